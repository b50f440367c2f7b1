"""Statistics of all cells and measures of an experiment, with interval and p-value by one method.

An interval excludes 0 exactly if p is below the level.
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
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import ZeroDenominator
from mechdsl.program import spec
from mechdsl.program.python_functions import PYTHON_CALL
from mechdsl.program.significance import MAX_RESAMPLES, MIN_UNITS, interval_gap
from mechdsl.statistics.corrections import add_corrected_p
from mechdsl.statistics.intervals import (
    FLIPS_PER_TEST,
    SkewedT,
    equal_value_inference,
    flip_count,
    share_difference,
    share_interval,
    sign_flip_inference,
    skewed_t,
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
    find_repeated_cells,
    reorder_rows,
)
from mechdsl.vocab.aggregates import ROW_STATISTICS
from mechdsl.vocab.metrics import EFFECTS, EffectKind

_HALVINGS = 40
"""Steps of the search for the level at which limits of shares reach 0."""


@dataclass(frozen=True, eq=False)
class Inference:
    """Inferences as arrays over cells, NaN for too few units or a missing bound."""

    low: Floats
    high: Floats
    p: Floats
    """Two-sided, for the hypothesis that the value is 0."""
    floor: Bools
    """Whether p is the smallest value for this number of flips or resamples."""

    @classmethod
    def of(cls, low: Floats, high: Floats, p: Floats, floor: Bools, level: float) -> Inference:
        """Return the inference of a tested value: the interval includes 0 if p isn't below the
        level. Interval and p are missing if an end is infinite or missing."""
        includes_zero = ~np.isnan(p) & (p >= level)
        known = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):
            low = np.where(includes_zero, np.minimum(low, 0.0), low)
            high = np.where(includes_zero, np.maximum(high, 0.0), high)
        low, high, p = (np.where(known, each, np.nan) for each in (low, high, p))
        return cls(low, high, p, floor & known)

    def within(self, limits: tuple[float, float] | None) -> Inference:
        """Return the inference with intervals cut to the range of the values, if it is known."""
        if limits is None:
            return self
        return replace(self, low=np.clip(self.low, *limits), high=np.clip(self.high, *limits))

    def fill(self, cells: Ints, own: Inference) -> None:
        """Replace the values of some cells."""
        self.low[cells], self.high[cells] = own.low, own.high
        self.p[cells], self.floor[cells] = own.p, own.floor


def infer(
    sums: EffectSums,
    settings: spec.Statistics,
    draws: Resamples,
    tests: int,
    *,
    tested: bool = True,
    limits: tuple[float, float] | None = None,
) -> Inference:
    """Compute intervals and p-values with the method of `stats test`.

    Cells of equal units don't show how other units differ. They have neither interval nor p,
    unless the range of the values bounds the mean.

    Args:
        sums: Effects of the cells.
        settings: Method and confidence.
        draws: Units, strata, seed, and the requested number of resamples.
        tests: Number of cells over which the smallest p is corrected.
        tested: Whether 0 means "no effect", so that the value has a p.
        limits: The least and the greatest mean, if they are known.
    """
    skewed = skewed_t(sums, draws.strata)
    low, high, p, floor = _by_method(sums, skewed, settings, draws, tests)
    equal = np.flatnonzero(skewed.flat & ~np.asarray(sums.fixed) & (sums.held >= MIN_UNITS))
    low[equal] = high[equal] = p[equal] = np.nan
    floor[equal] = False
    if limits is not None:
        low, high = np.clip(low, *limits), np.clip(high, *limits)
        low[equal], high[equal], p[equal] = equal_value_inference(
            sums.value[equal], sums.held[equal], limits, settings.confidence
        )
    if tested:
        return Inference.of(low, high, p, floor, 1 - settings.confidence / 100)
    known, nothing = np.isfinite(low) & np.isfinite(high), np.full(len(p), np.nan)
    low, high = (np.where(known, end, np.nan) for end in (low, high))
    return Inference(low, high, nothing, np.zeros(len(p), dtype=bool))


def draw_count(settings: spec.Statistics, tests: int) -> int:
    """Return the number of flips or resamples of the method; 0 for the formula of `t`."""
    level = 1 - settings.confidence / 100
    if settings.test == "t":
        return 0
    if settings.test == "flips":
        return flip_count(tests, level)
    return max(settings.resamples, min(MAX_RESAMPLES, ceil(2 * FLIPS_PER_TEST * tests / level)))


def _by_method(
    sums: EffectSums, skewed: SkewedT, settings: spec.Statistics, draws: Resamples, tests: int
) -> tuple[Floats, Floats, Floats, Bools]:
    if settings.test == "t":
        low, high = skewed.interval(settings.confidence, MIN_UNITS)
        return low, high, skewed.p(), np.zeros(len(low), dtype=bool)
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
    """Compute inferences for the difference of two shares; p is the level at which its limits reach
    0.

    Args:
        patched: Sums of 0 or 1 per row.
        base: Sums of the other run.
        rows: Number of rows, shape [cell].
        confidence: In percent.
        base_rows: Number of rows of the other run, if it has different rows, shape [cell].
    """
    low, high = share_difference(patched, base, rows, confidence, base_rows)
    least, most = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        ends = share_difference(patched, base, rows, 100 * (1 - middle), base_rows)
        with np.errstate(invalid="ignore"):
            excludes = (ends[0] > 0) | (ends[1] < 0)
        least, most = np.where(excludes, least, middle), np.where(excludes, middle, most)
    # Shared units differ in their sums; two samples share no units.
    unequal = np.count_nonzero(patched.top != base.top, axis=1)
    p = np.maximum(most, 2.0 ** (1.0 - unequal))
    p = np.where(patched.value == base.value, 1.0, np.minimum(p, 1.0))
    return Inference.of(low, high, p, np.zeros(len(rows), dtype=bool), 1 - confidence / 100)


LIMITED_UNITS = ("probability", "share")
"""Units of metrics with values from 0 to 1. Shares of attention aren't among them: rules scale
attention."""

ROUNDED = 0.0005
"""Largest excess over a limit that rounding may explain."""

SHARE_RUNS: Mapping[str, tuple[str, str | None]] = {
    "raw": ("patched", None),
    "delta": ("patched", "base"),
    "total": ("source", "base"),
}
"""Effect of a share → the run with the share, and the run that it is compared with."""


def _empty(cells: int) -> CellStatistics:
    """Return arrays of NaN to be filled."""
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
        repeated=np.zeros(cells, dtype=bool),
        units=np.zeros(cells, dtype=np.int64),
        floor=np.zeros(cells, dtype=bool),
        equal=np.zeros(cells, dtype=bool),
        has_p=False,
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
        """Number of prompts, shape [cell]."""
        return np.count_nonzero(self.rows.present, axis=1)

    def strata(self, sampling: SamplingDesign) -> Ints | None:
        """Return the strata of new samples, shape [unit]."""
        return sampling.draws(self.units, whole=self.whole).strata


def _unit_blocks(
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign
) -> Iterator[_UnitBlock]:
    """Yield all cells of a measure by their units."""
    for cells, seen in cells_by_view(data):
        units = sampling.units(seen)
        for block in cell_blocks(len(cells), max(sampling.settings.resamples, sampling.prompts)):
            some = cells[block]
            rows = effect_parts(data, effect, some)
            full = sampling.whole(rows.present)
            for whole in (True, False):
                indices = np.flatnonzero(full == whole)
                if len(indices):
                    part = (
                        rows
                        if len(indices) == len(some)
                        else effect_parts(data, effect, some[indices])
                    )
                    yield _UnitBlock(some[indices], units, part, part.sums(units), whole)


def _numbers(
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign, tests: int = 1
) -> CellStatistics:
    """Compute everything except the corrected p.

    Args:
        tests: Number of cells over which the smallest p is corrected.
    """
    data, sampling = reorder_rows(data, sampling.order), sampling.ordered
    statistics = _empty(data.patched.shape[0])
    reasons: list[str | None] = [None] * len(statistics.mean)
    further = {name: np.full(len(statistics.mean), np.nan) for name in ROW_STATISTICS}
    failures: dict[str, str] = {}
    for block in _unit_blocks(data, effect, sampling):
        cells, rows, n = block.cells, block.rows, block.n
        statistics.n[cells], statistics.units[cells] = n, block.sums.held
        statistics.mean[cells] = rows.mean()
        inference = _inference(data, effect, sampling, block, tests)
        statistics.low[cells], statistics.high[cells] = inference.low, inference.high
        if effect.tested:
            statistics.p[cells] = np.where(data.inert[cells], np.nan, inference.p)
            statistics.floor[cells] = inference.floor & ~data.inert[cells]
        statistics.base_mean[cells] = _mean_within(data.base, cells, rows.present)
        statistics.source_mean[cells] = _mean_within(data.source, cells, rows.present)
        statistics.rounding[cells] = rounding_bound(data, effect, cells, rows.present)
        for name, values in further.items():
            values[cells] = _row_statistic(name, rows, failures)
        lacks_interval = np.isnan(inference.low) & (block.sums.held >= MIN_UNITS)
        equal = skewed_t(block.sums, block.strata(sampling)).flat & lacks_interval & ~rows.fixed
        denominators = _denominators(block, sampling)
        weak = None if denominators is None else denominators.weak & (n > 0)
        equal &= np.isfinite(statistics.mean[cells]) & (weak is None or ~weak)
        statistics.equal[cells] = equal
        word = sampling.unit_word(block.units)
        for offset, cell in enumerate(cells.tolist()):
            undefined = int(rows.undefined[offset])
            is_weak = weak is not None and bool(weak[offset])
            if is_weak:
                for values in (statistics.mean, statistics.low, statistics.high, statistics.p):
                    values[cell] = np.nan
            gap = interval_gap(
                int(statistics.units[cell]),
                word,
                sampling.settings,
                is_ratio=denominators is not None and not is_weak,
                is_equal=bool(equal[offset]),
            )
            about = denominators.describe(offset, gap) if denominators and is_weak else ""
            reasons[cell] = _reason(data, effect, statistics, cell, undefined, gap, about)
    for values in (
        statistics.mean,
        statistics.low,
        statistics.high,
        statistics.base_mean,
        statistics.source_mean,
    ):
        values[~np.isfinite(values)] = np.nan
    return replace(
        statistics,
        reasons=tuple(reasons),
        has_p=effect.tested,
        further=further,
        failures=failures,
    )


def _row_statistic(name: str, rows: EffectParts, failures: dict[str, str]) -> Floats:
    """Return a statistic of the rows' effects, shape [cell].

    It is NaN for a ratio of means, as no row has one, and for a class that fails, whose exception
    is noted in `failures`.
    """
    entry, statistic = ROW_STATISTICS[name], np.full(len(rows.present), np.nan)
    if rows.denominator is not None:
        failures[name] = f"`{rows.effect.name}` is a ratio of means: no row has one"
        return statistic
    for cell, present in enumerate(rows.present):
        effects = rows.numerator[cell][present]
        if len(effects) < entry.min_rows:
            continue
        try:
            statistic[cell] = float(entry.compute(effects))
        except Exception as error:
            failures[name] = f"`compute` failed: {type(error).__name__}: {error}"
    return statistic


def _inference(
    data: MeasureData, effect: EffectKind, sampling: SamplingDesign, block: _UnitBlock, tests: int
) -> Inference:
    """Compute the inference by the type of value."""
    settings, cells = sampling.settings, block.cells
    nothing = np.full(len(cells), np.nan)
    if data.spread != "rows":
        return Inference(nothing, nothing, nothing, np.zeros(len(cells), dtype=bool))
    shares = cell_shares(data, effect, cells)

    def by_method(sums: EffectSums) -> Inference:
        draws = sampling.draws(block.units, whole=block.whole)
        limits = mean_range(data)
        return infer(sums, settings, draws, tests, tested=effect.tested, limits=limits)

    if shares is None:
        return by_method(block.sums)
    inference = _share_inference(data, effect, block, shares, settings.confidence)
    others = np.flatnonzero(~shares.exact)
    if len(others):
        inference.fill(others, by_method(block.sums.chosen(others)))
    return inference


def mean_range(data: MeasureData) -> tuple[float, float] | None:
    """Return the least and the greatest mean of a measure of probabilities, shares or lengths, or
    of their differences; None for other measures."""
    most = 1.0 if data.unit in LIMITED_UNITS else data.most
    if most is None or not data.word or data.estimator or data.effect not in SHARE_RUNS:
        return None
    runs = [each for each in (data.patched, data.base, data.source) if each is not None]
    if any(((run < -ROUNDED) | (run > most + ROUNDED)).any() for run in runs):
        return None
    return (0.0 if data.effect == "raw" else -most), most


def _share_inference(
    data: MeasureData,
    effect: EffectKind,
    block: _UnitBlock,
    shares: CellShares,
    confidence: float,
) -> Inference:
    """Compute the inference of shares, and of differences of shares."""
    effect_sums, *other = shares.sums(block.units)
    if not other:  # a single share isn't a difference and has no p
        low, high = share_interval(effect_sums, block.n, confidence)
        return Inference(low, high, np.full(len(low), np.nan), np.zeros(len(low), dtype=bool))
    inference = infer_shares(effect_sums, other[0], block.n, confidence)
    low, high = _inert_at_zero(data, effect, block.cells, (inference.low, inference.high))
    return replace(inference, low=low, high=high)


def _inert_at_zero(
    data: MeasureData, effect: EffectKind, cells: Ints, limits: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Return limits of differences of shares, shape [cell], with those of inert cells at 0: no row
    of them can differ from the base run."""
    low, high = limits
    still = data.inert[cells] & effect.of_intervention & ~np.isnan(low)
    return np.where(still, 0.0, low), np.where(still, 0.0, high)


@dataclass(frozen=True, eq=False)
class CellShares:
    """Cells whose effect is a share, or the difference of two shares."""

    exact: Bools
    """Whether all rows of the cell are 0 or 1, shape [cell]."""
    present: Bools
    """Shape [cell, prompt]."""
    runs: tuple[Floats, ...]
    """The run with the share and the one that it is compared with, each [cell, prompt]."""

    def sums(self, units: Units, of: int = 0) -> list[EffectSums]:
        """Return the sums of each run over units; `of` is the experiment's index among those of
        the units."""
        bottom = units.total(self.present.astype(np.float64), of)
        held = units.held(self.present, of)
        return [
            EffectSums(units.total(np.where(self.present, run, 0.0), of), bottom, held)
            for run in self.runs
        ]


def is_share(data: MeasureData) -> bool:
    """Return whether a measure counts rows: by its unit, or for a function of a Python file, which
    has no unit, if all values of all runs are 0 or 1."""
    if data.unit == "share":
        return True
    if data.word != PYTHON_CALL or data.unit or data.estimator:
        return False
    runs = [each for each in (data.patched, data.base, data.source) if each is not None]
    return all(bool((np.isin(run, (0.0, 1.0)) | np.isnan(run)).all()) for run in runs)


def cell_shares(data: MeasureData, effect: EffectKind, cells: Ints) -> CellShares | None:
    """Return the shares among some cells; None if there are none."""
    if effect.name not in SHARE_RUNS or not is_share(data):
        return None
    present = effect_parts(data, effect, cells).present
    exact = np.ones(len(cells), dtype=bool)
    runs: list[Floats] = []
    for name in SHARE_RUNS[effect.name]:
        if name is None:
            continue
        values = {"patched": data.patched, "base": data.base, "source": data.source}[name]
        if values is None:
            return None
        rows = values[cells] if len(values) > 1 else values
        runs.append(np.broadcast_to(rows, (len(cells), rows.shape[1])))
        exact &= (np.isin(runs[-1], (0.0, 1.0)) | ~present).all(axis=1)
    return CellShares(exact, present, tuple(runs)) if exact.any() else None


def share_mask(data: MeasureData, effect: EffectKind) -> Bools:
    """Return which of the cells with rows are shares or differences of shares. Shape [cell with
    rows]."""
    there = np.flatnonzero(effect_parts(data, effect, slice(None)).present.any(axis=1))
    shares = cell_shares(data, effect, there)
    return np.zeros(len(there), dtype=bool) if shares is None else shares.exact


def share_limits(
    data: MeasureData,
    effect: EffectKind,
    cells: Ints,
    units: Units,
    confidence: float,
    of: int = 0,
) -> tuple[Bools, Floats, Floats] | None:
    """Return which cells are shares or differences of shares, and their exact limits, shape [cell]
    each; None if there are none.

    Args:
        data: The measure.
        effect: Its effect.
        cells: Indices of the cells.
        units: Units of the rows.
        confidence: In percent.
        of: Index of the experiment among those of the units.
    """
    shares = cell_shares(data, effect, cells)
    if shares is None:
        return None
    effect_sums, *other = shares.sums(units, of)
    n = np.count_nonzero(shares.present, axis=1)
    if not other:
        return shares.exact, *share_interval(effect_sums, n, confidence)
    limits = share_difference(effect_sums, other[0], n, confidence)
    return shares.exact, *_inert_at_zero(data, effect, cells, limits)


def _denominators(block: _UnitBlock, sampling: SamplingDesign) -> Denominators | None:
    """Return the denominators of a block of ratios; None for means."""
    if block.rows.denominator is None:
        return None
    bottom = np.broadcast_to(block.rows.denominator, block.rows.present.shape)
    ones = block.rows.present.astype(np.float64)
    sums = EffectSums(block.units.total(bottom), block.units.total(ones), block.sums.held)
    return Denominators.of(sums, block.strata(sampling), sampling.settings.confidence)


DENOMINATOR_MARGIN = 2.0
"""Minimum size of a ratio's denominator, in half widths of its interval by Student's t: Fieller's g
is at most 1/4 (Finney 1971). Where the true denominator is one standard error, an interval that
excludes 0 lets through one sample in six: those whose denominator is large by chance, with ratios
that are too small."""


@dataclass(frozen=True, eq=False)
class Denominators:
    """Denominators of ratios with their intervals, shape [cell] each."""

    value: Floats
    low: Floats
    """By the method for ratios; below `MIN_UNITS`, where a ratio has no interval, Student's; for
    one unit, the value."""
    high: Floats
    least: Floats
    """Minimum absolute value for a ratio with an interval."""

    @classmethod
    def of(cls, sums: EffectSums, strata: Ints | None, confidence: float) -> Denominators:
        """Compute the denominators of cells.

        Args:
            sums: The denominators as means over rows.
            strata: Strata of the units, shape [unit].
            confidence: In percent.
        """
        value = sums.value
        low, high = skewed_t(sums, strata).interval(confidence, MIN_UNITS)
        width = np.nan_to_num(student_quantile(confidence, sums.held) * standard_error(sums))
        few = sums.held < MIN_UNITS
        low, high = np.where(few, value - width, low), np.where(few, value + width, high)
        return cls(value, low, high, np.where(few, 0.0, DENOMINATOR_MARGIN * width))

    @property
    def weak(self) -> Bools:
        """Whether a denominator is too close to 0 for a ratio, shape [cell]."""
        with np.errstate(invalid="ignore"):
            excludes_zero = (self.low > 0) | (self.high < 0)
            return ~excludes_zero | (np.abs(self.value) < self.least)

    def describe(self, cell: int, gap: str) -> str:
        """Describe a weak denominator and its interval; empty if it is 0 without a spread.

        Args:
            cell: Index of the cell.
            gap: Why it has no interval.
        """
        value, low, high = (float(each[cell]) for each in (self.value, self.low, self.high))
        if low == high == 0:
            return ""
        ends = f"[{low:.3g}, {high:.3g}]" if np.isfinite(low) else f"without an interval ({gap})"
        return f"{value:.3g} {ends}"


def rounding_bound(
    data: MeasureData, effect: EffectKind, cells: Ints, present: Bools
) -> Floats | float:
    """Return the maximum effect of rounding on the mean, NaN if unknown. Shape [cell]."""
    if effect.tested:
        return np.where(data.inert[cells], np.nan, _rounding(data, effect, cells))
    return _mean_within(data.rounding, cells, present)


def _rounding(data: MeasureData, effect: EffectKind, cells: CellIndex) -> Floats:
    """Return the change of the effect by maximum rounding in the same direction everywhere. Shape
    [cell]."""
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
    elif source is not None:  # the change from one unpatched run to the other
        source = moved
    measure_data = replace(data, patched=there, base=base, source=source)
    rounding = effect_parts(measure_data, effect, slice(None)).mean()
    if effect.circuit is not None:  # the effect of the base run isn't 0
        there = np.where(np.isnan(patched), np.nan, base)
        rounding -= effect_parts(replace(measure_data, patched=there), effect, slice(None)).mean()
    return np.abs(rounding)


def _mean_within(values: Floats | None, cells: CellIndex, present: Bools) -> Floats | float:
    """Return the mean of a run over the prompts of each cell."""
    if values is None:
        return np.nan
    rows = values[cells] if values.shape[0] > 1 else values
    count = np.count_nonzero(present, axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(present, rows, 0.0).sum(1) / np.where(count > 0, count, np.nan)


def _reason(
    data: MeasureData,
    effect: EffectKind,
    statistics: CellStatistics,
    cell: int,
    undefined: int,
    gap: str,
    zero: str,
) -> str | None:
    """Describe why a value of a cell is missing.

    Args:
        gap: The reason if it has no interval.
        zero: Its denominator in words, if that is too close to 0.
    """
    said: list[str] = []
    if data.missing is not None:
        return f"not computed ({data.missing.code}): {data.missing.reason}"
    if data.gaps and data.gaps[cell]:
        return data.gaps[cell]
    if statistics.n[cell] == 0:
        return "no prompt is part of this cell"
    if undefined:
        said.append(f"the base run's value is 0 in {undefined} of {statistics.n[cell]} prompts")
    elif zero:
        said.append(f"{effect.divisor} is too close to 0 there: {zero}")
    elif not np.isfinite(statistics.mean[cell]):
        by_zero = effect.denominator is not None and not np.isinf(statistics.mean[cell])
        said.append(f"{effect.divisor} is 0" if by_zero else "infinite for at least one prompt")
    if data.spread in NO_INTERVAL_REASONS:
        said.append(NO_INTERVAL_REASONS[data.spread])
    elif np.isfinite(statistics.mean[cell]) and not np.isfinite(statistics.low[cell]):
        said.append(gap)
    if data.inert[cell]:
        said.append(f"cannot differ from {effect.name_inert_runs('the base run')}: not tested")
    elif not effect.tested:
        said.append(f"`{effect.name}` is not a difference: no p")
    return "; ".join(said) or None


def compute_category_statistics(
    values: Floats, truth: Floats | None, rounding: Floats | None = None
) -> CellStatistics:
    """Compute the most frequent value of each cell, its share and the mean absolute error.

    Args:
        values: Shape [cell, prompt], NaN if a prompt isn't part of the cell.
        truth: The correct numbers, shape [1 or cell, prompt].
        rounding: 1 where rounding may change the category, shape [1 or cell, prompt].
    """
    statistics = _empty(len(values))
    reasons: list[str] = []
    for cell, row in enumerate(values):
        present = ~np.isnan(row)
        seen = row[present]
        statistics.n[cell] = len(seen)
        if not len(seen):
            reasons.append("no prompt is part of this cell")
            continue
        distinct, counts = np.unique(seen, return_counts=True)
        statistics.commonest[cell] = distinct[counts.argmax()]
        statistics.share[cell] = counts.max() / len(seen)
        if truth is not None:
            right = truth[cell if len(truth) > 1 else 0]
            statistics.mean_error[cell] = np.abs(seen - right[present]).mean()
        if rounding is not None:
            moved = rounding[cell if len(rounding) > 1 else 0]
            statistics.rounding[cell] = moved[present].mean()
        unknown = np.isnan(statistics.mean_error[cell])
        reasons.append(
            "a category has no mean" + ("; no right number is known for it" if unknown else "")
        )
    return replace(statistics, reasons=tuple(reasons))


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
    """Compute means, intervals, p and corrected p of every cell.

    p is corrected over the numbers of all measures together, except cells that can't differ from
    the base run and measures without p. A number that several cells must have counts once.

    Args:
        groups: Values of `stats by`, shape [prompt].
        ids: Hashes of the rows' contents, shape [prompt]; rows with equal hashes are one unit.
        strata: Strata of evenly assigned values, shape [prompt].
        blocks: Prompt block of each row, if there are several, shape [prompt].
        picked: Whether sites were selected on these rows.

    Returns:
        One entry per measure.
    """
    if not measures:
        return []
    sampling = SamplingDesign(
        measures[0].patched.shape[1], settings, seed, ids, groups, strata, blocks
    )
    tested = [measure.kind == "number" and effects[measure.effect].tested for measure in measures]
    first = [
        find_repeated_cells(data, effects[data.effect]) if own else np.arange(len(data.patched))
        for data, own in zip(measures, tested, strict=True)
    ]
    tests = sum(
        len(np.unique(cells[~data.inert]))
        for data, cells, own in zip(measures, first, tested, strict=True)
        if own
    )
    alone = settings.correction in ("max", "none")
    statistics = [
        _numbers(data, effects[data.effect], sampling, 1 if alone else tests)
        if data.kind == "number"
        else compute_category_statistics(data.patched, data.truth, data.rounding)
        for data in measures
    ]
    statistics = [
        replace(statistic, repeated=statistic.tested & (cells != np.arange(len(cells))))
        for statistic, cells in zip(statistics, first, strict=True)
    ]
    exact = [
        _exact_cells(data, effects, statistic)
        for data, statistic in zip(measures, statistics, strict=True)
    ]
    return add_corrected_p(
        measures, statistics, sampling, effects, exact=exact, first=first, picked=picked
    )


def _exact_cells(
    data: MeasureData, effects: Registry[EffectKind], statistics: CellStatistics
) -> Bools:
    """Return the tested cells whose p comes from exact limits of shares. Shape [cell]."""
    exact, tested = statistics.tested, np.flatnonzero(statistics.tested)
    shares = cell_shares(data, effects[data.effect], tested) if len(tested) else None
    exact[tested] = False if shares is None else shares.exact
    return exact


def run_interval(
    values: Floats, sampling: SamplingDesign, of: MeasureData | None = None
) -> Interval:
    """Return the mean of a run's values, shape [prompt], with its interval.

    Args:
        of: The measure of the values; rows that it can't distinguish are one unit.
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
        word="" if of is None else of.word,
        seen=None if of is None or of.seen is None or len(of.seen) > 1 else of.seen,
    )
    statistics = _numbers(data, EFFECTS["raw"], sampling)
    ends = (float(statistics.mean[0]), float(statistics.low[0]), float(statistics.high[0]))
    return Interval(*ends, int(statistics.n[0]))


def check_denominator(
    base: Floats,
    source: Floats | None,
    sampling: SamplingDesign,
    span: Span | None,
    *,
    effect: EffectKind,
) -> list[Diagnostic]:
    """Report E0604 if the effect's denominator can't be distinguished from 0, so that no cell needs
    to be run.

    Args:
        base: Shape [1 or cell, prompt], as in `MeasureData`.
        source: Like `base`.
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
    strata = sampling.draws(units, whole=bool(sampling.whole(present).all())).strata
    denominators = Denominators.of(sums, strata, sampling.settings.confidence)
    weak = denominators.weak & present.any(1)
    for cell in np.flatnonzero(weak)[:1].tolist():
        gap = interval_gap(int(sums.held[cell]), sampling.unit_word(units), sampling.settings)
        return [
            ZeroDenominator(
                span=span,
                effect=effect.name,
                divisor=effect.divisor,
                size=denominators.describe(cell, gap) or "0",
                n=int(present[cell].sum()),
            )
        ]
    return []
