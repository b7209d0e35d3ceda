"""The benchmark's table says what its log says, and its baseline is a causal model."""

import torch

import benchmark
from train_gpt import Data, make_batch

MACHINE = {"event": "machine", "device": "abacus", "cpus": 2, "torch": "2.13.0", "bfloat16": []}


def test_table_takes_medians_and_ratios_from_the_log():
    run = dict(lr=0.002, reached=True, steps=10, tokens=1000)
    events = [MACHINE]
    for tiny, baseline in ((1.0, 9.0), (2.0, 8.0), (7.0, 30.0)):
        events += [
            {"event": "tiny", **run, "train_time_s": tiny},
            {"event": "baseline", **run, "train_time_s": baseline},
        ]
    for name, seconds in (
        ("products", [1.0, 2.0, 9.0]),
        ("torch", [4.0, 4.0, 4.0]),
        ("ours", [3.0, 3.0, 1.0]),
    ):
        events.append(
            {"event": "optimizer", "name": name, "bank": [2, 3, 4], "threads": 1, "seconds": seconds}
        )
        small = {"event": "small", "matrices": [9, 8, 8]}
        events.append(small | {"name": name, "threads": 1, "seconds": seconds})
    text = benchmark.table(events)
    assert "abacus" in text and "| 2.0 s | 0.222 |" in text and "| 9.0 s | 1.000 |" in text
    assert "| ours | 1 | 3,000 | 1.50 | 0.75 |" in text
    assert "| 9 of 8 x 8, ours | 1 | 3,000.0 | 1.500 |" in text  # of the first


def test_runs_that_missed_the_target_do_not_count_as_times():
    run = dict(lr=0.002, steps=10, tokens=1000)
    events = [MACHINE]
    for reached, seconds in ((True, 4.0), (False, 1.0)):
        events += [
            {"event": kind, **run, "reached": reached, "train_time_s": seconds}
            for kind in ("tiny", "baseline")
        ]
    assert "| 1 of 2 |" in benchmark.table(events) and "| 4.0 s | 1.000 |" in benchmark.table(events)


def test_the_baseline_sees_neither_the_future_nor_other_documents():
    torch.manual_seed(0)
    model = benchmark.Baseline(64, width=32, heads=2, layers=2, max_tokens=16)
    model.dtype = torch.float32
    tokens = torch.randint(0, 60, (17,)).numpy()
    data = Data(predict_start=True)

    def loss_at(position: int, changed: int | None = None) -> float:
        row = tokens.copy()
        if changed is not None:
            row[changed] = 61
        batch = make_batch([(row, torch.tensor([6, 10]).numpy())], data, 2)
        targets = torch.full_like(batch.targets, -1)
        targets[0, position] = 3
        return float(model(batch.inputs, targets, batch.offsets, 4).detach())

    for position, changed, seen in (
        (9, 10, False),
        (9, 8, True),
        (9, 5, False),
        (5, 4, True),
        (12, 8, True),
        (15, 6, False),
    ):
        assert (loss_at(position) != loss_at(position, changed)) == seen, (position, changed)
