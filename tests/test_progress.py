"""What is on the screen while a run goes on: never long without news, never too much of it."""

import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from helpers import ROOT, options, train

Progress = train_gpt.Progress
SHORT = dict(model__tied=0, data__rows=1, data__row_tokens=32, evaluation__every=1000, evaluation__tokens=200,
             schedule__stages="((0, (16, 24)),)", schedule__steps=30, schedule__extension=0)  # fmt: skip


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Every line with its time."""
    lines, say = [], Progress.say

    def recorded(self: Progress, line: str) -> None:
        lines.append((time.monotonic(), line))
        say(self, line)

    monkeypatch.setattr(Progress, "say", recorded)
    return lines


def slow(monkeypatch: pytest.MonkeyPatch, method: str, seconds: float) -> None:
    """Makes a method of the trainer take longer."""
    original = getattr(train_gpt.Trainer, method)

    def slower(self: train_gpt.Trainer, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train_gpt.Trainer, method, slower)


@pytest.mark.usefixtures("data_dir")
def test_until_the_training_it_is_never_long_without_news(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list
) -> None:
    """Five seconds are a fifth of one here; every part of the start takes a second."""
    monkeypatch.setattr(Progress, "NEWS", 0.2)
    for method in ("load_data", "build_model", "forward_backward", "resume"):
        slow(monkeypatch, method, 1.0)
    advance, threads = train_gpt.Trainer.advance, []

    def watched(self: train_gpt.Trainer, *args: Any) -> Any:
        threads.extend(thread.name for thread in threading.enumerate())
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        return advance(self, *args)

    monkeypatch.setattr(train_gpt.Trainer, "advance", watched)
    train(options(out=tmp_path, **SHORT))
    (start,) = [i for i, (_, line) in enumerate(said) if line.startswith("training, 30 steps")]
    times = [at for at, _ in said[: start + 1]]
    # less than a part takes; what holds the interpreter up, such as collecting garbage, comes on top
    assert max(b - a for a, b in zip(times, times[1:])) < 0.8
    lines = [re.sub(r", \d+ s$", "", line) for _, line in said[:start]]
    folder = train_gpt.folder_from("DATA_DIR", "data") / "shakespeare"
    parts = [f"reading and checking {folder}", "building model and optimizer", "warm-up", "warm-up 1 of 3"]
    assert [*dict.fromkeys(lines)] == [*parts, "log and checkpoint"]
    assert all(lines.count(part) >= 3 for part in (*parts[:2], *parts[3:], "log and checkpoint"))
    assert threads and "progress" not in threads  # nothing disturbs the training


@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize("news, steps", [(0.0, [*range(10, 151, 10)]), (1000.0, [10, 150])])
def test_progress_is_said_all_along_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, news: float, steps: list
) -> None:
    """The first and the last step, and in between as often as NEWS allows."""
    monkeypatch.setattr(Progress, "NEWS", news)
    monkeypatch.setattr(Progress, "keep_saying", lambda self, ended: None)
    train(options(out=tmp_path, **SHORT | dict(schedule__steps=150, evaluation__log_every=10)))
    out = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^step (\d+)/150 loss", out, re.MULTILINE)] == steps
    assert len(re.findall(r"^step 150/150 validation loss", out, re.MULTILINE)) == 1
    assert len(re.findall(r"tokens/s \d+ s left$", out, re.MULTILINE)) == len(steps) - 1  # none at the end


def test_lines_of_the_training_are_few(said: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one line in NEWS seconds, whatever else was said; the clock is one of the test."""
    monkeypatch.setattr(Progress, "NEWS", 0.2)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(0)
    with progress.doing("training", training=True):
        while clock[0] < 1.0:
            progress.step("step", 0.5, "loss", last=False)
            clock[0] += 0.001
    times = [at for at, line in said if line == "step loss"]
    assert 4 <= len(times) <= 6 and min(b - a for a, b in zip(times, times[1:])) >= 0.2


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture) -> None:
    progress = Progress(1)
    with progress.doing("something"):
        progress.say("a line")
        progress.step("step 1", 0.5, "loss", last=True)
    assert capsys.readouterr() == ("", "")


def test_time_left_is_a_guess_in_words() -> None:
    assert [train_gpt.in_words(x) for x in (0.2, 119, 121, 3600)] == ["0 s", "119 s", "2 min", "60 min"]


# --------------------------------------------------------------------------------------------------
# On a terminal

RUN = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import train_gpt
train_gpt.Progress.REDRAW = 0.05
validate = train_gpt.Trainer.validate
def slow(self, *args, **kwargs):
    time.sleep(0.5 if self.clock.seconds else 0)
    return validate(self, *args, **kwargs)
train_gpt.Trainer.validate = slow
train_gpt.main(sys.argv[1:])
"""


def on_a_terminal(argv: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """What a command writes to a terminal of 100 columns, and its status."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=environment | {"COLUMNS": "100"})
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that nobody writes any more
            piece = b""
        if not piece:
            break
        written += piece
    os.close(ours)
    return written.decode(), child.wait()


def lines_that_stay(written: str) -> list[str]:
    """What is left of each line when all of it was written over."""
    return [line.rstrip("\r").rpartition("\r")[2].strip() for line in written.split("\n")]


@pytest.fixture(scope="module")
def screen(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, int]]:
    out = tmp_path_factory.mktemp("out")

    def run(**settings: Any) -> tuple[str, int]:
        argv = [sys.executable, "-c", RUN, str(ROOT), *options(out=out, **SHORT | settings)]
        return on_a_terminal(argv, dict(os.environ))

    return run


def test_a_terminal_has_one_bar_that_is_redrawn(screen: Callable) -> None:
    written, status = screen()
    assert status == 0
    stay = [line for line in lines_that_stay(written) if line]
    assert [re.sub(r"[\d.]+", "#", line)[:26] for line in stay] == [
        "step #/# validation loss #", "track tiny: validation los",
    ]  # fmt: skip
    drawn = written.split("\r")
    validating = {line for line in drawn if "step 30/30 validation |" in line}
    assert len([line for line in drawn if "step 30/30 validation |" in line]) >= 5, validating
    for part in ("reading and checking", "building model and optimizer", "warm-up", "training, 30 steps"):
        assert any(line.strip().startswith(part) for line in drawn), part


def test_a_refusal_stands_on_a_line_of_its_own(screen: Callable) -> None:
    written, status = screen(evaluation__tokens=10**6)
    assert status == 1
    (line,) = [line for line in lines_that_stay(written) if line]
    assert line.startswith("train_gpt.py: ") and "1000000" in line


def test_without_tqdm_there_are_lines(monkeypatch: pytest.MonkeyPatch, said: list) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Progress(0).doing("something"):
        pass
    assert [line for _, line in said] == ["something"]


# --------------------------------------------------------------------------------------------------
# Before torch is there

STAND_IN = """
import sys, time
print("torch begins", file=sys.stderr, flush=True)
time.sleep(0.5)
sys.exit(0)
"""


@pytest.mark.parametrize("rank, news", [(None, True), ("0", True), ("1", False)])
def test_something_is_said_before_torch_is_imported(tmp_path: Path, rank: str | None, news: bool) -> None:
    """Every five seconds; here every tenth of one. Of several processes the first one speaks."""
    (tmp_path / "torch.py").write_text(STAND_IN)
    source = (ROOT / "train_gpt.py").read_text()
    assert source.count("threading.Timer(5, ") == 1
    (tmp_path / "train_gpt.py").write_text(source.replace("threading.Timer(5, ", "threading.Timer(0.1, "))
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"RANK": rank} if rank else {}
    argv = [sys.executable, "train_gpt.py", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    if not news:
        assert lines == ["torch begins"]
        return
    assert lines[0] == "train_gpt.py: loading torch" and "torch begins" in lines
    assert "train_gpt.py: loading torch, 15 s" in lines
