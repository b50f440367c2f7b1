"""Linear components of all vectors at once: independent components.

Coordinates are s = (x − m) E, where x [vector, width] are the vectors, m is their mean and E
[width, component] the encoder; vectors are reconstructed as m + s D, with D [component, width].
E and D are inverse to each other in the subspace of the components: D E is the identity.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mechdsl.fits.factors import NotFactored, Solution

RANK_TOLERANCE = 1e-5
"""Singular value, relative to the largest one, up to which a direction counts as constant."""

CONVERGED = 1e-4
"""Change of the rotation in an iteration at which independent components have converged."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """The first principal components of vectors, scaled to variance 1."""

    center: Tensor
    """[width] mean of the vectors."""
    vectors: Tensor
    """[vector, component]: uncorrelated, with mean 0 and variance 1."""
    axes: Tensor
    """[component, width] orthonormal principal axes."""
    deviations: Tensor
    """[component] standard deviations along these axes, in descending order."""

    def encoder(self, rotation: Tensor) -> Tensor:
        """Return E [width, component] of the coordinates `vectors` Rᵀ."""
        return (self.axes.T / self.deviations) @ rotation.T

    def decoder(self, rotation: Tensor) -> Tensor:
        """Return D [component, width] of the same coordinates."""
        return rotation @ (self.deviations[:, None] * self.axes)


def whiten(vectors: Tensor, count: int, trainer: str) -> Whitening:
    """Compute whitened principal components.

    Args:
        vectors: [vector, width].
        count: Number of components.
        trainer: Name of the trainer, for the error.

    Raises:
        NotFactored: The vectors span fewer dimensions.
    """
    matrix = vectors.double().cpu()
    center = matrix.mean(0)
    left, values, axes = torch.linalg.svd(matrix - center, full_matrices=False)
    rank = int((values > RANK_TOLERANCE * values[:1]).sum())
    if rank < count:
        raise NotFactored(
            f"{count} components of vectors that differ in {rank} dimensions only",
            f"name more rows or tokens, or write `{trainer}(components: {max(rank, 1)})`",
        )
    largest = axes.abs().argmax(1, keepdim=True)
    signs = axes.gather(1, largest).sign()
    size = len(matrix) ** 0.5
    white = left * signs.T * size
    return Whitening(center, white[:, :count], (signs * axes)[:count], values[:count] / size)


def separate_sources(vectors: Tensor, count: int, steps: int, random: Generator) -> Solution:
    """Rotate whitened principal components until they are as independent as possible (ICA).

    Coordinates of the training vectors have mean 0 and variance 1, and they are uncorrelated. Each
    has the sign for which the longer tail of its distribution is positive. Components that explain
    more of the variance come first.

    Args:
        vectors: [vector, width].
        count: Number of components, at most the rank of the centred vectors.
        steps: Maximum number of iterations; 0 for a random rotation, from which they start.
        random: Source of the random rotation, on the CPU.

    Raises:
        NotFactored: The vectors span fewer dimensions.

    References:
        Hyvärinen 1999, doi 10.1109/72.761722: FastICA with all components in parallel and the
        contrast log cosh, as scikit-learn has it.
    """
    white = whiten(vectors, count, "ica")
    drawn = torch.randn(count, count, generator=random, dtype=torch.float64)
    rotation, done = torch.linalg.qr(drawn)[0], 0
    if steps:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        settings: dict[str, Any] = {"whiten": False, "w_init": rotation.numpy()}
        model = FastICA(**settings, tol=CONVERGED, max_iter=steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(white.vectors.numpy())
        rotation, done = torch.from_numpy(model.components_), int(model.n_iter_)
    skewed = (white.vectors @ rotation.T).pow(3).mean(0)
    rotation = rotation * torch.where(skewed < 0, -1.0, 1.0)[:, None]
    order = white.decoder(rotation).norm(dim=1).argsort(descending=True, stable=True)
    return linear_solution(white, rotation[order], done, stopped_early=0 < done < steps)


def linear_solution(
    white: Whitening, rotation: Tensor, steps: int, *, stopped_early: bool
) -> Solution:
    """Return components as a dictionary of the architecture `linear`."""
    tensors = {
        "W_enc": white.encoder(rotation).float(),
        "W_dec": white.decoder(rotation).float(),
        "b_dec": white.center.float(),
    }
    return Solution(tensors, steps, stopped_early)


def median_kurtosis(coordinates: Tensor) -> float:
    """Return the median over components of the size of the excess kurtosis.

    It is 0 for normal distributions, 3 for Laplace distributions and 1.2 for uniform ones.

    Args:
        coordinates: [vector, component].
    """
    own = coordinates.double().cpu()
    own = own - own.mean(0)
    variance = own.square().mean(0).clamp_min(torch.finfo(own.dtype).tiny)
    return float((own.pow(4).mean(0) / variance.square() - 3).abs().quantile(0.5))
