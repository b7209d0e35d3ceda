"""A comparison of variants: its table, its results, and the report that follows from both (see
compare.py)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import figures, stats
from .claims import write
from .logs import Point, Run, is_number
from .names import words_for
from .presets import PRESETS
from .tables import chance, number

VARIANT = {"preset": str, "options": list, "seeds": int, "finalist_seeds": int, "against": str, "why": str,
           "grid": dict}  # fmt: skip
TABLE = {"title": str, "track": str, "options": list, "seeds": int, "finalist_seeds": int, "first_seed": int,
         "variants": dict, "pairs": bool, "curves": bool}  # fmt: skip
HEADER = ("run_id", "source_sha256", "torch", "device", "world_size", "threads", "dtype")
SAME = ("source_sha256", "torch", "device", "world_size", "dtype")  # in all runs of a folder


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    against: str
    why: str
    track: str
    options: tuple[str, ...]
    own: str  # in the words of the table, without the options of all variants
    option: str  # of the grid, "" for none
    values: tuple[float | None, ...]
    seeds: range  # of every value
    further: range  # of the best value

    def command(self, value: float | None) -> list[str]:
        """The command line of a run but for its seed."""
        return ["--track", self.track, *self.options, *([self.option, str(value)] if self.option else [])]

    def judges(self) -> set[int]:
        """Seeds of the runs by which the variant is judged: after a choice only those that had no
        part in it."""
        return {*self.further} if self.option and self.further else {*self.seeds, *self.further}

    def screen(self) -> list[Job]:
        return [Job(self.name, value, seed) for seed in self.seeds for value in self.values]


class Job(NamedTuple):
    variant: str
    value: float | None  # of the grid
    seed: int


Results = dict[Job, dict[str, Any]]  # a line of results.jsonl for each finished run


def check(where: str, given: Any, kinds: dict[str, type]) -> None:
    """ValueError for what is not an object with these keys and kinds of values."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is not an object")
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool) and kinds[key] is not bool:
            raise ValueError(f"{where}: {key} is not of type {kinds[key].__name__}")
        if isinstance(value, int) and value < (key == "seeds"):
            raise ValueError(f"{where}: {key} cannot be {value}")
        if key == "options" and not all(isinstance(word, str) for word in value):
            raise ValueError(f"{where}: options are strings")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"one of the names {', '.join(key for key, _ in pairs)} is there twice")
    return dict(pairs)


def read_table(folder: Path) -> tuple[dict[str, Any], list[Variant]]:
    """What table.json says, and its variants. ValueError with one sentence for what it must not say."""
    path, variants = folder / "table.json", []
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check(str(path), table, TABLE)
    if missing := [key for key in ("title", "track", "seeds", "variants") if not table.get(key)]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    for name, given in table["variants"].items():
        where = f"{path}: variant {name!r}"
        check(where, given, VARIANT)
        if "against" in given and given["against"] not in table["variants"].keys() - {name}:
            raise ValueError(f"{where}: against {given['against']!r} is not another variant")
        preset = given.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"{where}: unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        preset_words = words_for(folder / "train_gpt.py", PRESETS.get(preset, ()))
        grid = given.get("grid", {"": [None]})
        values = next(iter(grid.values()), None)
        numbers = (
            isinstance(values, list)
            and len(values) > 1
            and all(is_number(value) and value > 0 for value in values)
        )
        if "grid" in given and not (len(grid) == 1 and numbers and values == sorted(set(values))):
            raise ValueError(
                f"{where}: a grid is one option with two or more positive numbers, each above the one before"
            )
        first, mine = table.get("first_seed", 0), table | given
        last = first + mine["seeds"]
        variants.append(Variant(
            name, given.get("against", ""), given.get("why", ""), table["track"],
            (*table.get("options", ()), *preset_words, *given.get("options", ())),
            " ".join([*[f"preset {preset}"] * bool(preset), *given.get("options", ())]), next(iter(grid)),
            tuple(values), range(first, last), range(last, last + mine.get("finalist_seeds", 0)),
        ))  # fmt: skip
    named = {v.name: v for v in variants}
    for v in variants:
        if v.against and not v.judges() & named[v.against].judges():
            raise ValueError(
                f"{path}: {v.name!r} is judged by other seeds than {v.against!r}; give both finalist_seeds"
            )
    return table, variants


def add(results: Results, line: dict[str, Any]) -> None:
    """ValueError for a line that is no result, repeats one or does not fit those before it."""
    try:
        job, header = Job(line["variant"], line["value"], line["seed"]), line["header"]
        # what is missing is a KeyError now, not in the midst of a report
        [line[key] for key in ("options", "alone", "train", "val")], line["final"]["val_loss"]
        [header[key] for key in HEADER]
    except (KeyError, TypeError):
        raise ValueError("not a result") from None
    if job in results:
        raise ValueError(f"a second run of {job}")
    for first in [other["header"] for other in results.values()][:1]:
        for key in SAME:
            if header[key] != first[key]:
                raise ValueError(f"{key} {header[key]} does not mix with {first[key]} of the runs before")
    results[job] = line


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, counted from 1, none where there is no file; a last one that a kill has
    torn does not count."""
    return enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1)


def read_results(folder: Path, variants: Sequence[Variant]) -> Results:
    """Finished runs of the table's variants and values."""
    path, results, named = folder / "results.jsonl", {}, {v.name: v for v in variants}
    for place, text in whole_lines(path):
        try:
            line = json.loads(text)
            add(results, line)
            v = named.get(line["variant"])
            if v and line["value"] in v.values and line["options"] != v.command(line["value"]):
                raise ValueError(
                    f"{v.name!r} was run with other options than the table's; give it a new name"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {place}: {error}") from None
    return {
        job: line
        for job, line in results.items()
        if job.variant in named and job.value in named[job.variant].values
    }


def read_times(folder: Path, variants: Sequence[Variant]) -> dict[tuple[str, str], dict[str, Any]]:
    """The line of times.jsonl for each (variant, reference) of the table."""
    path, named, times = folder / "times.jsonl", {v.name: v for v in variants}, {}
    for place, text in whole_lines(path):
        try:
            line = json.loads(text)
            pair = (line["variant"], line["against"])
            sides = line["seconds"]
            first = next(iter(times.values()), line)
            mixed = any(line[key] != first[key] for key in SAME)
            if mixed or pair in times or len({*map(len, sides)}) != 1:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {place}: no times, or times that do not mix with those before"
            ) from None
        if not {*pair} <= named.keys() or pair[1] not in (pair[0], named[pair[0]].against):
            continue
        if any(
            words not in map(named[name].command, named[name].values)
            for name, words in zip(pair, line["options"])
        ):
            raise ValueError(
                f"{path}, line {place}: {pair[0]!r} was timed with other options than the table's"
            )
        times[pair] = line
    return times


def loss_of(line: dict[str, Any]) -> float:
    """Final validation loss in nats per token, inf for a run that diverged."""
    loss = line["final"]["val_loss"]
    return math.inf if loss is None else loss


def best(v: Variant, results: Results) -> float | None:
    """The value with the lowest mean over the screening seeds that all values have; None when there
    is none or no grid."""
    seeds = [seed for seed in v.seeds if all(Job(v.name, value, seed) in results for value in v.values)]
    means = {value: sum(loss_of(results[Job(v.name, value, seed)]) for seed in seeds) for value in v.values}
    value = min(means, key=means.get)
    return value if seeds and means[value] < math.inf else None


def planned(variants: Sequence[Variant], results: Results) -> list[Job]:
    """Seed by seed, so that a comparison that is stopped has all variants; then finalists, as far
    as they are known."""
    jobs, further = [job for v in variants for job in v.screen()], []
    for v in variants:
        value = best(v, results)
        if all(job in results for job in v.screen()) and (value is not None or not v.option):
            further += [Job(v.name, value, seed) for seed in v.further]
    # a stable sort
    return [job for part in (jobs, further) for job in sorted(part, key=lambda job: job.seed)]


def judged(v: Variant, results: Results) -> dict[int, dict[str, Any]]:
    """The runs by which a variant is judged, by seed; those of the screening as long as there is none."""
    lines = {seed: results.get(Job(v.name, best(v, results), seed)) for seed in (*v.seeds, *v.further)}
    known = {seed: line for seed, line in lines.items() if line}
    return {seed: line for seed, line in known.items() if seed in v.judges()} or known


def training_curve(lines: Sequence[dict], steps: int) -> dict[str, np.ndarray]:
    """Mean over these runs, smoothed over a tenth of so many steps."""
    runs = [
        Run(Path(), x["header"], x["final"], [], [Point(*p, 0.0, None) for p in x["train"]]) for x in lines
    ]
    return figures.mean_curve(runs, "train", steps // 10)


def both_curves(runs: Sequence[dict], reference: Sequence[dict]) -> list[dict[str, np.ndarray]]:
    return [training_curve(side, reference[0]["final"]["step"]) for side in (runs, reference)]


def steps_apart(runs: Sequence[dict], reference: Sequence[dict]) -> float | None:
    """Steps to the lowest training loss that both reach, minus the reference's; None when there is
    no such loss."""
    mine, its = both_curves(runs, reference)
    ahead = mine["loss"].min() <= its["loss"].min()
    lead = figures.leading_steps(its, mine)[1] if ahead else -figures.leading_steps(mine, its)[1]
    return float(lead[-1]) if len(lead) else None


def shared(runs: dict[int, dict], reference: dict[int, dict]) -> list[list[dict]]:
    """Both sides' runs of the seeds that both have; [] without such a seed or when a run diverged."""
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds or math.inf in map(loss_of, (*runs.values(), *reference.values())):
        return []
    return [[side[seed] for seed in seeds] for side in (runs, reference)]


def difference(sides: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """Of the losses of `shared` runs, with interval and p; {} for none."""
    return stats.paired(*([loss_of(line) for line in side] for side in sides)) if sides else {}


def compared(sides: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """The difference, pairs, steps apart, ratio of times of `shared` runs; {} for none."""
    if not sides:
        return {}
    ratios = [math.log(x["final"]["train_time_s"] / y["final"]["train_time_s"]) for x, y in zip(*sides)]
    steps, ratio = steps_apart(*sides), math.exp(statistics.mean(ratios))
    return difference(sides) | {"pairs": len(ratios), "steps": steps, "ratio": ratio}


def correct(tests: Sequence[tuple[tuple[str, str], dict[str, Any]]]) -> int:
    """Gives each ((a, b), difference) with a p its `holm`. The number of tests: a against b and b
    against a are one."""
    same: dict[frozenset[str], list[dict]] = {}
    for names, ab in tests:
        if ab.get("p") is not None:
            same.setdefault(frozenset(names), []).append(ab)
    for found, p in zip(same.values(), stats.holm([found[0]["p"] for found in same.values()])):
        for ab in found:
            ab["holm"] = p
    return len(same)


def reached(line: dict[str, Any]) -> tuple[float, float]:
    """(step, seconds) at which the validation loss first comes to the target, linear between
    validations; inf for never."""
    target, points = line["final"]["target"], line["val"]
    for (step, loss, seconds), (next_step, next_loss, next_seconds) in zip(points[:1] + points, points):
        if next_loss <= target:
            # the first one follows on none
            part = (loss - target) / (loss - next_loss) if loss > target else 1.0
            return step + part * (next_step - step), seconds + part * (next_seconds - seconds)
    return math.inf, math.inf


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def losses_in_words(lines: Sequence[dict]) -> list[str]:
    """n, mean with its 95% interval, sd."""
    losses = [loss_of(line) for line in lines]
    if not losses or math.inf in losses:
        return [str(len(losses)), f"{losses.count(math.inf)} diverged" if losses else "-", "-"]
    found = stats.describe(losses)
    ends = ", {:.4f} to {:.4f}".format(*stats.interval(losses)) if found["n"] > 1 else ""
    return [str(found["n"]), number(found["mean"]) + ends, number(found["sd"])]


def reached_in_words(lines: Sequence[dict]) -> list[str]:
    """Steps and seconds to the target: median and how many runs reach it; one that never does is the last."""
    cells = []
    for values, form in zip(zip(*map(reached, lines)), ("{:.0f}", "{:.2f} s")):
        median, count = statistics.median(values), sum(value < math.inf for value in values)
        cells.append(f"{form.format(median) if median < math.inf else '-'} ({count} of {len(values)})")
    return cells or ["-", "-"]


def variant_row(
    v: Variant, runs: dict[int, dict], value: float | None, ab: dict[str, Any], timed: bool, goals: int
) -> str:
    lines, apart, times = [*runs.values()], ["-"] * 4, ["-"] * 2
    if ab:
        ends = f", {ab['low']:+.4f} to {ab['high']:+.4f}" if ab["p"] is not None else ""
        steps = "-" if ab["steps"] is None else f"{ab['steps']:+.0f}"
        apart = [f"{ab['difference']:+.4f}{ends}", str(ab["pairs"]), chance(ab.get("holm")), steps]
    if lines and math.inf not in map(loss_of, lines):
        seconds = statistics.median(line["final"]["train_time_s"] for line in lines)
        times = [f"{seconds:.2f} s", number(ab.get("ratio"), 3)]
    cells = [v.name, *losses_in_words(lines), *apart, *reached_in_words(lines)[:goals], *times * timed]
    own = f"{v.own} {v.option} {value:g}" if v.option and value is not None else v.own
    return table_row([*cells, f"`{own.strip()}`" if own else "-", v.why or "-"])


def pair_rows(order: Sequence[str], every: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The upper triangle of a matrix of differences, row minus column."""
    rows = [table_row(["", *order[1:]]), table_row(["---"] * len(order))]
    for place, name in enumerate(order[:-1]):
        cells = [""] * place
        for ab in (every[name, other] for other in order[place + 1 :]):
            p = ab.get("holm")
            text = (f"{ab['difference']:+.4f}" if ab else "-") + (f", p {chance(p)}" if p is not None else "")
            cells.append(f"**{text}**" if p is not None and p < 0.05 else text)
        rows.append(table_row([name, *cells]))
    return rows


def above_the_lowest(order: Sequence[str], runs: dict[str, dict[int, dict]],
                     every: dict[tuple[str, str], dict[str, Any]]) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The difference of each variant to the first of `order`, with the p of the table of pairs."""
    found = {}
    for name in order[1:]:
        if sides := shared(runs[name], runs[order[0]]):
            p = every[order[0], name].get("holm")
            found[name] = difference(sides) | {"pairs": len(sides[0]), "holm": p}
    return found


def grid_rows(v: Variant, results: Results, value: float | None) -> list[str]:
    rows = []
    for x in v.values:
        note = ""
        if x == value:
            note = "best" + (", at an end: the grid must grow" if x in (v.values[0], v.values[-1]) else "")
            note += "" if Job(v.name, x, v.seeds.stop) in results else "; judged by the runs that chose it"
        runs = [results[job] for job in v.screen() if job.value == x and job in results]
        rows.append(table_row([v.name, f"`{v.option} {x:g}`", *losses_in_words(runs), note]))
    return rows


def all_with(table: dict[str, Any]) -> str:
    return f" All with `{' '.join(table['options'])}`." if table.get("options") else ""


def time_lines(
    table: dict[str, Any], variants: Sequence[Variant], times: dict[tuple[str, str], dict]
) -> list[str]:
    """The part of the report about times in turns."""
    first = next(iter(times.values()))
    heads = ["variant", "against", "rounds", "time, ratio and 95% interval", "options"]
    lines = [
        "## Time in turns", "",
        "Training time of a variant over that of its reference, both in turns in one process, "
        f"on {first['world_size']} x "
        f"{first['device']}, threads: {first['threads']}, torch {first['torch']}, {first['dtype']}, "
        f"train_gpt.py {first['source_sha256'][:12]}.{all_with(table)}", "",
        "Ratio of the sums over all rounds, Cochran's interval for it. What a reference against itself is "
        "away from 1 is the",
        "error that the interval does not know of, such as where in memory a process has put its "
        "weights.", "",
        table_row(heads), table_row(["---"] * len(heads)),
    ]  # fmt: skip
    places = {v.name: place for place, v in enumerate(variants)}
    for (name, against), line in sorted(times.items(), key=lambda item: places[item[0][0]]):
        r, v = stats.ratio(*line["seconds"]), variants[places[name]]
        own = " ".join([*[v.own] * bool(v.own), *line["options"][0][-2:] * bool(v.option)])
        words = f"{r['ratio']:.3f}, {r['low']:.3f} to {r['high']:.3f}"
        reference = "itself" if name == against else against
        lines.append(
            table_row([name, reference, str(len(line["seconds"][0])), words, f"`{own}`" if own else "-"])
        )
    return lines


def report(folder: Path, out: Path) -> None:
    """Writes report.md and figures of the results in `folder` into `out`."""
    table, variants = read_table(folder)
    results, times = read_results(folder, variants), read_times(folder, variants)
    if not results and not times:
        raise ValueError(f"{folder} holds no result yet")
    parts = [[f"# {table['title']}"]]
    if results:
        parts.append(loss_lines(table, variants, results, out))
    if times:
        parts.append(time_lines(table, variants, times))
    write(out / "report.md", "\n\n".join("\n".join(part) for part in parts) + "\n")


def tested(table: dict[str, Any], variants: Sequence[Variant], runs: dict[str, dict[int, dict]]) -> tuple:
    """(each variant against its reference, every pair if the table asks for it, names with the lowest
    mean first).

    The first by name, the second by two names; without variants of which a run diverged in the second
    and third.
    """
    found = {v.name: compared(shared(runs[v.name], runs[v.against])) if v.against else {} for v in variants}
    means = {v.name: statistics.mean(map(loss_of, runs[v.name].values())) for v in variants if runs[v.name]}
    order = sorted((name for name, mean in means.items() if mean < math.inf), key=means.get)
    pairs = itertools.combinations(order, 2) if table.get("pairs") else ()
    return found, {(a, b): difference(shared(runs[a], runs[b])) for a, b in pairs}, order


def loss_lines(table: dict[str, Any], variants: Sequence[Variant], results: Results, out: Path) -> list[str]:
    """The part of the report about runs; its figures are written into `out`."""
    runs = {v.name: judged(v, results) for v in variants}
    values = {v.name: best(v, results) for v in variants}
    found, every, order = tested(table, variants, runs)
    tests = correct([*(((v.name, v.against), found[v.name]) for v in variants), *every.items()])
    missing = sum(job not in results for job in planned(variants, results))
    threads = sorted({line["header"]["threads"] for line in results.values()})
    timed = all(line["alone"] for line in results.values()) and len(threads) == 1
    header = [*results.values()][0]["header"]
    lines = [
        f"Track `{variants[0].track}`, {len(results)} "
        f"runs{f' of {len(results) + missing}' if missing else ''} on "
        f"{header['world_size']} x {header['device']}, threads: {' or '.join(map(str, threads))}, "
        f"torch {header['torch']}, "
        f"{header['dtype']}, train_gpt.py {header['source_sha256'][:12]}."
        f"{'' if timed else ' Runs beside each other: no times.'}"
        f"{all_with(table)}", "",
        "Losses in nats per token. Differences are those to the reference, means over the seeds that both "
        "have, paired t-test;",
        f"p is corrected for {tests} tests (Holm){', those of every pair' if every else ''}, "
        "the intervals are not. "
        "Steps: to the lowest training loss that both",
        "reach, minus the reference's; inside a cooldown they are fewer than what a longer schedule is "
        "worth.",
    ]  # fmt: skip
    goals, pool = [], [line for side in runs.values() for line in side.values()]
    if len(targets := {line["final"]["target"] for line in pool}) == 1 and any(
        reached(line)[0] < math.inf for line in pool
    ):
        goals = [f"{unit} to {min(targets):g}" for unit in ("steps", "seconds")[: 1 + timed]]
        lines += ["To the target: where the validation curve, linear between validations, "
                  "first comes so low; median over the",
                  "runs, one that never does being the last, and how many do."]  # fmt: skip
    names = ["variant", "n", "validation loss: mean, 95% interval", "sd", "difference, 95% interval", "pairs",
             "p (Holm)", "steps", *goals, *["time, median", "ratio of times"] * timed, "options",
             "why"]  # fmt: skip
    for name in sorted({v.against for v in variants}, key=[v.against for v in variants].index):
        lines += [
            "",
            f"## Against {name}" if name else "## References",
            "",
            table_row(names),
            table_row(["---"] * len(names)),
        ]
        rows = [(v, runs[v.name], values[v.name], found[v.name]) for v in variants if v.against == name]
        lines += [variant_row(*row, timed, len(goals)) for row in rows]
    if shown := {v: found[v.name] for v in variants if found[v.name]}:
        references = {v.against for v in shown}
        one = len(references) == 1
        than = f"that of {min(references)}" if len(references) == 1 else "the reference's"
        labels = {v.name if one else f"{v.name} against {v.against}": ab for v, ab in shown.items()}
        figures.differences(labels, out / "differences.png", than)
        lines += ["", "![differences of the validation loss](differences.png)"]
    if every:
        lines += ["", "## Every pair", "",
                  "Row minus column, lowest mean first, without variants of which a run diverged. Bold: "
                  "p below 0.05; the",
                  "chance of even one bold pair that is equal in truth is at most 5%. "
                  "A pair that is not bold is not shown to",
                  "be equal.", "",
                  *pair_rows(order, every)]  # fmt: skip
        if behind := above_the_lowest(order, runs, every):
            figures.differences(behind, out / "best.png", f"that of {order[0]}")
            lines += ["", f"![every variant minus {order[0]}, which has the lowest mean](best.png)"]
    if table.get("curves") and order:
        sides = {name: [*runs[name].values()] for name in order}
        trained = {name: training_curve(side, side[0]["final"]["step"]) for name, side in sides.items()}
        both = {
            v.name: both_curves(*shared(runs[v.name], runs[v.against])) for v in variants if found[v.name]
        }
        figures.training(
            trained, {name: figures.leading_steps(*pair) for name, pair in both.items()}, out / "curves.png"
        )
        lines += ["", "## Curves", "", "Lowest mean of the final losses first, "
                                       "without variants of which a run diverged.", "",
                  "![training loss, and further steps that the reference needs for the same "
                  "loss](curves.png)"]  # fmt: skip
    if grids := [v for v in variants if v.option]:
        heads = ["variant", "value", "n", "validation loss: mean, 95% interval", "sd", ""]
        lines += ["", "## Grids", "", table_row(heads), table_row(["---"] * 6)]
        lines += [row for v in grids for row in grid_rows(v, results, values[v.name])]
        curves = [(v.option, v.name, values[v.name], {x: [] for x in v.values}) for v in grids]
        for v, curve in zip(grids, curves):
            for job in v.screen():
                curve[-1][job.value] += [loss_of(results[job])] if job in results else []
        figures.grids(curves, out / "grids.png")
        lines += ["", "![final validation loss over the grids](grids.png)"]
    return lines
