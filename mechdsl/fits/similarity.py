"""Similarity of whole representations of the same rows."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.fits.vectors import checked

FEWEST_ROWS = 4
"""Of the estimator that corrects for few rows."""


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
    return float(_ratio(*(_hsic(*pair) for pair in _pairs(k, other))))


def cka_per_row(k: Floats, other: Floats) -> Floats:
    """[row] what each row contributes: their mean is `cka_unbiased`, and the standard error of the
    mean is that of the jackknife (Efron and Tibshirani 1993, chapter 11): θ + (n − 1)(mean of θ₋ᵢ −
    θ₋ᵢ), θ₋ᵢ without row i.

    A bootstrap would draw rows twice, and a row is like itself: the estimator, which leaves the
    diagonal out, would no longer be unbiased. k, other: as above. ValueError below 5 rows.
    """
    whole = cka_unbiased(k, other)
    left = _ratio(*(_hsic_without_each(*pair) for pair in _pairs(k, other)))
    return whole + (len(k) - 1) * (left.mean() - left)


def _pairs(k: Floats, other: Floats) -> tuple[tuple[Floats, Floats], ...]:
    return (k, other), (k, k), (other, other)


def _ratio(both: Floats, own: Floats, others: Floats) -> Floats:
    root = np.sqrt(np.maximum(own, 0.0) * np.maximum(others, 0.0))
    return np.divide(both, root, out=np.full_like(root, np.nan), where=root > 0)


def _unbiased(n: int, trace: Floats, one: Floats, two: Floats, crossed: Floats) -> Floats:
    """[tr(KL) + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3)), diagonals 0."""
    if n < FEWEST_ROWS:
        raise ValueError(f"{n} rows, where at least {FEWEST_ROWS} are needed")
    inner = trace + one * two / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed
    return np.asarray(inner / (n * (n - 3)))


def _hsic(k: Floats, other: Floats) -> Floats:
    """Of all rows."""
    one, two = k.sum(axis=1), other.sum(axis=1)
    return _unbiased(len(k), (k * other).sum(), one.sum(), two.sum(), one @ two)


def _hsic_without_each(k: Floats, other: Floats) -> Floats:
    """[row] of all rows but this one: what it takes part in is taken off the sums."""
    product, one, two = k * other, k.sum(axis=1), other.sum(axis=1)
    trace = product.sum() - 2 * product.sum(axis=1)
    # Σ_j (k_j − K_ij)(l_j − L_ij) over the other rows j.
    crossed = one @ two - one * two - k @ two - other @ one + product.sum(axis=1)
    return _unbiased(len(k) - 1, trace, one.sum() - 2 * one, two.sum() - 2 * two, crossed)


def _centred(x: Floats) -> Floats:
    rows = checked(x, 2)
    return rows - rows.mean(axis=0)
