"""Run logs: ours (JSON lines, see train_gpt.py) and those of the public speedrun, read into the
same `Run`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
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
        return "(" + "".join(f"{v!r}," if isinstance(v, str) else f"{text_of(v)}," for v in value) + ")"
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
        for line in path.read_text(encoding="utf-8-sig").splitlines():
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
    if final and not 0 < final["train_time_s"] < math.inf:
        raise ValueError(f"{path}: final.train_time_s is {final['train_time_s']}, no time that a run takes")

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
NUMBER = r"[-+]?[\d.]+(?:e[-+]?\d+)?|nan|inf"
RESULT = re.compile(
    rf"^step:(\d+)/(\d+) val_loss:({NUMBER})(?: \w+:(?:{NUMBER}))* "
    r"train_time:([\d.]+)(ms|s) step_avg:(?:[\d.]+|nan)ms",
    re.MULTILINE | re.IGNORECASE,
)
# of llm.c: validation and training loss of a step, without times
OLD_RESULT = re.compile(rf"^s:(\d+) (tel|trl):({NUMBER})\b", re.MULTILINE | re.IGNORECASE)
PYTHON = re.compile(r"^[ \t]*(?:import \w|from \S+ import |def \w|class \w|print0?\()", re.MULTILINE)


def decoded(content: bytes) -> str:
    """Text as a file opened for reading gives it, whatever its line ends and its first bytes are."""
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def read_public_log(path: Path) -> list[Run]:
    """The runs of a log of the public speedrun; ValueError naming the file and why it is none."""
    try:
        return parse_public_log(path, decoded(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def parse_public_log(path: Path, text: str) -> list[Run]:
    """The text of a log of the public speedrun: source, a line of 100 `=`, environment, again `=`, results.

    The oldest ones with a source have a line of `=` before it as well. Some lack the environment and its
    line, some the source too, which leaves the program's output; those of llm.c have no times either.
    Results count only after the environment or, where there is none, after the source, so that a source
    that prints or documents such lines is not taken for its own result. Where the steps begin anew, another
    run begins. ValueError when there is no run that was evaluated after a step.
    """
    parts = SEPARATOR.split(text)
    parts = parts[1:] if len(parts) > 1 and not parts[0].strip() else parts
    results = [match.groups() for part in parts[2:] for match in RESULT.finditer(part)]
    if len(parts) < 3:
        results = shorter_form(path, parts)
    elif not results:
        wanted = "no line `step:i/N val_loss:x train_time:yms step_avg:zms` after two lines of 100 `=`"
        raise ValueError(f"{path}: {wanted}")
    seconds = [
        math.nan if unit is None else float(time) / (1000 if unit.lower() == "ms" else 1)
        for _, _, _, time, unit in results
    ]
    val = [Point(int(row[0]), float(row[2]), time, None) for row, time in zip(results, seconds)]
    code = parts[0].strip() if len(parts) > 1 else ""
    environment = "\n".join(parts[1:] if len(parts) > 1 else parts)
    torch = re.search(r"pytorch (?:version )?(\S+)|^torch[ =]+(\d\S+)", environment, re.I | re.M)
    world_size = re.search(r"world_size=(\d+)", environment)
    cards = {m for m in re.findall(r"^\|\s+(\d+)\s+NVIDIA ", environment, re.MULTILINE)}
    device = re.search(r"device_name=(.+?) with|\|\s+\d+\s+(NVIDIA [^|]*?)\s+(?:On|Off)\s", environment)
    header = {
        "source_sha256": hashlib.sha256(code.encode()).hexdigest() if code else "",
        "steps": int(results[-1][1]), "torch": next(filter(None, torch.groups())) if torch else "",
        "world_size": int(world_size.group(1)) if world_size else len(cards),
        "device": next(filter(None, device.groups()), "") if device else "",
    }  # fmt: skip
    begins = [0, *(i for i in range(1, len(val)) if val[i].step <= val[i - 1].step), len(val)]
    curves = [val[begin:end] for begin, end in zip(begins, begins[1:])]
    curves = [curve for curve in curves if curve[-1].step > 0 and math.isfinite(curve[-1].loss)]
    if not curves:
        last = val[-1]
        why = f"the last validation loss is {last.loss}" if last.step else "no validation after step 0"
        raise ValueError(f"{path}: {why}")
    runs = []
    for number, curve in enumerate(curves, 1):
        last, name = curve[-1], path.stem if len(curves) == 1 else f"{path.stem}#{number}"
        time = None if math.isnan(last.seconds) else last.seconds
        final = {"step": last.step, "val_loss": last.loss, "train_time_s": time}
        runs.append(Run(path, {"run_id": name, **header}, final, curve, []))
    return runs


def shorter_form(path: Path, parts: list[str]) -> list[tuple]:
    """The results (groups of RESULT) of a log with one line of `=` after its source, or with none."""
    results: list[tuple] = [match.groups() for match in RESULT.finditer(parts[-1])]
    old = [m.groups() for m in OLD_RESULT.finditer(parts[-1]) if m[2].lower() == "tel"]
    if not results and old and len(parts) == 1:
        results = [(step, old[-1][0], loss, None, None) for step, _, loss in old]
    if not results:
        raise ValueError(f"{path}: no line of a validation, `step:i/N val_loss:x ...` or `s:i tel:x`")
    source = bool(PYTHON.search(parts[0]))
    if source != (len(parts) == 2):
        raise ValueError(f"{path}: no line of 100 `=` between a source and its results")
    if len(results) == 1:
        raise ValueError(f"{path}: no line of a validation but one: a note, or a run that broke off")
    return results


def points_of(run: Run) -> list[tuple]:
    return [(p.step, p.loss, None if math.isnan(p.seconds) else p.seconds) for p in run.val]


def without_mirrors(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Public runs without those that are there already, and a sentence for each of these.

    A log is the mirror of another when all its validations (steps, losses and times) are also in the other
    one. The fuller log stays; of equal ones the one with a source, and then the first by name.
    """

    def place(run: Run) -> tuple[str, str]:
        return str(run.path), run.header["run_id"]

    def rank(run: Run) -> tuple:
        return -len(run.val), not run.header["source_sha256"], *place(run)

    holding: dict[tuple, list[tuple[Run, set]]] = {}
    kept, refused = [], []
    for run in sorted(runs, key=rank):
        points = points_of(run)
        fuller = (other for other, held in holding.get(points[-1], ()) if held.issuperset(points))
        if other := next(fuller, None):
            where = f"{run.path.parent / run.header['run_id']}{run.path.suffix}"
            refused.append(f"{where}: the same losses and times as in {other.path}: one run, counted once")
            continue
        kept.append(run)
        entry = (run, set(points))
        for point in points:
            holding.setdefault(point, []).append(entry)
    return sorted(kept, key=place), sorted(refused)


def is_public_name(path: Path) -> bool:
    return path.suffix in (".txt", ".log")


def public_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The public logs in a folder and below it, each run once, and a sentence for each other text file."""
    runs, refused = [], []
    for path in sorted(path for path in folder.rglob("*") if is_public_name(path) and path.is_file()):
        try:
            runs += read_public_log(path)
        except ValueError as error:
            refused.append(str(error))
    runs, mirrors = without_mirrors(runs)
    return runs, refused + mirrors


def any_runs(path: Path) -> list[Run]:
    """Runs for a figure: a log, a record folder, a folder of logs, or a folder of public logs.

    ValueError for none.
    """
    if path.is_file():
        return [read_log(path)] if path.suffix == ".jsonl" else read_public_log(path)
    folder = path / "runs" if (path / "runs").is_dir() else path
    # beside the logs may lie those of tools/monitor.py
    logs = [log for log in sorted(folder.glob("*.jsonl")) if not log.name.endswith(".monitor.jsonl")]
    runs = [read_log(log) for log in logs] or public_runs(path)[0]
    finished = [run for run in runs if run.final]
    if not finished:
        raise ValueError(f"{path} holds no finished run")
    return finished
