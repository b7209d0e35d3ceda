"""Checkpoints: a run that ended anywhere goes on bit for bit, a bad one is named, a good one can be used."""

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt
from helpers import (
    STEPS,
    Outcome,
    check_equal,
    finish,
    options,
    patch_shard,
    refusal,
    start,
    train,
)

pytestmark = pytest.mark.usefixtures("data_dir")

# --------------------------------------------------------------------------------------------------
# Resume

# embed and head wait for every second step: saved at 4, 6, 10, 12, 16, 18, and the end
RESUMED = dict(checkpoint_every=3)


def resume(out: Path, **overrides: Any) -> Outcome:
    return train(options(**dict(out=out, **RESUMED) | dict(resume="") | overrides))


def stop_at(place: str, error: Callable[[], None]) -> contextlib.ExitStack:
    """Call `error` at a place of a run: "saved 2" after the second checkpoint, "save 2" in the midst of
    writing it, "rename 2" before it gets its name, "step 9" within a step."""
    what, number = place.split()
    target, name = {"saved": (train_gpt, "save_checkpoint"), "save": (train_gpt.os, "fsync"),
                    "rename": (train_gpt.os, "replace"),
                    "step": (train_gpt, "momentum_at")}[what]  # fmt: skip
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


@pytest.mark.parametrize(
    "place, step", [("saved 2", 6), ("save 2", 4), ("rename 3", 6), ("step 11", 10), ("step 2", 0)]
)
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
    kinds = [line["event"] for line in lines]
    assert kinds.count("header") == kinds.count("final") == 1
    times = [line["train_time_s"] for line in lines if "train_time_s" in line]
    assert times == sorted(times)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_interrupted_run_says_so_and_resumes(
    tmp_path: Path, reference: Outcome, capsys: pytest.CaptureFixture
) -> None:
    with stop_at("step 9", press_ctrl_c):
        assert "interrupted" in refusal(options(out=tmp_path, **RESUMED), capsys)
    check_equal(resume(tmp_path), reference)


def test_checkpoints_do_not_change_a_run(tmp_path: Path, reference: Outcome) -> None:
    outcome = train(options(out=tmp_path, **RESUMED))
    check_equal(outcome, reference)
    # the last two
    assert sorted(path.name for path in tmp_path.rglob("*.pt")) == ["step_000018.pt", "step_000020.pt"]
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


@pytest.mark.parametrize(
    "change", [dict(seed=1), dict(head__lr=0.009), dict(model__backout=-1), dict(data__row_tokens=48)]
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture, change: dict
) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    out = shutil.copytree(stopped, tmp_path / "out")
    message = refusal(options(out=out, resume=path, **change), capsys)
    (name,) = change
    expected = "another seed" if name == "seed" else f"another track (other {name.replace('__', '.')})"
    assert str(path) in message and expected in message
    # another track: its own, fresh run
    outcome = resume(out, schedule__steps=2, schedule__extension=0, **change)
    assert "resume" not in [line["event"] for line in outcome.lines]


def test_checkpoint_of_other_data_is_refused(
    tmp_path: Path,
    stopped: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
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


def test_resume_into_another_folder_keeps_the_log_readable(
    tmp_path: Path, stopped: Path, reference: Outcome
) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    outcome = train(options(out=tmp_path, resume=path))
    assert outcome.final["val_loss"] == reference.final["val_loss"]
    assert "resume" in [line["event"] for line in outcome.lines]


@pytest.mark.parametrize(
    "target, name", [(train_gpt.torch, "save"), (train_gpt.os, "fsync"), (train_gpt.os, "replace")]
)
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


def test_lines_after_the_checkpoint_are_written_again(
    tmp_path: Path, stopped: Path, reference: Outcome
) -> None:
    """Whatever a kill left behind step 6: whole lines, half a line, or not even the line of the
    checkpoint."""
    (path,) = stopped.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    saved_line = b'{"event": "checkpoint", "step": 6}\n'
    later = b'{"event": "step", "step": 7, "train_loss": 1.0, "train_time_s": 9.0, "tokens": 1}\n'
    torn = [*lines, later[:30]]
    for i, content in enumerate(
        (lines, [*lines, saved_line], [*lines, saved_line, later], torn, [*lines, later * 2], [])
    ):
        out = shutil.copytree(stopped, tmp_path / str(i))
        (out / path.name).write_bytes(b"".join(content))
        outcome = resume(out)
        kinds = [(line["event"], line.get("step")) for line in outcome.lines]
        assert kinds.count(("checkpoint", 6)) == 1 and kinds.count(("header", None)) == 1
        assert outcome.losses == (reference.losses if content else [x for x in reference.losses if x[1] > 6])


def test_resumed_from_an_older_checkpoint_and_stopped_again(
    tmp_path: Path, stopped: Path, reference: Outcome
) -> None:
    """The second resume goes on from the branch that the log holds, not from the later checkpoint
    of the first."""
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
def test_a_run_killed_after_its_last_checkpoint_ends(
    tmp_path: Path, reference: Outcome, logged: bool
) -> None:
    first = train(options(out=tmp_path, **RESUMED))
    next(tmp_path.glob("*/finished")).unlink()
    if not logged:
        first.log.write_bytes(b"".join(first.log.read_bytes().splitlines(keepends=True)[:-1]))
    outcome = resume(tmp_path)
    assert outcome.log == first.log
    assert [line["step"] for line in outcome.lines if line["event"] == "resume"] == [20]
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
    """The seed is only that of the initial weights: from a checkpoint on, a run of another seed is
    the same run."""
    (path,) = stopped.glob("*/step_000006.pt")
    outcome = train(options(out=tmp_path, resume=path, adopt="true", seed=1))
    assert outcome.losses == [loss for loss in reference.losses if loss[1] > 6]


def test_an_adopted_checkpoint_must_fit(tmp_path: Path, stopped: Path, capsys: pytest.CaptureFixture) -> None:
    (path,) = stopped.glob("*/step_000006.pt")
    for change, words in (dict(model__width=64), "does not fit"), (dict(schedule__steps=2), "only 4 steps"):
        assert words in refusal(options(out=tmp_path / "out", resume=path, adopt="true", **change), capsys)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# A checkpoint in use


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[Outcome, list[str]]:
    """A run whose validation takes the whole shard, and the options that use its last checkpoint."""
    out = tmp_path_factory.mktemp("trained")
    tokens = train_gpt.read_shard(data_dir / "shakespeare" / "val_000000.bin")
    outcome = train(options(out=out, checkpoint_every=100, evaluation__tokens=int((tokens[1:] != 256).sum())))
    (path,) = out.glob("*/step_000020.pt")
    return outcome, ["--track", "tiny", "--device", "cpu", "--threads", "1", "--resume", str(path)]


def test_loss_of_a_checkpoint(trained: tuple, data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """The run's own, on the validation shard and on the folder: a corpus means its validation shards."""
    (outcome, use), folder = trained, data_dir / "shakespeare"
    found = train_gpt.main([*use, "--evaluate", str(folder / "val_000000.bin")])
    assert found == pytest.approx(outcome.final["val_loss"], rel=1e-6)
    assert f"over {outcome.final['val_tokens']:,} tokens" in capsys.readouterr().out
    assert train_gpt.main([*use, "--evaluate", str(folder)]) == found
    said = f"{found:.4f} nats per token over {outcome.final['val_tokens']:,} tokens of "
    assert capsys.readouterr().out == f"{said}{folder / 'val_000000.bin'}\n"


def test_a_corpus_of_another_tokenizer_is_not_evaluated(
    trained: tuple, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its manifest says so, also when its tokens are small; a folder without a manifest is no corpus."""
    _, use = trained
    corpus = shutil.copytree(data_dir / "shakespeare", tmp_path / "corpus")
    manifest = corpus / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 257', '"vocab_size": 256'))
    for given in (corpus, corpus / "val_000000.bin"):
        assert "vocabulary" in refusal([*use, "--evaluate", str(given)], capsys)
    manifest.unlink()
    assert "manifest.json is missing" in refusal([*use, "--evaluate", str(corpus)], capsys)


def test_a_sample_may_begin_with_less_than_an_n_gram(trained: tuple, tmp_path: Path) -> None:
    """The longest n-gram of `tiny` has six tokens, a prompt may have one."""
    long = dict(model__ngrams="((2, 40), (9, 64))", schedule__steps=2, schedule__extension=0)
    train(options(out=tmp_path, checkpoint_every=2, **long))
    (path,) = tmp_path.glob("*/step_000002.pt")
    text = train_gpt.main([*trained[1][:-1], str(path), "--sample", "a", "--sample_tokens", "3"])
    assert text.startswith("a")


def test_loss_of_a_checkpoint_whose_head_is_the_embedding_too(
    trained: tuple, tmp_path: Path, data_dir: Path
) -> None:
    first, use = trained
    tokens = first.final["val_tokens"]
    outcome = train(options(out=tmp_path, checkpoint_every=100, evaluation__tokens=tokens, model__tied=2))
    (path,) = tmp_path.glob("*/step_000020.pt")
    found = train_gpt.main(
        [*use[:-1], str(path), "--evaluate", str(data_dir / "shakespeare" / "val_000000.bin")]
    )
    assert found == pytest.approx(outcome.final["val_loss"], rel=1e-6)


def test_a_sample_takes_likely_tokens_and_follows_the_seed(
    trained: tuple, capsys: pytest.CaptureFixture
) -> None:
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
    ("model", "unheard_of", 1, "unheard_of"), ("model", "width", "64", "width takes int"),
    ("model", "width", 64, "size"), ("data", None, None, "'data'"),
])  # fmt: skip
def test_a_checkpoint_of_another_version_is_not_used(
    trained: tuple,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    section: str,
    field: str | None,
    value: Any,
    sentence: str,
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
    (["--evaluate", "nothing.bin"], "nothing.bin is missing"),
    (["--evaluate", "large.bin"], "holds token 300"),
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
