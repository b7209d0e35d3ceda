"""A run seen from inside: norms, singular values and attention logits, in a log beside the run's own.

    python tools/monitor.py [--every 25]                         any option of train_gpt.py may follow
    torchrun --standalone --nproc_per_node=8 tools/monitor.py

Trains as train_gpt.py does, to the same losses bit for bit, and writes logs/<run_id>.monitor.jsonl: a
line for every K-th step, the same for any number of processes up to rounding, and in the end the seconds
that the monitor itself took. They are part of the training time.

parameters   of each that the step updates
  weight_rms   after the step, of the exact fp32 copy where there is one
  update_rms   of the weights' change in this step, decay included
  grad_norm    of the mean gradient over the tokens since the last update
  matrix       which matrix of the parameter the next two are of: another one at each line, in turns
  entering     least and largest singular value of what is orthogonalised: the equilibrated momentum, as it is
  leaving      the same of the result, before NorMuon and the learning rate
  decayed      share of the weights that cautious decay makes smaller in this step
layers       of each block before the update, from a pass without graphs over the beginning of the step's
             first row: twice the long window, at least 512 tokens
  output_rms   of the stream behind the block
  logit_max    largest q k, softmax scale included, among the pairs that attention looks at
null: not finite.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib import threads

if __name__ == "__main__":
    os.environ.update(threads.waiting())

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

EVERY = 25
PROBE = 512  # tokens at least
# columns of a parameter: sums of squares, a count, ranges of singular values; of a layer: a mean
# square and the largest logit
WEIGHTS, UPDATE, GRADIENT, DECAYED, ENTERING, LEAVING, COLUMNS = 0, 1, 2, 3, slice(4, 6), slice(6, 8), 8
OUTPUT, LOGIT = 0, 1


@contextlib.contextmanager
def put(owner: Any, **values: Any) -> Iterator[None]:
    """The attributes of `owner` have other values inside."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def square_sum(x: Tensor) -> Tensor:
    """fp64; one pass without a copy."""
    return x.flatten().dot(x.flatten()).double()


def singular_range(x: Tensor) -> Tensor:
    """Least and largest singular value of a matrix (m, n), fp64 (2,), NaN where it is not finite. From
    the smaller Gram matrix: 10 to 100 times as fast as svdvals on a CPU, and in fp64 good to 1e-8 of the
    largest."""
    x = x.double() if x.size(0) <= x.size(1) else x.double().mT
    gram = x @ x.mT
    # which refuses what is not finite
    found = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0)).clamp_min(0).sqrt()
    return found[[0, -1]] + 0 * gram.sum()


def largest_logit(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Largest score of q, k (B, T, H, d) among the visible pairs of a blocked layout's `mask`,
    products in fp32."""
    in_blocks, C = train_gpt.in_blocks, mask.size(-2)
    # (B, n, H, C, 2 C)
    scores = (in_blocks(q.float(), C) @ in_blocks(k.float(), C, True).mT).masked_fill(~mask, -math.inf)
    # without the queries that pad the row
    return scores.amax(-1).transpose(2, 3).flatten(1, 2)[:, : q.size(1)].amax()


def pieces(unit: train_gpt.Unit, place: int, size: int) -> Iterator[tuple[str, slice]]:
    """The parameters behind `size` entries of the unit's stack from entry `place` on, and where
    among these they are."""
    begin = 0
    for name, count in zip(unit.names, unit.counts):
        part = slice(max(begin - place, 0), min(begin + count - place, size))
        if part.start < part.stop:
            yield name, part
        begin += count


class Monitor:
    """Takes the place of methods of one trainer; at a monitored step also of what the optimizer calls.
    Each rank adds up what it owns of the stacks, rank 0 runs the probe; one sum over ranks brings it all
    to the host."""

    def __init__(self, trainer: train_gpt.Trainer, every: int):
        self.trainer, self.every = trainer, 1  # the warm-up shows every step, to run everything once
        self.log, self.seconds, self.began = None, 0.0, 0.0
        self.warm_up = trainer.warm_up
        self.forward_backward = trainer.forward_backward
        self.step = trainer.optimizer.step
        self.updates = {kind: kind.update for kind in (train_gpt.Unit, train_gpt.RowUnit)}
        self.originals = (
            train_gpt.Unit.update,
            train_gpt.Unit.decay,
            train_gpt.orthogonalize,
            train_gpt.attend,
            train_gpt.power_of_two,
        )
        units, layers = trainer.optimizer.units, trainer.track.model.layers
        self.rows = {name: i for i, name in enumerate(name for unit in units for name in unit.names)}
        largest = max(unit.chunk * max(1, unit.tail.numel()) for unit in units)
        # allocating it each time takes a CPU longer than its use
        self.buffer = torch.empty(largest, device=trainer.device)
        self.found = torch.zeros(len(self.rows) + layers, COLUMNS, dtype=torch.float64, device=trainer.device)

        def warm_up() -> None:
            self.warm_up()
            self.every, self.seconds = every, 0.0

        def forward_backward(batch: train_gpt.Batch, weights: Sequence[float]) -> Tensor:
            self.batch, self.windows = batch, trainer.stage.windows
            return self.forward_backward(batch, weights)

        trainer.warm_up = warm_up
        trainer.forward_backward = forward_backward
        trainer.optimizer.step = self.monitored_step

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        self.trainer.clock.synchronize()
        began = time.perf_counter()
        yield
        self.trainer.clock.synchronize()
        self.seconds += time.perf_counter() - began

    def monitored_step(self, *, tokens: int) -> None:
        done, optimizer = self.trainer.optimizer.step_count + 1, self.trainer.optimizer
        if done % self.every:
            return self.step(tokens=tokens)
        self.turn, active = done // self.every, optimizer._active(optimizer.step_count)
        with self.timed():
            self.found.zero_()
            if self.trainer.comm.rank == 0:
                self.probe()
        unit = dict(update=lambda *args: self.update(*args), decay=lambda *args: self.decay(*args))
        functions = dict(orthogonalize=self.orthogonalize, power_of_two=self.power_of_two)
        of_tables = put(train_gpt.RowUnit, update=unit["update"])
        with put(train_gpt.Unit, **unit), of_tables, put(train_gpt, **functions):
            self.step(tokens=tokens)
        with self.timed():
            self.report(done, active)

    @torch.no_grad()
    def probe(self) -> None:
        """Layers from an eager pass; blocked attention everywhere, since its layout says who sees whom."""
        model, device, layer = self.trainer.model, self.trainer.device, len(self.rows)
        inputs = self.batch.inputs[:1, : max(PROBE, 2 * self.windows[1])].to(device)
        offsets = self.batch.offsets[:1].to(device).clamp_max(inputs.size(1))

        def run(block: Any, *args: Any) -> Tensor:
            nonlocal layer
            x = block(*args)
            self.found[layer, OUTPUT] = square_sum(x.float()) / x.numel()
            layer += 1
            return x

        def attend(q: Tensor, k: Tensor, v: Tensor, layout: train_gpt.Layout) -> Tensor:
            self.found[layer, LOGIT] = largest_logit(q, k, layout.mask)
            return self.originals[3](q, k, v, layout)

        with (torch.compiler.set_stance("force_eager"), put(train_gpt, attend=attend),
              put(model, fused=False, make_layout=train_gpt.blocked_layout)):  # fmt: skip
            model.stream(inputs, offsets, self.windows, self.trainer.longest, model.tables(), run)

    def update(self, unit: train_gpt.Unit, grad: Tensor, scale: float, _: bool) -> tuple:
        with self.timed():
            self.unit = unit
            weights = unit.state.get("master", unit.stack(unit.params)[unit.own])
            change = self.buffer[: weights.numel()].view_as(weights).copy_(weights)
        pending = self.updates[type(unit)](unit, grad, scale, False)  # a graph could not be looked into
        with self.timed():
            rowwise = isinstance(unit, train_gpt.RowUnit)  # whose gradient has the rows that are updated
            # the stack of a table is not padded, that of `unit.stack` is
            now = unit.stack(unit.params)[unit.own] if rowwise else pending[1]
            weights = unit.state.get("master", now)
            change.sub_(weights)
            for name, part in pieces(unit, unit.own.start, unit.chunk):
                row = self.found[self.rows[name]]
                row[WEIGHTS], row[UPDATE] = square_sum(weights[part]), square_sum(change[part])
                row[GRADIENT] = square_sum(grad if rowwise else grad[part]) * scale**2
        return pending

    def power_of_two(self, x: Tensor, alive: Tensor) -> Tensor | float:
        power = self.originals[4](x, alive)
        self.power = torch.as_tensor(power).expand(len(x), 1, 1)
        return power

    def orthogonalize(self, x: Tensor, *args: Any) -> Tensor:
        y = self.originals[2](x, *args)
        with self.timed():
            begin = 0
            for name, count in zip(self.unit.names, self.unit.counts):
                at = begin + self.turn % count - self.unit.own.start - self.unit.part.start
                if 0 <= at < len(x):
                    row = self.found[self.rows[name]]
                    row[ENTERING], row[LEAVING] = singular_range(x[at]), singular_range(y[at])
                    if self.unit.group["equilibrate"] == "none":  # in the size of the momentum
                        row[ENTERING] /= self.power[at].item() or 1.0
                begin += count
        return y

    def decay(
        self, unit: train_gpt.Unit, weights: Tensor, update: Tensor, agree: Any, amount: Any,
        alive: Tensor | None = None,
    ) -> None:
        """Called for each slice of a unit that is updated."""
        with self.timed():
            place = unit.own.start + (0 if isinstance(unit, train_gpt.RowUnit) else unit.part.start)
            for name, part in pieces(unit, place, len(weights)) if cautious(unit) else ():
                agrees = agree(update[part] * weights[part], 0)
                decayed = agrees if alive is None else agrees & alive[part]
                self.found[self.rows[name], DECAYED] += decayed.count_nonzero()
        self.originals[1](unit, weights, update, agree, amount, alive)

    def report(self, step: int, active: Sequence[train_gpt.Unit]) -> None:
        found = [
            [x if math.isfinite(x) else None for x in row]
            for row in self.trainer.comm.all_reduce(self.found).tolist()
        ]
        parameters, model = {}, self.trainer.model

        def root(x: float | None, count: int = 1) -> float | None:
            return x if x is None else math.sqrt(x / count)

        for unit in active:
            for name, p, count in zip(unit.names, unit.params, unit.counts):
                row, n = found[self.rows[name]], p.numel()
                line = dict(
                    weight_rms=root(row[WEIGHTS], n),
                    update_rms=root(row[UPDATE], n),
                    grad_norm=root(row[GRADIENT]),
                )
                if unit.matrix:
                    line.update(matrix=self.turn % count, entering=row[ENTERING], leaving=row[LEAVING])
                parameters[name] = line | (dict(decayed=row[DECAYED] / n) if cautious(unit) else {})
        layers = [dict(output_rms=root(row[OUTPUT])) for row in found[len(self.rows) :]]
        for i in model.attention_blocks:
            layers[i]["logit_max"] = found[len(self.rows) + i][LOGIT]
        if self.log:
            self.log.write("monitor", step=step, parameters=parameters, layers=layers)


def cautious(unit: train_gpt.Unit) -> bool:
    return unit.group["cautious"] and unit.group["weight_decay"] > 0


def watch(trainer: train_gpt.Trainer, every: int) -> dict[str, Any]:
    monitor = Monitor(trainer, every)

    class Log(train_gpt.Log):
        """The run's log, which opens the monitor's with it: a resumed run has each step once there too."""

        def open(self, step: int) -> None:
            super().open(step)
            monitor.log = Original(self.path.with_suffix(".monitor.jsonl"))
            monitor.began = trainer.clock.seconds
            monitor.log.open(step)

    Original = train_gpt.Log
    with put(train_gpt, Log=Log):
        final = trainer.train()
    # 0: resumed at its end, nothing to add
    if monitor.log and (seconds := final["train_time_s"] - monitor.began):
        share = dict(monitor_s=monitor.seconds, train_time_s=seconds, share=monitor.seconds / seconds)
        monitor.log.write("overhead", step=final["step"], **share)
        print(f"monitor: {share['share']:.2%} of the training time, log {monitor.log.path}")
    return final


def main(argv: Sequence[str] | None = None) -> Any:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is, allow_abbrev=False)
    parser.add_argument("--every", type=int, default=EVERY, help=f"steps between lines of the log ({EVERY})")
    own, rest = parser.parse_known_args(argv)
    if own.every < 1:
        parser.error("--every is at least 1")
    return train_gpt.main(rest, lambda trainer: watch(trainer, own.every))


if __name__ == "__main__":
    main()
