"""Gates: numbers from 0 to 1 that choose sites, while they are trained.

A gate is open with a probability. The scores of all gates are shifted by one number, so that the
expected number of open gates is the wanted size in every step. A training therefore has no penalty
on this number, and no weight of it. The size can shrink during the training: a choice that only has
an effect as a whole, such as a path of edges, has gradients while most gates are open.

References:
    Louizos et al. 2018, arXiv 1712.01312 (hard concrete), equations 10 to 12.
    Bengio et al. 2013, arXiv 1308.3432 (straight-through).
    Bhaskar et al. 2024, arXiv 2406.16778 (a size that shrinks during the training).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mechdsl.base.hashing import stable_hash

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""β, γ and ζ of the hard concrete distribution."""

OPEN, SHRINKS = 0.9, 0.7
"""Share of the gates that are open first if the size shrinks, and share of the steps until it is
the wanted one."""

_BISECTIONS = 80
"""Halvings of an interval in the search for the shift; more don't change a 64-bit number."""


class Gates:
    """Gates of one mask."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        """Start with gates that are open with equal probability.

        Args:
            count: Number of gates.
            size: Expected number of open gates, below `count`.
            seed: Determines the samples of every step.
        """
        self.scores = torch.zeros(count, dtype=torch.float64)
        self.size, self._seed = size, seed
        self.shrinks = False
        """Whether the expected number of open gates falls from most of them to the size."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {"scores": self.scores}

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Further tensors that the next steps depend on: none."""
        return {}

    def probabilities(self, progress: float = 1.0) -> Tensor:
        """Return [gate] probabilities that a gate is open, which sum to the size.

        Args:
            progress: Share of the steps that are done.
        """
        return self._shifted(progress).sigmoid()

    def _shifted(self, progress: float) -> Tensor:
        """Return [gate] log odds of being open."""
        size, left = float(self.size), max(0.0, 1 - progress / SHRINKS)
        if self.shrinks and left:
            size *= max(1.0, OPEN * len(self.scores) / size) ** left
        return shift_to_sum(self.scores, size)

    def sample(self, rows: int, step: int, progress: float = 1.0) -> Tensor:
        """Draw [row, gate] values from 0 to 1 for a step, which carry gradients of the scores."""
        raise NotImplementedError

    def chosen(self) -> list[int]:
        """Return the numbers of the gates with the largest probabilities, as many as the size; the
        first ones of equal probability."""
        order = torch.argsort(self.probabilities().detach(), descending=True, stable=True)
        return sorted(order[: self.size].tolist())

    def after_step(self) -> None:
        """Nothing must be restored."""

    def _uniform(self, rows: int, step: int) -> Tensor:
        random = torch.Generator().manual_seed(stable_hash(self._seed, "gates", step) % 2**63)
        return torch.rand(rows, len(self.scores), generator=random, dtype=torch.float64)


class HardConcreteGates(Gates):
    """Gates with the hard concrete distribution: 0 and 1 have positive probability each.

    A gate is open if it isn't 0.
    """

    def sample(self, rows: int, step: int, progress: float = 1.0) -> Tensor:
        """Draw values by the reparametrisation of the paper."""
        odds = self._shifted(progress) + TEMPERATURE * math.log(-LOW / HIGH)
        noise = self._uniform(rows, step).logit(eps=1e-12)
        stretched = ((noise + odds) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW
        return stretched.clamp(0, 1)


class StraightThroughGates(Gates):
    """Gates that are 0 or 1; their gradient is that of their probability."""

    def sample(self, rows: int, step: int, progress: float = 1.0) -> Tensor:
        """Draw 0 or 1."""
        likely = self.probabilities(progress)
        drawn = (self._uniform(rows, step) < likely).to(likely)
        return likely + (drawn - likely).detach()


GATES: Mapping[str, type[Gates]] = {
    "hard_concrete": HardConcreteGates,
    "straight_through": StraightThroughGates,
}
"""Gates by the value of `kind` of a mask."""


def shift_to_sum(scores: Tensor, size: float) -> Tensor:
    """Return [gate] scores plus one number, so that their sigmoids sum to the size.

    The gradient is that of the implicit function: a score that grows lowers the others.
    """
    with torch.no_grad():
        low, high = -scores.max() - 50, -scores.min() + 50
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            above = (scores + middle).sigmoid().sum() > size
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        near = (scores + (low + high) / 2).sigmoid()
        slope = (near * (1 - near)).sum().clamp_min(1e-12)
    shift = (low + high) / 2
    return scores + shift - ((scores + shift).sigmoid().sum() - size) / slope
