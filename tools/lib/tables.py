"""Claims in words and the generated tables of the README files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .claims import record_folders
from .logs import differing, flat, read_log


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chance(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def claim(result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    loss = result["val_loss"]
    lines = [
        f"{result['name']}: {loss['n']} runs of {result['steps']} steps, {result['tokens']:,} tokens: "
        "mean validation loss "
        f"{loss['mean']:.4f}, sd {number(loss['sd'])}, margin {result['margin']:.4f} below "
        f"{result['target']}, "
        f"p {chance(result['p'])} ({result['rule']}): "
        + ("target reached" if result["reaches_target"] else "not shown")
    ]
    for device, seconds in result["train_time_s"].items():
        lines.append(f"  training time on {result['world_size']} x {device}: "
                     f"median {seconds['median']:.2f} s, "
                     f"mean {seconds['mean']:.2f}, sd {number(seconds['sd'], 2)}, "
                     f"n {seconds['n']}")  # fmt: skip
    for ab in result["beats"]:
        loss = ab["loss"]
        lines.append(f"  time over {ab['baseline']}: {ab['ratio']:.4f}, 95% interval {ab['low']:.4f} to "
                     f"{number(ab['high'])}, "
                     f"one-sided p {chance(ab['p'])} ({ab['rule']}, {ab['pairs']} pairs, "
                     f"{ab['discarded']} discarded): "
                     + ("faster" if ab["faster"] else "not shown to be faster"))  # fmt: skip
        steps = ab["steps_equivalent"]
        worth = "" if steps is None else f", worth {steps:+.1f} steps at the end of the baseline"
        lines.append(f"  loss minus the baseline's: {loss['difference']:+.4f}, "
                     f"95% interval {number(loss['low'])} to "
                     f"{number(loss['high'])}, Welch p {chance(loss['p'])}{worth}")  # fmt: skip
    return "\n".join(lines)


def optimizer_of(settings: dict[str, Any]) -> str:
    """What updates the matrices, in a few words."""
    m = settings.get("matrix", {})
    if m.get("kind") == "adam":
        return "AdamW"
    words = ["Muon" if m.get("equilibrate", "none") == "none" else f"MuonEq-{m['equilibrate']}"]
    words += ["NorMuon"] * bool(m.get("normuon"))
    return f"{' + '.join(words)}, {m.get('orthogonalize', '?')} {m.get('iterations', '?')}"


def title(folder: Path) -> str:
    """The first line of the record's README.md."""
    path = folder / "README.md"
    lines = path.read_text(encoding="utf-8-sig").strip().splitlines() if path.is_file() else []
    return lines[0].lstrip("# ").replace("|", "/") if lines else folder.name


def history(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The time records of a track, oldest first: each was timed against the one before it; the
    first was only timed against."""
    named = {result["name"]: result for result in results}

    def rank(name: str) -> int:
        return 1 + max(
            (rank(ab["baseline"]) for ab in named[name]["beats"] if ab["baseline"] in named), default=-1
        )

    beaten = {ab["baseline"] for result in results for ab in result["beats"]}
    chain = [result for result in results if result["beats"] or result["name"] in beaten or len(results) == 1]
    return sorted(chain, key=lambda result: (rank(result["name"]), result["first_run"]))


def by_machine(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results by number and kind of card, each with what was measured there: other times are no match."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for device, seconds in result["train_time_s"].items():
            beats = [ab for ab in result["beats"] if ab.get("device") == device]
            here = {**result, "train_time_s": {device: seconds}, "beats": beats}
            groups.setdefault(f"{result['world_size']} x {device}", []).append(here)
    return groups


def fastest(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each track and machine: how many records, and the fastest one."""
    lines = []
    for track in dict.fromkeys(result["track"] for result in results):
        of_track = [result for result in results if result["track"] == track]
        for machine, group in by_machine(of_track).items():
            times = [(*(x["median"] for x in r["train_time_s"].values()), r["name"]) for r in group]
            best = "the fastest {1}, {0:.2f} s".format(*min(times))
            lines.append(f"track {track} on {machine}: {len(group)} records, {best}")
    return lines


def seconds_of(result: dict[str, Any]) -> str:
    world_size, devices = result["world_size"], result["train_time_s"]
    return ", ".join(
        f"{seconds['median']:.1f} s on {world_size} x {device}" for device, seconds in devices.items()
    )


def loss_of(result: dict[str, Any]) -> str:
    return f"{result['val_loss']['mean']:.4f}, {result['val_loss']['n']}, {chance(result['p'])}"


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a record, which all its runs share."""
    return read_log(min((folder / "runs").glob("*.jsonl"))).settings


def link(folder: Path, beside: Path) -> str:
    return f"[{title(folder)}]({os.path.relpath(folder, beside)})"


def history_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    """A table for each machine."""
    groups, lines = by_machine(results), []
    for machine, group in groups.items():
        where = f" on {machine}" if len(groups) > 1 else ""
        lines += ["", f"Track `{track}`{where}, target {group[0]['target']} nats per token:", ""]
        lines += history_rows(track, group, root, beside)
    return lines[1:]


def history_rows(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    lines = []
    lines += ["| # | record | steps | tokens | validation loss: mean, n, p | training time, "
              "median | time over the one before: "
              "ratio, 95% interval, pairs, p |", "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for place, r in enumerate(history(results), 1):
        over = "; ".join(f"{ab['ratio']:.3f}, {ab['low']:.3f} to {number(ab['high'], 3)}, {ab['pairs']}, "
                         f"{chance(ab['p'])}"
                         for ab in r["beats"])  # fmt: skip
        lines.append(f"| {place} | {link(root / track / r['name'], beside)} | {r['steps']:,} | "
                     f"{r['tokens']:,} "
                     f"| {loss_of(r)} | {seconds_of(r)} | {over or '-'} |")  # fmt: skip
    return lines


def summary_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    """The history in few words, for a page that says what the project is; the statistics are in
    `history_table`. A table for each machine."""
    lines = []
    for machine, group in by_machine(results).items():
        target, where = group[0]["target"], f"median training times on {machine}"
        lines += ["", f"Track `{track}`, target {target} nats per token, {where}:", ""]
        lines += ["| # | record | date | steps | loss | time | speed-up over the one before |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for place, r in enumerate(history(group), 1):
            day = r["first_run"]
            date = f"{day[:4]}-{day[4:6]}-{day[6:8]}"
            (seconds,) = r["train_time_s"].values()
            faster = ", ".join(f"{1 / ab['ratio']:.2f} x" for ab in r["beats"])
            lines.append(f"| {place} | {link(root / track / r['name'], beside)} | {date} | {r['steps']:,} "
                         f"| {r['val_loss']['mean']:.4f} | {seconds['median']:.1f} s "
                         f"| {faster or '-'} |")  # fmt: skip
    return lines[1:]


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
        lines += ["", f"Track `{track}`, model and batch of {first['name']} ({model['layers']} blocks x "
                      f"{model['width']}, "
                  f"{first['tokens'] / first['steps']:,.0f} tokens in a step):", ""]  # fmt: skip
        lines += ["| rank | record | optimizer of the matrices | steps | validation loss: mean, n, p |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for place, (steps, _, r, settings) in enumerate(sorted(members, key=lambda m: m[:2]), 1):
            where = link(root / track / r["name"], beside)
            lines.append(f"| {place} | {where} | {optimizer_of(settings)} | {steps:,} | {loss_of(r)} |")
    return lines[1:]


class Known(NamedTuple):
    """A run, or a record, as the table of tried runs compares it."""

    time: str  # of the start, "20261122-034728"
    name: str
    steps: int
    loss: float | None
    seed: int | None  # None for a record: it has several
    settings: dict[str, Any]  # of `comparable`


STAGE = ("begin", "windows", "batch", "document_cut", "lr", "ahead")  # the columns of schedule.stages
NOT_COMPARED = {
    "evaluation.every", "evaluation.log_every",  # when something is measured
    "data.epochs",  # how often the data may be read at most
    "schedule.steps", "schedule.stages",  # shown by themselves
}  # fmt: skip
OFF = (None, 0, 1, -1, "", [])  # what a setting has that does nothing


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Flat settings, stages column by column; logs from before there were stages read as if there
    had been."""
    result = flat(settings)
    if "schedule.windows" in result:
        windows, cut = result.pop("schedule.windows"), result.pop("data.document_cut", None)
        if not result.get("schedule.extension"):
            result.pop("schedule.extension_windows", None)
        stages = [[i / len(windows), pair, 1, cut, 1.0, []] for i, pair in enumerate(windows)]
        result["schedule.stages"] = stages
    if len(result.get("model.softcap", ())) == 2:  # its shift came later
        scale, width = result["model.softcap"]
        result["model.softcap"] = [scale, 0.0, width]
    for name, *column in zip(STAGE, *result.get("schedule.stages", ())):
        same = all(value == column[0] for value in column)
        result[f"stages.{name}"] = column[0] if same else column
    return {key: value for key, value in result.items() if key not in NOT_COMPARED}


def apart(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The settings in which two runs differ.

    One that only one of two scripts knows counts unless it is off there.
    """
    return [key for key in differing(a, b) if key in a and key in b or (a | b)[key] not in OFF]


def short(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ",".join(map(short, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def tried_table(track: str, results: Sequence[dict[str, Any]], root: Path, beside: Path) -> list[str]:
    """Single runs in <track>/tried/ by time, each beside the record or run before it that is
    nearest to it."""
    known, paths = [], {}
    for place, r in enumerate(history(results), 1):
        settings = comparable(settings_of(root / track / r["name"]))
        known.append(
            Known(r["first_run"], f"record {place}", r["steps"], r["val_loss"]["mean"], None, settings)
        )
    for path in (root / track / "tried").glob("*.jsonl"):
        run = read_log(path)
        final, header = run.final or {}, run.header
        settings = comparable(run.settings)
        time, steps, loss = header["run_id"][:15], final.get("step", 0), final.get("val_loss")
        known.append(Known(time, path.stem, steps, loss, header["seed"], settings))
        paths[path.stem] = path, final.get("tokens", 0)
    known.sort(key=lambda run: (run.time, run.name))
    lines = [
        f"Track `{track}`, in the order of time; losses are of one seed, "
        "those of a record the mean over its seeds:",
        "",
    ]
    lines += ["| run | steps | tokens | loss | nearest before it | its loss | what differs |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for place, run in enumerate(known):
        if run.name not in paths:
            continue

        def distance(other: Known, run: Known = run) -> tuple:
            differs = apart(other.settings, run.settings)
            return len(differs), other.steps != run.steps, other.seed != run.seed, other.time

        path, tokens = paths[run.name]
        cells = [
            f"[{run.name}]({os.path.relpath(path, beside)})",
            f"{run.steps:,}",
            f"{tokens:,}",
            number(run.loss),
        ]
        near = min(known[:place], key=distance, default=None)
        cells += [near.name, number(near.loss), what_differs(near, run)] if near else ["-", "-", "the first"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if paths else []


def what_differs(near: Known, run: Known) -> str:
    changes = [("steps", near.steps, run.steps)] if near.steps != run.steps else []
    if near.seed is not None and near.seed != run.seed:
        changes.append(("seed", near.seed, run.seed))
    for key in apart(near.settings, run.settings):
        changes.append((key, near.settings.get(key), run.settings.get(key)))
    return ", ".join(f"`{key} {short(old)} -> {short(new)}`" for key, old, new in changes) or "nothing"


TABLES: dict[str, Callable] = {
    "summary": summary_table, "records": history_table, "steps": steps_table, "tried": tried_table,
}  # fmt: skip
NEW_TRACK = "# Track `{}`\n\n<!-- begin steps -->\n<!-- end steps -->\n"
NEW_TRIED = "# What was tried\n\n<!-- begin tried -->\n<!-- end tried -->\n"


def pages(root: Path) -> list[Path]:
    """The files with generated tables: of the repository, of the records, of each track, of what
    was tried there."""
    tracks = sorted({folder.parent for folder in record_folders(root)})
    tried = [track / "tried" for track in tracks if (track / "tried").is_dir()]
    return [folder / "README.md" for folder in (root.parent, root, *tracks, *tried)]


def page_text(path: Path, root: Path) -> str:
    """What stands there now; where a track has no page yet, a page without its tables."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if path.parent in (root, root.parent):
        raise ValueError(f"{path} is missing")
    return NEW_TRIED if path.parent.name == "tried" else NEW_TRACK.format(path.parent.name)


def with_tables(text: str, root: Path, beside: Path) -> str:
    """A markdown text with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew.

    A page inside the folder of a track, `beside`, has the tables of this track, any other page those of
    all tracks.
    """
    inside = beside.relative_to(root).parts if beside.is_relative_to(root) else ()
    proven: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder / "result.json" for folder in record_folders(root)):
        track = path.parents[1].name
        if not path.is_file() or inside and track != inside[0]:
            continue
        result = json.loads(path.read_text(encoding="utf-8-sig"))
        if result["reaches_target"]:
            proven.setdefault(track, []).append(result)
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
