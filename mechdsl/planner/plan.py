"""The plan of a file: rows of each experiment, and panels that share unpatched runs.

The unit is the row: one cell on one prompt, because positions (and, with several tokens under one
label, the number of runs) differ between prompts. Rows are integer columns in numpy, built per
batch of prompts; they never exist as objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Ints
from mechdsl.base.hashing import digest_number
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.models.restart import FULL_PASS, Shortcuts
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.graph import (
    EncodeNode,
    ForwardNode,
    Graph,
    GraphExperiment,
    MeasureNode,
    ReadNode,
    RunNeeds,
    SaveNode,
    build_direction_node,
    describe_default_position,
    graph_experiments,
    graph_from_leaves,
    run_needs,
    run_with_dependencies,
    unpatched_forward,
)
from mechdsl.planner.inert import (
    InertWrites,
    find_equal_cells,
    find_inert_writes,
    inert_cells,
    inert_rows,
)
from mechdsl.planner.rows import (
    ALL_TOKENS,
    NEWEST_TOKEN,
    NO_TOKENS,
    PathPlan,
    RaggedColumn,
    RowTable,
    RulePlan,
    TokenHits,
    count_columns,
)
from mechdsl.program.spec import SEED_AXIS, Generation
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.bases import CoordinateChange
from mechdsl.resolve.circuits import join_cells
from mechdsl.resolve.observations import Observation, RowSetObservation, TokenSetObservation
from mechdsl.resolve.runs import name_tensor
from mechdsl.resolve.types import (
    DRAW_AXIS,
    AxisIndices,
    BasisTargets,
    Coordinates,
    DirectionMember,
    ItemNumber,
    PositionTargets,
    PythonBasis,
    ResolvedExperiment,
    ResolvedRule,
    ResolvedSave,
    SiteLayer,
    SitePoint,
    SiteTargets,
    is_neuron,
    select_reached,
)
from mechdsl.vocab.sites import SITES, sites_of_stage


@dataclass(frozen=True)
class ReconstructedSpot:
    """Sites and a position at which a rule changes coordinates."""

    rule: int
    """Number of the rule."""
    points: tuple[int, ...]
    """Numbers of its written points."""
    position: int
    """Number of its position."""
    basis: int
    """Number of its basis."""


VECTORS_PER_TOKEN = 32
"""Vectors of the width of the stream that a pass without a circuit stores per token."""


@dataclass(frozen=True, eq=False)
class ExperimentPlan:
    """Everything known about an experiment's rows before the model runs."""

    experiment: ResolvedExperiment
    """The graph's version of the experiment."""
    runs: tuple[str, ...]
    """Every unpatched run that it reads, measures or starts from."""
    coordinates: tuple[Ints, ...]
    """Per axis, the index of every cell along it."""
    rules: tuple[RulePlan, ...]
    lowest: Ints
    """Per cell, the lowest block that it writes to or that a measure reads."""
    inert_runs: tuple[InertWrites, ...]
    """Per rule, its writes that have no effect."""
    inert: NDArray[np.bool_]
    """Per cell, whether its structure makes all of its rows equal to the base run."""
    inert_of: tuple[NDArray[np.bool_], ...]
    """Per measure and cell, whether the structure fixes its effect: the rows equal the base run
    where it is read, or the run that the effect of a circuit is compared with."""
    items: tuple[ItemNumber, ...]
    """Per cell, its occurrence number, if an axis is over occurrences."""
    drawn: NDArray[np.bool_] | None = None
    """Per cell, whether it exists; None if all do. A cell of a control exists if it has this draw;
    if measures name a loop's variable, a cell exists if it has the value that they are read for."""

    @property
    def n_cells(self) -> int:
        return len(self.lowest)

    @property
    def whole(self) -> bool:
        """Whether its rows are full forward passes under any plan.

        Reasons: a rule, an encoder-decoder or images require it, the rows start from a run with
        rules, they are estimated, or a path freezes activations that differ from those of its
        starting run.
        """
        if any(run.derived is not None for run in self.starting_runs):
            return True
        if self.experiment.spec.estimator is not None:
            return True
        if self.path is not None and (self.additional_rules or self._seen_in_mlps):
            return True
        together = self.experiment.model.shape.encodes_apart or self.experiment.needs_full_passes
        return together or any(plan.rule.does.whole for plan in self.rules)

    @property
    def ablates_circuits(self) -> bool:
        """Whether a rule ablates edges of circuits in the language model, whose receivers read the
        outputs of all blocks."""
        circuits = (plan.rule.circuit for plan in self.rules)
        return any(circuit is not None and not circuit.stack for circuit in circuits)

    @cached_property
    def token_weight(self) -> int:
        """Number of tokens whose memory a token of its rows takes: of an ablated circuit, the pass
        stores the outputs of all senders and the inputs of a block's receivers, and the neurons of
        each of these inputs."""
        senders = receivers = neurons = 0
        shape = self.experiment.model.shape
        for plan in self.rules if self.ablates_circuits else ():
            for of, to in chain.from_iterable(plan.edge_ends):
                senders = max(senders, len(of.points))
                layers = Counter(point.layer for point in to.points)
                receivers = max([receivers, *layers.values()])
                of_neurons = (p.layer for p in to.points if is_neuron(p))
                neurons = max([neurons, *Counter(of_neurons).values()])
        size = shape.largest(lambda block: block.neurons)
        vectors = senders + 2 * receivers + 2 * neurons * size // shape.d_model
        return 1 + vectors // VECTORS_PER_TOKEN

    @property
    def leaves_out_edges(self) -> bool:
        """Whether its cells, each a circuit without one edge, are estimated."""
        return self.experiment.has_circuit and self.experiment.spec.estimator is not None

    @cached_property
    def joined_rules(self) -> tuple[RulePlan, ...]:
        """The rules with all cells of `without each edge` as one, as in `join_cells`."""
        return tuple(
            replace(
                plan,
                rule=join_cells(plan.rule),
                site_of_cell=(plan.site_of_cell == len(plan.edge_ends)).astype(np.int64),
            )
            for plan in self.rules
        )

    @property
    def path(self) -> RulePlan | None:
        """The rule that patches a path, if any."""
        return next((plan for plan in self.rules if plan.paths is not None), None)

    @property
    def additional_rules(self) -> tuple[RulePlan, ...]:
        """The rules that act in addition to a path."""
        others = (plan for plan in self.rules if plan.paths is None)
        return tuple(plan for plan in others if plan.rule.does.changes != "nothing")

    @property
    def _seen_in_mlps(self) -> bool:
        """Whether measures read results of MLPs, which aren't computed in frozen MLPs."""
        points = (atom.point for m in self.experiment.measures for atom in m.atoms)
        return any(p is not None and p.site in sites_of_stage("in_mlp") for p in points)

    @cached_property
    def senders(self) -> Ints:
        """Numbers that are equal for cells with the same path senders and other rules, so that all
        their receivers are read in one pass. Shape [cell]."""
        path = self.path
        assert path is not None
        assert path.rule.sites is not None
        used = {*path.rule.sites.axes, *path.rule.positions.axes}
        used.update(() if path.rule.basis is None else path.rule.basis.axes)
        used.update(name for plan in self.additional_rules for name in plan.rule.axes)
        senders = np.zeros(self.n_cells, dtype=np.int64)
        for axis, coordinate in zip(self.experiment.axes, self.coordinates, strict=True):
            if axis.name in used:
                senders = senders * len(axis) + coordinate
        return senders

    def replaced_blocks(self, cell: int) -> tuple[tuple[tuple[str, int], int | None], ...]:
        """Return ((stack, layer), replacement) for the replaced blocks of a cell; None means
        identity."""
        blocks: dict[tuple[str, int], int | None] = {}
        for plan in self.rules:
            if plan.rule.does.changes == "blocks":
                for index in _list(plan.points, int(plan.site_of_cell[cell])).tolist():
                    to, of = plan.point_table[index], plan.source_table[index]
                    assert to.layer is not None
                    place = SITES[to.site].stack, to.layer
                    blocks[place] = None if of.site == to.site else of.layer
        return tuple(sorted(blocks.items()))

    def block_steps(self, cell: int) -> tuple[tuple[int, ...], ...]:
        """Return the first and the last step of a reply in which each rule replaces the blocks of a
        cell; an empty tuple means every step."""
        rules = [plan for plan in self.rules if plan.rule.does.changes == "blocks"]
        return tuple(() if p.steps is None else tuple(p.steps[cell].tolist()) for p in rules)

    def content(self, cell: int) -> int:
        """Return a number for a cell's effect: its values along the axes of active rules. It
        doesn't depend on names, the cell's index, other cells or observations."""
        acting = (plan.rule.axes for plan in self.rules if plan.rule.does.changes != "nothing")
        names = frozenset[str]().union(*acting)
        labels = [
            axis.labels[coordinate[cell]]
            for axis, coordinate in zip(self.experiment.axes, self.coordinates, strict=True)
            if axis.name in names
        ]
        return digest_number("cell", labels)

    @property
    def in_answers(self) -> bool:
        """Whether a rule acts on tokens of the answer, after the prompt."""
        return any(plan.in_answers for plan in self.rules)

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Whether a cell exists: paths lead forward, and targets may run out. Shape [cell]."""
        mask = np.ones(self.n_cells, dtype=np.bool_)
        if self.drawn is not None:
            mask &= self.drawn
        for plan in self.rules:
            if plan.paths is not None:
                mask &= plan.paths.exists
            mask &= ~plan.without_sites
            if plan.rule.compared_sites is not None:
                mask &= np.array([plan.rule.leads(at) for at in self._along()])
        return mask

    def _along(self) -> Iterator[dict[str, int]]:
        """Yield each cell's index along each axis."""
        names = [axis.name for axis in self.experiment.axes]
        for cell in range(self.n_cells):
            yield {
                n: int(coordinate[cell])
                for n, coordinate in zip(names, self.coordinates, strict=True)
            }

    @property
    def draws(self) -> int:
        """Number of noise draws per row, over all runs that it starts from or reads."""
        spec = self.experiment.spec
        names = [spec.base, spec.source, *(plan.rule.run for plan in self.rules)]
        runs = self.experiment.table.runs
        return max((runs[name].draws for name in names if name is not None), default=1)

    @cached_property
    def watched_sites(self) -> frozenset[SiteLayer]:
        """Sites at which rules change only features of dictionaries and keep features that are 0.

        Their features may be inactive. Empty if rows must be run for other reasons, such as an
        observation, whose value no unpatched run has.
        """
        acting = [plan for plan in self.rules if plan.rule.does.changes != "nothing"]
        runs = self.starting_runs
        is_plain = (
            self.experiment.generation is None
            and self.observes is None
            and self.experiment.spec.estimator is None
            and self.draws == 1
            and not self.in_answers
            and [run.derived for run in runs] == [None]
        )
        if not is_plain or not all(_keeps_inactive_features(plan.rule) for plan in acting):
            return frozenset()
        return frozenset(
            (point.site, point.layer) for plan in acting for point in plan.source_table
        )

    @cached_property
    def reconstructed(self) -> tuple[ReconstructedSpot, ...]:
        """Sites and positions at which rules change coordinates of dictionaries.

        Reconstruction errors are measured there. Empty for rows with noise or replaced text, and
        for runs with rules. In experiments that generate text, only sites in prompts.
        """
        runs = self.starting_runs
        is_plain = (
            self.draws == 1 and not self.in_answers and [run.derived for run in runs] == [None]
        )
        spots: dict[ReconstructedSpot, None] = {}
        for plan in self.rules if is_plain else ():
            dictionaries = _dictionaries(plan.rule)
            if not dictionaries:
                continue
            there = self.exists if plan.active is None else self.exists & plan.active
            if plan.steps is not None:  # the prompt is read at step 0
                there = there & (plan.steps[:, 0] == 0)
            assert plan.coordinates_of_cell is not None
            numbers = np.array([coordinate.basis for coordinate in plan.coordinates])
            basis = numbers[plan.coordinates_of_cell]
            places = np.stack([plan.site_of_cell, plan.position_of_cell, basis])[:, there]
            for site, position, number in np.unique(places, axis=1).T.tolist():
                if number not in dictionaries:
                    continue
                points = tuple(_list(plan.points, site).tolist())
                spots[ReconstructedSpot(plan.number, points, position, number)] = None
        return tuple(spots)

    @cached_property
    def observed_sites(self) -> frozenset[SiteLayer]:
        """Sites of the base run that determine the activity and the errors of features."""
        points = {
            point
            for spot in self.reconstructed
            for table in (self.rules[spot.rule].point_table, self.rules[spot.rule].source_table)
            for point in (table[number] for number in spot.points)
        }
        return self.watched_sites | {(point.site, point.layer) for point in points}

    @property
    def replaced(self) -> RulePlan | None:
        """The rule that replaces text of the prompts, if any."""
        return next((plan for plan in self.rules if plan.rule.does.changes == "input"), None)

    @property
    def observes(self) -> RulePlan | None:
        """The rule whose observation is measured, if any."""
        return next((plan for plan in self.rules if plan.rule.does.changes == "nothing"), None)

    @property
    def lists(self) -> int:
        """Number of tokens listed per cell, from the observation of its rows."""
        rule = None if self.observes is None else self.observes.rule
        return rule.does.lists(rule) if rule and isinstance(rule.does, Observation) else 0

    @property
    def starting_runs(self) -> tuple[PromptRun, ...]:
        """The runs that rows start from: the base run, or those with replaced text."""
        if not self.rules:
            return ()
        if self.replaced is not None:
            return tuple(self.replaced.rule.inputs.values())
        return (self.experiment.table.runs[self.experiment.spec.base],)

    def starting_run(self, rows: RowTable) -> Ints:
        """Return the index into `starting_runs`. Shape [row]."""
        if self.replaced is None:
            return np.zeros(len(rows), dtype=np.int64)
        return self.replaced.position_of_cell[rows.cell]

    def lengths(self, rows: RowTable) -> Ints:
        """Return the number of prompt tokens of each row's starting run. Shape [row]."""
        return self._of_starting_run(rows, "lengths")

    def sources(self, rows: RowTable) -> Ints:
        """Return the number of these tokens that an encoder reads. Shape [row]."""
        return self._of_starting_run(rows, "sources")

    def _of_starting_run(self, rows: RowTable, name: Literal["lengths", "sources"]) -> Ints:
        which = self.starting_run(rows)
        tokens = np.zeros(len(rows), dtype=np.int64)
        for index, run in enumerate(self.starting_runs):
            lengths = run.lengths if name == "lengths" else run.sources
            tokens = np.where(which == index, lengths[rows.prompt], tokens)
        return tokens

    def leftmost(self, rows: RowTable) -> Ints:
        """Return the first position that each row writes to. Shape [row]."""
        first = np.full(len(rows), np.iinfo(np.int64).max, dtype=np.int64)
        for plan in self.rules:
            numbers = plan.written.leftmost(plan.written_runs(rows))
            first = np.where(plan.acts(rows), np.minimum(first, numbers), first)
        return first

    def is_inert(self, rows: RowTable) -> NDArray[np.bool_]:
        """Return whether a row's structure makes it equal to the base run. Shape [row]."""
        return inert_rows(self.inert_runs, self.rules, rows)

    def _runs(self, prompts: Ints) -> Ints:
        """Return the number of runs, 0 if a rule has no position. Shape [cell, prompt]."""
        counts = np.ones((self.n_cells, len(prompts)), dtype=np.int64)
        for plan in self.rules:
            numbers = plan.run_counts(prompts)
            counts = np.where((numbers == 0) | (counts == 0), 0, np.maximum(numbers, counts))
        if self.drawn is not None:
            counts[~self.drawn] = 0
        return counts

    def present(self, prompts: Ints) -> NDArray[np.bool_]:
        """Return whether every rule has a position in the prompt. Shape [cell, prompt]."""
        return self._runs(prompts) > 0

    def count(self, prompts: Ints | None = None) -> int:
        """Count patched rows on some prompts, per noise draw: the plain loop's passes."""
        if prompts is None:
            prompts = np.arange(len(self.experiment.table), dtype=np.int64)
        return int(self._runs(prompts).sum()) * self.draws if self.rules else 0

    def passes(self, prompts: Ints) -> RowTable:
        """Return the rows to run.

        An observation of all rows together has one row per position, whose pass all cells read, or
        one for all positions. Observations of weights and estimates have no rows.
        """
        run = self.rules and self.experiment.spec.estimator is None
        rows = self.rows(prompts) if run else RowTable.none()
        for plan in self.rules:
            if isinstance(plan.rule.does, RowSetObservation):
                first = np.unique(plan.position_of_cell, return_index=True)[1]
                read = first if plan.rule.does.reads_vectors else first[:0]
                rows = rows.take(np.flatnonzero(np.isin(rows.cell, read)))
            if isinstance(
                plan.rule.does, TokenSetObservation
            ):  # one pass includes all their positions
                rows = rows.take(np.unique(rows.prompt, return_index=True)[1])
        return rows

    def rows(self, prompts: Ints) -> RowTable:
        """Return all rows on these prompts, ordered by cell and prompt."""
        flat = self._runs(prompts).ravel()
        place, alternative = count_columns(flat)
        cell = np.repeat(np.arange(self.n_cells), len(prompts))[place]
        prompt = np.tile(prompts, self.n_cells)[place]
        return RowTable(cell, prompt, alternative)


def plan_experiment(graph_experiment: GraphExperiment) -> ExperimentPlan:
    """Lay out the cells of one experiment."""
    experiment = graph_experiment.experiment
    shape = experiment.shape
    count = experiment.n_cells
    coordinates = (
        tuple(np.asarray(c, dtype=np.int64) for c in np.unravel_index(np.arange(count), shape))
        if shape
        else ()
    )
    names = [axis.name for axis in experiment.axes]
    by_name = dict(zip(names, coordinates, strict=True))
    shape = experiment.model.shape
    rules = tuple(
        replace(plan, in_answers=_acts_in_answers(experiment, plan), number=number)
        for number, plan in enumerate(
            _rule_plan(rule, by_name, count, shape) for rule in experiment.rules
        )
    )
    items: list[ItemNumber] = [None] * count
    for axis in experiment.axes:
        if axis.items:
            items = [axis.items[i] for i in by_name[axis.name]]
    inert_runs = tuple(find_inert_writes(experiment, plan) for plan in rules)
    inert = inert_cells(inert_runs, rules, count)
    return ExperimentPlan(
        experiment=experiment,
        runs=tuple(forward.run for forward in graph_experiment.runs),
        coordinates=coordinates,
        rules=rules,
        lowest=_lowest(experiment, rules, count),
        inert_runs=inert_runs,
        inert=inert,
        inert_of=tuple(
            inert | _find_inert(experiment, rules, number, by_name, count)
            for number in range(len(experiment.measures))
        ),
        items=tuple(items),
        drawn=_there(experiment, by_name, count),
    )


def _find_inert(
    experiment: ResolvedExperiment,
    rules: Sequence[RulePlan],
    number: int,
    by_name: Mapping[str, Ints],
    count: int,
) -> NDArray[np.bool_]:
    """Return whether the structure of each cell fixes the effect of one measure. Shape [cell]."""
    measure = experiment.measures[number]
    inert = [find_inert_writes(experiment, plan, measure) for plan in rules]
    mask = inert_cells(inert, rules, count)
    of_effect = [each for each in experiment.circuit_baselines.items() if number in each[1].numbers]
    for which, baseline in of_effect[-1:]:  # the circuit, if it is one of two
        shape = experiment.model.shape
        others = [
            plan if rule is plan.rule else _rule_plan(rule, by_name, count, shape)
            for plan, rule in zip(rules, baseline.experiment.rules, strict=True)
        ]
        equal = find_equal_cells(experiment, rules, others, measure, count)
        mask = equal if which == "circuit" else mask | equal
    return mask


def _there(
    experiment: ResolvedExperiment, by_name: Mapping[str, Ints], count: int
) -> NDArray[np.bool_] | None:
    """Return whether each cell exists, shape [cell]; None if all do."""
    drawn = _drawn(experiment, by_name, count)
    nest = experiment.own_loops
    if nest is not None and nest.axes:
        keys = zip(*(by_name[axis].tolist() for axis in nest.axes), strict=True)
        mask = np.array([key in nest.keys for key in keys], dtype=np.bool_)
        drawn = mask if drawn is None else drawn & mask
    fixed = {} if experiment.place is None else experiment.place.fixed
    for name, index in fixed.items():
        if name not in by_name:  # without rules, each value has one cell
            continue
        mask = by_name[name] == index
        drawn = mask if drawn is None else drawn & mask
    return drawn


def _drawn(
    experiment: ResolvedExperiment, by_name: Mapping[str, Ints], count: int
) -> NDArray[np.bool_] | None:
    """Return whether each cell's draw exists. Shape [cell]."""
    drawn = experiment.drawn
    if drawn is None:
        return None
    counts = np.array(list(drawn.counts.values()), dtype=np.int64)
    there = by_name[DRAW_AXIS] < counts[_lookup(list(drawn.counts), drawn.axes, by_name, count)]
    return None if there.all() else there


def _list_points(
    sites: SiteTargets | None, by_name: Mapping[str, Ints], count: int
) -> tuple[Ints, dict[tuple[SitePoint, SitePoint], int], list[list[int]]]:
    """Number the points that a rule writes and reads.

    Returns:
        [cell] index into the lists; the number of each pair of a written and a read point; lists of
        these numbers.
    """
    if sites is None:
        return np.zeros(count, dtype=np.int64), {}, [[]]
    table: dict[tuple[SitePoint, SitePoint], int] = {}
    keys = list(sites.points)
    sources = sites.points if sites.sources is None else sites.sources
    lists = [
        [
            table.setdefault(pair, len(table))
            for pair in zip(sites.points[key], sources[key], strict=True)
        ]
        for key in keys
    ]
    return _lookup(keys, sites.axes, by_name, count), table, lists


def _coordinates(
    basis: BasisTargets | None, by_name: Mapping[str, Ints], count: int
) -> tuple[tuple[Coordinates, ...], Ints | None]:
    """Return the sets of coordinates that a rule names in a basis, and [cell] their index."""
    if basis is None:
        return (), None
    named = basis.coordinates
    return tuple(named.values()), _lookup(list(named), basis.axes, by_name, count)


def _rule_plan(
    rule: ResolvedRule, by_name: Mapping[str, Ints], count: int, shape: ModelShape
) -> RulePlan:
    site_of_cell, table, lists = _list_points(rule.sites, by_name, count)
    donated = rule.does.reads == "donor"
    active = None
    if rule.only is not None:  # it has no sites in other cells
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
    directions: tuple[DirectionMember, ...] = ()
    direction_of_cell = keys_hit = key_of_cell = None
    if rule.direction is not None:
        directions = tuple(rule.direction.members.values())
        members = list(rule.direction.members)
        direction_of_cell = _lookup(members, rule.direction.axes, by_name, count)
    basis = rule.basis if rule.circuit is None else None
    coordinates, coordinates_of_cell = _coordinates(basis, by_name, count)
    steps = None
    if rule.steps is not None:
        ends = np.array(list(rule.steps.values.values()), dtype=np.int64)
        steps = ends[_lookup(list(rule.steps.values), rule.steps.axes, by_name, count)]
    vectors = _count_vectors(rule, shape)
    if rule.edge is not None:
        cells = rule.edge.keys.written
        keys_hit = TokenHits.of(tuple(cells.values()), vectors)
        key_of_cell = _lookup(list(cells), rule.edge.keys.axes, by_name, count)
    return RulePlan(
        rule=rule,
        site_of_cell=site_of_cell,
        position_of_cell=_lookup(positions, rule.positions.axes, by_name, count),
        points=RaggedColumn.of(lists),
        point_table=tuple(pair[0] for pair in table),
        source_table=tuple(pair[1] for pair in table),
        written=TokenHits.of(written, vectors),
        read=TokenHits.of(written if rule.external is not None and not donated else read, vectors),
        averaged=TokenHits.of(read, vectors),
        positions=written,
        sources=read,
        amounts=amounts,
        directions=directions,
        direction_of_cell=direction_of_cell,
        coordinates=coordinates,
        coordinates_of_cell=coordinates_of_cell,
        keys=keys_hit,
        key_of_cell=key_of_cell,
        follows=_follows(rule.positions),
        keys_follow=_follows(None if rule.edge is None else rule.edge.keys),
        paths=_paths(rule, site_of_cell, by_name, count, parallel=shape.parallel_block),
        vectors=vectors,
        active=active,
        steps=steps,
    )


def _count_vectors(rule: ResolvedRule, shape: ModelShape) -> int:
    """Return the number of vectors of each token at a rule's sites, as in `TokenHits.of`."""
    is_merged = rule.in_vision and (shape.resamples or not rule.reads_pattern)
    return shape.merged_side**2 if is_merged else 1


def _follows(targets: PositionTargets | None) -> Ints:
    """Return the tokens of a reply that positions refer to. Shape [position]."""
    if targets is None:
        return np.zeros(0, dtype=np.int64)
    tokens = [
        ALL_TOKENS if key in targets.every else NEWEST_TOKEN if key in targets.newest else NO_TOKENS
        for key in targets.written
    ]
    return np.array(tokens, dtype=np.int64)


def _acts_in_answers(experiment: ResolvedExperiment, plan: RulePlan) -> bool:
    """Whether a rule acts on tokens after the prompts."""
    if plan.rule.in_vision:
        return False
    runs, base = experiment.table.runs, experiment.spec.base
    places = [(plan.written, base)]
    places += [] if plan.keys is None else [(plan.keys, base)]
    places += [] if plan.rule.external is not None else [(plan.read, plan.rule.run)]
    return any(hits.include_answers(runs[run].lengths) for hits, run in places)


def _paths(
    rule: ResolvedRule,
    sender_of_cell: Ints,
    by_name: Mapping[str, Ints],
    count: int,
    *,
    parallel: bool,
) -> PathPlan | None:
    """Return the existing combinations of senders and receivers, with the reachable receivers."""
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
            for point in select_reached(of[pair // len(to)], to[pair % len(to)], parallel=parallel)
        ]
        for pair in pairs.tolist()
    ]
    return PathPlan(
        tuple(table),
        tuple(map(rule.path.reads, table)),
        RaggedColumn.of(lists),
        pair_of_cell.reshape(-1),
        rule.path.through_mlps,
        rule.path.frozen_norms,
        *_coordinates(rule.path.basis, by_name, count),
    )


def _lookup(
    keys: Sequence[AxisIndices], axes: Sequence[str], by_name: Mapping[str, Ints], count: int
) -> Ints:
    """Return the index of each cell's entry in `keys` (all combinations along `axes`)."""
    if not axes:
        return np.zeros(count, dtype=np.int64)
    sizes = [max(key[i] for key in keys) + 1 for i in range(len(axes))]
    ordinal = np.zeros(sizes, dtype=np.int64)
    for index, key in enumerate(keys):
        ordinal[key] = index
    return ordinal[tuple(by_name[name] for name in axes)]


def _lowest(experiment: ResolvedExperiment, rules: tuple[RulePlan, ...], count: int) -> Ints:
    """Return the lowest block that each cell writes to, or that a measure reads in the model."""
    n_layers = experiment.model.shape.n_layers
    lowest = np.full(count, n_layers, dtype=np.int64)
    for plan in rules:
        if plan.rule.circuit is not None:  # receivers read the outputs of all blocks
            return np.zeros(count, dtype=np.int64)
        if plan.rule.sites is None:
            continue
        numbers = [
            min(
                (_block(plan.point_table[p], n_layers) for p in _list(plan.points, key)),
                default=n_layers,
            )
            for key in range(len(plan.points.offsets) - 1)
        ]
        lowest = np.minimum(lowest, np.array(numbers, dtype=np.int64)[plan.site_of_cell])
    for measure in experiment.measures:
        for atom in measure.atoms:
            if atom.point is not None:
                lowest = np.minimum(lowest, _block(atom.point, n_layers))
    return lowest


def _list(ragged: RaggedColumn, key: int) -> Ints:
    return ragged.values[ragged.offsets[key] : ragged.offsets[key + 1]]


def _block(point: SitePoint, n_layers: int) -> int:
    """Return the block of a site; the number of blocks for sites after the last block."""
    if SITES[point.site].when == "embedding":
        return 0
    return n_layers if point.layer is None else point.layer


PROMPT_TOKENS = 4096
"""Maximum number of tokens of one batch of unpatched prompts."""

PASS_TOKENS = 2048
"""Maximum number of tokens of the first pass over rows. On two cores, 1,000 to 4,000 are equally
fast; smaller passes read the weights too often, larger ones exceed the cache."""

BATCH_ROWS = 1 << 18
"""Number of rows that are laid out together: columns of integers, a hundred bytes per row."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Experiments on the same model and prompts, which share their unpatched runs."""

    model: str
    encode: EncodeNode
    """The clean run's encoding."""
    experiments: tuple[ExperimentPlan, ...]
    runs: Mapping[str, RunNeeds]
    derived: Mapping[str, ExperimentPlan] = field(default_factory=dict[str, "ExperimentPlan"])
    """One-cell plans of runs with rules; each run follows those it uses."""

    @cached_property
    def table(self) -> PromptTable:
        """The prompts, with the runs of all experiments."""
        tables = [plan.experiment.table for plan in self.experiments]
        runs = {name: run for table in tables for name, run in table.runs.items()}
        return replace(tables[0], runs=runs)

    @property
    def models(self) -> tuple[str, ...]:
        """The model that the panel runs on, and others that it reads."""
        return tuple(dict.fromkeys(m for plan in self.experiments for m in plan.experiment.models))


@dataclass(frozen=True)
class GraphRewrite:
    """The effect of one pass on the graph: its nodes before and after."""

    name: str
    changed: bool
    before: int
    after: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of a whole file: the experiments to run and the optimisations of the planner passes.

    It is created as the plain loop; `mechdsl/planner/passes.py` lists the passes.
    """

    graph: Graph
    panels: tuple[Panel, ...]
    passes: tuple[str, ...] = ()
    """Names of the applied passes."""
    rewrites: tuple[GraphRewrite, ...] = ()
    """Effects of the passes on the graph."""
    skips_inert: bool = False
    """Skip rows that can't differ from the base run."""
    shares_rows: bool = False
    """Run equal rows once."""
    shortcuts: Shortcuts = FULL_PASS
    """The parts that a row reuses of its starting run."""
    narrows_logits: bool = False
    """Compute only the logits that metrics name, if they name all that they read."""
    joins_rows: bool = False
    """Run rows of all cells in shared passes."""
    keeps_tokens: bool = False
    """Cache keys and values during generation, so that only the newest token is computed."""
    fuses_kernels: bool = False
    """Fuse activation functions that consist of several operations into one kernel."""

    def does(self, name: str) -> bool:
        """Whether a pass was applied."""
        return name in self.passes

    @property
    def restarts(self) -> bool:
        """Whether rows reuse parts of an unpatched run; otherwise they are full forward passes."""
        return self.shortcuts != FULL_PASS


def build_plain_plan(graph: Graph) -> Plan:
    """Return the plan of the plain loop over a graph."""
    by_panel: dict[tuple[object, ...], list[GraphExperiment]] = {}
    for graph_experiment in graph_experiments(graph):
        # Only equal definitions give equal runs; runs can share a name without being equal.
        seed = dict(graph_experiment.experiment.spec.variant).get(SEED_AXIS)
        defined = tuple(
            (run.spec.span, seed) for run in graph_experiment.experiment.derived.values()
        )
        model, generation = (
            graph_experiment.experiment.model.key,
            graph_experiment.experiment.generation,
        )
        written = None if generation is None else generation.key(graph_experiment.experiment.seed)
        by_panel.setdefault((model, graph_experiment.clean, defined, written), []).append(
            graph_experiment
        )
    needs = run_needs(graph)
    panels = tuple(
        build_panel(
            experiments[0].experiment.model.key,
            experiments[0].clean,
            _on_the_same_runs(experiments),
            needs,
        )
        for experiments in by_panel.values()
    )
    return Plan(graph, panels)


def _on_the_same_runs(experiments: Sequence[GraphExperiment]) -> list[GraphExperiment]:
    """Share derived runs: experiments with equal definitions get those of the first one."""
    derived = experiments[0].experiment.derived
    runs = {name: experiments[0].experiment.table.runs[name] for name in derived}
    if not runs or len(experiments) == 1:
        return list(experiments)
    group: list[GraphExperiment] = []
    for graph_experiment in experiments:
        table = graph_experiment.experiment.table
        table = replace(table, runs={**table.runs, **runs})
        experiment = replace(graph_experiment.experiment, table=table, derived=derived)
        group.append(replace(graph_experiment, experiment=experiment))
    return group


def build_panel(
    model: str,
    encode: EncodeNode,
    experiments: Sequence[GraphExperiment],
    needs: Mapping[ForwardNode, RunNeeds],
) -> Panel:
    """Build the panel of experiments on the same prompts with what their runs must provide."""
    derived = {
        name: plan_experiment(replace(experiments[0], experiment=run, runs=()))
        for name, run in experiments[0].experiment.derived.items()
    }
    return Panel(
        model,
        encode,
        tuple(map(plan_experiment, experiments)),
        _needed_runs(experiments, needs),
        derived,
    )


def _needed_runs(
    experiments: Sequence[GraphExperiment], needs: Mapping[ForwardNode, RunNeeds]
) -> dict[str, RunNeeds]:
    """Return the needs of every unpatched run of a panel, including those of rows alone."""
    needed: dict[str, RunNeeds] = {}
    for each in experiments:
        for forward in each.runs:
            whole = replace(forward, stop=None)
            run = needs.get(whole, RunNeeds(whole))
            if forward.run == "clean" and each.experiment.keep:  # the clean run filters rows first
                run = replace(run, measured=True, stop=None)
            needed[forward.run] = run
    return needed


def cell_sites(plan: ExperimentPlan) -> Ints:
    """Return numbers that are equal for cells in which the same rule writes the same sites and
    layers. Shape [cell]."""
    codes: dict[tuple[int, frozenset[SiteLayer]], int] = {}
    sites = np.zeros(plan.n_cells, dtype=np.int64)
    for number, rule in enumerate(plan.rules):
        ends = pairwise(rule.points.offsets.tolist())
        points = [[rule.point_table[at] for at in rule.points.values[a:b]] for a, b in ends]
        places = [frozenset((point.site, point.layer) for point in each) for each in points]
        own = np.array([codes.setdefault((number, each), len(codes)) for each in places])
        acts = True if rule.active is None else rule.active
        sites = np.where(acts, own[rule.site_of_cell], sites)
    return sites


@dataclass(frozen=True, eq=False)
class WholeCell:
    """The joint input of a rule, shared by cells that differ only in other rules."""

    site: int
    """Index of the site combination."""
    cell: int
    """The first cell with this input."""
    runs: Ints
    """Indices into the rule's `written.tokens` in data order. Shape [row]."""
    prompts: Ints
    """Prompt of each row; one with several runs under one label is repeated. Shape [row]."""


@dataclass(frozen=True, eq=False)
class WholeCells:
    """The rows of every cell for one rule."""

    of_cell: Ints
    """Index into `cells`, shape [cell]; −1 for a cell without rows."""
    cells: tuple[WholeCell, ...]

    def place(self, rule: RulePlan, rows: RowTable) -> tuple[Ints, Ints]:
        """Return (index into `cells`, index among that cell's rows), each of shape [row]."""
        cell, run = self.of_cell[rows.cell], rule.written_runs(rows)
        within = np.zeros(len(rows), dtype=np.int64)
        for index in np.unique(cell):
            own, runs = cell == index, self.cells[index].runs
            order = np.argsort(runs)
            within[own] = order[np.searchsorted(runs, run[own], sorter=order)]
        return cell, within


def collect_whole_cells(plan: ExperimentPlan, rows: RowTable) -> Mapping[int, WholeCells]:
    """Collect the inputs of the rules that read whole cells, by rule number.

    Args:
        rows: All rows of the experiment, in every cell.
    """
    ids = np.array(plan.experiment.table.row_ids, dtype=np.int64)
    return {
        number: _of_rule(rule, rows, plan.n_cells, ids)
        for number, rule in enumerate(plan.rules)
        if rule.rule.does.reads == "cell"
    }


def _of_rule(rule: RulePlan, rows: RowTable, count: int, ids: Ints) -> WholeCells:
    """Collect the cells of one rule; `ids` are the row numbers in the data, shape [prompt]."""
    of_cell = np.full(count, -1, dtype=np.int64)
    whole_cells: dict[tuple[int, bytes], WholeCell] = {}
    numbers: dict[tuple[int, bytes], int] = {}
    run = rule.written_runs(rows)
    order = np.lexsort((run, rows.cell))
    cells, begins = np.unique(rows.cell[order], return_index=True)
    for cell, indices in zip(cells.tolist(), np.split(order, begins[1:]), strict=True):
        runs, first = np.unique(
            run[indices], return_index=True
        )  # other rules may multiply the rows
        key = (int(rule.site_of_cell[cell]), runs.tobytes())
        of_cell[cell] = numbers.setdefault(key, len(numbers))
        if key not in whole_cells:
            prompts = rows.prompt[indices[first]]
            as_given = np.lexsort((runs, ids[prompts]))
            whole_cells[key] = WholeCell(key[0], cell, runs[as_given], prompts[as_given])
    return WholeCells(of_cell, tuple(whole_cells.values()))


READ_BATCH_BYTES = 1 << 28
"""Memory limit for the read activations of one batch of prompts, over all tokens and sites."""


def read_batches(
    shape: ModelShape,
    itemsize: int,
    run: PromptRun,
    points: Iterable[SitePoint],
    prompts: Ints | None = None,
    tokens: int = PROMPT_TOKENS,
) -> list[Ints]:
    """Split prompts (by default all, in table order) into batches.

    A batch has at most `tokens` tokens, and its read activations fit into `READ_BATCH_BYTES`.

    Args:
        itemsize: Bytes per number of the model.
    """
    prompts = np.arange(len(run.rows), dtype=np.int64) if prompts is None else prompts
    if not len(prompts):
        return []
    longest = int(run.lengths[prompts].max())
    longest *= run.draws
    places = {(point.site, point.layer) for point in points}
    each = sum(_size_of_token(shape, place, longest) for place in places) * itemsize
    room = min(tokens, READ_BATCH_BYTES // max(1, each))
    size = max(1, room // longest)
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def _size_of_token(shape: ModelShape, place: SiteLayer, keys: int) -> int:
    """Return the size of a site at one token, with all patches that it is made from."""
    patches = shape.merged_side**2 if SITES[place[0]].stack == "vision" else 1
    return site_size(shape, place, keys * patches) * patches


def split_gradient_batches(
    shape: ModelShape, save: ResolvedSave, run: PromptRun, tokens: int = PROMPT_TOKENS
) -> list[Ints]:
    """Split all prompts into batches for a `save gradient` line.

    All blocks of a pass with gradients share the memory that one block of another pass has.
    """
    return read_batches(
        shape, DTYPE_BYTES["float32"], run, save.points, tokens=max(1, tokens // shape.n_layers)
    )


def site_size(shape: ModelShape, place: SiteLayer, keys: int) -> int:
    """Return the size of a site at one token; `keys` is the length of vectors over keys."""
    one = keys if SITES[place[0]].width == "key" else vector_width(shape, *place)
    return unit_count(shape, *place) * one


def point_size(shape: ModelShape, point: SitePoint, keys: int) -> int:
    """Return the size of a point at one token, of one head or neuron if the point names it."""
    whole = site_size(shape, (point.site, point.layer), keys)
    return whole if point.unit is None else whole // unit_count(shape, point.site, point.layer)


def is_read_only(panel: Panel) -> bool:
    """Whether only unmodified rows are observed, so that each prompt is one full forward pass. Runs
    with rules also read other runs."""
    return not panel.derived and all(map(_reads_only, panel.experiments))


def _dictionaries(rule: ResolvedRule) -> set[int]:
    """Return the numbers of a rule's bases that leave out a part of a vector."""
    if rule.basis is None or not isinstance(rule.does, CoordinateChange):
        return set()
    if rule.does.operation == "project out":  # it doesn't depend on the coordinates
        return set()
    return {
        number
        for number, points in enumerate(rule.basis.bases)
        if any(_reconstructs_a_vector(m.operand) for m in points.values())
    }


def _reconstructs_a_vector(operand: object) -> bool:
    """Return whether a basis reconstructs a vector alone, with an error."""
    is_dictionary = isinstance(operand, DictionaryFile) and not operand.crosses_layers
    return is_dictionary or isinstance(operand, PythonBasis)


def _keeps_inactive_features(rule: ResolvedRule) -> bool:
    """Return whether a rule changes features of dictionaries, and keeps those that are 0."""
    if rule.basis is None or not isinstance(rule.does, CoordinateChange):
        return False
    members = rule.basis.members
    are_dictionaries = all(isinstance(member.operand, DictionaryFile) for member in members)
    return are_dictionaries and rule.does.keeps_zeros


def _reads_only(plan: ExperimentPlan) -> bool:
    experiment = plan.experiment
    if plan.observes is None or len(plan.rules) > 1 or experiment.keep or experiment.accuracies:
        return False
    atoms = [(measure, atom) for measure in experiment.measures for atom in measure.atoms]
    return all(
        (measure.observed or atom.form.takes == "observation")
        and atom.run is None
        and atom.point is None
        for measure, atom in atoms
    )


SweepStage: TypeAlias = Sequence[tuple[str, bool]]
"""Runs, each with whether it is run for a batch's donors, which may be in other batches."""


def batch_size(panel: Panel, prompt_tokens: int) -> int:
    """Return the number of prompts of one batch within the token limit, by the longest prompt."""
    draws = max((run.draws for run in panel.table.runs.values()), default=1)
    cells = sum(experiment.n_cells for experiment in panel.experiments)
    tokens = longest_prompt(panel) * draws
    return max(1, min(prompt_tokens // tokens, BATCH_ROWS // max(1, cells)))


def longest_prompt(panel: Panel) -> int:
    """Return the maximum number of tokens of a prompt in any run."""
    runs = panel.table.runs.values()
    return max((int(run.lengths.max(initial=1)) for run in runs), default=1)


def count_sweeps(panel: Panel, *, several: bool) -> Counter[str]:
    """Return how often each run is computed on all prompts; `several`: in several batches."""
    filtering = set(_filtering(panel))
    measured, *stages = _stages(panel)
    generates = panel.experiments[0].experiment.generation is not None
    every = [measure for plan in panel.experiments for measure in plan.experiment.measures]
    if not generates or any(measure.reply is None for measure in every):
        stages.append(measured)
    counts = _counted(stages, panel, several=several)
    if generates:  # the prefill of replies is a separate pass
        counts += _counted([measured], panel, several=several)
    for name in panel.runs:
        counts[name] = max(1, counts[name])
    return counts + Counter(filtering)  # their results are not cached


def count_save_sweeps(panel: Panel, run: str, *, several: bool) -> Counter[str]:
    """Return how often each run is computed if only the vectors of one run are needed."""
    needed = set(_made_of(run, panel))
    stages: list[SweepStage] = [[(run, False)], *_averaged(panel, needed)]
    return _counted(stages, panel, several=several)


def _counted(stages: Iterable[SweepStage], panel: Panel, *, several: bool) -> Counter[str]:
    every = [set(_with_read(stage, panel)) for stage in stages]
    if several:
        return Counter(name for stage in every for name, _ in stage)
    return Counter({name for stage in every for name, _ in stage})


def external_runs(panel: Panel) -> list[tuple[PromptTable, PromptRun]]:
    """Return runs of other blocks that means and donors are taken from, each on all its rows."""
    runs = {
        (id(rule.rule.external.table), rule.rule.external.run): rule.rule.external
        for plan in (*panel.experiments, *panel.derived.values())
        for rule in plan.rules
        if rule.rule.external is not None
    }
    return [(external.table, external.table.runs[external.run]) for external in runs.values()]


def _filtering(panel: Panel) -> Iterator[str]:
    """Yield the runs that `keep` reads."""
    keep = panel.experiments[0].experiment.keep
    yield from ("clean",) if keep else ()
    yield from (atom.run for measure in keep for atom in measure.atoms if atom.run is not None)


def _stages(panel: Panel) -> Iterator[SweepStage]:
    """Yield the runs that each stage needs."""
    yield [(name, False) for name, needs in panel.runs.items() if needs.measured]
    for plan in panel.experiments:
        yield from _gathered(plan.rules)
    yield from _averaged(panel, panel.runs)
    yield [row_sweep for plan in panel.experiments if plan.rules for row_sweep in _row_sweeps(plan)]


def _gathered(rules: Iterable[RulePlan]) -> Iterator[SweepStage]:
    """Yield each run that is averaged or collected as a whole for a rule."""
    for rule in rules:
        if rule.rule.does.reads in ("mean", "cell") and rule.rule.external is None:
            yield [(rule.rule.run, False)]


def _averaged(panel: Panel, runs: Container[str]) -> Iterator[SweepStage]:
    """Yield each run that is averaged or collected as a whole for the rules of runs."""
    for name, plan in panel.derived.items():
        if name in runs:
            yield from _gathered(plan.rules)


def _made_of(run: str, panel: Panel) -> Iterator[str]:
    """Yield a run and all runs whose rules it depends on."""
    yield run
    if run in panel.derived:
        plan = panel.derived[run]
        for name in (plan.experiment.spec.base, *(rule.rule.run for rule in plan.rules)):
            if name != run:
                yield from _made_of(name, panel)


def _row_sweeps(plan: ExperimentPlan) -> Iterator[tuple[str, bool]]:
    """Yield the runs that rows start from, read and compare with; none if all measures are of
    replies and no rule reads a run."""
    measures = plan.experiment.measures
    read = [*_copied(plan.rules)]
    read += [
        (atom.run, False) for measure in measures for atom in measure.atoms if atom.run is not None
    ]
    if read or any(measure.reply is None for measure in measures):
        yield plan.experiment.spec.base, False
        yield from read


def _copied(rules: Iterable[RulePlan]) -> Iterator[tuple[str, bool]]:
    """Yield the runs whose vectors rules copy."""
    for rule in rules:
        if rule.rule.does.reads in ("run", "donor") and rule.rule.external is None:
            yield rule.rule.run, rule.rule.does.reads == "donor"


def _with_read(asked: SweepStage, panel: Panel) -> Iterator[tuple[str, bool]]:
    """Yield runs together with those that their own rules read."""
    for name, donors in asked:
        yield name, donors
        within = name
        while within in panel.derived:
            yield from _with_read(list(_copied(panel.derived[within].rules)), panel)
            within = panel.derived[within].experiment.spec.base


DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per number by dtype."""


@dataclass(frozen=True, eq=False)
class SaveLayout:
    """The content of a `save` line's file, which depends only on positions and the model's
    shape."""

    counts: Ints
    """Number of vectors per site, shape [row of the run]."""
    widths: Mapping[str, int]
    """Length of the vectors of each tensor."""
    columns: tuple[str, ...]
    """Additional integer tensors: the row, token, position, draw, sample and patch of each
    vector."""

    at_most: bool = False
    """Whether the counts are maxima, because replies may be shorter."""
    means: int | None = None
    """Number of means of each site; None if every vector is saved."""

    @staticmethod
    def of(
        save: ResolvedSave,
        run: PromptRun,
        shape: ModelShape,
        also: tuple[str, ...] = (),
        *,
        written: Generation | None = None,
    ) -> SaveLayout:
        """Compute the layout of a `save` line.

        Args:
            run: The saved run.
            shape: The shape of its model.
            also: Additional columns.
            written: Settings of replies whose tokens are saved but not generated yet.
        """
        counts, patches = np.zeros(len(run.rows), dtype=np.int64), save.count_patches(shape)
        for cell in save.cells:
            each = 1 if cell.reply is None or written is None else cell.reply.most(written.tokens)
            each *= patches // cell.vectors if patches > 1 else 1
            counts += each * np.array([sum(map(len, hits)) for hits in cell.hits], dtype=np.int64)
        counts *= 1 if written is None else written.samples
        keys = int(run.lengths.max())
        widths = {name_tensor(point): point_size(shape, point, keys) for point in save.points}
        if save.spec.mean:
            return SaveLayout(counts * run.draws, widths, (), means=len(save.cells))
        names = ("row", "token", "position", *(("draw",) if run.draws > 1 else ()), *also)
        names = (*names, *(("patch",) if patches > 1 else ()))
        return SaveLayout(counts * run.draws, widths, names, written is not None)

    @property
    def vectors(self) -> int:
        """Number of vectors, or means, per site."""
        return int(self.counts.sum()) if self.means is None else self.means

    @property
    def rows(self) -> int:
        """Number of rows with at least one vector."""
        return int((self.counts > 0).sum())

    def bytes(self, dtype: str) -> int:
        """Return the size of all tensors, without the file's header."""
        return self.vectors * (
            sum(self.widths.values()) * DTYPE_BYTES[dtype] + 8 * len(self.columns)
        )


def plan_save_layout(experiment: ResolvedExperiment, save: ResolvedSave) -> SaveLayout:
    """Compute what a line will write; compared models have the same sizes."""
    run, said = experiment.table.runs[save.run], experiment.generation
    written = said if save.in_reply else None
    also = ("sample",) if written and written.samples > 1 else ()
    return SaveLayout.of(save, run, experiment.model.shape, also, written=written)


def build_save_nodes(experiment: ResolvedExperiment) -> list[SaveNode]:
    """Return the `save` lines of an experiment as graph nodes."""
    reads = zip(experiment.saves, build_save_reads(experiment), strict=True)
    save_nodes = [SaveNode(experiment.key, read, save.spec.file) for save, read in reads]
    for file in experiment.direction_files:
        name, members = file.spec.direction.span.written, list(file.members.values())
        node = build_direction_node(experiment, name, members)
        save_nodes.append(SaveNode(experiment.key, node, file.spec.file))
    return save_nodes


def build_save_reads(experiment: ResolvedExperiment) -> list[ReadNode | MeasureNode]:
    """Return the reads of `save` lines, and the metrics of their gradients, as graph nodes."""
    return [_read(experiment, save) for save in experiment.saves]


def build_save_panel(experiment: ResolvedExperiment) -> Panel:
    """Return the runs that an experiment's `save` lines read, as a panel without cells."""
    reads = build_save_reads(experiment)
    needs = run_needs(graph_from_leaves(reads))
    compared = [run for read in reads if isinstance(read, MeasureNode) for run in read.references]
    needed = [*(read.forward for read in reads), *compared]
    runs = {node.run: node for forward in needed for node in run_with_dependencies(forward)}
    clean = replace(unpatched_forward(experiment, "clean").encode, run="clean")
    alone = replace(experiment, rules=(), axes=(), measures=(), keep=(), accuracies={})
    return build_panel(
        experiment.model.key, clean, [GraphExperiment(alone, clean, tuple(runs.values()))], needs
    )


def _read(experiment: ResolvedExperiment, save: ResolvedSave) -> ReadNode | MeasureNode:
    cells = {(number,): cell for number, cell in enumerate(save.cells)}
    forward = unpatched_forward(experiment, save.run)
    if save.gradient is not None and save.spec.gradient is not None:
        runs, said = save.gradient.compared_runs, save.spec.gradient.place
        return MeasureNode(
            forward,
            f"gradient of {save.gradient.text}",
            said or describe_default_position(experiment, save.gradient),
            tuple(unpatched_forward(experiment, run) for run in runs),
            measure=save.gradient,
        )
    return ReadNode(forward, save.spec.at.span.written, {(): save.points}, cells)
