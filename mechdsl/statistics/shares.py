"""Intervals of shares: exact for one, and by their limits for the difference of two."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.bootstrap import FEWEST_UNITS, standard_error, student
from mechdsl.statistics.effect_parts import Sums


def clopper_pearson(right: Floats, n: Floats, confidence: float | Floats) -> tuple[Floats, Floats]:
    """The exact interval of `right` out of `n` (Clopper and Pearson 1934). Neither needs to be a
    whole number."""
    from scipy.special import betaincinv  # not at the top: slow to import

    tail = (100.0 - confidence) / 200
    with np.errstate(invalid="ignore"):
        low = np.where(right <= 0, 0.0, betaincinv(np.maximum(right, 1e-9), n - right + 1, tail))
        high = np.where(
            right >= n, 1.0, betaincinv(right + 1, np.maximum(n - right, 1e-9), 1 - tail)
        )
    return low, high


def effective_n(sums: Sums, rows: Ints, confidence: float | Floats) -> Floats:
    """[cell]: how many independent rows tell as much of a share as these units do.

    Korn and Graubard 1998: p(1 − p) over the squared standard error, by the degrees of freedom of
    rows and units; never more than there are rows, and the units themselves where all rows are the
    same.
    """
    value, error = sums.value, standard_error(sums)
    alone = sums.held == rows
    with np.errstate(divide="ignore", invalid="ignore"):
        found = value * (1 - value) / error**2
        found = found * (student(confidence, rows) / student(confidence, sums.held)) ** 2
    found = np.where(np.isnan(found), sums.held, found)
    return np.where(alone, rows, np.minimum(found, rows))


def share_interval(sums: Sums, rows: Ints, confidence: float | Floats) -> tuple[Floats, Floats]:
    """[cell]: of a share of rows; where units are several rows, none below `FEWEST_UNITS`.

    sums: of 0 or 1 per row. rows: [cell].
    """
    n = effective_n(sums, rows, confidence)
    with np.errstate(invalid="ignore"):
        low, high = clopper_pearson(sums.value * n, n, confidence)
    known = (rows > 0) & ((sums.held == rows) | (sums.held >= FEWEST_UNITS))
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def share_difference(
    patched: Sums, base: Sums, rows: Ints, confidence: float | Floats, base_rows: Ints | None = None
) -> tuple[Floats, Floats]:
    """[cell]: of one share less another on the same rows, from the limits of both and their
    correlation (Newcombe 1998, method 10; Zou and Donner 2008), with exact limits. Of shares on
    other rows (`base_rows`) the correlation is 0."""
    low, high = share_interval(patched, rows, confidence)
    other_low, other_high = share_interval(
        base, rows if base_rows is None else base_rows, confidence
    )
    one, two = patched.value, base.value
    with np.errstate(divide="ignore", invalid="ignore"):
        left = patched.top - one[:, None] * patched.bottom
        right = base.top - two[:, None] * base.bottom
        together = (left * right).sum(1) / np.sqrt((left**2).sum(1) * (right**2).sum(1))
        together = np.nan_to_num(together)
        a, b = one - low, other_high - two
        c, d = high - one, two - other_low
        lower = one - two - np.sqrt(np.maximum(a**2 - 2 * together * a * b + b**2, 0.0))
        upper = one - two + np.sqrt(np.maximum(c**2 - 2 * together * c * d + d**2, 0.0))
    return lower, upper
