"""The least time of a step: operations and bytes over the rates of a card, nothing beside anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lib.cards import OUTSIDE, Card

# What moves in a pass besides the operands of products and of attention. With graphs the operations between
# them have a column of their own.
BYTES = ("bytes", "bytes of kernels", "bytes of gradients")


def visible_pairs(offsets: np.ndarray, window: int) -> int:
    """Pairs (query, key) that attention looks at in rows with document `offsets` (B, M + 1)."""
    lengths = np.diff(offsets).ravel().astype(np.int64)
    inside = np.minimum(lengths, window + 1)  # a query at position p sees min(p, window) + 1 keys
    return int((inside * (inside + 1) // 2 + (lengths - inside) * (window + 1)).sum())


def attention_pairs(
    model: Any, blocks: Sequence[int], windows: Sequence[int], offsets: np.ndarray
) -> float:
    """Visible pairs of all blocks with attention, by the settings `model` of a track.

    Those of paired heads count half: they have two positions for each token, in half of the heads.
    """
    total = 0.0
    for block in blocks:
        times = 2 if block in model.paired else 1
        total += visible_pairs(times * offsets, windows[block in model.long_blocks]) / times
    return total


class Floor(NamedTuple):
    """Seconds, each on its own."""

    arithmetic: float = 0.0
    bytes: float = 0.0
    optimizer: float = 0.0
    communication: float = 0.0
    between: float = 0.0  # eager operations between graphs, not in the sum

    @property
    def sum(self) -> float:
        return sum(self) - self.between

    def plus(self, other: Floor, times: float = 1.0) -> Floor:
        return Floor(*(a + times * b for a, b in zip(self, other)))


def sums(counts: Counter, part: str | None = None) -> Counter:
    """Counts by (part, what), added up over parts, or those of one part."""
    total: Counter = Counter()
    for (of, what), amount in counts.items():
        if part in (None, of):
            total[what] += amount
    return total


def arithmetic(card: Card, counts: Counter) -> float:
    """Seconds of the products and of attention; fp32 is taken to run at an eighth, without tensor cores."""
    work = sums(counts)
    usual = work["products"] + work["attention"] + 8 * work["products in fp32"]
    return usual / card.products + work["products in FP8"] / card.fp8_products


def of_pass(card: Card, counts: Counter) -> Floor:
    """Forward and backward of a micro-batch: what its products read and write is not counted as bytes."""
    work = sums(counts)
    between = sums(counts, OUTSIDE)["bytes"] if work["bytes of kernels"] else 0.0
    moved = sum(work[what] for what in BYTES) - between
    seconds = arithmetic(card, counts), moved / card.bytes_per_s
    return Floor(*seconds, between=between / card.bytes_per_s)


def moved_by_update(counts: Counter) -> float:
    """Bytes that a step of the optimizer moves, the operands of its products included."""
    work = sums(counts)
    return sum(work[what] for what in (*BYTES, "bytes of products"))


def of_update(card: Card, counts: Counter, sent: float) -> Floor:
    """A step of the optimizer in which a rank sends so many bytes."""
    seconds = arithmetic(card, counts) + moved_by_update(counts) / card.bytes_per_s
    return Floor(optimizer=seconds, communication=sent / card.link)
