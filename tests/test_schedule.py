"""The schedule of the track `short` at its boundaries (numbers of record #89), and other settings
by exact fractions."""

from dataclasses import replace
from fractions import Fraction

import pytest

from train_gpt import (
    TRACKS,
    Average,
    Schedule,
    Stage,
    learning_rate_factor,
    loss_weights,
    momentum_at,
    share_in_mean,
    stages_until,
    total_steps,
)

# as many steps as record #89, and its cooldown, whose values are known
SHORT = replace(TRACKS["short"].schedule, steps=1270, extension=15, cooldown=0.6, floor=0.15)
# blocks of 128: 1/3, 3/7, 5/11, 6/13
WINDOWS = [(128, 384), (384, 896), (640, 1408), (640, 1408), (768, 1664)]
OTHERS = [
    Schedule(steps=10, extension=0, cooldown=0.3, floor=0.0, momentum_warmup=4, momentum_cooldown=3),
    Schedule(steps=7, extension=5, cooldown=1.0, floor=0.15, momentum=(0.5, 0.9), momentum_warmup=1,
             momentum_cooldown=1),
    Schedule(steps=12, extension=3, cooldown=0.0, momentum_warmup=0, momentum_cooldown=0,
             stages=[(0, (4, 8))]),
    # ramps that meet
    Schedule(steps=20, extension=2, cooldown=0.25, floor=1.0, momentum_warmup=15, momentum_cooldown=12),
    # fewer steps than stages
    Schedule(steps=2, extension=1, stages=[(begin, (8, 8)) for begin in (0, 0.3, 0.6, 1)]),
    Schedule(steps=30, extension=4, cooldown=0.6, floor=0.15, stages=[
        (0, (8, 8), 1, 96, 1.0, ((0.5, 0.5), (0.25, 0))), (0.4, (8, 16), 2, 96, 1.5, ((0.5, 0),)),
        (0.75, (8, 24), 3, 96, 1.7), (1, (8, 32), 3, 96, 9.0, ((1, 2),))]),
    TRACKS["tiny"].schedule,
    TRACKS["medium"].schedule,
]  # fmt: skip


def test_numbers_of_the_short_track():
    schedule = TRACKS["short"].schedule
    assert (schedule.extension, schedule.cooldown, schedule.floor, schedule.decay_power) == (20, 0.8, 0.3, 2)
    data, evaluation = TRACKS["short"].data, TRACKS["short"].evaluation
    assert [data.rows * data.row_tokens * stage.batch for stage in SHORT.stages] == [
        131_072,
        262_144,
        393_216,
        262_144,
        131_072,
    ]
    # a fifth of the classes, and all of them in the first third and in the last steps
    assert [stage.candidates for stage in SHORT.stages] == [0, 10_240, 10_240, 0, 0]
    assert [stage.document_cut for stage in SHORT.stages] == [896, 2048, 2048, 2048, 2048]
    assert evaluation.windows == (768, 2560)  # 6/20 blocks
    assert (evaluation.tokens, evaluation.row_tokens, evaluation.target) == (10_485_760, 262_144, 3.28)


@pytest.mark.parametrize(
    "step,stage",
    [(0, 0), (422, 0), (423, 1), (846, 1), (847, 2), (1193, 2), (1194, 3), (1269, 3), (1270, 4), (1284, 4)],
)
def test_windows_of_the_short_track(step, stage):
    assert [stage.windows for stage in stages_until(SHORT, step)] == WINDOWS[: stage + 1]


@pytest.mark.parametrize(
    "step,factor",
    [(0, 1.0), (422, 1.0), (423, 1.52), (508, 1.52), (600, 1.3546), (700, 1.1748), (846, 0.9123),
     (847, 1.0271), (900, 0.9172), (1000, 0.7098), (1100, 0.5025), (1200, 0.2951), (1269, 0.1521),
     (1270, 0.15), (1284, 0.15)],
)  # fmt: skip
def test_learning_rate_of_the_short_track(step, factor):
    assert learning_rate_factor(SHORT, step) == pytest.approx(factor, abs=6e-5)


@pytest.mark.parametrize(
    "step,weights",
    [(0, [1, 0.5, 0.25]), (211, [1, 0.5, 0.1253]), (422, [1, 0.5, 0.0006]), (423, [1, 0.5]), (635, [1, 0.25]),
     (846, [1, 0.0012]), (847, [1]), (1269, [1]), (1284, [1])],
)  # fmt: skip
def test_loss_weights_of_the_short_track(step, weights):
    assert loss_weights(SHORT, step) == pytest.approx(weights, abs=6e-5)


@pytest.mark.parametrize(
    "step,momentum",
    [(0, 0.85), (1, 0.85 + 0.1 / 300), (150, 0.90), (299, 0.95 - 0.1 / 300), (300, 0.95), (301, 0.95),
     (1234, 0.95), (1235, 0.95), (1236, 0.948), (1260, 0.90), (1283, 0.854), (1284, 0.852)],
)  # fmt: skip
def test_momentum_of_the_short_track(step, momentum):
    assert momentum_at(SHORT, step) == pytest.approx(momentum, abs=1e-12)


def exact(x):
    return Fraction(str(x))


@pytest.mark.parametrize("schedule", [SHORT, *OTHERS])
def test_every_step_by_exact_fractions(schedule):
    s, total = schedule, schedule.steps + schedule.extension
    cooldown, floor, (low, high) = exact(s.cooldown) * s.steps, exact(s.floor), map(exact, s.momentum)
    assert total_steps(s) == total and all(isinstance(stage, Stage) for stage in s.stages)
    begins = [round(Fraction(stage.begin).limit_denominator(100) * s.steps) for stage in s.stages] + [total]
    for step in range(total):
        stage = max(i for i, begin in enumerate(begins[:-1]) if begin <= step)
        assert stages_until(s, step) == list(s.stages[: stage + 1])

        into = step - (s.steps - cooldown)  # steps into the cooldown
        gone = 1 if step >= s.steps else into / cooldown if into > 0 else 0
        factor = (1 - gone) * exact(s.stages[stage].lr) + gone * floor
        assert learning_rate_factor(s, step) == pytest.approx(float(factor), abs=1e-12)

        through = Fraction(step - begins[stage], begins[stage + 1] - begins[stage])
        weights = [
            1,
            *(exact(first) * (1 - through) + exact(last) * through for first, last in s.stages[stage].ahead),
        ]
        assert loss_weights(s, step) == pytest.approx([float(w) for w in weights], abs=1e-12)

        up = Fraction(step, s.momentum_warmup) if step < s.momentum_warmup else 1
        left = total - step
        down = Fraction(left, s.momentum_cooldown) if left < s.momentum_cooldown else 1
        assert momentum_at(s, step) == pytest.approx(float(low + (high - low) * min(up, down)), abs=1e-12)


@pytest.mark.parametrize("name", TRACKS)
def test_no_gradient_is_left_at_the_end_of_a_track(name):
    """A group with `every` k is updated after the steps k, 2 k, ...; the last step is one of them."""
    track = TRACKS[name]
    periods = {section.every for section in vars(track).values() if hasattr(section, "every") and
               hasattr(section, "betas")}  # fmt: skip
    assert periods and all(total_steps(track.schedule) % every == 0 for every in periods)


@pytest.mark.parametrize("warmup,cooldown", [(0, 0), (0, 5), (5, 0)])
def test_momentum_without_ramps(warmup, cooldown):
    schedule = replace(SHORT, steps=20, extension=0, momentum_warmup=warmup, momentum_cooldown=cooldown)
    values = [momentum_at(schedule, step) for step in range(20)]
    assert values[0] == pytest.approx(0.85 if warmup else 0.95) and values[10] == pytest.approx(0.95)
    assert values[-1] == pytest.approx(0.87 if cooldown else 0.95)


@pytest.mark.parametrize(
    "steps, span, memory, every", [(20, 0.5, 0.5, 2), (80, 0.25, 1, 4), (99, 1, 0.1, 1), (7, 0.4, 0.5, 3)]
)
def test_mean_of_the_weights_as_a_sum(steps, span, memory, every):
    """What each step's weights count in the end: every so many steps up to the last one, in the span alone,
    those of the first memory alike and all later ones more; in all 1."""
    average, counts = Average(span=span, memory=memory, every=every), [Fraction(0)] * steps
    for step in range(steps):
        share = Fraction(share_in_mean(average, steps, step)).limit_denominator(1000)
        counts = [(1 - share) * count for count in counts]
        counts[step] = share
    assert sum(counts) == 1
    taken, every_so_many = [step for step in range(steps) if counts[step]], range(steps)[::-every][::-1]
    assert taken == [step for step in every_so_many if step >= steps * (1 - span)]
    kept = max(1, round(memory * span * steps / every))
    assert len({counts[step] for step in taken[:kept]}) == 1
    later = [counts[step] for step in taken[kept - 1 :]]
    assert later == sorted(later) and len({*later}) == len(later)
    assert counts[-1] == Fraction(1, min(kept, len(taken)))


def test_no_weights_enter_the_mean_before_its_span():
    assert [share_in_mean(Average(span=0.25, every=1), 8, step) for step in range(8)] == [0] * 6 + [1, 1]
