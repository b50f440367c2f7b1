"""Rows that have written the same are equal up to where anything acts on them first: there, one of
them is computed for all.

Places are counted in half blocks: 2 · block is where a block begins, and 2 · block + 1 where its
attention has been computed, in front of the output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.generate.records import StepRules
from mechdsl.generate.states import States
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.vocab.sites import SITES, of_stage

BEHIND_ATTENTION = of_stage("mixed", "middle", "mlp", "in_mlp", "end")
"""Sites of a block that its attention doesn't hang on, for the same token and for later ones."""


@dataclass(frozen=True, eq=False)
class Lineup:
    """From where on each state of a pass has a row of its own."""

    begins: Ints
    """[state] half blocks, ascending; 2 · `n_layers` where only what lies behind all blocks is its
    own."""
    like: Ints
    """[state] the one that it is equal to in front of that; itself where it has a row everywhere.
    Those that others are equal to have one everywhere."""

    def __len__(self) -> int:
        return len(self.begins)

    @staticmethod
    def apart(count: int) -> Lineup:
        """All states have rows in all blocks."""
        return Lineup(np.zeros(count, dtype=np.int64), np.arange(count))

    @property
    def shares(self) -> bool:
        """Whether any state has none somewhere."""
        return len(self) > 0 and int(self.begins[-1]) > 0

    def attending(self, block: int) -> int:
        """States that have a row in a block's attention, and keys there: the first ones."""
        return self._up_to(2 * block)

    def rows(self, block: int) -> int:
        """States that have a row in the rest of a block: the first ones, those that attend among
        them."""
        return self._up_to(2 * block + 1)

    def _up_to(self, place: int) -> int:
        """States that have a row there."""
        counts = self._counts
        return counts[min(place, len(counts) - 1)] if counts else 0

    @cached_property
    def _counts(self) -> list[int]:
        """[half block]"""
        return np.bincount(self.begins).cumsum().tolist()

    def place(self, states: Ints, block: int) -> Ints:
        """In which row of a block's attention each of these states is computed."""
        return np.where(self.begins[states] <= 2 * block, states, self.like[states])


Moves = tuple[Ints, Ints]
"""([k] rows before, [k] rows now) whose keys and values have to be copied."""
NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


class SharedBlocks:
    """Which state is computed in which row, step by step."""

    def __init__(self, texts: Ints, acting: Ints, lowest: Ints, n_layers: int) -> None:
        """texts: [row] equal where prompts are. acting: [row] the first step in which anything is
        done to it. lowest: [row] the first half block in which anything ever is."""
        self._texts = texts
        self._acting = acting
        self._lowest = lowest
        self._n_layers = n_layers
        self._leader = np.zeros(0, dtype=np.int64)
        """[state] one that has written the same behind the same prompt."""
        self._begins = np.zeros(0, dtype=np.int64)
        """[state] where what has been done to it begins."""
        self.lineup = Lineup.apart(0)
        self.moves: Sequence[Moves] = ()
        """[block] from the step before."""

    def begin(self, states: States) -> None:
        """The prefill has these."""
        self._leader = self._texts[states.leaders]
        self.lineup = Lineup.apart(len(states))

    def arrange(self, states: States, newest: Ints, step: int) -> States:
        """The states of a step in an order in which those that have rows in a block come first.

        newest: [state] the last token of its reply.
        """
        rows, parents = states.leaders, states.parents
        acted = self._acting[rows] <= step
        lowest = np.where(acted, self._lowest[rows], 2 * self._n_layers)
        if self._stands(lowest, parents, newest):
            self.moves = [(NO_ROWS, NO_ROWS)] * self._n_layers
            return states
        pairs = self._leader[parents] * (1 + newest.max()) + newest
        written = np.unique(pairs, return_inverse=True)[1]
        leads = self.lineup.like[parents] != parents  # False sorts first: it has all of its keys
        order = np.lexsort((parents, leads, -lowest, written))
        first = np.ones(len(order), dtype=bool)
        first[1:] = written[order[1:]] != written[order[:-1]]
        leader = order[first][written]
        every = np.arange(len(rows))
        begins = np.where(leader == every, 0, lowest)
        like = np.where(begins == 0, every, leader)
        place = _places(begins, parents)
        at = np.argsort(place)
        before, self.lineup = self.lineup, Lineup(begins[at], place[like[at]])
        self._leader, self._begins, parents = place[leader[at]], lowest[at], parents[at]
        self.moves = [self._moved(before, parents, block) for block in range(self._n_layers)]
        return states.placed(place)

    def _stands(self, lowest: Ints, parents: Ints, newest: Ints) -> bool:
        """Whether all is as it was in the step before: those that had written the same still
        have."""
        return (
            np.array_equal(lowest, self._begins)
            and np.array_equal(parents, np.arange(len(self._leader)))
            and np.array_equal(newest, newest[self._leader])
        )

    def _moved(self, before: Lineup, parents: Ints, block: int) -> Moves:
        now = np.arange(self.lineup.attending(block))
        was = before.place(parents[: len(now)], block)
        other = was != now
        return was[other], now[other]


def _places(begins: Ints, parents: Ints) -> Ints:
    """[state] places in the order of `begins`; most stay where their parent was."""
    ordered = np.sort(begins)
    low, high = (np.searchsorted(ordered, begins, side=side) for side in ("left", "right"))
    stays = np.flatnonzero((parents >= low) & (parents < high))
    stays = stays[np.unique(parents[stays], return_index=True)[1]]
    place = np.full(len(begins), -1)
    place[stays] = parents[stays]
    others = np.flatnonzero(place < 0)
    others = others[np.argsort(begins[others], kind="stable")]
    place[others] = np.setdiff1d(np.arange(len(begins)), place[stays])
    return place


def lowest_acting(
    model: LoadedModel,
    count: int,
    prefill: RuleWrites,
    kept: Sequence[SiteWrite],
    steps: Sequence[StepRules],
) -> Ints:
    """[row] the first half block in which anything is ever done to it; 2 · `n_layers` where nothing
    is, or behind all blocks alone."""
    found = np.full(count, 2 * model.shape.n_layers, dtype=np.int64)
    writes = [*prefill.writes, *kept, *(each for rules in steps for each in rules.writes)]
    edges = [*prefill.edges, *(each.edge for rules in steps for each in rules.edges)]
    places = [
        *((each.rows, _begin(model, each)) for each in writes),
        *((each.rows, 2 * each.layer) for each in edges),
        *((each.rows, 0) for each in prefill.numbers),
    ]
    for rows, begin in places:
        index = rows.cpu().numpy()
        found[index] = np.minimum(found[index], begin)
    return found


def _begin(model: LoadedModel, write: SiteWrite) -> int:
    """The first half block whose rows a write tells apart."""
    if write.layer is None:
        return 0 if SITES[write.site].when == "embedding" else 2 * model.shape.n_layers
    if SITES[write.site].when == "after":  # what the block returns is changed
        return 2 * (write.layer + 1)
    return 2 * write.layer + int(write.site in BEHIND_ATTENTION)
