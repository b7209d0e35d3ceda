"""Statistics of public logs: groups of runs that can be one claim, and the page over a clone of the public
speedrun's repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import stats
from .logs import Run, decoded, is_public_name, parse_public_log, without_mirrors
from .tables import chance, number

# what mean validation loss each track asks for, by its own pages
TARGETS = {"track_1_short": 3.28, "track_2_medium": 2.92, "track_3_optimization": 3.28}


def groups_of(runs: Sequence[Run], target: float) -> list[dict[str, Any]]:
    """Runs of one source, length, number of processes and torch version together, with their statistics.

    p is null, and "no_p" says why, where no test can be made.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        h = run.header
        key = (h["source_sha256"], h["steps"], run.final["step"], h["world_size"], h["torch"])
        groups.setdefault(key, []).append(run)
    report = []
    for (digest, steps, last, world_size, torch), members in groups.items():
        losses = [run.final["val_loss"] for run in members]
        seconds = [run.final["train_time_s"] for run in members]
        no_p = "one run shows no spread" if len(losses) < 2 else None
        if len(losses) > 1 and len(set(losses)) == 1:
            no_p = "all losses are the same: no spread to test with"
        report.append({
            "folder": os.path.commonpath([str(run.path.parent) for run in members]), "source_sha256": digest,
            "steps": steps, "last_step": last, "world_size": world_size, "torch": torch,
            "device": members[0].header["device"], "target": target, "val_loss": stats.describe(losses),
            "p": None if no_p else stats.p_below(losses, target), "no_p": no_p,
            "train_time_s": None if None in seconds else stats.describe(seconds),
            "files": list(dict.fromkeys(run.path.name for run in members)),
        })  # fmt: skip
    return report


def holds(group: dict[str, Any]) -> bool:
    return group["p"] is not None and group["p"] < stats.ALPHA


def git(clone: Path, *words: str) -> bytes:
    """What git says about a clone; a file that it lacks is not fetched."""
    environment = os.environ | {"GIT_NO_LAZY_FETCH": "1"}
    done = subprocess.run(["git", "-C", str(clone), *words], capture_output=True, env=environment)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"{clone} is no clone of a repository: {said}")
    return done.stdout


def committed_logs(clone: Path) -> Iterator[tuple[Path, str | None]]:
    """Path and text of each log below records/ in the newest commit of a clone, which may be bare; None for
    the text of one that the clone lacks."""
    listed = git(clone, "ls-tree", "-r", "-z", "HEAD", "--", "records").decode(errors="replace")
    found = []
    for line in filter(None, listed.split("\0")):
        about, _, name = line.partition("\t")
        if is_public_name(path := Path(name)):
            found.append((path, about.split()[2]))
    environment = os.environ | {"GIT_NO_LAZY_FETCH": "1"}
    command = ["git", "-C", str(clone), "cat-file", "--batch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        for path, name in sorted(found):
            process.stdin.write(f"{name}\n".encode())
            process.stdin.flush()
            answer = process.stdout.readline().split()
            if answer[-1] == b"missing":
                yield path, None
                continue
            content = process.stdout.read(int(answer[2]) + 1)[:-1]
            yield path, decoded(content)
        process.stdin.close()


def entry_of(path: Path) -> Path:
    """The record that a log belongs to: the folder of its track, or of the results of its track, that it is
    in."""
    depth = 4 if path.parts[2] == "results" else 3
    return Path(*path.parts[:depth]) if len(path.parts) > depth else path.parent


def survey(clone: Path) -> dict[str, Any]:
    """All that the page says: {commit, folders: {folder: {logs, groups}}, refused, again}."""
    if inside := git(clone, "rev-parse", "--show-prefix").decode().strip():
        raise ValueError(f"{clone} is the folder {inside} of a clone, not the clone")
    entries: dict[Path, list[Run]] = {}
    logs: dict[Path, int] = {}
    refused = []
    for path, text in committed_logs(clone):
        logs[path.parent] = logs.get(path.parent, 0) + 1
        try:
            if text is None:
                raise ValueError(f"{path}: the clone lacks it")
            entries.setdefault(entry_of(path), []).extend(parse_public_log(path, text))
        except ValueError as error:
            refused.append(str(error))
    kept = []
    for runs in entries.values():
        some, mirrors = without_mirrors(runs)
        kept += some
        refused += mirrors
    _, again = without_mirrors(kept)
    folders = {}
    for folder in sorted(logs):
        runs = [run for run in kept if run.path.parent == folder]
        groups = groups_of(runs, TARGETS.get(folder.parts[1], 3.28))
        groups.sort(key=lambda g: (-g["val_loss"]["n"], g["files"]))
        folders[folder] = {"logs": logs[folder], "groups": groups}
    commit, day = git(clone, "log", "-1", "--format=%H %cs", "HEAD").decode().split()
    return {"commit": commit, "day": day, "folders": folders, "refused": sorted(refused), "again": again}


HEAD = """# What the public speedrun's logs show by themselves

The record folders of [KellerJordan/modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt), commit
`{commit}` ({day}), read by

    git clone https://github.com/KellerJordan/modded-nanogpt CLONE
    python tools/record.py public CLONE --out records/public.md

No log of theirs is here: each row names the folder below their `records/`.

**What a row means.** Runs of one source, number of steps, number of processes and torch version are one
group. n counts runs; some logs hold several. The mean of the last validation losses is tested against the
target of the track (3.28; track 2: 2.92) by a one-sided one-sample t-test, and *holds* says whether
mean <= target at p < 0.01 from these logs alone. `-`: fewer than two runs, or no spread. The source is the
beginning of its sha256, `-` where the log does not hold it. The torch version is `-` where it does not say.

**What it does not mean.** A row that does not hold is no error of those who made the record: for a long
time one log was enough, records that only made the system faster need none, and track 3 has a test of its
own, `(3.28 - mean) * sqrt(n) >= 0.004`. Some folders hold baselines, and runs that were tried. Groups are
judged one by one, without a correction for their number. Nothing here says whether a time was measured
well, whether all runs that were made are there, or whether a record may be beaten.
"""


def page(found: dict[str, Any]) -> str:
    """records/public.md"""
    lines = [HEAD.format(**found), "## In numbers", ""]
    lines += ["| track | target | folders | logs | readable folders | with a group that holds | "
              "fewer than three runs | more than one source |"]  # fmt: skip
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    tracks = sorted({folder.parts[1] for folder in found["folders"]})
    for track in tracks:
        folders = {folder: f for folder, f in found["folders"].items() if folder.parts[1] == track}
        readable = [f["groups"] for f in folders.values() if f["groups"]]
        few = sum(sum(g["val_loss"]["n"] for g in groups) < 3 for groups in readable)
        mixed = sum(len({g["source_sha256"] for g in groups}) > 1 for groups in readable)
        cells = [track, f"{TARGETS.get(track, 3.28)}", f"{len(folders)}"]
        cells += [f"{sum(f['logs'] for f in folders.values()):,}", f"{len(readable)}"]
        cells += [f"{sum(any(map(holds, groups)) for groups in readable)}", f"{few}", f"{mixed}"]
        lines.append(f"| {' | '.join(cells)} |")
    for track in tracks:
        lines += ["", f"## {track}", ""]
        lines += ["| folder | logs | source | torch | processes | steps | n | mean | sd | p | holds |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        for folder, f in found["folders"].items():
            if folder.parts[1] == track:
                lines += rows(folder, f)
    lines += ["", "## Not read, or not counted again", ""]
    lines += [f"- {text.replace('records/', '')}" for text in found["refused"]]
    lines += ["", "## In two records", "", "Each of the two counts them.", ""]
    again = [text.removesuffix(": one run, counted once") for text in found["again"]]
    lines += [f"- {text.replace('records/', '')}" for text in again]
    return "\n".join(lines) + "\n"


def rows(folder: Path, found: dict[str, Any]) -> list[str]:
    name, logs = str(Path(*folder.parts[2:])), str(found["logs"])
    if not found["groups"]:
        return [f"| {name} | {logs} | | | | | 0 | - | - | - | - |"]
    lines = []
    for g in found["groups"]:
        loss, steps = g["val_loss"], f"{g['steps']}"
        if g["last_step"] != g["steps"]:
            steps = f"{g['last_step']} of {g['steps']}"
        cells = [name, logs, g["source_sha256"][:8] or "-", g["torch"] or "-"]
        cells += [f"{g['world_size'] or '-'}", steps]
        cells += [f"{loss['n']}", f"{loss['mean']:.5f}", number(loss["sd"], 5), chance(g["p"])]
        cells += ["-" if g["p"] is None else "yes" if holds(g) else "no"]
        lines.append(f"| {' | '.join(cells)} |")
        name = logs = ""
    return lines
