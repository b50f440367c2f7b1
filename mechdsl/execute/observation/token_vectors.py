"""Vectors at all tokens of a position, of several sites at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.vectors import BatchReader, read_vectors, split_prompts
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.observations import TokenVectors
from mechdsl.resolve.types import SitePoint

SiteCombination: TypeAlias = tuple[SitePoint, ...]
"""The sites of one cell, whose vectors are one, side by side; none where there is nothing."""


def list_distinct_points(combinations: Sequence[SiteCombination]) -> list[SitePoint]:
    """Each once."""
    return list(dict.fromkeys(point for each in combinations for point in each))


def read_token_vectors(
    model: LoadedModel,
    run: PromptRun,
    lanes: BatchReader,
    combinations: Sequence[SiteCombination],
    spot: PositionCell,
    rows: Ints,
    keys: Sequence[bytes],
    forget: Callable[[], None] | None = None,
) -> dict[SiteCombination, TokenVectors]:
    """Of each combination of sites, side by side, at all tokens of a position; of runs with noise
    the mean over draws.

    lanes: reads all these sites. spot: as `every_token` gives it. rows: in the run's table, all of
    which have the position; keys: of these. forget: drops what a batch was made of.
    """
    tokens = [spot.hits[number][0] for number in rows.tolist()]
    row = np.repeat(np.arange(len(rows)), [len(own) for own in tokens])
    token = np.concatenate([np.array(own, dtype=np.int64) for own in tokens])
    stride = 1 + int(token.max())
    place = row * stride + token
    points = list_distinct_points(combinations)
    sums: dict[SitePoint, Floats] = {}
    counts = np.zeros(len(place))
    batches = split_prompts(model, run, points, rows)
    for found in read_vectors(lanes, points, [spot], batches):
        index = np.searchsorted(place, np.searchsorted(rows, found.prompts) * stride + found.tokens)
        vectors = found.vectors.double().cpu().numpy()
        point = points[found.point]
        if point not in sums:
            sums[point] = np.zeros((len(place), vectors.shape[1]))
        np.add.at(sums[point], index, vectors)
        if found.point == 0:
            np.add.at(counts, index, 1)
            if forget is not None and len(batches) > 1:
                forget()
    means = {point: total / counts[:, None] for point, total in sums.items()}
    return {
        each: TokenVectors(
            np.concatenate([means[point] for point in each], axis=1), row, token, rows, keys
        )
        for each in combinations
    }
