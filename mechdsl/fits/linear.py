"""Linear maps from vectors to numbers: ridge regression, with one penalty or with several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from mechdsl.base.arrays import Floats
from mechdsl.fits.vectors import checked

CONSTANT = 1e-12
"""Spreads that are so small beside the largest are rounding: such a dimension says nothing."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x ↦ x · weights + intercept."""

    weights: Floats
    """[width, target]."""
    intercept: Floats
    """[target]."""

    def __call__(self, x: Floats) -> Floats:
        """x: [row, width]. Returns [row, target]."""
        return np.asarray(x, dtype=np.float64) @ self.weights + self.intercept


def targets(y: Floats) -> Floats:
    """[row, target]: one number per row is one target."""
    array = np.asarray(y, dtype=np.float64)
    return checked(array[:, None] if array.ndim == 1 else array)


def ridge(x: Floats, y: Floats, penalty: float) -> LinearMap:
    """Minimises Σ (y − ŷ)² + penalty · Σ weights² (Hoerl and Kennard 1970); the intercept is free.

    x: [row, width]; y: [row] or [row, target], each target with its own weights. A penalty of 0 is
    least squares, the solution of least norm. ValueError for a negative penalty.
    """
    [found] = ridges(x, y, [penalty])
    return found


def ridges(x: Floats, y: Floats, penalties: Sequence[float]) -> list[LinearMap]:
    """`ridge` with each of the penalties, from one decomposition of the smaller Gram matrix."""
    if min(penalties) < 0:
        raise ValueError("a penalty is 0 or larger")
    rows, wanted = checked(x), targets(y)
    if len(rows) != len(wanted):
        raise ValueError(f"{len(rows)} vectors and {len(wanted)} targets")
    at, to = rows.mean(axis=0), wanted.mean(axis=0)
    rows, wanted = rows - at, wanted - to
    wide = rows.shape[1] > len(rows)
    # In the space of the rows where these are fewer: (XᵀX + λ)⁻¹Xᵀ = Xᵀ(XXᵀ + λ)⁻¹.
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = scipy.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    seen = values > values.max(initial=0.0) * len(gram) * np.finfo(np.float64).eps
    turned = vectors.T @ (wanted if wide else rows.T @ wanted)
    found: list[LinearMap] = []
    for penalty in penalties:
        shrunk = np.zeros_like(values)
        np.divide(1.0, values + penalty, out=shrunk, where=seen)
        weights = vectors @ (shrunk[:, None] * turned)
        weights = rows.T @ weights if wide else weights
        found.append(LinearMap(weights, to - at @ weights))
    return found


@dataclass(frozen=True, eq=False)
class Scale:
    """Takes each dimension's mean off and divides by its standard deviation."""

    mean: Floats
    """[width]."""
    by: Floats
    """[width]: 0 for a dimension that is the same in all rows; it becomes 0."""

    def __call__(self, x: Floats) -> Floats:
        """x: [row, width]. Returns [row, width]."""
        return (np.asarray(x, dtype=np.float64) - self.mean) * self.by


def standardised(x: Floats) -> Scale:
    """The scale at which each dimension of these rows has mean 0 and standard deviation 1.

    x: [row, width].
    """
    rows = checked(x)
    spread = rows.std(axis=0)
    # Rounding of a constant that is far from 0 is no spread.
    some = spread > np.maximum(CONSTANT * np.abs(rows).max(axis=0), 0.0)
    by = np.zeros_like(spread)
    np.divide(1.0, spread, out=by, where=some)
    return Scale(rows.mean(axis=0), by)
