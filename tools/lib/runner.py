"""Runs of a script in processes of their own, records that grow by complete runs, and what the
command lines share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .claims import ROOT, first_seed, read_runs, rules, sha256, unknown_track, write
from .logs import Run, different_settings, flat, plan_of, read_log, text_of
from .names import knows

# the child dies with the thread that started it, however that ends: PR_SET_PDEATHSIG outlives the exec
# (a preexec_fn would do the same, but not safely beside other threads)
TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_script(
    script: Path,
    options: Sequence[str],
    scratch: Path,
    heard: Callable[[dict[str, Any]], Any],
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> tuple[int | None, str]:
    """Run a script to its end, its log growing in the folder `scratch`, which is emptied first; it shows
    nothing after its result.

    `heard(event)` gets the last event of the log, {} before the first, every second; a true answer kills
    the run. Returns (exit status, None after a true answer; the last line that the script printed).
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tied = ["-c", TIED] if sys.platform == "linux" else []
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    quiet = ["--show", "false"] if knows(script, "show") else []
    command = [sys.executable, *tied, *launch, str(script), "--out", str(scratch), *quiet, *options]
    environment = (
        {"DATA_DIR": str(ROOT / "data"), "CACHE_DIR": str(ROOT / ".cache")} | os.environ | (environment or {})
    )
    killed = False
    with open(scratch / "output.txt", "wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while child.poll() is None and not killed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(1)
                killed = bool(heard(last_event(scratch) or {}))
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    said = (scratch / "output.txt").read_text(errors="replace").strip().splitlines() or ["nothing"]
    return None if killed else child.returncode, said[-1]


def compiled(script: Path, track: str) -> list[str]:
    """The option that compiles a run on a CPU, where the script has it: its default may be not to compile.

    Scripts whose default is to compile do the same with it. Tracks of GPUs are left to their default.
    """
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    knows = re.search(r'^    compile: Literal\["auto", "whole"|^    COMPILED = .*"whole"', text, re.MULTILINE)
    return ["--compile", "whole"] if track == "tiny" and knows else []


class Record:
    """A record folder that runs can be added to: its script, its settings and its seeds."""

    def __init__(self, folder: Path, options: Sequence[str], processes: int):
        self.folder, self.processes = folder, processes
        self.runs = read_runs(folder) if (folder / "runs").is_dir() else []
        self.track = folder.parent.name
        self.planned: int | None = None  # what the next runs say of themselves: see `logs.plan_of`
        self.beside: str | None = None
        self.options = [*options] if options or not self.runs else self.options_of(self.runs[0])

    @staticmethod
    def options_of(run: Run) -> list[str]:
        """Options that give the settings of a run whatever the defaults of its script."""
        settings = {**flat(run.header["settings"]), "dtype": run.header.get("dtype", "auto")}
        return [word for key, value in settings.items() for word in (f"--{key}", text_of(value))]

    def next_seed(self) -> int:
        used = {run.header["seed"] for run in (*self.runs, *read_runs(self.folder, "discarded"))}
        return next(seed for seed in itertools.count(self.first_seed()) if seed not in used)

    def first_seed(self) -> int:
        return first_seed(self.folder.name, (self.folder / "train_gpt.py").read_bytes())

    def run(self, seed: int, bar: tqdm, only_warm: bool = False) -> Run | None:
        """One complete run; its log grows in unfinished/ and moves to runs/ when it is whole.

        only_warm: stop when everything is compiled, which fills the compile cache, and return None.
        """
        scratch, script = self.folder / "unfinished", self.folder / "train_gpt.py"

        def heard(event: dict[str, Any]) -> bool:
            if "train_loss" in event:
                bar.set_postfix_str(
                    f"{self.folder.name} seed {seed} step {event['step']} loss {event['train_loss']:.3f}"
                )
            return only_warm and bool(event)

        options = ["--track", self.track, "--seed", str(seed), *compiled(script, self.track), *self.options]
        status, said = run_script(script, options, scratch, heard, self.processes)
        if only_warm and not status:
            return None
        logs = list(scratch.glob("*.jsonl"))
        if status or not logs:
            raise ValueError(f"a run of {self.folder} failed, it said: {said}")
        run = read_log(logs[0])
        if self.runs and (keys := different_settings(self.runs[0], run)):
            raise ValueError(
                f"{self.folder} has runs with other settings ({', '.join(keys)}); choose another --name"
            )
        if run.plan is None:
            header, rest = run.path.read_bytes().split(b"\n", 1)
            plan = plan_of(seed - self.first_seed() + 1, self.planned, self.beside)
            write(run.path, b"\n".join([header, json.dumps(plan).encode(), rest]))
            run = read_log(run.path)
        (self.folder / "runs").mkdir(exist_ok=True)
        self.runs.append(dataclasses.replace(run, path=self.folder / "runs" / run.path.name))
        os.replace(run.path, self.runs[-1].path)
        shutil.rmtree(scratch)
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
            raise ValueError(
                f"another record.py or compare.py is at work in {root}; two would slow each other"
            ) from None
        yield


def new_record(root: Path, track: str, name: str, source: Path, must_exist: bool = False) -> Path:
    """The folder <root>/<track>/<date>_<name> with a copy of the source; one that has this name and
    source goes on."""
    if not rules(track):
        raise ValueError(unknown_track(track))
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"a record's name has letters, digits, - and _, not {name!r}")
    for folder in sorted((root / track).glob(f"????-??-??_{name}")):
        if sha256(folder / "train_gpt.py") != sha256(source):
            raise ValueError(f"{folder} exists with another train_gpt.py; choose another --name")
        return folder
    if must_exist:
        raise ValueError(f"track {track} has no record {name} yet; with --runs 1 or more one is made")
    folder = root / track / f"{time.strftime('%Y-%m-%d')}_{name}"
    folder.mkdir(parents=True)
    write(folder / "train_gpt.py", source.read_bytes().decode())
    return folder


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def exit_status(program: str, work: Callable[[], int]) -> int:
    """What `work` returns; one sentence and 1 for what a user can do something about, 130 for an
    interrupt."""
    if threading.current_thread() is threading.main_thread():
        # also where the shell has told its background jobs to ignore them
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.default_int_handler)
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
