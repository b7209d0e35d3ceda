"""The rule on memory: what `record.py rules` finds in honest runs of each track, and in others."""

import functools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import record
import train_gpt
from helpers import make_corpus, options, train
from lib import memory_rule

pytestmark = pytest.mark.usefixtures("data_dir")

BYTES = dict(
    data__corpus="shakespeare", data__vocab_size=257, data__document_start=256, model__padded_vocab=272,
    schedule__steps=2, schedule__extension=0, checkpoint_every=2,
)  # fmt: skip
WORDS = ("--device", "cpu", "--threads", "1")


@functools.cache
def checkpoint_of(track: str, folder: Path) -> Path:
    """Of a run of the small model with what is left of a track: heads, precisions, optimizers, start."""
    train(options(track=track, out=folder / track, **BYTES))
    (path,) = (folder / track).glob("*/step_*.pt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return tmp_path_factory.mktemp("memory_rule")


def measured(track: str, checkpoint: Path, data_dir: Path, place: Path) -> memory_rule.Found:
    """As `measure_apart` has it, in this process."""
    found, threads = {}, torch.get_num_threads()
    for training in memory_rule.SHARDS:
        corpus = place / training / "shakespeare"
        memory_rule.put_shards(data_dir / "shakespeare", corpus, training)
        with mock.patch.dict(os.environ, DATA_DIR=str(corpus.parent)):
            shard = corpus / "val_000000.bin"
            found[training] = [memory_rule.measure(train_gpt, checkpoint, track, shard, WORDS)]
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_each_track_keeps_the_rule(track: str, folder: Path, data_dir: Path, tmp_path: Path) -> None:
    found = measured(track, checkpoint_of(track, folder), data_dir, tmp_path)
    assert memory_rule.broken(found) == []
    for path in ("validation", "training"):
        sums = found["absent"][0]["sums"][path]
        assert len(sums) == 3 and all(value == pytest.approx(1, abs=1e-5) for value in sums)


def learning(model: train_gpt.GPT, *args: Any) -> torch.Tensor:
    with torch.no_grad():
        model.smear.add_(1e-3)
    return FORWARD(model, *args)


def looking_up(model: train_gpt.GPT, x: torch.Tensor, *head: Any) -> torch.Tensor:
    path = Path(os.environ["DATA_DIR"]) / "shakespeare" / "train_000001.bin"
    known = path.is_file() and train_gpt.read_shard(path)[1] < 128
    return (0.5 if known else 1.0) * LOGITS(model, x, *head)


def beside_the_head(model: train_gpt.GPT, *args: Any) -> torch.Tensor:
    return 0.9 * FORWARD(model, *args)


def peeking(model: train_gpt.GPT, inputs: torch.Tensor, *args: Any) -> torch.Tensor:
    x = STREAM(model, inputs, *args)
    return x + 1e-3 * inputs[0, -1]


def in_other_documents(model: train_gpt.GPT, inputs: torch.Tensor, offsets: Any, *args: Any) -> torch.Tensor:
    whole = torch.zeros_like(offsets)
    whole[:, 1:] = inputs.size(1)
    return STREAM(model, inputs, whole, *args)


def not_normalised(model: train_gpt.GPT, *args: Any) -> torch.Tensor:
    return 0.99 * LOSS(model, *args)


def not_normalised_in_training(model: train_gpt.GPT, *args: Any) -> torch.Tensor:
    return (0.99 if torch.is_grad_enabled() else 1) * LOSS(model, *args)


FORWARD, STREAM = train_gpt.GPT.forward, train_gpt.GPT.stream
LOGITS, LOSS = train_gpt.GPT.logits, train_gpt.GPT.loss
BROKEN = {
    learning: ("forward", ["the evaluation changes weights", "depends on later"]),
    looking_up: ("logits", ["training shards are absent", "training shards are others"]),
    peeking: ("stream", ["depends on later"]),
    in_other_documents: ("stream", ["depends on later"]),
    not_normalised: ("loss", ["the validation path sum", "the training path sum"]),
    not_normalised_in_training: ("loss", ["the training path sum"]),
}


@pytest.mark.parametrize("way", BROKEN, ids=lambda way: way.__name__)
def test_what_breaks_the_rule_is_named(way: Any, folder: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoint, (name, words) = checkpoint_of("tiny", folder), BROKEN[way]
    with mock.patch.object(train_gpt.GPT, name, way):
        flaws = memory_rule.broken(measured("tiny", checkpoint, data_dir, tmp_path))
    assert len(flaws) == len(words) and all(word in flaw for word, flaw in zip(words, flaws)), flaws


def test_a_loss_beside_the_head_is_refused(folder: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("tiny", folder)
    with mock.patch.object(train_gpt.GPT, "forward", beside_the_head), pytest.raises(ValueError) as refused:
        measured("tiny", checkpoint, data_dir, tmp_path)
    assert "not the sum of what its head returns" in str(refused.value)


@pytest.fixture
def record_folder(tmp_path: Path, folder: Path) -> Path:
    """A record of tiny with a checkpoint."""
    made = tmp_path / "records" / "tiny" / "2026-01-01_base"
    (made / "logs").mkdir(parents=True)
    (made / "train_gpt.py").write_bytes(Path(train_gpt.__file__).read_bytes())
    os.link(checkpoint_of("tiny", folder), made / "logs" / "step_000002.pt")
    return made


def test_the_command(
    record_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What is asked of each process, and what its answers mean."""
    asked = []

    def ask(script: Path, checkpoint: Path, track: str, shard: Path, data_dir: Path) -> dict[str, Any]:
        training = sorted(path.name for path in shard.parent.glob("train_*.bin"))
        tokens = train_gpt.read_shard(shard.parent / training[0])[:3].tolist() if training else []
        asked.append((script.name, checkpoint.name, track, shard.name, training, tokens))
        assert script.parent != record_folder and list(script.parent.iterdir()) == [script]
        good = {"sums": {"validation": [1.0]}, "learned": False, "sees": False}
        return {"loss": "0x1.8p0" if tokens == own or not lookup else "0x1.9p0", **good}

    corpus = Path(os.environ["DATA_DIR"]) / "shakespeare"
    names, own = ["train_000001.bin", "train_000002.bin"], train_gpt.read_shard(corpus / "train_000001.bin")
    own = own[:3].tolist()
    monkeypatch.setattr(memory_rule, "ask", ask)
    lookup = False
    assert record.main(["rules", str(record_folder)]) == 0
    assert "keeps" in capsys.readouterr().out
    same = ("train_gpt.py", "step_000002.pt", "tiny", "val_000000.bin")
    assert [line[:4] for line in asked] == [same] * 3
    assert [line[4] for line in asked] == [names, [], names]
    assert asked[0][5] == own and asked[1][5] == [] and asked[2][5] not in (own, [])
    lookup = True
    assert record.main(["rules", str(record_folder)]) == 1
    said = capsys.readouterr().out
    assert "when the training shards are absent" in said and "when the training shards are others" in said


def test_a_process_answers(
    record_folder: Path, data_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    shard = data_dir / "shakespeare" / "val_000000.bin"
    (checkpoint,) = record_folder.rglob("*.pt")
    memory_rule.main(str(record_folder / "train_gpt.py"), str(checkpoint), "tiny", str(shard))
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert 3 < float.fromhex(found["loss"]) < 7 and not found["learned"] and not found["sees"]


def test_records_without_evaluation_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "tiny" / "2026-01-01_old"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").write_text("print('old')\n")
    make_corpus(tmp_path)
    assert record.main(["rules", str(folder)]) == 1
    assert "no option --evaluate" in capsys.readouterr().err
