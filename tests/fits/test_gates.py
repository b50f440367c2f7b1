"""Gates of masks: their expected number, their distribution and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit

from mechdsl.fits.gates import GATES, HardConcreteGates, StraightThroughGates, shift_to_sum

SCORES = torch.tensor([2.0, -1.0, 0.5, 0.0, -4.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_shift_to_sum_equals_scipy_root_and_finite_differences(size: int) -> None:
    """The shift equals SciPy's root, and its gradient finite differences."""
    found = shift_to_sum(SCORES, size)
    shift = brentq(lambda by: expit(SCORES.numpy() + by).sum() - size, -80, 80)
    assert found.sigmoid().sum().item() == pytest.approx(size)
    assert np.allclose(found.numpy(), SCORES.numpy() + shift, atol=1e-6)
    leaf = SCORES.clone().requires_grad_()
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (own,) = torch.autograd.grad((shift_to_sum(leaf, size).sigmoid() * weights).sum(), leaf)
    for number in range(6):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[number] = 1e-5
        ends = [
            (shift_to_sum(SCORES + sign * moved, size).sigmoid() * weights).sum().item()
            for sign in (1, -1)
        ]
        assert own[number].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6)


def test_hard_concrete_gates_have_the_published_distribution() -> None:
    """The frequencies of 0 and 1 follow equations 10 to 12 of the paper, and `size` gates are open
    on average."""
    gates = HardConcreteGates(4, 2, seed=3)
    with torch.no_grad():
        gates.scores.copy_(torch.tensor([1.0, -1.0, 0.0, 0.3]))
        drawn = gates.sample(200_000, step=7)
    beta, low, high = 2 / 3, -0.1, 1.1
    likely = gates.probabilities().numpy()
    assert likely.sum() == pytest.approx(2)
    odds = np.log(likely / (1 - likely)) + beta * math.log(-low / high)
    closed = expit(beta * math.log(-low / high) - odds)
    full = expit(odds - beta * math.log((1 - low) / (high - 1)))
    assert np.allclose((drawn == 0).double().mean(0), closed, atol=0.005)
    assert np.allclose((drawn == 1).double().mean(0), full, atol=0.005)
    assert (drawn > 0).double().sum(1).mean().item() == pytest.approx(2, abs=0.02)
    assert torch.equal(drawn, gates.sample(200_000, step=7))
    assert not torch.equal(drawn[:9], gates.sample(9, step=8))


@pytest.mark.parametrize("kind", GATES)
def test_shrinking_gates_fall_from_90_percent_to_the_size(kind: str) -> None:
    """By equal factors, in the first 70 % of the steps."""
    gates = GATES[kind](40, 3, seed=3)
    assert torch.equal(gates.sample(5, 2, 0.0), gates.sample(5, 2))
    gates.shrinks = True
    sizes = [float(gates.probabilities(step / 10).sum()) for step in range(11)]
    assert sizes[0] == pytest.approx(36)
    assert sizes[7:] == pytest.approx([3] * 4)
    ratios = np.array(sizes[1:8]) / np.array(sizes[:7])
    assert ratios == pytest.approx([12 ** (-1 / 7)] * 7)
    assert float((gates.sample(4000, 1, 0.0) > 0).double().sum(1).mean()) == pytest.approx(
        36, abs=1
    )
    larger = GATES[kind](4, 3, seed=3)
    larger.shrinks = True
    assert float(larger.probabilities(0.0).sum()) == pytest.approx(3.6)


def test_straight_through_gates_are_binary_with_the_gradient_of_probabilities() -> None:
    """Gates are 0 or 1, and their gradient equals that of the probability."""
    gates = StraightThroughGates(4, 2, seed=3)
    with torch.no_grad():
        gates.scores.copy_(torch.tensor([1.0, -1.0, 0.0, 0.3]))
    gates.scores.requires_grad_()
    drawn = gates.sample(50_000, step=0)
    assert set(drawn.detach().unique().round(decimals=9).tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), gates.probabilities(), atol=0.01)
    (own,) = torch.autograd.grad(drawn[:, 2].mean(), gates.scores)
    (expected,) = torch.autograd.grad(gates.probabilities()[2], gates.scores)
    assert torch.allclose(own, expected)


@pytest.mark.parametrize("kind", GATES)
def test_chosen_gates_have_the_highest_scores(kind: str) -> None:
    gates = GATES[kind](5, 2, 0)
    assert gates.chosen() == [0, 1]
    with torch.no_grad():
        gates.scores.copy_(torch.tensor([0.0, 2.0, -1.0, 2.0, 1.0]))
    assert gates.chosen() == [1, 3]
