"""tools/same_results.py sees one bit: in a loss, in a weight, in what is there at all."""

import math
import sys

import pytest
import torch

import same_results

LOSSES = [("step", 1, 5.5, 100), ("val", 2, 3.25, 200), ("final", 2, 3.25, 200)]
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def compared(losses: list, weights: dict) -> same_results.Finding:
    finding = same_results.Finding()
    finding.compare_losses(LOSSES, losses)
    finding.compare_tensors("weight", WEIGHTS, weights, finding.weights)
    return finding


def test_equal_numbers_are_the_same() -> None:
    finding = compared(list(LOSSES), {name: x.clone() for name, x in WEIGHTS.items()})
    assert finding.same and finding.verdict() == "same" and finding.largest == 0
    assert (finding.losses.compared, finding.weights.compared) == (3, 10)


@pytest.mark.parametrize("place", range(3))
def test_a_loss_that_differs_in_one_bit_is_counted(place: int) -> None:
    event, step, loss, tokens = LOSSES[place]
    losses = list(LOSSES)
    losses[place] = (event, step, math.nextafter(loss, math.inf), tokens)
    finding = compared(losses, WEIGHTS)
    assert not finding.same and finding.losses.different == 1
    assert 0 < finding.largest <= sys.float_info.epsilon * loss


@pytest.mark.parametrize("losses", [LOSSES[:2], [*LOSSES[:2], ("final", 3, 3.25, 200)], []])
def test_losses_at_other_steps_are_a_fault(losses: list) -> None:
    assert not compared(losses, WEIGHTS).same


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_differs_in_one_bit_is_counted(name: str) -> None:
    changed = WEIGHTS[name].clone()
    changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(math.inf, dtype=changed.dtype))
    finding = compared(LOSSES, WEIGHTS | {name: changed})
    assert not finding.same and finding.weights.different == 1 and finding.largest > 0


@pytest.mark.parametrize("weights", [
    {"a": WEIGHTS["a"]}, WEIGHTS | {"c": torch.ones(1)}, WEIGHTS | {"a": torch.arange(6.0)},
    WEIGHTS | {"b": torch.ones(4)},
], ids=["missing", "more", "shape", "dtype"])  # fmt: skip
def test_other_tensors_are_a_fault(weights: dict) -> None:
    assert not compared(LOSSES, weights).same
