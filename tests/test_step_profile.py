"""The profile's operations against torch's own counter, its pairs against brute force, its table
against its figures."""

import os

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import step_profile
import train_gpt
from helpers import options


@pytest.mark.parametrize("window", (1, 3, 11, 12, 40))
def test_visible_pairs(window):
    rows = [[5, 7, 12], [24], [1] * 24]
    offsets = np.array([[sum(row[:i]) for i in range(27)] for row in rows])
    expected = sum(min(p, window) + 1 for row in rows for length in row for p in range(length))
    assert step_profile.visible_pairs(offsets, window) == expected


@pytest.fixture(scope="module")
def profiled(data_dir):
    """The profile of a small run, the products that torch counts in its parts, and the folder of both."""
    counted = {}

    def work(trainer):
        parts = {}

        def remember(*args):
            parts.update(original(*args))
            return parts

        original, step_profile.parts_of = step_profile.parts_of, remember
        found = step_profile.profile(trainer, str(data_dir / "trace.json"))
        for name, (call, often, *_) in parts.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counted[name] = often * counter.get_total_flops()
        for p in trainer.model.parameters():  # a parameter without a gradient is left alone
            p.grad = torch.ones_like(p, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            trainer.optimizer.step(tokens=1)
        counted["optimizer, with its communication"] = counter.get_total_flops()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_profile, "ROUNDS", 1)
        patch.setattr(step_profile, "ceilings", lambda *_: (1e9, 2e9))
        argv = options(out=data_dir / "out", embed__every=1, head__every=1, scalar__every=1)
        return train_gpt.main(argv, work), counted, data_dir


def test_operations_are_those_that_torch_counts(profiled):
    """Exactly for the products of matrices; the attention kernel of a CPU looks at whole blocks,
    masked pairs included."""
    found, counted, _ = profiled
    parts = {row["part"]: row for row in found["parts"]}
    for name in ("MLP", "head and loss"):
        assert parts[name]["operations"] == counted[name] > 0
    gates = 7 * 12 * 32  # of one row each, whose products torch counts too
    name = "optimizer, with its communication"
    assert parts[name]["operations"] == pytest.approx(counted[name], rel=0.02, abs=gates)
    for name in (name for name in parts if name.startswith("attention")):
        assert 0.1 * counted[name] < parts[name]["operations"] < counted[name]


def test_table_says_what_was_found(profiled):
    found, _, folder = profiled
    text = step_profile.table(found)
    for row in found["parts"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['part']} |")]
        assert f"| {row['ms']:.2f} |" in line
        if "floor_ms" in row:
            assert row["floor_ms"] == pytest.approx(1e3 * max(row["operations"] / 1e9, row["bytes"] / 2e9))
            assert f"| {row['floor_ms']:.2f} | {row['ms'] / row['floor_ms']:.2f} |" in line
    assert os.path.getsize(folder / "trace.json") > 0


def test_model_operations_behind_mfu(profiled):
    """6 operations per token and parameter of a product, 12 D per visible pair, by hand from the settings."""
    found, _, folder = profiled
    products = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 264 * 32
    track, _ = train_gpt.parse_command_line(options())
    packer = train_gpt.Packer(train_gpt.shards_of(folder / "shakespeare", track.data)[0], track.data)
    offsets = next(train_gpt.training_steps(packer, track, 30, 0, 1, 17)).batch.offsets.numpy()
    # paired heads
    pairs = step_profile.visible_pairs(offsets, 24) + step_profile.visible_pairs(2 * offsets, 32) / 2
    expected = (6 * products * 24 * 64 + 12 * 32 * pairs) / (found["step_ms"] / 1e3) / 1e9
    assert found["mfu"] == pytest.approx(expected, rel=1e-6)


def test_help_names_the_script(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_profile.sys, "argv", ["step_profile.py", "--help"])
        step_profile.main()
    assert "step_profile.py --track short" in capsys.readouterr().out
