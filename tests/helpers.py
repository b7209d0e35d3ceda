"""Shared by the tests of whole runs: a small learnable corpus, a small model, runs in one process
or in several."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import shards
import train_gpt

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds for one set of processes, on a busy machine

# 18 + 2 steps of 12 or 24 rows: three stages, every form of a block, tied weights that part at step
# 12, both training shards are read, some groups wait for a second step
SMALL = {
    "track": "tiny", "compile": "none", "dtype": "float32", "threads": 1, "device": "cpu",
    "show": "false",
    "data.rows": 12, "data.row_tokens": 64, "data.epochs": 2,
    "model.padded_vocab": 264, "model.width": 32, "model.heads": 2, "model.layers": 2, "model.mlp_ratio": 4,
    "model.attention_free": "()", "model.long_blocks": "(1,)", "model.value_tables": "((0, 0), (1, 1))",
    "model.skips": "((0, 1),)", "model.backout": 0, "model.ngrams": "((2, 40), (3, 64))",
    "model.matches": "(2, 3)", "model.ngram_fold": 3, "model.ngram_signs": 5,
    "model.xsa": "(0,)", "model.key_offset": "(1,)", "model.paired": "(1,)",
    "model.attention_source": 0, "model.value_gate_inputs": 4, "model.qk_parts": 2, "model.tied": 0.6,
    "model.o_std": 0.5, "model.embed_std": 0.02, "model.head_std": 0.02,
    "matrix.lr": 0.03, "matrix.weight_decay": 0.1, "matrix.cautious": "true",
    "gate.lr": 0.03, "embed.lr": 0.02, "tables.lr": 0.3, "head.lr": 0.008, "scalar.lr": 0.02,
    "tables.betas": "(0, 0.95)", "tables.rowwise": "true",
    "embed.every": 2, "tables.every": 1, "head.every": 2, "scalar.every": 1,
    "schedule.steps": 18, "schedule.extension": 2, "schedule.decay_power": 2.0,
    "schedule.momentum": "(0.85, 0.95)", "schedule.momentum_warmup": 6, "schedule.momentum_cooldown": 4,
    # classes of the head are sampled, at first more than the targets of a row, then fewer
    "schedule.stages": "((0, (16, 24), 1, 48, 1.0, ((0.5, 0.0),), 48), "
                       "(0.5, (24, 32), 2, 96, 1.3, (), 16), "
                       "(1, (24, 40), 1, 96))",
    # from step 10 on, when head and embedding are still one
    "average.blends": "(('qk', 0.5), ('mlp', 0.3), ('embed', 0.6), ('lm_head', 0.6), ('ngram_embed', 0.5), "
                      "('skip', 1.0))",
    "average.span": 0.5, "average.memory": 0.5, "average.every": 2,
    "evaluation.tokens": 1000, "evaluation.row_tokens": 256, "evaluation.every": 7,
    "evaluation.windows": "(24, 48)", "evaluation.log_every": 1, "evaluation.target": 5.0,
}  # fmt: skip

STEPS = int(SMALL["schedule.steps"] + SMALL["schedule.extension"])
TOLERANCE = 1e-6  # relative, of every loss; the same maths in another order of additions
# Relative, in the norm of each parameter after 20 steps: rounding may change the sign of a gradient near
# zero, and Adam goes as far for it as for any other. Seeds differ: 2e-6 to 2e-4; losses agree to 4e-7.
PARAMETERS = 3e-4


def options(**overrides: Any) -> list[str]:
    """The command line of a small run; `data__rows=6` stands for --data.rows 6, None removes an option."""
    chosen = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    return [word for name, value in chosen.items() if value is not None for word in (f"--{name}", str(value))]


def make_corpus(data_dir: Path) -> Path:
    """Two training shards and a validation shard of a byte text that a small model can learn;
    returns their folder."""
    folder, files = data_dir / "shakespeare", {}
    random = np.random.default_rng(1)
    words = [bytes(random.integers(97, 123, random.integers(2, 8)).astype(np.uint8)) for _ in range(20)]
    for name, documents in {"train_000001.bin": 130, "train_000002.bin": 200, "val_000000.bin": 30}.items():
        tokens: list[int] = []
        for _ in range(documents):
            text = b" ".join(words[i] for i in random.integers(0, len(words), random.integers(2, 40)))
            tokens += [256, *text]
        files[name] = shards.write_shard(folder / name, np.array(tokens))
    shards.write_manifest(folder, "shakespeare", 257, 256, files)
    return folder


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def patch_shard(folder: Path, name: str, position: int, value: int, resign: bool = False) -> None:
    """Overwrite an int32 of the header (position < 256) or the token at position - 256."""
    path = folder / name
    content = bytearray(path.read_bytes())
    if position < 256:
        content[4 * position : 4 * position + 4] = value.to_bytes(4, "little")
    else:
        content[1024 + 2 * (position - 256) : 1026 + 2 * (position - 256)] = value.to_bytes(2, "little")
    path.write_bytes(content)
    if resign:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        files[name]["sha256"] = hashlib.sha256(content).hexdigest()
        edit_manifest(folder, files=files)


def events(log: Path) -> list[dict[str, Any]]:
    """The lines of a log, each of which must be one object of strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = log.read_text(encoding="ascii")
    assert text.endswith("\n")
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert all(isinstance(line, dict) and "event" in line for line in lines)
    return lines


@dataclass
class Outcome:
    """What a run leaves: the log's losses, the final event, the parameters of each rank."""

    final: dict[str, Any] = field(default_factory=dict)
    log: Path | None = None
    params: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return events(self.log)

    @property
    def losses(self) -> list[tuple[str, int, float]]:
        """(event, step, loss) of every training and validation loss, in the order of the log."""
        key = {"step": "train_loss", "val": "val_loss", "final": "val_loss"}
        return [
            (line["event"], line["step"], line[key[line["event"]]])
            for line in self.lines
            if line["event"] in key
        ]


def train(argv: list[str], main: Callable[[list[str]], Any] = train_gpt.main) -> Outcome:
    """Run `main` in this process and keep what is needed to compare it; thread count and signal
    handlers are put back."""
    outcome, threads, original, logs = Outcome(), torch.get_num_threads(), train_gpt.Trainer.train, []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}

    def capture(self: train_gpt.Trainer) -> dict[str, Any]:
        outcome.final = original(self)
        outcome.params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return outcome.final

    class Log(train_gpt.Log):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            logs.append(self)

    try:
        with mock.patch.object(train_gpt.Trainer, "train", capture), mock.patch.object(train_gpt, "Log", Log):
            main(argv)
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.compiler.set_stance("default")
        for log in logs:
            if log.file:
                log.file.close()
    outcome.log = logs[0].path
    return outcome


def no_traceback(*said: str) -> None:
    """What every test of bad input says of all that a program printed."""
    assert not any("Traceback" in text for text in said), said


def refusal(argv: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one sentence with which a command line is refused, without the program's name."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(argv)
    assert stop.value.code not in (0, None)
    output, error = capsys.readouterr()
    no_traceback(output, error)
    assert error.startswith("train_gpt.py: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error.removeprefix("train_gpt.py: ").strip()


def one_sentence(status: int | None, said: str, begins: str) -> str:
    """What a program said on stderr when it refused something: one line that names the program.

    Returns it without the name.
    """
    no_traceback(said)
    assert status not in (0, None) and said.startswith(begins) and said.endswith("\n"), (status, said)
    assert said.count("\n") == 1, said
    return said.removeprefix(begins).strip()


def check_close(outcome: Outcome, expected: Outcome) -> None:
    """The same losses and parameters up to rounding."""
    assert [loss[:2] for loss in outcome.losses] == [loss[:2] for loss in expected.losses]
    for (event, step, loss), (_, _, other) in zip(outcome.losses, expected.losses):
        assert loss == pytest.approx(other, rel=TOLERANCE, abs=0), f"{event} at step {step}"
    for name, p in expected.params.items():
        difference = (outcome.params[name].double() - p.double()).norm() / p.double().norm().clamp_min(1e-30)
        assert difference <= PARAMETERS, f"{name} differs by {difference:.1e}"


def check_equal(outcome: Outcome, expected: Outcome) -> None:
    """The same losses and parameters bit for bit, each step logged once."""
    assert outcome.losses == expected.losses
    assert outcome.params.keys() == expected.params.keys()
    for name, p in expected.params.items():
        assert torch.equal(outcome.params[name], p), name


def _child(rank: int, world_size: int, ports: list[int], jobs: list[list[str]], environment: dict,
           folder: Path, main: Callable) -> None:  # fmt: skip
    output = os.open(folder / f"output_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    results = []
    for port, argv in zip(ports, jobs):
        os.environ["MASTER_PORT"] = str(port)
        try:
            results.append(train(argv, main))
        except SystemExit as stop:
            results.append(stop.code)
    torch.save(results, folder / f"result_{rank}")


def train_with(world_size: int, jobs: list[list[str]], environment: dict[str, str], folder: Path,
               main: Callable = train_gpt.main) -> list[list[Any]]:  # fmt: skip
    """Run each command line on `world_size` gloo processes, as torchrun would; returns [job][rank] ->
    Outcome or status.

    The processes come from a fork server that has imported torch; they write what they print into `folder`.
    """
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in jobs]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in sockets]
    processes = start(
        _child, [(rank, world_size, ports, jobs, environment, folder, main) for rank in range(world_size)]
    )
    finish(processes)
    results = []
    for rank in range(world_size):
        said = (folder / f"output_{rank}").read_text()
        assert (folder / f"result_{rank}").is_file(), f"rank {rank} of {world_size} ended early:\n{said}"
        results.append(torch.load(folder / f"result_{rank}", weights_only=False))
    return [list(ranks) for ranks in zip(*results)]


def in_environment(environment: dict[str, str], function: Any, args: tuple) -> None:
    """A fork server keeps the environment of its own start; a shell ignores signals for what runs
    in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    function(*args)


def start(function: Any, arguments: list[tuple]) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "pytest", "train_gpt"])
    processes = [
        context.Process(target=in_environment, args=(dict(os.environ), function, args)) for args in arguments
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> list[int]:
    """Wait for processes; those that hang are killed and fail the test. Returns their exit codes."""
    for process in processes:
        process.join(TIMEOUT)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(processes)} processes hang"
    return [process.exitcode for process in processes]
