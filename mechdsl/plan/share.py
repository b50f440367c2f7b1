"""Rows that several cells or experiments have in common, each run once.

Two rows are the same where they start from the same run of the same prompt and write the same to
the same places, in the same steps of replies that are written alike; what is measured on them may
differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.columns import Hits, Ragged
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.whole_cells import WholeCells, whole_cells


@dataclass(frozen=True, eq=False)
class SharedRows:
    """The distinct rows of some experiments on the same prompts."""

    owner: Ints
    """[distinct] number of the experiment that says what is written."""
    rows: Rows
    """[distinct] as its experiment counts."""
    members: tuple[tuple[Ints, Rows], ...]
    """Per experiment: for each of its rows, the distinct row that it is; and the rows."""

    def __len__(self) -> int:
        return len(self.owner)


class Sharer:
    """Finds equal rows of the experiments of a panel."""

    def __init__(
        self,
        plans: Sequence[ExperimentPlan],
        *,
        share: bool,
        cells: Sequence[Mapping[int, WholeCells]] | None = None,
        kept: Sequence[Ints] | None = None,
    ) -> None:
        """cells: per plan, as `whole_cells` gives them; None where all rows are in them. kept: per
        plan, the rows that means and donors are of; None where it is all."""
        self.plans = plans
        self._cells = [_of_all(plan) for plan in plans] if cells is None else cells
        self.share = share
        self._numbers: dict[Hashable, int] = {}
        of = [b"" for _ in plans] if kept is None else [each.tobytes() for each in kept]
        self._keys = [
            [self._rule(rule, own) for rule in plan.rules]
            for plan, own in zip(plans, of, strict=True)
        ]

    def of(self, rows: Sequence[Rows]) -> SharedRows:
        """The rows of each experiment, equal ones once."""
        owner = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        every = Rows(
            *(
                np.concatenate([getattr(one, name) for one in rows])
                for name in ("cell", "prompt", "alternative")
            )
        )
        first = inverse = np.arange(len(owner))
        if self.share and len(owner):
            columns = [self._columns(number, one) for number, one in enumerate(rows)]
            code = combined(columns, [len(one) for one in rows])
            _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
        ends = np.cumsum([len(one) for one in rows])[:-1]
        return SharedRows(
            owner[first],
            every.take(first),
            tuple(zip(np.split(inverse, ends), rows, strict=True)),
        )

    def _columns(self, number: int, rows: Rows) -> list[Ints]:
        """What makes a row of one experiment what it is."""
        plan = self.plans[number]
        runs = np.array([self._number(id(run)) for run in plan.starting_runs], dtype=np.int64)
        draws = np.full(len(rows), plan.draws)
        found = [runs[plan.starting_run(rows)], draws, rows.prompt, self._drawn(plan, rows)]
        either: dict[str, int] = {}
        for place, rule in enumerate(plan.rules):
            if rule.rule.does.changes == "nothing":  # whatever is looked at, the row is the same
                continue
            own = self._of_rule(number, place, rows)
            if rule.rule.only is not None:  # each row has one of them, in the same columns
                begin = either.setdefault(rule.rule.only.axis, len(found))
                before = found[begin : begin + len(own)] or [np.full(len(rows), -1)] * len(own)
                acts = rule.acts(rows)
                own = [np.where(acts, a, b) for a, b in zip(own, before, strict=True)]
                found[begin : begin + len(own)] = own
            else:
                found += own
        return found

    def _drawn(self, plan: ExperimentPlan, rows: Rows) -> Ints:
        """[row] what its reply is drawn by, beside the prompt."""
        said = plan.experiment.generation
        if said is None or not said.sampled:
            return np.zeros(len(rows), dtype=np.int64)
        cells, inverse = np.unique(rows.cell, return_inverse=True)
        found = [self._number(("drawn", plan.content(cell))) for cell in cells.tolist()]
        return np.array(found, dtype=np.int64)[inverse]

    def _of_rule(self, number: int, place: int, rows: Rows) -> list[Ints]:
        """What a rule does to each row."""
        rule, key = self.plans[number].rules[place], self._keys[number][place]
        position = rule.position_of_cell[rows.cell]
        found = [
            np.full(len(rows), key.does),
            key.points[rule.site_of_cell[rows.cell]],
            key.written[rule.written_runs(rows)],
        ]
        if key.whole is None:
            run = rule.read.run(position, rows.prompt, rows.alternative)
            found.append(key.read[run])
        else:
            found.append(key.whole[position])
        # What the rule does, in front, says which of these follow.
        if place in self._cells[number]:
            found.append(self._of_cell(rule, self._cells[number][place], rows))
        found.append(rule.follow(rows))
        if key.keys is not None:
            found.append(key.keys[rule.key_runs(rows)])
        if rule.rule.amounts is not None:
            found.append(key.amounts[rows.cell])
        if rule.steps is not None:
            found += list(rule.steps[rows.cell].T)
        if key.directions is not None:
            found.append(key.directions[rows.cell])
        if rule.paths is not None and key.receivers is not None:
            found.append(key.receivers[rule.paths.pair_of_cell[rows.cell]])
        return found

    def _of_cell(self, rule: RulePlan, cells: WholeCells, rows: Rows) -> Ints:
        """[row] the rows that its cell has."""
        tokens = rule.read.tokens
        numbers = [
            self._number(
                (
                    "cell",
                    cell.prompts.tobytes(),
                    tokens.counts(cell.runs).tobytes(),
                    tokens.expand(cell.runs)[1].tobytes(),
                )
            )
            for cell in cells.cells
        ]
        return np.array(numbers, dtype=np.int64)[cells.of_cell[rows.cell]]

    def _rule(self, rule: RulePlan, kept: bytes) -> _RuleKey:
        does = rule.rule.does
        pairs = list(zip(rule.point_table, rule.source_table, strict=True))
        points = [
            tuple(pairs[i] for i in _list(rule.points, key))
            for key in range(len(rule.points.offsets) - 1)
        ]
        receivers = None
        if rule.paths is not None:
            paths = rule.paths
            ends = [
                tuple(paths.table[i] for i in _list(paths.points, key))
                for key in range(len(paths.points.offsets) - 1)
            ]
            receivers = np.array([self._number(("to", end)) for end in ends], dtype=np.int64)
        whole = None
        if does.over_rows:
            cells = zip(rule.positions, rule.sources, strict=True)
            numbers = [self._number((to.hits, of.hits, kept)) for to, of in cells]
            whole = np.array(numbers, dtype=np.int64)
        return _RuleKey(
            self._number(
                (
                    *(does.name, does.mode, does.key(rule.rule)),
                    *(rule.steps is None, rule.rule.after_prefill),
                )
            ),
            np.array([self._number(one) for one in points], dtype=np.int64),
            self._tokens(rule.written),
            self._tokens(rule.read),
            whole,
            None if rule.keys is None else self._tokens(rule.keys),
            np.array([self._number(("amount", one)) for one in rule.amounts.tolist()]),
            self._directions(rule),
            receivers,
        )

    def _directions(self, rule: RulePlan) -> Ints | None:
        """[cell]"""
        if rule.direction_of_cell is None:
            return None
        numbers = [self._number(("direction", member.name)) for member in rule.directions]
        return np.array(numbers, dtype=np.int64)[rule.direction_of_cell]

    def _tokens(self, hits: Hits) -> Ints:
        """[run] a number for its tokens: the token itself where there is one."""
        runs = np.arange(len(hits.tokens.offsets) - 1)
        found = hits.leftmost(runs) if len(runs) else runs
        for run in np.flatnonzero(hits.tokens.counts(runs) > 1):
            begin, end = hits.tokens.offsets[run : run + 2]
            found[run] = -1 - self._number(hits.tokens.values[begin:end].tobytes())
        return found

    def _number(self, content: Hashable) -> int:
        return self._numbers.setdefault(content, len(self._numbers))


def _of_all(plan: ExperimentPlan) -> Mapping[int, WholeCells]:
    if not any(rule.rule.does.reads == "cell" for rule in plan.rules):
        return {}
    prompts = np.arange(len(plan.experiment.table), dtype=np.int64)
    return whole_cells(plan, plan.rows(prompts))


@dataclass(frozen=True, eq=False)
class _RuleKey:
    """Numbers for what a rule writes; equal ones mean the same."""

    does: int
    points: Ints
    """[site combination]"""
    written: Ints
    """[run]"""
    read: Ints
    """[run]"""
    whole: Ints | None
    """[position], where what is written hangs on the positions of all rows."""
    keys: Ints | None
    """[run of keys], of attention rules."""
    amounts: Ints
    """[cell]"""
    directions: Ints | None
    """[cell], of rules that steer along one."""
    receivers: Ints | None
    """[pair of senders and receivers]"""


def _list(ragged: Ragged, key: int) -> list[int]:
    return ragged.values[ragged.offsets[key] : ragged.offsets[key + 1]].tolist()


def combined(columns: Sequence[Sequence[Ints]], lengths: Sequence[int]) -> Ints:
    """[row] one number for all columns: equal where all of them are.

    columns: of several parts, side by side; a part that has fewer is filled up.
    """
    code = np.zeros(sum(lengths), dtype=np.int64)
    size = 1
    for number in range(max((len(part) for part in columns), default=0)):
        column = np.concatenate(
            [
                part[number] if number < len(part) else np.full(length, -1, dtype=np.int64)
                for part, length in zip(columns, lengths, strict=True)
            ]
        )
        values, column = np.unique(column, return_inverse=True)
        if size * len(values) >= 1 << 62:
            distinct, code = np.unique(code, return_inverse=True)
            size = len(distinct)
        code = code * len(values) + column
        size *= len(values)
    return code
