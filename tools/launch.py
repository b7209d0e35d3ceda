"""Plans a run for this machine, makes its data where there is none, trains; run.sh ends in it.

    python tools/launch.py [--track TRACK] [--section.field value ...]      any option of train_gpt.py

All of it happens in one process, which imports torch once; only a run of several processes is given to
torchrun. A refusal is one sentence that names run.sh, the command that was typed. The exit status is that of
the first process that failed, 130 after an interrupt.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lib import threads

ROOT = Path(__file__).resolve().parents[1]
MAKERS = {"fineweb10B": "data/fineweb.py"}  # of any other corpus: data/<corpus>.py
INTERRUPTED = 130  # as a shell says it of a command that ended by Ctrl-C
FIRST_SIGNAL = 128  # and of other signals, 128 + their number
NEWS = 5.0  # seconds: the most without a word
# What torchrun tells its processes. This one belongs to no job, whatever has started it.
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")


class Plan(NamedTuple):
    """What a command line comes to on this machine."""

    track: str  # never "auto"
    corpus: str  # the folder of its shards, below DATA_DIR
    processes: int  # one for each device, a divisor of the rows of a step
    out: str = "logs"  # where its log will lie
    show: bool = True  # whether its losses are drawn


def say(sentence: str) -> None:
    print(f"run.sh: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def heard(what: str) -> Iterator[None]:
    """Every NEWS seconds it is said what is being done, and for how long by now."""
    ended = threading.Event()

    def keep_saying() -> None:
        seconds = 0
        while not ended.wait(NEWS):
            seconds += NEWS
            say(f"{what}, {seconds:g} s")

    threading.Thread(target=keep_saying, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def trainer() -> ModuleType:
    """train_gpt.py as a module; ValueError where its packages are there but broken."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if "torch" not in sys.modules:
        os.environ.update(threads.waiting())
        say("loading torch")
    try:
        with heard("loading torch"):
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
    return Plan(run.track, track.data.corpus, processes, run.out, run.show)


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
    with heard(f"making the corpus {corpus}"):
        # a Ctrl-C reaches the script too, which ends with a sentence of its own
        with contextlib.suppress(KeyboardInterrupt):
            script.wait()
        return script.wait() == 0


def train(words: Sequence[str]) -> int:
    """Train in this process, which has imported torch already; the exit status."""
    train_gpt = trainer()
    try:
        train_gpt.main(words)
    except SystemExit as end:  # the trainer has said why
        stopped_by_a_signal = isinstance(end.code, int) and end.code > FIRST_SIGNAL
        return INTERRUPTED if stopped_by_a_signal else end.code or 0
    return 0


def show(out: Path, since: float) -> None:
    """Draw the losses of the run that has ended in the folder `out`, unless it wrote nothing there."""
    from lib import picture

    logs = [path for path in out.glob("*.jsonl") if path.stat().st_mtime >= since]
    if logs:
        log = max(logs, key=lambda path: path.stat().st_mtime)
        print(f"picture {picture.draw(log, ROOT / 'records')}", flush=True)


def start(processes: int, words: Sequence[str]) -> int:
    """Train in so many processes on this machine, through torchrun; the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # the trainer says itself what is wrong, in one sentence
    command = ["--standalone", f"--nproc_per_node={processes}"]
    options = {action.dest for action in run.get_args_parser()._actions}
    # Under nohup torchrun would forward the signal to the ranks.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and "signals_to_handle" in options:
        command.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    command += [str(ROOT / "train_gpt.py"), *words]
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
    for name in JOB:
        os.environ.pop(name, None)
    # as the trainer has it, but before the plan asks for a GPU
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    began = time.time()
    try:
        found = plan(words)
        if not make_data(found.corpus):
            return 1
        # the last word on an option counts: all processes take the track that was planned
        planned = [*words, "--track", found.track]
        status = train(planned) if found.processes == 1 else start(found.processes, planned)
    except ValueError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    if status == 0 and found.show:
        try:
            show(Path(found.out), began)
        except (ValueError, OSError) as error:
            say(f"no picture: {error}")
    return status


if __name__ == "__main__":
    gc.disable()  # as in train_gpt.py, which asks for it again before the clock
    sys.exit(main(sys.argv[1:]))
