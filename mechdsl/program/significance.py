"""Limits of statistical tests: the smallest p-value under a `stats` line. No numpy."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import neg

from mechdsl.base.text import count_noun
from mechdsl.program import spec

MAX_EXACT_FLIPS = 14
"""Maximum number of prompts with a non-zero delta for which all sign flips are enumerated."""

CORRECTION_NAMES: Mapping[str, str] = {
    "holm": "Holm",
    "bh": "Benjamini-Hochberg",
    "max": "max-statistic",
    "none": "none",
}
"""Names of the corrections of `stats correct WORD`."""

MAX_RESAMPLES = 100_000
"""Maximum default number of sign flips or resamples; a file can request more."""

MIN_UNITS = 5
"""Minimum number of units for an interval or a p-value."""


def smallest_p_value(units: int, settings: spec.Statistics) -> float:
    """Return the smallest p-value that this number of units can have.

    It is 2^(1 − n), the probability that all signs are equal by chance, and at least one flip or
    resample among all; 1 if the units are too few for a test.
    """
    if units < MIN_UNITS:
        return 1.0
    least = 2.0 ** (1 - units)
    if settings.test == "bootstrap":
        return max(least, 2 / (max(MAX_RESAMPLES, settings.resamples) + 1))
    if settings.test == "flips" and units > MAX_EXACT_FLIPS:
        return max(least, 2 / (MAX_RESAMPLES + 1))
    return least


def interval_gap(
    units: int,
    word: str,
    settings: spec.Statistics,
    *,
    is_ratio: bool = False,
    is_equal: bool = False,
) -> str:
    """Describe why an estimate over this number of units has no interval.

    Args:
        units: Number of sampling units.
        word: Name of one unit.
        settings: Method and confidence.
        is_ratio: Whether units differ in their denominators, not only in their numbers of rows.
        is_equal: Whether all units have the same value.
    """
    words = count_noun(units, word)
    if units < MIN_UNITS:
        return f"{words}: no interval below {MIN_UNITS}"
    if is_equal:
        return f"all {words} have the same value"
    level = 1 - settings.confidence / 100
    if settings.test == "flips" and smallest_p_value(units, settings) >= level:
        return f"{words}: sign flips of so few give no p below {level:.4g}"
    return unequal_units(units, word, settings.confidence, is_ratio=is_ratio)


def unequal_units(units: int, word: str, confidence: float, *, is_ratio: bool = False) -> str:
    """Describe an estimate without an interval because few units hold most of the rows.

    Args:
        units: Number of sampling units.
        word: Name of one unit.
        confidence: In percent.
        is_ratio: Whether units differ in their denominators, not only in their numbers of rows.
    """
    sizes = "denominators" if is_ratio else "numbers of rows"
    return f"{count_noun(units, word)}: too unequal {sizes} for a {confidence:.6g} % interval"


def unreachable_cells(units: Sequence[int], settings: spec.Statistics) -> list[int]:
    """Return the indices of cells that can't be significant after correction, whatever their
    effect.

    Args:
        units: Number of prompts or groups of each tested cell.
    """
    least = sorted((smallest_p_value(unit, settings) for unit in units), reverse=True)
    level = 1 - settings.confidence / 100
    cells: list[int] = []
    for place, unit in enumerate(units):
        own = smallest_p_value(unit, settings)
        # Holm multiplies by the number of cells that remain after all with a smaller p are
        # rejected; the other corrections may leave p unchanged.
        left = bisect_right(least, -own, key=neg) if settings.correction == "holm" else 1
        if own * left >= level:
            cells.append(place)
    return cells
