"""What was observed of all rows at once, cell by cell, in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.digest import digest
from mechdsl.execute.kept_values import KeptValues, Part
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import RulePlan
from mechdsl.plan.value_keys import measure_digest, measure_rows
from mechdsl.prompts.prompt_table import PositionCell, PromptTable
from mechdsl.resolve.over_rows import OverRows, OverTokens
from mechdsl.rules.observations.maps import OfMaps


@dataclass(frozen=True, eq=False)
class KeptTogether:
    """Cells of one experiment: known before the run, or kept when they are made."""

    values: KeptValues
    keys: Sequence[bytes]
    """[cell]"""
    _made: list[Part] = field(default_factory=list[Part])

    def known(self) -> dict[int, tuple[Ints, Floats]]:
        """Cell → (columns among the kept rows, [measure, column]) of those that are there."""
        there = self.values.earlier(self.keys)
        return {
            cell: (there[key][0].astype(np.int64), there[key][1].T)
            for cell, key in enumerate(self.keys)
            if key in there
        }

    def made(self, cell: int, columns: Ints, values: Sequence[Floats]) -> None:
        """Keep a cell, at `flush`. values: per measure, [column], or one number of all."""
        every = np.stack([np.broadcast_to(each, columns.shape) for each in values], axis=1)
        self._made.append((self.keys[cell], columns.astype(np.uint64), every))

    def flush(self) -> None:
        """What was made is on the disk when this returns."""
        self.values.keep(self._made)
        self._made.clear()


def kept_together(
    values: KeptValues | None, plan: ExperimentPlan, rule: RulePlan, rows: Ints, table: PromptTable
) -> KeptTogether | None:
    """Where the cells of an observation over these rows are kept; None where they aren't: tokens
    that are listed are made with a cell, what is of maps is made of numbers that are at hand, and
    what has no digest can't be compared."""
    said, does = rule.rule.spec.observed, rule.rule.does
    assert isinstance(does, OverRows)
    if (
        values is None
        or isinstance(does, OfMaps)
        or (said is not None and said.top and not does.counts)
    ):
        return None
    try:
        shared = _shared(values, plan, rule, does, rows, table)
        cells = range(plan.n_cells)
        keys = [digest(shared, *_of_cell(plan, rule, cell, rows)) for cell in cells]
        return KeptTogether(values, keys)
    except TypeError:
        return None


def _shared(
    values: KeptValues,
    plan: ExperimentPlan,
    rule: RulePlan,
    does: OverRows,
    rows: Ints,
    table: PromptTable,
) -> bytes:
    """All that every cell hangs on: what is made of which rows of which runs."""
    experiment, contents = plan.experiment, values.contents
    own = {name: each for name, each in vars(does).items() if name != "trained_on"}
    runs = [table.runs[name] for name in dict.fromkeys((experiment.spec.base, rule.rule.run))]
    trained: list[object] = []
    if does.trained_on is not None:
        there = does.trained_on
        hits = [cell.hits for cell in there.cells]
        trained = [contents.of(there.run, there.table), hits, list(there.table.row_keys)]
    places = [*rule.positions, *rule.sources] if isinstance(does, OverTokens) else []
    measures = [
        [
            measure_digest(measure),
            [measure_rows(measure, runs[0], item, table, contents)[rows] for item in items],
        ]
        for items in [list(dict.fromkeys(plan.items))]
        for measure in experiment.measures
        if measure.observed
    ]
    return digest(
        *("together", contents.models[experiment.model.key], type(does), own, experiment.seed),
        [[run.draws, contents.of(run, table)[rows]] for run in runs],
        [table.row_keys[row] for row in rows.tolist()],
        *(rows, trained, measures, [_hits(spot, rows) for spot in places]),
    )


def _of_cell(plan: ExperimentPlan, rule: RulePlan, cell: int, rows: Ints) -> Sequence[object]:
    """The sites and positions of a cell, and which of its values it is."""
    index = [int(own[cell]) for own in plan.coordinates]
    along = dict(zip((axis.name for axis in plan.experiment.axes), index, strict=True))
    sites, other, edge, does = rule.rule.sites, rule.rule.beside, rule.rule.edge, rule.rule.does
    assert sites is not None
    assert isinstance(does, OverRows)
    targets = [sites] if other is None else [sites, other]
    points = [each.points[tuple(along[axis] for axis in each.axes)] for each in targets]
    place = int(rule.position_of_cell[cell])
    spots = [rule.positions[place], rule.sources[place]]
    if edge is not None and rule.key_of_cell is not None:
        spots.append(list(edge.keys.written.values())[int(rule.key_of_cell[cell])])
    return [
        [[(p.site, p.layer, p.unit) for p in each] for each in points],
        [_hits(spot, rows) for spot in spots],
        *(along.get(does.counts), plan.items[cell], place if _trains(rule) else None),
    ]


def _hits(spot: PositionCell, rows: Ints) -> Sequence[object]:
    return [spot.hits[row] for row in rows.tolist()]


def _trains(rule: RulePlan) -> bool:
    return isinstance(rule.rule.does, OverRows) and rule.rule.does.trained_on is not None
