"""The rule on memory in records/README.md, as far as code can check it, for one checkpoint of one script.

    python tools/lib/memory_rule.py SCRIPT CHECKPOINT TRACK SHARD     what `measure` finds, as a line of JSON

`record.py rules` calls this three times, each time in a process and with a DATA_DIR of its own: with the
training shards as they are, without them, and with others in their place. It uses only what every script
with the option --evaluate has: `main`, and a class `GPT` whose `forward` is the loss and whose `loss` is
the head.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

TOLERANCE = 1e-5  # of a sum of probabilities
PLACES = 3  # whose distributions are summed, for each path of the head
COPIES = 16  # of a place: products in FP8 take no fewer rows


def digest(model: Any) -> str:
    """Of all weights and buffers."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def measure(
    script: ModuleType, checkpoint: Path, track: str, shard: Path, words: Sequence[str] = ()
) -> dict[str, Any]:
    """What the script's own evaluation of a checkpoint on a shard gives, and what its model is like.

    "loss": the mean loss, every bit of it; "learned": whether the evaluation changed a weight; "sums": of the
    probabilities of all classes, for some places and each path of the head, validation and training; "sees":
    whether a loss depends on later tokens or on another document.
    """
    first_call: list[Any] = []

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not first_call:
            first_call.extend([digest(model), model, *args])
        return original(model, *args, **kwargs)

    original = script.GPT.forward
    with mock.patch.object(script.GPT, "forward", forward):
        evaluate = ["--resume", str(checkpoint), "--evaluate", str(shard)]
        loss = script.main(["--track", track, *evaluate, *words])
    before, model, inputs, _, offsets, *rest = first_call
    return {
        "loss": float(loss).hex(),
        "learned": digest(model) != before,
        "sums": {path: list(sums(script, model, inputs, offsets, rest, path)) for path in PATHS},
        "sees": sees(model, inputs, offsets, rest),
    }


PATHS = ("validation", "training")  # with gradients a head may multiply in lower precision


def sums(script: ModuleType, model: Any, inputs: Any, offsets: Any, rest: list, path: str) -> Iterator[float]:
    """The sum of the probabilities of all classes at some places, as the loss of one path has them.

    The loss is asked for every class as the target; what `forward` returns must be what `loss` does.
    """
    import torch  # only here: record.py does without

    heard: list[tuple] = []

    def head(model: Any, x: Any, targets: Any) -> Any:
        heard.append((x.detach(), original(model, x, targets)))
        return heard[-1][1]

    T = min(64, inputs.size(1))
    row, end = inputs[:1, :T], torch.full_like(offsets[:1], T)
    end[:, 0] = 0
    targets = row.roll(-1, 1).long()
    original = script.GPT.loss
    with torch.set_grad_enabled(path == "training"):
        with mock.patch.object(script.GPT, "loss", head):
            total = model(row, targets, end, *rest)
        if not torch.equal(total, torch.stack([out for _, out in heard]).sum(0)):
            raise ValueError("the loss of the model is not the sum of what its head returns")
        x = torch.cat([x for x, _ in heard])
        classes = torch.arange(len(model.lm_head), device=x.device).expand(COPIES, -1)
        for place in torch.linspace(0, len(x) - 1, PLACES).long().tolist():
            losses = original(model, x[place].expand(COPIES, -1).contiguous(), classes) / COPIES
            yield float(losses.detach().double().neg().exp().sum())


def sees(model: Any, inputs: Any, offsets: Any, rest: list) -> bool:
    """Whether the losses in the midst of the second of two documents change with the first one or with later
    tokens."""
    import torch

    row = inputs[:1, :256].clone()
    quarter = row.size(1) // 4
    ends = torch.full_like(offsets[:1], row.size(1))
    ends = torch.cat([ends[:, :1] * 0, ends[:, :1] // 2, ends[:, :1]], 1)
    targets = torch.full_like(row, -1, dtype=torch.int64)
    targets[:, 2 * quarter : 3 * quarter] = row[:, 2 * quarter + 1 : 3 * quarter + 1]
    others = row.roll(7, 1)
    others[:, 2 * quarter : 3 * quarter] = row[:, 2 * quarter : 3 * quarter]
    with torch.no_grad():
        losses = [model(tokens, targets, ends, *rest) for tokens in (row, others)]
    return not torch.equal(*losses)


# ---- on the side of record.py


def put_shards(source: Path, target: Path, training: str) -> None:
    """A copy of a corpus with its training shards "as they are", "absent" or "others": random tokens."""
    manifest = json.loads((source / "manifest.json").read_text(encoding="utf-8-sig"))
    target.mkdir(parents=True)
    shutil.copy(source / "manifest.json", target)
    random, start = np.random.default_rng(0), manifest["document_start"]
    for name in manifest["files"]:
        if "train_" not in name:
            shutil.copy(source / name, target)
        elif training == "as they are" and (source / name).is_file():
            os.symlink((source / name).absolute(), target / name)
        elif training == "others":
            header = np.zeros(256, "<i4")
            tokens = random.integers(0, manifest["vocab_size"], 50_000).astype("<u2")
            tokens[0] = start
            header[:3] = 20240520, 1, len(tokens)
            (target / name).write_bytes(header.tobytes() + tokens.tobytes())


SHARDS = ("as they are", "absent", "others")


Found = dict[str, list[dict[str, Any]]]  # by what stands in the place of the training shards


def measure_apart(script: Path, checkpoint: Path, track: str, corpus: Path) -> Found:
    """What `measure` finds for each validation shard, by what stands in the place of the training shards.

    The script is copied too, so that nothing beside it is found.
    """
    found: Found = {}
    with tempfile.TemporaryDirectory() as place:
        alone = Path(place) / "script" / script.name
        alone.parent.mkdir()
        shutil.copy(script, alone)
        for training in SHARDS:
            folder = Path(place) / training.replace(" ", "_")
            put_shards(corpus, folder / corpus.name, training)
            shards = sorted((folder / corpus.name).glob("*val_*.bin"))
            found[training] = [ask(alone, checkpoint, track, shard, folder) for shard in shards]
    return found


def ask(script: Path, checkpoint: Path, track: str, shard: Path, data_dir: Path) -> dict[str, Any]:
    """`measure` in a process of its own; ValueError with what it said where it failed."""
    command = [sys.executable, __file__, str(script), str(checkpoint.absolute()), track, str(shard)]
    environment = os.environ | {"DATA_DIR": str(data_dir)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=data_dir)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise ValueError(f"the evaluation of {checkpoint} by {script.name} failed, it said: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def broken(found: Found) -> list[str]:
    """What breaks the rule, a sentence each; [] where nothing does."""
    flaws, first = [], [shard["loss"] for shard in found["as they are"]]
    for training in SHARDS[1:]:
        if [shard["loss"] for shard in found[training]] != first:
            flaws.append(f"the validation loss changes when the training shards are {training}")
    for shard in found["absent"]:
        for path, values in shard["sums"].items():
            # NaN too
            if far := [value for value in values if not abs(value - 1) <= TOLERANCE]:
                flaws.append(f"the probabilities of the {path} path sum to {far[0]}, not 1")
        if shard["learned"]:
            flaws.append("the evaluation changes weights")
        if shard["sees"]:
            flaws.append("a loss depends on later tokens or on another document")
    return flaws


def main(script: str, checkpoint: str, track: str, shard: str) -> None:
    spec = importlib.util.spec_from_file_location("frozen_script", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(module)
        found = measure(module, Path(checkpoint), track, Path(shard))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
