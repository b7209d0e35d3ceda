"""Run logs: ours (JSON lines, see train_gpt.py) and those of the public speedrun, read into the
same `Run`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .names import present_settings


class Point(NamedTuple):
    step: int
    loss: float  # nats per token; of one step for training, of the validation tokens for validation
    seconds: float  # training time so far
    tokens: int | None  # training tokens so far; public logs do not say


@dataclass(frozen=True)
class Run:
    """One log. `header` and `final` are its events as they stand there; `val` and `train` are the curves."""

    path: Path
    header: dict[str, Any]
    final: dict[str, Any] | None
    val: list[Point] = field(repr=False)
    train: list[Point] = field(repr=False)
    resumed: bool = False
    plan: dict[str, Any] | None = None  # which of how many: see `plan_of`

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of the header, under the names of today."""
        return present_settings(self.header["settings"])


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"rows": 2}} -> {"data.rows": 2}"""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def text_of(value: Any) -> str:
    """A setting as the command line of train_gpt.py reads it: lists of a log are tuples there."""
    if isinstance(value, list):
        return "(" + "".join(f"{text_of(v)}," for v in value) + ")"
    return str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# what a claim is computed from; a log in which one of these is missing or of another kind proves nothing
HEADER = {"run_id": str, "track": str, "settings": dict, "source_sha256": str, "torch": str,
          "world_size": int, "seed": int}  # fmt: skip
FINAL = ("step", "val_loss", "val_tokens", "train_time_s", "tokens", "target", "compiles_in_timed_region")


def plan_of(index: int, planned: int | None, beside: str | None) -> dict[str, Any]:
    """The event that `record.py` puts after the header of a run, so that each log of a record says what the
    others must be.

    index: the run's place among all that were begun for this record, from 1 on. planned: how many were to
    count in the end, None where the results decide. beside: the record that the run was timed against.
    """
    return {"event": "plan", "index": index, "planned": planned, "beside": beside}


def is_plan(event: dict[str, Any]) -> bool:
    index, planned, beside = (event.get(name, "") for name in ("index", "planned", "beside"))
    whole = type(index) is int and (planned is None or type(planned) is int)
    return whole and (beside is None or isinstance(beside, str) and bool(beside))


def read_log(path: Path) -> Run:
    """One of our logs. ValueError naming the file and what is wrong with it when it is not such a log."""
    events = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError
            events.append(event)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: line {len(events) + 1} is not an event in JSON") from None
    if not events or events[0]["event"] != "header":
        raise ValueError(f"{path}: event: the first line is not a header")
    header, final = events[0], events[-1] if events[-1]["event"] == "final" else None
    for name, kind in HEADER.items():
        if not isinstance(header.get(name), kind) or isinstance(header[name], bool):
            raise ValueError(f"{path}: header.{name} is missing or not a {kind.__name__}")
    for name in FINAL if final else ():
        if not is_number(final.get(name)):
            raise ValueError(f"{path}: final.{name} is missing or not a number")

    def curve(kind: str, loss: str) -> list[Point]:
        try:
            chosen = [e for e in events if e["event"] == kind and e[loss] is not None]
            return [
                Point(int(e["step"]), float(e[loss]), float(e["train_time_s"]), e["tokens"]) for e in chosen
            ]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: a {kind} event lacks step, {loss}, train_time_s or tokens") from None

    resumed = any(e["event"] == "resume" for e in events)
    plan = next((e for e in events if e["event"] == "plan"), None)
    if plan and not is_plan(plan):
        raise ValueError(f"{path}: the plan event lacks index, planned or beside")
    return Run(path, header, final, curve("val", "val_loss"), curve("step", "train_loss"), resumed, plan)


def different_settings(a: Run, b: Run) -> list[str]:
    """Dotted names of the settings in which two runs differ."""
    return differing(flat(a.settings), flat(b.settings))


SEPARATOR = re.compile(r"^={100}\s*$", re.MULTILINE)
RESULT = re.compile(
    r"^step:(\d+)/(\d+) val_loss:([\d.]+|nan|inf) train_time:([\d.]+)(ms|s) step_avg:[\d.]+ms",
    re.MULTILINE | re.IGNORECASE,
)


def read_public_log(path: Path) -> Run:
    """A log of the public speedrun: source, a line of 100 `=`, environment, again `=`, then the results.

    The oldest ones have a line of `=` before the source as well. Results count only after the
    environment, so that a source that prints or documents such lines is not taken for its own result.
    ValueError when there are none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = SEPARATOR.split(text)
    source = 1 if not parts[0].strip() else 0
    results = [match.groups() for part in parts[source + 2 :] for match in RESULT.finditer(part)]
    if not results:
        raise ValueError(
            f"{path}: no line `step:i/N val_loss:x train_time:yms step_avg:zms` after two lines of 100 `=`"
        )
    code, environment = parts[source].strip(), "\n".join(parts[source + 1 :])
    torch = re.search(r"pytorch (?:version )?(\S+)", environment, re.IGNORECASE)
    world_size = re.search(r"world_size=(\d+)", environment)
    cards = {m for m in re.findall(r"^\|\s+(\d+)\s+NVIDIA ", environment, re.MULTILINE)}
    device = re.search(r"device_name=(.+?) with|\|\s+\d+\s+(NVIDIA [^|]*?)\s+(?:On|Off)\s", environment)
    val = [
        Point(int(step), float(loss), float(time) / (1000 if unit.lower() == "ms" else 1), None)
        for step, _, loss, time, unit in results
    ]
    header = {
        "run_id": path.stem, "source_sha256": hashlib.sha256(code.encode()).hexdigest(),
        "steps": int(results[-1][1]), "torch": torch.group(1) if torch else "",
        "world_size": int(world_size.group(1)) if world_size else len(cards),
        "device": next(filter(None, device.groups()), "") if device else "",
    }  # fmt: skip
    last = val[-1]
    return Run(
        path, header, {"step": last.step, "val_loss": last.loss, "train_time_s": last.seconds}, val, []
    )


def public_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The public logs in a folder and below it, and a sentence for each text file that is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".log") and path.is_file())
    runs, refused = [], []
    for path in paths:
        try:
            runs.append(read_public_log(path))
        except ValueError as error:
            refused.append(str(error))
    return runs, refused


def any_runs(path: Path) -> list[Run]:
    """Runs for a figure: a log, a record folder, a folder of logs, or a folder of public logs.

    ValueError for none.
    """
    if path.is_file():
        return [read_log(path) if path.suffix == ".jsonl" else read_public_log(path)]
    folder = path / "runs" if (path / "runs").is_dir() else path
    # beside the logs may lie those of tools/monitor.py
    logs = [log for log in sorted(folder.glob("*.jsonl")) if not log.name.endswith(".monitor.jsonl")]
    runs = [read_log(log) for log in logs] or public_runs(path)[0]
    finished = [run for run in runs if run.final]
    if not finished:
        raise ValueError(f"{path} holds no finished run")
    return finished
