"""The cells of an observation over all rows: which vectors they need, and which rows look alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import digest
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.fits.held_out import together
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.read_batches import numbers_of
from mechdsl.plan.rule_rows import RulePlan
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved_rule import SitePoint

GATHERED_BYTES = 1 << 30
"""Of vectors that are held at a time, as far as several cells are."""

Joined: TypeAlias = tuple[SitePoint, ...]
"""The sites of one cell, whose vectors are one, side by side; none where there is nothing."""


@dataclass(eq=False)
class Gatherer:
    """What an observation over all rows needs of which run, in each of its cells."""

    plan: ExperimentPlan
    rule: RulePlan
    does: OverRows
    runs: UnpatchedRuns
    kept: Ints
    known: Collection[int] = ()
    """Cells that nothing is gathered for."""
    sites: list[Joined] = field(init=False)
    """Of each cell."""
    beside: list[Joined] = field(init=False)
    """Of each cell, those that its sites are set against."""
    others: list[PositionCell] = field(init=False)
    """The positions that are set against those of the rule."""

    def __post_init__(self) -> None:
        rule = self.rule
        combinations: list[Joined] = []
        for key in range(len(rule.points.offsets) - 1):
            _, points = rule.points.expand(np.array([key]))
            combinations.append(tuple(rule.point_table[point] for point in points.tolist()))
        self.sites = [combinations[key] for key in rule.site_of_cell.tolist()]
        self.beside = list(self._of_other())
        edge = rule.rule.edge
        self.others = [] if edge is None else list(edge.keys.written.values())

    def _of_other(self) -> Iterator[Joined]:
        """Per cell, the sites that it is set against."""
        other = self.rule.rule.beside
        names = [axis.name for axis in self.plan.experiment.axes]
        for cell in range(self.plan.n_cells):
            if other is None:
                yield ()
                continue
            along = [self.plan.coordinates[names.index(axis)] for axis in other.axes]
            yield other.points[tuple(int(each[cell]) for each in along)]

    def needs(self, cell: int) -> list[Joined]:
        """Both, as far as there are any."""
        return [each for each in (self.sites[cell], self.beside[cell]) if each]

    def fitting(self, cells: Sequence[int], rows: int) -> Iterator[list[int]]:
        """Cells whose vectors are gathered in the same passes."""
        some: list[int] = []
        held: dict[Joined, int] = {}
        for cell in cells:
            more = {each: 12 * rows * sum(map(self.width, each)) for each in self.needs(cell)}
            if some and sum({**held, **more}.values()) > GATHERED_BYTES:
                yield some
                some, held = [], {}
            some.append(cell)
            held.update(more)
        if some:
            yield some

    def width(self, point: SitePoint) -> int:
        """Of the vector of one point: of all units side by side where it names none."""
        return numbers_of(self.runs.model.shape, point, 0)

    def keys(
        self,
        spots: Sequence[PositionCell],
        prompts: Ints,
        runs: Sequence[Run],
        table: PromptTable,
    ) -> list[bytes]:
        """[row] a digest of all that its vectors at some positions hang on, each of its own run: of
        models whose tokens see no later ones, the tokens up to the last position. Tiles of one
        image have one, so that no fit to some of them is told on others."""

        def seen(run: Run, row: int) -> list[object]:
            pairs = zip(spots, runs, strict=True)
            ids, hits = run.rows[row].ids, [spot.hits[row] for spot, own in pairs if own is run]
            last = max(token for own in hits for tokens in own for token in tokens)
            causal = self.runs.model_of(run).shape.causal
            # Of noise, and of rules (`run NAME { … }`), a row's whole content matters.
            alone = run.noise is None and run.derived is None
            drawn = None if alone else table.row_keys[row]
            return [ids[: last + 1] if causal else ids, hits, drawn]

        distinct = list({id(run): run for run in runs}.values())
        found = [
            digest(*(part for run in distinct for part in seen(run, row)))
            for row in prompts.tolist()
        ]
        images = table.cut_from
        return together(found, [images[row] for row in prompts.tolist()]) if images else found


def points_of(combinations: Sequence[Joined]) -> list[SitePoint]:
    """Each once."""
    return list(dict.fromkeys(point for each in combinations for point in each))
