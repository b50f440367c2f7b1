"""Measures that are averaged over an axis, or are areas under curves over it, row by row.

Before any statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.fits import against_masks
from mechdsl.resolve.cell_key import averaged_cells
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.replies import Replies
from mechdsl.statistics.measure_data import DrawnValues, MeasureData

Groups = Sequence[Sequence[int]]
"""[cell of the result] the cells that it is the mean of."""


@dataclass(frozen=True)
class Joined:
    """Cells of the result, each made of several."""

    groups: Groups
    numbers: Sequence[Callable[[Floats, Bools], Floats]]
    """Per group, of its cells' values [cell, prompt] and where there are any, [prompt]."""

    def of(self, values: Floats, there: Bools) -> Floats:
        """[cell of the result, prompt]"""
        pairs = zip(map(list, self.groups), self.numbers, strict=True)
        return np.stack([number(values[group], there[group]) for group, number in pairs])


def averaged(result: ExperimentResult, axis: str, *, area: bool = False) -> ExperimentResult:
    """The result with the mean along an axis in place of its cells: in each row over the cells that
    the row is part of, of the patched run and of those that it is set against alike. area: the
    area under the curve of each row that has all its cells."""
    axis = result.aliases.get(axis, axis)
    cells, groups = averaged_cells(result.cells, axis)
    sizes = sorted({len(group) for group in groups})
    count = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    said = f"over {axis}, row by row, of {count} cells"
    numbers: list[Callable[[Floats, Bools], Floats]] = [_mean] * len(groups)
    if area:
        places = [[float(result.cells[n].coords[axis]) for n in group] for group in groups]
        numbers = [partial(_area, np.array(each)) for each in places]
        said += ", by trapezoids, divided by the range"
    joined = Joined(groups, numbers)
    return replace(
        result,
        axes=tuple(name for name in result.axes if name != axis),
        aliases={name: of for name, of in result.aliases.items() if of != axis},
        centres=tuple(name for name in result.centres if name != axis),
        cells=tuple(cells),
        measures=tuple(_measure(data, joined) for data in result.measures),
        conventions={**result.conventions, "auc" if area else "mean": said},
        drawn=None if result.drawn is None else _drawn(result.drawn, joined),
        texts=(),
        hits=(),
        seen=(),
        replies=Replies(),
    )


def _measure(data: MeasureData, joined: Joined) -> MeasureData:
    there, groups = ~np.isnan(data.patched), joined.groups

    def joint(values: Floats) -> Floats:
        return joined.of(np.broadcast_to(values, there.shape), there)

    gaps = data.gaps or ("",) * len(data.patched)
    return replace(
        data,
        patched=joint(data.patched),
        base=joint(data.base),
        source=None if data.source is None else joint(data.source),
        truth=None if data.truth is None else joint(data.truth),
        rounding=None if data.rounding is None else joint(data.rounding),
        inert=np.array([data.inert[list(group)].all() for group in groups]),
        gaps=tuple(next((gaps[n] for n in group if gaps[n]), "") for group in groups),
        seen=None if data.seen is None else _seen(data.seen, groups),
    )


def _mean(values: Floats, there: Bools) -> Floats:
    """[prompt]; NaN for one that is part of none of the cells."""
    count = there.sum(0)
    total = np.where(there, values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _area(at: Floats, values: Floats, there: Bools) -> Floats:
    """[prompt]; NaN for one that isn't part of all cells. at: [cell] the numbers that they stand
    at, in any order."""
    order = np.argsort(at)
    whole = np.where(there.all(0), values, np.nan)
    return against_masks.area(whole[order].T, at[order])


def _seen(seen: Ints, groups: Groups) -> Ints:
    """[cell, prompt]: rows are alike where they are in every cell."""
    if len(seen) == 1:
        return seen
    codes = [np.unique(seen[list(group)], axis=1, return_inverse=True)[1] for group in groups]
    return np.stack([code.reshape(-1) for code in codes]).astype(np.int64)


def _drawn(drawn: DrawnValues, joined: Joined) -> DrawnValues:
    """Of random targets: draw k of all cells."""
    counts = np.array([drawn.counts[list(group)].min() for group in joined.groups])

    def joint(values: Floats) -> Floats:
        pairs = zip(values, ~np.isnan(values), strict=True)
        found = np.stack([joined.of(one, there) for one, there in pairs])
        beyond = np.arange(len(values))[:, None] >= counts[None, :]
        found[beyond] = np.nan
        return found

    return replace(drawn, values=tuple(map(joint, drawn.values)), counts=counts)
