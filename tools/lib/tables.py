"""Claims in words and the generated tables of the README files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .claims import record_folders
from .logs import differing, flat, read_log, text_of


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chance(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def claim(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    loss = result["val_loss"]
    lines = [
        f"{result['name']}: {loss['n']} runs of {result['steps']} steps, {result['tokens']:,} tokens: mean validation loss "
        f"{loss['mean']:.4f}, sd {number(loss['sd'])}, margin {result['margin']:.4f} below {result['target']}, "
        f"p {chance(result['p'])} ({result['rule']}): " + ("target reached" if result["reaches_target"] else "not shown")
    ]
    for device, seconds in result["train_time_s"].items():
        lines.append(f"  training time on {result['world_size']} x {device}: median {seconds['median']:.2f} s, "
                     f"mean {seconds['mean']:.2f}, sd {number(seconds['sd'], 2)}, n {seconds['n']}")  # fmt: skip
    for ab in result["beats"]:
        loss = ab["loss"]
        lines.append(f"  time over {ab['baseline']}: {ab['ratio']:.4f}, 95% interval {ab['low']:.4f} to {number(ab['high'])}, "
                     f"one-sided p {chance(ab['p'])} ({ab['rule']}, {ab['pairs']} pairs, {ab['discarded']} discarded): "
                     + ("faster" if ab["faster"] else "not shown to be faster"))  # fmt: skip
        steps = ab["steps_equivalent"]
        worth = "" if steps is None else f", worth {steps:+.1f} steps at the end of the baseline"
        lines.append(f"  loss minus the baseline's: {loss['difference']:+.4f}, 95% interval {number(loss['low'])} to "
                     f"{number(loss['high'])}, Welch p {chance(loss['p'])}{worth}")  # fmt: skip
    return "\n".join(lines)


def optimizer_of(settings: dict[str, Any]) -> str:
    """What updates the matrices, in a few words."""
    m = settings.get("matrix", {})
    if m.get("kind") == "adam":
        return "AdamW"
    words = ["Muon" if m.get("equilibrate", "none") == "none" else f"MuonEq-{m['equilibrate']}"]
    return " + ".join(words + ["NorMuon"] * bool(m.get("normuon"))) + f", {m.get('orthogonalize', '?')} {m.get('steps', '?')}"


def title(folder: Path) -> str:
    """The first line of the record's README.md."""
    path = folder / "README.md"
    lines = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []
    return lines[0].lstrip("# ").replace("|", "/") if lines else folder.name


def history(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The time records of a track, oldest first: each was timed against the one before it; the first was only timed against."""
    named = {result["name"]: result for result in results}

    def rank(name: str) -> int:
        return 1 + max((rank(ab["baseline"]) for ab in named[name]["beats"] if ab["baseline"] in named), default=-1)

    beaten = {ab["baseline"] for result in results for ab in result["beats"]}
    chain = [result for result in results if result["beats"] or result["name"] in beaten or len(results) == 1]
    return sorted(chain, key=lambda result: (rank(result["name"]), result["first_run"]))


def seconds_of(result: dict[str, Any]) -> str:
    world_size, devices = result["world_size"], result["train_time_s"]
    return ", ".join(f"{seconds['median']:.1f} s on {world_size} x {device}" for device, seconds in devices.items())


def loss_of(result: dict[str, Any]) -> str:
    return f"{result['val_loss']['mean']:.4f}, {result['val_loss']['n']}, {chance(result['p'])}"


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a record, which all its runs share."""
    return read_log(min((folder / "runs").glob("*.jsonl"))).header["settings"]


def link(folder: Path, beside: Path) -> str:
    return f"[{title(folder)}]({os.path.relpath(folder, beside)})"


def history_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    lines = [f"Track `{track}`, target {results[0]['target']} nats per token:", ""]
    lines += ["| # | record | steps | tokens | validation loss: mean, n, p | training time, median | time over the one before: "
              "ratio, 95% interval, pairs, p |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for place, r in enumerate(history(results), 1):
        over = "; ".join(f"{ab['ratio']:.3f}, {ab['low']:.3f} to {number(ab['high'], 3)}, {ab['pairs']}, {chance(ab['p'])}"
                         for ab in r["beats"])  # fmt: skip
        lines.append(f"| {place} | {link(root / track / r['name'], beside)} | {r['steps']:,} | {r['tokens']:,} "
                     f"| {loss_of(r)} | {seconds_of(r)} | {over or '-'} |")  # fmt: skip
    return lines


def steps_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    """Fewest steps to the target, separately for each model and data (batch included); any optimizer."""
    groups: dict[str, list] = {}
    for r in results:
        settings = settings_of(root / track / r["name"])
        data = {key: value for key, value in settings["data"].items() if key != "epochs"}
        schedule = settings["schedule"]  # windows: before there were stages of (begin, windows, batch, ...)
        stages = schedule["windows"] if "windows" in schedule else [stage[:3] for stage in schedule["stages"]]
        key = json.dumps([settings["model"], data, stages], sort_keys=True)
        groups.setdefault(key, []).append((r["steps"], r["val_loss"]["mean"], r, settings))
    lines = []
    for members in sorted(groups.values(), key=lambda members: min(m[:2] for m in members)):
        model = members[0][3]["model"]
        first = min((m[2] for m in members), key=lambda r: r["first_run"])
        lines += ["", f"Track `{track}`, model and batch of {first['name']} ({model['layers']} blocks x {model['width']}, "
                  f"{first['tokens'] / first['steps']:,.0f} tokens in a step):", ""]  # fmt: skip
        lines += ["| rank | record | optimizer of the matrices | steps | validation loss: mean, n, p |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for place, (steps, _, r, settings) in enumerate(sorted(members, key=lambda m: m[:2]), 1):
            where = link(root / track / r["name"], beside)
            lines.append(f"| {place} | {where} | {optimizer_of(settings)} | {steps:,} | {loss_of(r)} |")
    return lines[1:]


def tried_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    """Single runs in <track>/tried/: how each differs from the record that is nearest, and what it reached. No times."""
    paths = sorted((root / track / "tried").glob("*.jsonl"))
    records = {place: flat(settings_of(root / track / r["name"])) for place, r in enumerate(history(results), 1)}
    shown_elsewhere = {"evaluation.every", "evaluation.log_every", "schedule.steps"}
    lines = [f"Track `{track}`, each run beside the record that it has most settings in common with (its number above):", ""]
    lines += ["| run | steps | tokens | validation loss, one seed | record | differs in |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for path in paths:
        run = read_log(path)
        settings, final = flat(run.header["settings"]), run.final or {}
        keys = {place: [*differing(base, settings)] for place, base in records.items()}
        place = min(keys, key=lambda place: (len(keys[place]), -place))
        what = ", ".join(f"`{key} {text_of(settings.get(key))}`" for key in keys[place] if key not in shown_elsewhere)
        lines.append(f"| {path.stem} | {final.get('step', 0):,} | {final.get('tokens', 0):,} | {number(final.get('val_loss'))} "
                     f"| {place} | {what or '-'} |")  # fmt: skip
    return lines if paths else []


TABLES: dict[str, Callable] = {"records": history_table, "steps": steps_table, "tried": tried_table}


def with_tables(text: str, root: Path, beside: Path) -> str:
    """A markdown text with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    proven: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder / "result.json" for folder in record_folders(root)):
        if path.is_file() and (result := json.loads(path.read_text()))["reaches_target"]:
            proven.setdefault(path.parents[1].name, []).append(result)
    for name, make in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text.partition(begin)[2]:
            continue
        lines: list[str] = []
        for track, results in proven.items():
            lines += ["", *make(track, results, root, beside)]
        head, _, rest = text.partition(begin)
        text = head + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]
    return text
