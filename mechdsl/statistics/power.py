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
from mechdsl.statistics.intervals import skewed_t
from mechdsl.statistics.measurements import EffectSums

TARGET_POWER = 0.8
"""Probability of detecting an effect of the stated size."""

_DRAWN = 2000
"""Number of simulated experiments with few sign flips; the power is accurate to 0.9 %."""

_MOST_DRAWN = 1000
"""Maximum number of units of a simulated experiment."""

_STEPS = 10
"""Steps of a search between 0 and 4, to less than 0.01."""

_FEW_PATTERNS = 100
"""With more patterns of signs below the level, sign flips have the power of Student's t."""


@dataclass(frozen=True)
class DetectableEffect:
    """The smallest effect that one of many tests detects in 80 % of experiments."""

    units: int
    tests: int
    level: float
    """Threshold for the p of a single effect: the level divided by the number of tests, or the
    level without a correction."""
    effect: float | None
    """Mean of the per-unit deltas, in standard deviations; None if no effect is detectable."""
    smallest: float
    """The smallest possible p."""


def detectable_effect(units: int, tests: int, settings: spec.Statistics) -> DetectableEffect:
    """Return the smallest detectable effect for normal deltas of `units` rows or groups.

    For the corrected t it is simulated, to 1 % of the power. For resampling, and for flips of more
    than `MAX_EXACT_FLIPS` units, the effect d solves P(|T| > t) = 0.8, with T noncentral t with n -
    1 degrees of freedom and noncentrality d √n, and t the quantile of Student's t at the level
    (source: Cohen 1988, Statistical Power Analysis, ch. 2). If all patterns of signs are enumerated
    and few are below the level, sign flips have less power than t, and d is simulated, to 2 %.

    The level is that of a single effect. Holm's correction uses all tests; the correction by the
    maximum is less strict for correlated cells, and Benjamini and Hochberg's if other effects
    exist, so d is an upper bound for them.
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
        patterns = ceil(level / smallest) - 1  # p must be below the level, not equal to it
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
    """Return the standardised mean that the corrected t detects in 80 % of experiments with normal
    deltas.

    For more than `_MOST_DRAWN` units it is computed for that number and scaled by the root of the
    ratio.
    """
    drawn = min(units, _MOST_DRAWN)
    noise = np.random.default_rng([5, drawn]).standard_normal((_DRAWN, drawn))
    inference = skewed_t(EffectSums(noise, np.ones((1, drawn)), np.full(_DRAWN, drawn)))

    def power(effect: float) -> float:
        return float((inference.p_of(np.full(_DRAWN, -effect)) < level).mean())

    return _least(power) * sqrt(drawn / units)


def _least(power: Callable[[float], float]) -> float:
    """Return the smallest effect whose power is `TARGET_POWER`, up to 64."""
    low, high = 0.0, 4.0
    while power(high) < TARGET_POWER and high < 64:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < TARGET_POWER else (low, middle)
    return (low + high) / 2


def detectable_by_t(units: int, level: float) -> float:
    """Return the standardised mean that a two-sided t test detects in 80 % of experiments."""
    from scipy.special import nctdtrinc, stdtrit  # not at the top: slow to import

    t = stdtrit(units - 1, 1 - level / 2)
    return float(nctdtrinc(units - 1, 1 - TARGET_POWER, t)) / sqrt(units)


@cache
def detectable_by_flips(units: int, patterns: int) -> float:
    """Return the standardised mean that a two-sided sign-flip test detects in 80 % of experiments.

    p is small enough if at most `patterns` of the 2^(units - 1) patterns of signs (up to a common
    sign) have a sum as large as the observed one.
    """
    noise = np.random.default_rng([3, units]).standard_normal((_DRAWN, units))
    codes = np.arange(2 ** (units - 1))
    signs = 1.0 - 2.0 * ((codes[:, None] >> np.arange(units)) & 1)
    return _least(lambda effect: _power(signs, noise + effect, patterns))


def _power(signs: Floats, deltas: Floats, patterns: int) -> float:
    """Return the share of rows of deltas [experiment, unit] with at most `patterns` larger sums."""
    seen = np.abs(deltas.sum(1)) * (1 - 1e-9)
    reached = np.count_nonzero(np.abs(signs @ deltas.T) >= seen, axis=0)
    return float((reached <= patterns).mean())
