"""Correlations of values and of their ranks, and how well values separate items.

References:
    Hanley, J. A. and McNeil, B. J. (1982). The meaning and use of the area under a receiver
        operating characteristic (ROC) curve. Radiology 143, 29-36.
    Spearman, C. (1904). The proof and measurement of association between two things. Am. J.
        Psychol. 15, 72-101.
"""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Bools, Floats


def pearson(left: Floats, right: Floats) -> Floats:
    """Return Pearson's correlation of each row."""
    a = left - left.mean(1, keepdims=True)
    b = right - right.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def spearman(left: Floats, right: Floats) -> Floats:
    """Return Spearman's correlation of each row."""
    from scipy.stats import rankdata  # not at the top: slow to import

    return pearson(rankdata(left, axis=1), rankdata(right, axis=1))


def top_rank_correlation(one: Floats, other: Floats, count: int) -> float:
    """Compute Spearman's rank correlation of two predictions, over the tokens that lead in either.

    Args:
        one: Logits of a prediction, [token].
        other: Logits of another one.
        count: Number of the largest logits of each. Ties at the end prefer the first tokens.

    Returns:
        The correlation over the union of both sets, from -1 to 1. NaN if all their logits are equal
        in one prediction.
    """
    leaders = [np.argsort(-each, kind="stable")[:count] for each in (one, other)]
    union = np.union1d(*leaders)
    return float(spearman(one[None, union], other[None, union])[0])


def auroc(values: Floats, true: Floats | Bools) -> Floats:
    """Return how often a positive item has the greater value, with ties as half.

    It is Mann and Whitney's U divided by the number of pairs.

    Args:
        values: Shape [row, item].
        true: 0 or 1, shape [item].

    Returns:
        Shape [row].
    """
    from scipy.stats import rankdata  # not at the top: slow to import

    held = true > 0
    count, others = int(held.sum()), int((~held).sum())
    ranks = rankdata(values, axis=1)[:, held].sum(1)
    return (ranks - count * (count + 1) / 2) / (count * others)
