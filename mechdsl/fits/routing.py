"""A linear map of what tokens are mixed of, by weights over them that are fitted with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.linear import LinearMap, Scale, ridge, standardised, targets

STEPS = 200
"""Of the optimiser, at most."""


@dataclass(frozen=True, eq=False)
class Routing:
    """x ↦ Σ softmax(x · query) x · weights + intercept, over the tokens of a row."""

    scale: Scale
    query: Floats
    """[width]"""
    read: LinearMap

    def weights(self, vectors: Floats, row: Ints) -> Floats:
        """[token] how much of each is taken; those of a row add up to 1.

        vectors: [token, width]; row: [token] ascending from 0, without gaps.
        """
        return _softmax(self.scale(vectors) @ self.query, _starts(row), row)

    def __call__(self, vectors: Floats, row: Ints) -> Floats:
        """[row, target]"""
        mixed = np.add.reduceat(
            self.weights(vectors, row)[:, None] * self.scale(vectors), _starts(row)
        )
        return self.read(mixed)


def routing(vectors: Floats, row: Ints, y: Floats, penalty: float) -> Routing:
    """Minimises Σ (y − ŷ)² + penalty · (Σ weights² + Σ query²) on standardised vectors and targets,
    from equal weights on; for each query the best weights are those of a ridge regression.

    vectors: [token, width]; row: [token] ascending from 0, without gaps; y: [row] or [row, target].
    ValueError for a penalty that isn't above 0.
    """
    if penalty <= 0:
        raise ValueError("a penalty is above 0")
    scale, to = standardised(vectors), standardised(targets(y))
    x, wanted, starts = scale(vectors), to(targets(y)), _starts(row)

    def mixed(weights: Floats) -> Floats:
        return np.add.reduceat(weights[:, None] * x, starts)

    def error(query: Floats) -> tuple[float, Floats]:
        weights = _softmax(x @ query, starts, row)
        pooled = mixed(weights)
        read = ridge(pooled, wanted, penalty)
        off = read(pooled) - wanted
        # The ridge's own weights are at their best, so that they add nothing to the slope.
        of_weights = 2 * (x * (off @ read.weights.T)[row]).sum(axis=1)
        around = np.add.reduceat(weights * of_weights, starts)[row]
        slope = x.T @ (weights * (of_weights - around)) + 2 * penalty * query
        size = (off**2).sum() + penalty * ((read.weights**2).sum() + query @ query)
        return float(size), slope

    found = scipy.optimize.minimize(
        error, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": STEPS}
    )
    query = np.asarray(found.x, dtype=np.float64)
    read = ridge(mixed(_softmax(x @ query, starts, row)), wanted, penalty)
    spread = np.divide(1.0, to.by, out=np.zeros_like(to.by), where=to.by > 0)
    own = LinearMap(read.weights * spread, read.intercept * spread + to.mean)
    return Routing(scale, query, own)


def _starts(row: Ints) -> Ints:
    """[row] index of its first token."""
    return np.flatnonzero(np.diff(row, prepend=-1))


def _softmax(scores: Floats, starts: Ints, row: Ints) -> Floats:
    """[token] over the tokens of each row."""
    raised = np.exp(scores - np.maximum.reduceat(scores, starts)[row])
    return raised / np.add.reduceat(raised, starts)[row]
