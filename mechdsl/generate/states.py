"""Rows that have been equal so far are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """What a pass computes."""

    rows: Sequence[Sequence[int]]
    """[state] the rows that it stands for; the first of them leads."""
    parents: Sequence[int]
    """[state] which one of the step before it goes on from."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def leaders(self) -> list[int]:
        """[state]"""
        return [rows[0] for rows in self.rows]

    @property
    def of_row(self) -> dict[int, int]:
        """Row → its state."""
        return {row: state for state, rows in enumerate(self.rows) for row in rows}


class Sharing:
    """Which rows may be computed together, step by step."""

    def __init__(
        self, prompts: Sequence[tuple[int, ...]], acting: Ints, groups: Ints | None
    ) -> None:
        """acting: [row] the first step in which anything is done to it. groups: [row] equal where
        all that is done is equal; None: nowhere."""
        self.prompts = prompts
        self._acting = acting
        self._groups = np.arange(len(prompts)) if groups is None else groups

    def _group(self, row: int, step: int) -> int:
        """What has been done to a row up to a step; -1 for nothing yet."""
        return int(self._groups[row]) if self._acting[row] <= step else -1

    def first(self, by: Callable[[int], int]) -> States:
        """Of the prefill, in the order of what `by` gives for their rows."""
        found: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            found.setdefault((prompt, self._group(row, 0)), []).append(row)
        ordered = sorted(found.values(), key=lambda rows: by(rows[0]))
        return States(ordered, list(range(len(ordered))))

    def follow(self, before: States, tokens: Mapping[int, int], step: int) -> States:
        """Of the next step, `step`.

        tokens: of the rows that go on, their newest token.
        """
        rows: list[Sequence[int]] = []
        parents: list[int] = []
        for parent, every in enumerate(before.rows):
            if len(every) == 1:
                if every[0] in tokens:
                    rows.append(every)
                    parents.append(parent)
                continue
            found: dict[tuple[int, int], list[int]] = {}
            for row in every:
                if row in tokens:
                    found.setdefault((tokens[row], self._group(row, step)), []).append(row)
            rows.extend(found.values())
            parents.extend([parent] * len(found))
        return States(rows, parents)


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
