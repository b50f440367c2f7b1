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

    def directions(self) -> Tensor:
        """Return R [dims, width], orthonormal rows that carry gradients of the parameters."""
        return orthonormal_rows(self.matrix)

    def edit(self, own: Tensor, other: Tensor) -> Tensor:
        """Exchange the part of vectors in the subspace; see `exchange`."""
        return exchange(own, other, self.directions())

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the rows of the parameters orthonormal; their subspace stays."""
        self.matrix.copy_(orthonormal_rows(self.matrix))


def start_rotation(
    dims: int, width: int, random: Generator, device: torch.device, dtype: torch.dtype
) -> Rotation:
    """Draw directions of a subspace, uniformly distributed.

    Args:
        random: On the CPU.
    """
    drawn = torch.randn(dims, width, generator=random, dtype=torch.float64)
    return Rotation(drawn.to(device, dtype))


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
