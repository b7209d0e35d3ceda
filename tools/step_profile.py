"""Where the time of a training step goes: each part alone beside the floor that the machine's own rates set.

    python tools/step_profile.py --track short                    any option of train_gpt.py may follow
    python tools/step_profile.py --trace trace.json               also a trace of three steps, for chrome://tracing
    torchrun --standalone --nproc_per_node=8 tools/step_profile.py --track short

The parts run forward and backward on rows of the training data, compiled as in training, in the windows
of the schedule's last stage; the first rows of a step stand for all. The floor of a part is its
arithmetic over the rate of a large product (in FP8 for a head in FP8), or the bytes that it must move
(what it reads once, what it writes once) over the rate of a large copy, whichever is longer. MFU counts
6 operations per parameter in a product and token, and 12 D per visible pair of tokens, over the rate of
a large product in the precision of the activations.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import threads
from lib.floors import visible_pairs

if __name__ == "__main__":
    os.environ.update(threads.waiting())

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

ROUNDS = 9


def seconds_of(call: Callable[[], Any], clock: train_gpt.Clock, rounds: int = ROUNDS) -> float:
    """Median seconds of a call after two that do not count."""
    found = []
    for turn in range(rounds + 2):
        clock.synchronize()
        began = time.perf_counter()
        call()
        clock.synchronize()
        found += [time.perf_counter() - began] * (turn > 1)
    return statistics.median(found)


def ceilings(device: torch.device, dtype: torch.dtype, clock: train_gpt.Clock) -> tuple[float, float]:
    """Operations per second of a large product and bytes per second (read and written) of a large copy."""
    size, count = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    product = seconds_of(lambda: a @ b, clock)
    copy = seconds_of(lambda: target.copy_(source), clock)
    return 2 * size**3 / product, 2 * count / copy


def optimizer_work(optimizer: train_gpt.MuonEq) -> tuple[float, float]:
    """Operations and bytes of an update of all units on this rank: products, and each state,
    gradient and weight once."""
    operations = moved = 0.0
    for unit in optimizer.units:
        elements = unit.chunk * max(1, unit.tail.numel())
        states = sum(value.nbytes for value in unit.state.values())
        moved += (2 * states + elements * (4 + 2 * unit.dtype.itemsize)) / unit.group["every"]
        if unit.matrix:
            small, large = sorted(unit.tail)
            operations += unit.chunk * unit.group["steps"] * (4 * small * small * large + 2 * small**3)
    return operations, moved


def parts_of(trainer: train_gpt.Trainer, batch: train_gpt.Batch, stage: train_gpt.Stage) -> dict[str, tuple]:
    """Name -> (call, how often in a step, operations, bytes) of one forward and backward pass over
    one micro-batch."""
    model, device, c = trainer.model, trainer.device, trainer.track.model
    windows, rows = stage.windows, trainer.rows_per_pass[stage.batch]
    inputs, targets, offsets = (x[:rows].to(device) for x in batch[:3])  # the head with all classes
    B, T, D, size = *inputs.shape, c.width, model.dtype.itemsize
    n, A, hidden, cut = B * T, len(model.attention_blocks), model.mlp.size(-1), trainer.longest
    passes = len(batch.inputs) // rows

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=model.dtype).requires_grad_()

    def backward(part: Callable[..., Tensor], *args: Any) -> Callable[[], None]:
        def call() -> None:
            out = part(*args)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])
            for x in (x for x in args if isinstance(x, Tensor)):
                x.grad = None

        if trainer.compiled != "none" and part not in [
            getattr(model, name) for name in model.COMPILED[trainer.compiled]
        ]:
            part = torch.compile(part, dynamic=False, fullgraph=True)
        return call

    weights = [leaf(4 * D, D), leaf(c.heads, c.gate_inputs), leaf(2)]
    found = {}
    kinds = Counter((i in c.long_blocks, 1 + (i in c.paired)) for i in model.attention_blocks)
    # paired heads: two positions for each token, of half the heads
    for (long, twice), count in sorted(kinds.items()):
        window, where = windows[long], twice * offsets
        layout = train_gpt.blocked_layout(where, twice * T, window)
        if model.fused:
            layout = train_gpt.fused_layout(where, twice * T, train_gpt.window_size(window), twice * cut)
        pairs = visible_pairs(where.cpu().numpy(), window)
        heads = (B, twice * T, c.heads // twice, D // c.heads)
        q, k, v = (
            (train_gpt.norm(leaf(*heads).detach()) * s).requires_grad_()
            for s in (c.attention_scale, 1.0, 1.0)
        )
        name = f"attention kernel, window {window}" + ", paired heads" * (twice - 1)
        # five products backward: the scores once more, and the gradients of weights, q, k and v
        work = 14 * D // twice * pairs
        found[name] = (backward(train_gpt.attend, q, k, v, layout), passes * count, work, 12 * n * D * size)
        if not long and twice == 1:

            def attention(x: Tensor, qkvo: Tensor, gate: Tensor, mix: Tensor, layout: Any = layout) -> Tensor:
                bare = dict(value_gate=None, xsa=None, value=None, key_offset=False, paired=False)
                return model.attention(x, train_gpt.AttentionArgs(qkvo, gate, mix, layout=layout, **bare))

            call = backward(attention, leaf(B, T, D), *weights)
            name = "attention with its projections, this window in all blocks"
            found[name] = (call, passes * A, 14 * D * pairs + 24 * n * D * D, 4 * n * D * size)
    # each matrix of the MLP takes part in three products and moves three times
    matrices = len(train_gpt.MLP_MATRICES)
    work = 6 * matrices * n * D * hidden
    bytes_moved = 4 * n * D * size + 3 * matrices * D * hidden * size
    call = backward(model.feed_forward, leaf(B, T, D), leaf(matrices, D, hidden))
    found["MLP"] = (call, passes * c.layers, work, bytes_moved)
    work, bytes_moved = 6 * n * D * c.padded_vocab, 3 * n * D * size + 12 * D * c.padded_vocab
    at_once = min(n, model.LOGITS_AT_ONCE[model.low_memory])
    call = backward(model.loss, leaf(at_once, D), targets.flatten()[:at_once, None])
    found["head and loss"] = (call, passes * (n // at_once), work * at_once / n, bytes_moved * at_once / n)
    tables = len(c.ngrams) + 1 + len(model.value_embed) // c.padded_vocab
    call = backward(model.embedding, inputs, offsets, *model.tables())
    # the gradients are read and written in fp32
    found["embeddings"] = (call, passes, 0, n * D * tables * (4 * size + 8))
    return {name: part for name, part in found.items() if part[1]}


def communication(trainer: train_gpt.Trainer) -> tuple[Callable[[], None], float]:
    """All reductions and gathers of a step, one after the other, and the bytes that this rank sends.

    Those of row-wise tables are not among them: they depend on the rows that a step reads.
    """
    comm = trainer.comm
    units = [unit for unit in trainer.optimizer.units if not isinstance(unit, train_gpt.RowUnit)]
    buffers = [torch.zeros(unit.chunk * comm.world_size, *unit.tail, device=unit.device) for unit in units]

    def call() -> None:
        for unit, full in zip(units, buffers):
            chunk, work = comm.reduce_scatter(full)
            work.wait()
            comm.all_gather(full.to(unit.dtype), chunk.to(unit.dtype)).wait()

    share = (comm.world_size - 1) / comm.world_size
    return call, share * sum(
        x.numel() * (4 + unit.dtype.itemsize) / unit.group["every"] for unit, x in zip(units, buffers)
    )


def profile(trainer: train_gpt.Trainer, trace: str | None) -> dict[str, Any]:
    track, clock, device = trainer.track, trainer.clock, trainer.device
    trainer.warm_up()
    last = track.schedule.steps - 1
    trainer.set_stage(last)
    stage, weights = trainer.stage, train_gpt.loss_weights(track.schedule, last)
    packer = train_gpt.Packer(trainer.train_paths, track.data)
    rank, world_size, documents = trainer.comm.rank, trainer.comm.world_size, trainer.checked["documents"]
    batches = train_gpt.training_steps(packer, track, documents, rank, world_size, last)
    batch, read, count, _ = next(batches)

    def forward_backward() -> None:
        trainer.forward_backward(batch, weights)

    def step() -> None:
        forward_backward()
        trainer.optimizer.step(tokens=count)
        trainer.optimizer.zero_grad()

    for _ in range(trainer.period):
        step()
    (rate, bandwidth), fp8 = ceilings(device, trainer.dtype, clock), 0.0
    if trainer.model.fp8:
        a, b = (torch.randn(8192, 8192, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        scales = (1.0, 1.0)
        product = seconds_of(lambda: train_gpt.fp8_product(a, b, scales, torch.bfloat16, True), clock)
        fp8 = 2 * 8192**3 / product
    rows = []

    def add(name: str, seconds: float, operations: float, moved: float) -> None:
        floor = max(operations / (fp8 if name == "head and loss" and fp8 else rate), moved / bandwidth)
        rows.append(
            dict(part=name, ms=1e3 * seconds, floor_ms=1e3 * floor, operations=operations, bytes=moved)
        )

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole = seconds_of(lambda: [step() for _ in range(trainer.period)], clock) / trainer.period
    memory = train_gpt.peak_memory(device)
    both = seconds_of(forward_backward, clock)
    trainer.optimizer.reset()
    parts = parts_of(trainer, batch, stage)
    for name, (call, often, operations, moved) in parts.items():
        add(name, often * seconds_of(call, clock), often * operations, often * moved)
    trainer.optimizer.reset()
    forward_backward()

    def update() -> None:
        for _ in range(trainer.period):
            trainer.optimizer.step(tokens=count)

    add(
        "optimizer, with its communication",
        seconds_of(update, clock) / trainer.period,
        *optimizer_work(trainer.optimizer),
    )
    if world_size > 1:
        call, sent = communication(trainer)
        rows.append(dict(part="communication alone", ms=1e3 * seconds_of(call, clock), bytes=sent))
    rows.append(
        dict(part="data, prepared in the background", ms=1e3 * seconds_of(lambda: next(batches), clock))
    )
    # the matrices of the model take part in a product for each token, the pairs of tokens in each block
    kernels = [
        often * operations
        for name, (_, often, operations, _) in parts.items()
        if name.startswith("attention kernel")
    ]
    matrices = sum(getattr(trainer.model, name).numel() for name in ("qk", "vo", "mlp", "lm_head"))
    tokens = read // world_size
    model_operations = 6 * matrices * tokens + 12 / 14 * sum(kernels)
    if trace:
        names = ("CPU", "CUDA") if device.type == "cuda" else ("CPU",)
        activities = [getattr(torch.profiler.ProfilerActivity, name) for name in names]
        with torch.profiler.profile(activities=activities) as recorder:
            for _ in range(3):
                step()
        if rank == 0:
            recorder.export_chrome_trace(trace)
    return dict(
        device=trainer.environment["device"], torch=torch.__version__, world_size=world_size,
        track=trainer.run.track, dtype=str(trainer.dtype).removeprefix("torch."),
        attention=trainer.attention_kernel, windows=stage.windows, tokens=tokens,
        products_per_s=rate, bytes_per_s=bandwidth, step_ms=1e3 * whole,
        forward_backward_ms=1e3 * both, parts=rows, mfu=model_operations / whole / rate,
        peak_memory_bytes=memory,
    )  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['device']} x {found['world_size']}, torch {found['torch']}, track {found['track']}, "
        f"{found['dtype']}, "
        f"attention {found['attention']}, {found['tokens']:,} tokens per process, "
        f"windows {tuple(found['windows'])}",
        f"large product {found['products_per_s'] / 1e12:.2f} Tflop/s, large copy "
        f"{found['bytes_per_s'] / 1e9:.1f} GB/s",
        "", "| part | ms | of the step | floor, ms | over its floor |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    whole = found["step_ms"]
    rest = dict(part="forward and backward together", ms=found["forward_backward_ms"])
    for row in [*found["parts"], rest, dict(part="whole step", ms=whole)]:
        floor = row.get("floor_ms")
        beside = f"{floor:.2f} | {row['ms'] / floor:.2f}" if floor else " | "
        lines.append(f"| {row['part']} | {row['ms']:.2f} | {row['ms'] / whole:.1%} | {beside} |")
    lines += ["", f"MFU {found['mfu']:.1%}, peak memory {found['peak_memory_bytes'] / 1e9:.1f} GB"]
    return "\n".join(lines)


def main() -> None:
    own, argv, words = {"trace": None, "json": None}, [], sys.argv[1:]
    if "--help" in words:
        return print(__doc__.strip())
    while words:
        word = words.pop(0)
        if word.removeprefix("--") in own and words:
            own[word.removeprefix("--")] = words.pop(0)
        else:
            argv.append(word)
    found = train_gpt.main(argv, lambda trainer: profile(trainer, own["trace"]))
    if os.environ.get("RANK", "0") == "0":
        print(table(found))
        if own["json"]:
            Path(own["json"]).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
