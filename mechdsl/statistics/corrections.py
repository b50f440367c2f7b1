"""Corrections for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.statistics.units import BLOCK

MULTIPLIERS = 10_000
"""Joint normal draws of `by_maximum`."""


def holm(p: Floats) -> Floats:
    """Holm's step-down correction: no false positive among all tests, with the chosen level."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def benjamini_hochberg(p: Floats) -> Floats:
    """Benjamini and Hochberg's step-up correction: the share of false positives."""
    from scipy.stats import false_discovery_control  # not at the top: slow to import

    return false_discovery_control(p)


def by_maximum(p: Floats, moves: Floats, seed: int) -> Floats:
    """Step-down correction that takes into account how cells are correlated over units.

    Each p is a normal score, and the scores of all cells are as correlated as their units: the
    largest of them is drawn with Gaussian multipliers (Chernozhukov, Chetverikov and Kato 2013),
    and each cell is set against the largest of those with no smaller p (Westfall and Young 1993,
    algorithm 4.1). Few units make any cells look correlated, so that correlations are shrunk by
    what chance explains of them (Schäfer and Strimmer 2005).

    Args:
        p: [cell].
        moves: [cell, unit], how far each unit is from the cell's value.
        seed: of the draws.

    Returns:
        [cell], corrected p, no smaller than p.
    """
    from scipy.special import ndtri  # not at the top: slow to import

    if not len(p):
        return p.copy()
    size = np.sqrt((moves**2).sum(1, keepdims=True))
    unit = np.divide(moves, size, out=np.zeros_like(moves), where=size > 0)
    score = -ndtri(np.maximum(p, 1e-300) / 2)
    order = np.argsort(-score, kind="stable")
    unit, score = unit[order], score[order]
    still = size[order, 0] == 0
    chance = _due_to_chance(unit[~still])
    random = np.random.default_rng([4, seed % 2**63])
    extreme, done = np.zeros(len(p), dtype=np.int64), 0
    step = max(1, BLOCK // max(len(p), unit.shape[1]))
    while done < MULTIPLIERS:
        count = min(step, MULTIPLIERS - done)
        shared = random.standard_normal((count, unit.shape[1])) @ unit.T
        own = random.standard_normal((count, len(p)))
        drawn = np.abs(np.sqrt(1 - chance) * shared + np.sqrt(chance) * own)
        largest = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= score, axis=0)
        done += len(drawn)
    joint = np.maximum.accumulate((extreme + 1) / (MULTIPLIERS + 1))
    # units that don't differ have no part in the draws: Bonferroni's for them
    joint = np.where(still, np.minimum(1.0, p[order] * len(p)), joint)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.maximum(joint, p[order]))
    return corrected


def _due_to_chance(unit: Floats) -> float:
    """The part of the squared correlations of cells that as many units give of cells that aren't
    correlated, at most 1.

    unit: [cell, unit], rows of length 1.
    """
    cells, units = unit.shape
    pairs = cells * (cells - 1)
    squared = float(((unit.T @ unit) ** 2).sum()) - cells
    if units < 2 or squared <= 0:
        return 1.0
    return min(1.0, pairs / (units - 1) / squared)


CORRECTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": np.copy,
}
"""What `stats correct WORD` does to all p of an experiment; `max` needs more than p."""
