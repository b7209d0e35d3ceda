"""What a dry run expects of a real one, kept in a file, and the table that sets both beside each other."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import cards

KEPT = Path(__file__).resolve().parents[1] / "expected.json"
AGREES, FEW = 0.15, 0.05  # share by which a measured peak, and launches, may differ from those counted


def key(gpu: str, gpus: int, words: Sequence[str]) -> str:
    """What a run is called in the file: "1 x h100 --track short"."""
    return " ".join([f"{gpus} x {gpu}", *words])


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of all that a dry run has counted (its --json): of the last run, that with graphs."""
    run, passes = found["runs"][-1], {}
    for kind, counts in run["passes"].items():
        of_pass = {name: sum(amount for _, what, amount in counts if what == name)
                   for name in ("launches", "bytes of kernels")}  # fmt: skip
        steps = [step for step in run["steps"] if step["kind"] == kind]
        updates = sum(step["update_launches"] for step in steps) / len(steps)
        passes[kind] = {"passes": steps[0]["passes"], **of_pass, "launches of an update": updates}
    return {
        "source": found["source"],
        "torch": found["torch"],
        "peak_bytes": max(run["peaks"].values()),
        "graphs": run["graphs"].get("graphs", 0),
        "floors_s": {kind: sum(floor.values()) - floor["between"] for kind, floor in run["floors_s"].items()},
        "passes": passes,
    }


def keep(name: str, found: dict[str, Any], path: Path) -> None:
    """Add the summary of a dry run to the file, or put it in the place of an older one."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = summary(found)
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def card_of(title: str) -> str:
    """The name under which a dry run knows a device; "" for none."""
    words = re.split(r"[\s-]+", title.lower())
    return next((name for name in cards.CARDS if name in words), "")


def kernels_in_trace(path: Path, steps: int = 3) -> dict[str, float]:
    """Launches of Triton kernels in a step and their seconds, by a trace of so many steps."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        events = json.load(file)["traceEvents"]
    times = [x["dur"] for x in events if x.get("cat") == "kernel" and x["name"].startswith("triton_")]
    return {"launches": len(times) / steps, "seconds": sum(times) / 1e6 / steps}


def step_seconds(lines: Sequence[dict[str, Any]], kinds: Sequence[str]) -> dict[str, float]:
    """Mean seconds of a step of each kind, by a log with every step; `kinds` has that of each.

    The first two steps of the run do not count.
    """
    clocks = [line["train_time_s"] for line in lines if line["event"] == "step"]
    found: dict[str, list[float]] = {}
    for number in range(2, len(clocks)):
        found.setdefault(kinds[number], []).append(clocks[number] - clocks[number - 1])
    return {kind: sum(times) / len(times) for kind, times in found.items()}


def beside(name: str, expected: float, measured: float | None, within: float | None = None) -> str:
    """A row of the table. `within`: the share by which both may differ; None: the ratio says enough."""
    if measured is None:
        return f"| {name} | {expected:,.1f} | not measured | |"
    ratio = measured / expected if expected else float(measured == expected)
    word = "" if within is None else "as expected" if abs(ratio - 1) <= within else "DIFFERS"
    return f"| {name} | {expected:,.1f} | {measured:,.1f} | {ratio:.2f} {word}".rstrip() + " |"


def table(expected: dict[str, Any], measured: dict[str, Any]) -> str:
    """Expected beside measured, of which any may be missing.

    `measured`: peak_bytes, graphs, compiles, step_s by kind; of a profile kind, kernels, bytes_per_s.
    """
    lines = ["| | expected | measured | measured / expected |", "| --- | --- | --- | --- |"]
    peak = measured.get("peak_bytes")
    lines.append(beside("peak memory, GB", expected["peak_bytes"] / 1e9, peak and peak / 1e9, AGREES))
    lines.append(beside("graphs", expected["graphs"], measured.get("graphs"), 0.0))
    lines.append(beside("graphs made inside the clock", 0, measured.get("compiles"), 0.0))
    steps = measured.get("step_s", {})
    for kind, floor in expected["floors_s"].items():
        if kind in steps:
            lines.append(beside(f"step of {kind}, ms (expected: its floor)", 1e3 * floor, 1e3 * steps[kind]))
    kernels, kind = measured.get("kernels"), measured.get("kind", list(expected["passes"])[-1])
    step = expected["passes"][kind]
    launches = step["passes"] * step["launches"] + step["launches of an update"]
    launched, seconds = (kernels["launches"], kernels["seconds"]) if kernels else (None, None)
    lines.append(beside(f"launches of Triton kernels in a step of {kind}", launches, launched, FEW))
    moved = step["passes"] * step["bytes of kernels"] / 1e9
    at_rate = None if seconds is None else seconds * measured["bytes_per_s"] / 1e9
    lines.append(beside("bytes of the passes' kernels, GB (measured: as in a copy)", moved, at_rate))
    return "\n".join(lines)
