"""Vectors as functions of this package take them."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Floats


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
