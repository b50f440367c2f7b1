"""Factorizations of all vectors at once: nonnegative and semi-nonnegative factors.

X ≈ A F, where X [vector, width] are the vectors, A [vector, factor] nonnegative activations, and
the rows of F [factor, width] the factors, in the end of length 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

TOLERANCE = 1e-5
"""Relative decrease of the loss in an iteration at which a factorization has converged."""


class NotFactored(Exception):
    """Vectors that can't be factored: the reason and the fix, in lower case."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


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
        found = model.fit_transform(matrix.numpy(), W=first.numpy(), H=start.numpy().copy())
    done = int(model.n_iter_)
    rows = torch.from_numpy(model.components_)
    ordered = _ordered(torch.from_numpy(found), rows)
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
        found = products[factor] - gram[factor] @ rows + gram[factor, factor] * rows[factor]
        rows[factor] = _unit(found[None])[0]


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
