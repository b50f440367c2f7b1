"""Whether the effects of a family of cells are too skewed for its corrected p to hold the level."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mechdsl.base.arrays import Floats, Ints

FEWEST_CELLS = 8
"""Of fewer, the smallest p isn't so far out that skewness decides, nor is skewness known well."""
LIMITS: Mapping[str, tuple[float, float]] = {
    "t": (0.65, 0.4),
    "flips": (0.49, 0.2),
    "bootstrap": (0.49, 0.2),
}
"""`stats test` → (a, b): with n units and a median skewness above a nᵇ, more than 6 % of families
without an effect have a survivor. By simulation (`benchmarks/coverage`)."""
WITH_EFFECTS = 0.7
"""Share of the skewness that has the sign of its cell's effect, less the rest, from which on it is
that of few rows that differ: those stand for an effect, and against it nothing is hidden."""


def too_skewed(moves: Floats, value: Floats, units: Ints, test: str) -> bool:
    """Whether the level of a family isn't held.

    A sample shows least of its skewness exactly where its mean misleads, so one cell can't be
    judged by its own units; the family can.

    Args:
        moves: [cell, unit], how far each unit is from the cell's value.
        value: [cell], the effects.
        units: [cell], how many units it has.
        test: the word behind `stats test`.
    """
    if len(moves) < FEWEST_CELLS:
        return False
    size = np.sqrt((moves**2).sum(1) / units)
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = np.nan_to_num((moves**3).sum(1) / units / size**3)
    total = float(np.abs(skew).sum())
    factor, power = LIMITS[test]
    if float(np.median(np.abs(skew))) <= factor * float(np.median(units)) ** power:
        return False
    return float((np.sign(value) * skew).sum()) < WITH_EFFECTS * total
