"""Exact intervals of shares: how often the model is right, over rows."""

from __future__ import annotations

import math

import numpy as np

from mechdsl.base.arrays import Floats, Ints


def exact_share(
    right: Floats, confidence: float, units: Ints | None = None
) -> tuple[float, float, float]:
    """A share with its interval; NaN without rows.

    right: [row], 1 or 0, or a share of draws between them
    confidence: in percent
    units: [row]; rows of one number are right or wrong together, and not n times as much is known
    returns: share, low, high

    source: Clopper and Pearson 1934, doi.org/10.1093/biomet/26.4.404; with units of several rows
    at the effective n of Korn and Graubard 1998, which is no larger than the number of rows
    """
    from scipy.special import betaincinv  # not at the top: slow to import

    rows = len(right)
    if not rows:
        return math.nan, math.nan, math.nan
    share = float(right.mean())
    n = rows if units is None else _effective(right, share, units, confidence)
    tail = (100 - confidence) / 200
    hits = share * n
    low = 0.0 if hits <= 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits >= n else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return share, low, high


def _effective(right: Floats, share: float, units: Ints, confidence: float) -> float:
    """How many independent rows say as much as these units do."""
    from scipy.special import stdtrit  # not at the top: slow to import

    codes = np.unique(units, return_inverse=True)[1].reshape(-1)
    rows, count = len(right), int(codes.max()) + 1
    if count == rows:
        return rows
    spread = share * (1 - share)
    if spread == 0 or count == 1:  # all are the same, and units vary in nothing that is seen
        return count
    off = np.bincount(codes, weights=right - share)
    variance = count / (count - 1) * float(off @ off) / rows**2
    if variance == 0:
        return rows
    tail = (100 - confidence) / 200
    narrower = stdtrit(rows - 1, tail) / stdtrit(count - 1, tail)
    return min(float(rows), float(spread / variance * narrower**2))
