"""Steering vectors, while they are trained: x becomes x + v.

The free parameters w [width] give v = u w, where the unit u is a typical size of the numbers of x.
So the learning rate of Adam is a share of this size, at every site of every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

NUMBERS = "vector"
"""Name of the parameter."""


class SteeringVector:
    """A vector that is added to others."""

    def __init__(
        self, like: Tensor, random: Generator, *, length: float | None, penalty: float
    ) -> None:
        """Start from a random vector of the length, or from 0 if the length is learned.

        Args:
            like: [vector, width] vectors that it is added to.
            random: On the CPU.
            length: Length of the vector after every step; None if it is learned.
            penalty: Weight of the squared length, in units of the mean length of `like`.
        """
        width = like.shape[1]
        self._length, self._penalty = length, penalty
        self.like_length = float(like.norm(dim=1).mean())
        self._unit = (self.like_length if length is None else length) / math.sqrt(width) or 1.0
        self.numbers = torch.zeros(width, dtype=like.dtype, device=like.device)
        if length is not None:
            self.numbers = rescale(self.draw(random), math.sqrt(width))

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {NUMBERS: self.numbers}

    def vector(self) -> Tensor:
        """Return v [width], which carries gradients of the parameters."""
        return self._unit * self.numbers

    def draw(self, random: Generator) -> Tensor:
        """Draw [width] numbers of a vector in a uniformly distributed direction."""
        drawn = torch.randn(len(self.numbers), generator=random, dtype=torch.float64)
        return drawn.to(self.numbers.device, self.numbers.dtype)

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [vector, width] vectors of the base run with the vector added."""
        return own + self.vector()

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Return what training steps write: the same as `edit`."""
        return self.edit(own, other)

    def penalty(self) -> Tensor | float:
        """Return the penalty p ‖v‖² / m², where m is the mean length of the vectors of the site."""
        if not self._penalty:
            return 0.0
        return self._penalty * self.vector().square().sum() / self.like_length**2

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore the length, if it is given."""
        if self._length is not None:
            self.numbers.copy_(rescale(self.numbers, math.sqrt(len(self.numbers))))


def rescale(vector: Tensor, length: float) -> Tensor:
    """Return [width] a vector of the same direction and another length; 0 stays 0."""
    norm = float(vector.norm())
    return vector * (length / norm) if norm > 0 else vector
