"""What acts in one pass: on which of its rows, at which positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.generate.records import StepEdge, StepRules
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites


class Chosen:
    """Some rows, which are those of a pass."""

    def __init__(self, count: int, rows: Sequence[int] | Ints) -> None:
        """rows: of `count` ones, in the order of the pass; each at most once."""
        self.rows = torch.from_numpy(np.array(rows, dtype=np.int64))
        self.to = torch.full((count,), -1, dtype=torch.long)
        """[row] which row of the pass it is; -1 where it isn't there."""
        self.to[self.rows] = torch.arange(len(self.rows))

    def _there(self, rows: Tensor) -> Tensor:
        return self.to[rows] >= 0

    def write(self, write: SiteWrite) -> SiteWrite:
        """The part of a write."""
        return write.some(self._there(write.rows)).moved(self.to)

    def edge(self, edge: EdgeWrite) -> EdgeWrite:
        """The part of changed edges."""
        return edge.some(self._there(edge.rows)).moved(self.to)

    def rules(self, rules: RuleWrites) -> RuleWrites:
        """The part of what rules write."""
        return RuleWrites(
            [write for each in rules.writes if len((write := self.write(each)).rows)],
            [edge for each in rules.edges if len((edge := self.edge(each)).rows)],
            [each.some(self._there(each.rows)).moved(self.to) for each in rules.numbers],
            rules.blocks,
        )

    def step_rules(self, rules: StepRules) -> StepRules:
        """The part of what acts at newest tokens."""
        return replace(
            rules,
            writes=[own for each in rules.writes if len((own := self.write(each)).rows)],
            edges=[
                replace(each, edge=edge)
                for each in rules.edges
                if len((edge := self.edge(each.edge)).rows)
            ],
        )

    def step(
        self, steps: Sequence[StepRules], step: int, prompts: Tensor, newest: Tensor
    ) -> RuleWrites:
        """What acts at the newest token of a step, and writes where it stands.

        prompts: [row of the pass] tokens of the prompt. newest: [row of the pass] position of the
        newest token.
        """
        found = RuleWrites()
        for rules in steps:
            if not rules.acts(step):
                continue
            mine = self.step_rules(rules)
            own = RuleWrites(
                [replace(each, positions=newest[each.rows]) for each in mine.writes],
                [_at_newest(each, prompts, newest) for each in mine.edges],
                blocks=rules.blocks,
            )
            found = found.then(own)
        return found


def over_replies(prefill: RuleWrites, later: Sequence[RuleWrites]) -> RuleWrites:
    """What acts in one pass over prompts and replies, where each rule comes before the next one.

    A rule writes later tokens first, because a step reads the previous token as it was before the
    rule.

    Args:
        prefill: What acts in the prompts.
        later: [step - 1] what acts at the newest token of each step.

    Returns:
        Everything, with the blocks of the prefill.
    """
    found = RuleWrites()
    for each in (*(replace(own, blocks=()) for own in reversed(later)), prefill):
        found = found.then(each)
    return replace(found, writes=sorted(found.writes, key=lambda write: write.rule))


def joined(steps: Sequence[StepRules], count: int) -> list[StepRules]:
    """The same in few writes: neighbours that act in the same steps are one.

    count: rows.
    """
    found: list[StepRules] = []
    for _, some in groupby(steps, lambda rules: (rules.first, rules.last, tuple(rules.blocks))):
        each = list(some)
        writes = RuleWrites([write for rules in each for write in rules.writes])
        edges = [edge for rules in each for edge in rules.edges]
        found.append(replace(each[0], writes=merged(writes, count).writes, edges=edges))
    return found


def _at_newest(each: StepEdge, prompts: Tensor, newest: Tensor) -> EdgeWrite:
    """Edges from the newest token of each row."""
    edge = each.edge
    if edge.change == "allow":
        raise ValueError("what the newest token sees can't be allowed besides")
    queries = newest[edge.rows]
    entries, keys = [edge.entries], [edge.keys]
    if each.also:
        first = queries if each.also == "newest" else prompts[edge.rows]
        count = queries - first + 1
        own = torch.arange(len(queries)).repeat_interleave(count)
        before = torch.cumsum(count, 0) - count
        entries.append(own)
        keys.append(first[own] + torch.arange(len(own)) - before[own])
    return replace(edge, queries=queries, entries=torch.cat(entries), keys=torch.cat(keys))


@dataclass(eq=False)
class _Joined:
    """Writes or edges that can be one, as no row has two of them."""

    kind: object
    rows: Tensor
    """[row] bool."""
    parts: list[Any]

    @classmethod
    def of(cls, each: Iterable[tuple[object, object, Any]], count: int) -> list[_Joined]:
        """each: (what it must not pass by another of, what it must have in common, itself)."""
        found: dict[object, list[_Joined]] = {}
        for where, kind, part in each:
            before = found.setdefault(where, [])
            best: _Joined | None = None
            for other in reversed(before):
                if bool(other.rows[part.rows].any()):
                    break
                best = other if other.kind == kind else best
            if best is None:
                best = cls(kind, torch.zeros(count, dtype=torch.bool), [])
                before.append(best)
            best.rows[part.rows] = True
            best.parts.append(part)
        return [joined for every in found.values() for joined in every]


def merged(rules: RuleWrites, count: int) -> RuleWrites:
    """The same in fewer writes; those of one row stay in their order.

    count: rows of the pass.
    """
    writes = _Joined.of(
        ((each.where, (each.mode, each.values.shape[1]), each) for each in rules.writes),
        count,
    )
    edges = _Joined.of(((each.layer, each.change, each) for each in rules.edges), count)
    return replace(
        rules,
        writes=[_one_write(joined.parts) for joined in writes],
        edges=[_one_edge(joined.parts) for joined in edges],
    )


def _one_write(parts: Sequence[SiteWrite]) -> SiteWrite:
    if len(parts) == 1:
        return parts[0]
    to = [each.to for each in parts if each.to is not None]
    return replace(
        parts[0],
        rows=torch.cat([each.rows for each in parts]),
        positions=torch.cat([each.positions for each in parts]),
        units=torch.cat([each.units for each in parts]),
        values=torch.cat([each.values for each in parts]),
        to=torch.cat(to) if to else None,
    )


def _one_edge(parts: Sequence[EdgeWrite]) -> EdgeWrite:
    if len(parts) == 1:
        return parts[0]
    sizes = [0, *accumulate(len(each.rows) for each in parts)]
    return replace(
        parts[0],
        rows=torch.cat([each.rows for each in parts]),
        queries=torch.cat([each.queries for each in parts]),
        heads=torch.cat([each.heads for each in parts]),
        entries=torch.cat([each.entries + n for each, n in zip(parts, sizes, strict=False)]),
        keys=torch.cat([each.keys for each in parts]),
        amounts=torch.cat([each.amounts for each in parts]),
    )
