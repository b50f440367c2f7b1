"""Numbers that expectations compare, with their value under every resample."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mechdsl.base.arrays import Floats

ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": np.divide,
}


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its value under every resample (None: a constant)."""

    point: float
    samples: Floats | None = None
    why: str | None = None
    """Why there is no number, or no interval."""
    rounding: float = 0.0
    """How far rounding alone may move the number."""
    as_in_base: bool = False
    """That is how far it moves the base run's, as of shares of cells."""


def combined(sign: Literal["+", "-", "*", "/"], left: Estimate, right: Estimate) -> Estimate:
    """Of two numbers, resample by resample."""
    compute = ARITHMETIC[sign]
    with np.errstate(divide="ignore", invalid="ignore"):
        point = float(compute(left.point, right.point))
        zero = "it divides by 0" if sign == "/" and right.point == 0 else None
        why = left.why or right.why or zero
        rounding = _moved(sign, left, right)
        as_in_base = left.as_in_base or right.as_in_base
        if left.samples is None and right.samples is None:
            return Estimate(point, None, why, rounding, as_in_base)
        one = left.point if left.samples is None else left.samples
        two = right.point if right.samples is None else right.samples
        return Estimate(point, np.asarray(compute(one, two)), why, rounding, as_in_base)


def _moved(sign: Literal["+", "-", "*", "/"], left: Estimate, right: Estimate) -> float:
    """How far rounding moves what is calculated, to first order, both numbers in the worst
    direction."""
    if sign in ("+", "-"):
        return left.rounding + right.rounding
    one, two = abs(left.point), abs(right.point)
    if sign == "*":
        return one * right.rounding + two * left.rounding
    return (left.rounding + one / two * right.rounding) / two if two else 0.0


def pearson(left: Floats, right: Floats) -> Floats:
    """Row by row."""
    a = left - left.mean(1, keepdims=True)
    b = right - right.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def spearman(left: Floats, right: Floats) -> Floats:
    """Row by row."""
    from scipy.stats import rankdata  # not at the top: slow to import

    return pearson(rankdata(left, axis=1), rankdata(right, axis=1))
