"""Limits of statistical tests: the smallest p-value under a `stats` line. No numpy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import neg

from mechdsl.program import spec

MAX_EXACT_FLIPS = 14
"""Prompts with a non-zero delta up to which all sign flips are enumerated."""

CORRECTION_NAMES: Mapping[str, str] = {
    "holm": "Holm",
    "bh": "Benjamini-Hochberg",
    "max": "max-statistic",
    "none": "none",
}
"""How `stats correct WORD` is called."""

MAX_RESAMPLES = 100_000
"""Sign flips or resamples, unless the file asks for more of them."""

MIN_UNITS = 5
"""Units below which a cell has neither an interval nor a p."""


def smallest_p_value(units: int, settings: spec.Statistics) -> float:
    """The least p that so many units can have: 2^(1 − n), as often all signs are equal by chance,
    and no less than one flip or resample among all; 1 where units are too few for a test."""
    if units < MIN_UNITS:
        return 1.0
    least = 2.0 ** (1 - units)
    if settings.test == "bootstrap":
        return max(least, 2 / (max(MAX_RESAMPLES, settings.resamples) + 1))
    if settings.test == "flips" and units > MAX_EXACT_FLIPS:
        return max(least, 2 / (MAX_RESAMPLES + 1))
    return least


def unreachable_cells(units: Sequence[int], settings: spec.Statistics) -> list[int]:
    """Places of the cells that can't survive the correction, however large their effects.

    units: of every cell that is tested, prompts or groups.
    """
    least = sorted((smallest_p_value(each, settings) for each in units), reverse=True)
    level = 1 - settings.confidence / 100
    found: list[int] = []
    for place, each in enumerate(units):
        own = smallest_p_value(each, settings)
        # Holm multiplies by the cells that are left when all with a smaller p have been rejected;
        # the others may leave it as it is
        left = bisect_right(least, -own, key=neg) if settings.correction == "holm" else 1
        if own * left >= level:
            found.append(place)
    return found
