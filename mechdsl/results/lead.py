"""Whether a cell leads: tests behind `argmax(x) = L9H9` and `top 3 contains L9H9`.

A cell is the largest if it is larger than each other one, so each difference is tested at the full
level (an intersection-union test: Berger 1982); where any of several cells may be the one that is
larger, their bounds hold together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.bootstrap import Simultaneous, simultaneous
from mechdsl.statistics.cell_inference import infer
from mechdsl.statistics.effect_parts import Sums

if TYPE_CHECKING:
    from mechdsl.results.expectation_values import Chosen, Space


@dataclass(frozen=True)
class Nearest:
    """The cell that is hardest to tell from the leader, and the difference to it."""

    cell: int
    value: float
    low: float
    high: float


def ahead_of_each(
    space: Space, of: Chosen, leader: int, rivals: Ints, sign: float, confidence: float
) -> Nearest:
    """The difference to each rival has an interval of its own; the one with the lowest end."""
    low, high, value = (np.full(len(rivals), np.nan) for _ in range(3))
    sums = differences(space, of, np.full(len(rivals), leader), rivals, sign, -sign)
    settings = space.mine.sampling.settings.model_copy(update={"confidence": confidence})
    step = max(1, 4_000_000 // space.draws.resamples)
    for start in range(0, len(rivals), step):
        block = slice(start, start + step)
        own = sums.chosen(block)
        found = infer(own, settings, space.draws, 1)
        value[block], low[block], high[block] = own.value, found.low, found.high
    least = int(np.argmin(np.where(np.isnan(low), -np.inf, low)))
    return Nearest(int(rivals[least]), float(value[least]), float(low[least]), float(high[least]))


def ahead_of_some(
    space: Space, of: Chosen, leaders: Ints, rival: int, sign: float, confidence: float
) -> Simultaneous:
    """[leader]: the differences to one rival, with bounds that hold for all leaders together."""
    rivals = np.full(len(leaders), rival)
    sums = differences(space, of, leaders, rivals, sign, -sign)
    return simultaneous(sums, space.draws, confidence)


def surely_smaller(space: Space, of: Chosen, leader: int, confidence: float) -> Ints:
    """The cells whose size is smaller than that of the leader, bounds holding for all together."""
    places = {int(cell): n for n, cell in enumerate(of.cells)}
    mine = space.sums(of).value[places[leader]]
    sign = -1.0 if mine < 0 else 1.0
    rivals = of.cells[of.cells != leader]
    leaders = np.full(len(rivals), leader)
    above = differences(space, of, leaders, rivals, sign, -1.0)
    below = differences(space, of, leaders, rivals, sign, 1.0)
    both = Sums(
        np.concatenate([above.top, below.top]),
        above.bottom if len(above.bottom) == 1 else np.concatenate([above.bottom, below.bottom]),
        np.concatenate([above.held, below.held]),
    )
    low = simultaneous(both, space.draws, confidence).low_together.reshape(2, -1)
    return rivals[(low > 0).all(0)]


def differences(
    space: Space, of: Chosen, left: Ints, right: Ints, sign: float, other: float
) -> Sums:
    """[pair]: `sign` × the left cell's effect + `other` × the right one's."""
    places = {int(cell): n for n, cell in enumerate(of.cells)}
    one = np.array([places[int(cell)] for cell in left], dtype=np.int64)
    two = np.array([places[int(cell)] for cell in right], dtype=np.int64)
    sums = space.sums(of)
    held = np.minimum(sums.held[one], sums.held[two])
    if len(sums.bottom) == 1:
        return Sums(sign * sums.top[one] + other * sums.top[two], sums.bottom, held)
    # of means over different rows, or of different ratios: linearised, as pseudo-values
    every = np.ones((1, sums.top.shape[1]))
    values: Floats = sums.value
    moves = sums.top - values[:, None] * sums.bottom
    moves *= sums.top.shape[1] / sums.bottom.sum(1, keepdims=True)
    top = sign * moves[one] + other * moves[two]
    top += (sign * values[one] + other * values[two])[:, None]
    return Sums(top, every, held)
