"""Mixtures of Gaussians, fitted to all vectors at once.

The density of a vector x is Σ w_k N(x; m + d_k, Σ_k), where m is the mean of all vectors. Rows of
`W_dec` are the d_k, `b_dec` is m, `log_weights` has the log w_k, and `precision` the Cholesky
factors P_k of Σ_k⁻¹ = P_k P_kᵀ.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Generator, Tensor

from mechdsl.fits.factors import NotFactored, Solution

RIDGE = 1e-3
"""Added to the variances of each Gaussian, relative to the mean variance of the numbers, so that
they aren't 0 in directions in which the vectors of a component don't differ."""

STARTS = 5
"""Number of starts by k-means, of which the most likely mixture is kept."""

CONVERGED = 1e-4
"""Increase of the mean log likelihood in an iteration, in nats, at which a mixture has
converged."""


def fit_mixture(
    vectors: Tensor, count: int, covariance: str, steps: int, random: Generator
) -> Solution:
    """Fit a mixture of Gaussians by expectation maximisation, the largest component first.

    Args:
        vectors: [vector, width].
        count: Number of components.
        covariance: `full`, `diag`, or `spherical`.
        steps: Maximum number of iterations; 0 for random vectors as means, with equal weights and
            the covariance of all vectors.
        random: Source of all random numbers, on the CPU.

    Raises:
        NotFactored: There are fewer different vectors than components, or all are equal.

    References:
        Dempster, Laird and Rubin 1977, doi 10.1111/j.2517-6161.1977.tb01600.x, as scikit-learn has
        it.
    """
    matrix = vectors.double().cpu()
    distinct = len(matrix.unique(dim=0))
    if distinct == 1:
        raise NotFactored("all of its vectors are equal", "name more rows or tokens")
    if distinct < count:
        raise NotFactored(
            f"{count} components of {distinct} different vectors",
            f"name more rows or tokens, or write `mixture(components: {distinct})`",
        )
    center = matrix.mean(0)
    centred = matrix - center
    ridge = RIDGE * float(centred.square().mean())
    seed = int(torch.randint(2**31 - 1, (), generator=random))
    chosen = torch.randperm(len(matrix), generator=random)[:count]
    model = _fit(centred, count if steps else 1, covariance, max(steps, 1), ridge, seed)
    means, weights, precisions = (
        torch.from_numpy(each)
        for each in (model.means_, model.weights_, model.precisions_cholesky_)
    )
    if not steps:
        means, weights = centred[chosen], torch.full((count,), 1 / count, dtype=torch.float64)
        precisions = precisions.expand(count, *precisions.shape[1:])
    order = weights.argsort(descending=True, stable=True)
    tensors = {
        "W_dec": means[order].float(),
        "b_dec": center.float(),
        "log_weights": weights[order].log().float(),
        "precision": precisions[order].float(),
    }
    done = int(model.n_iter_) if steps else 0
    return Solution(tensors, done, stopped_early=bool(steps and model.converged_ and done < steps))


def _fit(centred: Tensor, count: int, covariance: str, steps: int, ridge: float, seed: int) -> Any:
    """Return the mixture of scikit-learn."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    model: Any = GaussianMixture(
        count,
        covariance_type=covariance,
        reg_covar=ridge,
        max_iter=steps,
        n_init=STARTS if count > 1 else 1,
        tol=CONVERGED,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(centred.numpy())


def shuffle_axes(vectors: Tensor, axes: Tensor, random: Generator) -> Tensor:
    """Exchange the coordinates along each principal axis between vectors, at random.

    Means, covariances and distributions along the axes stay, and clusters disappear.

    Args:
        vectors: [vector, width].
        axes: [axis, width] orthonormal; coordinates outside of their span stay with the vector.
        random: Source of the permutations, on the CPU.
    """
    wide, rows = vectors.double().cpu(), axes.double().cpu()
    along = wide @ rows.T
    order = torch.rand(along.shape, generator=random, dtype=torch.float64).argsort(dim=0)
    return wide + (along.gather(0, order) - along) @ rows
