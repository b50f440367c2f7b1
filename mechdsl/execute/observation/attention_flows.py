"""Flows of attention between the tokens of a prompt: rollout, and norms of weighted values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.observation.token_vectors import SiteCombination
from mechdsl.execute.vectors import BatchReader, read_vectors, split_prompts
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.weight_maps import WeightMaps
from mechdsl.models.shape import unit_count
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.types import SitePoint
from mechdsl.rules.observations.attention import list_value_points

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
        for found in read_vectors(self.lanes, self.points, [self.everywhere], [batch]):
            for prompt in batch.tolist():
                for draw in range(int(found.draws.max(initial=0)) + 1):
                    own = np.flatnonzero((found.prompts == prompt) & (found.draws == draw))
                    order = own[np.argsort(found.tokens[own])]
                    yield self.points[found.point], prompt, draw, found.vectors[order]


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
            own = [each for (row, _), each in mixed.items() if row == prompt]
            yield prompt, {points: np.mean(own, 0)}


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
    layers = sorted({point.layer or 0 for each in combinations for point in each})
    reader = reader_of(list_value_points(layers))
    model, maps = reader.model, WeightMaps(reader.model)
    wanted = {
        layer: {
            each: sorted(_list_heads(each, layer, unit_count(model.shape, "pattern", layer)))
            for each in combinations
            if any(point.layer == layer for point in each)
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
            yield prompt, {each: np.mean(norms[prompt, each], 0) for each in combinations}


def _list_heads(combination: SiteCombination, layer: int, count: int) -> Collection[int]:
    own = [point.unit for point in combination if point.layer == layer]
    return range(count) if None in own else {unit for unit in own if unit is not None}


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
        found = np.zeros((size, size))
        patterns, output = self.patterns[:, heads], self.output[heads]
        for first in range(0, size, KEYS_AT_A_TIME):
            keys = slice(first, first + KEYS_AT_A_TIME)
            moved = torch.einsum("khd,hdm->khm", self.values[keys][:, heads], output).double()
            products = torch.einsum("khm,kgm->khg", moved, moved)
            weights = patterns[..., keys]
            squares = torch.einsum("qhk,khg,qgk->qk", weights, products, weights)
            found[:, keys] = self.scale * squares.clamp_min(0).sqrt().cpu().numpy()
        return found


def average_flow(flow: Floats, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Return what some tokens have of others: summed over keys, averaged over queries.

    Args:
        flow: [query token, key token]
    """
    return float(flow[np.ix_(queries, keys)].sum(1).mean())
