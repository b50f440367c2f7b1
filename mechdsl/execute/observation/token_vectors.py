"""Vectors of rows at a position: at its tokens, means over them, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.hashing import digest
from mechdsl.dictionaries.features import Dictionary
from mechdsl.execute.vectors import BatchReader, SiteVectors, read_vectors, split_prompts
from mechdsl.fits.regression import group_keys
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.observations import TokenVectors
from mechdsl.resolve.types import SitePoint

Float32s: TypeAlias = NDArray[np.float32]

SiteCombination: TypeAlias = tuple[SitePoint, ...]
"""The sites of one cell, whose vectors are one, side by side; none where there is nothing."""


def list_distinct_points(combinations: Sequence[SiteCombination]) -> list[SitePoint]:
    """Each once."""
    return list(dict.fromkeys(point for combination in combinations for point in combination))


def read_token_vectors(
    model: LoadedModel,
    run: PromptRun,
    lanes: BatchReader,
    combinations: Sequence[SiteCombination],
    spot: PositionCell,
    rows: Ints,
    keys: Sequence[bytes],
    forget: Callable[[], None] | None = None,
    encoding: tuple[CoordinateSystem, Tensor] | None = None,
) -> dict[SiteCombination, TokenVectors]:
    """Of each combination of sites, side by side, at all tokens of a position; of runs with noise
    the mean over draws.

    lanes: reads all these sites. spot: as `every_token` gives it. rows: in the run's table, all of
    which have the position; keys: of these. forget: drops what a batch was made of. encoding: the
    basis that will encode the vectors, and an empty tensor of its precision and device; if it reads
    context, the vectors are what the preceding tokens don't predict.
    """
    if encoding is not None and isinstance(encoding[0], Dictionary) and encoding[0].reads_context:
        given = model, run, lanes, combinations, _extend_to_preceding(spot), rows, keys, forget
        every = read_token_vectors(*given)
        return {
            site_points: _remove_predicted(*encoding, token_vectors, spot)
            for site_points, token_vectors in every.items()
        }
    tokens = [spot.hits[number][0] for number in rows.tolist()]
    row = np.repeat(np.arange(len(rows)), [len(own) for own in tokens])
    token = np.concatenate([np.array(own, dtype=np.int64) for own in tokens])
    stride = 1 + int(token.max())
    place = row * stride + token
    points = list_distinct_points(combinations)
    sums: dict[SitePoint, Floats] = {}
    counts = np.zeros(len(place))
    batches = split_prompts(model, run, points, rows)
    for vector in read_vectors(lanes, points, [spot], batches):
        index = np.searchsorted(
            place, np.searchsorted(rows, vector.prompts) * stride + vector.tokens
        )
        vectors = vector.vectors.double().cpu().numpy()
        point = points[vector.point]
        if point not in sums:
            sums[point] = np.zeros((len(place), vectors.shape[1]))
        np.add.at(sums[point], index, vectors)
        if vector.point == 0:
            np.add.at(counts, index, 1)
            if forget is not None and len(batches) > 1:
                forget()
    means = {point: total / counts[:, None] for point, total in sums.items()}
    return {
        combination: TokenVectors(
            np.concatenate([means[point] for point in combination], axis=1), row, token, rows, keys
        )
        for combination in combinations
    }


def _extend_to_preceding(spot: PositionCell) -> PositionCell:
    """Return a position of all tokens up to the last one of another position."""
    last = (max((token for numbers in row for token in numbers), default=-1) for row in spot.hits)
    return replace(spot, hits=tuple((tuple(range(n + 1)),) if n >= 0 else () for n in last))


@torch.no_grad()
def _remove_predicted(
    system: CoordinateSystem, inputs: Tensor, every: TokenVectors, spot: PositionCell
) -> TokenVectors:
    """Return what the preceding tokens don't predict of the vectors at a position.

    Args:
        system: A basis that reads context.
        inputs: An empty tensor of the precision and device of the vectors that are encoded.
        every: Vectors at all tokens up to the last one of the position.
        spot: The position.
    """
    assert isinstance(system, Dictionary)
    ends = np.searchsorted(every.row, np.arange(len(every.prompts)), side="right")[:-1]
    rows = torch.from_numpy(every.vectors).to(inputs).tensor_split(torch.from_numpy(ends))
    novel = torch.cat([system.remove_predicted(row) for row in rows]).double().cpu().numpy()
    row, index = every.at(spot)
    predicted = every.vectors[index] * system.file.scale - novel[index]
    return TokenVectors(
        novel[index], row, every.tokens[index], every.prompts, every.keys, predicted
    )


def digest_inputs(
    spots: Sequence[PositionCell],
    prompts: Ints,
    runs: Sequence[PromptRun],
    table: PromptTable,
    causal: Sequence[bool],
    *,
    in_vision: bool = False,
    by_image: bool = False,
) -> list[bytes]:
    """[row] a digest of all that its vectors at some positions depend on, each in a given run.

    Tiles of one image share a digest, so that no fit to some of them is evaluated on others.

    Args:
        causal: For each position, whether its vectors don't depend on later tokens.
        in_vision: Whether the vectors are those of patches in the vision encoder of prompts, which
            don't depend on the text.
        by_image: Whether prompts that share an image there share a digest, as tiles do.
    """

    def seen(run: PromptRun, row: int) -> list[object]:
        numbers = [number for number, prompt_run in enumerate(runs) if prompt_run is run]
        ids, hits = run.rows[row].ids, [spots[number].hits[row] for number in numbers]
        if in_vision and not by_image:
            read = [list(chain.from_iterable(spots[n].parts(row, ids))) for n in numbers]
            return [read, None if run.derived is None else table.row_keys[row]]
        tokens = (spots[number].tokens(row) for number in numbers)
        last = max(token for each in tokens for joined in each for token in joined)
        # Of noise, and of rules (`run NAME { … }`), a row's whole content matters.
        alone = run.noise is None and run.derived is None
        drawn = None if alone else table.row_keys[row]
        return [ids[: last + 1] if causal[numbers[0]] else ids, hits, drawn]

    distinct = list({id(run): run for run in runs}.values())
    digests = [
        digest(*(part for run in distinct for part in seen(run, row))) for row in prompts.tolist()
    ]
    if table.cut_from:
        return group_keys(digests, [(table.cut_from[row],) for row in prompts.tolist()])
    if not by_image or not in_vision:
        return digests
    runs_of = list(zip(runs, spots, strict=True))
    images = [
        {name for run, spot in runs_of for name in run.rows[row].images_at(spot.tokens(row))}
        for row in prompts.tolist()
    ]
    return group_keys(digests, images)


def average_rows(
    batches: Iterable[SiteVectors],
    widths: Sequence[int],
    prompts: Ints,
    *,
    of_directions: bool = False,
) -> list[Float32s]:
    """[prompt, width] of each site: the mean over the tokens of one position and draws of noise,
    or, with `of_directions`, the sum of the unit vectors of tokens, each of the mean over its
    patches in a vision encoder.

    Args:
        prompts: Rows, ascending.
    """
    sums = [np.zeros((len(prompts), width)) for width in widths]
    counts = [np.zeros(len(prompts)) for _ in widths]
    for read in batches:
        row = np.searchsorted(prompts, read.prompts)
        vectors = read.vectors.double().cpu().numpy()
        if of_directions:
            row = row[:: read.patches]
            vectors = vectors.reshape(len(row), read.patches, vectors.shape[1]).mean(1)
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.add.at(sums[read.point], row, vectors)
        np.add.at(counts[read.point], row, 1)
    over = [np.ones_like(count) if of_directions else count for count in counts]
    return [(sums[n] / each[:, None]).astype(np.float32) for n, each in enumerate(over)]
