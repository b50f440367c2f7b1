"""Similarity of vectors, and of whole representations of the same rows."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.means import checked

FEWEST_ROWS = 4
"""Of the estimator that corrects for few rows."""
FEWEST_UNITS = 5
"""Below which there is no interval; without one of them `FEWEST_ROWS` are left."""


def cosine(a: Floats, b: Floats) -> Floats:
    """[row]: of the angle between two vectors; NaN where one of them is 0.

    a, b: [row, width].
    """
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = (np.asarray(a, dtype=np.float64) * b).sum(axis=-1)
    return np.divide(dots, lengths, out=np.full(len(dots), np.nan), where=lengths > 0)


def cka_linear(x: Floats, y: Floats) -> float:
    """Linear CKA: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred rows, Frobenius norms (Kornblith et al. 2019,
    section 3). From 0 to 1; nearly 1 for whatever has far more dimensions than rows, which
    `cka_unbiased` corrects. NaN where one side doesn't vary.

    x: [row, width]; y: [row, other width].
    """
    a, b = _centred(x), _centred(y)
    own = float(np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    return float(np.linalg.norm(b.T @ a) ** 2) / own if own > 0 else float("nan")


def linear_kernel(x: Floats) -> Floats:
    """[row, row]: inner products of the centred rows, with zeros on the diagonal, as
    `cka_unbiased` takes them.

    x: [row, width].
    """
    rows = _centred(x)
    found = rows @ rows.T
    np.fill_diagonal(found, 0.0)
    return found


def cka_unbiased(k: Floats, other: Floats) -> float:
    """Linear CKA from the unbiased estimator of HSIC (Song et al. 2012, equation 5, as in Nguyen et
    al. 2021, section 2): around 0 for representations that have nothing in common, however few the
    rows, so it can be a little below 0. NaN where one side doesn't vary.

    k, other: [row, row], `linear_kernel`s. ValueError below 4 rows.
    """
    if len(k) < FEWEST_ROWS:
        raise ValueError(f"{len(k)} rows, where at least {FEWEST_ROWS} are needed")
    units = np.zeros(len(k), dtype=np.int64)
    return float(_without_units(k, other, units, 0)[0])


def cka_interval(
    k: Floats,
    other: Floats,
    units: Ints,
    confidence: float,
) -> tuple[float, float]:
    """An interval for `cka_unbiased`: its jackknife over units with Student's t, on the scale of
    atanh as for correlations (Efron and Tibshirani 1993, chapter 11; Fisher 1921), cut at −1 and 1.

    units: [row], 0, 1, …: rows of one unit are left out together. NaN below 5 units.

    A bootstrap draws rows twice, and a row is like itself: the unbiased estimator, which leaves the
    diagonal out, would no longer be.
    """
    count = int(units.max(initial=-1)) + 1
    if count < FEWEST_UNITS:
        return float("nan"), float("nan")
    edge = 1 - 1e-12
    whole = np.arctanh(np.clip(cka_unbiased(k, other), -edge, edge))
    left = np.arctanh(np.clip(_without_units(k, other, units, count)[1:], -edge, edge))
    error = np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum())
    reach = float(stdtrit(count - 1, 0.5 + confidence / 200)) * error
    return float(np.tanh(whole - reach)), float(np.tanh(whole + reach))


def _without_units(k: Floats, other: Floats, units: Ints, count: int) -> Floats:
    """[1 + unit]: `cka_unbiased` of all rows, then without the rows of each unit."""
    own = _hsic(k, k, units, count) * _hsic(other, other, units, count)
    both = _hsic(k, other, units, count)
    root = np.sqrt(np.maximum(own, 0.0))
    return np.divide(both, root, out=np.full_like(both, np.nan), where=root > 0)


def _hsic(k: Floats, other: Floats, units: Ints, count: int) -> Floats:
    """[1 + unit]: the unbiased HSIC of all rows, then without each unit, in one pass over the
    kernels: what a unit's rows take part in is taken off the sums.

    HSIC = [tr(KL) + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3)), diagonals 0.
    """
    is_in = (units[:, None] == np.arange(count)).astype(np.float64)
    n = len(k) - np.concatenate([[0.0], is_in.sum(axis=0)])
    product = k * other
    traces = product.sum() - _taken(product, is_in)
    sums = [each.sum() - _taken(each, is_in) for each in (k, other)]
    # Σ_j (k_j − K_jU)(l_j − L_jU) over the rows j outside unit U; k_j is j's sum over all rows.
    parts = [
        each.sum(axis=1)[:, None] - np.hstack([np.zeros((len(k), 1)), each @ is_in])
        for each in (k, other)
    ]
    outside = 1 - np.hstack([np.zeros((len(k), 1)), is_in])
    crossed = (parts[0] * parts[1] * outside).sum(axis=0)
    inner = traces + sums[0] * sums[1] / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed
    return inner / (n * (n - 3))


def _taken(matrix: Floats, is_in: Floats) -> Floats:
    """[1 + unit]: what rows and columns of a unit add to the sum of a symmetric matrix; 0 first."""
    rows = matrix.sum(axis=1) @ is_in
    inside = (is_in * (matrix @ is_in)).sum(axis=0)
    return np.concatenate([[0.0], 2 * rows - inside])


def _centred(x: Floats) -> Floats:
    rows = checked(x, 2)
    return rows - rows.mean(axis=0)
