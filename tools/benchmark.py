"""Benchmarks: time to target beside a plain GPT with AdamW, the optimizer step, the loader. Not a timed test.

    python tools/benchmark.py                    everything
    python tools/benchmark.py target [--pairs 3] [--lr LR]
    python tools/benchmark.py grid               learning rates of the baseline (not timed)
    python tools/benchmark.py optimizer | loader
    python tools/benchmark.py table FILE...      the table of a log, nothing is run

What is measured is appended to records/benchmarks/<date>_<machine>.jsonl.

The baseline is a plain pre-norm GPT in good faith: 4 layers x 256, 4 heads, rotary, GELU, AdamW, the
loader, window, precision, compiler and threads of the track `tiny`, its own batch size and schedule,
stopped at the first validation that reaches the target. Contenders take turns in one run, each in a
fresh process with a warm compile cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lib import threads

if __name__ == "__main__":
    os.environ.update(threads.waiting())

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

ROUNDS = 9
GRID = (0.0005, 0.001, 0.002, 0.004, 0.008)
GRID_HORIZON = 1_000_000  # the grid compares whole schedules of this length
BASELINE_ROWS, BASELINE_WINDOW = 1, 64  # rows of 4096 tokens in a step
HORIZON = 9_000_000  # tokens over which the learning rate warms up, stays and falls
VALIDATE_EVERY = 100  # steps, in the last 40 % of the horizon


# --------------------------------------------------------------------------------------------------
# The baseline


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, layout: train_gpt.Layout, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        mask = layout.mask
        C = mask.size(-2)
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3 * self.heads, -1).chunk(3, 2)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        # plain softmax over the own and the previous block of C keys
        q, k, v = (x.view(B, T // C, C, self.heads, -1).transpose(2, 3) for x in (rotate(q), rotate(k), v))
        k, v = (torch.cat([F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], 3) for x in (k, v))
        scores = (q @ k.mT).float() * q.size(-1) ** -0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype)
        x = x + self.out((weights @ v).transpose(2, 3).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Baseline(nn.Module):
    """Pre-norm GPT; `forward` has the signature of train_gpt.GPT and returns summed nats."""

    def __init__(
        self, vocab: int, width: int = 256, heads: int = 4, layers: int = 4, max_tokens: int = 32_768
    ):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
        half = width // heads // 2
        angles = torch.arange(max_tokens)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)
        self.dtype = torch.bfloat16 if train_gpt.supports(torch.device("cpu"), "bfloat16") else torch.float32

    def forward(self, inputs: Tensor, targets: Tensor, offsets: Tensor, window: int) -> Tensor:
        T = inputs.size(1)
        layout = train_gpt.blocked_layout(offsets, T, window)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
            x = self.embed(inputs)
            cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
            for block in self.blocks:
                x = block(x, layout, cos, sin)
            logits = self.head(self.norm(x))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
        )


def baseline_lr(step: int, steps: int) -> float:
    """Linear warm-up over 2 %, flat, linear to 0 over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.6 * steps))


def train_baseline(lr: float, seed: int, threads: int, horizon: int) -> dict:
    """Train until a validation reaches the target; tokens and seconds of training, without
    compiling and validation."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    track = train_gpt.TRACKS["tiny"]
    data = dataclasses.replace(track.data, rows=BASELINE_ROWS, row_tokens=4096, epochs=100)
    window = BASELINE_WINDOW
    fixed = train_gpt.Track(data, schedule=train_gpt.Schedule(stages=(train_gpt.Stage(0, (window, window)),)))
    steps = horizon // (data.rows * data.row_tokens)
    folder = Path(os.environ.get("DATA_DIR", ROOT / "data")) / data.corpus
    training, stream, _ = train_gpt.shards_of(folder, data)
    rows = train_gpt.validation_rows(stream, data, track.evaluation.row_tokens, track.evaluation.tokens)
    validation = [train_gpt.make_batch([row], data, max(len(lengths) for _, lengths in rows)) for row in rows]
    model = Baseline(track.model.padded_vocab)
    decay = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model, dynamic=False, fullgraph=True)
    packer = train_gpt.Packer(training, data)
    batches = train_gpt.training_steps(packer, fixed, 32, 0, 1)

    def validate() -> float:
        with torch.no_grad():
            return sum(float(forward(*batch, window)) for batch in validation) / track.evaluation.tokens

    warm = next(batches)  # compile both graphs before the clock
    forward(*warm.batch, window).backward()
    optimizer.zero_grad()
    validate()
    seconds, tokens, losses, reached = 0.0, 0, [], False
    for step in range(steps):
        began = time.perf_counter()
        batch, _, count, _ = next(batches)
        (forward(*batch, window) / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * baseline_lr(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        tokens += data.rows * data.row_tokens
        if step + 1 == steps or ((step + 1) % VALIDATE_EVERY == 0 and step + 1 >= 0.6 * steps):
            losses.append((tokens, validate()))
            print(
                f"baseline lr {lr} step {step + 1}/{steps} validation loss {losses[-1][1]:.4f} "
                f"{seconds:.1f} s",
                flush=True,
            )
            reached = losses[-1][1] <= track.evaluation.target
            if reached:
                break
    return dict(
        lr=lr,
        seed=seed,
        steps=step + 1,
        tokens=tokens,
        train_time_s=seconds,
        val_loss=losses[-1][1],
        reached=reached,
    )


# --------------------------------------------------------------------------------------------------
# Measurements; each returns events for the log


def machine() -> dict:
    described = train_gpt.environment(torch.device("cpu"), train_gpt.Comm())
    keep = ("source_sha256", "git_commit", "torch", "device", "cpus", "threads")
    features = sorted(
        k for k, v in torch.cpu.get_capabilities().items() if v is True and ("bf16" in k or "amx" in k)
    )
    return {**{key: described[key] for key in keep}, "bfloat16": features}


def subprocess_json(*arguments: str) -> dict:
    """The last line that a fresh process of this script prints, as JSON."""
    process = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.strip().splitlines()[-1])


def run_tiny(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "train_gpt.py"), "--track", "tiny", "--seed", str(seed),
                   "--compile", "whole", "--out", out, "--show", "false"]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
        events = [json.loads(line) for line in next(Path(out).glob("*.jsonl")).read_text().splitlines()]
    final = events[-1]
    return dict(seed=seed, steps=final["step"], compile=events[0]["compile"],
                startup_s=sum(events[0]["startup_s"].values()),
                **{k: final[k] for k in ("tokens", "train_time_s", "val_loss", "reached")})  # fmt: skip


def measure_target(pairs: int, lr: float, threads: int) -> Iterator[dict]:
    for seed in range(pairs):
        yield {"event": "tiny", **run_tiny(seed)}
        arguments = ("--lr", str(lr), "--seed", str(seed), "--threads", str(threads))
        yield {"event": "baseline", **subprocess_json("baseline", *arguments)}


def measure_grid(threads: int) -> Iterator[dict]:
    """Loss of the baseline at the end of a short schedule for each learning rate; one thread each,
    side by side."""

    def run(lr: float) -> dict:
        return subprocess_json("baseline", "--lr", str(lr), "--threads", "1", "--horizon", str(GRID_HORIZON))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield from ({"event": "grid", **result} for result in pool.map(run, sorted(GRID, reverse=True)))


def interleaved(contenders: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, the contenders taking turns; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def matrices_with_gradients(count: int, m: int, n: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(0.02 * torch.randn(m, n, generator=generator)) for _ in range(count)]
    for p in matrices:
        p.grad = torch.randn(m, n, generator=generator)
    return matrices


def optimizer_steps(count: int, m: int, n: int, bank: bool) -> dict[str, Callable[[], None]]:
    """The step of torch.optim.Muon on `count` matrices, and of MuonEq with its options."""
    settings = dict(lr=1e-3, weight_decay=0.1)

    def muoneq(**fields) -> Callable[[], None]:
        params = matrices_with_gradients(count, m, n)
        if bank:
            stack = nn.Parameter(torch.stack([p.detach() for p in params]))
            stack.grad = torch.stack([p.grad for p in params])
            params = [stack]
        return train_gpt.MuonEq([dict(kind="matrix", params=params, **settings, **fields)]).step

    return {
        "torch.optim.Muon": torch.optim.Muon(matrices_with_gradients(count, m, n), **settings).step,
        "MuonEq: Nesterov, polar_express, decay": muoneq(equilibrate="none"),
        "MuonEq: + NorMuon": muoneq(equilibrate="none", normuon=True),
        "MuonEq: + row equilibration": muoneq(equilibrate="row"),
        "MuonEq: + both": muoneq(equilibrate="row", normuon=True),
    }


def measure_optimizer(threads: int) -> Iterator[dict]:
    """A bank of a large model beside bare products, and many small matrices."""
    K, m, n = 24, 768, 3072
    x = torch.randn(K, m, n).bfloat16()

    def products() -> None:
        for _ in range(5):
            gram = x @ x.mT
            gram @ gram
            gram @ x

    for count in dict.fromkeys((1, threads)):
        torch.set_num_threads(count)
        contenders = {"15 bare batched products": products, **optimizer_steps(K, m, n, bank=True)}
        for name, seconds in interleaved(contenders, ROUNDS).items():
            yield {"event": "optimizer", "name": name, "bank": [K, m, n], "threads": count,
                   "seconds": seconds}  # fmt: skip
        del contenders
        for shape in ((1000, 8, 8), (200, 64, 256)):
            for name, seconds in interleaved(optimizer_steps(*shape, bank=False), 5 * ROUNDS).items():
                yield {"event": "small", "name": name, "matrices": shape, "threads": count,
                       "seconds": seconds}  # fmt: skip
    torch.set_num_threads(threads)


def measure_loader() -> Iterator[dict]:
    tracks = train_gpt.TRACKS
    with tempfile.TemporaryDirectory() as folder:
        # documents with FineWeb's median of 403 tokens and a long tail
        rng, count = np.random.default_rng(0), 20_000_000
        tokens = rng.integers(0, 50256, count, dtype=np.uint16)
        tokens[np.cumsum(rng.lognormal(math.log(403), 1.0, 100_000).astype(int) + 32) % count] = 50256
        header = np.zeros(256, dtype="<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, count
        shard = Path(folder) / "train_000001.bin"
        shard.write_bytes(header.tobytes() + tokens.tobytes())
        corpus = (
            Path(os.environ.get("DATA_DIR", ROOT / "data")) / tracks["tiny"].data.corpus / "train_000001.bin"
        )
        cases = {"tiny": (corpus, tracks["tiny"]), "short, FineWeb format": (shard, tracks["short"])}
        for name, (path, track) in cases.items():
            data = dataclasses.replace(track.data, epochs=10**6)
            track = dataclasses.replace(track, data=data)
            for world_size in (1, 8) if data.rows % 8 == 0 else (1,):
                seconds = []
                steps = train_gpt.training_steps(train_gpt.Packer([path], data), track, 1024, 0, world_size)
                next(steps)
                rounds = max(1, 1_000_000 // (data.rows * data.row_tokens))
                for _ in range(5):
                    began = time.perf_counter()
                    read = sum(next(steps).tokens for _ in range(rounds))
                    seconds.append((time.perf_counter() - began) / read)
                rate = 1 / world_size / statistics.median(seconds)
                yield {
                    "event": "loader",
                    "name": name,
                    "world_size": world_size,
                    "tokens_per_s_per_rank": rate,
                }


# --------------------------------------------------------------------------------------------------
# The table


def table(events: list[dict]) -> str:
    """Markdown of a benchmark log; medians, ratios within the log."""
    host = next(e for e in events if e["event"] == "machine")
    bf16 = ", ".join(host["bfloat16"]) or "none"
    lines = [f"{host['device']}, {host['cpus']} cores, torch {host['torch']}, bf16 instructions: {bf16}", ""]
    timed = {
        kind: [e for e in events if e["event"] == kind and e["reached"]] for kind in ("tiny", "baseline")
    }
    runs = {kind: [e for e in events if e["event"] == kind] for kind in ("tiny", "baseline")}
    if all(timed.values()):
        seconds = {kind: statistics.median(e["train_time_s"] for e in done) for kind, done in timed.items()}
        lines += [
            "| time to 1.50 nats per byte | reached | steps | tokens | training time | of the baseline |"
        ]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for kind, label in (
            ("baseline", f"plain GPT, AdamW lr {timed['baseline'][0]['lr']}"),
            ("tiny", "track tiny"),
        ):
            middle = [statistics.median(e[k] for e in timed[kind]) for k in ("steps", "tokens")]
            lines.append(f"| {label} | {len(timed[kind])} of {len(runs[kind])} | {middle[0]:,.0f} | "
                         f"{middle[1]:,.0f} "
                         f"| {seconds[kind]:.1f} s | "
                         f"{seconds[kind] / seconds['baseline']:.3f} |")  # fmt: skip
        lines.append("")
    if grid := sorted((e for e in events if e["event"] == "grid"), key=lambda e: e["lr"]):
        lines += ["| baseline learning rate | tokens | validation loss |", "| --- | --- | --- |"]
        lines += [f"| {e['lr']} | {e['tokens']:,} | {e['val_loss']:.4f} |" for e in grid]
        lines.append("")
    if steps := [e for e in events if e["event"] == "optimizer"]:
        bank = " x ".join(map(str, steps[0]["bank"]))
        lines += [f"| optimizer step, bank of {bank} | threads | ms | of the products | of torch |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for threads in dict.fromkeys(e["threads"] for e in steps):
            middle = {e["name"]: statistics.median(e["seconds"]) for e in steps if e["threads"] == threads}
            products, torch_muon = list(middle.values())[:2]
            for name, s in middle.items():
                lines.append(
                    f"| {name} | {threads} | {1e3 * s:,.0f} | {s / products:.2f} | {s / torch_muon:.2f} |"
                )
        lines.append("")
    if steps := [e for e in events if e["event"] == "small"]:
        lines += ["| optimizer step, separate matrices | threads | ms | of torch |"]
        lines += ["| --- | --- | --- | --- |"]
        for shape, threads in dict.fromkeys((tuple(e["matrices"]), e["threads"]) for e in steps):
            of_shape = [e for e in steps if (tuple(e["matrices"]), e["threads"]) == (shape, threads)]
            torch_muon = statistics.median(of_shape[0]["seconds"])
            for e in of_shape:
                s = statistics.median(e["seconds"])
                name = f"{shape[0]:,} of {shape[1]} x {shape[2]}, {e['name']}"
                lines.append(f"| {name} | {threads} | {1e3 * s:,.1f} | {s / torch_muon:.3f} |")
        lines.append("")
    if loads := [e for e in events if e["event"] == "loader"]:
        lines += ["| loader | processes | million tokens per second and rank |", "| --- | --- | --- |"]
        lines += [
            f"| {e['name']} | {e['world_size']} | {e['tokens_per_s_per_rank'] / 1e6:.1f} |" for e in loads
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = ["all", "target", "grid", "optimizer", "loader", "baseline", "table"]
    parser.add_argument("what", nargs="?", default="all", choices=jobs)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--horizon", type=int, default=HORIZON)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a = parser.parse_args()
    if a.what == "table":
        print(table([json.loads(line) for file in a.files for line in file.read_text().splitlines()]))
        return
    cache = Path(os.environ.get("CACHE_DIR", ROOT / ".cache"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor-benchmark"))
    torch.set_num_threads(a.threads)
    if a.what == "baseline":
        print(json.dumps(train_baseline(a.lr, a.seed, a.threads, a.horizon)))
        return
    name = re.sub(r"\W+", "-", machine()["device"]).strip("-") or platform.machine()
    path = ROOT / "records" / "benchmarks" / f"{time.strftime('%Y-%m-%d')}_{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    parts = {"optimizer": lambda: measure_optimizer(a.threads), "loader": measure_loader,
             "grid": lambda: measure_grid(a.threads),
             "target": lambda: measure_target(a.pairs, a.lr, a.threads)}  # fmt: skip
    events, wanted = [], parts if a.what == "all" else [a.what]
    with open(path, "a") as file:
        for event in itertools.chain(
            [{"event": "machine", **machine()}], *(parts[what]() for what in wanted)
        ):
            file.write(json.dumps(event) + "\n")
            file.flush()
            events.append(event)
    print(table(events), f"\nlog: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # a run that has said itself why it ends
        sys.exit(f"benchmark.py: a run ended with status {error.returncode}")
    except OSError as error:
        sys.exit(f"benchmark.py: {error.filename}: {error.strerror}")
