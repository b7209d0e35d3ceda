"""The loader against a brute-force packer over Python lists, and validation rows against the plain
token stream."""

import hashlib
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import (
    Data,
    Evaluation,
    Model,
    Packer,
    Schedule,
    Track,
    check_data,
    make_batch,
    read_documents,
    read_shard,
    sample_classes,
    training_steps,
    validation_rows,
)

START = 50256  # needs all 16 bits


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


def write_shards(folder, shards):
    return [write_shard(folder / f"train_{i:06d}.bin", tokens) for i, tokens in enumerate(shards)]


def shards_of(lengths, before=0):
    """Documents of these lengths, every token of all shards different from its neighbours;
    `before`: an orphaned tail."""
    fresh = itertools.cycle(range(1, 50_000))

    def tokens_of(shard):
        orphans = [next(fresh) for _ in range(before)]
        return orphans + [t for n in shard for t in [START, *itertools.islice(fresh, n - 1)]]

    return [tokens_of(shard) for shard in lengths]


def track_of(data, *stages):
    """Stages (first step, batch, document cut); two of them begin in a schedule of two steps."""
    return Track(
        data,
        schedule=Schedule(steps=2, stages=[(first / 2, (8, 8), batch, cut) for first, batch, cut in stages]),
    )


def brute_rows(shards, data, cut_of=lambda row: 20):
    """[(documents of the row, position after it)], complete rows only; a row is T + 1 tokens of
    whole or cut documents."""
    documents = []
    for index, tokens in enumerate(shards):
        starts = [i for i, token in enumerate(tokens) if token == data.document_start] + [len(tokens)]
        documents += [(index, number, tokens[a:b]) for number, (a, b) in enumerate(zip(starts, starts[1:]))]
    walk = [(epoch, *document) for epoch in range(data.epochs) for document in documents]
    rows, row = [], []
    for here, following in zip(walk, [*walk[1:], (data.epochs, 0, 0, [])]):
        row.append(here[3][: cut_of(len(rows))][: data.row_tokens + 1 - sum(map(len, row))])
        if sum(map(len, row)) == data.row_tokens + 1:
            rows.append((row, following[:3]))
            row = []
    return rows


def pull(steps):
    """Steps until the data end, and the error."""
    found = []
    with pytest.raises(ValueError, match="end after") as error:
        for step in steps:
            found.append(step)
            assert len(found) < 1000
    return found, str(error.value)


def check_step(step, expected, data, rank, world_size):
    """One rank's step against R brute-force rows."""
    own = expected[rank * len(expected) // world_size : (rank + 1) * len(expected) // world_size]
    inputs, targets, offsets = step.batch
    T = data.row_tokens
    assert inputs.shape == targets.shape == (len(own), T)
    for i, (documents, _) in enumerate(own):
        flat = [token for document in documents for token in document]
        assert inputs[i].tolist() == flat[:T]
        assert targets[i].tolist() == [
            -1 if t == data.document_start and not data.predict_start else t for t in flat[1:]
        ]
        ends = [min(end, T) for end in itertools.accumulate(map(len, documents), initial=0)]
        row = offsets[i].tolist()
        assert row == ends[: len(row)] + [T] * (len(row) - len(ends))
    assert step.position == expected[-1][1]


# T is at most 12: documents longer than the cut, a row, two rows
length = st.one_of(st.integers(1, 4), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(length, min_size=1, max_size=12), min_size=1, max_size=4),
    before=st.integers(0, 3), T=st.integers(1, 12), cut=st.integers(1, 16), rows=st.sampled_from([1, 2, 4]),
    epochs=st.integers(1, 3), predict_start=st.booleans(), batch=st.integers(1, 3), later=st.integers(1, 16),
)  # fmt: skip
def test_packing_against_brute_force(
    tmp_path_factory, lengths, before, T, cut, rows, epochs, predict_start, batch, later
):
    """From the second step on another batch and another cut."""
    data = Data(document_start=START, predict_start=predict_start, rows=rows, row_tokens=T, epochs=epochs)
    shards, track = shards_of(lengths, before), track_of(data, (0, 1, cut), (1, batch, later))
    paths = write_shards(tmp_path_factory.mktemp("shards"), shards)
    expected = brute_rows(shards, data, lambda row: cut if row < rows else later)
    found, message = pull(training_steps(Packer(paths, data), track, T + 1, 0, 1))
    assert len(found) == (0 if len(expected) < rows else 1 + (len(expected) - rows) // (rows * batch))
    assert f"{epochs} epochs" in message
    for i, step in enumerate(found):
        first, count = (0, rows) if i == 0 else (rows + (i - 1) * rows * batch, rows * batch)
        check_step(step, expected[first : first + count], data, 0, 1)
        assert step.targets == int((step.batch.targets >= 0).sum()) and step.tokens == count * T


def example(tmp_path, **fields):
    """Three shards, rows that cross them, 8 rows of 16 tokens per step."""
    data = Data(**{**dict(document_start=START, rows=8, row_tokens=16, epochs=2), **fields})
    generator = np.random.default_rng(0)
    shards = shards_of([generator.integers(1, 30, n).tolist() for n in (40, 3, 60)])
    return data, track_of(data, (0, 1, 20)), shards, write_shards(tmp_path, shards)


@pytest.mark.parametrize("predict_start", (False, True))
@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
def test_ranks_share_the_same_step(tmp_path, world_size, predict_start):
    data, track, shards, paths = example(tmp_path, predict_start=predict_start)
    expected = brute_rows(shards, data)
    ranks = [
        pull(training_steps(Packer(paths, data), track, 17, rank, world_size))[0]
        for rank in range(world_size)
    ]
    assert len(expected) // 8 == len(ranks[0]) > 10
    for i, steps in enumerate(zip(*ranks)):
        for rank, step in enumerate(steps):
            check_step(step, expected[8 * i : 8 * i + 8], data, rank, world_size)
        total = sum(int((step.batch.targets >= 0).sum()) for step in steps)
        assert {step.targets for step in steps} == {total}
        assert total == 8 * 16 if predict_start else total < 8 * 16


@pytest.mark.parametrize("rank,world_size", [(0, 1), (1, 2)])
def test_resume_from_every_position(tmp_path, rank, world_size):
    data, track, _, paths = example(tmp_path)
    steps = pull(training_steps(Packer(paths, data), track, 17, rank, world_size))[0]
    assert {step.position[:2] for step in steps} >= {(0, 0), (0, 2), (1, 0), (1, 2)}
    for i, step in enumerate(steps):
        packer = Packer(paths, data, list(step.position))  # a checkpoint holds a list
        assert packer.position == step.position
        following = pull(training_steps(packer, track, 17, rank, world_size))[0]
        assert len(following) == len(steps) - i - 1
        for a, b in zip(following, steps[i + 1 :]):
            assert all(x.equal(y) for x, y in zip(a.batch, b.batch)) and a[1:] == b[1:]


def test_sampled_classes_of_a_row_by_hand():
    """Its targets as places among rising classes, then the sweep: 20,011 and 10 have no common divisor."""
    data = Data(vocab_size=10, document_start=0, predict_start=False, row_tokens=4)
    rows = [[8, 7, 7, 0, 3], [0, 1, 9, 1, 9]]

    def sampled(count):
        whole = [(np.array(row), [5]) for row in rows]
        batch = make_batch(whole, data, 1, count, 10, 5)
        return batch.classes.tolist(), batch.targets.tolist(), batch.log_counts.exp().tolist()

    # row 5 begins at 20 * 20,011 mod 10 = 0 and goes on with 1, 2, 3; row 6 with 4, 5, 6, 7; each of the
    # two that are no targets stands for four
    classes, targets, counts = sampled(4)
    assert (classes, targets) == ([[0, 1, 3, 7], [1, 4, 5, 9]], [[3, 3, -1, 2], [0, 3, 0, 3]])
    assert counts == [pytest.approx(row) for row in ([4, 4, 1, 1], [1, 4, 4, 1])]
    # more targets than classes: the rarest are left out
    assert sampled(1) == ([[7], [1]], [[0, 0, -1, -1], [0, -1, 0, -1]], [[1], [1]])
    assert sampled(10) == (2 * [[*range(10)]], [[7, 7, -1, 3], [1, 9, 1, 9]], 2 * [[1] * 10])


@pytest.mark.parametrize("vocab", (50_304, 3 * 20_011))
def test_a_sweep_visits_all_classes_equally_often(vocab):
    """Without targets, a fifth of the vocabulary for each row, the starts of the windows move on."""
    counts = np.zeros(vocab, int)
    for number in range(100):
        classes, _ = sample_classes(np.full(8, -1), vocab // 5 + 1, vocab, number)
        assert len(np.unique(classes)) == vocab // 5 + 1
        counts[classes] += 1
    assert counts.max() - counts.min() <= 1 and counts.min() >= 20


@pytest.mark.parametrize("world_size", (2, 8))
def test_sampled_classes_do_not_depend_on_the_processes(tmp_path, world_size):
    data, _, _, paths = example(tmp_path)
    track = Track(data, Model(padded_vocab=50_304), schedule=Schedule(
        steps=2, stages=[(0, (8, 8), 1, 20, 1.0, (), 40), (1, (8, 8), 2, 20, 1.0, (), 64)]))  # fmt: skip

    def first_steps(rank, world_size):
        steps = training_steps(Packer(paths, data), track, 17, rank, world_size)
        return [next(steps).batch for _ in range(3)]

    alone, ranks = first_steps(0, 1), [first_steps(rank, world_size) for rank in range(world_size)]
    for step, (whole, *parts) in enumerate(zip(alone, *ranks)):
        for name in ("targets", "classes", "log_counts"):
            assert getattr(whole, name).equal(torch.cat([getattr(part, name) for part in parts]))
        # rows are numbered by step and place
        first = step * len(whole.targets)
        for number, (places, classes) in enumerate(zip(whole.targets, whole.classes), first):
            targets = torch.where(places >= 0, classes[places], -1).numpy()
            wanted, _ = sample_classes(targets, (40, 40, 64)[step], 50_304, number)
            assert classes.tolist() == wanted.tolist()


def test_one_step_is_prepared_ahead(tmp_path):
    data, track, shards, paths = example(tmp_path)
    packer, expected, began = Packer(paths, data), brute_rows(shards, data), time.monotonic()
    steps = training_steps(packer, track, 17, 0, 1)
    assert next(steps).position == expected[7][1]
    while packer.position != expected[15][1] and time.monotonic() < began + 10:
        time.sleep(0.01)
    # the second step is ready before it is asked for, and no third one
    assert packer.position == expected[15][1]
    steps.close()


def test_the_next_shard_is_read_ahead_and_fails_only_when_reached(tmp_path):
    data, _, shards, paths = example(tmp_path, epochs=1)
    before = len(brute_rows(shards[:1], data))
    paths[1].write_bytes(paths[1].read_bytes()[:-2])
    packer = Packer(paths, data)
    for _ in range(before):
        packer.next_row(20)
    assert 1 in packer.loaded
    with pytest.raises(ValueError, match="train_000001.bin is truncated"):
        packer.next_row(20)


@pytest.mark.parametrize("documents", ([3, 2], [4, 1]))
def test_a_row_that_ends_with_the_data(tmp_path, documents):
    data = Data(document_start=START, rows=1, row_tokens=4, epochs=1)
    paths = write_shards(tmp_path, shards_of([documents]))
    packer = Packer(paths, data)
    assert [len(document) for document in packer.next_row(20)] == documents
    assert packer.position == (1, 0, 0)
    with pytest.raises(ValueError, match="end after 1 epochs"):
        packer.next_row(20)


def test_the_documents_of_a_row_are_counted_over_shards(tmp_path):
    """The largest number in a row of the schedule, whose rows begin in one shard and end in the next."""
    data = Data(
        corpus="", document_start=START, rows=1, row_tokens=9, vocab_size=START + 1, predict_start=True
    )
    shards = shards_of([[8, 3, 2], [2, 2, 3, 9], [9, 9]])
    paths, stream = write_shards(tmp_path, shards), write_shard(tmp_path / "val_000000.bin", [START, 1, 2, 3])
    digests = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in (*paths, stream)
    }
    manifest = {"vocab_size": START + 1, "document_start": START, "files": digests}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    schedule = Schedule(steps=3, extension=0, stages=[(0, (8, 8), 1, 20)])
    track = Track(data, schedule=schedule, evaluation=Evaluation(tokens=3, row_tokens=4))
    rows = [len(documents) for documents, _ in brute_rows(shards, data)][:3]
    assert check_data(track, tmp_path)["documents"] == max(rows) == 5 and rows == [2, 5, 2]


def test_batch_types_and_padding():
    data = Data(document_start=START, predict_start=False)
    rows = [
        (np.array([START, 7, START, 65535, 9]), np.array([2, 2])),
        (np.array([3, 4, 5, -1, -1]), np.array([3, 1])),
    ]
    inputs, targets, offsets = make_batch(rows, data, 4)
    assert [str(x.dtype) for x in (inputs, targets, offsets)] == ["torch.int32", "torch.int64", "torch.int32"]
    assert inputs.tolist() == [[START, 7, START, 65535], [3, 4, 5, 0]]
    assert targets.tolist() == [[7, -1, 65535, 9], [4, 5, -1, -1]]
    assert offsets.tolist() == [[0, 2, 4, 4, 4], [0, 3, 4, 4, 4]]
    # of all five: the last one is a target only
    for lengths, expected in (([3, 2], [0, 3, 4]), ([4, 1], [0, 4, 4])):
        assert make_batch([(rows[0][0], lengths)], data, 2).offsets.tolist() == [expected]


# --------------------------------------------------------------------------------------------------
# Validation


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.lists(length, min_size=1, max_size=8), min_size=1, max_size=3),
    before=st.integers(0, 3), T=st.integers(1, 14), predict_start=st.booleans(), share=st.floats(0, 1),
)  # fmt: skip
def test_validation_rows(tmp_path_factory, lengths, before, T, predict_start, share):
    data, shards = Data(document_start=START, predict_start=predict_start), shards_of(lengths, before)
    paths, stream = write_shards(tmp_path_factory.mktemp("val"), shards), sum(shards, [])
    pairs = [(a, b) for a, b in zip(stream, stream[1:]) if predict_start or b != START]
    wanted = round(share * len(pairs))
    if not wanted:
        return
    rows = validation_rows(paths, data, T, wanted)
    found, inputs_seen = [], []
    for number, row in enumerate(rows):
        inputs, targets, offsets = make_batch([row], data, T)
        assert inputs.shape == targets.shape == (1, T)
        inputs, targets, ends = inputs[0].tolist(), targets[0].tolist(), offsets[0].tolist()
        found += [(a, b) for a, b in zip(inputs, targets) if b >= 0]
        length = min(T, len(stream) - 1 - number * T)
        inputs_seen += inputs[:length]
        assert ends[0] == 0 and ends[-1] == T and ends == sorted(ends)
        if number < len(rows) - 1:  # an unpadded row: a new document exactly where the start token stands
            assert sorted({*ends} - {0, T}) == [i for i, token in enumerate(inputs) if token == START and i]
    assert found == pairs[:wanted]  # every target once, in order, no padding, exactly as many as asked for
    assert len(found) == wanted and inputs_seen[: (len(rows) - 1) * T] == stream[: (len(rows) - 1) * T]


def test_padding_of_the_last_validation_row_is_its_own_document(tmp_path):
    path = write_shard(tmp_path / "val.bin", [START, 1, 2, 3, START, 5, 6])
    data = Data(document_start=START, predict_start=True)
    first, last = validation_rows([path], data, 5, 6)
    assert first[0].tolist() == [START, 1, 2, 3, START, 5] and first[1].tolist() == [4, 1]
    assert last[0].tolist() == [5, 6, -1, -1, -1, -1] and last[1].tolist() == [1, 4]


@pytest.mark.parametrize("predict_start,targets", [(True, 6), (False, 5)])
def test_too_few_validation_tokens(tmp_path, predict_start, targets):
    path = write_shard(tmp_path / "val.bin", [START, 1, 2, 3, START, 5, 6])
    data = Data(document_start=START, predict_start=predict_start)
    rows = validation_rows([path], data, 4, targets)
    assert int(sum((make_batch([row], data, 4).targets >= 0).sum() for row in rows)) == targets
    with pytest.raises(
        ValueError, match=f"holds {targets} validation targets, the track needs {targets + 1}"
    ):
        validation_rows([path], data, 4, targets + 1)


@pytest.mark.parametrize("tokens", ([], [START]))
def test_validation_without_any_target(tmp_path, tokens):
    path = write_shard(tmp_path / "val.bin", tokens)
    with pytest.raises(ValueError, match="holds 0 validation targets"):
        validation_rows([path], Data(document_start=START), 4, 1)


# --------------------------------------------------------------------------------------------------
# Shards


def test_shard_round_trip(tmp_path):
    tokens = [0, 1, START, 65535, 256]
    found = read_shard(write_shard(tmp_path / "a.bin", tokens))
    assert found.tolist() == tokens and found.dtype == np.uint16
    assert read_shard(write_shard(tmp_path / "b.bin", [])).tolist() == []


REFUSED = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is not a token shard"),
    "short header": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is not a token shard"),
    "foreign magic": (lambda path: write_shard(path, [1, 2], magic=20240801), "is not a token shard"),
    "another format": (lambda path: path.write_bytes(b"\x93NUMPY" + bytes(2000)), "is not a token shard"),
    "version": (
        lambda path: write_shard(path, [1, 2], version=2),
        r"\(256, 20240520, 2\), not \(256, 20240520, 1\)",
    ),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "truncated"),
    "half a token": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "only a header": (lambda path: path.write_bytes(path.read_bytes()[:1024]), "truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"ab"), "damaged"),
    "count too large": (lambda path: write_shard(path, [1, 2], count=2**31 - 1), "truncated"),
    "negative count": (lambda path: write_shard(path, [], count=-1), "truncated"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


@pytest.mark.parametrize("damage,message", REFUSED.values(), ids=REFUSED.keys())
def test_refused_shards(tmp_path, damage, message):
    path = write_shard(tmp_path / "train_000007.bin", [START, 1, 2, 3])
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        read_shard(path)
    assert "train_000007.bin" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        Packer([path], Data(document_start=START)).next_row(20)


@pytest.mark.parametrize("tokens", ([], [1, 2, 3]))
def test_shard_without_a_document_start(tmp_path, tokens):
    path = write_shard(tmp_path / "train_000003.bin", tokens)
    with pytest.raises(ValueError, match="train_000003.bin holds no document start"):
        read_documents(Path(path), START)
