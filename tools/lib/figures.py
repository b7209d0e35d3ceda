"""PNG figures of runs: loss curves, leading steps, the history of a track's records, comparisons."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .logs import Run, any_runs
from .tables import title

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

SIZE = 100  # dots per inch
AXES = {"tokens": "training tokens", "step": "steps", "seconds": "training time (s)"}
MILLION = 1e6


def name_of(path: Path) -> str:
    """A record's title, else the name of the log or folder."""
    path = path.resolve()
    if path.is_file():
        return path.stem
    folder = path.parent if path.name == "runs" else path
    return title(folder) if (folder / "runs").is_dir() else folder.name


def wrapped(text: str, width: int = 46) -> str:
    return "\n".join(textwrap.wrap(text, width))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, fewer at the beginning; (n,) -> (n,)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) + 1 - width, 0)
    return (total[1:] - total[first]) / (np.arange(len(values)) + 1 - first)


def mean_curve(runs: Sequence[Run], loss: str, span: int) -> dict[str, np.ndarray]:
    """The curve of a set of runs at the steps that all of them logged: loss and sd over runs, step,
    seconds, tokens.

    Each run is smoothed over the last `span` steps before the mean is taken. ValueError when there is no
    common step.
    """
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    curves = [{p.step: p for p in (run.val if loss == "val" else run.train)} for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        raise ValueError(f"{runs[0].path.parent}: the logs have no {loss} losses at common steps")
    # a window of `span` steps holds as many logged points as fit into it
    spacing = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    width = max(1, round(span / spacing))
    for curve in curves:
        points = [curve[step] for step in steps]
        columns["loss"].append(smooth(np.array([p.loss for p in points]), width))
        columns["seconds"].append(np.array([p.seconds for p in points]))
    tokens = [curves[0][step].tokens for step in steps]
    result = {name: np.mean(values, 0) for name, values in columns.items()}
    result["sd"] = np.std(columns["loss"], 0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    result["step"] = np.array(steps)
    if None not in tokens:
        result["tokens"] = np.array(tokens)
    return result


def save(figure: plt.Figure, out: Path) -> None:
    """All or nothing, and without the version of matplotlib, so that equal figures are equal files."""
    if out.suffix != ".png":
        raise ValueError(f"{out} does not end in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=SIZE, metadata={"Software": None})
    plt.close(figure)
    partial.replace(out)


def said(loss: str, span: int) -> str:
    smoothing = f"mean over {span} steps" if span > 1 else "not smoothed"
    return f"{'validation' if loss == 'val' else 'training'} loss, {smoothing}"


def show_end(axis: plt.Axes, losses: Sequence[np.ndarray], part: float) -> None:
    """Cuts off what lies above all curves after this part of them: the steep beginning would
    flatten the rest."""
    lowest, highest = min(loss.min() for loss in losses), max(loss[int(part * len(loss))] for loss in losses)
    if highest > lowest:
        axis.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))


def curves(paths: Sequence[Path], loss: str, span: int, out: Path) -> None:
    """Loss against tokens, steps and training time: mean over the runs of each path, band of one sd
    over seeds."""
    sets = {path: any_runs(path) for path in paths}
    found = {path: mean_curve(runs, loss, span) for path, runs in sets.items()}
    axes_wanted = [axis for axis in AXES if all(axis in curve for curve in found.values())]
    units = dict.fromkeys(axes_wanted, 1.0)
    if "tokens" in units and max(curve["tokens"].max() for curve in found.values()) >= MILLION:
        units["tokens"] = MILLION
    size = 5 * len(axes_wanted), 4.5 + 0.25 * -(-len(found) // 3)
    figure, axes = plt.subplots(
        1, len(axes_wanted), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for path, curve in found.items():
        for axis, x in zip(axes[0], axes_wanted):
            label = f"{name_of(path)} (n = {len(sets[path])})"
            at = curve[x] / units[x]
            (line,) = axis.plot(at, curve["loss"], label=label, marker="." if len(at) < 30 else None)
            band = curve["loss"] - curve["sd"], curve["loss"] + curve["sd"]
            axis.fill_between(at, *band, color=line.get_color(), alpha=0.2)
    for axis, x in zip(axes[0], axes_wanted):
        axis.set(xlabel=AXES[x] + (" (millions)" if units[x] == MILLION else ""))
        axis.grid(alpha=0.3)
    show_end(axes[0][0], [curve["loss"] for curve in found.values()], 0.2)
    axes[0][0].set_ylabel("nats per token")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(axes_wanted), fontsize=9, frameon=False
    )
    devices = sorted({run.header.get("device", "") for runs in sets.values() for run in runs} - {""})
    figure.suptitle(
        f"{said(loss, span).capitalize()}; band: one sd over seeds; {', '.join(devices)}", fontsize=10
    )
    save(figure, out)


def leading_steps(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(steps of A, further steps that B needs for A's loss there), where both curves have come that low.

    The step at which a curve comes to a loss for the first time, linear between logged steps; losses
    that A has seen before or B never reaches are left out.
    """

    def falling(curve: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        best = np.minimum.accumulate(curve["loss"])
        new = np.concatenate([[True], best[1:] < best[:-1]])
        return curve["step"][new], curve["loss"][new]

    (steps_a, losses_a), (steps_b, losses_b) = falling(a), falling(b)
    shared = (losses_a <= losses_b[0]) & (losses_a >= losses_b[-1])
    reached = np.interp(-losses_a[shared], -losses_b, steps_b)
    return steps_a[shared], reached - steps_a[shared]


def leading(a: Path, b: Path, loss: str, span: int, out: Path) -> None:
    """For each point of A's curve: how many more steps B needs to come as low, absolute and as a ratio."""
    runs = any_runs(a), any_runs(b)
    steps, lead = leading_steps(*(mean_curve(side, loss, span) for side in runs))
    # the first validation of a public log comes before the first step
    steps, lead = steps[steps > 0], lead[steps > 0]
    if not len(steps):
        raise ValueError(f"{a} and {b} have no loss in common")
    names = name_of(a), name_of(b)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    axes[0].plot(steps, lead, marker="." if len(steps) < 30 else None)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel(wrapped(f"further steps of {names[1]} to the same loss"))
    axes[1].plot(steps, (steps + lead) / steps, marker="." if len(steps) < 30 else None)
    axes[1].axhline(1, color="black", linewidth=0.8)
    axes[1].set_ylabel(wrapped(f"steps of {names[1]} over steps of {names[0]}"))
    for axis in axes:
        axis.set_xlabel(wrapped(f"steps of {names[0]}"))
        axis.grid(alpha=0.3)
    heading = f"How many steps {names[1]} needs to come as low as {names[0]}"
    figure.suptitle(f"{wrapped(heading, 90)}\n{said(loss, span)}, of {len(runs[0])} runs of {names[0]} "
                    f"and {len(runs[1])} of {names[1]}", fontsize=10)  # fmt: skip
    save(figure, out)


def history(results: Sequence[dict[str, Any]], titles: dict[str, str], out: Path) -> None:
    """Training time of a track's records, the first one on top: a bar for each, a colour for each machine."""
    rows = []
    for result in sorted(results, key=lambda result: result["first_run"]):
        for device, seconds in result["train_time_s"].items():
            name = wrapped(titles[result["name"]], 44)
            rows.append((f"{result['world_size']} x {device}", name, seconds["median"]))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    counts: dict[str, int] = defaultdict(int)  # of the records of a machine, which have numbers of their own
    labels = []
    for place, (device, name, seconds) in enumerate(rows):
        first = counts[device] == 0
        counts[device] += 1
        labels.append(f"{counts[device]}: {name}")
        colour = f"C{list(counts).index(device)}"
        axis.barh(place, seconds, color=colour, height=0.6, label=device if first else None)
        axis.annotate(f"{seconds:.1f} s", (seconds, place), (4, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="training time to the target (s), median", xscale="log")
    axis.set_xlim(min(seconds for *_, seconds in rows) / 2, 2 * max(seconds for *_, seconds in rows))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=9, loc="lower right")
    figure.suptitle(
        f"Records of the track {results[0]['track']}: time to {results[0]['target']} nats per token",
        fontsize=11,
    )
    save(figure, out)


def differences(found: dict[str, dict[str, Any]], out: Path, than: str = "the reference's") -> None:
    """Results of `stats.paired` by label: a dot each, lowest on top, with its interval where there is one.

    A filled dot has p (Holm) below 0.05. Where a linear axis would hide the small ones behind a large
    one, it is linear up to 0.01 nats and logarithmic beyond.
    """
    ordered = sorted(found.items(), key=lambda item: -item[1]["difference"])
    figure, axis = plt.subplots(figsize=(8, 1.8 + 0.3 * len(ordered)), layout="constrained")
    intervals = []
    for place, (_, ab) in enumerate(ordered):
        middle, known = ab["difference"], ab["p"] is not None
        low, high = (ab["low"], ab["high"]) if known else (middle, middle)
        filled = ab.get("holm") is not None and ab["holm"] < 0.05
        axis.errorbar([middle], [place], xerr=[[middle - low], [high - middle]] if known else None, fmt="o",
                      capsize=3, color="C0", markerfacecolor="C0" if filled else "white")  # fmt: skip
        intervals.append((low, high))
    axis.set_yticks(
        range(len(ordered)), [f"{label} (n = {ab['pairs']})" for label, ab in ordered], fontsize=9
    )
    axis.set_xlabel("nats per token")
    lowest, highest = min(low for low, _ in intervals), max(high for _, high in intervals)
    width = float(np.median([high - low for low, high in intervals]))
    if width < 0.03 * (highest - lowest):
        largest = max(-lowest, highest)
        sizes = [x for x in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if x <= largest] or [
            largest
        ]
        ticks = [x for x in (*(-x for x in reversed(sizes)), 0, *sizes) if lowest <= x <= highest or x == 0]
        axis.set_xscale("symlog", linthresh=0.01, linscale=1.2)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=90)
        axis.set_xticks([], minor=True)
    if lowest - (highest - lowest) <= 0 <= highest + (highest - lowest):
        axis.axvline(0, color="black", linewidth=0.8)
    figure.suptitle(
        f"Final validation loss minus {than}, 95% interval; filled: p (Holm) below 0.05", fontsize=10
    )
    axis.margins(y=0.6 / len(ordered))
    axis.grid(alpha=0.3)
    save(figure, out)


def grids(curves: Sequence[tuple[str, str, float | None, dict[float, list[float]]]], out: Path) -> None:
    """(option, label, best value, losses of the runs at each value; inf: diverged): mean and sd over the
    option, log scale.

    One panel for each option. A cross at the top marks a value at which a run diverged, a ring the best one.
    """
    options = list(dict.fromkeys(option for option, *_ in curves))
    figure, axes = plt.subplots(1, len(options), figsize=(1 + 5 * len(options), 4.5), squeeze=False)
    for axis, wanted in zip(axes[0], options):
        for _, label, best, losses in (curve for curve in curves if curve[0] == wanted):
            good = {x: y for x, y in losses.items() if y and np.isfinite(y).all()}
            sd = [np.std(y, ddof=1) if len(y) > 1 else 0.0 for y in good.values()]
            mean = {x: np.mean(y) for x, y in good.items()}
            (line, *_) = axis.errorbar(
                mean.keys(), mean.values(), yerr=sd, marker=".", capsize=3, label=label
            )
            bad = [x for x, y in losses.items() if y and x not in good]
            axis.plot(
                bad, [0.97] * len(bad), "x", color=line.get_color(), transform=axis.get_xaxis_transform()
            )
            if best in good:
                axis.plot([best], [mean[best]], "o", markersize=11, fillstyle="none", color=line.get_color())
        ticks = sorted({x for option, *_, losses in curves if option == wanted for x in losses})
        axis.set(xlabel=wanted, ylabel="final validation loss (nats per token)", xscale="log")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], rotation=45)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("Mean and sd over seeds; ring: the best value; cross: a run diverged", fontsize=10)
    figure.tight_layout()
    save(figure, out)


def training(
    curves: dict[str, dict[str, np.ndarray]], leads: dict[str, tuple[np.ndarray, np.ndarray]], out: Path
) -> None:
    """Left the curves of `mean_curve` by label, right the `leading_steps` of some of these labels
    over their references."""
    columns = -(-len(curves) // 26)  # of the legend
    figure, axes = plt.subplots(1, 2, figsize=(10 + 2.7 * columns, 5), layout="constrained")
    for place, (label, curve) in enumerate(curves.items()):
        look = {
            "color": f"C{place % 10}",
            "linestyle": ("-", "--", ":", "-.")[place // 10 % 4],
            "linewidth": 1.2,
        }
        axes[0].plot(curve["step"], curve["loss"], label=label, **look)
        if label in leads:
            axes[1].plot(*leads[label], **look)
    show_end(axes[0], [curve["loss"] for curve in curves.values()], 0.5)
    axes[0].set(xlabel="steps", ylabel="nats per token")
    axes[0].set_title("training loss, mean over a tenth of the steps", fontsize=10)
    axes[1].set(xlabel="steps of the variant", ylabel="steps")
    axes[1].set_title("further steps that the reference needs for the same loss", fontsize=10)
    axes[1].axhline(0, color="black", linewidth=0.8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, ncols=columns)
    save(figure, out)
