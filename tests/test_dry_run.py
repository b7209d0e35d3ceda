"""The dry run: its counts beside formulas, its refusals, and a whole run of it on two ranks."""

import gzip
import json
import math
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dry_run
import train_gpt
from lib import cards, cubins, dry_report, expected, fake_gpu, floors, made_up, watched

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
    assert steps <= 32 and all(count % period == 0 for count in counts.values())


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
    assert counts["bytes of products"] == 4 * ((64 + 128 + 64) + (64 + 128 + 64))  # a slice of all is all
    assert counts["bytes"] == 0
    counts, _, _ = counted(lambda a, out: torch.bmm(a, a.mT, out=out), (2, 4, 8), (2, 4, 4))
    assert counts["bytes of products"] == 4 * (64 + 32)  # a matrix and its transpose, and what is written


def test_bytes_of_an_operation_are_its_operands_once():
    counts, _, _ = counted(lambda x: x.mul_(2).add(x.new_ones(()).expand(64)), (16, 64))
    # in place: read and written; the sum: an operand, a number that is expanded, a result; the number itself
    assert counts["bytes"] == 4 * (2 * 1024 + 1024 + 1 + 1024 + 1)


def test_elements_that_a_kernel_touches():
    """Of a slice, of what is broadcast and of a table less than the whole."""
    dependencies = pytest.importorskip("torch._inductor.dependencies")
    sympy = pytest.importorskip("sympy")
    from lib.fake_inductor import by_buffer

    t, d, row = sympy.symbols("d0 d1 indirect0", integer=True)
    sizes = sympy.Integer(16), sympy.Integer(4)

    def access(name, index):
        return dependencies.MemoryDep(name, sympy.sympify(index), (t, d), sizes)

    reads = [access("slice", 12 * t + d + 8), access("angles", d), access("table", 4 * row + d)]
    found = by_buffer([("read", reads), ("write", [access("out", 4 * t + d)])])
    assert found == {("slice", "read"): {(8, 64)}, ("angles", "read"): {(0, 4)}, ("table", "read"): {(0, 64)},
                     ("out", "write"): {(0, 64)}}  # fmt: skip


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
    rows, width = model.ngram_embed.shape
    numbers = sum(p.numel() for p in model.parameters()) - rows * width
    assert len(run["steps"]) == 3 and all(step["passes"] == 1 for step in run["steps"])
    sizes = []
    for step in run["steps"]:
        # fp32: sums of gradients and new weights, both whole, half of them sent by each of two ranks
        whole = [x[2] for x in step["collectives"] if x[1] == "float32" and "all_to_all" not in x[0]]
        assert 8 * numbers <= sum(whole) <= 8.1 * numbers
        # of the row-wise tables both masks, and rows: gradients that ranks send, new weights for two ranks
        (masks,) = [x[2] for x in step["collectives"] if x[1] == "uint8"]
        sent, new = [x[2] / (4 * width) for x in step["collectives"] if "all_to_all" in x[0]]
        assert masks == 2 * rows and sent == int(sent) < new == int(new) < 2 * sent
        sizes.append(sum(x[2] for x in step["collectives"]))
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


# --------------------------------------------------------------------------------------------------
# Kernels in machine code


def elf(*attributes: bytes) -> bytes:
    """An ELF file of 64 bits with the sections .nv.info and .shstrtab."""
    names, info = b"\0.nv.info\0.shstrtab\0.nv.info.kernel\0", b"".join(attributes)
    head = 64 + len(names) + len(info)
    sections = [(0, 0, 0), (1, 64 + len(names), len(info)), (20, 64, 0), (10, 64, len(names))]
    table = b"".join(struct.pack("<IIQQQQ24x", name, 0, 0, 0, at, size) for name, at, size in sections)
    start = struct.pack("<6s34xQ10xHHH", b"\x7fELF\x02\x01", head, 64, len(sections), 3)
    return start + names + info + table


def sized(attribute: int, *numbers: int) -> bytes:
    return struct.pack(f"<BBH{len(numbers)}I", 4, attribute, 4 * len(numbers), *numbers)


def test_registers_and_spills_are_read_from_a_cubin():
    """Of two functions the larger value; an attribute of another form or size is passed over."""
    one = struct.pack("<BBH", 3, cubins.REGISTERS, 99)
    made = elf(sized(cubins.REGISTERS, 7, 40), one, sized(cubins.FRAME_SIZE, 7, 0), sized(0x12, 1, 2, 3),
               sized(cubins.FRAME_SIZE, 8, 1208), sized(cubins.REGISTERS, 8, 255))  # fmt: skip
    assert cubins.attributes(made) == {cubins.REGISTERS: 255, cubins.FRAME_SIZE: 1208}
    with pytest.raises(ValueError, match="no cubin"):
        cubins.attributes(b"\x7fELF\x01\x01" + made[6:])
    with pytest.raises(ValueError, match="unknown form 9"):
        cubins.attributes(elf(struct.pack("<BBH", 9, 1, 0)))


def kernel_of(result: Callable, configurations: int) -> SimpleNamespace:
    autotuner = SimpleNamespace(_precompile_config=result)
    names = [f"configuration {i}" for i in range(configurations)]
    return SimpleNamespace(name="triton_a", part="block", launches=3, bytes=2e9, by_inductor=3e9,
                           autotuner=autotuner, configurations=names)  # fmt: skip


def compiled(spills: int, shared: int) -> SimpleNamespace:
    code = elf(sized(cubins.REGISTERS, 1, 32), sized(cubins.FRAME_SIZE, 1, spills))
    found = SimpleNamespace(asm={"cubin": code}, metadata=SimpleNamespace(shared=shared))
    return SimpleNamespace(kernel=found)


def test_kernels_that_fail_spill_or_take_too_much_shared_memory_are_named():
    def refuses(_: str) -> None:
        raise RuntimeError("PassManager::run failed\n  type fp8e4nv is not supported\n")

    spills = iter([compiled(0, 1024), compiled(64, 2048)])
    kernels = [
        kernel_of(refuses, 1),
        kernel_of(lambda _: next(spills), 2),
        kernel_of(lambda _: compiled(8, 4096), 1),
        kernel_of(lambda _: compiled(0, 200_000), 1),
    ]
    said = []
    found = cubins.compile_kernels(kernels, 101_376, said.append)
    assert said == [f"kernel {i} of 4" for i in (1, 2, 3, 4)]
    assert [x.failed.partition(" shared")[0] for x in found] == [
        "RuntimeError: type fp8e4nv is not supported", "", "", "", "200000 bytes of"
    ]  # fmt: skip
    assert dry_report.kernel_counts(found) == (
        "machine code: 5 configurations of 4 kernels, 2 fail, 2 spill; 3 kernels have no good one; "
        "shared memory of a block at most 195.3 KB"
    )
    *rows, total = dry_report.kernel_table(found, kernels, most=0)[2:]
    assert "| all 4 | 12 | 8.00 | 12.00 |" in total
    assert [row.split("|")[-3].strip() for row in rows] == ["0", "8", "0"]
    assert all("| 3 | 2.00 | 3.00 |" in row for row in rows)


@pytest.mark.parametrize("words, mode, kernels", [
    ([], "parts", False), (["--compile", "parts"], "parts", True), (["--compile", "whole"], "whole", True),
    (["--compile", "none"], "none", False),
])  # fmt: skip
def test_kernels_are_compiled_where_graphs_are_asked_for(words, mode, kernels):
    found = dry_run.read_options(words)
    assert (found.mode, found.kernels) == (mode, kernels)


def test_a_private_name_that_is_gone_leaves_the_kernels_out(monkeypatch):
    monkeypatch.setattr(cubins, "NAMES", (("torch", "nn.Module"), ("torch", "gone.compile")))
    dry = dry_run.DryRun.__new__(dry_run.DryRun)
    dry.compiler, dry.cubins = SimpleNamespace(kernels={}), []
    dry.options = dry_run.read_options(["--compile", "parts"])
    (sentence,) = dry.compile_kernels()
    assert "left out: kernels" in sentence and sentence.endswith("has no torch.gone.compile)")


# --------------------------------------------------------------------------------------------------
# What is expected of a real run

COUNTED = {
    "source": "abc", "torch": "2.13.0", "runs": [{
        "peaks": {"a": 1e9, "b": 20e9}, "graphs": {"graphs": 26},
        "floors_s": {"stage 1": {"arithmetic": 0.1, "bytes": 0.05, "between": 0.01}},
        "passes": {"stage 1": [["block", "launches", 200], ["loss", "launches", 91],
                               ["loss", "bytes of kernels", 5e9]]},
        "steps": [{"kind": "stage 1", "passes": 8, "update_launches": launches} for launches in (10, 30)],
    }],
}  # fmt: skip


def test_expected_beside_measured(tmp_path):
    place = tmp_path / "expected.json"
    expected.keep("1 x h100 --track short", COUNTED, place)
    kept = json.loads(place.read_text())["1 x h100 --track short"]
    assert expected.table(kept, {}).count("not measured") == 5
    lines = [{"event": "header"}, *({"event": "step", "train_time_s": s} for s in (1.0, 2.0, 2.3, 2.6))]
    steps = expected.step_seconds(lines, ["stage 1"] * 4)
    assert steps == {"stage 1": pytest.approx(0.3)}
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        events = [{"cat": "kernel", "name": "triton_poi_x", "dur": 10.0}] * 3 * 2348
        events += [{"cat": "kernel", "name": "gemm", "dur": 5.0}, {"name": "x"}]
        json.dump({"traceEvents": events}, file)
    kernels = expected.kernels_in_trace(tmp_path / "trace.json.gz")
    assert kernels == {"launches": 2348, "seconds": pytest.approx(0.02348)}
    measured = dict(peak_bytes=24e9, graphs=26, compiles=1, step_s=steps, kernels=kernels, bytes_per_s=3e12)
    rows = [line.split(" | ")[1:] for line in expected.table(kept, measured).splitlines()[2:]]
    assert rows == [
        ["20.0", "24.0", "1.20 DIFFERS |"], ["26.0", "26.0", "1.00 as expected |"],
        ["0.0", "1.0", "0.00 DIFFERS |"], ["150.0", "300.0", "2.00 |"],
        ["2,348.0", "2,348.0", "1.00 as expected |"], ["40.0", "70.4", "1.76 |"],
    ]  # fmt: skip


@pytest.mark.parametrize("title, name", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"),
    ("NVIDIA GeForce RTX 4090", "4090"), ("Tesla T4", ""),
])  # fmt: skip
def test_the_card_of_a_device(title, name):
    assert expected.card_of(title) == name
