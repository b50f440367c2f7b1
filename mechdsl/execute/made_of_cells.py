"""What rules write that a function makes of all rows of a cell at once.

The vectors of the unpatched run are gathered for every cell, batch of prompts by batch, and what is
made of them takes their place: it is there before the first row is laid out, so that it can't hang
on which rows share a pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_batch import TextBehind, UnpatchedBatch, fed_tokens
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.hooks.batch import together_on_device
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.plan.columns import counted, each_unit, units_of
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.whole_cells import WholeCell, WholeCells
from mechdsl.program.python_files import PythonFailure
from mechdsl.resolve.resolved_rule import Place
from mechdsl.vocab.sites import SITES

IN_MEMORY = 1 << 28
"""Bytes of the vectors of one rule that are held in memory; more lie in a temporary file."""


class CellFailed(Exception):
    """A function gave nothing that can be written, for a cell."""

    def __init__(self, failure: PythonFailure, cell: WholeCell) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.cell = cell


@dataclass(frozen=True, eq=False)
class _Block:
    """The vectors of one cell in one layer, for one draw of noise."""

    cell: int
    """Index into `WholeCells.cells`."""
    place: Place
    units: Ints
    """Ascending: the heads or neurons that are written; 0 for whole vectors."""
    draw: int
    shape: tuple[int, int, int, int]
    """Rows, positions, units, width."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class MadeOfCells:
    """What one rule writes, for every cell."""

    plan: RulePlan
    cells: WholeCells
    draws: int
    """Of noise, in the run that is read."""
    blocks: Mapping[tuple[int, Place, int], tuple[Ints, Tensor]]
    """By index of the cell, place that is read, and draw: the units, and the vectors, [row,
    position, unit, width]."""

    def read(
        self, rows: Rows, row: Ints, slot: Ints, place: Place, unit: Ints, draws: Ints
    ) -> Tensor:
        """[K, width] for K vectors of one place: row, token of its position, head or neuron.

        draws: [row]
        """
        cell, within = self.cells.place(self.plan, rows)
        draw = draws[row] if self.draws > 1 else np.zeros_like(row)
        found: Tensor | None = None
        kinds = np.stack([cell[row], draw])
        for index, number in np.unique(kinds, axis=1).T.tolist():
            own = np.flatnonzero((kinds[0] == index) & (kinds[1] == number))
            there, block = self.blocks[index, place, number]
            where = (within[row[own]], slot[own], np.searchsorted(there, unit[own]))
            values = block[tuple(map(torch.from_numpy, where))]
            if found is None:
                found = values.new_zeros(len(row), values.shape[-1])
            found[torch.from_numpy(own)] = values
        return torch.zeros(0, 1) if found is None else found


def made_of_cells(
    plan: ExperimentPlan,
    cells: Mapping[int, WholeCells],
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    readout: Readout,
) -> dict[tuple[int, int | None], MadeOfCells]:
    """By number of the rule, and of the metric whose text stands behind the prompts (None for the
    prompts alone; others are of rules that act on such text). CellFailed where a function fails.

    batches: of prompts. readout: what it has behind the prompts.
    """
    found: dict[tuple[int, int | None], MadeOfCells] = {}
    for number, own in cells.items():
        rule = plan.rules[number]
        for text in (None, *(readout.texts_behind if rule.behind else ())):
            made = _made(rule, own, runs, batches, text)
            found[number, None if text is None else text.number] = made
    return found


def _made(
    rule: RulePlan,
    cells: WholeCells,
    runs: UnpatchedRuns,
    batches: Sequence[Ints],
    text: TextBehind | None,
) -> MadeOfCells:
    run = runs.named(rule.rule.run)
    every = np.arange(len(run.rows), dtype=np.int64)
    ends = run.lengths + fed_tokens(text, every)
    draws = 1 if run.noise is None else run.noise.samples
    blocks = list(_blocks(rule, cells, runs.model.shape, draws, int(ends.max())))
    dtype = torch.promote_types(runs.model.dtype, torch.float32)
    space = _space(sum(block.size for block in blocks), dtype)
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
            _fill(rule, cells.cells[block.cell], block, lanes, ends, view, mask)
        if len(batches) > 1:
            runs.forget()
    for block, view, mask in zip(blocks, views, there, strict=True):
        rows = torch.from_numpy(np.flatnonzero(mask.any(axis=1)))
        if not len(rows):  # none of them goes as far in this pass
            continue
        given = view[rows].flatten(2)
        try:
            made = rule.rule.does.of_cell(rule.rule, given)
        except PythonFailure as failure:
            raise CellFailed(failure, cells.cells[block.cell]) from failure
        view[rows] = made.view(len(rows), *block.shape[1:])
    found = {
        (block.cell, block.place, block.draw): (block.units, view)
        for block, view in zip(blocks, views, strict=True)
    }
    return MadeOfCells(rule, cells, draws, found)


def _blocks(
    rule: RulePlan, cells: WholeCells, shape: ModelShape, draws: int, longest: int
) -> Iterator[_Block]:
    """What the function is called with, in the order of the calls."""
    unit_of = units_of(rule.source_table)
    for index, cell in enumerate(cells.cells):
        _, points = rule.points.expand(np.array([cell.site]))
        of_place: dict[Place, list[int]] = {}
        for point in points.tolist():
            source = rule.source_table[point]
            of_place.setdefault((source.site, source.layer), []).append(int(unit_of[point]))
        slots = int(rule.written.tokens.counts(cell.runs).max(initial=0))
        for place, named in of_place.items():
            _, every = each_unit(np.array(named, dtype=np.int64), units(shape, *place))
            each = np.unique(every)
            size = longest if SITES[place[0]].width == "key" else width(shape, *place)
            for draw in range(draws):
                own = (len(cell.runs), slots, len(each), size)
                yield _Block(index, place, each, draw, own)


def _space(size: int, dtype: torch.dtype) -> Tensor:
    """[size]: in memory, or in a file that is gone when nobody holds it any more."""
    kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    count = size * kind.itemsize
    if count <= IN_MEMORY:
        return torch.empty(size, dtype=dtype)
    with TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and no crash later
            os.posix_fallocate(file.fileno(), 0, count)
        mapped: NDArray[Any] = np.memmap(file, dtype=kind, mode="r+", shape=(size,))
        return torch.from_numpy(mapped)


def _fill(
    rule: RulePlan,
    cell: WholeCell,
    block: _Block,
    lanes: UnpatchedBatch,
    ends: Ints,
    view: Tensor,
    there: Bools,
) -> None:
    """Put the vectors of these prompts into a block, and note which there are.

    ends: [prompt] the first position that isn't there
    """
    own = np.flatnonzero(np.isin(cell.prompts, lanes.prompts))
    index, token = rule.read.tokens.expand(cell.runs[own])
    slot = counted(rule.read.tokens.counts(cell.runs[own]))[1]
    prompt = cell.prompts[own][index]
    here = token < ends[prompt]
    if not here.any():
        return
    row, token, slot, prompt = own[index][here], token[here], slot[here], prompt[here]
    lane = lanes.lane(prompt, np.full(len(prompt), block.draw))
    read = lanes.reads[SiteRead(*block.place)]
    at = torch.from_numpy(lane)
    columns = lanes.batch.columns(at, torch.from_numpy(token))
    vectors = read[together_on_device((at, columns), read.device)].to(view)
    vectors = vectors[:, torch.from_numpy(block.units)]
    if SITES[block.place[0]].width == "key":  # a prompt's own keys; the rest stays NaN
        vectors = vectors[..., : view.shape[-1]]
        keys = torch.arange(vectors.shape[-1])
        behind = keys >= torch.from_numpy(ends[prompt])[:, None, None]
        vectors = vectors.masked_fill(behind, torch.nan)
    where = torch.from_numpy(row), torch.from_numpy(slot)
    view[(*where, slice(None), slice(vectors.shape[-1]))] = vectors
    there[row, slot] = True
