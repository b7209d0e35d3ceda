"""Faults that are really injected into runs, and what is left of a run after them.

    python tests/faults.py kill --count 200 --seed 1   # kills, tears, flips, full disks in a short run
    python tests/faults.py disk                        # a disk that is really full; may need root to mount it
    python tests/faults.py soak --minutes 30           # runs of tiny under torchrun, killed at random

Every disturbed run is started again with its own command line, which says --resume, until it ends; then
its losses, its log and its weights are compared with those of the undisturbed run, bit for bit. Status 1
when anything differs.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "data")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train_gpt  # noqa: E402
from helpers import ROOT, TIMEOUT, Outcome, events, finish, make_corpus, options, start, train  # noqa: E402

SOURCE = str(ROOT / "train_gpt.py")
# embed and head wait for every second step: saved at 4, 6, 10, 12, 16, 18
CHECKPOINTS = dict(checkpoint_every=3)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One disturbance of one process: what, where, and how the checkpoints are damaged afterwards."""

    kind: str  # kill, write, full, SIGTERM, SIGINT, or time
    world_size: int
    victim: int  # rank
    place: str = ""  # function of train_gpt.py (kill, signals)
    # line event within it, byte of the files written (write, full), or share of the undisturbed time
    at: float = 0
    damage: str = ""  # tear or flip the newest checkpoint
    where: float = 0.0  # share of its length


# --------------------------------------------------------------------------------------------------
# Inside the disturbed process


class LineCounter:
    """Counts executed lines of train_gpt.py by function, in all threads; calls `act` at one of them."""

    def __init__(self, place: str = "", at: int = -1, act: Callable[[], None] | None = None):
        self.place, self.at, self.act = place, at, act
        self.counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> LineCounter:
        threading.settrace(self.enter)
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)
        threading.settrace(None)

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return self.line if code.co_filename == SOURCE and self.place in ("", code.co_qualname) else None

    def line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            name = frame.f_code.co_qualname
            self.counts[name] += 1
            if self.place == name and self.counts[name] == self.at and self.act:
                self.act()
        return self.line


class CountedFile:
    """A file opened for writing that stops after a number of bytes, counted over all files of the run."""

    def __init__(self, file: Any, budget: list[float], stop: Callable[[], None]):
        self.file, self.budget, self.stop = file, budget, stop

    def write(self, content: Any) -> int:
        content = memoryview(content).cast("B")
        room = int(min(len(content), self.budget[0]))
        self.budget[0] -= len(content)
        self.file.write(content[:room])
        if self.budget[0] < 0:
            self.file.flush()
            self.stop()
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __iter__(self) -> Any:
        return iter(self.file)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def limited_writes(limit: float, folder: str, stop: Callable[[], None]) -> contextlib.ExitStack:
    """Let all files that train_gpt.py writes below `folder` hold `limit` bytes in all."""
    budget, plain = [limit], builtins.open

    def counted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = plain(file, mode, *args, **kwargs)
        return (
            CountedFile(opened, budget, stop)
            if str(file).startswith(folder) and set(mode) & set("wa+")
            else opened
        )

    stack = contextlib.ExitStack()
    train_gpt.open = counted
    stack.callback(lambda: delattr(train_gpt, "open"))
    return stack


def no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def disturbance(fault: Fault | None, out: str) -> Any:
    """What makes the fault happen in this process while it is entered."""

    def send(number: int) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), number)

    if fault is None or fault.kind == "time":
        return contextlib.nullcontext()
    if fault.kind == "blind":  # to the disk that it is about to fill
        return mock.patch.object(train_gpt.Trainer, "check_disk", lambda *_: None)
    if fault.kind in ("write", "full"):
        return limited_writes(fault.at, out, no_space if fault.kind == "full" else send(signal.SIGKILL))
    number = signal.SIGKILL if fault.kind == "kill" else getattr(signal, fault.kind)
    return LineCounter(fault.place, int(fault.at), send(number))


def child(
    rank: int, world_size: int, port: int, argv: list[str], folder: Path, fault: Fault | None, count: bool
) -> None:
    """One rank; leaves what it printed and, when it comes to the end, its Outcome (and its line
    counts) in `folder`."""
    output = os.open(folder / f"output_{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mine = fault if fault and fault.victim == rank else None
    with LineCounter() if count else disturbance(mine, argv[argv.index("--out") + 1]) as entered:
        outcome = train(argv)
    torch.save((outcome, dict(entered.counts) if count else None), folder / f"result_{rank}")


# --------------------------------------------------------------------------------------------------
# Outside


def supervise(processes: list[Any]) -> list[int]:
    """Wait as torchrun does: when one fails the others get SIGTERM. Returns the exit codes."""
    end = time.monotonic() + TIMEOUT
    while all(process.exitcode in (None, 0) for process in processes) and any(
        process.is_alive() for process in processes
    ):
        assert time.monotonic() < end, "the run hangs"
        processes[0].join(0.02)
        time.sleep(0.02)
    time.sleep(1.0 if any(process.is_alive() for process in processes) else 0)  # time to say why
    for process in processes:
        process.terminate()
    return finish(processes)


def free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(world_size: int, argv: list[str], folder: Path, fault: Fault | None = None, delay: float = 0.0,
           count: bool = False) -> tuple[list[int], list[tuple[Outcome, dict]], str]:  # fmt: skip
    """Run all ranks to their end: exit codes, results of those that finished, everything that they
    printed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("result_*"):
        old.unlink()
    port = free_port()
    processes = start(
        child, [(rank, world_size, port, argv, folder, fault, count) for rank in range(world_size)]
    )
    if fault and fault.kind == "time":
        processes[fault.victim].join(delay)
        processes[fault.victim].kill()
    codes = supervise(processes)
    results = [torch.load(path, weights_only=False) for path in sorted(folder.glob("result_*"))]
    return (
        codes,
        results,
        "".join(path.read_text(errors="replace") for path in sorted(folder.glob("output_*"))),
    )


def newest(out: Path) -> Path | None:
    return max(out.glob("*/step_*.pt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def harm(out: Path, fault: Fault) -> None:
    """Tear or flip a bit of the newest checkpoint."""
    if not fault.damage or not (path := newest(out)):
        return
    size = path.stat().st_size
    place = min(int(fault.where * size), size - 1)
    if fault.damage == "tear":
        os.truncate(path, place)
        return
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << place % 8]))


def last_step(out: Path) -> int:
    """The last step that the newest log holds whole."""
    log = max(out.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns, default=None)
    lines = log.read_bytes().split(b"\n")[:-1] if log else []
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


def differing_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> int:
    """Bits in which fp32 parameters differ."""
    assert found.keys() == expected.keys()
    bits = 0
    for name, p in expected.items():
        a, b = (np.ascontiguousarray(x.numpy()).view(np.uint8) for x in (found[name], p))
        bits += int(np.unpackbits(a ^ b).sum())
    return bits


@dataclasses.dataclass
class Result:
    fault: Fault
    struck: bool  # whether the run had not ended before
    starts: int  # of the command, the disturbed one included
    repeated: int  # steps that were done twice
    bits: int  # of the final weights that differ
    flaws: list[str]


def survive(fault: Fault, folder: Path, reference: dict[int, Outcome], seconds: dict[int, float]) -> Result:
    """Inject the fault into a run, start its command again until it ends, compare with the
    undisturbed run."""
    out, expected, flaws = folder / "out", reference[fault.world_size], []
    argv = [*options(out=out, **CHECKPOINTS), "--resume"]
    began = time.monotonic()
    codes, results, said = launch(fault.world_size, argv, folder, fault, fault.at * seconds[fault.world_size])
    struck, before = any(codes), last_step(out)
    complete = any(out.glob("*/finished"))  # the fault came after the end of the run: a new one starts
    asked = fault.kind in ("SIGTERM", "SIGINT")
    # that is after the last collective
    if struck and not all(codes) and not complete and fault.place != "peak_memory":
        flaws.append(f"some ranks ended well: {codes}")
    if struck and fault.kind in ("kill", "write", "time") and codes[fault.victim] != -signal.SIGKILL:
        flaws.append(f"the victim was not killed: {codes}")
    if "Traceback" in said:
        flaws.append("a traceback: " + said[-1000:])
    if time.monotonic() - began > 60:
        flaws.append("took more than a minute to end")
    harm(out, fault)
    starts = 1
    if struck:
        while starts < 4:
            codes, results, said = launch(fault.world_size, argv, folder)
            starts += 1
            if not any(codes):
                break
    if any(codes):
        return Result(fault, struck, starts, 0, -1, [*flaws, f"never ended: {codes} {said[-1000:]}"])
    outcome = results[0][0]
    lines = outcome.lines
    resumed = [line["step"] for line in lines if line["event"] == "resume"]
    repeated = max(0, before - (resumed[0] if resumed else 0)) if struck and not complete else 0
    kinds = [line["event"] for line in lines]
    if kinds.count("header") != 1 or kinds.count("final") != 1 or kinds[-1] != "final":
        flaws.append("the log does not have one header and one final line")
    if outcome.losses != expected.losses:
        flaws.append("losses differ")
    if len({line["step"] for line in lines if line["event"] == "checkpoint"}) != kinds.count("checkpoint"):
        flaws.append("a checkpoint is logged twice")
    if fault.damage and resumed and "is damaged or foreign" not in said:
        flaws.append("the damaged checkpoint was not named")
    # steps between checkpoints, where embed and head wait for every second step
    interval = 6 if fault.damage else 4
    if repeated > interval + (0 if resumed else 4) or (
        asked and not fault.damage and repeated > 0 and before > 0
    ):
        flaws.append(f"{repeated} steps repeated")
    left = {path.name for path in out.glob(f"{outcome.log.stem}/*") if path.suffix != ".pt"} - {"finished"}
    if left:
        flaws.append(f"left behind: {left}")
    bits = sum(differing_bits(result.params, expected.params) for result, _ in results)
    return Result(fault, struck, starts, repeated, bits, flaws)


class Bench:
    """The undisturbed runs at one and two processes, and where faults can strike in them."""

    def __init__(self, folder: Path):
        self.folder, self.reference, self.seconds, self.lines = folder, {}, {}, {}
        for world_size in (1, 2):
            argv = options(out=folder / f"reference_{world_size}", **CHECKPOINTS)
            began = time.monotonic()
            codes, results, said = launch(world_size, argv, folder / f"undisturbed_{world_size}")
            assert not any(codes), said
            self.reference[world_size], self.seconds[world_size] = results[0][0], time.monotonic() - began
            argv = options(out=folder / f"counted_{world_size}", **CHECKPOINTS)
            codes, results, said = launch(world_size, argv, folder / f"counts_{world_size}", count=True)
            assert not any(codes), said
            for rank, (_, counts) in enumerate(results):
                self.lines[world_size, rank] = counts
        self.written = (
            sum(path.stat().st_size for path in (folder / "reference_1").rglob("*") if path.is_file()) * 3
        )

    def draw(self, count: int, seed: int) -> list[Fault]:
        """Faults spread over everything a run does, in the same order for one seed."""
        chance, faults = random.Random(seed), []
        kinds = ["kill"] * 5 + ["time"] * 2 + ["write", "full", "SIGTERM", "SIGINT"]
        for i in range(count):
            kind, world_size = kinds[i % len(kinds)], chance.choice((1, 2))
            victim = 0 if kind in ("write", "full") else chance.randrange(world_size)
            damage, where = chance.choice(("", "", "", "tear", "flip")), chance.random()
            lines = self.lines[world_size, victim]
            # a function first: rare ones are as likely as the inner loops
            place = chance.choice(sorted(lines))
            at: float = chance.randint(1, lines[place])
            if kind in ("SIGTERM", "SIGINT"):
                place = chance.choice(["Trainer.train", "Unit.update", "training_steps", "Trainer.validate"])
                at = chance.randint(1, lines[place])
            elif kind in ("write", "full"):
                at = chance.uniform(0, self.written)
            elif kind == "time":
                at = chance.random()
            place = place if kind in ("kill", "SIGTERM", "SIGINT") else ""
            faults.append(Fault(kind, world_size, victim, place, at, damage, where))
        return faults

    def survive(self, fault: Fault, number: int) -> Result:
        folder = self.folder / f"fault_{number}"
        result = survive(fault, folder, self.reference, self.seconds)
        if not result.flaws and not result.bits:
            shutil.rmtree(folder)
        return result


def table(results: list[Result]) -> str:
    """One line for each kind of fault."""
    rows = [("fault", "tried", "struck", "survived", "steps repeated: mean", "most", "bits differing")]
    names = {"kill": "SIGKILL at a line", "time": "SIGKILL at a time", "write": "SIGKILL inside a write",
             "full": "full disk", "SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}  # fmt: skip
    groups = {names[kind]: [r for r in results if r.fault.kind == kind] for kind in names}
    groups["of these, checkpoint torn"] = [r for r in results if r.fault.damage == "tear"]
    groups["of these, a bit flipped"] = [r for r in results if r.fault.damage == "flip"]
    groups["all"] = results
    for name, some in groups.items():
        if some:
            struck = [r for r in some if r.struck]
            repeated = [r.repeated for r in struck] or [0]
            good = sum(not r.flaws and r.bits == 0 for r in some)
            bits = sum(r.bits for r in some)
            rows.append((name, len(some), len(struck), good, f"{np.mean(repeated):.1f}", max(repeated), bits))
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    )


def kill(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "data")
        os.environ["DATA_DIR"] = str(folder / "data")
        bench = Bench(folder)
        results = []
        for number, fault in enumerate(tqdm(bench.draw(args.count, args.seed), unit="fault", disable=None)):
            result = bench.survive(fault, number)
            results.append(result)
            if result.flaws or result.bits:
                print(f"NOT survived: {result}", flush=True)
    print(f"{args.count} faults, seed {args.seed}\n\n{table(results)}")
    return int(any(r.flaws or r.bits for r in results))


# --------------------------------------------------------------------------------------------------
# A file system that is really full


def disk(args: argparse.Namespace) -> int:
    """Run into the end of a small tmpfs, make room, resume."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "data")
        os.environ["DATA_DIR"] = str(folder / "data")
        argv = options(out=folder / "reference", **CHECKPOINTS)
        expected = launch(1, argv, folder / "undisturbed")[1][0][0]
        size = newest(folder / "reference").stat().st_size
        small, failures = folder / "small", 0
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(3.5 * size)}", "tmpfs",
                                  str(small)],
                                 capture_output=True, text=True)  # fmt: skip
        if mounted.returncode:
            sys.exit(f"tests/faults.py: no tmpfs can be mounted here ({mounted.stderr.strip()})")
        try:
            argv = [*options(out=small / "out", **CHECKPOINTS), "--resume"]
            for filled in (0.6, 1.2, 2.2, 3.3):
                shutil.rmtree(small / "out", ignore_errors=True)
                with contextlib.suppress(OSError):
                    (small / "filler").write_bytes(bytes(int(filled * size)))
                # the estimate up front would refuse most of these: switched off for the first start
                codes, _, said = launch(1, argv, folder / "run", Fault("blind", 1, 0))
                print(
                    f"{filled:.1f} of 3.5 checkpoints taken: status {codes[0]}, "
                    f"{said.strip().splitlines()[-1][:120]}"
                )
                (small / "filler").unlink()
                again, results, said_again = launch(1, argv, folder / "run")
                good = (
                    not any(again)
                    and results[0][0].losses == expected.losses
                    and "Traceback" not in said + said_again
                )
                good = good and differing_bits(results[0][0].params, expected.params) == 0
                print(
                    "    with room again:",
                    "the same losses and weights" if good else f"NOT the same {again} {said_again}",
                )
                failures += not good
        finally:
            subprocess.run(["umount", str(small)])
    return int(failures > 0)


# --------------------------------------------------------------------------------------------------
# Whole runs under torchrun


def workers(parent: int) -> list[int]:
    """Processes that run train_gpt.py below a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            command = (path / "cmdline").read_bytes().split(b"\0")
            ancestor = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if ancestor == parent and any(word.endswith(b"train_gpt.py") for word in command):
                found.append(int(path.name))
    return found


def living(processes: list[int]) -> list[int]:
    return [pid for pid in processes if Path(f"/proc/{pid}").exists()]


def torchrun(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1000", "--monitor-interval=0.2", SOURCE, "--track", "tiny", "--out", str(out),
               *more]  # fmt: skip
    return subprocess.Popen(
        command, stdout=open(out.parent / f"{out.name}.txt", "ab"), stderr=subprocess.STDOUT
    )


def complete_logs(out: Path) -> list[list[tuple]]:
    """Validation losses of each log with a final line; more than one when the fault came after the
    end of a run."""
    found = []
    for path in out.glob("*.jsonl"):
        lines = events(path) if path.read_bytes().endswith(b"\n") else [{"event": "torn"}]
        if lines[-1]["event"] == "final":
            found.append(
                [(line["event"], line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
            )
    return found


def soak(args: argparse.Namespace) -> int:
    """tiny at N = 2 until the time is up; a rank or the launcher is killed at random, every minute
    on average."""
    chance, tried, ended, wrong = random.Random(args.seed), collections.Counter(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("the undisturbed run", flush=True)
        torchrun(folder / "undisturbed").wait()
        (expected,) = complete_logs(folder / "undisturbed")
        print(*expected, sep="\n", flush=True)
        end = time.monotonic() + 60 * args.minutes
        number = restarts = 0
        job = None
        while job is not None or time.monotonic() < end:
            out = folder / f"run_{number}"
            if job is None:
                job = torchrun(out, "--resume", "--checkpoint_every", "20")
            with contextlib.suppress(subprocess.TimeoutExpired):
                # the last run is left alone once the time is up
                job.wait(chance.expovariate(1 / args.every) if time.monotonic() < end else None)
            if job.poll() is None:
                what = chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "launcher"])
                victims = workers(job.pid)
                if victims and what != "launcher":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(victims), getattr(signal, what))
                    tried[what] += 1
                elif what == "launcher":
                    job.kill()
                    job.wait()
                    gone = time.monotonic() + 120
                    while (alive := living(victims)) and time.monotonic() < gone:
                        time.sleep(0.2)
                    if alive:
                        print(f"left behind by the launcher: {alive}", flush=True)
                        wrong += 1
                    tried[what] += 1
                    job, restarts = None, restarts + 1
                continue
            found = complete_logs(out)
            same = job.returncode == 0 and found and all(losses == expected for losses in found)
            resumes = sum(line["event"] == "resume" for path in out.glob("*.jsonl") for line in events(path))
            print(f"run {number}: status {job.returncode}, {resumes} resumes in its log, validation losses "
                  f"{'equal' if same else 'DIFFER'}", flush=True)  # fmt: skip
            if not same:
                print(found, (folder / f"{out.name}.txt").read_text()[-3000:], flush=True)
            wrong, ended, number, job = wrong + (not same), ended + 1, number + 1, None
    print(f"{args.minutes} minutes, seed {args.seed}: {ended} runs ended, {dict(tried)} injected, "
          f"{restarts} starts by hand, "
          f"{wrong} wrong")  # fmt: skip
    return int(wrong > 0 or ended == 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("kill", help="faults over the life of a short run")
    command.set_defaults(run=kill)
    command.add_argument("--count", type=int, default=200, help="faults (default 200)")
    command.add_argument("--seed", type=int, default=1, help="of the faults (default 1)")
    commands.add_parser("disk", help="a full tmpfs").set_defaults(run=disk)
    command = commands.add_parser("soak", help="whole runs under torchrun")
    command.set_defaults(run=soak)
    command.add_argument("--minutes", type=float, default=30, help="default 30")
    command.add_argument(
        "--every", type=float, default=60, help="seconds between faults on average (default 60)"
    )
    command.add_argument("--seed", type=int, default=1, help="of the faults (default 1)")
    args = parser.parse_args()
    sys.exit(args.run(args))


if __name__ == "__main__":
    main()
