"""All rows of a cell at once, for rules that make what they write of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan


@dataclass(frozen=True, eq=False)
class WholeCell:
    """What a rule is given at once: the same in all cells that differ elsewhere only."""

    site: int
    """Index of the site combination."""
    cell: int
    """The first cell that has it."""
    runs: Ints
    """[row] indices into the rule's `written.tokens`, in the order of the data."""
    prompts: Ints
    """[row]: a prompt with several runs under one label stands there with each."""


@dataclass(frozen=True, eq=False)
class WholeCells:
    """The rows of every cell, for one rule."""

    of_cell: Ints
    """[cell] index into `cells`; −1 where a cell has no rows."""
    cells: tuple[WholeCell, ...]

    def place(self, rule: RulePlan, rows: Rows) -> tuple[Ints, Ints]:
        """([row] index into `cells`, [row] which of its rows it is)."""
        cell, run = self.of_cell[rows.cell], rule.written_runs(rows)
        within = np.zeros(len(rows), dtype=np.int64)
        for index in np.unique(cell):
            own, runs = cell == index, self.cells[index].runs
            order = np.argsort(runs)
            within[own] = order[np.searchsorted(runs, run[own], sorter=order)]
        return cell, within


def whole_cells(plan: ExperimentPlan, rows: Rows) -> Mapping[int, WholeCells]:
    """By number of the rule, what it is given; of rules that read whole cells.

    rows: all rows of the experiment, in every cell
    """
    ids = np.array(plan.experiment.table.row_ids, dtype=np.int64)
    return {
        number: _of_rule(rule, rows, plan.n_cells, ids)
        for number, rule in enumerate(plan.rules)
        if rule.rule.does.reads == "cell"
    }


def _of_rule(rule: RulePlan, rows: Rows, count: int, ids: Ints) -> WholeCells:
    """ids: [prompt] of its row in the data"""
    of_cell = np.full(count, -1, dtype=np.int64)
    found: dict[tuple[int, bytes], WholeCell] = {}
    numbers: dict[tuple[int, bytes], int] = {}
    run = rule.written_runs(rows)
    order = np.lexsort((run, rows.cell))
    cells, begins = np.unique(rows.cell[order], return_index=True)
    for cell, own in zip(cells.tolist(), np.split(order, begins[1:]), strict=True):
        runs, first = np.unique(run[own], return_index=True)  # other rules may have more runs
        key = (int(rule.site_of_cell[cell]), runs.tobytes())
        of_cell[cell] = numbers.setdefault(key, len(numbers))
        if key not in found:
            prompts = rows.prompt[own[first]]
            as_given = np.lexsort((runs, ids[prompts]))
            found[key] = WholeCell(key[0], cell, runs[as_given], prompts[as_given])
    return WholeCells(of_cell, tuple(found.values()))
