"""The vectors of all tokens of some rows, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.gathering import Joined, points_of
from mechdsl.execute.read_vectors import LanesOf, prompt_batches, read_vectors
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.prompts.prompt_table import PositionCell, Run
from mechdsl.resolve.over_rows import TokenVectors
from mechdsl.resolve.resolved_rule import SitePoint


def token_vectors(
    model: LoadedModel,
    run: Run,
    lanes: LanesOf,
    combinations: Sequence[Joined],
    spot: PositionCell,
    rows: Ints,
    keys: Sequence[bytes],
    forget: Callable[[], None] | None = None,
) -> dict[Joined, TokenVectors]:
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
    points = points_of(combinations)
    sums: dict[SitePoint, Floats] = {}
    counts = np.zeros(len(place))
    batches = prompt_batches(model, run, points, rows)
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
