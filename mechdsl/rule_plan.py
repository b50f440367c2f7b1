"""A rule over all cells and prompts, and the rows that cells have, as columns of integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechdsl.columns import Hits, Ints, Ragged
from mechdsl.data.types import PositionCell
from mechdsl.resolve.types import ResolvedRule, SitePoint


@dataclass(frozen=True, eq=False)
class RulePlan:
    """One rule over all cells."""

    rule: ResolvedRule
    site_of_cell: Ints
    position_of_cell: Ints
    points: Ragged
    """Site combination → indices into `point_table`."""
    point_table: tuple[SitePoint, ...]
    written: Hits
    read: Hits
    positions: tuple[PositionCell, ...]
    """Where it writes, per value of `position_of_cell`."""
    sources: tuple[PositionCell, ...]
    """Where it reads."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One row per (cell, prompt, alternative), as parallel columns."""

    cell: Ints
    prompt: Ints
    """Index into the table's rows."""
    alternative: Ints
    """Which of several runs under one label (the middle tokens of a span), averaged later."""

    def __len__(self) -> int:
        return len(self.cell)

    @staticmethod
    def none() -> Rows:
        """No rows."""
        empty = np.zeros(0, dtype=np.int64)
        return Rows(empty, empty, empty)

    def take(self, index: Ints) -> Rows:
        return Rows(self.cell[index], self.prompt[index], self.alternative[index])
