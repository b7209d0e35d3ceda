"""Bad data, bad options and a run that goes wrong end early, in one clear sentence."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import shards
import train_gpt
from helpers import ROOT, edit_manifest, events, options, patch_shard, refusal, train

pytestmark = pytest.mark.usefixtures("data_dir")

# --------------------------------------------------------------------------------------------------
# Refusals of bad data


def cut(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)


BAD_DATA = {  # name: what happens to the folder, words of the sentence
    "no folder": (shutil.rmtree, ["shakespeare", "data/shakespeare.py", "DATA_DIR"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["manifest.json", "data/shakespeare.py"]),
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), ["manifest.json"]),
    "manifest is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), ["manifest.json"]),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]"), ["manifest.json"]),
    "manifest without files": (
        lambda f: (f / "manifest.json").write_text('{"vocab_size": 257}'),
        ["manifest.json"],
    ),
    "manifest without sha256": (
        lambda f: edit_manifest(f, files={n: {} for n in os.listdir(f)}),
        ["manifest.json"],
    ),
    "manifest with no shards": (lambda f: edit_manifest(f, files={}), ["train"]),
    "wrong vocabulary": (lambda f: edit_manifest(f, vocab_size=256), ["256", "257"]),
    "wrong document start": (lambda f: edit_manifest(f, document_start=0), ["256"]),
    "missing training shard": (lambda f: (f / "train_000001.bin").unlink(), ["train_000001.bin", "missing"]),
    "missing second shard": (lambda f: (f / "train_000002.bin").unlink(), ["train_000002.bin", "missing"]),
    "missing validation shard": (lambda f: (f / "val_000000.bin").unlink(), ["val_000000.bin", "missing"]),
    "truncated shard": (lambda f: cut(f, "train_000001.bin", 20000), ["train_000001.bin", "truncated"]),
    "truncated second shard": (
        lambda f: cut(f, "train_000002.bin", 20001),
        ["train_000002.bin", "truncated"],
    ),
    "truncated header": (lambda f: cut(f, "val_000000.bin", 100), ["val_000000.bin"]),
    "empty shard": (lambda f: cut(f, "train_000001.bin", 0), ["train_000001.bin"]),
    "wrong magic": (lambda f: patch_shard(f, "train_000001.bin", 0, 7), ["train_000001.bin", "20240520"]),
    "wrong version": (
        lambda f: patch_shard(f, "val_000000.bin", 1, 2),
        ["val_000000.bin", "20240520, 2), not"],
    ),
    "sha256 mismatch": (lambda f: patch_shard(f, "train_000002.bin", 266, 3), ["train_000002.bin", "sha256"]),
    "foreign token": (
        lambda f: patch_shard(f, "train_000001.bin", 266, 257, True),
        ["train_000001.bin", "257"],
    ),
    "foreign validation token": (
        lambda f: patch_shard(f, "val_000000.bin", 266, 65535, True),
        ["val_000000.bin", "65535"],
    ),
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


def test_unused_shards_may_be_missing(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data_dir / "shakespeare", tmp_path / "shakespeare")
    (tmp_path / "shakespeare/train_000002.bin").unlink()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    outcome = train(options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0))
    assert outcome.lines[0]["data"].keys() == {"train_000001.bin", "val_000000.bin"}


def test_every_training_token_may_be_used_but_no_more(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    """The longest schedule that the shards allow runs to its end; one step more is refused before
    anything starts."""

    def enough(steps: int) -> bool:
        track, _ = train_gpt.parse_command_line(options(schedule__steps=steps, schedule__extension=0))
        try:
            return bool(train_gpt.check_data(track, data_dir / "shakespeare"))
        except ValueError:
            return False

    most = next(steps for steps in range(20, 100) if not enough(steps + 1))
    changes = dict(schedule__extension=0, micro_rows=12, embed__every=1, head__every=1)
    assert train(options(out=tmp_path / "most", schedule__steps=most, **changes)).final["step"] == most
    assert "tokens" in refusal(options(out=tmp_path / "more", schedule__steps=most + 1, **changes), capsys)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("steps, epochs", [(60, 2), (500, 2), (500, 3), (10**7, 1)])
def test_too_few_training_tokens_are_counted_and_the_ways_out_work(
    data_dir: Path, steps: int, epochs: int
) -> None:
    """What an epoch gives, what the schedule takes, what is allowed; each option that is named would do."""
    folder = data_dir / "shakespeare"

    def check(**changes: Any) -> None:
        changes = dict(schedule__steps=steps, data__epochs=epochs) | changes
        track, _ = train_gpt.parse_command_line(options(**changes))
        train_gpt.check_data(track, folder)

    with pytest.raises(ValueError) as refused:
        check()
    sentence = str(refused.value)
    found = re.fullmatch(
        rf"the schedule takes ([\d,]+) training tokens, but an epoch gives ([\d,]+) of the ([\d,]+) in "
        rf"{folder} and --data.epochs is {epochs}; "
        r"(?:--data.epochs (\d+) or )?--schedule.steps (\d+) would do", sentence
    )  # fmt: skip
    takes, gives, there = (int(number.replace(",", "")) for number in found.groups()[:3])
    schedule = train_gpt.parse_command_line(options(schedule__steps=steps))[0].schedule
    if steps < 1000:
        batches = [train_gpt.stages_until(schedule, step)[-1].batch for step in range(steps + 2)]
        assert takes == 64 * 12 * sum(batches)
    assert there == sum(len(train_gpt.read_shard(path)) for path in folder.glob("train_*.bin"))
    assert 0.2 * there < gives <= there
    needed, fewer = found.groups()[3:]
    assert (needed is None) == (steps > 1000)
    if needed:
        check(data__epochs=needed)
        with pytest.raises(ValueError):
            check(data__epochs=int(needed) - 1)
    check(schedule__steps=fewer)


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
    "bool": (dict(matrix__nesterov="1"), ["--matrix.nesterov", "true|false", "1"]),
    "tuple": (dict(schedule__momentum="0.9"), ["--schedule.momentum", "(float, float)", "0.9"]),
    "code": (dict(matrix__lr="__import__('os').getpid()"), ["--matrix.lr", "float"]),
    "missing value": (["--seed"], ["--seed", "value"]),
    "missing value before another": (["--seed", "--out", "x"], ["--seed", "value"]),
    "no option": (["tiny"], ["tiny", "--track"]),
    "choice": (dict(matrix__equilibrate="rows"), ["equilibrate", "rowcol", "rows"]),
    "device": (dict(device="abacus"), ["abacus"]),
    "candidates in FP8": (dict(model__fp8_head="(1.0, 1.0, 1.0)",
                               schedule__stages="((0, (8, 8), 1, 96, 1.0, (), 40),)"), ["candidates", "16"]),
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
          "evaluation.log_every=0", "evaluation.every=0", "evaluation.tokens=0",
          "evaluation.row_tokens=0"]  # fmt: skip
IMPOSSIBLE = dict.fromkeys(COUNTS, "at least 1") | {
    "dtype=foo": "dtype", "dtype=int32": "dtype", "compile=true": "compile", "attention=fa1": "attention",
    "memory=1": "memory", "micro_rows=-1": "at least 0", "threads=-1": "at least 0",
    "schedule.stages=()": "stages", "schedule.stages=(16,24)": "stages",
    "schedule.stages=((0,16),)": "(begin, windows,", "schedule.stages=((0.5,(8,8)),)": "begin at 0",
    "schedule.stages=((0,(8,8)),(0,(8,8)))": "rising", "schedule.stages=((0,(8,8),0),)": "at least 1",
    "schedule.stages=((0,(8,8),1,96.5),)": "document_cut", "schedule.stages=((0,(8,8),1,96,'a'),)": "takes",
    "schedule.stages=((0,(8,8),1,96,1.0,(0.5,)),)": "ahead",
    "schedule.stages=((0,(8,8),1,96,1.0,(),7,8),)": "stages", "schedule.stages=((0,(0,8)),)": "windows",
    "schedule.stages=((0,(8,8),1,96,1.0,(),265),)": "candidates are 0 to padded_vocab",
    "model.matches=(0,)": "at least one token",
    "average.span=0": "average.span", "average.every=0": "at least 1",
    "average.blends=(('mpl',0.5),)": "mpl is no parameter", "average.blends=(('mlp',1.5),)": "not 0 to 1",
    "schedule.momentum=(0.9,)": "momentum", "model.softcap=(30.0,7.5)": "softcap",
    "model.paired=(5,)": "block number", "model.attention_source=2": "attention_source",
    "model.qk_parts=5": "qk_parts", "model.value_gate_inputs=33": "value_gate_inputs",
    "timeout=0": "timeout", "timeout=1000000000000000": "timeout",
    "seed=1000000000000000000000": "seed",
    "model.gate_inputs=-1": "gate_inputs", "model.gate_inputs=1000": "gate_inputs",
    "model.mlp_ratio=0": "mlp_ratio", "model.mlp_ratio=3.67": "117, not a multiple of 8",
    "model.up_std=-1": "up_std", "model.skips=((1,1),)": "skips",
    "model.value_tables=((0,-5),)": "tables", "matrix.mlp_lr_mul=()": "lr_mul",
    "matrix.mlp_lr_mul=(2.0,'a')": "mlp_lr_mul", "embed.every=0": "every", "model.ngrams=((2,0),)": "ngrams",
    "matrix.mlp_lr_mul=(1.0,2.0,3.0)": "lr_mul", "gate.iterations=0": "iterations",
    "model.low_precision=('foo',)": "low_precision", "model.fp8_head=(1.0,)": "fp8_head",
    "model.fp8_head=(0.0,1.0,1.0)": "fp8_head", "model.fp8_head=(1.0,1.0,1.0)": "multiples of 16",
    "schedule.steps=3": "is a multiple of 2", "embed.every=3": "is a multiple of 6",
    "model.heads=3": "heads", "model.padded_vocab=200": "padded_vocab", "model.skips=(3,)": "skips",
}  # fmt: skip


@pytest.mark.parametrize("setting", IMPOSSIBLE)
def test_impossible_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, setting: str) -> None:
    def alarm(*_: Any) -> None:
        raise AssertionError(f"{setting} hangs")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        message = refusal(
            [*options(out=tmp_path / "out", schedule__steps=2, schedule__extension=0), f"--{setting}"], capsys
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert IMPOSSIBLE[setting] in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("group", ["kind", "company"])
def test_tied_weights_that_cannot_part_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, group: str
) -> None:
    """An embedding under Muon, or in one stack with others, would die when head and embedding part."""
    original = train_gpt.MuonEq

    def other_groups(groups: list[dict], **options: Any) -> train_gpt.MuonEq:
        embed = next(g for g in groups if g["params"][0][0] == "embed")
        if group == "kind":
            embed.clear()
            embed.update(kind="matrix", lr=0.01, params=[("embed", model.embed)])
        else:
            scalars = next(g for g in groups if g["params"][0][0] == "residual")
            embed["params"] += scalars["params"]
            groups.remove(scalars)
        return original(groups, **options)

    def build(built: train_gpt.GPT, track: train_gpt.Track) -> train_gpt.MuonEq:
        nonlocal model
        model = built
        return optimizer_of(built, track)

    model, optimizer_of = None, train_gpt.build_optimizer
    monkeypatch.setattr(train_gpt, "build_optimizer", build)
    monkeypatch.setattr(train_gpt, "MuonEq", other_groups)
    message = refusal(options(out=tmp_path / "out"), capsys)
    assert "embed cannot take over the optimizer state of lm_head" in message
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
        assert error.startswith("train_gpt.py: 5 processes") and "[1, 2, 3, 4, 6, 12]" in error
        assert error.count("\n") == 1
    else:
        assert error == ""


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_numbers_of_torchrun_may_be_empty_but_not_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    """docker compose sets variables that nobody gave to nothing."""
    monkeypatch.setenv(name, "")
    train(options(out=tmp_path, schedule__steps=2, schedule__extension=0))
    monkeypatch.setenv(name, "two")
    message = refusal(options(out=tmp_path / "out"), capsys)
    assert f"{name} is 'two', not a number" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("corpus, hint", [
    ("shakespeare", "run `python data/shakespeare.py`"), ("fineweb10B", "run `python data/fineweb.py`"),
    ("mine", "run `python data/tokenize_text.py mine FILES`"),
])  # fmt: skip
def test_hints_name_scripts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, corpus: str, hint: str
) -> None:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    message = refusal(options(out=tmp_path / "out", data__corpus=corpus), capsys)
    assert f"{hint} or set DATA_DIR" in message
    (script,) = re.findall(r"data/\w+\.py", hint)
    assert (ROOT / script).is_file()


def test_an_empty_folder_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_DIR", "")
    assert train_gpt.folder_from("DATA_DIR", "data") == ROOT / "data"
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    assert train_gpt.folder_from("DATA_DIR", "data") == Path("elsewhere")


def test_data_with_nothing_to_predict_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    """Documents of one token, whose start is no target."""
    files, folder = {}, tmp_path / "shakespeare"
    for name, tokens in {"train_000001.bin": [256] * 4000, "val_000000.bin": [256, 97] * 2000}.items():
        files[name] = shards.write_shard(folder / name, np.array(tokens))
    shards.write_manifest(folder, "shakespeare", 257, 256, files)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    small = dict(data__rows=1, schedule__steps=2, schedule__extension=0)
    message = refusal(options(out=tmp_path / "out", **small), capsys)
    assert "step 0 has nothing to predict" in message


def test_unusable_output_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refusal(options(out=tmp_path / "file"), capsys)


# --------------------------------------------------------------------------------------------------
# A run that goes wrong


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("step", [0, 9])
def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, step: int, log_every: int
) -> None:
    original = train_gpt.learning_rate_factor
    monkeypatch.setattr(
        train_gpt, "learning_rate_factor", lambda s, at: math.nan if at == step else original(s, at)
    )
    changes = dict(checkpoint_every=2, evaluation__log_every=log_every, evaluation__every=100)
    message = refusal(options(out=tmp_path, **changes), capsys)
    assert message.startswith("not finite at step")
    assert ("the last checkpoint is kept" in message) == (step == 9)  # where there is one
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert lines[-1]["event"] != "final" and not list(tmp_path.rglob("finished"))
    checkpoints = sorted(tmp_path.rglob("*.pt"))
    assert [path.name for path in checkpoints[-1:]] == ["step_000008.pt"] * (step == 9)
    for path in checkpoints:
        content = torch.load(path, weights_only=True)
        assert all(p.isfinite().all() for p in content["model"].values()), path.name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name, step, log_every", [("lm_head", 9, 4), ("mlp", 9, 1), ("skip", 5, 100), ("embed", 1, 7)]
)
def test_a_gradient_that_is_not_finite_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    name: str, step: int, log_every: int, value: float,
) -> None:  # fmt: skip
    """The step and the group, although it is seen only with the next log line or validation (every
    7 steps)."""
    original, calls = train_gpt.Trainer.forward_backward, []

    def forward_backward(self: train_gpt.Trainer, *args: Any) -> torch.Tensor:
        loss = original(self, *args)
        if self.clock.began:
            calls.append(1)
            if len(calls) == step:
                getattr(self.model, name).grad.view(-1)[1 if name != "skip" else 0] = value
        return loss

    monkeypatch.setattr(train_gpt.Trainer, "forward_backward", forward_backward)
    changes = dict(
        evaluation__log_every=log_every, head__every=1, embed__every=1, checkpoint_every=2, model__tied=0
    )
    message = refusal(options(out=tmp_path, **changes), capsys)
    # small tensors share a unit
    others = {"skip": "residual, value_mix, xsa, skip, smear, backout"}.get(name, name)
    assert re.search(f": gradients of {re.escape(others)} since step {step}(;|$)", message)
    assert len(calls) <= min(-(-step // log_every) * log_every, -(-step // 7) * 7)
    for path in tmp_path.rglob("*.pt"):
        assert all(p.isfinite().all() for p in torch.load(path, weights_only=True)["model"].values()), (
            path.name
        )


def test_log_of_a_non_finite_loss_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_gpt, "learning_rate_factor", lambda *_: math.nan)
    refusal(options(out=tmp_path), capsys)
    events(next(tmp_path.glob("*.jsonl")))


def test_huge_learning_rate_stops_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "below 1e30, not 1e+39" in refusal(options(out=tmp_path, matrix__lr="1e39"), capsys)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: "
                                                "you tried to allocate 9 bytes"),
                                   MemoryError()], ids=["device", "cpu", "numpy"])  # fmt: skip
def test_too_little_memory_names_the_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(train_gpt.GPT, "forward", mock.Mock(side_effect=error))
    message = refusal(options(out=tmp_path / "out", micro_rows=3), capsys)
    assert "memory" in message and "micro_rows" in message
