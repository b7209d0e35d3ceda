"""Shards of made-up tokens, for what depends on the sizes of data and not on their content."""

from __future__ import annotations

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
