"""Intervals of means and ratios: bootstrap-t over units, or Student's t where that is wider.

A cell's error is that of its linearised ratio (Cochran 1977, section 6), computed anew in every
resample, so that what is resampled is a pivot: Efron and Tibshirani 1993, chapter 12; Hall 1988.
Percentiles of the mean itself are too narrow for few units (at 8, 89 % instead of 95 %), and the
bootstrap-t alone is for heavy tails (t with 3 degrees of freedom: 93 %), which is why each end is
the farther of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.units import BLOCK, Draws, blocks
from mechdsl.validate.reachable_p import FEWEST_UNITS

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
    """[resample, cell]: (resampled − value) / resampled error; NaN where no drawn unit differs, as
    that resample tells nothing of the error."""
    held: Ints
    """[cell]: units."""
    strata: int = 1
    """How many of them there are: each has a mean of its own."""

    @property
    def freedom(self) -> Ints:
        """[cell]: degrees of freedom."""
        return self.held - self.strata

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """[cell] each: NaN below `FEWEST_UNITS`."""
        tail = (100.0 - confidence) / 2
        lower, upper = percentiles(self.pivots, (tail, 100.0 - tail))
        t = student(confidence, self.freedom + 1)
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

    def p(self) -> tuple[Floats, Bools]:
        """[cell]: two-sided, by inversion of the interval; and whether it is the least that so many
        resamples give. 1 where the value is 0, and of one unit."""
        own = self.ratio
        known = np.count_nonzero(~np.isnan(self.pivots), axis=0)
        above = np.count_nonzero(self.pivots >= own, axis=0)
        below = np.count_nonzero(self.pivots <= own, axis=0)
        return self.p_of(np.minimum(above, below), known)

    def p_of(self, beyond: Ints, known: Ints) -> tuple[Floats, Bools]:
        """The same. beyond: [cell], how many pivots, of those `known`, are as far out."""
        from scipy.special import stdtr  # not at the top: slow to import

        resampled = np.where(self.held >= FEWEST_RESAMPLED, (beyond + 1) / (known + 1), 0.0)
        by_t = stdtr(np.maximum(self.freedom, 1), -np.abs(self.ratio))
        p = np.minimum(1.0, 2 * np.maximum(resampled, by_t))
        # so often all units have the same sign by chance, and no spread of theirs says otherwise
        by_sign = 2.0 ** (1.0 - self.held)
        least = (beyond == 0) & (resampled > by_t) & (p > by_sign) & (self.error != 0)
        p = np.maximum(by_sign, p)
        none = (self.value == 0) | np.isnan(self.error)
        return np.where(none, 1.0, p), least & ~none


def percentiles(samples: Floats, ends: tuple[float, float]) -> tuple[Floats, Floats]:
    """Over the first axis, NaN left out; NaN where nothing else is there, or where an end is
    infinite."""
    if not len(samples):
        nothing = np.full(samples.shape[1:], np.nan)
        return nothing, nothing
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


def student(confidence: float | Floats, units: Ints) -> Floats:
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


def studentise(sums: Sums, draws: Draws) -> Studentised:
    """Bootstrap-t of cells: value, error, and their pivots under every resample."""
    value, error = sums.value, standard_error(sums, draws.strata)
    found = list(pivots(sums, draws))
    every = np.concatenate(found) if found else np.zeros((0, len(value)))
    return Studentised(value, error, every, sums.held, draws.count)


def pivots(sums: Sums, draws: Draws) -> Iterator[Floats]:
    """[resample, cell] in blocks of resamples."""
    value, strata = sums.value, draws.strata
    error = standard_error(sums, strata)
    with np.errstate(invalid="ignore"):
        left = sums.top - value[:, None] * sums.bottom
    left = np.where(np.isfinite(value)[:, None], left, 0.0)
    plain = len(sums.bottom) == 1 and bool((sums.bottom == 1.0).all())
    for weights in draws.weights(3 * len(left)):
        yield _pivots(weights, left, sums.bottom, sums.held, error, strata, plain)


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
        return pivot(moved, spread, error)


def pivot(moved: Floats, spread: Floats, error: Floats) -> Floats:
    """[resample, cell]: NaN where no drawn unit differs; 0 where none differs at all, as nothing
    moves then."""
    flat = spread <= np.sqrt(FLAT) * error
    return np.where(error == 0, 0.0, moved / np.where(flat, np.nan, spread))


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
    """Bounds by the largest and the smallest pivot of all cells in each resample, at least by
    Student's t; by Bonferroni and Student's t where the resamples don't tell. A cell that no unit
    moves has its value as bound; one below `FEWEST_UNITS` has none, and the others don't ask it."""
    cells = len(sums.top)
    greatest, least = np.full(draws.resamples, -np.inf), np.full(draws.resamples, np.inf)
    blind = np.zeros(draws.resamples, dtype=bool)
    value, error, low, high = (np.full(cells, np.nan) for _ in range(4))
    width = max(1, min(cells, 2 * BLOCK // draws.resamples))
    for block in blocks(cells, 2 * BLOCK // width):
        found = studentise(sums.chosen(block), draws)
        value[block], error[block] = found.value, found.error
        low[block], high[block] = found.interval(confidence)
        own = found.pivots[:, (found.error > 0) & ~np.isnan(low[block])]
        if own.shape[1]:
            blind |= np.isnan(own).any(1)
            own = np.nan_to_num(own, nan=0.0)
            greatest = np.maximum(greatest, own.max(1))
            least = np.minimum(least, own.min(1))
    moving = (error > 0) & ~np.isnan(low)
    if not moving.any():
        return Simultaneous(value, low, high, low, high)
    held, tail = sums.held[moving], (100.0 - confidence) / 2
    units = held[None].min(1) - draws.count + 1
    alone, each = (float(student(100 - 2 * tail / m, units)[0]) for m in (1, len(held)))
    if held.min() < FEWEST_RESAMPLED:
        upper, lower = each, -each
    else:
        # where too many resamples say nothing of some cell, Bonferroni's bound holds
        least_t = each if 100 * blind.mean() > tail else alone
        upper = max(float(np.percentile(greatest, 100 - tail)), least_t)
        lower = min(float(np.percentile(least, tail)), -least_t)
    return Simultaneous(
        value,
        low,
        high,
        np.where(np.isnan(low), np.nan, np.where(moving, value - upper * error, value)),
        np.where(np.isnan(low), np.nan, np.where(moving, value - lower * error, value)),
    )
