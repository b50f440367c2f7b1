"""Factors, independent components and mixtures of Gaussians, fitted to all vectors at once.

Nonnegative and semi-nonnegative factors: X ≈ A F, where X [vector, width] are the vectors, A
[vector, factor] nonnegative activations, and the rows of F [factor, width] the factors, in the end
of length 1.

Independent components: coordinates are s = (x − m) E, where x are the vectors, m is their mean and
E [width, component] the encoder; vectors are reconstructed as m + s D, with D [component, width].
E and D are inverse to each other in the subspace of the components: D E is the identity.

Mixtures: the density of a vector x is Σ w_k N(x; m + d_k, Σ_k). Rows of `W_dec` are the d_k,
`b_dec` is m, `log_weights` has the log w_k, and `precision` the Cholesky factors P_k of
Σ_k⁻¹ = P_k P_kᵀ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mechdsl.base.text import HintedError

TOLERANCE = 1e-5
"""Relative decrease of the loss in an iteration at which a factorization has converged."""


class NotFactored(HintedError):
    """Vectors that can't be factored: the reason and the fix, in lower case."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A dictionary that was computed from all vectors together."""

    tensors: Mapping[str, Tensor]
    """Those of its file, float32 on the CPU. Rows of `W_dec` have the length 1, or 0 for a factor
    without activations; those with the largest sum of squared activations are first."""
    steps: int
    """Iterations that were done."""
    stopped_early: bool
    """Whether it converged before the maximum number of iterations."""


def draw_factors(count: int, width: int, random: Generator) -> Tensor:
    """Return [count, width] float64: random directions of length 1, uniformly distributed."""
    return _unit(torch.randn(count, width, generator=random, dtype=torch.float64))


def factor_nonnegative(vectors: Tensor, start: Tensor, steps: int) -> Solution:
    """Factor nonnegative vectors into nonnegative factors (NMF), by coordinate descent.

    Args:
        vectors: [vector, width].
        start: [factor, width] factors at the start, nonnegative.
        steps: Maximum number of iterations; 0 returns the start.

    Raises:
        NotFactored: A vector has a negative number, or there are fewer vectors than factors.

    References:
        Lee and Seung 1999; Cichocki and Phan 2009 for the algorithm, as scikit-learn has it.
    """
    _check_count(vectors, start)
    least = float(vectors.min())
    if least < 0:
        share = float((vectors < 0).double().mean())
        raise NotFactored(
            f"`nmf` needs nonnegative vectors, and {share:.1%} of their numbers are negative "
            f"(the smallest is {least:.3g})",
            f"write `semi_nmf(factors: {len(start)})`, whose factors have both signs",
        )
    if not steps:
        return _solution(start, 0, stopped_early=False)
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    matrix = vectors.double().cpu()
    settings: dict[str, Any] = {"n_components": len(start), "init": "custom", "solver": "cd"}
    model = NMF(**settings, tol=TOLERANCE, max_iter=steps)
    first = torch.full((len(matrix), len(start)), float(matrix.mean()), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        factors = model.fit_transform(matrix.numpy(), W=first.numpy(), H=start.numpy().copy())
    done = int(model.n_iter_)
    rows = torch.from_numpy(model.components_)
    ordered = _ordered(torch.from_numpy(factors), rows)
    return _solution(ordered, done, stopped_early=done < steps)


def factor_semi_nonnegative(vectors: Tensor, start: Tensor, steps: int, penalty: float) -> Solution:
    """Factor vectors into factors of both signs with nonnegative, sparse activations (semi-NMF).

    It minimises the mean of ‖x − f F‖² / 2 + p Σ f over activations f ≥ 0 and factors of length 1.
    An iteration changes the activations of one factor after another, and then the factors one after
    another, each to the exact solution for the others. A factor without activations becomes the
    residual of the vector that has the largest one.

    Args:
        vectors: [vector, width].
        start: [factor, width] factors at the start, of length 1.
        steps: Maximum number of iterations; 0 returns the start.
        penalty: p, in the units of the vectors.

    Raises:
        NotFactored: There are fewer vectors than factors.

    References:
        Ding, Li and Jordan 2010, where p is 0; Hoyer 2002 for the penalty; Cichocki and Phan 2009
        for the updates.
    """
    _check_count(vectors, start)
    matrix, rows = vectors.double().cpu(), start.clone()
    activations = matrix.new_zeros(len(matrix), len(rows))
    before: float | None = None
    for step in range(steps):
        _update_activations(activations, matrix @ rows.T - penalty, rows @ rows.T)
        _update_rows(rows, activations.T @ matrix, activations.T @ activations)
        residual = matrix - activations @ rows
        loss = float(residual.square().sum() / 2 + penalty * activations.sum())
        idle = (activations == 0).all(0).nonzero()[:, 0]
        if len(idle):
            largest = residual.square().sum(1).topk(len(idle)).indices
            rows[idle] = _unit(residual[largest])
        elif before is not None and before - loss <= TOLERANCE * before:
            ordered = _ordered(activations, rows)
            return _solution(ordered, step + 1, stopped_early=True, penalty=penalty)
        before = loss
    ordered = _ordered(activations, rows) if steps else start
    return _solution(ordered, steps, stopped_early=False, penalty=penalty)


def _update_activations(activations: Tensor, products: Tensor, gram: Tensor) -> None:
    """Change [vector, factor] activations, one factor after another.

    Args:
        products: [vector, factor] of vectors with factors, minus the penalty.
        gram: [factor, factor] products of the factors, whose length is 1.
    """
    for factor in range(len(gram)):
        rest = products[:, factor] - activations @ gram[:, factor]
        activations[:, factor] = (activations[:, factor] + rest).clamp_min(0)


def _update_rows(rows: Tensor, products: Tensor, gram: Tensor) -> None:
    """Change [factor, width] factors, one after another; those without activations stay.

    Args:
        products: [factor, width] sums of vectors, weighted with activations.
        gram: [factor, factor] products of the activations of two factors.
    """
    for factor in gram.diagonal().nonzero()[:, 0].tolist():
        product = products[factor] - gram[factor] @ rows + gram[factor, factor] * rows[factor]
        rows[factor] = _unit(product[None])[0]


def _solution(rows: Tensor, steps: int, *, stopped_early: bool, penalty: float = 0.0) -> Solution:
    """Return factors as a dictionary of the architecture `nonnegative`."""
    tensors = {
        "W_dec": rows.float(),
        "b_dec": torch.zeros(rows.shape[1]),
        "threshold": torch.full((len(rows),), penalty),
    }
    return Solution(tensors, steps, stopped_early)


def _check_count(vectors: Tensor, start: Tensor) -> None:
    if len(vectors) < len(start):
        raise NotFactored(
            f"{len(start)} factors need as many vectors, and the training has {len(vectors)}",
            f"name more rows or tokens, or write `factors: {len(vectors)}` or less",
        )


def _ordered(activations: Tensor, rows: Tensor) -> Tensor:
    """Return factors of length 1, those with the largest activations first."""
    lengths = rows.norm(dim=1)
    energy = activations.square().sum(0) * lengths.square()
    return _unit(rows)[energy.argsort(descending=True, stable=True)]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


# --- independent components -----------------------------------------------------------------------


RANK_TOLERANCE = 1e-5
"""Singular value, relative to the largest one, up to which a direction counts as constant."""

ROTATION_CONVERGED = 1e-4
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


def principal_parts(
    vectors: Tensor, count: int, fewer: Callable[[int], str]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean and the singular value decomposition of centred vectors, in 64 bits.

    Args:
        vectors: [vector, width].
        count: Number of components.
        fewer: Returns what to write if vectors differ in fewer dimensions, whose number it takes.

    Returns:
        The mean [width]; left vectors [vector, axis], singular values [axis] in descending order
        and axes [axis, width], those of constant directions last.

    Raises:
        NotFactored: The vectors span fewer dimensions.
    """
    matrix = vectors.double().cpu()
    center = matrix.mean(0)
    left, values, axes = torch.linalg.svd(matrix - center, full_matrices=False)
    rank = count_dimensions(values)
    if rank < count:
        raise NotFactored(
            f"{count} components of vectors that differ in {rank} dimensions only",
            f"name more rows or tokens, or write {fewer(rank)}",
        )
    return center, left, values, axes


def count_dimensions(values: Tensor) -> int:
    """Return how many singular values [axis] aren't those of constant directions."""
    return int((values > RANK_TOLERANCE * values[:1]).sum())


def whiten(vectors: Tensor, count: int) -> Whitening:
    """Compute whitened principal components.

    Args:
        vectors: [vector, width].
        count: Number of components.

    Raises:
        NotFactored: The vectors span fewer dimensions.
    """
    parts = principal_parts(vectors, count, lambda rank: f"`ica(components: {max(rank, 1)})`")
    center, left, values, axes = parts
    largest = axes.abs().argmax(1, keepdim=True)
    signs = axes.gather(1, largest).sign()
    size = len(vectors) ** 0.5
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
    white = whiten(vectors, count)
    drawn = torch.randn(count, count, generator=random, dtype=torch.float64)
    rotation, done = torch.linalg.qr(drawn)[0], 0
    if steps:
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        settings: dict[str, Any] = {"whiten": False, "w_init": rotation.numpy()}
        model = FastICA(**settings, tol=ROTATION_CONVERGED, max_iter=steps)
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
    tensor = coordinates.double().cpu()
    tensor = tensor - tensor.mean(0)
    variance = tensor.square().mean(0).clamp_min(torch.finfo(tensor.dtype).tiny)
    return float((tensor.pow(4).mean(0) / variance.square() - 3).abs().quantile(0.5))


# --- mixtures of Gaussians ------------------------------------------------------------------------


RIDGE = 1e-3
"""Added to the variances of each Gaussian, relative to the mean variance of the numbers, so that
they aren't 0 in directions in which the vectors of a component don't differ."""

STARTS = 50
"""Number of starts by k-means, of which the most likely mixture is kept."""

LIKELIHOOD_CONVERGED = 1e-4
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
        tol=LIKELIHOOD_CONVERGED,
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
