"""Vectors of many rows, a batch at a time: what is saved, fitted and compared is read here.

Nothing is gathered: a caller that needs all rows at once keeps what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.options import PaddingSide
from mechdsl.execute.unpatched_batch import UnpatchedBatch, UnpatchedRequest, compute_unpatched
from mechdsl.hooks.batch import together_on_device
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.models.shape import ModelShape
from mechdsl.plan.columns import Hits
from mechdsl.plan.plan import PROMPT_TOKENS
from mechdsl.plan.read_batches import read_batches
from mechdsl.prompts.prompt_table import PositionCell, PromptTable, Run
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.vocab.sites import stop_layer

LanesOf: TypeAlias = Callable[[Ints], UnpatchedBatch]
"""Prompts → one run on these, with the sites that are wanted."""


@dataclass(frozen=True, eq=False)
class FoundVectors:
    """The vectors of one site at one position, in the rows of a batch."""

    batch: int
    """Number of the batch."""
    point: int
    """Index of the site among those that were asked for."""
    position: int
    """Index of the position."""
    prompts: Ints
    """[K] number of the row, ascending; a position of several tokens has several vectors a row."""
    draws: Ints
    """[K] draw of noise; 0 where a run has none."""
    tokens: Ints
    """[K] token position in the unpadded prompt."""
    vectors: Tensor
    """[K, width] on the model's device and in its type. All units of a site are side by side where
    the point names none. Over keys as wide as the longest prompt of the batch."""


def read_vectors(
    lanes: LanesOf,
    points: Sequence[SitePoint],
    positions: Sequence[PositionCell],
    batches: Iterable[Ints],
) -> Iterator[FoundVectors]:
    """The vectors of each site at each position, batch after batch of prompts.

    lanes: a run, as `reader` or `UnpatchedRuns.reader` gives it. positions: of that run. Rows that
    lack a position have no vectors there.
    """
    hits = [Hits.of([cell]) for cell in positions]
    for count, batch in enumerate(batches):
        found = lanes(batch)
        for number, hit in enumerate(hits):
            index, run = hit.runs.expand(batch)
            which, token = hit.tokens.expand(run)
            prompts = batch[index[which]]
            row = np.repeat(prompts, found.draws)
            token = np.repeat(token, found.draws)
            draw = np.tile(np.arange(found.draws), len(prompts))
            lane = torch.from_numpy(found.lane(row, draw))
            for place, point in enumerate(points):
                yield FoundVectors(
                    count, place, number, row, draw, token, _at(found, point, lane, token)
                )


def _at(found: UnpatchedBatch, point: SitePoint, lane: Tensor, token: Ints) -> Tensor:
    """[K, width] of one site in these lanes at these tokens."""
    read = found.reads[SiteRead(point.site, point.layer)]
    index = lane, found.batch.columns(lane, torch.from_numpy(token))
    vectors = read[together_on_device(index, read.device)]
    return vectors.flatten(1) if point.unit is None else vectors[:, point.unit]


def reader(
    model: LoadedModel,
    table: PromptTable,
    run: Run,
    points: Iterable[SitePoint],
    *,
    seed: int,
    side: PaddingSide | None = None,
) -> LanesOf:
    """What reads these sites of any run that has no rules, and stops above the highest one.

    seed: of noise. side: as in `Options`.
    """
    request = wanted(points, model.shape)

    def lanes(prompts: Ints) -> UnpatchedBatch:
        due = [(run, request)]
        return compute_unpatched(model, due, prompts, table.row_keys, seed=seed, side=side)[0]

    return lanes


def wanted(points: Iterable[SitePoint], shape: ModelShape) -> UnpatchedRequest:
    """That these sites are read, and nothing above them."""
    places = frozenset((point.site, point.layer) for point in points)
    stops = [stop_layer(*place, shape.n_layers) for place in places]
    stop = None if None in stops else max((n for n in stops if n is not None), default=0)
    return UnpatchedRequest(reads=places, stop=stop)


def prompt_batches(
    model: LoadedModel,
    run: Run,
    points: Iterable[SitePoint],
    prompts: Ints | None = None,
    tokens: int = PROMPT_TOKENS,
) -> list[Ints]:
    """Prompts, all by default, as many at a time as there is room for what is read of them."""
    return read_batches(model.shape, model.dtype.itemsize, run, points, prompts, tokens)
