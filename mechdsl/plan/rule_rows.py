"""A rule over all cells and prompts, and the rows that cells have, as columns of integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.plan.columns import Hits, Ragged
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.direction_types import Member
from mechdsl.resolve.resolved_rule import ResolvedRule, SitePoint
from mechdsl.vocab.sites import SITES

NOTHING, NEWEST, EVERY = range(3)
"""Tokens of a reply that a rule acts at."""


@dataclass(frozen=True, eq=False)
class PathPlan:
    """The receivers of a path rule."""

    table: tuple[SitePoint, ...]
    points: Ragged
    """Pair of senders and receivers → indices into `table`, those that a sender reaches."""
    pair_of_cell: Ints
    through_mlps: bool
    frozen_norms: bool

    @property
    def exists(self) -> NDArray[np.bool_]:
        """[cell] whether any receiver lies behind a sender."""
        return self.points.counts(self.pair_of_cell) > 0

    @property
    def at_the_end(self) -> bool:
        """Whether paths lead to nothing but the end of the model, and nothing is recorded."""
        return bool(self.table) and bool(self.is_end.all())

    @property
    def also_at_the_end(self) -> bool:
        """Whether the end of the model stands beside other receivers."""
        return bool(self.is_end.any()) and not self.at_the_end

    @property
    def is_end(self) -> Bools:
        """[point of `table`]"""
        return np.array([SITES[p.site].when == "output" for p in self.table], dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class RulePlan:
    """One rule over all cells."""

    rule: ResolvedRule
    site_of_cell: Ints
    position_of_cell: Ints
    points: Ragged
    """Site combination → indices into `point_table`."""
    point_table: tuple[SitePoint, ...]
    source_table: tuple[SitePoint, ...]
    """Per point, the one that is read: another where a rule writes into another layer."""
    written: Hits
    read: Hits
    positions: tuple[PositionCell, ...]
    """Where it writes, per value of `position_of_cell`."""
    sources: tuple[PositionCell, ...]
    """Where it reads."""
    averaged: Hits
    """What a mean is taken of: `read`, but for the rows of another block."""
    number: int = field(default=0, kw_only=True)
    """Its place among the rules of its experiment."""
    amounts: Floats
    """[cell] the number that is written, or that attention is multiplied with."""
    directions: tuple[Member, ...] = ()
    """What it steers along …"""
    direction_of_cell: Ints | None = None
    """… [cell] which of them."""
    keys: Hits | None = None
    """Attention rules: the keys; `written` are the queries."""
    key_of_cell: Ints | None = None
    paths: PathPlan | None = None
    behind: bool = False
    """Whether it acts on tokens of the answer, which only passes have that are read there."""

    follows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[position] what of a reply it acts at too, at each of its steps: `NOTHING`, `NEWEST`, or
    `EVERY`, all tokens so far."""
    keys_follow: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[position of keys] the same of the keys of attention rules."""
    active: Bools | None = None
    """[cell] whether it acts there; None where it does in all."""
    steps: Ints | None = None
    """[cell, 2] the first and the last step of a reply in which it acts; None in each step."""

    def follow(self, rows: Rows) -> Ints:
        """[row] what of a reply it is about, positions and keys together; 0 for nothing."""
        found = self.follows[self.position_of_cell[rows.cell]]
        if self.key_of_cell is None:
            return found
        return found + (EVERY + 1) * self.keys_follow[self.key_of_cell[rows.cell]]

    @property
    def placed(self) -> Iterator[tuple[Sequence[PositionCell], Ints]]:
        """(values, [cell] which of them) of its positions, and of its keys."""
        yield self.positions, self.position_of_cell
        if self.rule.edge is not None and self.key_of_cell is not None:
            yield list(self.rule.edge.keys.written.values()), self.key_of_cell

    def within(self, cells: Bools) -> RulePlan:
        """The rule in some cells, [cell]; it has no sites in others."""
        ends = self.points.offsets
        return replace(
            self,
            active=cells if self.active is None else self.active & cells,
            site_of_cell=np.where(cells, self.site_of_cell, len(ends) - 1),
            points=Ragged(np.append(ends, ends[-1]), self.points.values),
        )

    def acts(self, rows: Rows) -> Bools:
        """[row] whether it does anything."""
        if self.active is None:
            return np.ones(len(rows), dtype=np.bool_)
        return self.active[rows.cell]

    def written_runs(self, rows: Rows) -> Ints:
        """[row] the run that each row writes at: an index into `written.tokens`."""
        return self.written.run(self.position_of_cell[rows.cell], rows.prompt, rows.alternative)

    def key_runs(self, rows: Rows) -> Ints:
        """[row] the run of each row's keys: an index into `keys.tokens`; attention rules only."""
        assert self.keys is not None
        assert self.key_of_cell is not None
        return self.keys.run(self.key_of_cell[rows.cell], rows.prompt, rows.alternative)

    def run_counts(self, prompts: Ints) -> Ints:
        """[cell, prompt]: how many runs there are, none where the rule has no place in a cell."""
        counts = _counts(self.written, self.position_of_cell, prompts)
        if self.keys is not None and self.key_of_cell is not None:
            own = _counts(self.keys, self.key_of_cell, prompts)
            counts = np.where((own == 0) | (counts == 0), 0, np.maximum(own, counts))
        if self.paths is not None:
            counts = np.where(self.paths.exists[:, None], counts, 0)
        if self.active is not None:
            counts = np.where(self.active[:, None], counts, 1)
        return counts


def _counts(hits: Hits, position: Ints, prompts: Ints) -> Ints:
    key = position[:, None] * hits.prompts + prompts[None, :]
    return hits.runs.counts(key.ravel()).reshape(key.shape)


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
