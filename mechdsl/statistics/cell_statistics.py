"""Statistics of all cells and measures of an experiment, with interval and p by one method.

An interval excludes 0 exactly where p is below the level.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, CellIndex, Floats, Ints
from mechdsl.base.records import Registry
from mechdsl.base.source import Span
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.statistics import ZeroDenominator
from mechdsl.program import spec
from mechdsl.program.significance import MAX_RESAMPLES, MIN_UNITS
from mechdsl.statistics.corrections import add_corrected_p
from mechdsl.statistics.intervals import (
    FLIPS_PER_TEST,
    flip_count,
    share_difference,
    share_interval,
    sign_flip_inference,
    standard_error,
    student_quantile,
    studentise,
)
from mechdsl.statistics.measurements import (
    NO_INTERVAL_REASONS,
    CellStatistics,
    EffectParts,
    EffectSums,
    Interval,
    MeasureData,
    Resamples,
    SamplingDesign,
    Units,
    cell_blocks,
    cells_by_view,
    effect_parts,
    reorder_rows,
)
from mechdsl.statistics.skewed_t import skewed_t
from mechdsl.vocab.effects import EFFECTS, EffectKind

_HALVINGS = 40
"""Steps of the search for the level at which limits of shares reach 0."""


@dataclass(frozen=True, eq=False)
class Inference:
    """Arrays over cells, NaN where there are too few units or no bound."""

    low: Floats
    high: Floats
    p: Floats
    """Two-sided, of the hypothesis that the figure is 0."""
    floor: Bools
    """Whether p is the least that so many flips or resamples give."""

    @classmethod
    def of(cls, low: Floats, high: Floats, p: Floats, floor: Bools, level: float) -> Inference:
        """The interval of a figure that is tested: it includes 0 where p isn't below the level, and
        p is missing where the interval is."""
        includes_zero = ~np.isnan(p) & (p >= level)
        known = ~np.isnan(low) & ~np.isnan(high)
        with np.errstate(invalid="ignore"):
            low = np.where(includes_zero, np.minimum(low, 0.0), low)
            high = np.where(includes_zero, np.maximum(high, 0.0), high)
        return cls(low, high, np.where(known, p, np.nan), floor & known)


def infer(
    sums: EffectSums,
    settings: spec.Statistics,
    draws: Resamples,
    tests: int,
    *,
    tested: bool = True,
) -> Inference:
    """By the method that `stats test` names.

    Args:
        sums: of the cells.
        settings: the method, the confidence.
        draws: the units, their strata, the seed, and how many resamples the file asks for.
        tests: of how many cells the smallest p has to survive the correction.
        tested: whether 0 means "no effect", so that the figure has a p.
    """
    low, high, p, floor = _by_method(sums, settings, draws, tests)
    if tested:
        return Inference.of(low, high, p, floor, 1 - settings.confidence / 100)
    nothing = np.full(len(p), np.nan)
    return Inference(low, high, nothing, np.zeros(len(p), dtype=bool))


def draw_count(settings: spec.Statistics, tests: int) -> int:
    """How many flips or resamples the method takes; none by the formula of `t`."""
    level = 1 - settings.confidence / 100
    if settings.test == "t":
        return 0
    if settings.test == "flips":
        return flip_count(tests, level)
    return max(settings.resamples, min(MAX_RESAMPLES, ceil(2 * FLIPS_PER_TEST * tests / level)))


def _by_method(
    sums: EffectSums, settings: spec.Statistics, draws: Resamples, tests: int
) -> tuple[Floats, Floats, Floats, Bools]:
    if settings.test == "t":
        found = skewed_t(sums, draws.strata)
        low, high = found.interval(settings.confidence, MIN_UNITS)
        return low, high, found.p(), np.zeros(len(low), dtype=bool)
    count = draw_count(settings, tests)
    if settings.test == "flips":
        flips = sign_flip_inference(sums, count, draws.seed, settings.confidence)
        few = (sums.held < MIN_UNITS) | ~np.isfinite(sums.value)
        low, high = (np.where(few, np.nan, end) for end in (flips.low, flips.high))
        return low, high, flips.p, flips.floor
    resampled = studentise(
        sums, Resamples(draws.units, max(count, draws.resamples), draws.seed, draws.strata)
    )
    return *resampled.interval(settings.confidence), *resampled.p()


def infer_shares(
    patched: EffectSums,
    base: EffectSums,
    rows: Ints,
    confidence: float,
    base_rows: Ints | None = None,
) -> Inference:
    """Of the difference of two shares: p is the level at which its limits reach 0.

    Args:
        patched: 0 or 1 per row.
        base: the same of the other run.
        rows: [cell].
        confidence: in percent.
        base_rows: [cell], of the other run, if it has other rows.
    """
    low, high = share_difference(patched, base, rows, confidence, base_rows)
    least, most = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        ends = share_difference(patched, base, rows, 100 * (1 - middle), base_rows)
        with np.errstate(invalid="ignore"):
            excludes = (ends[0] > 0) | (ends[1] < 0)
        least, most = np.where(excludes, least, middle), np.where(excludes, middle, most)
    # units that both shares have differ in their sums; two samples have none in common
    unequal = np.count_nonzero(patched.top != base.top, axis=1)
    p = np.maximum(most, 2.0 ** (1.0 - unequal))
    p = np.where(patched.value == base.value, 1.0, np.minimum(p, 1.0))
    return Inference.of(low, high, p, np.zeros(len(rows), dtype=bool), 1 - confidence / 100)


SHARE_RUNS: Mapping[str, tuple[str, str | None]] = {
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
class _UnitBlock:
    """Some cells of a measure that share their units, and whether they have whole strata."""

    cells: Ints
    units: Units
    rows: EffectParts
    sums: EffectSums
    whole: bool

    @property
    def n(self) -> Ints:
        """[cell]: prompts."""
        return np.count_nonzero(self.rows.present, axis=1)


def _unit_blocks(
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign
) -> Iterator[_UnitBlock]:
    """All cells of a measure."""
    for cells, seen in cells_by_view(data):
        units = sampling.units(seen)
        for block in cell_blocks(len(cells), max(sampling.settings.resamples, sampling.prompts)):
            some = cells[block]
            rows = effect_parts(data, effect, some)
            full = sampling.whole(rows.present)
            for whole in (True, False):
                own = np.flatnonzero(full == whole)
                if len(own):
                    part = rows if len(own) == len(some) else effect_parts(data, effect, some[own])
                    yield _UnitBlock(some[own], units, part, part.sums(units), whole)


def _numbers(
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign, tests: int = 1
) -> CellStatistics:
    """Everything but the corrected p.

    tests: of how many cells the smallest p has to survive the correction
    """
    data, sampling = reorder_rows(data, sampling.order), sampling.ordered
    found = _empty(data.patched.shape[0])
    reasons: list[str | None] = [None] * len(found.mean)
    for block in _unit_blocks(data, effect, sampling):
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
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign, block: _UnitBlock, tests: int
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
    n = np.count_nonzero(effect_parts(data, effect, cells).present, axis=1)
    if not other:
        return share_interval(own, n, confidence)
    low, high = share_difference(own, other[0], n, confidence)
    still = data.inert[cells] & effect.of_intervention & ~np.isnan(low)
    return np.where(still, 0.0, low), np.where(still, 0.0, high)


def _share_sums(
    data: MeasureData, effect: EffectKind, cells: Ints, units: Units, of: int = 0
) -> list[EffectSums]:
    """The one share, or the two, that an effect is made of; none of anything else."""
    runs = _shares(data, effect, cells)
    if runs is None:
        return []
    present = effect_parts(data, effect, cells).present
    bottom, held = units.total(present.astype(np.float64), of), units.held(present, of)
    return [EffectSums(units.total(np.where(present, run, 0.0), of), bottom, held) for run in runs]


def _shares(data: MeasureData, effect: EffectKind, cells: Ints) -> list[Floats] | None:
    """[cell, prompt] of the one run, or the two, whose shares an effect is; None where it isn't of
    shares."""
    if data.unit != "share" or effect.name not in SHARE_RUNS:
        return None
    found: list[Floats] = []
    for name in SHARE_RUNS[effect.name]:
        if name is None:
            continue
        values = {"patched": data.patched, "base": data.base, "source": data.source}[name]
        if values is None or not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
            return None
        rows = values[cells] if len(values) > 1 else values
        found.append(np.broadcast_to(rows, (len(cells), rows.shape[1])))
    return found


def _zero_denominators(
    block: _UnitBlock, sampling: SamplingDesign
) -> dict[int, tuple[float, float, float]]:
    """Cells of a block whose denominator can't be told from 0 → it and its interval: by Fieller's
    condition their ratio has no bounds (Fieller 1954)."""
    if block.rows.denominator is None:
        return {}
    bottom = np.broadcast_to(block.rows.denominator, block.rows.present.shape)
    ones = block.rows.present.astype(np.float64)
    sums = EffectSums(block.units.total(bottom), block.units.total(ones), block.sums.held)
    strata = sampling.draws(block.units, whole=block.whole).strata
    low, high = denominator_interval(sums, strata, sampling.settings.confidence)
    value = sums.value
    with np.errstate(invalid="ignore"):
        found = np.flatnonzero(~((low > 0) | (high < 0)) & (block.n > 0))
    return {int(i): (float(value[i]), float(low[i]), float(high[i])) for i in found}


def denominator_interval(
    sums: EffectSums, strata: Ints | None, confidence: float
) -> tuple[Floats, Floats]:
    """[cell] each: the interval of a denominator, by the same rule as that of a ratio.

    Below `FEWEST_UNITS`, where a ratio has no interval, it is Student's, and of one unit the value.
    """
    value = sums.value
    low, high = skewed_t(sums, strata).interval(confidence, MIN_UNITS)
    width = np.nan_to_num(student_quantile(confidence, sums.held) * standard_error(sums))
    few = sums.held < MIN_UNITS
    return np.where(few, value - width, low), np.where(few, value + width, high)


def rounding_bound(
    data: MeasureData, effect: EffectKind, cells: Ints, present: Bools
) -> Floats | float:
    """[cell]: how far rounding alone may move the mean; NaN where that isn't known or can't be."""
    if effect.tested:
        return np.where(data.inert[cells], np.nan, _rounding(data, effect, cells))
    return _mean_within(data.rounding, cells, present)


def _rounding(data: MeasureData, effect: EffectKind, cells: CellIndex) -> Floats:
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
    return np.abs(effect_parts(own, effect, slice(None)).mean())


def _mean_within(values: Floats | None, cells: CellIndex, present: Bools) -> Floats | float:
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
    if data.spread in NO_INTERVAL_REASONS:
        said.append(NO_INTERVAL_REASONS[data.spread])
    elif np.isfinite(found.mean[cell]) and not np.isfinite(found.low[cell]):
        said.append(f"{count_noun(units, unit)}: no interval below {MIN_UNITS}")
    if data.inert[cell]:
        said.append("cannot differ from the base run: not tested")
    elif not effect.tested:
        said.append(f"`{effect.name}` is not a difference: no p")
    return "; ".join(said) or None


def compute_category_statistics(
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


def compute_cell_statistics(
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
    sampling = SamplingDesign(
        measures[0].patched.shape[1], settings, seed, ids, groups, strata, blocks
    )
    tests = sum(
        int(np.count_nonzero(~data.inert))
        for data in measures
        if data.kind == "number" and effects[data.effect].tested
    )
    alone = settings.correction in ("max", "none")
    found = [
        _numbers(data, effects[data.effect], sampling, 1 if alone else tests)
        if data.kind == "number"
        else compute_category_statistics(data.patched, data.truth, data.rounding)
        for data in measures
    ]
    return add_corrected_p(measures, found, sampling, effects, picked=picked)


def run_interval(
    values: Floats, sampling: SamplingDesign, of: MeasureData | None = None
) -> Interval:
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
    sampling: SamplingDesign,
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
    sums = EffectSums(
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
