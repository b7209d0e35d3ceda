"""The schedule of the track `short` at every boundary (numbers of record #42), and other settings by exact fractions."""

from dataclasses import replace
from fractions import Fraction

import pytest

from train_gpt import TRACKS, Schedule, learning_rate_factor, momentum_at, total_steps, windows_until

SHORT = TRACKS["short"].schedule
FIRST, SECOND, THIRD, LAST = (128, 384), (384, 896), (640, 1408), (768, 1664)  # blocks of 128: 1/3, 3/7, 5/11, 6/13
OTHERS = [
    Schedule(steps=10, extension=0, cooldown=0.3, floor=0.0, momentum_warmup=4, momentum_cooldown=3),
    Schedule(steps=7, extension=5, cooldown=1.0, floor=0.15, momentum=(0.5, 0.9), momentum_warmup=1, momentum_cooldown=1),
    Schedule(steps=12, extension=3, cooldown=0.0, momentum_warmup=0, momentum_cooldown=0, windows=((4, 8),)),
    Schedule(steps=20, extension=2, cooldown=0.25, floor=1.0, momentum_warmup=15, momentum_cooldown=12),  # ramps that meet
    Schedule(steps=2, extension=1),  # fewer steps than stages
    TRACKS["tiny"].schedule,
]


def test_numbers_of_the_short_track():
    assert (SHORT.steps, SHORT.extension, total_steps(SHORT)) == (2245, 40, 2285)
    evaluation = TRACKS["short"].evaluation
    assert evaluation.windows == (768, 2560)  # 6/20 blocks
    assert (evaluation.tokens, evaluation.row_tokens, evaluation.target) == (10_485_760, 262_144, 3.28)


@pytest.mark.parametrize(
    "step,windows",
    [(0, FIRST), (1, FIRST), (748, FIRST), (749, SECOND), (750, SECOND), (1496, SECOND), (1497, THIRD), (1498, THIRD),
     (2244, THIRD), (2245, LAST), (2246, LAST), (2284, LAST)],
)  # fmt: skip
def test_windows_of_the_short_track(step, windows):
    stages = [FIRST, SECOND, THIRD, LAST]
    assert windows_until(SHORT, step) == stages[: stages.index(windows) + 1]


@pytest.mark.parametrize(
    "step,factor",
    [(0, 1.0), (1, 1.0), (1121, 1.0), (1122, 1.0), (1123, 1 - 0.9 * 0.5 / 1122.5), (1124, 1 - 0.9 * 1.5 / 1122.5),
     (1684, 1 - 0.9 * 561.5 / 1122.5), (2243, 0.1 + 0.9 * 2 / 1122.5), (2244, 0.1 + 0.9 / 1122.5), (2245, 0.1), (2246, 0.1),
     (2284, 0.1)],
)  # fmt: skip
def test_learning_rate_of_the_short_track(step, factor):
    assert learning_rate_factor(SHORT, step) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    "step,momentum",
    [(0, 0.85), (1, 0.85 + 0.1 / 300), (150, 0.90), (299, 0.95 - 0.1 / 300), (300, 0.95), (301, 0.95), (2234, 0.95),
     (2235, 0.95), (2236, 0.948), (2260, 0.90), (2283, 0.854), (2284, 0.852)],
)  # fmt: skip
def test_momentum_of_the_short_track(step, momentum):
    assert momentum_at(SHORT, step) == pytest.approx(momentum, abs=1e-12)


def exact(x):
    return Fraction(str(x))


@pytest.mark.parametrize("schedule", [SHORT, *OTHERS])
def test_every_step_by_exact_fractions(schedule):
    s, stages = schedule, len(schedule.windows)
    cooldown, floor, (low, high) = exact(s.cooldown) * s.steps, exact(s.floor), map(exact, s.momentum)
    assert total_steps(s) == s.steps + s.extension
    for step in range(s.steps + s.extension):
        stage = max(i for i in range(stages) if Fraction(i * s.steps, stages) <= step) if step < s.steps else stages
        every = [*s.windows, s.extension_windows]
        assert windows_until(s, step) == every[: stage + 1]

        into = step - (s.steps - cooldown)  # steps into the cooldown
        factor = Fraction(1) if into <= 0 and step < s.steps else floor
        if 0 < into < cooldown:
            factor = 1 - (1 - floor) * into / cooldown
        assert learning_rate_factor(s, step) == pytest.approx(float(factor), abs=1e-12)

        up = Fraction(step, s.momentum_warmup) if step < s.momentum_warmup else 1
        left = s.steps + s.extension - step
        down = Fraction(left, s.momentum_cooldown) if left < s.momentum_cooldown else 1
        assert momentum_at(s, step) == pytest.approx(float(low + (high - low) * min(up, down)), abs=1e-12)


@pytest.mark.parametrize("warmup,cooldown", [(0, 0), (0, 5), (5, 0)])
def test_momentum_without_ramps(warmup, cooldown):
    schedule = replace(SHORT, steps=20, extension=0, momentum_warmup=warmup, momentum_cooldown=cooldown)
    values = [momentum_at(schedule, step) for step in range(20)]
    assert values[0] == pytest.approx(0.85 if warmup else 0.95) and values[10] == pytest.approx(0.95)
    assert values[-1] == pytest.approx(0.87 if cooldown else 0.95)
