"""Student's t corrected for skewness: intervals and p of means and ratios, without resampling.

A number θ is compatible with the units u of a cell if the mean of Aᵤ − θBᵤ is compatible with 0
(Fieller 1954), where A and B are the sums of numerator and denominator over the unit's rows. T is
the t statistic of that mean and a its standardised third cumulant. For a quantile q of Student's t,
T is compared with q + h (2q² + 1) / 6 + 0.4 h² q³: the quantile of a studentised mean of skewness h
(Hall 1983), with a third term. h is the part of a that is evidence against the effect, enlarged,
because a sample of skewed units understates its skewness exactly where its mean is misleading. The
constants were chosen by simulation (`benchmarks/coverage`): from 16 units on, they control the
level of a family of 144 cells of lognormal units.

The interval is the set of all θ whose p is not below the level. p of θ = 0 is at least 2^(1 − k)
for k units that aren't 0, the probability that all of them have the same sign by chance.

References:
    Fieller, E. C. (1954). Some problems in interval estimation. J. R. Stat. Soc. B 16, 175-185.
    Hall, P. (1983). Inverting an Edgeworth expansion. Ann. Stat. 11, 569-576.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.statistics.measurements import EffectSums

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
            found = self._of(twice)._searched_end(sides, (bounds[0][twice], bounds[1][twice]))
            low[curved], high[curved] = np.split(found, 2)
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
        columns = {each.name: getattr(self, each.name)[..., cells] for each in fields(self)}
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
        flat=(np.sqrt(squares[0]) <= FLAT_ERROR * size) & (sums.held > 1),
        freedom=(sums.held - _strata_count(strata)).astype(np.float64),
        slope=bottom.sum(1),
        squares=squares,
        cubes=cubes,
    )


def skewed_t_of_moves(
    value: Floats,
    moves: Floats,
    held: Ints,
    strata: Ints | None = None,
    freedom: Floats | None = None,
) -> SkewedT:
    """Return the statistic of smooth numbers, linearised.

    Args:
        value: Shape [cell].
        moves: Change of the value by one unit, shape [cell, unit]; they sum to 0.
        held: Number of units, shape [cell].
        strata: Shape [unit], as in `skewed_t`.
        freedom: Degrees of freedom, shape [cell], if they aren't units minus strata.
    """
    ones = np.zeros_like(moves)
    squares, cubes = _moments(moves, ones, held, strata)
    size = np.sqrt((moves**2).sum(1)) + np.abs(value) / np.maximum(held, 1)
    default = (held - _strata_count(strata)).astype(np.float64)
    return SkewedT(
        value=value,
        held=held,
        nonzero=held,
        flat=(np.sqrt(squares[0]) <= FLAT_ERROR * size) & (held > 1),
        freedom=default if freedom is None else freedom,
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
        own = np.flatnonzero(strata == stratum)
        count = np.full(len(left), float(len(own)))
        two, three = _cumulants(left[:, own], bottom[:, own], count)
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
    found = np.zeros_like(at)
    for each in coefficients[::-1]:
        found = found * at + each
    return found
