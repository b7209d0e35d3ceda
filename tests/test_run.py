"""The promises of a run: one result at any world size, exact resume, clear refusals, an honest log, the command line."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt
from helpers import ROOT, SMALL, Outcome, events, finish, make_corpus, options, start, train, train_with

TOLERANCE = 1e-6  # relative, of every loss; the same maths in another order of additions
PARAMETERS = 1e-4  # relative, in the norm of each parameter after 20 steps
STEPS = int(SMALL["schedule.steps"] + SMALL["schedule.extension"])


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    make_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The undisturbed run: one process, no checkpoints."""
    return train(options(out=tmp_path_factory.mktemp("reference")))


def refusal(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one sentence with which a command line is refused, without the program's name."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(argv)
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert error.startswith("train_gpt.py: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error.removeprefix("train_gpt.py: ").strip()


def check_close(outcome: Outcome, expected: Outcome) -> None:
    """The same losses and parameters up to rounding."""
    assert [loss[:2] for loss in outcome.losses] == [loss[:2] for loss in expected.losses]
    for (event, step, loss), (_, _, other) in zip(outcome.losses, expected.losses):
        assert loss == pytest.approx(other, rel=TOLERANCE, abs=0), f"{event} at step {step}"
    for name, p in expected.params.items():
        difference = (outcome.params[name].double() - p.double()).norm() / p.double().norm().clamp_min(1e-30)
        assert difference <= PARAMETERS, f"{name} differs by {difference:.1e}"


def check_equal(outcome: Outcome, expected: Outcome) -> None:
    """The same losses and parameters bit for bit, each step logged once."""
    assert outcome.losses == expected.losses
    assert outcome.params.keys() == expected.params.keys()
    for name, p in expected.params.items():
        assert torch.equal(outcome.params[name], p), name


# --- one result at any world size and any micro_rows


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> dict[str, list[Outcome]]:
    """Runs on 1 to 4 processes: what each rank returned, by name."""
    folder, results = tmp_path_factory.mktemp("worlds"), {}
    environment = {"DATA_DIR": str(data_dir)}

    def launch(world_size: int, jobs: dict[str, list[str]]) -> None:
        output = folder / f"output_{world_size}"
        output = output.with_name(f"{output.name}_resumed") if output.exists() else output
        found = train_with(world_size, list(jobs.values()), environment, output)
        results.update(zip(jobs, found))

    def ran(world_size: int) -> dict[str, list[str]]:
        return {str(world_size): options(out=folder / str(world_size), checkpoint_every=10)}

    launch(2, ran(2) | {
        "2 micro 2": options(out=folder / "m2", micro_rows=2),
        "2 micro 3": options(out=folder / "m3", micro_rows=3),
        "2 refused": options(out=folder / "refused", evaluation__tokens=10**6),
    })  # fmt: skip
    results["2 output"] = [(folder / f"output_2/output_{rank}").read_text() for rank in range(2)]
    for world_size in (1, 3, 4):
        launch(world_size, ran(world_size))
    for world_size in (1, 2, 3, 4):
        jobs = {}
        for other in {1, 2, 3, 4} - {world_size}:
            out = shutil.copytree(folder / str(other), folder / f"from {other} to {world_size}")
            jobs[out.name] = options(out=out, resume=min(out.rglob("*.pt")))
        launch(world_size, jobs)
    return results


@pytest.mark.parametrize("name", ["1", "2", "3", "4", "2 micro 2", "2 micro 3"])
def test_any_world_size_gives_the_same_run(worlds: dict, reference: Outcome, name: str) -> None:
    assert len(reference.losses) == STEPS + 4  # validations at 7, 14 and the end, and the final event
    check_close(worlds[name][0], reference)
    assert worlds[name][0].lines[0]["world_size"] == int(name[0])


@pytest.mark.parametrize("micro_rows", [2, 3, 12])
def test_micro_rows_are_only_a_memory_knob(tmp_path: Path, reference: Outcome, micro_rows: int) -> None:
    check_close(train(options(out=tmp_path, micro_rows=micro_rows)), reference)


@pytest.mark.parametrize("name", ["2", "3", "4", "from 2 to 3", "from 3 to 4"])
def test_all_ranks_end_with_the_same_parameters(worlds: dict, name: str) -> None:
    first, *others = worlds[name]
    assert len(others) == int(name[-1]) - 1
    for other in others:
        assert other.final.items() >= {key: first.final[key] for key in ("step", "val_loss", "tokens")}.items()
        assert all(torch.equal(p, other.params[name]) for name, p in first.params.items())


@pytest.mark.parametrize("other", [1, 2, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_checkpoint_loads_at_any_world_size(worlds: dict, reference: Outcome, world_size: int, other: int) -> None:
    if world_size == other:
        pytest.skip("resumed bit for bit elsewhere")
    outcome = worlds[f"from {other} to {world_size}"][0]
    resume = [line for line in outcome.lines if line["event"] == "resume"]
    assert [(line["step"], line["world_size"]) for line in resume] == [(10, world_size)]
    check_close(outcome, reference)


def test_several_processes_refuse_with_one_sentence(worlds: dict) -> None:
    assert worlds["2 refused"] == [1, 1]
    errors = [[line for line in output.splitlines() if "train_gpt.py:" in line] for output in worlds["2 output"]]
    assert len(errors[0]) == 1 and "1000000" in errors[0][0] and not errors[1]
    assert "Traceback" not in "".join(worlds["2 output"])


def test_the_model_learns(reference: Outcome) -> None:
    losses = [loss for event, _, loss in reference.losses if event == "step"]
    assert losses[0] == pytest.approx(math.log(264), abs=0.1)  # logits are zero at the start
    assert losses[-1] < losses[0] - 1.5
    assert reference.final["val_loss"] < 4.0 and reference.final["reached"] is True


def test_a_seed_gives_one_run(tmp_path: Path, reference: Outcome) -> None:
    short = dict(schedule__steps=4, schedule__extension=0)
    first, again, other = (train(options(out=tmp_path / str(i), seed=seed, **short)) for i, seed in enumerate((3, 3, 4)))
    check_equal(again, first)
    assert other.final["val_loss"] != first.final["val_loss"]


# --- resume

RESUMED = dict(checkpoint_every=3)  # embed and head wait for every second step: saved at 4, 6, 10, 12, 16, 18, and the end


def resume(out: Path, **overrides: Any) -> Outcome:
    return train(options(**dict(out=out, **RESUMED) | dict(resume="") | overrides))


def stop_at(place: str, error: Callable[[], None]) -> contextlib.ExitStack:
    """Call `error` at a place of a run: "saved 2" after the second checkpoint, "save 2" in the midst of writing it,
    "rename 2" before it gets its name, "step 9" within a step."""
    what, number = place.split()
    target, name = {"saved": (train_gpt, "save_checkpoint"), "save": (train_gpt.os, "fsync"),
                    "rename": (train_gpt.os, "replace"), "step": (train_gpt, "momentum_at")}[what]  # fmt: skip
    original, calls = getattr(target, name), []

    def patched(*args: Any) -> Any:
        calls.append(args)
        due = args[1] == int(number) if what == "step" else len(calls) == int(number)
        if due and what != "saved":
            error()
        result = original(*args)
        if due:
            error()
        return result

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(target, name, patched))
    return stack


class Stopped(BaseException):
    """What no handler of the trainer expects."""


def stop() -> None:
    raise Stopped


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def killed_run(argv: list[str], place: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with stop_at(place, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train(argv)


@pytest.mark.parametrize("place, step", [("saved 2", 6), ("save 2", 4), ("rename 3", 6), ("step 11", 10), ("step 2", 0)])
def test_killed_run_resumes_bit_for_bit(tmp_path: Path, reference: Outcome, place: str, step: int) -> None:
    assert finish(start(killed_run, [(options(out=tmp_path, **RESUMED), place)])) == [-signal.SIGKILL]
    outcome = resume(tmp_path)
    assert [line["step"] for line in outcome.lines if line["event"] == "resume"] == [step] * (step > 0)
    check_equal(outcome, reference)


def test_run_stopped_twice_resumes_bit_for_bit(tmp_path: Path, reference: Outcome) -> None:
    for place in ("step 8", "step 15"):
        with stop_at(place, stop), pytest.raises(Stopped):
            resume(tmp_path)
    outcome = resume(tmp_path)
    check_equal(outcome, reference)
    lines = outcome.lines
    assert [line["step"] for line in lines if line["event"] == "resume"] == [6, 12]
    assert [line["step"] for line in lines if line["event"] == "checkpoint"] == [4, 6, 10, 12, 16, 18, 20]
    assert [line["event"] for line in lines].count("header") == [line["event"] for line in lines].count("final") == 1
    times = [line["train_time_s"] for line in lines if "train_time_s" in line]
    assert times == sorted(times)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_interrupted_run_says_so_and_resumes(tmp_path: Path, reference: Outcome, capsys: pytest.CaptureFixture) -> None:
    with stop_at("step 9", press_ctrl_c):
        assert "interrupted" in refusal(options(out=tmp_path, **RESUMED), capsys)
    check_equal(resume(tmp_path), reference)


def test_checkpoints_do_not_change_a_run(tmp_path: Path, reference: Outcome) -> None:
    outcome = train(options(out=tmp_path, **RESUMED))
    check_equal(outcome, reference)
    assert sorted(path.name for path in tmp_path.rglob("*.pt")) == ["step_000018.pt", "step_000020.pt"]  # the last two
    assert not list(tmp_path.rglob("*.partial"))


def test_resume_without_checkpoint_starts_fresh(tmp_path: Path) -> None:
    short = dict(schedule__steps=2, schedule__extension=0)
    for out in (tmp_path, tmp_path / "new"):
        outcome = resume(out, **short)
        assert outcome.final["step"] == 2 and "resume" not in [line["event"] for line in outcome.lines]


def test_finished_run_is_not_resumed(tmp_path: Path) -> None:
    first = train(options(out=tmp_path, **RESUMED))
    time.sleep(1)  # run ids are made of seconds and the process
    before = first.log.read_bytes()
    again = resume(tmp_path)
    assert again.log != first.log and first.log.read_bytes() == before
    assert "resume" not in [line["event"] for line in again.lines]
    check_equal(again, first)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was stopped after its checkpoints of steps 4 and 6."""
    out = tmp_path_factory.mktemp("stopped")
    with stop_at("saved 2", stop), pytest.raises(Stopped):
        train(options(out=out, **RESUMED))
    return out


def foreign(path: Path, **changes: Any) -> None:
    content = {**torch.load(path, weights_only=True), **changes}
    train_gpt.save_checkpoint(path, {key: value for key, value in content.items() if value is not None})


def signed(path: Path, content: bytes) -> None:
    """With the checksum that belongs to it."""
    path.write_bytes(content + hashlib.sha256(content).digest())


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


class Evil:
    """Loading it unsafely leaves the folder `evil` beside the checkpoint."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path.parent / "evil"),)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "text": lambda path: path.write_text("nothing to see here"),
    "a bit flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "a bit flipped at the start": lambda path: flip(path, 5),
    "a bit flipped in the checksum": lambda path: flip(path, -1),
    "no checksum": lambda path: path.write_bytes(saved({"format": "train_gpt checkpoint 2"})),
    "other content": lambda path: signed(path, saved({"model": {}, "step": 6})),
    "list": lambda path: signed(path, saved([1, 2, 3])),
    "signed garbage": lambda path: signed(path, bytes(range(256)) * 40),
    "other format": lambda path: foreign(path, format="train_gpt checkpoint 1"),
    "code": lambda path: signed(path, pickle.dumps(Evil(path), protocol=2)),
    "code in the format of torch": lambda path: signed(path, saved({"format": Evil(path)})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, stopped: Path, reference: Outcome, capsys: pytest.CaptureFixture, damage: str
) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    (path,) = out.glob("*/step_000006.pt")
    before = {p: p.read_bytes() for p in out.glob("*.jsonl")}
    DAMAGE[damage](path)
    assert str(path) in refusal(options(out=out, resume=path, **RESUMED), capsys)
    assert {p: p.read_bytes() for p in out.glob("*.jsonl")} == before
    outcome = resume(out)
    error = capsys.readouterr().err
    assert error.startswith("train_gpt.py: ") and str(path) in error and error.count("\n") == 1
    assert [line["step"] for line in outcome.lines if line["event"] == "resume"] == [4]
    check_equal(outcome, reference)
    assert not list(out.rglob("evil"))


@pytest.mark.parametrize("change", [dict(seed=1), dict(head__lr=0.009), dict(model__backout=-1), dict(data__row_tokens=48)])
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture, change: dict
) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    out = shutil.copytree(stopped, tmp_path / "out")
    message = refusal(options(out=out, resume=path, **change), capsys)
    assert str(path) in message and ("seed" if "seed" in change else "track") in message
    outcome = resume(out, schedule__steps=2, schedule__extension=0, **change)  # another track: its own, fresh run
    assert "resume" not in [line["event"] for line in outcome.lines]


def test_checkpoint_of_other_data_is_refused(
    tmp_path: Path, stopped: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    shutil.copytree(data_dir / "shakespeare", tmp_path / "shakespeare")
    patch_shard(tmp_path / "shakespeare", "train_000001.bin", 300, 98, resign=True)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    message = refusal(options(out=tmp_path / "out", resume=path), capsys)
    assert str(path) in message and "another data" in message


def test_missing_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "step_1.pt"
    assert f"No such file or directory: {path}" in refusal(options(out=tmp_path / "out", resume=path), capsys)
    assert not (tmp_path / "out").exists()


def test_resume_into_another_folder_keeps_the_log_readable(tmp_path: Path, stopped: Path, reference: Outcome) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    outcome = train(options(out=tmp_path, resume=path))
    assert outcome.final["val_loss"] == reference.final["val_loss"]
    assert "resume" in [line["event"] for line in outcome.lines]


@pytest.mark.parametrize("target, name", [(train_gpt.torch, "save"), (train_gpt.os, "fsync"), (train_gpt.os, "replace")])
def test_failed_save_leaves_no_checkpoint_and_keeps_the_previous(
    tmp_path: Path, reference: Outcome, capsys: pytest.CaptureFixture, target: Any, name: str
) -> None:
    original, calls = getattr(target, name), []

    def full_disk(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*args)

    with mock.patch.object(target, name, full_disk):
        assert "No space left on device" in refusal(options(out=tmp_path, **RESUMED), capsys)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["step_000004.pt", "step_000006.pt"]
    check_equal(resume(tmp_path), reference)


def test_too_little_disk_is_seen_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stopped: Path
) -> None:
    """Three checkpoints must fit; those that the run has already count as room."""
    size = sum(path.stat().st_size for path in stopped.rglob("step_000006.pt"))
    free = 2.5 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=free))
    message = refusal(options(out=tmp_path / "out", **RESUMED), capsys)
    assert "MB free" in message and "--out" in message and not (tmp_path / "out").exists()
    out = shutil.copytree(stopped, tmp_path / "stopped")
    assert resume(out).final["step"] == STEPS
    free = 0
    assert train(options(out=tmp_path / "out")).final["step"] == STEPS  # writes no checkpoint


def test_a_log_has_one_writer(tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    (path,) = out.glob("*.jsonl")
    before = path.read_bytes()
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        message = refusal([*options(out=out, **RESUMED), "--resume"], capsys)
    assert f"another process writes {path}" in message and path.read_bytes() == before


def test_lines_after_the_checkpoint_are_written_again(tmp_path: Path, stopped: Path, reference: Outcome) -> None:
    """Whatever a kill left behind step 6: whole lines, half a line, or not even the line of the checkpoint."""
    (path,) = stopped.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    saved_line = b'{"event": "checkpoint", "step": 6}\n'
    later = b'{"event": "step", "step": 7, "train_loss": 1.0, "train_time_s": 9.0, "tokens": 1}\n'
    torn = [*lines, later[:30]]
    for i, content in enumerate((lines, [*lines, saved_line], [*lines, saved_line, later], torn, [*lines, later * 2], [])):
        out = shutil.copytree(stopped, tmp_path / str(i))
        (out / path.name).write_bytes(b"".join(content))
        outcome = resume(out)
        kinds = [(line["event"], line.get("step")) for line in outcome.lines]
        assert kinds.count(("checkpoint", 6)) == 1 and kinds.count(("header", None)) == 1
        assert outcome.losses == (reference.losses if content else [x for x in reference.losses if x[1] > 6])


def test_resumed_from_an_older_checkpoint_and_stopped_again(tmp_path: Path, stopped: Path, reference: Outcome) -> None:
    """The second resume goes on from the branch that the log holds, not from the later checkpoint of the first."""
    out = shutil.copytree(stopped, tmp_path / "out")
    (older,) = out.glob("*/step_000004.pt")
    with stop_at("step 5", stop), pytest.raises(Stopped):
        resume(out, resume=older)
    outcome = resume(out)
    assert [line["step"] for line in outcome.lines if line["event"] == "resume"] == [4, 4]
    check_equal(outcome, reference)


def test_a_finished_run_resumed_by_name_can_be_resumed_again(tmp_path: Path, reference: Outcome) -> None:
    first = train(options(out=tmp_path, **RESUMED))
    (path,) = tmp_path.glob("*/step_000018.pt")
    with stop_at("step 19", stop), pytest.raises(Stopped):
        train(options(out=tmp_path, resume=path, **RESUMED))
    outcome = resume(tmp_path)
    assert outcome.log == first.log
    check_equal(outcome, reference)


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_killed_after_its_last_checkpoint_ends(tmp_path: Path, reference: Outcome, logged: bool) -> None:
    first = train(options(out=tmp_path, **RESUMED))
    next(tmp_path.glob("*/finished")).unlink()
    if not logged:
        first.log.write_bytes(b"".join(first.log.read_bytes().splitlines(keepends=True)[:-1]))
    outcome = resume(tmp_path)
    assert outcome.log == first.log and [line["step"] for line in outcome.lines if line["event"] == "resume"] == [20]
    assert [line["event"] for line in outcome.lines].count("final") == 1 and list(tmp_path.glob("*/finished"))
    check_equal(outcome, reference)


@pytest.mark.parametrize("change", [dict(head__lr=0.009), dict(seed=1), dict(schedule__steps=16)])
def test_another_runs_checkpoint_can_be_adopted(
    tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture, change: dict
) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    out = tmp_path / "out"
    assert "--adopt true" in refusal(options(out=out, resume=path, **change), capsys)
    outcome = train(options(out=out, resume=path, adopt="true", **change))
    header, resumed, *others = outcome.lines  # a run of its own
    assert header["event"] == "header" and header["run_id"] == outcome.log.stem
    assert (resumed["event"], resumed["step"], resumed["run_id"]) == ("resume", 6, path.parent.name)
    assert others[0]["step"] == 7 and others[-1]["event"] == "final"
    assert {p: p.read_bytes() for p in before} == before


def test_an_adopted_run_goes_on_in_its_data(tmp_path: Path, stopped: Path, reference: Outcome) -> None:
    """The seed is only that of the initial weights: from a checkpoint on, a run of another seed is the same run."""
    (path,) = stopped.glob("*/step_000006.pt")
    outcome = train(options(out=tmp_path, resume=path, adopt="true", seed=1))
    assert outcome.losses == [loss for loss in reference.losses if loss[1] > 6]


def test_an_adopted_checkpoint_must_fit(tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    for change, words in (dict(model__width=64), "does not fit"), (dict(schedule__steps=3), "only 5 steps"):
        assert words in refusal(options(out=tmp_path / "out", resume=path, adopt="true", **change), capsys)
    assert not (tmp_path / "out").exists()


# --- refusals of bad data


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def patch_shard(folder: Path, name: str, position: int, value: int, resign: bool = False) -> None:
    """Overwrite an int32 of the header (position < 256) or the token at position - 256."""
    path = folder / name
    content = bytearray(path.read_bytes())
    if position < 256:
        content[4 * position : 4 * position + 4] = value.to_bytes(4, "little")
    else:
        content[1024 + 2 * (position - 256) : 1026 + 2 * (position - 256)] = value.to_bytes(2, "little")
    path.write_bytes(content)
    if resign:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        files[name]["sha256"] = hashlib.sha256(content).hexdigest()
        edit_manifest(folder, files=files)


def cut(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)


BAD_DATA = {  # name: what happens to the folder, words of the sentence
    "no folder": (shutil.rmtree, ["shakespeare", "data/shakespeare.py", "DATA_DIR"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "data/shakespeare.py"]),
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json"]),
    "manifest is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), ["manifest.json"]),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json"]),
    "manifest without files": (lambda f: (f / "manifest.json").write_text('{"vocab_size": 257}'), ["manifest.json"]),
    "manifest without sha256": (lambda f: edit_manifest(f, files={n: {} for n in os.listdir(f)}), ["manifest.json"]),
    "manifest with no shards": (lambda f: edit_manifest(f, files={}), ["train"]),
    "wrong vocabulary": (lambda f: edit_manifest(f, vocab_size=256), ["256", "257"]),
    "wrong document start": (lambda f: edit_manifest(f, document_start=0), ["256"]),
    "missing training shard": (lambda f: (f / "train_000001.bin").unlink(), ["train_000001.bin", "missing"]),
    "missing second shard": (lambda f: (f / "train_000002.bin").unlink(), ["train_000002.bin", "missing"]),
    "missing validation shard": (lambda f: (f / "val_000000.bin").unlink(), ["val_000000.bin", "missing"]),
    "truncated shard": (lambda f: cut(f, "train_000001.bin", 20000), ["train_000001.bin", "truncated"]),
    "truncated second shard": (lambda f: cut(f, "train_000002.bin", 20001), ["train_000002.bin", "truncated"]),
    "truncated header": (lambda f: cut(f, "val_000000.bin", 100), ["val_000000.bin"]),
    "empty shard": (lambda f: cut(f, "train_000001.bin", 0), ["train_000001.bin"]),
    "wrong magic": (lambda f: patch_shard(f, "train_000001.bin", 0, 7), ["train_000001.bin", "20240520"]),
    "wrong version": (lambda f: patch_shard(f, "val_000000.bin", 1, 2), ["val_000000.bin", "20240520, 2), not"]),
    "sha256 mismatch": (lambda f: patch_shard(f, "train_000002.bin", 266, 3), ["train_000002.bin", "sha256"]),
    "foreign token": (lambda f: patch_shard(f, "train_000001.bin", 266, 257, True), ["train_000001.bin", "257"]),
    "foreign validation token": (lambda f: patch_shard(f, "val_000000.bin", 266, 65535, True), ["val_000000.bin", "65535"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    shutil.copytree(data_dir / "shakespeare", tmp_path / "shakespeare")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    damage, words = BAD_DATA[name]
    damage(tmp_path / "shakespeare")
    message = refusal(options(out=tmp_path / "out"), capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_unused_shards_may_be_missing(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(data_dir / "shakespeare", tmp_path / "shakespeare")
    (tmp_path / "shakespeare/train_000002.bin").unlink()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    outcome = train(options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0))
    assert outcome.lines[0]["data"].keys() == {"train_000001.bin", "val_000000.bin"}


def test_every_training_token_may_be_used_but_no_more(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """The longest schedule that the shards allow runs to its end; one step more is refused before anything starts."""

    def enough(steps: int) -> bool:
        track, _ = train_gpt.parse_command_line(options(schedule__steps=steps, schedule__extension=0))
        try:
            return bool(train_gpt.check_data(track, data_dir / "shakespeare"))
        except ValueError:
            return False

    most = next(steps for steps in range(20, 100) if not enough(steps + 1))
    changes = dict(schedule__extension=0, micro_rows=12)
    assert train(options(out=tmp_path / "most", schedule__steps=most, **changes)).final["step"] == most
    assert "tokens" in refusal(options(out=tmp_path / "more", schedule__steps=most + 1, **changes), capsys)
    assert not (tmp_path / "more").exists()


BAD_OPTIONS = {  # name: (command line or overrides, words of the sentence)
    "too few training tokens": (dict(schedule__steps=500), ["train", "tokens"]),
    "too few validation tokens": (dict(evaluation__tokens=10**6), ["validation", "1000000"]),
    "micro_rows": (dict(micro_rows=5), ["micro_rows 5", "12"]),
    "micro_rows too large": (dict(micro_rows=24), ["micro_rows 24", "12"]),
    "unknown option": (["--matrix.equilibrated", "row"], ["--matrix.equilibrated", "--matrix.equilibrate"]),
    "unknown section": (["--matrx.lr", "1"], ["--matrx.lr", "--matrix.lr"]),
    "unknown run option": (["--sed", "1"], ["--sed", "--seed"]),
    "unknown track": (dict(track="huge"), ["huge", "tiny", "short"]),
    "int": (dict(data__rows="many"), ["--data.rows", "int", "many"]),
    "int is no float": (dict(data__rows="12.0"), ["--data.rows", "int", "12.0"]),
    "int is no bool": (dict(seed="true"), ["--seed", "int", "True"]),
    "float": (dict(matrix__lr="fast"), ["--matrix.lr", "float", "fast"]),
    "bool": (dict(matrix__nesterov="1"), ["--matrix.nesterov", "bool", "1"]),
    "tuple": (dict(schedule__momentum="0.9"), ["--schedule.momentum", "tuple", "0.9"]),
    "code": (dict(matrix__lr="__import__('os').getpid()"), ["--matrix.lr", "float"]),
    "missing value": (["--seed"], ["--seed", "value"]),
    "missing value before another": (["--seed", "--out", "x"], ["--seed", "value"]),
    "no option": (["tiny"], ["tiny", "--track"]),
    "choice": (dict(matrix__equilibrate="rows"), ["equilibrate", "rowcol", "rows"]),
    "device": (dict(device="abacus"), ["abacus"]),
    "other corpus": (dict(data__corpus="nowhere"), ["nowhere", "manifest.json"]),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    change, words = BAD_OPTIONS[name]
    base = options(out=tmp_path / "out", **(change if isinstance(change, dict) else {}))
    message = refusal(base if isinstance(change, dict) else base + change, capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


COUNTS = ["data.rows=0", "model.heads=0", "data.row_tokens=0", "data.row_tokens=-5", "schedule.steps=0",
          "evaluation.log_every=0", "evaluation.every=0", "evaluation.tokens=0", "evaluation.row_tokens=0"]  # fmt: skip
IMPOSSIBLE = dict.fromkeys(COUNTS, "at least 1") | {
    "dtype=foo": "dtype", "dtype=int32": "dtype", "compile=true": "compile", "attention=fa1": "attention",
    "memory=1": "memory", "micro_rows=-1": "at least 0", "threads=-1": "at least 0",
    "schedule.stages=()": "stages", "schedule.stages=(16,24)": "stages", "schedule.stages=((0,16),)": "(short, long window)",
    "schedule.stages=((0.5,(8,8)),)": "begin at 0", "schedule.stages=((0,(8,8)),(0,(8,8)))": "rising",
    "schedule.stages=((0,(8,8),0),)": "at least 1", "schedule.stages=((0,(8,8),1,96.5),)": "document cut",
    "schedule.stages=((0,(8,8),1,96,'a'),)": "takes", "schedule.stages=((0,(8,8),1,96,1.0,(0.5,)),)": "ahead",
    "schedule.stages=((0,(8,8),1,96,1.0,(),7),)": "stages", "schedule.stages=((0,(0,8)),)": "windows",
    "schedule.momentum=(0.9,)": "momentum", "model.softcap=(30.0,7.5)": "softcap", "model.paired=(5,)": "block number",
    "model.frozen=2": "frozen", "model.qk_parts=5": "qk_parts", "model.value_gate_inputs=33": "value_gate_inputs",
    "timeout=0": "timeout", "timeout=1000000000000000": "timeout", "seed=1000000000000000000000": "seed",
    "model.gate_inputs=-1": "gate_inputs", "model.gate_inputs=1000": "gate_inputs", "model.mlp_ratio=0": "mlp_ratio",
    "model.up_std=-1": "up_std", "model.skips=((1,1),)": "skips", "model.value_tables=((0,-5),)": "tables",
    "matrix.lr_mul=()": "lr_mul", "matrix.lr_mul=(2.0,'a')": "lr_mul", "embed.every=0": "every",
    "model.ngrams=((2,0),)": "ngrams", "gate.lr_mul=()": "lr_mul", "gate.lr_mul=((0,1),)": "lr_mul",
    "model.low_precision=('foo',)": "low_precision", "model.fp8_head=(1.0,)": "fp8_head",
    "model.fp8_head=(0.0,1.0,1.0)": "fp8_head", "model.fp8_head=(1.0,1.0,1.0)": "multiples of 16",
    "model.heads=3": "heads", "model.padded_vocab=200": "padded_vocab", "model.skips=(3,)": "skips",
}  # fmt: skip


@pytest.mark.parametrize("setting", IMPOSSIBLE)
def test_impossible_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, setting: str) -> None:
    def alarm(*_: Any) -> None:
        raise AssertionError(f"{setting} hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        message = refusal([*options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0), f"--{setting}"], capsys)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert IMPOSSIBLE[setting] in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_impossible_world_size_lists_the_allowed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as stop:
        train(options(out=tmp_path / "out"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and not (tmp_path / "out").exists()
    if rank == 0:
        assert error.startswith("train_gpt.py: 5 processes") and "[1, 2, 3, 4, 6, 12]" in error and error.count("\n") == 1
    else:
        assert error == ""


def test_unusable_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refusal(options(out=tmp_path / "file"), capsys)


# --- a run that goes wrong


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("step", [0, 9])
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, step: int, log_every: int
) -> None:
    original = train_gpt.learning_rate_factor
    monkeypatch.setattr(train_gpt, "learning_rate_factor", lambda s, at: math.nan if at == step else original(s, at))
    changes = dict(checkpoint_every=2, evaluation__log_every=log_every, evaluation__every=100)
    message = refusal(options(out=tmp_path, **changes), capsys)
    assert message.startswith("not finite at step") and "the last checkpoint is kept" in message
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert lines[-1]["event"] != "final" and not list(tmp_path.rglob("finished"))
    checkpoints = sorted(tmp_path.rglob("*.pt"))
    assert [path.name for path in checkpoints[-1:]] == ["step_000008.pt"] * (step == 9)
    for path in checkpoints:
        content = torch.load(path, weights_only=True)
        assert all(p.isfinite().all() for p in content["model"].values()), path.name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name, step, log_every", [("lm_head", 9, 4), ("mlp", 9, 1), ("skip", 5, 100), ("embed", 1, 7)])
def test_a_gradient_that_is_not_finite_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    name: str, step: int, log_every: int, value: float,
) -> None:  # fmt: skip
    """The step and the group, although it is seen only with the next log line or validation (every 7 steps)."""
    original, calls = train_gpt.Trainer.forward_backward, []

    def forward_backward(self: train_gpt.Trainer, *args: Any) -> torch.Tensor:
        loss = original(self, *args)
        if self.clock.began:
            calls.append(1)
            if len(calls) == step:
                getattr(self.model, name).grad.view(-1)[1 if name != "skip" else 0] = value
        return loss

    monkeypatch.setattr(train_gpt.Trainer, "forward_backward", forward_backward)
    changes = dict(evaluation__log_every=log_every, head__every=1, embed__every=1, checkpoint_every=2, model__tied=0)
    message = refusal(options(out=tmp_path, **changes), capsys)
    others = {"skip": "residual, value_mix, xsa, skip, smear, backout"}.get(name, name)  # small tensors share a unit
    assert f": gradients of {others} since step {step};" in message
    assert len(calls) <= min(-(-step // log_every) * log_every, -(-step // 7) * 7)
    for path in tmp_path.rglob("*.pt"):
        assert all(p.isfinite().all() for p in torch.load(path, weights_only=True)["model"].values()), path.name


def test_log_of_a_non_finite_loss_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_gpt, "learning_rate_factor", lambda *_: math.nan)
    refusal(options(out=tmp_path), capsys)
    events(next(tmp_path.glob("*.jsonl")))


def test_huge_learning_rate_stops_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "below 1e30, not 1e+39" in refusal(options(out=tmp_path, matrix__lr="1e39"), capsys)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                                   MemoryError()], ids=["device", "cpu", "numpy"])  # fmt: skip
def test_too_little_memory_names_the_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(train_gpt.GPT, "forward", mock.Mock(side_effect=error))
    message = refusal(options(out=tmp_path / "out", micro_rows=3), capsys)
    assert "memory" in message and "micro_rows" in message


# --- the log

HEADER = {
    "run_id": str, "track": str, "settings": dict, "seed": int, "dtype": str, "micro_rows": list, "source_sha256": str,
    "git_commit": str, "git_dirty": bool, "torch": str, "cuda": (str, type(None)), "driver": str, "python": str,
    "device": str, "cpus": int, "world_size": int, "threads": int, "data": dict, "compiled": str, "compile": str,
    "startup_s": dict, "attention": str, "head": str,
}  # fmt: skip
TIMED = {"step": int, "train_time_s": float, "tokens": int}
FIELDS = {
    "header": HEADER,
    "step": TIMED | {"train_loss": float},
    "val": TIMED | {"val_loss": float, "val_tokens": int},
    "final": TIMED | {"val_loss": float, "val_tokens": int, "target": float, "reached": bool,
                      "compiles_in_timed_region": int, "peak_memory_bytes": int},
}  # fmt: skip


def test_log_has_every_event_and_field(reference: Outcome) -> None:
    lines = reference.lines
    assert [line["event"] for line in lines] == (
        ["header"] + ["step"] * 7 + ["val"] + ["step"] * 7 + ["val"] + ["step"] * 6 + ["val", "final"]
    )
    for line in lines:
        for name, kind in FIELDS[line["event"]].items():
            assert isinstance(line[name], kind), (line["event"], name)
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in steps] == [*itertools.accumulate([768] * 9 + [1536] * 9 + [768] * 2)]
    times = [line["train_time_s"] for line in lines if "train_time_s" in line]
    assert times == sorted(times) and times[0] > 0
    final = dict(lines[-1])
    assert final.pop("event") == "final" and final == reference.final
    assert final["val_tokens"] == 1000 and final["peak_memory_bytes"] > 2**20 and final["compiles_in_timed_region"] == 0


def test_header_says_what_was_run(reference: Outcome, data_dir: Path) -> None:
    header = reference.lines[0]
    track, run = train_gpt.parse_command_line(options())
    assert header["settings"] == json.loads(json.dumps(dataclasses.asdict(track)))
    assert header["settings"]["head"]["every"] == 2 and header["settings"]["data"]["rows"] == 12  # the overrides
    assert (header["track"], header["seed"], header["dtype"], header["threads"]) == ("tiny", 0, "float32", 1)
    folder = data_dir / "shakespeare"
    assert header["data"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}
    assert header["torch"] == torch.__version__ and header["compile"] == "none" and header["compiled"] == "none"
    parts = ["imports and processes", "data", "model and optimizer", "graphs", "optimizer"]
    assert list(header["startup_s"]) == parts and min(header["startup_s"].values()) >= 0
    assert (header["attention"], header["head"]) == ("blocked", "float32")


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_age_of_a_process() -> None:
    began = time.time()
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); import train_gpt; print(time.time() - train_gpt.process_age())"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert abs(float(done.stdout) - began) < 0.5


def test_source_is_stored_once_beside_the_logs(tmp_path: Path) -> None:
    short, source = dict(schedule__steps=1, schedule__extension=0), (ROOT / "train_gpt.py").read_bytes()
    runs = [train(options(out=tmp_path, seed=seed, **short)) for seed in (0, 1)]
    assert [path.read_bytes() for path in tmp_path.glob("*.py")] == [source]
    assert {run.lines[0]["source_sha256"] for run in runs} == {hashlib.sha256(source).hexdigest()}
    assert len({run.log for run in runs}) == len(list(tmp_path.glob("*.jsonl"))) == 2
    (stored,) = tmp_path.glob("*.py")
    assert stored.stem == hashlib.sha256(source).hexdigest()


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_logs_of_the_tracks_stay_below_100_kb(reference: Outcome, name: str) -> None:
    longest = {}
    for line in reference.log.read_text().splitlines():
        event = json.loads(line)["event"]
        longest[event] = max(longest.get(event, 0), len(line) + 10)  # later steps have more digits
    schedule, evaluation = train_gpt.TRACKS[name].schedule, train_gpt.TRACKS[name].evaluation
    steps = train_gpt.total_steps(schedule)
    total = longest["header"] + 80 * 200 + longest["final"]  # up to 200 data digests
    total += longest["step"] * (steps // evaluation.log_every + 1) + longest["val"] * (steps // evaluation.every + 1)
    assert total < 100_000


# --- compiled runs

# no attention: it takes twice as long to compile
COMPILED = dict(compile="parts", data__rows=1, model__layers=1, model__attention_free="(0,)", model__long_blocks="()",
                model__xsa="()", model__key_offset="()", model__paired="()", model__frozen=-1, model__qk_parts=1,
                model__skips="()", model__value_tables="()", model__backout=-1, schedule__stages="((0, (64, 64)),)",
                schedule__steps=3, schedule__extension=0, evaluation__windows="(64, 64)", evaluation__row_tokens=64,
                evaluation__tokens=200)  # fmt: skip


def test_compiled_run_is_cold_once_and_compiles_nothing_in_the_timed_region(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    environment |= dict(CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_COMPILE_THREADS="2")
    headers = []
    for name in ("cold", "warm"):
        argv = [sys.executable, str(ROOT / "train_gpt.py"), *options(out=tmp_path / name, **COMPILED)]
        done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        header, *_, final = events(next((tmp_path / name).glob("*.jsonl")))
        assert final["event"] == "final" and final["compiles_in_timed_region"] == 0
        assert header["compiled"] == "parts" and header["graphs"] >= 2
        headers.append(header)
    assert [header["compile"] for header in headers] == ["cold", "warm"]
    assert headers[1]["startup_s"]["graphs"] < headers[0]["startup_s"]["graphs"]
    assert any((tmp_path / "cache").iterdir())


def test_graphs_are_made_beside_parameters_of_low_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients are fp32, which a graph that is traced meanwhile would not take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = dict(dtype="bfloat16", model__low_precision="('mlp', 'embed', 'ngram_embed', 'value_embed')",
                    schedule__stages="((0, (64, 64)), (0.5, (32, 32), 2))")  # fmt: skip
    outcome = train(options(out=tmp_path, **COMPILED | settings))
    assert outcome.lines[0]["graphs"] >= 3 and outcome.final["compiles_in_timed_region"] == 0


def test_compiling_in_the_timed_region_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    original = train_gpt.Trainer.warm_up

    def nothing_warmed_up(self: train_gpt.Trainer) -> float:
        with torch.compiler.set_stance("force_eager"):
            return original(self)

    monkeypatch.setattr(train_gpt.Trainer, "warm_up", nothing_warmed_up)
    torch._dynamo.reset()
    assert "timed region" in refusal(options(out=tmp_path, **COMPILED), capsys)
    assert [line["event"] for line in events(next(tmp_path.glob("*.jsonl")))] == ["header"]


# --- importing and the command line


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    code = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import numpy, torch, torch._dynamo, torch.distributed as dist
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().tolist(),
            torch.get_float32_matmul_precision(), dict(os.environ), os.listdir("."), threading.active_count(), os.getcwd(),
            dist.is_initialized(), torch._dynamo.config.get_config_copy(), torch.is_grad_enabled())
before, modules = state(), {name.split(".")[0] for name in sys.modules}
import train_gpt
assert state() == before, (state(), before)
new = {name.split(".")[0] for name in sys.modules} - modules - set(sys.stdlib_module_names)
assert new == {"train_gpt"}, new
"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    argv = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--track", "short", "--help"]])
def test_help_lists_every_track_and_field(capsys: pytest.CaptureFixture, argv: list[str]) -> None:
    train_gpt.main(argv)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert said.err == ""
    for f in dataclasses.fields(train_gpt.Run):
        assert any(line.strip().startswith(f"--{f.name} ") and f.metadata["meaning"] in line for line in lines), f.name
    for name, track in train_gpt.TRACKS.items():
        (begin,) = [i for i, line in enumerate(lines) if line.startswith(f"Track {name} ")]
        ends = [i for i, line in enumerate(lines) if line.startswith("Track ") and i > begin]
        part = lines[begin + 1 : ends[0] if ends else None]
        for section in dataclasses.fields(track):
            settings = getattr(track, section.name)
            for f in dataclasses.fields(settings):
                (line,) = [x for x in part if x.strip().startswith(f"--{section.name}.{f.name} ")]
                assert f.metadata["meaning"] and line.endswith(f.metadata["meaning"])
                assert str(getattr(settings, f.name)).replace(" ", "") in line.replace(" ", "")


VALUES = [  # option, text, value
    ("seed", "3", 3),
    ("seed", "-1", -1),
    ("data.rows", "6", 6),
    ("matrix.lr", "0.5", 0.5),
    ("matrix.lr", "2", 2.0),
    ("evaluation.target", "-1e-3", -0.001),
    ("head.eps", "1e-10", 1e-10),
    ("matrix.cautious", "false", False),
    ("matrix.cautious", "True", True),
    ("matrix.nesterov", "FALSE", False),
    ("matrix.phase", "7", 7),
    ("matrix.phase", "none", None),
    ("matrix.equilibrate", "row", "row"),
    ("out", "1", "1"),
    ("out", "a b", "a b"),
    ("schedule.momentum", "(0.5, 0.75)", (0.5, 0.75)),
    ("schedule.momentum", "0.5,0.75", (0.5, 0.75)),
    ("model.skips", "[(0, 1)]", ((0, 1),)),
    ("model.skips", "()", ()),
    ("model.skips", "((1, 2), (3, 4))", ((1, 2), (3, 4))),
    ("schedule.stages", "((0, (3, 4)),)", ((0, (3, 4), 1, 4096, 1.0, ()),)),
    ("matrix.lr_mul", "(1.0, 2.0)", (1.0, 2.0)),
    ("matrix.lr_mul", "2.5", 2.5),
]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("option, text, value", VALUES)
def test_values_of_options(option: str, text: str, value: Any, joined: bool) -> None:
    argv = [f"--{option}={text}"] if joined else [f"--{option}", text]
    track, run = train_gpt.parse_command_line(["--track", "tiny", *argv])
    found = functools.reduce(getattr, option.split("."), track if "." in option else run)
    assert found == value and type(found) is type(value)
    others = train_gpt.parse_command_line(["--track", "tiny"])
    section, _, name = option.rpartition(".")
    if section:
        changed = dataclasses.replace(getattr(track, section), **{name: getattr(getattr(others[0], section), name)})
        assert dataclasses.replace(track, **{section: changed}) == others[0] and run == others[1]
    else:
        assert dataclasses.replace(run, **{name: getattr(others[1], name)}) == others[1] and track == others[0]


def test_order_of_options() -> None:
    def parse(*argv: str) -> tuple[train_gpt.Track, train_gpt.Run]:
        return train_gpt.parse_command_line(argv)

    assert parse("--data.rows", "6", "--track", "short") == parse("--track", "short", "--data.rows=6")
    assert parse("--track", "tiny", "--seed", "1", "--seed", "2") == parse("--track", "tiny", "--seed", "2")
    assert parse("--track", "tiny")[0] == train_gpt.TRACKS["tiny"]
    assert parse("--track", "tiny", "--resume")[1].resume == ""
    assert parse("--resume", "--track", "tiny")[1].resume == ""
    assert parse("--track", "tiny", "--resume", "a.pt")[1].resume == "a.pt"
    assert parse("--track", "tiny")[1].resume is None
    assert parse("--track", "tiny", "--checkpoint-every", "5")[1].checkpoint_every == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice depends on the devices")
def test_track_auto_is_tiny_without_a_large_gpu() -> None:
    assert train_gpt.parse_command_line([])[1].track == "tiny" == train_gpt.parse_command_line(["--track", "auto"])[1].track


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_tracks_are_frozen_data(name: str) -> None:
    track = train_gpt.TRACKS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        track.data.rows = 1
    assert json.loads(json.dumps(dataclasses.asdict(track)))["data"]["rows"] == track.data.rows
    assert track.data.vocab_size <= track.model.padded_vocab and track.model.width % track.model.heads == 0
    assert np.iinfo(np.uint16).max >= track.data.document_start


# --- what changes during a run


def test_stages_reach_the_model_and_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, windows, loss weights, tied weights, rotary history, learning rate and decay of every step."""
    forward, step, rotary, seen = train_gpt.Trainer.forward_backward, train_gpt.MuonEq.step, train_gpt.GPT.set_rotary, []

    def forward_backward(self: train_gpt.Trainer, batch: Any, weights: Any) -> torch.Tensor:
        if self.clock.began:
            seen.append([len(batch.inputs), self.stage.windows, [*weights], self.model.tied, self.model.history])
        return forward(self, batch, weights)

    def optimizer_step(self: train_gpt.MuonEq, *, tokens: int) -> None:
        if seen:
            group = next(group for group in self.param_groups if group["kind"] == "matrix" and group["weight_decay"])
            seen[-1] += [group["lr"] / 0.03, group["weight_decay"] / 0.1]
        step(self, tokens=tokens)

    def set_rotary(self: train_gpt.GPT, windows: list[int]) -> None:
        self.history = windows
        rotary(self, windows)

    monkeypatch.setattr(train_gpt.Trainer, "forward_backward", forward_backward)
    monkeypatch.setattr(train_gpt.MuonEq, "step", optimizer_step)
    monkeypatch.setattr(train_gpt.GPT, "set_rotary", set_rotary)
    train(options(out=tmp_path))
    schedule = train_gpt.parse_command_line(options())[0].schedule
    factors = [train_gpt.learning_rate_factor(schedule, at) for at in range(STEPS)]
    stages = [(12, (16, 24), [24])] * 9 + [(24, (24, 32), [24, 32])] * 9 + [(12, (24, 40), [24, 32, 40])] * 2
    weights = [[1.0, 0.5 * (1 - at / 9)] for at in range(9)] + [[1.0]] * 11
    assert len(seen) == STEPS
    for at, (rows, windows, found, tied, history, lr, decay) in enumerate(seen):
        assert (rows, windows, history) == stages[at] and found == pytest.approx(weights[at])
        assert tied == (at < 12) and lr == pytest.approx(factors[at]) and decay == pytest.approx(factors[at])  # power 2


def test_tied_weights_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, parted = train_gpt.MuonEq.copy_state, []

    def copy_state(self: train_gpt.MuonEq, source: str, target: str) -> None:
        before = self.state_dict()["state"]  # of the embedding: never updated
        original(self, source, target)
        state, params = self.state_dict()["state"], {unit.names[0]: unit.params[0] for unit in self.units}
        assert not any(x.any() for x in before["embed"].values() if isinstance(x, torch.Tensor))
        same = [torch.equal(state["embed"][key], state["lm_head"][key]) for key in ("exp_avg", "exp_avg_sq")]
        parted.append((self.steps, torch.equal(params["embed"], params["lm_head"]), same))

    monkeypatch.setattr(train_gpt.MuonEq, "copy_state", copy_state)
    params = train(options(out=tmp_path)).params
    assert parted == [(12, True, [True, True])] and not torch.equal(params["embed"], params["lm_head"])
    train(options(out=tmp_path, model__tied=0))
    train(options(out=tmp_path, model__tied=1))
    assert len(parted) == 2 and parted[1][0] == 18  # the last one only in the extension


@pytest.mark.parametrize(
    "asked, world_size, rows", [(0, 1, [8, 8, 8]), (0, 2, [4, 8, 6]), (2, 4, [2, 2, 2]), (0, 8, [1, 2, 3])]
)
def test_rows_of_a_pass_follow_the_batch(asked: int, world_size: int, rows: list[int]) -> None:
    track, run = train_gpt.parse_command_line(["--track", "tiny", "--data.rows", "8", "--micro_rows", str(asked)])
    assert [train_gpt.micro_rows(track, run, world_size, batch) for batch in (1, 2, 3)] == rows  # 1,024 tokens each


# --- a checkpoint in use


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[Outcome, list[str]]:
    """A run whose validation takes the whole shard, and the options that use its last checkpoint."""
    out, tokens = tmp_path_factory.mktemp("trained"), train_gpt.read_shard(data_dir / "shakespeare" / "val_000000.bin")
    outcome = train(options(out=out, checkpoint_every=100, evaluation__tokens=int((tokens[1:] != 256).sum())))
    (path,) = out.glob("*/step_000020.pt")
    return outcome, ["--track", "tiny", "--device", "cpu", "--threads", "1", "--resume", str(path)]


def test_loss_of_a_checkpoint(trained: tuple, data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """On the validation shard the run's own, on a folder that of all its shards."""
    (outcome, use), folder = trained, data_dir / "shakespeare"
    found = train_gpt.main([*use, "--evaluate", str(folder / "val_000000.bin")])
    assert found == pytest.approx(outcome.final["val_loss"], rel=1e-6)
    assert f"over {outcome.final['val_tokens']:,} tokens" in capsys.readouterr().out
    found = train_gpt.main([*use, "--evaluate", str(folder)])
    stream = np.concatenate([train_gpt.read_shard(path) for path in sorted(folder.glob("*.bin"))])
    assert f"{found:.4f} nats per token over {(stream[1:] != 256).sum():,} tokens of {folder}" in capsys.readouterr().out


def test_loss_of_a_checkpoint_whose_head_is_the_embedding_too(trained: tuple, tmp_path: Path, data_dir: Path) -> None:
    first, use = trained
    tokens = first.final["val_tokens"]
    outcome = train(options(out=tmp_path, checkpoint_every=100, evaluation__tokens=tokens, model__tied=2))
    (path,) = tmp_path.glob("*/step_000020.pt")
    found = train_gpt.main([*use[:-1], str(path), "--evaluate", str(data_dir / "shakespeare" / "val_000000.bin")])
    assert found == pytest.approx(outcome.final["val_loss"], rel=1e-6)


def test_a_sample_takes_likely_tokens_and_follows_the_seed(trained: tuple, capsys: pytest.CaptureFixture) -> None:
    _, use = trained

    def sample(**fields: Any) -> str:
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        text = train_gpt.main([*use, "--sample", "ab cd", "--sample_tokens", "12", *words])
        assert capsys.readouterr().out == text + "\n" and text.startswith("ab cd") and len(text) <= 17
        return text

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    greedy = sample(seed=1, temperature=1e-3)
    assert greedy == sample(seed=2, temperature=1e-3)
    content = torch.load(use[-1], weights_only=True)
    track, _ = train_gpt.parse_command_line(options())
    model = train_gpt.GPT(track.model, 256, torch.float32)
    model.load_state_dict(content["model"])
    model.set_rotary([24, 32, 40])
    tokens = [256, *greedy.encode()]
    for place in range(6, len(tokens)):
        inputs, targets = torch.tensor([tokens[:place]], dtype=torch.int32), torch.full((1, place), -1)
        offsets, losses = torch.tensor([[0, place]], dtype=torch.int32), []
        for token in range(257):
            targets[0, -1] = token
            with torch.no_grad():
                losses.append(float(model(inputs, targets, offsets, (24, 48), place)))
        assert losses[tokens[place]] == min(losses)


@pytest.mark.parametrize("section, field, value, sentence", [
    ("model", "unheard_of", 1, "unheard_of"), ("model", "width", "64", "width takes int"), ("model", "width", 64, "size"),
    ("data", None, None, "'data'"),
])  # fmt: skip
def test_a_checkpoint_of_another_version_is_not_used(
    trained: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, section: str, field: str | None, value: Any, sentence: str
) -> None:
    _, use = trained
    path = tmp_path / "step_000020.pt"
    key = torch.load(use[-1], weights_only=True)["key"]
    if field:
        key["track"][section][field] = value
    else:
        del key["track"][section]
    shutil.copy(use[-1], path)
    foreign(path, key=key)
    message = refusal([*use[:-1], str(path), "--sample", "a"], capsys)
    assert f"{path} is not of this train_gpt.py" in message and sentence in message


@pytest.mark.parametrize("words, sentence", [
    (["--sample", "a"], "need --resume PATH"), (["--evaluate", "x.bin", "--resume"], "need --resume PATH"),
    (["--evaluate", "nothing.bin"], "nothing.bin is missing"), (["--evaluate", "large.bin"], "holds token 300"),
])  # fmt: skip
def test_a_checkpoint_cannot_be_used(
    trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    words: list[str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3
    (tmp_path / "large.bin").write_bytes(header.tobytes() + np.array([256, 300, 7], "<u2").tobytes())
    _, use = trained
    assert sentence in refusal([*(use[:-2] if "need" in sentence else use), *words], capsys)
