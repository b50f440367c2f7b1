"""Vectors, edges and position ids that rules write into rows, also during generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.dictionaries.features import Dictionary
from mechdsl.execute.unpatched_batch import Continuation, UnpatchedBatch, count_fed_tokens
from mechdsl.execute.vectors import FittedDirections
from mechdsl.forward.generation.rules import GenerationRules, StepEdge, StepRules
from mechdsl.forward.hooks.batch import (
    CircuitWrite,
    EdgeWrite,
    PositionIdWrite,
    RuleWrites,
    SenderFill,
    SiteRead,
    SiteWrite,
    SplitOutputs,
    WriteMode,
    array_to_device,
    arrays_to_device,
    gather_vectors,
    to_device,
)
from mechdsl.forward.hooks.coordinates import (
    OTHERS,
    CoordinateSystem,
    CoordinateWrite,
    FeatureSplit,
)
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.plan import ExperimentPlan, WholeCells
from mechdsl.planner.rows import (
    ALL_TOKENS,
    ALL_UNITS,
    NEWEST_TOKEN,
    NO_TOKENS,
    EdgeEnds,
    RowTable,
    RulePlan,
    count_columns,
    expand_units,
    point_units,
)
from mechdsl.resolve.bases import CoordinateChange
from mechdsl.resolve.types import CircuitTargets, SiteLayer, SitePoint, find_split_output, is_neuron
from mechdsl.vocab.sites import SITES, write_order


@dataclass(frozen=True, eq=False)
class CellVectors:
    """Vectors that one rule writes, if a function computes them from all rows of a cell."""

    plan: RulePlan
    cells: WholeCells
    draws: int
    """Number of noise draws in the run that is read."""
    blocks: Mapping[tuple[int, SiteLayer, int], tuple[Ints, Tensor]]
    """By index of the cell, site that is read, and draw: units, and vectors [row, position, unit,
    width]."""

    def read(
        self, rows: RowTable, row: Ints, slot: Ints, place: SiteLayer, unit: Ints, draws: Ints
    ) -> Tensor:
        """Look up K vectors of one site.

        Args:
            rows: The rows of an experiment.
            row: [K] index into `rows`.
            slot: [K] token of the position.
            unit: [K] head or neuron.
            draws: [row] noise draw.

        Returns:
            [K, width].
        """
        cell, within = self.cells.place(self.plan, rows)
        draw = draws[row] if self.draws > 1 else np.zeros_like(row)
        vectors: Tensor | None = None
        kinds = np.stack([cell[row], draw])
        for index, number in np.unique(kinds, axis=1).T.tolist():
            indices = np.flatnonzero((kinds[0] == index) & (kinds[1] == number))
            there, block = self.blocks[index, place, number]
            where = (within[row[indices]], slot[indices], np.searchsorted(there, unit[indices]))
            values = block[tuple(map(torch.from_numpy, where))]
            if vectors is None:
                vectors = values.new_zeros(len(row), values.shape[-1])
            vectors[torch.from_numpy(indices)] = values
        return torch.zeros(0, 1) if vectors is None else vectors


@dataclass(frozen=True, eq=False)
class RuleMeans:
    """Mean activations that a rule writes."""

    values: Mapping[SiteLayer, Tensor]
    """[position, group, token of the position, unit, width]."""
    groups: Ints
    """[prompt] its group."""
    of_coordinates: bool = False
    """Whether they are means of coordinates, of all units of a site as one if the rule joins
    them."""


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """The edges of a circuit, as `CircuitWrite` lists them."""

    senders: tuple[tuple[SiteLayer, tuple[int, ...], tuple[int, ...]], ...]
    """(site and layer, units, neurons that are one sender together)."""
    receivers: tuple[tuple[SiteRead, int], ...]
    mask: Tensor
    others: Mapping[int, tuple[int, ...]]
    """By layer, the neurons that are one node together."""
    features: SplitOutputs
    """By output, the features that are nodes."""
    cells: tuple[Tensor, Tensor]
    """Receiver and sender in the mask, of each edge."""


@dataclass(frozen=True, eq=False)
class RuleInputs:
    """Inputs of an experiment's rules besides the source run."""

    means: Mapping[int, RuleMeans]
    """Means by number of the rule."""
    of_texts: Mapping[int, Mapping[int, RuleMeans]]
    """Means in passes with a continuation, by number of the metric that reads it; only for rules
    that act on tokens after the prompts."""
    donors: Mapping[int, Ints]
    """By number of the rule, [prompt] the row whose activation replaces the prompt's, for
    `resample`: a row of the same prompt set, or of the different set that the rule names."""
    made: Mapping[tuple[int, int | None], CellVectors] = field(
        default_factory=dict[tuple[int, int | None], CellVectors]
    )
    """Vectors from functions of whole cells, as returned by `compute_cell_vectors`."""
    directions: FittedDirections = field(default_factory=FittedDirections)
    edges: dict[tuple[int, int, int], EdgeTable] = field(
        default_factory=dict[tuple[int, int, int], EdgeTable]
    )
    """The circuits that passes have ablated, by number of the rule, of the circuit and of the class
    of tokens."""

    def tabulate(self, rule: RulePlan, number: int, of_class: int, shape: ModelShape) -> EdgeTable:
        """Return the edges of a rule's circuit at a class of tokens, which are counted once for all
        passes."""
        key = rule.number, number, of_class
        edge_table = self.edges.get(key)
        if edge_table is None:
            circuit, ends = rule.rule.circuit, rule.edge_ends[number][of_class]
            assert circuit is not None
            others = list_other_neurons(circuit, shape)
            features = split_outputs(rule, self.directions)
            kept = _list_kept_senders(circuit, ends[0]) if rule.rule.does.reads is None else []
            edge_table = _tabulate(*ends, kept, others, features)
            self.edges[key] = edge_table
        return edge_table

    def made_with(self, rule: int, text: Continuation | None) -> CellVectors | None:
        """Return the vectors that a rule writes with this continuation, if it reads whole cells."""
        cell_vectors = None if text is None else self.made.get((rule, text.number))
        return self.made.get((rule, None)) if cell_vectors is None else cell_vectors

    def of(self, text: Continuation | None) -> Mapping[int, RuleMeans]:
        """Return the means in passes with this continuation, by number of the rule."""
        return self.means if text is None else {**self.means, **self.of_texts.get(text.number, {})}


RuleReader: TypeAlias = Callable[[RulePlan], UnpatchedBatch]
"""Maps a rule to its source run's lanes, for the current prompts or their donors."""


@dataclass(frozen=True, eq=False)
class _WriteTokens:
    """All tokens that one rule writes, as parallel columns."""

    row: Ints
    written: Ints
    read: Ints
    slot: Ints
    """Index of the token within the position."""


@dataclass(frozen=True, eq=False)
class _WriteEntries(_WriteTokens):
    """All vectors that one rule writes, as parallel columns."""

    point: Ints


def find_read_prompts(plan: RulePlan, rows: RowTable, means_and_donors: RuleInputs) -> Ints:
    """Return [row]: the prompt whose activation each row reads."""
    donors = means_and_donors.donors.get(plan.number)
    return rows.prompt if donors is None else donors[rows.prompt]


def select_readable_rows(
    plan: ExperimentPlan,
    rows: RowTable,
    means_and_donors: RuleInputs,
    texts: Sequence[Continuation | None],
) -> Ints:
    """Select the rows whose reads are all available.

    A row is excluded if its donor lacks the position, or if a measured pass would write an answer
    token that the run it reads only predicts.

    Args:
        rows: Its rows.
        means_and_donors: Inputs of the rules.
        texts: Continuations of the measured passes.

    Returns:
        Indices of the remaining rows.
    """
    good = np.ones(len(rows), dtype=np.bool_)
    for rule in plan.rules:
        if rule.rule.does.reads == "donor":
            position = rule.position_of_cell[rows.cell]
            key = position * rule.read.prompts + find_read_prompts(rule, rows, means_and_donors)
            good &= (rule.read.runs.counts(key) > 0) | ~rule.acts(rows)
    indices = np.flatnonzero(good)
    row_table = rows.take(indices)
    fine = np.ones(len(indices), dtype=np.bool_)
    for rule in plan.rules:
        if rule.in_answers:
            tokens = _list_tokens(rule, row_table, means_and_donors)
            for text in texts:
                written, read = _find_present(plan, rule, row_table, tokens, means_and_donors, text)
                written &= rule.acts(row_table)[tokens.row]
                fine[tokens.row[written & ~read]] = False
    return indices[fine]


def find_pass_ends(plan: ExperimentPlan, rows: RowTable, text: Continuation | None) -> Ints | None:
    """Return [row]: the first position after the end of a pass with this continuation.

    None if no rule acts on tokens after the prompts, so that positions needn't be checked.
    """
    return plan.lengths(rows) + count_fed_tokens(text, rows.prompt) if plan.in_answers else None


def _list_tokens(plan: RulePlan, rows: RowTable, means_and_donors: RuleInputs) -> _WriteTokens:
    """List the tokens that the rule writes, including tokens that a pass may lack."""
    position = plan.position_of_cell[rows.cell]
    written_run = plan.written_runs(rows)
    read_run = plan.read.run(
        position, find_read_prompts(plan, rows, means_and_donors), rows.alternative
    )
    row, written = plan.written.tokens.expand(written_run)
    _, slot = count_columns(plan.written.tokens.counts(written_run))
    read = plan.read.tokens.values[plan.read.tokens.offsets[read_run][row] + slot]
    return _WriteTokens(row, written, read, slot)


def _find_present(
    plan: ExperimentPlan,
    rule: RulePlan,
    rows: RowTable,
    tokens: _WriteTokens,
    means_and_donors: RuleInputs,
    text: Continuation | None,
) -> tuple[Bools, Bools]:
    """Find which tokens are present with this continuation.

    Returns:
        [token] whether the pass contains the written token, and whether the run that is read
        contains the token that is read for it.
    """
    ends = plan.lengths(rows) + count_fed_tokens(text, rows.prompt)
    written = tokens.written < ends[tokens.row]
    if rule.rule.does.reads not in ("run", "donor", "cell"):
        return written, np.ones_like(written)
    prompts = find_read_prompts(rule, rows, means_and_donors)
    lengths = plan.experiment.table.runs[rule.rule.run].lengths[prompts]
    return written, tokens.read < (lengths + count_fed_tokens(text, prompts))[tokens.row]


def _list_token_entries(
    plan: ExperimentPlan,
    rule: RulePlan,
    rows: RowTable,
    means_and_donors: RuleInputs,
    text: Continuation | None,
) -> _WriteTokens:
    """List the tokens that the rule writes and that are present."""
    tokens = _list_tokens(rule, rows, means_and_donors)
    there = np.ones(len(tokens.row), dtype=np.bool_)
    if rule.in_answers:  # in a pass that isn't measured, the token to read may be missing
        written, read = _find_present(plan, rule, rows, tokens, means_and_donors, text)
        there = written & read
    every = (tokens.row, tokens.written, tokens.read, tokens.slot)
    return _WriteTokens(*(each[there] for each in every))


def _list_entries(
    plan: ExperimentPlan,
    rule: RulePlan,
    rows: RowTable,
    means_and_donors: RuleInputs,
    text: Continuation | None,
) -> _WriteEntries:
    """List the vectors that the rule writes at present tokens."""
    tokens = _list_token_entries(plan, rule, rows, means_and_donors, text)
    index, point = rule.points.expand(rule.site_of_cell[rows.cell][tokens.row])
    every = (tokens.row, tokens.written, tokens.read, tokens.slot)
    row, written, read, slot = (each[index] for each in every)
    return _WriteEntries(row, written, read, slot, point)


def build_writes(
    plan: ExperimentPlan,
    rows: RowTable,
    draws: Ints,
    lanes_of: RuleReader,
    means_and_donors: RuleInputs,
    shape: ModelShape,
    text: Continuation | None = None,
    *,
    senders: bool = True,
) -> list[SiteWrite]:
    """Build the writes of these rows with this continuation.

    Writes to one site and layer act in the order of the file, each on the result of the preceding
    ones; if two rules set the same vector, the later one wins.

    Args:
        rows: Its rows.
        draws: [row] noise draw.
        lanes_of: Returns the lanes that a rule reads.
        means_and_donors: Inputs of the rules.
        text: Continuation of the prompts.
        senders: Whether to include senders of paths.
    """
    parts = list_rule_writes(
        plan, rows, draws, lanes_of, means_and_donors, shape, text, senders=senders
    )
    apart = any(rule.does.mode == "step" for rule in plan.experiment.rules)
    return [
        write
        for place, part in parts.items()
        for write in _merge_in_order(place, part, apart=apart)
    ]


def list_rule_writes(
    plan: ExperimentPlan,
    rows: RowTable,
    draws: Ints,
    lanes_of: RuleReader,
    means_and_donors: RuleInputs,
    shape: ModelShape,
    text: Continuation | None = None,
    *,
    senders: bool = True,
) -> Mapping[SiteLayer, list[RuleWrite]]:
    """Return what each rule writes at each site, in the order of the file.

    Args: as for `build_writes`.
    """
    parts: dict[SiteLayer, list[RuleWrite]] = defaultdict(list)
    for rule in plan.rules:
        if rule.rule.does.changes != "sites" or (rule.paths is not None and not senders):
            continue
        entries = _list_entries(plan, rule, rows, means_and_donors, text)
        for to, of, chosen, unit, read in _group_by_site(rule, entries.point, shape):
            asked = _RuleVectors(
                rule,
                of,
                entries,
                chosen,
                read,
                rows,
                draws,
                lanes_of,
                means_and_donors.of(text),
                means_and_donors.made_with(rule.number, text),
                means_and_donors,
                shape,
            )
            spots = entries.row[chosen], entries.written[chosen], unit
            mode = rule.rule.does.mode
            if mode == "coordinates":
                for write in _write_coordinates(asked, spots, to, rows):
                    parts[to].append(write)
                    for later, rule_write in list_later_writes(
                        write, to, means_and_donors.directions
                    ):
                        parts[later].append(rule_write)
                continue
            if mode == "edit":
                parts[to] += _write_edits(asked, spots)
                continue
            values = rule.rule.does.values(rule.rule, asked)
            where = asked.amounts if mode == "along" else None
            parts[to].append(RuleWrite(*spots, values, mode, where, rule.number))
    return parts


@dataclass(frozen=True, eq=False)
class _Coordinates:
    """Implementation of `mechdsl.resolve.types.VectorBatch` for some coordinates of vectors."""

    of: _RuleVectors
    system: CoordinateSystem
    which: Tensor | None
    """[K, m]; None for all."""

    @property
    def amounts(self) -> Tensor:
        return self.of.amounts

    @property
    def width(self) -> int:
        return self.system.size if self.which is None else self.which.shape[1]

    def direction(self) -> Tensor:
        raise TypeError("rules in a basis have no direction")

    def read(self) -> Tensor:
        """Return the coordinates of the vectors that are read: [K, m]."""
        vectors = self.of.read()
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        which = None if self.which is None else to_device(self.which, wide.device)
        if not self.of.reads_coordinates:
            return self.system.encode(wide, which)
        wide = wide[:, : self.system.size]
        return wide if which is None else wide.gather(1, which)


def _write_coordinates(
    asked: _RuleVectors, spots: tuple[Ints, Ints, Ints], place: SiteLayer, rows: RowTable
) -> Iterator[RuleWrite]:
    """Yield the writes of a rule in a basis, by basis and number of coordinates."""
    plan = asked.plan
    basis, does = plan.rule.basis, plan.rule.does
    assert basis is not None
    assert plan.coordinates_of_cell is not None
    assert isinstance(does, CoordinateChange)
    members = basis.members
    named = plan.coordinates_of_cell[rows.cell[asked.row]]
    numbers = np.array([coordinate.basis for coordinate in plan.coordinates], dtype=np.int64)
    pairs, inverse = np.unique(np.stack([spots[2], numbers[named]]), axis=1, return_inverse=True)
    last = len(basis.bases) - 1  # features that come in are those of the last basis
    both = [
        [members.index(basis.at(SitePoint(*place, unit), which)) for which in (number, last)]
        for unit, number in pairs.T.tolist()
    ]
    member_of, other_of = np.array(both)[inverse.ravel()].T
    counts = np.array([(len(c.which), len(c.inserted)) for c in plan.coordinates]).T
    kinds = np.stack([member_of, other_of, *counts[:, named]])
    for number, other, count, more in np.unique(kinds, axis=1).T.tolist():
        same = np.equal(kinds, [[number], [other], [count], [more]])
        indices = np.flatnonzero(same.all(axis=0))
        which = None
        if count:
            used = (plan.coordinates[n] for n in np.unique(named[indices]))
            every = [each.which + each.inserted for each in used]
            table = np.array(every, dtype=np.int64)
            which = torch.from_numpy(table[np.unique(named[indices], return_inverse=True)[1]])
        system = asked.means_and_donors.directions.systems[members[number].name]
        part = _Coordinates(asked.part(indices), system, which)
        values = does.values(plan.rule, part)
        if values.shape[1] > 1 and values.stride(1) == 0:  # one number for all coordinates
            values = values[:, :1]
        mode = asked.means_and_donors.directions.mode(
            members[number],
            does.operation,
            (count, more),
            joins_units=asked.joins_units,
            drops_error=does.drops_error,
            inserted=members[other] if more else None,
        )
        row, position, unit = (spot[indices] for spot in spots)
        yield RuleWrite(row, position, unit, values, mode, which, plan.number)


def write_receiving_features(
    plan: RulePlan, part: RuleWrite, place: SiteLayer, cells: Ints, directions: FittedDirections
) -> Iterator[RuleWrite]:
    """Yield the writes of receivers of a path at one site, which are features if it has a basis.

    Features get the values that the dictionary computes from the vectors that receivers read.

    Args:
        plan: The plan of the path rule.
        part: The vectors that receivers read.
        place: The written site.
        cells: [row] cell of each row.
        directions: The bases of the experiment.
    """
    basis, paths = plan.rule.receiving_basis, plan.paths
    if basis is None or paths is None or paths.coordinates_of_cell is None:
        yield part
        return
    member = basis.at(SitePoint(*place, None))
    system, vectors = directions.systems[member.name], part.values
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    named = paths.coordinates_of_cell[cells[part.row]]
    counts = np.array([len(coordinate.which) for coordinate in paths.coordinates], dtype=np.int64)[
        named
    ]
    for count in np.unique(counts).tolist():
        indices = np.flatnonzero(counts == count)
        which = None
        if count:
            table = {
                number: paths.coordinates[number].which for number in set(named[indices].tolist())
            }
            which = torch.tensor([table[number] for number in named[indices].tolist()])
        index = array_to_device(indices, wide.device)
        on_device = None if which is None else to_device(which, wide.device)
        values = system.encode(wide[index], on_device)
        mode = directions.mode(member, "set", (count, 0), joins_units=False, drops_error=False)
        spots = part.row[indices], part.position[indices], part.unit[indices]
        yield RuleWrite(*spots, values, mode, which, plan.number)


def list_later_writes(
    write: RuleWrite, place: SiteLayer, directions: FittedDirections
) -> Iterator[tuple[SiteLayer, RuleWrite]]:
    """Yield the writes of features of a cross-layer transcoder to the layers after theirs."""
    site, layer = place
    if layer is None or not isinstance(write.mode, CoordinateWrite):
        return
    for later, mode in directions.later_modes(write.mode, layer).items():
        yield (site, later), replace(write, mode=mode)


def _write_edits(asked: _RuleVectors, spots: tuple[Ints, Ints, Ints]) -> Iterator[RuleWrite]:
    """Yield the writes of a rule that adds edits, by edit."""
    plan = asked.plan
    assert plan.direction_of_cell is not None
    which = plan.direction_of_cell[asked.rows.cell[asked.row]]
    for number in np.unique(which).tolist():
        indices = np.flatnonzero(which == number)
        values = plan.rule.does.values(plan.rule, asked.part(indices))
        mode = asked.means_and_donors.directions.edit(plan.directions[number])
        row, position, unit = (spot[indices] for spot in spots)
        yield RuleWrite(row, position, unit, values, mode, None, plan.number)


def _group_by_site(
    rule: RulePlan, points: Ints, shape: ModelShape
) -> Iterator[tuple[SiteLayer, SiteLayer, Ints, Ints, Ints]]:
    """Group the entries of a rule by the site that they write and the site that they read.

    Args:
        points: [entry] index of the point.

    Yields:
        The written site, the read site, the entries, once per unit, and the written and the read
        unit of each.
    """
    pairs = [
        ((to.site, to.layer), (of.site, of.layer))
        for to, of in zip(rule.point_table, rule.source_table, strict=True)
    ]
    places = sorted(set(pairs), key=str)
    place_of_point = np.array([places.index(pair) for pair in pairs], dtype=np.int64)
    unit_of_point, unit_of_source = point_units(rule.point_table), point_units(rule.source_table)
    numbers = place_of_point[points]
    for index in np.unique(numbers):
        to, of = places[index]
        chosen = np.flatnonzero(numbers == index)
        if rule.joins_units(to, shape):
            none = np.zeros_like(chosen)
            yield to, of, chosen, none, none
            continue
        again, unit = expand_units(unit_of_point[points[chosen]], unit_count(shape, *to))
        chosen = chosen[again]
        read = unit_of_source[points[chosen]]
        yield to, of, chosen, unit, np.where(read == ALL_UNITS, unit, read)


def build_edges(
    plan: ExperimentPlan, rows: RowTable, shape: ModelShape, text: Continuation | None = None
) -> list[EdgeWrite]:
    """Build the changes of attention edges in these rows, in the order of the file."""
    edges: list[EdgeWrite] = []
    ends = find_pass_ends(plan, rows, text)
    for rule in plan.rules:
        edge = rule.rule.edge
        if edge is None or edge.change is None or rule.keys is None:
            continue
        keys = rule.key_runs(rows)
        row, query = rule.written.tokens.expand(rule.written_runs(rows))
        if ends is not None:
            there = query // rule.vectors < ends[row]
            row, query = row[there], query[there]
        index, point = rule.points.expand(rule.site_of_cell[rows.cell][row])
        layer = np.array([p.layer for p in rule.point_table], dtype=np.int64)[point]
        unit = point_units(rule.point_table)[point]
        site = rule.point_table[0].site
        for at in np.unique(layer):
            chosen = np.flatnonzero(layer == at)
            again, head = expand_units(unit[chosen], unit_count(shape, site, int(at)))
            chosen = chosen[again]
            row_of = row[index[chosen]]
            entry, key = rule.keys.tokens.expand(keys[row_of])
            if ends is not None:
                there = key // rule.vectors < ends[row_of[entry]]
                entry, key = entry[there], key[there]
            edges.append(
                EdgeWrite(
                    int(at),
                    edge.change,
                    torch.from_numpy(row_of),
                    torch.from_numpy(query[index[chosen]]),
                    torch.from_numpy(head),
                    torch.from_numpy(entry),
                    torch.from_numpy(key),
                    torch.from_numpy(rule.amounts[rows.cell[row_of]]),
                    SITES[site].stack,
                )
            )
    return edges


def build_rule_writes(
    plan: ExperimentPlan,
    rows: RowTable,
    draws: Ints,
    lanes_of: RuleReader,
    means_and_donors: RuleInputs,
    shape: ModelShape,
    text: Continuation | None = None,
    *,
    senders: bool = True,
) -> RuleWrites:
    """Build everything that the rules of these rows change; arguments as in `build_writes`."""
    given = (lanes_of, means_and_donors, shape, text)
    return RuleWrites(
        build_writes(plan, rows, draws, *given, senders=senders),
        build_edges(plan, rows, shape, text),
        build_position_ids(plan, rows, text),
        plan.replaced_blocks(int(rows.cell[0])) if len(rows) else (),
        [write for *_, write in iter_circuits(plan, rows, draws, *given)],
    )


def iter_circuits(
    plan: ExperimentPlan,
    rows: RowTable,
    draws: Ints,
    lanes_of: RuleReader,
    means_and_donors: RuleInputs,
    shape: ModelShape,
    text: Continuation | None,
) -> Iterator[tuple[RulePlan, int, CircuitWrite]]:
    """Yield the edges that rules ablate in these rows, rule by rule and circuit by circuit, for
    each class of tokens, with the rule and the class."""
    for rule in plan.rules:
        circuit = rule.rule.circuit
        if circuit is None:
            continue
        every = _list_token_entries(plan, rule, rows, means_and_donors, text)
        edges = list(circuit.edges.values())
        which = rule.site_of_cell[rows.cell][every.row]
        classes = rule.classes_of(rows.prompt[every.row], every.written)
        for number, of_class in np.unique(np.stack([which, classes]), axis=1).T.tolist():
            if number == len(edges) or not edges[number][of_class]:  # the rule doesn't act there
                continue
            indices = np.flatnonzero((which == number) & (classes == of_class))
            table = means_and_donors.tabulate(rule, number, of_class, shape)
            asked = _RuleVectors(
                rule,
                table.senders[0][0],
                every,
                indices,
                np.zeros_like(indices),
                rows,
                draws,
                lanes_of,
                means_and_donors.of(text),
                None,
                means_and_donors,
                shape,
            )
            write = CircuitWrite(
                torch.from_numpy(every.row[indices]),
                torch.from_numpy(every.written[indices]),
                tuple(
                    SenderFill(
                        SiteRead(*place),
                        units,
                        _fill(asked, place, units, others, table.features),
                        others,
                    )
                    for place, units, others in table.senders
                ),
                table.receivers,
                table.mask,
                _name_source(rule, every, indices),
                others=table.others,
                features=table.features,
            )
            yield rule, of_class, write


def _name_source(rule: RulePlan, every: _WriteTokens, numbers: Ints) -> str:
    """Return the run whose values are written at the same tokens of the same rows; empty if there
    is none, or if the edges of a circuit have positions."""
    same = rule.rule.does.reads == "run" and rule.rule.external is None
    same = same and rule.rule.circuit is not None and not rule.rule.circuit.places
    same = same and np.array_equal(every.read[numbers], every.written[numbers])
    return rule.rule.run if same else ""


NODES: Mapping[str, str] = {"mlp_out": "mlp_nodes", "attn_out": "attn_nodes"}
"""Site of an output → the name, in means, of the vectors of the nodes that it is split into."""


def split_outputs(rule: RulePlan, directions: FittedDirections) -> dict[SiteLayer, FeatureSplit]:
    """Return the outputs whose features are nodes of a rule's circuit."""
    outputs: dict[SiteLayer, FeatureSplit] = {}
    circuit = rule.rule.circuit
    for output, feature in ({} if circuit is None else circuit.features).items():
        system = directions.systems[feature.member.name]
        assert isinstance(system, Dictionary)
        outputs[output] = FeatureSplit(system, feature.which, feature.member.reads)
    return outputs


def group_senders(
    senders: Sequence[SitePoint], features: SplitOutputs
) -> Iterator[tuple[SiteLayer, tuple[int, ...]]]:
    """Yield the senders of edges in forward order, with the heads, neurons or features of each
    layer together; without a node of several neurons.

    features: By output, the features that are nodes.
    """
    places = {(sender.site, sender.layer) for sender in senders}
    for place in sorted(places, key=lambda place: write_order(*place)):
        numbers = {number_unit(s, features) for s in senders if (s.site, s.layer) == place}
        rest = (OTHERS,) if OTHERS in numbers and place in features else ()
        yield place, (*sorted(numbers - {OTHERS}), *rest)


def number_unit(node: SitePoint, features: SplitOutputs) -> int:
    """Return the number of a head, neuron or feature, 0 for whole vectors, or `OTHERS`."""
    is_split = find_split_output(node) in features
    is_several = node.unit is None and (is_split or is_neuron(node))
    return OTHERS if is_several else node.unit or 0


def list_other_neurons(
    circuit: CircuitTargets, shape: ModelShape
) -> dict[SiteLayer, tuple[int, ...]]:
    """Return the neurons that are one node of a circuit together, by site and layer."""
    return {
        where: tuple(sorted({*range(unit_count(shape, *where))} - {*numbers}))
        for where, numbers in circuit.neurons.items()
    }


def list_stream_nodes(
    others: Mapping[SiteLayer, tuple[int, ...]],
    features: SplitOutputs,
    stack: str,
) -> tuple[dict[int, tuple[int, ...]], SplitOutputs]:
    """Return the neurons that are one node together, by layer, and the features that are nodes of
    one stream, by output.

    Args:
        stack: Empty for the main stream, or `encoder`.
    """
    stream_nodes = {
        layer: units
        for (site, layer), units in others.items()
        if SITES[site].stack == stack and layer is not None
    }
    return stream_nodes, {} if stack else features


def _fill_features(
    asked: _RuleVectors, split: FeatureSplit, output: SiteLayer, units: tuple[int, ...]
) -> Tensor:
    """Return [K, unit, d_model]: what features and the rest of an output add to the stream, with
    the values of a rule at its tokens."""
    rule, (site, layer) = asked.plan.rule, output
    if rule.does.reads == "mean":
        index = np.array([split.nodes.index(unit) for unit in units], dtype=np.int64)
        chosen, unit = np.repeat(asked.chosen, len(units)), np.tile(index, len(asked.chosen))
        means = replace(asked, place=(NODES[site], layer), chosen=chosen, unit=unit)
        return rule.does.values(rule, means).unflatten(0, (len(asked.chosen), len(units)))
    outputs = rule.does.values(rule, replace(asked, place=output))
    if rule.does.reads is None:
        return outputs[:, None].expand(-1, len(units), -1)
    inputs = outputs
    if split.reads:
        inputs = rule.does.values(rule, replace(asked, place=(split.reads, layer)))
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return split.split(outputs.to(wide), inputs.to(wide), units)


def _fill(
    asked: _RuleVectors,
    place: SiteLayer,
    units: tuple[int, ...],
    others: tuple[int, ...],
    features: SplitOutputs,
) -> Tensor:
    """Return [K, unit, width]: the values of a rule at its tokens, for each of some heads, neurons
    or features, then for others of these neurons."""
    if place in features:
        return _fill_features(asked, features[place], place, units)
    asked = replace(asked, place=place)
    if others:  # most neurons of the layer: they are read as one vector
        whole = replace(asked, joins=True, unit=np.zeros_like(asked.chosen))
        found = asked.plan.rule.does.values(asked.plan.rule, whole)
        return found[:, [*units, *others], None]
    chosen, unit = np.repeat(asked.chosen, len(units)), np.tile(units, len(asked.chosen))
    values = asked.plan.rule.does.values(
        asked.plan.rule, replace(asked, chosen=chosen, unit=unit.astype(np.int64))
    )
    return values.unflatten(0, (len(asked.chosen), len(units)))


def _list_kept_senders(circuit: CircuitTargets, ablated: EdgeEnds) -> list[SitePoint]:
    """Return the senders without an ablated edge in the stream of others; none if few edges are
    ablated.

    With the fill 0, what a receiver reads is then a sum of what it keeps, which is exactly 0 if
    nothing is left. A stream from which all else is subtracted would leave rounding errors, which
    the next norm amplifies.

    Args:
        ablated: The senders of the ablated edges, which are of one stream.
    """
    stack = SITES[ablated.points[0].site].stack == "encoder"
    senders = [of for of, _ in circuit.every if (SITES[of.site].stack == "encoder") == stack]
    if 2 * len(ablated.of_edge) < len(senders):
        return []
    others = {*ablated.points}
    return list(dict.fromkeys(of for of in senders if of not in others))


def _tabulate(
    senders: EdgeEnds,
    receivers: EdgeEnds,
    kept: Sequence[SitePoint],
    others: Mapping[SiteLayer, tuple[int, ...]],
    features: SplitOutputs,
) -> EdgeTable:
    """Return the columns and rows of the edges.

    Args:
        kept: Senders without an ablated edge.
    """
    every = [*senders.points, *kept]
    joined: dict[SiteLayer, tuple[int, ...]] = {
        (of.site, of.layer): others[of.site, of.layer]
        for of in every
        if is_neuron(of) and of.unit is None
    }
    places = tuple(
        (place, numbers, joined.get(place, ())) for place, numbers in group_senders(every, features)
    )
    nodes = (
        (*p, unit) for p, numbers, rest in places for unit in (*numbers, *[OTHERS][: len(rest)])
    )
    columns = {where: n for n, where in enumerate(nodes)}
    column = np.array(
        [columns[of.site, of.layer, number_unit(of, features)] for of in senders.points]
    )
    mask = torch.zeros(len(receivers.points), len(columns))
    cells = torch.from_numpy(receivers.of_edge), torch.from_numpy(column[senders.of_edge])
    mask[cells] = 1
    ends = tuple(
        (SiteRead(to.site, to.layer), number_unit(to, features)) for to in receivers.points
    )
    stack = "encoder" if SITES[senders.points[0].site].stack == "encoder" else ""
    return EdgeTable(places, ends, mask, *list_stream_nodes(others, features, stack), cells)


def build_position_ids(
    plan: ExperimentPlan, rows: RowTable, text: Continuation | None = None
) -> list[PositionIdWrite]:
    """Build the changes of position ids in these rows, in the order of the file.

    The tokens of an encoder and those of its decoder are counted separately.
    """
    position_ids: list[PositionIdWrite] = []
    sources = plan.sources(rows)
    ends = find_pass_ends(plan, rows, text)
    for rule in plan.rules:
        if rule.rule.does.changes != "positions":
            continue
        written = rule.written_runs(rows)
        row, token = rule.written.tokens.expand(written)
        _, place = count_columns(rule.written.tokens.counts(written))
        decoded = token >= sources[row]
        place -= decoded * np.bincount(row[~decoded], minlength=len(written))[row]
        number = rule.amounts[rows.cell[row]].astype(np.int64) + place
        if ends is not None:
            there = token < ends[row]
            row, token, number = row[there], token[there], number[there]
        position_ids.append(PositionIdWrite(*map(torch.from_numpy, (row, token, number))))
    return position_ids


@dataclass(frozen=True, eq=False)
class _RuleVectors:
    """Implementation of `mechdsl.resolve.types.VectorBatch` for one rule at one site."""

    plan: RulePlan
    place: SiteLayer
    """The site that is read."""
    entries: _WriteTokens
    chosen: Ints
    """[K] indices into the entries."""
    unit: Ints
    """[K] head or neuron."""
    rows: RowTable
    draws: Ints
    lanes_of: RuleReader
    means: Mapping[int, RuleMeans]
    made: CellVectors | None
    means_and_donors: RuleInputs
    shape: ModelShape
    joins: bool = False
    """Whether the neurons of a layer are read as one vector, for a circuit."""

    def part(self, own: Ints) -> _RuleVectors:
        """Select some of the vectors."""
        return replace(self, chosen=self.chosen[own], unit=self.unit[own])

    @property
    def row(self) -> Ints:
        """[K] row of each vector."""
        return self.entries.row[self.chosen]

    @property
    def joins_units(self) -> bool:
        """Whether a vector is that of all units of the site."""
        return self.joins or self.plan.joins_units(self.place, self.shape)

    @property
    def amounts(self) -> Tensor:
        return torch.from_numpy(self.plan.amounts[self.rows.cell[self.row]])

    @property
    def width(self) -> int:
        if SITES[self.place[0]].width == "key":
            return 1
        units = unit_count(self.shape, *self.place) if self.joins else 1
        return units * vector_width(self.shape, *self.place)

    def direction(self) -> Tensor:
        return self.means_and_donors.directions.of(self.plan, self.rows.cell[self.row])

    def read(self) -> Tensor:
        if self.made is not None:
            slot = self.entries.slot[self.chosen]
            return self.made.read(self.rows, self.row, slot, self.place, self.unit, self.draws)
        return self._mean() if self.plan.rule.does.reads == "mean" else self._activation()

    def _mean(self) -> Tensor:
        means = self.means[self.plan.number]
        values = means.values[self.place]
        index = (
            self.plan.position_of_cell[self.rows.cell[self.row]],
            means.groups[self.rows.prompt[self.row]],
            self.entries.slot[self.chosen],
            self.unit,
        )
        if self.joins_units and not means.of_coordinates:
            return values[arrays_to_device(index[:3], values.device)].flatten(1)
        return values[arrays_to_device(index, values.device)]

    @property
    def reads_coordinates(self) -> bool:
        """Whether `read` returns all coordinates instead of vectors."""
        return self.plan.rule.does.reads == "mean" and self.means[self.plan.number].of_coordinates

    def _activation(self) -> Tensor:
        lanes = self.lanes_of(self.plan)
        prompts = find_read_prompts(self.plan, self.rows, self.means_and_donors)
        lane = lanes.lane(prompts[self.row], self.draws[self.row])
        where = SiteRead(*self.place)
        read = lanes.reads[where]
        if self.joins_units:
            read = read.flatten(2).unsqueeze(2)
        return gather_vectors(
            read,
            lanes.batch.of_read(where),
            torch.from_numpy(lane),
            torch.from_numpy(self.entries.read[self.chosen]),
            torch.from_numpy(self.unit),
        )


@dataclass(frozen=True, eq=False)
class RuleWrite:
    """Vectors that one rule writes at one site."""

    row: Ints
    position: Ints
    unit: Ints
    values: Tensor
    mode: WriteMode = "set"
    to: Tensor | None = None
    rule: int = -1
    """Number of the rule."""


def _merge_in_order(
    place: SiteLayer, parts: Sequence[RuleWrite], *, apart: bool
) -> Iterator[SiteWrite]:
    """Merge the writes of one site: adjacent rules that set vectors become one write.

    Args:
        place: The site and its layer.
        parts: Writes in the order of the file.
        apart: Merge nothing, because a step reads the vectors between two rules.
    """
    for sets, group in groupby(parts, lambda part: part.mode == "set" and not apart):
        if sets:
            yield join_writes(place, list(group))
            continue
        for part in group:
            yield join_writes(place, [part])


def join_writes(place: SiteLayer, rule_writes: Sequence[RuleWrite]) -> SiteWrite:
    """Join writes to one site; of several writes to the same vector, the last wins."""
    row = np.concatenate([part.row for part in rule_writes])
    position = np.concatenate([part.position for part in rule_writes])
    unit = np.concatenate([part.unit for part in rule_writes])
    longest = max(
        part.values.shape[1] for part in rule_writes
    )  # vectors over keys, of several rules
    last_values = rule_writes[-1].values
    values = torch.cat([_widen_keys(part.values, longest).to(last_values) for part in rule_writes])
    to = rule_writes[-1].to
    key = np.stack([row, position, unit])
    _, last = np.unique(key[:, ::-1], axis=1, return_index=True)
    if len(last) < len(row):
        keep = np.sort(len(row) - 1 - last)
        row, position, unit = row[keep], position[keep], unit[keep]
        values = values[array_to_device(keep, values.device)]
        to = None if to is None else to[array_to_device(keep, to.device)]
    site, layer = place
    return SiteWrite(
        site,
        layer,
        torch.from_numpy(row),
        torch.from_numpy(position),
        torch.from_numpy(unit),
        values,
        mode=rule_writes[-1].mode,
        to=to,
        rule=rule_writes[-1].rule,
    )


def _widen_keys(values: Tensor, width: int) -> Tensor:
    """Return [K, width]: values over keys, padded for later keys, which have no effect."""
    if values.shape[1] == width:
        return values
    return values[:, torch.arange(width).clamp(max=values.shape[1] - 1)]


def select_prefill_rules(plan: ExperimentPlan) -> ExperimentPlan:
    """Restrict the plan to the rules that act in the prefill."""
    if plan.experiment.generation is None:
        return plan
    rules: list[RulePlan] = []
    for rule in plan.rules:
        if rule.rule.in_prefill:
            there = None if rule.steps is None else rule.steps[:, 0] == 0
            rules.append(rule if there is None or there.all() else rule.within(there))
    return replace(plan, rules=tuple(rules))


def build_generation_rules(
    plan: ExperimentPlan,
    rows: RowTable,
    draws: Ints,
    lanes_of: RuleReader,
    means_and_donors: RuleInputs,
    shape: ModelShape,
) -> GenerationRules:
    """Build the rules that act after the prefill.

    At the newest token a rule writes the same vector as at the last of its prompt tokens.
    """
    kept: list[SiteWrite] = []
    steps: list[StepRules] = []
    for rule in plan.rules:
        alone = replace(plan, rules=(rule,))

        def of(numbers: Ints, alone: ExperimentPlan = alone) -> RuleWrites:
            given = (lanes_of, means_and_donors, shape)
            rule_writes = build_rule_writes(alone, rows.take(numbers), draws[numbers], *given)
            return rule_writes.moved(torch.from_numpy(numbers))

        if rule.rule.after_prefill:
            kept += of(np.arange(len(rows))).writes
            continue
        for also, following in _iter_following(rule, rows):
            for first, last, numbers in _iter_steps(rule, rows, following):
                writes = of(numbers)
                steps.append(
                    StepRules(
                        first=max(first, 1),
                        last=last,
                        writes=tuple(map(_keep_last_write, writes.writes)),
                        edges=tuple(StepEdge(_keep_last_edge(e, also), also) for e in writes.edges),
                        blocks=writes.blocks,
                    )
                )
    return GenerationRules(tuple(kept), tuple(steps))


ExtraKeys = Literal["", "newest", "written"]


def _iter_following(rule: RulePlan, rows: RowTable) -> Iterator[tuple[ExtraKeys, Ints]]:
    """Group the rows in which a rule follows the newest token, by additional keys."""
    follows = rule.acts(rows) & (rule.follows[rule.position_of_cell[rows.cell]] != NO_TOKENS)
    keys = np.full(len(rows), NO_TOKENS)
    if rule.key_of_cell is not None:
        keys = rule.keys_follow[rule.key_of_cell[rows.cell]]
    kinds: tuple[tuple[ExtraKeys, Bools], ...] = (
        ("", keys == NO_TOKENS),
        ("newest", keys == NEWEST_TOKEN),
        ("written", keys == ALL_TOKENS),
    )
    for also, own in kinds:
        indices = np.flatnonzero(follows & own)
        if len(indices):
            yield also, indices


def _iter_steps(
    rule: RulePlan, rows: RowTable, numbers: Ints
) -> Iterator[tuple[int, int | None, Ints]]:
    """Group the rows in `numbers` by the steps in which a rule acts, apart from step 0.

    Yields:
        First step, last step (None for no limit), rows.
    """
    if rule.steps is None:
        yield 0, None, numbers  # including the final token, which is read and predicts nothing
        return
    ends, which = np.unique(rule.steps[rows.cell[numbers]], axis=0, return_inverse=True)
    for number, (first, last) in enumerate(ends.tolist()):
        if last > 0:
            yield first, last, numbers[which.reshape(-1) == number]


def _is_last(rows: Tensor, positions: Tensor) -> Tensor:
    """Return [K]: whether each position is the last of its row."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool)
    last = torch.full((int(rows.max()) + 1,), -1)
    last = last.scatter_reduce(0, rows, positions, "amax")
    return positions == last[rows]


def _keep_last_write(write: SiteWrite) -> SiteWrite:
    """Keep, for each row, the write at its last token."""
    return write.some(_is_last(write.rows, write.positions))


def _keep_last_edge(edge: EdgeWrite, also: ExtraKeys) -> EdgeWrite:
    """Keep, for each row, the edges of its last query.

    Where the newest token is added as a key, the query's own token is dropped from the keys.
    """
    edge = edge.some(_is_last(edge.rows, edge.queries))
    if also != "newest":
        return edge
    others = edge.keys != edge.queries[edge.entries]
    return replace(edge, entries=edge.entries[others], keys=edge.keys[others])
