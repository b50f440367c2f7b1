"""One effect in two runs: the difference of its means, or of its ratios, with an interval and p.

Where both runs have the same rows each unit is set against itself; where they have no row in
common they are two samples. Either way the difference is linearised (Binder 1983), and interval and
p are those of Student's t corrected for skewness (`skewed_t`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.skewed_t import SkewedT, skewed_t_of_moves

ROUNDED = 1e-13
"""Differences that are smaller than this share of both values are rounding."""


@dataclass(frozen=True, eq=False)
class Both:
    """The same cells of two runs, over the same units."""

    old: Sums
    new: Sums

    @property
    def value(self) -> Floats:
        """[cell]: new less old."""
        return self.new.value - self.old.value

    def chosen(self, cells: Cells) -> Both:
        """Some of its cells."""
        return Both(self.old.chosen(cells), self.new.chosen(cells))


def paired(both: Both, strata: Ints | None) -> SkewedT:
    """The difference, each unit set against itself. strata: [unit], as in `skewed_t`."""
    held = np.minimum(both.new.held, both.old.held)
    new, old = _moves(both.new), _moves(both.old)
    found = skewed_t_of_moves(both.value, new - old, held, strata)
    size = np.sqrt((new**2).sum(1)) + np.sqrt((old**2).sum(1))
    scale = np.abs(both.new.value) + np.abs(both.old.value)
    rounded = np.abs(both.value) <= ROUNDED * scale
    return replace(
        found,
        value=np.where(rounded, 0.0, found.value),
        flat=found.flat | (np.sqrt(found.squares[0]) <= ROUNDED * size),
    )


def unpaired(both: Both, of_new: Bools) -> SkewedT:
    """The difference of two independent samples; degrees of freedom by Welch and Satterthwaite.

    Args:
        both: the runs.
        of_new: [unit], whether it is one of the new run.
    """
    new, old = (
        skewed_t_of_moves(each.value, _moves(each)[:, own], each.held)
        for each, own in ((both.new, of_new), (both.old, ~of_new))
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


def _moves(sums: Sums) -> Floats:
    """[cell, unit]: how far each unit moves the value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = sums.top - sums.value[:, None] * sums.bottom
        return np.nan_to_num(left / sums.bottom.sum(1, keepdims=True))
