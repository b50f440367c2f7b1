"""Rows that have been equal so far are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.generate.records import StepRules
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites

NEVER = 1 << 40


@dataclass(frozen=True, eq=False)
class States:
    """What a pass computes: rows, and which of them stand for others too."""

    rows: Ints
    """[n] of one state side by side, ascending there; the first of them leads."""
    of: Ints
    """[n] the state of each of these, ascending."""
    parents: Ints
    """[state] which one of the step before it goes on from."""

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def leaders(self) -> Ints:
        """[state]"""
        return self.rows[np.searchsorted(self.of, np.arange(len(self)))]

    def placed(self, place: Ints) -> States:
        """The same with each state in another place, [state]."""
        of, parents = place[self.of], np.empty_like(self.parents)
        parents[place] = self.parents
        order = np.argsort(of, kind="stable")
        return States(self.rows[order], of[order], parents)


def numbered(prompts: Sequence[tuple[int, ...]]) -> Ints:
    """[row] equal where prompts are: they count from 0 as they first come."""
    numbers: dict[tuple[int, ...], int] = {}
    every = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return np.array(every, dtype=np.int64)


class Sharing:
    """Which rows may be computed together, step by step."""

    def __init__(
        self, prompts: Sequence[tuple[int, ...]], acting: Ints, groups: Ints | None
    ) -> None:
        """acting: [row] the first step in which anything is done to it. groups: [row] equal where
        all that is done is equal; None: nowhere."""
        self._prompts = numbered(prompts)
        self._acting = acting
        self._groups = np.arange(len(prompts)) if groups is None else groups

    def first(self, by: Ints) -> States:
        """Of the prefill, in the order of what `by` has for their rows, [row]."""
        rows = np.arange(len(self._prompts))
        found = self._split(rows, self._prompts, np.zeros_like(rows), 0)
        order = np.argsort(by[found.leaders], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        states = States(found.rows, found.of, np.arange(len(found))).placed(place)
        return States(states.rows, states.of, np.arange(len(states)))

    def follow(self, before: States, newest: Ints, step: int) -> States:
        """Of the next step, `step`.

        newest: [n] the token that each of the rows before has written; below 0 where it is done.
        """
        goes = newest >= 0
        return self._split(before.rows[goes], before.of[goes], newest[goes], step)

    def _split(self, rows: Ints, parents: Ints, tokens: Ints, step: int) -> States:
        """Rows that go on from one state, with one token and with equal things done to them."""
        acted = self._acting[rows] <= step
        groups = np.where(acted, self._groups[rows], -1)  # -1: nothing has been done yet
        keys = (groups, tokens, parents)
        order = np.lexsort((rows, *keys))
        begins = np.zeros(len(order), dtype=bool)
        for key in keys:
            begins[1:] |= np.diff(key[order]) != 0
        begins[:1] = True
        return States(rows[order], begins.cumsum() - 1, parents[order][begins])


def first_acting(
    count: int, prefill: RuleWrites, kept: Sequence[SiteWrite], steps: Sequence[StepRules]
) -> Ints:
    """[row] the first step in which anything is done to a row; what is done to all rows alike, as
    other blocks, doesn't tell them apart."""
    found = np.full(count, NEVER, dtype=np.int64)

    def note(each: Iterable[Tensor], step: int) -> None:
        for rows in each:
            index = rows.cpu().numpy()
            found[index] = np.minimum(found[index], step)

    every = (*prefill.writes, *prefill.edges, *prefill.numbers)
    note((each.rows for each in every), 0)
    note((write.rows for write in kept), 1)
    for rules in steps:
        note((write.rows for write in rules.writes), rules.first)
        note((each.edge.rows for each in rules.edges), rules.first)
    return found
