"""Rotations: orthonormal directions of a subspace, while they are trained.

The free parameters are a matrix A [dims, width] with rows of any length and angle. Its directions R
are the rows of the orthonormal factor of A, so that gradients turn the subspace and never scale it.
After a step, A becomes R: the next step has the same size wherever it starts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

MATRIX = "rotation"
"""Name of the parameter."""


class Rotation:
    """Orthonormal directions of a subspace."""

    def __init__(self, matrix: Tensor) -> None:
        """Start from [dims, width] independent rows."""
        self.matrix = orthonormal_rows(matrix).detach().clone()

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Tensors that the optimiser changes."""
        return {MATRIX: self.matrix}

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Further tensors that the next steps depend on: none."""
        return {}

    def directions(self) -> Tensor:
        """Return R [dims, width], orthonormal rows that carry gradients of the parameters."""
        return orthonormal_rows(self.matrix)

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Exchange the part of vectors in the subspace; see `exchange`."""
        return exchange(own, other, self.directions())

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Return what training steps write in place of `edit`.

        Args:
            progress: Share of the steps that are done, from 0 to below 1.
        """
        return self.edit(own, other)

    def penalty(self) -> Tensor | float:
        """Return what is added to the loss."""
        return 0.0

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the rows of the parameters orthonormal; their subspace stays."""
        self.matrix.copy_(orthonormal_rows(self.matrix))


class BoundlessRotation(Rotation):
    """Orthonormal directions in an order, with a learned boundary between used and unused ones.

    In training, direction i of n has the weight m_i = sigmoid((b n − i − 1/2) / T), where b is the
    boundary and the temperature T falls from n/10 to 1/10 in a geometric sequence. The loss has the
    additional term p b for a penalty p. In the end, the first round(b n) directions are used.

    References:
        Wu et al. 2023, arXiv 2305.08809, section 3, where T falls linearly from 50 to 0.1.
    """

    def __init__(self, matrix: Tensor, penalty: float) -> None:
        """Start from [dims, width] independent rows, of which half are used."""
        super().__init__(matrix)
        self.boundary = torch.full((), 0.5, dtype=matrix.dtype, device=matrix.device)
        self._weight = penalty

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {**super().parameters, "boundary": self.boundary}

    def directions(self) -> Tensor:
        """Return the directions that are used, at least one."""
        count = max(1, round(float(self.boundary.detach()) * len(self.matrix)))
        return orthonormal_rows(self.matrix)[:count]

    def relaxed_edit(self, own: Tensor, other: Tensor, progress: float) -> Tensor:
        """Exchange every direction to the share of its weight."""
        count = len(self.matrix)
        temperature = count / 10 * (1 / count) ** progress
        place = torch.arange(count, dtype=own.dtype, device=own.device) + 0.5
        weight = torch.sigmoid((self.boundary * count - place) / temperature)
        rows = orthonormal_rows(self.matrix)
        return own + ((other - own) @ rows.T * weight) @ rows

    def penalty(self) -> Tensor | float:
        """Return the penalty p b."""
        return self._weight * self.boundary

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the rows orthonormal, and keep the boundary between 0 and 1."""
        super().after_step()
        self.boundary.clamp_(0, 1)


def draw_rows(
    dims: int, width: int, random: Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draw [dims, width] rows whose span is uniformly distributed.

    Args:
        random: On the CPU.
    """
    drawn = torch.randn(dims, width, generator=random, dtype=torch.float64)
    return drawn.to(device, dtype)


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return [dims, width] orthonormal rows of the same span, by the QR decomposition of Aᵀ.

    The triangular factor has a positive diagonal, so that rows change continuously with A.
    """
    factor, triangle = torch.linalg.qr(matrix.T)
    signs = triangle.diagonal().detach().sign()
    return (factor * torch.where(signs == 0, torch.ones_like(signs), signs)).T


def exchange(own: Tensor, other: Tensor, directions: Tensor) -> Tensor:
    """Return [vector, width]: vectors whose part in a subspace is that of other vectors.

    Args:
        own: [vector, width]
        other: [vector, width]
        directions: R [dims, width], orthonormal rows.

    Returns:
        x + (y − x) RᵀR for vectors x of `own` and y of `other`.
    """
    return own + (other - own) @ directions.T @ directions
