"""Comparisons of variants from one small table: which is better, by how much, how surely.

    python tools/compare.py run FOLDER [--workers N] [--only VARIANT ...]    what FOLDER/table.json asks for
    python tools/compare.py time FOLDER [--rounds N] [--only VARIANT ...]    what variants cost in time
    python tools/compare.py report FOLDER [--check]                          FOLDER/report.md, its figures

The first two go on where they were stopped.

table.json:
    {"title": "What the parts are worth", "track": "tiny", "options": ["--schedule.steps", "130"],
     "seeds": 2, "finalist_seeds": 4,
     "variants": {"full": {},
                  "no n-grams": {"options": ["--model.ngrams", "()"], "against": "full",
                                 "why": "text for the report"},
                  "Muon": {"preset": "muon", "against": "full",
                           "grid": {"--matrix.lr": [0.02, 0.04, 0.08]}}}}

A variant's options follow those of its "preset" (lib/presets.py: the field's optimizers), which follow
those of the table.

Every variant, or every value of its `grid`, is run with `seeds` seeds, then with `finalist_seeds` (0)
further ones: of a grid only the value with the lowest mean of the final validation losses, which is then
judged by the further ones alone, since the runs that chose a value flatter it. Seeds count from
`first_seed` (0), for all variants alike. A variant may have its own `seeds` and `finalist_seeds`.

A difference is the mean over the seeds that a variant and its reference share, with the 95% interval and
two-sided p of the paired t-test: runs of one seed start from the same weights (where shapes agree) and
all see the same data in the same order, so what a seed does to both cancels, and unlike Welch's test
this one holds whether or not they are correlated. p is corrected over all differences of a report (Holm
1979), the intervals are not. A mean's own 95% interval is the t interval over its runs; those of two
variants may overlap although their difference is sure.

"pairs": true in the table adds the differences of all pairs of variants to the report, with a figure of
those to the lowest mean, and p is corrected over all of them. "curves": true adds a figure of the
training curves, and of the steps by which variants lead their references.

FOLDER/train_gpt.py is what is run: a copy of the repository's, unless one lies there already.
FOLDER/results.jsonl gets a line for each finished run; the report follows from it and the table alone.
--workers N divides the cores, or gives worker i the i-th GPU; then the report has no times, since runs
beside each other slow each other.

Runs that follow each other differ in time by much more than most variants do. `time` therefore trains
each variant and its reference in turns in one process (lib/in_turns.py), N rounds (40) of both
schedules, and each reference against itself, which shows how far such a ratio can be trusted;
FOLDER/times.jsonl gets a line for each pair, and the report their ratios.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lib import in_turns, threads
from lib.claims import ROOT, sha256, write
from lib.comparison import (
    HEADER,
    Job,
    Variant,
    add,
    best,
    planned,
    read_results,
    read_table,
    read_times,
    report,
)
from lib.logs import Point, Run, read_log
from lib.runner import alone, compiled, exit_status, positive, run_script

POINTS = 60  # of a training curve in results.jsonl, at most


def check_options(source: Path, variants: Sequence[Variant]) -> None:
    """ValueError now for what the script would refuse hours later."""
    script = in_turns.load(source)
    for v in variants:
        try:
            for value in v.values:
                script.check_settings(*script.parse_command_line(v.command(value)))
            for word in (*v.options, v.option):
                if word.partition("=")[0] in ("--track", "--seed", "--out", "--resume", "--adopt"):
                    raise ValueError(f"{word} is not for a variant to set")
        except ValueError as error:
            raise ValueError(f"variant {v.name!r}: {error}") from None


def thinned(points: Sequence[Point]) -> list[list[float]]:
    """[step, loss], at most `POINTS` of them: each is the mean of the points since the one before,
    the last step stays."""
    width = max(1, math.ceil(len(points) / POINTS))
    parts = [points[max(0, end - width) : end] for end in range(len(points), 0, -width)][::-1]
    return [[part[-1].step, round(sum(p.loss for p in part) / len(part), 5)] for part in parts]


def result_of(job: Job, options: list[str], is_alone: bool, run: Run) -> dict[str, Any]:
    """The line of results.jsonl.

    A run that diverged ends at its last finite loss and has the validation loss null.
    """
    last = max((*run.train, *run.val), key=lambda p: p.step, default=Point(0, math.nan, 0.0, 0))
    final = dict(step=last.step, val_loss=None, train_time_s=last.seconds, tokens=last.tokens,
                 target=run.header["settings"]["evaluation"]["target"], reached=False)  # fmt: skip
    if run.final:
        final = {key: run.final[key] for key in final}
    return {
        **job._asdict(), "options": options, "alone": is_alone,
        "header": {key: run.header[key] for key in HEADER}, "final": final, "train": thinned(run.train),
        "val": [[p.step, p.loss, p.seconds] for p in run.val],
    }  # fmt: skip


class Workers:
    """Runs jobs beside each other, each worker on its share of the cores and a GPU of its own."""

    def __init__(self, folder: Path, count: int):
        cores = sorted(os.sched_getaffinity(0)) if count > 1 else [0]
        if count > len(cores):
            raise ValueError(f"{count} workers are more than the {len(cores)} cores here")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        self.folder = folder
        self.count = count
        self.stopping = threading.Event()
        self.free = queue.SimpleQueue()
        for i in range(count):
            self.free.put((i, cores[i * (len(cores) // count) :][: len(cores) // count], gpus[i % len(gpus)]))

    def run(self, job: Job, options: list[str], say: Callable[[str], None]) -> dict[str, Any] | None:
        """The result of a job, in a thread of its own; None when all are to stop."""
        number, cores, gpu = own = self.free.get()
        if self.count > 1:
            os.sched_setaffinity(0, cores)  # of this thread, and so of the processes that it starts
        name = f"{job.variant}, " + f"{job.value}, " * (job.value is not None) + f"seed {job.seed}"

        def heard(event: dict[str, Any]) -> bool:
            say(f"{name}, step {event.get('step', 0)}")
            return self.stopping.is_set()

        try:
            scratch = self.folder / "unfinished" / str(number)
            source = self.folder / "train_gpt.py"
            words = [*compiled(source, options[1]), *options, "--seed", str(job.seed)]  # --track comes first
            environment = {"CUDA_VISIBLE_DEVICES": gpu} if self.count > 1 else {}
            status, said = run_script(source, words, scratch, heard, environment=environment)
            if status is None:
                return None
            logs = list(scratch.glob("*.jsonl"))
            if not logs or status and "not finite at step" not in said:
                raise ValueError(f"{name} failed, it said: {said}")
            return result_of(job, options, self.count == 1, read_log(logs[0]))
        finally:
            self.free.put(own)


def choose(variants: Sequence[Variant], names: Sequence[str] | None) -> list[Variant]:
    """The variants of --only, or all."""
    if unknown := set(names or ()) - {v.name for v in variants}:
        raise ValueError(f"--only {min(unknown)!r} is not a variant of the table")
    return [v for v in variants if not names or v.name in names]


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What adds a line to the file `path`, at once; nothing else is timed meanwhile."""

    def keep(line: dict[str, Any]) -> None:
        file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        file.flush()

    with alone(ROOT / "records"), open(path, "a+b") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)  # a kill can tear the last line
        yield keep


def source_of(folder: Path, variants: Sequence[Variant], known: Iterable[str]) -> Path:
    """What is run in a folder, the repository's script in a new one; ValueError when lines are
    `known` from another."""
    source = folder / "train_gpt.py"
    if not source.exists():
        write(source, (ROOT / "train_gpt.py").read_bytes())
    if {*known} - {sha256(source)}:
        raise ValueError(
            f"{source} is not what {folder} was run with; a folder goes on only with the same source"
        )
    check_options(source, variants)
    return source


def command_run(a: argparse.Namespace) -> int:
    _, variants = read_table(a.folder)
    chosen = choose(variants, a.only)
    workers = Workers(a.folder, a.workers)
    named = {v.name: v for v in variants}
    with growing(a.folder / "results.jsonl") as keep:
        results = read_results(a.folder, variants)
        source_of(a.folder, variants, (line["header"]["source_sha256"] for line in results.values()))
        total = sum(len(v.screen()) + len(v.further) for v in chosen)
        bar = tqdm(
            total=total,
            initial=sum(job in results for job in planned(chosen, results)),
            unit="run",
            dynamic_ncols=True,
        )
        while todo := [job for job in planned(chosen, results) if job not in results]:
            with concurrent.futures.ThreadPoolExecutor(a.workers) as pool:
                commands = [(job, named[job.variant].command(job.value), bar.set_postfix_str) for job in todo]
                futures = [pool.submit(workers.run, *command) for command in commands]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        add(results, line := future.result())
                        keep(line)
                        bar.update()
                except BaseException:
                    workers.stopping.set()
                    pool.shutdown(cancel_futures=True)
                    bar.close()
                    raise
        bar.close()
    shutil.rmtree(a.folder / "unfinished", ignore_errors=True)
    return 0


def command_time(a: argparse.Namespace) -> int:
    if a.rounds < 2:
        raise ValueError("one round has no interval; --rounds is at least 2")
    _, variants = read_table(a.folder)
    named, chosen = {v.name: v for v in variants}, choose(variants, a.only)
    with growing(a.folder / "times.jsonl") as keep:
        results, times = read_results(a.folder, variants), read_times(a.folder, variants)
        source = source_of(a.folder, variants, (line["source_sha256"] for line in times.values()))
        references = dict.fromkeys(v.against for v in chosen if v.against)
        pairs = [*((name, name) for name in references), *((v.name, v.against) for v in chosen if v.against)]
        for pair in tqdm([pair for pair in pairs if pair not in times], unit="pair", dynamic_ncols=True):
            values = {name: best(named[name], results) for name in pair}
            if first := [name for name in pair if named[name].option and values[name] is None]:
                raise ValueError(f"the grid of {first[0]!r} has no best value yet; `run` comes before `time`")
            options = [named[name].command(values[name]) for name in pair]
            compiling = [compiled(source, words[1]) + words for words in options]  # --track comes first
            words = [str(source), str(a.rounds), *map(json.dumps, compiling)]
            status, said = run_script(
                Path(in_turns.__file__), words, a.folder / "unfinished", lambda _: False,
                environment=threads.waiting(),
            )  # fmt: skip
            if status:
                raise ValueError(f"{pair[0]} against {pair[1]} failed, it said: {said}")
            keep({"variant": pair[0], "against": pair[1], "options": options, **json.loads(said)})
    shutil.rmtree(a.folder / "unfinished", ignore_errors=True)
    return 0


def command_report(a: argparse.Namespace) -> int:
    stale = []
    with tempfile.TemporaryDirectory() as made:
        report(a.folder, Path(made))
        for fresh in sorted(Path(made).iterdir()):
            path = a.folder / fresh.name
            # pixels depend on matplotlib's version; what they show stands in the text
            counts = path.suffix == ".md" or not a.check
            if not path.exists() or counts and path.read_bytes() != fresh.read_bytes():
                stale.append(fresh.name)
                if not a.check:
                    write(path, fresh.read_bytes())
    if stale:
        print(f"{'stale' if a.check else 'written'} in {a.folder}: {', '.join(stale)}")
    return int(a.check and bool(stale))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="what table.json asks for and results.jsonl does not have yet")
    p.add_argument("folder", type=Path, metavar="FOLDER", help="holds table.json")
    p.add_argument(
        "--workers",
        type=positive,
        default=1,
        help="runs beside each other (default: 1, only then times count)",
    )
    p.add_argument("--only", nargs="+", metavar="VARIANT", help="no other variants")
    p.set_defaults(function=command_run)
    p = commands.add_parser("time", help="training times of variants and references, in turns in one process")
    p.add_argument("folder", type=Path, metavar="FOLDER", help="holds table.json")
    p.add_argument(
        "--rounds", type=positive, default=40, help="parts into which both schedules are cut (default: 40)"
    )
    p.add_argument("--only", nargs="+", metavar="VARIANT", help="no other variants")
    p.set_defaults(function=command_time)
    p = commands.add_parser("report", help="report.md and figures from results.jsonl and table.json")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    p.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 when the report is stale"
    )
    p.set_defaults(function=command_report)
    a = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    return exit_status("compare.py", lambda: a.function(a))


if __name__ == "__main__":
    sys.exit(main())
