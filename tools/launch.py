"""Plans a run for this machine, makes its data where there is none, starts its processes; run.sh ends in it.

    python tools/launch.py [--track TRACK] [--section.field value ...]      any option of train_gpt.py

All of it happens in one process, which imports torch once. A refusal is one sentence that names run.sh, the
command that was typed. The exit status is that of the first process that failed, 130 after an interrupt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lib import threads

ROOT = Path(__file__).resolve().parents[1]
MAKERS = {"fineweb10B": "data/fineweb.py"}  # of any other corpus: data/<corpus>.py
INTERRUPTED = 130  # as a shell says it of a command that ended by Ctrl-C


class Plan(NamedTuple):
    """What a command line comes to on this machine."""

    track: str  # never "auto"
    corpus: str  # the folder of its shards, below DATA_DIR
    processes: int  # one for each device, a divisor of the rows of a step


def say(sentence: str) -> None:
    print(f"run.sh: {sentence}", file=sys.stderr, flush=True)


def trainer() -> ModuleType:
    """train_gpt.py as a module; ValueError where its packages are there but broken."""
    sys.path.insert(0, str(ROOT))
    os.environ.update(threads.waiting())
    try:
        import train_gpt
    except (ImportError, OSError) as error:
        remedy = "pip install -r requirements.txt"
        raise ValueError(f"{sys.executable} cannot import torch and numpy ({error}): {remedy}") from None
    return train_gpt


def processes_for(rows: int, devices: int) -> int:
    """The largest number of processes, at most one for each device, that divides the rows of a step."""
    return max(n for n in range(1, devices + 1) if rows % n == 0)


def plan(words: Sequence[str]) -> Plan:
    """The plan for a command line of train_gpt.py.

    ValueError for what the trainer would refuse before it looks at data.
    """
    train_gpt = trainer()
    import torch

    train_gpt.check_system()
    track, run = train_gpt.parse_command_line(words)
    device = train_gpt.device_of(run, 0)
    if run.evaluate is None and run.sample is None:
        train_gpt.check_folders(run, device)
    train_gpt.check_settings(track, run)
    devices = 1 if device.type == "cpu" else torch.accelerator.device_count()
    processes = processes_for(track.data.rows, devices)
    if processes < devices:
        say(f"using {processes} of {devices} devices, a step has {track.data.rows} rows")
    return Plan(run.track, track.data.corpus, processes)


def make_data(corpus: str) -> bool:
    """Run the script that makes a corpus, unless the corpus is there.

    False when the script failed, which it has said itself. ValueError when there is no such script.
    """
    folder = Path(os.environ.get("DATA_DIR") or os.path.relpath(ROOT / "data"))
    if (folder / corpus / "manifest.json").is_file():
        return True
    maker = MAKERS.get(corpus, f"data/{corpus}.py")
    if not (ROOT / maker).is_file():
        raise ValueError(f"there is no data for the corpus {corpus} in {folder} and no {maker} that makes it")
    script = subprocess.Popen([sys.executable, str(ROOT / maker)])
    # a Ctrl-C reaches the script too, which ends with a sentence of its own
    with contextlib.suppress(KeyboardInterrupt):
        script.wait()
    return script.wait() == 0


def start(processes: int, words: Sequence[str]) -> int:
    """Train in so many processes on this machine; the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # the trainer says itself what is wrong, in one sentence
    command = ["--standalone", f"--nproc_per_node={processes}", str(ROOT / "train_gpt.py"), *words]
    try:
        run.main(command)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:  # what a killed rank cannot say itself
                say(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}")
        _, first = error.get_first_failure()
        return first.exitcode or 1
    except SignalException:  # SIGTERM, SIGINT, SIGHUP or SIGQUIT; torchrun has ended the ranks
        return INTERRUPTED
    return 0


def main(words: Sequence[str]) -> int:
    """Plan, data, training; the exit status."""
    try:
        found = plan(words)
        if not make_data(found.corpus):
            return 1
        # the last word on an option counts: all processes take the track that was planned
        return start(found.processes, [*words, "--track", found.track])
    except ValueError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
