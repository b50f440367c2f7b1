"""`auroc(effect, truth)`: how well an effect ranks cells, or the rows of one, that are true.

The interval is the bootstrap's (`around`), but where the order is perfect: then no resample has
another one, as none of a share that is 1 has, and its interval would be a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mechdsl.base.arrays import Bools, Floats
from mechdsl.results.estimates import Estimate, NoNumber, around, auroc
from mechdsl.results.lead import differences
from mechdsl.statistics.bootstrap import simultaneous
from mechdsl.statistics.effect_parts import parts
from mechdsl.statistics.shares import clopper_pearson
from mechdsl.validate.conditions import CellSelection, truth_of
from mechdsl.vocab.effects import EFFECTS

if TYPE_CHECKING:
    from mechdsl.results.expectation_values import Chosen, Space


def ranking_of_cells(
    space: Space, of: Chosen, truth: Sequence[CellSelection], confidence: float
) -> Estimate:
    """How often a true cell has the greater effect. A perfect order is as sure as the pairs of
    cells whose differences are, all together."""
    true = np.array([any(each.matches(of.result.cells[i]) for each in truth) for i in of.cells])
    if not 0 < true.sum() < len(true):
        which = "none" if not true.sum() else "every one"
        raise NoNumber(f"{which} of the {len(true)} cells is one of the true ones")
    sums = space.sums(of)
    point = float(auroc(sums.value[None], true)[0])
    if space.too_few:
        return Estimate(point, why=space.too_few)
    if point in (0.0, 1.0):
        sign = 1.0 if point else -1.0
        left, right = np.meshgrid(of.cells[true], of.cells[~true])
        pairs = differences(space, of, left.ravel(), right.ravel(), sign, -sign)
        sure = simultaneous(pairs, space.draws, confidence).low_together > 0
        return _perfect(point, float(sure.mean()))
    found = [auroc(sums.under(weights), true) for weights in space.draws.weights(4 * len(sums.top))]
    return _between(point, np.concatenate(found), confidence)


def ranking_of_rows(space: Space, of: Chosen, column: str, confidence: float) -> Estimate:
    """How often a row where the column is true has the greater effect. In a perfect order all pairs
    of units without one in common are right, and their exact limits hold."""
    if len(of.cells) != 1:
        raise NoNumber(f"{len(of.cells)} cells are meant, not one")
    data = of.result.measures[of.measure]
    found = parts(data, EFFECTS[data.effect], of.cells)
    if found.denominator is not None:
        raise NoNumber(f"`{data.effect}` is a ratio of means: no row has one")
    truths = [truth_of(each) for each in of.result.row_values[column]]
    known = found.present[0] & np.array([each is not None for each in truths])
    true: Bools = np.array([bool(each) for each in truths]) & known
    false = ~np.array([bool(each) for each in truths]) & known
    if not true.any() or not false.any():
        raise NoNumber(f"`{column}` is the same in all {int(known.sum())} rows")
    effects, codes = found.numerator[0], space.units.codes[space.place(of.result)]
    ahead = effects[true][:, None] - effects[false][None]
    wins = (ahead > 0) + 0.5 * (ahead == 0)
    point = float(wins.mean())
    if space.too_few:
        return Estimate(point, why=space.too_few)
    if point in (0.0, 1.0):
        pairs = np.array([min(len(np.unique(codes[each])) for each in (true, false))], dtype=float)
        low, high = clopper_pearson(point * pairs, pairs, confidence)
        return _perfect(point, float(low[0] if point else 1 - high[0]))
    resampled: list[Floats] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for weights in space.draws.weights(4 * len(effects)):
            one, two = weights[:, codes[true]], weights[:, codes[false]]
            resampled.append(((one @ wins) * two).sum(1) / (one.sum(1) * two.sum(1)))
    return _between(point, np.concatenate(resampled), confidence)


def _between(point: float, resampled: Floats, confidence: float) -> Estimate:
    low, high = around(2 * point - 1, 2 * resampled - 1, confidence)
    return Estimate(point, None, (low + 1) / 2, (high + 1) / 2)


def _perfect(point: float, sure: float) -> Estimate:
    """sure: the share that the order is at least right, or wrong, in."""
    return Estimate(point, None, sure, 1.0) if point else Estimate(point, None, 0.0, 1 - sure)
