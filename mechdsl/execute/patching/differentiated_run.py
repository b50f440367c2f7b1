"""Gradients of metrics of an unpatched run: passes with autograd, and gradients with respect to
sites as vectors (`save gradient of`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.measurement.readout import Readout, ReadoutInput
from mechdsl.execute.unpatched_batch import (
    UnpatchedBatch,
    build_noise_writes,
    compute_prompt_loss,
    find_continuation_positions,
    find_positions,
    select_positions,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns, flatten_units, require_logits
from mechdsl.execute.vectors import SiteVectors, list_tokens
from mechdsl.forward.hooks.attention import has_sinks
from mechdsl.forward.hooks.backward_rules import catch_autograd_errors, compute_gradients
from mechdsl.forward.hooks.batch import (
    Batch,
    CircuitRead,
    CircuitWrite,
    SiteRead,
    SiteWrite,
    indices_to_device,
)
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import IMAGE_TOKENS, LoadedModel, has_single_output
from mechdsl.models.shape import unit_count, vector_width
from mechdsl.planner.rows import TokenHits
from mechdsl.program.estimators import BackwardRules
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.types import ResolvedSave, SiteLayer, SitePoint


@dataclass(frozen=True, eq=False)
class DrawLanes:
    """Lanes of a pass: one for each draw of a prompt.

    Draws are separate even if the run is the same in all, because written values may differ.
    """

    used: Ints
    """[lane] its lane in the unpatched run."""
    batch: Batch
    prompts: Ints
    """[lane]"""
    draws: Ints
    """[lane]"""
    lengths: Ints
    """[lane]"""

    @staticmethod
    def of(every: UnpatchedBatch, prompts: Ints, draws: int) -> DrawLanes:
        """Select the lanes of some prompts of an unpatched run."""
        lanes, draw = np.repeat(prompts, draws), np.tile(np.arange(draws), len(prompts))
        used = every.lane(lanes, draw)
        batch = every.batch.take(torch.from_numpy(used))
        return DrawLanes(used, batch, lanes, draw, every.lengths[used])

    def take(self, lanes: Ints) -> DrawLanes:
        """Return the lanes of some numbers, which may repeat."""
        batch = self.batch.take(torch.from_numpy(lanes))
        columns = (self.prompts[lanes], self.draws[lanes], self.lengths[lanes])
        return DrawLanes(self.used[lanes], batch, *columns)

    def of_draw(self, prompts: Ints, draws: Ints) -> Ints:
        """Return the lane of each (prompt, draw)."""
        first = np.searchsorted(self.prompts, prompts)
        return first + draws


def write_point(
    point: SitePoint, model: LoadedModel, lanes: Tensor, tokens: Tensor, vectors: Tensor
) -> SiteWrite:
    """Write vectors of a site, with the numbers of all heads or neurons unless it names one.

    Args:
        lanes: [vector]
        tokens: [vector]
        vectors: [vector, width]
    """
    units = unit_count(model.shape, point.site, point.layer) if point.unit is None else 1
    unit = torch.arange(units) if point.unit is None else torch.tensor([point.unit])
    return SiteWrite(
        point.site,
        point.layer,
        lanes.repeat_interleave(units),
        tokens.repeat_interleave(units),
        unit.repeat(len(lanes)),
        vectors.reshape(len(lanes) * units, -1),
    )


@dataclass(frozen=True, eq=False)
class DifferentiatedRun:
    """An unpatched run on one batch of prompts, in passes with autograd."""

    runs: UnpatchedRuns
    run: PromptRun
    readout: Readout
    batch: Ints
    """The prompts of the batch."""
    backward: BackwardRules | None = None
    """Changes of the derivatives."""
    recompute: bool = False
    """Whether backward passes compute activations again to save memory, if that is possible."""

    @property
    def model(self) -> LoadedModel:
        """The run's model."""
        return self.runs.model_of(self.run)

    def read(
        self,
        adds: Sequence[SiteWrite],
        lanes: DrawLanes,
        reads: Sequence[SiteRead],
        circuits: Sequence[CircuitWrite | CircuitRead] = (),
    ) -> tuple[ReadoutInput, dict[SiteRead, Tensor]]:
        """Run the lanes with these additions and edges; returns readout input and values read at
        sites.

        Raises AutogradFailed.
        """
        readout, run = self.readout, self.run
        points = [(n, atom) for n, (_, atom) in enumerate(readout.atoms) if atom.point is not None]
        compared = [SiteRead(a.point.site, a.point.layer) for _, a in points if a.point is not None]
        columns = [find_positions(s, run.name, lanes.prompts, lanes.lengths) for s in readout.spots]
        at = torch.from_numpy(np.stack(columns, axis=1))
        full = readout.loss is not None or has_single_output(self.model)
        logits: Tensor | None = None
        loss: Tensor | None = None
        tensors: dict[SiteRead, Tensor] = {}
        if readout.needs_plain or reads:
            with catch_autograd_errors():
                result = run_full(
                    self.model,
                    lanes.batch,
                    writes=[*self.noise(lanes), *adds],
                    reads=[*reads, *compared],
                    logits_at=None if full else at,
                    circuits=circuits,
                    gradients=True,
                    recompute=self.recompute,
                    backward=self.backward,
                )
            logits, tensors = require_logits(result.logits), result.reads
            if readout.loss is not None:
                loss = compute_prompt_loss(readout.loss, logits, lanes.batch, run, lanes.prompts)
            logits = select_positions(logits, lanes.batch, at) if full else logits
        row = torch.arange(len(lanes.used))
        references = self.runs.references(readout, self.batch, lanes.prompts, lanes.draws)
        reading = ReadoutInput(
            run=run.name,
            prompts=lanes.prompts,
            items=[None] * len(lanes.prompts),
            logits=logits if readout.needs_plain else None,
            continued={n: self._continued(n, adds, lanes, circuits) for n in readout.continuations},
            loss=loss,
            activations={
                n: flatten_units(read[indices_to_device((row, columns), read.device)], atom)
                for (n, atom), where in zip(points, compared, strict=True)
                for read, columns in [
                    (tensors[where], lanes.batch.columns(row, at[:, readout.atoms[n][0]]))
                ]
            },
            references={n: reference.clone() for n, reference in references.items()},
        )
        return reading, tensors

    def _continued(
        self,
        number: int,
        adds: Sequence[SiteWrite],
        lanes: DrawLanes,
        circuits: Sequence[CircuitWrite | CircuitRead],
    ) -> Tensor:
        """Return [lane, token, vocab]: logits with a text of several tokens after the prompts."""
        atom = self.readout.atoms[number][1]
        every = self.runs.lanes(self.run, self.batch, atom)
        result = run_full(
            self.model,
            every.batch.take(torch.from_numpy(lanes.used)),
            writes=[*self.noise(lanes), *adds],
            logits_at=find_continuation_positions(atom, lanes.prompts, lanes.lengths),
            circuits=circuits,
            gradients=True,
            recompute=self.recompute,
            backward=self.backward,
        )
        return require_logits(result.logits)

    def unpatched(self) -> UnpatchedBatch:
        """Return the run on the batch without additions, of a pass that other readers share."""
        return self.runs.lanes(self.run, self.batch)

    def zeros(self, *size: int) -> Tensor:
        """Create zeros to add at a site, which the metric is differentiated by."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        return torch.zeros(size, dtype=dtype, device=self.model.device, requires_grad=True)

    def add_zeros(
        self, places: Iterable[SiteLayer], lane: Tensor, token: Tensor
    ) -> tuple[dict[SiteLayer, Tensor], list[SiteWrite]]:
        """Add zeros at all units of sites, which the metric is differentiated by.

        Args:
            places: Sites and layers, which may repeat.
            lane: [vector]
            token: [vector]

        Returns:
            The zeros [vector, units, width] of each site and layer, and the writes that add them.
        """
        shape = self.model.shape
        leaves: dict[SiteLayer, Tensor] = {}
        adds: list[SiteWrite] = []
        for site, layer in dict.fromkeys(places):
            units = unit_count(shape, site, layer)
            leaf = self.zeros(len(lane), units, vector_width(shape, site, layer))
            unit = torch.arange(units).repeat(len(lane))
            at = lane.repeat_interleave(units), token.repeat_interleave(units), unit
            leaves[site, layer] = leaf
            adds.append(SiteWrite(site, layer, *at, leaf.flatten(0, 1), mode="add"))
        return leaves, adds

    def noise(self, lanes: DrawLanes) -> list[SiteWrite]:
        """Build the noise of a corrupted run."""
        table, seed = self.runs.table, self.runs.seed
        return build_noise_writes(self.model, self.run.noise, lanes.prompts, table.row_keys, seed)


@dataclass(frozen=True, eq=False)
class BasePatterns:
    """All attention weights of one layer in the base run."""

    where: SiteRead
    """The site of the weights."""
    scores: Tensor
    """[lane, column, head, key]"""
    weights: Tensor
    """[lane, column, head, key]"""
    spots: tuple[Tensor, Tensor, Tensor]
    """Lane, position and head of the weights of all tokens."""
    columns: Tensor
    """[spot] column of the position."""
    has_sink: bool
    """Whether the keys compete with a sink."""

    @staticmethod
    def reads(where: SiteRead) -> tuple[SiteRead, SiteRead]:
        """Return the sites of the scores and of the weights of the layer that a site is in."""
        scores, weights = (replace(where, site=site) for site in ("scores", "pattern"))
        return scores, weights

    @staticmethod
    def of(
        where: SiteRead, read: Mapping[SiteRead, Tensor], batch: Batch, model: LoadedModel
    ) -> BasePatterns:
        """Return those of the layer that a site is in, from the values at `reads`."""
        assert where.layer is not None
        own = BasePatterns.reads(where)
        scores, weights = (read[each] for each in own)
        frame, heads = batch.of_read(own[1]), weights.shape[2]
        tokens = frame.tokens()
        if where.stack == "vision":  # queries are patches; others have no weights, or NaN
            scores, weights = scores.nan_to_num(0.0), weights.nan_to_num(0.0)
            lane, column = weights[:, :, 0].any(-1).nonzero(as_tuple=True)
            tokens = lane.cpu(), column.cpu() - frame.starts[lane.cpu()]
        lane, token = (each.repeat_interleave(heads) for each in tokens)
        spots = (lane, token, torch.arange(heads).repeat(len(token) // heads))
        block = model.stack(where.stack).anatomy.blocks[where.layer]
        has_sink = has_sinks(model.module.get_submodule(block.path))
        columns = frame.columns(lane, token)
        return BasePatterns(own[1], scores, weights, spots, columns, has_sink)

    @property
    def size(self) -> tuple[int, int]:
        """Shape of the zeros that `added` adds: [spot, key]."""
        return len(self.columns), self.weights.shape[-1]

    def added(self, leaf: Tensor) -> SiteWrite:
        """Add [spot, key] to the weights."""
        where = self.where
        return SiteWrite("pattern", where.layer, *self.spots, leaf, mode="add", stack=where.stack)

    def held(self) -> SiteWrite:
        """Write the weights of the base run in all rows."""
        where, (lane, token, head) = self.where, self.spots
        weight = self.weights[indices_to_device((lane, self.columns, head), self.weights.device)]
        return SiteWrite("pattern", where.layer, lane, token, head, weight, stack=where.stack)

    def expand(self, gradient: Tensor) -> Tensor:
        """Return [lane, column, head, key]: a gradient by the weights; gradient: [spot, key]."""
        lane, _, head = self.spots
        slopes = torch.zeros_like(self.weights, dtype=torch.float64)
        slopes[indices_to_device((lane, self.columns, head), gradient.device)] = gradient.double()
        return slopes


def number_keys(
    model: LoadedModel, batch: Batch, where: SiteRead, lane: Tensor, position: Tensor
) -> Tensor:
    """Return [K] the indices of keys among those of their queries, given their positions [K].

    In a vision encoder, positions are those of patches, and the keys of a query are the patches of
    its image.
    """
    if where.stack != "vision":
        return position
    count = model.shape.merged_side**2
    index = IMAGE_TOKENS[model.module].index(batch)
    return index[lane, batch.columns(lane, position // count)] * count + position % count


def renormalize_scores(scores: Tensor, base: Tensor, weights: Tensor, *, has_sink: bool) -> Tensor:
    """Return weights of new scores, from scores and weights of the base run.

    All have the shape [..., key]. A sink keeps its score: its weight is what the others lack.
    Without a sink, they lack only rounding errors, which would count as much as keys with very low
    new scores. Keys that a query doesn't see have a score and a weight of 0.
    """
    seen = (weights > 0) | (base != 0)
    largest = weights.argmax(-1, keepdim=True)
    size = base.gather(-1, largest) - weights.gather(-1, largest).log()
    scores = (scores - size).masked_fill(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    top = top.clamp(min=0) if has_sink else top.nan_to_num(neginf=0.0)  # -inf: sees no key
    shares = (scores - top).exp()
    total = shares.sum(-1, keepdim=True)
    if has_sink:
        total += (1 - weights.sum(-1, keepdim=True)).clamp(min=0) * (-top).exp()
    return torch.where(total > 0, shares / total, 0.0)


def read_gradients(
    runs: UnpatchedRuns, run: PromptRun, save: ResolvedSave, batches: Iterable[Ints]
) -> Iterator[SiteVectors]:
    """Read the gradient of a metric with respect to each site, batch by batch.

    Zeros are added at the named tokens of every site, and the metric is differentiated with respect
    to them: one backward pass serves all sites. The metric of a row depends
    on the row's own tokens only, so the gradient of the sum over rows has the gradients of all.

    Args:
        runs: With the readout of the metric.
        run: The differentiated run, which has no rules.
        save: The line, with its positions in the run.
        batches: Batches of prompts.

    Yields:
        As `read_vectors`, at least in 32 bits. Raises AutogradFailed.
    """
    (readout,) = runs.readouts
    count = save.count_patches(runs.model_of(run).shape)
    hits = [TokenHits.of([cell], count) for cell in save.cells]
    for number, batch in enumerate(batches):
        lanes = DrawLanes.of(runs.reader(run, ())(batch), batch, run.draws)
        named = [list_tokens(hit, batch, run.draws) for hit in hits]
        places = [np.stack([lanes.of_draw(row, draw), token]) for row, draw, token in named]
        spots, index = np.unique(np.concatenate(places, axis=1), axis=1, return_inverse=True)
        ends = np.cumsum([location.shape[1] for location in places])[:-1]
        of_position = np.split(index.reshape(-1), ends)
        differentiated = DifferentiatedRun(runs, run, readout, batch)
        gradients = _gradients(differentiated, lanes, spots, save.points)
        for position, (rows, draws, token) in enumerate(named):
            tensor = torch.from_numpy(of_position[position])
            each = count // save.cells[position].vectors
            for place, point in enumerate(save.points):
                every = gradients[point.site, point.layer]
                every = every[tensor.to(every.device)]
                vectors = every.flatten(1) if point.unit is None else every[:, point.unit]
                of_token = (rows, draws, token // each, vectors, each)
                yield SiteVectors(number, place, position, *of_token)


def _gradients(
    run: DifferentiatedRun, lanes: DrawLanes, spots: Ints, points: Iterable[SitePoint]
) -> dict[SiteLayer, Tensor]:
    """Compute gradients at some tokens of a batch: site and layer → [spot, units, width].

    Args:
        spots: [2, spot] lane and token.
    """
    lane, token = (torch.from_numpy(spot) for spot in spots)
    leaves, adds = run.add_zeros(((point.site, point.layer) for point in points), lane, token)
    reading, _ = run.read(adds, lanes, ())
    (values,) = run.readout.tensors(reading)
    gradients = compute_gradients(values.sum(), list(leaves.values()), keep=False)
    return dict(zip(leaves, gradients, strict=True))
