"""A scale for each channel, while it is trained: x becomes x ⊙ s.

The free parameters w [width] give s = 1 + w and start from 0, so that a step of Adam changes each
factor by about the learning rate at most.

References:
    Park et al. 2025, arXiv 2509.25843 (scales of heads).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHANGES = "changes"
"""Name of the parameter."""


class ChannelScales:
    """Factors of the numbers of vectors."""

    def __init__(self, like: Tensor, *, penalty: float) -> None:
        """Start from factors of 1.

        Args:
            like: [vector, width] vectors that they multiply.
            penalty: Weight of the mean squared difference from 1.
        """
        self._penalty = penalty
        self.changes = torch.zeros(like.shape[1], dtype=like.dtype, device=like.device)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {CHANGES: self.changes}

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Further tensors that the next steps depend on: none."""
        return {}

    def factors(self) -> Tensor:
        """Return s [width], which carries gradients of the parameters."""
        return 1 + self.changes

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [vector, width] vectors of the base run, scaled."""
        return own * self.factors()

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Return what training steps write: the same as `edit`."""
        return self.edit(own, other)

    def penalty(self) -> Tensor | float:
        """Return the penalty p ‖s − 1‖² / width."""
        return self._penalty * self.changes.square().mean() if self._penalty else 0.0

    def after_step(self) -> None:
        """Nothing must be restored."""
