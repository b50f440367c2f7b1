"""What is found in rows: a value of each measure, and why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.e02_python import PythonFailed
from mechdsl.diagnostics.e06_experiment import UnreadableMeasure


@dataclass(frozen=True, eq=False)
class Gap:
    """Rows in which a measure has no value, though the model's output can be used."""

    rows: Ints
    reason: str


@dataclass(frozen=True, eq=False)
class Failed:
    """A measure whose function failed, so that no row has a value."""

    problem: PythonFailed | UnreadableMeasure
    row: int | None
    """The row that it fails at; None where it isn't known, or hangs on none."""
    rows: int
    """How many it was called with; 0 where none of them has to do with it."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a readout finds in rows."""

    values: list[Floats]
    """Per measure, [row]."""
    broken: Bools
    """[row] whether it can't be used, as a number that is read is none; such a row has no value in
    any measure."""
    rounding: list[Floats]
    """Per measure, [row]: how far rounding may move the value; 0 where that wasn't asked for."""
    failed: Mapping[int, Failed]
    """By number, the measures that can't be computed."""
    gaps: Mapping[int, Gap]
    """By number, the measures that have no value in some rows."""
    listed: Tensor | None = None
    """[row, vocab] probabilities, where an observation lists tokens."""
    replies: Sequence[tuple[Reply, ...]] = ()
    """[row] what it wrote: one reply for each sample, of each draw of noise."""

    def over_draws(self, draws: int) -> Found:
        """Averaged over draws of noise, which lie side by side: over those that have a value, as
        replies may be too short for a place. One that can't be used, or is a gap, leaves none."""
        broken = np.count_nonzero(self.broken.reshape(-1, draws), axis=1) > 0

        def mean(number: int) -> Floats:
            there = ~np.isnan(self.values[number].reshape(-1, draws))
            found = over(self.values[number].reshape(-1, draws), there)
            lost = broken.copy()
            if number in gaps:
                lost[gaps[number].rows] = True
            return np.where(lost, np.nan, found)

        failed = {
            number: replace(each, row=None if each.row is None else each.row // draws)
            for number, each in self.failed.items()
        }
        gaps = {n: Gap(np.unique(gap.rows // draws), gap.reason) for n, gap in self.gaps.items()}
        listed = self.listed
        return Found(
            [mean(number) for number in range(len(self.values))],
            broken,
            [own.reshape(-1, draws).mean(axis=1) for own in self.rounding],
            failed,
            gaps,
            listed if listed is None else listed.unflatten(0, (-1, draws)).mean(1),
            _side_by_side(self.replies, draws),
        )


def over(values: Floats, there: Bools) -> Floats:
    """[row] the mean of [row, n] over those that are there, NaN where none is."""
    count = np.count_nonzero(there, axis=1)
    total = np.where(there, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _side_by_side(replies: Sequence[tuple[Reply, ...]], draws: int) -> list[tuple[Reply, ...]]:
    """Of each row, what it wrote in all draws."""
    groups = (replies[n : n + draws] for n in range(0, len(replies), draws))
    return [tuple(reply for one in group for reply in one) for group in groups]
