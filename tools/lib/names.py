"""Settings that had other names in the scripts and logs of November 2026.

Logs, tables and scripts of that time stay as they are; what compares them with newer ones uses the names of
today. `value` holds the settings of the tables, `hidden` those of two sections at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# "section" or "section.field" as it was -> as it is, in each place where it went
FORMER = {
    "value": ["tables"],
    "hidden": ["matrix_adam", "gate_adam"],
    "model.frozen": ["model.attention_source"],
    "matrix.lr_mul": ["matrix.mlp_lr_mul"],
    "matrix.steps": ["matrix.iterations"],
    "gate.steps": ["gate.iterations"],
    "gate.lr_mul": [],  # a factor beside gate.lr, never used
}


def present(name: str) -> list[str]:
    """What a setting "section.field" is called today; [] when it is gone."""
    section, _, field = name.partition(".")
    if section in FORMER:
        return [f"{now}.{field}" for now in FORMER[section]]
    return FORMER.get(name, [name])


def present_settings(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of a log's header, {section: {field: value}}, under the names of today."""
    result: dict[str, dict[str, Any]] = {}
    for section, fields in settings.items():
        for field, value in fields.items():
            for name in present(f"{section}.{field}"):
                now, _, rest = name.partition(".")
                result.setdefault(now, {})[rest] = value
    return result


def former(name: str) -> str:
    """What a setting "section.field" of today was called in November 2026."""
    section, _, field = name.partition(".")
    for before, now in FORMER.items():
        if section in now:
            return f"{before}.{field}"
        if name in now:
            return before
    return name


def knows(script: Path, option: str) -> bool:
    """Whether a script has this option beside those of its track."""
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    return bool(re.search(rf"^    {option}: .*= field\(", text, re.MULTILINE))


def words_for(script: Path, words: Sequence[str]) -> list[str]:
    """Options in the names of today, "--section.field value" each, as this script knows them.

    Where two of them were one setting, the first one counts.
    """
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    if not re.search(r"^    hidden: Adam\b", text, re.MULTILINE):
        return list(words)
    result: list[str] = []
    origin: dict[str, str] = {}  # of each former option
    for option, value in zip(words[::2], words[1::2], strict=True):
        before = f"--{former(option.removeprefix('--'))}"
        if origin.setdefault(before, option) == option:
            result += [before, value]
    return result
