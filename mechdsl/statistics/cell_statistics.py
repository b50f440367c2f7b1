"""The statistics of an experiment: of all its cells and measures together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.base.plural import plural
from mechdsl.base.registry import Registry
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e06_statistics import ZeroDenominator
from mechdsl.program import spec
from mechdsl.statistics.bootstrap import standard_error, student
from mechdsl.statistics.cell_inference import Inference, infer, infer_shares
from mechdsl.statistics.correct_cells import with_corrected_p
from mechdsl.statistics.effect_parts import Parts, Sums, parts
from mechdsl.statistics.measure_data import NO_INTERVAL, CellStatistics, Interval, MeasureData
from mechdsl.statistics.sampling import Sampling, in_order, partitions
from mechdsl.statistics.shares import share_difference, share_interval
from mechdsl.statistics.skewed_t import skewed_t
from mechdsl.statistics.units import Units, blocks
from mechdsl.validate.reachable_p import FEWEST_UNITS
from mechdsl.vocab.effect_kind import EffectKind
from mechdsl.vocab.effects import EFFECTS

SHARES: Mapping[str, tuple[str, str | None]] = {
    "raw": ("patched", None),
    "delta": ("patched", "base"),
    "total": ("source", "base"),
}
"""Effect of a share → the run whose share it is, and that which it is set against."""


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
        units=np.zeros(cells, dtype=np.int64),
        floor=np.zeros(cells, dtype=bool),
    )


@dataclass(frozen=True, eq=False)
class _Block:
    """Some cells of a measure that share their units, and whether they have whole strata."""

    cells: Ints
    units: Units
    rows: Parts
    sums: Sums
    whole: bool

    @property
    def n(self) -> Ints:
        """[cell]: prompts."""
        return np.count_nonzero(self.rows.present, axis=1)


def _blocks(data: MeasureData, effect: EffectKind, sampling: Sampling) -> Iterator[_Block]:
    """All cells of a measure."""
    for cells, seen in partitions(data):
        units = sampling.units(seen)
        for block in blocks(len(cells), max(sampling.settings.resamples, sampling.prompts)):
            some = cells[block]
            rows = parts(data, effect, some)
            full = sampling.whole(rows.present)
            for whole in (True, False):
                own = np.flatnonzero(full == whole)
                if len(own):
                    part = rows if len(own) == len(some) else parts(data, effect, some[own])
                    yield _Block(some[own], units, part, part.sums(units), whole)


def _numbers(
    data: MeasureData, effect: EffectKind, sampling: Sampling, tests: int = 1
) -> CellStatistics:
    """Everything but the corrected p.

    tests: of how many cells the smallest p has to survive the correction
    """
    data, sampling = in_order(data, sampling.order), sampling.ordered
    found = _empty(data.patched.shape[0])
    reasons: list[str | None] = [None] * len(found.mean)
    for block in _blocks(data, effect, sampling):
        cells, rows, n = block.cells, block.rows, block.n
        found.n[cells], found.units[cells] = n, block.sums.held
        found.mean[cells] = rows.mean()
        inference = _inference(data, effect, sampling, block, tests)
        found.low[cells], found.high[cells] = inference.low, inference.high
        if effect.tested:
            found.p[cells] = np.where(data.inert[cells], np.nan, inference.p)
            found.floor[cells] = inference.floor & ~data.inert[cells]
        found.base_mean[cells] = _mean_within(data.base, cells, rows.present)
        found.source_mean[cells] = _mean_within(data.source, cells, rows.present)
        found.rounding[cells] = rounding_bound(data, effect, cells, rows.present)
        zero = _zero_denominators(block, sampling)
        word = sampling.unit_word(block.units)
        for offset, cell in enumerate(cells.tolist()):
            undefined = int(rows.undefined[offset])
            about = zero.get(offset)
            if about is not None:
                for values in (found.mean, found.low, found.high, found.p):
                    values[cell] = np.nan
            reasons[cell] = _reason(data, effect, found, cell, undefined, word, about)
    for values in (found.mean, found.low, found.high, found.base_mean, found.source_mean):
        values[~np.isfinite(values)] = np.nan
    return replace(found, reasons=tuple(reasons))


def _inference(
    data: MeasureData, effect: EffectKind, sampling: Sampling, block: _Block, tests: int
) -> Inference:
    """By the kind of the figure."""
    settings, cells = sampling.settings, block.cells
    if data.spread != "rows":
        nothing = np.full(len(cells), np.nan)
        return Inference(nothing, nothing, nothing, np.zeros(len(cells), dtype=bool))
    limits = share_limits(data, effect, cells, block.units, settings.confidence)
    if limits is None:
        draws = sampling.draws(block.units, whole=block.whole)
        return infer(block.sums, settings, draws, tests, tested=effect.tested)
    runs = _share_sums(data, effect, cells, block.units)
    if len(runs) == 1:  # a share is no difference: it has no p
        return Inference(*limits, np.full(len(cells), np.nan), np.zeros(len(cells), dtype=bool))
    patched, base = runs
    found = infer_shares(patched, base, block.n, settings.confidence)
    still = data.inert[cells] & effect.of_intervention & ~np.isnan(found.low)
    return replace(
        found, low=np.where(still, 0.0, found.low), high=np.where(still, 0.0, found.high)
    )


def share_limits(
    data: MeasureData,
    effect: EffectKind,
    cells: Ints,
    units: Units,
    confidence: float,
    of: int = 0,
) -> tuple[Floats, Floats] | None:
    """[cell] each: exact limits of shares and of what lies between two; None of anything else.

    of: the number of the experiment among those whose units these are
    """
    sums = _share_sums(data, effect, cells, units, of)
    if not sums:
        return None
    own, *other = sums
    n = np.count_nonzero(parts(data, effect, cells).present, axis=1)
    if not other:
        return share_interval(own, n, confidence)
    low, high = share_difference(own, other[0], n, confidence)
    still = data.inert[cells] & effect.of_intervention & ~np.isnan(low)
    return np.where(still, 0.0, low), np.where(still, 0.0, high)


def _share_sums(
    data: MeasureData, effect: EffectKind, cells: Ints, units: Units, of: int = 0
) -> list[Sums]:
    """The one share, or the two, that an effect is made of; none of anything else."""
    runs = _shares(data, effect, cells)
    if runs is None:
        return []
    present = parts(data, effect, cells).present
    bottom, held = units.total(present.astype(np.float64), of), units.held(present, of)
    return [Sums(units.total(np.where(present, run, 0.0), of), bottom, held) for run in runs]


def _shares(data: MeasureData, effect: EffectKind, cells: Ints) -> list[Floats] | None:
    """[cell, prompt] of the one run, or the two, whose shares an effect is; None where it isn't of
    shares."""
    if data.unit != "share" or effect.name not in SHARES:
        return None
    found: list[Floats] = []
    for name in SHARES[effect.name]:
        if name is None:
            continue
        values = {"patched": data.patched, "base": data.base, "source": data.source}[name]
        if values is None or not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
            return None
        rows = values[cells] if len(values) > 1 else values
        found.append(np.broadcast_to(rows, (len(cells), rows.shape[1])))
    return found


def _zero_denominators(block: _Block, sampling: Sampling) -> dict[int, tuple[float, float, float]]:
    """Cells of a block whose denominator can't be told from 0 → it and its interval: by Fieller's
    condition their ratio has no bounds (Fieller 1954)."""
    if block.rows.denominator is None:
        return {}
    bottom = np.broadcast_to(block.rows.denominator, block.rows.present.shape)
    ones = block.rows.present.astype(np.float64)
    sums = Sums(block.units.total(bottom), block.units.total(ones), block.sums.held)
    strata = sampling.draws(block.units, whole=block.whole).strata
    low, high = denominator_interval(sums, strata, sampling.settings.confidence)
    value = sums.value
    with np.errstate(invalid="ignore"):
        found = np.flatnonzero(~((low > 0) | (high < 0)) & (block.n > 0))
    return {int(i): (float(value[i]), float(low[i]), float(high[i])) for i in found}


def denominator_interval(
    sums: Sums, strata: Ints | None, confidence: float
) -> tuple[Floats, Floats]:
    """[cell] each: the interval of a denominator, by the same rule as that of a ratio.

    Below `FEWEST_UNITS`, where a ratio has no interval, it is Student's, and of one unit the value.
    """
    value = sums.value
    low, high = skewed_t(sums, strata).interval(confidence, FEWEST_UNITS)
    width = np.nan_to_num(student(confidence, sums.held) * standard_error(sums))
    few = sums.held < FEWEST_UNITS
    return np.where(few, value - width, low), np.where(few, value + width, high)


def rounding_bound(
    data: MeasureData, effect: EffectKind, cells: Ints, present: Bools
) -> Floats | float:
    """[cell]: how far rounding alone may move the mean; NaN where that isn't known or can't be."""
    if effect.tested:
        return np.where(data.inert[cells], np.nan, _rounding(data, effect, cells))
    return _mean_within(data.rounding, cells, present)


def _rounding(data: MeasureData, effect: EffectKind, cells: Cells) -> Floats:
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
    return np.abs(parts(own, effect, slice(None)).mean())


def _mean_within(values: Floats | None, cells: Cells, present: Bools) -> Floats | float:
    """The mean of a run over the prompts of each cell."""
    if values is None:
        return np.nan
    rows = values[cells] if values.shape[0] > 1 else values
    count = np.count_nonzero(present, axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(present, rows, 0.0).sum(1) / np.where(count > 0, count, np.nan)


def _reason(
    data: MeasureData,
    effect: EffectKind,
    found: CellStatistics,
    cell: int,
    undefined: int,
    unit: str,
    zero: tuple[float, float, float] | None,
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
    elif zero is not None and not zero[1] == zero[2] == 0:
        value, low, high = zero
        said.append(
            f"{effect.divisor} can't be told from 0 there: {value:.3g} [{low:.3g}, {high:.3g}]"
        )
    elif not np.isfinite(found.mean[cell]):
        by_zero = effect.denominator is not None and not np.isinf(found.mean[cell])
        said.append(f"{effect.divisor} is 0" if by_zero else "infinite for at least one prompt")
    units = int(found.units[cell])
    if data.spread in NO_INTERVAL:
        said.append(NO_INTERVAL[data.spread])
    elif np.isfinite(found.mean[cell]) and not np.isfinite(found.low[cell]):
        said.append(f"{plural(units, unit)}: no interval below {FEWEST_UNITS}")
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
    strata: Ints | None = None,
    blocks: Ints | None = None,
    picked: bool = False,
) -> list[CellStatistics]:
    """Means, intervals, p and corrected p of every cell, one entry per measure.

    p is corrected over the cells of all measures together; those that can't differ from the base
    run, and measures without p, stay out of it.

    groups: [prompt], the values of `stats by`. ids: [prompt], hashes of the rows' contents; rows of
    one are one unit. strata: [prompt], what is dealt out evenly.
    blocks: [prompt], of which block it is, where several stand side by side.
    picked: whether sites were picked on these rows.
    """
    if not measures:
        return []
    sampling = Sampling(measures[0].patched.shape[1], settings, seed, ids, groups, strata, blocks)
    tests = sum(
        int(np.count_nonzero(~data.inert))
        for data in measures
        if data.kind == "number" and effects[data.effect].tested
    )
    alone = settings.correction in ("max", "none")
    found = [
        _numbers(data, effects[data.effect], sampling, 1 if alone else tests)
        if data.kind == "number"
        else category_statistics(data.patched, data.truth, data.rounding)
        for data in measures
    ]
    return with_corrected_p(measures, found, sampling, effects, picked=picked)


def run_interval(values: Floats, sampling: Sampling, of: MeasureData | None = None) -> Interval:
    """The mean of a run's values [prompt] with its interval.

    of: the measure whose values they are; rows that it can't tell apart are one unit.
    """
    data = MeasureData(
        label="",
        metric="",
        effect="raw",
        kind="number",
        per_prompt=False,
        patched=values[None],
        base=values[None],
        source=None,
        inert=np.zeros(1, dtype=bool),
        unit="" if of is None else of.unit,
        seen=None if of is None or of.seen is None or len(of.seen) > 1 else of.seen,
    )
    found = _numbers(data, EFFECTS["raw"], sampling)
    ends = (float(found.mean[0]), float(found.low[0]), float(found.high[0]))
    return Interval(*ends, int(found.n[0]))


def check_denominator(
    base: Floats,
    source: Floats | None,
    sampling: Sampling,
    span: Span | None,
    *,
    effect: EffectKind,
) -> list[Diagnostic]:
    """E0604 where the effect's denominator can't be told from 0, so that no cell need be run.

    base, source: [1 or cell, prompt], as in `MeasureData`
    """
    if effect.denominator is None:
        return []
    rows = np.asarray(effect.denominator(base, base, source), dtype=np.float64)
    units, present = sampling.units(), ~np.isnan(rows)
    sums = Sums(
        units.total(np.where(present, rows, 0.0)),
        units.total(present.astype(np.float64)),
        units.held(present),
    )
    confidence = sampling.settings.confidence
    strata = sampling.draws(units, whole=bool(sampling.whole(present).all())).strata
    ends = denominator_interval(sums, strata, confidence)
    for value, low, high, n in zip(sums.value, *ends, present.sum(1), strict=True):
        if n and not (low > 0 or high < 0):
            return [
                ZeroDenominator(
                    span=span,
                    effect=effect.name,
                    divisor=effect.divisor,
                    mean=f"{value:.3g}",
                    low=f"{low:.3g}",
                    high=f"{high:.3g}",
                    confidence=f"{confidence:g}",
                    n=int(n),
                )
            ]
    return []
