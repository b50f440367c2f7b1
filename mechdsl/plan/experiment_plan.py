"""One experiment's cells laid out as rows, columns of integers in numpy.

The unit is the row: one cell on one prompt, because positions (and with several tokens under one
label, the number of runs) differ from prompt to prompt. Rows are made for a batch of prompts at a
time and never held as objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import number_of
from mechdsl.graph.needs import Asked
from mechdsl.plan.columns import Hits, Ragged, counted
from mechdsl.plan.inert import Inert, inert_cells, inert_of, inert_rows
from mechdsl.plan.rule_rows import EVERY, NEWEST, NOTHING, PathPlan, Rows, RulePlan
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.direction_types import Member
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.over_rows import OverRows, OverTokens
from mechdsl.resolve.path_rules import reached
from mechdsl.resolve.resolved import DRAW, Env, ResolvedExperiment
from mechdsl.resolve.resolved_rule import Key, PositionTargets, ResolvedRule, SitePoint
from mechdsl.vocab.sites import SITES, of_stage


@dataclass(frozen=True, eq=False)
class ExperimentPlan:
    """Everything that is known of an experiment's rows before the model runs."""

    experiment: ResolvedExperiment
    """As the graph has it."""
    runs: tuple[str, ...]
    """Every unpatched run that it reads, measures or starts from."""
    coordinates: tuple[Ints, ...]
    """Per axis, the index of every cell along it."""
    rules: tuple[RulePlan, ...]
    lowest: Ints
    """Per cell, the lowest block that it writes to or that a measure reads."""
    inert_runs: tuple[Inert, ...]
    """Per rule, what it writes that can't change anything."""
    inert: NDArray[np.bool_]
    """Per cell: by structure none of its rows can differ from the base run."""
    items: tuple[Env, ...]
    """Per cell, its occurrence, where an axis runs over occurrences."""
    drawn: NDArray[np.bool_] | None = None
    """Per cell, whether there is one: of a control, whether it has this draw; where measures name a
    loop's variable, whether it has the value that they are read for. None for all."""

    @property
    def n_cells(self) -> int:
        return len(self.lowest)

    @property
    def whole(self) -> bool:
        """Whether its rows are whole passes, whatever else is planned: a rule asks for it, they
        start from a run that has rules, are estimated, or what a path holds isn't what that run
        has."""
        if any(run.derived is not None for run in self.starting_runs):
            return True
        if self.experiment.spec.estimator is not None:
            return True
        if self.path is not None and (self.beside_path or self._seen_in_mlps):
            return True
        return any(plan.rule.does.whole for plan in self.rules)

    @property
    def path(self) -> RulePlan | None:
        """The rule that patches a path, if there is one."""
        return next((plan for plan in self.rules if plan.paths is not None), None)

    @property
    def beside_path(self) -> tuple[RulePlan, ...]:
        """The rules that act beside a path."""
        others = (plan for plan in self.rules if plan.paths is None)
        return tuple(plan for plan in others if plan.rule.does.changes != "nothing")

    @property
    def _seen_in_mlps(self) -> bool:
        """Whether measures read what MLPs compute, which aren't computed where they are held."""
        points = (atom.point for m in self.experiment.measures for atom in m.atoms)
        return any(p is not None and p.site in of_stage("in_mlp") for p in points)

    @cached_property
    def senders(self) -> Ints:
        """[cell] equal where the senders of its path and the rules beside it are the same, so that
        all receivers are read in one pass."""
        path = self.path
        assert path is not None
        assert path.rule.sites is not None
        used = {*path.rule.sites.axes, *path.rule.positions.axes}
        used.update(name for plan in self.beside_path for name in plan.rule.axes)
        found = np.zeros(self.n_cells, dtype=np.int64)
        for axis, own in zip(self.experiment.axes, self.coordinates, strict=True):
            if axis.name in used:
                found = found * len(axis) + own
        return found

    def replaced_blocks(self, cell: int) -> tuple[tuple[int, int | None], ...]:
        """Blocks that don't do their own work in a cell, and which do it; None where none does."""
        found: dict[int, int | None] = {}
        for plan in self.rules:
            if plan.rule.does.changes == "blocks":
                for index in _list(plan.points, int(plan.site_of_cell[cell])).tolist():
                    to, of = plan.point_table[index], plan.source_table[index]
                    assert to.layer is not None
                    found[to.layer] = None if of.site == to.site else of.layer
        return tuple(sorted(found.items()))

    def content(self, cell: int) -> int:
        """A number for what a cell does: its values along the axes of rules that act. It doesn't
        depend on names, the cell's index, other cells or observations."""
        acting = (plan.rule.axes for plan in self.rules if plan.rule.does.changes != "nothing")
        names = frozenset[str]().union(*acting)
        labels = [
            axis.labels[own[cell]]
            for axis, own in zip(self.experiment.axes, self.coordinates, strict=True)
            if axis.name in names
        ]
        return number_of("cell", labels)

    @property
    def behind(self) -> bool:
        """Whether a rule acts on tokens of the answer, behind the prompt."""
        return any(plan.behind for plan in self.rules)

    @property
    def exists(self) -> NDArray[np.bool_]:
        """[cell] whether there is such a cell: paths only lead forward, and there may be no more
        targets to be drawn."""
        found = np.ones(self.n_cells, dtype=np.bool_)
        if self.drawn is not None:
            found &= self.drawn
        for plan in self.rules:
            if plan.paths is not None:
                found &= plan.paths.exists
            if plan.rule.beside is not None:
                found &= np.array([plan.rule.leads(at) for at in self._along()])
        return found

    def _along(self) -> Iterator[dict[str, int]]:
        """Per cell, its index along each axis."""
        names = [axis.name for axis in self.experiment.axes]
        for cell in range(self.n_cells):
            yield {n: int(own[cell]) for n, own in zip(names, self.coordinates, strict=True)}

    @property
    def draws(self) -> int:
        """Draws of noise that every row is run with, of all runs that it starts from or reads."""
        spec = self.experiment.spec
        names = [spec.base, spec.source, *(plan.rule.run for plan in self.rules)]
        runs = self.experiment.table.runs
        return max((runs[name].draws for name in names if name is not None), default=1)

    @property
    def replaced(self) -> RulePlan | None:
        """The rule that puts other text into the prompts, if there is one."""
        return next((plan for plan in self.rules if plan.rule.does.changes == "input"), None)

    @property
    def observes(self) -> RulePlan | None:
        """The rule that is measured by what it looks at, if there is one."""
        return next((plan for plan in self.rules if plan.rule.does.changes == "nothing"), None)

    @property
    def lists(self) -> int:
        """How many tokens are listed of each cell, by what is seen of its rows."""
        rule = None if self.observes is None else self.observes.rule
        return rule.does.lists(rule) if rule and isinstance(rule.does, Observation) else 0

    @property
    def starting_runs(self) -> tuple[Run, ...]:
        """The runs that rows start from: the base run, or those with the text put in."""
        if not self.rules:
            return ()
        if self.replaced is not None:
            return tuple(self.replaced.rule.inputs.values())
        return (self.experiment.table.runs[self.experiment.spec.base],)

    def starting_run(self, rows: Rows) -> Ints:
        """[row] index into `starting_runs`."""
        if self.replaced is None:
            return np.zeros(len(rows), dtype=np.int64)
        return self.replaced.position_of_cell[rows.cell]

    def lengths(self, rows: Rows) -> Ints:
        """[row] tokens of the prompt that it starts from."""
        which = self.starting_run(rows)
        found = np.zeros(len(rows), dtype=np.int64)
        for index, run in enumerate(self.starting_runs):
            found = np.where(which == index, run.lengths[rows.prompt], found)
        return found

    def leftmost(self, rows: Rows) -> Ints:
        """The first position that each row writes to."""
        first = np.full(len(rows), np.iinfo(np.int64).max, dtype=np.int64)
        for plan in self.rules:
            own = plan.written.leftmost(plan.written_runs(rows))
            first = np.where(plan.acts(rows), np.minimum(first, own), first)
        return first

    def is_inert(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows can't differ from the base run, by structure."""
        return inert_rows(self.inert_runs, self.rules, rows)

    def _runs(self, prompts: Ints) -> Ints:
        """[cell, prompt]: how many runs there are, none where a rule has no position."""
        counts = np.ones((self.n_cells, len(prompts)), dtype=np.int64)
        for plan in self.rules:
            own = plan.run_counts(prompts)
            counts = np.where((own == 0) | (counts == 0), 0, np.maximum(own, counts))
        if self.drawn is not None:
            counts[~self.drawn] = 0
        return counts

    def present(self, prompts: Ints) -> NDArray[np.bool_]:
        """[cell, prompt] whether the prompt is part of the cell: no rule lacks a position there."""
        return self._runs(prompts) > 0

    def count(self, prompts: Ints | None = None) -> int:
        """Patched rows on these prompts (or all), draws included: passes of the plain loop."""
        if prompts is None:
            prompts = np.arange(len(self.experiment.table), dtype=np.int64)
        return int(self._runs(prompts).sum()) * self.draws if self.rules else 0

    def passes(self, prompts: Ints) -> Rows:
        """The rows that are run: of what is observed of all rows at once, one for every position,
        whose pass all cells read, or one of all positions; none of what is observed of weights,
        and of estimates."""
        run = self.rules and self.experiment.spec.estimator is None
        rows = self.rows(prompts) if run else Rows.none()
        for plan in self.rules:
            if isinstance(plan.rule.does, OverRows):
                first = np.unique(plan.position_of_cell, return_index=True)[1]
                read = first if plan.rule.does.reads_vectors else first[:0]
                rows = rows.take(np.flatnonzero(np.isin(rows.cell, read)))
            if isinstance(plan.rule.does, OverTokens):  # all of whose positions one pass has
                rows = rows.take(np.unique(rows.prompt, return_index=True)[1])
        return rows

    def rows(self, prompts: Ints) -> Rows:
        """All rows on these prompts, ordered by cell and prompt."""
        flat = self._runs(prompts).ravel()
        place, alternative = counted(flat)
        cell = np.repeat(np.arange(self.n_cells), len(prompts))[place]
        prompt = np.tile(prompts, self.n_cells)[place]
        return Rows(cell, prompt, alternative)


def plan_experiment(each: Asked) -> ExperimentPlan:
    """Lay the cells of one experiment out."""
    experiment = each.experiment
    shape = experiment.shape
    count = experiment.n_cells
    coordinates = (
        tuple(np.asarray(c, dtype=np.int64) for c in np.unravel_index(np.arange(count), shape))
        if shape
        else ()
    )
    names = [axis.name for axis in experiment.axes]
    by_name = dict(zip(names, coordinates, strict=True))
    parallel = experiment.model.shape.parallel_block
    rules = tuple(
        replace(plan, behind=_is_behind(experiment, plan), number=number)
        for number, plan in enumerate(
            _rule_plan(rule, by_name, count, parallel=parallel) for rule in experiment.rules
        )
    )
    items: list[Env] = [None] * count
    for axis in experiment.axes:
        if axis.items:
            items = [axis.items[i] for i in by_name[axis.name]]
    inert_runs = tuple(inert_of(experiment, plan) for plan in rules)
    return ExperimentPlan(
        experiment=experiment,
        runs=tuple(forward.run for forward in each.runs),
        coordinates=coordinates,
        rules=rules,
        lowest=_lowest(experiment, rules, count),
        inert_runs=inert_runs,
        inert=inert_cells(inert_runs, rules, count),
        items=tuple(items),
        drawn=_there(experiment, by_name, count),
    )


def _there(
    experiment: ResolvedExperiment, by_name: Mapping[str, Ints], count: int
) -> NDArray[np.bool_] | None:
    """[cell] which of them there are; None where that is all."""
    drawn = _drawn(experiment, by_name, count)
    nest = experiment.own_loops
    if nest is not None and nest.axes:
        keys = zip(*(by_name[axis].tolist() for axis in nest.axes), strict=True)
        own = np.array([key in nest.keys for key in keys], dtype=np.bool_)
        drawn = own if drawn is None else drawn & own
    fixed = {} if experiment.place is None else experiment.place.fixed
    for name, index in fixed.items():
        if name not in by_name:  # without rules there is one cell for each of its values
            continue
        own = by_name[name] == index
        drawn = own if drawn is None else drawn & own
    return drawn


def _drawn(
    experiment: ResolvedExperiment, by_name: Mapping[str, Ints], count: int
) -> NDArray[np.bool_] | None:
    """[cell] which draws there are."""
    drawn = experiment.drawn
    if drawn is None:
        return None
    counts = np.array(list(drawn.counts.values()), dtype=np.int64)
    there = by_name[DRAW] < counts[_lookup(list(drawn.counts), drawn.axes, by_name, count)]
    return None if there.all() else there


def _rule_plan(
    rule: ResolvedRule, by_name: Mapping[str, Ints], count: int, *, parallel: bool
) -> RulePlan:
    site_of_cell = np.zeros(count, dtype=np.int64)
    table: dict[tuple[SitePoint, SitePoint], int] = {}
    lists: list[list[int]] = [[]]
    if rule.sites is not None:
        sites = rule.sites
        keys = list(sites.points)
        site_of_cell = _lookup(keys, sites.axes, by_name, count)
        sources = sites.points if sites.sources is None else sites.sources
        lists = [
            [
                table.setdefault(pair, len(table))
                for pair in zip(sites.points[key], sources[key], strict=True)
            ]
            for key in keys
        ]
    donated = rule.does.reads == "donor"
    active = None
    if rule.only is not None:  # elsewhere it has no sites
        active = by_name[rule.only.axis] == rule.only.index
        site_of_cell = np.where(active, site_of_cell, len(lists))
        lists.append([])
    positions = list(rule.positions.written)
    written = tuple(rule.positions.written[key] for key in positions)
    read = tuple(rule.positions.read[key] for key in positions)
    amounts = np.zeros(count)
    if rule.amounts is not None:
        values = np.array(list(rule.amounts.values.values()))
        amounts = values[_lookup(list(rule.amounts.values), rule.amounts.axes, by_name, count)]
    directions: tuple[Member, ...] = ()
    direction_of_cell = None
    if rule.direction is not None:
        directions = tuple(rule.direction.members.values())
        members = list(rule.direction.members)
        direction_of_cell = _lookup(members, rule.direction.axes, by_name, count)
    steps = None
    if rule.steps is not None:
        ends = np.array(list(rule.steps.values.values()), dtype=np.int64)
        steps = ends[_lookup(list(rule.steps.values), rule.steps.axes, by_name, count)]
    keys_hit, key_of_cell = None, None
    if rule.edge is not None:
        cells = rule.edge.keys.written
        keys_hit = Hits.of(tuple(cells.values()))
        key_of_cell = _lookup(list(cells), rule.edge.keys.axes, by_name, count)
    return RulePlan(
        rule=rule,
        site_of_cell=site_of_cell,
        position_of_cell=_lookup(positions, rule.positions.axes, by_name, count),
        points=Ragged.of(lists),
        point_table=tuple(pair[0] for pair in table),
        source_table=tuple(pair[1] for pair in table),
        written=Hits.of(written),
        read=Hits.of(written if rule.apart is not None and not donated else read),
        averaged=Hits.of(read),
        positions=written,
        sources=read,
        amounts=amounts,
        directions=directions,
        direction_of_cell=direction_of_cell,
        keys=keys_hit,
        key_of_cell=key_of_cell,
        follows=_follows(rule.positions),
        keys_follow=_follows(None if rule.edge is None else rule.edge.keys),
        paths=_paths(rule, site_of_cell, by_name, count, parallel=parallel),
        active=active,
        steps=steps,
    )


def _follows(targets: PositionTargets | None) -> Ints:
    """[position] what of a reply is meant."""
    if targets is None:
        return np.zeros(0, dtype=np.int64)
    found = [
        EVERY if key in targets.every else NEWEST if key in targets.newest else NOTHING
        for key in targets.written
    ]
    return np.array(found, dtype=np.int64)


def _is_behind(experiment: ResolvedExperiment, plan: RulePlan) -> bool:
    """Whether a rule acts on tokens behind the prompts."""
    runs, base = experiment.table.runs, experiment.spec.base
    places = [(plan.written, base)]
    places += [] if plan.keys is None else [(plan.keys, base)]
    places += [] if plan.rule.apart is not None else [(plan.read, plan.rule.run)]
    return any(hits.lie_behind(runs[run].lengths) for hits, run in places)


def _paths(
    rule: ResolvedRule,
    sender_of_cell: Ints,
    by_name: Mapping[str, Ints],
    count: int,
    *,
    parallel: bool,
) -> PathPlan | None:
    """Every combination of senders and receivers that some cell has, and who is reached."""
    if rule.path is None:
        return None
    assert rule.sites is not None
    receivers = rule.path.receivers
    keys = list(receivers.points)
    receiver_of_cell = _lookup(keys, receivers.axes, by_name, count)
    of, to = list(rule.sites.points.values()), [receivers.points[key] for key in keys]
    pairs, pair_of_cell = np.unique(
        sender_of_cell * len(to) + receiver_of_cell, return_inverse=True
    )
    table: dict[SitePoint, int] = {}
    lists = [
        [
            table.setdefault(point, len(table))
            for point in reached(of[pair // len(to)], to[pair % len(to)], parallel=parallel)
        ]
        for pair in pairs.tolist()
    ]
    return PathPlan(
        tuple(table),
        Ragged.of(lists),
        pair_of_cell.reshape(-1),
        rule.path.through_mlps,
        rule.path.frozen_norms,
    )


def _lookup(
    keys: Sequence[Key], axes: Sequence[str], by_name: Mapping[str, Ints], count: int
) -> Ints:
    """Per cell, which of `keys` (all combinations along `axes`) it has."""
    if not axes:
        return np.zeros(count, dtype=np.int64)
    sizes = [max(key[i] for key in keys) + 1 for i in range(len(axes))]
    ordinal = np.zeros(sizes, dtype=np.int64)
    for index, key in enumerate(keys):
        ordinal[key] = index
    return ordinal[tuple(by_name[name] for name in axes)]


def _lowest(experiment: ResolvedExperiment, rules: tuple[RulePlan, ...], count: int) -> Ints:
    """The lowest block that each cell writes to, or that a measure reads inside the model."""
    n_layers = experiment.model.shape.n_layers
    lowest = np.full(count, n_layers, dtype=np.int64)
    for plan in rules:
        if plan.rule.sites is None:
            continue
        own = [
            min(
                (_block(plan.point_table[p], n_layers) for p in _list(plan.points, key)),
                default=n_layers,
            )
            for key in range(len(plan.points.offsets) - 1)
        ]
        lowest = np.minimum(lowest, np.array(own, dtype=np.int64)[plan.site_of_cell])
    for measure in experiment.measures:
        for atom in measure.atoms:
            if atom.point is not None:
                lowest = np.minimum(lowest, _block(atom.point, n_layers))
    return lowest


def _list(ragged: Ragged, key: int) -> Ints:
    return ragged.values[ragged.offsets[key] : ragged.offsets[key + 1]]


def _block(point: SitePoint, n_layers: int) -> int:
    """The block that a site lies in; the number of blocks for what lies behind them."""
    if point.layer is not None:
        return point.layer
    return 0 if SITES[point.site].when == "embedding" else n_layers
