"""Intervals and p-values: bootstrap-t over units, exact limits of shares, sign flips.

A cell's error is that of its linearised ratio (Cochran 1977, section 6), recomputed in every
resample, so that a pivot is resampled: Efron and Tibshirani 1993, chapter 12; Hall 1988.
Percentiles of the mean itself are too narrow for few units (at 8 units, 89 % instead of 95 %), and
bootstrap-t alone is too narrow for heavy tails (t with 3 degrees of freedom: 93 %). So each end of
an interval is the farther one of bootstrap-t's and Student's t's.

Sign flips (Fisher 1935) are exact if, without an effect, the delta of a unit is d or −d with equal
probability; `stats test t` doesn't assume that. The units whose sign a flip changes are a subset,
and the sum of a flip is as far from 0 as the observed one where the mean of that subset has another
sign. So the means of subsets are the ends of the intervals at all levels (Hartigan 1969), and p and
interval agree.

Student's t corrected for skewness needs no resampling. A number θ is compatible with the units u of
a cell if the mean of Aᵤ − θBᵤ is compatible with 0 (Fieller 1954), where A and B are the sums of
numerator and denominator over the unit's rows. T is the t statistic of that mean and a its
standardised third cumulant. For a quantile q of Student's t, T is compared with q + h (2q² + 1) / 6
+ 0.4 h² q³: the quantile of a studentised mean of skewness h (Hall 1983), with a third term. h is
the part of a that is evidence against the effect, enlarged, because a sample of skewed units
understates its skewness exactly where its mean is misleading. The constants were chosen by
simulation (`benchmarks/coverage`): from 16 units on, they control the level of a family of 144
cells of lognormal units. The interval is the set of all θ whose p is not below the level. p of θ =
0 is at least 2^(1 − k) for k units that aren't 0, the probability that all of them have the same
sign by chance.

References:
    Fieller, E. C. (1954). Some problems in interval estimation. J. R. Stat. Soc. B 16, 175-185.
    Hall, P. (1983). Inverting an Edgeworth expansion. Ann. Stat. 11, 569-576.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import ceil

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.program.significance import MAX_EXACT_FLIPS, MAX_RESAMPLES, MIN_UNITS
from mechdsl.statistics.measurements import BLOCK_NUMBERS, EffectSums, Resamples, cell_blocks

MIN_RESAMPLED_UNITS = 8
"""Minimum number of units for resampling; below it, Student's t is used, because resamples of so
few units are too often of a single one."""

FLAT_VARIANCE = 1e-10
"""Variances below this share of the squared value are rounding."""


@dataclass(frozen=True, eq=False)
class StudentisedCells:
    """Cells with their standard errors, and the changes of both in every resample."""

    value: Floats
    """Shape [cell]."""
    error: Floats
    """Standard error, shape [cell]; NaN for one unit, 0 if all units are equal."""
    pivots: Floats
    """(resampled − value) / resampled error, shape [resample, cell]; NaN if all drawn units are
    equal, because the resample has no information on the error."""
    held: Ints
    """Number of units, shape [cell]."""
    strata: int = 1
    """Number of strata, each with a separate mean."""

    @property
    def freedom(self) -> Ints:
        """Degrees of freedom, shape [cell]."""
        return self.held - self.strata

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """Return the interval, NaN below `MIN_UNITS`. Shape [cell] each."""
        tail = (100.0 - confidence) / 2
        lower, upper = percentiles(self.pivots, (tail, 100.0 - tail))
        t = student_quantile(confidence, self.freedom + 1)
        with np.errstate(invalid="ignore"):
            low = self.value - self.error * self._farther(upper, t)
            high = self.value + self.error * self._farther(-lower, t)
        flat = self.error == 0
        low, high = np.where(flat, self.value, low), np.where(flat, self.value, high)
        few = (self.held < MIN_UNITS) | ~np.isfinite(self.value)
        return np.where(few, np.nan, low), np.where(few, np.nan, high)

    def _farther(self, resampled: Floats, t: Floats) -> Floats:
        """Return the distance of an end in errors: by the resamples if available, at least by t."""
        known = np.isfinite(resampled) & (self.held >= MIN_RESAMPLED_UNITS)
        return np.where(known, np.maximum(resampled, t), t)

    @property
    def ratio(self) -> Floats:
        """The value divided by its error, shape [cell]; 0 for a value of 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.value == 0, 0.0, self.value / self.error)

    def p(self) -> tuple[Floats, Bools]:
        """Return two-sided p by inversion of the interval, shape [cell], and whether it is the
        smallest value for this number of resamples. p is 1 for a value of 0 and for one unit."""
        ratio = self.ratio
        known = np.count_nonzero(~np.isnan(self.pivots), axis=0)
        above = np.count_nonzero(self.pivots >= ratio, axis=0)
        below = np.count_nonzero(self.pivots <= ratio, axis=0)
        return self.p_of(np.minimum(above, below), known)

    def p_of(self, beyond: Ints, known: Ints) -> tuple[Floats, Bools]:
        """Return p from `beyond`, how many of the `known` pivots are as extreme, shape [cell]."""
        from scipy.special import stdtr  # not at the top: slow to import

        resampled = np.where(self.held >= MIN_RESAMPLED_UNITS, (beyond + 1) / (known + 1), 0.0)
        by_t = stdtr(np.maximum(self.freedom, 1), -np.abs(self.ratio))
        p = np.minimum(1.0, 2 * np.maximum(resampled, by_t))
        # The probability that all units have the same sign by chance, whatever their spread.
        by_sign = 2.0 ** (1.0 - self.held)
        least = (beyond == 0) & (resampled > by_t) & (p > by_sign) & (self.error != 0)
        p = np.maximum(by_sign, p)
        none = (self.value == 0) | np.isnan(self.error)
        return np.where(none, 1.0, p), least & ~none


def percentiles(samples: Floats, ends: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return percentiles over the first axis, ignoring NaN; NaN if nothing else exists, or if an
    end is infinite."""
    if not len(samples):
        nothing = np.full(samples.shape[1:], np.nan)
        return nothing, nothing
    columns = np.array(samples.T)  # a copy by cell, partitioned in place: twice as fast
    missing = np.isnan(columns)
    with np.errstate(invalid="ignore"):
        if not missing.any():
            low, high = np.percentile(columns, ends, axis=-1, overwrite_input=True)
            return low, high
        none = missing.all(axis=-1)
        columns[none] = 0.0  # avoids numpy's warning about cells without a number
        low, high = np.nanpercentile(columns, ends, axis=-1)
    return np.where(none, np.nan, low), np.where(none, np.nan, high)


def seed_half_width(values: Floats, confidence: float) -> float:
    """Return half the width of the interval of the mean over trainings, by Student's t.

    Args:
        values: The mean of each training, shape [seed].
        confidence: In percent.

    Returns:
        NaN below `MIN_UNITS` trainings, which don't show how often a training fails, and if all
        values are equal.
    """
    error = float(values.std(ddof=1)) / np.sqrt(len(values))
    t = float(student_quantile(confidence, np.array([len(values)]))[0])
    return float(error * t) if error and len(values) >= MIN_UNITS else float("nan")


def student_quantile(confidence: float | Floats, units: Ints) -> Floats:
    """Return the quantile of Student's t, NaN for one unit. Shape [cell]."""
    from scipy.special import stdtrit  # not at the top: slow to import

    freedom = np.maximum(units - 1, 1).astype(np.float64)
    return np.where(units > 1, stdtrit(freedom, 0.5 + confidence / 200), np.nan)


def standard_error(sums: EffectSums, strata: Ints | None = None) -> Floats:
    """Return the standard error of the linearised ratio, NaN for one unit. Shape [cell]."""
    value = sums.value
    with np.errstate(divide="ignore", invalid="ignore"):
        left = sums.top - value[:, None] * sums.bottom
        if strata is None:
            spread = (left**2).sum(1) * sums.held / (sums.held - 1)
        else:
            spread = np.zeros(len(left))
            for stratum in range(strata.max() + 1):
                values = left[:, strata == stratum]
                spread += values.var(1, ddof=1) * values.shape[1]
        error = np.sqrt(spread) / np.abs(sums.bottom.sum(1))
        size = np.sqrt((sums.top**2).sum(1)) / np.abs(sums.bottom.sum(1))
        error = np.where(error <= FLAT_VARIANCE * size, 0.0, error)
    return np.where(sums.held > 1, error, np.nan)


def studentise(sums: EffectSums, draws: Resamples) -> StudentisedCells:
    """Compute bootstrap-t of cells: value, error, and their pivots under every resample."""
    value, error = sums.value, standard_error(sums, draws.strata)
    pivots = list(resampled_pivots(sums, draws))
    every = np.concatenate(pivots) if pivots else np.zeros((0, len(value)))
    return StudentisedCells(value, error, every, sums.held, draws.count)


def resampled_pivots(sums: EffectSums, draws: Resamples) -> Iterator[Floats]:
    """Yield pivots of shape [resample, cell] in blocks of resamples."""
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
    """Return pivots of shape [resample, cell]."""
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
        for member in members:
            drawn, rest = weights[:, member], left[:, member]
            squares = drawn @ (rest**2).T
            if plain:
                count = drawn.shape[1]
                along, both = drawn @ rest.T, np.float64(count)
            else:
                along, both = (
                    drawn @ (rest * bottom[:, member]).T,
                    drawn @ (bottom[:, member] ** 2).T,
                )
            squares += moved * (moved * both - 2 * along)
            if strata is None:
                spread = squares
                continue
            count = drawn.shape[1]
            total = drawn @ rest.T - moved * (drawn @ bottom[:, member].T)
            spread += (squares - total**2 / count) * count / (count - 1)
        if strata is None:
            spread = spread * (held / (held - 1))
        spread = np.sqrt(np.maximum(spread, 0.0)) / np.abs(scale)
        return studentised_pivot(moved, spread, error)


def studentised_pivot(moved: Floats, spread: Floats, error: Floats) -> Floats:
    """Return pivots of shape [resample, cell]: NaN if all drawn units are equal; 0 if all units
    are, because nothing changes then."""
    flat = spread <= np.sqrt(FLAT_VARIANCE) * error
    return np.where(error == 0, 0.0, moved / np.where(flat, np.nan, spread))


@dataclass(frozen=True, eq=False)
class SimultaneousBounds:
    """Cells with separate intervals, and with simultaneous bounds."""

    value: Floats
    low: Floats
    high: Floats
    low_together: Floats
    """Shape [cell]: all cells exceed theirs, at a one-sided level of (100 − confidence) / 2 %."""
    high_together: Floats

    def within(self, limits: tuple[float, float] | None) -> SimultaneousBounds:
        """Return the bounds cut to the range of the values, if it is known."""
        if limits is None:
            return self
        bounds = (self.low, self.high, self.low_together, self.high_together)
        return SimultaneousBounds(self.value, *(np.clip(bound, *limits) for bound in bounds))


def simultaneous_bounds(
    sums: EffectSums, draws: Resamples, confidence: float
) -> SimultaneousBounds:
    """Compute simultaneous bounds by the largest and the smallest pivot of all cells in each
    resample, at least by Student's t. If the resamples are uninformative, Bonferroni and Student's
    t are used. A cell without variation has its value as bound; one below `MIN_UNITS` has none
    and doesn't affect the others."""
    cells = len(sums.top)
    greatest, least = np.full(draws.resamples, -np.inf), np.full(draws.resamples, np.inf)
    blind = np.zeros(draws.resamples, dtype=bool)
    value, error, low, high = (np.full(cells, np.nan) for _ in range(4))
    width = max(1, min(cells, 2 * BLOCK_NUMBERS // draws.resamples))
    for block in cell_blocks(cells, 2 * BLOCK_NUMBERS // width):
        studentised_cells = studentise(sums.chosen(block), draws)
        value[block], error[block] = studentised_cells.value, studentised_cells.error
        low[block], high[block] = studentised_cells.interval(confidence)
        values = studentised_cells.pivots[:, (studentised_cells.error > 0) & ~np.isnan(low[block])]
        if values.shape[1]:
            blind |= np.isnan(values).any(1)
            values = np.nan_to_num(values, nan=0.0)
            greatest = np.maximum(greatest, values.max(1))
            least = np.minimum(least, values.min(1))
    moving = (error > 0) & ~np.isnan(low)
    if not moving.any():
        return SimultaneousBounds(value, low, high, low, high)
    held, tail = sums.held[moving], (100.0 - confidence) / 2
    units = held[None].min(1) - draws.count + 1
    alone, each = (float(student_quantile(100 - 2 * tail / m, units)[0]) for m in (1, len(held)))
    if held.min() < MIN_RESAMPLED_UNITS:
        upper, lower = each, -each
    else:
        # If too many resamples are uninformative for some cell, use Bonferroni's bound.
        least_t = each if 100 * blind.mean() > tail else alone
        upper = max(float(np.percentile(greatest, 100 - tail)), least_t)
        lower = min(float(np.percentile(least, tail)), -least_t)
    return SimultaneousBounds(
        value,
        low,
        high,
        np.where(np.isnan(low), np.nan, np.where(moving, value - upper * error, value)),
        np.where(np.isnan(low), np.nan, np.where(moving, value - lower * error, value)),
    )


def clopper_pearson(right: Floats, n: Floats, confidence: float | Floats) -> tuple[Floats, Floats]:
    """Return the exact interval of `right` out of `n` (Clopper and Pearson 1934); neither needs to
    be a whole number."""
    from scipy.special import betaincinv  # not at the top: slow to import

    tail = (100.0 - confidence) / 200
    with np.errstate(invalid="ignore"):
        low = np.where(right <= 0, 0.0, betaincinv(np.maximum(right, 1e-9), n - right + 1, tail))
        high = np.where(
            right >= n, 1.0, betaincinv(right + 1, np.maximum(n - right, 1e-9), 1 - tail)
        )
    return low, high


def effective_sample_size(sums: EffectSums, rows: Ints, confidence: float | Floats) -> Floats:
    """Return the number of independent rows with the same information on a share. Shape [cell].

    Korn and Graubard 1998: p(1 − p) over the squared standard error, adjusted by the degrees of
    freedom of rows and units; at most the number of rows, and the number of units if all rows are
    equal.
    """
    value, error = sums.value, standard_error(sums)
    alone = sums.held == rows
    with np.errstate(divide="ignore", invalid="ignore"):
        size = value * (1 - value) / error**2
        size = (
            size
            * (student_quantile(confidence, rows) / student_quantile(confidence, sums.held)) ** 2
        )
    size = np.where(np.isnan(size), sums.held, size)
    return np.where(alone, rows, np.minimum(size, rows))


def share_interval(
    sums: EffectSums, rows: Ints, confidence: float | Floats
) -> tuple[Floats, Floats]:
    """Return the interval of a share of rows; if units are several rows, none below `MIN_UNITS`.

    Args:
        sums: Sums of 0 or 1 per row.
        rows: Number of rows, shape [cell].

    Returns:
        Shape [cell] each.
    """
    n = effective_sample_size(sums, rows, confidence)
    with np.errstate(invalid="ignore"):
        low, high = clopper_pearson(sums.value * n, n, confidence)
    known = (rows > 0) & ((sums.held == rows) | (sums.held >= MIN_UNITS))
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def share_difference(
    patched: EffectSums,
    base: EffectSums,
    rows: Ints,
    confidence: float | Floats,
    base_rows: Ints | None = None,
) -> tuple[Floats, Floats]:
    """Return the interval of the difference of two shares on the same rows, from the exact limits
    of both and their correlation with a correction for continuity (Newcombe 1998, method 10; Zou
    and Donner 2008). Shape [cell] each. On different rows (`base_rows`) the correlation is 0."""
    low, high = share_interval(patched, rows, confidence)
    other_low, other_high = share_interval(
        base, rows if base_rows is None else base_rows, confidence
    )
    one, two = patched.value, base.value
    with np.errstate(divide="ignore", invalid="ignore"):
        left = patched.top - one[:, None] * patched.bottom
        right = base.top - two[:, None] * base.bottom
        together = (left * right).sum(1) / np.sqrt((left**2).sum(1) * (right**2).sum(1))
        # Without the correction for continuity, two equal shares of 0.5 have the interval [0, 0].
        spread = np.sqrt(one * (1 - one) * two * (1 - two))
        corrected = np.maximum(together - 1 / (2 * patched.held * spread), 0.0)
        together = np.nan_to_num(np.where(together > 0, corrected, together))
        a, b = one - low, other_high - two
        c, d = high - one, two - other_low
        lower = one - two - np.sqrt(np.maximum(a**2 - 2 * together * a * b + b**2, 0.0))
        upper = one - two + np.sqrt(np.maximum(c**2 - 2 * together * c * d + d**2, 0.0))
    return lower, upper


MIN_FLIPS = 10_000

FLIPS_PER_TEST = 4
"""Number of random flips per test, divided by the level: a cell can have three flips as extreme as
the observed sum and remain significant."""


@dataclass(frozen=True, eq=False)
class SignFlipResult:
    """Result of sign flips, as arrays over cells."""

    p: Floats
    """In (0, 1]; 1 for a value of 0."""
    floor: Bools
    """Whether p is the smallest value for this number of flips, and may be smaller."""
    low: Floats
    """−infinity if the flips give no bound."""
    high: Floats


def flip_count(tests: int, level: float) -> int:
    """Return the number of random flips for this number of cells, so that a p can be small enough,
    up to `MAX_RESAMPLES`."""
    return min(MAX_RESAMPLES, max(MIN_FLIPS, ceil(FLIPS_PER_TEST * tests / level)))


def sign_flip_inference(
    sums: EffectSums, flips: int, seed: int, confidence: float
) -> SignFlipResult:
    """Compute two-sided p and interval of each cell.

    Args:
        sums: Effects of the cells; units that aren't part of a cell have sums of 0.
        flips: Number of random flips, for cells with more than `MAX_EXACT_FLIPS` units.
        seed: Seed of the random flips.
        confidence: In percent.
    """
    cells = len(sums.top)
    result = SignFlipResult(
        np.ones(cells), np.zeros(cells, dtype=bool), np.full(cells, -np.inf), np.full(cells, np.inf)
    )
    used = np.flatnonzero((sums.top != 0).any(0) | (sums.bottom != 0).any(0))
    exact = len(used) <= MAX_EXACT_FLIPS
    count = 2 ** len(used) - 1 if exact else flips
    tail = (100 - confidence) / 200
    for block in cell_blocks(cells, count):
        effect_sums = sums.chosen(block)
        bottom = np.broadcast_to(effect_sums.bottom, effect_sums.top.shape)
        subsets = _every_subset(len(used)) if exact else _random_subsets(len(used), flips, seed)
        means = np.concatenate(
            [_subset_means(chosen, effect_sums.top[:, used], bottom[:, used]) for chosen in subsets]
        )
        _fill(result, block, means, effect_sums.value, tail, exact)
    return result


def _subset_means(chosen: Floats, top: Floats, bottom: Floats) -> Floats:
    """Return subset means, NaN if a subset's denominator doesn't have the sign of the whole
    denominator. Shape [subset, cell]."""
    below = chosen @ bottom.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below * np.sign(bottom.sum(1)) > 0, chosen @ top.T / below, np.nan)


def _fill(
    result: SignFlipResult, block: slice, means: Floats, value: Floats, tail: float, exact: bool
) -> None:
    """Fill the results from `means` [subset, cell]; NaN is maximally extreme on both sides."""
    count = len(means) + 1  # including the flip that changes no sign
    lowest = np.sort(np.nan_to_num(means, nan=-np.inf), axis=0)
    highest = np.sort(np.nan_to_num(means, nan=np.inf), axis=0)
    # Equal means may differ by rounding, so relax the bound.
    slack = 1e-9 * np.abs(value)
    below = np.count_nonzero(lowest <= slack, axis=0)
    above = np.count_nonzero(highest >= -slack, axis=0)
    beyond = np.where(value > 0, below, above)
    result.p[block] = np.where(value == 0, 1.0, np.minimum(1.0, 2 * (1 + beyond) / count))
    if not exact:
        result.floor[block] = (beyond == 0) & (value != 0)
    outside = ceil(tail * count) - 1
    if outside > 0:
        result.low[block], result.high[block] = lowest[outside - 1], highest[-outside]


def _every_subset(width: int) -> Iterator[Floats]:
    """Yield all subsets except the empty one as 0 and 1. Shape [subset, unit]."""
    codes = np.arange(1, 2**width)
    yield ((codes[:, None] >> np.arange(width)[None, :]) & 1).astype(np.float64)


def _random_subsets(units: int, flips: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng([2, seed % 2**63])
    # numpy draws four small numbers at once and discards the rest of a call.
    step = max(4, BLOCK_NUMBERS // units // 4 * 4)
    for start in range(0, flips, step):
        yield random.integers(0, 2, (min(step, flips - start), units), dtype=np.int8).astype(float)


def joint_sign_flip_p(deltas: Floats, flips: int, seed: int) -> Floats:
    """Compute p of several sums together: the share of flips whose largest sum is as large.

    Args:
        deltas: Shape [sum, unit].
        flips: Number of random flips, for more than `MAX_EXACT_FLIPS` units.
        seed: Seed of the random flips.

    Returns:
        p corrected by the distribution of the largest sum divided by its root of squares (Westfall
        and Young 1993, algorithm 4.1). Shape [sum].
    """
    size = np.sqrt((deltas**2).sum(1))
    unit = deltas / np.where(size > 0, size, 1.0)[:, None]
    own = np.abs(unit.sum(1))
    order = np.argsort(-own, kind="stable")
    unit, own = unit[order], own[order]
    used = np.flatnonzero(np.any(deltas != 0, axis=0))
    exact = len(used) <= MAX_EXACT_FLIPS
    subsets = _every_subset(len(used)) if exact else _random_subsets(len(used), flips, seed)
    extreme, count = np.zeros(len(own), dtype=np.int64), 1
    for chosen in subsets:
        sums = np.abs((1 - 2 * chosen) @ unit[:, used].T)
        largest = np.maximum.accumulate(sums[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= own * (1 - 1e-9), axis=0)
        count += len(chosen)
    p = (extreme + 1) / count
    sums = np.empty_like(p)
    sums[order] = np.maximum.accumulate(p)
    return np.where(size > 0, sums, 1.0)


SKEWNESS_FACTOR = 1.4
"""Factor on the measured skewness where it is evidence against an effect."""

BASE_SKEWNESS = 1.0
"""Skewness of the sum against every effect, times the number of units."""

FREEDOM_SHARE = 0.45
"""Share of the degrees of freedom in the corrected quantiles, from 16 units on. With fewer units,
whose p can't be so small, it rises to 1 at 8."""

FREEDOM_RISE = 0.07

CURVATURE = 0.4
"""Coefficient of the third term of the corrected quantile."""

FLAT_ERROR = 1e-10
"""Standard errors below this share of the value are rounding."""

_DOUBLINGS = 60
"""Steps of the search for a number that isn't compatible with the units."""

_HALVINGS = 64
"""Steps of the search for the end of an interval, to the precision of a float."""

_NEWTON_STEPS = 40
"""Steps of the search for a statistic's quantile, from above, because the function is convex."""


@dataclass(frozen=True, eq=False)
class SkewedT:
    """Means or ratios of cells, with central moments of numerators and denominators.

    Attributes:
        value: The estimate, shape [cell].
        held: Number of units in the cell, shape [cell].
        nonzero: Number of units with a non-zero numerator, shape [cell].
        flat: Whether all units agree on the value, shape [cell].
        freedom: Degrees of freedom, shape [cell].
        slope: Sum of all denominators, shape [cell].
        squares: Σ (l − δb)² as a polynomial in δ: coefficients of 1, δ, δ², shape [3, cell]; l is
            numerators minus value × denominators, b denominators, both centred within strata.
        cubes: The third cumulant of Σ (l − δb) as a polynomial in δ, shape [4, cell].
    """

    value: Floats
    held: Ints
    nonzero: Ints
    flat: Bools
    freedom: Floats
    slope: Floats
    squares: Floats
    cubes: Floats

    def statistic(self, shift: Floats) -> tuple[Floats, Floats]:
        """Return T and its standardised third cumulant for the hypothesis θ = value + shift.

        Args:
            shift: Shape [cell].

        Returns:
            Shape [cell] each.
        """
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            spread = np.maximum(_polynomial(self.squares, shift), 0.0)
            ratio = -shift * self.slope / np.sqrt(spread)
            skew = _polynomial(self.cubes, shift) / spread**1.5
        return ratio, np.where(np.isfinite(skew), skew, 0.0)

    def p(self) -> Floats:
        """Return two-sided p of θ = 0, shape [cell]: 1 for a value of 0 or one unit, NaN for
        none."""
        p = np.maximum(self.p_of(np.zeros_like(self.value)), 2.0 ** (1.0 - self.nonzero))
        p = np.where(self.flat, 2.0 ** (1.0 - self.held), p)
        unknown = (self.value == 0) | (self.held < 2)
        p = np.where(unknown, 1.0, np.minimum(p, 1.0))
        return np.where(np.isfinite(self.value), p, np.nan)

    def p_of(self, theta: Floats) -> Floats:
        """Return two-sided p of the hypothesis `theta`, shape [cell]. Shape [cell]."""
        from scipy.special import stdtr  # not at the top: slow to import

        ratio, skew = self.statistic(theta - self.value)
        freedom = np.maximum(self.freedom, 1.0)
        size = np.abs(ratio)
        plain = 2 * stdtr(freedom, -size)
        against = _against(ratio, skew, freedom)
        corrected = 2 * stdtr(_tail_freedom(freedom), -_quantile(size, against))
        return np.where(np.isnan(ratio), 1.0, np.maximum(plain, corrected))

    def interval(self, confidence: float, fewest: int) -> tuple[Floats, Floats]:
        """Return the numbers whose p isn't below the level.

        Args:
            confidence: In percent.
            fewest: Minimum number of units for an interval.

        Returns:
            The low and the high end, shape [cell] each: NaN if the cell has too few units, or if
            the set is unbounded, as with a denominator that may be 0.
        """
        level = 1 - confidence / 100
        known = (self.held >= fewest) & np.isfinite(self.value)
        low, high = (np.where(self.flat, self.value, end) for end in self._ends(level))
        known &= np.isfinite(low) & np.isfinite(high)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)

    def _ends(self, level: float) -> tuple[Floats, Floats]:
        """Return both ends, infinite if there is none. Shape [cell] each."""
        bounds = self._critical(level)
        low, high = (self._straight_end(side, bounds) for side in (-1.0, 1.0))
        curved = np.flatnonzero(self.squares[1:].any(axis=0) | self.cubes[1:].any(axis=0))
        if len(curved):
            twice, sides = np.tile(curved, 2), np.repeat([-1.0, 1.0], len(curved))
            ends = self._of(twice)._searched_end(sides, (bounds[0][twice], bounds[1][twice]))
            low[curved], high[curved] = np.split(ends, 2)
        return low, high

    def _straight_end(self, side: float, bounds: tuple[Floats, Floats]) -> Floats:
        """Return one end where T is proportional to the shift and the skewness doesn't depend on
        it, as with equal denominators. Shape [cell]."""
        plain, tail = bounds
        with np.errstate(divide="ignore", invalid="ignore"):
            _, skew = self.statistic(np.full_like(self.value, side))
            against = _against(np.sign(-side * self.slope), skew, np.maximum(self.freedom, 1.0))
            size = np.sqrt(self.squares[0]) / np.abs(self.slope)
            return self.value + side * size * np.maximum(plain, _corrected(tail, against))

    def _of(self, cells: Ints) -> SkewedT:
        """Select some cells."""
        columns = {field.name: getattr(self, field.name)[..., cells] for field in fields(self)}
        return SkewedT(**columns)

    def _searched_end(self, side: Floats, bounds: tuple[Floats, Floats]) -> Floats:
        """Return one end by bisection of a compatible and an incompatible number. Shape [cell].

        Args:
            side: -1 for the low end, 1 for the high end, shape [cell].
            bounds: The quantiles of `_critical`, shape [cell] each.
        """
        # 0 is inside exactly if it isn't rejected, even if a number nearer to the value is.
        faces_zero, rejects_zero = side * self.value < 0, self._rejects(-self.value, bounds)
        inside = np.where(faces_zero & ~rejects_zero, -self.value, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            size = np.sqrt(self.squares[0]) / np.abs(self.slope)
            outside = side * np.where(size > 0, size, np.abs(self.value) + 1.0)
        rejected = faces_zero & rejects_zero
        outside = np.where(rejected, -self.value, inside + outside)
        for _ in range(_DOUBLINGS):
            fresh = ~rejected & self._rejects(outside, bounds)
            rejected |= fresh
            if rejected.all():
                break
            inside = np.where(rejected, inside, outside)
            outside = np.where(rejected, outside, 2 * outside)
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            out = self._rejects(middle, bounds)
            inside, outside = np.where(out, inside, middle), np.where(out, middle, outside)
        with np.errstate(invalid="ignore"):
            return np.where(rejected, self.value + inside, side * np.inf)

    def _critical(self, level: float) -> tuple[Floats, Floats]:
        """Return Student's quantile and the corrected quantile. Shape [cell] each."""
        from scipy.special import stdtrit  # not at the top: slow to import

        freedom = np.maximum(self.freedom, 1.0)
        plain = np.asarray(stdtrit(freedom, 1 - level / 2), dtype=np.float64)
        return plain, np.asarray(stdtrit(_tail_freedom(freedom), 1 - level / 2), dtype=np.float64)

    def _rejects(self, shift: Floats, quantiles: tuple[Floats, Floats]) -> Bools:
        ratio, skew = self.statistic(shift)
        against = _against(ratio, skew, np.maximum(self.freedom, 1.0))
        return np.abs(ratio) > np.maximum(quantiles[0], _corrected(quantiles[1], against))


def skewed_t(sums: EffectSums, strata: Ints | None = None) -> SkewedT:
    """Return the statistic of cells that are sums over units.

    Args:
        sums: Numerators and denominators by unit.
        strata: Shape [unit], if new samples have the same number of units in each; then every cell
            has
            all units.
    """
    value = sums.value
    with np.errstate(invalid="ignore"):
        left = sums.top - value[:, None] * sums.bottom
    left = np.where(np.isfinite(left), left, 0.0)
    bottom = np.broadcast_to(sums.bottom, left.shape)
    squares, cubes = _moments(left, bottom, sums.held, strata)
    size = np.sqrt((sums.top**2).sum(1))
    return SkewedT(
        value=value,
        held=sums.held,
        nonzero=np.count_nonzero(sums.top, axis=1),
        flat=equal_units(sums, left) | (np.sqrt(squares[0]) <= FLAT_ERROR * size) & (sums.held > 1),
        freedom=(sums.held - _strata_count(strata)).astype(np.float64),
        slope=bottom.sum(1),
        squares=squares,
        cubes=cubes,
    )


def equal_units(sums: EffectSums, left: Floats) -> Bools:
    """Return whether all units of a cell have the same value within rounding, shape [cell].

    Args:
        sums: Numerators and denominators by unit.
        left: Numerators minus the cell's value times denominators, shape [cell, unit].
    """
    return (np.abs(left) <= sums.rounding).all(axis=1) & (sums.held > 1)


def equal_value_inference(
    value: Floats, held: Ints, limits: tuple[float, float], confidence: float
) -> tuple[Floats, Floats, Floats]:
    """Return the interval and p of means of equal units, from the range of the values alone.

    If a share q of the population has another value, all n units have the same with probability
    (1 − q)ⁿ. The interval contains each mean with q up to 1 − (α/2)^(1/n); p of 0 is 2 (1 − q)ⁿ
    with the least q for which the mean may be 0. For values of 0 and 1, these are the limits of
    Clopper and Pearson (1934).

    Args:
        value: The value of all units, shape [cell].
        held: Number of units, shape [cell].
        limits: The least and the greatest value.
        confidence: In percent.

    Returns:
        The low end, the high end and p, shape [cell] each.
    """
    least, most = limits
    share = 1 - (0.5 - confidence / 200) ** (1 / held)
    low, high = value - share * (value - least), value + share * (most - value)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.where(value > 0, -least / (value - least), most / (most - value))
    p = np.where(value == 0, 1.0, np.minimum(1.0, 2 * np.maximum(beyond, 0.0) ** held))
    return low, high, p


def skewed_t_of_moves(
    value: Floats,
    moves: Floats,
    held: Ints,
    strata: Ints | None = None,
) -> SkewedT:
    """Return the statistic of smooth numbers, linearised.

    Args:
        value: Shape [cell].
        moves: Change of the value by one unit, shape [cell, unit]; they sum to 0.
        held: Number of units, shape [cell].
        strata: Shape [unit], as in `skewed_t`.
    """
    ones = np.zeros_like(moves)
    squares, cubes = _moments(moves, ones, held, strata)
    size = np.sqrt((moves**2).sum(1)) + np.abs(value) / np.maximum(held, 1)
    return SkewedT(
        value=value,
        held=held,
        nonzero=held,
        flat=(np.sqrt(squares[0]) <= FLAT_ERROR * size) & (held > 1),
        freedom=(held - _strata_count(strata)).astype(np.float64),
        slope=np.ones(len(value)),
        squares=squares,
        cubes=cubes,
    )


def _tail_freedom(freedom: Floats) -> Floats:
    """Return the degrees of freedom of the corrected quantiles. Shape [cell]."""
    share = FREEDOM_SHARE + FREEDOM_RISE * np.maximum(15 - freedom, 0.0)
    return freedom * np.minimum(share, 1.0)


def _against(ratio: Floats, skew: Floats, freedom: Floats) -> Floats:
    """Return the skewness h that is evidence against an effect of this sign. Shape [cell]."""
    return SKEWNESS_FACTOR * np.maximum(-np.sign(ratio) * skew, 0.0) + BASE_SKEWNESS / (freedom + 1)


def _corrected(quantile: Floats, against: Floats) -> Floats:
    """Return the number that T is compared with, for a quantile of Student's t."""
    second = against * (2 * quantile**2 + 1) / 6
    return quantile + second + CURVATURE * against**2 * quantile**3


def _quantile(size: Floats, against: Floats) -> Floats:
    """Return the inverse of `_corrected`; 0 below its smallest value."""
    q = size.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(_NEWTON_STEPS):
            slope = 1 + 2 * against * q / 3 + 3 * CURVATURE * against**2 * q**2
            nearer = np.maximum(q - (_corrected(q, against) - size) / slope, 0.0)
            if not (nearer < q).any():  # only rounding makes a step increase
                break
            q = np.minimum(nearer, q)
    return np.where(np.isinf(size), np.inf, q)


def _strata_count(strata: Ints | None) -> int:
    return 1 if strata is None else int(strata.max()) + 1


def _moments(
    left: Floats, bottom: Floats, held: Ints, strata: Ints | None
) -> tuple[Floats, Floats]:
    """Return unbiased second and third cumulants of Σ (left − δ bottom), as polynomials in δ."""
    if strata is None:
        return _cumulants(left, bottom, held.astype(np.float64))
    squares, cubes = np.zeros((3, len(left))), np.zeros((4, len(left)))
    for stratum in range(int(strata.max()) + 1):
        indices = np.flatnonzero(strata == stratum)
        count = np.full(len(left), float(len(indices)))
        two, three = _cumulants(left[:, indices], bottom[:, indices], count)
        squares += two
        cubes += three
    return squares, cubes


def _cumulants(left: Floats, bottom: Floats, held: Floats) -> tuple[Floats, Floats]:
    n = np.maximum(held, 1.0)
    absent = left.shape[1] - held
    means = [values.sum(1) / n for values in (left, bottom)]
    one, two = (v - mean[:, None] for v, mean in zip((left, bottom), means, strict=True))

    def power(i: int, j: int) -> Floats:
        # Units that aren't in the cell have sums of 0.
        away = absent * (-means[0]) ** i * (-means[1]) ** j
        return (one**i * two**j).sum(1) - away

    with np.errstate(divide="ignore", invalid="ignore"):
        second = n / (n - 1)
        third = n**2 / ((n - 1) * (n - 2))
        squares = second * np.stack([power(2, 0), -2 * power(1, 1), power(0, 2)])
        cubes = third * np.stack([power(3, 0), -3 * power(2, 1), 3 * power(1, 2), -power(0, 3)])
    return np.nan_to_num(squares, posinf=0.0), np.nan_to_num(cubes, posinf=0.0, neginf=0.0)


def _polynomial(coefficients: Floats, at: Floats) -> Floats:
    values = np.zeros_like(at)
    for each in coefficients[::-1]:
        values = values * at + each
    return values
