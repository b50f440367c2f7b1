"""Inputs of rules besides the source run: means, donors and functions of whole cells, and
dictionaries.

Means are averaged, donors are drawn, and functions of whole cells are called before any cell runs.
Derived runs, which a file defines with rules (`run healed { … }`), also need these inputs. A
feature of a dictionary is inactive in a row if it is 0 in all runs involved, so that nothing
changes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.cache import ActivityCache, CachedCell, ErrorCache
from mechdsl.execute.measurement.readout import MeasureFailure, Readout
from mechdsl.execute.measurement.values import UnusableRow, describe_cell, report_function_failure
from mechdsl.execute.patching.writes import (
    NODES,
    CellVectors,
    RuleInputs,
    RuleMeans,
    RuleReader,
    RuleWrite,
    build_rule_writes,
    list_rule_writes,
    split_outputs,
)
from mechdsl.execute.unpatched_batch import Continuation, UnpatchedBatch, count_fed_tokens
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import DirectionFits, FittedDirections, read_vectors
from mechdsl.forward.hooks.batch import (
    RuleWrites,
    SiteRead,
    SplitOutputs,
    gather_vectors,
    indices_to_device,
    to_device,
)
from mechdsl.forward.hooks.coordinates import (
    MAX_NUMBERS,
    CoordinateSystem,
    CoordinateWrite,
    FeatureSplit,
)
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.plan import (
    ExperimentPlan,
    ReconstructedSpot,
    WholeCell,
    WholeCells,
    collect_whole_cells,
)
from mechdsl.planner.rows import RowTable, RulePlan, count_columns, expand_units, point_units
from mechdsl.program.python_functions import PythonFailure, PythonNotLoaded
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.types import BasisTargets, ExternalRun, SiteLayer, SitePoint
from mechdsl.vocab.sites import SITES

MAX_MEMORY_BYTES = 1 << 28
"""Largest size of one rule's vectors held in memory; larger ones use a temporary file."""


class CellFunctionFailed(Exception):
    """Failure of a function to give writable vectors for a cell."""

    def __init__(self, failure: PythonFailure, cell: WholeCell) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.cell = cell


@dataclass(frozen=True, eq=False)
class _CellBlock:
    """Vectors of one cell at one site, for one noise draw."""

    cell: int
    """Index into `WholeCells.cells`."""
    place: SiteLayer
    units: Ints
    """Heads or neurons that are written, ascending; 0 for whole vectors."""
    draw: int
    shape: tuple[int, int, int, int]
    """Rows, positions, units, width."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


def compute_cell_vectors(
    plan: ExperimentPlan,
    cells: Mapping[int, WholeCells],
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    readout: Readout,
) -> dict[tuple[int, int | None], CellVectors]:
    """Compute the vectors of rules whose function reads all rows of a cell.

    Args:
        cells: By number of the rule, the cells.
        batches: Batches of prompts.
        readout: Readout whose continuations are run too, for rules that act on such text.

    Returns:
        Vectors by number of the rule and of the metric whose text follows the prompts (None for
        the prompts alone).

    Raises:
        CellFunctionFailed: A function fails.
    """
    cell_vectors: dict[tuple[int, int | None], CellVectors] = {}
    for number, cell in cells.items():
        rule = plan.rules[number]
        for text in (None, *(readout.appended_texts if rule.in_answers else ())):
            made = _compute_rule_vectors(rule, cell, runs, batches, text)
            cell_vectors[number, None if text is None else text.number] = made
    return cell_vectors


def _compute_rule_vectors(
    rule: RulePlan,
    cells: WholeCells,
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    text: Continuation | None,
) -> CellVectors:
    run = runs.named(rule.rule.run)
    every = np.arange(len(run.rows), dtype=np.int64)
    ends = run.lengths + count_fed_tokens(text, every)
    draws = 1 if run.noise is None else run.noise.samples
    blocks = list(_list_blocks(rule, cells, runs.model.shape, draws, int(ends.max())))
    dtype = torch.promote_types(runs.model.dtype, torch.float32)
    space = _allocate(sum(block.size for block in blocks), dtype)
    begins = np.cumsum([0, *(block.size for block in blocks)]).tolist()
    views = [
        space[begin : begin + block.size].view(block.shape)
        for block, begin in zip(blocks, begins, strict=False)
    ]
    there = [np.zeros(block.shape[:2], dtype=np.bool_) for block in blocks]
    for view in views:
        view.fill_(torch.nan)
    for batch in batches:
        lanes = runs.lanes(run, batch, None if text is None else text.atom)
        for block, view, mask in zip(blocks, views, there, strict=True):
            _fill_block(rule, cells.cells[block.cell], block, lanes, ends, view, mask)
        if len(batches) > 1:
            runs.forget()
    for block, view, mask in zip(blocks, views, there, strict=True):
        rows = torch.from_numpy(np.flatnonzero(mask.any(axis=1)))
        if not len(rows):  # this pass ends before the position in all rows
            continue
        given = view[rows].flatten(2)
        try:
            made = rule.rule.does.of_cell(rule.rule, given)
        except PythonFailure as failure:
            raise CellFunctionFailed(failure, cells.cells[block.cell]) from failure
        view[rows] = made.view(len(rows), *block.shape[1:])
    rule_vectors = {
        (block.cell, block.place, block.draw): (block.units, view)
        for block, view in zip(blocks, views, strict=True)
    }
    return CellVectors(rule, cells, draws, rule_vectors)


def _list_blocks(
    rule: RulePlan, cells: WholeCells, shape: ModelShape, draws: int, longest: int
) -> Iterator[_CellBlock]:
    """List the blocks that the function is called with, in the order of the calls."""
    unit_of = point_units(rule.source_table)
    for index, cell in enumerate(cells.cells):
        _, points = rule.points.expand(np.array([cell.site]))
        of_place: dict[SiteLayer, list[int]] = {}
        for point in points.tolist():
            source = rule.source_table[point]
            of_place.setdefault((source.site, source.layer), []).append(int(unit_of[point]))
        slots = int(rule.written.tokens.counts(cell.runs).max(initial=0))
        for place, named in of_place.items():
            _, every = expand_units(np.array(named, dtype=np.int64), unit_count(shape, *place))
            each = np.unique(every)
            size = longest if SITES[place[0]].width == "key" else vector_width(shape, *place)
            for draw in range(draws):
                own = (len(cell.runs), slots, len(each), size)
                yield _CellBlock(index, place, each, draw, own)


def _allocate(size: int, dtype: torch.dtype) -> Tensor:
    """Allocate [size] in memory, or in a file that is deleted with its last reference."""
    kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    count = size * kind.itemsize
    if count <= MAX_MEMORY_BYTES:
        return torch.empty(size, dtype=dtype)
    with TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here instead of a later crash
            os.posix_fallocate(file.fileno(), 0, count)
        mapped: NDArray[Any] = np.memmap(file, dtype=kind, mode="r+", shape=(size,))
        return torch.from_numpy(mapped)


def _fill_block(
    rule: RulePlan,
    cell: WholeCell,
    block: _CellBlock,
    lanes: UnpatchedBatch,
    ends: Ints,
    view: Tensor,
    there: Bools,
) -> None:
    """Copy the vectors of these prompts into a block, and mark the present ones in `there`.

    Args:
        lanes: Lanes of the prompts.
        ends: [prompt] first position after the end of the pass.
        view: [row, position, unit, width] the block's vectors.
        there: [row, position] whether a vector is present.
    """
    indices = np.flatnonzero(np.isin(cell.prompts, lanes.prompts))
    index, token = rule.read.tokens.expand(cell.runs[indices])
    slot = count_columns(rule.read.tokens.counts(cell.runs[indices]))[1]
    prompt = cell.prompts[indices][index]
    here = token // rule.vectors < ends[prompt]
    if not here.any():
        return
    row, token, slot, prompt = indices[index][here], token[here], slot[here], prompt[here]
    lane = lanes.lane(prompt, np.full(len(prompt), block.draw))
    where = SiteRead(*block.place)
    read = lanes.reads[where]
    at = torch.from_numpy(lane)
    columns = lanes.batch.of_read(where).columns(at, torch.from_numpy(token))
    vectors = read[indices_to_device((at, columns), read.device)].to(view)
    vectors = vectors[:, torch.from_numpy(block.units)]
    if SITES[block.place[0]].width == "key":  # keys after the prompt's end stay NaN
        vectors = vectors[..., : view.shape[-1]]
        keys = torch.arange(vectors.shape[-1])
        outside = keys >= torch.from_numpy(ends[prompt])[:, None, None]
        vectors = vectors.masked_fill(outside, torch.nan)
    where = torch.from_numpy(row), torch.from_numpy(slot)
    view[(*where, slice(None), slice(vectors.shape[-1]))] = vectors
    there[row, slot] = True


def choose_donors(
    plan: ExperimentPlan, table: PromptTable, seed: int, kept: Ints
) -> dict[int, Ints]:
    """Choose the rows of `RuleInputs.donors`; within one prompt set, by permuting the kept rows."""
    donors: dict[int, Ints] = {}
    for rule in plan.rules:
        if rule.rule.does.reads == "donor":
            external = rule.rule.external
            if external is None:
                donors[rule.number] = _permute_rows(kept, table.row_keys, seed)
            else:
                donors[rule.number] = _choose_external_donors(
                    table, plan.starting_runs[0], external, seed
                )
    return donors


def _choose_external_donors(
    table: PromptTable, base: PromptRun, external: ExternalRun, seed: int
) -> Ints:
    """Return [prompt]: a row of a different prompt set, drawn by the prompt's content.

    Rows with other text than the prompt are preferred.
    """
    keys, run = external.table.row_keys, external.table.runs[external.run]
    order = sorted(range(len(keys)), key=lambda row: (stable_hash(seed, "donor", keys[row]), row))
    donors = np.empty(len(table), dtype=np.int64)
    for prompt, key in enumerate(table.row_keys):
        first = stable_hash(seed, "row of a donor", key) % len(order)
        around = [*order[first:], *order[:first]]
        ids = base.rows[prompt].ids
        donors[prompt] = next((row for row in around if run.rows[row].ids != ids), around[0])
    return donors


def compute_means(
    plan: ExperimentPlan,
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    readout: Readout,
    directions: FittedDirections,
) -> tuple[dict[int, RuleMeans], dict[int, dict[int, RuleMeans]]]:
    """Compute the means of `RuleInputs` over the kept rows, in batches of prompts.

    Args:
        batches: Batches of prompts.
        directions: Directions and bases of the rules.
        readout: Readout whose continuations matter if rules act on them.

    Returns:
        `RuleInputs.means` and `RuleInputs.of_texts`.
    """
    averaging = {n: rule for n, rule in enumerate(plan.rules) if rule.rule.does.reads == "mean"}
    means = {
        number: _compute_rule_means(rule, runs, batches, None, directions)
        for number, rule in averaging.items()
    }
    of_texts = {
        text.number: {
            number: _compute_rule_means(rule, runs, batches, text, directions)
            for number, rule in averaging.items()
            if rule.in_answers
        }
        for text in (readout.appended_texts if plan.in_answers else ())
    }
    return means, of_texts


def _permute_rows(kept: Ints, keys: Sequence[int], seed: int) -> Ints:
    """Return a seeded permutation of the kept rows without a fixed point.

    A donor has different content, unless one content makes up more than half of the rows.

    Args:
        keys: [prompt] content key, which determines the order. Rows of equal content are adjacent
            in it, so that a shift by the size of the largest group leaves every group.
    """
    drawn = {key: stable_hash(seed, "donor", key) for key in {keys[row] for row in kept.tolist()}}
    order = np.array(sorted(kept.tolist(), key=lambda row: drawn[keys[row]]), dtype=np.int64)
    most = max(Counter(keys[row] for row in kept.tolist()).values(), default=0)
    donors = np.arange(len(keys), dtype=np.int64)
    donors[order] = np.roll(order, most if most < len(kept) else 1)
    return donors


@dataclass(frozen=True, eq=False)
class _CoordinateEncoder:
    """Encoder of activations whose coordinates are averaged: the mean of coordinates isn't the
    coordinates of the mean if the encoder isn't affine."""

    rule: RulePlan
    basis: BasisTargets
    directions: FittedDirections
    shape: ModelShape

    @staticmethod
    def of(
        rule: RulePlan, directions: FittedDirections, shape: ModelShape
    ) -> _CoordinateEncoder | None:
        """Return the encoder of a rule; None if vectors are averaged."""
        basis = rule.rule.basis
        if basis is None or rule.rule.circuit is not None:
            return None
        systems = [directions.systems[member.name] for member in basis.members]
        if all(system.is_affine for system in systems):
            return None
        return _CoordinateEncoder(rule, basis, directions, shape)

    def _systems(self, place: SiteLayer) -> list[CoordinateSystem | None]:
        """Return the basis of each vector at a site; None for heads that the rule doesn't write."""
        if self.rule.joins_units(place, self.shape):
            return [self.directions.systems[self.basis.at(SitePoint(*place, None)).name]]
        members = [
            self.basis.find(SitePoint(*place, unit))
            for unit in range(unit_count(self.shape, *place))
        ]
        return [
            None if member is None else self.directions.systems[member.name] for member in members
        ]

    def extent(self, place: SiteLayer) -> tuple[int, int]:
        """Return the vectors at a site, and the largest number of their coordinates."""
        systems = self._systems(place)
        return len(systems), max(0 if system is None else system.size for system in systems)

    def encode(self, place: SiteLayer, vectors: Tensor) -> Tensor:
        """Return [K, unit, coordinate] for vectors [K, unit, width]."""
        systems, (count, size) = self._systems(place), self.extent(place)
        parts = vectors.flatten(1)[:, None] if count == 1 else vectors
        wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
        activations = wide.new_zeros(len(parts), count, size)
        for unit, system in enumerate(systems):
            if system is not None:
                activations[:, unit, : system.size] = system.encode(wide[:, unit], None)
        return activations


def _compute_rule_means(
    rule: RulePlan,
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    text: Continuation | None,
    directions: FittedDirections,
) -> RuleMeans:
    """Average activations, or their coordinates, over all kept rows, in batches of prompts."""
    names = rule.rule.groups or ("",) * len(runs.table)
    codes = np.unique(names, return_inverse=True)[1].astype(np.int64)
    tokens = rule.averaged.tokens
    slots = int(tokens.counts(np.arange(len(tokens.offsets) - 1)).max())
    shape = runs.model.shape
    places = {(p.site, p.layer) for p in rule.source_table}
    size = (len(rule.sources), int(codes.max()) + 1)
    external = rule.rule.external
    run = runs.named(rule.rule.run) if external is None else external.table.runs[external.run]
    every = np.arange(len(run.rows), dtype=np.int64)
    longest = int((run.lengths + count_fed_tokens(text, every)).max())
    encoder = _CoordinateEncoder.of(rule, directions, shape)
    sums: dict[SiteLayer, Tensor] = {}
    for place in places:
        width = longest if SITES[place[0]].width == "key" else vector_width(shape, *place)
        extent = unit_count(shape, *place), width
        extent = extent if encoder is None else encoder.extent(place)
        sums[place] = torch.zeros(*size, slots, *extent, dtype=torch.float64)
    split = split_outputs(rule, directions)
    for (site, layer), own in split.items():
        if (site, layer) in places:
            extent = len(own.nodes), shape.d_model
            sums[NODES[site], layer] = torch.zeros(*size, slots, *extent, dtype=torch.float64)
    counts = torch.zeros(*size, slots, dtype=torch.float64)
    read = codes if external is None else np.zeros(len(external.table), dtype=np.int64)
    if external is not None:
        every = np.arange(len(external.table), dtype=np.int64)
        size = max(len(batch) for batch in batches)
        batches = [every[i : i + size] for i in range(0, len(every), size)]
    for batch in batches:
        if external is None:
            lanes = runs.lanes(run, batch, None if text is None else text.atom)
        else:
            lanes = runs.external_lanes(external, batch, places)
        ends = None
        if rule.in_answers:
            ends = lanes.lengths + np.repeat(count_fed_tokens(text, batch), lanes.draws)
        _add_to_sums(rule, batch, lanes, read, sums, counts, ends, encoder, split)
        if len(batches) > 1:
            runs.forget()
    divisor = counts.clamp(min=1)[..., None, None]
    means = {place: total / divisor for place, total in sums.items()}
    return RuleMeans(means, codes, encoder is not None)


@dataclass(frozen=True, eq=False)
class _LaneVectors:
    """Activations at some tokens of lanes."""

    lanes: UnpatchedBatch
    lane: Ints
    """[K]"""
    token: Ints
    """[K]"""

    def at(self, place: SiteLayer) -> Tensor:
        """Return [K, unit, width]."""
        where = SiteRead(*place)
        read, at = self.lanes.reads[where], torch.from_numpy(self.lane)
        columns = self.lanes.batch.of_read(where).columns(at, torch.from_numpy(self.token))
        return read[indices_to_device((at, columns), read.device)]

    def in_stack(self, stack: str) -> Tensor:
        """Return [K]: whether each token is read by the encoder of an encoder-decoder, or not."""
        lengths = self.lanes.batch.of_stack("encoder").lengths
        encoded = torch.from_numpy(self.token) < lengths[torch.from_numpy(self.lane)]
        return encoded == (stack == "encoder")

    def some(self, there: Tensor) -> _LaneVectors:
        """Return some of the tokens, by [K] bool."""
        own = there.numpy()
        return replace(self, lane=self.lane[own], token=self.token[own])

    def split(self, output: SiteLayer, split: FeatureSplit) -> Tensor:
        """Return [K, node, d_model]: what the nodes of an output add to the stream."""
        site, layer = output
        sites = site, split.reads or site
        outputs, inputs = (self.at((site, layer))[:, 0] for site in sites)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        return split.split(outputs.to(wide), inputs.to(wide), split.nodes)


def _add_to_sums(
    plan: RulePlan,
    prompts: Ints,
    lanes: UnpatchedBatch,
    groups: Ints,
    sums: dict[SiteLayer, Tensor],
    counts: Tensor,
    ends: Ints | None,
    encoder: _CoordinateEncoder | None,
    split: SplitOutputs,
) -> None:
    """Add activations of these prompts, or their coordinates, to the sums of a `mean` ablation.

    Args:
        lanes: Their lanes.
        groups: [prompt] group.
        sums: [position, group, token, unit, width] per site.
        counts: [position, group, token] number of summands.
        ends: [lane] first position after the end of the pass; None if positions needn't be
            checked.
        split: By output, the features of a circuit that are averaged as nodes.
    """
    nodes = {(NODES[site], layer): (site, layer) for site, layer in split}
    positions = np.repeat(np.arange(len(plan.sources)), len(prompts))
    prompt = np.tile(prompts, len(plan.sources))
    key = positions * plan.averaged.prompts + prompt
    index, run = plan.averaged.runs.expand(key)
    for draw in range(lanes.draws):
        lane = lanes.lane(prompt[index], np.full(len(index), draw))
        row, token = plan.averaged.tokens.expand(run)
        _, slot = count_columns(plan.averaged.tokens.counts(run))
        if ends is not None:
            there = token < ends[lane[row]]
            row, token, slot = row[there], token[there], slot[there]
        added = tuple(
            map(torch.from_numpy, (positions[index][row], groups[prompt[index]][row], slot))
        )
        read = _LaneVectors(lanes, lane[row], token)
        for place, total in sums.items():
            lane_vectors, into = read, added
            if plan.rule.circuit is not None and plan.rule.circuit.encoder is not None:
                here = read.in_stack(SiteRead(*place).stack)  # other tokens have no such vector
                lane_vectors, into = read.some(here), tuple(each[here] for each in added)
            if place in nodes:
                vectors = lane_vectors.split(nodes[place], split[nodes[place]])
            else:
                vectors = lane_vectors.at(place)
            if encoder is not None:
                vectors = encoder.encode(place, vectors)
            vectors = vectors[..., : total.shape[-1]]  # vectors over keys may be padded
            total.index_put_(into, vectors.to(total), accumulate=True)
        counts.index_put_(added, torch.ones(len(slot), dtype=counts.dtype), accumulate=True)


def report_cell_failure(failed: CellFunctionFailed, plan: ExperimentPlan) -> Diagnostic:
    """Report E0223 for a function that was given all rows of a cell."""
    rows = 0 if isinstance(failed.failure, PythonNotLoaded) else len(failed.cell.runs)
    words = describe_cell(plan, failed.cell.cell)
    seen = UnusableRow(int(failed.cell.prompts[0]), plan.experiment.spec.base, words)
    problem = MeasureFailure(failed.failure.diagnostic, None, rows)
    return report_function_failure(problem, plan.experiment, seen)


@dataclass(frozen=True, eq=False)
class DerivedRuns:
    """Runs that one panel derives with rules; each may read preceding ones."""

    plans: Mapping[str, ExperimentPlan]
    runs: UnpatchedRuns
    donors: Mapping[str, Mapping[int, Ints]]
    """By run and number of the rule, [prompt] the row that replaces the prompt, for `resample`."""
    cells: Mapping[str, Mapping[int, WholeCells]]
    """By run and number of the rule, the rows that a function is given at once."""
    directions: Mapping[str, FittedDirections]
    batches: Sequence[Ints]
    """Batches of the prompts that means average over."""
    _written: dict[str, RuleInputs] = field(default_factory=dict[str, RuleInputs])

    @staticmethod
    def define(
        plans: Mapping[str, ExperimentPlan],
        runs: UnpatchedRuns,
        batches: Sequence[Ints],
        fits: DirectionFits,
    ) -> tuple[DerivedRuns, list[Diagnostic]]:
        """Define the derived runs, which can be read afterwards.

        Args:
            plans: The plan of each run.
            runs: The unpatched runs, which get the rules.
            batches: Rows used for means, donors and functions of whole cells.
            fits: Fits of directions.

        Returns:
            The runs, and the problems: E0223 for a function that fails, E0641 for a zero direction.
        """
        kept = np.concatenate([np.arange(0), *batches])
        directions = {name: fits.of(plan) for name, plan in plans.items()}
        derived_runs = DerivedRuns(
            plans,
            runs,
            {
                name: choose_donors(plan, runs.table, runs.seed, kept)
                for name, plan in plans.items()
            },
            {name: collect_whole_cells(plan, plan.rows(kept)) for name, plan in plans.items()},
            {name: own for name, (own, _) in directions.items()},
            batches,
        )
        problems = [problem for _, diagnostics in directions.values() for problem in diagnostics]
        runs.rules_of = derived_runs.rules
        for name, plan in plans.items() if not problems else ():
            if derived_runs.cells[name]:  # run functions first, because they may fail
                try:
                    derived_runs.written(name)
                except CellFunctionFailed as failed:
                    return derived_runs, [report_cell_failure(failed, plan)]
        return derived_runs, problems

    def written(self, name: str) -> RuleInputs:
        """Return the inputs of a run's rules besides activations on the same prompt.

        Means are computed on the first read, because all values of the run may be cached.
        """
        if name not in self._written:
            plan, cells, readout = self.plans[name], self.cells[name], Readout.of(())
            directions = self.directions[name]
            means, of_texts = compute_means(plan, self.runs, self.batches, readout, directions)
            made = compute_cell_vectors(plan, cells, self.runs, self.batches, readout)
            self._written[name] = RuleInputs(means, of_texts, self.donors[name], made, directions)
        return self._written[name]

    def rules(self, run: PromptRun, prompts: Ints, draw: Ints, batch: Ints) -> RuleWrites:
        """Build the writes of a derived run in rows that start from it.

        Writes of its base run come first.

        Args:
            run: The run; without rules there are no writes.
            prompts: [row] prompt.
            draw: [row] noise draw.
        """
        if run.derived is None:
            return RuleWrites()
        plan, written = self.plans[run.name], self.written(run.name)
        none = np.zeros(len(prompts), dtype=np.int64)
        rows = RowTable(none, prompts, none)

        def lanes_of(rule: RulePlan) -> UnpatchedBatch:
            donors, external = written.donors.get(rule.number), rule.rule.external
            due = batch if donors is None else np.unique(donors[batch])
            if external is not None:
                places = {(point.site, point.layer) for point in rule.source_table}
                return self.runs.external_lanes(external, due, places)
            return self.runs.lanes(self.runs.named(rule.rule.run), due, alone=donors is not None)

        shape = self.runs.model.shape
        before = self.rules(self.runs.named(run.derived.base), prompts, draw, batch)
        return before.then(build_rule_writes(plan, rows, draw, lanes_of, written, shape))


BasisErrors: TypeAlias = dict[str, tuple[float, int]]
"""Basis → mean of ‖x − x̂‖ / ‖x‖ over vectors x of the base run, and number of vectors."""


@dataclass(eq=False)
class ReconstructionErrors:
    """Errors of the bases of one experiment, summed for each prompt."""

    plan: ExperimentPlan
    cache: ErrorCache | None
    found: dict[ReconstructedSpot, Floats]
    """[prompt of the table, 2]: sum of relative errors, and number of vectors; NaN if unknown."""

    @staticmethod
    def of(plan: ExperimentPlan, rows: int, cache: ErrorCache | None) -> ReconstructionErrors:
        """Look up the errors that were measured before the run.

        Args:
            rows: Rows of the prompt table.
        """
        errors = {spot: np.full((rows, 2), np.nan) for spot in plan.reconstructed}
        for spot, values in errors.items() if cache is not None else ():
            assert cache is not None
            values[:] = cache.earlier(spot)
        return ReconstructionErrors(plan, cache, errors)

    def is_unknown(self, prompts: Ints) -> Bools:
        """Return [prompt] whether an error isn't known yet."""
        missing = np.zeros(len(prompts), dtype=np.bool_)
        for values in self.found.values():
            missing |= np.isnan(values[prompts, 0])
        return missing

    def measure(
        self, prompts: Ints, base: UnpatchedBatch, directions: FittedDirections
    ) -> Iterator[CachedCell]:
        """Measure errors on prompts of the base run, and yield what is to be stored."""
        for spot, values in self.found.items():
            values[prompts] = self._measured(spot, prompts, base, directions)
            if self.cache is not None:
                yield self.cache.part(spot, prompts, values[prompts])

    def _measured(
        self,
        spot: ReconstructedSpot,
        prompts: Ints,
        base: UnpatchedBatch,
        directions: FittedDirections,
    ) -> Floats:
        rule = self.plan.rules[spot.rule]
        basis = rule.rule.basis
        assert basis is not None
        pairs = [(rule.point_table[n], rule.source_table[n]) for n in spot.points]
        points = [point for pair in pairs for point in pair]
        position = rule.positions[spot.position]
        sums = np.zeros((len(base.prompts), 2))
        vectors: dict[int, Tensor] = {}
        for vector in read_vectors(lambda _: base, points, [position], [base.prompts]):
            vectors[vector.point] = vector.vectors
            if vector.point % 2 == 0:
                continue
            system = directions.systems[basis.at(points[vector.point - 1], spot.basis).name]
            errors = relative_errors(
                system, vectors.pop(vector.point - 1), vectors.pop(vector.point)
            )
            at = np.searchsorted(base.prompts, vector.prompts)
            np.add.at(sums[:, 0], at, errors)
            np.add.at(sums[:, 1], at, 1)
        return sums[np.searchsorted(base.prompts, prompts)]

    def mean(self, prompts: Ints) -> BasisErrors:
        """Return the mean error of each basis over the vectors of these prompts."""
        sums: dict[str, Floats] = {}
        for spot, values in self.found.items():
            basis = self.plan.rules[spot.rule].rule.basis
            assert basis is not None
            own = np.nansum(values[prompts], axis=0)
            name = basis.names[spot.basis]
            sums[name] = sums.get(name, 0) + own
        return {name: (own[0] / own[1], int(own[1])) for name, own in sums.items() if own[1]}


def relative_errors(system: CoordinateSystem, vectors: Tensor, inputs: Tensor) -> Floats:
    """Return [K]: ‖x − x̂‖ / ‖x‖, 0 for x = 0.

    Args:
        vectors: [K, width] what is reconstructed.
        inputs: [K, …] what is encoded: the same vectors, or the inputs of a transcoder.
    """
    errors = [np.zeros(0)]
    count = max(1, MAX_NUMBERS // max(system.size, vectors.shape[1]))
    for begin in range(0, len(vectors), count):
        tensors, given = vectors[begin : begin + count], inputs[begin : begin + count]
        dtype = torch.promote_types(tensors.dtype, torch.float32)
        tensors, given = tensors.to(dtype), given.to(dtype)
        error, length = (tensors - system.reconstruct(given)).norm(dim=-1), tensors.norm(dim=-1)
        ratio = torch.where(length > 0, error / length, 0.0)
        errors.append(ratio.double().cpu().numpy())
    return np.concatenate(errors)


# --- inactive features ----------------------------------------------------------------------------


_UNKNOWN = -1


class FeatureActivity:
    """Rows of an experiment whose features are known to be active or inactive."""

    def __init__(self, plan: ExperimentPlan, rows: int, cache: ActivityCache | None) -> None:
        """Look up the rows that were decided before the run.

        Args:
            rows: Rows of the prompt table.
        """
        self._inactive = np.full((plan.n_cells, rows), _UNKNOWN, dtype=np.int8)
        self._cache = cache

    def look_up(self, rows: RowTable, *, own: bool = False) -> None:
        """Read stored decisions on rows: from before this run, or of an interrupted attempt."""
        if self._cache is not None and len(rows):
            there, inactive = (self._cache.own if own else self._cache.earlier)(rows)
            self._set(rows.take(np.flatnonzero(there)), inactive[there])

    def decide(self, rows: RowTable, inactive: Bools) -> Iterator[CachedCell]:
        """Record decisions, and yield what is to be stored of them."""
        self._set(rows, inactive)
        if self._cache is not None and len(rows):
            yield from self._cache.parts(rows, inactive)

    def _set(self, rows: RowTable, inactive: Bools) -> None:
        self._inactive[rows.cell, rows.prompt] = inactive

    def is_unknown(self, rows: RowTable) -> Bools:
        """Return [row] whether a row isn't decided yet."""
        return self._inactive[rows.cell, rows.prompt] == _UNKNOWN

    def is_inactive(self, rows: RowTable) -> Bools:
        """Return [row] whether a row is decided and inactive."""
        return self._inactive[rows.cell, rows.prompt] == 1


def find_inactive_rows(
    plan: ExperimentPlan,
    rows: RowTable,
    base: UnpatchedBatch,
    lanes_of: RuleReader,
    inputs: RuleInputs,
    shape: ModelShape,
) -> Bools:
    """Return [row]: whether all features that the rules change are 0 before and after.

    By induction over the writes of a row, its forward pass equals the base run.

    Args:
        plan: A plan with `watched_sites`.
        rows: Its rows on the prompts of `base`.
        base: The run that the rows start from.
        lanes_of: Returns the lanes that a rule reads.
        inputs: Inputs of the rules.
    """
    named = np.ones(len(rows), dtype=np.bool_)
    for rule in plan.rules:
        if rule.coordinates_of_cell is not None:
            counts = np.array([len(coordinate.which) for coordinate in rule.coordinates])
            named &= (counts[rule.coordinates_of_cell[rows.cell]] > 0) | ~rule.acts(rows)
    inactive_rows = np.zeros(len(rows), dtype=np.bool_)
    for part in _parts(plan, np.flatnonzero(named)):
        row_table = rows.take(part)
        still = np.ones(len(row_table), dtype=np.bool_)
        draws = np.zeros(len(row_table), dtype=np.int64)
        writes = list_rule_writes(plan, row_table, draws, lanes_of, inputs, shape)
        for place, parts in writes.items():
            for write in parts:
                still[write.row[_changes(place, write, row_table, base)]] = False
        inactive_rows[part] = still
    return inactive_rows


def _parts(plan: ExperimentPlan, rows: Ints) -> Iterator[Ints]:
    """Divide rows so that the features of the vectors of a part fit in memory."""
    sizes = [m.size for r in plan.rules if r.rule.basis for m in r.rule.basis.members]
    count = max(1, MAX_NUMBERS // max(sizes))
    for begin in range(0, len(rows), count):
        yield rows[begin : begin + count]


def _changes(place: SiteLayer, write: RuleWrite, rows: RowTable, base: UnpatchedBatch) -> Bools:
    """Return [vector]: whether a feature is active before or after a write to the base run."""
    mode = write.mode
    assert isinstance(mode, CoordinateWrite)
    site, layer = place
    where = SiteRead(mode.reads or site, mode.find_layer(layer))
    read = base.reads[where]
    if mode.joins_units:
        read = read.flatten(2).unsqueeze(2)
    lane = base.lane(rows.prompt[write.row], np.zeros_like(write.row))
    at = (torch.from_numpy(each) for each in (lane, write.position, write.unit))
    now = gather_vectors(read, base.batch.of_read(where), *at)
    wide = now.to(torch.promote_types(now.dtype, torch.float32))
    which = None if write.to is None else to_device(write.to, wide.device)
    changed = (mode.system.encode(wide, which) != 0).any(-1)
    if mode.operation == "set":
        changed |= to_device(write.values != 0, changed.device).any(-1)
    return changed.cpu().numpy()
