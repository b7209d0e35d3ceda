"""The dry run: its counts beside formulas, its refusals, and a whole run of it on two ranks."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import dry_run
import train_gpt
from lib import cards, fake_gpu, floors, made_up, watched

TOOL = Path(dry_run.__file__)
CPU_BUILD = not cards.cuda_build()


def test_options_of_the_tool_and_of_the_run_are_told_apart():
    words = ["--gpus", "4", "--memory", "low", "--gpu=a100", "--data.rows=4"]
    found = dry_run.read_options(words)
    assert (found.gpu, found.gpus, found.mode) == ("a100", 4, "parts")
    assert found.others == ["--memory", "low", "--data.rows=4", "--track", "short"]


@pytest.mark.parametrize("words,sentence", [
    (["--gpu", "t4"], "--gpu is one of h100"),
    (["--gpus", "0"], "number of GPUs"),
    (["--gpus", "--memory"], "needs a value"),
    (["--compile", "auto"], "parts, whole or none"),
    (["--script", "nowhere.py"], "is missing"),
])  # fmt: skip
def test_bad_options_are_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        dry_run.read_options(words)


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_the_short_schedule_has_every_stage_for_whole_periods(name):
    track = train_gpt.TRACKS[name]
    short = watched.short_schedule(track)
    period, steps = watched.update_period(track), short.schedule.steps + short.schedule.extension
    stages = [train_gpt.stages_until(short.schedule, step)[-1] for step in range(steps)]
    counts = Counter(map(track.schedule.stages.index, stages))
    assert counts.keys() == {*range(len(track.schedule.stages))}
    assert steps <= 26 and all(count % period == 0 for count in counts.values())


@pytest.mark.parametrize("name", train_gpt.TRACKS)
def test_kinds_of_steps_are_those_of_the_schedule(name):
    track = train_gpt.TRACKS[name]
    period = watched.update_period(track)
    expected = Counter()
    for step in range(train_gpt.total_steps(track.schedule)):
        stage = len(train_gpt.stages_until(track.schedule, step)) - 1
        expected[watched.Kind(stage, step < train_gpt.untie_step(track, period))] += 1
    assert watched.kinds_of_steps(track) == expected


def counted(work, *shapes, dtype=torch.float32):
    """The counts and the peak of some work on tensors without content, which exist before."""
    mode = fake_gpu.CountingMode("cpu")
    with mode:
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        mode.take()
        result = work(*tensors)
        peak = mode.peak
    return floors.sums(mode.take()), peak, result


def test_operations_and_bytes_of_products():
    counts, _, _ = counted(lambda a, b: (a @ b, torch.baddbmm(a[:, :, :8], a, b)), (2, 4, 8), (2, 8, 8))
    assert counts["products in fp32"] == 2 * (2 * 2 * 4 * 8 * 8)
    assert counts["bytes of products"] == 4 * ((64 + 128 + 64) + (64 + 64 + 128 + 64))
    assert counts["bytes"] == 0


def test_bytes_of_an_operation_are_its_operands_once():
    counts, _, _ = counted(lambda x: x.mul_(2).add(x.new_ones(()).expand(64)), (16, 64))
    # in place: read and written; the sum: an operand, a number that is expanded, a result; the number itself
    assert counts["bytes"] == 4 * (2 * 1024 + 1024 + 1 + 1024 + 1)


def test_memory_is_counted_in_blocks_while_it_lives():
    def work(x):
        a = x + 1  # 4,000 bytes are 8 blocks of 512
        del a
        b = (x + 2)[:10]  # a view keeps the whole
        return b

    _, peak, _ = counted(work, (1000,))
    assert peak == 2 * 4096


def test_a_cast_goes_with_the_addition_of_its_result():
    mode = fake_gpu.CountingMode("cpu")
    with mode:
        grad, new = torch.empty(1000), torch.empty(1000, dtype=torch.bfloat16)
        mode.take()
        mode.accumulating = True
        grad.add_(new.float())
        counts = floors.sums(mode.take())
        assert counts == {"bytes of gradients": 10_000, "operations": 2}


def test_pairs_of_paired_heads_count_half():
    settings = train_gpt.Model(paired=(1,), long_blocks=(1,), layers=2)
    offsets = np.array([[0, 5, 9]])
    alone = floors.attention_pairs(settings, [0], (2, 3), offsets)
    both = floors.attention_pairs(settings, [0, 1], (2, 3), offsets)
    brute = [min(p, 3) + 1 for length in (10, 8) for p in range(length)]
    assert both - alone == sum(brute) / 2


def test_a_floor_is_operations_and_bytes_over_the_rates():
    card = cards.CARDS["h100"]
    assert math.isclose(card.products, 798e12) and math.isclose(card.bytes_per_s, 3.0e12)
    counts = Counter({("block", "products"): 798e9, ("block", "bytes of kernels"): 6e9,
                      ("outside graphs", "bytes"): 3e9, ("loss", "products in FP8"): 1197e9})  # fmt: skip
    floor = floors.of_pass(card, counts)
    assert np.allclose([floor.arithmetic, floor.bytes, floor.between, floor.sum], [2e-3, 2e-3, 1e-3, 4e-3])
    step = watched.Step(watched.Kind(0, True), 3, True, pass_counts=[counts, Counter()])
    step.collectives = [("all_gather", "float32", 1.0, 0.45e9)]
    assert np.isclose(step.floor(card).sum, 4e-3 + 1e-3)


@pytest.mark.skipif(bool(cards.real_driver()), reason="refused beside a real driver")
def test_a_whole_run_without_a_gpu(tmp_path):
    """Two ranks of `tiny`; the counts of the optimizer and of the collectives follow from the sizes."""
    place = tmp_path / "counts.json"
    options = ["--gpu", "4090", "--gpus", "2", "--track", "tiny", "--compile", "none", "--json", str(place)]
    done = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "uncompiled: fits" in done.stdout and "Not proven" in done.stdout
    assert ("built for CPUs" in done.stdout) == CPU_BUILD
    run = json.loads(place.read_text())["runs"][0]
    track = train_gpt.TRACKS["tiny"]
    model = train_gpt.GPT(track.model, 1, torch.float32, "meta")
    numbers = sum(p.numel() for p in model.parameters())
    assert len(run["steps"]) == 3 and all(step["passes"] == 1 for step in run["steps"])
    # fp32: sums of gradients and new weights, both whole, half of them sent by each of two ranks
    sizes = [sum(x[2] for x in step["collectives"]) for step in run["steps"]]
    assert all(8 * numbers <= size <= 8.1 * numbers for size in sizes)
    assert all(step["sent"] == size / 2 for step, size in zip(run["steps"], sizes))


def test_what_the_run_itself_refuses_is_one_sentence(tmp_path):
    words = ["--gpus", "3", "--track", "tiny"]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 processes do not divide the 2 rows of a step" in done.stderr


def test_made_up_documents_are_cut_to_the_size_of_the_shard(tmp_path):
    track = watched.short_schedule(train_gpt.TRACKS["tiny"])
    made_up.make_tokens(tmp_path, track, 3)
    assert train_gpt.check_data(track, tmp_path)["documents"] > 1
