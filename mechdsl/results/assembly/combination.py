"""Combinations of results: variants of an experiment, prompt sets, and means along an axis.

Cells of one prompt set have values in its own rows alone, so n, intervals and p are of these rows.
Averages and areas under curves are computed row by row, before any statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.fits.agreement import area_under_curve
from mechdsl.program.spec import PROMPTS_AXIS, SEED_AXIS
from mechdsl.resolve.cells import (
    VariantLabels,
    average_cells,
    distinguish_variants,
    join_axes,
    join_cells,
)
from mechdsl.results.assembly.sampling_units import keep_shared_views
from mechdsl.results.experiment_result import ExperimentResult, Replies, merge_replies
from mechdsl.statistics.measurements import CellStatistics, MeasureData, RandomControlValues

NumberType = TypeVar("NumberType", np.float64, np.int64)


def merge_variants(parts: Sequence[tuple[VariantLabels, ExperimentResult]]) -> ExperimentResult:
    """Combine variants: one result with all their cells, on the prompts that all of them share.

    Results of several blocks are laid out by `merge_prompt_sets`. Statistics are computed
    afterwards, over all cells.
    """
    first = parts[0][1]
    if len(parts) == 1 and not parts[0][0]:
        return first
    ids = _common_rows([result for _, result in parts])
    left_out = {row: where for _, result in parts for row, where in result.left_out.items()}
    parts = [
        (labels, _accuracy_without(_select_rows(result, ids), left_out)) for labels, result in parts
    ]
    results = [result for _, result in parts]
    axes = join_axes([(labels, result.axes) for labels, result in parts])
    several = distinguish_variants([(labels, result.model) for labels, result in parts])
    fewer = "" if ids is None or len(ids) == first.prompts else f"{len(ids)} that all results have"
    return replace(
        results[0],
        model=", ".join(dict.fromkeys(result.model for result in results)),
        axes=tuple(axes),
        aliases={name: axis for result in results for name, axis in result.aliases.items()},
        centres=tuple(dict.fromkeys(axis for result in results for axis in result.centres)),
        cells=tuple(join_cells(axes, [(labels, result.cells) for labels, result in parts])),
        measures=tuple(
            _merge_measures([result.measures[n] for result in results])
            for n in range(len(first.measures))
        ),
        runs=_merge_runs(results, several, lambda result: result.runs),
        accuracy=_merge_runs(results, several, lambda result: result.accuracy),
        accuracy_rounding=_merge_runs(results, several, lambda result: result.accuracy_rounding),
        accuracy_rows=_merge_runs(results, several, lambda result: result.accuracy_rows),
        accuracy_units=_merge_runs(results, several, lambda result: result.accuracy_units),
        base=", ".join(dict.fromkeys(result.base for result in results)),
        source=", ".join(dict.fromkeys(r.source for r in results if r.source)) or None,
        called=_merge_names(results),
        conventions={
            **_merge_conventions([(labels, result.conventions) for labels, result in parts]),
            **({"prompts": fewer} if fewer else {}),
        },
        left_out=left_out,
        population="; ".join(dict.fromkeys(r.population for r in results if r.population)),
        hashes=_merge_hashes(parts),
        drawn=_merge_drawn(results),
        replies=merge_replies([result.replies for result in results], several),
        texts=results[0].texts if len({result.texts for result in results}) == 1 else (),
        hits=tuple(hit for result in results for hit in result.hits)
        if len({result.texts for result in results}) == 1
        else (),
        seen=results[0].seen if len({result.texts for result in results}) == 1 else (),
        active=tuple(rows for result in results for rows in result.active),
        circuit=results[0].circuit
        if all(each.circuit == results[0].circuit for each in results)
        else None,
    )


def merge_finished(
    parts: Sequence[tuple[VariantLabels, ExperimentResult]],
) -> ExperimentResult:
    """Combine results that have statistics, each of which keeps its own."""
    statistics = zip(*(result.statistics for _, result in parts), strict=True)
    return replace(merge_variants(parts), statistics=tuple(map(_merge_statistics, statistics)))


def _merge_statistics(parts: Sequence[CellStatistics]) -> CellStatistics:
    first = parts[0]
    arrays = (field.name for field in fields(first) if field.type in ("Floats", "Ints", "Bools"))
    names = dict.fromkeys(name for statistics in parts for name in statistics.further)
    return replace(
        first,
        **{name: np.concatenate([getattr(each, name) for each in parts]) for name in arrays},
        reasons=tuple(reason for each in parts for reason in each.reasons),
        further={
            name: np.concatenate(
                [each.further.get(name, np.full(len(each.mean), np.nan)) for each in parts]
            )
            for name in names
        },
    )


# --- prompts -------------------------------------------------------------------------------------


def _common_rows(results: Sequence[ExperimentResult]) -> tuple[int, ...] | None:
    """Return the numbers of the prompts that all variants include, in the first one's order."""
    first = results[0].row_ids
    if first is None or all(result.row_ids == first for result in results):
        return first
    kept = set(first).intersection(*(result.row_ids or () for result in results))
    return tuple(number for number in first if number in kept)


def _select_rows(result: ExperimentResult, ids: tuple[int, ...] | None) -> ExperimentResult:
    """Restrict a result to some of its prompts."""
    if ids is None or result.row_ids is None or result.row_ids == ids:
        return result
    places = {number: n for n, number in enumerate(result.row_ids)}
    index = np.array([places[number] for number in ids], dtype=np.int64)

    def cut(values: Floats | Ints | None) -> Any:
        return None if values is None else values[:, index]

    def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in index.tolist())

    return replace(
        result,
        measures=tuple(
            _change_rows(data, cut, keep_shared_views(cut(data.seen))) for data in result.measures
        ),
        drawn=None
        if result.drawn is None
        else replace(result.drawn, values=tuple(v[:, :, index] for v in result.drawn.values)),
        runs={
            run: {label: values[index] for label, values in found.items()}
            for run, found in result.runs.items()
        },
        **_accuracy_at(
            result, index, [r for r in result.accuracy if r not in result.accuracy_rows]
        ),
        row_ids=ids,
        row_keys=None if result.row_keys is None else chosen(result.row_keys),
        strata=None if result.strata is None else result.strata[index],
        row_values={name: chosen(values) for name, values in result.row_values.items()},
        texts=chosen(result.texts) if result.texts else (),
        seen=chosen(result.seen) if result.seen else (),
        hits=tuple(chosen(hit) for hit in result.hits),
    )


def _change_rows(
    data: MeasureData, change: Callable[[Floats], Floats], seen: Ints | None
) -> MeasureData:
    """Return a measure with changed values of its rows, and with other views."""
    names = ("patched", "base", "source", "truth", "rounding")
    values = {name: getattr(data, name) for name in names}
    known = {name: change(array) for name, array in values.items() if array is not None}
    return replace(data, **known, seen=seen)


def _accuracy_without(result: ExperimentResult, rows: Collection[int]) -> ExperimentResult:
    """Remove the excluded rows from accuracies, which are otherwise over all rows."""
    for run, ids in result.accuracy_rows.items():
        index = np.flatnonzero([row not in rows for row in ids])
        result = replace(
            result,
            **_accuracy_at(result, index, [run]),
            accuracy_rows={**result.accuracy_rows, run: tuple(ids[i] for i in index.tolist())},
        )
    return result


def _accuracy_at(result: ExperimentResult, index: Ints, runs: Sequence[str]) -> dict[str, Any]:
    """Restrict the accuracies of these runs to some of their rows."""
    accuracies: dict[str, Any] = {}
    for name in ("accuracy", "accuracy_rounding", "accuracy_units"):
        own: Mapping[str, Any] = getattr(result, name)
        accuracies[name] = {run: each[index] if run in runs else each for run, each in own.items()}
    return accuracies


# --- values ---------------------------------------------------------------------------------------


def _merge_measures(parts: Sequence[MeasureData]) -> MeasureData:
    """Combine one measure over the cells of all variants."""
    cells = [len(data.patched) for data in parts]
    gaps = [data.gaps or ("",) * len(data.patched) for data in parts]
    sources = [data.source for data in parts]
    truths = [data.truth for data in parts]
    roundings = [data.rounding for data in parts]
    seen = [data.seen for data in parts]
    same = [np.arange(len(p.patched)) if p.same is None else p.same for p in parts]
    starts = np.cumsum([0, *(int(each.max(initial=-1)) + 1 for each in same)])
    if any(s is not None for s in seen):
        prompts = parts[0].patched.shape[1]
        seen = [np.arange(prompts)[None] if s is None else s for s in seen]
    return replace(
        parts[0],
        patched=np.concatenate([data.patched for data in parts]),
        base=_merge_arrays([data.base for data in parts], cells),
        source=None if any(s is None for s in sources) else _merge_arrays(sources, cells),
        truth=None if any(t is None for t in truths) else _merge_arrays(truths, cells),
        inert=np.concatenate([data.inert for data in parts]),
        rounding=None if any(r is None for r in roundings) else _merge_arrays(roundings, cells),
        gaps=tuple(gap for names in gaps for gap in names),
        seen=None if all(s is None for s in seen) else _merge_arrays(seen, cells),
        same=np.concatenate([each + start for each, start in zip(same, starts, strict=False)]),
    )


def _merge_arrays(
    values: Sequence[NDArray[NumberType] | None], cells: Sequence[int]
) -> NDArray[NumberType]:
    """Combine arrays [1 or cell, prompt] of variants; one row if all have the same single row."""
    present = [value for value in values if value is not None]
    if all(len(v) == 1 and np.array_equal(v, present[0], equal_nan=True) for v in present):
        return present[0]
    rows = [np.broadcast_to(v, (n, v.shape[1])) for v, n in zip(present, cells, strict=True)]
    return np.concatenate(rows)


def _merge_runs(
    results: Sequence[ExperimentResult],
    several: Sequence[str],
    of: Callable[[ExperimentResult], Mapping[str, Any]],
) -> dict[str, Any]:
    """Combine the unpatched runs of all variants; with several blocks or models, their names
    include the variant."""
    return {
        f"{run} ({which})" if which else run: values
        for result, which in zip(results, several, strict=True)
        for run, values in of(result).items()
    }


def _merge_names(results: Sequence[ExperimentResult]) -> dict[str, str]:
    """Return the display names that all variants share."""
    names = {run for result in results for run in (result.base, result.source) if run}
    every = {run: {result.shown(run) for result in results} for run in names}
    return {run: next(iter(found)) for run, found in every.items() if len(found) == 1}


def _merge_drawn(results: Sequence[ExperimentResult]) -> RandomControlValues | None:
    """Combine the draws of all variants, padded to the largest number."""
    known = [result.drawn for result in results if result.drawn is not None]
    if len(known) < len(results):
        return None
    most = max(
        len(values) for random_control_values in known for values in random_control_values.values
    )

    def filled(values: Floats) -> Floats:
        missing = np.full((most - len(values), *values.shape[1:]), np.nan)
        return np.concatenate([values, missing])

    return replace(
        known[0],
        values=tuple(
            np.concatenate([filled(values) for values in of_all], axis=1)
            for of_all in zip(
                *(random_control_values.values for random_control_values in known), strict=True
            )
        ),
        counts=np.concatenate([random_control_values.counts for random_control_values in known]),
    )


# --- texts ----------------------------------------------------------------------------------------


def _merge_conventions(parts: Sequence[tuple[VariantLabels, Mapping[str, str]]]) -> dict[str, str]:
    """Combine conventions: once if all variants share one, otherwise with the names of variants."""
    conventions: dict[str, str] = {}
    for key in dict.fromkeys(key for _, said in parts for key in said):
        texts = [said.get(key) for _, said in parts]
        if all(text == texts[0] for text in texts):
            conventions[key] = texts[0] or ""
            continue
        whose = _variant_names([labels for labels, _ in parts], texts)
        by_text: dict[str, dict[str, None]] = {}
        for name, text in zip(whose, texts, strict=True):
            if text is not None:
                by_text.setdefault(text, {})[name] = None
        conventions[key] = "; ".join(
            f"{', '.join(names)}: {text}" for text, names in by_text.items()
        )
    return conventions


def _variant_names(labels: Sequence[VariantLabels], texts: Sequence[str | None]) -> list[str]:
    """Return names that distinguish the differing variants: one axis's label if it suffices."""
    for axis in range(len(labels[0])):
        names = [str(each[axis][1]) for each in labels]
        if len(set(zip(names, texts, strict=True))) == len(set(names)):
            word = f"{SEED_AXIS} " if labels[0][axis][0] == SEED_AXIS else ""
            return [f"{word}{name}" for name in names]
    return [", ".join(f"{axis} {label}" for axis, label in each) for each in labels]


def _merge_hashes(parts: Sequence[tuple[VariantLabels, ExperimentResult]]) -> dict[str, str]:
    """Combine hashes by name; with several blocks or models, names include the variant."""
    hashes: dict[str, str] = {}
    for labels, result in parts:
        for key, value in result.hashes.items():
            same = all(other.hashes.get(key) == value for _, other in parts)
            of_block = key.startswith("data") and PROMPTS_AXIS in dict(labels)
            whose = dict(labels)[PROMPTS_AXIS] if of_block else result.model
            hashes[key if same else f"{key} of {whose}"] = value
    return hashes


@dataclass(frozen=True, eq=False)
class PromptSetResult:
    """The result on one block or a part of one."""

    label: VariantLabels
    """Label on the axis of blocks."""
    block: str
    """Name of the block; two parts of one block may share rows."""
    result: ExperimentResult


def merge_prompt_sets(
    parts: Sequence[PromptSetResult],
) -> list[tuple[VariantLabels, ExperimentResult]]:
    """Extend each result to the rows of all of them, with NaN in other results' rows.

    Rows are numbered consecutively over the blocks. Each block's rows are a separate stratum: they
    are resampled separately, with a fixed number per block.
    """
    starts = _first_rows(parts)
    own = [
        [starts[part.block] + row for row in part.result.row_ids or range(part.result.prompts)]
        for part in parts
    ]
    every = list(dict.fromkeys(row for rows in own for row in rows))
    places = {row: place for place, row in enumerate(every)}
    where = [np.array([places[row] for row in rows], dtype=np.int64) for rows in own]
    results = [part.result for part in parts]
    shared = [
        n
        for n in results[0].row_values
        if all(n in experiment_result.row_values for experiment_result in results)
    ]

    def joined(columns: Sequence[Sequence[Any] | None]) -> tuple[Any, ...] | None:
        """Join a value per row; None if some results have none."""
        cells: list[Any] = [None] * len(every)
        for index, column in zip(where, columns, strict=True):
            if not column and len(index):
                return None
            for place, value in zip(index.tolist(), column or (), strict=True):
                cells[place] = value
        return tuple(cells)

    said = ", ".join(f"{block} from {start}" for block, start in starts.items())
    common: dict[str, Any] = {
        "row_ids": tuple(every),
        "row_keys": joined([experiment_result.row_keys for experiment_result in results]),
        "blocks": _result_of_rows(where, len(every)),
        "strata": _strata_of_rows(results, where, len(every)),
        "row_values": {
            n: joined([experiment_result.row_values[n] for experiment_result in results])
            for n in shared
        },
        "texts": joined([experiment_result.texts for experiment_result in results]) or (),
        "seen": joined([experiment_result.seen for experiment_result in results]) or (),
    }
    prompt_sets: list[tuple[VariantLabels, ExperimentResult]] = []
    for part, index in zip(parts, where, strict=True):
        result = _pad_result(part.result, index, len(every), starts[part.block])
        result = replace(result, **common, hits=result.hits if common["texts"] else ())
        conventions = {**result.conventions, "rows": f"numbered consecutively: {said}"}
        prompt_sets.append((part.label, replace(result, conventions=conventions)))
    return prompt_sets


def _first_rows(parts: Sequence[PromptSetResult]) -> dict[str, int]:
    """Return the number of each block's first row."""
    sizes: dict[str, int] = {}
    for part in parts:
        result = part.result
        rows = [*(result.row_ids or range(result.prompts)), *result.left_out]
        rows += [row for accuracy_row in result.accuracy_rows.values() for row in accuracy_row]
        sizes[part.block] = max(sizes.get(part.block, 0), max(rows, default=-1) + 1)
    return dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))


def _result_of_rows(where: Sequence[Ints], size: int) -> Ints:
    """Return a code of the results that contain each row. Shape [prompt]."""
    there = np.zeros((len(where), size), dtype=np.int64)
    for numbers, index in zip(there, where, strict=True):
        numbers[index] = 1
    return np.unique(there, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _strata_of_rows(results: Sequence[ExperimentResult], where: Sequence[Ints], size: int) -> Ints:
    """Return a code of each row's results and of its stratum in them. Shape [prompt]."""
    codes = np.full((len(results), size), -1, dtype=np.int64)
    for code, index, result in zip(codes, where, results, strict=True):
        code[index] = 0 if result.strata is None else result.strata
    return np.unique(codes, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _pad_result(result: ExperimentResult, index: Ints, size: int, start: int) -> ExperimentResult:
    """Move a result's rows to their indices among all rows; shared fields are omitted.

    Args:
        index: New index of each row, shape [prompt].
        start: Offset of its row numbers.
    """

    def padded(values: Floats) -> Floats:
        wide = np.full((*values.shape[:-1], size), np.nan)
        wide[..., index] = values
        return wide

    of_cells: dict[int, tuple[tuple[int, ...], ...]] = {}
    for hits in result.hits:  # cells of one position share their hits
        if id(hits) not in of_cells:
            coordinates: list[tuple[int, ...]] = [()] * size
            for place, tokens in zip(index.tolist(), hits, strict=True):
                coordinates[place] = tokens
            of_cells[id(hits)] = tuple(coordinates)
    accuracy: Mapping[str, tuple[int, ...]] = result.accuracy_rows
    return replace(
        result,
        measures=tuple(
            _change_rows(data, padded, _pad_views(data.seen, index, size))
            for data in result.measures
        ),
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
        active=tuple(
            tuple(replace(row, row=start + row.row) for row in rows) for rows in result.active
        ),
    )


def _pad_views(seen: Ints | None, index: Ints, size: int) -> Ints | None:
    """Pad codes of shape [1 or cell, prompt]; every row of another block gets a unique code."""
    if seen is None:
        return None
    views = np.tile(np.arange(size, dtype=np.int64) + int(seen.max(initial=0)) + 1, (len(seen), 1))
    views[:, index] = seen
    return views


CellGroups = Sequence[Sequence[int]]
"""The cells that each cell of the result averages. Shape [cell of the result]."""


@dataclass(frozen=True)
class CellAverages:
    """Cells of a result that each combine several cells."""

    groups: CellGroups
    numbers: Sequence[Callable[[Floats, Bools], Floats]]
    """Per group, the function of its cells' values and their presence, each [cell, prompt], that
    returns [prompt]."""

    def of(self, values: Floats, there: Bools) -> Floats:
        """Combine values. Shape [cell of the result, prompt]."""
        pairs = zip(map(list, self.groups), self.numbers, strict=True)
        return np.stack([number(values[group], there[group]) for group, number in pairs])


def average_over_axis(
    result: ExperimentResult, axis: str, *, area: bool = False
) -> ExperimentResult:
    """Average a result along an axis instead of keeping its cells.

    Each row is averaged over the cells that it is part of, equally for the patched run and the runs
    it is compared with.

    Args:
        area: Compute the area under the curve of each row that is part of all cells.
    """
    axis = result.aliases.get(axis, axis)
    cells, groups = average_cells(result.cells, axis)
    sizes = sorted({len(group) for group in groups})
    count = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    said = f"over {axis}, per row, of {count} cells"
    numbers: list[Callable[[Floats, Bools], Floats]] = [_row_means] * len(groups)
    if area:
        places = [[float(result.cells[n].coords[axis]) for n in group] for group in groups]
        numbers = [partial(_row_areas, np.array(each)) for each in places]
        said += ", by the trapezoidal rule, divided by the range"
    joined = CellAverages(groups, numbers)
    return replace(
        result,
        axes=tuple(name for name in result.axes if name != axis),
        aliases={name: of for name, of in result.aliases.items() if of != axis},
        centres=tuple(name for name in result.centres if name != axis),
        cells=tuple(cells),
        measures=tuple(_average_measure(data, joined) for data in result.measures),
        conventions={**result.conventions, "auc" if area else "mean": said},
        drawn=None if result.drawn is None else _average_drawn(result.drawn, joined),
        texts=(),
        hits=(),
        seen=(),
        active=(),
        replies=Replies(),
    )


def _average_measure(data: MeasureData, joined: CellAverages) -> MeasureData:
    there, groups = ~np.isnan(data.patched), joined.groups

    def joint(values: Floats) -> Floats:
        return joined.of(np.broadcast_to(values, there.shape), there)

    gaps = data.gaps or ("",) * len(data.patched)
    return replace(
        data,
        patched=joint(data.patched),
        base=joint(data.base),
        source=None if data.source is None else joint(data.source),
        truth=None if data.truth is None else joint(data.truth),
        rounding=None if data.rounding is None else joint(data.rounding),
        inert=np.array([data.inert[list(group)].all() for group in groups]),
        gaps=tuple(next((gaps[n] for n in group if gaps[n]), "") for group in groups),
        seen=None if data.seen is None else _average_views(data.seen, groups),
        same=None if data.same is None else _average_codes(data.same, groups),
    )


def _average_codes(same: Ints, groups: Sequence[Sequence[int]]) -> Ints:
    """Return the codes of averages: equal if those of their cells are. Shape [group]."""
    numbers: dict[tuple[int, ...], int] = {}
    own = (tuple(same[list(group)].tolist()) for group in groups)
    return np.array([numbers.setdefault(each, len(numbers)) for each in own], dtype=np.int64)


def _row_means(values: Floats, there: Bools) -> Floats:
    """Return the mean of each row, NaN for a row without cells. Shape [prompt]."""
    count = there.sum(0)
    total = np.where(there, values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _row_areas(at: Floats, values: Floats, there: Bools) -> Floats:
    """Return the area of each row, NaN for a row that isn't part of all cells. Shape [prompt].

    Args:
        at: Coordinates of the cells, in any order, shape [cell].
    """
    order = np.argsort(at)
    whole = np.where(there.all(0), values, np.nan)
    return area_under_curve(whole[order].T, at[order])


def _average_views(seen: Ints, groups: CellGroups) -> Ints:
    """Return codes of shape [cell, prompt] that are equal for rows that are equal in every cell."""
    if len(seen) == 1:
        return seen
    codes = [np.unique(seen[list(group)], axis=1, return_inverse=True)[1] for group in groups]
    return np.stack([code.reshape(-1) for code in codes]).astype(np.int64)


def _average_drawn(drawn: RandomControlValues, joined: CellAverages) -> RandomControlValues:
    """Average values of random targets: draw k is averaged over all cells."""
    counts = np.array([drawn.counts[list(group)].min() for group in joined.groups])

    def joint(values: Floats) -> Floats:
        pairs = zip(values, ~np.isnan(values), strict=True)
        stacked = np.stack([joined.of(one, there) for one, there in pairs])
        beyond = np.arange(len(values))[:, None] >= counts[None, :]
        stacked[beyond] = np.nan
        return stacked

    return replace(drawn, values=tuple(map(joint, drawn.values)), counts=counts)
