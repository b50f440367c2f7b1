"""Sign flips: are the deltas far from 0, were their signs random?

Fisher 1935. Exact where the delta of a unit is as likely d as −d without an effect; `stats test t`
doesn't assume that. The units whose sign a flip turns are a subset, and the sum of a flip is as far
from 0 as the one observed where the mean of that subset has another sign: so the means of subsets
are the ends of the intervals at all levels (Hartigan 1969), and p and interval agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from mechdsl.base.arrays import Bools, Floats
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.units import BLOCK, blocks
from mechdsl.validate.reachable_p import EXACT_UP_TO, MOST_DRAWN

MIN_FLIPS = 10_000
PER_TEST = 4
"""Random flips for each cell, over the level: of so many, three may be as extreme as what was
measured, and the cell still survives."""


@dataclass(frozen=True, eq=False)
class Flips:
    """Arrays over cells."""

    p: Floats
    """In (0, 1]; 1 where the value is 0."""
    floor: Bools
    """Whether p is the smallest that so many flips give, so that it may be smaller."""
    low: Floats
    """−infinity where the flips give no bound."""
    high: Floats


def flips_for(tests: int, level: float) -> int:
    """Random flips for so many cells: enough that a p can be small enough, if that isn't more than
    `MOST_DRAWN`."""
    return min(MOST_DRAWN, max(MIN_FLIPS, ceil(PER_TEST * tests / level)))


def flip_signs(sums: Sums, flips: int, seed: int, confidence: float) -> Flips:
    """Two-sided p and interval of each cell.

    Args:
        sums: of the cells; units that aren't part of one have sums of 0.
        flips: random ones, for cells of more than `EXACT_UP_TO` units.
        seed: of the random flips.
        confidence: in percent.
    """
    cells = len(sums.top)
    found = Flips(
        np.ones(cells), np.zeros(cells, dtype=bool), np.full(cells, -np.inf), np.full(cells, np.inf)
    )
    used = np.flatnonzero((sums.top != 0).any(0) | (sums.bottom != 0).any(0))
    exact = len(used) <= EXACT_UP_TO
    count = 2 ** len(used) - 1 if exact else flips
    tail = (100 - confidence) / 200
    for block in blocks(cells, count):
        own = sums.chosen(block)
        bottom = np.broadcast_to(own.bottom, own.top.shape)
        subsets = _every_subset(len(used)) if exact else _random_subsets(len(used), flips, seed)
        means = np.concatenate(
            [_means(chosen, own.top[:, used], bottom[:, used]) for chosen in subsets]
        )
        _fill(found, block, means, own.value, tail, exact)
    return found


def _means(chosen: Floats, top: Floats, bottom: Floats) -> Floats:
    """[subset, cell]: NaN where the denominator of a subset isn't positive."""
    below = chosen @ bottom.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, chosen @ top.T / below, np.nan)


def _fill(
    found: Flips, block: slice, means: Floats, value: Floats, tail: float, exact: bool
) -> None:
    """means: [subset, cell]; one that is NaN is as far out as can be on both sides."""
    count = len(means) + 1  # the flip that turns no sign
    lowest = np.sort(np.nan_to_num(means, nan=-np.inf), axis=0)
    highest = np.sort(np.nan_to_num(means, nan=np.inf), axis=0)
    # means that are equal by value differ by rounding, so the bound gives way a little
    slack = 1e-9 * np.abs(value)
    below = np.count_nonzero(lowest <= slack, axis=0)
    above = np.count_nonzero(highest >= -slack, axis=0)
    beyond = np.where(value > 0, below, above)
    found.p[block] = np.where(value == 0, 1.0, np.minimum(1.0, 2 * (1 + beyond) / count))
    if not exact:
        found.floor[block] = (beyond == 0) & (value != 0)
    outside = ceil(tail * count) - 1
    if outside > 0:
        found.low[block], found.high[block] = lowest[outside - 1], highest[-outside]


def _every_subset(width: int) -> Iterator[Floats]:
    """[subset, unit] of 0 and 1, but for the empty one."""
    codes = np.arange(1, 2**width)
    yield ((codes[:, None] >> np.arange(width)[None, :]) & 1).astype(np.float64)


def _random_subsets(units: int, flips: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng([2, seed % 2**63])
    # numpy draws four small numbers at once and throws away what a call leaves of them
    step = max(4, BLOCK // units // 4 * 4)
    for start in range(0, flips, step):
        yield random.integers(0, 2, (min(step, flips - start), units), dtype=np.int8).astype(float)


def largest_flip(deltas: Floats, flips: int, seed: int) -> Floats:
    """p of several sums together: in how many flips the largest of them is as large.

    Args:
        deltas: [sum, unit].
        flips: random ones, for more than `EXACT_UP_TO` units.
        seed: of the random flips.

    Returns:
        [sum], corrected by the distribution of the largest sum over its root of squares (Westfall
        and Young 1993, algorithm 4.1).
    """
    size = np.sqrt((deltas**2).sum(1))
    unit = deltas / np.where(size > 0, size, 1.0)[:, None]
    own = np.abs(unit.sum(1))
    order = np.argsort(-own, kind="stable")
    unit, own = unit[order], own[order]
    used = np.flatnonzero(np.any(deltas != 0, axis=0))
    exact = len(used) <= EXACT_UP_TO
    subsets = _every_subset(len(used)) if exact else _random_subsets(len(used), flips, seed)
    extreme, count = np.zeros(len(own), dtype=np.int64), 1
    for chosen in subsets:
        found = np.abs((1 - 2 * chosen) @ unit[:, used].T)
        largest = np.maximum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= own * (1 - 1e-9), axis=0)
        count += len(chosen)
    p = (extreme + 1) / count
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(p)
    return np.where(size > 0, found, 1.0)
