"""Prove that a change of train_gpt.py changed no number.

    python tools/same_results.py OLD NEW [--out DIR] [--only CASE ...] [--quick]
    python tools/same_results.py times OLD NEW [--out DIR] [--rounds 40] [--passes 1] [--threads 0]

OLD and NEW are files or git revisions: 3ab6d49, HEAD, path/to/train_gpt.py. Both do the same short
runs on the CPU, each in processes of its own: every track, one and two processes, float32 and
bfloat16, with and without a compiler, stopped and resumed. Every loss in the logs, all weights and
all optimizer state of the last checkpoint have to be the same numbers. So has what NEW makes of a
checkpoint of OLD: --adopt true goes on as OLD does, --evaluate and --sample give the same number and
text. The last thing printed is a table; the status is 1 when anything differs.

`times` trains `tiny`, compiled, with both in turns in one process: the ratio of their step times. A
pass takes as long as two runs; its interval halves with four times the passes.

--out DIR keeps the table (same-results.md, step-times.md), the runs and the compile cache in DIR; a
run of the same source, settings, versions and machine is not done again. --only takes parts of the
names of cases (--list prints them); --quick leaves out what takes longer than seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.builds import Build, Options, Outcome, Workplace, last_line, load_build, machine, reason

# ----------------------------------------------------------------------------------------
# Cases: what both builds run, in today's names (lib/builds.py translates them for an older build)
# ----------------------------------------------------------------------------------------

# One thread adds in one order. The log has the loss of every step.
COMMON = {"device": "cpu", "threads": 1, "compile": "none", "evaluation.log_every": 1}

# Three stages of three steps.
TINY = COMMON | {
    "schedule.steps": 9,
    "evaluation.tokens": 20_000, "evaluation.row_tokens": 8192, "evaluation.every": 4,
}  # fmt: skip

# The tracks of GPUs as they are, but narrower, with fewer and shorter rows and documents, windows that
# fit them, a small table of n-grams and few steps. They still cross every stage, the extension and the
# step at which the head and the embedding part. The logits of GPT-2's vocabulary take nearly all of
# the time: most cases have a small one.
NARROW = COMMON | {
    "data.rows": 2, "model.ngrams": ((2, 9973),),
    "schedule.extension": 2, "schedule.momentum_warmup": 3, "schedule.momentum_cooldown": 2,
    "evaluation.tokens": 1000, "evaluation.row_tokens": 512, "evaluation.every": 3,
    "evaluation.windows": (96, 320),
}  # fmt: skip
FEW_TOKENS = {
    "data.corpus": "few_tokens", "data.vocab_size": 1025, "data.document_start": 1024,
    "model.padded_vocab": 1088,
}  # fmt: skip
WIDE_SHORT = NARROW | {
    "data.row_tokens": 128, "model.width": 48, "schedule.steps": 6,
    "schedule.stages": (
        (0, (16, 48), 1, 112, 1.0, ((0.5, 0.5), (0.25, 0.0))),
        (1 / 3, (48, 112), 2, 256, 1.52, ((0.5, 0.0),)),
        (2 / 3, (80, 176), 3, 256, 1.73),
        (1, (96, 208), 3, 256),
    ),
}  # fmt: skip
SHORT = WIDE_SHORT | FEW_TOKENS | {"data.row_tokens": 256}
MEDIUM = NARROW | FEW_TOKENS | {
    "data.row_tokens": 128, "model.width": 64, "schedule.steps": 12,
    "schedule.stages": (
        (0, (8, 24), 1, 100, 1.0, ((0.5, 0.5), (0.25, 0.0))),
        (1 / 12, (24, 56), 2, 100, 1.52, ((0.5, 0.0),)),
        (2 / 12, (40, 88), 3, 100, 1.73),
        *((i / 12, (24 + 8 * i, 56 + 16 * i), 4, 100, 2.0) for i in range(3, 9)),
    ),
}  # fmt: skip

ADAMW = {
    "matrix.kind": "adam", "matrix_adam.lr": 0.003, "matrix_adam.weight_decay": 0.1,
    "gate.kind": "adam", "gate_adam.lr": 0.003, "gate_adam.weight_decay": 0.1,
}  # fmt: skip
OTHER_MUON = {
    "matrix.equilibrate": "col", "matrix.orthogonalize": "newton_schulz", "matrix.iterations": 6,
    "matrix.norm_bound": "spc", "matrix.scale": "match_rms_adamw", "matrix.nesterov": False,
    "matrix.normuon": False, "matrix.weight_decay": 0.1, "schedule.decay_power": 2.0,
    "gate.equilibrate": "row", "gate.iterations": 3,
    "tables.weight_decay": 0.01, "tables.cautious": True, "embed.every": 3,
}  # fmt: skip
ROWCOL = {
    "matrix.equilibrate": "rowcol", "matrix.phase": 4, "matrix.equilibrate_exponent": -0.4,
    "matrix.mlp_lr_mul": (0.5, 2.0), "matrix.cautious": True, "matrix.weight_decay": 0.1,
}  # fmt: skip
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
LOW_MEMORY, ONE_ROW = {"memory": "low"}, {"micro_rows": 1}
PARTS = {"compile": "parts"}
AS_IT_IS = {"threads": 1, "device": "cpu", "compile": "whole", "schedule.steps": 200}


@dataclasses.dataclass(frozen=True)
class Case:
    track: str
    settings: Options
    processes: int = 1
    middle: int = 0  # a step at which it is also stopped and resumed; 0: none
    used: bool = False  # whether its checkpoint is also evaluated and sampled from
    quick: bool = False

    @property
    def steps(self) -> int:
        return self.settings["schedule.steps"] + self.settings.get("schedule.extension", 0)

    @property
    def options(self) -> dict[str, Any]:
        """With a checkpoint at the end, and one in the middle."""
        return {"track": self.track, **self.settings, "checkpoint_every": self.middle or self.steps}


CASES = {
    "tiny, float32": Case("tiny", TINY | FP32, middle=5, used=True, quick=True),
    "tiny, bfloat16": Case("tiny", TINY | BF16, quick=True),
    "tiny, float32, 2 processes": Case("tiny", TINY | FP32, 2),
    "tiny, bfloat16, 2 processes": Case("tiny", TINY | BF16, 2, middle=5),
    "tiny, bfloat16, low memory, rows one by one": Case("tiny", TINY | BF16 | LOW_MEMORY | ONE_ROW),
    "tiny, bfloat16, AdamW": Case("tiny", TINY | BF16 | ADAMW, quick=True),
    "tiny, bfloat16, rowcol that becomes row": Case("tiny", TINY | BF16 | ROWCOL, quick=True),
    "tiny, float32, other forms of Muon": Case("tiny", TINY | FP32 | OTHER_MUON, quick=True),
    "short, float32": Case("short", SHORT | FP32, middle=4),
    "short, bfloat16": Case("short", SHORT | BF16, used=True, quick=True),
    "short, float32, 2 processes": Case("short", SHORT | FP32, 2),
    "short, bfloat16, 2 processes": Case("short", SHORT | BF16, 2, middle=4),
    "short, bfloat16, low memory": Case("short", SHORT | BF16 | LOW_MEMORY),
    "short, bfloat16, AdamW": Case("short", SHORT | BF16 | {"matrix.kind": "adam"}),
    "short, bfloat16, GPT-2's vocabulary": Case("short", WIDE_SHORT | BF16),
    "medium, float32": Case("medium", MEDIUM | FP32),
    "medium, bfloat16": Case("medium", MEDIUM | BF16, quick=True),
    "medium, bfloat16, 2 processes": Case("medium", MEDIUM | BF16, 2),
    "tiny, compiled in parts": Case("tiny", TINY | PARTS),
    "tiny as it is, compiled": Case("tiny", AS_IT_IS, used=True),
}

# ----------------------------------------------------------------------------------------
# Comparison
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Count:
    """Numbers that were compared, and how many of them differ."""

    compared: int = 0
    different: int = 0

    def add(self, compared: int, different: int) -> None:
        self.compared += compared
        self.different += different


@dataclasses.dataclass
class Finding:
    """What a case showed."""

    losses: Count = dataclasses.field(default_factory=Count)
    weights: Count = dataclasses.field(default_factory=Count)
    state: Count = dataclasses.field(default_factory=Count)  # of the optimizer
    largest: float = 0.0  # absolute difference of any two numbers
    faults: list[str] = dataclasses.field(default_factory=list)  # everything else that is wrong
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def counts(self) -> dict[str, Count]:
        return {"losses": self.losses, "weights": self.weights, "optimizer state": self.state}

    @property
    def same(self) -> bool:
        return not self.faults and all(count.different == 0 for count in self.counts.values())

    def verdict(self) -> str:
        if self.same:
            return "same"
        wrong = [(what, x) for what, x in self.counts.items() if x.different]
        counted = [f"{x.different:,} of {x.compared:,} {what}" for what, x in wrong]
        return "DIFFERENT: " + "; ".join(counted + self.faults)

    def compare(self, case: Case, a: Outcome, b: Outcome, after: int = 0) -> None:
        """Two runs of a case: all losses after a step, and the last checkpoint."""
        self.compare_losses(a.losses(after), b.losses(after))
        self.compare_checkpoints(a.checkpoint(case.steps), b.checkpoint(case.steps))

    def compare_losses(self, a: Sequence[tuple], b: Sequence[tuple]) -> None:
        """(event, step, loss, tokens) of two logs."""
        places = [[(event, step, tokens) for event, step, _, tokens in side] for side in (a, b)]
        if places[0] != places[1] or not a:
            self.faults.append(f"{len(a)} and {len(b)} losses in the logs, or at other steps and tokens")
        self.losses.add(abs(len(a) - len(b)), abs(len(a) - len(b)))
        for (_, _, x, _), (_, _, y, _) in zip(a, b):
            self.compare_numbers(x, y)

    def compare_numbers(self, x: float | None, y: float | None) -> None:
        """Two losses; None is one that was not finite."""
        self.losses.add(1, int(x != y))
        if x != y:
            self.largest = max(self.largest, math.inf if x is None or y is None else abs(x - y))

    def compare_checkpoints(self, a: Path, b: Path) -> None:
        x, y = (torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in (a, b))
        for name in ("step", "tokens", "position"):
            if x[name] != y[name]:
                self.faults.append(f"{name} of the checkpoints is {x[name]} and {y[name]}")
        self.compare_tensors("weight", x["model"], y["model"], self.weights)
        self.compare_tensors("state", flat_state(x["optimizer"]), flat_state(y["optimizer"]), self.state)

    def compare_tensors(self, what: str, a: Mapping[str, Any], b: Mapping[str, Any], count: Count) -> None:
        """Tensors of the same names."""
        if missing := sorted(a.keys() ^ b.keys()):
            self.faults.append(f"only one checkpoint has {what} {', '.join(missing)}")
        for name in sorted(a.keys() & b.keys()):
            x, y = torch.as_tensor(a[name]), torch.as_tensor(b[name])
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                self.faults.append(f"{what} {name} is {x.dtype} {[*x.shape]} and {y.dtype} {[*y.shape]}")
            elif torch.equal(x, y):
                count.add(x.numel(), 0)
            else:
                gap = (x.double() - y.double()).abs().nan_to_num(math.inf)
                count.add(x.numel(), int((x != y).sum()))
                self.largest = max(self.largest, float(gap.max()))


def flat_state(optimizer: Mapping[str, Any]) -> dict[str, Tensor | int]:
    """Moments, master copies and counts of updates by parameter; how the groups are divided is no result.

    The count of a parameter that never had a gradient is left out: older builds count steps, younger ones 0.
    """
    parts = {"step": optimizer["step"]}
    for name, part in optimizer["state"].items():
        moments = [value for key, value in part.items() if key not in ("updates", "master")]
        never = not any(moment.any() for moment in moments)
        parts |= {f"{name}.{key}": value for key, value in part.items() if not (never and key == "updates")}
    return parts


# ----------------------------------------------------------------------------------------
# Checks: each gives a row of the table
# ----------------------------------------------------------------------------------------

Check = Callable[[Case, Build, Build, Workplace], Finding]


def check_run(case: Case, old: Build, new: Build, place: Workplace) -> Finding:
    """Both builds, from the start to the end."""
    finding = Finding()
    finding.compare(case, *(place.run(build, case.options, case.processes) for build in (old, new)))
    return finding


def check_resumed(case: Case, old: Build, new: Build, place: Workplace) -> Finding:
    """Each build, stopped and resumed, ends as it does without that; both end alike."""
    finding, ends = Finding(), []
    for build in (old, new):
        whole = place.run(build, case.options, case.processes)
        ends.append(place.run(build, case.options, case.processes, whole.checkpoint(case.middle)))
        finding.compare(case, whole, ends[-1])
    finding.compare(case, *ends)
    return finding


def check_adopted(case: Case, old: Build, new: Build, place: Workplace) -> Finding:
    """NEW refuses a checkpoint of OLD in one sentence, and adopts it to go on as OLD does."""
    finding = Finding()
    start = place.run(old, case.options, case.processes).checkpoint(case.middle)
    options = {**case.options, "resume": start}
    if old.digest == new.digest:
        finding.notes.append("the same source: nothing to refuse")
    elif case.processes == 1:
        refused = place.call(new, {**options, "out": place.folder / "refused"})
        lines = refused.stderr.strip().replace(str(start), start.name).splitlines()
        sentences = [line for line in lines if not line.startswith("train_gpt.py: loading torch")]
        if refused.returncode == 1 and len(sentences) == 1:
            finding.notes.append(f'refused: "{sentences[0]}"')
        else:
            said = f"status {refused.returncode}, {last_line(refused.stderr)}"
            finding.faults.append(f"not refused in one sentence: {said}")
    resumed = place.run(old, case.options, case.processes, start)
    adopted = place.run(new, {**options, "adopt": True}, case.processes)
    finding.compare(case, resumed, adopted, case.middle)
    return finding


def check_used(case: Case, old: Build, new: Build, place: Workplace) -> Finding:
    """--evaluate and --sample give the same for a checkpoint of OLD with both, and for one of NEW."""
    finding = Finding()
    of_old, of_new = (place.run(build, case.options).checkpoint(case.steps) for build in (old, new))
    pairs = (old, of_old), (new, of_old), (new, of_new)
    corpus = "few_bytes" if case.track == "tiny" else case.settings["data.corpus"]
    evaluate = {"evaluate": place.data / corpus / "val_000000.bin"}
    sample = {"sample": "KING HENRY:", "sample_tokens": 60, "temperature": 0.8}

    losses = [float(result_of_main(place, build, {"resume": path, **evaluate})) for build, path in pairs]
    for loss in losses[1:]:
        finding.compare_numbers(losses[0], loss)
    finding.notes.append(f"--evaluate: {losses[0]:.4f}")
    if case.track == "tiny":  # the text of the others needs the tokenizer of GPT-2
        texts = [result_of_main(place, build, {"resume": path, **sample}) for build, path in pairs]
        if texts[1:] != texts[:1] * 2:
            finding.faults.append(f"--sample gives {', '.join(texts)}")
        finding.notes.append(f"--sample: {texts[0][:25]} ...")
    return finding


def result_of_main(place: Workplace, build: Build, options: Options) -> str:
    """What `main` of a build returns, all digits of it; ValueError with what it said instead."""
    program = f"""
import sys
sys.path.insert(0, {str(build.script.parent)!r})
import train_gpt
print(ascii(train_gpt.main(sys.argv[1:])))
"""
    done = place.call(build, {"device": "cpu", "threads": 1, **options}, start=["-c", program])
    if done.returncode:
        raise ValueError(f"{build.side} failed: {reason(done.stderr)}")
    return last_line(done.stdout)


def checks_of(name: str, case: Case) -> Iterator[tuple[str, Check]]:
    """The rows that a case gives."""
    yield name, check_run
    if case.middle:
        yield f"{name}, resumed at step {case.middle}", check_resumed
        yield f"{name}, checkpoint of OLD adopted", check_adopted
    if case.used:
        yield f"{name}, checkpoint of OLD used", check_used


def check_all(cases: Mapping[str, Case], old: Build, new: Build, place: Workplace) -> dict[str, Finding]:
    findings: dict[str, Finding] = {}
    for case_name, case in cases.items():
        for name, check in checks_of(case_name, case):
            began = time.monotonic()
            try:
                findings[name] = check(case, old, new, place)
            except ValueError as error:  # a build cannot do it
                findings[name] = Finding(faults=[str(error).replace(f"{place.folder}/", "")])
            print(f"{time.monotonic() - began:6.1f} s  {name}: {findings[name].verdict()}", flush=True)
    return findings


def table(findings: Mapping[str, Finding]) -> str:
    heads = ["case", *(word for what in Finding().counts for word in (f"{what} compared", "differ"))]
    rows = [[*heads, "largest difference", "also"], ["---"] * (len(heads) + 2)]
    for name, finding in findings.items():
        counts = [f"{n:,}" for x in finding.counts.values() for n in (x.compared, x.different)]
        also = "; ".join([f"WRONG: {fault}" for fault in finding.faults] + finding.notes)
        rows.append([name, *counts, f"{finding.largest:.3g}", also.replace("|", "/").replace("\n", " ")])
    return "\n".join(markdown(rows))


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


# ----------------------------------------------------------------------------------------
# Step times
# ----------------------------------------------------------------------------------------


def load_module(build: Build) -> ModuleType:
    """The script as a module of its own: two builds share nothing but torch."""
    spec = importlib.util.spec_from_file_location(f"train_gpt_{build.side}", build.script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


class Racer:
    """A build's trainer, warm and at its first step. What is known here of its interface stands here."""

    def __init__(self, module: ModuleType, trainer: Any):
        self.trainer, self.clock = trainer, trainer.clock
        self.steps = module.total_steps(trainer.track.schedule)
        trainer.warm_up()
        set_stage = getattr(trainer, "set_stage", None) or trainer.enter  # its name in November 2026
        set_stage(0)
        packer = module.Packer(trainer.train_paths, trainer.track.data)
        self.batches = module.training_steps(packer, trainer.track, trainer.checked["documents"], 0, 1)

    def train(self, first: int, last: int) -> float:
        """Seconds of the steps first .. last - 1, which follow those before."""
        before = self.clock.seconds
        self.clock.start()
        for step in range(first, last):
            self.trainer.advance(step, self.batches)
        self.clock.stop()
        return self.clock.seconds - before


def seconds_in_turns(racers: Sequence[Racer], rounds: int) -> list[list[float]]:
    """Seconds of each block of steps of each of the two: whole schedules, the order swapped each time."""
    seconds: list[list[float]] = [[] for _ in racers]
    torch.compiler.set_stance("fail_on_recompile")  # both are warm: whatever is compiled now would be timed
    gc.collect()
    try:
        for turn in range(rounds):
            for side in (0, 1) if turn % 2 else (1, 0):
                first, last = (racers[side].steps * k // rounds for k in (turn, turn + 1))
                seconds[side].append(racers[side].train(first, last))
    finally:
        torch.compiler.set_stance("default")
    return seconds


def check_times(old: Build, new: Build, place: Workplace, args: argparse.Namespace) -> str:
    """A table with the ratio of the step times of `tiny`, compiled, and its 95% interval over the blocks."""
    from scipy import stats

    os.environ |= place.environment  # one compile cache for both
    modules = [load_module(build) for build in (old, new)]
    options = ["--track", "tiny", "--device", "cpu", "--compile", "whole", "--threads", str(args.threads)]
    options += ["--out", str(place.folder / "times")]

    def race(*trainers: Any) -> list[list[float]]:
        seconds: list[list[float]] = [[], []]
        for _ in range(args.passes):
            racers = [Racer(*pair) for pair in zip(modules, trainers)]
            for side, more in zip(seconds, seconds_in_turns(racers, args.rounds)):
                side += more
        return seconds

    # `main` gives its trainer to the function that it gets: that of NEW is made inside that of OLD
    seconds = modules[0].main(options, lambda a: modules[1].main(options, lambda b: race(a, b)))
    logs = np.log(seconds[1]) - np.log(seconds[0])
    mean = float(logs.mean())
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    ends = mean - half, mean + half
    cells = {
        "blocks": f"{len(logs)}",
        "OLD, s": f"{sum(seconds[0]):.2f}",
        "NEW, s": f"{sum(seconds[1]):.2f}",
        "mean log ratio NEW / OLD": f"{mean:+.5f}",
        "95% interval": " to ".join(f"{x:+.5f}" for x in ends),
        "as a ratio": f"{math.exp(mean):.4f}, {' to '.join(f'{math.exp(x):.4f}' for x in ends)}",
        "NEW slower by at most": f"{math.expm1(ends[1]):+.2%}",
    }
    title = f"Training of `tiny`, compiled, threads: {torch.get_num_threads()}, in turns in one process:"
    return "\n".join([title, "", *markdown([[*cells], ["---"] * len(cells), [*cells.values()]])])


# ----------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep table, runs and compile cache here")
    parser.add_argument("--only", metavar="CASE", nargs="+", default=[""], help="cases with such names")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--rounds", type=int, default=40, help="of times: blocks of steps, 30 to 200")
    parser.add_argument("--passes", type=int, default=1, help="of times: whole schedules of both builds")
    parser.add_argument("--threads", type=int, default=0, help="of times: 1 where others use the machine too")
    args = parser.parse_args(argv)
    args.cases = {name: case for name, case in CASES.items() if chosen(name, args.only)}
    if args.quick:
        args.cases = {name: case for name, case in args.cases.items() if case.quick}
    if not args.cases:
        parser.error("no such case; --list prints them")
    if not 30 <= args.rounds <= 200:
        parser.error("--rounds is 30 to 200")
    if args.passes < 1:
        parser.error("--passes is at least 1")
    return args


def chosen(name: str, words: Sequence[str]) -> bool:
    """Whether a case is one of the words, or has one in its name that is not itself the name of a case."""
    return name in words or any(word in name for word in words if word not in CASES)


def main(argv: Sequence[str]) -> int:
    if "--list" in argv:
        print("\n".join(name + " (quick)" * case.quick for name, case in CASES.items()))
        return 0
    times = argv[:1] == ["times"]
    args = parse(argv[times:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs, too
    try:
        return compare(args, times)
    except (ValueError, OSError) as error:
        print(f"same_results.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("same_results.py: interrupted; --out DIR keeps the runs that have ended", file=sys.stderr)
        return 130


def compare(args: argparse.Namespace, times: bool) -> int:
    """Do what the command line asks for, print and keep the table; the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.out or Path(scratch)).absolute()
        old = load_build("OLD", args.old, folder / "builds")
        new = load_build("NEW", args.new, folder / "builds")
        new = dataclasses.replace(new, again=new.digest == old.digest)
        place = Workplace(folder)
        findings = {} if times else check_all(args.cases, old, new, place)
        result = check_times(old, new, place, args) if times else table(findings)
        good = all(finding.same for finding in findings.values())
        builds = "\n".join(f"- {build.side}: `{build.name}`, sha256 {build.digest}" for build in (old, new))
        text = f"{time.strftime('%Y-%m-%d')}, {', '.join(machine())}\n\n{builds}\n\n{result}\n"
        print(f"\n{text}")
        if args.out:
            (folder / ("step-times.md" if times else "same-results.md")).write_text(text)
    if not times:
        print("no number differs" if good else "NOT the same: see the table")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
