"""Results of one experiment on several blocks of prompts, put side by side: cells of one block have
values in its own rows alone, so that n, intervals and p are of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.resolve.cell_key import Labels
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.measure_data import MeasureData


@dataclass(frozen=True, eq=False)
class OfBlock:
    """The result on one block, or on a part of one."""

    label: Labels
    """Of the axis of blocks."""
    block: str
    """Its name; two parts of one block may share rows."""
    result: ExperimentResult


def side_by_side(parts: Sequence[OfBlock]) -> list[tuple[Labels, ExperimentResult]]:
    """The results, each on the rows of all of them: NaN where a row isn't its own.

    Rows are numbered on from block to block, and each block's are a stratum of their own: they are
    drawn by themselves, so many of each as there are.
    """
    starts = _starts(parts)
    own = [
        [starts[part.block] + row for row in part.result.row_ids or range(part.result.prompts)]
        for part in parts
    ]
    every = list(dict.fromkeys(row for rows in own for row in rows))
    places = {row: place for place, row in enumerate(every)}
    where = [np.array([places[row] for row in rows], dtype=np.int64) for rows in own]
    results = [part.result for part in parts]
    shared = [n for n in results[0].row_values if all(n in each.row_values for each in results)]

    def joined(columns: Sequence[Sequence[Any] | None]) -> tuple[Any, ...] | None:
        """A value per row; None where not all results have them."""
        found: list[Any] = [None] * len(every)
        for index, column in zip(where, columns, strict=True):
            if not column and len(index):
                return None
            for place, value in zip(index.tolist(), column or (), strict=True):
                found[place] = value
        return tuple(found)

    said = ", ".join(f"{block} from {start}" for block, start in starts.items())
    beside: dict[str, Any] = {
        "row_ids": tuple(every),
        "row_keys": joined([each.row_keys for each in results]),
        "blocks": _blocks(where, len(every)),
        "strata": _strata(results, where, len(every)),
        "row_values": {n: joined([each.row_values[n] for each in results]) for n in shared},
        "texts": joined([each.texts for each in results]) or (),
        "seen": joined([each.seen for each in results]) or (),
    }
    found: list[tuple[Labels, ExperimentResult]] = []
    for part, index in zip(parts, where, strict=True):
        result = _on_all(part.result, index, len(every), starts[part.block])
        result = replace(result, **beside, hits=result.hits if beside["texts"] else ())
        conventions = {**result.conventions, "rows": f"numbered on: {said}"}
        found.append((part.label, replace(result, conventions=conventions)))
    return found


def _starts(parts: Sequence[OfBlock]) -> dict[str, int]:
    """The number of each block's first row."""
    sizes: dict[str, int] = {}
    for part in parts:
        result = part.result
        rows = [*(result.row_ids or range(result.prompts)), *result.left_out]
        rows += [row for own in result.accuracy_rows.values() for row in own]
        sizes[part.block] = max(sizes.get(part.block, 0), max(rows, default=-1) + 1)
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))


def _blocks(where: Sequence[Ints], size: int) -> Ints:
    """[prompt]: which results a row is in."""
    there = np.zeros((len(where), size), dtype=np.int64)
    for own, index in zip(there, where, strict=True):
        own[index] = 1
    return np.unique(there, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _strata(results: Sequence[ExperimentResult], where: Sequence[Ints], size: int) -> Ints:
    """[prompt]: which results a row is in, and its stratum in each of them."""
    codes = np.full((len(results), size), -1, dtype=np.int64)
    for own, index, result in zip(codes, where, results, strict=True):
        own[index] = 0 if result.strata is None else result.strata
    return np.unique(codes, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _on_all(result: ExperimentResult, index: Ints, size: int, start: int) -> ExperimentResult:
    """A result with its rows at their places among all, without what all have in common.

    index: [prompt] its place. start: what is added to its numbers of rows.
    """

    def padded(values: Floats) -> Floats:
        found = np.full((*values.shape[:-1], size), np.nan)
        found[..., index] = values
        return found

    of_cells: dict[int, tuple[tuple[int, ...], ...]] = {}
    for hits in result.hits:  # cells of one position share them
        if id(hits) not in of_cells:
            found: list[tuple[int, ...]] = [()] * size
            for place, tokens in zip(index.tolist(), hits, strict=True):
                found[place] = tokens
            of_cells[id(hits)] = tuple(found)
    accuracy: Mapping[str, tuple[int, ...]] = result.accuracy_rows
    return replace(
        result,
        measures=tuple(_measure(data, padded, index, size) for data in result.measures),
        drawn=None
        if result.drawn is None
        else replace(result.drawn, values=tuple(map(padded, result.drawn.values))),
        runs={
            run: {label: padded(values) for label, values in found.items()}
            for run, found in result.runs.items()
        },
        left_out={start + row: why for row, why in result.left_out.items()},
        accuracy_rows={run: tuple(start + row for row in rows) for run, rows in accuracy.items()},
        hits=tuple(of_cells[id(hits)] for hits in result.hits),
        replies=result.replies.shifted(start),
    )


def _measure(data: MeasureData, padded: Any, index: Ints, size: int) -> MeasureData:
    def of(values: Floats | None) -> Floats | None:
        return None if values is None else padded(values)

    return replace(
        data,
        patched=padded(data.patched),
        base=padded(data.base),
        source=of(data.source),
        truth=of(data.truth),
        rounding=of(data.rounding),
        seen=None if data.seen is None else _seen(data.seen, index, size),
    )


def _seen(seen: Ints, index: Ints, size: int) -> NDArray[np.int64]:
    """[1 or cell, prompt]: rows of other blocks are like no other."""
    found = np.tile(np.arange(size, dtype=np.int64) + int(seen.max(initial=0)) + 1, (len(seen), 1))
    found[:, index] = seen
    return found
