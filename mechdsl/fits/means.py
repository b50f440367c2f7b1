"""Means of vectors, and the direction from one mean to another."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Floats


def mean(x: Floats) -> Floats:
    """The mean vector.

    x: [row, width]. Returns [width]. ValueError without rows.
    """
    return checked(x).mean(axis=0)


def mean_difference(a: Floats, b: Floats) -> Floats:
    """mean(a) − mean(b): from the vectors `b` to the vectors `a` (Marks and Tegmark 2023; Arditi et
    al. 2024). Rows needn't correspond, nor be equally many.

    a: [row, width], b: [other row, width]. Returns [width].
    """
    return mean(a) - mean(b)


def checked(x: Floats, fewest: int = 1) -> Floats:
    """The vectors as float64, [row, width]; ValueError where these aren't at least `fewest` rows of
    finite numbers."""
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"vectors are [row, width], not of {array.ndim} axes")
    if len(array) < fewest:
        raise ValueError(f"{len(array)} rows, where at least {fewest} are needed")
    if not np.isfinite(array).all():
        raise ValueError("a vector isn't finite")
    return array
