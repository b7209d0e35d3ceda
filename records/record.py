"""Records that verify themselves: run a script several times, compare two, check a claim, draw tables and figures.

    python records/record.py run --track tiny --name NAME --runs 5 [--source FILE] [-- --matrix.lr 0.02 ...]
    python records/record.py ab --baseline DIR_OR_FILE --candidate DIR_OR_FILE --pairs 5 [--until-decided]
    python records/record.py verify [DIR ...]         does each folder prove its claim? none: every record
    python records/record.py plan --sd 0.003 --margin 0.004 --power 0.9
    python records/record.py table [--check]          the tables of README.md and records/README.md
    python records/record.py plot curves|leading|history ...
    python records/record.py import DIR               statistics of logs of the public speedrun

A record is a folder records/<track>/<date>_<name>/ with train_gpt.py as run, runs/*.jsonl, pairs.jsonl when it was timed
against another, a README.md that says what changed, and result.json, which this tool computes from the logs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import stats
from logs import Run, public_runs, read_log
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"


# ---------------------------------------------------------------------------------------------------------------------
# Checking a folder


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"rows": 2}} -> {"data.rows": 2}"""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def rules(track: str) -> dict[str, Any]:
    """What a track fixes, as flat settings: its data's tokens and what counts as its target. Empty for unknown tracks."""
    sys.path.insert(0, str(ROOT))
    import dataclasses

    import train_gpt

    if track not in train_gpt.TRACKS:
        return {}
    settings = flat(dataclasses.asdict(train_gpt.TRACKS[track]))
    fixed = ("data.corpus", "data.vocab_size", "data.document_start", "data.predict_start", "evaluation.target")
    return {key: settings[key] for key in (*fixed, "evaluation.tokens")}


SAME = ("track", "source_sha256", "world_size", "torch", "dtype", "data")  # header fields that all runs of a record share


def problems(runs: Sequence[Run], source: Path) -> list[str]:
    """Why these runs prove nothing: one sentence each, naming the file and the field. Empty when nothing is wrong."""
    found = []
    for run in runs:
        if run.final is None:
            found.append(f"{run.path}: final: the run did not finish")
        if run.resumed:
            found.append(f"{run.path}: resume: a resumed run has no clock that can be trusted")
    for run in (finished := [run for run in runs if run.final]):
        final, settings = run.final, flat(run.header["settings"])
        if final["compiles_in_timed_region"]:
            found.append(f"{run.path}: final.compiles_in_timed_region is {final['compiles_in_timed_region']}")
        if run.val and (run.val[-1].step, run.val[-1].loss) != (final["step"], final["val_loss"]):
            found.append(f"{run.path}: final.val_loss is not that of the last validation")
        allowed = rules(run.header["track"])
        for key in (key for key in allowed if key in settings and settings[key] != allowed[key]):
            more = key == "evaluation.tokens" and settings[key] > allowed[key]
            harder = key == "evaluation.target" and settings[key] < allowed[key]
            if not (more or harder):
                found.append(f"{run.path}: settings.{key} is {settings[key]}, track {run.header['track']} says {allowed[key]}")
        wanted = max(settings.get("evaluation.tokens", 0), allowed.get("evaluation.tokens", 0))
        if final["val_tokens"] < wanted:
            found.append(f"{run.path}: final.val_tokens is {final['val_tokens']}, the track says {wanted}")
        if "evaluation.target" in settings and final["target"] != settings["evaluation.target"]:
            found.append(f"{run.path}: final.target is {final['target']}, settings.evaluation.target another")
        if final["reached"] is not (final["val_loss"] <= final["target"]):
            found.append(f"{run.path}: final.reached does not follow from final.val_loss and final.target")
    for run in runs[1:]:
        first = runs[0]
        for key in SAME:
            if run.header.get(key) != first.header.get(key):
                found.append(f"{run.path}: {key} differs from that of {first.path.name}")
        for key in differing(flat(first.header["settings"]), flat(run.header["settings"])):
            found.append(f"{run.path}: settings.{key} differs from that of {first.path.name}")
    for run in finished[1:]:
        if run.final["step"] != finished[0].final["step"]:
            found.append(f"{run.path}: final.step differs from that of {finished[0].path.name}")
    for field, value in (
        ("seed", lambda run: run.header["seed"]),
        ("run_id", lambda run: run.header["run_id"]),
        ("final.val_loss", lambda run: run.final["val_loss"] if run.final else run.path),  # a copy with another seed
    ):
        seen: dict[Any, Run] = {}
        for run in runs:
            if (other := seen.setdefault(value(run), run)) is not run:
                found.append(f"{run.path}: {field} {value(run)} is also that of {other.path.name}")
    if not source.is_file():
        found.append(f"{source} is missing: the source that was run")
    elif runs and (digest := sha256(source)) != runs[0].header["source_sha256"]:
        found.append(f"{source}: sha256 {digest} is not source_sha256 of the runs, {runs[0].header['source_sha256']}")
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_runs(folder: Path) -> list[Run]:
    """The logs of a record folder in the order in which they were run."""
    runs = [read_log(path) for path in (folder / "runs").glob("*.jsonl")]
    return sorted(runs, key=lambda run: (run.header["run_id"], run.path.name))


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """Lines of pairs.jsonl: {baseline, order, planned, baseline_run, candidate_run, discarded}; [] where there is none."""
    path = folder / "pairs.jsonl"
    try:
        pairs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for pair in pairs:
            if not all(isinstance(pair[key], str) for key in ("baseline", "order", "baseline_run", "candidate_run")):
                raise ValueError
            pair["planned"], pair["discarded"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a list of pairs in JSON lines") from None
    return pairs


def compare(baseline: Path, folder: Path, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The A/B of a record against one baseline, from both folders' logs alone; ValueError when they do not fit together."""
    sides = [{run.header["run_id"]: run for run in read_runs(side)} for side in (baseline, folder)]
    couples = []
    for number, pair in enumerate(pairs, 1):
        where = f"{folder / 'pairs.jsonl'}: pair {number}"
        if pair["discarded"]:
            continue
        for side, name in zip(sides, ("baseline_run", "candidate_run")):
            if pair[name] not in side or not side[pair[name]].final:
                raise ValueError(f"{where}: {name} {pair[name]} is not a finished run of its folder")
        couple = [side[pair[name]] for side, name in zip(sides, ("baseline_run", "candidate_run"))]
        for key in ("device", "cpus", "threads", "world_size", "torch", "driver"):
            if couple[0].header.get(key) != couple[1].header.get(key):
                raise ValueError(f"{where}: {key} differs between the two runs")
        couples.append(couple)
    for name in ("baseline_run", "candidate_run"):
        if len({pair[name] for pair in pairs}) < len(pairs):
            raise ValueError(f"{folder / 'pairs.jsonl'}: {name} appears in two pairs")
    return judge(couples, pairs) | {"baseline": baseline.name}


def judge(couples: list[list[Run]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratio of training times (candidate over baseline), difference of losses, and what it is worth in steps.

    The number of pairs was fixed in advance when every pair says the same number and that many are there: paired t-test on
    the log ratios. Otherwise `stats.sequential` gives p and interval.
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
        "ratio": math.exp(sum(ratios) / len(ratios)), "low": math.exp(low), "high": math.exp(high) if high < 700 else None,
        "p": p, "faster": used >= stats.MINIMUM_PAIRS and p < stats.ALPHA,
        "loss": welch, "loss_per_step": slope, "steps_equivalent": welch["difference"] / slope if slope else None,
        "device": couples[-1][0].header.get("device"),
    }  # fmt: skip


def loss_per_step(runs: Sequence[Run], share: float = 0.2) -> float | None:
    """Slope of the training loss over the last `share` of the steps, averaged over runs (nats per token and step, < 0).

    Least squares over the logged steps. Inside the cooldown a curve falls faster than final losses do when the whole
    schedule is stretched, so dividing a difference of losses by this slope gives a cautious number of steps.
    """
    slopes = []
    for run in runs:
        points = [p for p in run.train if p.step > (1 - share) * run.final["step"]]
        if len(points) >= 3:
            x, y = [p.step for p in points], [p.loss for p in points]
            mx, my = sum(x) / len(x), sum(y) / len(y)
            slopes.append(sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x))
    slope = sum(slopes) / len(slopes) if slopes else 0.0
    return slope if slope < 0 else None


def summarize(folder: Path) -> dict[str, Any]:
    """result.json of a record, from its logs alone. ValueError (one line per problem) when they prove nothing."""
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
        machines[device] = stats.describe([r.final["train_time_s"] for r in runs if r.header.get("device", "") == device])
    # where the losses had a say in when to stop, the test must allow for that
    sequential = any(pair["planned"] is None for pair in pairs)
    p = stats.sequential([loss - target for loss in losses])["p_below"] if sequential else stats.p_below(losses, target)
    result = {
        "track": header["track"], "name": folder.name, "source_sha256": header["source_sha256"],
        "first_run": header["run_id"][:15], "target": target, "val_loss": stats.describe(losses),
        "margin": target - sum(losses) / len(losses), "p": p, "rule": "sequential" if sequential else "fixed",
        "reaches_target": p < stats.ALPHA, "steps": final["step"], "tokens": final["tokens"], "val_tokens": final["val_tokens"],
        "world_size": header["world_size"], "torch": header["torch"], "dtype": header.get("dtype"),
        "train_time_s": machines, "seeds": [run.header["seed"] for run in runs], "beats": [],
    }  # fmt: skip
    for baseline in dict.fromkeys(pair["baseline"] for pair in pairs):
        result["beats"].append(compare(folder.parent / baseline, folder, [p for p in pairs if p["baseline"] == baseline]))
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


def write(path: Path, text: str) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def verify(folder: Path) -> dict[str, Any]:
    """The claim of a record, recomputed; ValueError when it cannot be computed or its result.json says something else.

    result["holds"]: mean loss below the target with p < 0.01, and faster than every baseline it was timed against.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    result = summarize(folder)
    try:
        stored = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder / 'result.json'} is missing; `record.py run --runs 0` writes it") from None
    except ValueError:
        raise ValueError(f"{folder / 'result.json'} is not JSON") from None
    if not same(stored, result):
        keys = differing(stored, result) if isinstance(stored, dict) else ["it"]
        wrong = [k for k in keys if not isinstance(stored, dict) or not same(stored.get(k), result.get(k))]
        raise ValueError(f"{folder / 'result.json'}: {', '.join(wrong)} is not what the logs give; it was edited or is stale")
    return result | {"holds": result["reaches_target"] and all(b["faster"] for b in result["beats"])}


def record_folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/*/train_gpt.py"))


# ---------------------------------------------------------------------------------------------------------------------
# Running


def text_of(value: Any) -> str:
    """A setting as the command line of train_gpt.py reads it: lists of a log are tuples there."""
    if isinstance(value, list):
        return "(" + "".join(f"{text_of(v)}," for v in value) + ")"
    return str(value)


class Record:
    """A record folder that runs can be added to: its script, its settings and its seeds."""

    def __init__(self, folder: Path, options: Sequence[str], processes: int):
        self.folder, self.processes = folder, processes
        self.runs = read_runs(folder) if (folder / "runs").is_dir() else []
        self.track = folder.parent.name
        self.options = [*options] if options or not self.runs else self.options_of(self.runs[0])

    @staticmethod
    def options_of(run: Run) -> list[str]:
        """Options that give the settings of a run whatever the defaults of its script."""
        settings = {**flat(run.header["settings"]), "dtype": run.header["dtype"], "compile": run.header["compiled"]}
        return [word for key, value in settings.items() for word in (f"--{key}", text_of(value))]

    def next_seed(self) -> int:
        """Seeds follow from the folder's name and the source, so that nobody picks them and two records share none."""
        digest = hashlib.sha256(self.folder.name.encode() + (self.folder / "train_gpt.py").read_bytes()).hexdigest()
        discarded = [read_log(path) for path in (self.folder / "discarded").glob("*.jsonl")]
        used = {run.header["seed"] for run in (*self.runs, *discarded)}
        return next(seed for seed in itertools.count(int(digest[:6], 16)) if seed not in used)

    def run(self, seed: int, bar: tqdm, only_warm: bool = False) -> Run | None:
        """One complete run; its log grows in unfinished/ and moves to runs/ when it is whole.

        only_warm: stop when everything is compiled, which fills the compile cache, and return None.
        """
        scratch = self.folder / "unfinished"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        command = [sys.executable, *(launch if self.processes > 1 else []), str(self.folder / "train_gpt.py"),
                   "--track", self.track, "--seed", str(seed), "--out", str(scratch), *self.options]  # fmt: skip
        environment = {"DATA_DIR": str(ROOT / "data"), "CACHE_DIR": str(ROOT / ".cache")} | os.environ
        with open(scratch / "output.txt", "wb") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            try:
                while child.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(1)
                    line = last_event(scratch)
                    if line and only_warm:
                        return None
                    if line and "train_loss" in line:
                        bar.set_postfix_str(f"{self.folder.name} seed {seed} step {line['step']} loss {line['train_loss']:.3f}")
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if only_warm and child.returncode == 0:
            return None
        logs = list(scratch.glob("*.jsonl"))
        if child.returncode or not logs:
            said = (scratch / "output.txt").read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise ValueError(f"a run of {self.folder} failed, it said: {said[-1]}")
        run = read_log(logs[0])
        if self.runs and (keys := differing(flat(self.runs[0].header["settings"]), flat(run.header["settings"]))):
            raise ValueError(f"{self.folder} has runs with other settings ({', '.join(keys)}); choose another --name")
        (self.folder / "runs").mkdir(exist_ok=True)
        os.replace(logs[0], self.folder / "runs" / logs[0].name)
        shutil.rmtree(scratch)
        self.runs.append(read_log(self.folder / "runs" / logs[0].name))
        return self.runs[-1]

    def discard(self, run: Run) -> None:
        (self.folder / "discarded").mkdir(exist_ok=True)
        os.replace(run.path, self.folder / "discarded" / run.path.name)
        self.runs.remove(run)


def last_event(folder: Path) -> dict[str, Any] | None:
    """The last whole line of the log that is being written in a folder."""
    for path in folder.glob("*.jsonl"):
        lines = path.read_text().split("\n")[:-1]
        return json.loads(lines[-1]) if lines else None
    return None


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One timed thing at a time: two would slow each other."""
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another `record.py run` or `ab` is at work in {root}; two would slow each other") from None
        yield


def new_record(root: Path, track: str, name: str, source: Path) -> Path:
    """The folder <root>/<track>/<date>_<name> with a copy of the source; one that has this name and source goes on."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"a record's name has letters, digits, - and _, not {name!r}")
    for folder in sorted((root / track).glob(f"????-??-??_{name}")):
        if sha256(folder / "train_gpt.py") != sha256(source):
            raise ValueError(f"{folder} exists with another train_gpt.py; choose another --name")
        return folder
    folder = root / track / f"{time.strftime('%Y-%m-%d')}_{name}"
    folder.mkdir(parents=True)
    write(folder / "train_gpt.py", source.read_bytes().decode())
    return folder


def command_run(a: argparse.Namespace) -> int:
    folder = new_record(a.root, a.track, a.name, a.source)
    record = Record(folder, a.overrides, a.processes)
    with alone(a.root), tqdm(total=a.runs, initial=min(a.runs, len(record.runs)), unit="run", dynamic_ncols=True) as bar:
        while len(record.runs) < a.runs:
            run = record.run(record.next_seed(), bar)
            bar.update()
            final = run.final
            bar.write(f"{run.path.name}: validation loss {final['val_loss']:.4f} after {final['step']} steps, "
                      f"{final['train_time_s']:.2f} s")  # fmt: skip
    print(claim(write_result(folder)))
    return 0


def side(a: argparse.Namespace, path: Path, name: str | None, overrides: list[str]) -> Record:
    """A record folder as it is, or a new one for a script."""
    if (path / "train_gpt.py").is_file():
        return Record(path.resolve(), overrides, a.processes)
    if path.is_dir():
        raise ValueError(f"{path} is no record folder: it holds no train_gpt.py")
    if not name:
        raise ValueError(f"{path} is a file: --name says what its record folder is called")
    return Record(new_record(a.root, a.track, name, path), overrides, a.processes)


def command_ab(a: argparse.Namespace) -> int:
    baseline = side(a, a.baseline, a.name and f"{a.name}-baseline", [])
    candidate = side(a, a.candidate, a.name, a.overrides)
    if baseline.folder == candidate.folder or baseline.folder.parent != candidate.folder.parent:
        raise ValueError("baseline and candidate are two record folders of the same track")
    path, planned = candidate.folder / "pairs.jsonl", None if a.until_decided else a.pairs

    def ours() -> list[dict[str, Any]]:
        return [pair for pair in read_pairs(candidate.folder) if pair["baseline"] == baseline.folder.name]

    def valid() -> int:
        return sum(not pair["discarded"] for pair in ours())

    most, began = a.max_pairs if a.until_decided else a.pairs, time.monotonic()
    with alone(a.root), tqdm(total=most, initial=min(most, valid()), unit="pair", dynamic_ncols=True) as bar:
        if valid() < most:
            for record in (baseline, candidate):
                bar.set_postfix_str(f"filling the compile cache of {record.folder.name}")
                record.run(0, bar, only_warm=True)
        while valid() < most and not (a.until_decided and (settled(baseline, candidate, ours()) or overdue(a, began))):
            order = "baseline first" if len(ours()) % 2 == 0 else "candidate first"
            sides = (baseline, candidate) if order == "baseline first" else (candidate, baseline)
            runs = {record: record.run(record.next_seed(), bar) for record in sides}
            compiled = any(run.final["compiles_in_timed_region"] for run in runs.values())
            for record, run in runs.items() if compiled else ():
                record.discard(run)
            line = {
                "baseline": baseline.folder.name, "order": order, "planned": planned,
                "baseline_run": runs[baseline].header["run_id"], "candidate_run": runs[candidate].header["run_id"],
                "discarded": "a compile inside the clock" if compiled else None,
            }  # fmt: skip
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
            ratio = runs[candidate].final["train_time_s"] / runs[baseline].final["train_time_s"]
            bar.write(f"pair {len(ours())}: time ratio {ratio:.4f}" + (", discarded" if compiled else ""))
            bar.update(not compiled)
    write_result(baseline.folder)
    result = write_result(candidate.folder)
    print(claim(result))
    return 0


def settled(baseline: Record, candidate: Record, pairs: list[dict[str, Any]]) -> bool:
    """Whether `stats.sequential` has decided both questions of a record.

    Time: the candidate is faster, or slower, or within 1% of the baseline. Loss: its mean is below the target or above.
    """
    runs = [{run.header["run_id"]: run for run in record.runs} for record in (baseline, candidate)]
    good = [pair for pair in pairs if not pair["discarded"]]
    couples = [(runs[0][pair["baseline_run"]].final, runs[1][pair["candidate_run"]].final) for pair in good]
    time_rule = stats.sequential([math.log(c["train_time_s"] / b["train_time_s"]) for b, c in couples])
    loss_rule = stats.sequential([run.final["val_loss"] - run.final["target"] for run in candidate.runs])
    equal = max(abs(time_rule["low"]), abs(time_rule["high"])) < 0.01
    return (equal or decided(time_rule)) and decided(loss_rule)


def decided(rule: dict[str, Any]) -> bool:
    return min(rule["p_below"], rule["p_above"]) < stats.ALPHA


def overdue(a: argparse.Namespace, began: float) -> bool:
    return a.minutes is not None and time.monotonic() - began > 60 * a.minutes


# ---------------------------------------------------------------------------------------------------------------------
# Saying what was found


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def chance(p: float) -> str:
    return f"{p:.1g}" if p < 0.001 else f"{p:.3f}"


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
                     f"{number(loss['high'])}, Welch p {'-' if loss['p'] is None else chance(loss['p'])}{worth}")  # fmt: skip
    return "\n".join(lines)


def command_verify(a: argparse.Namespace) -> int:
    folders = a.folders or record_folders(a.root)
    if not folders:
        raise ValueError(f"{a.root} holds no record")
    reports, bad = [], False
    for folder in tqdm(folders, unit="record", disable=len(folders) < 2 or None):
        try:
            result = verify(folder.resolve())
            text = claim(result) + f"\n  {'holds' if result['holds'] else 'DOES NOT HOLD'}"
            reports.append(result)
        except ValueError as error:
            text, result = f"{folder.name}: REFUSED\n" + "\n".join(f"  {line}" for line in str(error).splitlines()), {}
            reports.append({"name": folder.name, "holds": False, "refused": str(error).splitlines()})
        bad |= not result.get("holds")
        if not a.json:
            print(text)
    if a.json:
        print(json.dumps(reports, indent=1))
    return int(bad)


def command_plan(a: argparse.Namespace) -> int:
    n = stats.runs_needed(a.sd, a.margin, a.power)
    print(f"{n} runs: with sd {a.sd} and a true margin of {a.margin}, p < {stats.ALPHA} has probability {a.power} or more")
    return 0


def command_import(a: argparse.Namespace) -> int:
    if not a.folder.is_dir():
        raise ValueError(f"{a.folder} is not a folder")
    runs, refused = public_runs(a.folder)
    if not runs:
        raise ValueError(f"{a.folder} holds no log of the public speedrun" + "".join(f"\n  {line}" for line in refused))
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        key = run.header["source_sha256"], run.header["steps"], run.final["step"], run.header["world_size"], run.header["torch"]
        groups.setdefault(key, []).append(run)
    report = []
    for (digest, steps, last, world_size, torch), members in groups.items():
        losses, seconds = [run.final["val_loss"] for run in members], [run.final["train_time_s"] for run in members]
        report.append({
            "folder": os.path.commonpath([str(run.path.parent) for run in members]), "source_sha256": digest, "steps": steps,
            "last_step": last, "world_size": world_size, "torch": torch, "device": members[0].header["device"],
            "target": a.target, "val_loss": stats.describe(losses), "p": stats.p_below(losses, a.target),
            "train_time_s": stats.describe(seconds), "files": [run.path.name for run in members],
        })  # fmt: skip
    if a.json:
        print(json.dumps({"groups": report, "refused": refused}, indent=1))
        return 0
    for group in report:
        loss, seconds = group["val_loss"], group["train_time_s"]
        print(f"{group['folder']}: {loss['n']} runs of {group['last_step']} of {group['steps']} steps, mean validation loss "
              f"{loss['mean']:.5f}, sd {number(loss['sd'], 5)}, p {chance(group['p'])} against {a.target}; training time mean "
              f"{seconds['mean']:.2f} s, sd {number(seconds['sd'], 2)}; "
              f"{group['world_size']} x {group['device'] or 'unknown device'}, torch {group['torch'] or 'unknown'}, "
              f"source {group['source_sha256'][:12]}")  # fmt: skip
    if len(report) > 1:
        print(f"{len(report)} groups: sources, steps, torch versions or numbers of processes differ, so they are not one claim")
    for line in refused:
        print(f"not read: {line}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Tables


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
        settings = read_runs(root / track / r["name"])[0].header["settings"]
        data = {key: value for key, value in settings["data"].items() if key != "epochs"}
        key = json.dumps([settings["model"], data, settings["schedule"]["windows"]], sort_keys=True)
        groups.setdefault(key, []).append((r["steps"], r["val_loss"]["mean"], r, settings))
    lines = []
    for members in sorted(groups.values(), key=lambda members: min(m[:2] for m in members)):
        model, data = members[0][3]["model"], members[0][3]["data"]
        first = min((m[2] for m in members), key=lambda r: r["first_run"])
        lines += ["", f"Track `{track}`, model and batch of {first['name']} ({model['layers']} blocks x {model['width']}, "
                  f"{data['rows'] * data['row_tokens']:,} tokens in a step):", ""]  # fmt: skip
        lines += ["| rank | record | optimizer of the matrices | steps | validation loss: mean, n, p |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for place, (steps, _, r, settings) in enumerate(sorted(members, key=lambda m: m[:2]), 1):
            where = link(root / track / r["name"], beside)
            lines.append(f"| {place} | {where} | {optimizer_of(settings)} | {steps:,} | {loss_of(r)} |")
    return lines[1:]


TABLES: dict[str, Callable] = {"records": history_table, "steps": steps_table}


def with_tables(text: str, root: Path, beside: Path) -> str:
    """A markdown text with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text.partition(begin)[2]:
            continue
        lines: list[str] = []
        for track in sorted({folder.parent.name for folder in record_folders(root)}):
            folders = [folder for folder in record_folders(root) if folder.parent.name == track]
            files = [folder / "result.json" for folder in folders]
            results = [json.loads(path.read_text()) for path in files if path.is_file()]
            if proven := [result for result in results if result["reaches_target"]]:
                lines += ["", *make(track, proven, root, beside)]
        head, _, rest = text.partition(begin)
        text = head + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]
    return text


def command_table(a: argparse.Namespace) -> int:
    stale = []
    for path in (a.root.parent / "README.md", a.root / "README.md"):
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        text = path.read_text(encoding="utf-8")
        fresh = with_tables(text, a.root, path.parent)
        if fresh != text:
            stale.append(path.name if path.parent == a.root.parent else f"{a.root.name}/{path.name}")
            if not a.check:
                write(path, fresh)
    if stale:
        print(f"{'stale' if a.check else 'written'}: {', '.join(stale)}")
    return int(a.check and bool(stale))


def command_plot(a: argparse.Namespace) -> int:
    import figures

    if a.kind == "history":
        if len(a.runs) != 1:
            raise ValueError("plot history takes one track")
        track = a.root / str(a.runs[0])
        results = [json.loads(path.read_text()) for path in sorted(track.glob("*/result.json"))]
        if not results:
            raise ValueError(f"{track} holds no record with a result.json")
        figures.history(history(results), {r["name"]: title(track / r["name"]) for r in results}, a.out)
    elif a.kind == "curves":
        figures.curves(a.runs, a.loss, a.span, a.out)
    elif len(a.runs) != 2:
        raise ValueError("plot leading takes two arguments: run A and run B")
    else:
        figures.leading(*a.runs, a.loss, a.span, a.out)
    print(a.out)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    argv, overrides = (list(argv), []) if "--" not in argv else (argv[: argv.index("--")], argv[argv.index("--") + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=RECORDS, help="folder of the tracks (default: records/)")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    p = command("run", command_run, "N complete runs with independent seeds into records/<track>/<date>_<name>/; "
                "goes on where it was interrupted. Options after -- go to train_gpt.py.")  # fmt: skip
    p.add_argument("--track", default="tiny")
    p.add_argument("--name", required=True, help="of the record")
    p.add_argument("--runs", type=whole, required=True, help="in all, those that are there included; 0 only writes result.json")
    p.add_argument("--source", type=Path, default=ROOT / "train_gpt.py", help="script to run (default: train_gpt.py)")
    p.add_argument("--processes", type=positive, default=1, help="processes of a run, one for each GPU (default: 1)")

    p = command("ab", command_ab, "Interleaved A/B on this machine: ratio of the training times, difference of the losses. "
                "The order is swapped from pair to pair, caches are warm, a pair with a compile inside the clock does not "
                "count. Options after -- go to the candidate.")  # fmt: skip
    p.add_argument("--baseline", type=Path, required=True, help="record folder or script")
    p.add_argument("--candidate", type=Path, required=True, help="record folder or script")
    p.add_argument("--pairs", type=positive, default=stats.MINIMUM_PAIRS, help="valid pairs in all (default: 5)")
    p.add_argument("--until-decided", action="store_true", help="go on until time and loss are settled (sequential test)")
    p.add_argument("--max-pairs", type=positive, default=40, help="with --until-decided (default: 40)")
    p.add_argument("--minutes", type=float, help="with --until-decided: no new pair after this time")
    p.add_argument("--track", default="tiny", help="where a script's record folder is made")
    p.add_argument("--name", help="of the record that is made for a script")
    p.add_argument("--processes", type=positive, default=1, help="processes of a run (default: 1)")

    p = command("verify", command_verify, "Recompute each claim from the logs alone; exit status 0 only if all hold.")
    p.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="record folders (default: all)")
    p.add_argument("--json", action="store_true", help="for machines")

    p = command("plan", command_plan, f"How many runs show p < {stats.ALPHA} with the wanted probability.")
    p.add_argument("--sd", type=float, required=True, help="spread of the final loss from seed to seed")
    p.add_argument("--margin", type=float, required=True, help="how far the true mean lies below the target")
    p.add_argument("--power", type=float, default=0.9, help="wanted probability (default: 0.9)")

    p = command("table", command_table, "Make the tables between the markers of README.md and records/README.md anew.")
    p.add_argument("--check", action="store_true", help="change nothing; exit status 1 when they are stale")

    p = command("plot", command_plot, "PNG figures. curves: loss against tokens, steps and time, mean and band over seeds. "
                "leading: how many more steps B needs for each loss of A. history: a track's records by date.")  # fmt: skip
    p.add_argument("kind", choices=("curves", "leading", "history"))
    p.add_argument("runs", nargs="+", type=Path, metavar="RUNS",
                   help="record folders, logs, folders of public logs; history: a track")  # fmt: skip
    p.add_argument("--loss", choices=("val", "train"), default="val", help="which curve (default: val)")
    p.add_argument("--span", type=positive, default=1, help="smoothing: steps of a running mean (default: 1, none)")
    p.add_argument("--out", type=Path, required=True, help="the PNG to write")

    p = command("import", command_import, "Statistics of the logs of the public speedrun below a folder.")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--target", type=float, default=3.28, help="validation loss (default: 3.28)")
    p.add_argument("--json", action="store_true", help="for machines")
    a = parser.parse_args(argv)
    if overrides and a.command not in ("run", "ab"):
        parser.error("only run and ab take options after --")
    a.root, a.overrides = a.root.resolve(), overrides
    return a


def whole(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError("not below 0")
    return int(text)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    a = parse(sys.argv[1:] if argv is None else list(argv))
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):  # also where the shell has told its background jobs to ignore them
            signal.signal(stop, signal.default_int_handler)
    try:
        return a.function(a)
    except (ValueError, OSError) as error:
        print(f"record.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("record.py: interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
