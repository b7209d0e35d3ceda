"""A run of train_gpt.py that is watched: a schedule of few steps, and what each of them needs and moves."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lib import cards, floors

ALLOWANCE = 1.5e9  # bytes: CUDA's context, workspaces of cuBLAS and FlashAttention, buffers of NCCL
FRAGMENTED = 0.03  # share of the peak that the allocator loses between blocks
PASSES = 2  # of a step are run: one, and one that adds to its gradients; the others are like the second


# ---- a schedule of a few steps that has all stages of the real one


def update_period(track: Any) -> int:
    """Steps in which every group of the optimizer is updated."""
    return math.lcm(*(part.every for part in vars(track).values() if hasattr(part, "betas")))


def untie_step(track: Any) -> int:
    """The step before which head and embedding part."""
    period = update_period(track)
    return math.ceil(round(track.model.tied * track.schedule.steps) / period) * period


def short_schedule(track: Any) -> Any:
    """The track with the fewest steps in which each stage has a whole number of periods of updates."""
    period, schedule = update_period(track), track.schedule
    extension = period if schedule.extension else 0

    def good(steps: int) -> bool:
        begins = [round(stage.begin * steps) for stage in schedule.stages] + [steps + extension]
        lengths = [end - begin for begin, end in zip(begins, begins[1:])]
        return all(length >= period and length % period == 0 for length in lengths)

    steps = next((steps for steps in range(period, 1000, period) if good(steps)), min(schedule.steps, 1000))
    return dataclasses.replace(
        track, schedule=dataclasses.replace(schedule, steps=steps, extension=extension)
    )


class Kind(NamedTuple):
    """What the work of a step depends on."""

    stage: int
    tied: bool

    def __str__(self) -> str:
        return f"stage {self.stage + 1}{', tied' if self.tied else ''}"


def kinds_of_steps(track: Any) -> Counter:
    """How many steps of each kind the real schedule has."""
    schedule, untie = track.schedule, untie_step(track)
    begins = [round(stage.begin * schedule.steps) for stage in schedule.stages]
    kinds: Counter = Counter()
    for step in range(schedule.steps + schedule.extension):
        stage = sum(begin <= step for begin in begins) - 1
        kinds[Kind(stage, step < untie)] += 1
    return kinds


def steps_thrown_away(track: Any) -> int:
    """The last steps whose gradients some groups of the optimizer never use: they end between two updates."""
    return (track.schedule.steps + track.schedule.extension) % update_period(track)


# ---- what is seen of a run


@dataclasses.dataclass
class Step:
    """A step of the dry run. Memory in bytes; counts as in `CountingMode`."""

    kind: Kind
    passes: int  # of a rank
    all_groups: bool  # of the optimizer were updated
    pass_peaks: list[int] = dataclasses.field(default_factory=list)
    pass_counts: list[Counter] = dataclasses.field(default_factory=list)
    update_peak: int = 0
    update_counts: Counter = dataclasses.field(default_factory=Counter)
    collectives: list[tuple] = dataclasses.field(default_factory=list)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return sum(sent for *_, sent in self.collectives)

    def floor(self, card: cards.Card) -> floors.Floor:
        """All passes: those that were not run are like the last one."""
        found = floors.of_update(card, self.update_counts, self.sent)
        for counts in self.pass_counts:
            found = found.plus(floors.of_pass(card, counts))
        return found.plus(floors.of_pass(card, self.pass_counts[-1]), self.passes - len(self.pass_counts))


@dataclasses.dataclass
class Found:
    """What a dry run has seen, in bytes and counts."""

    compiled: str  # mode of compilation
    built: int = 0  # live with weights and optimizer state
    warm_up_peak: int = 0
    validation_peak: int = 0
    steps: list[Step] = dataclasses.field(default_factory=list)
    graphs: dict[str, Any] = dataclasses.field(default_factory=dict)  # of torch.compile
    seconds: float = 0.0

    def peaks(self) -> dict[str, int]:
        """The most live bytes of each phase."""
        updates = {True: [0], False: [0]}
        for step in self.steps:
            updates[step.all_groups].append(step.update_peak)
        return {
            "weights and optimizer state": self.built,
            "forward and backward, first pass": self.warm_up_peak,
            "forward and backward, gradients waiting": max(max(step.pass_peaks) for step in self.steps),
            "validation": self.validation_peak,
            "optimizer step, some groups": max(updates[False]),
            "optimizer step, all groups": max(updates[True]),
        }

    def needed(self) -> float:
        """Bytes that a card must have."""
        return max(self.peaks().values()) * (1 + FRAGMENTED) + ALLOWANCE

    def kinds(self) -> list[Kind]:
        return list(dict.fromkeys(step.kind for step in self.steps))

    def last_pass(self, kind: Kind) -> Counter:
        """Counts of a pass of this kind that adds to gradients, or that is alone."""
        return [step for step in self.steps if step.kind == kind][-1].pass_counts[-1]

    def floor(self, kind: Kind, card: cards.Card) -> floors.Floor:
        """The mean of a step of this kind over a period of updates."""
        same = [step for step in self.steps if step.kind == kind]
        same = same or [step for step in self.steps if step.kind.stage == kind.stage]
        mean = floors.Floor()
        for step in same:
            mean = mean.plus(step.floor(card), 1 / len(same))
        return mean


class Watcher:
    """The `work` of `train_gpt.main`: trains, and notes memory and counts of each phase in `found`."""

    def __init__(self, mode: Any, collectives: list, say: Callable[[str], None], found: Found):
        self.mode, self.collectives, self.say, self.found = mode, collectives, say, found
        self.step: Step | None = None  # None before the training
        self.rows_per_pass: dict[int, int] = {}  # by the batch of the stage; the warm-up shows them

    def __call__(self, trainer: Any) -> dict[str, Any]:
        """Train; the `final` event of the log."""
        self.trainer, self.found.built = trainer, self.mode.live
        schedule = trainer.track.schedule
        self.num_steps = schedule.steps + schedule.extension
        if hasattr(trainer, "progress"):  # it is this tool that speaks
            trainer.progress.speaks = False
        trainer.last_page = lambda: None  # has the model write
        self.calls = {name: getattr(trainer, name) for name in ("advance", "forward_backward", "validate")}
        for name in self.calls:
            setattr(trainer, name, getattr(self, name))
        self.update, trainer.optimizer.step = trainer.optimizer.step, self.optimizer_step
        self.mode.take()
        return trainer.train()

    def advance(self, step: int, batches: Any) -> Any:
        self.number = step
        self.step = Step(Kind(0, False), 0, (step + 1) % self.trainer.period == 0)
        self.found.steps.append(self.step)
        return self.calls["advance"](step, batches)

    def forward_backward(self, batch: Any, weights: Sequence[float]) -> Any:
        """The first PASSES passes of a step; in the warm-up there is one."""
        trainer, stage = self.trainer, self.trainer.stage
        number = trainer.track.schedule.stages.index(stage)
        doing = "warm-up" if self.step is None else f"step {self.number + 1} of {self.num_steps}"
        self.say(f"{doing}, stage {number + 1}")
        self.mode.take()
        if self.step is None:
            self.rows_per_pass[stage.batch] = len(batch.inputs)
            loss = self.calls["forward_backward"](batch, weights)
            self.found.warm_up_peak = max(self.found.warm_up_peak, self.mode.peak)
            return loss
        rows, size = len(batch.inputs), self.rows_per_pass[stage.batch]
        self.step.kind, self.step.passes = Kind(number, trainer.model.tied), rows // size
        pairs = self.pairs_of_a_row(batch.offsets, stage.windows)
        self.mode.accumulating = trainer.compiled != "none"
        for begin in range(0, min(rows, PASSES * size), size):
            part = type(batch)(*(x[begin : begin + size] for x in batch))
            loss = self.calls["forward_backward"](part, weights)
            self.step.pass_peaks.append(self.mode.peak)
            self.step.pass_counts.append(self.with_attention(self.mode.take(), size * pairs))
        self.mode.accumulating = False
        return loss

    def pairs_of_a_row(self, offsets: Any, windows: Sequence[int]) -> float:
        """Pairs that the attention of all blocks sees in a row, the mean over the rows of the step."""
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():  # these are numbers
            where = offsets.numpy()
        model, blocks = self.trainer.track.model, self.trainer.model.attention_blocks
        return floors.attention_pairs(model, blocks, windows, where) / len(where)

    def with_attention(self, counts: Counter, pairs: float) -> Counter:
        """The counts with the operations of attention: two products forward, five backward."""
        D, blocks = self.trainer.track.model.width, len(self.trainer.model.attention_blocks)
        for part, what in [*counts]:
            products = {"attention forward": 2, "attention backward": 5}.get(what)
            if products:
                counts[part, "attention"] += 2 * products * D * pairs * counts[part, what] / blocks
        return counts

    def optimizer_step(self, **given: Any) -> None:
        self.collectives.clear()
        self.mode.take()
        self.update(**given)
        peak, counts = self.mode.peak, self.mode.take()
        if self.step is not None:
            self.step.update_peak, self.step.update_counts = peak, counts
            self.step.collectives = list(self.collectives)

    def validate(self, *given: Any, **named: Any) -> Any:
        self.say("validation")
        self.mode.take()
        result = self.calls["validate"](*given, **named)
        self.found.validation_peak = max(self.found.validation_peak, self.mode.peak)
        return result
