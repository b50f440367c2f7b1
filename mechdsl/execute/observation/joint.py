"""Observations over all rows of a cell, and flows of attention between the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.hashing import stable_hash
from mechdsl.dictionaries.features import Dictionary, load_cross_decoder
from mechdsl.execute.cache import PanelCache, open_joint_cache
from mechdsl.execute.measurement.readout import ListedToken, Readout, ReadoutInput
from mechdsl.execute.measurement.values import (
    CellGap,
    GraphFindings,
    MeasuredValues,
    UnusableRow,
    describe_cell,
    expand_base_values,
)
from mechdsl.execute.observation.attribution_graphs import (
    AttributionGraph,
    GraphPrompt,
    GraphTranscoder,
    LogitMeasure,
    attribute,
    list_graph,
    list_influential,
    score_ablation,
    score_graph,
    score_weight,
    weigh_features,
)
from mechdsl.execute.observation.features import list_raised_tokens, observe_features
from mechdsl.execute.observation.token_vectors import (
    Float32s,
    SiteCombination,
    average_rows,
    digest_inputs,
    list_distinct_points,
    read_token_vectors,
)
from mechdsl.execute.observation.weights import WeightObserver
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import (
    BatchReader,
    SiteVectors,
    build_reader,
    read_vectors,
    split_prompts,
)
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.weight_maps import WeightMaps
from mechdsl.models.shape import unit_count
from mechdsl.planner.plan import ExperimentPlan, point_size
from mechdsl.planner.rows import RowTable, RulePlan
from mechdsl.program.group_files import LayerFeature
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import Hits, PositionCell, PromptRun
from mechdsl.resolve.loops import evaluate_arithmetic
from mechdsl.resolve.observations import (
    ObservedTokens,
    RowSetObservation,
    RowVectors,
    TokenSetObservation,
    TokenVectors,
    TrainingVectors,
    join_positions,
)
from mechdsl.resolve.types import ResolvedMeasure, SitePoint
from mechdsl.rules.observations.attention import (
    AttentionRollout,
    WeightedValueNorm,
    list_value_points,
)
from mechdsl.rules.observations.features import FEATURE_AXIS, FeatureActivations, correlate
from mechdsl.rules.observations.graph_probes import GraphProbe
from mechdsl.rules.observations.graphs import AttributionGraphs, GraphAblation, GraphWeight
from mechdsl.rules.observations.maps import MapObservation
from mechdsl.rules.observations.weights import CIRCUIT_AXES, WeightObservation

MIXTURE_TOLERANCE = 0.02
"""How far the output of heads may be from their weighted values, relative to its largest number."""

KEYS_AT_A_TIME = 64
"""Keys whose transformed values are held at a time."""

Flows: TypeAlias = Mapping[SiteCombination, Floats]
"""Of each combination of sites, [query token, key token]."""


class PromptReader:
    """Reads sites at every token of prompts, one prompt and noise draw at a time."""

    def __init__(
        self,
        model: LoadedModel,
        run: PromptRun,
        lanes_of: Callable[[Sequence[SitePoint]], BatchReader],
        points: Sequence[SitePoint],
    ) -> None:
        self.model, self.run, self.points, self.lanes = model, run, points, lanes_of(points)
        tokens = tuple((tuple(range(len(row.ids))),) for row in run.rows)
        self.everywhere = PositionCell("tokens *", tokens)

    def batches(self, prompts: Ints) -> list[Ints]:
        return split_prompts(self.model, self.run, self.points, prompts)

    def read(self, batch: Ints) -> Iterator[tuple[SitePoint, int, int, Tensor]]:
        """Yield (site, prompt, noise draw, [token, width]), site by site in their order."""
        for vector in read_vectors(self.lanes, self.points, [self.everywhere], [batch]):
            for prompt in batch.tolist():
                for draw in range(int(vector.draws.max(initial=0)) + 1):
                    indices = np.flatnonzero((vector.prompts == prompt) & (vector.draws == draw))
                    order = indices[np.argsort(vector.tokens[indices])]
                    yield self.points[vector.point], prompt, draw, vector.vectors[order]


ReaderOf: TypeAlias = Callable[[Sequence[SitePoint]], PromptReader]
"""Returns the reader of some sites."""


def compute_rollouts(
    reader_of: ReaderOf, combinations: Sequence[SiteCombination], prompts: Ints
) -> Iterator[tuple[int, Flows]]:
    """Yield (prompt, how much of each token is in each other one after the last layer), as the mean
    over draws of runs with noise.

    Args:
        reader_of: Returns the reader of a run.
        combinations: One: the patterns of all layers, the first one first.
    """
    (points,) = combinations
    reader = reader_of(points)
    run, shape = reader.run, reader.model.shape
    for batch in reader.batches(prompts):
        mixed: dict[tuple[int, int], Floats] = {}
        for point, prompt, draw, vectors in reader.read(batch):
            heads = unit_count(shape, "pattern", point.layer)
            size = len(run.rows[prompt].ids)
            step = vectors.double().reshape(size, heads, -1).mean(1).cpu().numpy()
            step = step[:, :size] + np.eye(size)
            step /= step.sum(1, keepdims=True)
            key = prompt, draw
            mixed[key] = step @ mixed[key] if key in mixed else step
        for prompt in batch.tolist():
            values = [each for (row, _), each in mixed.items() if row == prompt]
            yield prompt, {points: np.mean(values, 0)}


def compute_value_norms(
    reader_of: ReaderOf, combinations: Sequence[SiteCombination], prompts: Ints
) -> Iterator[tuple[int, Flows]]:
    """Yield (prompt, norms of what attention moves from each token to each other one), as the mean
    over layers, and over draws of runs with noise.

    Args:
        reader_of: Returns the reader of a run.
        combinations: The patterns of heads, or of all heads of a layer, whose vectors are summed.

    Raises:
        ValueError: If the output of a head isn't the sum of its weighted values.
    """
    layers = sorted({point.layer or 0 for points in combinations for point in points})
    reader = reader_of(list_value_points(layers))
    model, maps = reader.model, WeightMaps(reader.model)
    wanted = {
        layer: {
            points: sorted(_list_heads(points, layer, unit_count(model.shape, "pattern", layer)))
            for points in combinations
            if any(point.layer == layer for point in points)
        }
        for layer in layers
    }
    for batch in reader.batches(prompts):
        norms: dict[tuple[int, SiteCombination], list[Floats]] = {}
        seen: dict[tuple[int, int], dict[str, Tensor]] = {}
        for point, prompt, draw, vectors in reader.read(batch):
            sites = seen.setdefault((prompt, draw), {})
            sites[point.site] = vectors
            if len(sites) < 3:
                continue
            del seen[prompt, draw]
            assert point.layer is not None
            layer = _LayerValues(model, maps, point.layer, sites)
            for combination, heads in wanted[point.layer].items():
                norms.setdefault((prompt, combination), []).append(layer.norms(heads))
        for prompt in batch.tolist():
            yield prompt, {points: np.mean(norms[prompt, points], 0) for points in combinations}


def _list_heads(combination: SiteCombination, layer: int, count: int) -> Collection[int]:
    units = [point.unit for point in combination if point.layer == layer]
    return range(count) if None in units else {unit for unit in units if unit is not None}


class _LayerValues:
    """Patterns and transformed values of one layer, for one prompt."""

    def __init__(
        self, model: LoadedModel, maps: WeightMaps, layer: int, sites: Mapping[str, Tensor]
    ) -> None:
        size = len(sites["v"])
        heads = unit_count(model.shape, "pattern", layer)
        values = sites["v"].float().unflatten(1, (unit_count(model.shape, "v", layer), -1))
        self.patterns = sites["pattern"].unflatten(1, (heads, -1))[..., :size].double()
        self.values = values.repeat_interleave(heads // values.shape[1], 1)
        self.output = maps.output(layer)
        tap = model.anatomy.blocks[layer].taps.get("attn_out")
        self.scale = 1.0 if tap is None else tap.scale
        mixed = torch.einsum("qhk,khd->qhd", self.patterns, self.values.double()).flatten(1)
        found = sites["z"].double()
        close = MIXTURE_TOLERANCE * float(found.abs().max())
        if mixed.shape != found.shape or float((mixed - found).abs().max()) > close:
            raise ValueError(f"in layer {layer}, `z` isn't the sum of the weighted values `v`")

    def norms(self, heads: Sequence[int]) -> Floats:
        """Return [query, key]: norms of the summed vectors of some heads."""
        size = len(self.values)
        norms = np.zeros((size, size))
        patterns, output = self.patterns[:, heads], self.output[heads]
        for first in range(0, size, KEYS_AT_A_TIME):
            keys = slice(first, first + KEYS_AT_A_TIME)
            moved = torch.einsum("khd,hdm->khm", self.values[keys][:, heads], output).double()
            products = torch.einsum("khm,kgm->khg", moved, moved)
            weights = patterns[..., keys]
            squares = torch.einsum("qhk,khg,qgk->qk", weights, products, weights)
            norms[:, keys] = self.scale * squares.clamp_min(0).sqrt().cpu().numpy()
        return norms


def average_flow(flow: Floats, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Return what some tokens have of others: summed over keys, averaged over queries.

    Args:
        flow: [query token, key token]
    """
    return float(flow[np.ix_(queries, keys)].sum(1).mean())


MAX_GATHERED_BYTES = 1 << 30
"""Of vectors that are held at a time, as far as several cells are."""


@dataclass(eq=False)
class VectorGatherer:
    """What an observation over all rows needs of which run, in each of its cells."""

    plan: ExperimentPlan
    rule: RulePlan
    does: RowSetObservation
    runs: UnpatchedRuns
    kept: Ints
    known: Collection[int] = ()
    """Cells that nothing is gathered for."""
    sites: list[SiteCombination] = field(init=False)
    """Of each cell."""
    compared_sites: list[SiteCombination] = field(init=False)
    """Of each cell, those that its sites are set against."""
    others: list[PositionCell] = field(init=False)
    """The positions that are set against those of the rule."""

    def __post_init__(self) -> None:
        rule = self.rule
        combinations: list[SiteCombination] = []
        for key in range(len(rule.points.offsets) - 1):
            _, points = rule.points.expand(np.array([key]))
            combinations.append(tuple(rule.point_table[point] for point in points.tolist()))
        self.sites = [combinations[key] for key in rule.site_of_cell.tolist()]
        self.compared_sites = list(self._of_other())
        edge = rule.rule.edge
        self.others = [] if edge is None else list(edge.keys.written.values())

    def _of_other(self) -> Iterator[SiteCombination]:
        """Per cell, the sites that it is set against."""
        other = self.rule.rule.compared_sites
        names = [axis.name for axis in self.plan.experiment.axes]
        for cell in range(self.plan.n_cells):
            if other is None:
                yield ()
                continue
            along = [self.plan.coordinates[names.index(axis)] for axis in other.axes]
            yield other.points[tuple(int(each[cell]) for each in along)]

    def needs(self, cell: int) -> list[SiteCombination]:
        """Both, as far as there are any."""
        return [points for points in (self.sites[cell], self.compared_sites[cell]) if points]

    def fitting(self, cells: Sequence[int], rows: int) -> Iterator[list[int]]:
        """Cells whose vectors are gathered in the same passes."""
        some: list[int] = []
        held: dict[SiteCombination, int] = {}
        for cell in cells:
            more = {points: 12 * rows * sum(map(self.width, points)) for points in self.needs(cell)}
            if some and sum({**held, **more}.values()) > MAX_GATHERED_BYTES:
                yield some
                some, held = [], {}
            some.append(cell)
            held.update(more)
        if some:
            yield some

    def width(self, point: SitePoint) -> int:
        """Of the vector of one point: of all units side by side where it names none."""
        return point_size(self.runs.model.shape, point, 0)

    def keys(
        self,
        spots: Sequence[PositionCell],
        prompts: Ints,
        runs: Sequence[PromptRun],
        table: PromptTable,
    ) -> list[bytes]:
        """[row] a digest of what its vectors at some positions depend on, each of one run: of
        models whose tokens see no later ones, the tokens up to the last position, unless the
        observation needs the whole text. Tiles of one image have one, so that no fit to some of
        them is told on others."""
        whole = self.does.of_whole_text
        causal = [self.runs.model_of(run).shape.reads_prefix and not whole for run in runs]
        in_vision = self.rule.rule.only_in_vision
        by_image = self.does.keeps_images_together
        given = spots, prompts, runs, table, causal
        return digest_inputs(*given, in_vision=in_vision, by_image=by_image)

    def cells(self) -> Iterator[tuple[int, Ints, RowVectors]]:
        """(cell, its columns among the kept rows, their vectors), of cells that have any."""
        rule = self.rule
        key_of_cell = np.zeros_like(rule.position_of_cell)
        key_of_cell = key_of_cell if rule.key_of_cell is None else rule.key_of_cell
        places = np.stack([rule.position_of_cell, key_of_cell])
        for place, key in np.unique(places, axis=1).T.tolist():
            spots = [rule.positions[place], *self.others[key : key + 1]]
            runs = [self.runs.named(self.plan.experiment.spec.base)] * len(spots)
            if rule.rule.does.reads == "run":
                spots.append(rule.sources[place])
                runs.append(self.runs.named(rule.rule.run))
            numbers = np.flatnonzero((places[0] == place) & (places[1] == key)).tolist()
            numbers = [cell for cell in numbers if cell not in self.known]
            there = [all(spot.hits[row] for spot in spots) for row in self.kept.tolist()]
            columns = np.flatnonzero(there)
            if not len(columns) or not numbers:
                continue
            keys = self.keys(spots, self.kept[columns], runs, self.runs.table)
            for some in self.fitting(numbers, len(columns) * len(spots)):
                wanted = list(dict.fromkeys(points for cell in some for points in self.needs(cell)))
                vectors = [
                    self._gathered(wanted, spot, run, columns)
                    for spot, run in zip(spots, runs, strict=True)
                ]
                training = self._training(wanted, place)
                for cell in some:
                    seen = self._seen(cell, vectors, columns, keys, spots)
                    yield cell, columns, replace(seen, training=training.get(self.sites[cell]))

    def flows(self) -> Iterator[tuple[int, Ints, Callable[[], Floats]]]:
        """Yield each cell, its columns among the kept rows, and a function that returns what
        attention moves from its keys to its queries, [column]."""
        rule, run = self.rule, self.runs.named(self.plan.experiment.spec.base)
        assert rule.key_of_cell is not None
        cells = [cell for cell in range(self.plan.n_cells) if cell not in self.known]
        spots = [
            (rule.positions[rule.position_of_cell[cell]], self.others[rule.key_of_cell[cell]])
            for cell in cells
        ]
        if not cells:
            return
        values = np.full((len(cells), len(self.kept)), np.nan)
        model, lanes_of = self.runs.model_of(run), partial(self.runs.reader, run)
        reader_of = partial(PromptReader, model, run, lanes_of)
        wanted = list(dict.fromkeys(self.sites[cell] for cell in cells))
        compute = (
            compute_rollouts if isinstance(self.does, AttentionRollout) else compute_value_norms
        )
        try:
            for row, flows in compute(reader_of, wanted, self.kept):
                column = int(np.searchsorted(self.kept, row))
                for number, hits in enumerate(spots):
                    own = [[t for tokens in hit.hits[row] for t in tokens] for hit in hits]
                    if all(own):
                        flow = flows[self.sites[cells[number]]]
                        values[number, column] = average_flow(flow, *own)
        except ValueError as problem:
            for cell in cells:
                yield cell, np.arange(len(self.kept)), partial(_refuse_cell, str(problem))
            return
        for cell, value in zip(cells, values, strict=True):
            there = np.flatnonzero(np.isfinite(value))
            if len(there):
                yield cell, there, value[there].copy

    def graphs(
        self,
        does: AttributionGraphs,
        systems: Mapping[str, CoordinateSystem],
        measured: MeasuredValues,
    ) -> Iterator[tuple[int, Ints, Callable[[], Floats]]]:
        """Yield each cell, its columns among the kept rows, and a function that computes the scores
        of their attribution graphs, [score, column]."""
        rule, run = self.rule, self.runs.named(self.plan.experiment.spec.base)
        model = self.runs.model_of(run)
        transcoders: dict[int, GraphTranscoder] = {}
        for layer, member in does.members.items():
            system = systems.get(member.name)
            if not isinstance(system, Dictionary):  # the experiment is lost
                return
            file = does.decoders.get(layer)
            decoders = None if file is None else load_cross_decoder(file)
            transcoders[layer] = GraphTranscoder.of(member.reads, system, decoders)
        seed = self.plan.experiment.seed
        kept = frozenset().union(*map(does.features_of, does.groups))
        for cell in range(self.plan.n_cells):
            spot = rule.positions[rule.position_of_cell[cell]]
            there = np.array([n for n, row in enumerate(self.kept.tolist()) if spot.hits[row]])
            if cell in self.known or not len(there):
                continue
            rows = self.kept[there].tolist()
            ends = [1 + spot.hits[row][0][0] for row in rows]
            prompts = [
                GraphPrompt(
                    model,
                    transcoders,
                    run.rows[row].ids[:end],
                    _select_target(does.target, run.name, row),
                    stable_hash(seed, "ablated features", self.runs.table.row_keys[row]),
                    kept,
                )
                for row, end in zip(rows, ends, strict=True)
            ]
            drawn = None if does.pruning is None or cell else (rows[0], does.pruning)
            if not isinstance(does, GraphProbe):
                yield cell, there, partial(_score_prompts, prompts, does, drawn, measured)
                continue
            keys = self.keys([spot], self.kept[there], [run], self.runs.table)
            outcomes = [_select_target(does.outcome, run.name, row) for row in rows]
            probed = _ProbedPrompts(prompts, outcomes, self.kept[there], keys, seed)
            yield cell, there, partial(_probe_prompts, probed, does, drawn, measured)

    def _training(
        self, wanted: Sequence[SiteCombination], place: int
    ) -> dict[SiteCombination, TrainingVectors]:
        """Of the rows that it is fitted on at a position, where these are others."""
        training_rows = self.does.trained_on
        if training_rows is None:
            return {}
        spot, table, run = training_rows.cells[place], training_rows.table, training_rows.run
        rows = np.flatnonzero([bool(hits) for hits in spot.hits])
        model = self.runs.model_of(run)

        def lanes_of(points: Sequence[SitePoint]) -> BatchReader:
            return build_reader(model, table, run, points, seed=self.runs.seed, side=self.runs.side)

        vectors = self._read(wanted, spot, run, rows, lanes_of)
        keys = self.keys([spot], rows, [run], table)
        return {
            points: TrainingVectors(of.astype(np.float64), rows, keys)
            for points, of in vectors.items()
        }

    def _seen(
        self,
        cell: int,
        found: Sequence[Mapping[SiteCombination, Float32s]],
        columns: Ints,
        keys: Sequence[bytes],
        spots: Sequence[PositionCell],
    ) -> RowVectors:
        """found: per position, the vectors of joined sites."""
        points, compared = self.sites[cell], self.compared_sites[cell]
        other = found[0][compared] if compared else found[1][points] if len(found) > 1 else None
        rows = self.kept[columns]
        if compared or self.rule.rule.does.reads == "run":  # of a token with what it is elsewhere
            pairs = [(1, 0)] * len(rows)
        else:
            pairs = [_pair_sites(*(spot.hits[row] for spot in spots)) for row in rows.tolist()]
        return RowVectors(
            found[0][points].astype(np.float64),
            rows,
            keys,
            float(torch.finfo(self.runs.model.dtype).eps),
            None if other is None else other.astype(np.float64),
            None,
            self._number(cell),
            points,
            np.array(pairs, dtype=np.float64),
        )

    def _number(self, cell: int) -> int:
        """Which of several values of what it observes is asked for, from 1; 0 where it has one."""
        names = [axis.name for axis in self.plan.experiment.axes]
        axis = self.does.counts
        return int(self.plan.coordinates[names.index(axis)][cell]) + 1 if axis in names else 0

    def _gathered(
        self,
        combinations: Sequence[SiteCombination],
        position: PositionCell,
        run: PromptRun,
        columns: Ints,
    ) -> dict[SiteCombination, Float32s]:
        """[column, width] of each."""
        lanes_of = partial(self.runs.reader, run)
        return self._read(combinations, position, run, self.kept[columns], lanes_of)

    def _read(
        self,
        combinations: Sequence[SiteCombination],
        position: PositionCell,
        run: PromptRun,
        prompts: Ints,
        lanes_of: Callable[[Sequence[SitePoint]], BatchReader],
    ) -> dict[SiteCombination, Float32s]:
        """[prompt, width] of each: the mean over the tokens of the position and draws of noise, or,
        where the observation is of directions, the sum of the unit vectors."""
        points = list_distinct_points(combinations)
        model = self.runs.model_of(run)
        batches = split_prompts(model, run, points, prompts)

        def read() -> Iterator[SiteVectors]:
            for vector in read_vectors(lanes_of(points), points, [position], batches):
                yield vector
                if vector.point == 0 and run.derived is not None and len(batches) > 1:
                    self.runs.forget()  # what it is made of

        widths = [self.width(point) for point in points]
        rows = average_rows(read(), widths, prompts, of_directions=self.does.of_directions)
        means = dict(zip(points, rows, strict=True))
        return {
            combination: np.concatenate([means[point] for point in combination], axis=1)
            for combination in combinations
        }


def compute_token_cells(
    gatherer: VectorGatherer, does: TokenSetObservation
) -> Iterator[tuple[int, Ints, Callable[[], Mapping[str, Floats]]]]:
    """(cell, its columns among the kept rows, what gives [column] by the words of what is
    observed): the mean over a row's tokens there. What cells share is made once."""
    plan, rule = gatherer.plan, gatherer.rule
    words = (does.word, *does.controls, *does.findings)
    names = [axis.name for axis in plan.experiment.axes]
    value = np.zeros(plan.n_cells, dtype=np.int64)
    value = plan.coordinates[names.index(does.counts)] if does.counts in names else value
    for cells, seen in _iter_tokens(gatherer):
        values = cache(partial(does.per_token, seen, plan.experiment.seed))
        for cell in cells:
            row, index = seen.own.at(rule.positions[rule.position_of_cell[cell]])
            there, starts = np.unique(row, return_index=True)
            if len(there):
                columns = np.searchsorted(gatherer.kept, seen.own.prompts[there])
                number = int(value[cell])
                yield cell, columns, partial(_average_tokens, words, values, number, index, starts)


def _average_tokens(
    words: Sequence[str],
    values: Callable[[], Sequence[Floats]],
    number: int,
    index: Ints,
    starts: Ints,
) -> dict[str, Floats]:
    """By word [row]: of one of its values at some tokens, those of each row from `starts` on."""
    sizes = np.diff(starts, append=len(index))
    tokens = (np.add.reduceat(value[number, index], starts) / sizes for value in values())
    return dict(zip(words, tokens, strict=True))


def _iter_tokens(
    gatherer: VectorGatherer, encoding: tuple[CoordinateSystem, Tensor] | None = None
) -> Iterator[tuple[list[int], ObservedTokens]]:
    """(cells of the same sites, all tokens of these cells), of those that have any.

    Args:
        encoding: As in `read_token_vectors`. Patches of a token are then read one by one.
    """
    rule, runs, known = gatherer.rule, gatherer.runs, gatherer.known
    base = runs.named(gatherer.plan.experiment.spec.base)
    patches = _count_patches(gatherer) if encoding is not None else 1
    spot = join_positions([position.in_patches(patches) for position in rule.positions])
    rows = gatherer.kept[[bool(spot.hits[row]) for row in gatherer.kept.tolist()]]
    due = [cell for cell in range(gatherer.plan.n_cells) if cell not in known]
    size = sum(len(tokens) for row in rows.tolist() for tokens in spot.hits[row])
    for some in gatherer.fitting(due, size) if size else ():
        wanted = list(dict.fromkeys(gatherer.sites[cell] for cell in some))
        own = _read_run(gatherer, wanted, spot, base, rows, encoding)
        other: dict[SiteCombination, TokenVectors] = {}
        if rule.rule.does.reads == "run":
            read = runs.named(rule.rule.run)
            sources = join_positions([source.in_patches(patches) for source in rule.sources])
            other = _read_run(gatherer, wanted, sources, read, rows, encoding)
        training = _read_training(gatherer, wanted)
        for sites in wanted:
            cells = [cell for cell in some if gatherer.sites[cell] == sites]
            yield cells, ObservedTokens(own[sites], other.get(sites), training.get(sites))


def _count_patches(gatherer: VectorGatherer) -> int:
    """Return the number of patches of a token at a rule's sites in a vision encoder, otherwise
    1."""
    rule = gatherer.rule.rule
    return gatherer.plan.experiment.model.shape.merged_side**2 if rule.in_vision else 1


def _read_run(
    gatherer: VectorGatherer,
    wanted: Sequence[SiteCombination],
    spot: PositionCell,
    run: PromptRun,
    rows: Ints,
    encoding: tuple[CoordinateSystem, Tensor] | None,
) -> dict[SiteCombination, TokenVectors]:
    """Of each of the sites, at all tokens of a position in some rows."""
    runs = gatherer.runs
    keys = gatherer.keys([spot], rows, [run], runs.table)
    lanes = runs.reader(run, list_distinct_points(wanted))
    forget = runs.forget if run.derived is not None else None
    model = runs.model_of(run)
    return read_token_vectors(model, run, lanes, wanted, spot, rows, keys, forget, encoding)


def _read_training(
    gatherer: VectorGatherer, wanted: Sequence[SiteCombination]
) -> dict[SiteCombination, TokenVectors]:
    """The same of the rows that it is fitted on, where these are others."""
    training_rows, runs = gatherer.does.trained_on, gatherer.runs
    if training_rows is None:
        return {}
    spot, model = join_positions(training_rows.cells), runs.model_of(training_rows.run)
    rows = np.flatnonzero([bool(hits) for hits in spot.hits])
    keys = gatherer.keys([spot], rows, [training_rows.run], training_rows.table)
    points = list_distinct_points(wanted)
    lanes = build_reader(
        model, training_rows.table, training_rows.run, points, seed=runs.seed, side=runs.side
    )
    return read_token_vectors(model, training_rows.run, lanes, wanted, spot, rows, keys)


CellComputation: TypeAlias = Callable[[], Sequence[Floats]]


@dataclass(frozen=True, eq=False)
class JointObservation:
    """What was observed of all rows of an experiment."""

    kept: Ints
    """[column] the rows of the table."""
    values: list[Floats]
    """Per measure, [cell, column]; NaN where a row isn't part of the cell."""
    stored: set[int]
    """Cells that were there before the run."""

    def of(self, rows: RowTable) -> list[Floats]:
        """Per measure, [row]."""
        columns = np.searchsorted(self.kept, rows.prompt)
        return [values[rows.cell, columns] for values in self.values]


def find_joint_rule(plan: ExperimentPlan) -> tuple[RulePlan, RowSetObservation] | None:
    """The rule that observes all rows at once, if there is one."""
    for rule in plan.rules:
        if isinstance(rule.rule.does, RowSetObservation):
            return rule, rule.rule.does
    return None


def observe_jointly(
    plan: ExperimentPlan,
    runs: UnpatchedRuns,
    measured: MeasuredValues,
    systems: Mapping[str, CoordinateSystem],
    store: PanelCache | None = None,
) -> JointObservation | None:
    """What is observed of all kept rows at once; None where nothing is. Cells that it can't be made
    of are gaps of `measured`. systems: the bases of rules, by name. store: where cells are looked
    up and kept."""
    observed = find_joint_rule(plan)
    if observed is None:
        return None
    experiment = plan.experiment
    shape, run = (plan.n_cells, len(measured.kept)), experiment.spec.base
    base = [
        np.broadcast_to(expand_base_values(plan, measured, run, number), shape)
        for number in range(len(experiment.measures))
    ]
    found = [
        np.full(each.shape, np.nan) if measure.observed else each.copy()
        for measure, each in zip(experiment.measures, base, strict=True)
    ]
    looked = [values for m, values in zip(experiment.measures, found, strict=True) if m.observed]
    findings = {word: np.full(shape, np.nan) for word in observed[1].findings}
    looked += findings.values()
    kept = open_joint_cache(store, plan, observed[0], measured.kept, runs.table)
    known = {} if kept is None else kept.known()
    for cell, (there, own) in known.items():
        for values, each in zip(looked, own, strict=True):
            values[cell, there] = each
    exists = plan.exists
    done = {*known, *np.flatnonzero(~exists).tolist()}
    gatherer = VectorGatherer(plan, *observed, runs, measured.kept, done)
    for cell, there, make in _iter_cells(gatherer, measured, systems):
        if not exists[cell]:
            continue
        try:
            made = make()
        except (ValueError, ArithmeticError) as problem:
            _mark_gap(plan, measured, cell, there, str(problem))
            continue
        for values, each in zip(looked, made, strict=True):
            values[cell, there] = each
        if kept is not None:
            kept.made(cell, there, made)
    if kept is not None:
        kept.flush()
    measured.findings = {
        word: (float(np.nanmin(finding)), float(np.nanmax(finding)))
        for word, finding in findings.items()
        if not np.isnan(finding).all()
    }
    return JointObservation(measured.kept, found, set(known))


def _iter_cells(
    gatherer: VectorGatherer, measured: MeasuredValues, systems: Mapping[str, CoordinateSystem]
) -> Iterator[tuple[int, Ints, CellComputation]]:
    """(cell, its columns, what gives the values of each measure of what is observed)."""
    does, seed = gatherer.does, gatherer.plan.experiment.seed
    measures = [measure for measure in gatherer.plan.experiment.measures if measure.observed]
    if isinstance(does, WeightObservation):
        yield from _iter_weight_cells(gatherer, does, measures, measured, systems)
        return
    if isinstance(does, MapObservation):
        yield from _iter_map_cells(gatherer, does, measures)
        return
    if isinstance(does, AttentionRollout | WeightedValueNorm):
        for cell, there, flow in gatherer.flows():
            yield cell, there, partial(_flow_measures, measures, does.word, flow)
        return
    if isinstance(does, AttributionGraphs):
        for cell, there, score in gatherer.graphs(does, systems, measured):
            yield cell, there, partial(_graph_measures, measures, does, score)
        return
    if isinstance(does, FeatureActivations):
        assert does.member is not None
        system = systems.get(does.member.name)
        if system is not None:  # otherwise the experiment is lost
            yield from _iter_feature_cells(gatherer, does, measures, measured, system)
        return
    if isinstance(does, TokenSetObservation):

        def read(numbers: Callable[[], Mapping[str, Floats]]) -> list[Floats]:
            made = numbers()
            values = _evaluate_measures(measures, made)
            return [*values, *(made[word] for word in does.findings)]

        for cell, there, numbers in compute_token_cells(gatherer, does):
            yield cell, there, partial(read, numbers)
        return
    words = (does.word, *does.controls)

    def made(seen: RowVectors) -> list[Floats]:
        return _evaluate_measures(measures, dict(zip(words, does.per_row(seen, seed), strict=True)))

    for cell, there, seen in gatherer.cells():
        yield cell, there, partial(made, seen)


def _iter_weight_cells(
    gatherer: VectorGatherer,
    does: WeightObservation,
    measures: Sequence[ResolvedMeasure],
    measured: MeasuredValues,
    systems: Mapping[str, CoordinateSystem],
) -> Iterator[tuple[int, Ints, CellComputation]]:
    """The same of an observation of weights."""
    plan, every = gatherer.plan, np.arange(len(gatherer.kept))
    run = gatherer.runs.named(gatherer.rule.rule.run)
    names = [axis.name for axis in plan.experiment.axes]
    nowhere = np.zeros(plan.n_cells, int)

    def along(axis: str) -> Ints:
        return plan.coordinates[names.index(axis)] if axis in names else nowhere

    cells = WeightObserver(
        does,
        WeightMaps(gatherer.runs.model_of(run)),
        Readout.of(measures),
        gatherer.kept,
        run.name,
        [
            (*sites, *compared)
            for sites, compared in zip(gatherer.sites, gatherer.compared_sites, strict=True)
        ],
        along("value"),
        plan.items,
        (along(CIRCUIT_AXES[0]), along(CIRCUIT_AXES[1])),
        along(FEATURE_AXIS),
        systems,
    )

    def made(cell: int) -> list[Floats]:
        measured.listed[cell] = cells.listed(cell)
        if does.gives == "logits":
            return cells.read(cell)
        numbers = {word: np.array(number) for word, number in cells.numbers(cell).items()}
        return _evaluate_measures(measures, numbers)

    for cell in range(plan.n_cells):
        if cell not in gatherer.known:
            yield cell, every, partial(made, cell)


def _iter_map_cells(
    gatherer: VectorGatherer, does: MapObservation, measures: Sequence[ResolvedMeasure]
) -> Iterator[tuple[int, Ints, CellComputation]]:
    """The same of maps that other experiments made; rows without a map or a region aren't in it."""
    assert does.scores is not None
    own = {word: values[..., gatherer.kept] for word, values in does.scores.by_word.items()}
    rule = gatherer.rule
    for cell, place in enumerate(zip(rule.site_of_cell, rule.position_of_cell, strict=True)):
        numbers = {word: values[place] for word, values in own.items()}
        there = np.flatnonzero(np.isfinite(np.stack(list(numbers.values()))).all(axis=0))
        if len(there):
            numbers_there = {word: values[there] for word, values in numbers.items()}
            yield cell, there, partial(_evaluate_measures, measures, numbers_there)


def _iter_feature_cells(
    gatherer: VectorGatherer,
    does: FeatureActivations,
    measures: Sequence[ResolvedMeasure],
    measured: MeasuredValues,
    system: CoordinateSystem,
) -> Iterator[tuple[int, Ints, CellComputation]]:
    """Yield the cells of observed features, as `_iter_cells`; cells of ranks without a feature are
    left out."""
    plan, rule = gatherer.plan, gatherer.rule
    names = [axis.name for axis in plan.experiment.axes]
    ranks = plan.coordinates[names.index(FEATURE_AXIS)]
    model = gatherer.runs.model_of(gatherer.runs.named(plan.experiment.spec.base))
    wide = torch.promote_types(model.dtype, torch.float32)
    inputs = torch.empty(0, dtype=wide, device=model.device)
    for cells, seen in _iter_tokens(gatherer, (system, inputs)):
        vectors = [
            token_vectors.vectors
            for token_vectors in (seen.own, seen.other)
            if token_vectors is not None
        ]
        if not all(np.isfinite(vector).all() for vector in vectors):
            broken = partial(_refuse_cell, "its vectors have NaN or infinity")
            every = np.arange(len(gatherer.kept))
            yield from ((cell, every, broken) for cell in cells)
            continue
        observed_features = observe_features(does, system, seen.own, seen.other, inputs)
        measured.features = observed_features.findings
        features, listed = observed_features.findings.features, list[list[int]]()
        if does.unembeds and features:
            maps = WeightMaps(model)
            listed = list_raised_tokens(maps, system, seen.own, features, inputs)
        at: dict[int, tuple[Ints, Floats, Floats]] = {}
        for cell in cells:
            rank, place = int(ranks[cell]), int(rule.position_of_cell[cell])
            if rank >= len(features):
                continue
            if place not in at:
                patches = _count_patches(gatherer)
                source = rule.sources[place].in_patches(patches) if does.reads == "run" else None
                at[place] = observed_features.at(rule.positions[place].in_patches(patches), source)
            there, values, density = at[place]
            if not len(there):
                continue
            if rank < len(listed):
                measured.listed[cell] = list(map(ListedToken, listed[rank]))
            prompts = seen.own.prompts[there]
            numbers = values[:, rank], density[:, rank]
            make = partial(_feature_measures, measures, does, prompts, *numbers)
            yield cell, np.searchsorted(gatherer.kept, prompts), make


def _feature_measures(
    measures: Sequence[ResolvedMeasure],
    does: FeatureActivations,
    prompts: Ints,
    values: Floats,
    density: Floats,
) -> list[Floats]:
    if does.targets is not None:
        values = correlate(values, np.array(does.targets)[prompts])[1]
    return _evaluate_measures(measures, {does.word: values, "density": density})


def _select_target(target: ResolvedMeasure | None, run: str, row: int) -> LogitMeasure | None:
    """Return the measure of one row, as a function of its logits."""
    if target is None:
        return None
    readout, prompts = Readout.of([target]), np.array([row])

    def measure(logits: Tensor) -> Tensor:
        given = ReadoutInput(run, prompts, [None], logits[None, None], {}, None, {}, {})
        return readout.tensors(given)[0][0]

    return measure


def _score_prompts(
    prompts: Sequence[GraphPrompt],
    does: AttributionGraphs,
    drawn: tuple[int, tuple[float, float]] | None,
    measured: MeasuredValues,
) -> Floats:
    """Return the scores of the graphs of some prompts, [score, prompt].

    Args:
        drawn: The row of the first prompt, whose graph is kept, and how it is pruned; None for no
            graph.
    """
    scores: list[Sequence[float]] = []
    for number, prompt in enumerate(prompts):
        graph = attribute(prompt)
        if number == 0 and drawn is not None:
            measured.graph = _draw_graph(prompt, graph, does, drawn)
        scores.append(_score_graph(prompt, graph, does))
    return np.array(scores).T


def _draw_graph(
    prompt: GraphPrompt,
    graph: AttributionGraph,
    does: AttributionGraphs,
    drawn: tuple[int, tuple[float, float]],
) -> GraphFindings:
    supernodes = {
        supernode.name: supernode.features for supernode in does.groups.get("supernodes", ())
    }
    return list_graph(graph, prompt.ids, *drawn, supernodes)


@dataclass(frozen=True, eq=False)
class _ProbedPrompts:
    """Prompts whose graphs are the input of a probe."""

    prompts: Sequence[GraphPrompt]
    outcomes: Sequence[LogitMeasure | None]
    """The measures that are predicted; None for values of rows."""
    rows: Ints
    """[prompt] number in the table."""
    keys: Sequence[bytes]
    """[prompt] equal for equal texts."""
    seed: int


def _probe_prompts(
    probed: _ProbedPrompts,
    does: GraphProbe,
    drawn: tuple[int, tuple[float, float]] | None,
    measured: MeasuredValues,
) -> Floats:
    """Return what probes tell of the graphs of some prompts, [score, prompt]; see `_score_prompts`.

    Raises ValueError if the rows permit no fit.
    """
    weights: list[dict[LayerFeature, float]] = []
    entropies, values = list[float](), list[float]()
    if drawn is not None:
        first = probed.prompts[0]
        measured.graph = _draw_graph(first, attribute(first), does, drawn)
    for prompt, outcome in zip(probed.prompts, probed.outcomes, strict=True):
        own, logits = weigh_features(prompt)
        weights.append(own)
        entropies.append(float(torch.special.entr(logits.double().softmax(-1)).sum()))
        if outcome is not None:
            values.append(float(outcome(logits)))
    named = sorted(does.features_of("features") or frozenset[LayerFeature]().union(*weights))
    columns = [[own.get(each, 0.0) for each in named] for own in weights]
    probe_prompts = does.tell(
        np.array(columns).reshape(len(weights), len(named)),
        np.array(entropies),
        np.array(values) if values else None,
        (probed.rows, probed.keys),
        probed.seed,
    )
    return np.stack(probe_prompts)


def _score_graph(
    prompt: GraphPrompt, graph: AttributionGraph, does: AttributionGraphs
) -> Sequence[float]:
    """Return what an observation measures of a graph, in the order of its words.

    Raises ValueError if too few features are active.
    """
    if not isinstance(does, GraphAblation | GraphWeight):
        return score_graph(graph)
    if isinstance(does, GraphWeight):
        sources = graph.features.find(does.features_of("from"))
        to = graph.features.find(does.features_of("to")) if "to" in does.groups else None
        return score_weight(prompt, graph, sources, to)
    if does.groups:
        chosen = graph.features.find(does.features_of("features"))
    else:
        chosen = list_influential(graph, does.top)
        count = len(graph.features)
        if not len(chosen):
            needed = 2 * does.top
            raise ValueError(
                f"only {count} features are active in a prompt, and {needed} are needed"
            )
    return score_ablation(prompt, graph, chosen)


def _graph_measures(
    measures: Sequence[ResolvedMeasure], does: AttributionGraphs, score: Callable[[], Floats]
) -> list[Floats]:
    words = (does.word, *does.controls)
    return _evaluate_measures(measures, dict(zip(words, score(), strict=True)))


def _flow_measures(
    measures: Sequence[ResolvedMeasure], word: str, flow: Callable[[], Floats]
) -> list[Floats]:
    return _evaluate_measures(measures, {word: flow()})


def _refuse_cell(reason: str) -> Any:
    raise ValueError(reason)


def _evaluate_measures(
    measures: Sequence[ResolvedMeasure], by_name: Mapping[str, Floats]
) -> list[Floats]:
    """Per measure, [row] or one number of all, of what is observed by its words."""
    return [
        np.asarray(
            evaluate_arithmetic(
                m.expression, {a.node: by_name[a.name] for a in m.atoms}.__getitem__
            )
        )
        for m in measures
    ]


def _mark_gap(
    plan: ExperimentPlan, measured: MeasuredValues, cell: int, there: Ints, reason: str
) -> None:
    """A cell has no value of what is observed."""
    base = plan.experiment.spec.base
    first = UnusableRow(int(measured.kept[there[0]]), base, describe_cell(plan, cell))
    for number, measure in enumerate(plan.experiment.measures):
        if measure.observed:
            measured.gaps[number, cell] = CellGap(reason, first, len(there))


def _pair_sites(one: Hits, other: Hits | None = None) -> tuple[int, int]:
    """(pairs of different tokens, pairs of a token with itself) of two positions of a row, or
    within one."""
    numbers = [token for tokens in one for token in tokens]
    others = numbers if other is None else [token for tokens in other for token in tokens]
    same = sum(numbers.count(token) for token in others)
    return len(numbers) * len(others) - same, same
