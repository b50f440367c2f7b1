"""Canonical correlations: directions of two sets of vectors whose coordinates correlate.

Coordinates are s = (x − m) E, where m is the mean of the vectors and E [width, component] the
encoder; over the vectors of the fit, each has variance 1. Coordinate k of one set correlates with
coordinate k of the other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mechdsl.fits.factors import (
    RANK_TOLERANCE,
    NotFactored,
    Solution,
    count_dimensions,
    principal_parts,
)

CONVERGED = 1e-6
"""Change of the weights in an iteration at which a sparse component has converged."""

BISECTIONS = 60
"""Halvings of the interval of a threshold."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """Coordinates of one of two sets of vectors."""

    center: Tensor
    """[width] mean of the vectors."""
    encoder: Tensor
    """[width, component]."""

    def of(self, vectors: Tensor) -> Tensor:
        """Return [vector, component] coordinates of vectors [vector, width]."""
        return (vectors.double().cpu() - self.center) @ self.encoder

    def turned(self, signs: Tensor) -> Encoding:
        """Multiply each coordinate by a sign, [component]."""
        return Encoding(self.center, self.encoder * signs)


@dataclass(frozen=True, eq=False)
class CorrelatedPair:
    """Coordinates of two sets of vectors, pair by pair."""

    own: Encoding
    other: Encoding
    steps: int
    """Iterations that were done."""
    converged: bool

    def correlate(self, own: Tensor, other: Tensor) -> Tensor:
        """Return [component] Pearson correlations of the coordinates of pairs of vectors; 0 where
        a coordinate is constant.

        Args:
            own: [vector, width].
            other: [vector, other width].
        """
        first, second = self.own.of(own), self.other.of(other)
        first, second = first - first.mean(0), second - second.mean(0)
        sizes = first.norm(dim=0) * second.norm(dim=0)
        products = (first * second).sum(0)
        return torch.where(sizes > 0, products / sizes.clamp_min(1e-300), 0.0)

    def align(self, own: Tensor, other: Tensor) -> CorrelatedPair:
        """Return the pair with signs for which these vectors have no negative correlation."""
        signs = torch.where(self.correlate(own, other) < 0, -1.0, 1.0).double()
        return CorrelatedPair(self.own, self.other.turned(signs), self.steps, self.converged)

    def solution(self, own: Tensor) -> Solution:
        """Return the coordinates of the first set as a dictionary of the architecture `linear`.

        Its decoder is the linear map that reconstructs the vectors best from their coordinates.

        Args:
            own: [vector, width] of the fit.

        Raises:
            NotFactored: Coordinates depend on each other.
        """
        centred, coordinates = own.double().cpu() - self.own.center, self.own.of(own)
        count = coordinates.shape[1]
        values = torch.linalg.svdvals(coordinates)
        if len(values) < count or values[-1] <= RANK_TOLERANCE * values[0]:
            raise NotFactored(
                f"its {count} components depend on each other", "write fewer components"
            )
        tensors = {
            "W_enc": self.own.encoder.float(),
            "W_dec": torch.linalg.lstsq(coordinates, centred).solution.float(),
            "b_dec": self.own.center.float(),
        }
        return Solution(tensors, self.steps, stopped_early=self.converged)


def correlate_sets(
    own: Tensor, other: Tensor, count: int, ridge: float, steps: int, random: Generator
) -> CorrelatedPair:
    """Find canonical correlations by singular values, the largest ones first.

    Each covariance matrix has `ridge` times its mean variance added to its diagonal. Both
    coordinates of a pair have the sign for which the longer tail of their sum is positive, so that
    the exchanged sets have the same coordinates.

    Args:
        own: [vector, width].
        other: [vector, other width] of the same rows.
        count: Number of pairs.
        ridge: From 0, for exact canonical correlations, to 1.
        steps: 0 for random directions of the whitened vectors.
        random: Source of the random directions, on the CPU.

    Raises:
        NotFactored: A set differs in fewer dimensions; or without a ridge, there are so few vectors
            that all correlations would be 1.

    References:
        Hotelling 1936, doi 10.1093/biomet/28.3-4.321; Vinod 1976, doi 10.1016/0304-4076(76)90010-5
        (ridge).
    """
    sets = [_whiten(each, count, ridge) for each in (own, other)]
    ranks = [len(each.deviations) for each in sets]
    if ridge == 0 and len(own) - 1 <= sum(ranks):
        raise NotFactored(
            f"exact canonical correlations of {len(own):,} vectors that differ in {ranks[0]} and "
            f"{ranks[1]} dimensions would all be 1",
            "write `ridge: 0.1`, or name more rows or tokens",
        )
    if steps:
        decomposition = torch.linalg.svd(sets[0].shrunk.T @ sets[1].shrunk, full_matrices=False)
        turns = [decomposition[0][:, :count], decomposition[2][:count].T]
    else:
        turns = [_draw_turn(rank, count, random) for rank in ranks]
    first, second = (each.encode(turn) for each, turn in zip(sets, turns, strict=True))
    return _orient(first, second, own, other, min(steps, 1), converged=False)


@dataclass(frozen=True, eq=False)
class _Whitened:
    """Vectors as principal components whose variances are 1, or less with a ridge."""

    center: Tensor
    axes: Tensor
    """[axis, width]."""
    deviations: Tensor
    """[axis] standard deviations, with the ridge."""
    shrunk: Tensor
    """[vector, axis], divided by the root of the number of vectors."""

    def encode(self, turn: Tensor) -> Encoding:
        """Return coordinates of directions [axis, component], with variance 1."""
        sizes = (self.shrunk @ turn).norm(dim=0)
        return Encoding(self.center, (self.axes.T / self.deviations) @ turn / sizes)


def _whiten(vectors: Tensor, count: int, ridge: float) -> _Whitened:
    center, left, values, axes = principal_parts(vectors, count, lambda _: "fewer components")
    rank = count_dimensions(values)
    left, axes = left[:, :rank], axes[:rank]
    variances = values[:rank].square() / len(vectors)
    wide = (variances + ridge * variances.sum() / vectors.shape[1]).sqrt()
    return _Whitened(center, axes, wide, left * (variances.sqrt() / wide))


def _draw_turn(rank: int, count: int, random: Generator) -> Tensor:
    drawn = torch.randn(rank, count, generator=random, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0]


def _orient(
    first: Encoding, second: Encoding, own: Tensor, other: Tensor, steps: int, *, converged: bool
) -> CorrelatedPair:
    """Return a pair whose signs don't depend on the order of the sets."""
    pair = CorrelatedPair(first, second, steps, converged).align(own, other)
    tail = (pair.own.of(own) + pair.other.of(other)).pow(3).sum(0)
    signs = torch.where(tail < 0, -1.0, 1.0).double()
    return CorrelatedPair(pair.own.turned(signs), pair.other.turned(signs), steps, converged)


def correlate_sparse(
    own: Tensor, other: Tensor, count: int, penalty: float, steps: int, random: Generator
) -> CorrelatedPair:
    """Find sparse canonical correlations by a penalised matrix decomposition.

    Numbers of the vectors are standardised, and their covariances within a set are treated as 0.
    The weights u of a component have length 1 and the sum of sizes Σ |uᵢ| ≤ max(1, (1 − penalty)
    √width).

    Args:
        own: [vector, width].
        other: [vector, other width] of the same rows.
        count: Number of pairs.
        penalty: From 0 to below 1; larger values have fewer weights that aren't 0.
        steps: Maximum number of iterations for each component; 0 for random sparse weights.
        random: Source of the random weights, on the CPU.

    Raises:
        NotFactored: A set differs in fewer dimensions.

    References:
        Witten, Tibshirani and Hastie 2009, doi 10.1093/biostatistics/kxp008, algorithms 2 and 3.
    """
    sets = [_standardize(each, count) for each in (own, other)]
    widths = [each.shape[1] for _, _, each in sets]
    bounds = [max(1.0, (1 - penalty) * width**0.5) for width in widths]
    variances = [float(each.double().var(0).sum()) for each in (own, other)]
    # The alternation begins with the same set if the sets are exchanged.
    order = sorted((0, 1), key=lambda n: (widths[n], variances[n]))
    made: list[list[Tensor]] = [[], []]
    table = sets[order[0]][2].T @ sets[order[1]][2] / len(own)
    done, settled = 0, True
    for _ in range(count):
        limits = bounds[order[0]], bounds[order[1]]
        pair, taken = _decompose(table, limits, steps, random)
        done, settled = max(done, taken), settled and taken < steps
        table = table - (pair[0] @ table @ pair[1]) * torch.outer(*pair)
        for number, weights in zip(order, pair, strict=True):
            made[number].append(weights)
    encodings: list[Encoding] = []
    for (center, deviations, standard), columns in zip(sets, made, strict=True):
        weights = torch.stack(columns, dim=1)
        sizes = (standard @ weights).norm(dim=0).clamp_min(1e-300) / len(own) ** 0.5
        encodings.append(Encoding(center, weights / deviations[:, None] / sizes))
    first, second = encodings
    return _orient(first, second, own, other, done, converged=settled and steps > 0)


def _standardize(vectors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the standard deviations (1 for constant numbers) and standardised vectors.

    Raises NotFactored.
    """
    matrix = vectors.double().cpu()
    center = matrix.mean(0)
    centred = matrix - center
    rank = int(torch.linalg.matrix_rank(centred, rtol=RANK_TOLERANCE))
    if rank < count:
        raise NotFactored(
            f"{count} components of vectors that differ in {rank} dimensions only",
            "name more rows or tokens, or write fewer components",
        )
    deviations = centred.square().mean(0).sqrt()
    deviations = torch.where(deviations > RANK_TOLERANCE * deviations.max(), deviations, 1.0)
    return center, deviations, centred / deviations


def _decompose(
    table: Tensor, bounds: tuple[float, float], steps: int, random: Generator
) -> tuple[tuple[Tensor, Tensor], int]:
    """Return the sparse weights u, v for which u · Z v is largest, and the iterations done."""
    if not steps:
        drawn = [torch.randn(size, generator=random, dtype=torch.float64) for size in table.shape]
        first, second = (_shrink(each, bound) for each, bound in zip(drawn, bounds, strict=True))
        return (first, second), 0
    second = torch.linalg.svd(table, full_matrices=False)[2][0]
    first = _shrink(table @ second, bounds[0])
    for step in range(1, steps + 1):
        before = first, second
        second = _shrink(table.T @ first, bounds[1])
        first = _shrink(table @ second, bounds[0])
        if max(float((a - b).norm()) for a, b in zip(before, (first, second), strict=True)) < (
            CONVERGED
        ):
            return (first, second), step
    return (first, second), steps


def _shrink(weights: Tensor, bound: float) -> Tensor:
    """Return weights of length 1 that are soft-thresholded until their sizes sum to `bound`."""

    def made(threshold: float) -> Tensor:
        shrunk = weights.sign() * (weights.abs() - threshold).clamp_min(0)
        return shrunk / shrunk.norm().clamp_min(1e-300)

    if float(made(0.0).abs().sum()) <= bound:
        return made(0.0)
    low, high = 0.0, float(weights.abs().max())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(made(middle).abs().sum()) > bound:
            low = middle
        else:
            high = middle
    found = made(high)
    if bool((found == 0).all()):  # one number only: the threshold is its size up to rounding
        largest = torch.zeros_like(weights)
        largest[weights.abs().argmax()] = float(weights[weights.abs().argmax()].sign())
        return largest
    return found


def pair_components(own: Tensor, other: Tensor, count: int) -> CorrelatedPair:
    """Return the first principal components of each set, in pairs: a control."""
    components = [_whiten(each, count, 0.0) for each in (own, other)]
    first, second = (
        component.encode(torch.eye(len(component.deviations))[:, :count].double())
        for component in components
    )
    return CorrelatedPair(first, second, 0, converged=False).align(own, other)
