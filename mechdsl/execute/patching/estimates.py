"""Effects estimated by gradients of the metric instead of patched runs (`using`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.hashing import digest_number
from mechdsl.execute.measurement.readout import Readout, ReadoutInput, ReadoutResult, ValueGap
from mechdsl.execute.patching.differentiated_run import (
    BasePatterns,
    DifferentiatedRun,
    DrawLanes,
    number_keys,
    renormalize_scores,
)
from mechdsl.execute.patching.held_passes import (
    HeldPass,
    PathEdges,
    SentRows,
    hold_rows,
    hold_sublayers,
    select_writes,
)
from mechdsl.execute.patching.writes import (
    RuleInputs,
    RuleReader,
    RuleWrite,
    build_edges,
    build_writes,
    iter_circuits,
    join_writes,
    list_later_writes,
    select_readable_rows,
    write_receiving_features,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.forward.hooks.backward_rules import compute_gradients
from mechdsl.forward.hooks.batch import (
    Batch,
    CircuitWrite,
    EdgeWrite,
    RuleWrites,
    SiteRead,
    SiteWrite,
    WriteMode,
    apply_write,
    array_to_device,
    gather_vectors,
    indices_to_device,
    to_device,
)
from mechdsl.forward.hooks.coordinates import CoordinateWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import ModelShape, unit_count, vector_width
from mechdsl.planner.cost import (
    DECOMPOSED_TOKENS,
    PATTERN_NUMBERS,
    circuit_runs,
    count_circuit_tokens,
    count_pattern_rows,
    count_vision_work,
    list_dropped_layers,
)
from mechdsl.planner.plan import ExperimentPlan, cell_sites
from mechdsl.planner.rows import RowTable, RulePlan
from mechdsl.program.estimators import BackwardRules, GradientEstimator
from mechdsl.prompts.rows import row_in_patches
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN, ImagePromptTokenizer
from mechdsl.resolve.types import ItemNumber, SiteLayer, SitePoint

_STREAMS = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm")
"""Sites that are not inside a sublayer of one layer."""


@dataclass(frozen=True, eq=False)
class _BaseVectors:
    """Vectors of the base run at the spots of a site."""

    values: Tensor
    """[spot, width]"""
    inputs: Tensor | None = None
    """[spot, …] vectors of the site that a transcoder encodes; None for others."""

    def at(self, spot: Tensor) -> _BaseVectors:
        """Select spots: [K] index. The vectors are in 64 bits."""
        spot = to_device(spot, self.values.device)
        inputs = None if self.inputs is None else self.inputs[spot].double()
        return _BaseVectors(self.values[spot].double(), inputs)


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
    def of(write: SiteWrite, lane_of_row: Ints, model: LoadedModel) -> _WrittenVectors:
        row = write.rows.numpy()
        joins = isinstance(write.mode, CoordinateWrite) and write.mode.joins_units
        units = np.zeros_like(row) if joins else write.units.numpy()
        places = np.stack([lane_of_row[row], write.positions.numpy(), units])
        spots, spot = np.unique(places, axis=1, return_inverse=True)
        own = (torch.from_numpy(each) for each in (spot.reshape(-1), *spots))
        index, lane, position, unit = own
        shape = model.stack(write.stack).shape
        every = torch.arange(unit_count(shape, write.site, write.layer))
        units_of = every.expand(len(unit), -1) if joins else unit[:, None]
        # A clone, because tensors created in inference mode can't be differentiated.
        values, which = write.values.clone(), None if write.to is None else write.to.clone()
        places_of = (lane, position, units_of, write.mode, which)
        return _WrittenVectors(write.where, row, index, values, *places_of)

    def some(self, rows: Ints) -> _WrittenVectors:
        """Select the vectors of some rows: [row] bool by number; spots of other rows remain."""
        return self._take(np.flatnonzero(rows[self.row]))

    def _take(self, own: Ints) -> _WrittenVectors:
        """Select vectors by number; spots of others remain."""
        values = self.values[array_to_device(own, self.values.device)]
        spot = self.spot[torch.from_numpy(own)]
        which = None if self.which is None else self.which[torch.from_numpy(own)]
        return replace(self, row=self.row[own], spot=spot, values=values, which=which)

    def width(self, model: LoadedModel) -> int:
        """Return the length of the vector of a spot."""
        shape = model.stack(self.where.stack).shape
        return self.unit.shape[1] * vector_width(shape, self.where.site, self.where.layer)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lane, position and unit of each vector of all spots."""
        count = self.unit.shape[1]
        lane, position = (each.repeat_interleave(count) for each in (self.lane, self.position))
        return lane, position, self.unit.reshape(-1)

    def added(self, values: Tensor) -> SiteWrite:
        """Add [spot, width] to the current values."""
        where = self.where
        values = values.reshape(self.unit.numel(), -1)
        given = (where.site, where.layer, *self.places, values)
        return SiteWrite(*given, mode="add", stack=where.stack)

    @property
    def source(self) -> SiteRead | None:
        """Site that a transcoder encodes; None for others."""
        if not isinstance(self.mode, CoordinateWrite) or not self.mode.reads:
            return None
        layer = self.mode.find_layer(self.where.layer)
        return replace(self.where, site=self.mode.reads, layer=layer)

    @property
    def reads(self) -> list[SiteRead]:
        """Sites whose values in the base run `base` needs."""
        return [self.where, *([] if self.source is None else [self.source])]

    def base(self, read: Mapping[SiteRead, Tensor], batch: Batch) -> _BaseVectors:
        """Return the vectors of the base run, from the values at `reads`."""

        def gather(where: SiteRead) -> Tensor:
            own = batch.of_site(where.site, where.stack)
            vectors = gather_vectors(read[where].detach(), own, *self.places)
            return vectors.reshape(len(self.lane), -1)

        inputs = None if self.source is None else gather(self.source)
        return _BaseVectors(gather(self.where), inputs)

    def written(self, base: _BaseVectors) -> Tensor:
        """Return [K, width] in 64 bits: what each row writes over K vectors of the base run."""
        now = base.values
        values = self.values.to(now.device).double()
        if self.mode == "set":
            return values
        which = None if self.which is None else to_device(self.which, now.device)
        return apply_write(self.mode, now, values, which, inputs=base.inputs)

    @staticmethod
    def as_whole(
        parts: Sequence[_WrittenVectors], read: Mapping[SiteRead, Tensor], batch: Batch
    ) -> _WrittenVectors:
        """Return the vectors, with the coordinates that are written, of one site whose heads have
        one spot each.

        Args:
            parts: Writes of different bases, such as those of several heads.
            read: Values of the base run at `reads`.
        """
        changes = [part.written(part.base(read, batch).at(part.spot)) for part in parts]
        places = [
            torch.stack([place[part.spot] for place in part.places]).numpy() for part in parts
        ]
        spots, spot = np.unique(np.concatenate(places, axis=1), axis=1, return_inverse=True)
        lane, position, unit = (torch.from_numpy(own) for own in spots)
        row = np.concatenate([part.row for part in parts])
        index = torch.from_numpy(spot.reshape(-1))
        values = torch.cat(changes)
        return _WrittenVectors(parts[0].where, row, index, values, lane, position, unit[:, None])

    def way(self, base: _BaseVectors) -> Tensor:
        """Return [spot, width]: the change of each spot if all rows are written together.

        Args:
            base: The vectors at all spots.
        """
        one = self._first_rows()
        spot = self.spot[torch.from_numpy(one)]
        vectors = base.at(spot)
        change = (self._take(one).written(vectors) - vectors.values).to(base.values)
        tensor = torch.zeros_like(base.values)
        return tensor.index_add_(0, to_device(spot, tensor.device), change)

    def _first_rows(self) -> Ints:
        """Select one of the vectors that are written at a spot, for each set of coordinates."""
        places = self.spot[:, None]
        if self.which is not None:
            places = torch.cat([places, self.which], dim=1)
        return np.unique(places.numpy(), axis=0, return_index=True)[1]


@dataclass(frozen=True, eq=False)
class _SentVectors:
    """The vectors that senders of a path change, in a pass in which all else is held."""

    held: HeldPass
    leaves: Sequence[Tensor]
    """The zeros that are added to them."""
    written: Sequence[_WrittenVectors]
    bases: Sequence[_BaseVectors]


@dataclass(frozen=True, eq=False)
class _ChangedPatterns:
    """Attention weights of one layer that rows change by writing its queries or keys.

    A change is one query that a row writes, or the keys of one head that it writes. It changes the
    weights of this query, or of all queries of the heads that share the keys.
    """

    base: BasePatterns
    scores: Sequence[Tensor]
    """[lane, column, head, key] each: of the base run, and with written vectors."""
    row: Ints
    """[change]"""
    places: tuple[Tensor, Tensor, Tensor]
    """Lane [change, 1, 1], column [change, query, 1] and head [change, 1, head]."""
    of_vector: Ints
    """[K] the change that each vector belongs to, …"""
    number: Ints
    """… the index of its scores, …"""
    keys: Tensor | None
    """… and the position of a key; None for queries."""

    @staticmethod
    def of(
        parts: Sequence[_WrittenVectors],
        batch: Batch,
        model: LoadedModel,
        noise: Sequence[SiteWrite],
    ) -> _ChangedPatterns:
        """Run the layer with the written vectors: several times if a vector has several values.

        Args:
            parts: All writes at one site.
        """
        where = parts[0].where
        assert where.layer is not None
        reads = BasePatterns.reads(where)
        stop = 0 if where.stack in ("encoder", "vision") else where.layer + 1
        frame = batch.of_read(reads[1])
        read = run_full(model, batch, stop=stop, writes=noise, reads=[*reads, where]).reads
        base = BasePatterns.of(where, read, batch, model)
        vectors = _WrittenVectors.as_whole(parts, read, batch)
        _, tokens, heads, _ = base.weights.shape
        lane, position, unit = (location[vectors.spot] for location in vectors.places)
        number = 1 + _count_earlier(vectors.spot.numpy())
        scores = [base.scores]
        for which in range(1, int(number.max(initial=0)) + 1):
            indices = torch.from_numpy(np.flatnonzero(number == which))
            values = vectors.values[to_device(indices, vectors.values.device)]
            place = lane[indices], position[indices], unit[indices]
            write = SiteWrite(where.site, where.layer, *place, values, stack=where.stack)
            given = run_full(model, batch, stop=stop, writes=[*noise, write], reads=reads[:1])
            scores.append(given.reads[reads[0]].nan_to_num(0.0))
        if where.site == "q":
            change = np.arange(len(vectors.row))
            place = (lane, frame.columns(lane, position)[:, None], unit[:, None])
            row, keys = vectors.row, None
        else:
            keys = number_keys(model, batch, where, lane, position)
            shared = heads // unit_count(model.stack(where.stack).shape, "k", where.layer)
            together = np.stack([vectors.row, lane.numpy(), unit.numpy()])
            every, change = np.unique(together, axis=1, return_inverse=True)
            row, lane, unit = every[0], *map(torch.from_numpy, every[1:])
            queries = torch.arange(tokens).expand(len(row), -1)
            place = (lane, queries, unit[:, None] * shared + torch.arange(shared))
        places = (place[0][:, None, None], place[1][:, :, None], place[2][:, None, :])
        return _ChangedPatterns(base, scores, row, places, change.reshape(-1), number, keys)

    def sums(self, kind: GradientEstimator, gradient: Tensor, rows: int) -> Floats:
        """Return [row]: the estimator's numbers of the changed weights; gradient: [spot, key]."""
        device, pattern = gradient.device, self.base.weights
        slopes = self.base.expand(gradient)
        sums = np.zeros(rows)
        each = self.places[1].shape[1] * self.places[2].shape[2] * pattern.shape[-1]
        count = max(1, PATTERN_NUMBERS // each)
        for first in range(0, len(self.row), count):
            own = slice(first, first + count)
            place = tuple(to_device(index[own], device) for index in self.places)
            base, weights, slope = (
                value[place].double() for value in (self.scores[0], pattern, slopes)
            )
            changed = self._written(base, place, first)
            written = renormalize_scores(changed, base, weights, has_sink=self.base.has_sink)
            flat = [value.flatten(0, -2) for value in (written, weights, slope)]
            parts = kind.values(flat[0], flat[1], flat[2], {}).reshape(len(base), -1).sum(1)
            np.add.at(sums, self.row[own], parts.cpu().numpy())
        return sums

    def _written(self, base: Tensor, place: tuple[Tensor, ...], first: int) -> Tensor:
        """Return scores [change, query, head, key] with the vectors of changes from `first` on."""
        change = self.of_vector - first
        scores = base
        for which, changed in enumerate(self.scores[1:], 1):
            some = (change >= 0) & (change < len(base)) & (self.number == which)
            indices = torch.from_numpy(np.flatnonzero(some))
            at = torch.from_numpy(change)[indices]
            there = torch.zeros(len(base), base.shape[-1], dtype=torch.bool)
            if self.keys is None:
                there[at] = True
            else:
                there[at, self.keys[indices]] = True
            there = to_device(there, base.device)[:, None, None]
            scores = torch.where(there, changed[place].double(), scores)
        return scores


@dataclass(frozen=True, eq=False)
class _ReceivingPatterns:
    """Attention weights whose queries or keys receive along the edges of a path."""

    edges: PathEdges
    model: LoadedModel
    base: Mapping[SiteRead, BasePatterns]
    """Site of the weights → those of the base run."""
    fixed: Mapping[SiteRead, Tensor]
    """[lane, column, unit, width] of the queries and keys of the base run."""

    @staticmethod
    def of(
        edges: PathEdges, model: LoadedModel, batch: Batch, noise: Sequence[SiteWrite]
    ) -> _ReceivingPatterns:
        """Read the base run on the lanes of all rows."""
        wheres = [SiteRead(*place) for place in edges.attended]
        fixed = [replace(each, site=_OTHER_FACTOR[each.site]) for each in wheres]
        reads = {own for each in wheres for own in BasePatterns.reads(each)}
        read: Mapping[SiteRead, Tensor] = {}
        if wheres:
            given = [*sorted(reads, key=repr), *fixed]
            stop = model.shape.n_layers
            read = run_full(model, batch, stop=stop, writes=noise, reads=given).reads
        own = [BasePatterns.of(each, read, batch, model) for each in wheres]
        base = {patterns.where: patterns for patterns in own}
        return _ReceivingPatterns(edges, model, base, {each: read[each] for each in fixed})

    def sums(
        self,
        kind: GradientEstimator,
        run: DifferentiatedRun,
        sent: SentRows,
        lanes: DrawLanes,
        slopes: Sequence[Sequence[Tensor]],
    ) -> list[dict[SiteLayer, Floats]]:
        """Return the estimator's numbers of changed weights.

        Args:
            kind: The estimator.
            run: The base run.
            sent: The rows with distinct senders.
            lanes: The lanes of all rows.
            slopes: For each gradient of a metric, [spot, key] of each of `base`.

        Returns:
            For each gradient, [sender, unit] by queries or keys that receive.
        """
        count = len(sent.lane)
        units = {at: unit_count(self.model.shape, *at) for at in self.edges.attended}
        sums = [{at: np.zeros((count, unit)) for at, unit in units.items()} for _ in slopes]
        places = list(self.base)
        each = max((patterns.scores[0].numel() for patterns in self.base.values()), default=1)
        some = count_pattern_rows(each, len(self.base))
        for first in range(0, count if places else 0, some):
            numbers = np.arange(first, min(first + some, count))
            for at, changed in self._changed_scores(run, sent.take(numbers), lanes):
                where = SiteRead(*at)
                base = self.base[replace(where, site="pattern")]
                lane = indices_to_device((torch.from_numpy(sent.lane[numbers]),), changed.device)
                scores, weights = (part[lane].double() for part in (base.scores, base.weights))
                written = renormalize_scores(
                    changed.double(), scores, weights, has_sink=base.has_sink
                )
                for number, gradients in enumerate(slopes):
                    slope = base.expand(gradients[places.index(base.where)])[lane]
                    flat = [part.flatten(0, -2) for part in (written, weights, slope)]
                    parts = kind.values(flat[0], flat[1], flat[2], {})
                    of_head = parts.reshape(weights.shape[:-1]).sum(1)
                    of_unit = of_head.unflatten(1, (units[at], -1)).sum(2)
                    sums[number][at][numbers] = of_unit.cpu().numpy()
        return sums

    def _changed_scores(
        self, run: DifferentiatedRun, sent: SentRows, lanes: DrawLanes
    ) -> Iterator[tuple[SiteLayer, Tensor]]:
        """Yield [sender, column, head, key]: the scores with changed queries, or with changed keys,
        by the site that receives. The other factor of the scores is that of the base run."""
        draw_lanes = lanes.take(sent.lane)
        held = hold_rows(self.edges.rule, len(sent.lane), sent.rows.cell)
        noise, stop = run.noise(draw_lanes), self.model.shape.n_layers
        given = (held, RuleWrites(sent.writes), noise, RuleWrites())
        with (
            torch.no_grad(),
            hold_sublayers(self.model, run.runs.norms, draw_lanes.batch, *given) as holds,
        ):
            for site in _OTHER_FACTOR:
                ends = {at: SiteRead(*at) for at in self.edges.attended}
                ends = {at: where for at, where in ends.items() if where.site == site}
                if not ends:
                    continue
                writes = [*noise, *holds, *sent.writes]
                writes += [self._fix(where, sent.lane, draw_lanes.batch) for where in ends.values()]
                reads = [BasePatterns.reads(where)[0] for where in ends.values()]
                read = run_full(
                    self.model, draw_lanes.batch, stop=stop, writes=writes, reads=reads
                ).reads
                for (at, where), scores in zip(ends.items(), reads, strict=True):
                    yield at, self._select(where, read[scores], sent, draw_lanes.batch)

    def _fix(self, where: SiteRead, lanes: Ints, batch: Batch) -> SiteWrite:
        """Write the other factor of the scores at all tokens of rows, as in the base run."""
        other = replace(where, site=_OTHER_FACTOR[where.site])
        values = self.fixed[other]
        row, token = batch.of_read(other).tokens()
        index = torch.from_numpy(lanes)[row], batch.of_read(other).columns(row, token)
        value, units = values[indices_to_device(index, values.device)], values.shape[2]
        place = (row.repeat_interleave(units), token.repeat_interleave(units))
        unit = torch.arange(units).repeat(len(row))
        return SiteWrite(
            other.site, other.layer, *place, unit, value.flatten(0, 1), stack=other.stack
        )

    def _select(self, where: SiteRead, scores: Tensor, sent: SentRows, batch: Batch) -> Tensor:
        """Return scores that differ from those of the base run only at the tokens of the path: at
        others, two passes of low precision may differ by rounding errors."""
        before = self.base[replace(where, site="pattern")].scores
        before = before[indices_to_device((torch.from_numpy(sent.lane),), before.device)]
        row, token = (torch.from_numpy(each) for each in sent.tokens)
        size = scores.shape[1] if where.site == "q" else scores.shape[3]
        changes = torch.zeros(len(scores), size, dtype=torch.bool)
        if where.site == "q":
            token = batch.of_read(where).columns(row, token)
        changes[row, token] = True
        changes = changes[:, :, None, None] if where.site == "q" else changes[:, None, None]
        return torch.where(to_device(changes, scores.device), scores, before)


@dataclass(frozen=True, eq=False)
class _EdgeShares:
    """Shares of a circuit's edges that carry the fill, in runs of the circuit as a whole.

    The metric is differentiated by them. Each cell of `without each edge` changes one.
    """

    plan: ExperimentPlan
    """With rules that ablate every edge of some cell."""
    inputs: RuleInputs
    leaves: Sequence[Tensor]
    """[lane, edge] zeros, by number of the rule."""

    def circuits(self, rows: RowTable, draws: Ints, lanes_of: RuleReader) -> list[CircuitWrite]:
        """Return the edges that carry the fill in runs of the circuit, one for each row."""
        given = self.plan, rows, draws, lanes_of, self.inputs, self.shape, None
        return [self._share(*circuit) for circuit in iter_circuits(*given)]

    @property
    def shape(self) -> ModelShape:
        return self.plan.experiment.model.shape

    def _share(self, rule: RulePlan, of_class: int, write: CircuitWrite) -> CircuitWrite:
        """Set the shares of edges that some cell changes: 1 in the circuit if the rule ablates the
        circuit, 0 if it ablates all others."""
        circuit = rule.rule.circuit
        assert circuit is not None
        table = self.inputs.tabulate(rule, 0, of_class, self.shape)
        (classes,) = circuit.edges.values()
        place, here = {edge: n for n, edge in enumerate(classes[of_class])}, list[tuple[int, int]]()
        for number, edge in enumerate(rule.left_out):
            at = circuit.named[()][edge]
            if edge in place and (at is None or at & circuit.classes[of_class]):
                here.append((number, place[edge]))
        leaf, mask = self.leaves[rule.number], table.mask
        if not here:
            return write
        number, of_table = torch.tensor(here).T
        row, column = (cell[of_table] for cell in table.cells)
        shares = leaf[to_device(write.rows, leaf.device)][:, to_device(number, leaf.device)]
        shares = shares + (0 if rule.rule.spec.all_but else 1)
        mask = mask.to(leaf).expand(len(write.rows), *mask.shape)
        index = torch.arange(len(mask))[:, None], row[None], column[None]
        return replace(write, mask=mask.index_put(indices_to_device(index, leaf.device), shares))


_OTHER_FACTOR = {"q": "k", "k": "q"}
"""The vectors that scores of attention are products with."""


def _count_earlier(values: Ints) -> Ints:
    """Return [n]: how often each value occurs before."""
    order = np.argsort(values, kind="stable")
    firsts = np.searchsorted(values[order], values[order])
    counts = np.empty_like(order)
    counts[order] = np.arange(len(order)) - firsts
    return counts


def draw_noise(key: Sequence[int], size: Sequence[int]) -> Floats:
    """Draw numbers of a standard normal distribution, equal for equal keys."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    return random.standard_normal(size)


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
        self.joins_cells, self.between_runs = said.joins_cells, said.between_runs
        self.readout = readout
        self.means_and_donors = means_and_donors
        self.model = runs.model
        self.lanes_of = lanes_of
        self._vision_work = count_vision_work(plan.experiment)
        run = runs.named(plan.experiment.spec.base)
        self.differentiated = DifferentiatedRun(runs, run, readout, batch, self.kind.backward)
        self._joined_inputs = replace(means_and_donors, edges={})
        """For rules with all cells of `without each edge` as one."""

    def first(self, prompts: Ints, most: int) -> tuple[Ints, int]:
        """Select the first prompts, at least one, that together have up to `most` tokens.

        Patches in the blocks of a vision encoder count as tokens in the same number of blocks.

        Returns:
            These prompts, which are differentiated together, and their number of tokens.
        """
        lanes, (encoded, _) = self.differentiated.unpatched(), self._vision_work
        tokens = lanes.lengths[lanes.lane(prompts, np.zeros_like(prompts))]
        tokens = (tokens + encoded[prompts] // self.model.shape.n_layers) * self.plan.draws
        ends = np.cumsum(tokens)
        count = max(1, int(np.searchsorted(ends, most, side="right")))
        return prompts[:count], int(ends[count - 1])

    def recompute(self, wanted: bool) -> None:
        """Set whether backward passes compute activations again, to save memory."""
        self.differentiated = replace(self.differentiated, recompute=wanted)

    def of(self, rows: RowTable, base: Sequence[Floats]) -> ReadoutResult:
        """Estimate the measures: the base run's value plus the estimated effect.

        An estimator whose values aren't effects gives its value instead.

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
        if self.plan.leaves_out_edges:
            values = self._leave_out_edges(drawn, draw, lanes.take(lane_of_row))
            return self._result(values, wanted, [np.zeros(len(rows)) for _ in values])
        if self.plan.path is not None:
            fixes = self.kind.fixes_attention
            given = (self.plan, drawn, draw, lane_of_row, self.model.shape)
            edges = PathEdges.of(*given, fixes_attention=fixes)
            senders = drawn.take(edges.first), draw[edges.first]
            given = (self.lanes_of, self.means_and_donors, self.model.shape)
            writes = build_writes(self.plan, *senders, *given)
            sent = SentRows.of(edges, senders[0], writes, lane_of_row[edges.first])
            if self.kind.decomposes:
                writes = self._decompose_edges(edges, sent, lanes, drawn.cell)
                items = [self.plan.items[cell] for cell in drawn.cell]
                sums = self._decomposed(writes, lanes, lane_of_row, items)
            else:
                sums = self._along_edges(edges, sent, lanes, self._environments(drawn))
            return self._result(sums, wanted, base)
        if self.kind.place == "attention":
            edges = build_edges(self.plan, drawn, self.model.shape)
            writes = [_select_keys(edge, lanes.batch) for edge in edges]
        else:
            given = (self.lanes_of, self.means_and_donors, self.model.shape)
            writes = build_writes(self.plan, drawn, draw, *given)
        if self.kind.decomposes:
            items = [self.plan.items[cell] for cell in drawn.cell]
            sums = self._decomposed(writes, lanes, lane_of_row, items)
            return self._result(sums, wanted, base)
        written = [_WrittenVectors.of(write, lane_of_row, self.model) for write in writes]
        environments = self._environments(drawn)
        if self.between_runs:
            sums = self._between_runs(written, lanes, environments)
        elif self.kind.adds_noise or self.steps is not None:
            sums_of = self._near_base if self.kind.adds_noise else self._along
            sums = sums_of(written, lanes, environments, cell_sites(self.plan)[drawn.cell])
        else:
            sums = self._at_base(written, lanes, environments)
        return self._result(sums, wanted, base)

    def _environments(self, rows: RowTable) -> Sequence[ItemNumber]:
        """Return the occurrence that measures read in each row; None if they read none."""
        if not any(atom.by_item for _, atom in self.readout.atoms):
            return [None] * len(rows)
        return [self.plan.items[cell] for cell in rows.cell]

    def _result(self, sums: Floats, wanted: Ints, base: Sequence[Floats]) -> ReadoutResult:
        """Average values [measure, row and draw] over draws, and add those of the base run."""
        values = sums.reshape(len(sums), -1, self.plan.draws)[:, wanted].mean(axis=2)
        own = base if self.kind.is_effect else [np.zeros_like(each) for each in base]
        return _mark_gaps([one + value for one, value in zip(own, values, strict=True)])

    def _with_others(self, rows: RowTable) -> tuple[RowTable, Ints]:
        """Add rows that move along the line together: all rows of a prompt at one site.

        Rows with cached values are included.

        Returns:
            All rows, and the indices of the requested ones.
        """
        if not self.joins_cells:
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
        noise = self.differentiated.noise(lanes)
        changed: dict[SiteRead, list[_WrittenVectors]] = defaultdict(list)
        for vectors in filter(self._is_fixed, written):
            changed[vectors.where].append(vectors)
        fixed = [
            _ChangedPatterns.of(parts, lanes.batch, self.model, noise) for parts in changed.values()
        ]
        plain = [vectors for vectors in written if not self._is_fixed(vectors)]
        given = (plain, fixed, lanes, environments)
        if not self.kind.drops_layers:
            return self.kind.finish(self._to_first_order(self.differentiated, *given))
        layers = list_dropped_layers(self.plan.experiment)
        own_layer = np.full(len(environments), -1)
        for vectors in written:
            if vectors.where.site not in _STREAMS:
                stack = "" if vectors.where.stack == "cross" else vectors.where.stack
                own, now = layers.index((stack, vectors.where.layer)), own_layer[vectors.row]
                own_layer[vectors.row] = np.where(np.isin(now, (-1, own)), own, len(layers))
        rules = self.kind.backward or BackwardRules()
        total = np.zeros((len(self.readout.measures), len(environments)))
        counts = np.zeros(len(environments))
        for number, (stack, layer) in enumerate(layers):
            dropped = replace(rules, dropped_layer=layer, dropped_stack=stack)
            run = replace(self.differentiated, backward=dropped)
            counted = own_layer != number
            total += np.abs(self._to_first_order(run, *given)) * counted
            counts += counted
        return self.kind.finish(total / counts)

    def _leave_out_edges(self, rows: RowTable, draws: Ints, lanes: DrawLanes) -> Floats:
        """Return [measure, row]: the value of a run of the circuit as a whole, plus the change of
        the share of one edge times the derivative by it in that run.

        Args:
            rows: Cells of `without each edge`.
            draws: [row]
            lanes: [row] of the base run.
        """
        environments = self._environments(rows)
        runs = circuit_runs(self.plan)[rows.cell]
        same = np.stack([runs, rows.alternative, rows.prompt, draws])
        _, first, run_of_row = np.unique(same, axis=1, return_index=True, return_inverse=True)
        run_of_row = run_of_row.reshape(-1)
        leave_out_edges = np.zeros((len(self.readout.measures), len(rows)))
        longest = int(lanes.lengths.max())
        size = max(1, count_circuit_tokens(self.plan) // longest)
        for begin in range(0, len(first), size):
            numbers = first[begin : begin + size]
            items = [environments[n] for n in numbers.tolist()]
            given = rows.take(numbers), draws[numbers], lanes.take(numbers), items
            here = np.flatnonzero((run_of_row >= begin) & (run_of_row < begin + size))
            edges = np.stack([rule.site_of_cell[rows.cell[here]] for rule in self.plan.rules])
            leave_out_edges[:, here] = self._near_circuit(*given, run_of_row[here] - begin, edges)
        return leave_out_edges

    def _near_circuit(
        self,
        runs: RowTable,
        draws: Ints,
        lanes: DrawLanes,
        items: Sequence[ItemNumber],
        run_of_row: Ints,
        edges: Ints,
    ) -> Floats:
        """Return [measure, row]: what `_leave_out_edges` does, from one pass.

        Args:
            runs: A row of each run of the circuit.
            draws: [run]
            lanes: [run]
            items: [run]
            run_of_row: [row]
            edges: [rule, row] the edge whose share changes.
        """
        run = replace(self.differentiated, recompute=False)
        rules = self.plan.joined_rules
        leaves = [run.zeros(len(runs), len(rule.left_out)) for rule in rules]
        shares = _EdgeShares(replace(self.plan, rules=rules), self._joined_inputs, leaves)
        reading, _ = run.read((), lanes, (), shares.circuits(runs, draws, self.lanes_of))
        values = self.readout.tensors(replace(reading, items=items))
        own_values = [value.detach().double().cpu().numpy()[run_of_row] for value in values]
        effects = np.zeros((len(values), len(run_of_row)))
        for number, value in enumerate(values):
            gradients = compute_gradients(value.sum(), leaves, keep=number + 1 < len(values))
            for rule, edge, gradient in zip(rules, edges, gradients, strict=True):
                acts = np.flatnonzero(rule.acts(runs)[run_of_row])
                index = torch.from_numpy(run_of_row[acts]), torch.from_numpy(edge[acts])
                slope = gradient[indices_to_device(index, gradient.device)].double()[:, None]
                base = torch.full_like(slope, 0 if rule.rule.spec.all_but else 1)
                change = self.kind.values(1 - base, base, slope, self.options)
                effects[number, acts] += change.cpu().numpy()
        return self.kind.finish(effects) + np.stack(own_values)

    def _decomposed(
        self,
        writes: Sequence[SiteWrite],
        lanes: DrawLanes,
        lane_of_row: Ints,
        items: Sequence[ItemNumber],
    ) -> Floats:
        """Return [measure, row]: the metric of irrelevant parts less that of whole activations.

        Each pass has the base run of some rows, and then their irrelevant parts.
        """
        count = len(lane_of_row)
        effects = np.zeros((len(self.readout.measures), count))
        by_item = any(atom.by_item for _, atom in self.readout.atoms)
        some = max(1, DECOMPOSED_TOKENS // (2 * int(lanes.lengths.max())))
        for first in range(0, count, some):
            numbers = np.arange(first, min(first + some, count))
            place = np.full(count, -1)
            place[numbers] = len(numbers) + np.arange(len(numbers))
            both = lanes.take(np.tile(lane_of_row[numbers], 2))
            adds = select_writes(writes, place)
            with torch.no_grad():
                reading, _ = self.differentiated.read(adds, both, ())
                kinds = (
                    [items[n] for n in numbers.tolist()] * 2
                    if by_item
                    else [None] * (2 * len(numbers))
                )
                values = self.readout.tensors(replace(reading, items=kinds))
            for number, value in enumerate(values):
                whole, irrelevant = value.double().chunk(2)
                effects[number, numbers] = (irrelevant - whole).cpu().numpy()
        return effects

    def _decompose_edges(
        self, edges: PathEdges, sent: SentRows, lanes: DrawLanes, cells: Ints
    ) -> list[SiteWrite]:
        """Return the irrelevant parts of receivers' inputs, as writes of the rows of edges.

        Each pass has the base run of some senders, and then their irrelevant parts, in which the
        irrelevant parts of all other heads and MLPs are the base run's values.

        Args:
            cells: [row]
        """
        count, run, backward = len(sent.lane), self.differentiated, self.kind.backward
        some = max(1, DECOMPOSED_TOKENS // (2 * int(lanes.lengths.max())))
        parts: dict[SiteLayer, list[Tensor]] = {place: [] for place in edges.reads}
        for first in range(0, count, some):
            sent_rows = sent.take(np.arange(first, min(first + some, count)))
            size = len(sent_rows.lane)
            both = lanes.take(np.tile(sent_rows.lane, 2))
            held = hold_rows(edges.rule, 2 * size, np.tile(sent_rows.rows.cell, 2))
            held = replace(held, norms=np.zeros_like(held.norms))  # they divide as in the base run
            writes, noise = select_writes(sent_rows.writes, size + np.arange(size)), run.noise(both)
            given = (both.batch, held, RuleWrites(writes), noise, RuleWrites())
            with torch.no_grad(), hold_sublayers(self.model, run.runs.norms, *given) as holds:
                read = run_full(
                    self.model,
                    both.batch,
                    stop=self.model.shape.n_layers,
                    writes=[*noise, *holds, *writes],
                    reads=[*edges.reads.values()],
                    backward=backward,
                ).reads
            row, token = (torch.from_numpy(each) for each in sent_rows.tokens)
            for place, where in edges.reads.items():
                index = row + size, both.batch.of_read(where).columns(row + size, token)
                parts[place].append(read[where][indices_to_device(index, read[where].device)])
        values = {place: torch.cat(tensors) for place, tensors in parts.items()}
        directions, writes = self.means_and_donors.directions, list[SiteWrite]()
        for number, receivers in enumerate(edges.receivers):
            rows = np.flatnonzero(edges.receivers_of_row == number)
            for point in receivers.points:
                place = point.site, point.layer
                part = self._receive(point, rows, edges, sent, values[place])
                given = (edges.rule, part, place, cells, directions)
                for receiving_feature in write_receiving_features(*given):
                    writes.append(join_writes(place, [receiving_feature]))
                    later = list_later_writes(receiving_feature, place, directions)
                    writes += [join_writes(to, [rule_write]) for to, rule_write in later]
        return writes

    def _receive(
        self, point: SitePoint, rows: Ints, edges: PathEdges, sent: SentRows, values: Tensor
    ) -> RuleWrite:
        """Return the values of one receiver in the rows that it receives in.

        Args:
            values: [token of the senders, unit, width]
        """
        counts = np.bincount(sent.tokens[0], minlength=len(sent.lane))
        firsts, sender = np.cumsum(counts) - counts, edges.sender[rows]
        row = np.repeat(rows, counts[sender])
        inside = np.arange(len(row)) - np.repeat(
            np.cumsum(counts[sender]) - counts[sender], counts[sender]
        )
        token = np.repeat(firsts[sender], counts[sender]) + inside
        units = np.arange(values.shape[1]) if point.unit is None else np.array([point.unit])
        value = values[:, torch.from_numpy(units).to(values.device)]
        return RuleWrite(
            np.repeat(row, len(units)),
            np.repeat(sent.tokens[1][token], len(units)),
            np.tile(units, len(row)),
            value[array_to_device(token, value.device)].flatten(0, 1),
        )

    def _is_fixed(self, written: _WrittenVectors) -> bool:
        own = written.where
        return self.kind.fixes_attention and own.site in ("q", "k")

    def _to_first_order(
        self,
        run: DifferentiatedRun,
        written: Sequence[_WrittenVectors],
        fixed: Sequence[_ChangedPatterns],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
    ) -> Floats:
        """Return [measure, row]: the estimator's numbers by the gradient in a run."""
        if self.kind.place == "attention":
            widths = [vectors.values.shape[1] for vectors in written]
        else:
            widths = [vectors.width(self.model) for vectors in written]
        sizes = [(len(vectors.lane), width) for vectors, width in zip(written, widths, strict=True)]
        patterns = [changed_patterns.base for changed_patterns in fixed]
        leaves = [run.zeros(*size) for size in (*sizes, *(pattern.size for pattern in patterns))]
        adds = [each.added(leaf) for each, leaf in zip([*written, *patterns], leaves, strict=True)]
        reads = dict.fromkeys(where for vectors in written for where in vectors.reads)
        reading, read = run.read(adds, lanes, [*reads])
        bases = [vectors.base(read, lanes.batch) for vectors in written]
        effects = np.zeros((len(self.readout.measures), len(environments)))
        for number, numbers, gradients in self._gradients(reading, leaves, environments):
            sums = [
                self._sums(vectors, base, gradient, len(environments))
                for vectors, base, gradient in zip(written, bases, gradients, strict=False)
            ]
            sums += [
                changed_patterns.sums(self.kind, gradient, len(environments))
                for changed_patterns, gradient in zip(fixed, gradients[len(written) :], strict=True)
            ]
            for each in sums:
                effects[number, numbers] += each[numbers]
        return effects

    def _along_edges(
        self,
        edges: PathEdges,
        sent: SentRows,
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
    ) -> Floats:
        """Return [measure, row]: the change of senders times the gradient along edges.

        Args:
            edges: The edges of all rows.
            sent: The rows with distinct senders.
            lanes: The lanes of all rows.
            environments: [row]
        """
        run = self.differentiated
        written = [_WrittenVectors.of(write, sent.lane, self.model) for write in sent.writes]
        paths = edges.rule.paths
        if paths is not None and paths.at_the_end and paths.frozen_norms:
            rules = self.kind.backward or BackwardRules()
            run = replace(run, backward=replace(rules, fixed_norms=True))
        systems = self.means_and_donors.directions.systems
        received, adds = run.add_zeros(edges.list_written(systems), *edges.tokens)
        patterns = _ReceivingPatterns.of(edges, self.model, lanes.batch, run.noise(lanes))
        weights = [run.zeros(*base_patterns.size) for base_patterns in patterns.base.values()]
        adds += [
            base_patterns.added(leaf)
            for base_patterns, leaf in zip(patterns.base.values(), weights, strict=True)
        ]
        leaves = [run.zeros(len(vectors.lane), vectors.width(self.model)) for vectors in written]
        changes = [vectors.added(leaf) for vectors, leaf in zip(written, leaves, strict=True)]
        wheres = dict.fromkeys(where for vectors in written for where in vectors.reads)
        given = (run.model, run.runs.norms, lanes.batch, run.noise(lanes), changes, [*wheres])
        held = HeldPass.run(edges, *given, systems, self.kind.backward)
        along = _SentVectors(
            held, leaves, written, [vectors.base(held.senders, lanes.batch) for vectors in written]
        )
        given = (along, received, weights, adds)
        along_edges = np.zeros((len(self.readout.measures), len(environments)))
        for moved in self._list_moved_senders(written):
            along_edges += self._sum_rounds(run, *given, patterns, sent, lanes, environments, moved)
        return along_edges

    def _sum_rounds(
        self,
        run: DifferentiatedRun,
        along: _SentVectors,
        received: Mapping[SiteLayer, Tensor],
        weights: Sequence[Tensor],
        adds: Sequence[SiteWrite],
        patterns: _ReceivingPatterns,
        sent: SentRows,
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
        moved: SiteRead | None,
    ) -> Floats:
        """Return [measure, row]: the sum over the runs that paths are differentiated in.

        Args:
            run: The base run.
            along: The senders.
            received: The zeros that are added at receivers, by site.
            weights: The zeros that are added to the weights of each of `patterns.base`.
            adds: The writes that add them.
            patterns: Attention weights whose queries or keys receive.
            sent: The rows with distinct senders.
            lanes: The lanes of all rows.
            environments: [row]
            moved: The site of senders that move; None if the model's input moves, or nothing.
        """
        edges, leaves = along.held.edges, [*received.values(), *weights]
        rounds = self._list_rounds(run, edges)
        every: list[list[tuple[int, Ints, Sequence[Tensor]]]] = []
        for differentiated_run, _ in rounds:
            moves = self._moved_inputs(edges.rule, lanes, moved)
            every.append(
                self._mean_gradients(differentiated_run, leaves, adds, moves, lanes, environments)
            )
        slopes = [each[len(received) :] for numbers in every for *_, each in numbers]
        by_pattern = iter(patterns.sums(self.kind, run, sent, lanes, slopes))
        effects = np.zeros((len(self.readout.measures), len(environments)))
        for (_, share), gradients in zip(rounds, every, strict=True):
            values = np.zeros_like(effects)
            for measure, numbers, each in gradients:
                by_site = dict(zip(received, each[: len(received)], strict=True))
                given = (numbers, by_site, next(by_pattern), moved)
                values[measure, numbers] = self._sum_edges(along, *given)
            effects += (np.abs(values) if self.kind.drops_layers else values) * share
        return effects

    def _list_rounds(
        self, run: DifferentiatedRun, edges: PathEdges
    ) -> list[tuple[DifferentiatedRun, Floats]]:
        """List the runs that paths are differentiated in, with [row] the share of each in a value:
        without the gradient through one layer after another, if the estimator drops layers. The
        layer that all receivers of a row are in has no share, because its gradient would be 0."""
        count = len(edges.receivers_of_row)
        if not self.kind.drops_layers:
            return [(run, np.ones(count))]
        layers = list_dropped_layers(self.plan.experiment)
        own_layer = np.full(len(edges.receivers), -1)
        for number, receivers in enumerate(edges.receivers):
            reads = [SiteRead(point.site, point.layer) for point in receivers.points]
            places = {
                None if each.site in _STREAMS else (each.stack.replace("cross", ""), each.layer)
                for each in reads
            }
            if len(places) == 1 and (place := places.pop()) is not None:
                own_layer[number] = layers.index(place)
        own_layer = own_layer[edges.receivers_of_row]
        counts = len(layers) - (own_layer >= 0)
        rules = run.backward or BackwardRules()
        return [
            (
                replace(run, backward=replace(rules, dropped_layer=layer, dropped_stack=stack)),
                (own_layer != number) / counts,
            )
            for number, (stack, layer) in enumerate(layers)
        ]

    def _sum_edges(
        self,
        along: _SentVectors,
        rows: Ints,
        by_site: Mapping[SiteLayer, Tensor],
        by_pattern: Mapping[SiteLayer, Floats],
        moved: SiteRead | None,
    ) -> Floats:
        """Return [row]: the estimator's numbers of rows, by one gradient of a metric.

        Args:
            along: The senders.
            rows: Numbers of the rows.
            by_site: [token, unit, width] gradients by the receivers' sites.
            by_pattern: [sender, unit] numbers of queries and keys that receive.
            moved: The only site of senders that counts; None for all.
        """
        edges, effects = along.held.edges, np.zeros(len(rows))
        for number in np.unique(edges.receivers_of_row[rows]).tolist():
            indices = np.flatnonzero(edges.receivers_of_row[rows] == number)
            sums = np.zeros(len(edges.first))
            if edges.has_gradient(number):
                gradients = along.held.gradients(number, by_site, along.leaves)
                for each in zip(along.written, along.bases, gradients, strict=True):
                    if moved is None or each[0].where == moved:
                        sums += self._sums(*each, len(sums))
            for point in edges.list_attended(number):
                values = by_pattern[point.site, point.layer]
                sums += values.sum(1) if point.unit is None else values[:, point.unit]
            effects[indices] = sums[edges.sender[rows[indices]]]
        return effects

    def _list_moved_senders(self, written: Sequence[_WrittenVectors]) -> Sequence[SiteRead | None]:
        """List the sites of senders that move separately; None if the model's input moves."""
        if self.kind.moves != "senders":
            return [None]
        return list(dict.fromkeys(vectors.where for vectors in written))

    def _near_base(
        self,
        written: Sequence[_WrittenVectors],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
        groups: Ints,
    ) -> Floats:
        """Return [measure, row]: values by the mean gradient near the base run, with noise at the
        sites of a group of rows."""
        wheres = [vectors.where for vectors in written]
        noise = self.differentiated.noise(lanes)
        read = run_full(self.model, lanes.batch, writes=noise, reads=wheres).reads
        effects = np.zeros((len(self.readout.measures), len(environments)))
        for every in _iter_joint_writes(written, groups):
            bases = [vectors.base(read, lanes.batch) for vectors in every]
            leaves = [self.differentiated.zeros(*base.values.shape) for base in bases]
            adds = [vectors.added(leaf) for vectors, leaf in zip(every, leaves, strict=True)]
            samples = range(int(self.options["samples"]))
            places = dict.fromkeys(vectors.where for vectors in every)
            moves = ([self._noise_at(at, read[at], lanes, n) for at in places] for n in samples)
            given = (self.differentiated, leaves, adds, moves, lanes, environments)
            for number, numbers, gradients in self._mean_gradients(*given):
                for each in zip(every, bases, gradients, strict=True):
                    effects[number, numbers] += self._sums(*each, len(environments))[numbers]
        return self.kind.finish(effects)

    def _between_runs(
        self,
        written: Sequence[_WrittenVectors],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
    ) -> Floats:
        """Return [measure, row]: values by the mean gradient as the model's input moves from the
        source run to the base run."""
        run = self.differentiated
        reads = [*dict.fromkeys(where for vectors in written for where in vectors.reads)]
        read = run_full(self.model, lanes.batch, writes=run.noise(lanes), reads=reads).reads
        bases = [vectors.base(read, lanes.batch) for vectors in written]
        leaves = [run.zeros(len(vectors.lane), vectors.width(self.model)) for vectors in written]
        adds = [vectors.added(leaf) for vectors, leaf in zip(written, leaves, strict=True)]
        moves = self._moved_inputs(self.plan.rules[0], lanes)
        effects = np.zeros((len(self.readout.measures), len(environments)))
        given = (run, leaves, adds, moves, lanes, environments)
        for number, numbers, gradients in self._mean_gradients(*given):
            for each in zip(written, bases, gradients, strict=True):
                effects[number, numbers] += self._sums(*each, len(environments))[numbers]
        return self.kind.finish(effects)

    def _mean_gradients(
        self,
        run: DifferentiatedRun,
        leaves: Sequence[Tensor],
        adds: Sequence[SiteWrite],
        moves: Iterable[Sequence[SiteWrite]],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
    ) -> list[tuple[int, Ints, Sequence[Tensor]]]:
        """Return what `_gradients` yields, averaged over passes.

        Args:
            leaves: The zeros that `adds` writes.
            moves: Further writes of each pass.
        """
        count, total = 0, list[tuple[int, Ints, Sequence[Tensor]]]()
        for moved in moves:
            reading, _ = run.read([*moved, *adds], lanes, ())
            gradients = list(self._gradients(reading, leaves, environments))
            if total:
                gradients = [
                    (number, numbers, [a + b for a, b in zip(sums, new, strict=True)])
                    for (number, numbers, new), (*_, sums) in zip(gradients, total, strict=True)
                ]
            count, total = count + 1, gradients
        return [
            (number, numbers, [each / count for each in sums]) for number, numbers, sums in total
        ]

    def _moved_inputs(
        self, rule: RulePlan, lanes: DrawLanes, moved: SiteRead | None = None
    ) -> Iterator[list[SiteWrite]]:
        """Yield the writes that move activations toward the source run, for each point; none for
        the base run, which comes first.

        Args:
            moved: The site that moves; None for the streams that enter block 0 of each stack.
        """
        yield []
        steps = self.steps or 1
        if steps == 1:
            return
        source = replace(self.differentiated, run=self.differentiated.runs.named(rule.rule.run))
        other = DrawLanes.of(self.lanes_of(rule), np.unique(lanes.prompts), self.plan.draws)
        stacks = ["", *({"encoder"} & self.model.shape.others.keys())]
        stacks += ["vision"] if rule.rule.in_vision else []
        wheres = [SiteRead("resid_pre", 0, stack) for stack in stacks]
        wheres = wheres if moved is None else [moved]
        stop = 1 if moved is None or moved.layer is None else moved.layer + 1
        stop = 0 if moved is not None and moved.stack in ("encoder", "vision") else stop
        tensors = [
            run_full(
                self.model, draw_lanes.batch, stop=stop, writes=run.noise(draw_lanes), reads=wheres
            ).reads
            for run, draw_lanes in ((self.differentiated, lanes), (source, other))
        ]
        moves: list[SiteWrite] = []
        for where in wheres:
            lane, token = self._list_moved_tokens(where, rule, lanes)
            streams: list[Tensor] = []
            for draw_lanes, reads in zip((lanes, other), tensors, strict=True):
                index = lane, draw_lanes.batch.of_read(where).columns(lane, token)
                streams.append(reads[where][indices_to_device(index, reads[where].device)])
            change, units = (streams[1] - streams[0]).flatten(0, 1), streams[0].shape[1]
            place = lane.repeat_interleave(units), token.repeat_interleave(units)
            unit = torch.arange(units).repeat(len(lane))
            given = (where.site, where.layer, *place, unit, change)
            moves.append(SiteWrite(*given, mode="add", stack=where.stack))
        for point in range(1, steps):
            share = 1 - point / steps
            yield [replace(move, values=share * move.values) for move in moves]

    def _list_moved_tokens(
        self, where: SiteRead, rule: RulePlan, lanes: DrawLanes
    ) -> tuple[Tensor, Tensor]:
        """Return lane and position of what moves at a site: all tokens, or all patches of images.

        If a rule is in the vision encoder, images move there, and their tokens follow.
        """
        if where.stack == "vision":
            return self._list_patches(lanes)
        lane, token = lanes.batch.of_read(where).tokens()
        if not rule.rule.in_vision:
            return lane, token
        ids = lanes.batch.ids
        of_image = ids[indices_to_device((lane, lanes.batch.columns(lane, token)), ids.device)]
        moves = (of_image < IMAGE_TOKEN).cpu()
        return lane[moves], token[moves]

    def _noise_at(self, where: SiteRead, read: Tensor, lanes: DrawLanes, sample: int) -> SiteWrite:
        """Build noise at all vectors of a site; read: [lane, column, unit, width] of it."""
        batch = lanes.batch.of_site(where.site, where.stack)
        in_vision = where.stack == "vision"
        lane, position = self._list_patches(lanes) if in_vision else batch.tokens()
        vectors = read[indices_to_device((lane, batch.columns(lane, position)), read.device)]
        ends = np.cumsum(np.bincount(lane.numpy()))[:-1].tolist()
        values: list[Floats] = []
        by_lane = zip(lanes.prompts, lanes.draws, vectors.tensor_split(ends), strict=True)
        for prompt, draw, tensor in by_lane:
            row = self.differentiated.run.rows[int(prompt)]
            content = digest_number(row.source, np.array(row.ids, dtype=np.int64).tobytes())
            place = digest_number(where.site, where.layer, where.stack)
            key = [self.differentiated.runs.seed % 2**63, content, place, int(draw), sample]
            scale = self.options["noise"] * float(tensor.max() - tensor.min())
            values.append(draw_noise(key, tensor.shape) * scale)
        units = read.shape[2]
        return SiteWrite(
            where.site,
            where.layer,
            lane.repeat_interleave(units),
            position.repeat_interleave(units),
            torch.arange(units).repeat(len(lane)),
            torch.from_numpy(np.concatenate(values).reshape(len(lane) * units, -1)),
            mode="add",
            stack=where.stack,
        )

    def _list_patches(self, lanes: DrawLanes) -> tuple[Tensor, Tensor]:
        """Return lane and position of the patches of all image tokens, as in `TokenHits`."""
        count = self.model.shape.merged_side**2
        rows = [self.differentiated.run.rows[int(prompt)] for prompt in lanes.prompts]
        reader = self.model.tokenizer
        if self.model.shape.resamples and isinstance(reader, ImagePromptTokenizer):
            own = [sorted(row_in_patches(reader, row).patch_tokens) for row in rows]
            lane = torch.arange(len(own)).repeat_interleave(torch.tensor([*map(len, own)]))
            return lane, torch.tensor([position for each in own for position in each])
        patches = [
            torch.tensor(
                [t for picture in row.whole_pictures for t in picture.places(picture.name)[0]]
            )
            for row in rows
        ]
        lane = torch.arange(len(patches)).repeat_interleave(torch.tensor([*map(len, patches)]))
        position = torch.cat(patches)[:, None] * count + torch.arange(count)
        return lane.repeat_interleave(count), position.flatten()

    def _along(
        self,
        written: Sequence[_WrittenVectors],
        lanes: DrawLanes,
        environments: Sequence[ItemNumber],
        groups: Ints,
    ) -> Floats:
        """Return [measure, row]: estimates by the mean gradient along the line of each group."""
        assert self.steps is not None
        reads = [*dict.fromkeys(where for vectors in written for where in vectors.reads)]
        noise = self.differentiated.noise(lanes)
        read = run_full(self.model, lanes.batch, writes=noise, reads=reads).reads
        effects = np.zeros((len(self.readout.measures), len(environments)))
        for every in _iter_joint_writes(written, groups):
            bases = [vectors.base(read, lanes.batch) for vectors in every]
            ways = [vectors.way(base) for vectors, base in zip(every, bases, strict=True)]
            for step in range(self.steps):
                share = (step + 0.5) / self.steps
                leaves = [(way * share).requires_grad_() for way in ways]
                adds = [vectors.added(leaf) for vectors, leaf in zip(every, leaves, strict=True)]
                reading, _ = self.differentiated.read(adds, lanes, ())
                for number, numbers, gradients in self._gradients(reading, leaves, environments):
                    for each in zip(every, bases, gradients, strict=True):
                        effects[number, numbers] += (
                            self._sums(*each, len(environments))[numbers] / self.steps
                        )
        return self.kind.finish(effects)

    def _sums(
        self, written: _WrittenVectors, base: _BaseVectors, gradient: Tensor, rows: int
    ) -> Floats:
        """Return [row]: the estimator's numbers, summed or averaged over the vectors of a row."""
        spot = to_device(written.spot, gradient.device)
        vectors = base.at(written.spot)
        values = vectors.values.to(gradient.device)
        changed = written.written(vectors).to(gradient.device)
        parts = self.kind.values(changed, values, gradient[spot].double(), self.options)
        if parts.shape != (len(values),):
            function = f"{type(self.kind).__name__}.values"
            shape = list(parts.shape)
            raise TypeError(f"`{function}` returned the shape {shape} instead of [{len(values)}]")
        if self.kind.over_vectors == "mean":
            counts = np.bincount(written.row)[written.row]
            parts = parts / array_to_device(counts, parts.device)
        sums = np.zeros(rows)
        np.add.at(sums, written.row, parts.cpu().numpy())
        return sums

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
            own = np.array([n for n, environment in enumerate(environments) if environment == kind])
            values = self.readout.tensors(replace(reading, items=[kind] * len(reading.prompts)))
            for number, value in enumerate(values):
                more = (place * len(values) + number + 1) < last
                gradients = compute_gradients(value.sum(), leaves, keep=more)
                yield number, own, gradients


def _iter_joint_writes(
    written: Sequence[_WrittenVectors], groups: Ints
) -> Iterator[list[_WrittenVectors]]:
    """Yield the writes of rows that move along the line together.

    Args:
        written: The writes of all rows; those of one site may be separate, such as writes of
            different numbers of features, and those of a cross-layer transcoder to later layers.
        groups: [row] equal for rows that move together.
    """
    for group in np.unique(groups):
        own = [vectors.some(groups == group) for vectors in written]
        if together := [vectors for vectors in own if len(vectors.row)]:
            yield together


def _select_keys(edge: EdgeWrite, batch: Batch) -> SiteWrite:
    """Build vectors over keys: 1 at the keys of an edge, else 0."""
    width = batch.keys_of(edge.stack).key_width
    values = torch.zeros(len(edge.rows), width, dtype=torch.float64)
    values[edge.entries, edge.keys] = 1
    given = edge.layer, edge.rows, edge.queries, edge.heads, values
    return SiteWrite("pattern", *given, stack=edge.stack)


def _iter_places(rows: RowTable) -> Iterator[tuple[int, int, int]]:
    columns = (rows.cell.tolist(), rows.prompt.tolist(), rows.alternative.tolist())
    return zip(*columns, strict=True)


def _mark_gaps(values: list[Floats]) -> ReadoutResult:
    """Mark undefined values as gaps."""
    gaps: dict[int, ValueGap] = {}
    for number, value in enumerate(values):
        rows = np.flatnonzero(~np.isfinite(value))
        if len(rows):
            gaps[number] = ValueGap(rows, "its gradient isn't a number")
            value[rows] = np.nan
    count = len(values[0])
    broken = np.zeros(count, dtype=np.bool_)
    return ReadoutResult(values, broken, [np.zeros(count) for _ in values], {}, gaps)
