"""Shards of made-up tokens, for what depends on the sizes of data and not on their content."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "data"))
import shards  # noqa: E402


def make_tokens(folder: Path, track: Any, steps: int) -> None:
    """Shards for so many steps of a track (and twice as many more): tokens by Zipf's law.

    The median document is a fifth of the cut (FineWeb's has 403 tokens), the tail is long.
    """
    data, rng, files = track.data, np.random.default_rng(0), {}
    stages = track.schedule.stages
    cut, batch = max(stage.document_cut for stage in stages), max(stage.batch for stage in stages)
    need = {
        "train_000001.bin": 3 * steps * data.rows * batch * data.row_tokens,
        "val_000000.bin": 2 * track.evaluation.tokens,
    }
    for name, count in need.items():
        rank = (data.vocab_size ** rng.random(count)).astype(np.uint16) - 1
        tokens = np.where(rank == data.document_start, 0, rank).astype(np.uint16)
        starts = np.cumsum(rng.lognormal(np.log(cut / 5), 1.0, count // 8).astype(int) + 8)
        tokens[np.concatenate([[0], starts[starts < count]])] = data.document_start
        files[name] = shards.write_shard(folder / name, tokens)
    shards.write_manifest(folder, data.corpus, data.vocab_size, data.document_start, files)


# ---- rows of tables that real text reads


def distinct(n: int, tokens: float) -> float:
    """How many different n-grams so many GPT-2 tokens of web text have.

    The powers fit within a seventh what was measured from 30,000 to 800,000 tokens. Of n-grams longer than
    pairs all count as different.
    """
    return {1: 46 * tokens**0.48, 2: min(tokens, 3.6 * tokens**0.84)}.get(n, tokens)


def rows_read(model: Any, name: str, size: int, tokens: float) -> float:
    """Rows of the table `name` (size rows) that so many tokens read."""
    if name != "ngram_embed":  # embeddings of tokens, one table or several
        return min(size, size // model.padded_vocab * distinct(1, tokens))
    of_ngrams = sum(rows * -math.expm1(-distinct(n, tokens) / rows) for n, rows in model.ngrams)
    return min(size, of_ngrams + len(model.matches) * distinct(1, tokens))


def read_as_text_would(train_gpt: Any, model: Any) -> None:
    """Row-wise tables, whose masks have no content here, are read as by real text, evenly over owners."""

    def row_counts(unit: Any, masks: Any) -> list[list[int]]:
        ranks = unit.comm.world_size
        # a mask for each rank, and two for all of them; a single process has one
        tokens = [unit.tokens / ranks] * (len(masks) - 2) + [unit.tokens] * min(2, len(masks))
        rows = [rows_read(model, unit.names[0], unit.size, n) for n in tokens]
        return [[math.ceil(n / ranks)] * ranks for n in rows]

    if hasattr(train_gpt, "RowUnit"):
        train_gpt.RowUnit.row_counts = row_counts
