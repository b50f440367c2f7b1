"""Rules during generation, and rows that share computation until rules separate them.

Sites are counted in half blocks: 2 · block is the start of a block, and 2 · block + 1 the point
after its attention, before the output projection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import BlockPairs, EdgeWrite, RuleWrites, SiteWrite
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.vocab.sites import SITES, sites_of_stage


@dataclass(frozen=True, eq=False)
class StepEdge:
    """Attention edges from the newest token.

    The `queries` of `edge` are ignored; its `keys` are positions of the prompt.
    """

    edge: EdgeWrite
    also: Literal["", "newest", "written"] = ""
    """Additional keys: the newest token itself, or all tokens of the reply up to it."""


@dataclass(frozen=True, eq=False)
class StepRules:
    """Changes at the newest token of the passes `first` to `last`, both included.

    The newest token of step s is token s of the reply.
    """

    first: int
    """1 or more; step 0 is the prefill, whose changes are given separately."""
    last: int | None = None
    """None: up to the end."""
    writes: Sequence[SiteWrite] = ()
    """Writes whose `positions` are ignored."""
    edges: Sequence[StepEdge] = ()
    blocks: BlockPairs = ()
    """Blocks that replace others, for the newest token of all rows."""

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError("step 0 is the prefill, whose writes are given by themselves")

    def moved(self, rows: Tensor) -> StepRules:
        """Renumber rows: row i becomes row `rows[i]`."""
        return replace(
            self,
            writes=[write.moved(rows) for write in self.writes],
            edges=[replace(edge, edge=edge.edge.moved(rows)) for edge in self.edges],
        )

    def acts(self, step: int) -> bool:
        """Return whether the rules act in a step."""
        return self.first <= step and (self.last is None or step <= self.last)


@dataclass(frozen=True, eq=False)
class GenerationRules:
    """Rules that act after the prefill, in some rows of a pass."""

    kept: tuple[SiteWrite, ...] = ()
    """Edits of keys and values between the prefill and the first step."""
    steps: tuple[StepRules, ...] = ()
    """Rules at the newest token, in the order of the file."""

    def then(self, later: GenerationRules) -> GenerationRules:
        """Append the rules of further rows."""
        return GenerationRules((*self.kept, *later.kept), (*self.steps, *later.steps))

    def moved(self, rows: Tensor) -> GenerationRules:
        """Renumber rows: row i becomes row `rows[i]`."""
        return GenerationRules(
            tuple(write.moved(rows) for write in self.kept),
            tuple(step.moved(rows) for step in self.steps),
        )


class RowChoice:
    """Selection of rows for one pass."""

    def __init__(self, count: int, rows: Sequence[int] | Ints) -> None:
        """Select rows; rows: of `count` ones, in the order of the pass, each at most once."""
        self.rows = torch.from_numpy(np.array(rows, dtype=np.int64))
        self.to = torch.full((count,), -1, dtype=torch.long)
        """[row] its number in the pass; -1 for rows outside it."""
        self.to[self.rows] = torch.arange(len(self.rows))

    def _there(self, rows: Tensor) -> Tensor:
        return self.to[rows] >= 0

    def write(self, write: SiteWrite) -> SiteWrite:
        """Restrict a write to the selected rows."""
        return write.some(self._there(write.rows), self.to)

    def edge(self, edge: EdgeWrite) -> EdgeWrite:
        """Restrict edges to the selected rows."""
        return edge.some(self._there(edge.rows)).moved(self.to)

    def rules(self, rules: RuleWrites) -> RuleWrites:
        """Restrict the writes of rules to the selected rows."""
        return RuleWrites(
            [write for site_write in rules.writes if len((write := self.write(site_write)).rows)],
            [edge for edge_write in rules.edges if len((edge := self.edge(edge_write)).rows)],
            [number.some(self._there(number.rows)).moved(self.to) for number in rules.numbers],
            rules.blocks,
        )

    def step_rules(self, rules: StepRules) -> StepRules:
        """Restrict rules at newest tokens to the selected rows."""
        return replace(
            rules,
            writes=[
                site_write for write in rules.writes if len((site_write := self.write(write)).rows)
            ],
            edges=[
                replace(step_edge, edge=edge)
                for step_edge in rules.edges
                if len((edge := self.edge(step_edge.edge)).rows)
            ],
        )

    def step(
        self, steps: Sequence[StepRules], step: int, prompts: Tensor, newest: Tensor
    ) -> RuleWrites:
        """Build the writes at the newest token of a step, at its position.

        Args:
            steps: All rules.
            prompts: [row of the pass] number of prompt tokens.
            newest: [row of the pass] position of the newest token.
        """
        writes = RuleWrites()
        for rules in steps:
            if not rules.acts(step):
                continue
            mine = self.step_rules(rules)
            rule_writes = RuleWrites(
                [replace(write, positions=newest[write.rows]) for write in mine.writes],
                [_place_edge(edge, prompts, newest) for edge in mine.edges],
                blocks=rules.blocks,
            )
            writes = writes.then(rule_writes)
        return writes


def merge_steps(prefill: RuleWrites, later: Sequence[RuleWrites]) -> RuleWrites:
    """Merge the writes of one pass over prompts and replies, in the order of rules.

    A rule writes later tokens first, because a step reads the previous token as it was before the
    rule.

    Args:
        prefill: Writes in the prompts.
        later: [step - 1] writes at the newest token of each step.

    Returns:
        All writes, with the blocks of the prefill.
    """
    writes = RuleWrites()
    for rule_writes in (*(replace(own, blocks=()) for own in reversed(later)), prefill):
        writes = writes.then(rule_writes)
    return replace(writes, writes=sorted(writes.writes, key=lambda write: write.rule))


def join_step_rules(steps: Sequence[StepRules], count: int) -> list[StepRules]:
    """Join adjacent rules that act in the same steps into few writes; count: number of rows."""
    step_rules: list[StepRules] = []
    for _, some in groupby(steps, lambda rules: (rules.first, rules.last, tuple(rules.blocks))):
        each = list(some)
        writes = RuleWrites([write for rules in each for write in rules.writes])
        edges = [edge for rules in each for edge in rules.edges]
        step_rules.append(replace(each[0], writes=merge_writes(writes, count).writes, edges=edges))
    return step_rules


def _place_edge(step_edge: StepEdge, prompts: Tensor, newest: Tensor) -> EdgeWrite:
    """Build edges from the newest token of each row."""
    edge = step_edge.edge
    if edge.change == "allow":
        raise ValueError("what the newest token sees can't be allowed besides")
    queries = newest[edge.rows]
    entries, keys = [edge.entries], [edge.keys]
    if step_edge.also:
        first = queries if step_edge.also == "newest" else prompts[edge.rows]
        count = queries - first + 1
        indices = torch.arange(len(queries)).repeat_interleave(count)
        before = torch.cumsum(count, 0) - count
        entries.append(indices)
        keys.append(first[indices] + torch.arange(len(indices)) - before[indices])
    return replace(edge, queries=queries, entries=torch.cat(entries), keys=torch.cat(keys))


@dataclass(eq=False)
class _MergedWrites:
    """Writes or edges that can be merged, as each row has at most one of them."""

    kind: object
    rows: Tensor
    """[row] bool."""
    parts: list[Any]

    @classmethod
    def of(cls, each: Iterable[tuple[object, object, Any]], count: int) -> list[_MergedWrites]:
        """Merge parts of equal kind.

        Args:
            each: Scope within which the order matters, kind that merged parts share, and the part.
            count: Number of rows.
        """
        merged: dict[object, list[_MergedWrites]] = {}
        for where, kind, part in each:
            before = merged.setdefault(where, [])
            best: _MergedWrites | None = None
            for other in reversed(before):
                if bool(other.rows[part.rows].any()):
                    break
                best = other if other.kind == kind else best
            if best is None:
                best = cls(kind, torch.zeros(count, dtype=torch.bool), [])
                before.append(best)
            best.rows[part.rows] = True
            best.parts.append(part)
        return [joined for every in merged.values() for joined in every]


def merge_writes(rules: RuleWrites, count: int) -> RuleWrites:
    """Merge writes into fewer ones; those of one row stay in order.

    Args:
        count: Number of rows of the pass.
    """
    writes = _MergedWrites.of(
        ((write.where, (write.mode, write.values.shape[1]), write) for write in rules.writes),
        count,
    )
    edges = _MergedWrites.of(
        (((edge.stack, edge.layer), edge.change, edge) for edge in rules.edges), count
    )
    return replace(
        rules,
        writes=[_concatenate_writes(joined.parts) for joined in writes],
        edges=[_concatenate_edges(joined.parts) for joined in edges],
    )


def _concatenate_writes(parts: Sequence[SiteWrite]) -> SiteWrite:
    if len(parts) == 1:
        return parts[0]
    to = [part.to for part in parts if part.to is not None]
    return replace(
        parts[0],
        rows=torch.cat([part.rows for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        units=torch.cat([part.units for part in parts]),
        values=torch.cat([part.values for part in parts]),
        to=torch.cat(to) if to else None,
    )


def _concatenate_edges(parts: Sequence[EdgeWrite]) -> EdgeWrite:
    if len(parts) == 1:
        return parts[0]
    sizes = [0, *accumulate(len(part.rows) for part in parts)]
    return replace(
        parts[0],
        rows=torch.cat([part.rows for part in parts]),
        queries=torch.cat([part.queries for part in parts]),
        heads=torch.cat([part.heads for part in parts]),
        entries=torch.cat([part.entries + n for part, n in zip(parts, sizes, strict=False)]),
        keys=torch.cat([part.keys for part in parts]),
        amounts=torch.cat([part.amounts for part in parts]),
    )


NO_STEP = 1 << 40


@dataclass(frozen=True, eq=False)
class RowStates:
    """States that a pass computes: groups of rows that share a computation."""

    rows: Ints
    """[n] rows, grouped by state and ascending within one; the first one leads."""
    of: Ints
    """[n] the state of each row, ascending."""
    parents: Ints
    """[state] the state of the preceding step that it continues."""

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def leaders(self) -> Ints:
        """[state] its leading row."""
        return self.rows[np.searchsorted(self.of, np.arange(len(self)))]

    def placed(self, place: Ints) -> RowStates:
        """Move each state to a new index, [state]."""
        of, parents = place[self.of], np.empty_like(self.parents)
        parents[place] = self.parents
        order = np.argsort(of, kind="stable")
        return RowStates(self.rows[order], of[order], parents)


def number_distinct(values: Sequence[Hashable]) -> Ints:
    """Return [row]: number of its value, from 0 in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    every = [numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(every, dtype=np.int64)


def number_rules(writes: Sequence[SiteWrite], count: int) -> Ints:
    """Return [row]: equal numbers for rows with equal writes, of `count` rows."""
    rules: list[tuple[object, ...]] = [()] * count
    for number, write in enumerate(writes):
        order = write.rows.argsort(stable=True)
        rows, counts = write.rows[order].unique_consecutive(return_counts=True)
        parts = [write.positions, write.units, write.values]
        parts += [] if write.to is None else [write.to]
        each = [part.cpu()[order].view(len(order), -1).view(torch.uint8) for part in parts]
        every = torch.cat(each, dim=1).numpy()
        ends = counts.cumsum(0).tolist()
        for row, first, end in zip(rows.tolist(), [0, *ends], ends, strict=False):
            rules[row] = (*rules[row], number, every[first:end].tobytes())
    return number_distinct(rules)


def find_shared_end(ids: Ints, starts: Ints, first: int) -> tuple[int, Ints]:
    """Find the column up to which it saves most to compute equal beginnings of texts once.

    Args:
        ids: [text, column] token ids, padded on the left.
        starts: [text] column of the first token.
        first: The first column that texts don't share yet.

    Returns:
        The end of these columns, `first` if nothing is saved, and [text] numbers that are equal for
        texts with equal beginnings.
    """
    best, end, numbers = 0, first, np.arange(len(ids))
    of = starts
    for column in range(ids.shape[1] - 1):
        of = np.unique(np.stack([of, ids[:, column]]), axis=1, return_inverse=True)[1].ravel()
        fewer = len(ids) - 1 - int(of.max())
        if not fewer:
            break
        saved = fewer * (column + 1 - first)
        if saved > best and column >= starts.max():
            best, end, numbers = saved, column + 1, of
    return end, numbers


class RowSharing:
    """Grouping of rows that can be computed together, step by step."""

    def __init__(
        self, prompts: Sequence[tuple[int, ...]], acting: Ints, groups: Ints | None
    ) -> None:
        """Prepare the grouping.

        Args:
            prompts: [row] token ids.
            acting: [row] the first step in which a rule acts on it.
            groups: [row] equal for rows with equal rules; None: all rows differ.
        """
        self._prompts = number_distinct(prompts)
        self._acting = acting
        self._groups = np.arange(len(prompts)) if groups is None else groups

    def first(self, by: Ints) -> RowStates:
        """Return the states of the prefill, ordered by `by` [row] of their leading rows."""
        rows = np.arange(len(self._prompts))
        row_states = self._split(rows, self._prompts, np.zeros_like(rows), 0)
        order = np.argsort(by[row_states.leaders], kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        states = RowStates(row_states.rows, row_states.of, np.arange(len(row_states))).placed(place)
        return RowStates(states.rows, states.of, np.arange(len(states)))

    def follow(self, before: RowStates, newest: Ints, step: int) -> RowStates:
        """Return the states of step `step`.

        Args:
            before: States of the preceding step.
            newest: [n] newest token of each row in `before`; negative if the row is finished.
        """
        goes = newest >= 0
        return self._split(before.rows[goes], before.of[goes], newest[goes], step)

    def _split(self, rows: Ints, parents: Ints, tokens: Ints, step: int) -> RowStates:
        """Group rows that continue the same state with the same token and equal rules."""
        acted = self._acting[rows] <= step
        groups = np.where(acted, self._groups[rows], -1)  # -1: no rule has acted yet
        keys = (groups, tokens, parents)
        order = np.lexsort((rows, *keys))
        begins = np.zeros(len(order), dtype=bool)
        for key in keys:
            begins[1:] |= np.diff(key[order]) != 0
        begins[:1] = True
        return RowStates(rows[order], begins.cumsum() - 1, parents[order][begins])


def find_first_step(
    count: int, prefill: RuleWrites, kept: Sequence[SiteWrite], steps: Sequence[StepRules]
) -> Ints:
    """Return [row]: the first step in which a rule acts on a row.

    Changes to all rows alike, such as exchanged blocks, don't count, because they don't distinguish
    rows.
    """
    found = np.full(count, NO_STEP, dtype=np.int64)

    def note(each: Iterable[Tensor], step: int) -> None:
        for rows in each:
            index = rows.cpu().numpy()
            found[index] = np.minimum(found[index], step)

    every = (*prefill.writes, *prefill.edges, *prefill.numbers)
    note((write.rows for write in every), 0)
    note((write.rows for write in kept), 1)
    for rules in steps:
        note((write.rows for write in rules.writes), rules.first)
        note((edge.edge.rows for edge in rules.edges), rules.first)
    return found


SITES_AFTER_ATTENTION = sites_of_stage("mixed", "middle", "mlp", "in_mlp", "end")
"""Sites of a block that its attention doesn't depend on, for the same token and for later ones."""


@dataclass(frozen=True, eq=False)
class RowLineup:
    """Starting point of each state's separate row in a pass."""

    begins: Ints
    """[state] half blocks, ascending; 2 · `n_layers` if only the computation after all blocks is
    separate."""
    like: Ints
    """[state] the state whose row it shares before that; itself if it has a row everywhere. States
    whose rows are shared have a row everywhere."""

    def __len__(self) -> int:
        return len(self.begins)

    @staticmethod
    def apart(count: int) -> RowLineup:
        """Create a lineup in which all states have rows in all blocks."""
        return RowLineup(np.zeros(count, dtype=np.int64), np.arange(count))

    @property
    def shares(self) -> bool:
        """Whether any state lacks a row somewhere."""
        return len(self) > 0 and int(self.begins[-1]) > 0

    def attending(self, block: int) -> int:
        """Return how many states have a row, and keys, in a block's attention: the first ones."""
        return self._up_to(2 * block)

    def rows(self, block: int) -> int:
        """Return how many states have a row in the rest of a block, including those that attend."""
        return self._up_to(2 * block + 1)

    def _up_to(self, place: int) -> int:
        """Return the number of states with a row at a half block."""
        counts = self._counts
        return counts[min(place, len(counts) - 1)] if counts else 0

    @cached_property
    def _counts(self) -> list[int]:
        """[half block] number of states with a row."""
        return np.bincount(self.begins).cumsum().tolist()

    def place(self, states: Ints, block: int) -> Ints:
        """Return the row of a block's attention in which each of these states is computed."""
        return np.where(self.begins[states] <= 2 * block, states, self.like[states])


RowMoves = tuple[Ints, Ints]
"""([k] old rows, [k] new rows) whose keys and values are copied."""

NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


class SharedBlocks:
    """Assignment of states to rows, step by step."""

    def __init__(self, texts: Ints, acting: Ints, lowest: Ints, n_layers: int) -> None:
        """Prepare the assignment.

        Args:
            texts: [row] equal for rows with equal prompts.
            acting: [row] the first step in which a rule acts on it.
            lowest: [row] the first half block that a rule ever changes.
            n_layers: Number of blocks.
        """
        self._texts = texts
        self._acting = acting
        self._lowest = lowest
        self._n_layers = n_layers
        self._leader = np.zeros(0, dtype=np.int64)
        """[state] a state with the same generated tokens after the same prompt."""
        self._begins = np.zeros(0, dtype=np.int64)
        """[state] the half block where its rules begin."""
        self.lineup = RowLineup.apart(0)
        self.moves: Sequence[RowMoves] = ()
        """[block] moves from the preceding step."""

    def begin(self, states: RowStates) -> None:
        """Start with the states of the prefill."""
        self._leader = self._texts[states.leaders]
        self.lineup = RowLineup.apart(len(states))

    def arrange(self, states: RowStates, newest: Ints, step: int) -> RowStates:
        """Order the states of a step so that those with rows in a block come first.

        Args:
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
        leads = self.lineup.like[parents] != parents  # False sorts first: it has all its keys
        order = np.lexsort((parents, leads, -lowest, written))
        first = np.ones(len(order), dtype=bool)
        first[1:] = written[order[1:]] != written[order[:-1]]
        leader = order[first][written]
        every = np.arange(len(rows))
        begins = np.where(leader == every, 0, lowest)
        like = np.where(begins == 0, every, leader)
        place = _assign_rows(begins, parents)
        at = np.argsort(place)
        before, self.lineup = self.lineup, RowLineup(begins[at], place[like[at]])
        self._leader, self._begins, parents = place[leader[at]], lowest[at], parents[at]
        self.moves = [self._moved(before, parents, block) for block in range(self._n_layers)]
        return states.placed(place)

    def _stands(self, lowest: Ints, parents: Ints, newest: Ints) -> bool:
        """Return whether nothing changed since the preceding step.

        States with equal generated tokens must still have equal ones.
        """
        return (
            np.array_equal(lowest, self._begins)
            and np.array_equal(parents, np.arange(len(self._leader)))
            and np.array_equal(newest, newest[self._leader])
        )

    def _moved(self, before: RowLineup, parents: Ints, block: int) -> RowMoves:
        now = np.arange(self.lineup.attending(block))
        was = before.place(parents[: len(now)], block)
        other = was != now
        return was[other], now[other]


def _assign_rows(begins: Ints, parents: Ints) -> Ints:
    """Return [state]: indices in the order of `begins`; most states stay where their parent was."""
    counts = np.bincount(begins)
    ends = counts.cumsum()
    stays = np.flatnonzero((parents >= (ends - counts)[begins]) & (parents < ends[begins]))
    first = np.full(len(begins), -1)
    first[parents[stays[::-1]]] = stays[::-1]  # of several assignments, the last one counts
    taken = first >= 0
    place = np.full(len(begins), -1)
    place[first[taken]] = np.flatnonzero(taken)
    others = np.flatnonzero(place < 0)
    place[others[np.argsort(begins[others], kind="stable")]] = np.flatnonzero(~taken)
    return place


def find_lowest_block(
    model: LoadedModel,
    count: int,
    prefill: RuleWrites,
    kept: Sequence[SiteWrite],
    steps: Sequence[StepRules],
) -> Ints:
    """Return [row]: the first half block that a rule ever changes.

    2 · `n_layers` if there is none, or only after all blocks.
    """
    block = np.full(count, 2 * model.shape.n_layers, dtype=np.int64)
    writes = [*prefill.writes, *kept, *(write for rules in steps for write in rules.writes)]
    edges = [*prefill.edges, *(edge.edge for rules in steps for edge in rules.edges)]
    places = [
        *((write.rows, _find_half_block(model, write)) for write in writes),
        *((edge.rows, 2 * edge.layer) for edge in edges),
        *((number.rows, 0) for number in prefill.numbers),
    ]
    for rows, begin in places:
        index = rows.cpu().numpy()
        block[index] = np.minimum(block[index], begin)
    return block


def _find_half_block(model: LoadedModel, write: SiteWrite) -> int:
    """Return the first half block in which a write makes rows differ."""
    if write.layer is None:
        return 0 if SITES[write.site].when == "embedding" else 2 * model.shape.n_layers
    if SITES[write.site].when == "after":  # the block's output is changed
        return 2 * (write.layer + 1)
    return 2 * write.layer + int(write.site in SITES_AFTER_ATTENTION)
