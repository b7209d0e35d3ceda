"""What a record folder proves: the checks on its logs, the tests of its claim, its comparison with
another record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import stats
from .logs import Run, different_settings, differing, flat, read_log

ROOT = Path(__file__).resolve().parents[2]


def rules(track: str) -> dict[str, Any]:
    """What a track fixes, as flat settings: its data's tokens and what counts as its target.

    Empty for unknown tracks.
    """
    sys.path.insert(0, str(ROOT))
    import train_gpt

    if track not in train_gpt.TRACKS:
        return {}
    settings = flat(dataclasses.asdict(train_gpt.TRACKS[track]))
    fixed = ("data.corpus", "data.vocab_size", "data.document_start", "data.predict_start",
             "evaluation.target")  # fmt: skip
    return {key: settings[key] for key in (*fixed, "evaluation.tokens")}


def unknown_track(track: str) -> str:
    import train_gpt

    return f"unknown track {track!r}, there are {', '.join(train_gpt.TRACKS)}"


# the files that data/shakespeare.py makes, the same bytes on every machine
SHAKESPEARE = {
    "train_000001.bin": "0a2e806df4be9b1a90a5d0713ec012ec26a3a18ac85d1f38e628ef42187cd48e",
    "val_000000.bin": "3dca7ae6b80be15b91d09a578319cc7c807715c9850820ab4cde220c677808f4",
}


def other_data(corpus: str, files: Any) -> list[str]:
    """Where the files of a run, {name: sha256}, are not those of a track's corpus.

    The bytes of FineWeb are what the hub publishes: data/fineweb.py asks there. Here only their names are
    known, so its digests are compared with the baseline's (`data_apart`).
    """
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        return ["data is missing: the files that were read, and the sha256 of each"]
    if corpus == "shakespeare":
        known: dict[str, str | None] = dict(SHAKESPEARE)
    elif corpus == "fineweb10B":
        training = sum("_train_" in name for name in files)
        known = {f"fineweb_train_{i:06d}.bin": None for i in range(1, max(training, 1) + 1)}
        known["fineweb_val_000000.bin"] = None
    else:
        return []
    found = [f"data: {name} is no file of {corpus}" for name in sorted(files.keys() - known.keys())]
    found += [f"data: {name} of {corpus} was not read" for name in sorted(known.keys() - files.keys())]
    for name in sorted(files.keys() & known.keys()):
        if known[name] not in (None, files[name]):
            found.append(f"data: {name} has sha256 {files[name]}, {corpus} has {known[name]}")
    return found


def data_apart(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The files that differ between two runs.

    A run names the training files that it reads, from the first on, so that the shorter schedule may lack
    the last ones of the longer. The validation files are the same.
    """
    apart = [name for name in sorted(a.keys() & b.keys()) if a[name] != b[name]]
    apart += [name for name in sorted(a.keys() ^ b.keys()) if "train_" not in name]
    training = [sorted(name for name in files if "train_" in name) for files in (a, b)]
    shorter, longer = sorted(training, key=len)
    return apart + [name for name, other in zip(shorter, longer) if name != other]


# header fields that all runs of a record share
SAME = ("track", "source_sha256", "world_size", "torch", "dtype", "data")


def flaws(run: Run) -> list[str]:
    """Why this run by itself proves nothing: one sentence each, naming the file and the field."""
    found = []
    if run.resumed:
        found.append("resume: a resumed run has no clock that can be trusted")
    if (final := run.final) is None:
        return [f"{run.path}: {text}" for text in [*found, "final: the run did not finish"]]
    if final["compiles_in_timed_region"]:
        found.append(f"final.compiles_in_timed_region is {final['compiles_in_timed_region']}")
    for name, value in zip(("step", "val_loss", "train_time_s", "tokens"), run.val[-1] if run.val else ()):
        # seconds; the clock is read again at the end
        if abs(final[name] - value) > (0.01 if name == "train_time_s" else 0):
            found.append(f"final.{name} is not that of the last validation")
    track, settings = run.header["track"], flat(run.settings)
    allowed = rules(track)
    for key in (key for key in allowed if key in settings and settings[key] != allowed[key]):
        more = key == "evaluation.tokens" and settings[key] > allowed[key]
        harder = key == "evaluation.target" and settings[key] < allowed[key]
        if not (more or harder):
            found.append(f"settings.{key} is {settings[key]}, track {track} says {allowed[key]}")
    if allowed:
        found += other_data(allowed["data.corpus"], run.header.get("data"))
    wanted = max(settings.get("evaluation.tokens", 0), allowed.get("evaluation.tokens", 0))
    if final["val_tokens"] < wanted:
        found.append(f"final.val_tokens is {final['val_tokens']}, the track says {wanted}")
    if final["target"] != settings.get("evaluation.target", final["target"]):
        found.append(
            f"final.target is {final['target']}, settings.evaluation.target {settings['evaluation.target']}"
        )
    if final.get("reached") is not (final["val_loss"] <= final["target"]):
        found.append("final.reached does not follow from final.val_loss and final.target")
    return [f"{run.path}: {text}" for text in found]


def problems(runs: Sequence[Run], source: Path) -> list[str]:
    """Why these runs of this source prove nothing, each and together. Empty when nothing is wrong."""
    found, first = [flaw for run in runs for flaw in flaws(run)], runs[0]
    track = source.parent.parent.name
    if first.header["track"] != track:
        found.append(f"{first.path}: track is {first.header['track']}, its record lies in {track}/")
    for run in runs[1:]:
        for key in SAME:
            if run.header.get(key) != first.header.get(key):
                found.append(f"{run.path}: {key} differs from that of {first.path.name}")
        for key in different_settings(first, run):
            found.append(f"{run.path}: settings.{key} differs from that of {first.path.name}")
        if run.final and first.final and run.final["step"] != first.final["step"]:
            found.append(f"{run.path}: final.step differs from that of {first.path.name}")
    for field, value in (
        ("seed", lambda run: run.header["seed"]),
        ("run_id", lambda run: run.header["run_id"]),
        # a copy with another seed
        ("final.val_loss", lambda run: run.final["val_loss"] if run.final else run.path),
    ):
        seen: dict[Any, Run] = {}
        for run in runs:
            if (other := seen.setdefault(value(run), run)) is not run:
                found.append(f"{run.path}: {field} {value(run)} is also that of {other.path.name}")
    if not source.is_file():
        return [*found, f"{source} is missing: the source that was run"]
    if (digest := sha256(source)) != first.header["source_sha256"]:
        text = f"{source}: sha256 {digest} is not source_sha256 of the runs, {first.header['source_sha256']}"
        unix_lines = source.read_bytes().replace(b"\r\n", b"\n")
        if hashlib.sha256(unix_lines).hexdigest() == first.header["source_sha256"]:
            text += "; only its line ends differ (CRLF, as git's core.autocrlf makes them)"
        return [*found, text]
    return found + left_out(runs, source.parent)


def first_seed(name: str, source: bytes) -> int:
    """The first seed of a record: it follows from the folder's name and the source, so that nobody picks it
    and two records share none. The runs after the first one count on from there."""
    return int(hashlib.sha256(name.encode() + source).hexdigest()[:6], 16)


def left_out(runs: Sequence[Run], folder: Path) -> list[str]:
    """Signs that not every run that was begun for a record is there: a hole in the seeds, or fewer runs than
    its logs say were planned."""
    found, begun = [], [*runs, *read_runs(folder, "discarded")]
    first = first_seed(folder.name, (folder / "train_gpt.py").read_bytes())
    given = range(first, first + len(begun))
    wanted = f"the folder's name and its source give {given[0]} to {given[-1]}"
    for run in begun:
        seed = run.header["seed"]
        if seed not in given:
            found.append(f"{run.path}: seed {seed} is none of this record: {wanted}")
        if run.plan and run.plan["index"] != seed - first + 1:
            text = f"plan.index is {run.plan['index']}, the seed is that of run {seed - first + 1}"
            found.append(f"{run.path}: {text}")
    for seed in sorted(set(given) - {run.header["seed"] for run in begun}):
        found.append(f"{folder}: seed {seed} has no run: {wanted}")
    planned = max((run.plan["planned"] or 0 for run in begun if run.plan), default=0)
    if planned > len(runs):
        found.append(f"{folder}: {planned} runs were planned, {len(runs)} are there")
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_runs(folder: Path, which: str = "runs") -> list[Run]:
    """The logs of a record folder in the order in which they were run; of those that do not count with
    "discarded"."""
    runs = [read_log(path) for path in (folder / which).glob("*.jsonl")]
    return sorted(runs, key=lambda run: (run.header["run_id"], run.path.name))


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """Lines of pairs.jsonl: {baseline, order, planned, baseline_run, candidate_run, discarded}; []
    where there is none.

    A pair that was interrupted after its first run is discarded and has "" for the other.
    """
    path = folder / "pairs.jsonl"
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
        pairs = [json.loads(line) for line in text.splitlines()]
        for pair in pairs:
            if not all(
                isinstance(pair[key], str) for key in ("baseline", "order", "baseline_run", "candidate_run")
            ):
                raise ValueError
            pair["planned"], pair["discarded"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a list of pairs in JSON lines") from None
    return pairs


def compare(baseline: Path, folder: Path, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The A/B of a record against one baseline, from both folders' logs alone; ValueError when they
    do not fit together."""
    if not baseline.is_dir():
        raise ValueError(f"{folder / 'pairs.jsonl'}: the folder {baseline} of the baseline is missing")
    sides = [{run.header["run_id"]: run for run in read_runs(side)} for side in (baseline, folder)]
    couples = []
    for number, pair in enumerate(pairs, 1):
        where = f"{folder / 'pairs.jsonl'}: pair {number}"
        if pair["discarded"]:
            if reason := no_reason(pair, baseline, folder):
                raise ValueError(f"{where}: {reason}")
            continue
        for side, name in zip(sides, ("baseline_run", "candidate_run")):
            if pair[name] not in side or not side[pair[name]].final:
                raise ValueError(f"{where}: {name} {pair[name]} is not a finished run of its folder")
        couple = [side[pair[name]] for side, name in zip(sides, ("baseline_run", "candidate_run"))]
        for key in ("device", "cpus", "threads", "world_size", "torch", "driver"):
            if couple[0].header.get(key) != couple[1].header.get(key):
                raise ValueError(f"{where}: {key} differs between the two runs")
        if apart := data_apart(*(run.header.get("data") or {} for run in couple)):
            raise ValueError(f"{where}: data: {', '.join(apart)} differs between the two runs")
        couples.append(couple)
    for name in ("baseline_run", "candidate_run"):
        named = [pair[name] for pair in pairs if pair[name]]
        if len(set(named)) < len(named):
            raise ValueError(f"{folder / 'pairs.jsonl'}: {name} appears in two pairs")
    planned = max(pair["planned"] or 0 for pair in pairs)
    if planned > len(couples):
        found = f"{planned} pairs were planned, {len(couples)} are there"
        raise ValueError(f"{folder / 'pairs.jsonl'}: {found}")
    if alone := without_pair(baseline, folder, pairs):
        raise ValueError("\n".join(alone))
    return judge(couples, pairs) | {"baseline": baseline.name}


def no_reason(pair: dict[str, Any], baseline: Path, folder: Path) -> str | None:
    """What is wrong with a pair that was set aside: its logs are still there, and show a compile inside the
    clock; None when nothing is."""
    compiled = False
    for side, name in ((baseline, "baseline_run"), (folder, "candidate_run")):
        runs = [*read_runs(side), *read_runs(side, "discarded")]
        logs = {run.header["run_id"]: run for run in runs}
        if pair[name] and not (pair[name] in logs and logs[pair[name]].final):
            return f"{name} {pair[name]} was set aside, and is not a finished run of its folder"
        compiled |= bool(pair[name]) and logs[pair[name]].final["compiles_in_timed_region"] > 0
    whole = pair["baseline_run"] and pair["candidate_run"]
    return "it was set aside, but nothing was compiled inside the clock" if whole and not compiled else None


def without_pair(baseline: Path, folder: Path, pairs: list[dict[str, Any]]) -> list[str]:
    """The runs of an A/B that are in none of its pairs.

    A run says what it was run beside (`plan_of`). Older logs do not: there each run between the first and
    the last one of the A/B must be in some pair of the track.
    """
    found = []
    anywhere = {
        pair[name]
        for path in folder.parent.glob("*/pairs.jsonl")
        for pair in read_pairs(path.parent)
        for name in ("baseline_run", "candidate_run")
    }
    for side, other, name in ((baseline, folder, "baseline_run"), (folder, baseline, "candidate_run")):
        named = {pair[name] for pair in pairs} - {""}
        for run in [*read_runs(side), *read_runs(side, "discarded")]:
            run_id = run.header["run_id"]
            if run.plan:
                lost = run.plan["beside"] == other.name and run_id not in named
            else:
                lost = bool(named) and min(named) < run_id < max(named) and run_id not in anywhere
            if lost:
                found.append(f"{run.path}: it was run for the A/B with {other.name} and is in no pair")
    return found


def judge(couples: list[list[Run]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratio of training times (candidate over baseline), difference of losses, and what it is worth in steps.

    The number of pairs was fixed in advance when every pair says the same number and that many are
    there: paired t-test on the log ratios. Otherwise `stats.sequential` gives p and interval.
    """
    if not couples:
        raise ValueError("there is no valid pair yet")
    ratios = [math.log(c.final["train_time_s"] / b.final["train_time_s"]) for b, c in couples]
    losses = [[run.final["val_loss"] for run in side] for side in zip(*couples)]
    planned = {pair["planned"] for pair in pairs}
    fixed = planned == {len(ratios)}
    if fixed:
        (low, high), p, used = stats.interval(ratios), stats.p_below(ratios), len(ratios)
    else:
        rule = stats.sequential(ratios)
        low, high, p, used = rule["low"], rule["high"], rule["p_below"], rule["n"]
    slope = loss_per_step([b for b, _ in couples])
    welch = stats.welch(losses[1], losses[0])
    return {
        "pairs": len(ratios), "discarded": sum(bool(pair["discarded"]) for pair in pairs),
        "rule": "fixed" if fixed else "sequential", "pairs_used": used,
        "ratio": math.exp(sum(ratios) / len(ratios)), "low": math.exp(low),
        "high": math.exp(high) if high < 700 else None, "p": p,
        "faster": used >= stats.MINIMUM_PAIRS and p < stats.ALPHA, "loss": welch, "loss_per_step": slope,
        "steps_equivalent": welch["difference"] / slope if slope else None,
        "device": couples[-1][0].header.get("device"),
    }  # fmt: skip


def loss_per_step(runs: Sequence[Run], share: float = 0.2) -> float | None:
    """Slope of the training loss over the last `share` of the steps, averaged over runs (nats per token
    and step, < 0).

    Least squares over the logged steps. Inside the cooldown a curve falls faster than final losses do
    when the whole schedule is stretched, so dividing a difference of losses by this slope gives a
    cautious number of steps.
    """
    slopes = []
    for run in runs:
        points = [p for p in run.train if p.step > (1 - share) * run.final["step"]]
        if len(points) >= 3:
            slopes.append(
                statistics.linear_regression([p.step for p in points], [p.loss for p in points]).slope
            )
    slope = sum(slopes) / len(slopes) if slopes else 0.0
    return slope if slope < 0 else None


def summarize(folder: Path) -> dict[str, Any]:
    """result.json of a record, from its logs alone.

    ValueError (one line per problem) when they prove nothing.
    """
    runs = read_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: runs: there is no log")
    if found := problems(runs, folder / "train_gpt.py"):
        raise ValueError("\n".join(found))
    header, final, pairs = runs[0].header, runs[0].final, read_pairs(folder)
    losses = [run.final["val_loss"] for run in runs]
    target = min(run.final["target"] for run in runs)
    machines = {}
    for device in dict.fromkeys(run.header.get("device", "") for run in runs):
        machines[device] = stats.describe(
            [r.final["train_time_s"] for r in runs if r.header.get("device", "") == device]
        )
    # where the losses had a say in when to stop, the test must allow for that
    sequential = any(pair["planned"] is None for pair in pairs)
    p = (
        stats.sequential([loss - target for loss in losses])["p_below"]
        if sequential
        else stats.p_below(losses, target)
    )
    result = {
        "track": header["track"], "name": folder.name, "source_sha256": header["source_sha256"],
        "first_run": header["run_id"][:15], "target": target, "val_loss": stats.describe(losses),
        "margin": target - sum(losses) / len(losses), "p": p, "rule": "sequential" if sequential else "fixed",
        "reaches_target": p < stats.ALPHA, "steps": final["step"], "tokens": final["tokens"],
        "val_tokens": final["val_tokens"], "world_size": header["world_size"], "torch": header["torch"],
        "dtype": header.get("dtype"), "train_time_s": machines, "seeds": [run.header["seed"] for run in runs],
        "beats": [],
    }  # fmt: skip
    for baseline in dict.fromkeys(pair["baseline"] for pair in pairs):
        result["beats"].append(
            compare(folder.parent / baseline, folder, [p for p in pairs if p["baseline"] == baseline])
        )
    return result


def same(a: Any, b: Any) -> bool:
    """Equal, floats to 1e-9: the last digits of a p-value may differ between versions of scipy."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-300)
    return type(a) is type(b) and a == b


def write_result(folder: Path) -> dict[str, Any]:
    result = summarize(folder)
    write(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def write(path: Path, content: str | bytes) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def verify(folder: Path) -> dict[str, Any]:
    """The claim of a record, recomputed; ValueError when it cannot be computed or its result.json says
    something else.

    result["holds"]: mean loss below the target with p < 0.01, and faster than every baseline it was
    timed against.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not rules(track := folder.resolve().parent.name):
        raise ValueError(f"{folder}: {unknown_track(track)}")
    result = summarize(folder)
    try:
        stored = json.loads((folder / "result.json").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{folder / 'result.json'} is missing; `record.py run --runs 0` writes it") from None
    except ValueError:
        raise ValueError(f"{folder / 'result.json'} is not JSON") from None
    if not same(stored, result):
        keys = differing(stored, result) if isinstance(stored, dict) else ["it"]
        wrong = [k for k in keys if not isinstance(stored, dict) or not same(stored.get(k), result.get(k))]
        raise ValueError(
            f"{folder / 'result.json'}: {', '.join(wrong)} is not what the logs give; "
            "it was edited or is stale"
        )
    return result | {"holds": result["reaches_target"] and all(b["faster"] for b in result["beats"])}


def record_folders(root: Path) -> list[Path]:
    """Every record below the folder of the tracks.

    A folder with a table.json is a comparison (compare.py), and one with nothing but its script and what a
    run under way writes is no record yet.
    """
    begun = ("runs", "discarded", "result.json", "pairs.jsonl", "README.md")
    return sorted(
        path.parent
        for path in root.glob("*/*/train_gpt.py")
        if not (path.parent / "table.json").exists() and any((path.parent / name).exists() for name in begun)
    )
