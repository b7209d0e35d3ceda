"""run.sh from end to end on a small corpus; environments are stand-ins, nothing is installed or
downloaded."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, events, no_traceback, options

SHORT = dict(schedule__steps=5, schedule__extension=0, evaluation__every=100)


@pytest.fixture(scope="module")
def environment(data_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return kept | dict(PYTHON=sys.executable, CACHE_DIR=str(data_dir / "cache"))


def run(argv: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def sentence(done: subprocess.CompletedProcess, program: str = "run.sh", begun: bool = True) -> str:
    """The one sentence on stderr of a command that refused, after it had `begun` to load torch; only the
    trainer has said more, that it reads the data."""
    no_traceback(done.stdout, done.stderr)
    assert done.returncode != 0
    assert re.fullmatch("" if program == "run.sh" else "reading and checking .*\n", done.stdout), done.stdout
    news = "run.sh: loading torch\n" * begun
    assert done.stderr.startswith(f"{news}{program}: "), done.stderr
    assert done.stderr.count("\n") == 1 + begun, done.stderr
    return done.stderr.removeprefix(news)


# --------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def trained(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess:
    """A run from another working directory; it writes into `out` there."""
    folder = tmp_path_factory.mktemp("elsewhere")
    argv = [
        str(ROOT / "run.sh"),
        "--system",
        "tiny",
        *options(track=None, show=None, out=folder / "out", **SHORT),
    ]
    done = run(argv, environment, folder)
    done.folder = folder
    return done


def test_one_command_trains_and_says_how_it_went(trained: subprocess.CompletedProcess) -> None:
    assert trained.returncode == 0, trained.stderr
    no_traceback(trained.stderr)
    assert [path.name for path in trained.folder.iterdir()] == ["out"]
    (log,) = (trained.folder / "out").glob("*.jsonl")
    header, *_, final = events(log)
    assert header["track"] == "tiny" and header["settings"]["schedule"]["steps"] == 5
    assert header["world_size"] == 1
    assert final["event"] == "final" and final["step"] == 5
    end, _, page = trained.stdout.partition("the model writes:\n")
    *text, log_line, picture_line = page.splitlines()
    assert text[0] == "  HAMLET."
    assert (log_line, picture_line) == (f"log {log}", f"picture {log.with_suffix('.svg')}")
    assert log.with_suffix(".svg").read_text().startswith("<svg ")
    last = end.splitlines()[-1]
    assert last.startswith("track tiny: validation loss")
    words = (f"{final['val_loss']:.4f}", "5.0", "5 steps", log.name)
    assert all(word in last for word in words), last
    assert not (ROOT / "logs" / log.name).exists()


def test_two_processes_of_torchrun_give_the_same_loss(
    trained: subprocess.CompletedProcess, environment: dict[str, str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                str(ROOT / "train_gpt.py")]  # fmt: skip
    done = run([*torchrun, *options(out=tmp_path / "out", **SHORT)], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    (log,), (other,) = (folder.glob("*.jsonl") for folder in (tmp_path / "out", trained.folder / "out"))
    lines = events(log)
    assert lines[0]["world_size"] == 2 and [line["event"] for line in lines].count("final") == 1
    assert lines[-1]["val_loss"] == pytest.approx(events(other)[-1]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("argv, words", [
    (["tiny", "--matrix.lrr", "1"], ["--matrix.lrr", "--matrix.lr"]),
    (["--device", "abacus"], ["abacus"]),
    (["tiny", "--data.corpus", "nowhere"], ["nowhere"]),
])  # fmt: skip
def test_bad_options_are_refused_in_one_sentence(
    environment: dict[str, str], tmp_path: Path, argv: list[str], words: list[str]
) -> None:
    message = sentence(run([str(ROOT / "run.sh"), "--system", *argv], environment, tmp_path))
    assert all(word in message for word in words), message


def test_torch_that_is_there_but_broken_is_said_in_one_sentence(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is missing')")
    broken = environment | {"PYTHONPATH": str(tmp_path)}
    message = sentence(run([str(ROOT / "run.sh"), "--system", "tiny"], broken, tmp_path))
    assert "libtorch.so is missing" in message and "requirements.txt" in message


def test_failure_of_the_trainer_is_said_once(environment: dict[str, str], tmp_path: Path) -> None:
    argv = [
        str(ROOT / "run.sh"),
        "--system",
        "tiny",
        *options(track=None, out=tmp_path / "out", evaluation__tokens=10**6),
    ]
    assert "1000000" in sentence(run(argv, environment, tmp_path), "train_gpt.py")
    assert not (tmp_path / "out").exists()


def test_help_needs_no_python(environment: dict[str, str], tmp_path: Path) -> None:
    done = run([str(ROOT / "run.sh"), "--help"], environment | {"PYTHON": "/nowhere"}, tmp_path)
    assert done.returncode == 0 and "./run.sh" in done.stdout and "--system" in done.stdout
    assert done.stderr == ""


# --------------------------------------------------------------------------------------------------
# Python, packages and data, with a stand-in for Python that notes how it is called

FAKE = """#!/bin/sh
echo "$@" | head -1 >> "$CALLS"
case "$*" in
  *version_info*) exit ${FAKE_CHECK:-0} ;;
  "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip"*) exit ${FAKE_PIP:-0} ;;
  tools/launch.py*) exit ${FAKE_LAUNCH:-0} ;;
esac
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """run.sh and its requirements alone in a folder, with the stand-in."""
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def calls_of(copy: Path, *argv: str, **settings: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run the copy of run.sh; what its Python was asked to do, checks of versions and packages left out."""
    calls = copy / "calls"
    calls.write_text("")
    environment = (
        dict(PATH="/usr/local/bin:/usr/bin:/bin", PYTHON=str(copy / "fake"), CALLS=str(calls)) | settings
    )
    done = run([str(copy / "run.sh"), *argv], environment, copy)
    return done, [line for line in calls.read_text().splitlines() if not line.startswith("-c ")]


@pytest.mark.parametrize("argv, settings, words", [
    ([], dict(PYTHON="/nowhere/python"), ["/nowhere/python", "3.11"]),
    ([], dict(FAKE_CHECK="3"), ["3.11", "PYTHON"]),
    (["--system"], dict(FAKE_CHECK="3"), ["3.11", "PYTHON"]),
    (["--system"], dict(FAKE_CHECK="4"), ["has no torch and numpy: pip install -r requirements.txt"]),
    (["--system", "test"], dict(FAKE_CHECK="4"), ["has no pytest and hypothesis", "requirements-dev.txt"]),
    (["--system"], dict(FAKE_CHECK="1"), ["cannot be run"]),
])  # fmt: skip
def test_missing_python_or_packages_are_said_in_one_sentence(
    copy: Path, argv: list, settings: dict, words: list
) -> None:
    done, calls = calls_of(copy, *argv, **settings)
    assert all(word in sentence(done, begun=False) for word in words)
    assert calls == [] and not (copy / ".venv").exists()


def test_environment_is_made_once_and_used(copy: Path) -> None:
    done, calls = calls_of(copy, "tiny")
    assert done.returncode == 0, done.stderr
    assert calls == [
        "-m venv .venv",
        "-m pip install --quiet -r requirements.txt",
        "tools/launch.py --track tiny",
    ]
    _, calls = calls_of(copy, "tiny")
    assert not any("venv" in call or "pip" in call for call in calls)
    # the tests need more packages, then training needs no further ones
    _, calls = calls_of(copy, "test", "-x")
    assert calls == ["-m pip install --quiet -r requirements-dev.txt", "-m pytest -x"]
    _, calls = calls_of(copy, "tiny")
    assert not any("pip" in call for call in calls)
    (copy / "requirements.txt").write_text("torch==9.9.9\n")
    _, calls = calls_of(copy, "tiny")
    assert calls[0] == "-m pip install --quiet -r requirements.txt"


def test_python_answers_for_itself_and_its_packages(copy: Path) -> None:
    """The questions that the stand-in does not understand, in one start."""
    python = copy / "python"
    python.write_text(f'#!/bin/sh\necho "$1" >> "$CALLS"\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    done, _ = calls_of(copy, "--system", PYTHON=str(python))
    assert sentence(done, begun=False) == (
        f"run.sh: {python} has no torch and numpy: pip install -r requirements.txt\n"
    )
    assert (copy / "calls").read_text() == "-c\n"


def test_a_long_installation_is_talked_about(copy: Path) -> None:
    """Every five seconds, here every fifth of a second; nothing goes on after it."""
    (copy / "run.sh").write_text((copy / "run.sh").read_text().replace("sleep 5 ", "sleep 0.2 "))
    slow = (copy / "fake").read_text().replace('"-m pip"*) ', '"-m pip"*) sleep 1; ')
    (copy / "fake").write_text(slow)
    done, calls = calls_of(copy, "tiny")
    assert done.returncode == 0 and calls[-1] == "tools/launch.py --track tiny", done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("run.sh: installing requirements.txt into .venv")
    assert 3 <= len(others) <= 5 and others[:2] == ["run.sh: installing, 5 s", "run.sh: installing, 10 s"]


def test_interrupted_installation_is_repeated(copy: Path) -> None:
    done, calls = calls_of(copy, "tiny", FAKE_PIP="1")
    no_traceback(done.stdout, done.stderr)
    assert done.returncode != 0 and "could not install requirements.txt" in done.stderr
    assert not any("launch" in call for call in calls)  # nothing was trained
    done, calls = calls_of(copy, "tiny")
    assert done.returncode == 0 and "-m pip install --quiet -r requirements.txt" in calls


@pytest.mark.parametrize("argv, words", [
    ([], "--track auto"),
    (["short"], "--track short"),
    (["train"], "--track auto"),
    (["--seed", "3"], "--track auto --seed 3"),
    (["tiny", "--model.skips", "((0, 1),)"], "--track tiny --model.skips ((0, 1),)"),
])  # fmt: skip
def test_words_and_status_pass_through(copy: Path, argv: list[str], words: str) -> None:
    done, calls = calls_of(copy, "--system", *argv, FAKE_LAUNCH="7")
    assert (calls, done.returncode, done.stderr) == ([f"tools/launch.py {words}"], 7, "")


def test_help_of_the_trainer_starts_nothing(copy: Path) -> None:
    _, calls = calls_of(copy, "--system", "short", "--seed", "3", "--help")
    assert calls == ["train_gpt.py --help"]
