"""Interval and p of cells by one rule: the interval excludes 0 exactly where p < level."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.program import spec
from mechdsl.statistics.bootstrap import FEWEST_UNITS, studentise
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.shares import share_difference
from mechdsl.statistics.sign_flips import PER_TEST, flip_signs, flips_for
from mechdsl.statistics.skewed_t import skewed_t
from mechdsl.statistics.units import Draws
from mechdsl.validate.reachable_p import MOST_DRAWN

_HALVINGS = 40
"""Steps of the search for the level at which limits of shares reach 0."""


@dataclass(frozen=True, eq=False)
class Inference:
    """Arrays over cells, NaN where there are too few units or no bound."""

    low: Floats
    high: Floats
    p: Floats
    """Two-sided, of the hypothesis that the figure is 0."""
    floor: Bools
    """Whether p is the least that so many flips or resamples give."""

    @classmethod
    def of(cls, low: Floats, high: Floats, p: Floats, floor: Bools, level: float) -> Inference:
        """The interval of a figure that is tested: it includes 0 where p isn't below the level, and
        p is missing where the interval is."""
        includes_zero = ~np.isnan(p) & (p >= level)
        known = ~np.isnan(low) & ~np.isnan(high)
        with np.errstate(invalid="ignore"):
            low = np.where(includes_zero, np.minimum(low, 0.0), low)
            high = np.where(includes_zero, np.maximum(high, 0.0), high)
        return cls(low, high, np.where(known, p, np.nan), floor & known)


def infer(
    sums: Sums, settings: spec.Statistics, draws: Draws, tests: int, *, tested: bool = True
) -> Inference:
    """By the method that `stats test` names.

    Args:
        sums: of the cells.
        settings: the method, the confidence.
        draws: the units, their strata, the seed, and how many resamples the file asks for.
        tests: of how many cells the smallest p has to survive the correction.
        tested: whether 0 means "no effect", so that the figure has a p.
    """
    low, high, p, floor = _by_method(sums, settings, draws, tests)
    if tested:
        return Inference.of(low, high, p, floor, 1 - settings.confidence / 100)
    nothing = np.full(len(p), np.nan)
    return Inference(low, high, nothing, np.zeros(len(p), dtype=bool))


def draws_of(settings: spec.Statistics, tests: int) -> int:
    """How many flips or resamples the method takes; none by the formula of `t`."""
    level = 1 - settings.confidence / 100
    if settings.test == "t":
        return 0
    if settings.test == "flips":
        return flips_for(tests, level)
    return max(settings.resamples, min(MOST_DRAWN, ceil(2 * PER_TEST * tests / level)))


def _by_method(
    sums: Sums, settings: spec.Statistics, draws: Draws, tests: int
) -> tuple[Floats, Floats, Floats, Bools]:
    if settings.test == "t":
        found = skewed_t(sums, draws.strata)
        low, high = found.interval(settings.confidence, FEWEST_UNITS)
        return low, high, found.p(), np.zeros(len(low), dtype=bool)
    count = draws_of(settings, tests)
    if settings.test == "flips":
        flips = flip_signs(sums, count, draws.seed, settings.confidence)
        few = (sums.held < FEWEST_UNITS) | ~np.isfinite(sums.value)
        low, high = (np.where(few, np.nan, end) for end in (flips.low, flips.high))
        return low, high, flips.p, flips.floor
    resampled = studentise(
        sums, Draws(draws.units, max(count, draws.resamples), draws.seed, draws.strata)
    )
    return *resampled.interval(settings.confidence), *resampled.p()


def infer_shares(
    patched: Sums, base: Sums, rows: Ints, confidence: float, base_rows: Ints | None = None
) -> Inference:
    """Of the difference of two shares: p is the level at which its limits reach 0.

    Args:
        patched: 0 or 1 per row.
        base: the same of the other run.
        rows: [cell].
        confidence: in percent.
        base_rows: [cell], of the other run, if it has other rows.
    """
    low, high = share_difference(patched, base, rows, confidence, base_rows)
    least, most = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        ends = share_difference(patched, base, rows, 100 * (1 - middle), base_rows)
        with np.errstate(invalid="ignore"):
            excludes = (ends[0] > 0) | (ends[1] < 0)
        least, most = np.where(excludes, least, middle), np.where(excludes, middle, most)
    # units that both shares have differ in their sums; two samples have none in common
    unequal = np.count_nonzero(patched.top != base.top, axis=1)
    p = np.maximum(most, 2.0 ** (1.0 - unequal))
    p = np.where(patched.value == base.value, 1.0, np.minimum(p, 1.0))
    return Inference.of(low, high, p, np.zeros(len(rows), dtype=bool), 1 - confidence / 100)
