"""Results of one experiment on several models, sources or bases, put together as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.resolve.cell_key import Labels, joined_axes, joined_cells, told_apart
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.replies import beside
from mechdsl.results.seen_rows import shared_rows
from mechdsl.statistics.measure_data import DrawnValues, MeasureData

A = TypeVar("A", np.float64, np.int64)


def merged(parts: Sequence[tuple[Labels, ExperimentResult]]) -> ExperimentResult:
    """One result with the cells of all variants, on the prompts that all of them have; of several
    blocks, as `side_by_side` lays them out.

    Statistics come afterwards, over all cells.
    """
    first = parts[0][1]
    if len(parts) == 1 and not parts[0][0]:
        return first
    ids = _common([result for _, result in parts])
    left_out = {row: where for _, result in parts for row, where in result.left_out.items()}
    parts = [
        (labels, _accuracy_without(_on_rows(result, ids), left_out)) for labels, result in parts
    ]
    results = [result for _, result in parts]
    axes = joined_axes([(labels, result.axes) for labels, result in parts])
    several = told_apart([(labels, result.model) for labels, result in parts])
    fewer = "" if ids is None or len(ids) == first.prompts else f"{len(ids)} that all have"
    return replace(
        results[0],
        model=", ".join(dict.fromkeys(result.model for result in results)),
        axes=tuple(axes),
        aliases={name: axis for result in results for name, axis in result.aliases.items()},
        centres=tuple(dict.fromkeys(axis for result in results for axis in result.centres)),
        cells=tuple(joined_cells(axes, [(labels, result.cells) for labels, result in parts])),
        measures=tuple(
            _measure([result.measures[n] for result in results]) for n in range(len(first.measures))
        ),
        runs=_by_run(results, several, lambda result: result.runs),
        accuracy=_by_run(results, several, lambda result: result.accuracy),
        accuracy_rounding=_by_run(results, several, lambda result: result.accuracy_rounding),
        accuracy_rows=_by_run(results, several, lambda result: result.accuracy_rows),
        accuracy_units=_by_run(results, several, lambda result: result.accuracy_units),
        base=", ".join(dict.fromkeys(result.base for result in results)),
        source=", ".join(dict.fromkeys(r.source for r in results if r.source)) or None,
        called=_called(results),
        conventions={
            **_said([(labels, result.conventions) for labels, result in parts]),
            **({"prompts": fewer} if fewer else {}),
        },
        left_out=left_out,
        population="; ".join(dict.fromkeys(r.population for r in results if r.population)),
        hashes=_hashes(parts),
        drawn=_drawn(results),
        replies=beside([result.replies for result in results], several),
        texts=results[0].texts if len({result.texts for result in results}) == 1 else (),
        hits=tuple(hit for result in results for hit in result.hits)
        if len({result.texts for result in results}) == 1
        else (),
        seen=results[0].seen if len({result.texts for result in results}) == 1 else (),
    )


# --- prompts -------------------------------------------------------------------------------------


def _common(results: Sequence[ExperimentResult]) -> tuple[int, ...] | None:
    """The numbers of the prompts that all variants have kept, in the order of the first."""
    first = results[0].row_ids
    if first is None or all(result.row_ids == first for result in results):
        return first
    kept = set(first).intersection(*(result.row_ids or () for result in results))
    return tuple(number for number in first if number in kept)


def _on_rows(result: ExperimentResult, ids: tuple[int, ...] | None) -> ExperimentResult:
    """The result on some of its prompts."""
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
            replace(
                data,
                patched=cut(data.patched),
                base=cut(data.base),
                source=cut(data.source),
                truth=cut(data.truth),
                rounding=cut(data.rounding),
                seen=shared_rows(cut(data.seen)),
            )
            for data in result.measures
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


def _accuracy_without(result: ExperimentResult, rows: Collection[int]) -> ExperimentResult:
    """Accuracies are of all rows, but for those that are left out of everything."""
    for run, ids in result.accuracy_rows.items():
        index = np.flatnonzero([row not in rows for row in ids])
        result = replace(
            result,
            **_accuracy_at(result, index, [run]),
            accuracy_rows={**result.accuracy_rows, run: tuple(ids[i] for i in index.tolist())},
        )
    return result


def _accuracy_at(result: ExperimentResult, index: Ints, runs: Sequence[str]) -> dict[str, Any]:
    """The accuracies of these runs on some of their rows."""
    found: dict[str, Any] = {}
    for name in ("accuracy", "accuracy_rounding", "accuracy_units"):
        own: Mapping[str, Any] = getattr(result, name)
        found[name] = {run: each[index] if run in runs else each for run, each in own.items()}
    return found


# --- values ---------------------------------------------------------------------------------------


def _measure(parts: Sequence[MeasureData]) -> MeasureData:
    """One measure over the cells of all variants."""
    cells = [len(data.patched) for data in parts]
    gaps = [data.gaps or ("",) * len(data.patched) for data in parts]
    sources = [data.source for data in parts]
    truths = [data.truth for data in parts]
    roundings = [data.rounding for data in parts]
    seen = [data.seen for data in parts]
    if any(s is not None for s in seen):
        prompts = parts[0].patched.shape[1]
        seen = [np.arange(prompts)[None] if s is None else s for s in seen]
    return replace(
        parts[0],
        patched=np.concatenate([data.patched for data in parts]),
        base=_side_by_side([data.base for data in parts], cells),
        source=None if any(s is None for s in sources) else _side_by_side(sources, cells),
        truth=None if any(t is None for t in truths) else _side_by_side(truths, cells),
        inert=np.concatenate([data.inert for data in parts]),
        rounding=None if any(r is None for r in roundings) else _side_by_side(roundings, cells),
        gaps=tuple(gap for own in gaps for gap in own),
        seen=None if all(s is None for s in seen) else _side_by_side(seen, cells),
    )


def _side_by_side(values: Sequence[NDArray[A] | None], cells: Sequence[int]) -> NDArray[A]:
    """[1 or cell, prompt] of each variant as one: a single row where all have the same one."""
    found = [value for value in values if value is not None]
    if all(len(v) == 1 and np.array_equal(v, found[0], equal_nan=True) for v in found):
        return found[0]
    rows = [np.broadcast_to(v, (n, v.shape[1])) for v, n in zip(found, cells, strict=True)]
    return np.concatenate(rows)


def _by_run(
    results: Sequence[ExperimentResult],
    several: Sequence[str],
    of: Callable[[ExperimentResult], Mapping[str, Any]],
) -> dict[str, Any]:
    """The unpatched runs of all variants; those of several blocks or models say which."""
    return {
        f"{run} ({which})" if which else run: values
        for result, which in zip(results, several, strict=True)
        for run, values in of(result).items()
    }


def _called(results: Sequence[ExperimentResult]) -> dict[str, str]:
    """Names for people that all variants agree on."""
    names = {run for result in results for run in (result.base, result.source) if run}
    every = {run: {result.shown(run) for result in results} for run in names}
    return {run: next(iter(found)) for run, found in every.items() if len(found) == 1}


def _drawn(results: Sequence[ExperimentResult]) -> DrawnValues | None:
    """The draws of all variants, as many as the one with the most."""
    known = [result.drawn for result in results if result.drawn is not None]
    if len(known) < len(results):
        return None
    most = max(len(values) for each in known for values in each.values)

    def filled(values: Floats) -> Floats:
        missing = np.full((most - len(values), *values.shape[1:]), np.nan)
        return np.concatenate([values, missing])

    return replace(
        known[0],
        values=tuple(
            np.concatenate([filled(values) for values in of_all], axis=1)
            for of_all in zip(*(each.values for each in known), strict=True)
        ),
        counts=np.concatenate([each.counts for each in known]),
    )


# --- what is said ---------------------------------------------------------------------------------


def _said(parts: Sequence[tuple[Labels, Mapping[str, str]]]) -> dict[str, str]:
    """Conventions once where all variants have them, else with whose they are."""
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for _, said in parts for key in said):
        texts = [said.get(key) for _, said in parts]
        if all(text == texts[0] for text in texts):
            found[key] = texts[0] or ""
            continue
        whose = _whose([labels for labels, _ in parts], texts)
        by_text: dict[str, dict[str, None]] = {}
        for name, text in zip(whose, texts, strict=True):
            if text is not None:
                by_text.setdefault(text, {})[name] = None
        found[key] = "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())
    return found


def _whose(labels: Sequence[Labels], texts: Sequence[str | None]) -> list[str]:
    """What tells the variants apart that differ here: the label of one axis if that is enough."""
    for axis in range(len(labels[0])):
        own = [str(each[axis][1]) for each in labels]
        if len(set(zip(own, texts, strict=True))) == len(set(own)):
            return own
    return [", ".join(f"{axis} {label}" for axis, label in each) for each in labels]


def _hashes(parts: Sequence[tuple[Labels, ExperimentResult]]) -> dict[str, str]:
    """Hashes by what they are of; those of several blocks or models say which."""
    found: dict[str, str] = {}
    for labels, result in parts:
        for key, value in result.hashes.items():
            same = all(other.hashes.get(key) == value for _, other in parts)
            of_block = key.startswith("data") and BLOCKS in dict(labels)
            whose = dict(labels)[BLOCKS] if of_block else result.model
            found[key if same else f"{key} of {whose}"] = value
    return found
