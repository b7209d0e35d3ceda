"""The launcher: which track, corpus and processes a command line comes to, when data is made, how a
run may end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import launch
import train_gpt
from helpers import ROOT, no_traceback, options
from launch import Plan

DEVICE = dict(short=torch.device("cuda", 0), tiny=torch.device("cpu"))


def said(capfd: pytest.CaptureFixture) -> str:
    """The one sentence on stderr."""
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("run.sh: ") and err.count("\n") == 1, err
    return err.removeprefix("run.sh: ").strip()


# --------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("rows, devices, processes", [
    (8, 1, 1), (8, 2, 2), (8, 3, 2), (8, 7, 4), (8, 8, 8), (8, 9, 8), (12, 5, 4), (12, 11, 6), (7, 6, 1),
])  # fmt: skip
def test_processes_are_the_most_that_divide_the_rows(rows: int, devices: int, processes: int) -> None:
    assert launch.processes_for(rows, devices) == processes


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes believe that this machine has so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(train_gpt, "device_of", lambda run, local_rank: DEVICE[run.track])
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")  # in the cache's name

    return pretend


def test_every_device_gets_a_process_and_idle_ones_are_said(
    gpus: Callable, capfd: pytest.CaptureFixture
) -> None:
    gpus(8)
    assert launch.plan(["--track", "short"]) == Plan("short", "fineweb10B", 8)
    assert capfd.readouterr().err == ""
    gpus(7)
    rows = train_gpt.TRACKS["short"].data.rows
    assert launch.plan(["--track", "short"]).processes == 4
    assert said(capfd) == f"using 4 of 7 devices, a step has {rows} rows"


def test_the_cpu_has_one_process_whatever_devices_there_are(
    gpus: Callable, capfd: pytest.CaptureFixture
) -> None:
    gpus(8)
    assert launch.plan(["--track", "tiny"]) == Plan("tiny", "shakespeare", 1)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_auto_is_resolved_and_the_last_word_counts() -> None:
    assert launch.plan(["--track", "auto"]) == Plan("tiny", "shakespeare", 1)
    assert launch.plan(["--track", "short", "--track", "tiny", "--data.corpus", "mine"]) == Plan(
        "tiny", "mine", 1
    )


@pytest.mark.parametrize("words, sentence", [
    (["--track", "tony"], "unknown track 'tony'"),
    (["--matrix.lrr", "1"], "the nearest is --matrix.lr"),
    (["--device", "abacus"], "no device 'abacus'"),
    (["--schedule.stages", "((0.5, (16, 24)),)"], "schedule.stages begin at 0"),
])  # fmt: skip
def test_what_the_trainer_refuses_is_refused_before_anything_starts(
    words: list[str], sentence: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "make_data", None)
    monkeypatch.setattr(launch, "train", None)
    assert launch.main(words) == 1 and sentence in said(capfd)


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "train_gpt", None)  # an import raises ImportError
    assert launch.main([]) == 1
    sentence = said(capfd)
    assert sys.executable in sentence and "pip install -r requirements.txt" in sentence


# --------------------------------------------------------------------------------------------------
# The data

MAKER = """import os, pathlib, sys
print("made by", pathlib.Path(__file__).name)
if {status}: sys.exit({status})
folder = pathlib.Path(os.environ["DATA_DIR"], "{corpus}")
folder.mkdir(parents=True)
(folder / "manifest.json").write_text("{{}}")
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the repository, with the scripts that make two corpora; training
    always succeeds."""
    (tmp_path / "data").mkdir()
    for corpus, script in (("shakespeare", "shakespeare.py"), ("fineweb10B", "fineweb.py")):
        (tmp_path / "data" / script).write_text(MAKER.format(corpus=corpus, status=0))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "corpora"))
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "plan", lambda words: Plan("tiny", words[-1], 1))
    monkeypatch.setattr(launch, "train", lambda words: 0)
    return tmp_path


@pytest.mark.parametrize("corpus, script", [("shakespeare", "shakespeare.py"), ("fineweb10B", "fineweb.py")])
def test_data_is_made_only_where_it_is_missing(
    repository: Path, corpus: str, script: str, capfd: pytest.CaptureFixture
) -> None:
    assert launch.main([corpus]) == 0 and capfd.readouterr() == (f"made by {script}\n", "")
    assert launch.main([corpus]) == 0 and capfd.readouterr() == ("", "")


def test_nothing_is_trained_without_data(
    repository: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", None)
    (repository / "data" / "shakespeare.py").write_text(MAKER.format(corpus="shakespeare", status=3))
    assert launch.main(["shakespeare"]) == 1
    assert capfd.readouterr() == ("made by shakespeare.py\n", "")  # which says itself what was wrong
    assert launch.main(["mine"]) == 1
    wanted = f"no data for the corpus mine in {repository / 'corpora'} and no data/mine.py that makes it"
    assert wanted in said(capfd)


def test_without_data_dir_the_data_lies_in_data(
    repository: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "data" / "mine").mkdir()
    (repository / "data" / "mine" / "manifest.json").touch()
    monkeypatch.chdir(repository)
    for setting in (None, ""):
        monkeypatch.delenv("DATA_DIR") if setting is None else monkeypatch.setenv("DATA_DIR", setting)
        assert launch.main(["mine"]) == 0
        assert launch.main(["yours"]) == 1 and "yours in data and no data/yours.py" in said(capfd)


def test_a_slow_data_script_is_talked_about(
    repository: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "NEWS", 0.1)
    script = repository / "data" / "shakespeare.py"
    script.write_text("import time; time.sleep(0.5)\n" + script.read_text())
    assert launch.main(["shakespeare"]) == 0
    said = capfd.readouterr().err.splitlines()
    assert len(said) >= 3 and said[1] == "run.sh: making the corpus shakespeare, 0.2 s"


def test_an_interrupted_data_script_has_the_last_word(
    repository: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", None)
    (repository / "data" / "shakespeare.py").write_text(
        "import os, signal, sys, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); "
        "time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5); sys.exit('interrupted; "
        "the same command starts again')\n"
    )
    assert launch.main(["shakespeare"]) == 1
    assert capfd.readouterr() == ("", "interrupted; the same command starts again\n")


# --------------------------------------------------------------------------------------------------
# The run


@pytest.fixture
def torchrun_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Puts something else into torchrun's place; returns the words that it will have got."""

    def put(error: BaseException | None = None) -> list[str]:
        got: list[str] = []

        def main(words: list[str]) -> None:
            got.extend(words)
            if error:
                raise error

        monkeypatch.setattr(torchrun, "main", main)
        return got

    monkeypatch.setattr(launch, "make_data", lambda corpus: True)
    monkeypatch.setattr(launch, "plan", lambda words: Plan("short", "fineweb10B", 4))
    monkeypatch.setattr(launch.logging, "disable", lambda level: None)
    return put


def test_all_processes_take_the_track_that_was_planned(torchrun_does: Callable) -> None:
    words = torchrun_does()
    assert launch.main(["--track", "auto", "--resume"]) == 0
    trainer = str(ROOT / "train_gpt.py")
    wanted = ["--standalone", "--nproc_per_node=4", "--virtual-local-rank", trainer, "--track", "auto",
              "--resume", "--track", "short"]  # fmt: skip
    assert words == wanted
    track, run = train_gpt.parse_command_line(["--track", "auto", "--resume", "--track", "tiny"])
    assert (run.track, run.resume) == ("tiny", "") and track == train_gpt.TRACKS["tiny"]


def failure(exitcode: int, timestamp: int) -> Any:
    return SimpleNamespace(
        exitcode=exitcode, timestamp=timestamp, message="", local_rank=0, pid=1, error_file=""
    )


@pytest.mark.parametrize("exitcodes, status, lines", [
    ([1, 3], 1, []),  # the rank has said what is wrong
    ([0], 1, []),
    ([-9], -9, ["rank 0 was ended by SIGKILL"]),
    ([2, -15, -15], 2, ["rank 1 was ended by SIGTERM", "rank 2 was ended by SIGTERM"]),
])  # fmt: skip
def test_the_status_is_that_of_the_first_failure(
    torchrun_does: Callable, capfd: pytest.CaptureFixture, exitcodes: list[int], status: int,
    lines: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    failures = {rank: failure(code, rank) for rank, code in enumerate(exitcodes)}
    monkeypatch.setattr(ChildFailedError, "format_msg", lambda self: "")
    torchrun_does(ChildFailedError("train_gpt.py", failures))
    assert launch.main(["--track", "tiny"]) == status
    assert capfd.readouterr().err == "".join(f"run.sh: {line}\n" for line in lines)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SignalException("", signal.SIGHUP)])
def test_an_interrupt_is_no_error(
    torchrun_does: Callable, capfd: pytest.CaptureFixture, error: BaseException
) -> None:
    torchrun_does(error)
    assert launch.main(["--track", "tiny"]) == 130
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def trainer_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Puts something else into the trainer's place; returns the words that it will have got."""

    def put(work: Callable[[], Any]) -> list[str]:
        got: list[str] = []

        def main(words: list[str], *_: Any) -> Any:
            got.extend(words)
            return work()

        monkeypatch.setattr(train_gpt, "main", main)
        return got

    monkeypatch.setattr(launch, "make_data", lambda corpus: True)
    monkeypatch.setattr(launch, "start", None)
    return put


def test_one_process_trains_in_this_one(trainer_does: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever job this process belongs to itself."""
    for name in launch.JOB:
        monkeypatch.setenv(name, "1")
    words = trainer_does(lambda: [name for name in launch.JOB if name in os.environ] and 1 / 0)
    assert launch.main(["--track", "auto", "--device", "cpu", "--resume"]) == 0
    assert words == ["--track", "auto", "--device", "cpu", "--resume", "--track", "tiny"]


@pytest.mark.parametrize("code, status", [
    (0, 0), (1, 1), (3, 3), (None, 0), (130, 130), (128 + signal.SIGHUP, 130), (128 + signal.SIGTERM, 130),
])  # fmt: skip
def test_the_status_is_that_of_the_trainer(
    trainer_does: Callable, capfd: pytest.CaptureFixture, code: int | None, status: int
) -> None:
    trainer_does(lambda: sys.exit(code))
    assert launch.main(["--track", "tiny"]) == status
    assert capfd.readouterr() == ("", "")


def test_torch_is_imported_once_and_by_one_process(tmp_path: Path, data_dir: Path) -> None:
    """The second thing is said before it is there: torch's stand-in notes who imports it, and waits."""
    stand_in = "import __main__, os, sys, time; print(os.getpid(), file=sys.stderr)\n"
    stand_in += "give_up = time.monotonic() + 60\n"
    stand_in += "while len(__main__.said) < 2 and time.monotonic() < give_up: time.sleep(0.01)\n"
    stand_in += "sys.path.remove(os.environ['STAND_IN']); del sys.modules['torch']; import torch\n"
    (tmp_path / "torch.py").write_text(stand_in)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import launch; launch.NEWS = 0.1\n"
    code += "said, say = [], launch.say; launch.say = lambda words: (say(words), said.append(words))\n"
    code += "sys.exit(launch.main(sys.argv[1:]))"
    words = options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0)
    environment = os.environ | dict(PYTHONPATH=str(tmp_path), STAND_IN=str(tmp_path))
    argv = [sys.executable, "-c", code, str(ROOT / "tools"), *words]
    done = subprocess.run(argv, env=environment, cwd=data_dir, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stderr.splitlines()
    assert first == "run.sh: loading torch"
    # two threads write these: neither waits for the other
    assert any(re.fullmatch(r"run.sh: loading torch, \d\.\d s", line) for line in rest)
    assert sum(line.isdigit() for line in rest) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_the_run_with_a_checkpoint(
    tmp_path: Path, data_dir: Path, number: signal.Signals
) -> None:
    words = options(out=tmp_path / "out", schedule__steps=20_000, schedule__extension=0, data__epochs=2000)
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *words]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "step" in line and "loss" in line:
            break
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    no_traceback(out, err)
    (log,) = (tmp_path / "out").glob("*.jsonl")
    assert "checkpoint" in {json.loads(line)["event"] for line in log.read_text().splitlines()}


@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize("processes", [1, 2])
def test_under_nohup_a_run_outlives_its_terminal(tmp_path: Path, processes: int) -> None:
    """A signal that was ignored when the job started stays ignored, also in ranks that torchrun starts."""
    words = options(out=tmp_path / "out", data__epochs=40, schedule__steps=150, schedule__extension=0)
    code = f"import sys, launch; launch.processes_for = lambda *_: {processes}; "
    code += "sys.exit(launch.main(sys.argv[1:]))"
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    job = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--show", "false"], env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    end = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.jsonl")) and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGHUP)  # as a terminal that closes does
    _, said = job.communicate(timeout=100)
    (log,) = (tmp_path / "out").glob("*.jsonl")
    assert job.returncode == 0, said
    assert log.read_text().splitlines()[-1].startswith('{"event": "final", "step": 150')
