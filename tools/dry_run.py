"""A run on GPUs that you do not have: does it fit, what does it move, how long must it take at least?

    python tools/dry_run.py --gpu h100 --gpus 8 --track short      any option of train_gpt.py may follow
    python tools/dry_run.py --gpu 4090 --memory low                a card of 24 GB
    python tools/dry_run.py --compile none                         uncompiled only: ten seconds
    python tools/dry_run.py --compile parts                        and all kernels to machine code: minutes
    python tools/dry_run.py --script OLD/train_gpt.py --json FILE  another build; all counts as JSON
    python tools/dry_run.py --expect tools/expected.json           keeps what on_gpu.py compares with

The whole of train_gpt.py runs, with a schedule of a few steps for each stage, on tensors without content:
first uncompiled, then with the graphs of torch.compile, whose kernels are written and counted. This shows
whether shapes, dtypes, devices and schedule fit together, and counts memory, bytes and communication. It
needs no GPU, but a CUDA build of torch (on Linux, `pip install torch` brings one) and gcc; with less it does
what it can and says what is missing. docs/DRY_RUN.md says how it works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from lib import cards, cubins, dry_report, expected, floors, made_up, watched  # noqa: E402
from lib.watched import Found  # noqa: E402

VALIDATION_ROWS = 2  # of each rank
NOT_PROVEN = (
    "Not proven by this: any number that a kernel computes, that a kernel launches, any speed, NCCL, "
    "streams, the allocator's fragmentation."
)
HOW_TO_GET = "`pip install torch` on Linux brings a CUDA build, which needs no GPU"
# What is tried, one after the other, where a run does not fit.
LESS_MEMORY = (["--micro_rows", "1"], ["--memory", "low"], ["--memory", "low", "--micro_rows", "1"])


class Options(NamedTuple):
    """The tool's own options; the others are those of train_gpt.py."""

    gpu: str
    gpus: int
    mode: str  # "none": uncompiled only, or the graphs of train_gpt.py's --compile
    kernels: bool  # whether the kernels of the graphs are compiled too
    script: Path
    json: Path | None
    expect: Path | None  # where to keep what tools/on_gpu.py sets beside its measurements
    others: list[str]


def read_options(words: Sequence[str]) -> Options:
    """ValueError for what does not exist or fit."""
    own = {"gpu": "h100", "gpus": "1", "compile": "", "script": str(ROOT / "train_gpt.py"), "json": ""}
    own["expect"] = ""
    words, others = list(words), []
    while words:
        name, _, value = words.pop(0).partition("=")
        if name.removeprefix("--") not in own:
            others.append(f"{name}={value}" if value else name)
            continue
        value = value or (words.pop(0) if words and not words[0].startswith("--") else "")
        if not value:
            raise ValueError(f"{name} needs a value")
        own[name.removeprefix("--")] = value
    if own["gpu"] not in cards.CARDS:
        raise ValueError(f"--gpu is one of {', '.join(cards.CARDS)}, not {own['gpu']!r}")
    if not own["gpus"].isdecimal() or int(own["gpus"]) == 0:
        raise ValueError(f"--gpus is a number of GPUs, not {own['gpus']!r}")
    if own["compile"] not in ("", "parts", "whole", "none"):
        raise ValueError(f"--compile is parts, whole or none, not {own['compile']!r}")
    script = Path(own["script"]).resolve()
    if not script.is_file():
        raise ValueError(f"--script {script} is missing")
    if not any(word.partition("=")[0] == "--track" for word in others):
        others += ["--track", "short"]
    place, expect = (Path(own[name]) if own[name] else None for name in ("json", "expect"))
    mode, kernels = own["compile"] or "parts", own["compile"] in ("parts", "whole")
    return Options(own["gpu"], int(own["gpus"]), mode, kernels, script, place, expect, others)


def load_script(path: Path) -> Any:
    """The module train_gpt of a file."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Saying:
    """What is being done, on stderr: a line drawn anew, or without a terminal one every five seconds."""

    def __init__(self) -> None:
        self.began, self.what, self.doing = time.monotonic(), "loading torch", ""
        self.terminal = sys.stderr.isatty()
        self.ended = threading.Event()
        threading.Thread(target=self.keep_saying, daemon=True).start()

    def __call__(self, what: str) -> None:
        self.what = what

    def keep_saying(self) -> None:
        start, end = ("\r\033[K", "") if self.terminal else ("", "\n")
        while not self.ended.is_set():
            seconds = time.monotonic() - self.began
            line = f"{start}dry_run.py: {self.doing}{self.what}, {seconds:.0f} s"
            print(line, end=end, file=sys.stderr, flush=True)
            self.ended.wait(0.5 if self.terminal else 5.0)

    def end(self) -> None:
        self.ended.set()
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class DryRun:
    """The runs of one command line. `on_cpu`: the tensors without content are those of a CPU."""

    def __init__(self, options: Options, folder: Path, on_cpu: bool, say: Saying):
        from lib.fake_gpu import FakeGPU, fake_ranks

        self.options, self.folder, self.on_cpu, self.say = options, folder, on_cpu, say
        self.card = cards.CARDS[options.gpu]
        self.gpu = FakeGPU(self.card, options.gpus, on_cpu)
        self.T = load_script(options.script)
        self.collectives: list[tuple] = []
        self.kernels: list[Any] = []  # of the graphs, and what became of them
        self.cubins: list[cubins.Cubin] = []
        if on_cpu:
            self.pretend_on_cpu()
        if options.gpus > 1:
            fake_ranks(self.T, options.gpus, self.collectives)
            size = str(options.gpus)
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        self.track, self.run_options = self.T.parse_command_line(options.others)
        made_up.read_as_text_would(self.T, self.track.model)
        self.short = watched.short_schedule(self.track)
        os.environ.update(DATA_DIR=str(folder / "data"), CACHE_DIR=str(folder / "cache"))
        self.make_data()

    def pretend_on_cpu(self) -> None:
        """The CPU has what the card has, and the optimizer does not cut its work for a CPU's cache."""
        import torch

        capability = self.card.capability
        has = {"fp8": capability >= (8, 9), "fa3": capability[0] == 9, "fa4": capability[0] in (9, 10)}
        self.T.supports = lambda device, feature: has.get(feature, True)
        self.T.Unit.SLICE = dict.fromkeys(self.T.Unit.SLICE, 2**62)
        if hasattr(self.T, "choose_memory"):
            properties = types.SimpleNamespace(total_memory=self.card.memory)
            torch.cuda.get_device_properties = lambda _: properties
            choose, cuda = self.T.choose_memory, torch.device("cuda")
            self.T.choose_memory = lambda run, _: choose(run, cuda)

    def make_data(self) -> None:
        """Made-up shards for the short schedule and a few validation rows."""
        tokens = VALIDATION_ROWS * self.options.gpus * self.track.evaluation.row_tokens
        evaluation = dataclasses.replace(self.short.evaluation, tokens=tokens)
        self.short = dataclasses.replace(self.short, evaluation=evaluation)
        steps = self.short.schedule.steps + self.short.schedule.extension
        made_up.make_tokens(self.folder / "data" / self.track.data.corpus, self.short, steps)

    def words(self, compiled: str) -> list[str]:
        """The command line for train_gpt.py; of an option that occurs twice the last one holds."""
        schedule = self.short.schedule
        values = {
            "compile": compiled,
            "out": self.folder / "logs",
            "schedule.steps": schedule.steps,
            "schedule.extension": schedule.extension,
            "evaluation.tokens": self.short.evaluation.tokens,
            "evaluation.every": 10**6,
            "evaluation.log_every": 1,
            "device": "cpu" if self.on_cpu else "cuda",
        }
        if self.run_options.dtype == "auto":
            values["dtype"] = "bfloat16"
        return [*self.options.others, *(word for name, x in values.items() for word in (f"--{name}", str(x)))]

    def run(self, compiled: str, *more: str) -> Found:
        """Train without content, in this mode of compilation, with `more` options."""
        import torch

        from lib.fake_gpu import CountingMode

        if "torch._dynamo" in sys.modules:  # of a run before
            torch.compiler.set_stance("default")
            torch.compiler.reset()
        mode = self.gpu.mode = CountingMode(self.gpu.mode.device_type)
        found, began = Found(compiled), time.monotonic()
        watcher = watched.Watcher(mode, self.collectives, self.say, found)
        self.say.doing = f"{' '.join(more)} {'uncompiled' if compiled == 'none' else 'compiled'}: ".lstrip()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), mode:
            warnings.simplefilter("ignore")
            final = self.T.main([*self.words(compiled), *more], watcher)
        found.seconds = time.monotonic() - began
        found.graphs["compiled while training"] = final["compiles_in_timed_region"]
        gc.collect()
        return found

    def run_compiled(self, *more: str) -> Found:
        """The same with graphs, whose kernels are written and counted."""
        from torch._dynamo.utils import counters

        counters.clear()
        self.compiler.kernels.clear()
        found = self.run(self.options.mode, *more)
        found.graphs |= {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "Triton kernels": len(self.compiler.kernels),
            "of them with several configurations": sum(
                len(kernel.configurations) > 1 for kernel in self.compiler.kernels.values()
            ),
        }
        return found

    def prepare_compiler(self) -> str:
        """Why there are no graphs, "" where there are."""
        if self.on_cpu:
            return "graphs need the device, see above"
        from lib import fake_gpu, fake_inductor

        if missing := fake_gpu.missing_names(fake_inductor.NAMES):
            return f"this torch or Triton has no {', '.join(missing)}"
        self.compiler = fake_inductor.FakeCompiler(self.gpu)
        return ""

    def all_runs(self) -> tuple[list[Found], list[str]]:
        """The runs, and what was left out."""
        run = functools.partial(self.run, "none")
        found, left_out = [run()], []
        if self.options.mode != "none":
            if why := self.prepare_compiler():
                left_out.append(f"left out: graphs, and memory and floor with them ({why})")
            else:
                run = self.run_compiled
                found.append(run())
                left_out += self.compile_kernels()
        if found[-1].needed() > self.card.memory:
            left_out += self.what_helps(run)
        return found, left_out

    def compile_kernels(self) -> list[str]:
        """The kernels of the last run to machine code, where that is asked for; what was left out."""
        from lib.fake_gpu import missing_names

        self.kernels = [*self.compiler.kernels.values()]
        if not self.options.kernels:
            return []
        if missing := missing_names(cubins.NAMES):
            return [f"left out: kernels to machine code (this torch or Triton has no {', '.join(missing)})"]
        self.say.doing = ""
        self.cubins = cubins.compile_kernels(self.kernels, self.card.shared, self.say)
        return []

    def what_helps(self, run: Any) -> list[str]:
        """The first of LESS_MEMORY with which it fits."""
        given = {word.partition("=")[0] for word in self.options.others}
        for words in LESS_MEMORY:
            if given & {*words}:
                continue
            found = run(*words)
            if found.needed() <= self.card.memory:
                return [f"with {' '.join(words)} it fits: {found.needed() / 1e9:.1f} GB"]
        return ["neither --memory low nor --micro_rows 1 is enough; with more GPUs each has less"]


# ---- what is said


def report(dry: DryRun, found: list[Found], left_out: list[str]) -> str:
    """The text that the user reads."""
    import torch

    options, card, last = dry.options, dry.card, found[-1]
    words, machine = " ".join(options.others), f"{options.gpus} x {card.title}"
    lines = [f"{words} on {machine}, torch {torch.__version__}, source {digest(options.script)}", ""]
    lines += [dry_report.verdict(run, card) for run in found] + left_out
    if options.mode != "none" and len(found) > 1:
        lines += [", ".join(f"{name} {number}" for name, number in last.graphs.items())]
    if dry.cubins:
        lines += [dry_report.kernel_counts(dry.cubins)]
    wasted = watched.steps_thrown_away(dry.track)
    if wasted:
        lines += [f"the last {wasted} of the steps: gradients of some groups are not applied"]
    lines += ["", *dry_report.memory_table(found)]
    if options.gpus > 1:
        lines += ["", *dry_report.communication_table(last)]
    lines += ["", *dry_report.pass_table(last, card)]
    lines += ["", *dry_report.update_table(found)]
    if dry.cubins:
        lines += ["", *dry_report.kernel_table(dry.cubins, dry.kernels)]
    for run in found:
        lines += ["", f"{dry_report.how(run)}:", "", *dry_report.floor_table(run, card, dry.track)]
    rates = f"{card.products / 1e12:.0f} Tflop/s in bfloat16, {card.fp8_products / 1e12:.0f} in FP8"
    rates += f", {card.bytes_per_s / 1e12:.2f} TB/s, {card.link / 1e9:.0f} GB/s to other GPUs"
    lines += ["", f"Floors are at {rates}, nothing beside anything else.", NOT_PROVEN]
    return "\n".join(lines)


def in_lists(counts: Counter) -> list[list]:
    """Counts as lists of (part, what, amount)."""
    return [[*key, amount] for key, amount in counts.items()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def as_json(dry: DryRun, found: list[Found]) -> dict[str, Any]:
    """All that was counted."""
    import torch

    kinds, runs = watched.kinds_of_steps(dry.track), []
    for run in found:
        steps = []
        for step in run.steps:
            counted = {"update_bytes": floors.moved_by_update(step.update_counts), "sent": step.sent}
            counted["update_launches"] = floors.sums(step.update_counts)["launches"]
            kept = ("passes", "all_groups", "pass_peaks", "update_peak", "collectives")
            steps.append({"kind": str(step.kind), **counted, **{name: getattr(step, name) for name in kept}})
        runs.append(
            {
                "compiled": run.compiled,
                "peaks": run.peaks(),
                "needed": run.needed(),
                "floors_s": {str(kind): run.floor(kind, dry.card)._asdict() for kind in kinds},
                "passes": {str(kind): in_lists(run.last_pass(kind)) for kind in run.kinds()},
                "steps": steps,
                "graphs": run.graphs,
                "seconds": run.seconds,
            }
        )
    counts = {str(kind): count for kind, count in kinds.items()}
    kernels = [{name: getattr(kernel, name) for name in ("name", "part", "launches", "bytes", "by_inductor")}
               for kernel in dry.kernels]  # fmt: skip
    source = {"source": digest(dry.options.script), "torch": torch.__version__}
    found = {"gpu": dry.options.gpu, "gpus": dry.options.gpus, **source, "steps": counts, "runs": runs}
    return found | {"kernels": kernels, "cubins": [dataclasses.asdict(cubin) for cubin in dry.cubins]}


def dry_run(options: Options, say: Saying) -> None:
    with tempfile.TemporaryDirectory(prefix="dry-run-") as place:
        folder = Path(place)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "kernels")  # before torch asks for it
        if not cards.cuda_build():
            why = f"this torch is built for CPUs; {HOW_TO_GET}"
        else:
            why = cards.false_driver(folder / "driver", options.gpus)
        dry = DryRun(options, folder, bool(why), say)
        found, left_out = dry.all_runs()
        if why:
            left_out.insert(0, f"left out: whether all tensors are on one device ({why})")
        say.end()
        print(report(dry, found, left_out))
        counts = as_json(dry, found)
        if options.json:
            options.json.write_text(json.dumps(counts) + "\n")
        if options.expect:
            name = expected.key(options.gpu, options.gpus, options.others)
            expected.keep(name, counts, options.expect)


def main() -> None:
    if {"--help", "-h"} & {*sys.argv[1:]}:
        return print(f"{__doc__.strip()}\n\n{cards.table()}")
    if driver := cards.real_driver():
        here = f"there is a GPU's driver here ({driver})"
        sys.exit(f"dry_run.py: {here}, beside which none may be put; tools/on_gpu.py measures instead")
    try:
        options = read_options(sys.argv[1:])
        say = Saying()
        dry_run(options, say)
    except ValueError as error:
        sys.exit(f"dry_run.py: {error}")


if __name__ == "__main__":
    main()
