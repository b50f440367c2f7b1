"""Comparisons of two runs or two experiments: differences and correlations of their effects.

The difference of one effect in two runs is that of its means, or of its ratios. Runs with the same
rows are compared unit by unit; runs without common rows are two samples. In both cases the
difference is linearised (Binder 1983), with interval and p from Student's t corrected for skewness
(`skewed_t`).

The correlation is that of the true effects of two experiments, over shared cells. Where rows are
shared, both sums are over the same units, so their noise is correlated, and a plain correlation of
means is that of effects plus noise. Here the noise is subtracted: with θ and η the centred
effects, and dᵤ and eᵤ the change of each by unit u,

    C(θ, η) = θ·η − n / (n − 1) Σᵤ dᵤ·eᵤ

doesn't depend on the noise on average, because no unit is multiplied by itself (a U-statistic:
Hoeffding 1948). The correlation is r = C(θ, η) / √(C(θ, θ) C(η, η)), corrected for attenuation and
for shared noise (Spearman 1904). A number ρ is compatible with the units if C(θ, η) −
ρ √(C(θ, θ) C(η, η)) is compatible with 0 (Fieller 1954), by the jackknife's bias and variance
(Efron and Stein 1981) plus the variance of the products of pairs of units, which matters for small
effects. Strata are not used: intervals are slightly wider than necessary.

References:
    Efron, B. and Stein, C. (1981). The jackknife estimate of variance. Ann. Stat. 9, 586-596.
    Hoeffding, W. (1948). A class of statistics with asymptotically normal distribution. Ann. Math.
        Stat. 19, 293-325.
    Spearman, C. (1904). The proof and measurement of association between two things. Am. J.
        Psychol. 15, 72-101.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.base.arrays import Bools, CellIndex, Floats, Ints
from mechdsl.statistics.intervals import SkewedT, skewed_t_of_moves, student_quantile
from mechdsl.statistics.measurements import EffectSums

ROUNDING_SHARE = 1e-13
"""Differences below this share of both values are rounding."""


@dataclass(frozen=True, eq=False)
class RunPair:
    """The same cells of two runs over the same units."""

    old: EffectSums
    new: EffectSums

    @property
    def value(self) -> Floats:
        """New minus old, shape [cell]."""
        return self.new.value - self.old.value

    def chosen(self, cells: CellIndex) -> RunPair:
        """Select some cells."""
        return RunPair(self.old.chosen(cells), self.new.chosen(cells))


def paired_difference(both: RunPair, strata: Ints | None) -> SkewedT:
    """Compute the difference of paired units. `strata`: [unit], as in `skewed_t`."""
    held = np.minimum(both.new.held, both.old.held)
    new, old = _unit_moves(both.new), _unit_moves(both.old)
    inference = skewed_t_of_moves(both.value, new - old, held, strata)
    size = np.sqrt((new**2).sum(1)) + np.sqrt((old**2).sum(1))
    scale = np.abs(both.new.value) + np.abs(both.old.value)
    rounded = np.abs(both.value) <= ROUNDING_SHARE * scale
    return replace(
        inference,
        value=np.where(rounded, 0.0, inference.value),
        flat=inference.flat | (np.sqrt(inference.squares[0]) <= ROUNDING_SHARE * size),
    )


def unpaired_difference(both: RunPair, of_new: Bools) -> SkewedT:
    """Compute the difference of two independent samples; degrees of freedom by Welch and
    Satterthwaite.

    Args:
        both: The runs.
        of_new: Whether a unit is of the new run, shape [unit].
    """
    new, old = (
        skewed_t_of_moves(effect_sums.value, _unit_moves(effect_sums)[:, mask], effect_sums.held)
        for effect_sums, mask in ((both.new, of_new), (both.old, ~of_new))
    )
    spread = new.squares[0] + old.squares[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [each.squares[0] ** 2 / np.maximum(each.held - 1, 1) for each in (new, old)]
        welch = spread**2 / (parts[0] + parts[1])
    fewest = np.minimum(new.held, old.held)
    return SkewedT(
        value=both.value,
        held=fewest,
        nonzero=new.held + old.held,
        flat=new.flat & old.flat,
        freedom=np.where(np.isfinite(welch), welch, fewest - 1.0),
        slope=new.slope,
        squares=new.squares + old.squares,
        cubes=new.cubes - old.cubes,
    )


def _unit_moves(sums: EffectSums) -> Floats:
    """Return the change of the value by each unit. Shape [cell, unit]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = sums.top - sums.value[:, None] * sums.bottom
        return np.nan_to_num(left / sums.bottom.sum(1, keepdims=True))


MAX_PAIRED_UNITS = 1_000
"""Maximum number of units whose pairwise products are computed; beyond that, every k-th is used."""


@dataclass(frozen=True)
class TrueCorrelation:
    """r with its interval, NaN if either experiment's effects vary only by chance between cells."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class _Effects:
    """Effects and their changes by units, both centred over cells.

    Attributes:
        value: Shape [cell].
        moves: Shape [unit, cell].
        held: Whether the experiment has the unit, shape [unit].
    """

    value: Floats
    moves: Floats
    held: Floats


@dataclass(frozen=True, eq=False)
class _Product:
    """C of two experiments, and C without each of the units, shape [unit]."""

    value: float
    without: Floats


def true_correlation(one: EffectSums, two: EffectSums, confidence: float) -> TrueCorrelation:
    """Estimate the correlation of true effects.

    Args:
        one: Cells of one experiment, over the units of both.
        two: The same cells of the other experiment.
        confidence: In percent.
    """
    x, y = _effects(one), _effects(two)
    nothing = TrueCorrelation(math.nan, math.nan, math.nan)
    xy, xx, yy = _product(x, y), _product(x, x), _product(y, y)
    count = len(xy.without)
    quantile = float(student_quantile(confidence, np.array([count]))[0])
    size = _paired(x, y)
    for product, pairs in ((xx, size.xx), (yy, size.yy)):
        spread = quantile * math.sqrt(_variance(product) + pairs)
        if not product.value - spread > 0 or (product.without <= 0).any():
            return nothing
    scale = _Product(math.sqrt(xx.value * yy.value), np.sqrt(xx.without * yy.without))
    # (a − ρb)² ≤ q² (v₀ − 2ρv₁ + ρ²v₂), corrected for the jackknife's bias
    a, b = _unbiased(xy), _unbiased(scale)
    left, right = math.sqrt(yy.value / xx.value), math.sqrt(xx.value / yy.value)
    joined = (left * size.xx_xy + right * size.yy_xy) / 2
    alone = (left**2 * size.xx + right**2 * size.yy + 2 * size.xx_yy) / 4
    v0 = _variance(xy) + size.xy
    v1 = _covariance(xy, scale) + joined
    v2 = _variance(scale) + alone
    square, line = b**2 - quantile**2 * v2, a * b - quantile**2 * v1
    constant = a**2 - quantile**2 * v0
    if square <= 0 or b <= 0:
        return nothing
    root = math.sqrt(max(line**2 - square * constant, 0.0))
    low, high = (line - root) / square, (line + root) / square
    return TrueCorrelation(_within(a / b), _within(low), _within(high))


def _within(correlation: float) -> float:
    return min(max(correlation, -1.0), 1.0)


def _effects(sums: EffectSums) -> _Effects:
    value = sums.value
    bottom = np.broadcast_to(sums.bottom, sums.top.shape)
    moves = ((sums.top - value[:, None] * bottom) / bottom.sum(1, keepdims=True)).T
    held = (bottom != 0).any(0).astype(np.float64)
    return _Effects(value - value.mean(), moves - moves.mean(1, keepdims=True), held)


def _product(x: _Effects, y: _Effects) -> _Product:
    shared = (x.held * y.held) > 0
    own = (x.moves * y.moves).sum(1)
    n, total = int(shared.sum()), float(own.sum())
    noise = n / (n - 1) * total if n > 1 else 0.0
    value = float(x.value @ y.value) - noise
    # A mean without unit u is θ − n / (n − 1) dᵤ.
    one, two = (
        effects.held.sum() / max(effects.held.sum() - 1, 1) * effects.moves for effects in (x, y)
    )
    means = float(x.value @ y.value) - one @ y.value - two @ x.value + (one * two).sum(1)
    left = np.full(len(own), noise)
    if n > 2:
        fewer = (n**2 * total - n**3 / (n - 1) * own) / ((n - 1) * (n - 2))
        left = np.where(shared, fewer, noise)
    return _Product(value, means - left)


def _unbiased(of: _Product) -> float:
    """Return C corrected for bias by the jackknife."""
    count = len(of.without)
    return of.value - (count - 1) / count * float((of.without - of.value).sum())


def _covariance(one: _Product, two: _Product) -> float:
    count = len(one.without)
    products = (one.without - one.value) * (two.without - two.value)
    return (count - 1) / count * float(products.sum())


def _variance(of: _Product) -> float:
    return _covariance(of, of)


@dataclass(frozen=True)
class _Paired:
    """Variances and covariances that products of pairs of different units add to C."""

    xy: float
    xx: float
    yy: float
    xx_xy: float
    yy_xy: float
    xx_yy: float


def _paired(x: _Effects, y: _Effects) -> _Paired:
    """Compute 2 Σᵤ≠ᵥ Kᵤᵥ Lᵤᵥ of the symmetric products K and L of moves."""
    count = len(x.moves)
    some = slice(None, None, -(-count // MAX_PAIRED_UNITS))
    one, two = x.moves[some], y.moves[some]
    mixed = one @ two.T
    products = {"xy": (mixed + mixed.T) / 2, "xx": one @ one.T, "yy": two @ two.T}
    for product in products.values():
        np.fill_diagonal(product, 0.0)
    scale = 2 * (count / len(one)) ** 2

    def together(left: str, right: str) -> float:
        return scale * float((products[left] * products[right]).sum())

    return _Paired(
        together("xy", "xy"),
        together("xx", "xx"),
        together("yy", "yy"),
        together("xx", "xy"),
        together("yy", "xy"),
        together("xx", "yy"),
    )
