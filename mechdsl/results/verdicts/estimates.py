"""Numbers that expectations compare, with their intervals.

Arithmetic on means is smooth: every unit has an influence, so that the error can be recomputed in
every resample, as bootstrap-t requires. For numbers that aren't smooth (a largest cell, a rank, an
absolute value) only the ends of the interval are known.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.intervals import (
    FLAT_VARIANCE,
    SkewedT,
    StudentisedCells,
    skewed_t_of_moves,
    studentised_pivot,
)
from mechdsl.statistics.measurements import EffectSums, Resamples
from mechdsl.vocab.aggregates import CellAggregate

Operator = Literal["+", "-", "*", "/"]

OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": np.divide,
}

IntervalFunction: TypeAlias = Callable[[float], tuple[float, float]]
"""Function of a confidence that returns the ends of an interval."""


# --- smooth numbers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedNumber:
    """A number that doesn't depend on the prompts."""

    value: float


@dataclass(frozen=True, eq=False)
class WeightedCells:
    """A weighted sum of cells' effects."""

    sums: EffectSums
    share: Floats
    """Weight of each cell, shape [cell]."""
    limits: IntervalFunction | None = None
    """For cells whose intervals aren't from the bootstrap."""
    range: tuple[float, float] | None = None
    """The least and the greatest sum, if they are known."""

    def within(self, ends: tuple[float, float]) -> tuple[float, float]:
        """Return the ends of an interval, cut to the range."""
        if self.range is None:
            return ends
        least, most = self.range
        low, high = (min(max(end, least), most) for end in ends)
        return low, high

    def combine(self, values: Floats) -> tuple[Floats, Floats]:
        """Return the sums, shape [resample], and their derivatives by each cell."""
        return values @ self.share, self.share


@dataclass(frozen=True, eq=False)
class CombinedNumbers:
    """The result of an operation on two numbers."""

    sign: Operator
    left: SmoothNumber
    right: SmoothNumber


@dataclass(frozen=True, eq=False)
class CombinedCells:
    """An aggregate of cells' effects that is neither a weighted sum nor an extreme cell."""

    sums: EffectSums
    method: CellAggregate

    def combine(self, values: Floats) -> tuple[Floats, Floats]:
        """Return the aggregates, shape [resample], and their derivatives by each cell."""
        return combine_cells(self.method, values), cell_slopes(self.method, values)


SmoothNumber: TypeAlias = FixedNumber | WeightedCells | CombinedCells | CombinedNumbers


def combine_cells(method: CellAggregate, values: Floats) -> Floats:
    """Return the aggregates, shape [resample], of effects of shape [resample, cell].

    Raises NoNumber if the class fails or returns an array of another shape.
    """
    return _checked(method, "combine", values, values.shape[:1])


def cell_slopes(method: CellAggregate, values: Floats) -> Floats:
    """Return the partial derivatives by each cell, shape [resample, cell].

    Raises NoNumber as `combine_cells` does.
    """
    return _checked(method, "slope", values, values.shape)


def _checked(
    method: CellAggregate,
    function: Literal["combine", "slope"],
    values: Floats,
    shape: tuple[int, ...],
) -> Floats:
    try:
        found = np.asarray(getattr(method, function)(values.copy()), dtype=np.float64)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise NoNumber(f"`{function}` of `{method.name}` failed: {said}") from error
    if found.shape != shape:
        sizes = f"the shape {list(found.shape)} instead of {list(shape)}"
        raise NoNumber(f"`{function}` of `{method.name}` returned {sizes}")
    return found


def evaluate_resamples(number: SmoothNumber, weights: Floats) -> tuple[Floats, Floats]:
    """Evaluate a number under resamples with weights of shape [resample, unit].

    Returns:
        Its value, shape [resample], and its change by one additional unit, shape [resample, unit].
    """
    match number:
        case FixedNumber():
            return np.full(len(weights), number.value), np.zeros_like(weights)
        case WeightedCells(sums=sums) | CombinedCells(sums=sums):
            scale = weights @ sums.bottom.T
            values = (weights @ sums.top.T) / scale
            combined, slope = number.combine(values)
            weight = np.broadcast_to(slope / scale, values.shape)
            return combined, weight @ sums.top - _weighted_sum(weight * values, sums.bottom)
        case CombinedNumbers():
            one, by_one = evaluate_resamples(number.left, weights)
            two, by_two = evaluate_resamples(number.right, weights)
            value = OPERATIONS[number.sign](one, two)
            if number.sign in ("+", "-"):
                return value, OPERATIONS[number.sign](by_one, by_two)
            one, two = one[:, None], two[:, None]
            if number.sign == "*":
                return value, by_one * two + one * by_two
            return value, (by_one - value[:, None] * by_two) / two


def weighted_cells(number: SmoothNumber) -> Iterator[WeightedCells | CombinedCells]:
    """Yield the cells that a number is computed from."""
    match number:
        case FixedNumber():
            return
        case CombinedNumbers(left=left, right=right):
            yield from weighted_cells(left)
            yield from weighted_cells(right)
        case _:
            yield number


def is_single_cell(number: SmoothNumber) -> bool:
    """Whether a number is one cell, shifted and scaled by fixed numbers."""
    match number:
        case WeightedCells():
            return len(number.share) == 1
        case CombinedNumbers(_, one, FixedNumber()) | CombinedNumbers(_, FixedNumber(), one):
            return is_single_cell(one)
        case _:
            return False


def is_linear(number: SmoothNumber) -> bool:
    """Whether a number is a sum of cells, each times a fixed number."""
    match number:
        case CombinedNumbers("+" | "-", left, right):
            return is_linear(left) and is_linear(right)
        case (
            CombinedNumbers("*", left, FixedNumber())
            | CombinedNumbers("/", left, FixedNumber())
            | CombinedNumbers("*", FixedNumber(), left)
        ):
            return is_linear(left)
        case CombinedNumbers() | CombinedCells():
            return False
        case _:
            return True


def exact_interval(number: SmoothNumber, confidence: float) -> tuple[float, float] | None:
    """Return the ends of a single cell with exact limits, shifted and scaled by fixed numbers; None
    for other numbers."""

    def found(inner: SmoothNumber) -> tuple[float, float] | None:
        if not isinstance(inner, WeightedCells) or inner.limits is None:
            return None
        return inner.within(inner.limits(confidence))

    return map_interval(number, found)


def map_interval(
    number: SmoothNumber, interval: Callable[[SmoothNumber], tuple[float, float] | None]
) -> tuple[float, float] | None:
    """Return the ends of a number that is another one, shifted and scaled by fixed numbers.

    Args:
        number: The shifted and scaled number.
        interval: Function that returns the ends of the other number, or None.
    """
    match number:
        case CombinedNumbers(sign, inner, FixedNumber(value)):
            mapped = map_interval(inner, interval)
            ends = [] if mapped is None else [float(OPERATIONS[sign](e, value)) for e in mapped]
        case CombinedNumbers(sign, FixedNumber(value), inner) if sign != "/":
            mapped = map_interval(inner, interval)
            ends = [] if mapped is None else [float(OPERATIONS[sign](value, e)) for e in mapped]
        case _:
            return interval(number)
    return (min(ends), max(ends)) if ends else None


def _weighted_sum(weight: Floats, bottom: Floats) -> Floats:
    """Multiply [resample, cell] by [1 or cell, unit]."""
    return weight.sum(1, keepdims=True) @ bottom if len(bottom) == 1 else weight @ bottom


def number_skewed_t(number: SmoothNumber, draws: Resamples, held: int) -> SkewedT:
    """Return the corrected t of one number with `held` units."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, moves = evaluate_resamples(number, np.ones((1, draws.units)))
    return skewed_t_of_moves(value, moves, np.array([held], dtype=np.int64), draws.strata)


def studentise_number(number: SmoothNumber, draws: Resamples, held: int) -> StudentisedCells:
    """Return bootstrap-t of one number with `held` units, like `studentise` for cells."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, influence = evaluate_resamples(number, np.ones((1, draws.units)))
        error = np.sqrt(_squared_error(np.ones((1, draws.units)), influence, draws.strata, held))
        size = np.sqrt((influence**2).sum(1)) + np.abs(value) / max(held, 1)
        error = np.where(error <= FLAT_VARIANCE * size, 0.0, error)
        studentised: list[Floats] = []
        for weights in draws.weights(4 * draws.units):
            moved, influence = evaluate_resamples(number, weights)
            moved = moved - value
            spread = np.sqrt(_squared_error(weights, influence, draws.strata, held))
            studentised.append(studentised_pivot(moved, spread, error))
    pivots = np.concatenate(studentised) if studentised else np.zeros(0)
    error = error if held > 1 else np.full(1, np.nan)
    units = np.array([held], dtype=np.int64)
    return StudentisedCells(value, error, pivots[:, None], units, draws.count)


def _squared_error(weights: Floats, influence: Floats, strata: Ints | None, held: int) -> Floats:
    """Return the squared standard error. Shape [resample]."""
    if strata is None:
        return (weights * influence**2).sum(1) * held / (held - 1)
    squared_error = np.zeros(len(weights))
    for stratum in range(int(strata.max()) + 1):
        own = strata == stratum
        drawn, part = weights[:, own], influence[:, own]
        count = drawn.shape[1]
        squares, total = (drawn * part**2).sum(1), (drawn * part).sum(1)
        squared_error += np.maximum(squares - total**2 / count, 0.0) * count / (count - 1)
    return squared_error


class NoNumber(Exception):
    """Raised with the reason why a number doesn't exist."""


class NotComputed(NoNumber):
    """Raised if an experiment or a measure could not be computed."""


# --- estimates ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number, smooth or with the ends of its interval."""

    point: float
    smooth: SmoothNumber | None = None
    low: float = math.nan
    """For non-smooth numbers: the interval at the requested confidence."""
    high: float = math.nan
    why: str | None = None
    """Why there is no number, or no interval."""
    rounding: float = 0.0
    """Maximum effect of rounding on the number."""
    as_in_base: bool = False
    """Whether `rounding` is the base run's, as for shares of cells."""

    @property
    def fixed(self) -> bool:
        """Whether the number doesn't depend on prompts."""
        return isinstance(self.smooth, FixedNumber)


def constant_estimate(value: float) -> Estimate:
    return Estimate(value, FixedNumber(value), value, value)


def combine_estimates(sign: Operator, left: Estimate, right: Estimate) -> Estimate:
    """Combine two numbers: a smooth number if both are, otherwise an interval from their ends."""
    with np.errstate(divide="ignore", invalid="ignore"):
        point = float(OPERATIONS[sign](np.float64(left.point), right.point))
    zero = "it divides by 0" if sign == "/" and right.point == 0 else None
    estimate = Estimate(
        point,
        why=left.why or right.why or zero,
        rounding=_combined_rounding(sign, left, right),
        as_in_base=left.as_in_base or right.as_in_base,
    )
    if left.smooth is not None and right.smooth is not None:
        if isinstance(left.smooth, FixedNumber) and isinstance(right.smooth, FixedNumber):
            return replace(estimate, smooth=FixedNumber(point), low=point, high=point)
        return replace(estimate, smooth=CombinedNumbers(sign, left.smooth, right.smooth))
    low, high = _operation_interval(sign, left, right)
    return replace(estimate, low=low, high=high)


def _operation_interval(sign: Operator, left: Estimate, right: Estimate) -> tuple[float, float]:
    """Return bounds of the result if both operands are within their intervals."""
    if sign == "/" and right.low <= 0 <= right.high:
        return math.nan, math.nan
    compute = OPERATIONS[sign]
    every = [compute(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
    return (math.nan, math.nan) if any(map(math.isnan, every)) else (min(every), max(every))


def absolute_estimate(inner: Estimate, low: float, high: float) -> Estimate:
    """Return the absolute value of a number with an interval: its bounds are the least and greatest
    absolute value in the interval. Resampled absolute values are never below 0 and can't be
    used."""
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    farthest = max(abs(low), abs(high))
    if math.isnan(low) or math.isnan(high):
        nearest = farthest = math.nan
    return replace(inner, point=abs(inner.point), smooth=None, low=nearest, high=farthest)


def _combined_rounding(sign: Operator, left: Estimate, right: Estimate) -> float:
    """Return the first-order effect of rounding on a result, in the worst direction."""
    if sign in ("+", "-"):
        return left.rounding + right.rounding
    one, two = abs(left.point), abs(right.point)
    if sign == "*":
        return one * right.rounding + two * left.rounding
    return (left.rounding + one / two * right.rounding) / two if two else 0.0


# --- correlations ---------------------------------------------------------------------------------


def fisher_interval(point: float, resampled: Floats, confidence: float) -> tuple[float, float]:
    """Return the interval of a correlation.

    It extends equally to both sides on Fisher's scale and contains the required share of resamples.
    Resampling adds noise, so resampled correlations are nearer to 0 than the estimate; their
    percentiles may exclude it, but this interval never does.
    """
    known = resampled[np.isfinite(resampled)]
    if not len(known) or not math.isfinite(point):
        return math.nan, math.nan
    most = 1 - 1e-12
    at = math.atanh(min(max(point, -most), most))
    width = float(np.percentile(np.abs(np.arctanh(np.clip(known, -most, most)) - at), confidence))
    return math.tanh(at - width), math.tanh(at + width)
