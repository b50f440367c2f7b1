"""Intervals of means and ratios: bootstrap-t over units, or Student's t where that is wider.

A cell's error is that of its linearised ratio (Cochran 1977, section 6), computed anew in every
resample, so that what is resampled is a pivot: Efron and Tibshirani 1993, chapter 12; Hall 1988.
Percentiles of the mean itself are too narrow for few units (at 8, 89 % instead of 95 %), and the
bootstrap-t alone is for heavy tails (t with 3 degrees of freedom: 93 %), which is why each end is
the farther of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.units import BLOCK, Draws, blocks

FEWEST_UNITS = 5
"""Units below which there is no interval."""
FEWEST_RESAMPLED = 8
"""Units below which Student's t stands in: resamples of so few are too often of one unit."""
FLAT = 1e-10
"""Variances that are so small beside what they are of are rounding."""


@dataclass(frozen=True, eq=False)
class Studentised:
    """Cells with their standard errors, and how far both moved in every resample."""

    value: Floats
    """[cell]."""
    error: Floats
    """[cell]: the standard error; NaN for one unit, 0 where no unit differs."""
    pivots: Floats
    """[resample, cell]: (resampled − value) / resampled error, infinite where that error is 0."""
    held: Ints
    """[cell]: units."""

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """[cell] each: NaN below `FEWEST_UNITS`."""
        tail = (100.0 - confidence) / 2
        lower, upper = percentiles(self.pivots, (tail, 100.0 - tail))
        t = student(confidence, self.held)
        with np.errstate(invalid="ignore"):
            low = self.value - self.error * self._farther(upper, t)
            high = self.value + self.error * self._farther(-lower, t)
        flat = self.error == 0
        low, high = np.where(flat, self.value, low), np.where(flat, self.value, high)
        few = (self.held < FEWEST_UNITS) | ~np.isfinite(self.value)
        return np.where(few, np.nan, low), np.where(few, np.nan, high)

    def _farther(self, resampled: Floats, t: Floats) -> Floats:
        """How many errors an end is away: by the resamples where these tell, at least by t."""
        known = np.isfinite(resampled) & (self.held >= FEWEST_RESAMPLED)
        return np.where(known, np.maximum(resampled, t), t)

    @property
    def ratio(self) -> Floats:
        """[cell]: the value in errors; 0 where it is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.value == 0, 0.0, self.value / self.error)

    def p(self) -> Floats:
        """[cell]: two-sided, by inversion of the interval; 1 where the value is 0, at least
        2 / (resamples + 1)."""
        from scipy.special import stdtr  # not at the top: slow to import

        own = self.ratio
        above = (np.count_nonzero(self.pivots >= own, axis=0) + 1) / (len(self.pivots) + 1)
        below = (np.count_nonzero(self.pivots <= own, axis=0) + 1) / (len(self.pivots) + 1)
        by_t = stdtr(np.maximum(self.held - 1, 1), -np.abs(own))
        found = 2 * np.maximum(np.minimum(above, below), by_t)
        return np.where(self.value == 0, 1.0, np.minimum(1.0, found))


def percentiles(samples: Floats, ends: tuple[float, float]) -> tuple[Floats, Floats]:
    """Over the first axis, NaN left out; NaN where nothing else is there, or where an end is
    infinite."""
    columns = np.array(samples.T)  # a copy, by cell: partitioned in place, twice as fast
    missing = np.isnan(columns)
    with np.errstate(invalid="ignore"):
        if not missing.any():
            low, high = np.percentile(columns, ends, axis=-1, overwrite_input=True)
            return low, high
        none = missing.all(axis=-1)
        columns[none] = 0.0  # numpy warns of cells without a number
        low, high = np.nanpercentile(columns, ends, axis=-1)
    return np.where(none, np.nan, low), np.where(none, np.nan, high)


def student(confidence: float, units: Ints) -> Floats:
    """[cell]: the quantile of Student's t for so many units, NaN for one."""
    from scipy.special import stdtrit  # not at the top: slow to import

    freedom = np.maximum(units - 1, 1).astype(np.float64)
    return np.where(units > 1, stdtrit(freedom, 0.5 + confidence / 200), np.nan)


def standard_error(sums: Sums, strata: Ints | None = None) -> Floats:
    """[cell]: of the linearised ratio; NaN for one unit."""
    value = sums.value
    with np.errstate(divide="ignore", invalid="ignore"):
        left = sums.top - value[:, None] * sums.bottom
        if strata is None:
            spread = (left**2).sum(1) * sums.held / (sums.held - 1)
        else:
            spread = np.zeros(len(left))
            for stratum in range(strata.max() + 1):
                own = left[:, strata == stratum]
                spread += own.var(1, ddof=1) * own.shape[1]
        error = np.sqrt(spread) / np.abs(sums.bottom.sum(1))
        size = np.sqrt((sums.top**2).sum(1)) / np.abs(sums.bottom.sum(1))
        error = np.where(error <= FLAT * size, 0.0, error)
    return np.where(sums.held > 1, error, np.nan)


def studentise(sums: Sums, draws: Draws, columns: int | None = None) -> Studentised:
    """Bootstrap-t of cells: value, error, and their pivots under every resample.

    columns: numbers per resample that blocks of resamples are cut by; the same ones draw the same
    """
    value, strata = sums.value, draws.strata
    error = standard_error(sums, strata)
    with np.errstate(invalid="ignore"):
        left = np.nan_to_num(sums.top - value[:, None] * sums.bottom)
    plain = len(sums.bottom) == 1 and bool((sums.bottom == 1.0).all())
    found = [
        _pivots(weights, left, sums.bottom, sums.held, error, strata, plain)
        for weights in draws.weights(columns or 3 * len(left))
    ]
    empty = np.zeros((0, len(value)))
    return Studentised(value, error, np.concatenate(found) if found else empty, sums.held)


def _pivots(
    weights: Floats,
    left: Floats,
    bottom: Floats,
    held: Ints,
    error: Floats,
    strata: Ints | None,
    plain: bool,
) -> Floats:
    """[resample, cell]."""
    every = slice(None)
    members = (
        [every]
        if strata is None
        else [np.flatnonzero(strata == each) for each in range(int(strata.max()) + 1)]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = weights @ bottom.T
        moved = (weights @ left.T) / scale
        spread = np.zeros_like(moved)
        for own in members:
            drawn, rest = weights[:, own], left[:, own]
            squares = drawn @ (rest**2).T
            if plain:
                count = drawn.shape[1]
                along, both = drawn @ rest.T, np.float64(count)
            else:
                along, both = drawn @ (rest * bottom[:, own]).T, drawn @ (bottom[:, own] ** 2).T
            squares += moved * (moved * both - 2 * along)
            if strata is None:
                spread = squares
                continue
            count = drawn.shape[1]
            total = drawn @ rest.T - moved * (drawn @ bottom[:, own].T)
            spread += (squares - total**2 / count) * count / (count - 1)
        if strata is None:
            spread = spread * (held / (held - 1))
        spread = np.sqrt(np.maximum(spread, 0.0)) / np.abs(scale)
        flat = spread <= np.sqrt(FLAT) * error
        pivots = moved / np.where(flat, 0.0, spread)
        # nothing moved: no resample says that it does
        return np.where(flat & (np.abs(moved) <= FLAT * error), 0.0, pivots)


@dataclass(frozen=True, eq=False)
class Simultaneous:
    """Cells with intervals of their own, and with bounds that hold for all of them together."""

    value: Floats
    low: Floats
    high: Floats
    low_together: Floats
    """[cell]: all lie above theirs, with one-sided level (100 − confidence) / 2 %."""
    high_together: Floats


def simultaneous(sums: Sums, draws: Draws, confidence: float) -> Simultaneous:
    """Bounds by the largest and the smallest pivot of all cells in each resample; by Bonferroni and
    Student's t where the resamples don't tell. A cell that no unit moves has its value as bound."""
    cells = len(sums.top)
    greatest, least = np.full(draws.resamples, -np.inf), np.full(draws.resamples, np.inf)
    value, error, low, high = (np.full(cells, np.nan) for _ in range(4))
    width = max(1, min(cells, 2 * BLOCK // draws.resamples))
    for block in blocks(cells, 2 * BLOCK // width):
        found = studentise(sums.chosen(block), draws, columns=3 * width)
        value[block], error[block] = found.value, found.error
        low[block], high[block] = found.interval(confidence)
        pivots = np.nan_to_num(found.pivots[:, found.error > 0], nan=0.0)
        if pivots.shape[1]:
            greatest = np.maximum(greatest, pivots.max(1))
            least = np.minimum(least, pivots.min(1))
    moving = error > 0
    held = sums.held[moving]
    if not len(held):
        return Simultaneous(value, low, high, low, high)
    upper, lower = _together(greatest, least, held, confidence)
    return Simultaneous(
        value,
        low,
        high,
        np.where(np.isnan(low), np.nan, np.where(moving, value - upper * error, value)),
        np.where(np.isnan(low), np.nan, np.where(moving, value - lower * error, value)),
    )


def _together(
    greatest: Floats, least: Floats, held: Ints, confidence: float
) -> tuple[float, float]:
    """The pivots that the greatest stays under and the least over."""
    tail = (100.0 - confidence) / 2
    units = held.min()
    if units >= FEWEST_RESAMPLED:
        with np.errstate(invalid="ignore"):
            upper, lower = np.percentile(greatest, 100 - tail), np.percentile(least, tail)
        if np.isfinite(upper) and np.isfinite(lower):
            t = float(student(confidence, units[None])[0])
            return max(float(upper), t), min(float(lower), -t)
    t = float(student(100 - 2 * tail / len(held), units[None])[0])
    return t, -t
