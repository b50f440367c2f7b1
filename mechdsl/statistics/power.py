"""Statistical power: the smallest effect that a number of rows can detect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, sqrt

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.program.significance import MAX_EXACT_FLIPS, smallest_p_value
from mechdsl.statistics.measurements import EffectSums
from mechdsl.statistics.skewed_t import skewed_t

TARGET_POWER = 0.8
"""How often an effect of the stated size is found."""

_DRAWN = 2000
"""Experiments that are simulated where sign flips are few: the power is known to 0.9 %."""

_MOST_DRAWN = 1000
"""Units of a simulated experiment."""

_STEPS = 10
"""Of a search between 0 and 4, down to less than 0.01."""

_FEW_PATTERNS = 100
"""Of more patterns of signs below the level, sign flips find as much as Student's t."""


@dataclass(frozen=True)
class DetectableEffect:
    """The smallest effect that one test among many finds in 80 % of experiments."""

    units: int
    tests: int
    level: float
    """What the p of one effect alone has to be below: the level over the number of tests, unless
    nothing is corrected."""
    effect: float | None
    """Mean of the per-unit deltas, in their standard deviations; None where no effect, however
    large, is found."""
    smallest: float
    """The smallest p that can be reached."""


def detectable_effect(units: int, tests: int, settings: spec.Statistics) -> DetectableEffect:
    """The smallest effect that can be shown by normal deltas of `units` rows or groups.

    By the corrected t it is found by simulation, to 1 % of the power. By resampling, and by flips
    of more than `EXACT_UP_TO` units, the effect d solves P(|T| > t) = 0.8, T noncentral t with
    n - 1 degrees of freedom and noncentrality d √n, t the quantile of Student's t at the level
    (source: Cohen 1988, Statistical Power Analysis, ch. 2). Where all patterns of signs are
    enumerated and few lie below the level, sign flips find less than t, and d is found by
    simulating them, to 2 %.

    The level is that of one effect alone. Holm's correction then takes all tests; that by the
    maximum takes less where cells are correlated, and Benjamini and Hochberg's less where other
    effects are there too, so d is an upper bound for them.
    """
    level = 1 - settings.confidence / 100
    if settings.correction != "none":
        level /= max(1, tests)
    smallest = smallest_p_value(units, settings)
    if smallest >= level:
        return DetectableEffect(units, tests, level, None, smallest)
    if settings.test == "t":
        effect = detectable_by_skewed_t(units, level)
    elif settings.test == "flips" and units <= MAX_EXACT_FLIPS:
        patterns = ceil(level / smallest) - 1  # p is below the level, not at it
        effect = (
            detectable_by_flips(units, patterns)
            if patterns <= _FEW_PATTERNS
            else detectable_by_t(units, level)
        )
    else:
        effect = detectable_by_t(units, level)
    return DetectableEffect(units, tests, level, effect, smallest)


@cache
def detectable_by_skewed_t(units: int, level: float) -> float:
    """The standardised mean that the corrected t finds in 80 % of experiments with normal deltas.

    Of more than `_MOST_DRAWN` units it is found for so many and scaled by the root of their share.
    """
    drawn = min(units, _MOST_DRAWN)
    noise = np.random.default_rng([5, drawn]).standard_normal((_DRAWN, drawn))
    found = skewed_t(EffectSums(noise, np.ones((1, drawn)), np.full(_DRAWN, drawn)))

    def power(effect: float) -> float:
        return float((found.p_of(np.full(_DRAWN, -effect)) < level).mean())

    return _least(power) * sqrt(drawn / units)


def _least(power: Callable[[float], float]) -> float:
    """The smallest effect whose power is `POWER`, up to 64."""
    low, high = 0.0, 4.0
    while power(high) < TARGET_POWER and high < 64:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < TARGET_POWER else (low, middle)
    return (low + high) / 2


def detectable_by_t(units: int, level: float) -> float:
    """The standardised mean that a two-sided t test finds in 80 % of experiments."""
    from scipy.special import nctdtrinc, stdtrit  # not at the top: slow to import

    t = stdtrit(units - 1, 1 - level / 2)
    return float(nctdtrinc(units - 1, 1 - TARGET_POWER, t)) / sqrt(units)


@cache
def detectable_by_flips(units: int, patterns: int) -> float:
    """The same of a two-sided sign-flip test, whose p is small enough where at most `patterns` of
    the 2^(units - 1) patterns of signs (up to a sign for all) have as large a sum as the one seen.
    """
    noise = np.random.default_rng([3, units]).standard_normal((_DRAWN, units))
    codes = np.arange(2 ** (units - 1))
    signs = 1.0 - 2.0 * ((codes[:, None] >> np.arange(units)) & 1)
    return _least(lambda effect: _power(signs, noise + effect, patterns))


def _power(signs: Floats, deltas: Floats, patterns: int) -> float:
    """In how many rows of deltas [experiment, unit] at most `patterns` sums are as large."""
    seen = np.abs(deltas.sum(1)) * (1 - 1e-9)
    reached = np.count_nonzero(np.abs(signs @ deltas.T) >= seen, axis=0)
    return float((reached <= patterns).mean())
