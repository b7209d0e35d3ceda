"""Train a GPT to a target validation loss against the clock. One file, any number of processes, one result.

    ./run.sh                                                      environment, data and the track this machine can run
    torchrun --standalone --nproc_per_node=8 train_gpt.py         8 GPUs (the same maths on 1, 2 or 4)
    python train_gpt.py --track tiny --seed 3 --matrix.equilibrate row
    python train_gpt.py --help                                    every track, every field, its value and meaning

A step is R packed rows of T tokens whatever the number of processes: a rank takes R / N rows, gradients are sums over
tokens, reduced in fp32 and divided once by the global token count. Record numbers (#42) are those of the public speedrun
(KellerJordan/modded-nanogpt).

Contents: 1 tracks   2 data   3 attention   4 model   5 optimizer   6 schedule   7 run   8 main
"""

from __future__ import annotations

import ast
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# 1. Tracks: every number of a run. A track is data, never code. ------------------------------------------------------

def field(default: Any, meaning: str, least: float = -math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning, "least": least})

def fit(value: Any, kind: Any) -> Any:
    """The value as a field of this type has it: whole numbers as floats, lists as tuples; an error when it does not fit."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        for one in args:
            with contextlib.suppress(TypeError, ValueError):
                return fit(value, one)
    elif origin is tuple and isinstance(value, (tuple, list)):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return tuple(fit(*pair) for pair in zip(value, kinds, strict=True))
    elif kind is Stage and isinstance(value, (tuple, list)):
        return Stage(*map(fit, Stage(*value), get_type_hints(Stage).values()))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
        return float(value)
    elif value in args if origin is Literal else type(value) is kind is not float:
        return value
    raise TypeError

def takes(f: dataclasses.Field) -> str:
    """The type of a field in words."""
    return f.type.removeprefix("Literal").replace("float", "float below 1e30")

class Settings:
    """Fields that are checked wherever they come from; ValueError, beginning with the field's name, for what cannot be."""
    def __post_init__(self) -> None:
        for f, kind in zip(dataclasses.fields(self), get_type_hints(type(self)).values()):
            value, least = getattr(self, f.name), f.metadata["least"]
            try:
                object.__setattr__(self, f.name, fit(value, kind))
            except (TypeError, ValueError):
                raise ValueError(f"{f.name} takes {takes(f)}, not {value!r}: {f.metadata['meaning']}") from None
            if least > -math.inf and value < least:
                raise ValueError(f"{f.name} is at least {least}, not {value}")

@dataclasses.dataclass(frozen=True)
class Data(Settings):
    corpus: str = field("fineweb10B", "folder of the shards below DATA_DIR")
    vocab_size: int = field(50257, "tokens that occur, the document start included")
    document_start: int = field(50256, "token before every document")
    predict_start: bool = field(True, "whether a document start counts as a target, in training and validation")
    rows: int = field(8, "packed rows of a step over all processes (R), times the batch factor of the stage", 1)
    row_tokens: int = field(16_384, "tokens of one row (T); nothing crosses a row border", 1)
    epochs: int = field(1, "how often the shards may be read", 1)

@dataclasses.dataclass(frozen=True)
class Model(Settings):
    padded_vocab: int = field(288, "rows of the embedding tables and the head")
    width: int = field(192, "width of the residual stream (D)")
    heads: int = field(3, "attention heads (H), each of width D / H", 1)
    layers: int = field(4, "blocks", 1)
    mlp_ratio: int = field(4, "hidden width of the MLP over D", 1)
    attention_free: tuple[int, ...] = field((), "blocks without attention (#17)")
    long_blocks: tuple[int, ...] = field((), "blocks with the long window (#20)")
    value_tables: tuple[tuple[int, int], ...] = field((), "(block, table): value embedding that a block adds to v (#14, #63)")
    value_gate_inputs: int = field(0, "leading channels of stream and value embedding that gate the latter; 0: no gate", 0)
    xsa: tuple[int, ...] = field((), "blocks whose heads give up their component along the position's own value (#82)")
    key_offset: tuple[int, ...] = field((), "blocks whose keys take their unrotated half from the position before (#49)")
    paired: tuple[int, ...] = field((), "blocks whose heads 0 .. H/2 - 1 and H/2 .. H - 1 see each other's keys (#58)")
    frozen: int = field(-1, "block whose output the attention of all later blocks reads; -1: none (#77)")
    ngrams: tuple[tuple[int, int], ...] = field((), "(n, rows): hashed embeddings of the last n tokens, added to the token's")
    ngram_signs: int = field(0, "fixed patterns of signs, one of which an n-gram's second hash puts on its row; 0: none", 0)
    skips: tuple[tuple[int, int], ...] = field((), "(source, target): output of one block added before another (#11, #45)")
    backout: int = field(-1, "block whose output is partly subtracted at the end; -1: none (#40)")
    gate_inputs: int = field(12, "leading channels that the attention and smear gates read (#28, #34)", 1)
    rotary_base: float = field(1024.0, "slowest rotary frequency is 1 / base")
    attention_scale: float = field(0.1, "softmax scale at the first window (#20, #31)")
    softcap: tuple[float, float, float] = field((30.0, 0.0, 7.5), "(A, B, C): logits become A sigmoid((l + B) / C) (#18, #54)")
    tied: float = field(0.0, "share of the scheduled steps in which the head is the embedding too (#51, #53)", 0)
    qk_parts: int = field(1, "row blocks of q and of k orthogonalised by themselves, such as pairs of heads (#80)", 1)
    low_precision: tuple[str, ...] = field((), "parameters in the activations' dtype, with fp32 copies in the optimizer (#57)")
    fp8_head: tuple[float, ...] = field((), "divisors of inputs, weights and gradients of a head in FP8 (#19); (): none")
    up_std: float = field(0.5, "std of q, k, v and MLP up at the start, times D ** -0.5", 0)
    o_std: float = field(0.0, "std of o at the start, times D ** -0.5 (#64)", 0)
    embed_std: float = field(1.0, "std of the embedding at the start", 0)
    value_std: float = field(1.0, "std of the value embeddings at the start", 0)
    head_std: float = field(0.0, "std of the head at the start", 0)
    residual_start: float = field(1.0, "factor on the stream before each block at the start (#45)")

@dataclasses.dataclass(frozen=True)
class Matrix(Settings):
    kind: Literal["matrix", "adam"] = field("matrix", "adam: the settings of `hidden` instead of those below")
    lr: float = field(0.03, "learning rate at factor 1", 0)
    weight_decay: float = field(0.0, "decoupled decay per step: lr * weight_decay")
    cautious: bool = field(False, "decay only where update and weight have the same sign")
    nesterov: bool = field(True, "blend the gradient into the momentum")
    equilibrate: Literal["none", "row", "col", "rowcol"] = field("row", "MuonEq before orthogonalising")
    equilibrate_exponent: float = field(-0.5, "power of the sums of squares")
    phase: int | None = field(None, "update from which rowcol becomes row")
    orthogonalize: str = field("polar_express", "polar_express, newton_schulz or another entry of ORTHOGONALIZERS")
    steps: int = field(5, "iterations of the orthogonalisation", 1)
    norm_bound: Literal["frobenius", "spc"] = field("frobenius", "bound of the largest singular value")
    normuon: bool = field(False, "NorMuon: equalise rows or columns of the update by their running mean square")
    normuon_axis: Literal["auto", "row", "col"] = field("auto", "what has a mean square of its own; auto: the longer side")
    beta2: float = field(0.95, "decay of NorMuon's mean square")
    scale: Literal["spectral", "match_rms_adamw"] = field("spectral", "sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n))")
    lr_mul: float | tuple[float, ...] = field(1.0, "factor on lr, or one for each matrix in turns: (up, down) of the MLP (#42)")

@dataclasses.dataclass(frozen=True)
class Adam(Settings):
    lr: float = field(0.008, "learning rate at factor 1", 0)
    betas: tuple[float, float] = field((0.65, 0.95), "decay of the first and second moment")
    eps: float = field(1.5e-13, "added to the root of the second moment; gradients are means over tokens")
    weight_decay: float = field(0.0, "decoupled decay per update: lr * weight_decay")
    cautious: bool = field(False, "decay only where update and weight have the same sign")
    every: int = field(2, "steps between updates; gradients are kept in between (#39)", 1)

class Stage(NamedTuple):
    """What changes together (records #46, #72), from the step `begin` times the scheduled steps on (1: the extension)."""
    begin: float
    windows: tuple[int, int]  # (short, long), tokens
    batch: int = 1  # factor on the rows of a step
    document_cut: int = 4096  # tokens kept of a document; the tail is dropped (#29)
    lr: float = 1.0  # factor on the learning rates above their floor
    ahead: tuple[tuple[float, float], ...] = ()  # (first, last) weights of the targets 2, 3, ... tokens on, linear in between

@dataclasses.dataclass(frozen=True)
class Schedule(Settings):
    steps: int = field(2245, "scheduled steps", 1)
    extension: int = field(40, "further steps at the learning-rate floor (#35)", 0)
    stages: tuple[Stage, ...] = field((Stage(0, (64, 64)),), "(begin, (short, long window), batch, document cut, lr, ahead)")
    cooldown: float = field(0.5, "share of the scheduled steps over which the learning rate falls")
    floor: float = field(0.1, "learning-rate factor at the end (#19)")
    decay_power: float = field(1.0, "decoupled decay goes with the learning-rate factor to this power (#43: 2)", 1)
    momentum: tuple[float, float] = field((0.85, 0.95), "momentum at the ends of the run and between")
    momentum_warmup: int = field(300, "steps over which the momentum rises (#9)")
    momentum_cooldown: int = field(50, "last steps over which it falls again (#39)")

@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
    target: float = field(3.28, "validation loss to reach, nats per token")
    tokens: int = field(10_485_760, "validation targets, from the start of the validation shards", 1)
    row_tokens: int = field(262_144, "tokens of one validation row", 1)
    every: int = field(250, "steps between validations; the end is always validated", 1)
    windows: tuple[int, int] = field((768, 2560), "(short, long) at the final validation")
    log_every: int = field(10, "steps between logged training losses", 1)

@dataclasses.dataclass(frozen=True)
class Track:
    data: Data = Data()
    model: Model = Model()
    matrix: Matrix = Matrix()
    gate: Matrix = Matrix()
    hidden: Adam = Adam(lr=0.002, betas=(0.9, 0.95), weight_decay=0.1, every=1)
    embed: Adam = Adam()
    value: Adam = Adam()
    head: Adam = Adam()
    scalar: Adam = Adam()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()

@dataclasses.dataclass(frozen=True)
class Run(Settings):
    track: str = field("auto", "short where every CUDA GPU has capability >= 8.0 and 70 GB, else tiny")
    seed: int = field(0, "seed of the initial weights")
    device: str = field("auto", "cpu, cuda, ...; auto: the accelerator, and the CPU for the track tiny")
    dtype: Literal["auto", "bfloat16", "float32"] = field("auto", "of activations; auto: bfloat16 where the processor has it")
    compile: Literal["auto", "whole", "parts", "none"] = field("auto", "parts: equal blocks share a graph; auto: whole on CPU")
    attention: Literal["fa2", "fa3", "fa4"] = field("fa2", "on a CUDA GPU: fa2 is in torch, others where installed")
    memory: Literal["normal", "low"] = field("normal", "low: blocks recomputed in the backward, few logits at a time")
    micro_rows: int = field(0, "rows of one forward pass, a memory knob without effect on the result; 0: up to 8,192 tokens", 0)
    threads: int = field(0, "CPU threads of a process; 0: cores over processes", 0)
    checkpoint_every: int = field(0, "steps between checkpoints, the end has one too; 0: none", 0)
    resume: str | None = field(None, "checkpoint to go on from; without a value: the newest good one of this run")
    evaluate: str | None = field(None, "shard or folder of shards: print the loss of the checkpoint --resume PATH on it")
    sample: str | None = field(None, "text that the model of the checkpoint --resume PATH goes on from")
    sample_tokens: int = field(200, "tokens of a sample; it ends earlier with its document", 1)
    temperature: float = field(1.0, "of a sample; near 0: always the likeliest token", 0)
    adopt: bool = field(False, "resume even the checkpoint of another source, track, seed, dtype or data, as a new run")
    timeout: int = field(600, "seconds without progress after which a job of several processes ends", 1)
    out: str = field("logs", "folder of logs and checkpoints")

TRACKS = {
    # A small GPT on the works of Shakespeare, tokens are bytes: ten seconds on two CPU cores.
    "tiny": Track(
        data=Data("shakespeare", vocab_size=257, document_start=256, predict_start=False, rows=2, row_tokens=1024),
        model=Model(width=128, heads=2, layers=2, attention_free=(0,), ngram_signs=64,
                    ngrams=((2, 2048), (3, 4096), (4, 4096), (5, 8192), (6, 8192))),
        matrix=Matrix(lr=0.04, normuon=True), gate=Matrix(equilibrate="none", normuon=True, normuon_axis="row"),
        embed=Adam(lr=0.6, every=1), value=Adam(lr=1.0, every=1), head=Adam(lr=0.008, every=1), scalar=Adam(lr=0.04, every=1),
        schedule=Schedule(steps=200, extension=0, momentum=(0.8, 0.85), momentum_warmup=100, momentum_cooldown=0, stages=(
            Stage(0, (64, 64)), Stage(1 / 3, (64, 64), 2, lr=1.5), Stage(2 / 3, (64, 64), 4, lr=2.0))),
        evaluation=Evaluation(target=1.50, tokens=444_324, row_tokens=32_768, every=100, windows=(64, 64), log_every=2)),
    # 124M-class GPT on the data of the defaults, FineWeb in GPT-2 tokens: the public speedrun's record #89 without its gate
    # networks (#81, #85), head mixing (#85) and prefix loss (#88), so with about an eighth more steps.
    "short": Track(
        model=Model(padded_vocab=50304, width=768, heads=6, layers=11, attention_free=(6,), long_blocks=(3, 10),
                    value_tables=((1, 0), (2, 1), (8, 2), (9, 3), (10, 4)), value_gate_inputs=6, ngrams=((2, 377_280),),
                    ngram_signs=8192, xsa=(1, 3, 4, 7, 8, 10), key_offset=(3, 10), paired=(0, 2, 5, 9), frozen=7,
                    skips=((3, 6),), backout=7, softcap=(23.0, 5.0, 7.5), tied=2 / 3, qk_parts=3, o_std=0.5, embed_std=0.005,
                    head_std=0.005, value_std=0.01, residual_start=1.1, fp8_head=(100 / 448, 1.6 / 448, 0.75 / 448),
                    low_precision=("qk", "vo", "mlp", "embed", "value_embed", "ngram_embed")),
        matrix=Matrix(lr=0.023, weight_decay=0.0276, cautious=True, equilibrate="none", normuon=True, beta2=0.9,
                      lr_mul=(2.0, 4.0)),
        gate=Matrix(kind="adam"), hidden=Adam(lr=0.008, betas=(0.9, 0.99), eps=1.5e-15),
        embed=Adam(lr=0.008, betas=(0.5, 0.95), eps=1.5e-15, weight_decay=0.006, cautious=True),
        value=Adam(lr=0.6, betas=(0.75, 0.95), eps=1.5e-15, weight_decay=0.015, cautious=True),
        head=Adam(lr=0.008, betas=(0.5, 0.95), eps=1.5e-15, weight_decay=0.006, cautious=True),
        scalar=Adam(lr=0.04, betas=(0.9, 0.99), eps=1.5e-15),
        schedule=Schedule(steps=1450, extension=15, cooldown=0.6, floor=0.15, decay_power=2.0, stages=(
            Stage(0, (128, 384), 1, 896, 1.0, ahead=((0.5, 0.5), (0.25, 0.0))),
            Stage(1 / 3, (384, 896), 2, 2048, 1.52, ahead=((0.5, 0.0),)),
            Stage(2 / 3, (640, 1408), 3, 2048, 1.73),
            Stage(1, (768, 1664), 3, 2048)))),
    # GPT-2 medium class on the same data: the sizes and schedule of the public speedrun's medium track.
    "medium": Track(
        model=Model(padded_vocab=50304, width=1024, heads=8, layers=16, long_blocks=(0, 4, 11, 15), gate_inputs=16,
                    value_tables=(*((i, i) for i in range(5)), *((11 + i, i) for i in range(5))), value_gate_inputs=8,
                    ngrams=((2, 251_520),), ngram_signs=8192, key_offset=(0, 4, 11, 15), skips=((3, 6),), backout=11,
                    softcap=(23.0, 5.0, 7.5), tied=1 / 6, o_std=0.5, embed_std=0.005, head_std=0.005, value_std=0.01,
                    residual_start=1.05, fp8_head=(100 / 448, 1.6 / 448, 0.75 / 448),
                    low_precision=("qk", "vo", "mlp", "embed", "value_embed", "ngram_embed")),
        matrix=Matrix(lr=0.015, weight_decay=0.018, cautious=True, equilibrate="none", normuon=True, lr_mul=(2.0, 4.0)),
        gate=Matrix(kind="adam"), hidden=Adam(lr=0.0008, betas=(0.9, 0.99)),
        embed=Adam(lr=0.004, betas=(0.8, 0.95), weight_decay=0.003, cautious=True),
        value=Adam(lr=0.3, betas=(0.8, 0.95), weight_decay=0.0075, cautious=True),
        head=Adam(lr=0.004, betas=(0.8, 0.95), weight_decay=0.003, cautious=True),
        scalar=Adam(lr=0.008, betas=(0.9, 0.99)),
        schedule=Schedule(steps=4700, extension=40, cooldown=0.7, decay_power=2.0, stages=(
            Stage(0, (128, 384), ahead=((0.5, 0.5), (0.25, 0.0))),
            Stage(1 / 12, (384, 896), 2, lr=1.52, ahead=((0.5, 0.0),)),
            Stage(2 / 12, (640, 1408), 3, lr=1.73),
            *(Stage(i / 12, (384 + 128 * i, 896 + 256 * i), 4, lr=2.0) for i in range(3, 9)))),
        evaluation=Evaluation(target=2.92, windows=(1408, 3456))),
}

# 2. Data: shards, packing of documents into rows, prefetch. ----------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256

def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, uint16 (count,). The format of llm.c: 256 int32 (magic, version, count), then uint16 tokens.
    Raises ValueError naming the file when it is missing, truncated or something else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if (found := (len(header), *header[:2].tolist())) != (wanted := (HEADER_INTS, SHARD_MAGIC, SHARD_VERSION)):
        raise ValueError(f"{path} is not a token shard: size of the header, magic and version are {found}, not {wanted}")
    count, size = int(header[2]), path.stat().st_size
    if count < 0 or size != 4 * HEADER_INTS + 2 * count:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes for {count} tokens")
    return np.fromfile(path, dtype="<u2", offset=4 * HEADER_INTS)

def read_documents(path: Path, start_token: int) -> tuple[np.ndarray, list[int]]:
    """Tokens of a shard, where its documents begin and where the last one ends."""
    tokens = read_shard(path)
    borders = [*np.flatnonzero(tokens == start_token).tolist(), len(tokens)]
    if len(borders) == 1:
        raise ValueError(f"{path} holds no document start (token {start_token})")
    return tokens, borders

class Batch(NamedTuple):
    inputs: Tensor  # (B, T) int32
    targets: Tensor  # (B, T) int64, -1 where nothing is predicted
    offsets: Tensor  # (B, M + 1) int32: 0, ends of the documents, then T repeated

def make_batch(rows: Sequence[tuple[np.ndarray, Sequence[int]]], data: Data, documents: int) -> Batch:
    """Rows of (T + 1 tokens, lengths of their documents) as tensors; token -1 pads, M = `documents`."""
    tokens = np.stack([row for row, _ in rows]).astype(np.int64)  # (B, T + 1)
    targets = tokens[:, 1:].copy()
    if not data.predict_start:
        targets[targets == data.document_start] = -1
    lengths = np.stack([np.pad(lengths, (1, documents - len(lengths))) for _, lengths in rows])  # (B, M + 1)
    offsets = lengths.cumsum(1).clip(max=targets.shape[1]).astype(np.int32)  # the last token is a target only
    return Batch(*map(torch.from_numpy, (tokens[:, :-1].clip(min=0).astype(np.int32), targets, offsets)))

class Packer:
    """Walks through the documents in shard order and packs them into rows of T + 1 tokens.
    Each document gives its first min(length, cut, space left) tokens, the rest is dropped, and the next row begins
    with the next document. The order depends on nothing but the track. `position` is (epoch, shard, document)."""
    def __init__(self, paths: Sequence[Path], data: Data, position: Sequence[int] = (0, 0, 0)):
        self.paths, self.data, self.position = list(paths), data, tuple(position)
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.loaded: dict[int, concurrent.futures.Future] = {}

    def shard(self, current: int) -> tuple[np.ndarray, list[int]]:
        """The documents of a shard; the one after it is read in the background."""
        start, wanted = self.data.document_start, (current, (current + 1) % len(self.paths))
        self.loaded = {i: self.loaded.get(i) or self.pool.submit(read_documents, self.paths[i], start) for i in wanted}
        return self.loaded[current].result()

    def next_row(self, cut: int) -> list[np.ndarray]:
        """The documents of the next row, each cut to `cut` tokens, T + 1 tokens in all."""
        row, need, (epoch, index, document) = [], self.data.row_tokens + 1, self.position
        while need:
            if epoch >= self.data.epochs:
                raise ValueError(f"the training shards end after {self.data.epochs} epochs; the schedule needs more tokens")
            tokens, borders = self.shard(index)
            while need and document < len(borders) - 1:
                begin, end = borders[document : document + 2]
                row.append(tokens[begin : min(end, begin + cut, begin + need)])
                need, document = need - len(row[-1]), document + 1
            if document == len(borders) - 1:
                again, index = divmod(index + 1, len(self.paths))
                epoch, document = epoch + again, 0
        self.position = epoch, index, document
        return row

class Step(NamedTuple):
    batch: Batch  # this rank's R / N rows
    tokens: int  # of all R rows
    targets: int  # of all R rows
    position: tuple[int, int, int]  # of the packer after this step

def training_steps(packer: Packer, track: Track, documents: int, rank: int, world_size: int, first: int = 0) -> Iterator[Step]:
    """The rows of one step after the other, endless; one step is prepared ahead."""
    data = track.data

    def prepare(step: int) -> Step:
        stage = stages_until(track.schedule, step)[-1]
        rows = [packer.next_row(stage.document_cut) for _ in range(data.rows * stage.batch)]
        share = len(rows) // world_size
        own = [(np.concatenate(row), [len(document) for document in row]) for row in rows[rank * share :][:share]]
        batch = make_batch(own, data, documents)
        batch = Batch(*(x.pin_memory() for x in batch)) if torch.cuda.is_initialized() else batch
        tokens = len(rows) * data.row_tokens
        starts = sum(len(row) - 1 for row in rows)  # the first of a row is not predicted
        return Step(batch, tokens, tokens if data.predict_start else tokens - starts, packer.position)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(prepare, first)
        for step in itertools.count(first + 1):
            ready, ahead = ahead.result(), pool.submit(prepare, step)
            yield ready

def validation_rows(paths: Sequence[Path], data: Data, T: int, targets: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """The validation stream cut into rows of T tokens, in order and not aligned to documents; the last row is padded.
    Ends after exactly so many counted `targets`, 0: with the stream; Refusal when there are fewer."""
    stream = np.concatenate([read_shard(path) for path in paths])
    counted = np.cumsum((stream[1:] != data.document_start) | data.predict_start)
    found = counted[-1] if len(counted) else 0
    if found < (wanted := targets or max(1, found)):
        raise Refusal(f"{paths[0].parent} holds {found} validation targets, the track needs {wanted}")
    stream = stream[: np.searchsorted(counted, wanted) + 2]
    rows = []
    for begin in range(0, len(stream) - 1, T):
        row = stream[begin : begin + T + 1]
        inputs = len(row) - 1
        starts = np.flatnonzero(row[:inputs] == data.document_start)
        lengths = np.diff(np.unique([0, *starts, inputs, T]))
        rows.append((np.pad(row.astype(np.int32), (0, T - inputs), constant_values=-1), lengths))
    return rows

# 3. Attention: causal, within a document, window W = own position and the W before it. -------------------------------

class Layout(NamedTuple):
    """Who sees whom in a batch of rows, for one window: a mask for the blocked form, the last three for the fused one."""
    starts: Tensor  # (B, T) bool, first positions of documents
    mask: Tensor | None = None  # (B, T / C, 1, C, 2 C) bool, blocks of C queries against their own and the previous block
    offsets: Tensor | None = None  # (B M + 1,) int32 over the flattened rows
    longest: int = 0  # upper bound of a document's length
    window: Tensor | None = None  # (W, 0), of `window_size`

def document_starts(offsets: Tensor, T: int) -> Tensor:
    """Whether a document begins at a position, (B, T) bool, from the document `offsets` (B, M + 1)."""
    return offsets.new_zeros(len(offsets), T + 1, dtype=torch.bool).scatter(1, offsets.long(), True)[:, :T]

def blocked_layout(offsets: Tensor, T: int, window: int) -> Layout:
    """The `Layout` of rows with document `offsets` (B, M + 1) and its mask; documents of no length are allowed."""
    C = min(window, T)
    blocks, starts = -(-T // C), document_starts(offsets, T)
    document = F.pad(starts.cumsum(1), (0, -T % C)).view(-1, blocks, C)
    keys = torch.cat([F.pad(document[:, :-1], (0, 0, 1, 0), value=-1), document], 2)  # (B, blocks, 2 C)
    distance = torch.arange(C, device=offsets.device)[:, None] + C - torch.arange(2 * C, device=offsets.device)
    near = (distance >= 0) & (distance <= window)
    return Layout(starts, (near & (document[..., None] == keys[:, :, None, :]))[:, :, None])

def window_size(window: int) -> Tensor:
    """A window as the size of an empty tensor (W, 0), which one graph can take with any value."""
    size = torch.empty(window, 0)
    torch._dynamo.mark_dynamic(size, 0)
    return size

def fused_layout(offsets: Tensor, T: int, window: Tensor, longest: int) -> Layout:
    """The same for FlashAttention, all rows as one sequence of documents; `window` is a `window_size`."""
    starts = offsets[:, :-1] + T * torch.arange(len(offsets), device=offsets.device, dtype=torch.int32)[:, None]
    flat = F.pad(starts.flatten(), (0, 1), value=len(offsets) * T)
    return Layout(document_starts(offsets, T), None, flat, min(longest, T), window)

def in_blocks(x: Tensor, C: int, previous: bool = False) -> Tensor:
    """(B, T, H, d) -> (B, T / C, H, C, d), blocks of C positions; with the previous block before each (.., 2 C, d)."""
    B, T, H, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)).view(B, -1, C, H, d).transpose(2, 3)
    return torch.cat([F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], 3) if previous else x

def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k) v for q, k, v of (B, T, H, d); the softmax scale is already in q. In blocks the cost is T x window, and
    exponentials need no running maximum: scores are bounded (|q k| <= 60: RMS-normalised heads times a scale)."""
    if layout.mask is not None:
        C = layout.mask.size(-2)
        weights = torch.where(layout.mask, (in_blocks(q, C) @ in_blocks(k, C, True).mT).float().exp(), 0.0)
        y = (weights / weights.sum(-1, keepdim=True)).to(q.dtype) @ in_blocks(v, C, True)  # (B, T / C, H, C, d)
        return y.transpose(2, 3).flatten(1, 2)[:, : q.size(1)]
    from torch.nn.attention.varlen import varlen_attn
    flat, cu, longest = [x.flatten(0, 1) for x in (q, k, v)], layout.offsets, layout.longest
    return varlen_attn(*flat, cu, cu, longest, longest, scale=1.0, window_size=(layout.window.size(0), 0)).view_as(q)

def supports(device: torch.device, feature: str) -> bool:
    """Whether the processor has bfloat16, fp8 products, a kernel for varlen_attn (flash), or the kernels fa3 and fa4."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fa4 = major in (9, 10) and torch.__version__ >= "2.13"  # its backward refuses windows before
        return {"fp8": (major, minor) >= (8, 9), "fa3": major == 9, "fa4": fa4}.get(feature, major >= 8)
    slow = device.type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return feature == "bfloat16" and not slow

# 4. Model: weights of one shape live in one bank. --------------------------------------------------------------------

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)

def rotary_frequencies(model: Model, windows: Sequence[int]) -> tuple[Tensor, float]:
    """Frequencies (d / 2,) in radians per token, half of them 0 (#17), and softmax scale after a history of long windows.
    At each change YaRN (2309.00071, #31) interpolates slow frequencies and the scale grows by 1 + 0.2 ln(new / old)."""
    scale, turning = model.attention_scale, model.width // model.heads // 4
    frequencies = model.rotary_base ** -torch.linspace(0, 1, turning, dtype=torch.float64)
    for old, new in zip(windows, windows[1:]):
        keep = ((old * frequencies / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
        frequencies = frequencies * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return F.pad(frequencies, (0, turning)), scale

def ngram_hashes(inputs: Tensor, starts: Tensor, ngrams: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Row of each n-gram in its table and a second hash, (B, T, len(ngrams)) each: the last n tokens within the document.
    The tables lie one after the other. Embeddings of hashed n-grams: fastText (1607.04606), record #62 (pairs)."""
    document, begin, rows, second = starts.cumsum(1), 0, [], []
    for n, count in ngrams:
        key = inputs.long() + 1
        for k in range(1, n):
            same = document[:, k:] == document[:, :-k]
            key = (key * 1_000_003 + F.pad(torch.where(same, inputs[:, :-k].long() + 1, 0), (k, 0))) % 2**31
        rows.append(begin + (key * 48_271 >> 8) % count)
        second.append(key * 16_807 >> 9)
        begin += count
    return torch.stack(rows, -1), torch.stack(second, -1)

class Lookup(torch.autograd.Function):
    """Rows of a table (R, D) by an index (...). The backward is one scatter_add: inductor's own for F.embedding is slow."""
    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(table, index)
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (table, index), grad = ctx.saved_tensors, grad.float().flatten(0, -2)
        places = index.reshape(-1, 1).long().expand_as(grad)
        return torch.zeros_like(table, dtype=grad.dtype).scatter_add(0, places, grad).to(table.dtype), None

def to_fp8(x: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    return (x / divisor).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)

def fp8_product(a: Tensor, b: Tensor, divisors: tuple[float, float], dtype: torch.dtype, fast: bool) -> Tensor:
    """(m, k) (n, k) -> (m, n); both row-major, as the hardware wants it. torch 2.11 cannot compile F.scaled_mm."""
    scales = (torch.full((), divisor, device=a.device) for divisor in divisors)
    return torch._scaled_mm(a, b.T, *scales, out_dtype=dtype, use_fast_accum=fast)

class FP8Linear(torch.autograd.Function):
    """x (n, D) times the transpose of w (V, D) in FP8 with fixed divisors (of x, w and the gradient); records #19, #42.
    e4m3 forward and e5m2 gradients; the gradient of w, an fp32 parameter, comes out in fp32."""
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, divisors: tuple[float, float, float]) -> Tensor:
        of_x, of_w, _ = ctx.divisors = divisors
        x8, w8 = to_fp8(x, of_x, torch.float8_e4m3fn), to_fp8(w, of_w, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        return fp8_product(x8, w8, (of_x, of_w), x.dtype, True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x8, w8), (of_x, of_w, of_g) = ctx.saved_tensors, ctx.divisors
        g8 = to_fp8(grad, of_g, torch.float8_e5m2)
        dx = fp8_product(g8, w8.T.contiguous(), (of_g, of_w), grad.dtype, False)
        return dx, fp8_product(g8.T.contiguous(), x8.T.contiguous(), (of_g, of_x), torch.float32, False), None

class GPT(nn.Module):
    """The decoder of records #42 to #89. All sizes come from `model`; activations and `low_precision` have `dtype`."""
    COMPILED = {"parts": ("layout", "embedding", "block", "loss"), "whole": ("body",), "none": ()}
    LOGITS_AT_ONCE = (32768, 4096)  # tokens, with memory normal and low

    def __init__(self, model: Model, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.dtype = model, dtype
        D, H, L, V = model.width, model.heads, model.layers, model.padded_vocab
        self.attention_blocks = [i for i in range(L) if i not in model.attention_free]
        A, G = len(self.attention_blocks), model.gate_inputs
        tables = 1 + max((table for _, table in model.value_tables), default=-1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device))
        self.qk = parameter(2 * A * model.qk_parts, D // model.qk_parts, D)  # q and k of each attention block, (out, in)
        self.vo = parameter(2 * A, D, D)
        self.mlp = parameter(2 * L, D, model.mlp_ratio * D)  # up as (in, out), down as (out, in)
        self.gate = parameter(A, H, G)
        self.value_gate = parameter(A if model.value_gate_inputs else 0, H, 2 * model.value_gate_inputs)
        self.smear_gate = parameter(1, G)
        self.embed = parameter(V, D)
        self.ngram_embed = parameter(sum(rows for _, rows in model.ngrams), D)
        self.value_embed = parameter(tables * V, D)
        self.lm_head = parameter(V, D)
        self.residual = parameter(L, 2)  # on the stream and on the embedding, before each block
        self.value_mix = parameter(A, 2)  # on v and on the value embedding
        self.xsa = parameter(A if model.xsa else 0, H)
        self.skip = parameter(len(model.skips))
        self.smear = parameter(1)
        self.backout = parameter(1)
        positions, half = max_tokens * (2 if model.paired else 1), D // H // 2
        self.register_buffer("cos", torch.ones(positions, half, dtype=dtype, device=device), persistent=False)
        self.register_buffer("sin", torch.zeros(positions, half, dtype=dtype, device=device), persistent=False)
        self.register_buffer("attention_scale", torch.ones((), dtype=dtype, device=device), persistent=False)
        signs = torch.randint(0, 2, (model.ngram_signs, D), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        self.register_buffer("signs", signs.to(device), persistent=False)
        for name in model.low_precision:
            setattr(self, name, nn.Parameter(getattr(self, name).to(dtype)))
        short, place = dtype.itemsize == 2, self.embed.device
        self.fused, self.fp8 = short and supports(place, "flash"), bool(model.fp8_head) and short and supports(place, "fp8")
        self.low_memory, self.tied, self.layout = False, False, blocked_layout

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The start of a run, the same on every device: drawn on the CPU from `seed`; zero where nothing else is said."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        uniform = {"qk": (c.up_std,), "vo": (c.up_std, c.o_std), "mlp": (c.up_std, 0.0)}  # stds, of the matrices in turns
        normal = {"embed": c.embed_std, "value_embed": c.value_std, "lm_head": c.head_std}
        constant = {"residual": (c.residual_start, 0.0), "value_mix": 0.5, "skip": -1.5, "backout": 0.5 * (c.backout >= 0)}
        bound = (3 / c.width) ** 0.5  # of std D ** -0.5
        for name, p in self.named_parameters():
            if name in uniform:
                stds = torch.tensor(uniform[name]).repeat(len(p) // len(uniform[name]))
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator) * stds[:, None, None])
            elif name in normal:
                p.copy_(torch.randn(p.shape, generator=generator) * normal[name])
            else:
                p.copy_(torch.tensor(constant.get(name, 0.0)))

    @torch.no_grad()
    def set_rotary(self, windows: Sequence[int]) -> None:
        """Rotary tables and softmax scale for a history of long windows (in place: nothing recompiles)."""
        frequencies, scale = rotary_frequencies(self.config, windows)
        positions = torch.arange(self.cos.size(0), dtype=torch.float64, device=self.cos.device)
        angles = positions[:, None] * frequencies.to(self.cos.device)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        self.attention_scale.fill_(scale)

    def rotate(self, x: Tensor) -> Tensor:  # (B, T, H, d), pairs are (j, j + d / 2)
        cos, sin = self.cos[: x.size(1), None], self.sin[: x.size(1), None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

    def embedding(self, inputs: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """First activations (B, T, D) and value embeddings (tables, B, T, D)."""
        c, dtype = self.config, self.dtype
        starts = document_starts(offsets, inputs.size(1))
        x = Lookup.apply(self.lm_head if self.tied else self.embed, inputs).to(dtype)
        if c.ngrams:
            rows, second = ngram_hashes(inputs, starts, c.ngrams)
            found = Lookup.apply(self.ngram_embed, rows)
            if c.ngram_signs:  # what shares a row by chance is no longer alike (record #83)
                found = found * F.embedding(second % c.ngram_signs, self.signs)
            x = x + found.sum(-2).to(dtype)
        weight = ~starts[..., None] * self.smear * torch.sigmoid(F.linear(x[..., : c.gate_inputs], self.smear_gate.to(dtype)))
        x = norm(x + weight.to(dtype) * x.roll(1, 1))  # of the token before, in its document (record #34)
        tables = torch.arange(0, len(self.value_embed), c.padded_vocab, device=inputs.device)  # first rows
        return x, Lookup.apply(self.value_embed, inputs + tables[:, None, None]).to(dtype)

    def block(self, x: Tensor, x0: Tensor, read: Tensor | None, residual: Tensor, mlp: Tensor, attention: tuple) -> Tensor:
        """x (B, T, D) through a block, whose attention may `read` another stream: `mlp` is (up, down), `attention` what
        the method of that name takes after x, or empty."""
        x = residual[0] * x + residual[1] * x0
        if attention:
            x = x + self.attention(norm(x if read is None else read), *attention)
        return x + self.feed_forward(x, mlp)

    def feed_forward(self, x: Tensor, mlp: Tensor) -> Tensor:  # ReLU^2: 2109.08668
        return F.linear(F.relu(norm(x) @ mlp[0]).square(), mlp[1])

    def attention(self, x: Tensor, qkvo: Tensor, gate: Tensor, mix: Tensor, value_gate: Tensor | None, xsa: Tensor | None,
                  value: Tensor | None, layout: Layout, forms: Sequence[str]) -> Tensor:  # fmt: skip
        """Of x (B, T, D) with qkvo (4 D, D); `value` is a value embedding (B, T, D), `forms` name what else is on here."""
        (B, T, D), H = x.shape, self.config.heads
        q, k, v = F.linear(x, qkvo[: 3 * D]).view(B, T, 3 * H, -1).chunk(3, 2)
        v = mix[0] * v
        if value is not None:
            weight = mix[1]
            if value_gate is not None:  # record #55
                n = value_gate.size(-1) // 2
                read = torch.cat([x[..., :n], value[..., :n]], -1)
                weight = 2 * weight * torch.sigmoid(F.linear(read, value_gate))[..., None]
            v = v + weight * value.view_as(v)
        q, k, keyed = norm(q), norm(k), v  # 2010.04245
        if "paired" in forms:  # two positions for each token, of half the heads (record #58)
            q, k, keyed = (z.reshape(B, 2 * T, H // 2, -1) for z in (q, k, v))
        q, k = self.rotate(q) * self.attention_scale, self.rotate(k)
        if "key_offset" in forms:  # who looks for a token finds the one that followed it (record #49)
            still = torch.arange(k.size(-1), device=k.device) % (k.size(-1) // 2) >= k.size(-1) // 4
            k = torch.where(still & ~layout.starts[..., None, None], k.roll(1, 1), k)
        y = attend(q, k, keyed, layout).reshape(B, T, H, -1)
        if "xsa" in forms:  # 2603.09078, record #82
            share = torch.tanh(xsa)[:, None] * (y * v).sum(-1, True) / v.square().sum(-1, True).clamp_min(1e-8)
            y = y - share * v
        y = y * torch.sigmoid(F.linear(x[..., : gate.size(-1)], gate))[..., None]
        return F.linear(y.reshape(B, T, D), qkvo[3 * D :])

    def logits(self, x: Tensor) -> Tensor:
        """(n, V) fp32 of activations (n, D), the rows that pad the vocabulary included."""
        x, (A, B, C) = norm(x), self.config.softcap
        if self.fp8 and torch.is_grad_enabled():
            logits = FP8Linear.apply(x, self.lm_head, self.config.fp8_head)
        else:
            logits = F.linear(x, self.lm_head.to(self.dtype))
        return A * torch.sigmoid((logits.float() + B) / C)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropies (K,) in nats, fp32, of (n, D) activations against K targets each (n, K), -1 for none."""
        z = self.logits(x)
        classes = torch.arange(z.size(1), device=z.device)  # the backward of a gather would write zeros of the size of z first
        own = [torch.where(classes == target[:, None], z, 0.0).sum(1) for target in targets.unbind(1)]
        return ((z.logsumexp(-1, True) - torch.stack(own, 1)) * (targets >= 0)).sum(0)

    def forward(self, inputs: Tensor, targets: Tensor, offsets: Tensor, windows: tuple[int, int], longest: int,
                ahead: int = 0) -> Tensor:  # fmt: skip
        """Summed cross entropies in nats, fp32 (1 + ahead,), over the targets >= 0 of (B, T) rows.
        The first is of the targets, the others of those 1, 2, ... places on in the row; windows are (short, long)."""
        windows = [window_size(w) for w in windows] if self.fused else windows
        return self.body(inputs, targets, offsets, windows, longest, ahead)

    def body(self, inputs: Tensor, targets: Tensor, offsets: Tensor, windows: Sequence, longest: int, ahead: int) -> Tensor:
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = again if self.low_memory and torch.is_grad_enabled() else lambda part, *args: part(*args)
        x = self.stream(inputs, offsets, windows, longest, run).flatten(0, 1)
        further = torch.stack([F.pad(targets[:, k:], (0, k), value=-1) for k in range(1 + ahead)], -1).flatten(0, 1)
        parts = zip(*(whole.split(self.LOGITS_AT_ONCE[self.low_memory]) for whole in (x, further)))
        return torch.stack([run(self.loss, *part) for part in parts]).sum(0)

    def stream(self, inputs: Tensor, offsets: Tensor, windows: Sequence, longest: int, run: Callable) -> Tensor:
        """Activations (B, T, D) before the last norm; `run` calls a block."""
        c, D, dtype, T = self.config, self.config.width, self.dtype, inputs.size(1)
        kinds, layouts = {i: (i in c.long_blocks, 1 + (i in c.paired)) for i in self.attention_blocks}, {}
        for long, twice in sorted(set(kinds.values())):  # those that some block uses
            rows = twice * offsets, twice * T, windows[long]
            layouts[long, twice] = fused_layout(*rows, twice * longest) if self.fused else self.layout(*rows)
        A = len(self.attention_blocks)
        qkvo = torch.cat([bank.to(dtype).view(A, 2 * D, D) for bank in (self.qk, self.vo)], 1)
        banks = qkvo, self.gate.to(dtype), self.value_mix.to(dtype), self.value_gate.to(dtype), self.xsa.to(dtype)
        attentions = iter(zip(*(bank.unbind(0) if len(bank) else [None] * A for bank in banks)))
        mlps, residuals = self.mlp.to(dtype).view(c.layers, 2, D, -1).unbind(0), self.residual.to(dtype).unbind(0)
        skip, tables = torch.sigmoid(self.skip).to(dtype).unbind(0), dict(c.value_tables)
        sources = {source for source, _ in c.skips} | {c.backout, c.frozen}

        x, values = self.embedding(inputs, offsets)
        x0, values, outputs = x.view_as(x), values.unbind(0), {}  # x twice would be another graph
        for i in range(c.layers):
            for number, (source, target) in enumerate(c.skips):
                if target == i:
                    x = torch.addcmul(x, skip[number], outputs[source])
            attention, read = (), outputs.get(c.frozen)  # record #77
            if i in kinds:
                forms = tuple(form for form in ("xsa", "key_offset", "paired") if i in getattr(c, form))
                attention = *next(attentions), (values[tables[i]] if i in tables else None), layouts[kinds[i]], forms
            x = run(self.block, x, x0, read, residuals[i], mlps[i], attention)
            if i in sources:
                outputs[i] = x
        return torch.addcmul(x, -self.backout.to(dtype), outputs[c.backout]) if c.backout >= 0 else x

# 5. Optimizer: MuonEq for matrices, Adam for the rest; stacked, padded, sharded over ranks. --------------------------

# Margin by which the bound of the largest singular value is enlarged, triples (a, b, c), and the one of all further iterations.
# A function (K, m, n) -> (K, m, n) is an entry too: that is where an optimizer of one's own goes.
ORTHOGONALIZERS: dict[str, tuple | Callable[[Tensor], Tensor]] = {
    "polar_express": (1.02, (  # 2505.16932: 5 iterations, safety 2e-2
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ), (1.875, -1.25, 0.375)),
    "newton_schulz": (1.0, (), (3.4445, -4.7750, 2.0315)),  # KellerJordan/Muon
}  # fmt: skip
TINY = 1e-30  # guards divisions; a zero matrix stays exactly zero

class Comm:
    """The collectives of a step. With one process the buffers are passed through; work is waited for, never futures."""
    DONE = types.SimpleNamespace(wait=lambda: None)  # nothing is under way

    def __init__(self) -> None:
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.calls = 0
        # torch 2.13 renamed the tensor collectives, 2.11 has only the old names
        self._scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
        self._gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

    def reduce_scatter(self, full: Tensor) -> tuple[Tensor, Any]:
        """(N C, ...) -> this rank's (C, ...) of the sum over ranks, and the work to wait for."""
        self.calls += 1
        if self.world_size == 1:
            return full, self.DONE
        chunk = full.new_empty(full.size(0) // self.world_size, *full.shape[1:])
        return chunk, self._scatter(chunk, full, async_op=True)

    def all_gather(self, full: Tensor, chunk: Tensor) -> Any:
        """Chunks (C, ...) of all ranks -> full (N C, ...); the chunk may lie inside `full`."""
        self.calls += 1
        if self.world_size == 1:
            if full.data_ptr() != chunk.data_ptr():
                full.copy_(chunk)
            return self.DONE
        return self._gather(full, chunk, async_op=True)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum, or another reduction, over ranks, in place."""
        self.calls += 1
        if self.world_size > 1:
            dist.all_reduce(x, op)
        return x

def equilibrate(u: Tensor, mode: str, exponent: float = -0.5) -> Tensor:
    """MuonEq (MaeChd/muon-eq): scale rows and / or columns of u (K, m, n) by their sum of squares to `exponent`.
    Both sums of "rowcol" come from the same u. With exponent -1/2 its scale has no effect: the floor is 1e-8 of their mean."""
    dims = {"none": (), "row": (-1,), "col": (-2,), "rowcol": (-1, -2)}[mode]
    sums = [torch.linalg.vector_norm(u, dim=dim, keepdim=True).square() for dim in dims]
    return math.prod(((x + 1e-8 * x.mean((-2, -1), keepdim=True) + TINY).pow(exponent) for x in sums), start=u)

def orthogonalize(x: Tensor, method: str | Callable = "polar_express", steps: int = 5, norm_bound: str = "frobenius",
                  work_dtype: torch.dtype = torch.bfloat16) -> Tensor:  # fmt: skip
    """Nearest (semi-)orthogonal matrices to x (K, m, n), approximately: singular values near 1, in `work_dtype`.
    x is divided by an upper bound of its largest singular value, its Frobenius norm or, tighter, ||(x xT)^2||_F^(1/4)
    ("spc"), and goes through an odd quintic a x + (b g + c g^2) x, g = x xT, `steps` times, with the last triples of the
    `method` where there are more. A method that is a function gets x in `work_dtype` as it is."""
    if callable(found := ORTHOGONALIZERS.get(method, method)):
        return found(x.to(work_dtype))
    margin, triples, limit = found
    triples = (*triples, *[limit] * max(0, steps - len(triples)))[-steps:]
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(TINY)
    x = (x / (size if norm_bound == "spc" else size * margin)).to(work_dtype)
    wide = x.size(-2) <= x.size(-1)
    x, multiply_add = (x[0], torch.addmm) if len(x) == 1 else (x, torch.baddbmm)  # a CPU is slow with a batch of one
    for i, (a, b, c) in enumerate(triples):
        gram = x @ x.mT if wide else x.mT @ x
        if norm_bound == "spc" and i == 0:  # the bound comes from products that the first iteration needs anyway
            square = gram @ gram
            bound = torch.linalg.vector_norm(square.float(), dim=(-2, -1), keepdim=True).clamp_min(TINY) ** 0.25 * margin
            x, gram, square = (x / bound).to(work_dtype), gram / bound**2, square / bound**4
            polynomial = (b * gram + c * square).to(work_dtype)
        else:
            polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a) if wide else multiply_add(x, x, polynomial, beta=a)
    return x[None] if x.ndim == 2 else x

class Unit:
    """Parameters that are updated as one stack, and this rank's chunk of the state.
    The stack (S, *tail) has one entry per matrix (tail (m, n)) or per element (tail ()). It is padded with zeros to
    N equal chunks; rank r owns entries [r C, (r + 1) C)."""
    SLICE = {"matrix": 2**22, "adam": 2**17}  # elements that a CPU updates at a time: they stay in its cache

    def __init__(self, group: dict, members: list[tuple[str, Tensor, list[float]]], comm: Comm):
        self.group, self.comm = group, comm
        self.names, self.params, factors = map(list, zip(*members))  # factors on the learning rate, one for each matrix
        self.matrix = group["kind"] == "matrix"
        self.tail = self.params[0].shape[-2:] if self.matrix else torch.Size()
        self.counts = [p.numel() // self.tail.numel() for p in self.params]
        self.size = sum(self.counts)
        self.chunk = -(-self.size // comm.world_size)
        self.own = slice(comm.rank * self.chunk, (comm.rank + 1) * self.chunk)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.padding = self.chunk * comm.world_size - self.size
        # one unpadded parameter: gradients and weights travel from and to its own storage
        self.direct = len(self.params) == 1 and self.padding == 0 and self.params[0].is_contiguous()
        lr_mul = [float(factor) for part in factors for factor in part]
        self.lr_mul: Tensor | float = lr_mul[0]
        if len(set(lr_mul)) > 1:
            self.lr_mul = F.pad(torch.tensor(lr_mul, device=self.device), (0, self.padding))[self.own, None, None]
        shapes = {key: (self.chunk, *self.tail) for key in (("momentum",) if self.matrix else ("exp_avg", "exp_avg_sq"))}
        if self.group.get("normuon"):
            (m, n), axis = self.tail, self.group["normuon_axis"]
            shapes["second_moment"] = (self.chunk, m, 1) if axis == "row" or (axis == "auto" and m >= n) else (self.chunk, 1, n)
        if self.dtype != torch.float32:
            shapes["master"] = (self.chunk, *self.tail)
        self.state = {key: torch.zeros(shape, device=self.device) for key, shape in shapes.items()}  # fp32
        self.reset()

    def reset(self) -> None:
        self.updates, self.tokens = 0, 0  # updates made; tokens of the steps since the last one
        self.bad_since = torch.full((), math.inf, device=self.device)  # first step with a gradient that is not finite
        for key, value in self.state.items():
            value.copy_(self.stack(self.params)[self.own]) if key == "master" else value.zero_()

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The padded stack of one tensor per parameter, or of one state of each; of a direct unit a view."""
        parts = [t.detach().reshape(-1, *t.shape[t.ndim - len(self.tail) :]) for t in tensors]  # (K, m, n), (K, m, 1), (S,)
        return parts[0] if self.direct else torch.cat([*parts, parts[0].new_zeros(self.padding, *parts[0].shape[1:])])

    def update(self, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
        """Update the owned chunk with fp32 `grad` * scale, send it to all ranks: the stack, the chunk, work to wait for."""
        self.updates += 1
        full = self.stack(self.params)
        weights = self.state.get("master", full[self.own])
        size = self.chunk if weights.is_cuda else max(1, self.SLICE[self.group["kind"]] // self.tail.numel())
        for begin in range(0, self.chunk, size):
            part = slice(begin, begin + size)
            state = {key: value[part] for key, value in self.state.items()}
            lr = self.group["lr"] * (self.lr_mul if isinstance(self.lr_mul, float) else self.lr_mul[part])
            (self.update_matrices if self.matrix else self.update_elements)(weights[part], grad[part], scale, state, lr)
        chunk = weights.to(self.dtype)
        return full, chunk, self.comm.all_gather(full, chunk)

    def update_elements(self, weights: Tensor, grad: Tensor, scale: float, state: dict, lr: float) -> None:
        """Adam (1412.6980) with decoupled decay (1711.05101); flat fp32 chunks (C,). torch's kernel takes one pass."""
        group, (beta1, beta2), mean = self.group, self.group["betas"], grad * scale
        if group["weight_decay"]:  # the new first moment has the sign of the update
            self.decay(weights, state["exp_avg"].lerp(mean, 1 - beta1), torch.gt)
        count = torch.full((), float(self.updates), device=weights.device)  # torch.tensor would wait for the device
        fixed = dict(beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=0.0, amsgrad=False, maximize=False)
        torch._fused_adamw_([weights], [mean], [state["exp_avg"]], [state["exp_avg_sq"]], [], [count], lr=lr, **fixed)

    def decay(self, weights: Tensor, update: Tensor, agree: Callable) -> None:
        """Decoupled decay; cautious: only where update and weight agree in sign (2510.12402)."""
        amount = self.group["lr"] * self.group["weight_decay"]
        if amount and self.group["cautious"]:
            weights.sub_(amount * weights * agree(update * weights, 0))
        elif amount:
            weights.mul_(1 - amount)

    def update_matrices(self, weights: Tensor, grad: Tensor, scale: float, state: dict, lr: Tensor | float) -> None:
        """Muon with its relatives; fp32 (C, m, n)."""
        group, mu, (m, n) = self.group, self.group["momentum"], self.tail
        momentum = state["momentum"].mul_(mu).add_(grad, alpha=(1 - mu) * scale)  # EMA form
        update = momentum.mul(mu).add_(grad, alpha=(1 - mu) * scale) if group["nesterov"] else momentum
        mode = group["equilibrate"]
        if mode == "rowcol" and group["phase"] is not None and self.updates >= group["phase"]:
            mode = "row"
        update = equilibrate(update, mode, group["equilibrate_exponent"])  # (C, m, n)
        update = orthogonalize(update, group["orthogonalize"], group["steps"], group["norm_bound"], group["work_dtype"])
        factor = lr * (math.sqrt(max(1.0, m / n)) if group["scale"] == "spectral" else 0.2 * math.sqrt(max(m, n)))
        if group["normuon"]:
            factor = factor * normuon_factor(update, state["second_moment"], group["beta2"])
        self.decay(weights, update, torch.ge)
        if isinstance(factor, float):
            weights.add_(update, alpha=-factor)
        else:
            weights.sub_(update * factor)

def normuon_factor(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon (2510.05491): factor per row or column of `update` (K, m, n) that keeps each Frobenius norm.
    `second_moment` (K, m, 1) or (K, 1, n) is the running mean square, updated in place before use."""
    dim = -1 if second_moment.size(-1) == 1 else -2
    length = update.size(dim)
    mean_square = torch.linalg.vector_norm(update.float(), dim=dim, keepdim=True).square() / length
    second_moment.lerp_(mean_square, 1 - beta2)
    factor = second_moment.clamp_min(1e-10).rsqrt()
    before = (length * mean_square.sum((-2, -1), keepdim=True)).sqrt()
    after = (length * (mean_square * factor.square()).sum((-2, -1), keepdim=True)).sqrt()
    return factor * (before / after.clamp_min(1e-10))

class MuonEq(torch.optim.Optimizer):
    """Muon, NorMuon and MuonEq for matrices, Adam for everything else, in one sharded step.
    `groups` are dicts with `kind`, `params` (tensors or (name, tensor) pairs) and any field of `FIELDS[kind]`; `lr`, `momentum`
    and `weight_decay` are read at every step. Matrix parameters are (m, n) or banks (K, m, n), "row" is dim -2; those of one
    shape in one group are processed as one stack. Each rank updates its share, and all ranks receive the result.
    grads="mean": gradients are means and equal on all ranks (one process, with or without torch.distributed, or DDP).
    grads="token_sum": they are sums over this rank's tokens; `step(tokens=n)` divides their sum over ranks by the global n.
    A matrix update: EMA momentum, Nesterov, `equilibrate` (MuonEq), `orthogonalize` (Muon), `normuon`, shape `scale`, decoupled
    decay lr * weight_decay, all but the products in fp32. Parameters of lower precision keep an fp32 master copy; their `.grad`
    is an fp32 sum with "token_sum". A missing gradient counts as zero. ValueError for what does not exist or fit."""
    FIELDS = {
        "matrix": {**vars(Matrix()), "momentum": 0.95, "work_dtype": torch.bfloat16, "every": 1},
        "adam": {"kind": "adam", **vars(Adam()), "betas": (0.9, 0.95), "eps": 1e-8, "every": 1},
    }
    SMALL = 16_384  # elements below which Adam parameters share one stack

    def __init__(self, groups: Iterable[dict], grads: str = "mean"):
        if grads not in ("mean", "token_sum"):
            raise ValueError(f"grads is 'mean' or 'token_sum', not {grads!r}")
        self.grads, self.comm, self.steps = grads, Comm(), 0
        self.units, self.named = [], {}
        super().__init__(groups, {})  # adds the groups one after the other

    def _checked(self, group: dict) -> dict:
        if (kind := group.get("kind")) not in self.FIELDS:
            raise ValueError(f"a group's kind is 'matrix' or 'adam', not {kind!r}")
        fields, settings = self.FIELDS[kind], Matrix if kind == "matrix" else Adam
        for key in group.keys() - fields.keys() - {"params"}:
            near = difflib.get_close_matches(key, fields, 1)
            raise ValueError(f"a {kind} group has no field {key!r}" + (f", nearest: {near[0]!r}" if near else ""))
        if "lr" not in group:
            raise ValueError(f"a {kind} group needs lr")
        group = {"params": [], **fields, **group}
        checked = {f.name: group[f.name] for f in dataclasses.fields(settings)}
        if not callable(method := checked.pop("orthogonalize", "polar_express")) and method not in ORTHOGONALIZERS:
            raise ValueError(f"orthogonalize is one of {', '.join(ORTHOGONALIZERS)}, not {method!r}")
        settings(**checked)  # refuses the rest
        if group["every"] < 1:
            raise ValueError("every is at least 1")
        return group

    def add_param_group(self, param_group: dict) -> None:
        """Check a group, fill in its defaults and divide its parameters into units."""
        group, named, stacks = self._checked(param_group), dict(self.named), collections.defaultdict(list)
        lr_mul, matrices = np.atleast_1d(group.get("lr_mul", 1.0)).tolist(), 0
        factors = itertools.cycle(lr_mul)
        for p in [group["params"]] if isinstance(group["params"], Tensor) else group["params"]:
            name, p = p if isinstance(p, tuple) else (str(len(named)), p)
            if name in named or any(p is other for other in named.values()):
                raise ValueError(f"parameter {name!r} appears twice")
            named[name] = p
            if group["kind"] == "adam":
                shape, count = name if p.numel() >= self.SMALL else None, 1
            elif p.ndim in (2, 3):
                shape, count = p.shape[-2:], p.shape[:-2].numel()
            else:
                raise ValueError(f"matrix parameter {name!r} has shape {tuple(p.shape)}; (m, n) or (K, m, n) expected")
            if p.numel():
                stacks[p.dtype, p.device, shape].append((name, p, list(itertools.islice(factors, count))))
                matrices += count
        if not lr_mul or matrices % len(lr_mul):
            raise ValueError(f"lr_mul has {len(lr_mul)} entries for {matrices} matrices")
        group["params"] = list(named.values())[len(self.named) :]
        super().add_param_group(group)
        self.named = named
        # large reductions start first, small updates are done first: their waits hide behind the large transfers
        self.units += [Unit(group, stack, self.comm) for stack in stacks.values()]
        self.units.sort(key=lambda unit: (unit.matrix, unit.size * unit.tail.numel()))
        for p in group["params"] if self.grads == "token_sum" else ():
            p.grad_dtype = torch.float32  # of several backward passes; the parameter may have a lower precision

    def _active(self, step: int) -> list[Unit]:
        return [unit for unit in self.units if (step + 1) % unit.group["every"] == 0]

    @torch.no_grad()
    def step(self, *, tokens: int | None = None) -> None:
        """Update the groups that are due. `tokens`: global token count behind the gradients (grads="token_sum")."""
        if (self.grads == "token_sum") != (tokens is not None) or tokens == 0:
            raise ValueError('step(tokens=n) with n > 0 goes with grads="token_sum"')
        self.steps += 1
        for unit in self.units:
            unit.tokens += 1 if tokens is None else tokens
        reducing = []
        for unit in reversed(self._active(self.steps - 1)):
            grads = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in unit.params]
            full = unit.stack(grads).float()
            reducing.append((unit, full, *(self.comm.reduce_scatter(full) if tokens else (full[unit.own], Comm.DONE))))
        gathering = []
        for unit, _, chunk, work in reversed(reducing):
            work.wait()
            finite = chunk.sum().isfinite()  # one pass; the largest absolute value takes 40 times as long on a CPU
            unit.bad_since = torch.where(finite, unit.bad_since, unit.bad_since.clamp_max(self.steps))
            gathering.append((unit, *unit.update(chunk, 1 / unit.tokens)))
            unit.tokens = 0
        for unit, full, _, work in gathering:
            work.wait()  # the buffers live until here
            for p, part in zip(unit.params, full[: unit.size].split(unit.counts)) if not unit.direct else ():
                p.copy_(part.view(p.shape))

    def zero_grad(self) -> None:
        """Drop the gradients of the groups that the last step updated; the others go on accumulating."""
        for p in (p for unit in self._active(self.steps - 1) for p in unit.params):
            p.grad = None

    def copy_state(self, source: str, target: str) -> None:
        """Give a parameter the moments of another one of its shape; each has a unit to itself (tied weights that part)."""
        a, b = (next(unit for unit in self.units if unit.names == [name]) for name in (source, target))
        b.reset()  # takes its master copy from the parameter
        b.updates = a.updates
        for key in a.state.keys() - {"master"}:
            b.state[key].copy_(a.state[key])

    def reset(self) -> None:
        """Forget all state and gradients; master copies are taken from the parameters again."""
        super().zero_grad()
        for unit in self.units:
            unit.reset()
        self.steps = 0

    def bad_since(self) -> Tensor:
        """First step, from 1, in which a gradient in this rank's chunks was not finite, (units,) fp32; inf for none."""
        return torch.stack([unit.bad_since for unit in self.units])

    def state_dict(self) -> dict:
        """Full unpadded fp32 state by parameter name, the same at any world size. Collective: every rank calls it."""
        state: dict[str, dict] = {}
        for unit in self.units:
            for key, chunk in unit.state.items():
                full = chunk.new_empty(unit.size + unit.padding, *chunk.shape[1:])
                self.comm.all_gather(full, chunk).wait()
                for name, p, part in zip(unit.names, unit.params, full[: unit.size].split(unit.counts)):
                    shape = p.shape[:-2] + part.shape[1:] if unit.matrix else p.shape
                    state.setdefault(name, {"updates": unit.updates})[key] = part.reshape(shape).clone()
        groups = [{key: g[key] for key in ("lr", "momentum", "weight_decay") if key in g} for g in self.param_groups]
        return {"step": self.steps, "state": state, "groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict` written at any world size; ValueError naming the parameter that does not fit."""
        state = state_dict["state"]
        expected = {name: {key: p.shape[:-2] + chunk.shape[1:] if unit.matrix else p.shape for key, chunk in unit.state.items()}
                    for unit in self.units for name, p in zip(unit.names, unit.params)}  # fmt: skip
        for name in expected.keys() | state.keys():
            found = {key: value.shape for key, value in state.get(name, {}).items() if isinstance(value, Tensor)}
            if expected.get(name) != found:
                raise ValueError(f"optimizer state of {name} is {found}, expected {expected.get(name)}")
        for unit in self.units:
            for key, chunk in unit.state.items():
                chunk.copy_(unit.stack([state[name][key] for name in unit.names])[unit.own])
            unit.updates, unit.tokens = state[unit.names[0]]["updates"], 0
        for group, saved in zip(self.param_groups, state_dict["groups"]):
            group.update(saved)
        self.steps = state_dict["step"]

# 6. Schedule: pure functions of the step. ----------------------------------------------------------------------------

def total_steps(schedule: Schedule) -> int:
    return schedule.steps + schedule.extension

def stage_begins(schedule: Schedule) -> list[int]:
    """The first step of each stage."""
    return [round(stage.begin * schedule.steps) for stage in schedule.stages]

def stages_until(schedule: Schedule, step: int) -> list[Stage]:
    """The stages that have begun by this step; the last one is in force."""
    return [stage for stage, begin in zip(schedule.stages, stage_begins(schedule)) if begin <= step]

def learning_rate_factor(schedule: Schedule, step: int) -> float:
    """The stage's factor, from the last `cooldown` of the scheduled steps on more and more of the floor, then the floor."""
    remaining = max(0.0, 1 - step / schedule.steps)
    share = min(1.0, remaining / schedule.cooldown) if schedule.cooldown else float(remaining > 0)
    return share * stages_until(schedule, step)[-1].lr + (1 - share) * schedule.floor

def loss_weights(schedule: Schedule, step: int) -> list[float]:
    """Weights of the next target (1) and of those 2, 3, ... tokens on; linear within a stage (record #53)."""
    stages = stages_until(schedule, step)
    begin, end = [*stage_begins(schedule), total_steps(schedule)][len(stages) - 1 : len(stages) + 1]
    return [1.0, *(first + (last - first) * (step - begin) / (end - begin) for first, last in stages[-1].ahead)]

def momentum_at(schedule: Schedule, step: int) -> float:
    """Rises over the first steps, falls again over the last."""
    low, high = schedule.momentum
    rising = step / schedule.momentum_warmup if schedule.momentum_warmup else 1.0
    falling = (total_steps(schedule) - step) / schedule.momentum_cooldown if schedule.momentum_cooldown else 1.0
    return low + (high - low) * min(1.0, rising, falling)

# 7. Run: data check, clock, log, checkpoints, warm-up, training and validation. --------------------------------------

CHECKPOINT_FORMAT = "train_gpt checkpoint 2"

@functools.cache
def source() -> tuple[bytes, str]:
    """This file and its sha256, read once: log, checkpoints and the copy beside the log agree even if it changes meanwhile."""
    content = Path(__file__).read_bytes()
    return content, hashlib.sha256(content).hexdigest()

def shards_of(folder: Path, data: Data) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """Training shards, validation shards and the sha256 of each, as the manifest beside them has them; else ValueError."""
    hint = f"run `python data/{'fineweb' if data.corpus.startswith('fineweb') else data.corpus}.py` or set DATA_DIR"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = manifest["vocab_size"], manifest["document_start"]
        digests = {folder / name: file["sha256"] for name, file in sorted(manifest["files"].items())}
    except FileNotFoundError:
        raise ValueError(f"no data: {folder / 'manifest.json'} is missing; {hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / 'manifest.json'} is not a manifest of token shards; {hint}") from None
    if found != (needed := (data.vocab_size, data.document_start)):
        raise ValueError(f"{folder} has vocabulary and document start {found}, the track needs {needed}")
    training, validation = ([path for path in digests if split in path.name] for split in ("train_", "val_"))
    if not training or not validation:
        raise ValueError(f"{folder} holds no {'validation' if training else 'training'} shards")
    return training, validation, digests

def check_data(track: Track, folder: Path) -> dict[str, Any]:
    """Read every file that the run will read, before the clock; ValueError at the first thing that is wrong.
    Returns the sha256 of each file used and the most documents of a training row."""
    data, (training, validation, digests) = track.data, shards_of(folder, track.data)
    packer, most = Packer(training, data), 0
    for step in range(total_steps(track.schedule)):
        stage = stages_until(track.schedule, step)[-1]
        for _ in range(data.rows * stage.batch):
            most = max(most, len(packer.next_row(stage.document_cut)))
    epoch, last, _ = packer.position
    used = training[: last + 1 if epoch == 0 else None] + validation
    for path in used:
        if (largest := int(read_shard(path).max(initial=0))) >= data.vocab_size:
            raise ValueError(f"{path} holds token {largest}, the vocabulary has {data.vocab_size}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digests[path]:
            raise ValueError(f"{path} does not match the sha256 in its manifest; fetch it again")
    return {"digests": {path.name: digests[path] for path in used}, "documents": most}

class Refusal(ValueError):
    """What all ranks refuse with the same sentence; rank 0 says it."""

def on_rank_0(comm: Comm, work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, for all ranks; Refusal on all of them when it fails."""
    box: list[Any] = [None, None]
    if comm.rank == 0:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:
            box[1] = explanation(error)
    if comm.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise Refusal(box[1])
    return box[0]

def watch(trainer: Trainer, seconds: int, done: threading.Event, store: dist.Store) -> None:
    """Thread that ends this process when no rank has moved for `seconds`, or the store of the ranks is gone.
    All ranks make the same collective calls in the same order, so those that have made fewest hold up the others."""
    comm, calls, idle, why = trainer.comm, -1, 0, ""
    try:
        while not why and not done.wait(1.0):
            idle = 0 if calls != (calls := comm.calls + trainer.optimizer.comm.calls) else idle + 1
            store.set(f"calls/{comm.rank}", str(calls))
            if idle > seconds and comm.world_size > 1:
                made = [store.add(f"calls/{rank}", 0) for rank in range(comm.world_size)]  # 0 where nothing was set
                behind = ", ".join(str(rank) for rank, n in enumerate(made) if n == min(made))
                why = f"no progress for {seconds} s (--timeout), held up by rank {behind}"
    except RuntimeError:
        why = "the process that started it does not answer"
    if why and not done.is_set():
        print(f"train_gpt.py: rank {comm.rank} ends: {why}", file=sys.stderr, flush=True)
        os._exit(1)

class Clock:
    """Seconds of training. Stopped during validation and checkpoints; waits for the device at both ends."""
    def __init__(self, device: torch.device):
        self.synchronize, self.seconds, self.began = torch.get_device_module(device).synchronize, 0.0, None

    def start(self) -> None:
        self.synchronize()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.synchronize()
        self.seconds, self.began = self.now(), None

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self.began if self.began is not None else 0.0)

class Log:
    """One JSON line per event, flushed; the source stands beside it once per sha256. Only rank 0 writes.
    A log that is there already keeps its lines up to the `step` of `open`: what came after it, the end too, happens again."""
    def __init__(self, path: Path):
        self.path, self.file, self.events = path, None, set()

    def open(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, digest = source()
        (self.path.parent / f"{digest}.py").write_bytes(content)
        self.file, size = open(self.path, "a+b"), 0
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes {self.path}; wait until it has ended") from None
        self.file.seek(0)
        for line in self.file:
            try:
                event = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}  # a kill can tear the last line
                if event.get("step", 0) > step or event["event"] == "final":
                    break
                self.events.add((event["event"], event.get("step")))
            except (ValueError, AttributeError, KeyError, TypeError):
                raise ValueError(f"{self.path} is not a log: {line[:40]!r}") from None
            size += len(line)
        self.file.truncate(size)

    def write(self, event: str, **fields: Any) -> None:
        if self.file:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
            self.file.write((json.dumps({"event": event, **finite}) + "\n").encode())
            self.file.flush()

def save_checkpoint(path: Path, content: dict) -> None:
    """All or nothing: written under another name with its sha256 at the end, flushed, then renamed. The last two stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("step.partial")  # one name: the next save replaces what a kill leaves
    try:
        with open(partial, "w+b") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # torch's writer hides the system's reason
        raise OSError(f"cannot write {partial}: {error.__context__ or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    for old in sorted(path.parent.glob("step_*.pt"), key=lambda path: path.stat().st_mtime_ns)[:-2]:
        old.unlink()

def load_checkpoint(path: Path, key: dict) -> dict:
    """A checkpoint with this `key` (empty: with any); ValueError naming the file when it is anything else."""
    try:
        content = np.memmap(path, mode="r")  # bytes
        if hashlib.sha256(content[:-32]).digest() != content[-32:].tobytes():
            raise ValueError("its checksum is wrong")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if found["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"its format is not {CHECKPOINT_FORMAT!r}")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load fails in many ways on damaged files
        reason = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or foreign ({reason})") from None
    for name, value in key.items():
        if found["key"].get(name) != value:
            raise ValueError(f"checkpoint {path} belongs to another {name}; --adopt true takes it as the start of a new run")
    return found

def newest_checkpoint(out: Path, key: dict) -> str:
    """The newest good checkpoint of unfinished runs of this track, seed and source, "" for none; others are named."""
    for path in sorted(out.glob("*/step_*.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if not (path.parent / "finished").exists() and load_checkpoint(path, key):
                return str(path)
        except ValueError as error:
            print(f"train_gpt.py: not resumed from: {error}", file=sys.stderr)
    return ""

def environment(device: torch.device, comm: Comm) -> dict[str, Any]:
    """What a reader of the log must know about the machine."""
    def command(line: str) -> str:  # "" where there is no such command
        return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    on_cuda = device.type == "cuda"
    cpu = command("sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1") or os.uname().machine
    return {"source_sha256": source()[1], "git_commit": command("git rev-parse HEAD"),
            "git_dirty": bool(command("git status --porcelain --untracked-files=no")),
            "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "driver": command("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if on_cuda else "",
            "device": torch.cuda.get_device_name(device) if on_cuda else cpu,
            "cpus": os.cpu_count(), "world_size": comm.world_size, "threads": torch.get_num_threads()}  # fmt: skip

def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What attention runs on, for the log; ValueError when another kernel than torch's own is asked for in vain."""
    try:
        if name != "fa2":
            torch.nn.attention.activate_flash_attention_impl(name.upper())
            if not supports(device, name):
                raise RuntimeError("it is not made for this GPU or this torch")
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--attention {name} cannot be used here ({error}); fa2 is part of torch") from None
    return name if dtype.itemsize == 2 and supports(device, "flash") else "blocked"

def build_optimizer(model: GPT, track: Track) -> MuonEq:
    banks = dataclasses.replace(track.matrix, lr_mul=1.0), track.matrix, track.gate
    qkvo, mlp, gate = (track.hidden if bank.kind == "adam" else bank for bank in banks)
    groups = []
    for settings, *names in (
        (qkvo, "qk", "vo"),
        (mlp, "mlp"),
        (gate, "gate", "value_gate", "smear_gate"),
        (track.embed, "embed"),
        (track.value, "value_embed", "ngram_embed"),
        (track.head, "lm_head"),
        (track.scalar, "residual", "value_mix", "xsa", "skip", "smear", "backout"),
    ):
        own = {"work_dtype": model.dtype} if isinstance(settings, Matrix) else {"kind": "adam"}
        groups.append({"params": [(name, getattr(model, name)) for name in names], **vars(settings), **own})
    return MuonEq(groups, grads="token_sum")

def process_age() -> float:
    """Seconds since this process was started, where the system says so."""
    if sys.platform != "linux":
        return 0.0
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")

class Trainer:
    """One run: everything between a parsed command line and the final line of the log."""
    def __init__(self, track: Track, run: Run, comm: Comm, device: torch.device):
        self.track, self.run, self.comm, self.device = track, run, comm, device
        self.laps = {"": time.time() - process_age(), "imports and processes": time.time()}  # start, ends
        data, schedule, evaluation = track.data, track.schedule, track.evaluation
        folder = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parent / "data")) / data.corpus
        self.checked = on_rank_0(comm, lambda: check_data(track, folder))
        self.train_paths, validation, _ = shards_of(folder, data)
        rows = validation_rows(validation, data, evaluation.row_tokens, evaluation.tokens)
        documents, self.val_longest = max(len(x) for _, x in rows), max(int(x.max()) for _, x in rows)  # of one row
        self.validation = [make_batch([row], data, documents) for row in rows[comm.rank :: comm.world_size]]
        self.laps["data"] = time.time()
        dtype = run.dtype if run.dtype != "auto" else "bfloat16" if supports(device, "bfloat16") else "float32"
        self.dtype = getattr(torch, dtype)
        self.attention = choose_attention(run.attention, device, self.dtype)
        self.model = GPT(track.model, max(data.row_tokens, evaluation.row_tokens), self.dtype, device)
        self.optimizer = build_optimizer(self.model, track)
        self.base = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.period = math.lcm(*(group["every"] for group in self.optimizer.param_groups))
        self.untie = math.ceil(round(track.model.tied * schedule.steps) / self.period) * self.period  # where no gradients wait
        self.model.low_memory = run.memory == "low"
        self.compiled = run.compile if run.compile != "auto" else "whole" if device.type == "cpu" else "parts"
        for name in GPT.COMPILED[self.compiled]:
            setattr(self.model, name, torch.compile(getattr(self.model, name), dynamic=False, fullgraph=True))
        self.clock, self.environment = Clock(device), environment(device, comm)
        self.key = {"track": json.loads(json.dumps(dataclasses.asdict(track))), "seed": run.seed, "dtype": dtype,
                    "source": self.environment["source_sha256"], "data": self.checked["digests"]}  # fmt: skip
        self.switches = {*stage_begins(schedule), self.untie}  # steps at which the model changes
        self.micro_rows = {stage.batch: micro_rows(track, run, comm.world_size, stage.batch) for stage in schedule.stages}
        self.longest = max(stage.document_cut for stage in schedule.stages)
        self.steps, self.done, self.tokens, self.position = total_steps(schedule), 0, 0, (0, 0, 0)  # position: the packer's
        self.folder = Path(run.out) / f"{time.strftime('%Y%m%d-%H%M%S')}_{run.track}_{run.seed}_{os.urandom(2).hex()}"
        self.asked_to_stop = 0  # the signal that did
        self.say = functools.partial(print, flush=True) if comm.rank == 0 else lambda _: None
        self.laps["model and optimizer"] = time.time()

    def enter(self, step: int) -> None:
        """Set the model to the stage of a step."""
        stages = stages_until(self.track.schedule, step)
        self.model.set_rotary([stage.windows[1] for stage in stages])
        self.model.tied, self.stage = step < self.untie, stages[-1]

    def forward_backward(self, batch: Batch, weights: Sequence[float]) -> Tensor:
        """Add this rank's gradient sums to the parameters; returns its summed loss of the next tokens."""
        total, weights = torch.zeros((), device=self.device), torch.tensor(weights).to(self.device, non_blocking=True)
        for micro in zip(*(x.split(self.micro_rows[self.stage.batch]) for x in batch)):
            parts = (x.to(self.device, non_blocking=True) for x in micro)
            self.comm.calls += 1  # a sign of life for `watch`
            losses = self.model(*parts, self.stage.windows, self.longest, len(weights) - 1)
            losses.backward(weights)
            total += losses[0].detach()
        return total

    def advance(self, step: int, batches: Iterator[Step]) -> tuple[Tensor, Step]:
        """Do a step; this rank's summed loss and what it has read. Within a stage the first one needs `enter` before."""
        schedule = self.track.schedule
        if step == self.untie > 0:  # the embedding, tied to the head until now, goes on by itself (records #51, #53)
            self.model.embed.detach().copy_(self.model.lm_head.detach())
            self.optimizer.copy_state("lm_head", "embed")
        if step in self.switches:
            self.enter(step)
        read = next(batches)
        loss = self.forward_backward(read.batch, loss_weights(schedule, step))
        factor, momentum = learning_rate_factor(schedule, step), momentum_at(schedule, step)  # Adam has its betas
        for group, (lr, decay) in zip(self.optimizer.param_groups, self.base):
            group.update(lr=lr * factor, weight_decay=decay * factor ** (schedule.decay_power - 1), momentum=momentum)
        self.optimizer.step(tokens=read.targets)
        self.optimizer.zero_grad()
        self.done, self.tokens, self.position = step + 1, self.tokens + read.tokens, read.position
        return loss, read

    @torch.no_grad()
    def validate(self, windows: tuple[int, int], rows: int | None = None) -> dict[str, Any]:
        """The `val` event, the same on all ranks; its loss is the sum over so many rows of each rank over all targets."""
        total, count = torch.zeros(1, dtype=torch.float64, device=self.device), self.track.evaluation.tokens
        for batch in self.validation[:rows]:
            total += self.model(*(x.to(self.device) for x in batch), windows, self.val_longest).double()
        loss = float(self.comm.all_reduce(total)) / count
        return dict(step=self.done, val_loss=loss, val_tokens=count, train_time_s=self.clock.seconds, tokens=self.tokens)

    def warm_up(self) -> None:
        """Run every graph and the optimizer once on made-up rows, then set everything to its start."""
        schedule, T = self.track.schedule, self.track.data.row_tokens
        self.model.init_weights(self.run.seed)
        row = (np.arange(T + 1) % self.track.data.vocab_size, np.diff([*range(0, T, self.longest), T]))
        for step in sorted(step for step in self.switches if step < self.steps):
            self.enter(step)
            batch = make_batch([row] * self.micro_rows[self.stage.batch], self.track.data, self.checked["documents"])
            self.forward_backward(batch, loss_weights(schedule, step))
            self.model.zero_grad()  # a graph cannot be traced beside fp32 gradients of bf16 parameters
            self.validate(self.stage.windows, 1)
        self.validate(self.track.evaluation.windows, 1)
        self.laps["graphs"] = time.time()
        for _ in range(self.period):
            self.optimizer.step(tokens=1)
        self.model.init_weights(self.run.seed)
        for p in self.model.parameters() if self.comm.world_size > 1 else ():
            dist.broadcast(p.detach(), src=0)
        self.optimizer.reset()
        self.laps["optimizer"] = time.time()

    def resume(self) -> tuple[str, str]:
        """Go on from the checkpoint of --resume; its path and the id of its run, empty where there is none."""
        run, key = self.run, {} if self.run.adopt and self.run.resume else self.key
        path = run.resume if run.resume != "" else on_rank_0(self.comm, lambda: newest_checkpoint(Path(run.out), key))
        if not path:
            return "", ""
        on_rank_0(self.comm, lambda: load_checkpoint(Path(path), key) and None)
        found = load_checkpoint(Path(path), key)
        if found["step"] > self.steps:
            raise Refusal(f"checkpoint of step {found['step']}: the schedule has only {self.steps} steps")
        try:  # the fields of the groups are the track's
            self.optimizer.load_state_dict({**found["optimizer"], "groups": []})
            self.model.load_state_dict(found["model"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Refusal(f"checkpoint {path} does not fit: {error}") from None
        self.done, self.tokens, self.clock.seconds = found["step"], found["tokens"], found["train_time_s"]
        self.enter(self.done)
        if (found["key"]["data"], found["key"]["track"]["data"]) == (self.key["data"], self.key["track"]["data"]):
            self.position = found["position"]
        if found["key"] == self.key:  # else it is adopted, as the start of a new run
            self.folder = self.folder.with_name(found["run_id"])
        return path, found["run_id"]

    def open_log(self, checkpoint: str, run_id: str, **compiling: Any) -> None:
        """On rank 0: begin the log, or go on with that of the run whose `checkpoint` it is."""
        run, dtype, own = self.run, self.key["dtype"], run_id == self.folder.name
        self.check_disk()
        if own:
            os.utime(checkpoint)  # the newest now: what came after it is done again
            (self.folder / "finished").unlink(missing_ok=True)
        self.log.open(self.done)
        if not self.log.events:
            startup = dict(zip([*self.laps][1:], np.diff([*self.laps.values()]).round(3).tolist()))
            self.log.write("header", run_id=self.folder.name, track=run.track, settings=dataclasses.asdict(self.track),
                           seed=run.seed, dtype=dtype, micro_rows=[*self.micro_rows.values()], **self.environment,
                           data=self.checked["digests"], attention=self.attention, head="fp8" if self.model.fp8 else dtype,
                           compiled=self.compiled, startup_s=startup, **compiling)  # fmt: skip
        if own and ("checkpoint", self.done) not in self.log.events:
            self.log.write("checkpoint", step=self.done)
        if checkpoint:
            self.log.write("resume", step=self.done, world_size=self.comm.world_size, run_id=run_id)

    def save(self) -> None:
        """Collective: rank 0 writes a checkpoint, the others wait for it."""
        self.check_finite(all(p.isfinite().all() for p in self.model.parameters()), "parameters")
        model = dict(self.model.state_dict())
        model["embed"] = model["lm_head" if self.model.tied else "embed"]
        content = dict(key=self.key, run_id=self.folder.name, step=self.done, position=self.position, tokens=self.tokens,
                       train_time_s=self.clock.seconds, model=model, optimizer=self.optimizer.state_dict())  # fmt: skip
        on_rank_0(self.comm, lambda: save_checkpoint(self.folder / f"step_{self.done:06d}.pt", content))
        self.log.write("checkpoint", step=self.done)

    def check_disk(self) -> None:
        """ValueError when two checkpoints and the one that is being written will not fit."""
        state = sum(value.nbytes for unit in self.optimizer.units for value in unit.state.values())
        need = 3 * (sum(p.nbytes for p in self.model.parameters()) + self.comm.world_size * state)
        folder = next(path for path in self.folder.absolute().parents if path.is_dir())
        free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in self.folder.glob("step_*.pt"))
        if self.run.checkpoint_every and free < need:
            raise ValueError(f"{folder} has {free / 1e6:,.0f} MB free, checkpoints take {need / 1e6:,.0f}; use another --out")

    def on_signal(self, number: int, _: Any) -> None:
        """The run saves and ends at its next logged step; before training, or after a Ctrl-C, it ends at once."""
        if self.clock.now() == 0 or self.asked_to_stop == signal.SIGINT:  # torchrun turns the second Ctrl-C into SIGTERM
            raise KeyboardInterrupt
        self.asked_to_stop = number

    def check_finite(self, finite: bool, what: str) -> None:
        """Else a Refusal that says in which step and for which parameters a gradient was first not finite. Collective."""
        if finite:
            return
        since = self.comm.all_reduce(self.optimizer.bad_since(), dist.ReduceOp.MIN).tolist()
        names = [name for unit, at in zip(self.optimizer.units, since) if at == min(since) <= self.done for name in unit.names]
        where = f"gradients of {', '.join(names)} since step {min(since):.0f}" if names else "no gradient before it"
        raise Refusal(f"not finite at step {self.done}, {what}: {where}; the last checkpoint is kept")

    def report(self, loss: Tensor, targets: int) -> bool:
        """Log the loss of the last step; whether a rank was asked to stop. Collective."""
        sums = torch.stack([loss, (self.optimizer.bad_since() <= self.done).any(), loss.new_tensor(self.asked_to_stop)])
        loss_sum, bad, stops = self.comm.all_reduce(sums).tolist()
        train_loss, seconds = loss_sum / targets, self.clock.now()
        self.log.write("step", step=self.done, train_loss=train_loss, train_time_s=seconds, tokens=self.tokens)
        self.check_finite(not bad and math.isfinite(train_loss), f"training loss {train_loss}")
        if self.done % max(1, self.steps // 20) == 0 or self.done == self.steps:
            speed = f"{seconds:.1f} s {self.tokens / seconds:,.0f} tokens/s"
            self.say(f"step {self.done}/{self.steps} loss {train_loss:.4f} {speed}")
        return stops > 0

    def train(self) -> dict[str, Any]:
        """Train from the start or a checkpoint to the end of the schedule; returns the `final` event."""
        track, comm, clock, evaluation = self.track, self.comm, self.clock, self.track.evaluation
        self.warm_up()
        from torch._dynamo.utils import counters  # after the cache has its place
        graphs, misses = counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"]
        cache, resumed = "cold" if misses else "warm" if graphs else "none", self.resume()
        self.log = Log(self.folder.with_name(f"{self.folder.name}.jsonl"))
        on_rank_0(comm, lambda: self.open_log(*resumed, graphs=graphs, compile=cache))
        packer = Packer(self.train_paths, track.data, self.position)
        batches = training_steps(packer, track, self.checked["documents"], comm.rank, comm.world_size, self.done)
        torch.compiler.set_stance("fail_on_recompile")  # without effect where nothing is compiled
        gc.collect()
        # a run that was killed between its last checkpoint and its end has only the end before it
        val = self.validate(evaluation.windows) if self.done == self.steps else {}
        every, stopping = self.run.checkpoint_every, False
        clock.start()
        for step in range(self.done, self.steps):
            loss, read = self.advance(step, batches)
            done, last = step + 1, step + 1 == self.steps
            validating = last or done % evaluation.every == 0
            if validating or done % evaluation.log_every == 0:
                stopping = self.report(loss, read.targets)
            due = stopping or (every > 0 and done % every < self.period)  # all groups are updated in one of `period` steps
            saving = every > 0 if last else due and done % self.period == 0
            if not (validating or saving):
                continue
            clock.stop()
            if validating:
                val = self.validate(evaluation.windows if last else self.stage.windows)
                self.log.write("val", **val)
                self.say(f"step {done}/{self.steps} validation loss {val['val_loss']:.4f} training time {clock.seconds:.2f} s")
                self.check_finite(math.isfinite(val["val_loss"]), f"validation loss {val['val_loss']}")
            if saving:
                self.save()
            if saving and stopping and not last:
                self.say(f"stopped and saved at step {done}; the same command with --resume goes on")
                sys.exit(128 + (self.asked_to_stop or signal.SIGTERM))
            clock.start()
        clock.stop()
        reached, compiles = val["val_loss"] <= evaluation.target, counters["stats"]["unique_graphs"] - graphs
        final = dict(**val, target=evaluation.target, reached=reached, compiles_in_timed_region=compiles,
                     peak_memory_bytes=peak_memory(self.device))  # fmt: skip
        self.log.write("final", **final)
        if comm.rank == 0 and self.folder.is_dir():
            (self.folder / "finished").touch()
        self.say(f"track {self.run.track}: validation loss {val['val_loss']:.4f}, target {evaluation.target} "
                 f"{'' if reached else 'NOT '}reached, training time {val['train_time_s']:.2f} s, {self.steps} steps, "
                 f"{self.tokens} tokens, {comm.world_size} x {self.environment['device']}, log {self.log.path}")  # fmt: skip
        return final

@torch.no_grad()
def use_checkpoint(run: Run, device: torch.device) -> float | str:
    """The mean loss, nats per token, on the shards of --evaluate, or the text of --sample; printed and returned."""
    if not run.resume:
        raise ValueError("--evaluate and --sample need --resume PATH, a checkpoint")
    found = load_checkpoint(Path(run.resume), {})
    try:
        track = Track(**{name: type(part)(**found["key"]["track"][name]) for name, part in vars(Track()).items()})
        dtype = torch.bfloat16 if found["key"]["dtype"] == "bfloat16" and supports(device, "bfloat16") else torch.float32
        model = GPT(track.model, track.evaluation.row_tokens, dtype, device)
        for name, p in model.named_parameters():
            p.copy_(found["model"][name])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"checkpoint {run.resume} is not of this train_gpt.py: {error}") from None
    data, longest, windows = track.data, track.evaluation.row_tokens, track.evaluation.windows
    model.set_rotary([stage.windows[1] for stage in stages_until(track.schedule, found["step"])])
    if run.evaluate:
        paths = sorted(Path(run.evaluate).glob("*.bin")) or [Path(run.evaluate)]
        if (largest := max(int(read_shard(path).max(initial=0)) for path in paths)) >= data.vocab_size:
            raise ValueError(f"{run.evaluate} holds token {largest}, the vocabulary has {data.vocab_size}")
        total, count = 0.0, 0
        for row in validation_rows(paths, data, longest):
            batch = make_batch([row], data, len(row[1]))
            total += float(model(*(x.to(device) for x in batch), windows, longest))
            count += int((batch.targets >= 0).sum())
        print(f"{total / count:.4f} nats per token over {count:,} tokens of {run.evaluate}")
        return total / count
    if not (as_bytes := data.vocab_size == 257):
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
    tokens = [data.document_start, *(run.sample.encode() if as_bytes else encoding.encode_ordinary(run.sample))]
    generator, windows = torch.Generator().manual_seed(run.seed), [window_size(w) for w in windows] if model.fused else windows
    for _ in range(run.sample_tokens):
        T = min(len(tokens), longest)
        inputs, offsets = (torch.tensor([x], dtype=torch.int32, device=device) for x in (tokens[-T:], [0, T]))
        x = model.stream(inputs, offsets, windows, T, lambda part, *args: part(*args))
        logits = model.logits(x[0, -1:])[0, : data.vocab_size].cpu() / max(run.temperature, 1e-6)
        tokens.append(int(logits.softmax(0).multinomial(1, generator=generator)))
        if tokens[-1] == data.document_start:
            break
    words = [token for token in tokens if token != data.document_start]
    print(text := bytes(words).decode(errors="replace") if as_bytes else encoding.decode(words))
    return text

def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator's allocator, or of the process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# 8. main: command line, devices, process group. ----------------------------------------------------------------------

def help_text() -> str:
    lines = [__doc__.strip(), "", "Run options (--name value):"]
    lines += [f"  --{f.name:<18} {f.default!s:<8} {takes(f)}   {f.metadata['meaning']}" for f in dataclasses.fields(Run)]
    for name, track in TRACKS.items():
        lines += ["", f"Track {name} (--section.field value):"]
        for section, part in vars(track).items():
            lines += [f"  --{section + '.' + f.name:<32} {getattr(part, f.name)}   {takes(f)}   {f.metadata['meaning']}"
                      for f in dataclasses.fields(part)]  # fmt: skip
    return "\n".join(lines)

def parse_command_line(argv: Sequence[str]) -> tuple[Track, Run]:
    """Track and run options; ValueError names the nearest option for an unknown one."""
    known, values, words = {f.name: f for f in dataclasses.fields(Run)}, collections.defaultdict(dict), list(argv)
    for section in dataclasses.fields(Track):
        known |= {f"{section.name}.{f.name}": f for f in dataclasses.fields(section.default)}
    while words:
        option, _, text = words.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--"):
            raise ValueError(f"{option!r} is not an option; options look like --track tiny")
        if name not in known:
            raise ValueError(f"unknown option {option}, the nearest is --{difflib.get_close_matches(name, known, 1, 0.0)[0]}")
        if not text and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not text and name != "resume":
            raise ValueError(f"{option} needs a value")
        section, _, key = name.rpartition(".")
        values[section][key] = text
        if not known[name].type.startswith(("str", "Literal")):
            with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                values[section][key] = ast.literal_eval(text.capitalize() if text.isalpha() else text)  # true is True

    def changed(settings: Settings, section: str) -> Settings:
        try:
            return dataclasses.replace(settings, **values[section])
        except ValueError as error:
            raise ValueError(f"--{section}{'.' * bool(section)}{error}") from None
    run = changed(Run(), "")
    if run.track == "auto":
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        large = cards and all((c.major, c.minor) >= (8, 0) and c.total_memory >= 70e9 for c in cards)
        run = dataclasses.replace(run, track="short" if large else "tiny")
    if run.track not in TRACKS:
        raise ValueError(f"unknown track {run.track!r}, there are {', '.join(TRACKS)}")
    return Track(**{section: changed(part, section) for section, part in vars(TRACKS[run.track]).items()}), run

def device_of(run: Run, local_rank: int) -> torch.device:
    """This process's accelerator; the CPU where there is none and for the track tiny."""
    accelerator = None if run.device == "cpu" else torch.accelerator.current_accelerator(True)  # None where there is none
    if run.device == "cpu" or run.device == "auto" and (run.track == "tiny" or accelerator is None):
        return torch.device("cpu")
    if accelerator is None or run.device not in ("auto", accelerator.type):
        raise ValueError(f"there is no device {run.device!r} here")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.accelerator.device_count():
        raise ValueError(f"more processes than the {torch.accelerator.device_count()} devices here")
    return torch.device(accelerator.type, local_rank)

def check_settings(track: Track, run: Run) -> None:
    """ValueError for settings that no run can have together."""
    data, model, stages, fp8 = track.data, track.model, track.schedule.stages, track.model.fp8_head
    begins, windows = [stage.begin for stage in stages], [track.evaluation.windows, *(stage.windows for stage in stages)]
    blocks = [*model.attention_free, *model.long_blocks, *model.xsa, *model.key_offset, *model.paired, *sum(model.skips, ()),
              *(block for block, _ in model.value_tables), max(0, model.frozen), max(0, model.backout)]
    for good, sentence in (
        (begins[:1] == [0] and begins == sorted({*begins}), "schedule.stages begin at 0 and in rising order"),
        (all(stage.batch >= 1 and stage.document_cut >= 1 for stage in stages), "batch and document cut are at least 1"),
        (min(map(min, windows)) >= 1, "attention windows are at least 1 token"),
        (model.width % (4 * model.heads) == 0, f"model.width {model.width} is not a multiple of 4 x {model.heads} heads"),
        (model.attention_scale * model.width / model.heads <= 40, "model.attention_scale x head width is at most 40"),
        ({*model.low_precision} <= {"qk", "vo", "mlp", "embed", "ngram_embed", "value_embed"}, "low_precision: no such bank"),
        (len(fp8) in (0, 3) and all(x > 0 for x in fp8), "fp8_head is three positive numbers or ()"),
        (not fp8 or data.row_tokens % 16 == model.width % 16 == model.padded_vocab % 16 == 0,
         "a head in FP8 needs row_tokens, width and padded_vocab that are multiples of 16"),
        (model.padded_vocab >= data.vocab_size, f"model.padded_vocab is less than the {data.vocab_size} tokens of the data"),
        (all(i in range(model.layers) for i in blocks), f"a block number, frozen or backout is outside 0..{model.layers - 1}"),
        (all(n >= 1 and rows >= 1 for n, rows in model.ngrams), "ngrams and their tables have at least one token and row"),
        (model.width % model.qk_parts == 0, f"model.qk_parts divides the width {model.width}"),
        (not model.paired or model.heads % 2 == 0, "paired blocks need an even number of heads"),
        (all(a < b for a, b in model.skips) and all(t >= 0 for _, t in model.value_tables), "skips go on, tables count from 0"),
        (max(model.gate_inputs, model.value_gate_inputs) <= model.width, "gate_inputs and value_gate_inputs exceed the width"),
        (abs(run.seed) < 2**63, "the seed has 64 bits"),
        (run.timeout <= 10**6, "timeout is 1 to 1,000,000 seconds"),
    ):
        if not good:
            raise ValueError(sentence)
    build_optimizer(GPT(model, 1, torch.float32, "meta"), track)  # refuses what an optimizer cannot do

def micro_rows(track: Track, run: Run, world_size: int, batch: int = 1) -> int:
    """Rows of a forward pass in stages of this `batch`; ValueError for a number of processes or rows that does not divide."""
    rows = track.data.rows
    if rows % world_size:
        allowed = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(f"{world_size} processes do not divide the {rows} rows of a step; allowed: {allowed}")
    own = rows // world_size
    if run.micro_rows and own % run.micro_rows:
        raise ValueError(f"micro_rows {run.micro_rows} does not divide the {own} rows of a process")
    most = max(1, 8192 // track.data.row_tokens)
    return run.micro_rows or max(n for n in range(1, most + 1) if own * batch % n == 0)

def explanation(error: BaseException) -> str | None:
    """One sentence for what a user can do something about; None for a defect of the program."""
    text = str(error)
    if isinstance(error, ValueError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        return "out of memory; --memory low, a smaller --micro_rows or --evaluation.row_tokens, or more processes, need less"
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"lost the connection to another rank ({text.strip().splitlines()[-1]})"
    if "fail_on_recompile" in text:
        return "a graph would have been compiled inside the timed region; the warm-up did not cover it"
    if isinstance(error, OSError):
        return f"{error.strerror or text}: {error.filename}" if error.filename else text
    return None

def main(argv: Sequence[str], work: Callable[[Trainer], Any] = lambda trainer: trainer.train()) -> Any:
    """Set up what a command line asks for and do the `work`; one sentence and a non-zero status when it cannot be done."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before anything asks for a GPU
    if "--help" in argv or "-h" in argv:
        return print(help_text())
    rank, local_rank, world_size = (int(os.environ.get(*x)) for x in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        track, run = parse_command_line(argv)
        device = device_of(run, local_rank)
        cache = Path(os.environ.get("CACHE_DIR", Path(__file__).resolve().parent / ".cache"))
        model = torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else device.type
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / f"inductor-{torch.__version__}-{model}"))
        check_settings(track, run)
        micro_rows(track, run, world_size)
        if device.type == "cpu":
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(run.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        else:
            torch.accelerator.set_device_index(local_rank)
        torch._dynamo.config.recompile_limit = 64
        if run.evaluate is not None or run.sample is not None:
            return use_checkpoint(run, device)
        if "WORLD_SIZE" in os.environ:
            restart, job = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "RUN_ID"))
            bound = datetime.timedelta(seconds=run.timeout + 60)
            if job and sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a rank does not outlive torchrun
            # torchrun answers at once, unless it was killed meanwhile; its store outlives a restart, with the old addresses
            found = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=30) if job else bound))[0]
            store = dist.PrefixStore(f"start {restart or 0}", found)
            pulse = store.clone()
            store.set_timeout(bound)
            own, backend = None if device.type == "cpu" else device, dist.get_default_backend_for_device(device)
            dist.init_process_group(backend, timeout=bound, store=store, rank=rank, world_size=world_size, device_id=own)
            if on_rank_0(Comm(), lambda: job and found.check(["ended"])):
                return dist.destroy_process_group()  # restarted by a fault after the end of the run
        trainer, done = Trainer(track, run, Comm(), device), threading.Event()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, trainer.on_signal)
        if dist.is_initialized():
            threading.Thread(target=watch, args=(trainer, run.timeout, done, pulse), daemon=True).start()
        result = work(trainer)
        done.set()
        if dist.is_initialized() and rank == 0:
            found.set("ended", "1")
        if dist.is_initialized():
            dist.destroy_process_group()
        return result
    except (Exception, KeyboardInterrupt) as error:
        common = isinstance(error, Refusal) or (isinstance(error, ValueError) and not dist.is_initialized())
        sentence, own = explanation(error), not common and world_size > 1
        if own or rank == 0:
            who, cause = f"rank {rank}: " * own, sentence or f"{type(error).__name__}: {error}"
            print(f"train_gpt.py: {who}{cause}", file=sys.stderr, flush=True)
        if sentence is None:
            raise
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)

if __name__ == "__main__":
    main(sys.argv[1:])
