"""Train a GPT to a target validation loss against the clock. One file, any number of processes, one result.

    ./run.sh                                                environment, data, the track for this machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py   8 GPUs (the same maths on 1, 2 or 4)
    python train_gpt.py --track tiny --seed 3 --matrix.equilibrate row
    python train_gpt.py --help                              every field, its values and its meaning

A step is R packed rows of T tokens (times the batch factor of a stage) whatever the number of
processes N: a rank takes R / N rows, gradients are sums over tokens, reduced in fp32 and divided
once by the global count of targets. Record numbers such as #42 are those of the public speedrun
(KellerJordan/modded-nanogpt); numbers such as 2505.16932 are papers on arXiv.

Contents, in the order in which a token meets them:
    1 Tracks      every number of a run, as data
    2 Data        shards, documents packed into rows, validation rows
    3 Attention   who sees whom, and the kernels
    4 Model       class GPT; above it an index of all techniques by the field's names
    5 Optimizer   class MuonEq: Muon, NorMuon, MuonEq and Adam, sharded over ranks
    6 Schedule    pure functions of the step
    7 Run         data check, log, checkpoints, class Trainer
    8 Main        command line, help, devices, process group

To learn how the model is trained, read sections 4 to 6, then `Trainer.advance` and `Trainer.train`. The rest
makes data, keeps runs safe and says what is wrong.
"""

from __future__ import annotations

import gc
import os

if __name__ == "__main__":
    # What a start makes is kept for the whole run; looking through it for garbage takes half a second.
    gc.disable()  # until training begins

if __name__ == "__main__" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & {*os.environ}:
    # How often a thread looks for work before it sleeps; OpenMP reads it when torch is loaded. With its own
    # 300,000 a run takes 60 times as long where another program keeps a core busy, with 3,000 three times.
    os.environ["GOMP_SPINCOUNT"] = "3000"

import ast
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":

    def say_what_takes_so_long(seconds: int = 0) -> None:
        """At once, and every five seconds until this file is read: from a cold disk torch takes many."""
        if "main" not in globals():
            so_far = f", {seconds} s" if seconds else ""
            print(f"train_gpt.py: loading torch{so_far}", file=sys.stderr, flush=True)
            timer = threading.Timer(5, say_what_takes_so_long, [seconds + 5])
            timer.daemon = True
            timer.start()

    say_what_takes_so_long()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

# ----------------------------------------------------------------------------------------------------
# 1. Tracks
#
# Every number of a run stands here. A track is data, never code: a `Track` has one section for each
# concern (`data`, `model`, `schedule`, ...), and each section is a frozen dataclass whose fields carry
# their default, their meaning and their least value. The table `TRACKS` at the end of this section
# holds the tracks. The command line changes single fields: --section.field value.
#
# A new setting is one `field` in a section. The help, the check of its type, the log and the
# checkpoint follow from it.
# ----------------------------------------------------------------------------------------------------

LARGEST_FLOAT = 1e30  # a setting beyond it is a slip of the pen


class Stage(NamedTuple):
    """What changes together during a run (records #46, #72)."""

    begin: float  # the stage begins at step begin * schedule.steps; 1 is the start of the extension
    # Attention windows (short, long), in positions; paired heads have two positions for each token.
    windows: tuple[int, int]
    batch: int = 1  # factor on the rows of a step: a growing batch, and a taper at the end
    document_cut: int = 4096  # tokens kept of a document; the tail is dropped (#29)
    lr: float = 1.0  # factor on the learning rates, which the cooldown fades to the floor
    # For the targets 2, 3, ... tokens ahead: (first, last) weight of their loss, linear in between (#53).
    ahead: tuple[tuple[float, float], ...] = ()
    # Sampled softmax: classes of a row in training, see `sample_classes`; 0: all of them (#92).
    candidates: int = 0


Numbers = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]
Shares = tuple[tuple[str, float], ...]


def field(default: Any, meaning: str, minimum: float = -math.inf, below: float = math.inf) -> Any:
    """A field of a section of settings, of numbers from `minimum` on and `below` another."""
    metadata = {"meaning": meaning, "minimum": minimum, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


def coerce(value: Any, kind: Any) -> Any:
    """The value as a field of this type holds it: whole numbers as floats, lists as tuples.

    TypeError or ValueError if it does not fit, OverflowError for NaN and for a number that is too large.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        for choice in args:
            with contextlib.suppress(TypeError, ValueError):
                return coerce(value, choice)
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (tuple, list)):
            kinds = args[:1] * len(value) if args[-1] is ... else args
            return tuple(coerce(*pair) for pair in zip(value, kinds, strict=True))
    elif kind is Stage:
        if isinstance(value, (tuple, list)):
            return Stage(*map(coerce, Stage(*value), get_type_hints(Stage).values()))
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) < LARGEST_FLOAT:  # NaN too
                raise OverflowError
            return float(value)
    elif type(value) is kind:
        return value
    raise TypeError


def type_in_words(kind: Any) -> str:
    """What a field of this type takes, in the form in which it is typed."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(args)
    if origin is types.UnionType:
        return " or ".join(map(type_in_words, args))
    if origin is tuple:
        inside = [type_in_words(arg) for arg in args if arg is not ...]
        return f"({', '.join(inside)}{', ...' * (args[-1] is ...)})"
    if kind is Stage:
        return f"({', '.join(Stage._fields)})"
    words = {bool: "true|false", str: "text", types.NoneType: "none"}
    return words.get(kind) or kind.__name__


class Settings:
    """A section of settings, checked wherever its values come from.

    ValueError, beginning with the name of the field, for a value of another type or out of bounds.
    """

    def __post_init__(self) -> None:
        for f, kind in zip(dataclasses.fields(self), get_type_hints(type(self)).values()):
            value, minimum = getattr(self, f.name), f.metadata["minimum"]
            try:
                object.__setattr__(self, f.name, coerce(value, kind))
            except (TypeError, ValueError):
                takes = type_in_words(kind)
                raise ValueError(f"{f.name} takes {takes}, not {value!r}: {f.metadata['meaning']}") from None
            except OverflowError:
                raise ValueError(f"{f.name} takes numbers below 1e30, not {value!r}") from None
            # of a tuple each number
            values = np.atleast_1d(value) if minimum > -math.inf else ()
            if any(x < minimum for x in values):
                raise ValueError(f"{f.name} is at least {minimum}, not {value}")
            if any(x >= f.metadata["below"] for x in values):
                raise ValueError(f"{f.name} is below {f.metadata['below']}, not {value}")


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    corpus: str = field("fineweb10B", "folder of the shards below DATA_DIR")
    vocab_size: int = field(50257, "tokens that occur, the document start included")
    document_start: int = field(50256, "token before every document")
    predict_start: bool = field(True, "whether a document start counts as a target")
    rows: int = field(8, "packed rows of a step (R), times the batch of the stage", 1)
    row_tokens: int = field(16_384, "tokens of one row (T); nothing crosses a row border", 1)
    epochs: int = field(1, "how often the shards may be read", 1)


@dataclasses.dataclass(frozen=True)
class Model(Settings):
    # sizes
    padded_vocab: int = field(288, "rows of the embedding tables and the head")
    width: int = field(192, "width of the residual stream (D)")
    heads: int = field(3, "attention heads (H), each of width D / H", 1)
    layers: int = field(4, "blocks", 1)
    mlp_ratio: float = field(4.0, "hidden width of the MLP over D; need not be whole", 0)
    # what a block is made of; blocks are named by their number, from 0
    attention_free: Numbers = field((), "blocks without attention (#17)")
    long_blocks: Numbers = field((), "blocks with the long window (#20)")
    value_tables: Pairs = field((), "(block, table): value embedding added to v (#14, #63)")
    value_gate_inputs: int = field(0, "channels that gate a value embedding; 0: no gate (#55)", 0)
    xsa: Numbers = field((), "blocks whose heads give up their part along their own value (#82)")
    key_offset: Numbers = field((), "blocks with half of each key from the position before (#49)")
    paired: Numbers = field((), "blocks whose heads h and h + H/2 see each other's keys (#58)")
    attention_source: int = field(-1, "block whose output all later attention reads; -1: none (#77)")
    # what is added to the stream
    ngrams: Pairs = field((), "(n, rows): hashed embeddings of the last n tokens (#62)")
    ngram_fold: int = field(0, "folded bytes: from this n on A is a, a line end a space; 0: never")
    ngram_signs: int = field(0, "sign patterns for the rows of n-grams; 0: none (#83)", 0)
    matches: Numbers = field((), "n: what followed the last n tokens before, in the document")
    skips: Pairs = field((), "(source, target): block output added before a block (#11, #45)")
    backout: int = field(-1, "block whose output is partly subtracted at the end; -1: none (#40)")
    gate_inputs: int = field(12, "leading channels that attention and smear gates read (#28, #34)", 1)
    # positions and logits
    rotary_base: float = field(1024.0, "the slowest rotary frequency is 1 / base")
    attention_scale: float = field(0.1, "softmax scale at the first window (#20, #31)")
    softcap: tuple[float, float, float] = field(
        (30.0, 0.0, 7.5), "(A, B, C): logits are A sigmoid((l + B) / C) (#18, #54)"
    )
    # Of the scheduled steps; 1: until the extension. `untie_step` rounds up: no gradients wait there.
    tied: float = field(0.0, "share of the steps before head and embedding untie (#51, #53)", 0)
    # how weights are stored and multiplied
    qk_parts: int = field(1, "row blocks of q and of k, each orthogonalised by itself (#80)", 1)
    low_precision: tuple[str, ...] = field(
        (), "parameters in the activations' dtype, with fp32 master copies (#57)"
    )
    fp8_head: tuple[float, ...] = field(
        (), "divisors of input, weight, gradient of an FP8 head; (): none (#19)"
    )
    # the start
    up_std: float = field(0.5, "std of q, k, v and MLP up at the start, times D ** -0.5", 0)
    o_std: float = field(0.0, "std of o at the start, times D ** -0.5 (#64)", 0)
    embed_std: float = field(1.0, "std of the embedding at the start", 0)
    value_std: float = field(1.0, "std of the value embeddings at the start", 0)
    head_std: float = field(0.0, "std of the head at the start", 0)
    residual_start: float = field(1.0, "factor on the stream before each block at the start (#45)")


@dataclasses.dataclass(frozen=True)
class Muon(Settings):
    """The fields of a matrix update that the sections of a track and the groups of `MuonEq` have in common.

    A track has a `MuonSection` for gates and a `Matrix` for the blocks. `build_optimizer` makes groups of
    them, `MatrixGroup` in section 5, where two fields have the names of the public class.
    """

    lr: float = field(0.03, "learning rate at factor 1", 0)
    weight_decay: float = field(0.0, "decoupled decay per step: lr * weight_decay", 0)
    cautious: bool = field(False, "cautious decay: where update and weight have the same sign")
    nesterov: bool = field(True, "blend the gradient into the momentum")
    # rowcol balances rows and columns by their sums of squares now, before orthogonalising; both
    # does it weakly by running means of these, before and after
    equilibrate: Literal["none", "row", "col", "rowcol", "both"] = field(
        "row", "MuonEq; both: weakly, before and after"
    )
    equilibrate_exponent: float = field(-0.5, "power of the sums of squares, not of both")
    phase: int | None = field(None, "update from which rowcol becomes row")
    orthogonalize: str = field("polar_express", "polar_express, newton_schulz, another of ORTHOGONALIZERS")
    norm_bound: Literal["frobenius", "spc"] = field(
        "frobenius", "bound of the largest singular value; spc: Schatten-8"
    )
    normuon: bool = field(False, "NorMuon: equalise rows or columns by their running mean square")
    normuon_axis: Literal["auto", "row", "col"] = field(
        "auto", "what has a mean square; auto: the longer side"
    )
    beta2: float = field(0.95, "decay of NorMuon's mean square", 0, 1)
    # by the shape of a matrix: of Muon (KellerJordan/Muon), or of Moonlight (2502.16982), with
    # which an update has the root mean square 0.2, about that of AdamW
    scale: Literal["spectral", "match_rms_adamw"] = field(
        "spectral", "sqrt(max(1, m/n)) or 0.2 sqrt(max(m, n))"
    )


@dataclasses.dataclass(frozen=True)
class MuonSection(Muon):
    """A section of a track: how some matrices are updated, by Muon or by Adam."""

    kind: Literal["matrix", "adam"] = field(
        "matrix", "adam: matrix_adam or gate_adam holds instead"
    )
    iterations: int = field(5, "iterations of the orthogonalisation", 1)


@dataclasses.dataclass(frozen=True)
class Matrix(MuonSection):
    """The section of the matrices of the blocks: q, k, v, o and the MLP."""

    mlp_lr_mul: float | tuple[float, ...] = field(
        1.0, "factor on lr in the MLP, or one for each of (up, down) (#42)"
    )


@dataclasses.dataclass(frozen=True)
class Adam(Settings):
    lr: float = field(0.008, "learning rate at factor 1", 0)
    betas: tuple[float, float] = field((0.65, 0.95), "decay of the first and second moment", 0, 1)
    eps: float = field(1.5e-13, "added to the root of the second moment of the mean over tokens", 0)
    weight_decay: float = field(0.0, "decoupled decay per update: lr * weight_decay", 0)
    cautious: bool = field(False, "cautious decay: where update and weight have the same sign")
    every: int = field(2, "steps between updates; gradients are kept in between (#39)", 1)
    # Rows that were not read stay as they are; only decay that is not cautious moves all rows.
    rowwise: bool = field(False, "row-wise: one second moment for a row, and no first one (#92)")


@dataclasses.dataclass(frozen=True)
class Schedule(Settings):
    steps: int = field(2245, "scheduled steps", 1)
    extension: int = field(40, "further steps at the learning-rate floor (#35)", 0)
    stages: tuple[Stage, ...] = field((Stage(0, (64, 64)),), "what changes together, and when")
    cooldown: float = field(0.5, "share of the scheduled steps over which the learning rate falls")
    floor: float = field(0.1, "learning-rate factor at the end (#19)")
    decay_power: float = field(1.0, "lr * weight_decay goes with the factor to this power (#43: 2)", 1)
    momentum: tuple[float, float] = field((0.85, 0.95), "(low, high): at the ends of the run, and between")
    momentum_warmup: int = field(300, "steps over which the momentum rises (#9)")
    momentum_cooldown: int = field(50, "last steps over which it falls again; 0: it stays (#39)")


@dataclasses.dataclass(frozen=True)
class Average(Settings):
    """Weight average: the last weights are blended with an exponential mean (EMA) of earlier ones.

    Record #92; equal parts are stochastic weight averaging (SWA, 1803.05407).
    """

    blends: Shares = field((), "(parameter, share of its mean in the end)")
    span: float = field(0.25, "last share of all steps whose weights are averaged", 0)
    memory: float = field(0.5, "time constant of the EMA as a share of the span; 1: equal parts", 0)
    every: int = field(4, "steps between two weights of the mean", 1)


@dataclasses.dataclass(frozen=True)
class Evaluation(Settings):
    target: float = field(3.28, "validation loss to reach, nats per token")
    tokens: int = field(10_485_760, "targets, from the start of the validation shards", 1)
    row_tokens: int = field(262_144, "tokens of one validation row", 1)
    every: int = field(250, "steps between validations; the end is always validated", 1)
    windows: tuple[int, int] = field((768, 2560), "(short, long) at the final validation")
    log_every: int = field(10, "steps between logged training losses", 1)


@dataclasses.dataclass(frozen=True)
class Track:
    """The settings of a run. `build_optimizer` says which parameters follow which section."""

    data: Data = Data()
    model: Model = Model()
    matrix: Matrix = Matrix()
    matrix_adam: Adam = Adam(lr=0.002, betas=(0.9, 0.95), weight_decay=0.1, every=1)
    gate: MuonSection = MuonSection()
    gate_adam: Adam = Adam(lr=0.002, betas=(0.9, 0.95), weight_decay=0.1, every=1)
    embed: Adam = Adam()
    tables: Adam = Adam()
    head: Adam = Adam()
    scalar: Adam = Adam()
    schedule: Schedule = Schedule()
    average: Average = Average()
    evaluation: Evaluation = Evaluation()


@dataclasses.dataclass(frozen=True)
class Run(Settings):
    """The options that are no part of a track: where and how it runs, not what it computes."""

    track: str = field("auto", "short where every CUDA GPU has capability >= 8.0 and 22 GB, else tiny")
    seed: int = field(0, "seed of the initial weights")
    device: str = field("auto", "cpu, cuda, ...; auto: the accelerator, and the CPU for the track tiny")
    dtype: Literal["auto", "bfloat16", "float32"] = field(
        "auto", "of activations; auto: bfloat16 where the processor has it"
    )
    compile: Literal["auto", "whole", "parts", "none"] = field(
        "auto", "auto: parts on a GPU; on a CPU whole where the cache has it, else none"
    )
    attention: Literal["fa2", "fa3", "fa4"] = field(
        "fa2", "on a CUDA GPU: fa2 is in torch, others where installed"
    )
    memory: Literal["auto", "normal", "low"] = field(
        "auto", "low: blocks are recomputed; auto: low on a GPU below 26 GB"
    )
    micro_rows: int = field(
        0, "rows of a forward pass, without effect on the result; 0: 4,096 or 8,192 tokens", 0
    )
    threads: int = field(0, "CPU threads of a process; 0: cores over processes", 0)
    checkpoint_every: int = field(0, "steps between checkpoints, the end has one too; 0: none", 0)
    resume: str | None = field(
        None, "checkpoint to go on from; without a value: the newest good one of this run"
    )
    evaluate: str | None = field(
        None, "shard, or corpus for its validation shards: print the loss of --resume PATH on it"
    )
    sample: str | None = field(
        None, "text that the model of the checkpoint --resume PATH goes on from"
    )
    sample_tokens: int = field(200, "tokens of a sample; it ends earlier with its document", 1)
    temperature: float = field(1.0, "of a sample; near 0: always the likeliest token", 0)
    adopt: bool = field(
        False, "resume the checkpoint of another source, track, seed, dtype or data, as a new run"
    )
    timeout: int = field(
        600, "seconds without progress after which a job of several processes ends", 1
    )
    out: str = field("logs", "folder of logs and checkpoints")
    show: bool = field(True, "after a run: text by a model of bytes; by ./run.sh a picture of the losses too")


# A small GPT on the works of Shakespeare, tokens are bytes: seconds on two CPU cores.
TINY = Track(
    data=Data(
        "shakespeare", vocab_size=257, document_start=256, predict_start=False, rows=2, row_tokens=1024
    ),
    model=Model(
        width=128, heads=2, layers=1, mlp_ratio=1, head_std=0.05, ngram_signs=64, ngram_fold=4,
        ngrams=((2, 8192), (3, 16_384), (4, 16_384), (5, 32_768), (6, 32_768)), matches=(2, 3, 5, 8),
    ),
    matrix=Matrix(lr=0.06, normuon=True),
    gate=MuonSection(equilibrate="none", normuon=True, normuon_axis="row"),
    embed=Adam(lr=0.6, every=1),
    tables=Adam(lr=0.18, betas=(0, 0.9), every=1, rowwise=True),
    head=Adam(lr=0.064, every=1),
    scalar=Adam(lr=0.04, every=1),
    schedule=Schedule(
        steps=46, extension=0, floor=0.2, momentum=(0.8, 0.85), momentum_warmup=40, momentum_cooldown=0,
        stages=(
            Stage(0, (32, 32)),
            Stage(1 / 3, (32, 32), batch=2, lr=1.5),
            Stage(2 / 3, (32, 32), batch=4, lr=2.0),
        ),
    ),
    evaluation=Evaluation(
        target=1.50, tokens=444_324, row_tokens=32_768, every=100, windows=(32, 32), log_every=2
    ),
)  # fmt: skip

# 124M-class GPT on the data of the defaults, FineWeb in GPT-2 tokens: the public speedrun's record #89
# without its gate networks (#81, #85), head mixing (#85) and prefix loss (#88), with the averages, the
# sampled softmax, the batch taper and the smaller blocks of #92 (a block and three attentions less, MLPs of
# 2,816), and with what followed earlier matches. Nobody has run it: that it needs about 1,400 steps is a
# guess, as good as 1,200 or 1,650; records/README.md has the reasons.
SHORT = Track(
    model=Model(
        padded_vocab=50304, width=768, heads=6, layers=10, mlp_ratio=11 / 3,
        attention_free=(4, 6, 8), long_blocks=(3, 9),
        value_tables=((1, 0), (2, 1), (7, 2), (9, 3)), value_gate_inputs=6,
        xsa=(1, 3, 7, 9), key_offset=(3, 9), paired=(0, 2, 5), attention_source=6,
        ngrams=((2, 377_280),), ngram_signs=8192, matches=(1, 3), skips=((3, 6),), backout=6,
        softcap=(23.0, 5.0, 7.5), tied=1.0, qk_parts=3,
        low_precision=("qk", "vo", "mlp", "embed", "value_embed", "ngram_embed"),
        fp8_head=(100 / 448, 1.6 / 448, 0.75 / 448),
        o_std=0.5, embed_std=0.005, head_std=0.005, value_std=0.01, residual_start=1.1,
    ),
    matrix=Matrix(
        lr=0.023, weight_decay=0.0276, cautious=True, equilibrate="none", normuon=True, beta2=0.9,
        mlp_lr_mul=(2.0, 4.0),
    ),
    matrix_adam=Adam(lr=0.008, betas=(0.9, 0.99), eps=1.5e-15),
    gate=MuonSection(kind="adam"),
    gate_adam=Adam(lr=0.008, betas=(0.9, 0.99), eps=1.5e-15),
    embed=Adam(lr=0.008, betas=(0.5, 0.95), eps=1.5e-15, weight_decay=0.006, cautious=True),
    # a guess after #92, which no run of ours has measured; #89 has betas (0.75, 0.95) and is not row-wise
    tables=Adam(lr=0.6, betas=(0, 0.95), eps=1.5e-15, weight_decay=0.015, cautious=True, rowwise=True),
    head=Adam(lr=0.008, betas=(0.5, 0.95), eps=1.5e-15, weight_decay=0.006, cautious=True),
    scalar=Adam(lr=0.04, betas=(0.9, 0.99), eps=1.5e-15),
    schedule=Schedule(
        steps=1450, extension=20, cooldown=0.8, floor=0.3, decay_power=2.0,
        stages=(
            Stage(0, (128, 384), 1, 896, ahead=((0.5, 0.5), (0.25, 0.0))),
            Stage(1 / 3, (384, 896), 2, 2048, lr=1.52, ahead=((0.5, 0.0),), candidates=10_240),
            Stage(2 / 3, (640, 1408), 3, 2048, lr=1.73, candidates=10_240),
            # batch taper, with the full softmax
            Stage(0.94, (640, 1408), 2, 2048, lr=1.73),
            Stage(1, (768, 1664), 1, 2048),
        ),
    ),
    # a guess: what #92 says of itself, in other words; no run of ours has measured it
    average=Average(
        blends=(("qk", 0.5), ("vo", 0.5), ("mlp", 0.5), ("embed", 0.5), ("lm_head", 0.5)),
        span=0.25, memory=0.5, every=4,
    ),
)  # fmt: skip

# GPT-2 medium class on the same data: the sizes and schedule of the public speedrun's medium track.
MEDIUM = Track(
    model=Model(
        padded_vocab=50304, width=1024, heads=8, layers=16, long_blocks=(0, 4, 11, 15),
        value_tables=(*((i, i) for i in range(5)), *((11 + i, i) for i in range(5))), value_gate_inputs=8,
        key_offset=(0, 4, 11, 15),
        ngrams=((2, 251_520),), ngram_signs=8192, skips=((3, 6),), backout=11, gate_inputs=16,
        softcap=(23.0, 5.0, 7.5), tied=1 / 6,
        low_precision=("qk", "vo", "mlp", "embed", "value_embed", "ngram_embed"),
        fp8_head=(100 / 448, 1.6 / 448, 0.75 / 448),
        o_std=0.5, embed_std=0.005, head_std=0.005, value_std=0.01, residual_start=1.05,
    ),
    matrix=Matrix(
        lr=0.015, weight_decay=0.018, cautious=True, equilibrate="none", normuon=True, mlp_lr_mul=(2.0, 4.0)
    ),
    matrix_adam=Adam(lr=0.0008, betas=(0.9, 0.99)),
    gate=MuonSection(kind="adam"),
    gate_adam=Adam(lr=0.0008, betas=(0.9, 0.99)),
    embed=Adam(lr=0.004, betas=(0.8, 0.95), weight_decay=0.003, cautious=True),
    tables=Adam(lr=0.3, betas=(0.8, 0.95), weight_decay=0.0075, cautious=True),
    head=Adam(lr=0.004, betas=(0.8, 0.95), weight_decay=0.003, cautious=True),
    scalar=Adam(lr=0.008, betas=(0.9, 0.99)),
    schedule=Schedule(
        steps=4700, extension=40, cooldown=0.7, decay_power=2.0,
        stages=(
            Stage(0, (128, 384), ahead=((0.5, 0.5), (0.25, 0.0))),
            Stage(1 / 12, (384, 896), batch=2, lr=1.52, ahead=((0.5, 0.0),)),
            Stage(2 / 12, (640, 1408), batch=3, lr=1.73),
            *(Stage(i / 12, (384 + 128 * i, 896 + 256 * i), batch=4, lr=2.0) for i in range(3, 9)),
        ),
    ),
    evaluation=Evaluation(target=2.92, windows=(1408, 3456)),
)  # fmt: skip

TRACKS = {"tiny": TINY, "short": SHORT, "medium": MEDIUM}


# ----------------------------------------------------------------------------------------------------
# 2. Data
#
# A corpus is a folder of shards: files of uint16 tokens in which every document begins with one
# start token. `Packer` walks through the documents and fills training rows of T + 1 tokens,
# `training_steps` makes the batches of a rank of them, one step ahead of the training, and
# `validation_rows` cuts the validation stream. None of it is random: the order depends on the track
# alone, so a `position` (epoch, shard, document) is all that a checkpoint has to keep.
#
# `Trainer` in section 7 calls these; `check_data` there reads everything once before the clock.
# ----------------------------------------------------------------------------------------------------

# The shard format of llm.c: 256 int32 (magic number, version, token count, zeros), then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
SWEEP_STRIDE = 20_011  # between classes that follow each other in a sweep, or a little more (#92)


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, uint16 (count,).

    ValueError naming the file if it is missing, truncated or something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    found = (len(header), *header[:2].tolist())
    wanted = (HEADER_INTS, SHARD_MAGIC, SHARD_VERSION)
    if found != wanted:
        what = "size of the header, magic and version"
        raise ValueError(f"{path} is not a token shard: {what} are {found}, not {wanted}")
    count, size = int(header[2]), path.stat().st_size
    if count < 0 or size != 4 * HEADER_INTS + 2 * count:
        raise ValueError(f"{path} is truncated or damaged: {size} bytes for {count} tokens")
    return np.fromfile(path, dtype="<u2", offset=4 * HEADER_INTS)


def read_documents(path: Path, start_token: int) -> tuple[np.ndarray, list[int]]:
    """Tokens of a shard, and its borders: where each document begins and where the last one ends."""
    tokens = read_shard(path)
    borders = [*np.flatnonzero(tokens == start_token).tolist(), len(tokens)]
    if len(borders) == 1:
        raise ValueError(f"{path} holds no document start (token {start_token})")
    return tokens, borders


class Batch(NamedTuple):
    inputs: Tensor  # (B, T) int32
    targets: Tensor  # (B, T) int64, -1 where nothing is predicted
    offsets: Tensor  # (B, M + 1) int32: 0, ends of the documents, then T repeated


class SampledBatch(NamedTuple):
    inputs: Tensor  # (B, T) int32
    targets: Tensor  # (B, T) int64: places among the classes of the row, -1 where nothing is predicted
    offsets: Tensor  # (B, M + 1) int32, as in `Batch`
    classes: Tensor  # (B, P) int64, in rising order: those that the softmax of the row has
    log_counts: Tensor  # (B, P) fp32: log of the number of classes that each of them stands for


def sample_classes(
    targets: np.ndarray, count: int, vocab: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sampled softmax: `count` classes, of `vocab`, of a row in training, and their log counts.

    They are the row's targets, which stand for themselves, and, to fill up, a window of a sweep over all
    classes, another window for each row `number`: these stand for all other classes, so that the sum of the
    exponentials is right in the mean (1412.2007). Of more targets than `count` the rarest are left out.
    Record #92 has a set for all rows of a GPU, and no counts; this one follows from a row and its number, and
    is the same for any number of processes.
    """
    found, times = np.unique(targets[targets >= 0], return_counts=True)
    kept = found[np.argsort(-times, kind="stable")[:count]]
    # steps of a size without a common divisor visit each class once before any comes again
    stride = next(size for size in itertools.count(SWEEP_STRIDE) if math.gcd(size, vocab) == 1)
    swept = (number * count + np.arange(count)) * stride % vocab
    others = swept[~np.isin(swept, kept)][: count - len(kept)]
    log_counts = np.zeros(count, np.float32)
    log_counts[len(kept) :] = math.log((vocab - len(kept)) / max(1, len(others)))
    classes = np.concatenate([kept, others])
    order = classes.argsort()
    return classes[order], log_counts[order]


def make_batch(
    rows: Sequence[tuple[np.ndarray, Sequence[int]]], data: Data, most: int,
    candidates: int = 0, vocab: int = 0, first: int = 0,
) -> Batch | SampledBatch:  # fmt: skip
    """Rows of (T + 1 tokens, lengths of their documents) as tensors.

    Token -1 pads a row. `most` is M, the largest number of documents in a row. With so many `candidates` of
    `vocab` classes each row has a sample of them; rows are numbered from `first`.
    """
    tokens = np.stack([row for row, _ in rows]).astype(np.int64)  # (B, T + 1)
    inputs = tokens[:, :-1].clip(min=0).astype(np.int32)  # (B, T)
    targets = tokens[:, 1:].copy()  # (B, T)
    if not data.predict_start:
        targets[targets == data.document_start] = -1
    # A zero in front, and zeros for documents that are not there: offsets are running sums.
    padded = np.stack([np.pad(lengths, (1, most - len(lengths))) for _, lengths in rows])  # (B, M + 1)
    # The last token of a row is a target only, so the last document may be one token shorter.
    offsets = padded.cumsum(1).clip(max=targets.shape[1]).astype(np.int32)
    if not candidates:
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(offsets))
    samples = [sample_classes(row, candidates, vocab, number) for number, row in enumerate(targets, first)]
    classes, log_counts = map(np.stack, zip(*samples))  # (B, P)
    for row, some in zip(targets, classes):
        place = np.searchsorted(some, row).clip(max=candidates - 1)
        row[:] = np.where(some[place] == row, place, -1)
    return SampledBatch(*(torch.from_numpy(x) for x in (inputs, targets, offsets, classes, log_counts)))


class Packer:
    """Walks through the documents in shard order and packs them into rows of T + 1 tokens.

    Each document gives its first min(length, cut, space left) tokens, the rest is dropped, and the next row
    begins with the next document. `position` is (epoch, shard, document) of that document.
    """

    def __init__(self, paths: Sequence[Path], data: Data, position: Sequence[int] = (0, 0, 0)):
        self.paths, self.data, self.position = list(paths), data, tuple(position)
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.loaded: dict[int, concurrent.futures.Future] = {}

    def shard(self, current: int) -> tuple[np.ndarray, list[int]]:
        """Tokens and borders of a shard; the one after it is read in the background, others are dropped."""
        start = self.data.document_start
        wanted = {current, (current + 1) % len(self.paths)}
        kept = {i: reading for i, reading in self.loaded.items() if i in wanted}
        # the current one first: the pool has one thread
        new = [i for i in sorted(wanted, key=lambda i: i != current) if i not in kept]
        self.loaded = kept | {i: self.pool.submit(read_documents, self.paths[i], start) for i in new}
        return self.loaded[current].result()

    def next_row(self, cut: int) -> list[np.ndarray]:
        """The documents of the next row, each cut to `cut` tokens, T + 1 tokens in all."""
        row = []
        need = self.data.row_tokens + 1
        epoch, index, document = self.position
        while need:
            if epoch >= self.data.epochs:
                end = f"the training shards end after {self.data.epochs} epochs"
                raise ValueError(f"{end}; the schedule needs more tokens")
            tokens, borders = self.shard(index)
            while need and document < len(borders) - 1:
                begin, end = borders[document : document + 2]
                row.append(tokens[begin : min(end, begin + cut, begin + need)])
                need -= len(row[-1])
                document += 1
            if document == len(borders) - 1:  # the shard is used up
                document = 0
                index += 1
            if index == len(self.paths):
                index = 0
                epoch += 1
        self.position = epoch, index, document
        return row


class StepData(NamedTuple):
    batch: Batch | SampledBatch  # this rank's R / N rows
    tokens: int  # of all R rows
    targets: int  # of all R rows
    position: tuple[int, int, int]  # of the packer after this step


def training_steps(
    packer: Packer, track: Track, documents: int, rank: int, world_size: int, first: int = 0
) -> Iterator[StepData]:
    """What a rank trains on in step `first` and the following ones, endless; one step is prepared ahead.

    `documents` is the most that a row holds (see `check_data`). Every rank packs all rows and takes its
    share.
    """
    data = track.data

    def prepare(step: int) -> StepData:
        stage = stages_until(track.schedule, step)[-1]
        rows = [packer.next_row(stage.document_cut) for _ in range(data.rows * stage.batch)]
        share = len(rows) // world_size
        mine = rows[rank * share : (rank + 1) * share]
        local = [(np.concatenate(row), [len(document) for document in row]) for row in mine]
        first = step * len(rows) + rank * share  # number of this rank's first row
        batch = make_batch(local, data, documents, stage.candidates, track.model.padded_vocab, first)
        if torch.cuda.is_initialized():
            batch = type(batch)(*(x.pin_memory() for x in batch))
        tokens = len(rows) * data.row_tokens
        # The first document of a row begins at its first token, which is never a target.
        starts = sum(len(row) - 1 for row in rows)
        return StepData(batch, tokens, tokens if data.predict_start else tokens - starts, packer.position)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(prepare, first)
        for step in itertools.count(first + 1):
            ready = coming.result()
            coming = pool.submit(prepare, step)
            yield ready


def validation_rows(
    paths: Sequence[Path], data: Data, T: int, targets: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The validation stream in rows of (T + 1 tokens, lengths of documents), as `make_batch` takes them.

    Rows are not aligned to documents; the last one is padded with -1. The stream ends after exactly so
    many counted `targets`, 0: with the shards. ValueError when there are fewer.
    """
    stream = np.concatenate([read_shard(path) for path in paths])
    counted = np.cumsum((stream[1:] != data.document_start) | data.predict_start)  # targets up to each token
    available = int(counted[-1]) if len(counted) else 0
    wanted = targets or max(1, available)
    if available < wanted:
        raise ValueError(f"{paths[0].parent} holds {available} validation targets, the track needs {wanted}")
    last = np.searchsorted(counted, wanted)  # stream[last + 1] is the last target that is wanted
    stream = stream[: last + 2]
    rows = []
    for begin in range(0, len(stream) - 1, T):
        row = stream[begin : begin + T + 1]
        inputs = len(row) - 1
        starts = np.flatnonzero(row[:inputs] == data.document_start)
        borders = np.unique([0, *starts, inputs, T])
        rows.append((np.pad(row.astype(np.int32), (0, T - inputs), constant_values=-1), np.diff(borders)))
    return rows


# ----------------------------------------------------------------------------------------------------
# 3. Attention
#
# One maths: causal, within a document, a window of W means a position itself and the W before it.
# `Layout` says who sees whom in a batch, and `attend` computes the softmax in one of two ways:
#   fused     FlashAttention on all rows as one sequence of documents (16-bit on a CUDA GPU),
#   blocked   products of blocks of W queries with their own and the previous block of keys (elsewhere).
# `GPT.layouts` makes a layout per kind of block, `GPT.attention` uses it.
# ----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Who sees whom in a batch of rows, for one window.

    The blocked form has a mask, the fused one has the last three fields.
    """

    starts: Tensor  # (B, T) bool, first positions of documents
    mask: Tensor | None = None  # (B, T / C, 1, C, 2 C) bool, see `in_blocks`
    offsets: Tensor | None = None  # (B M + 1,) int32 over the flattened rows
    longest: int = 0  # upper bound of a document's length
    window: Tensor | None = None  # (W, 0), of `window_size`


def document_starts(offsets: Tensor, T: int) -> Tensor:
    """Whether a document begins at a position, (B, T) bool, from the document `offsets` (B, M + 1)."""
    starts = offsets.new_zeros(len(offsets), T + 1, dtype=torch.bool)
    return starts.scatter(1, offsets.long(), True)[:, :T]  # offset T is the end of the row, no start


def blocked_layout(offsets: Tensor, T: int, window: int) -> Layout:
    """The `Layout` of rows with document `offsets` (B, M + 1), with a mask.

    Documents of no length are allowed.
    """
    C = min(window, T)
    blocks = -(-T // C)
    starts = document_starts(offsets, T)
    # number of the document at each position, in blocks; the last block is padded
    document = F.pad(starts.cumsum(1), (0, -T % C)).view(-1, blocks, C)  # (B, blocks, C)
    before = F.pad(document[:, :-1], (0, 0, 1, 0), value=-1)  # no document before the first block
    keys = torch.cat([before, document], 2)  # (B, blocks, 2 C)
    query_place = torch.arange(C, device=offsets.device)[:, None] + C
    distance = query_place - torch.arange(2 * C, device=offsets.device)  # (C, 2 C)
    near = (distance >= 0) & (distance <= window)
    same = document[..., None] == keys[:, :, None, :]  # (B, blocks, C, 2 C)
    return Layout(starts, (near & same)[:, :, None])


def window_size(window: int) -> Tensor:
    """A window as the size of an empty tensor (W, 0), which one graph can take with any value."""
    size = torch.empty(window, 0)
    torch._dynamo.mark_dynamic(size, 0)
    return size


def fused_layout(offsets: Tensor, T: int, window: Tensor, longest: int) -> Layout:
    """The same for FlashAttention, all rows as one sequence of documents; `window` is a `window_size`."""
    row_begins = T * torch.arange(len(offsets), device=offsets.device, dtype=torch.int32)[:, None]
    flat = F.pad((offsets[:, :-1] + row_begins).flatten(), (0, 1), value=len(offsets) * T)
    return Layout(document_starts(offsets, T), None, flat, min(longest, T), window)


def in_blocks(x: Tensor, C: int, previous: bool = False) -> Tensor:
    """(B, T, H, d) -> (B, T / C, H, C, d): blocks of C positions, the last one padded.

    With the `previous` block before each one: (B, T / C, H, 2 C, d).
    """
    B, T, H, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)).view(B, -1, C, H, d).transpose(2, 3)
    if not previous:
        return x
    before = F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat([before, x], 3)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k) v for q, k, v of (B, T, H, d) -> (B, T, H, d); the softmax scale is already in q.

    In blocks the cost is T x window, and the exponentials need no running maximum: heads are
    RMS-normalised, so |q k| is at most the softmax scale times d, with a key offset, which joins
    parts of two keys, sqrt(2) times that. `model_rules` holds scale times d at most at 40 at the
    first window, and it grows slowly with the windows; fp32 overflows at 88.
    """
    if layout.mask is not None:
        C = layout.mask.size(-2)
        scores = in_blocks(q, C) @ in_blocks(k, C, True).mT  # (B, T / C, H, C, 2 C)
        if one_by_one(scores):  # one pass each; adding, unlike a choice, leaves the gradient as it is
            hidden = torch.where(layout.mask, 0.0, -math.inf)
            weights = torch.softmax(scores.add_(hidden.to(q.dtype)), -1)
        else:
            weights = torch.where(layout.mask, scores.float().exp(), 0.0)
            weights = (weights / weights.sum(-1, keepdim=True)).to(q.dtype)
        y = weights @ in_blocks(v, C, True)  # (B, T / C, H, C, d)
        return y.transpose(2, 3).flatten(1, 2)[:, : q.size(1)]
    from torch.nn.attention.varlen import varlen_attn

    flat = [x.flatten(0, 1) for x in (q, k, v)]  # (B T, H, d)
    ends, longest = layout.offsets, layout.longest
    window = (layout.window.size(0), 0)  # positions before and after
    return varlen_attn(*flat, ends, ends, longest, longest, scale=1.0, window_size=window).view_as(q)


def supports(device: torch.device, feature: str) -> bool:
    """Whether the device has a feature: bfloat16, fp8 (products), flash (for varlen_attn), fa3 or fa4."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if feature == "fp8":
            return (major, minor) >= (8, 9)
        if feature == "fa3":
            return major == 9
        if feature == "fa4":  # its backward refuses windows before torch 2.13
            return major in (9, 10) and torch.__version__ >= "2.13"
        return major >= 8
    if device.type == "cpu" and feature == "bfloat16":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return feature == "bfloat16"


# ----------------------------------------------------------------------------------------------------
# 4. Model
#
# A decoder-only GPT. Here is what this file knows to train it with, sections 2 to 6 included: the field's
# name of a technique (with the record or paper that brought it), its setting, and where it is done.
#
#   tokens
#     n-gram embeddings, hashed (#62)             model.ngrams                ngram_rows
#     sign patterns of n-grams (#83)              model.ngram_signs           sign_pattern
#     folded bytes                                model.ngram_fold            fold_bytes
#     matches: what followed the last match       model.matches               match_rows
#     smear: the token before (#34)               model.gate_inputs           GPT.embedding
#     value embeddings (#14, #63)                 model.value_tables          GPT.mix_value
#     gates of value embeddings (#55)             model.value_gate_inputs     GPT.mix_value
#     tied head, untied (split) later (#51, #53)  model.tied                  untie_step
#     gradients of read rows alone                -                           Lookup, SumOfRows
#   attention
#     norm of q and k (2010.04245)                -                           GPT.attention
#     rotary positions, RoPE, by half (#17)       model.rotary_base           rotary_frequencies
#     YaRN (2309.00071, #31)                      Stage.windows               rotary_frequencies
#     softmax scale (#31)                         model.attention_scale       rotary_frequencies
#     short and long windows (#20)                model.long_blocks           GPT.layouts
#     gates per head (#28)                        model.gate_inputs           GPT.attention
#     exclusive self-attention, XSA (#82)         model.xsa                   GPT.attention
#     key offset by a position (#49)              model.key_offset            GPT.attention
#     paired heads (#58)                          model.paired                GPT.attention
#     one source for all later blocks (#77)       model.attention_source      GPT.stream
#     blocks without attention (#17)              model.attention_free        GPT.stream
#   MLP and stream
#     MLP width, ReLU squared (2109.08668)        model.mlp_ratio             mlp_width, relu_squared
#     factors on stream and embedding (#45)       model.residual_start        GPT.block
#     skips, as in a U-net (#11, #45)             model.skips                 GPT.add_earlier
#     backout (#40)                               model.backout               GPT.stream
#     standard deviations at the start (#64)      model.o_std                 GPT.init_weights
#     weights of low precision (#57)              model.low_precision         GPT.__init__
#   logits and loss
#     soft cap (#18, #54)                         model.softcap               GPT.logits
#     FP8 head (#19)                              model.fp8_head              FP8Linear
#     multi-token prediction, ahead (#53)         Stage.ahead                 loss_weights
#     sampled softmax (#92)                       Stage.candidates            sample_classes
#   optimizer
#     Muon: Polar Express, Newton-Schulz          matrix.orthogonalize        orthogonalize
#     MuonEq: equilibrate (2603.28254)            matrix.equilibrate          equilibrate
#     two-sided balance: equilibrate=both         matrix.equilibrate          balance_factors
#     NorMuon (2510.05491)                        matrix.normuon              normuon_factor
#     q and k orthogonalised in parts (#80)       model.qk_parts              GPT.make_parameters
#     learning rates of the MLP (#42)             matrix.mlp_lr_mul           build_optimizer
#     cautious weight decay (2510.12402)          matrix.cautious             Unit.decay
#     overflow guard                              -                           power_of_two
#     row-wise tables, row-wise Adam (#92)        tables.rowwise              RowUnit
#     updates every few steps (#39)               head.every                  MuonEq._active
#     weights changed from outside, masters       model.low_precision         followed
#     Adam in one kernel, on a GPU                -                           adam_pass
#     FSDP2, DTensors                             -                           ShardedMatrices
#   schedule and data
#     cooldown                                    schedule.cooldown           learning_rate_factor
#     floor of the learning rate (#19)            schedule.floor              learning_rate_factor
#     extension at the floor (#35)                schedule.extension          total_steps
#     decay by a power of the schedule (#43)      schedule.decay_power        Trainer.advance
#     momentum warmup (#9)                        schedule.momentum_warmup    momentum_at
#     momentum cooldown (#39)                     schedule.momentum_cooldown  momentum_at
#     growing batch, batch taper (#46)            Stage.batch                 training_steps
#     weight average, exponential mean (EMA)      average.blends              WeightMeans
#     documents packed and cut (#29)              Stage.document_cut          Packer
#
# Weights of one shape live in one bank, a stacked `nn.Parameter`: the optimizer updates a bank at a
# time, and `GPT.stream` hands each block its slices. To read a forward pass, begin at `GPT.forward`:
#   forward -> body -> stream -> embedding, layouts, then block after block (attention, feed_forward)
#                   -> loss -> logits
# `GPT.COMPILED` names those that become graphs of torch.compile. There is no train() and eval():
# what only training does (recomputation, FP8) asks `torch.is_grad_enabled()`.
# ----------------------------------------------------------------------------------------------------

MLP_MATRICES = ("up", "down")  # of a block: the bank, its start, its learning rates and the profile follow
YARN_TURNS = 32  # a frequency that turns so often in the old window keeps its speed (2309.00071)

# Multipliers of the n-gram hashes: a prime for the running key, and two of Lehmer's (Park and Miller 1988),
# whose low bits are shifted out since they are the worst ones.
HASH_KEY, HASH_ROW, HASH_SIGN = 1_000_003, 48_271, 16_807


def one_by_one(x: Tensor) -> bool:
    """Whether operators on x run one by one on a CPU, where each is a pass over memory.

    There some have a form with fewer passes. A graph, which joins operators, has the plain one, and so has
    a GPU, which torch has kernels of its own for.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class RMSNorm(torch.autograd.Function):
    """`norm` with a backward of four passes; that of F.rms_norm has a dozen on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, factor = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, 1e-6)  # y / x is factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, factor = ctx.saved_tensors
        # what would change the norm of x has no effect
        along = (grad * y).sum(-1, keepdim=True).div_(y.size(-1))
        return torch.addcmul(grad, y, along, value=-1).mul_(factor.to(grad.dtype))


def norm(x: Tensor) -> Tensor:
    """x over the root mean square of its last dimension (1910.07467)."""
    return RMSNorm.apply(x) if one_by_one(x) else F.rms_norm(x, (x.size(-1),), eps=1e-6)


class ReLUSquared(torch.autograd.Function):
    """`relu_squared` with a backward of two passes in place of four."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return (grad * ctx.saved_tensors[0]).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """The square of what is positive, else 0 (2109.08668)."""
    return ReLUSquared.apply(x) if one_by_one(x) else F.relu(x).square()


def mlp_width(model: Model) -> int:
    """Hidden width of the MLP. It is rounded: 11/3 may be typed as 3.6667."""
    return round(model.mlp_ratio * model.width)


def turning_pairs(model: Model) -> int:
    """Pairs of channels (j, j + d / 2) of a head that rotary positions turn: half of the d / 2 (#17)."""
    return model.width // model.heads // 4


def rotary_frequencies(model: Model, windows: Sequence[int]) -> tuple[Tensor, float]:
    """Frequencies (d / 2,) in radians per token, half of them 0 (#17), and the softmax scale.

    Both depend on the history of long windows: at each change YaRN (2309.00071, #31) interpolates the slow
    frequencies, and the scale grows by 1 + 0.2 ln(new / old).
    """
    turning = turning_pairs(model)
    frequencies = model.rotary_base ** -torch.linspace(0, 1, turning, dtype=torch.float64)
    scale = model.attention_scale
    for old, new in zip(windows, windows[1:]):
        turns = old * frequencies / (2 * math.pi)  # in the old window
        keep = ((turns - 1) / (YARN_TURNS - 1)).clamp(0, 1)  # 0: interpolated, 1: as it was
        frequencies = frequencies * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return F.pad(frequencies, (0, turning)), scale


def fold_bytes(inputs: Tensor) -> Tensor:
    """Folded bytes: capital letters as small ones, line ends as spaces."""
    capital = (inputs >= ord("A")) & (inputs <= ord("Z"))
    return torch.where(inputs == ord("\n"), ord(" "), inputs + 32 * capital)


def ngram_keys(inputs: Tensor, document: Tensor, longest: int) -> list[Tensor]:
    """A hash below 2**31 of the last n tokens at each place, (..., T), for n from 1 to `longest`.

    Tokens of other documents, by the number of the `document` (..., T) at each place, count as none. So does
    what lies before the row.
    """

    def last(x: Tensor, none: int) -> Tensor:
        """x at the places up to each one, the place itself at the end: (..., T, longest)."""
        return F.pad(x, (longest - 1, 0), value=none).unfold(-1, longest, 1)

    same = last(document, -1) == document[..., None]
    tokens = torch.where(same, last(inputs.long() + 1, 0), 0)
    keys = [tokens[..., -1]]
    for k in range(1, longest):
        keys.append((keys[-1] * HASH_KEY + tokens[..., -1 - k]) % 2**31)
    return keys


def ngram_rows(keys: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Rows of n-grams in their tables, (B, T) each.

    Each table has its `keys` (B, T), and `counts` rows. The tables lie one after the other in one bank.
    Embeddings of hashed n-grams: fastText (1607.04606), record #62 (pairs).
    """
    begins = itertools.accumulate(counts, initial=0)
    return [begin + (key * HASH_ROW >> 8) % count for key, count, begin in zip(keys, counts, begins)]


def sign_pattern(key: Tensor, patterns: int) -> Tensor:
    """The number of the pattern of signs of an n-gram's key: another hash of it; any shape."""
    return (key * HASH_SIGN >> 9) % patterns


def place_before(key: Tensor, document: Tensor) -> Tensor:
    """The last place before each one with the same key in the same document, -1 for none; all (..., T).

    Sorted by key and then by place, it is the neighbour in front. Where that is of another document, there
    is none in this one: documents follow each other.
    """
    T = key.size(-1)
    order = (key * T + torch.arange(T, device=key.device)).argsort(-1)
    in_front = order.roll(1, -1)  # of the first one the last: another key or a later place
    alike = (key.gather(-1, order) == key.gather(-1, in_front)) & (in_front < order)
    alike = alike & (document.gather(-1, order) == document.gather(-1, in_front))
    return torch.zeros_like(order).scatter(-1, order, torch.where(alike, in_front, -1))


def match_rows(inputs: Tensor, keys: Sequence[Tensor], document: Tensor, vocab: int) -> Tensor:
    """Matches: rows for the token that followed the last n tokens where the document had them last.

    Each table has its `keys` (B, T), those of `ngram_keys` for one n; n-grams with the same key count as the
    same. A table has a row for "not seen before" and one for each of `vocab` tokens; tables lie one after the
    other. Returns (tables, B, T). Copying as an input: after #92, there for the longest match alone.
    """
    key = torch.stack([*keys])
    before = place_before(key, document.expand_as(key))
    follower = inputs.long().expand_as(key).gather(-1, before + 1)  # at a place that is not after this one
    begins = torch.arange(0, len(keys) * (vocab + 1), vocab + 1, device=key.device)
    return begins[:, None, None] + torch.where(before >= 0, follower + 1, 0)


class Table(NamedTuple):
    """An embedding table as a forward pass takes it."""

    rows: Tensor  # (R, D): the parameter, detached, so that autograd makes no gradient of its size
    sums: Tensor | None  # (R, D) fp32: its `.grad`, to which the backward adds; None: nothing is trained
    read: Tensor | None = None  # (R,) bool: the rows of `sums` to which something was added


def add_rows(
    sums: Tensor, index: Tensor, grad: Tensor, patterns: Tensor | None = None, signs: Tensor | None = None
) -> None:
    """Add `grad` (n, D) to a row of each table: the rows `index` (n, tables) of `sums` (R, D), in place.

    For the first tables it has signs: `signs` (P, D) at the numbers `patterns` (n, tables with signs).
    """
    signed = 0 if patterns is None else patterns.size(1)
    if sums.is_cuda:  # in one addition: for each more, inductor would copy all of `sums`
        grads = [grad[:, None].expand(-1, index.size(1) - signed, -1)]  # (n, tables without signs, D)
        if signed:
            grads = [grad[:, None] * F.embedding(patterns, signs), *grads]
        sums.index_add_(0, index.flatten(), torch.cat(grads, 1).flatten(0, 1))
        return
    for k, at in enumerate(index.unbind(1)):
        sums.index_add_(0, at, grad * F.embedding(patterns[:, k], signs) if k < signed else grad)


# The same as an operator of its own, for a graph on a CPU: there inductor would copy all of `sums` there and
# back. Elsewhere it is not called, since its first call loads the compiler.
add_rows_in_graph = torch.library.custom_op("train_gpt::add_rows", add_rows, mutates_args=("sums",))


def add_gradients(sums: Tensor, read: Tensor | None, index: Tensor, *grad: Tensor) -> None:
    """`add_rows` of a backward, which also marks the rows of `sums` that are `read` (R,)."""
    if read is not None:
        read.scatter_(0, index.flatten().long(), True)
    compiled_on_a_cpu = torch.compiler.is_compiling() and not sums.is_cuda
    (add_rows_in_graph if compiled_on_a_cpu else add_rows)(sums, index, *grad)


class Lookup(torch.autograd.Function):
    """Rows of a table (R, D) by an index (...) -> (..., D). The backward adds to `sums` (R, D), in fp32.

    A gradient of its own would have the size of the table, for the few rows that a pass reads.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, sums: Tensor | None, read: Tensor | None, index: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(sums, read, index)
        return F.embedding(index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        sums, read, index = ctx.saved_tensors
        add_gradients(sums, read, index.flatten()[:, None], grad.flatten(0, -2).to(sums.dtype))
        return None, None, None, None


class SumOfRows(torch.autograd.Function):
    """A row of each of several tables, summed: index (B, T, tables) -> (B, T, D), in fp32.

    The tables lie in one bank (R, D). Rows of the first have signs: `signs` (P, D) at the numbers `patterns`
    (B, T, tables with signs). One table after the other: what is found in all of them would be large.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, sums: Tensor | None, read: Tensor | None, index: Tensor, patterns: Tensor | None,
        signs: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(sums, read, index, patterns, signs)
        signed = 0 if patterns is None else patterns.size(-1)
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        for k, at in enumerate(index.unbind(-1)):
            found = F.embedding(at, rows).to(total.dtype)
            if k < signed:
                found = found * F.embedding(patterns[..., k], signs)
            total = total + found
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, ...]:
        sums, read, index, patterns, signs = ctx.saved_tensors
        patterns = None if patterns is None else patterns.flatten(0, 1)
        add_gradients(sums, read, index.flatten(0, 1), grad.flatten(0, 1).to(sums.dtype), patterns, signs)
        return (None,) * 6


def to_fp8(x: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    return (x / divisor).clamp(limits.min, limits.max).to(dtype)


def fp8_product(
    a: Tensor, b: Tensor, divisors: tuple[float, float], dtype: torch.dtype, fast: bool
) -> Tensor:
    """(m, k) (n, k) -> (m, n); both row-major, as the hardware wants it.

    A private call, since torch 2.11 cannot compile F.scaled_mm.
    """
    scales = (torch.full((), divisor, device=a.device) for divisor in divisors)
    return torch._scaled_mm(a, b.T, *scales, out_dtype=dtype, use_fast_accum=fast)


class FP8Linear(torch.autograd.Function):
    """x (n, D) times the transpose of w (V, D) in FP8 with fixed divisors of x, w and the gradient.

    Records #19, #42: e4m3 forward and e5m2 gradients. The gradient of w, the fp32 head or the rows
    of it that are sampled, is fp32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, divisors: tuple[float, float, float]) -> Tensor:
        of_x, of_w, _ = ctx.divisors = divisors
        x8 = to_fp8(x, of_x, torch.float8_e4m3fn)
        w8 = to_fp8(w, of_w, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        return fp8_product(x8, w8, (of_x, of_w), x.dtype, True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, w8 = ctx.saved_tensors
        of_x, of_w, of_g = ctx.divisors
        g8 = to_fp8(grad, of_g, torch.float8_e5m2)
        dx = fp8_product(g8, w8.T.contiguous(), (of_g, of_w), grad.dtype, False)
        dw = fp8_product(g8.T.contiguous(), x8.T.contiguous(), (of_g, of_x), torch.float32, False)
        return dx, dw, None


class Joined(torch.autograd.Function):
    """x itself. The backward joins its gradient with the `sums` of those that `Reading` has added."""

    @staticmethod
    def forward(ctx, x: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(sums)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad + ctx.saved_tensors[0], None


class Reading(torch.autograd.Function):
    """x itself. The backward adds the gradient to `sums`, in the kernel that makes it."""

    @staticmethod
    def forward(ctx, x: Tensor, sums: Tensor) -> Tensor:
        ctx.save_for_backward(sums)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        ctx.saved_tensors[0].add_(grad)
        return None, None


class Shared(NamedTuple):
    """Activations x (B, T, D) that several blocks read, and `sums` of the gradients that they give it.

    None: autograd adds, which would write the gradient of each block and read it again. The sums
    are complete when the backward of `Joined` adds them: the stream goes through `Joined` before it
    comes to any block that reads, so that the backward of each of these has run.
    """

    x: Tensor
    sums: Tensor | None

    def apart(self) -> Shared:
        """The same for one reader: autograd does not mind that others add to the same sums."""
        return Shared(self.x, None if self.sums is None else self.sums.data)

    def read(self) -> Tensor:
        return self.x if self.sums is None else Reading.apply(self.x, self.sums)


class AttentionArgs(NamedTuple):
    """What the attention of one block is given besides its input."""

    qkvo: Tensor  # (4 D, D): the matrices of q, k, v and o, each (out, in)
    gate: Tensor  # (H, gate_inputs)
    value_mix: Tensor  # (2,): factors on v and on the value embedding
    value_gate: Tensor | None  # (H, 2 value_gate_inputs), None: no gate
    xsa: Tensor | None  # (H,), None: the heads keep the component along their own value
    value: Tensor | None  # (B, T, D) value embedding, None: the block has none
    layout: Layout  # of 2 T positions where heads are paired
    key_offset: bool
    paired: bool


def call_directly(part: Callable[..., Tensor], *args: Any) -> Tensor:
    """How the model runs a block and its loss unless they are to be recomputed in the backward."""
    return part(*args)


class GPT(nn.Module):
    """The decoder of the index above, after records #42 to #92.

    All sizes come from `model`, `max_tokens` is the longest row, activations and the parameters in
    `model.low_precision` have `dtype`. Weights are undefined until `init_weights`.
    """

    # Which attributes become graphs: with "parts" equal blocks share one, "whole" is a single graph.
    COMPILED = {
        "parts": ("make_layout", "embedding", "add_earlier", "block", "loss"), "whole": ("body",), "none": ()
    }  # fmt: skip
    LOGITS_AT_ONCE = (32768, 4096)  # tokens, with memory normal and low

    def __init__(self, model: Model, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.dtype = model, dtype
        self.attention_blocks = [i for i in range(model.layers) if i not in model.attention_free]
        self.make_parameters(model, device)
        for name in model.low_precision:
            setattr(self, name, nn.Parameter(getattr(self, name).to(dtype)))
        self.make_buffers(model, max_tokens, device)
        half_precision, place = dtype.itemsize == 2, self.embed.device
        self.fused = half_precision and supports(place, "flash")  # attention
        self.fp8 = bool(model.fp8_head) and half_precision and supports(place, "fp8")  # head, in training
        self.low_memory = False
        self.tied = False  # whether the head is the embedding too, at this step
        # whether blocks add up the gradients of what they share; one graph of everything does so by itself
        self.adds_gradients = place.type == "cuda"
        self.make_layout = blocked_layout

    def make_parameters(self, model: Model, device: torch.device | str) -> None:
        """The banks. Shapes with numbers are those of the track `short`: 10 blocks, 7 with attention."""

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device))

        D, H, L, V = model.width, model.heads, model.layers, model.padded_vocab
        A, parts = len(self.attention_blocks), model.qk_parts
        value_tables = 1 + max((table for _, table in model.value_tables), default=-1)
        # matrices: (out, in), but up as (in, out) so that up and down have one shape
        self.qk = parameter(2 * A * parts, D // parts, D)  # (42, 256, 768): q and k of each block, in parts
        self.vo = parameter(2 * A, D, D)  # (14, 768, 768)
        self.mlp = parameter(len(MLP_MATRICES) * L, D, mlp_width(model))  # (20, 768, 2816)
        self.gate = parameter(A, H, model.gate_inputs)  # (7, 6, 12)
        self.value_gate = parameter(A if model.value_gate_inputs else 0, H, 2 * model.value_gate_inputs)
        self.smear_gate = parameter(1, model.gate_inputs)
        # tables: a row of D channels for each token or hashed n-gram; the bank of the n-grams has those of
        # matches too
        self.embed = parameter(V, D)  # (50304, 768)
        table_rows = [*(rows for _, rows in model.ngrams), *(V + 1 for _ in model.matches)]
        self.ngram_embed = parameter(sum(table_rows), D)  # (477890, 768)
        self.value_embed = parameter(value_tables * V, D)  # (201216, 768)
        self.lm_head = parameter(V, D)
        # scalars
        self.residual = parameter(L, 2)  # on the stream and on the embedding, before each block
        self.value_mix = parameter(A, 2)  # on v and on the value embedding
        self.xsa = parameter(A if model.xsa else 0, H)
        self.skip = parameter(len(model.skips))
        self.smear = parameter(1)
        self.backout = parameter(1)

    def make_buffers(self, model: Model, max_tokens: int, device: torch.device | str) -> None:
        """Rotary tables (see `set_rotary`) and the fixed sign patterns of n-grams; not in checkpoints."""
        D, half_head = model.width, model.width // model.heads // 2
        positions = max_tokens * (2 if model.paired else 1)
        fixed = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (model.ngram_signs, D), generator=fixed) * 2.0 - 1  # -1 or 1
        for name, buffer in {
            "cos": torch.ones(positions, half_head, dtype=self.dtype, device=device),
            "sin": torch.zeros(positions, half_head, dtype=self.dtype, device=device),
            "attention_scale": torch.ones((), dtype=self.dtype, device=device),
            "signs": signs.to(device),
        }.items():
            self.register_buffer(name, buffer, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The start of a run, the same on every device: drawn on the CPU from `seed`.

        Zero where nothing else is said.
        """
        c = self.config
        generator = torch.Generator().manual_seed(seed)
        mlp_stds = {"up": c.up_std, "down": 0.0}
        # stds of the matrices of a bank, in turns, times D ** -0.5
        uniform = {
            "qk": (c.up_std,),
            "vo": (c.up_std, c.o_std),
            "mlp": tuple(mlp_stds[name] for name in MLP_MATRICES),
        }
        normal = {"embed": c.embed_std, "value_embed": c.value_std, "lm_head": c.head_std}
        backout = 0.5 if c.backout >= 0 else 0.0
        constant = {"residual": (c.residual_start, 0.0), "value_mix": 0.5, "skip": -1.5, "backout": backout}
        bound = (3 / c.width) ** 0.5  # a uniform distribution on (-bound, bound) has the std D ** -0.5
        for name, p in self.named_parameters():
            if name in uniform:
                stds = torch.tensor(uniform[name]).repeat(len(p) // len(uniform[name]))
                drawn = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
                p.copy_(drawn * stds[:, None, None])
            elif name in normal:
                p.copy_(torch.randn(p.shape, generator=generator) * normal[name])
            else:
                p.copy_(torch.tensor(constant.get(name, 0.0)))

    def compile_parts(self, mode: str) -> None:
        """Put torch.compile around the methods that COMPILED names for "whole", "parts" or "none"."""
        self.adds_gradients &= mode != "whole"
        for name in self.COMPILED[mode]:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True))

    @torch.no_grad()
    def set_rotary(self, windows: Sequence[int]) -> None:
        """Rotary tables and softmax scale for a history of long windows (in place: nothing recompiles)."""
        frequencies, scale = rotary_frequencies(self.config, windows)
        positions = torch.arange(self.cos.size(0), dtype=torch.float64, device=self.cos.device)
        angles = positions[:, None] * frequencies.to(self.cos.device)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        self.attention_scale.fill_(scale)

    def rotate(self, x: Tensor) -> Tensor:
        """(B, T, H, d) with each pair of channels (j, j + d / 2) turned by its angle at the position."""
        cos, sin = self.cos[: x.size(1), None], self.sin[: x.size(1), None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

    # ---- the forward pass, from the outside in

    def forward(
        self, inputs: Tensor, targets: Tensor, offsets: Tensor, windows: tuple[int, int], longest: int,
        ahead: int = 0, classes: Tensor | None = None, log_counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Summed cross entropies in nats, fp32 (1 + ahead,), over the targets >= 0 of (B, T) rows.

        The first is of the targets themselves, the others of those 1, 2, ... places on in the row.
        `windows` are (short, long), `longest` bounds the length of a document. With `classes` (B, P) a row
        has no others, the targets are places among them, and `log_counts` (B, P) weigh them.
        """
        sizes = self.window_sizes(windows)
        head = None if classes is None else self.table(self.lm_head)
        sample = head, classes, log_counts
        return self.body(inputs, targets, offsets, sizes, longest, ahead, self.tables(), *sample)

    def window_sizes(self, windows: tuple[int, int]) -> Sequence:
        """(short, long) as attention takes them: numbers, or `window_size` tensors where it is fused."""
        return [window_size(w) for w in windows] if self.fused else windows

    def tables(self) -> list[Table]:
        """The tables of tokens, n-grams and value embeddings. In training each has a `.grad`, zeros at first.

        Graphs take them as arguments: torch.compile traces no graph that meets a parameter of low
        precision which has an fp32 gradient.
        """
        # while they are tied, the table is that of the head; `embed` takes over when they part
        embed = self.lm_head if self.tied else self.embed
        return [self.table(p) for p in (embed, self.ngram_embed, self.value_embed)]

    def table(self, p: nn.Parameter) -> Table:
        """A parameter as a forward pass takes it: an embedding, or the head where its classes are sampled."""
        rows, sums, read = p.detach(), None, None
        if torch.is_grad_enabled() and p.requires_grad:
            rows.requires_grad_()
            if p.grad is None:
                p.grad_dtype = torch.promote_types(p.dtype, torch.float32)
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
                # for `RowUnit`; unless its classes are sampled, the head has a gradient in each row
                if p is not self.lm_head:
                    p.grad.rows_read = torch.zeros(len(p), dtype=torch.bool, device=p.device)
            # `data`: autograd adds to the same tensor for a tied head, and so do backwards of other forward
            # passes; it would call that a change of what `Lookup` has saved
            sums, read = (None if x is None else x.data for x in (p.grad, getattr(p.grad, "rows_read", None)))
        return Table(rows, sums, read)

    def body(
        self, inputs: Tensor, targets: Tensor, offsets: Tensor, windows: Sequence, longest: int, ahead: int,
        tables: Sequence[Table], head: Table | None = None, classes: Tensor | None = None,
        log_counts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The losses of `forward`, (1 + ahead,); the graph of the mode "whole".

        `windows` are those of `window_sizes`, `tables` those of `GPT.tables`, and `head` is the table of the
        head where `classes` are sampled.
        """
        call = call_directly
        if self.low_memory and torch.is_grad_enabled():
            # Keep the inputs of each part and compute the rest again; nothing in it is random.
            call = functools.partial(recompute, use_reentrant=False, preserve_rng_state=False)
        x = self.stream(inputs, offsets, windows, longest, tables, call)  # (B, T, D)
        shifted = [F.pad(targets[:, k:], (0, k), value=-1) for k in range(1 + ahead)]
        all_targets = torch.stack(shifted, -1)  # (B, T, 1 + ahead)
        at_once = self.LOGITS_AT_ONCE[int(self.low_memory)]  # dynamo of torch 2.11 takes no bool as an index
        if classes is None:
            parts = [*zip(x.flatten(0, 1).split(at_once), all_targets.flatten(0, 1).split(at_once))]
        else:  # each row by itself, with the rows of the head that are its classes
            heads, parts = Lookup.apply(*head, classes), []  # (B, P, D)
            for row, of_row, *sample in zip(x, all_targets, heads, log_counts):
                parts += [(*part, *sample) for part in zip(row.split(at_once), of_row.split(at_once))]
        return torch.stack([call(self.loss, *part) for part in parts]).sum(0)

    def stream(
        self, inputs: Tensor, offsets: Tensor, windows: Sequence, longest: int, tables: Sequence[Table],
        call: Callable = call_directly,
    ) -> Tensor:  # fmt: skip
        """Activations (B, T, D) of tokens (B, T) before the last norm. `call` calls a block.

        `windows` are those of `GPT.window_sizes`, `tables` those of `GPT.tables`.
        """
        c, dtype = self.config, self.dtype
        layouts = self.layouts(offsets, inputs.size(1), windows, longest)
        attention_weights = self.attention_weights()
        mlps = iter(self.mlp.to(dtype).unbind(0))  # (D, hidden) each
        residuals = self.residual.to(dtype).unbind(0)  # (2,) each
        skip_weights = torch.sigmoid(self.skip).to(dtype).unbind(0)
        value_table = dict(c.value_tables)
        read_later = {source for source, _ in c.skips} | {c.backout, c.attention_source}
        outputs = {}  # of the blocks in `read_later`; none has the number -1

        x, values = self.in_training("embedding")(inputs, offsets, *tables)  # (B, T, D), (tables, B, T, D)
        values = values.unbind(0)
        x, x0 = self.shared(x)
        for i in range(c.layers):
            # skips: the outputs of earlier blocks (U-net)
            for number, (source, target) in enumerate(c.skips):
                if target == i:
                    x = self.in_training("add_earlier")(x, skip_weights[number], outputs[source].apart())
            # attention: its weights, value embedding and layout; None in blocks without
            attention = None
            if i in attention_weights:
                attention = AttentionArgs(
                    *attention_weights[i],
                    value=values[value_table[i]] if i in value_table else None,
                    layout=layouts[i in c.long_blocks, i in c.paired],
                    key_offset=i in c.key_offset,
                    paired=i in c.paired,
                )
            # the block, whose attention reads the output of `attention_source` once that is there
            attention_input = outputs[c.attention_source].apart() if c.attention_source in outputs else None
            mlp = [next(mlps) for _ in MLP_MATRICES]
            x = call(self.block, x, x0.apart(), attention_input, residuals[i], mlp, attention)
            if i in read_later:
                x, outputs[i] = self.shared(x)
        if c.backout >= 0:
            x = self.in_training("add_earlier")(x, -self.backout.to(dtype)[0], outputs[c.backout].apart())
        return x

    def in_training(self, name: str) -> Callable:
        """A method as its graph, where there is one; validation, which no clock measures, does without."""
        return getattr(self, name) if torch.is_grad_enabled() else functools.partial(getattr(GPT, name), self)

    def add_earlier(self, x: Tensor, weight: Tensor, earlier: Shared) -> Tensor:
        """x (B, T, D) with `weight` () times the output of an earlier block."""
        return torch.addcmul(x, weight, earlier.read())

    def shared(self, x: Tensor) -> tuple[Tensor, Shared]:
        """x (B, T, D), and x for all that reads it later."""
        if not self.adds_gradients or not torch.is_grad_enabled():
            # another tensor: for a block whose x is x0 dynamo would make one more graph
            return x, Shared(x.view_as(x), None)
        sums = torch.zeros_like(x)
        return Joined.apply(x, sums.data), Shared(x.detach().requires_grad_(), sums)

    def layouts(
        self, offsets: Tensor, T: int, windows: Sequence, longest: int
    ) -> dict[tuple[bool, bool], Layout]:
        """The layout of each kind of block that occurs, by (has the long window, has paired heads).

        Paired heads see a row of 2 T positions, two for each token; a window counts positions.
        """
        c, made = self.config, {}
        for long, paired in sorted({(i in c.long_blocks, i in c.paired) for i in self.attention_blocks}):
            times, window = 2 if paired else 1, windows[int(long)]
            if self.fused:
                made[long, paired] = fused_layout(times * offsets, times * T, window, times * longest)
            else:
                made[long, paired] = self.make_layout(times * offsets, times * T, window)
        return made

    def attention_weights(self) -> dict[int, tuple[Tensor | None, ...]]:
        """The first five fields of `AttentionArgs` for each block with attention, by its number."""
        c, dtype, A, D = self.config, self.dtype, len(self.attention_blocks), self.config.width
        qkvo = torch.cat([bank.to(dtype).view(A, 2 * D, D) for bank in (self.qk, self.vo)], 1)  # (A, 4 D, D)
        banks = [qkvo, *(bank.to(dtype) for bank in (self.gate, self.value_mix, self.value_gate, self.xsa))]
        slices = [bank.unbind(0) if len(bank) else [None] * A for bank in banks]
        weights = {}
        for i, (*others, xsa) in zip(self.attention_blocks, zip(*slices)):
            weights[i] = (*others, xsa if i in c.xsa else None)
        return weights

    def embedding(
        self, inputs: Tensor, offsets: Tensor, embed: Table, ngram_embed: Table, value_embed: Table
    ) -> tuple[Tensor, Tensor]:
        """First activations (B, T, D) and value embeddings (tables, B, T, D) of tokens (B, T)."""
        c, dtype = self.config, self.dtype
        starts = document_starts(offsets, inputs.size(1))
        x = Lookup.apply(*embed, inputs).to(dtype)
        # the last tokens, and what followed them before
        if c.ngrams or c.matches:
            x = x + self.ngrams(inputs, starts, ngram_embed).to(dtype)
        # smear: a gated part of the token before, in its document (#34)
        gate = torch.sigmoid(F.linear(x[..., : c.gate_inputs], self.smear_gate.to(dtype)))
        weight = ~starts[..., None] * self.smear * gate
        x = norm(x + weight.to(dtype) * x.roll(1, 1))
        # value embeddings: all tables at once; each begins padded_vocab rows after the one before
        first_rows = torch.arange(0, len(value_embed.rows), c.padded_vocab, device=inputs.device)
        return x, Lookup.apply(*value_embed, inputs + first_rows[:, None, None]).to(dtype)

    def ngrams(self, inputs: Tensor, starts: Tensor, table: Table) -> Tensor:
        """What the last tokens are and what followed them before: sums of rows of the `table`, (B, T, D)."""
        c = self.config
        document = starts.cumsum(1)  # (B, T), its number in the row
        # n-grams: a row for each length; long ones are seldom met again, so that those share a row
        # which are alike once they are folded
        texts = torch.stack([inputs, fold_bytes(inputs)] if c.ngram_fold else [inputs])
        longest = max(*c.matches, *(n for n, _ in c.ngrams), 1, 1)
        keys = ngram_keys(texts, document.expand_as(texts), longest)  # of the last 1, 2, ... tokens
        hashed_keys = [keys[n - 1][int(0 < c.ngram_fold <= n)] for n, _ in c.ngrams]
        rows = ngram_rows(hashed_keys, [count for _, count in c.ngrams])
        # matches: what followed, however far back it is; their tables lie behind those of the n-grams
        if c.matches:
            matched = match_rows(inputs, [keys[n - 1][0] for n in c.matches], document, c.padded_vocab)
            rows += [*(matched + sum(count for _, count in c.ngrams))]
        # n-grams that share a row by chance differ in their signs (#83)
        patterns = None
        if c.ngrams and c.ngram_signs:
            patterns = sign_pattern(torch.stack(hashed_keys, -1), c.ngram_signs)  # (B, T, tables of n-grams)
        return SumOfRows.apply(*table, torch.stack(rows, -1), patterns, self.signs)

    def block(
        self, x: Tensor, x0: Shared, attention_input: Shared | None, residual: Tensor,
        mlp: Sequence[Tensor], attention: AttentionArgs | None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, D) through a block; its attention reads `attention_input` where that is given, else x."""
        x = residual[0] * x + residual[1] * x0.read()
        if attention is not None:
            attended = x if attention_input is None else attention_input.read()
            x = x + self.attention(norm(attended), attention)
        return x + self.feed_forward(x, mlp)

    def feed_forward(self, x: Tensor, mlp: Sequence[Tensor]) -> Tensor:
        """(B, T, D) -> (B, T, D) with two matrices (D, hidden): up as (in, out), down as (out, in)."""
        up, down = mlp
        return F.linear(relu_squared(norm(x) @ up), down)

    def attention(self, x: Tensor, args: AttentionArgs) -> Tensor:
        """(B, T, D) -> (B, T, D); x is normed."""
        B, T, D = x.shape
        H = self.config.heads
        q, k, v = F.linear(x, args.qkvo[: 3 * D]).view(B, T, 3 * H, -1).chunk(3, 2)  # (B, T, H, d) each
        v = self.mix_value(x, v, args)
        q, k = norm(q), norm(k)
        # paired heads: h and h + H / 2 become one head, whose positions 2 t and 2 t + 1 are theirs at t (#58)
        attended = v
        if args.paired:
            q, k, attended = (z.reshape(B, 2 * T, H // 2, -1) for z in (q, k, v))
        # positions; the softmax scale goes into q
        q, k = self.rotate(q) * self.attention_scale, self.rotate(k)
        # key offset: the channels that do not turn are those of the position before, so that a query that
        # looks for a token finds the token after it (#49); of paired heads that is the other head's position
        if args.key_offset:
            d = k.size(-1)
            still = torch.arange(d, device=k.device) % (d // 2) >= turning_pairs(self.config)
            k = torch.where(still & ~args.layout.starts[..., None, None], k.roll(1, 1), k)
        y = attend(q, k, attended, args.layout).reshape(B, T, H, -1)
        # exclusive self-attention: a share of the component along the position's own value is removed (#82)
        if args.xsa is not None:
            along = torch.tanh(args.xsa)[:, None] * (y * v).sum(-1, True)  # (B, T, H, 1)
            y = y - along / v.square().sum(-1, True).clamp_min(1e-8) * v
        # a gate for each head, then the projection back to the stream
        y = y * torch.sigmoid(F.linear(x[..., : args.gate.size(-1)], args.gate))[..., None]
        return F.linear(y.reshape(B, T, D), args.qkvo[3 * D :])

    def mix_value(self, x: Tensor, v: Tensor, args: AttentionArgs) -> Tensor:
        """v (B, T, H, d) times its factor, and the value embedding with its gate where the block has one."""
        v = args.value_mix[0] * v
        if args.value is None:
            return v
        weight = args.value_mix[1]
        if args.value_gate is not None:  # of the leading channels of x and of the value embedding (#55)
            n = args.value_gate.size(-1) // 2
            gate_input = torch.cat([x[..., :n], args.value[..., :n]], -1)
            weight = 2 * weight * torch.sigmoid(F.linear(gate_input, args.value_gate))[..., None]
        return v + weight * args.value.view_as(v)

    def logits(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        """(n, V) fp32 of activations (n, D), with the rows that pad the vocabulary. Validation has no FP8.

        (n, P) with a `head` (P, D) of its own.
        """
        A, B, C = self.config.softcap
        x, head = norm(x), self.lm_head if head is None else head
        if self.fp8 and torch.is_grad_enabled():
            logits = FP8Linear.apply(x, head, self.config.fp8_head)
        else:
            logits = F.linear(x, head.to(self.dtype))
        return A * torch.sigmoid((logits.float() + B) / C)

    def loss(
        self, x: Tensor, targets: Tensor, head: Tensor | None = None, log_counts: Tensor | None = None
    ) -> Tensor:
        """Summed cross entropies (K,) in nats, fp32, of activations (n, D) and targets (n, K), -1 for none.

        Where training samples P classes (sampled softmax), a `head` (P, D) stands for `lm_head`,
        and a class counts exp(log_counts) times in the softmax, `log_counts` (P,); targets count
        once.

        This is the training loss AND the validation loss, on which the claim of a record rests. A term that
        only training minimises (z-loss, say) stands behind `torch.is_grad_enabled()`, as FP8 does in
        `logits`; the test `test_validation_loss_is_the_plain_cross_entropy` fails when it does not.
        """
        z = self.logits(x, head)  # (n, V), or (n, P) of sampled classes
        if one_by_one(z):  # torch's kernels, of one pass each
            if log_counts is None:
                log_chances = F.log_softmax(z, -1)
            else:
                log_chances = F.log_softmax(z + log_counts, -1) - log_counts
            sums = [F.nll_loss(log_chances, t.long(), ignore_index=-1, reduction="sum") for t in targets.mT]
            return torch.stack(sums)
        # A sum over classes picks the logit of the target: the backward of a gather would first write
        # zeros of the size of z.
        classes = torch.arange(z.size(1), device=z.device)
        target_logits = []
        for target in targets.unbind(1):
            target_logits.append(torch.where(classes == target[:, None], z, 0.0).sum(1))
        if log_counts is not None:
            z = z + log_counts
        losses = z.logsumexp(-1, True) - torch.stack(target_logits, 1)  # (n, K)
        return (losses * (targets >= 0)).sum(0)


# ----------------------------------------------------------------------------------------------------
# 5. Optimizer
#
# `MuonEq` updates matrices by Muon and its relatives and everything else by Adam. One matrix W (m, n)
# with gradient G, in nine lines:
#
#     M = mu M + (1 - mu) G                      `blended`: momentum
#     U = mu M + (1 - mu) G                      Nesterov: the gradient once more
#     r = row sums of U * U                      `direction`: MuonEq, balance the rows (or the columns) ...
#     U = U / sqrt(r)                            ... before they are orthogonalised
#     X = U / (1.02 ||U||)                       singular values between 0 and 1
#     X = a X + (b X X' + c (X X')^2) X          Polar Express: five times, towards singular values of 1
#     X = X / sqrt(running mean square)          `update_matrices`: NorMuon, by rows or columns, norm restored
#     W = W - lr decay W
#     W = W - lr sqrt(max(1, m / n)) X
#
# Balance has more modes than this one ("row"): "rowcol" divides by the sums of rows and of columns,
# "both" balances weakly by running means of them, before the polynomial and again after it
# (`balance_factors`). To change the update read `Unit.update_matrices`, which does it for a stack
# of matrices, and what it calls; its reference, in float64, is `matrix_reference` in
# tests/test_optimizer.py.
#
# The matrices of one shape in a group are one `Unit`: a stack (S, m, n), padded to N equal chunks,
# one for each rank. For Adam a large parameter is a unit, and so are all small ones of a group. Of
# the track `short` on 8 ranks, for example:
#
#     bank       matrices       chunk of a rank   padded to
#     qk         42 x 256 x 768         6             48
#     vo         14 x 768 x 768         2             16
#     mlp        20 x 768 x 2816        3             24
#     lm_head    38,633,472 numbers     4,829,184     -      (Adam: a stack of single numbers)
#
# A step has three phases, each over all units, so that communication runs beside arithmetic:
#     reduce   gradients are summed over ranks, each rank receives the chunk that it owns (reduce_scatter);
#     update   each rank updates its chunk, with the state that only it holds;
#     gather   the new weights of all chunks go to all ranks (all_gather).
# Units are updated in one order, those of Adam before matrices and small before large, and reduced
# in the reverse one: the large transfers begin first. New weights travel while the next units are
# updated, so that those of Adam hide behind the products of matrices. NCCL does one transfer after
# the other: over it the first update waits for all sums. With one process nothing is sent.
#
# There are four kinds of units. `Unit` is described above. A row-wise table is a `RowUnit`: only
# rows that were read are sent and updated. Of DTensors, as FSDP2 makes them, `Shards` updates what
# a rank holds, and `ShardedMatrices` has an owner for each matrix that is cut into rows.
# ----------------------------------------------------------------------------------------------------

TINY_NUMBER = 1e-30  # guards divisions; a zero matrix stays exactly zero
# Adam clamps gradients to this size: the square of a larger one could be infinite, and nothing moves then.
LARGEST_TO_SQUARE = 1e18


class Comm:
    """The collectives of a step. With one process the buffers are passed through.

    The asynchronous ones return work to `wait()` for. `calls` counts them, and the forward passes: signs of
    life for `watch`. A copy of an optimizer has the same one.
    """

    DONE = types.SimpleNamespace(wait=lambda: None)  # work that is done

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.group = process_group  # None: all processes
        distributed = dist.is_initialized()
        self.rank = dist.get_rank(process_group) if distributed else 0
        self.world_size = dist.get_world_size(process_group) if distributed else 1
        if self.rank < 0:
            raise ValueError("this process is not in the process_group of the optimizer")
        self.calls = 0
        self.along: dict[Any, Comm] = {}  # the processes that share DTensors, see `comm_along`
        self.duties = [0] * self.world_size  # numbers of such matrices that each of them updates
        # torch 2.13 renamed the tensor collectives, 2.11 has only the old names.
        renamed = hasattr(dist, "reduce_scatter_single")
        self._scatter = getattr(dist, "reduce_scatter_single" if renamed else "reduce_scatter_tensor", None)
        self._gather = getattr(dist, "all_gather_single" if renamed else "all_gather_into_tensor", None)

    def __deepcopy__(self, memo: dict) -> Comm:
        return self

    def __reduce__(self) -> tuple:
        if self.group is not None:
            raise TypeError(
                "an optimizer with a process_group or DTensors cannot be pickled, its state_dict can"
            )
        return Comm, ()  # of the processes that read it

    def reduce_scatter(self, full: Tensor) -> tuple[Tensor, Any]:
        """(N C, ...) -> this rank's (C, ...) of the sum over ranks, and the work to wait for."""
        self.calls += 1
        if self.world_size == 1:
            return full, self.DONE
        chunk = full.new_empty(full.size(0) // self.world_size, *full.shape[1:])
        return chunk, self._scatter(chunk, full, group=self.group, async_op=True)

    def all_gather(self, full: Tensor, chunk: Tensor) -> Any:
        """Chunks (C, ...) of all ranks -> full (N C, ...), and the work to wait for.

        The chunk may lie inside `full`.
        """
        self.calls += 1
        if self.world_size == 1:
            if full.data_ptr() != chunk.data_ptr():
                full.copy_(chunk)
            return self.DONE
        return self._gather(full, chunk, group=self.group, async_op=True)

    def all_to_all(self, sent: Tensor, counts: list[int], arrive: list[int]) -> tuple[Tensor, Any]:
        """Rows (R, ...), `counts` of them for each rank -> those that `arrive` from each, and the work."""
        self.calls += 1
        received = sent.new_empty(sum(arrive), *sent.shape[1:])
        exchange = dist.all_to_all_single
        return received, exchange(received, sent, arrive, counts, group=self.group, async_op=True)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum, or another reduction, over ranks, in place."""
        self.calls += 1
        if self.world_size > 1:
            dist.all_reduce(x, op, group=self.group)
        return x

    def all_gather_object(self, x: Any) -> list[Any]:
        """What each rank has."""
        found = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, x, group=self.group)
        return found


def largest(x: Tensor) -> Tensor:
    """The largest absolute value of each matrix (K, m, n), as (K, 1, 1)."""
    if x.is_cuda:  # a graph reads x once for it
        return x.abs().amax((-2, -1), keepdim=True)
    # abs().amax() and the norm of order inf take a CPU several times as long
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def sums_of_squares(x: Tensor, dim: int) -> Tensor:
    """Of each row (dim -1: (K, m, 1)) or column (dim -2: (K, 1, n)) of x (K, m, n)."""
    # a norm over columns takes a CPU ten times as long, with ten times the error
    if dim == -2 and not x.is_cuda:
        return x.square().sum(-2, keepdim=True)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).square()


def has_gradient(grad: Tensor, sums: Tensor) -> Tensor:
    """Which matrices of `grad` (K, m, n) are not zero: (K, 1, 1). `sums` are the sums of their numbers."""
    alive = sums != 0
    # a sum of zero says nothing; asking a GPU would take longer than looking
    if grad.is_cuda or not alive.all():
        alive |= largest(grad) != 0
    return alive


def power_of_two(x: Tensor, alive: Tensor) -> Tensor | float:
    """A factor for each matrix of x (K, m, n) with which squares of its numbers neither overflow nor vanish.

    The product is exact. It is 1 for the usual sizes, and 0 for what is not `alive`.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    in_range = (norm > 2.0**-30) & (norm < 2.0**30)
    if not x.is_cuda and (alive & in_range).all():
        return 1.0
    size = largest(x).clamp_min(torch.finfo(x.dtype).tiny)
    return (torch.frexp(size).mantissa / size).masked_fill_(in_range, 1.0) * alive


def where_alive(alive: Tensor, value: float, otherwise: float, dtype: torch.dtype) -> Tensor | float:
    """`value` for each matrix that is `alive` (K, 1, 1), another for the rest; a number where all are."""
    # a CPU multiplies by a number in two thirds of the time that a tensor takes it
    if not alive.is_cuda and alive.all():
        return value
    return torch.full_like(alive, otherwise, dtype=dtype).masked_fill_(alive, value)


def equilibrate(u: Tensor, mode: str, exponent: float = -0.5) -> Tensor:
    """MuonEq (2603.28254): scale rows and / or columns of u (K, m, n) by their sums of squares.

    The factor is the sum to the power `exponent`. Both sums of "rowcol" come from the same u. 1e-8
    of their mean is added to the sums: with exponent -1/2 the scale of u has no effect ("row",
    "col") or the inverse one ("rowcol", and what follows divides by the norm).
    """
    dims = {"none": (), "row": (-1,), "col": (-2,), "rowcol": (-1, -2)}[mode]
    sums = [sums_of_squares(u, dim) for dim in dims]
    for x in sums:  # (K, m, 1) of rows, (K, 1, n) of columns
        floor = 1e-8 * x.mean((-2, -1), keepdim=True) + TINY_NUMBER
        u = u * (x + floor).pow(exponent)
    return u


def balance_factors(
    u: Tensor, norms: Sequence[Tensor], power: Tensor | float, alive: Tensor
) -> list[Tensor]:
    """The two-sided balance: factors (K, m, 1) of the rows and (K, 1, n) of the columns of u (K, m, n).

    With the energy e of a row or column and e' the geometric mean of all rows or columns, the factors are
    B^-1/2 and A^-1/2, where B and A are (e / e')^0.25 within [1/2, 2]; `balance_again` has the rest:

        D = B^-1/2 polar(B^-1/2 U A^-1/2) A^-1/2, in the size of the polar factor

    (the public speedrun's IsoMuon with the energy of the update in place of the noise of the
    gradient). An energy is the running mean, decay 0.95, of the sums of squares of u without
    `power`: of the momentum, blended with the gradient where `nesterov` says so. `norms`, (K, m, 1)
    and (K, 1, n), are their roots, updated in place where `alive` is true. The means begin at zero;
    a correction for it, as Adam has, would be one factor for all rows, which e / e' does not see.

    A row or column that has always been zero does not count in e', and stays zero.
    """
    factors = []
    for norm, dim in zip(norms, (-1, -2)):
        now = sums_of_squares(u, dim).sqrt()
        # roots, because squares could overflow; where `power` is 0, so is u
        now = torch.where(now > 0, now / power, now)
        kept = norm * where_alive(alive, 0.95**0.5, 1.0, norm.dtype)
        norm.copy_(torch.hypot(kept, now * 0.05**0.5))
        # logarithms to base 2 beside the largest: a power of two in all norms changes no bit
        mantissa, exponent = torch.frexp(norm)
        logs = mantissa.log2() + (exponent - exponent.amax((-2, -1), keepdim=True))
        logs = logs.masked_fill_(norm == 0, 0.0)
        count = (norm != 0).sum((-2, -1), keepdim=True)
        mean = logs.sum((-2, -1), keepdim=True) / count.clamp_min(1)
        # (norm^2)^(0.25 * -1/2), within the roots of [1/2, 2]
        factors.append(torch.exp2((mean - logs) / 4).clamp(0.5**0.5, 2**0.5))
    return factors


def balance_again(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The polar factor x (K, m, n) scaled on both sides in fp32, with the Frobenius norm that it had."""
    rows, columns = factors
    before = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=rows.dtype)
    x = x.to(rows.dtype, copy=True).mul_(rows).mul_(columns)
    after = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x.mul_(before / after.clamp_min(TINY_NUMBER))


class Polynomial(NamedTuple):
    """An iteration x -> a x + (b g + c g^2) x with g = x xT, which moves singular values towards 1."""

    margin: float  # by which the bound of the largest singular value is enlarged before the first iteration
    first: tuple[tuple[float, float, float], ...]  # (a, b, c) of the first iterations
    then: tuple[float, float, float]  # (a, b, c) of all further ones


# A function (K, m, n) -> (K, m, n) is an entry too: that is where an optimizer of your own goes.
ORTHOGONALIZERS: dict[str, Polynomial | Callable[[Tensor], Tensor]] = {
    "polar_express": Polynomial(  # 2505.16932: 5 iterations, safety 2e-2
        margin=1.02,
        first=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        then=(1.875, -1.25, 0.375),
    ),
    "newton_schulz": Polynomial(margin=1.0, first=(), then=(3.4445, -4.7750, 2.0315)),  # KellerJordan/Muon
}


def orthogonalize(
    x: Tensor, method: str | Callable = "polar_express", steps: int = 5, norm_bound: str = "frobenius",
    work_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Nearest (semi-)orthogonal matrices to x (K, m, n), approximately, in `work_dtype`.

    x is divided by an upper bound of its largest singular value, its Frobenius norm or, tighter,
    the Schatten-8 norm ||(x xT)^2||_F^(1/4) ("spc"), and goes through the `Polynomial` of the
    method `steps` times: the last ones of its list where it has more. A method that is a function
    gets x in `work_dtype` as it is.
    """
    method = ORTHOGONALIZERS.get(method, method)
    if callable(method):
        return method(x.to(work_dtype))
    method = Polynomial(*method)  # a plain tuple is welcome too
    missing = max(0, steps - len(method.first))
    triples = (*method.first, *[method.then] * missing)[-steps:]
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(TINY_NUMBER)
    divisor = size if norm_bound == "spc" else size * method.margin
    x = torch.div(x, divisor, out=torch.empty_like(x, dtype=work_dtype))
    wide = x.size(-2) <= x.size(-1)
    single = len(x) == 1  # a CPU is slow with a batch of one matrix
    x = x[0] if single else x
    multiply_add = torch.addmm if single else torch.baddbmm
    for i, (a, b, c) in enumerate(triples):
        gram = x @ x.mT if wide else x.mT @ x  # the smaller of the two
        if norm_bound == "spc" and i == 0:
            # The tighter bound comes from products that the first iteration needs anyway.
            square = gram @ gram
            norms = torch.linalg.vector_norm(square.float(), dim=(-2, -1), keepdim=True)
            bound = norms.clamp_min(TINY_NUMBER) ** 0.25 * method.margin
            x = (x / bound).to(work_dtype)
            polynomial = (b * (gram / bound**2) + c * (square / bound**4)).to(work_dtype)
        else:
            polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a) if wide else multiply_add(x, x, polynomial, beta=a)
    return x[None] if single else x


def normuon_factor(update: Tensor, second_moment: Tensor, beta2: float, alive: Tensor) -> Tensor:
    """NorMuon (2510.05491): factor per row or column of `update` (K, m, n) that keeps each Frobenius norm.

    `second_moment` (K, m, 1) or (K, 1, n) is the running mean square, updated in place before use, where
    `alive` (K, 1, 1) is true.
    """
    dim = -1 if second_moment.size(-1) == 1 else -2
    length = update.size(dim)
    mean_square = sums_of_squares(update.to(second_moment.dtype), dim) / length
    second_moment.lerp_(mean_square, where_alive(alive, 1 - beta2, 0.0, mean_square.dtype))
    factor = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = (length * mean_square.sum((-2, -1), keepdim=True)).sqrt()
    norm_after = (length * (mean_square * factor.square()).sum((-2, -1), keepdim=True)).sqrt()
    return factor * (norm_before / norm_after.clamp_min(1e-10))


def add_scaled(x: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
    """x + factor * y, in place; shapes as one, the factor a number or, in a graph, a tensor ()."""
    return x.add_(y, alpha=factor) if isinstance(factor, float) else x.add_(y * factor)


def changed_bits(master: Tensor, weights: Tensor) -> Tensor:
    """Integers, not zero where the fp32 `master` copy does not round to weights of 1 or 2 bytes.

    All have one shape. Bits are compared: a weight of -0 is another one than 0.
    """
    # of integers this takes a CPU a tenth of the time that a comparison takes
    bits = {1: torch.int8, 2: torch.int16}[weights.dtype.itemsize]
    return master.to(weights.dtype).view(bits) ^ weights.view(bits)


def followed(master: Tensor, stored: Tensor) -> Tensor:
    """The fp32 `master` copy, but `stored` weights of low precision where others have changed them.

    All have one shape. A change that rounding hides is not seen.
    """
    return torch.where(changed_bits(master, stored) == 0, master, stored)


class StepNumbers(NamedTuple):
    """What changes from step to step in an update; in a graph tensors of no dimension."""

    # on the gradient: 1 / targets since the last update; with grads="mean" 1 / steps
    scale: Tensor | float
    lr: Tensor | float  # of the group
    momentum: Tensor | float  # of matrices
    decay: Tensor | float  # lr * weight_decay


class Member(NamedTuple):
    """A parameter of a unit."""

    name: str
    param: Tensor  # (m, n) or (K, m, n); any shape for Adam
    lr_mul: list[float]  # factor on the learning rate of each of its matrices


class Unit:
    """Parameters that are updated as one stack, and this rank's chunk of the state.

    The stack (S, *tail) has one entry per matrix (tail (m, n)) or per number (tail ()). It is padded with
    zeros to N equal chunks (C, *tail); rank r owns entries [r C, (r + 1) C). State is fp32, and fp64 for
    parameters in fp64.
    """

    # numbers that a CPU updates at a time: a core keeps them and what is made of them in its cache
    SLICE = {"matrix": 2**19, "adam": 2**17}
    STATE = (  # the tensors of `state`
        "momentum", "second_moment", "row_norm", "col_norm", "exp_avg", "exp_avg_sq", "master",
    )  # fmt: skip

    # ---- division and state

    def __init__(self, group: dict, members: Sequence[Member], comm: Comm):
        """Divide the members over the processes of `comm`, and make their state.

        They have one dtype and device, matrices (m, n) or (K, m, n) also one (m, n). The settings in `group`
        are read at every step.
        """
        self.group, self.comm = group, comm
        self.group_number = 0  # its place in `param_groups`
        self.words: list[Any] = []  # the settings that are no numbers, as they were checked last
        self.names = [member.name for member in members]
        self.params = [member.param for member in members]
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        # of gradients, state and arithmetic
        self.precision = torch.promote_types(self.dtype, torch.float32)
        self.matrix = group["kind"] == "matrix"
        self.tail = self.entry_shape()
        self.divide()
        self.lr_mul = self.chunk_of_factors([factor for member in members for factor in member.lr_mul])
        self.updates = torch.zeros(len(members), dtype=torch.int64)  # of each parameter
        self.state = {}
        for key, shape in self.state_shapes().items():
            self.state[key] = torch.zeros(shape, dtype=self.precision, device=self.device)
        self.reset()

    def entry_shape(self) -> torch.Size:
        """The tail of the stack: (m, n) for matrices, () for numbers."""
        return self.params[0].shape[-2:] if self.matrix else torch.Size()

    def divide(self) -> None:
        """The stack and this rank's chunk of it."""
        comm, held = self.comm, self.held()
        self.counts = [x.numel() // self.tail.numel() for x in held]  # entries of each parameter
        self.size = sum(self.counts)
        self.chunk = -(-self.size // comm.world_size)
        self.padding = self.chunk * comm.world_size - self.size
        self.own = slice(comm.rank * self.chunk, (comm.rank + 1) * self.chunk)
        # one unpadded parameter: its stack is a view of it, so gradients and weights travel from and to its
        # own storage
        self.direct = len(held) == 1 and self.padding == 0 and held[0].is_contiguous()
        # of each parameter the part that lies in the chunk
        borders = np.cumsum([0, *self.counts]).clip(self.own.start, self.own.stop) - self.own.start
        self.parts = [slice(*pair) for pair in itertools.pairwise(borders.tolist())]

    def held(self) -> list[Tensor]:
        """What this rank holds of each parameter: all of it."""
        return self.params

    def chunk_of_factors(self, factors: list[float]) -> float | Tensor:
        """The factors on the learning rate of this rank's matrices, (C, 1, 1); one number for equal ones."""
        if len(set(factors)) == 1:
            return factors[0]
        stack = torch.tensor(factors, dtype=self.precision, device=self.device)
        return F.pad(stack, (0, self.padding))[self.own, None, None]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each state of the chunk that the group's settings need, by its name in STATE."""
        shapes = {}
        for key in ("momentum",) if self.matrix else ("exp_avg", "exp_avg_sq"):
            shapes[key] = (self.chunk, *self.tail)
        if self.group.get("normuon"):
            (m, n), axis = self.tail, self.group["normuon_axis"]
            by_row = axis == "row" or (axis == "auto" and m >= n)
            shapes["second_moment"] = (self.chunk, m, 1) if by_row else (self.chunk, 1, n)
        if self.group.get("equilibrate") == "both":
            m, n = self.tail
            shapes |= {"row_norm": (self.chunk, m, 1), "col_norm": (self.chunk, 1, n)}
        if self.dtype != self.precision:
            shapes["master"] = (self.chunk, *self.tail)
        return shapes

    def reset(self) -> None:
        """State as at the start; the master copy is that of the parameters now."""
        self.updates.zero_()
        self.tokens = 0  # of the steps since the last update; with grads="mean" the number of these steps
        # the first step with a gradient that is not finite
        self.bad_since = torch.full((), math.inf, device=self.device)
        for key, value in self.state.items():
            if key == "master":
                self.load(key, self.params)
            else:
                value.zero_()

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The padded stack of one tensor per parameter, or of one state of each; of a direct unit a view."""
        # (m, n) or (K, m, n) -> (K, m, n), state (K, m, 1) likewise; for Adam any shape -> (S,)
        first = tensors[0]
        entry = first.shape[first.ndim - len(self.tail) :]
        if self.direct:
            return first.detach().reshape(-1, *entry)
        # matrices of one kind are joined as they are: with a thousand small ones, each call counts
        if not self.matrix or any(t.ndim != first.ndim for t in tensors):
            tensors = [t.reshape(-1, *entry) for t in tensors]
        zeros = first.new_zeros(self.padding, *entry).reshape(-1, *tensors[0].shape[1:])
        return torch.cat([*tensors, zeros]).detach().reshape(-1, *entry)

    def unstack(self, full: Tensor) -> Sequence[Tensor]:
        """The part of each parameter in a stack or a stacked state (N C, ...)."""
        return full[: self.size].split(self.counts)

    def views(self) -> list[dict[str, Tensor]]:
        """What this rank holds of the state of each parameter, as `optimizer.state` shows it.

        A parameter of which it holds all entries has states of its shape.
        """
        found = []
        for p, part, updates in zip(self.params, self.parts, self.updates):
            views: dict[str, Tensor] = {"updates": updates}
            for key, chunk in self.state.items():
                views[key] = chunk[part]
                shape = self.shape_of(p, key)
                if views[key].numel() == shape.numel():
                    views[key] = views[key].view(shape)
            found.append(views)
        return found

    def shape_of(self, p: Tensor, key: str) -> torch.Size:
        """The shape that a state has in `state_dict`: that of the parameter, or (.., m, 1) of NorMuon."""
        return p.shape[: p.ndim - len(self.tail)] + self.state[key].shape[1:]

    # ---- the step, in the order of its calls: reduce; update: count_updates, then update_chunk (for each
    # slice update_matrices or update_elements) or, on a GPU, update_compiled; send; receive; note_bad

    def reduce(self, summed: bool) -> tuple[Any, Tensor, Any]:
        """Begin to reduce: what is sent, the owned chunk (C, *tail) of the gradients, and the work.

        Gradients that are not to be `summed` over ranks are not sent. What is sent must live until the work
        is done, and the chunk is complete only then. ValueError from `check_gradients`.
        """
        full = self.gradients()
        chunk, work = self.comm.reduce_scatter(full) if summed else (full[self.own], Comm.DONE)
        return full, chunk, work

    def gradients(self) -> Tensor:
        """The stack of the gradients; zeros for those that are missing, which `missing` lists."""
        grads = [p.grad if p.requires_grad else None for p in self.params]
        self.check_gradients(grads)
        # frozen, or None
        self.missing = [i for i, grad in enumerate(grads) if grad is None]
        for i in self.missing:
            grads[i] = torch.zeros_like(self.params[i], dtype=self.precision)
        return self.stack(grads).to(self.precision)

    def check_gradients(self, grads: list[Tensor | None]) -> None:
        """ValueError for what cannot be updated."""
        # mostly nothing is wrong
        dtypes = {p.dtype for p in self.params}
        layouts = {grad.layout for grad in grads if grad is not None}
        if dtypes == {self.dtype} and layouts <= {torch.strided}:
            return
        for name, p, grad in zip(self.names, self.params, grads):
            if p.dtype != self.dtype:
                raise ValueError(
                    f"parameter {name!r} is {p.dtype} now and was {self.dtype} when the optimizer was made"
                )
            if grad is not None and grad.layout != torch.strided:
                raise ValueError(f"the gradient of parameter {name!r} is sparse; MuonEq takes dense ones")

    def update(self, grad: Tensor, scale: float, compiled: bool) -> tuple[Tensor, Tensor, tuple | None]:
        """Update the owned chunk with `grad` (C, *tail) times `scale`, see `StepNumbers`.

        Returns the stack, the chunk of new weights, which may lie in it, and with `compiled` for matrices the
        job that `update_together` still has to do.
        """
        full = self.stack(self.params)  # a copy, or the parameter itself where the unit is direct
        stored = full[self.own]  # the chunk of the parameters
        weights = self.state.get("master", stored)  # fp32, changed in place
        skipped, spans = self.count_updates(grad)
        if compiled and not skipped and len(spans) == 1 and self.fits_graph(stored):
            job = self.update_compiled(stored, weights, grad, scale, spans[0][2])
            return full, stored, job
        if "master" in self.state:
            self.take_over(stored)
        self.update_chunk(weights, grad, scale, skipped, spans)
        return full, weights.to(self.dtype), None

    def count_updates(self, grad: Tensor) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Count an update of each parameter that is not skipped; returns those that are, and the `spans`."""
        skipped = self.skipped(grad)
        self.updates += 1
        self.updates[skipped] -= 1
        return skipped, self.spans(skipped)

    def skipped(self, grad: Tensor) -> list[int]:
        """The parameters that are left alone in this step: those without a gradient, on any rank.

        Where a gradient is missing only here, the sum over ranks that has arrived, `grad`, is not zero.
        """
        skipped = []
        for i in self.missing:
            alone = self.comm.world_size == 1 or not self.params[i].requires_grad
            if alone or not grad[self.parts[i]].any():
                skipped.append(i)
        return skipped

    def spans(self, skipped: list[int]) -> list[tuple[int, int, int]]:
        """(begin, end, updates) of the runs of the chunk that have been updated equally often: mostly one.

        What is skipped belongs to its neighbours' run, so that the rest is computed in the same places.
        """
        counts = self.updates.tolist()
        # mostly one span
        if not skipped and len(set(counts)) == 1:
            return [(0, self.chunk, counts[0])]
        spans: list[tuple[int, int, int]] = []
        for i, (part, updates) in enumerate(zip(self.parts, counts)):
            if i in skipped or part.start == part.stop:
                continue
            begin = spans[-1][1] if spans else 0
            if spans and spans[-1][2] == updates:
                begin = spans.pop()[0]
            spans.append((begin, part.stop, updates))
        if spans:
            spans[-1] = (spans[-1][0], self.chunk, spans[-1][2])
        return spans

    def update_chunk(
        self, weights: Tensor, grad: Tensor, scale: float, skipped: list[int],
        spans: list[tuple[int, int, int]],
    ) -> None:  # fmt: skip
        """Update weights (C, *tail) and state in place."""
        self.sums = self.sum(grad)
        # what is skipped inside a span would go on by its moments, or decay
        kept = []
        if spans:
            # a zero gradient leaves the state of a matrix alone
            state = () if self.matrix else self.state.values()
            parts = [x[self.parts[i]] for i in skipped for x in (weights, *state)]
            kept = [(part, part.clone()) for part in parts]
        numbers_at_a_time = self.SLICE[self.group["kind"]]
        size = self.chunk if weights.is_cuda else max(1, numbers_at_a_time // self.tail.numel())
        update = self.update_matrices if self.matrix else self.update_elements
        numbers = self.numbers(scale)
        for begin, end, updates in spans:
            for first in range(begin, end, size):
                self.part = part = slice(first, min(first + size, end))  # of the chunk
                state = {key: value[part] for key, value in self.state.items()}
                update(weights[part], grad[part], numbers, state, updates)
        for part, before in kept:
            part.copy_(before)

    def numbers(self, scale: float) -> StepNumbers:
        """The numbers of a step as floats, from the group as it is now."""
        lr, momentum = float(self.group["lr"]), float(self.group.get("momentum", 0.0))
        return StepNumbers(scale, lr, momentum, lr * self.group["weight_decay"])

    def sum(self, grad: Tensor) -> Tensor:
        """The sum of each matrix of the chunk, (C, 1, 1), or of all its numbers, (): whether all are finite.

        Finite gradients with a sum beyond fp32 count as not finite too, in `bad_since`.
        """
        # a largest absolute value takes a CPU 40 times as long
        return grad.sum((-2, -1), keepdim=True) if self.matrix else grad.sum()

    def update_matrices(
        self, weights: Tensor, grad: Tensor, numbers: StepNumbers, state: dict, updates: int
    ) -> None:
        """Muon with its relatives, as at the head of this section, for a slice of the chunk.

        Weights and `grad` (c, m, n) and the `state` are those of the slice `self.part`; weights and state are
        changed in place. Padding is matrices of zeros, which must stay zero. `updates` counts this one too.

        At an owner under FSDP2 weights are zeros: what is added to them is sent to those who hold the rows.
        On a CUDA GPU, where `fits_graph` allows it, this is traced as a whole: numbers are tensors, `updates`
        is 0, and nothing is read on the host.
        """
        group, (m, n) = self.group, self.tail
        lr = numbers.lr * (self.lr_mul if isinstance(self.lr_mul, float) else self.lr_mul[self.part])
        update, alive, power = self.blended(grad, numbers, state)
        update = self.direction(update, alive, power, state, updates)
        # the size of the update: by shape, as Muon or Moonlight (2502.16982) has it, and by row or column
        if group["scale"] == "spectral":
            factor = lr * math.sqrt(max(1.0, m / n))
        else:
            factor = lr * (0.2 * math.sqrt(max(m, n)))
        if group["normuon"]:
            factor = factor * normuon_factor(update, state["second_moment"], group["beta2"], alive)
        self.decay(weights, update, torch.ge, numbers.decay, alive)
        if isinstance(factor, float):
            weights.add_(update, alpha=-factor)
        else:
            weights.sub_(update * factor)

    def blended(
        self, grad: Tensor, numbers: StepNumbers, state: dict
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The momentum, with the gradient once more for Nesterov, (c, m, n); which matrices move, (c, 1, 1).

        Third, a power of two by which it was multiplied, so that nothing overflows; 0 for what rests.
        """
        group, scale, mu = self.group, numbers.scale, numbers.momentum
        # momentum, as an exponential mean; that of a matrix whose gradient is zero stays as it is
        alive = has_gradient(grad, self.sums[self.part])  # (c, 1, 1)
        momentum = state["momentum"].mul_(where_alive(alive, mu, 1.0, grad.dtype))
        add_scaled(momentum, grad, (1 - mu) * scale)
        if group["nesterov"]:
            update = add_scaled(momentum.mul(mu), grad, (1 - mu) * scale)
        else:
            update = momentum
        # the size; a function of your own gets what is blended as large as it is
        method = group["orthogonalize"]
        own = callable(ORTHOGONALIZERS.get(method, method))
        power = alive if own else power_of_two(update, alive)
        if isinstance(power, Tensor):
            alive = alive | (largest(momentum) == 0)  # before its first gradient a matrix decays
            update = update * power
        return update, alive, power

    def direction(
        self, update: Tensor, alive: Tensor, power: Tensor | float, state: dict, updates: int
    ) -> Tensor:
        """What `blended` returns, balanced and orthogonalised: (c, m, n), in `work_dtype` but for "both"."""
        group, mode = self.group, self.group["equilibrate"]
        if mode == "rowcol" and group["phase"] is not None and updates >= group["phase"]:
            mode = "row"
        if mode == "both":
            factors = balance_factors(update, [state["row_norm"], state["col_norm"]], power, alive)
            update = (update * factors[0]).mul_(factors[1])
        else:
            update = equilibrate(update, mode, group["equilibrate_exponent"])
        method, bound = group["orthogonalize"], group["norm_bound"]
        update = orthogonalize(update, method, group["steps"], bound, group["work_dtype"])
        return balance_again(update, factors) if mode == "both" else update

    def decay(
        self, weights: Tensor, update: Tensor, agree: Callable, amount: Tensor | float,
        alive: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Decoupled decay (1711.05101) of weights, in place, by `amount` = lr * weight_decay.

        Without lr_mul and the factors of the shape. Of matrices (C, m, n) only those that are
        `alive` (C, 1, 1). Cautious (2510.12402): only where the `update`, not yet subtracted, and
        the weight `agree` in sign; torch.ge, for matrices, counts a zero as agreement, torch.gt,
        for Adam, does not.
        """
        if isinstance(amount, float) and not amount:
            return
        if self.group["cautious"]:
            where = agree(update * weights, 0)
            weights.sub_(amount * weights * (where if alive is None else where & alive))
        else:
            kept = 1 - amount
            weights.mul_(kept if alive is None else where_alive(alive, kept, 1.0, weights.dtype))

    def update_elements(
        self, weights: Tensor, grad: Tensor, numbers: StepNumbers, state: dict, updates: int
    ) -> None:
        """Adam (1412.6980) with decoupled decay (1711.05101) on fp32 (C,), in one pass of torch's kernel."""
        group, bound = self.group, LARGEST_TO_SQUARE
        mean = (grad * numbers.scale).clamp_(-bound, bound)
        beta1, beta2 = group["betas"]
        if group["weight_decay"]:  # the new first moment has the sign of the update; 0 in rows never read
            self.decay(weights, state["exp_avg"].lerp(mean, 1 - beta1), torch.gt, numbers.decay)
        # torch.tensor would wait for the device
        count = torch.full((), float(updates), device=weights.device)
        torch._fused_adamw_(
            [weights], [mean], [state["exp_avg"]], [state["exp_avg_sq"]], [], [count],
            lr=numbers.lr, beta1=beta1, beta2=beta2, eps=group["eps"],
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip

    def take_over(self, now: Tensor) -> None:
        """The master copy follows weights (C, *tail) that others changed: those it does not round to."""
        now, master = now.flatten(), self.state["master"].view(-1)
        size = len(now) if now.is_cuda else self.SLICE["adam"]
        for old, new in zip(master.split(size), now.split(size)):
            different = changed_bits(old, new)
            # a GPU would have to be waited for
            if now.is_cuda or (len(new) and (different.max() or different.min())):
                old.copy_(torch.where(different == 0, old, new))

    def fits_graph(self, stored: Tensor) -> bool:
        """Whether a graph takes this unit, whose chunk of the parameters is `stored`."""
        if self.matrix:  # neither a function that may be untraceable nor a mode that changes with the steps
            method, mode = self.group["orthogonalize"], self.group["equilibrate"]
            changes = mode == "rowcol" and self.group["phase"] is not None
            return stored.is_cuda and not changes and not callable(ORTHOGONALIZERS.get(method, method))
        return stored.is_cuda and len(stored) >= 2 * ROW and len(stored) % ROW == 0

    def update_compiled(
        self, stored: Tensor, weights: Tensor, grad: Tensor, scale: float, updates: int
    ) -> tuple | None:
        """Adam in one kernel; for matrices the job that `update_together` has to do."""
        group, numbers = self.group, self.numbers(scale)
        if self.matrix:
            self.part = slice(0, self.chunk)
            return self, stored, weights, grad, StepNumbers(*self.on_device(numbers))
        _, lr, _, decay = numbers
        beta1, beta2 = group["betas"]
        updates = max(updates, 1)  # on tensors without content it is 0
        size, root = lr / (1 - beta1**updates), math.sqrt(1 - beta2**updates)  # with bias corrections
        changing = self.on_device([scale, 1 - beta1, 1 - beta2, size, root, group["eps"], decay])
        chunks = [weights, grad, self.state["exp_avg"], self.state["exp_avg_sq"]]
        rows = [x.reshape(-1, ROW) for x in (*chunks, *([stored] if "master" in self.state else []))]
        for x in rows:
            torch._dynamo.mark_dynamic(x, 0)
        cautious = group["cautious"] or not decay
        self.sums = graph_of(adam_pass)(*rows, numbers=changing, cautious=cautious)
        return None

    def update_in_graph(self, stored: Tensor, weights: Tensor, grad: Tensor, numbers: StepNumbers) -> None:
        """All matrices of the chunk, whose rounded weights are `stored`; traced, see `update_together`."""
        self.sums = self.sum(grad)
        if "master" in self.state:
            self.take_over(stored)
        self.update_matrices(weights, grad, numbers, self.state, 0)
        if "master" in self.state:
            stored.copy_(weights)

    def on_device(self, numbers: Sequence[float]) -> tuple[Tensor, ...]:
        """Numbers as a graph takes them: it would be made anew for another float. Nothing waits for it."""
        return torch.tensor(numbers, dtype=self.precision).to(self.device, non_blocking=True).unbind()

    def send(self, full: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Send the new weights of the chunk: the stack, what is sent, and the work to wait for.

        Both must live until the work is done; then `receive` takes the stack.
        """
        return full, chunk, self.comm.all_gather(full, chunk)

    def receive(self, full: Tensor) -> None:
        """Write the new weights of a stack (N C, *tail) to the parameters."""
        if self.direct:
            return
        held = self.held()
        if {x.shape for x in held} == {self.tail}:
            parts = full[: self.size].unbind()
        else:
            parts = [part.view(x.shape) for x, part in zip(held, self.unstack(full))]
        # one call for all
        torch._foreach_copy_(held, parts)

    def note_bad(self, step: int) -> None:
        """Remember the first step, counted from 1, in which a gradient of the chunk was not finite."""
        finite = self.sums.isfinite().all()
        self.bad_since = torch.where(finite, self.bad_since, self.bad_since.clamp_max(step))

    def clear(self) -> bool:
        """Make the gradients zero in a way of its own; false: there is none."""
        return False

    # ---- checkpoints and copies

    def moments(self) -> dict[str, torch.Size]:
        """The shapes of the state that does not follow from the parameters."""
        return {key: value.shape for key, value in self.state.items() if key != "master"}

    def saved(self, key: str) -> list[Tensor]:
        """A state of each parameter for `state_dict`, gathered from all ranks."""
        chunk = self.state[key]
        full = chunk.new_empty(self.size + self.padding, *chunk.shape[1:])
        self.comm.all_gather(full, chunk).wait()
        parts = self.unstack(full)
        return [part.reshape(self.shape_of(p, key)).clone() for p, part in zip(self.params, parts)]

    def load(self, key: str, saved: Sequence[Tensor]) -> None:
        """Take over a state of each parameter as `saved` returned it, at any number of ranks."""
        self.state[key].copy_(self.stack(saved)[self.own])

    def take_moments(self, other: Unit) -> None:
        """Take over the moments of a unit with the same `moments`."""
        for key in other.moments():
            self.state[key].copy_(other.state[key])

    def converted(self, state: dict[str, Any]) -> dict[str, Any]:
        """The saved state of a parameter as this unit has it."""
        return state

    def join(self, comm: Comm) -> None:
        """In a copy of an optimizer, belong to its processes; ValueError if these are others."""
        self.comm = comm
        processes = (self.size + self.padding) // self.chunk
        if processes != comm.world_size or self.own.start != comm.rank * self.chunk:
            raise ValueError(
                f"this rank of {comm.world_size} did not write this copy of an optimizer on "
                f"{processes} processes; a state_dict fits any number"
            )


class RowUnit(Unit):
    """A table (R, D) of an Adam group with `rowwise`: a row has one second moment, and no first one.

    A row whose gradient is zero does not move, but for decay that is not cautious, with which all
    rows are updated. Else a step computes with the other rows alone, and over ranks they alone are
    sent: gradients to their owners, rank r having the rows [r C, (r + 1) C), and new weights to
    all. Whoever makes a gradient may attach a mask (R,), `p.grad.rows_read`, of the rows that may
    be other than zero; else they are looked for. Row-wise state: record #92, and torchrec's
    row-wise optimizers.
    """

    def __init__(self, group: dict, members: Sequence[Member], comm: Comm):
        if members[0].param.ndim < 2:
            raise ValueError(f"parameter {members[0].name!r} has no rows; rowwise takes tables (R, D)")
        super().__init__(group, members, comm)
        self.mine: slice | Tensor | None = None  # the rows of this rank's gradient, until it is cleared

    def entry_shape(self) -> torch.Size:
        return self.params[0].shape[-1:]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"exp_avg_sq": (self.chunk, 1)}
        if self.dtype != self.precision:
            shapes["master"] = (self.chunk, *self.tail)
        return shapes

    def all_decay(self) -> bool:
        """Whether rows without a gradient move too: only cautious decay leaves them alone."""
        return bool(self.group["weight_decay"]) and not self.group["cautious"]

    def reduce(self, summed: bool) -> tuple[Tensor, Tensor, Any]:
        """Rows of gradients: those sent, those this rank updates (or what arrives for them), the work."""
        p, rank = self.params[0], self.comm.rank
        self.check_gradients([p.grad])
        self.missing = [] if p.requires_grad and p.grad is not None else [0]
        grad = torch.zeros_like(p, dtype=self.precision) if self.missing else p.grad
        read, grad = getattr(grad, "rows_read", None), grad.reshape(self.size, -1)
        if self.comm.world_size == 1:
            # all rows where many of them are read: a slice needs no copies
            every = read is None or self.all_decay()
            [[count]] = [[self.size]] if every else self.row_counts(read[None])
            few = count < self.size / (3 if p.is_cuda else 2)
            self.rows = torch.nonzero_static(read, size=count)[:, 0] if few else slice(0, self.size)
            self.mine = self.rows
            rows = grad.index_select(0, self.rows) if few else grad
            return grad, rows.to(self.precision), Comm.DONE
        counts = self.plan(grad.ne(0).any(1) if read is None else read, summed)
        if not summed:
            return grad, grad[self.own].index_select(0, self.rows).to(self.precision), Comm.DONE
        sent = grad.index_select(0, self.mine).to(self.precision)
        arriving, work = self.comm.all_to_all(sent, counts[rank], self.arriving)
        chunk = sent.new_zeros(len(self.rows), *self.tail)

        def wait() -> None:
            work.wait()
            self.sum_over_ranks(chunk, arriving)

        return sent, chunk, types.SimpleNamespace(wait=wait)

    def plan(self, read: Tensor, summed: bool) -> list[list[int]]:
        """Which rows go where, from the mask (R,) of this rank; the numbers that each rank sends to each."""
        N, rank = self.comm.world_size, self.comm.rank
        # (ranks, N C): 1 for a row that is read, 2 more where there is a gradient; without sums all are alike
        read = F.pad(read.byte(), (0, self.padding))
        by_rank = (read + 2 * (not self.missing))[None]
        if summed:
            mine, by_rank = by_rank[0], read.new_empty(N, len(read))
            self.comm.all_gather(by_rank.view(-1), mine).wait()
        by_rank, exists = by_rank & 1, by_rank.amax(0) >> 1
        updated = by_rank.amax(0)
        if self.all_decay():
            updated[: self.size] = 1
        # the only numbers that the host needs, and waits for
        counts = self.row_counts(torch.cat([by_rank, updated[None], exists[None]]))
        self.exists = any(counts.pop())
        self.updated_by = counts.pop()
        # rows of the stack: all that are updated, and those with a gradient here
        self.updated = torch.nonzero_static(updated, size=sum(self.updated_by))[:, 0]
        self.mine = torch.nonzero_static(read, size=sum(counts[rank if summed else 0]))[:, 0]
        # rows of the chunk: those that are updated, and the place among them of each one that arrives
        self.rows = torch.nonzero_static(updated[self.own], size=self.updated_by[rank])[:, 0]
        self.arriving = [sent[rank] for sent in counts]
        arriving = torch.nonzero_static(by_rank[:, self.own], size=sum(self.arriving))[:, 1]
        self.places = (updated[self.own].cumsum(0) - 1)[arriving]
        return counts

    def row_counts(self, masks: Tensor) -> list[list[int]]:
        """How many rows of each owner there are in masks (.., N C)."""
        return masks.view(len(masks), self.comm.world_size, self.chunk).sum(2).tolist()

    def sum_over_ranks(self, grad: Tensor, arrived: Tensor) -> None:
        """Add to `grad` (n, D), of the rows that this rank updates, what all ranks have sent of them."""
        # one rank after the other: each has sent a row at most once, so that the order of sums is fixed
        for places, part in zip(self.places.split(self.arriving), arrived.split(self.arriving)):
            grad.index_add_(0, places, part)

    def sum(self, grad: Tensor) -> Tensor:
        """As `Unit.sum`; on a CPU the norms of the rows, which the update needs, do."""
        self.norms = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        total = self.norms.sum()
        return grad.sum() if grad.is_cuda or not total.isfinite() else total

    def update(self, grad: Tensor, scale: float, compiled: bool) -> tuple[Tensor, Tensor, None]:
        """As `Unit.update`, for the rows that have a gradient."""
        p, N = self.params[0], self.comm.world_size
        full = p.detach().reshape(self.size, -1)  # a copy where p is not contiguous
        own = full[self.own]
        self.rests = bool(self.missing) and (N == 1 or not p.requires_grad or not self.exists)
        self.updates += not self.rests
        if compiled and not self.rests and self.fits_graph(grad):
            self.update_rows_compiled(own, grad, scale)
            return full, own, None
        self.sums = self.sum(grad)
        if not self.rests:
            self.update_rows(own, grad, scale)
        return full, own, None

    def send(self, full: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor, Any]:
        """As `Unit.send`: the new rows of the chunk go to each rank."""
        N, self.arrived = self.comm.world_size, None
        if self.rests or N == 1:
            return full, chunk, Comm.DONE
        rows = chunk.index_select(0, self.rows)
        sent = rows.repeat(N, 1)
        self.arrived, work = self.comm.all_to_all(sent, [len(rows)] * N, self.updated_by)
        return full, sent, work

    def fits_graph(self, grad: Tensor) -> bool:
        return grad.is_cuda and len(grad) > 1  # torch takes a size of 1 for a constant

    def update_rows_compiled(self, own: Tensor, grad: Tensor, scale: float) -> None:
        """`update_rows` in one kernel; where few rows are read, on copies of them."""
        group, beta2, every = self.group, self.group["betas"][1], isinstance(self.rows, slice)
        _, lr, _, decay = self.numbers(scale)
        correction = 1 - beta2 ** int(self.updates)
        numbers = self.on_device([scale, 1 - beta2, correction, lr, group["eps"], decay])
        chunks = [self.state.get("master", own), self.state["exp_avg_sq"]]
        chunks += [own] if "master" in self.state else []
        rows = [x[self.rows] for x in chunks]
        for x in (grad, *rows):
            torch._dynamo.mark_dynamic(x, 0)
        weights, *others = rows
        cautious = group["cautious"] or not decay
        self.sums = graph_of(row_pass)(weights, grad, *others, numbers=numbers, cautious=cautious)
        if not every:
            self.state["exp_avg_sq"].mul_(beta2)  # of the other rows
            for chunk, new in zip(chunks, rows):
                chunk.index_copy_(0, self.rows, new)

    def update_rows(self, own: Tensor, grad: Tensor, scale: float) -> None:
        """Adam with beta1 = 0 and decoupled decay of the rows of the chunk `own` with gradients (n, D).

        The second moment is the running mean of a row's mean square.
        """
        rows, group, beta2 = self.rows, self.group, self.group["betas"][1]
        root = grad.size(1) ** 0.5
        weights = own
        if "master" in self.state:  # it follows weights that others changed
            weights = self.state["master"]
            weights[rows] = followed(weights[rows], own[rows])
        # a larger gradient counts as this one, whose square is finite; norms are (n, 1)
        if grad.is_cuda or not self.norms.isfinite().all():
            grad = (grad * scale).clamp_(-LARGEST_TO_SQUARE / root, LARGEST_TO_SQUARE / root)
            self.norms, scale = torch.linalg.vector_norm(grad, dim=1, keepdim=True), 1.0
        # the second moment of all rows falls: the others have nothing to add
        second_moment = self.state["exp_avg_sq"].mul_(beta2)
        mean_square = (self.norms * (scale / root)).square_()
        second_moment[rows] = (now := second_moment[rows].add_(mean_square, alpha=1 - beta2))
        size = (now / (1 - beta2 ** int(self.updates))).sqrt_().add_(group["eps"]).clamp_min_(TINY_NUMBER)
        if group["weight_decay"]:
            before = weights[rows]
            self.decay(before, grad, torch.gt, self.numbers(scale).decay)
            weights[rows] = before
        factor = -float(group["lr"]) * scale / size
        if isinstance(rows, slice):
            weights[rows].addcmul_(grad, factor)
        else:
            weights.index_add_(0, rows, grad * factor)
        if "master" in self.state:
            own[rows] = weights[rows].to(self.dtype)

    def receive(self, full: Tensor) -> None:
        """Write the rows that the ranks have updated."""
        if self.arrived is not None:
            full.index_copy_(0, self.updated, self.arrived)
            self.arrived = None
        p = self.params[0]
        if full.data_ptr() != p.data_ptr():
            p.copy_(full.view(p.shape))

    def converted(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of Adam with moments of each number: the mean of the second one over a row."""
        if "exp_avg" not in state or state["exp_avg_sq"].ndim < 2:
            return state
        kept = {key: value for key, value in state.items() if key != "exp_avg"}
        return {**kept, "exp_avg_sq": state["exp_avg_sq"].mean(-1, keepdim=True)}

    def clear(self) -> bool:
        """Make the gradient zero where it was not, if that is known; whether this was done."""
        grad = self.params[0].grad
        if self.mine is None or not hasattr(grad, "rows_read"):
            return False
        if isinstance(self.mine, slice):
            grad.zero_()
        else:
            grad.view(self.size, -1).index_fill_(0, self.mine, 0)
        grad.rows_read.zero_()
        self.mine = None
        return True


# ---- as graphs, on a GPU
#
# The formulas of `Unit.update_elements` and `RowUnit.update_rows` once more, each as one kernel of
# torch.compile. Matrices are updated by `Unit.update_matrices` itself, traced for all units together.

# Numbers of a row of `adam_pass`. With rows of a fixed size one graph serves units of all sizes.
ROW = 1024


def decay_numbers(weights: Tensor, update: Tensor, amount: Tensor, cautious: bool) -> None:
    """Decoupled decay of weights that Adam updates, in a graph, as `Unit.decay` does it.

    Weights and `update`, which is subtracted later, have one shape, `amount` () is lr * weight_decay.
    """
    decayed = weights * amount
    weights.sub_(torch.where(update * weights > 0, decayed, 0.0) if cautious else decayed)


def adam_pass(
    weights: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, stored: Tensor | None = None, *,
    numbers: Sequence[Tensor], cautious: bool,
) -> Tensor:  # fmt: skip
    """`Unit.update_elements` and what goes with it, all (n, ROW): a graph of it reads and writes each once.

    `stored` are weights of low precision, of which `weights` is the master copy. `numbers` are made by
    `Unit.update_compiled`. Returns the sum of the gradients.
    """
    scale, blend1, blend2, size, root, eps, decay = numbers
    if stored is not None:
        weights.copy_(followed(weights, stored))
    mean = (grad * scale).clamp(-LARGEST_TO_SQUARE, LARGEST_TO_SQUARE)
    exp_avg.lerp_(mean, blend1)
    exp_avg_sq.lerp_(mean.square(), blend2)
    decay_numbers(weights, exp_avg, decay, cautious)
    weights.sub_(size * exp_avg / (exp_avg_sq.sqrt() / root + eps))
    if stored is not None:
        stored.copy_(weights)
    return grad.sum(1).sum()  # by rows first: that goes into the same kernel


def row_pass(
    weights: Tensor, grad: Tensor, second_moment: Tensor, stored: Tensor | None = None, *,
    numbers: Sequence[Tensor], cautious: bool,
) -> Tensor:  # fmt: skip
    """`RowUnit.update_rows` for rows (n, D) of a table with second moments (n, 1); else as `adam_pass`."""
    scale, blend, correction, lr, eps, decay = numbers
    if stored is not None:
        weights.copy_(followed(weights, stored))
    bound = LARGEST_TO_SQUARE / grad.size(1) ** 0.5
    mean = (grad * scale).clamp(-bound, bound)
    second_moment.lerp_(mean.square().mean(1, keepdim=True), blend)
    decay_numbers(weights, mean, decay, cautious)
    size = ((second_moment / correction).sqrt() + eps).clamp_min(TINY_NUMBER)
    weights.sub_(lr * mean / size)
    if stored is not None:
        stored.copy_(weights)
    return grad.sum(1).sum()


def update_together(jobs: Sequence[tuple]) -> None:
    """Update the matrices of several units, (unit, its stored weights, arguments): one graph for them all."""
    for unit, stored, *arguments in jobs:
        unit.update_in_graph(stored, *arguments)


@functools.cache
def graph_of(function: Callable) -> Callable:
    """The function as torch.compile makes it, for each of the settings that it meets."""
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---- parameters that are DTensors, as those of FSDP2 (fully_shard)
#
# `Shards` updates what a rank holds as if it were alone: the numbers of Adam, and whole matrices.
# A matrix of which each rank holds some rows has an owner, which gets all rows of the gradient, keeps
# the momentum, and sends the rows of the update back (`ShardedMatrices`): one all-to-all each way for
# a unit. No rank holds more rows than the owner, so at most (N - 1) / N of a matrix travel each way.
#
# Of the MLP of 12 layers, matrices of 768 x 3072, on 8 ranks:
#
#     held     96 rows of each matrix
#     owned    1 or 2 matrices; 672 rows of each arrive and, as an update, leave again

# Attributes by which others mark pieces of parameters that cannot work here, and what helps.
MARKS = {
    # FullyShardedDataParallel, also with use_orig_params
    "_fsdp_flattened": "belongs to FSDP1, which cuts matrices into flat pieces; "
    "fully_shard (FSDP2) keeps matrices",
    "ds_id": "belongs to DeepSpeed's ZeRO 3, which cuts matrices into flat pieces; "
    "DDP and fully_shard (FSDP2) keep matrices",
    "tensor_model_parallel": "is a tensor-parallel piece of Megatron, which is no whole matrix; "
    "where the tensor-parallel size is 1, delete its attribute tensor_model_parallel",
}


def refuse_foreign(name: str, p: Tensor, kind: str, rowwise: bool, grads: str) -> None:
    """ValueError for a parameter that is a piece of another one and cannot work here."""
    for mark, meaning in MARKS.items():
        # Megatron marks all parameters, with a truth value
        # DeepSpeed marks with a number, which may be 0
        if getattr(p, mark, None) not in (None, False) or (mark == "ds_id" and hasattr(p, mark)):
            raise ValueError(f"parameter {name!r} {meaning}")
    if not hasattr(p, "placements"):
        return
    if grads != "mean":
        raise ValueError(f'parameter {name!r} is a DTensor, it has reduced gradients: grads="mean"')
    if rowwise:
        raise ValueError(f"parameter {name!r} is a DTensor, and rowwise takes plain tables")
    sharded = [x for x in p.placements if not x.is_replicate()]
    rows = len(sharded) <= 1 and all(type(x).__name__ == "Shard" and x.dim == 0 for x in sharded)
    if any(x.is_partial() for x in sharded) or (kind == "matrix" and not rows):
        raise ValueError(
            f"{kind} parameter {name!r} is a DTensor with placements {p.placements}: MuonEq takes "
            "matrices sharded over dimension 0 along one dimension of the mesh, as by fully_shard "
            "(FSDP2) without shard_placement_fn or tensor parallelism; an adam group takes any Shard, "
            "neither takes Partial"
        )


def comm_along(comm: Comm, mesh: Any, dim: int | None) -> Comm:
    """The processes along a dimension of a device mesh; None: this process alone."""
    if (mesh, dim) not in comm.along:
        comm.along[mesh, dim] = found = Comm(mesh.get_group(dim or 0))
        if dim is None:
            found.rank, found.world_size = 0, 1
    return comm.along[mesh, dim]


def make_unit(group: dict, members: Sequence[Member], comm: Comm) -> Unit:
    """The unit of parameters of one shape and one kind of sharding."""
    p = members[0].param
    if not hasattr(p, "placements"):
        return (RowUnit if group.get("rowwise") else Unit)(group, members, comm)
    mesh = p.device_mesh
    for dim, placement in enumerate(p.placements):
        if group["kind"] == "matrix" and placement.is_shard() and mesh.size(dim) > 1:
            return ShardedMatrices(group, members, comm_along(comm, mesh, dim))
    return Shards(group, members, comm_along(comm, mesh, None))


def local(x: Tensor) -> Tensor:
    """What this rank holds of a DTensor, in its storage; other tensors as they are."""
    with torch.no_grad():
        return x.to_local() if hasattr(x, "to_local") else x


def local_part(x: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of x, a DTensor or a whole tensor, when it is sharded `like` another."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(x, "placements"):
        # every rank has all of it, so nothing is sent
        whole = x.detach().to(like.device)
        x = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return local(x.detach().redistribute(placements=like.placements))


class Shards(Unit):
    """Parameters that are DTensors, of which each rank updates what it holds.

    Its state in `state_dict` is sharded as they are; what has a number for each row or column is whole.
    """

    SMALL_STATE = ("second_moment", "row_norm", "col_norm")

    def held(self) -> list[Tensor]:
        return [local(p) for p in self.params]

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        return super().stack([local(x) for x in tensors])

    def check_gradients(self, grads: list[Tensor | None]) -> None:
        super().check_gradients(grads)
        for name, p, grad in zip(self.names, self.params, grads):
            found = getattr(grad, "placements", None)
            if grad is not None and found != p.placements:
                raise ValueError(
                    f"the gradient of parameter {name!r} has placements {found}, the parameter "
                    f"{p.placements}: redistribute it before the step"
                )

    def as_dtensors(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what this rank holds of a state of each parameter, as DTensors."""
        from torch.distributed.tensor import DTensor

        found = []
        for p, held, part in zip(self.params, self.held(), parts):
            how = dict(shape=p.shape, stride=p.stride(), run_check=False)
            part = part.reshape(held.shape).clone()
            found.append(DTensor.from_local(part, p.device_mesh, p.placements, **how))
        return found

    def saved(self, key: str) -> list[Tensor]:
        if key in self.SMALL_STATE:
            return super().saved(key)
        return self.as_dtensors(self.unstack(self.state[key]))

    def load(self, key: str, saved: Sequence[Tensor]) -> None:
        if key not in self.SMALL_STATE:
            saved = [local_part(x, p) for x, p in zip(saved, self.params)]
        super().load(key, saved)

    def join(self, comm: Comm) -> None:
        """A copy stays on its mesh."""


class ShardedMatrices(Shards):
    """Matrices of which each rank holds some rows: their stack (S, m, n) is S m rows.

    The chunk (C, m, n) of a rank are the matrices that it owns, those with the numbers `own` in the
    stack. It has their momentum, and the master copy of the R rows that it holds, (R, n).
    """

    def divide(self) -> None:
        """The rows that this rank holds, the matrices that it owns, and the ways between these.

        ValueError for parameters that are not cut as torch.chunk cuts them.
        """
        comm, (m, n) = self.comm, self.tail
        self.counts = [p.numel() // (m * n) for p in self.params]
        self.size, self.padding, self.direct = sum(self.counts), 0, False
        # the rank that holds each row of the stack, as torch.chunk divides the first dimension
        holders = []
        for p in self.params:
            entries = np.arange(len(p)) // -(-len(p) // comm.world_size)
            holders.append(np.repeat(entries, p.numel() // n // len(p)))
        holder = np.concatenate(holders)
        self.rows = [x.numel() // n for x in self.held()]
        if self.rows != [int((ranks == comm.rank).sum()) for ranks in holders]:
            raise ValueError(f"the shards of {', '.join(self.names)} are not those of torch.chunk")
        owners = self.owners(holder.reshape(-1, m))
        owner = np.repeat(owners, m)
        # what is owned
        own = np.flatnonzero(owners == comm.rank)
        self.own, self.chunk = torch.from_numpy(own).to(self.device), len(own)
        borders = np.searchsorted(own, np.cumsum([0, *self.counts])).tolist()
        self.parts = [slice(*pair) for pair in itertools.pairwise(borders)]
        # the order in which the rows held here leave, by owner, and that in which owned rows arrive, by
        # holder; the updates take the same ways back
        self.leaving, self.to_ranks = self.by_rank(owner[holder == comm.rank])
        self.arriving, self.from_ranks = self.by_rank(holder[owner == comm.rank])

    def by_rank(self, ranks: np.ndarray) -> tuple[Tensor, list[int]]:
        """The order that sorts rows by a rank of each, and the number of rows of each rank."""
        order = torch.from_numpy(np.argsort(ranks, kind="stable")).to(self.device)
        return order, np.bincount(ranks, minlength=self.comm.world_size).tolist()

    def owners(self, holder: np.ndarray) -> np.ndarray:
        """The owner of each matrix; `holder` (S, m) is the rank that holds each row."""
        load = self.comm.duties
        owners = []
        for ranks in holder:
            rows = np.bincount(ranks, minlength=len(load))
            # of those who hold most rows the one that owns least
            owners.append(min(np.flatnonzero(rows == rows.max()).tolist(), key=load.__getitem__))
            load[owners[-1]] += self.tail.numel()
        return np.array(owners)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().state_shapes()
        if "master" in shapes:
            shapes["master"] = (sum(self.rows), self.tail[1])
        return shapes

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows that this rank holds, (R, n)."""
        return torch.cat([local(x).detach().reshape(-1, self.tail[1]) for x in tensors])

    # ---- the step

    def to_owners(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows held here (R, n) -> what is sent, the owned matrices (C, m, n), and the work."""
        sent = rows[self.leaving]
        received, work = self.comm.all_to_all(sent, self.to_ranks, self.from_ranks)
        chunk = torch.empty(self.chunk, *self.tail, dtype=self.precision, device=self.device)

        def wait() -> None:
            work.wait()
            chunk.view(-1, self.tail[1])[self.arriving] = received.to(self.precision)

        return sent, chunk, types.SimpleNamespace(wait=wait)

    def to_holders(self, chunk: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Owned matrices (C, m, n) -> rows held here as they arrive (R, n), what is sent, the work."""
        sent = chunk.view(-1, self.tail[1])[self.arriving]
        received, work = self.comm.all_to_all(sent, self.from_ranks, self.to_ranks)
        return received, sent, work

    def held_rows(self, received: Tensor) -> Tensor:
        """The rows that `to_holders` received, (R, n), in their own order."""
        rows = torch.empty_like(received, dtype=self.precision)
        rows[self.leaving] = received.to(self.precision)
        return rows

    def reduce(self, summed: bool) -> tuple[Any, Tensor, Any]:
        # all ranks send the same dtype, whether a gradient is missing or not
        return self.to_owners(self.gradients().to(self.params[0].grad_dtype or self.precision))

    def update(self, grad: Tensor, scale: float, compiled: bool) -> tuple[None, Tensor, None]:
        """Compute what is added to the owned matrices."""
        moved = torch.zeros_like(grad)
        self.alive = torch.zeros(self.chunk, 1, 1, dtype=torch.bool, device=self.device)
        skipped, spans = self.count_updates(grad)
        self.update_chunk(moved, grad, scale, skipped, spans)
        for i in skipped:
            self.alive[self.parts[i]] = False
        # what is sent for parameters of two bytes has two bytes
        wire = self.precision if self.dtype == self.precision else torch.bfloat16
        # A matrix that is left alone does not decay either. Those who hold it learn this without another
        # transfer: it is sent as minus zeros, which adding zero has removed from all others.
        return None, moved.to(wire).add_(0.0).masked_fill_(~self.alive, -0.0), None

    def send(self, full: None, chunk: Tensor) -> tuple[Tensor, Tensor, Any]:
        """As `Unit.send`: the rows go to those who hold them."""
        return self.to_holders(chunk)

    def decay(
        self, weights: Tensor, update: Tensor, agree: Callable, amount: Tensor | float,
        alive: Tensor | None = None,
    ) -> None:  # fmt: skip
        """At the owner, which has no weights, nothing decays yet."""
        self.alive[self.part] = alive

    def receive(self, full: Tensor) -> None:
        """Decay the rows held here and add what the owners sent."""
        now, moved = self.stack(self.params), self.held_rows(full)
        weights = self.state.get("master", now)
        if "master" in self.state:
            self.take_over(now)
        left_alone = (moved == 0) & moved.signbit()
        super().decay(weights, -moved, torch.ge, self.numbers(1.0).decay, ~left_alone)
        weights.add_(moved)
        held = self.held()
        parts = weights.to(self.dtype).split(self.rows)
        torch._foreach_copy_(held, [part.view(x.shape) for x, part in zip(held, parts)])

    # ---- state

    def shape_of(self, p: Tensor, key: str) -> torch.Size:
        return p.shape if key == "master" else super().shape_of(p, key)

    def views(self) -> list[dict[str, Tensor]]:
        found = super().views()
        if "master" in self.state:
            for views, rows, x in zip(found, self.state["master"].split(self.rows), self.held()):
                views["master"] = rows.view(x.shape)
        return found

    def moments(self) -> dict[str, torch.Size]:
        shapes = super().moments()
        # of the stack: ranks own different numbers of matrices
        return {key: torch.Size([self.size, *shape[1:]]) for key, shape in shapes.items()}

    def take_moments(self, other: Unit) -> None:
        for key in other.moments():  # it may have other owners
            self.load(key, other.saved(key))

    def saved(self, key: str) -> list[Tensor]:
        """A state of each parameter: whole where it is in SMALL_STATE, else a DTensor like the parameter.

        The momentum goes from owners to those who hold the rows, and so must another state of its shape.
        """
        state = self.state[key]
        if key in self.SMALL_STATE:
            # each rank adds its own to zeros
            full = state.new_zeros(self.size, *state.shape[1:])
            full[self.own] = state
            pairs = zip(self.params, self.unstack(self.comm.all_reduce(full)))
            return [part.reshape(self.shape_of(p, key)).clone() for p, part in pairs]
        if key == "momentum":
            received, _, work = self.to_holders(state)
            work.wait()
            state = self.held_rows(received)
        return self.as_dtensors(state.split(self.rows))

    def load(self, key: str, saved: Sequence[Tensor]) -> None:
        """Take over what `saved` returned, or whole tensors; rows of the momentum go to the owners."""
        if key in self.SMALL_STATE:
            full = torch.cat([x.reshape(-1, *self.state[key].shape[1:]) for x in saved])
            self.state[key].copy_(full[self.own.to(full.device)])
            return
        rows = self.stack([local_part(x, p) for x, p in zip(saved, self.params)])
        if key == "momentum":
            _, chunk, work = self.to_owners(rows.to(self.precision))
            work.wait()
            rows = chunk
        self.state[key].copy_(rows)


# ---- the groups of an optimizer, and the class that has them


@dataclasses.dataclass(frozen=True)
class MatrixGroup(Muon):
    """The fields of a group of kind "matrix"."""

    kind: Literal["matrix"] = field("matrix", "Muon and its relatives")
    momentum: float = field(0.95, "decay of the momentum, an exponential mean", 0, 1)
    steps: int = field(5, "iterations of the orthogonalisation", 1)
    lr_mul: float | tuple[float, ...] = field(1.0, "factor on lr, or one for each matrix in turns")
    work_dtype: torch.dtype = field(torch.bfloat16, "precision of the products")
    every: int = field(1, "steps between updates; gradients are kept in between", 1)


@dataclasses.dataclass(frozen=True)
class AdamGroup(Adam):
    """The fields of a group of kind "adam"."""

    kind: Literal["adam"] = field("adam", "AdamW")
    betas: tuple[float, float] = field((0.9, 0.95), "decay of the first and second moment", 0, 1)
    eps: float = field(1e-8, "added to the root of the second moment", 0)
    every: int = field(1, "steps between updates; gradients are kept in between", 1)


GROUPS = {"matrix": MatrixGroup, "adam": AdamGroup}


def checked_group(group: dict) -> dict:
    """The group with the defaults of its kind; ValueError for what does not exist or fit."""
    kind = group.get("kind")
    if kind not in GROUPS:
        raise ValueError(f"a group's kind is 'matrix' or 'adam', not {kind!r}")
    article = {"matrix": "a", "adam": "an"}[kind]
    defaults = {f.name: f.default for f in dataclasses.fields(GROUPS[kind])}
    for key in group.keys() - defaults.keys() - {"params"}:
        nearest = difflib.get_close_matches(key, defaults, 1)
        hint = f", nearest: {nearest[0]!r}" if nearest else ""
        raise ValueError(f"{article} {kind} group has no field {key!r}{hint}")
    if "lr" not in group:
        raise ValueError(f"{article} {kind} group needs lr")
    group = {"params": [], **defaults, **group}
    check_values(group)
    return group


def check_values(group: dict) -> None:
    """ValueError for a value that a field of the group does not take."""
    values = {f.name: group[f.name] for f in dataclasses.fields(GROUPS[group["kind"]])}
    if group.get("rowwise") and group["betas"][0]:
        raise ValueError(f"rowwise has no first moment: betas are (0, beta2), not {group['betas']}")
    for name, value in values.items():
        if isinstance(value, (Tensor, np.generic)) and math.prod(value.shape) == 1:
            values[name] = value.item()
    method = values.get("orthogonalize", "")
    if callable(method):  # whatever it does, it is no text
        values["orthogonalize"] = ""
    elif method and method not in ORTHOGONALIZERS:
        raise ValueError(f"orthogonalize is one of {', '.join(ORTHOGONALIZERS)}, not {method!r}")
    GROUPS[group["kind"]](**values)  # refuses the rest


def copied(values: dict[str, Any]) -> dict[str, Any]:
    """A copy for a `state_dict`, without numpy's types, which torch.load does not read."""
    numpy = (np.generic, np.ndarray)
    return {k: v.tolist() if isinstance(v, numpy) else copy.deepcopy(v) for k, v in values.items()}


def called_from(module: str) -> bool:
    """Whether a function of the module of this name is among the callers."""
    frame = sys._getframe()
    while frame and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def in_torch_checkpoint() -> bool:
    """Whether torch's checkpoints are asking: they call parameters by number."""
    return called_from("torch.distributed.checkpoint.state_dict")


class MuonEq(torch.optim.Optimizer):
    """Muon, NorMuon and MuonEq for matrices, Adam for everything else, in one sharded step.

    Args:
        groups: dicts with `kind` ("matrix" or "adam"), `params` (tensors or (name, tensor) pairs), `lr`
            and any field of `MatrixGroup` or `AdamGroup`. `lr`, `momentum` and `weight_decay` are read at
            every step.
        grads: "mean": gradients are means and equal on all ranks (one process, with or without
            torch.distributed, or DDP). "token_sum": they are sums over this rank's tokens, and
            `step(tokens=n)` divides their sum over ranks by the global n.
        process_group: the processes that hold these parameters and share the work; all of them by default.
            DTensors know theirs.

    Matrix parameters are (m, n) or banks (K, m, n), "row" is dim -2; those of one shape in one
    group are processed as one stack. Each rank updates its share, and all ranks receive the result.
    Everything but the products of `orthogonalize` is fp32, or fp64 for parameters in fp64:
    parameters of lower precision keep an fp32 master copy, and with "token_sum" their `.grad` is an
    fp32 sum. Decay is lr * weight_decay, decoupled.

    DTensors, as of FSDP2 (make the optimizer after `fully_shard`), take grads="mean". A matrix that
    is sharded over rows along one dimension of a mesh, with copies along others (HSDP), gets the
    update of the whole matrix; for Adam any Shard will do. Their state in `state_dict` is sharded
    likewise. Refused by name: other placements, pieces of FSDP1, ZeRO 3 and Megatron, and
    ZeroRedundancyOptimizer.

    Without a gradient nothing moves: a parameter that is frozen or whose gradient is None (with
    "token_sum": on all ranks) is left alone, decay and state included. So is a matrix whose gradient is
    zero, an expert without tokens; before its first gradient it decays.

    `equilibrate="both"` balances rows and columns weakly, before and after `orthogonalize`, by
    running energies that are state (`balance_factors`). `normuon` comes after the second balance,
    and undoes it on the side on which it makes rows or columns equal.

    Example, the MLP of a GPT whose up projections move half as fast as those down:
        MuonEq([dict(kind="matrix", params=[("mlp", bank)], lr=0.02, lr_mul=(1.0, 2.0), equilibrate="col"),
                dict(kind="adam", params=others, lr=3e-4)])

    ValueError for a field or value that does not exist or fit.
    """

    SMALL = 16_384  # numbers below which Adam parameters share one stack
    # The names of parameters that another one stands in for. Their units do nothing in a step; all ranks
    # set the same names, and `copy_state` gives them their state when they begin.
    resting: Sequence[str] = ()
    compiled = False  # whether chunks on a CUDA GPU are updated by graphs of torch.compile

    def __init__(
        self, groups: Iterable[dict], grads: str = "mean",
        process_group: dist.ProcessGroup | None = None, **unknown: Any,
    ):  # fmt: skip
        if called_from("torch.distributed.optim.zero_redundancy_optimizer"):
            raise ValueError(
                "ZeroRedundancyOptimizer divides parameters among the ranks, "
                "and so does MuonEq by itself: make it without ZeroRedundancyOptimizer"
            )
        if grads not in ("mean", "token_sum"):
            raise ValueError(f"grads is 'mean' or 'token_sum', not {grads!r}")
        # one group may stand alone; parameters without a group are a common mistake
        groups = [groups] if isinstance(groups, (dict, Tensor)) else list(groups)
        if unknown or not all(isinstance(group, dict) for group in groups):
            example = "MuonEq([dict(kind='matrix', params=matrices, lr=0.02), dict(kind='adam', ...)])"
            found = f"{', '.join(unknown)} of its own" if unknown else "parameters without a group"
            raise TypeError(f"MuonEq takes a list of groups, as in {example}, not {found}")
        # what torch's own class does not know, before it adds the groups
        self.grads, self.comm = grads, Comm(process_group)
        self.step_count = 0
        self.defaults: dict[str, Any] = {}
        self.units: list[Unit] = []
        self.named: dict[str, Tensor] = {}
        super().__init__(groups, {})
        # Schedulers ask whether there is a momentum; a group of Adam does not read the one that they set.
        momenta = [group["momentum"] for group in self.param_groups if "momentum" in group]
        self.defaults = {"lr": self.param_groups[0]["lr"], "momentum": (momenta or [0.0])[0]}
        self._compare_ranks()

    # ---- groups: names, matrices, units

    def add_param_group(self, param_group: dict) -> None:
        """Check a group, fill in its defaults and divide its parameters into units. Every rank calls it."""
        group = checked_group(param_group)
        named = self._named(group["params"])
        for name, p in named.items():
            refuse_foreign(name, p, group["kind"], group.get("rowwise", False), self.grads)
        stacks = self._stacks(group, named)
        self.param_groups.append({**group, "params": list(named.values())})
        self.named |= named
        for stack in stacks:
            unit = make_unit(self.param_groups[-1], stack, self.comm)
            unit.group_number = len(self.param_groups) - 1
            self.units.append(unit)
            self._show_state(unit)
        # the order of the updates: Adam before matrices, small before large
        self.units.sort(key=lambda unit: (unit.matrix, unit.size * unit.tail.numel()))
        if self.defaults:  # else there are more groups to come
            self._compare_ranks()

    def _compare_ranks(self) -> None:
        """ValueError on all ranks where their parameters differ: they would overwrite each other's."""
        own = [f"{len(self.param_groups)} groups, grads={self.grads!r}"]
        for group, names in zip(self.param_groups, self._names()):
            for name, p in zip(names, group["params"]):
                own.append(f"{group['kind']} parameter {name!r} {tuple(p.shape)} {p.dtype}")
        ranks = self.comm.all_gather_object(own)
        for rank, other in enumerate(ranks):
            for here, there in itertools.zip_longest(ranks[0], other, fillvalue="nothing more"):
                if here != there:
                    raise ValueError(
                        f"rank {rank} has {there} where rank 0 has {here}: the ranks of an optimizer hold "
                        "the same parameters; process_group takes those that do"
                    )

    def _show_state(self, unit: Unit) -> None:
        """Fill `optimizer.state`, which others read and may add to, and prepare gradients."""
        for p, views in zip(unit.params, unit.views()):
            self.state[p].update(views)
            if self.grads == "token_sum":
                # Sums of several backward passes need fp32, which the parameter itself may not have.
                p.grad_dtype = unit.precision

    def _named(self, params: Any) -> dict[str, Tensor]:
        """The parameters of a group by name; a parameter without a name is called by its number."""
        named: dict[str, Tensor] = {}
        for item in [params] if isinstance(params, Tensor) else params:
            number = str(len(self.named) + len(named))
            name, p = item if isinstance(item, tuple) and len(item) == 2 else (number, item)
            if not isinstance(p, Tensor):
                raise TypeError(f"a parameter is a tensor or a pair (name, tensor), not {item!r}")
            if not p.is_floating_point():
                raise ValueError(f"parameter {name!r} is {p.dtype}; MuonEq takes real floating-point numbers")
            if not p.is_leaf:
                raise ValueError(f"parameter {name!r} is computed from others; it has no gradient of its own")
            known = {**self.named, **named}
            if name in known or any(p is other for other in known.values()):
                raise ValueError(f"parameter {name!r} appears twice")
            named[name] = p
        return named

    def _stacks(self, group: dict, named: dict[str, Tensor]) -> list[list[Member]]:
        """The members of each unit: matrices of one shape, or one large or many small parameters for Adam."""
        factors = self._lr_factors(group, named)
        stacks = collections.defaultdict(list)
        for name, p in named.items():
            if group["kind"] == "matrix":
                together = p.shape[-2:]
            else:
                together = name if p.numel() >= self.SMALL or group["rowwise"] else None
            if p.numel():
                sharding = getattr(p, "device_mesh", None), getattr(p, "placements", None)
                stacks[p.dtype, p.device, together, *sharding].append(Member(name, p, factors[name]))
        return list(stacks.values())

    def _lr_factors(self, group: dict, named: dict[str, Tensor]) -> dict[str, list[float]]:
        """Factors on the learning rate of the matrices of each parameter: the entries of lr_mul in turns."""
        if group["kind"] == "adam":
            return {name: [1.0] for name in named}
        lr_mul = [float(factor) for factor in np.atleast_1d(group["lr_mul"])]
        matrices = {}
        for name, p in named.items():
            if p.ndim not in (2, 3):
                shape = tuple(p.shape)
                raise ValueError(f"matrix parameter {name!r} has shape {shape}; (m, n) or (K, m, n) expected")
            matrices[name] = p.shape[:-2].numel() if p.numel() else 0
        total = sum(matrices.values())
        if not lr_mul or total % len(lr_mul):
            raise ValueError(f"lr_mul has {len(lr_mul)} entries for {total} matrices")
        in_turns = lr_mul * (total // len(lr_mul))
        factors = {}
        begin = 0
        for name, count in matrices.items():
            factors[name] = in_turns[begin : begin + count]
            begin += count
        return factors

    # ---- the step

    def _active(self, step: int) -> list[Unit]:
        """The units that are updated in this step, counted from 0."""
        at_work = [unit for unit in self.units if not {*unit.names} & {*self.resting}]
        return [unit for unit in at_work if (step + 1) % unit.group["every"] == 0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, tokens: int | None = None) -> Any:
        """Update the groups that are due.

        A `closure` computes the gradients first; what it returns, the loss, is returned. `tokens` is the
        global count of targets behind the gradients, for grads="token_sum" only.

        ValueError for `tokens` that are missing, not above 0 or not wanted, for settings that were changed to
        what does not fit, and for gradients that are sparse.
        """
        summed = self.grads == "token_sum"
        if summed != (tokens is not None) or summed and not tokens > 0:
            raise ValueError('step(tokens=n) with n > 0 goes with grads="token_sum"')
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = self._update
        if torch.compiler.is_compiling():  # what follows is no part of a graph
            update = torch.compiler.disable(update)
        update(tokens if summed else 1)
        return loss

    def _update(self, tokens: int) -> None:
        """The three phases, for gradients that are divided by the sum of `tokens` since the last update."""
        self._check_settings()
        summed = self.grads == "token_sum"
        for unit in self.units:
            unit.tokens += tokens
        active = self._active(self.step_count)
        self.step_count += 1

        # reduce: matrices before Adam, the largest unit first; its sum is needed last
        reducing = []
        for unit in reversed(active):
            reducing.append((unit, *unit.reduce(summed)))

        # update: Adam before matrices, the smallest unit first
        gathering, together = [], []
        for unit, _, chunk, work in reversed(reducing):
            work.wait()
            full, chunk, job = unit.update(chunk, 1 / unit.tokens, self.compiled)
            unit.tokens = 0
            if job:
                together.append((unit, full, chunk, job))
            else:
                gathering.append((unit, *unit.send(full, chunk)))
        if together:
            graph_of(update_together)([job for *_, job in together])
        for unit, full, chunk, _ in together:
            gathering.append((unit, *unit.send(full, chunk)))

        # gather: what was sent lives in these tuples until it has arrived
        for unit, full, _, work in gathering:
            work.wait()
            unit.receive(full)
            unit.note_bad(self.step_count)

    def _check_settings(self) -> None:
        """Take the groups as they are now; check those in which a word, truth value or function changed."""
        for unit in self.units:
            # somebody may have put a new group there
            unit.group = group = self.param_groups[unit.group_number]
            words = [x for x in group.values() if isinstance(x, (str, bool)) or callable(x)]
            if words != unit.words:
                check_values(group)
                if missing := [key for key in unit.state_shapes() if key not in unit.state]:
                    need = " and ".join(missing)
                    raise ValueError(
                        f"equilibrate or normuon was changed to what needs the state {need}; "
                        "that is made with the optimizer"
                    )
                unit.words = words

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the groups that the last step updated; the others go on accumulating.

        With `set_to_none` false they become zeros. So does that of a row-wise table with
        `rows_read` in any case: it is kept, and cleared in the rows that were read.
        """
        for unit in self._active(self.step_count - 1):
            for p in () if unit.clear() else unit.params:
                if set_to_none or p.grad is None:
                    p.grad = None
                else:
                    p.grad.detach_().zero_()

    def bad_since(self) -> Tensor:
        """The first step, from 1, with a gradient in this rank's chunks that was not finite: (units,) fp32.

        Infinity where all were finite.
        """
        since = [unit.bad_since for unit in self.units]
        return torch.stack(since) if since else torch.zeros(0)

    # ---- state

    def reset(self) -> None:
        """Forget all state and gradients; master copies are taken from the parameters again.

        Weights that others change between two steps are noticed without it, and the moments stay. Where there
        is a master copy, three things cannot be noticed: a change that low precision rounds away, one that
        only a rank makes that does not own the weight, and one undone before the step.
        """
        for p in self.named.values():
            p.grad = None
        for unit in self.units:
            unit.reset()
        self.step_count = 0

    def units_to_copy(self, source: str, target: str) -> tuple[Unit, Unit]:
        """The units between which `copy_state` copies; ValueError where it would not work."""
        units = {name: unit for unit in self.units for name in unit.names}
        a, b = units.get(source), units.get(target)
        alone = all(unit and len(unit.names) == 1 for unit in (a, b))
        if not alone or a.moments() != b.moments():
            raise ValueError(
                f"{target} cannot take over the optimizer state of {source}: "
                "both need the same kind of group, of which they are the only parameters"
            )
        return a, b

    def copy_state(self, source: str, target: str) -> None:
        """Give a parameter the moments of another one of its shape (tied weights that part)."""
        a, b = self.units_to_copy(source, target)
        b.reset()  # takes its master copy from the parameter
        b.updates.copy_(a.updates)
        b.take_moments(a)

    def state_dict(self) -> dict:
        """The count of steps, the full unpadded state by parameter name, and the settings of the groups.

        The same at any world size; that of DTensors is sharded as they are. Collective: every rank
        calls it. A group's "params" are names; functions are not kept. What others have put into
        `optimizer.state` is kept as it is on this rank.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        # what the parameters are called
        numbered = in_torch_checkpoint()
        keys = {name: number if numbered else name for number, name in enumerate(self.named)}
        # their state, gathered from all ranks
        state: dict[str | int, dict] = {}
        for unit in self.units:
            # a rank that owns no part of a parameter may not know that it was updated
            updates = self.comm.all_reduce(unit.updates.to(unit.device, copy=True), dist.ReduceOp.MAX)
            for name, count in zip(unit.names, updates.tolist()):
                state[keys[name]] = {"updates": count}
            for key in unit.state:
                for name, value in zip(unit.names, unit.saved(key)):
                    state[keys[name]][key] = value
        for name, p in self.named.items():
            if foreign := self._foreign_state(p):
                state.setdefault(keys[name], {}).update(copy.deepcopy(foreign))
        # the settings of their groups
        groups = []
        for group, names in zip(self.param_groups, self._names()):
            kept = {k: v for k, v in group.items() if k != "params" and not callable(v)}
            if numbered:  # torch's checkpoints know no dtypes
                kept = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in kept.items()}
            groups.append({**copied(kept), "params": [keys[name] for name in names]})
        content = {"step": self.step_count, "state": state, "param_groups": groups}
        if others := self._state_of_no_parameter():
            # the wrapper looks for it where torch's optimizers have it
            state.update(copy.deepcopy(others))
            content["others"] = [*others]
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, content)
            content = content if changed is None else changed
        return content

    def _names(self) -> list[list[str]]:
        """The names of the parameters of each group."""
        names = {id(p): name for name, p in self.named.items()}
        return [[names[id(p)] for p in group["params"]] for group in self.param_groups]

    def _foreign_state(self, p: Tensor) -> dict[str, Any]:
        """What others have put into `optimizer.state` of a parameter."""
        return {k: v for k, v in self.state.get(p, {}).items() if k not in ("updates", *Unit.STATE)}

    def _state_of_no_parameter(self) -> dict[Any, Any]:
        """What wrappers such as TRAC keep in `optimizer.state` under a name of their own."""
        return {key: value for key, value in self.state.items() if not isinstance(key, Tensor)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a `state_dict` written at any world size; one without groups leaves the settings.

        ValueError naming the parameter or group that does not fit; then nothing is taken over.
        """
        content = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, content)
            content = content if changed is None else changed
        # does it fit?
        if not isinstance(content.get("state"), dict):
            raise ValueError(f"a state_dict of MuonEq has 'step' and 'state'; this one has {[*content]}")
        state, groups = self._by_name(content)
        kept = content.get("others", [])  # names of entries of the state, once the entries themselves
        others = {key: state.pop(key) if key in state else kept[key] for key in kept}
        settings = self._settings_from(groups)
        for unit in self.units:
            state |= {name: unit.converted(state[name]) for name in unit.names if name in state}
        self._check_state(state)
        factors = []
        for group, names in zip(settings, self._names()):
            factors.append(self._lr_factors(group, {name: self.named[name] for name in names}))
        # from here on nothing is refused
        for group, new in zip(self.param_groups, settings):
            group.update(new)
        for unit in self.units:
            of_group = factors[unit.group_number]
            unit.lr_mul = unit.chunk_of_factors([x for name in unit.names for x in of_group[name]])
            saved = [state[name] for name in unit.names]
            for key in unit.state:
                unit.load(key, [entry[key] for entry in saved])
            unit.updates.copy_(torch.tensor([int(entry["updates"]) for entry in saved]))
            unit.tokens = 0
        for name, entry in state.items():
            foreign = {k: v for k, v in entry.items() if k not in ("updates", *Unit.STATE)}
            self.state[self.named[name]].update(copy.deepcopy(foreign))
        # copied, but for the parameters themselves, which may be keys
        self.state.update(copy.deepcopy(others, {id(p): p for p in self.named.values()}))
        # torch.distributed.checkpoint drops what it does not know
        steps = [int(unit.updates.max()) * unit.group["every"] for unit in self.units]
        self.step_count = content.get("step", max(steps, default=0))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _by_name(self, content: dict) -> tuple[dict[str, dict], list[dict] | None]:
        """State by name and groups of a `state_dict`; numbers, as torch has them, go by position."""
        state, groups = content["state"], content.get("param_groups", content.get("groups"))
        saved = [key for group in groups or () for key in group.get("params", ())]
        if not in_torch_checkpoint() and not any(isinstance(key, int) for key in saved):
            return dict(state), groups
        own = [name for names in self._names() for name in names]
        if len(saved) != len(own):
            raise ValueError(f"the state has {len(saved)} parameters, this optimizer {len(own)}")
        name = dict(zip(saved, own))
        groups = [{**group, "params": [name[key] for key in group["params"]]} for group in groups]
        return {name.get(key, key): entry for key, entry in state.items()}, groups

    def _check_state(self, state: dict[str, dict]) -> None:
        """ValueError where state does not fit its parameter; a frozen parameter may have none."""
        expected: dict[str, dict] = {}
        for unit in self.units:
            for name, p in zip(unit.names, unit.params):
                expected[name] = {key: tuple(unit.shape_of(p, key)) for key in unit.state}
                if name not in state and not p.requires_grad:
                    zeros = {key: torch.zeros(shape) for key, shape in expected[name].items()}
                    master = {"master": p} if "master" in zeros else {}
                    state[name] = {"updates": 0, **zeros, **master}
        for name in expected.keys() | state.keys():
            saved = state.get(name, {})
            found = {key: tuple(value.shape) for key, value in saved.items() if key in Unit.STATE}
            if name not in self.named or expected.get(name, {}) != found:
                raise ValueError(f"optimizer state of {name} is {found}, expected {expected.get(name)}")
            if found and "updates" not in saved:
                raise ValueError(f"optimizer state of {name} has no count of updates; MuonEq writes one")

    def _settings_from(self, groups: list[dict] | None) -> list[dict]:
        """The settings of each group after loading; ValueError where saved groups are not those of now."""
        if groups is None:
            return [{**group} for group in self.param_groups]
        if len(groups) != len(self.param_groups):
            counts = f"{len(groups)} parameter groups, this optimizer {len(self.param_groups)}"
            raise ValueError(f"the state has a different number of parameter groups: {counts}")
        by_names = {frozenset(group["params"]): group for group in groups if group.get("params")}
        settings = []
        for group, names, saved in zip(self.param_groups, self._names(), groups):
            if by_names and names:
                saved = by_names.get(frozenset(names))  # wherever it stands
            if saved is None or saved.get("kind", group["kind"]) != group["kind"]:
                wanted = f"{group['kind']} group of the parameters {', '.join(names)}"
                raise ValueError(f"the state has no {wanted}")
            saved = copied({**saved, "params": None})
            saved.pop("rowwise", None)  # the state has been made
            if isinstance(saved.get("work_dtype"), str):
                saved["work_dtype"] = getattr(torch, saved["work_dtype"].removeprefix("torch."))
            settings.append({**group, **saved, "params": group["params"]})
            check_values(settings[-1])
        return settings

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: each rank its own chunks, for as many processes."""
        foreign = {p: state for p in self.named.values() if (state := self._foreign_state(p))}
        foreign |= self._state_of_no_parameter()
        own = ("grads", "comm", "step_count", "units", "named")
        return {**super().__getstate__(), "state": foreign, **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        foreign = collections.defaultdict(dict, state["state"])
        defaults = dict(state["defaults"])
        super().__setstate__({**state, "state": foreign})
        self.defaults = defaults  # torch adds a field that no group has
        for unit in self.units:
            unit.join(self.comm)
            self._show_state(unit)


# ----------------------------------------------------------------------------------------------------
# 6. Schedule
#
# Pure functions of a `Schedule` and a step: which stage is in force, the factor on the learning rates,
# the weights of the losses further ahead, the momentum, and what enters the mean of the weights.
# `Trainer.advance` asks them in every step.
# A new shape of schedule (cosine, say) is a change of `learning_rate_factor`.
# ----------------------------------------------------------------------------------------------------


def total_steps(schedule: Schedule) -> int:
    return schedule.steps + schedule.extension


def stage_begins(schedule: Schedule) -> list[int]:
    """The first step of each stage."""
    return [round(stage.begin * schedule.steps) for stage in schedule.stages]


def stages_until(schedule: Schedule, step: int) -> list[Stage]:
    """The stages that have begun by this step; the last one is in force."""
    return [stage for stage, begin in zip(schedule.stages, stage_begins(schedule)) if begin <= step]


def long_windows(schedule: Schedule, step: int) -> list[int]:
    """The history of the long window up to this step, one entry for each stage."""
    return [stage.windows[1] for stage in stages_until(schedule, step)]


def learning_rate_factor(schedule: Schedule, step: int) -> float:
    """The factor on all learning rates: that of the stage, faded to the floor over the cooldown."""
    remaining = max(0.0, 1 - step / schedule.steps)  # share of the scheduled steps
    if schedule.cooldown:
        share = min(1.0, remaining / schedule.cooldown)
    else:
        share = float(remaining > 0)
    return share * stages_until(schedule, step)[-1].lr + (1 - share) * schedule.floor


def loss_weights(schedule: Schedule, step: int) -> list[float]:
    """Weights of the next target (1) and of those 2, 3, ... tokens ahead; linear within a stage (#53)."""
    number = len(stages_until(schedule, step)) - 1
    borders = [*stage_begins(schedule), total_steps(schedule)]
    begin, end = borders[number], borders[number + 1]
    weights = [1.0]
    for first, last in schedule.stages[number].ahead:
        weights.append(first + (last - first) * (step - begin) / (end - begin))
    return weights


def momentum_at(schedule: Schedule, step: int) -> float:
    """Rises over the first steps, falls again over the last."""
    low, high = schedule.momentum
    remaining = total_steps(schedule) - step
    rising = step / schedule.momentum_warmup if schedule.momentum_warmup else 1.0
    falling = remaining / schedule.momentum_cooldown if schedule.momentum_cooldown else 1.0
    return low + (high - low) * min(1.0, rising, falling)


def share_in_mean(average: Average, steps: int, step: int) -> float:
    """Share of the weights after a step (from 0) in the running mean; 0 where they do not enter it.

    With a span of 80 steps, a memory of a half and every fourth step, the mean takes 20 weights: the first
    ten in equal parts, from then on a tenth of each.
    """
    behind, left = divmod(steps - 1 - step, average.every)  # weights that are still to come
    number = math.ceil(average.span * steps / average.every) - behind  # of this one, from 1
    if left or number < 1:
        return 0.0
    return 1 / min(number, max(1, round(average.memory * average.span * steps / average.every)))


# ----------------------------------------------------------------------------------------------------
# 7. Run
#
# A run from a parsed command line to the final line of its log is a `Trainer`. Who calls whom:
#
#     main (section 8)
#       Trainer.__init__     load_data, build_model; nothing is compiled yet
#       Trainer.train
#         warm_up            every graph and the optimizer once, then the weights of the seed
#         resume             weights, state and position of a checkpoint
#         open_log           the header
#         the loop, on the clock:
#           advance          set_stage, forward_backward, learning rates, MuonEq.step
#           report           a training loss in the log, every few steps
#           validate, save   off the clock
#         finish             the final line
#
# Before them stand what a Trainer uses: the check of the data, the clock, the log and the checkpoints.
# All events of the log pass through `Log.write` on rank 0; that is the place for a tracker of your own.
# ----------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "train_gpt checkpoint 2"
CHECKPOINTS_KEPT = 2
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")  # in the log
PASS_TOKENS = 8192  # of a forward pass where --micro_rows does not say how many rows it has
# On a CPU inductor adds up to 4,096 numbers in another way than more of them: passes of at most so many
# tokens share one graph.
ONE_GRAPH_TOKENS = 4096
# Bytes of a GPU from which on --memory auto takes this way. tools/dry_run.py counts what `short` needs on one
# GPU, 18.6 GB and compiled 22.5 GB; the rest is for what counting misses.
LEAST_MEMORY = {"low": 22e9, "normal": 26e9}
BYTE_VOCABULARY = 257  # 256 bytes and the document start: such a corpus needs no tokenizer
PROMPT, TEXT_BYTES, TEXT_SECONDS = "HAMLET.\n", 200, 5.0  # of the text after a run, and the most of it
# What settings were called before December 2026: checkpoints of that time are read, options are told apart.
FORMER_NAMES = {
    "value.": "tables.",
    "hidden.": "matrix_adam.",
    "model.frozen": "model.attention_source",
    "matrix.lr_mul": "matrix.mlp_lr_mul",
    "matrix.steps": "matrix.iterations",
    "gate.steps": "gate.iterations",
}


def present_name(name: str) -> str:
    """What a setting "section.field" is called now."""
    for before, now in FORMER_NAMES.items():
        if name == before or (before.endswith(".") and name.startswith(before)):
            return now + name.removeprefix(before)
    return name


class Refusal(ValueError):
    """What all ranks refuse with the same sentence; rank 0 says it."""


@functools.cache
def source() -> tuple[bytes, str]:
    """This file and its sha256, read once: log and checkpoints agree even if the file changes meanwhile."""
    content = Path(__file__).read_bytes()
    return content, hashlib.sha256(content).hexdigest()


# ---- the data of a run


def folder_from(variable: str, beside_this_file: str) -> Path:
    """The folder that an environment variable names; one that is empty is as good as none."""
    return Path(os.environ.get(variable) or Path(__file__).resolve().parent / beside_this_file)


def how_to_make(corpus: str) -> str:
    """What makes a corpus that is not there, as far as it is beside this file."""
    scripts = Path(__file__).resolve().parent / "data"
    script = "fineweb" if corpus.startswith("fineweb") else corpus
    if (scripts / f"{script}.py").is_file():
        return f"run `python data/{script}.py` or set DATA_DIR"
    if (scripts / "tokenize_text.py").is_file():
        return f"run `python data/tokenize_text.py {corpus} FILES` or set DATA_DIR"
    return "set DATA_DIR to the folder of the corpora"


def read_manifest(folder: Path, data: Data) -> dict[Path, str]:
    """The shards of a corpus and their sha256, as the manifest beside them has them.

    ValueError for a manifest that is missing, damaged or of another tokenizer.
    """
    hint = how_to_make(data.corpus)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8-sig"))
        found = manifest["vocab_size"], manifest["document_start"]
        digests = {folder / name: file["sha256"] for name, file in sorted(manifest["files"].items())}
    except FileNotFoundError:
        raise ValueError(f"no data: {folder / 'manifest.json'} is missing; {hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / 'manifest.json'} is not a manifest of token shards; {hint}") from None
    needed = data.vocab_size, data.document_start
    if found != needed:
        raise ValueError(f"{folder} has vocabulary and document start {found}, the track needs {needed}")
    return digests


def shards_of(folder: Path, data: Data) -> tuple[list[Path], list[Path], dict[Path, str]]:
    """Training shards, validation shards and the sha256 of each; ValueError where one kind is missing."""
    digests = read_manifest(folder, data)
    training = [path for path in digests if "train_" in path.name]
    validation = [path for path in digests if "val_" in path.name]
    if not training or not validation:
        raise ValueError(f"{folder} holds no {'validation' if training else 'training'} shards")
    return training, validation, digests


def check_tokens(path: Path, data: Data, place: Any) -> None:
    """ValueError, naming the `place`, for a shard with tokens outside the vocabulary."""
    largest = int(read_shard(path).max(initial=0))
    if largest >= data.vocab_size:
        raise ValueError(f"{place} holds token {largest}, the vocabulary has {data.vocab_size}")


class Packed(NamedTuple):
    rows: int  # of the schedule
    packed: int  # of them, from the epochs that were given
    documents: int  # most in one of these
    position: tuple[int, int, int]  # of the packer after them

    @property
    def epochs(self) -> int:
        """How many were begun."""
        return self.position[0] + (self.position[1:] > (0, 0))


def pack_schedule(track: Track, training: Sequence[Path], epochs: int) -> Packed:
    """Pack the rows of a whole schedule, as far as so many epochs give them."""
    data, schedule = track.data, track.schedule
    begins = [*stage_begins(schedule), total_steps(schedule)]
    counts = [
        data.rows * stage.batch * max(0, end - begin)
        for stage, begin, end in zip(schedule.stages, begins, begins[1:])
    ]
    # The packer itself never ends, so that the row that takes more than there is can be counted out.
    packer = Packer(training, dataclasses.replace(data, epochs=sys.maxsize))
    packed, most, position = 0, 0, packer.position
    for stage, count in zip(schedule.stages, counts):
        for _ in range(count):
            documents = len(packer.next_row(stage.document_cut))
            if packer.position > (epochs, 0, 0):
                return Packed(sum(counts), packed, most, position)
            packed, most, position = packed + 1, max(most, documents), packer.position
    return Packed(sum(counts), packed, most, position)


def too_few_tokens(track: Track, folder: Path, training: Sequence[Path], found: Packed) -> str:
    """The sentence for a schedule that takes more than the epochs give: the numbers, and what would do."""
    data, schedule, T = track.data, track.schedule, track.data.row_tokens
    ways = []
    # so many are tried, but not more than a few billion tokens
    most = min(100, 2 + 2**32 // (found.packed * T + 1)) * data.epochs
    more = pack_schedule(track, training, most)
    if more.packed == more.rows:
        ways.append(f"--data.epochs {more.epochs}")
    steps = schedule.steps * found.packed // found.rows
    while steps >= 1:
        shorter = dataclasses.replace(track, schedule=dataclasses.replace(schedule, steps=steps))
        tried = pack_schedule(shorter, training, data.epochs)
        if tried.packed == tried.rows:
            ways.append(f"--schedule.steps {steps}")
            break
        steps = steps * tried.packed // tried.rows
    there = sum(path.stat().st_size // 2 - 2 * HEADER_INTS for path in training)
    return (
        f"the schedule takes {found.rows * T:,} training tokens, but an epoch gives "
        f"{found.packed * T // data.epochs:,} of the {there:,} in {folder} and --data.epochs is "
        f"{data.epochs}; {' or '.join(ways) or 'more text'} would do"
    )


def check_data(track: Track, folder: Path) -> dict[str, Any]:
    """Read every file that the run will read, before the clock; ValueError at the first thing that is wrong.

    Returns the sha256 of each file used ("digests") and the most documents of a training row ("documents").
    """
    data = track.data
    training, validation, digests = shards_of(folder, data)
    found = pack_schedule(track, training, data.epochs)
    if found.packed < found.rows:
        raise ValueError(too_few_tokens(track, folder, training, found))
    epoch, last, _ = found.position
    used = (training if epoch else training[: last + 1]) + validation
    for path in used:
        check_tokens(path, data, path)
        if hashlib.sha256(path.read_bytes()).hexdigest() != digests[path]:
            raise ValueError(f"{path} does not match the sha256 in its manifest; fetch it again")
    return {"digests": {path.name: digests[path] for path in used}, "documents": found.documents}


# ---- the machine as it is


def check_system() -> None:
    """ValueError where runs cannot be kept apart by locks on files, which is on Windows."""
    if importlib.util.find_spec("fcntl") is None:
        raise ValueError("this needs Linux or macOS; on Windows use WSL")


def compile_cache(device: torch.device) -> Path:
    """The folder in which torch's compiler keeps what it has made for this device."""
    name = device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(device).replace(" ", "-")
    here = folder_from("CACHE_DIR", ".cache") / f"inductor-{torch.__version__}-{name}"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or here)


def cannot_write(folder: Path) -> str:
    """Why nothing can be written to a folder, which may be still to be made; "" where something can."""
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):  # os.access would say yes to a folder in /proc
            return ""
    except OSError as error:
        return f"{there}: {error.strerror}"


def closed_inside(folder: Path) -> str:
    """The first thing in a folder that this user may not use, which another one has made; "" for none."""
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(parent, name)
            need = os.R_OK | os.W_OK | os.X_OK if name in folders else os.R_OK
            if not os.access(path, need) and os.path.exists(path):  # else it was removed meanwhile
                return f"{path}: {os.strerror(errno.EACCES)}"
    return ""


def check_folders(run: Run, device: torch.device) -> None:
    """ValueError for a folder that the run will write to and cannot."""
    if why := cannot_write(Path(run.out)):
        raise ValueError(f"--out {run.out} cannot be written ({why}); choose another folder")
    may_do_without = run.compile == "auto" and device.type == "cpu"
    if run.compile == "none" or may_do_without:
        return
    if why := cache_problem(device):
        raise ValueError(f"{why}; set CACHE_DIR to another folder, or take --compile none")


def cache_problem(device: torch.device) -> str:
    """Why the compile cache is of no use; "" where it is."""
    cache = compile_cache(device)
    why = cannot_write(cache) or closed_inside(cache)
    return f"the compile cache cannot be written ({why})" if why else ""


def compiler_and_probe(device_type: str) -> tuple[str, list[str], str, str]:
    """The compiler that torch will call, its words, a small source for it, and the packages it comes in."""
    mac = sys.platform == "darwin"
    if device_type == "cpu":  # kernels in C++; Python.h is in each of them
        compiler = os.environ.get("CXX", "clang++" if mac else "g++")
        words, headers = ["-x", "c++"], ["Python.h", "cmath"]
        if not mac:
            words, headers = [*words, "-fopenmp"], [*headers, "omp.h"]
        packages = "g++ python3-dev"
    else:  # Triton's launcher in C
        compiler = os.environ.get("CC") or ("gcc" if shutil.which("gcc") else "clang")
        words, headers = ["-x", "c"], ["Python.h"]
        packages = "gcc python3-dev"
    source = "".join(f"#include <{header}>\n" for header in headers)
    install = "xcode-select --install" if mac else f"apt install {packages}"
    return compiler, ["-shared", "-fPIC", *words, f"-I{sysconfig.get_path('include')}"], source, install


def failed_probe(command: Sequence[str], library: Path) -> str:
    """Why a compiler's command gives no `library` that can be loaded; "" where it does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if done.returncode:
            return next((line for line in said if "error: " in line), said[-1]).rpartition("error: ")[2][:200]
        ctypes.CDLL(str(library))  # fails for another machine's code, and on disks that allow no programs
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:200]
    return ""


def compiler_problem(cache: Path, device_type: str = "cpu") -> str:
    """Why torch cannot compile for a device here, and what to install; "" where it can.

    A tiny file is compiled and loaded, which takes 0.3 s, once for each compiler: a file in the `cache`
    remembers that it went well.
    """
    compiler, words, source, install = compiler_and_probe(device_type)
    found = shutil.which(compiler)
    if found is None:
        return f"there is no compiler {compiler}; `{install}` brings one"
    known = [os.path.realpath(found), os.stat(found).st_mtime_ns, words, source, torch.__version__]
    marker = cache / f"compiler-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}-works"
    if marker.exists():
        return ""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        probe, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        probe.write_text(source)
        why = failed_probe([found, *words, str(probe), "-o", str(library)], library)
    if why:
        return f"the compiler {compiler} does not work ({why}); `{install}` brings what it needs"
    marker.touch()
    return ""


# ---- several processes


def on_rank_0(comm: Comm, work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, for all ranks; Refusal on all of them when it fails."""
    result, refused = None, None
    if comm.rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            refused = explanation(error)
    if comm.world_size > 1:
        box = [result, refused]
        dist.broadcast_object_list(box, src=0)
        result, refused = box
    if refused is not None:
        raise Refusal(refused)
    return result


def watch(trainer: Trainer, seconds: int, ended: threading.Event, store: dist.Store) -> None:
    """Thread that ends this process when no rank has moved for `seconds`, or the store of the ranks is gone.

    All ranks make the same collective calls in the same order, so those that have made fewest hold up
    the others.
    """
    comm = trainer.comm
    calls, idle, why = -1, 0, ""
    try:
        while not why and not ended.wait(1.0):
            latest = comm.calls + trainer.optimizer.comm.calls
            idle = idle + 1 if latest == calls else 0
            calls = latest
            store.set(f"calls/{comm.rank}", str(calls))
            if idle > seconds and comm.world_size > 1:
                # adding 0 reads a number, 0 where nothing was set
                made = [store.add(f"calls/{rank}", 0) for rank in range(comm.world_size)]
                behind = ", ".join(str(rank) for rank, n in enumerate(made) if n == min(made))
                why = f"no progress for {seconds} s (--timeout), held up by rank {behind}"
    except RuntimeError:
        why = "the process that started it does not answer"
    if why and not ended.is_set():
        print(f"train_gpt.py: rank {comm.rank} ends: {why}", file=sys.stderr, flush=True)
        os._exit(1)


# ---- clock and log


class Clock:
    """Seconds of training. Stopped during validation and checkpoints; waits for the device at both ends."""

    def __init__(self, device: torch.device):
        self.synchronize = torch.get_device_module(device).synchronize
        self.seconds = 0.0  # up to the last stop
        self.began: float | None = None  # None while it is stopped

    def start(self) -> None:
        self.synchronize()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.synchronize()
        self.seconds = self.now()
        self.began = None

    def now(self) -> float:
        running = 0.0 if self.began is None else time.perf_counter() - self.began
        return self.seconds + running


class Log:
    """One JSON line per event, flushed; the source stands beside it once per sha256. Only rank 0 writes.

    A log that is there already keeps its lines up to the `step` of `open`: what came after it, the end too,
    happens again.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, None
        self.events: set[tuple[str, int | None]] = set()  # (event, step) of the lines that were kept

    def open(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content, digest = source()
        (self.path.parent / f"{digest}.py").write_bytes(content)
        self.file = open(self.path, "a+b")
        import fcntl  # only here: Windows has none, and the optimizer is of use there too

        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes {self.path}; wait until it has ended") from None
        self.file.truncate(self.size_until(step))

    def size_until(self, step: int) -> int:
        """Bytes of the lines up to a step, whose events are noted; ValueError for a file that is no log."""
        size = 0
        self.file.seek(0)
        for line in self.file:
            if not line.endswith(b"\n"):  # a kill can tear the last line
                break
            try:
                event = json.loads(line)
                name, at = event["event"], event.get("step")
                if name == "final" or (at or 0) > step:
                    break
                self.events.add((name, at))
            except (ValueError, AttributeError, KeyError, TypeError):
                raise ValueError(f"{self.path} is not a log: {line[:40]!r}") from None
            size += len(line)
        return size

    def write(self, event: str, **fields: Any) -> None:
        """Every event of a run passes here. A number that is not finite becomes null, as JSON demands."""
        if not self.file:
            return
        line = {"event": event, **fields}
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None
        self.file.write((json.dumps(line) + "\n").encode())
        self.file.flush()


def in_words(seconds: float) -> str:
    """A time that is a guess."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class Progress:
    """What a run says on the screen: lines that stay, and what is being done. Only rank 0 speaks.

    On a terminal a bar at its foot is drawn anew by a thread. Elsewhere there are lines: one when
    something begins and, until the training begins, one every NEWS seconds while it lasts.
    """

    NEWS = 5.0  # seconds: the most without a line before the training, the least between two during it
    REDRAW = 0.5  # seconds

    def __init__(self, rank: int):
        self.speaks = rank == 0
        self.bar: Any = None  # of tqdm, while something is being done on a terminal
        self.said = -math.inf  # when the last line was written

    def say(self, line: str) -> None:
        """A line that stays."""
        self.said = time.monotonic()
        if self.bar is not None:
            self.bar.write(line)
        elif self.speaks:
            print(line, flush=True)

    def now(self, what: str, share: float = 0.0, details: str = "") -> None:
        """What is being done by now, which share of it, and what else there is to say."""
        self.what, self.share, self.details = what, share, details

    def step(self, what: str, share: float, details: str, last: bool) -> None:
        """As `now`, for a step of the training: without a bar the first, the last and some are lines."""
        self.now(what, share, details)
        if self.bar is None and (last or time.monotonic() >= self.said + self.NEWS):
            self.say(f"{what} {details}")

    @contextlib.contextmanager
    def doing(self, what: str, training: bool = False) -> Iterator[None]:
        """Say what is being done while it is done; without a bar no thread disturbs the training."""
        self.now(what)
        if not self.speaks:
            yield
            return
        self.bar = self.new_bar(what) if sys.stdout.isatty() else None
        if self.bar is None:
            self.say(what)
        self.said = -math.inf if training else self.said  # the first step is said
        ended = threading.Event()
        thread = threading.Thread(target=self.keep_saying, args=(ended,), daemon=True, name="progress")
        if self.bar is not None or not training:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def new_bar(self, what: str) -> Any:
        """An empty bar that vanishes when it is closed; None where tqdm is not installed."""
        try:
            from tqdm import tqdm  # only here: it takes a moment
        except ImportError:
            return None
        tqdm.monitor_interval = 0  # no thread of its own
        form = "{desc} |{bar}| {elapsed}{postfix}"
        # tqdm draws nothing where a terminal does not know them
        columns, rows = shutil.get_terminal_size()
        size = {"ncols": columns - 1, "nrows": rows}
        return tqdm(desc=what, total=1.0, bar_format=form, leave=False, file=sys.stdout, **size)

    def keep_saying(self, ended: threading.Event) -> None:
        """Thread that draws the bar, or says again what is being done and for how long."""
        began = time.monotonic()
        with contextlib.suppress(OSError):  # nobody reads it any more
            while not ended.wait(self.NEWS if self.bar is None else self.REDRAW):
                if self.bar is None:
                    self.say(f"{self.what}, {time.monotonic() - began:.0f} s")
                else:
                    self.bar.ncols = shutil.get_terminal_size().columns - 1
                    self.bar.n = self.share
                    self.bar.set_description_str(self.what, refresh=False)
                    self.bar.set_postfix_str(self.details)


def process_age() -> float:
    """Seconds since this process was started, where the system says so."""
    if sys.platform != "linux":
        return 0.0
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the system's start
    return float(Path("/proc/uptime").read_text().split()[0]) - started


def peak_memory(device: torch.device) -> int:
    """Bytes: of the accelerator's allocator, or of the process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    import resource  # only here: Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def waiting() -> str:
    """How the threads of a parallel region wait for each other, as OpenMP was told."""
    settings = [f"{name}={os.environ[name]}" for name in WAITING if name in os.environ]
    return " ".join(settings) or "default"


def environment(device: torch.device, comm: Comm) -> dict[str, Any]:
    """What a reader of the log must know about the machine."""

    def command(line: str) -> str:  # "" where there is no such command
        folder = Path(__file__).parent
        return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder).stdout.strip()

    # A repository that merely encloses this file says nothing of it.
    tracked = bool(command(f"git ls-files -- {shlex.quote(Path(__file__).name)}"))
    if device.type == "cuda":
        driver = command("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        name = torch.cuda.get_device_name(device)
    else:
        driver = ""
        name = command("sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1") or os.uname().machine
    return {
        "source_sha256": source()[1],
        "git_commit": command("git rev-parse HEAD") if tracked else None,
        "git_dirty": bool(command("git status --porcelain --untracked-files=no")) if tracked else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "driver": driver,
        "device": name,
        "cpus": os.cpu_count(),
        "world_size": comm.world_size,
        "threads": torch.get_num_threads(),
        "waiting": waiting(),
    }


# ---- checkpoints


def save_checkpoint(path: Path, content: dict) -> None:
    """All or nothing: written under another name, flushed, then renamed. The last CHECKPOINTS_KEPT stay.

    The sha256 of the content stands at the end of the file.
    """
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
    by_age = sorted(path.parent.glob("step_*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for old in by_age[:-CHECKPOINTS_KEPT]:
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
            other = f"checkpoint {path} belongs to another {name}"
            if name == "track":
                other += f" ({different_settings(found['key'].get(name), value)})"
            raise ValueError(f"{other}; --adopt true takes it as the start of a new run")
    return found


def different_settings(before: Any, now: dict[str, dict[str, Any]]) -> str:
    """The settings "section.field" in which two tracks differ, the first few by name."""
    before = before if isinstance(before, dict) else {}
    names = []
    for section in now.keys() | before.keys():
        a, b = before.get(section, {}), now.get(section, {})
        names += [f"{section}.{field}" for field in a.keys() | b.keys() if a.get(field) != b.get(field)]
    shown = ", ".join(sorted(names)[:3])
    return f"other {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def newest_checkpoint(out: Path, key: dict) -> str:
    """The newest good checkpoint of unfinished runs with this `key`, "" for none; others are named."""
    by_age = sorted(out.glob("*/step_*.pt"), key=lambda path: path.stat().st_mtime_ns)
    for path in reversed(by_age):
        try:
            if not (path.parent / "finished").exists() and load_checkpoint(path, key):
                return str(path)
        except ValueError as error:
            print(f"train_gpt.py: not resumed from: {error}", file=sys.stderr)
    return ""


# ---- what a track makes of a run


def build_optimizer(model: GPT, track: Track) -> MuonEq:
    """Which parameter is updated by which section of the track."""

    def muon(settings: MuonSection, adam: Adam, lr_mul: Any = 1.0) -> dict[str, Any]:
        if settings.kind == "adam":
            return {"kind": "adam", **vars(adam)}
        shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(Muon)}
        others = {"kind": "matrix", "steps": settings.iterations, "lr_mul": lr_mul, "work_dtype": model.dtype}
        return {**shared, **others}

    def adam(settings: Adam) -> dict[str, Any]:
        return {"kind": "adam", **vars(settings)}

    table = (
        (muon(track.matrix, track.matrix_adam), "qk", "vo"),
        (muon(track.matrix, track.matrix_adam, track.matrix.mlp_lr_mul), "mlp"),
        (muon(track.gate, track.gate_adam), "gate", "value_gate", "smear_gate"),
        (adam(track.embed), "embed"),
        (adam(track.tables), "value_embed", "ngram_embed"),
        (adam(track.head), "lm_head"),
        (adam(track.scalar), "residual", "value_mix", "xsa", "skip", "smear", "backout"),
    )
    groups = []
    for settings, *names in table:
        groups.append({**settings, "params": [(name, getattr(model, name)) for name in names]})
    return MuonEq(groups, grads="token_sum")


def choose_memory(run: Run, device: torch.device) -> tuple[str, str]:
    """normal or low, and why where the GPU decides."""
    if run.memory != "auto" or run.track == "tiny" or device.type != "cuda":
        return run.memory.replace("auto", "normal"), ""
    has, needs = torch.cuda.get_device_properties(device).total_memory, LEAST_MEMORY["normal"]
    sizes = f"the GPU has {has / 1e9:.1f} GB, normal is for {needs / 1e9:.0f} GB or more"
    return ("low", sizes) if has < needs else ("normal", "")


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What attention runs on, for the log; ValueError for a kernel that cannot be used here."""
    try:
        if name != "fa2":
            torch.nn.attention.activate_flash_attention_impl(name.upper())
            if not supports(device, name):
                raise RuntimeError("it is not made for this GPU or this torch")
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--attention {name} cannot be used here ({error}); fa2 is part of torch") from None
    return name if dtype.itemsize == 2 and supports(device, "flash") else "blocked"


def rows_per_pass(
    track: Track, run: Run, world_size: int, batch: int = 1, tokens: int = PASS_TOKENS
) -> int:
    """Rows of a forward pass in stages of this `batch`: as many as have `tokens`, or as asked for.

    ValueError for a number of processes or of rows that does not divide the rows of a step.
    """
    rows = track.data.rows
    if rows % world_size:
        allowed = [n for n in range(1, rows + 1) if rows % n == 0]
        cannot = f"{world_size} processes do not divide the {rows} rows of a step"
        raise ValueError(f"{cannot}; allowed: {allowed}")
    local = rows // world_size
    if run.micro_rows:
        if local % run.micro_rows:
            raise ValueError(f"micro_rows {run.micro_rows} does not divide the {local} rows of a process")
        return run.micro_rows
    most = max(1, tokens // track.data.row_tokens)
    return max(n for n in range(1, most + 1) if local * batch % n == 0)


def untie_step(track: Track, period: int) -> int:
    """The step before which head and embedding part (untie, split).

    It is rounded up to a multiple of `period`: then no gradients wait for an update.
    """
    wanted = round(track.model.tied * track.schedule.steps)
    return math.ceil(wanted / period) * period


class WeightMeans:
    """Weight averages (EMA) of some parameters, fp32, whole on every rank: all have the same ones."""

    def __init__(self, model: GPT, average: Average):
        params = dict(model.named_parameters())
        for name, blend in average.blends:
            if name not in params or not 0 <= blend <= 1:
                known = "is no parameter" if name not in params else f"has the share {blend}, not 0 to 1"
                raise ValueError(f"average.blends: {name} {known}")
        self.blends = {name: blend for name, blend in average.blends if blend and params[name].numel()}
        self.params = {name: params[name] for name in self.blends}
        # They are there from the start, so that a run in too little memory does not get to its last steps.
        self.means = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.params.items()}

    @torch.no_grad()
    def add(self, share: float) -> None:
        """Let the weights as they are be this share of the means; a share of 1 begins them anew."""
        for name, mean in self.means.items():
            mean.lerp_(self.params[name].float(), share)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Give a parameter the mean of another one (tied weights that part), which may have none."""
        if target in self.means:
            self.means[target].copy_(self.means.get(source, self.params[target]))

    def load(self, means: dict[str, Tensor]) -> None:
        """The means of a checkpoint; they begin anew where it has others."""
        if means.keys() != self.means.keys():
            return self.add(1.0)
        for name, mean in means.items():
            self.means[name].copy_(mean)

    @torch.no_grad()
    def blend(self) -> None:
        """Move each parameter towards its mean, each matrix with the norm that it has.

        A mean is shorter than what it is the mean of, and the model was trained with the longer ones.
        """
        for name, mean in self.means.items():
            p = self.params[name]
            weights = p.float()
            blended = weights.lerp(mean, self.blends[name])
            if p.ndim > 1:
                before, after = (torch.linalg.matrix_norm(x, keepdim=True) for x in (weights, blended))
                blended *= before / after.clamp_min(TINY_NUMBER)
            p.copy_(blended)


# ---- compiled or not
#
# A run of seconds is over before its graphs are compiled. With --compile auto a run on a CPU is compiled
# only where a run of the same source, settings and torch has left its graphs in the cache and is known to
# end sooner with them. For this each complete run leaves its times beside the graphs, in `history_file`.


def history_file(trainer: Trainer) -> Path:
    """Where runs that would have the same graphs as this one note their times."""
    run, facts = trainer.run, {key: trainer.key[key] for key in ("source", "track", "dtype")}
    facts |= {"micro_rows": run.micro_rows, "memory": trainer.memory, "ranks": trainer.comm.world_size}
    facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return compile_cache(trainer.device) / f"times-{digest[:16]}.json"


def read_history(path: Path) -> dict[str, list[float]]:
    """By mode of compilation: seconds from the start of the process to the first step, and of training."""
    try:
        history = json.loads(path.read_text())
        return {mode: [float(start), float(training)] for mode, (start, training) in history.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def note_times(path: Path, mode: str, start: float, training: float) -> None:
    """Add the times of a complete run to the history. A cold start is noted as 0: it will not be repeated."""
    history = read_history(path) | {mode: [start, training]}
    with contextlib.suppress(OSError):  # a cache that is read-only serves as well
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_text(json.dumps(history))
        os.replace(path.with_suffix(".partial"), path)


def sooner(history: dict[str, list[float]]) -> tuple[str, str]:
    """The mode in which a run on a CPU ends sooner, and why."""
    if "whole" not in history:
        return "none", "the cache has no graphs of these settings"
    compiled, plain = sum(history["whole"]), sum(history.get("none", [math.inf]))
    if compiled >= plain:
        return "none", f"{plain:.0f} s from start to end, {compiled:.0f} s with the graphs of the cache"
    return "whole", "the graphs are in the cache"


def make_header(folder: Path) -> None:
    """Let torch make the header of its C++ kernels in a `folder`, in a thread, while the model is traced.

    It takes four seconds, and otherwise the first kernel waits for it. The header is made for the flags of a
    kernel, hence with one.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    source = """
        #include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(float* x) { at::vec::Vectorized<float>(1.0f).store(x); }
    """

    def make() -> None:
        with contextlib.suppress(Exception):  # whatever is wrong, the first kernel says it
            CppPythonBindingsCodeCache.load_pybinding(["float*"], source)

    if not any(folder.glob("*.gch")):
        here = contextvars.copy_context()  # settings of torch's compiler are those of a thread
        threading.Thread(target=here.run, args=[make], name="make_header", daemon=True).start()


def prepare_compiler(device: torch.device) -> dict[str, Any]:
    """Set up torch's compiler; returns what the log says of its settings.

    Private names of torch are left alone where they do not exist; tests/test_startup.py says so then.
    """
    import torch._dynamo
    from torch._functorch import config as functorch
    from torch._inductor import codecache
    from torch._inductor import config as inductor

    torch._dynamo.config.recompile_limit = 64
    settings: dict[str, Any] = {}
    # `Lookup` has no state that a key of the cache would miss, so graphs with it may come from the cache.
    if hasattr(functorch, "autograd_cache_allow_custom_autograd_functions"):
        functorch.autograd_cache_allow_custom_autograd_functions = True
        settings["autograd_cache"] = True
    # The header of all C++ kernels is parsed once and kept in the cache, instead of in a common folder.
    if device.type == "cpu" and hasattr(codecache, "_HEADER_LOCK_DIR"):
        headers = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "precompiled_headers"
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = str(headers), str(headers / "locks")
        settings["precompiled_header"] = inductor.cpp_cache_precompile_headers
    # What the processor says it has is not tried out by test programs, which takes seconds.
    if device.type == "cpu" and hasattr(inductor.cpp, "vec_isa_ok"):
        inductor.cpp.vec_isa_ok = settings["vec_isa_ok"] = True
    # Tracing parses a whole file for the names of its functions, for a log that is off: it takes 0.2 s.
    with contextlib.suppress(ImportError):
        from torch._dynamo import funcname_cache

        funcname_cache.cache[__file__] = {}
    if settings.get("precompiled_header"):
        make_header(headers)
    return settings


class Trainer:
    """One run: everything between a parsed command line and the final line of the log."""

    def __init__(self, track: Track, run: Run, comm: Comm, device: torch.device):
        self.track, self.run, self.comm, self.device = track, run, comm, device
        # when each part of the start was done; the first entry is the start of the process
        self.startup = {"": time.time() - process_age(), "imports and processes": time.time()}
        self.cannot_compile = self.look_for_compiler()
        self.progress = Progress(comm.rank)
        folder = folder_from("DATA_DIR", "data") / track.data.corpus
        with self.progress.doing(f"reading and checking {folder}"):
            self.load_data()
        self.startup["data"] = time.time()
        with self.progress.doing("building model and optimizer"):
            self.build_model()
            self.name_run()
            self.choose_mode()
        # the schedule
        schedule = track.schedule
        groups = self.optimizer.param_groups
        self.base = [(group["lr"], group["weight_decay"]) for group in groups]  # at factor 1
        # steps in which every group is updated
        self.period = math.lcm(*(group["every"] for group in groups))
        self.untie_step = untie_step(track, self.period)
        # steps before which the model changes
        self.stage_starts = {*stage_begins(schedule), self.untie_step}
        self.longest = max(stage.document_cut for stage in schedule.stages)
        tokens = ONE_GRAPH_TOKENS if self.one_graph else PASS_TOKENS
        self.rows_per_pass = {
            stage.batch: rows_per_pass(track, run, comm.world_size, stage.batch, tokens)
            for stage in schedule.stages
        }
        self.num_steps = total_steps(schedule)
        row_tokens = sum(stages_until(schedule, step)[-1].batch for step in range(self.num_steps))
        # of the whole schedule
        self.all_tokens = row_tokens * track.data.rows * track.data.row_tokens
        # progress: all that a checkpoint keeps besides weights and state
        self.done, self.tokens = 0, 0  # steps and tokens so far
        self.position = (0, 0, 0)  # of the packer
        self.clock = Clock(device)
        self.log: Log | None = None  # opened by `train`, when it is known whether a run goes on
        self.asked_to_stop = 0  # the number of the signal
        self.startup["model and optimizer"] = time.time()

    def name_run(self) -> None:
        """What the run is called, and what a checkpoint must share with it."""
        track, run = self.track, self.run
        now, random = time.strftime("%Y%m%d-%H%M%S"), os.urandom(2).hex()
        self.folder = Path(run.out) / f"{now}_{run.track}_{run.seed}_{random}"
        self.environment = environment(self.device, self.comm)
        self.key = {
            "source": self.environment["source_sha256"],
            # lists for tuples, as in the log
            "track": json.loads(json.dumps(dataclasses.asdict(track))),
            "seed": run.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data": self.checked["digests"],
        }

    def find_checkpoint(self) -> tuple[str, dict[str, Any]]:
        """The path that --resume means, "" for none, and the mode of that run, {} where another begins."""
        run = self.run
        key = {} if run.adopt and run.resume else self.key

        def find() -> tuple[str, dict[str, Any]]:  # on rank 0, so that a refusal is one sentence
            path = newest_checkpoint(Path(run.out), key) if run.resume == "" else run.resume
            if not path:
                return "", {}
            found = load_checkpoint(Path(path), key)
            return path, found.get("mode", {}) if found["key"] == self.key else {}

        return on_rank_0(self.comm, find)

    def choose_mode(self) -> None:
        """Compiled or not, for the whole run: as asked, as in the run that goes on, or what ends sooner."""
        run = self.run
        self.resume_from, before = self.find_checkpoint()
        if not run.threads and before.get("world_size") == self.comm.world_size:
            torch.set_num_threads(before["threads"])
            self.environment["threads"] = before["threads"]
        earlier = before.get("waiting", waiting())
        if earlier != waiting():  # OpenMP has read it by now; results do not depend on it
            self.progress.say(f"threads wait as in {waiting()}, those of the run before as in {earlier}")
        self.history = on_rank_0(self.comm, lambda: history_file(self))
        if run.compile != "auto":
            self.compiled, why = run.compile, "asked for"
        elif self.cannot_compile:
            self.compiled, why = "none", self.cannot_compile
        elif before:
            self.compiled, why = before["compiled"], "as in the run that goes on"
        elif self.device.type != "cpu":
            self.compiled, why = "parts", "the default on an accelerator"
        else:
            self.compiled, why = on_rank_0(self.comm, lambda: sooner(read_history(self.history)))
        if run.compile == "auto" and before.get("compiled") != self.compiled:
            self.progress.say(f"{'not compiled' if self.compiled == 'none' else 'compiled'}: {why}")
        self.compile_settings = {"chosen": why}
        if self.compiled != "none":
            self.compile_settings |= prepare_compiler(self.device)
        self.model.compile_parts(self.compiled)
        self.optimizer.compiled = self.compiled != "none"
        # for any number of rows
        sampled = any(stage.candidates for stage in self.track.schedule.stages)  # row by row
        self.one_graph = self.compiled == "whole" and self.device.type == "cpu" and not sampled

    def look_for_compiler(self) -> str:
        """Why nothing can be compiled here; "" where it can or is not wanted. Refusal if it was asked for."""
        run, device = self.run, self.device
        if run.compile == "none":
            return ""

        def problem() -> str:
            return cache_problem(device) or compiler_problem(compile_cache(device), device.type)

        found = on_rank_0(self.comm, problem)
        if found and run.compile != "auto":
            raise Refusal(f"{found}, and --compile none does without")
        return found

    def load_data(self) -> None:
        """Check the corpus and make this rank's validation batches."""
        data, evaluation, comm = self.track.data, self.track.evaluation, self.comm
        folder = folder_from("DATA_DIR", "data") / data.corpus
        self.checked = on_rank_0(comm, lambda: check_data(self.track, folder))
        self.train_paths, val_paths, _ = shards_of(folder, data)
        try:
            rows = validation_rows(val_paths, data, evaluation.row_tokens, evaluation.tokens)
        except ValueError as error:  # every rank says the same
            raise Refusal(str(error)) from None
        documents = max(len(lengths) for _, lengths in rows)  # of one row
        self.val_longest = max(int(lengths.max()) for _, lengths in rows)
        self.validation = [make_batch([row], data, documents) for row in rows[comm.rank :: comm.world_size]]

    def build_model(self) -> None:
        """Model and optimizer in the precision that the device has; the weights are those of `warm_up`."""
        track, run, device = self.track, self.run, self.device
        dtype = run.dtype
        if dtype == "auto":
            dtype = "bfloat16" if supports(device, "bfloat16") else "float32"
        self.dtype = getattr(torch, dtype)
        self.attention_kernel = choose_attention(run.attention, device, self.dtype)
        longest_row = max(track.data.row_tokens, track.evaluation.row_tokens)
        self.model = GPT(track.model, longest_row, self.dtype, device)
        self.memory, why = choose_memory(run, device)
        self.model.low_memory = self.memory == "low"
        if why:
            self.progress.say(f"memory {self.memory}: {why}")
        self.optimizer = build_optimizer(self.model, track)
        self.means = WeightMeans(self.model, track.average)

    # ---- a step

    def set_stage(self, step: int) -> None:
        """Set the model to the stage of a step."""
        schedule = self.track.schedule
        self.stage = stages_until(schedule, step)[-1]
        self.model.set_rotary(long_windows(schedule, step))
        self.model.tied = step < self.untie_step
        self.optimizer.resting = ("embed",) if self.model.tied else ()  # the head is the embedding too

    def forward_backward(self, batch: Batch | SampledBatch, weights: Sequence[float]) -> Tensor:
        """Add this rank's gradient sums to the parameters; returns its summed loss of the next tokens."""
        total = torch.zeros((), device=self.device)
        # targets of weight 0 where other stages have more, so that one graph of the loss serves all
        most = 1 + max(len(stage.ahead) for stage in self.track.schedule.stages)
        weights = torch.tensor([*weights, *[0.0] * (most - len(weights))]).to(self.device, non_blocking=True)
        size = self.rows_per_pass[self.stage.batch]
        for rows in zip(*(x.split(size) for x in batch)):
            inputs, targets, offsets, *sample = (x.to(self.device, non_blocking=True) for x in rows)
            self.comm.calls += 1  # a sign of life for `watch`
            if self.one_graph and len(inputs) > 1:  # torch takes a size of 1 for a constant
                for x in (inputs, targets, offsets):
                    torch._dynamo.mark_dynamic(x, 0)
            sizes = self.stage.windows, self.longest, len(weights) - 1
            losses = self.model(inputs, targets, offsets, *sizes, *sample)
            losses.backward(weights)
            total += losses[0].detach()
        return total

    def advance(self, step: int, batches: Iterator[StepData]) -> tuple[Tensor, StepData]:
        """Do a step; returns this rank's summed loss and the data of the step.

        A first step in the middle of a stage needs `set_stage` before.
        """
        schedule = self.track.schedule
        # what changes with this step
        # head and embedding part: the embedding goes on by itself (#51, #53)
        if step == self.untie_step > 0:
            self.model.embed.detach().copy_(self.model.lm_head.detach())
            self.optimizer.copy_state("lm_head", "embed")
            self.means.copy("lm_head", "embed")
        if step in self.stage_starts:
            self.set_stage(step)
        # gradients
        data = next(batches)
        if data.targets == 0:  # every rank sees the same
            raise Refusal(f"step {step} has nothing to predict: its documents have one token each")
        loss = self.forward_backward(data.batch, loss_weights(schedule, step))
        # update; a group of Adam has a momentum of its own and does not read this one
        factor, momentum = learning_rate_factor(schedule, step), momentum_at(schedule, step)
        for group, (lr, decay) in zip(self.optimizer.param_groups, self.base):
            group["lr"] = lr * factor
            # the optimizer multiplies it by the learning rate, which has one power of the factor already
            group["weight_decay"] = decay * factor ** (schedule.decay_power - 1)
            group["momentum"] = momentum
        self.optimizer.step(tokens=data.targets)
        self.optimizer.zero_grad()
        self.average(step)
        self.done = step + 1
        self.tokens += data.tokens
        self.position = data.position
        return loss, data

    def average(self, step: int) -> None:
        """Let the weights after a step enter their means; after the last one they are blended with them."""
        if self.means.params and (share := share_in_mean(self.track.average, self.num_steps, step)):
            self.means.add(share)
        if step == self.num_steps - 1:
            self.means.blend()

    def uncompiled_validation(self) -> contextlib.AbstractContextManager:
        """On a CPU validation has no graph: it is off the clock, and its graph takes longer than it saves."""
        if self.compiled == "none" or self.device.type != "cpu":
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    @torch.no_grad()
    def validation_sum(self, windows: tuple[int, int], rows: int | None = None) -> Tensor:
        """Summed losses (1,), fp64, of the validation rows of this rank, or of the first `rows` of them."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        with self.uncompiled_validation():
            for batch in self.validation[:rows]:
                total += self.model(*(x.to(self.device) for x in batch), windows, self.val_longest).double()
        return total

    def validate(self, windows: tuple[int, int]) -> dict[str, Any]:
        """The `val` event, the same on all ranks."""
        count = self.track.evaluation.tokens
        loss = float(self.comm.all_reduce(self.validation_sum(windows))) / count
        seconds = self.clock.seconds
        return dict(
            step=self.done, val_loss=loss, val_tokens=count, train_time_s=seconds, tokens=self.tokens
        )

    # ---- before the clock

    def kinds_of_passes(self) -> tuple[list[int], list[tuple[tuple[int, int], bool]]]:
        """What the warm-up has to run: a step for each kind of pass, (windows, tied) for each validation."""
        schedule = self.track.schedule
        passes, validations = {}, {}
        for step in sorted(step for step in self.stage_starts if step < self.num_steps):
            stage, tied = stages_until(schedule, step)[-1], step < self.untie_step
            rows = self.rows_per_pass[stage.batch]
            passes.setdefault((rows, stage.windows, tied, stage.candidates), step)
            validations[stage.windows, tied] = None
        validations[self.track.evaluation.windows, tied] = None
        return list(passes.values()), list(validations)

    def wait_for_graphs(self, seconds: float = 0.5) -> Path:
        """Wait until the first process of this machine has made its graphs; the file that says so then.

        The others find them in the cache. That needs the same device number in all (torchrun
        --virtual-local-rank): it is in each graph. Without it all make their own graphs at once.
        """
        done = history_file(self).with_suffix(f".{self.attention_kernel}.graphs")
        waits = self.compiled != "none" and self.device.type != "cpu" and self.device.index == 0
        calls = self.comm.calls
        while waits and rank_on_machine() > 0 and not done.exists():
            self.comm.calls += 1  # a sign of life: if anyone holds up the others, it is the first
            time.sleep(seconds)
        self.comm.calls = calls
        return done

    def warm_up(self) -> None:
        """Run every graph and the optimizer once on made-up rows, then set everything to its start."""
        self.model.init_weights(self.run.seed)
        done = self.wait_for_graphs()
        self.run_graphs()
        self.startup["graphs"] = time.time()
        if self.compiled != "none":
            with contextlib.suppress(OSError):  # a cache that is read-only has them
                done.touch()
        alone = self.comm.world_size == 1
        self.progress.now("optimizer" if alone else "optimizer, once all processes are here", 1.0)
        for p in self.model.parameters():  # without a gradient nothing would be done
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        for _ in range(self.period):
            self.optimizer.step(tokens=1)
        self.model.zero_grad()
        # the start of the run
        self.model.init_weights(self.run.seed)
        if self.comm.world_size > 1:
            for p in self.model.parameters():
                dist.broadcast(p.detach(), src=0)
        self.optimizer.reset()
        self.startup["optimizer"] = time.time()

    def run_graphs(self) -> None:
        """A pass of each kind and a validation row of each kind; nothing in it waits for other processes."""
        data, schedule = self.track.data, self.track.schedule
        tokens = np.arange(data.row_tokens + 1) % data.vocab_size
        lengths = np.diff([*range(0, data.row_tokens, self.longest), data.row_tokens])
        passes, validations = self.kinds_of_passes()
        total = len(passes) + len(validations)
        what = "graphs" if self.compiled != "none" else "warm-up"
        for number, step in enumerate(passes):
            self.progress.now(f"{what} {number + 1} of {total}", number / total)
            self.set_stage(step)
            rows = [(tokens, lengths)] * self.rows_per_pass[self.stage.batch]
            classes = self.stage.candidates, self.track.model.padded_vocab
            batch = make_batch(rows, data, self.checked["documents"], *classes)
            self.forward_backward(batch, loss_weights(schedule, step))
            # a graph cannot be traced beside fp32 gradients of bf16 parameters
            self.model.zero_grad()
        for number, (windows, self.model.tied) in enumerate(validations, len(passes)):
            self.progress.now(f"{what} {number + 1} of {total}", number / total)
            self.validation_sum(windows, rows=1)

    def resume(self) -> tuple[str, str]:
        """Go on from the checkpoint of --resume; returns its path and the id of its run, "" for none."""
        path = self.resume_from
        if not path:
            return "", ""
        # Rank 0 has read it before; nothing is sent to the others.
        found = load_checkpoint(Path(path), {})
        if found["step"] > self.num_steps:
            raise Refusal(f"checkpoint of step {found['step']}: the schedule has only {self.num_steps} steps")
        try:  # learning rates and the like are the track's, not those of the checkpoint
            self.optimizer.load_state_dict({key: found["optimizer"][key] for key in ("step", "state")})
            self.model.load_state_dict(found["model"])
            self.means.load(found.get("means", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Refusal(f"checkpoint {path} does not fit: {error}") from None
        self.done, self.tokens, self.clock.seconds = found["step"], found["tokens"], found["train_time_s"]
        self.set_stage(self.done)
        same_data = found["key"]["data"] == self.key["data"]
        if same_data and found["key"]["track"]["data"] == self.key["track"]["data"]:
            self.position = found["position"]
        if found["key"] == self.key:  # else it is adopted, as the start of a new run
            self.folder = self.folder.with_name(found["run_id"])
        return path, found["run_id"]

    def open_log(self, checkpoint: str, run_id: str, **compiling: Any) -> None:
        """On rank 0: begin the log, or go on with that of the run whose `checkpoint` it is."""
        self.check_disk()
        goes_on = run_id == self.folder.name
        if goes_on:
            os.utime(checkpoint)  # the newest now: what came after it is done again
            (self.folder / "finished").unlink(missing_ok=True)
        self.log.open(self.done)
        if not self.log.events:
            self.log.write("header", **self.header(), **compiling)
        if goes_on and ("checkpoint", self.done) not in self.log.events:
            self.log.write("checkpoint", step=self.done)
        if checkpoint:
            self.log.write("resume", step=self.done, world_size=self.comm.world_size, run_id=run_id)

    def header(self) -> dict[str, Any]:
        """What the first line of the log says."""
        dtype = self.key["dtype"]
        parts, ends = list(self.startup)[1:], list(self.startup.values())
        return dict(
            run_id=self.folder.name,
            track=self.run.track,
            settings=dataclasses.asdict(self.track),
            seed=self.run.seed,
            dtype=dtype,
            micro_rows=list(self.rows_per_pass.values()),
            **self.environment,
            data=self.checked["digests"],
            attention=self.attention_kernel,
            head="fp8" if self.model.fp8 else dtype,
            memory=self.memory,
            compiled=self.compiled,
            compile_settings=self.compile_settings,
            startup_s=dict(zip(parts, np.diff(ends).round(3).tolist())),
        )

    def check_disk(self) -> None:
        """ValueError when two checkpoints and the one that is being written will not fit."""
        if not self.run.checkpoint_every:
            return
        weights = sum(p.nbytes for p in self.model.parameters())
        local_state = sum(x.nbytes for unit in self.optimizer.units for x in unit.state.values())
        means = sum(mean.nbytes for mean in self.means.means.values())
        need = (CHECKPOINTS_KEPT + 1) * (weights + means + self.comm.world_size * local_state)
        folder = next(path for path in self.folder.absolute().parents if path.is_dir())
        replaced = sum(path.stat().st_size for path in self.folder.glob("step_*.pt"))
        free = shutil.disk_usage(folder).free + replaced
        if free < need:
            sizes = f"{free / 1e6:,.0f} MB free, checkpoints take {need / 1e6:,.0f}"
            raise ValueError(f"{folder} has {sizes}; use another --out")

    # ---- between steps

    def on_signal(self, number: int, _: Any) -> None:
        """The run saves and ends at its next logged step; before training, or after a Ctrl-C, at once."""
        # After a Ctrl-C any signal counts: torchrun turns the second Ctrl-C into SIGTERM.
        if self.clock.now() == 0 or self.asked_to_stop == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked_to_stop = number

    def check_finite(self, finite: bool, what: str) -> None:
        """Else a Refusal that names the parameters whose gradients went first, and the step. Collective."""
        if finite:
            return
        since = self.comm.all_reduce(self.optimizer.bad_since(), dist.ReduceOp.MIN).tolist()
        first = min(since)
        where = "no gradient before it"
        if first <= self.done:
            units = [unit for unit, step in zip(self.optimizer.units, since) if step == first]
            names = [name for unit in units for name in unit.names]
            where = f"gradients of {', '.join(names)} since step {first:.0f}"
        kept = "; the last checkpoint is kept" if list(self.folder.glob("step_*.pt")) else ""
        raise Refusal(f"not finite at step {self.done}, {what}: {where}{kept}")

    def report(self, loss: Tensor, targets: int) -> bool:
        """Log the loss of the last step; whether a rank was asked to stop. Collective."""
        bad = (self.optimizer.bad_since() <= self.done).any()
        sums = torch.stack([loss, bad, loss.new_tensor(self.asked_to_stop)])
        loss_sum, bad_ranks, stops = self.comm.all_reduce(sums).tolist()
        train_loss, seconds = loss_sum / targets, self.clock.now()
        line = dict(step=self.done, train_loss=train_loss, train_time_s=seconds, tokens=self.tokens)
        self.log.write("step", **line)
        self.check_finite(not bad_ranks and math.isfinite(train_loss), f"training loss {train_loss}")
        left = (self.all_tokens - self.tokens) / self.tokens * seconds
        details = f"loss {train_loss:.4f} {seconds:.1f} s {self.tokens / seconds:,.0f} tokens/s"
        self.progress.step(
            f"step {self.done}/{self.num_steps}",
            self.tokens / self.all_tokens,
            details if left == 0 else f"{details} {in_words(left)} left",
            last=self.done == self.num_steps,
        )
        return stops > 0

    def report_validation(self, last: bool) -> dict[str, Any]:
        """Validate, log it and say it; the `val` event."""
        step, share = f"step {self.done}/{self.num_steps}", self.tokens / self.all_tokens
        self.progress.now(f"{step} validation", share)
        val = self.validate(self.track.evaluation.windows if last else self.stage.windows)
        self.log.write("val", **val)
        loss = val["val_loss"]
        self.progress.say(f"{step} validation loss {loss:.4f} training time {self.clock.seconds:.2f} s")
        self.progress.now(step, share)
        self.check_finite(math.isfinite(loss), f"validation loss {loss}")
        return val

    def is_due_to_save(self, stopping: bool) -> bool:
        """Whether to save now. Only where no gradients wait for an update: once in `period` steps."""
        every = self.run.checkpoint_every
        if self.done == self.num_steps:
            return every > 0
        # the first step at or after a multiple of `every` that is a multiple of `period`
        due = stopping or (every > 0 and self.done % every < self.period)
        return due and self.done % self.period == 0

    def mode(self) -> dict[str, Any]:
        """How the run computes, which a run that goes on keeps."""
        mode = {"compiled": self.compiled, "threads": torch.get_num_threads()}
        return {**mode, "world_size": self.comm.world_size, "waiting": waiting()}

    def save(self) -> None:
        """Collective: rank 0 writes a checkpoint, the others wait for it."""
        self.check_finite(all(p.isfinite().all() for p in self.model.parameters()), "parameters")
        model = dict(self.model.state_dict())
        if self.model.tied:
            model["embed"] = model["lm_head"]
        content = dict(
            key=self.key,
            mode=self.mode(),
            run_id=self.folder.name,
            step=self.done,
            position=self.position,
            tokens=self.tokens,
            train_time_s=self.clock.seconds,
            model=model,
            optimizer=self.optimizer.state_dict(),
            means=self.means.means,
        )
        on_rank_0(self.comm, lambda: save_checkpoint(self.folder / f"step_{self.done:06d}.pt", content))
        self.log.write("checkpoint", step=self.done)

    # ---- the run

    def train(self) -> dict[str, Any]:
        """Train from the start or a checkpoint to the end of the schedule; returns the `final` event."""
        evaluation, clock, progress = self.track.evaluation, self.clock, self.progress
        with progress.doing("graphs, minutes where they are new" if self.compiled != "none" else "warm-up"):
            self.warm_up()
        graphs, cache = compiled_so_far()
        with progress.doing("log and checkpoint"):
            checkpoint, run_id = self.resume()
            self.log = Log(self.folder.with_name(f"{self.folder.name}.jsonl"))
            on_rank_0(self.comm, lambda: self.open_log(checkpoint, run_id, graphs=graphs, compile=cache))
        packer = Packer(self.train_paths, self.track.data, self.position)
        documents, rank, world_size = self.checked["documents"], self.comm.rank, self.comm.world_size
        batches = training_steps(packer, self.track, documents, rank, world_size, self.done)
        if self.compiled != "none":
            torch.compiler.set_stance("fail_on_recompile")
        gc.collect()
        gc.freeze()  # none of what is there by now will be garbage
        gc.enable()
        val, stopping = {}, False
        # a run that was killed between its last checkpoint and its end
        if self.done == self.num_steps:
            val = self.validate(evaluation.windows)

        with progress.doing(f"training, {self.num_steps} steps", training=True):
            clock.start()
            for step in range(self.done, self.num_steps):
                loss, data = self.advance(step, batches)
                last = self.done == self.num_steps
                validating = last or self.done % evaluation.every == 0
                if validating or self.done % evaluation.log_every == 0:
                    stopping = self.report(loss, data.targets)
                saving = self.is_due_to_save(stopping)
                if validating or saving:
                    clock.stop()
                    if validating:
                        val = self.report_validation(last)
                    if saving:
                        self.save()
                    if saving and stopping and not last:
                        self.end_as_asked()
                    clock.start()
            clock.stop()
        return self.finish(val, graphs)

    def end_as_asked(self) -> None:
        """Leave after a signal, with its status."""
        resume = "the same command with --resume goes on"
        self.progress.say(f"stopped and saved at step {self.done}; {resume}")
        sys.exit(128 + (self.asked_to_stop or signal.SIGTERM))

    def finish(self, val: dict[str, Any], graphs: int) -> dict[str, Any]:
        """Write and say the end of the run; the `final` event. `graphs` were made before the clock."""
        target, loss, seconds = self.track.evaluation.target, val["val_loss"], val["train_time_s"]
        reached = loss <= target
        final = dict(
            **val,
            target=target,
            reached=reached,
            compiles_in_timed_region=compiled_so_far()[0] - graphs,
            peak_memory_bytes=peak_memory(self.device),
        )
        self.log.write("final", **final)
        if self.comm.rank == 0 and self.folder.is_dir():
            (self.folder / "finished").touch()
        if self.comm.rank == 0:
            start = 0.0 if compiled_so_far()[1] == "cold" else self.startup["optimizer"] - self.startup[""]
            note_times(self.history, self.compiled, start, seconds)
        if self.run.compile == "auto" and self.compiled == "none" and not self.cannot_compile:
            self.progress.say("--compile whole compiles once; from then on such a run trains in less time")
        self.progress.say(
            f"track {self.run.track}: validation loss {loss:.4f}, "
            f"target {target} {'reached' if reached else 'NOT reached'}, "
            f"training time {seconds:.2f} s, {self.num_steps} steps, {self.tokens} tokens, "
            f"{self.comm.world_size} x {self.environment['device']}, log {self.log.path}"
        )
        if self.run.show and self.comm.rank == 0:
            self.last_page()
        return final

    def last_page(self) -> None:
        """Say some text by the model, where a token is a byte, and the path of the log."""
        if self.track.data.vocab_size == BYTE_VOCABULARY:
            self.progress.say("the model writes:")
            for line in self.text_by_the_model().splitlines():
                self.progress.say(f"  {line}")
        self.progress.say(f"log {self.log.path}")

    def text_by_the_model(self) -> str:
        """PROMPT and what the model goes on with, in what the screen can show; nothing is compiled for it."""
        prompt = PROMPT.encode()
        compiled = self.compiled != "none"
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        end, threads = time.monotonic() + TEXT_SECONDS, torch.get_num_threads()
        torch.set_num_threads(1)  # single tokens are too little work to be shared
        with eager:
            further = continuation(self.model, self.track, prompt, temperature=0.8, seed=0)
            in_time = itertools.takewhile(lambda _: time.monotonic() < end, further)
            text = bytes([*prompt, *itertools.islice(in_time, TEXT_BYTES)]).decode(errors="replace")
        torch.set_num_threads(threads)
        shown = "".join(x if x == "\n" or (x.isprintable() and x != "\ufffd") else "?" for x in text)
        encoding = sys.stdout.encoding or "ascii"
        return shown.encode(encoding, "replace").decode(encoding)


def compiled_so_far() -> tuple[int, str]:
    """Graphs compiled in this process, and whether the cache had them: "warm", "cold" or "none"."""
    if "torch._dynamo" not in sys.modules:
        return 0, "none"
    from torch._dynamo.utils import counters  # only here: the cache must have its place before

    graphs = counters["stats"]["unique_graphs"]
    if counters["inductor"]["fxgraph_cache_miss"]:
        return graphs, "cold"
    return graphs, "warm" if graphs else "none"


# ---- a checkpoint in use


def model_of_checkpoint(path: str, device: torch.device) -> tuple[GPT, Track]:
    """The model of a checkpoint, ready to be evaluated, and the sections of its track that this takes."""
    found = load_checkpoint(Path(path), {})
    try:
        settings = found["key"]["track"]
        of_model = {present_name(f"model.{name}"): value for name, value in settings["model"].items()}
        model_settings = {name.removeprefix("model."): value for name, value in of_model.items()}
        track = Track(
            data=Data(**settings["data"]),
            model=Model(**model_settings),
            schedule=Schedule(**settings["schedule"]),
            evaluation=Evaluation(**settings["evaluation"]),
        )
        in_bfloat16 = found["key"]["dtype"] == "bfloat16" and supports(device, "bfloat16")
        dtype = torch.bfloat16 if in_bfloat16 else torch.float32
        model = GPT(track.model, track.evaluation.row_tokens, dtype, device)
        for name, p in model.named_parameters():
            p.detach().copy_(found["model"][name])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path} is not of this train_gpt.py: {error}") from None
    model.set_rotary(long_windows(track.schedule, found["step"]))
    return model, track


@torch.no_grad()
def evaluate_checkpoint(run: Run, device: torch.device) -> float:
    """The mean loss, nats per token, of --resume on a shard or on the validation shards of a corpus.

    Printed with the names of the shards, and returned.
    """
    model, track = model_of_checkpoint(run.resume, device)
    data, evaluation = track.data, track.evaluation
    given = Path(run.evaluate)
    folder = given if given.is_dir() else given.parent
    paths = [given]
    if given.is_dir() or (folder / "manifest.json").is_file():  # which also knows the vocabulary
        shards = read_manifest(folder, data)
        paths = [path for path in shards if "val_" in path.name] if given.is_dir() else paths
    if not paths:
        raise ValueError(f"{folder} holds no validation shards; name a shard")
    for path in paths:
        check_tokens(path, data, path)
    total, count = 0.0, 0
    for tokens, lengths in validation_rows(paths, data, evaluation.row_tokens):
        batch = make_batch([(tokens, lengths)], data, len(lengths))
        total += float(model(*(x.to(device) for x in batch), evaluation.windows, evaluation.row_tokens))
        count += int((batch.targets >= 0).sum())
    names = ", ".join(map(str, paths))
    print(f"{total / count:.4f} nats per token over {count:,} tokens of {names}")
    return total / count


@torch.no_grad()
def continuation(
    model: GPT, track: Track, tokens: Iterable[int], temperature: float, seed: int
) -> Iterator[int]:
    """The tokens with which a model goes on in a document, drawn one after the other, up to its end."""
    longest, windows = track.evaluation.row_tokens, model.window_sizes(track.evaluation.windows)
    start, device = track.data.document_start, model.embed.device
    generator = torch.Generator().manual_seed(seed)
    tokens = [start, *tokens]
    while True:
        T = min(len(tokens), longest)
        inputs = torch.tensor([tokens[-T:]], dtype=torch.int32, device=device)
        offsets = torch.tensor([[0, T]], dtype=torch.int32, device=device)
        x = model.stream(inputs, offsets, windows, T, model.tables())
        logits = model.logits(x[0, -1:])[0, : track.data.vocab_size].cpu()
        chances = (logits / max(temperature, 1e-6)).softmax(0)
        tokens.append(int(chances.multinomial(1, generator=generator)))
        if tokens[-1] == start:
            return
        yield tokens[-1]


def sample_checkpoint(run: Run, device: torch.device) -> str:
    """The text of --sample and what the model of --resume goes on with; printed and returned."""
    model, track = model_of_checkpoint(run.resume, device)
    if track.data.vocab_size == BYTE_VOCABULARY:
        encode, decode = str.encode, lambda tokens: bytes(tokens).decode(errors="replace")
    else:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        encode, decode = encoding.encode_ordinary, encoding.decode
    tokens = encode(run.sample)
    further = continuation(model, track, tokens, run.temperature, run.seed)
    text = decode([*tokens, *itertools.islice(further, run.sample_tokens)])
    print(text)
    return text


# ----------------------------------------------------------------------------------------------------
# 8. Main
#
# `main` reads the command line, refuses what can be refused without a model, sets up device, compile
# cache and process group, and hands over to a `Trainer`. Every error that a user can do something
# about ends in one sentence (`explanation`) and a non-zero status. The tools call `main` with other
# `work` to be done with the trainer.
# ----------------------------------------------------------------------------------------------------


# ---- help


def as_typed(value: Any, separator: str = ",") -> str:
    """A value in the form that the command line takes; `separator` is that of the outer tuple."""
    if isinstance(value, tuple):
        inside = separator.join(repr(x) if isinstance(x, str) else as_typed(x) for x in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def meaning_of(f: dataclasses.Field, kind: Any) -> str:
    """The meaning of a field, after the values that it can have where these are few."""
    choices = type_in_words(kind) if get_origin(kind) is Literal else ""
    return "; ".join(filter(None, [choices, f.metadata["meaning"]]))


def fields_of(section: type) -> list[tuple[dataclasses.Field, Any]]:
    """The fields of a section with their types."""
    return list(zip(dataclasses.fields(section), get_type_hints(section).values()))


def help_table() -> list[str]:
    """One line for each field of a track, with a column for each track."""
    width = 16  # of a column

    def row(name: str, values: Iterable[Any], meaning: str = "") -> str:
        texts = map(as_typed, values)
        cells = [text if len(text) < width else "..." for text in texts]
        return f"  {name:<22}" + "".join(f"{cell:<{width}}" for cell in cells) + meaning

    def of_tracks(section: str, name: str) -> list[Any]:
        return [getattr(getattr(track, section), name) for track in TRACKS.values()]

    lines = [row("", TRACKS)]
    sections = vars(Track())
    adam_sections = [section for section, part in sections.items() if type(part) is Adam]
    for section, part in sections.items():
        if section in adam_sections or section == "gate":
            continue
        lines.append(f"--{section}.FIELD")
        for f, kind in fields_of(type(part)):
            lines.append(row(f.name, of_tracks(section, f.name), meaning_of(f, kind)))
    lines.append("--gate.FIELD (as --matrix.FIELD, without mlp_lr_mul; where the values differ)")
    for f, _ in fields_of(MuonSection):
        if of_tracks("gate", f.name) != of_tracks("matrix", f.name):
            lines.append(row(f.name, of_tracks("gate", f.name)))
    lines.append(", ".join(f"--{section}.FIELD" for section in adam_sections) + " (all of Adam)")
    for f, kind in fields_of(Adam):
        if f.name != "lr":
            lines.append(row(f.name, [""] * len(TRACKS), meaning_of(f, kind)))
    for section in adam_sections:
        lines.append(row(f"lr of {section}", of_tracks(section, "lr"), "learning rate at factor 1"))
    return [line.rstrip() for line in lines]


def help_text() -> str:
    """What --help prints."""
    lines = [*__doc__.strip().splitlines()[:6], "", "Options (--name value):"]
    for f, kind in fields_of(Run):
        lines.append(f"  --{f.name:<18}{as_typed(f.default):<10}{meaning_of(f, kind)}")
    lines += ["", "Fields of a track (--section.field value) and their values in each track:"]
    lines += [*help_table(), ""]
    lines += ["`python train_gpt.py --help SECTION` prints types, and values that are too long here (...)."]
    lines += ['A value with brackets goes in quotes: --schedule.momentum "(0.8,0.9)".']
    return "\n".join(lines)


def help_section(section: str) -> str:
    """What --help SECTION prints: type, least value, meaning and values of each field."""
    sections = vars(Track())
    if section not in sections:
        raise ValueError(f"there is no section {section!r}; there are {', '.join(sections)}")
    lines = []
    for f, kind in fields_of(type(sections[section])):
        least, below = f.metadata["minimum"], f.metadata["below"]
        bound = f", at least {least:g}" if least > -math.inf else ""
        bound += f", below {below:g}" if below < math.inf else ""
        lines += [f"--{section}.{f.name} VALUE", f"    {type_in_words(kind)}{bound}"]
        lines += [f"    {f.metadata['meaning']}"]
        for name, track in TRACKS.items():
            value = as_typed(getattr(getattr(track, section), f.name), separator=", ")
            lines += textwrap.wrap(f"    {name:<8}{value}", 138, subsequent_indent=" " * 13)
    return "\n".join(lines)


# ---- command line


def parse_command_line(argv: Sequence[str]) -> tuple[Track, Run]:
    """Track and run options; ValueError names the nearest option for an unknown one."""
    values = read_options(argv)

    def changed(settings: Settings, section: str) -> Settings:
        try:
            return dataclasses.replace(settings, **values[section])
        except ValueError as error:
            prefix = f"{section}." if section else ""
            raise ValueError(f"--{prefix}{error}") from None

    run = changed(Run(), "")
    if run.track == "auto":
        run = dataclasses.replace(run, track=track_for_this_machine())
    if run.track not in TRACKS:
        raise ValueError(f"unknown track {run.track!r}, there are {', '.join(TRACKS)}")
    sections = vars(TRACKS[run.track])
    return Track(**{section: changed(part, section) for section, part in sections.items()}), run


def read_options(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The values of a command line by section ("" for those of `Run`) and field, not yet checked."""
    kinds = {f.name: kind for f, kind in fields_of(Run)}
    for section, part in vars(Track()).items():
        kinds |= {f"{section}.{f.name}": kind for f, kind in fields_of(type(part))}
    values = collections.defaultdict(dict)
    words = list(argv)
    while words:
        option, _, text = words.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--"):
            raise ValueError(f"{option!r} is not an option; options look like --track tiny")
        if name not in kinds:
            if present_name(name) in kinds:
                raise ValueError(f"unknown option {option}, it is --{present_name(name)} now")
            nearest = difflib.get_close_matches(name, kinds, 1, 0.0)[0]
            raise ValueError(f"unknown option {option}, the nearest is --{nearest}")
        if not text and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not text and name != "resume":
            raise ValueError(f"{option} needs a value")
        section, _, key = name.rpartition(".")
        values[section][key] = value_of(text, kinds[name])
    return values


def value_of(text: str, kind: Any) -> Any:
    """A word of the command line as a Python value; what is none, or is meant as text, stays text."""
    if kind in (str, str | None) or get_origin(kind) is Literal:
        return text
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text.capitalize() if text.isalpha() else text)  # true is True
    return text


def track_for_this_machine() -> str:
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    new = all((card.major, card.minor) >= (8, 0) for card in cards)
    large = all(card.total_memory >= LEAST_MEMORY["low"] for card in cards)
    return "short" if cards and new and large else "tiny"


# ---- checks before anything is built


def model_rules(track: Track) -> list[tuple[bool, str]]:
    """What must be true of a model, and the sentence for where it is not."""
    data, model, fp8 = track.data, track.model, track.model.fp8_head
    blocks = [*model.attention_free, *model.long_blocks, *model.xsa, *model.key_offset, *model.paired]
    blocks += [*sum(model.skips, ()), *(block for block, _ in model.value_tables)]
    blocks += [i for i in (model.attention_source, model.backout) if i != -1]
    low = {"qk", "vo", "mlp", "embed", "ngram_embed", "value_embed"}
    fp8_sizes = (data.row_tokens, model.width, model.padded_vocab)
    return [
        (model.width % (4 * model.heads) == 0,
         f"model.width {model.width} is not a multiple of 4 x {model.heads} heads"),
        # products on a GPU want it
        (mlp_width(model) >= 8 and mlp_width(model) % 8 == 0,
         f"model.mlp_ratio x width is {mlp_width(model)}, not a multiple of 8"),
        (model.attention_scale * model.width / model.heads <= 40,
         "model.attention_scale x head width is at most 40"),
        ({*model.low_precision} <= low, "low_precision: no such bank"),
        (len(fp8) in (0, 3) and all(x > 0 for x in fp8), "fp8_head is three positive numbers or ()"),
        (not fp8 or all(size % 16 == 0 for size in fp8_sizes),
         "a head in FP8 needs row_tokens, width and padded_vocab that are multiples of 16"),
        (model.padded_vocab >= data.vocab_size,
         f"model.padded_vocab is less than the {data.vocab_size} tokens of the data"),
        (all(i in range(model.layers) for i in blocks),
         f"a block number, attention_source or backout is outside 0..{model.layers - 1}"),
        (all(n >= 1 and rows >= 1 for n, rows in model.ngrams) and all(n >= 1 for n in model.matches),
         "ngrams, their tables and matches have at least one token and row"),
        (not model.ngram_fold or data.vocab_size == BYTE_VOCABULARY, "ngram_fold is for tokens of bytes"),
        (model.width % model.qk_parts == 0, f"model.qk_parts divides the width {model.width}"),
        (not model.paired or model.heads % 2 == 0, "paired blocks need an even number of heads"),
        (all(a < b for a, b in model.skips), "skips go on to a later block"),
        (all(table >= 0 for _, table in model.value_tables), "value_tables count from 0"),
        (max(model.gate_inputs, model.value_gate_inputs) <= model.width,
         "gate_inputs and value_gate_inputs exceed the width"),
    ]  # fmt: skip


def schedule_rules(track: Track, run: Run) -> list[tuple[bool, str]]:
    """What must be true of a schedule and of the options, and the sentence for where it is not."""
    stages = track.schedule.stages
    begins = [stage.begin for stage in stages]
    windows = [track.evaluation.windows, *(stage.windows for stage in stages)]
    return [
        (begins[:1] == [0] and begins == sorted({*begins}), "schedule.stages begin at 0 and in rising order"),
        (all(stage.batch >= 1 and stage.document_cut >= 1 for stage in stages),
         "batch and document cut are at least 1"),
        (all(0 <= stage.candidates <= track.model.padded_vocab for stage in stages),
         "candidates are 0 to padded_vocab"),
        (not track.model.fp8_head or all(stage.candidates % 16 == 0 for stage in stages),
         "a head in FP8 needs candidates that are a multiple of 16"),
        (min(map(min, windows)) >= 1, "attention windows are at least 1 token"),
        (0 < track.average.span <= 1, "average.span is above 0 and at most 1"),
        (abs(run.seed) < 2**63, "the seed has 64 bits"),
        (run.timeout <= 10**6, "timeout is 1 to 1,000,000 seconds"),
    ]  # fmt: skip


def check_settings(track: Track, run: Run) -> None:
    """ValueError for settings that no run can have together."""
    for good, sentence in [*schedule_rules(track, run), *model_rules(track)]:
        if not good:
            raise ValueError(sentence)
    on_nothing = GPT(track.model, 1, torch.float32, "meta")
    optimizer = build_optimizer(on_nothing, track)  # refuses what an optimizer cannot do
    WeightMeans(on_nothing, track.average)  # refuses parameters that do not exist
    # The gradients of the last steps would be lost if a group still waited for its update at the end.
    every = [group["every"] for group in optimizer.param_groups]
    steps, period = total_steps(track.schedule), math.lcm(*every)
    if steps % period:
        waiting = f"{steps} steps end between two updates of a group with every {max(every)}"
        raise ValueError(f"{waiting}; schedule.steps + schedule.extension is a multiple of {period}")
    if track.model.tied > 0:
        optimizer.units_to_copy("lm_head", "embed")


# ---- device and processes


def number_from(variable: str, alone: int) -> int:
    """A number that torchrun puts into the environment; `alone` where it is not set or empty."""
    text = os.environ.get(variable) or str(alone)
    if not text.isdecimal():
        raise ValueError(f"the environment variable {variable} is {text!r}, not a number as torchrun sets it")
    return int(text)


def rank_on_machine() -> int:
    """The number of this process among those on its machine."""
    return number_from("RANK", 0) % max(1, number_from("LOCAL_WORLD_SIZE", 1))


def has_own_device(local_rank: int) -> bool:
    """Whether torchrun --virtual-local-rank shows each process one device: LOCAL_RANK is 0 in all of them.

    The first one cannot see that of others; of it CUDA_VISIBLE_DEVICES is asked.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return local_rank == 0 and (rank_on_machine() > 0 or (len(visible) == 1 and visible != [""]))


def device_of(run: Run, local_rank: int) -> torch.device:
    """This process's accelerator; the CPU where there is none and for the track tiny."""
    if run.device == "cpu":
        return torch.device("cpu")
    # None where there is none
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if run.device == "auto" and (run.track == "tiny" or accelerator is None):
        return torch.device("cpu")
    if accelerator is None or run.device not in ("auto", accelerator.type):
        raise ValueError(f"there is no device {run.device!r} here")
    count = torch.accelerator.device_count()
    if number_from("LOCAL_WORLD_SIZE", 1) > count and not (count == 1 and has_own_device(local_rank)):
        raise ValueError(f"more processes than the {count} devices here")
    return torch.device(accelerator.type, local_rank)


def keep_freed_memory() -> None:
    """Tell the allocator of glibc to keep what is freed: large tensors are made and dropped in every step.

    It would give them back to the system, which fills each new page with zeros: half the time of an
    uncompiled validation.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
        for parameter in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


def set_up_device(run: Run, device: torch.device) -> None:
    """Threads or the current device, and the place of the compile cache."""
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = number_from("LOCAL_WORLD_SIZE", 1)
        torch.set_num_threads(run.threads or max(1, cores // processes))
        keep_freed_memory()
    else:
        torch.accelerator.set_device_index(device.index)
    cache = str(compile_cache(device))
    # so nothing is compiled, but torch makes the folder: its own will do
    if cannot_write(Path(cache)):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        if device.type != "cpu":  # else torch has one for each device, which are all alike
            os.environ.setdefault("TRITON_CACHE_DIR", str(Path(cache, "triton")))


class Job(NamedTuple):
    """The stores of a job of several processes."""

    store: dist.Store  # the launcher's, which outlives a restart: it says whether the run has ended
    pulse: dist.Store  # of this start, for `watch`


def start_processes(run: Run, device: torch.device, rank: int, world_size: int) -> Job:
    """Join the process group that torchrun's environment variables describe."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0
    under_torchrun = bool(os.environ.get("TORCHELASTIC_RUN_ID"))
    if under_torchrun and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG: a rank does not outlive torchrun
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    bound = datetime.timedelta(seconds=run.timeout + 60)
    # torchrun answers at once, unless it was killed meanwhile.
    patience = datetime.timedelta(seconds=30) if under_torchrun else bound
    launcher_store = next(dist.rendezvous("env://", timeout=patience))[0]
    # Its store outlives a restart, with the old addresses in it: a prefix for each start keeps them apart.
    store = dist.PrefixStore(f"start {restart}", launcher_store)
    pulse = store.clone()
    store.set_timeout(bound)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        timeout=bound,
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=None if device.type == "cpu" else device,
    )
    return Job(launcher_store, pulse)


def explanation(error: BaseException) -> str | None:
    """One sentence for what a user can do something about; None for a defect of the program."""
    text = str(error)
    if isinstance(error, ValueError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text:
        less = "--memory low, a smaller --micro_rows or --evaluation.row_tokens, or more processes"
        return f"out of memory; {less}, need less"
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"lost the connection to another rank ({text.strip().splitlines()[-1]})"
    if "fail_on_recompile" in text:
        return "a graph would have been compiled inside the timed region; the warm-up did not cover it"
    if isinstance(error, OSError):
        return f"{error.strerror or text}: {error.filename}" if error.filename else text
    return None


def report_error(error: BaseException, rank: int, world_size: int) -> None:
    """Say why the run ends and leave with a non-zero status. Returns only for a defect of the program."""
    # Rank 0 says what all ranks refuse alike; each rank says, with its number, what only it has met.
    # Before the ranks have met, each machine has one that speaks: folders may differ from machine to machine.
    met = dist.is_initialized()
    common = isinstance(error, Refusal) or (isinstance(error, ValueError) and not met)
    by_itself = not common and world_size > 1
    on_machine = os.environ.get("LOCAL_WORLD_SIZE", "")  # LOCAL_RANK is 0 in all under --virtual-local-rank
    first_of_machine = rank % max(1, int(on_machine) if on_machine.isdecimal() else world_size) == 0
    sentence = explanation(error)
    if by_itself or rank == 0 or (first_of_machine and not met):
        who = f"rank {rank}: " if by_itself else ""
        what = sentence or f"{type(error).__name__}: {error}"
        print(f"train_gpt.py: {who}{what}", file=sys.stderr, flush=True)
    if sentence is not None:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def run_trainer(trainer: Trainer, work: Callable[[Trainer], Any], job: Job | None) -> Any:
    """Do the `work` while signals and the watch-dog are looked after."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, trainer.on_signal)
    ended = threading.Event()
    if job:
        watched = (trainer, trainer.run.timeout, ended, job.pulse)
        threading.Thread(target=watch, args=watched, daemon=True).start()
    result = work(trainer)
    ended.set()
    return result


def main(argv: Sequence[str], work: Callable[[Trainer], Any] = lambda trainer: trainer.train()) -> Any:
    """Set up what a command line asks for and do the `work`.

    One sentence and a non-zero status when it cannot be done.
    """
    # before anything asks for a GPU
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    rank, world_size = 0, 1  # until the environment has been read
    try:
        rank, world_size = number_from("RANK", 0), number_from("WORLD_SIZE", 1)
        for word in ("--help", "-h"):
            if word in argv:
                section = "".join(argv[argv.index(word) + 1 :][:1])
                named = section and not section.startswith("-")
                return print(help_section(section) if named else help_text())
        # refuse what can be refused without a model
        check_system()
        track, run = parse_command_line(argv)
        device = device_of(run, number_from("LOCAL_RANK", 0))
        in_use = run.evaluate is not None or run.sample is not None
        if not in_use:
            check_folders(run, device)  # before torch's compiler is loaded, which makes its cache
        set_up_device(run, device)  # before anything asks torch's compiler where its cache is
        check_settings(track, run)
        rows_per_pass(track, run, world_size)
        # a checkpoint in use needs neither data nor other processes
        if in_use:
            if not run.resume:
                raise ValueError("--evaluate and --sample need --resume PATH, a checkpoint")
            gc.enable()
            return evaluate_checkpoint(run, device) if run.evaluate else sample_checkpoint(run, device)
        # the run
        job = start_processes(run, device, rank, world_size) if os.environ.get("WORLD_SIZE") else None
        if job and on_rank_0(Comm(), lambda: job.store.check(["ended"])):
            return dist.destroy_process_group()  # restarted by a fault after the end of the run
        result = run_trainer(Trainer(track, run, Comm(), device), work, job)
        if job:
            if rank == 0:
                job.store.set("ended", "1")
            dist.destroy_process_group()
        return result
    except (Exception, KeyboardInterrupt) as error:
        report_error(error, rank, world_size)
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
