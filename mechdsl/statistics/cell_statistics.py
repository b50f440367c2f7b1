"""The statistics of an experiment: of all its cells and measures together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.base.registry import Registry
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_statistics import ZeroDenominator
from mechdsl.program import spec
from mechdsl.statistics.bootstrap import Resampling, blocks, parts
from mechdsl.statistics.measure_data import CellStatistics, Interval, MeasureData
from mechdsl.statistics.sign_flips import CORRECTIONS, flips_in_words, sign_flip
from mechdsl.vocab.effect_kind import EffectKind


def _empty(cells: int) -> CellStatistics:
    """Arrays to be filled, NaN so far."""
    nothing = [np.full(cells, np.nan) for _ in range(11)]
    mean, low, high, p, p_corrected, base_mean, source_mean, commonest, share, error, bound = (
        nothing
    )
    return CellStatistics(
        mean=mean,
        low=low,
        high=high,
        p=p,
        p_corrected=p_corrected,
        n=np.zeros(cells, dtype=np.int64),
        base_mean=base_mean,
        source_mean=source_mean,
        commonest=commonest,
        share=share,
        mean_error=error,
        reasons=(None,) * cells,
        test=None,
        tests=0,
        rounding=bound,
    )


def _numbers(
    data: MeasureData, effect: EffectKind, resampling: Resampling, tests: int
) -> CellStatistics:
    cells = data.patched.shape[0]
    found = _empty(cells)
    reasons: list[str | None] = []
    unit = "group" if resampling.grouped else "prompt"
    order = resampling.order
    for block in blocks(cells, max(resampling.resamples, len(order))):
        rows = parts(data, effect, block, order)
        n = np.count_nonzero(rows.present, axis=1)
        units = resampling.units_of(rows.present)
        found.n[block] = n
        found.mean[block] = rows.mean()
        samples = [rows.weighted(weights) for weights in resampling.weights(len(n))]
        low, high = resampling.interval(np.concatenate(samples))
        found.low[block] = np.where(units > 1, low, np.nan)
        found.high[block] = np.where(units > 1, high, np.nan)
        found.base_mean[block] = _mean_within(data.base, block, order, rows.present)
        found.source_mean[block] = _mean_within(data.source, block, order, rows.present)
        if effect.tested:
            deltas = resampling.per_unit(_deltas(data, effect, block, order))
            # an infinite delta has no sum to compare; its cell has no mean either
            tested = np.isfinite(deltas).all(1) & (n > 0) & ~data.inert[block]
            p = np.full(len(n), np.nan)
            p[tested] = sign_flip(deltas[tested], tests, resampling.seed)
            found.p[block] = p
            bound = _rounding(data, effect, block, order)
            found.rounding[block] = np.where(data.inert[block], np.nan, bound)
        else:
            found.rounding[block] = _mean_within(data.rounding, block, order, rows.present)
        for offset, cell in enumerate(range(*block.indices(cells))):
            undefined = int(rows.undefined[offset])
            reasons.append(_reason(data, effect, found, cell, int(units[offset]), undefined, unit))
    for values in (found.mean, found.low, found.high, found.base_mean, found.source_mean):
        values[~np.isfinite(values)] = np.nan
    return replace(found, reasons=tuple(reasons))


def _rounding(data: MeasureData, effect: EffectKind, cells: Cells, order: Ints) -> Floats:
    """[cell]: the effect of a change as large as rounding may be, in every prompt and in the same
    direction."""
    if data.rounding is None:
        return np.full(data.patched[cells].shape[0], np.nan)
    patched = data.patched[cells]

    def rows(values: Floats) -> Floats:
        return values[cells] if values.shape[0] > 1 else values

    base, moved = rows(data.base), rows(data.base) + rows(data.rounding)
    there = np.where(np.isnan(patched), np.nan, moved)
    source = data.source
    if source is not None and effect.of_intervention:
        source = rows(source)
    elif source is not None:  # the change is that from one unpatched run to the other
        source = moved
    own = replace(data, patched=there, base=base, source=source)
    return np.abs(parts(own, effect, slice(None), order).mean())


def _deltas(data: MeasureData, effect: EffectKind, cells: Cells, order: Ints) -> Floats:
    plain = EffectKind(name="", meaning="", formula="", numerator=effect.numerator)
    return parts(data, plain, cells, order).numerator


def _mean_within(
    values: Floats | None, cells: Cells, order: Ints, present: Bools
) -> Floats | float:
    """The mean of a run over the prompts of each cell."""
    if values is None:
        return np.nan
    rows = (values[cells] if values.shape[0] > 1 else values)[:, order]
    count = np.count_nonzero(present, axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(present, rows, 0.0).sum(1) / np.where(count > 0, count, np.nan)


def _reason(
    data: MeasureData,
    effect: EffectKind,
    found: CellStatistics,
    cell: int,
    units: int,
    undefined: int,
    unit: str,
) -> str | None:
    """Why something of a cell is null, in words."""
    said: list[str] = []
    if data.missing is not None:
        return f"not computed ({data.missing.code}): {data.missing.reason}"
    if data.gaps and data.gaps[cell]:
        return data.gaps[cell]
    if found.n[cell] == 0:
        return "no prompt is part of this cell"
    if undefined:
        said.append(f"the base run's value is 0 in {undefined} of {found.n[cell]} prompts")
    elif not np.isfinite(found.mean[cell]):
        zero = effect.denominator is not None and not np.isinf(found.mean[cell])
        said.append(f"{effect.divisor} is 0" if zero else "infinite for at least one prompt")
    if units == 1:
        said.append(f"one {unit}: no interval")
    elif np.isfinite(found.mean[cell]) and not np.isfinite(found.low[cell]):
        said.append(f"{effect.divisor or 'the value'} is 0 or infinite in some resamples")
    if data.inert[cell]:
        said.append("cannot differ from the base run: not tested")
    elif not effect.tested:
        said.append(f"`{effect.name}` is not a difference: no p")
    return "; ".join(said) or None


def category_statistics(
    values: Floats, truth: Floats | None, rounding: Floats | None = None
) -> CellStatistics:
    """The commonest value of each cell, its share and the mean absolute error.

    values: [cell, prompt], NaN where a prompt is not part of the cell
    truth: [1 or cell, prompt], the right numbers
    rounding: [1 or cell, prompt], 1 where rounding may change the category
    """
    found = _empty(len(values))
    reasons: list[str] = []
    for cell, row in enumerate(values):
        present = ~np.isnan(row)
        seen = row[present]
        found.n[cell] = len(seen)
        if not len(seen):
            reasons.append("no prompt is part of this cell")
            continue
        distinct, counts = np.unique(seen, return_counts=True)
        found.commonest[cell] = distinct[counts.argmax()]
        found.share[cell] = counts.max() / len(seen)
        if truth is not None:
            right = truth[cell if len(truth) > 1 else 0]
            found.mean_error[cell] = np.abs(seen - right[present]).mean()
        if rounding is not None:
            moved = rounding[cell if len(rounding) > 1 else 0]
            found.rounding[cell] = moved[present].mean()
        unknown = np.isnan(found.mean_error[cell])
        reasons.append(
            "a category has no mean" + ("; no right number is known for it" if unknown else "")
        )
    return replace(found, reasons=tuple(reasons))


def cell_statistics(
    measures: Sequence[MeasureData],
    settings: spec.Statistics,
    seed: int,
    groups: NDArray[Any] | None = None,
    *,
    effects: Registry[EffectKind],
    ids: Sequence[int] | None = None,
) -> list[CellStatistics]:
    """Means, intervals, p and corrected p of every cell, one entry per measure.

    p is corrected over the cells of all measures together; those that can't differ from the base
    run, and measures without p, stay out of it.
    """
    if not measures:
        return []
    resampling = Resampling(measures[0].patched.shape[1], settings, seed, ids=ids, groups=groups)

    def is_tested(data: MeasureData) -> bool:
        return data.kind == "number" and effects[data.effect].tested

    tests = sum(
        int(np.count_nonzero(~data.inert & ~np.isnan(data.patched).all(1)))
        for data in measures
        if is_tested(data)
    )
    found = [
        _numbers(data, effects[data.effect], resampling, tests)
        if data.kind == "number"
        else category_statistics(data.patched, data.truth, data.rounding)
        for data in measures
    ]
    together = np.concatenate([entry.p for entry in found])
    known = ~np.isnan(together)
    corrected = together.copy()
    corrected[known] = CORRECTIONS[settings.correction](together[known])
    per_measure = np.split(corrected, np.cumsum([len(entry.p) for entry in found])[:-1])
    words = flips_in_words(resampling.units, tests, "group" if resampling.grouped else "prompt")
    return [
        replace(
            entry,
            p_corrected=p,
            test=words if is_tested(data) else None,
            tests=int(np.count_nonzero(known)),
        )
        for data, entry, p in zip(measures, found, per_measure, strict=True)
    ]


def run_interval(values: Floats, resampling: Resampling) -> Interval:
    """The mean of a run's values [prompt] with its interval, from the shared draws."""
    return run_intervals(values[None], resampling)[0]


def run_intervals(values: Floats, resampling: Resampling) -> list[Interval]:
    """The same for several rows of values, [row, prompt]."""
    plain = EffectKind(
        name="", meaning="", formula="", numerator=lambda patched, base, source: patched
    )
    data = MeasureData(
        "", "", "", "number", False, values, values, None, np.zeros(len(values), bool)
    )
    found = _numbers(data, plain, resampling, 0)
    return [
        Interval(float(mean), float(low), float(high), int(n))
        for mean, low, high, n in zip(found.mean, found.low, found.high, found.n, strict=True)
    ]


def check_denominator(
    base: Floats,
    source: Floats | None,
    settings: spec.Statistics,
    seed: int,
    span: Span | None,
    *,
    effect: EffectKind,
    groups: NDArray[Any] | None = None,
    ids: Sequence[int] | None = None,
) -> list[Diagnostic]:
    """E0604 where the effect's denominator can't be told from 0, so that no cell need be run.

    base, source: [1 or cell, prompt], as in `MeasureData`
    """
    if effect.denominator is None:
        return []
    rows = np.asarray(effect.denominator(base, base, source), dtype=np.float64)
    resampling = Resampling(rows.shape[1], settings, seed, ids=ids, groups=groups)
    for found in run_intervals(rows, resampling):
        low, high = (found.mean, found.mean) if np.isnan(found.low) else (found.low, found.high)
        if found.n and low <= 0 <= high:
            return [
                ZeroDenominator(
                    span=span,
                    effect=effect.name,
                    divisor=effect.divisor,
                    mean=f"{found.mean:.3g}",
                    low=f"{low:.3g}",
                    high=f"{high:.3g}",
                    confidence=f"{settings.confidence:g}",
                    n=found.n,
                )
            ]
    return []
