"""The picture of a run: its losses beside those of the newest record, as an SVG file written by hand.

The launcher draws it in a moment, without matplotlib; figures.py draws those of the records. The file is
ASCII, scales, and follows the reader's light or dark screen.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .logs import Point, Run, read_log

WIDTH, HEIGHT = 860, 420
TOP, BOTTOM = 96, 366  # of both panels
PANELS = ((64, 424), (476, 836))  # left and right edge of each
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
.page { fill: #fff } .frame { fill: none; stroke: #999 } .grid { stroke: #e4e4e4 }
.line { fill: none; stroke-width: 1.2; stroke-linejoin: round } .dot { stroke-width: 1.5 }
.run { stroke: #0969da } .record { stroke: #c4620a } .target { stroke: #333; stroke-dasharray: 6 4 }
.dot.run { fill: #0969da } .dot.record { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #ccc } .page { fill: #0d1117 } .frame { stroke: #666 } .grid { stroke: #2a3038 }
  .run { stroke: #58a6ff } .record { stroke: #f0a050 } .target { stroke: #ccc }
  .dot.run { fill: #58a6ff } .dot.record { fill: #0d1117 }
}
"""


class Curves(NamedTuple):
    """What a run or a record shows."""

    style: str  # a class of STYLE
    name: str
    run: Run


class Axis(NamedTuple):
    """A value at `low` lies at `start`, one at `high` at `end` (in pixels)."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers from `low` to `high`, evenly spaced by 1, 2 or 5 times a power of 10."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def label(value: float, all_values: Sequence[float]) -> str:
    """With as many digits as the distance of the ticks needs."""
    step = all_values[1] - all_values[0] if len(all_values) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}"


def newest_record(root: Path, track: str) -> Path | None:
    """The record of a track whose first run is the newest; None where there is no record."""
    runs = sorted((root / track).glob("*/runs/*.jsonl"))
    first = {path.parent.parent: path.name for path in reversed(runs)}
    return max(first, key=first.__getitem__, default=None)


def median_run(folder: Path) -> Run:
    """The run of a record with the median training time; ValueError for a record without a finished run."""
    runs = [read_log(path) for path in sorted((folder / "runs").glob("*.jsonl"))]
    finished = sorted((run for run in runs if run.final), key=lambda run: run.final["train_time_s"])
    if not finished:
        raise ValueError(f"{folder} holds no finished run")
    return finished[len(finished) // 2]


def title(folder: Path) -> str:
    """The first line of the record's page."""
    page = folder / "README.md"
    lines = page.read_text(encoding="utf-8").strip().splitlines() if page.is_file() else []
    words = lines[0].lstrip("# ") if lines else folder.name
    return textwrap.shorten(words, 70, placeholder=" ...")


def loss_axis(curves: Sequence[Curves], target: float) -> Axis:
    """From below everything up to where the curves are after a fifth of their way: the steep beginning
    would flatten the rest."""
    lowest, highest = target, target
    for one in curves:
        losses = [p.loss for p in one.run.train + one.run.val]
        later = [p.loss for p in one.run.train[len(one.run.train) // 20 :]] or losses
        lowest, highest = min([lowest, *losses]), max([highest, *later])
    room = 0.05 * (highest - lowest) or 0.5
    return Axis(lowest - room, highest + room, BOTTOM, TOP)


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' * bool(style)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def dot(x: float, y: float, style: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="dot {style}"/>'


def legend(curves: Sequence[Curves], target: float) -> Iterator[str]:
    """What lines and dots are, and a row for each run."""
    right = PANELS[1][1]
    yield text(right, 26, f"line: training, dot: validation, dashed: target {target:g}", "end")
    for row, one in enumerate(curves):
        y = 50 + 18 * row
        yield line(64, y - 4, 88, y - 4, f"line {one.style}")
        yield dot(100, y - 4, one.style)
        yield text(112, y, one.name)


def frame(x: Axis, y: Axis, words: str) -> Iterator[str]:
    """Grid, ticks with their numbers, and what the horizontal axis is."""
    upright, level = ticks(x.low, x.high, 6), ticks(y.low, y.high, 7)
    for value in upright:
        yield line(x.place(value), TOP, x.place(value), BOTTOM, "grid")
        yield text(x.place(value), BOTTOM + 18, label(value, upright), "middle")
    for value in level:
        yield line(x.start, y.place(value), x.end, y.place(value), "grid")
        yield text(x.start - 8, y.place(value) + 4, label(value, level), "end")
    yield f'<rect x="{x.start}" y="{TOP}" width="{x.end - x.start}" height="{BOTTOM - TOP}" class="frame"/>'
    yield text((x.start + x.end) / 2, BOTTOM + 40, words, "middle")


def panel(
    number: int, curves: Sequence[Curves], y: Axis, target: float, words: str, at: Callable[[Point], float]
) -> Iterator[str]:
    """Losses against what `at` says of a point."""
    start, end = PANELS[number]
    furthest = max((at(p) for one in curves for p in one.run.train + one.run.val), default=0.0)
    x = Axis(0.0, furthest or 1.0, start, end)
    yield from frame(x, y, words)
    yield f'<clipPath id="panel{number}"><rect x="{start}" y="{TOP}" width="{end - start}" '
    yield f'height="{BOTTOM - TOP}"/></clipPath><g clip-path="url(#panel{number})">'
    for one in reversed(curves):  # the run lies above the record
        places = " ".join(f"{x.place(at(p)):.1f},{y.place(p.loss):.1f}" for p in one.run.train)
        yield f'<polyline points="{places}" class="line {one.style}"/>'
    yield "</g>"
    yield line(start, y.place(target), end, y.place(target), "target")
    for one in reversed(curves):
        yield from (dot(x.place(at(p)), y.place(p.loss), one.style) for p in one.run.val if p.loss <= y.high)


def machine(run: Run) -> str:
    """How many of which device."""
    device = run.header.get("device", "")
    return f"{run.header['world_size']} x {device}" if device else ""


def name(kind: str, run: Run) -> str:
    """One line of the legend."""
    final = run.final or {}
    loss = f"loss {final['val_loss']:.4f} in {final['train_time_s']:.2f} s" if final else "not finished"
    return f"{kind}: {loss}, {machine(run)}"


def svg(run: Run, record: Path | None = None) -> str:
    """The picture of a run, beside the median run of a record."""
    target = float(run.settings["evaluation"]["target"])
    curves = [Curves("run", name("this run", run), run)]
    if record is not None:
        best = median_run(record)
        curves.append(Curves("record", name(f"record, {title(record)}", best), best))
    y = loss_axis(curves, target)
    millions = max((p.tokens for one in curves for p in one.run.val + one.run.train), default=0) >= 1e6
    unit = 1e6 if millions else 1e3
    words = f"training tokens ({'millions' if millions else 'thousands'})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">',
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" class="page"/>',
        text(64, 26, f"track {run.header['track']}: loss in nats per token", style="title"),
        *legend(curves, target),
        *panel(0, curves, y, target, words, lambda p: p.tokens / unit),
        *panel(1, curves, y, target, "training time (s)", lambda p: p.seconds),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def draw(log: Path, records: Path) -> Path:
    """Write the picture of a log beside it; its path. ValueError or OSError where that cannot be done."""
    run = read_log(log)
    out = log.with_suffix(".svg")
    partial = out.with_suffix(".partial")
    drawn = svg(run, newest_record(records, run.header["track"]))
    partial.write_bytes(drawn.encode("ascii", "xmlcharrefreplace"))
    partial.replace(out)
    return out
