"""R² of predictions, with the influence of each row on it, written out."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


def r_squared_contributions(y: Array, predicted: Array) -> Array:
    """Return R² plus the derivative of R² by the weight of each row times their number, [row]."""
    rows = len(y)
    errors = ((y - predicted).reshape(rows, -1) ** 2).sum(axis=1)
    around = ((y - y.mean(axis=0)).reshape(rows, -1) ** 2).sum(axis=1)
    score = 1 - errors.sum() / around.sum()
    return score + (around - errors - score * around) / around.mean()
