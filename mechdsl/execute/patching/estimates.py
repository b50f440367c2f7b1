"""Effects estimated by gradients of the metric instead of patched runs (`using`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.measurement.readout import Readout, ReadoutInput, ReadoutResult, ValueGap
from mechdsl.execute.patching.differentiated_run import DifferentiatedRun, DrawLanes
from mechdsl.execute.patching.writes import (
    RuleInputs,
    RuleReader,
    build_edges,
    build_writes,
    select_readable_rows,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.forward.hooks.batch import (
    Batch,
    EdgeWrite,
    SiteRead,
    SiteWrite,
    WriteMode,
    apply_write,
    array_to_device,
    gather_vectors,
    to_device,
)
from mechdsl.forward.hooks.coordinates import CoordinateWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.gradients import compute_gradients
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.plan import ExperimentPlan, cell_sites
from mechdsl.planner.rows import RowTable
from mechdsl.resolve.types import ItemNumber


@dataclass(frozen=True, eq=False)
class _WrittenVectors:
    """Vectors that rows write at one site of one layer.

    A spot is a vector of a lane, or the vectors of all its units if the rows' basis joins them;
    several rows may write one.
    """

    where: SiteRead
    row: Ints
    """[K]"""
    spot: Tensor
    """[K] index of the spot."""
    values: Tensor
    """[K, width], or the coordinates that are written."""
    lane: Tensor
    """[spot]"""
    position: Tensor
    """[spot]"""
    unit: Tensor
    """[spot, unit of the spot]"""
    mode: WriteMode = "set"
    which: Tensor | None = None
    """[K, m]: the coordinates that are written; None for all of them, or for whole vectors."""

    @staticmethod
    def of(write: SiteWrite, lane_of_row: Ints, shape: ModelShape) -> _WrittenVectors:
        row = write.rows.numpy()
        joins = isinstance(write.mode, CoordinateWrite) and write.mode.joins_units
        units = np.zeros_like(row) if joins else write.units.numpy()
        places = np.stack([lane_of_row[row], write.positions.numpy(), units])
        spots, spot = np.unique(places, axis=1, return_inverse=True)
        own = (torch.from_numpy(each) for each in (spot.reshape(-1), *spots))
        index, lane, position, unit = own
        every = torch.arange(unit_count(shape, write.site, write.layer))
        units_of = every.expand(len(unit), -1) if joins else unit[:, None]
        # A clone, because tensors created in inference mode can't be differentiated.
        values, which = write.values.clone(), None if write.to is None else write.to.clone()
        places_of = (lane, position, units_of, write.mode, which)
        return _WrittenVectors(write.where, row, index, values, *places_of)

    def some(self, rows: Ints) -> _WrittenVectors:
        """Select the vectors of some rows: [row] bool by number; spots of other rows remain."""
        own = np.flatnonzero(rows[self.row])
        values = self.values[array_to_device(own, self.values.device)]
        spot = self.spot[torch.from_numpy(own)]
        return replace(self, row=self.row[own], spot=spot, values=values)

    def width(self, shape: ModelShape) -> int:
        """Return the length of the vector of a spot."""
        return self.unit.shape[1] * vector_width(shape, self.where.site, self.where.layer)

    @property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lane, position and unit of each vector of all spots."""
        count = self.unit.shape[1]
        lane, position = (each.repeat_interleave(count) for each in (self.lane, self.position))
        return lane, position, self.unit.reshape(-1)

    def added(self, values: Tensor) -> SiteWrite:
        """Add [spot, width] to the current values."""
        where = self.where
        values = values.reshape(self.unit.numel(), -1)
        given = (where.site, where.layer, *self._places, values)
        return SiteWrite(*given, mode="add", stack=where.stack)

    def base(self, read: Tensor, batch: Batch) -> Tensor:
        """Return [spot, width]: the values in the base run."""
        own = batch.of_site(self.where.site, self.where.stack)
        return gather_vectors(read.detach(), own, *self._places).reshape(len(self.lane), -1)

    def written(self, base: Tensor) -> Tensor:
        """Return [K, width] in 64 bits: what each row writes over [K, width] of the base run."""
        values = self.values.to(base.device).double()
        if self.mode == "set":
            return values
        which = None if self.which is None else to_device(self.which, base.device)
        return apply_write(self.mode, base.double(), values, which)


class GradientEstimates:
    """Estimates for the rows of one experiment on one batch of prompts."""

    def __init__(
        self,
        plan: ExperimentPlan,
        readout: Readout,
        means_and_donors: RuleInputs,
        runs: UnpatchedRuns,
        lanes_of: RuleReader,
        batch: Ints,
    ) -> None:
        """Prepare estimates; lanes_of: returns a rule's lanes; batch: the current prompts."""
        said = plan.experiment.spec.estimator
        assert said is not None
        self.plan = plan
        self.kind, self.steps, self.options = said.kind, said.steps, dict(said.options)
        self.readout = readout
        self.means_and_donors = means_and_donors
        self.model = runs.model
        self.lanes_of = lanes_of
        run = runs.named(plan.experiment.spec.base)
        self.differentiated = DifferentiatedRun(runs, run, readout, batch, self.kind.backward)

    def first(self, prompts: Ints, most: int) -> tuple[Ints, int]:
        """Select the first prompts, at least one, that together have up to `most` tokens.

        Returns:
            These prompts, which are differentiated together, and their number of tokens.
        """
        lanes = self.differentiated.unpatched()
        tokens = lanes.lengths[lanes.lane(prompts, np.zeros_like(prompts))] * self.plan.draws
        ends = np.cumsum(tokens)
        count = max(1, int(np.searchsorted(ends, most, side="right")))
        return prompts[:count], int(ends[count - 1])

    def of(self, rows: RowTable, base: Sequence[Floats]) -> ReadoutResult:
        """Estimate the measures: the base run's value plus the estimated effect.

        An estimator whose values are no effects gives its value instead.

        Args:
            rows: All requested rows of their prompts.
            base: Per measure, [row] the base run's value.
        """
        every, wanted = self._with_others(rows)
        draws = self.plan.draws
        index = np.repeat(np.arange(len(every)), draws)
        draw = np.tile(np.arange(draws), len(every))
        drawn = every.take(index)
        prompts = np.unique(drawn.prompt)
        lane_of_row = np.searchsorted(prompts, drawn.prompt) * draws + draw
        lanes = DrawLanes.of(self.differentiated.unpatched(), prompts, draws)
        if self.kind.place == "attention":
            edges = build_edges(self.plan, drawn, self.model.shape)
            writes = [_select_keys(edge, lanes.batch.key_width) for edge in edges]
        else:
            given = (self.lanes_of, self.means_and_donors, self.model.shape)
            writes = build_writes(self.plan, drawn, draw, *given)
        shape = self.model.shape
        written = [_WrittenVectors.of(write, lane_of_row, shape) for write in writes]
        environments = [self.plan.items[cell] for cell in drawn.cell]
        if not any(atom.by_item for _, atom in self.readout.atoms):
            environments = [None] * len(drawn)
        if self.steps is None:
            sums = self._at_base(written, lanes, environments)
        else:
            groups = cell_sites(self.plan)[drawn.cell]
            sums = self._along(written, lanes, environments, groups)
        values = sums.reshape(len(sums), len(every), draws)[:, wanted].mean(axis=2)
        own = base if self.kind.is_effect else [np.zeros_like(each) for each in base]
        return _mark_gaps([one + value for one, value in zip(own, values, strict=True)])

    def _with_others(self, rows: RowTable) -> tuple[RowTable, Ints]:
        """Add rows that move along the line together: all rows of a prompt at one site.

        Rows with cached values are included.

        Returns:
            All rows, and the indices of the requested ones.
        """
        if self.steps is None:
            return rows, np.arange(len(rows))
        sites = cell_sites(self.plan)
        every = self.plan.rows(np.unique(rows.prompt))
        every = every.take(np.flatnonzero(np.isin(sites[every.cell], sites[rows.cell])))
        good = select_readable_rows(self.plan, every, self.means_and_donors, self.readout.passes)
        every = every.take(good)
        places = {place: n for n, place in enumerate(_iter_places(every))}
        return every, np.array([places[place] for place in _iter_places(rows)], dtype=np.int64)

    # --- the estimators ---

    def _at_base(
        self,
        written: Sequence[_WrittenVectors],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
    ) -> Floats:
        """Return [measure, row]: estimates by the gradient at the base run."""
        if self.kind.place == "attention":
            widths = [each.values.shape[1] for each in written]
        else:
            widths = [each.width(self.model.shape) for each in written]
        leaves = [
            self.differentiated.zeros(len(each.lane), width)
            for each, width in zip(written, widths, strict=True)
        ]
        adds = [each.added(leaf) for each, leaf in zip(written, leaves, strict=True)]
        reading, read = self.differentiated.read(adds, lanes, [each.where for each in written])
        bases = [each.base(read[each.where], lanes.batch) for each in written]
        found = np.zeros((len(self.readout.measures), len(environments)))
        for number, own, gradients in self._gradients(reading, leaves, environments):
            for each, base, gradient in zip(written, bases, gradients, strict=True):
                sums = self._sums(each, base, gradient, len(environments))
                found[number, own] += sums[own]
        return self.kind.finish(found)

    def _along(
        self,
        written: Sequence[_WrittenVectors],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
        groups: Ints,
    ) -> Floats:
        """Return [measure, row]: estimates by the mean gradient along the line, site by site."""
        assert self.steps is not None
        wheres = [each.where for each in written]
        noise = self.differentiated.noise(lanes)
        read = run_full(self.model, lanes.batch, writes=noise, reads=wheres).reads
        found = np.zeros((len(self.readout.measures), len(environments)))
        for whole in written:
            base = whole.base(read[whole.where], lanes.batch)
            for group in np.unique(groups[whole.row]):
                each = whole.some(groups == group)
                way = torch.zeros_like(base)
                spot = to_device(each.spot, base.device)
                way[spot] = each.values.to(base) - base[spot]
                for step in range(self.steps):
                    leaf = (way * ((step + 0.5) / self.steps)).requires_grad_()
                    reading, _ = self.differentiated.read([each.added(leaf)], lanes, ())
                    for number, own, gradients in self._gradients(reading, [leaf], environments):
                        sums = self._sums(each, base, gradients[0], len(environments))
                        found[number, own] += sums[own] / self.steps
        return self.kind.finish(found)

    def _sums(self, written: _WrittenVectors, base: Tensor, gradient: Tensor, rows: int) -> Floats:
        """Return [row]: the estimator's numbers, summed or averaged over the vectors of a row."""
        spot = to_device(written.spot, gradient.device)
        own = base.to(gradient.device)[spot].double()
        given = (written.written(own), own, gradient[spot].double())
        parts = self.kind.values(*given, self.options)
        if parts.shape != (len(own),):
            function = f"{type(self.kind).__name__}.values"
            shape = list(parts.shape)
            raise TypeError(f"`{function}` returned the shape {shape} instead of [{len(own)}]")
        if self.kind.over_vectors == "mean":
            counts = np.bincount(written.row)[written.row]
            parts = parts / array_to_device(counts, parts.device)
        found = np.zeros(rows)
        np.add.at(found, written.row, parts.cpu().numpy())
        return found

    def _gradients(
        self, reading: ReadoutInput, leaves: Sequence[Tensor], environments: Sequence[ItemNumber]
    ) -> Iterator[tuple[int, Ints, Sequence[Tensor]]]:
        """Yield gradients of each measure.

        Each lane's metric depends on that lane only, so one gradient of the sum over lanes
        suffices.

        Yields:
            Measure, its rows, and per leaf the gradient of the sum over lanes.
        """
        kinds = list(dict.fromkeys(environments))
        last = len(kinds) * len(self.readout.measures)
        for place, kind in enumerate(kinds):
            own = np.array([n for n, each in enumerate(environments) if each == kind])
            values = self.readout.tensors(replace(reading, items=[kind] * len(reading.prompts)))
            for number, value in enumerate(values):
                more = (place * len(values) + number + 1) < last
                found = compute_gradients(value.sum(), leaves, keep=more)
                yield number, own, found


def _select_keys(edge: EdgeWrite, width: int) -> SiteWrite:
    """Build vectors over keys: 1 at the keys of an edge, else 0."""
    values = torch.zeros(len(edge.rows), width, dtype=torch.float64)
    values[edge.entries, edge.keys] = 1
    return SiteWrite("pattern", edge.layer, edge.rows, edge.queries, edge.heads, values)


def _iter_places(rows: RowTable) -> Iterator[tuple[int, int, int]]:
    columns = (rows.cell.tolist(), rows.prompt.tolist(), rows.alternative.tolist())
    return zip(*columns, strict=True)


def _mark_gaps(values: list[Floats]) -> ReadoutResult:
    """Mark undefined values as gaps."""
    gaps: dict[int, ValueGap] = {}
    for number, own in enumerate(values):
        rows = np.flatnonzero(~np.isfinite(own))
        if len(rows):
            gaps[number] = ValueGap(rows, "its gradient isn't a number")
            own[rows] = np.nan
    count = len(values[0])
    broken = np.zeros(count, dtype=np.bool_)
    return ReadoutResult(values, broken, [np.zeros(count) for _ in values], {}, gaps)
