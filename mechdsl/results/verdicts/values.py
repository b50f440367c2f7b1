"""Values of expectations: cells, effects, accuracies, correlations and ranks.

`argmax(x) = L9H9` and `top 3 contains L9H9, L9H6` test whether a cell leads. A cell is the largest
if it exceeds every other one, so each difference is tested at the full level (an intersection-union
test: Berger 1982). Where any of several cells may be the larger one, their bounds are simultaneous.

`auroc(effect, truth)` measures how well an effect ranks the positive cells, or the positive rows of
one cell. Its interval is from the bootstrap (`fisher_interval`) unless the order is perfect: then
no resample has another order, and the bootstrap's interval would be a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.text import count_noun, name_list
from mechdsl.checks.conditions import (
    Absolute,
    Accuracy,
    Area,
    Arithmetic,
    CellSelection,
    CellValue,
    ConditionValue,
    ConstantValue,
    Correlation,
    Ranking,
    truth_value,
)
from mechdsl.fits.agreement import auroc, pearson, spearman
from mechdsl.program import spec
from mechdsl.program.significance import MIN_UNITS, interval_gap, smallest_p_value, unequal_units
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.verdicts.estimates import (
    CombinedCells,
    CombinedNumbers,
    Estimate,
    FixedNumber,
    IntervalFunction,
    NoNumber,
    NotComputed,
    SmoothNumber,
    WeightedCells,
    absolute_estimate,
    cell_slopes,
    combine_cells,
    combine_estimates,
    constant_estimate,
    exact_interval,
    fisher_interval,
    is_linear,
    is_single_cell,
    map_interval,
    number_skewed_t,
    studentise_number,
    weighted_cells,
)
from mechdsl.statistics.cell_statistics import Inference, infer, mean_range, share_limits
from mechdsl.statistics.comparisons import true_correlation
from mechdsl.statistics.intervals import (
    SimultaneousBounds,
    clopper_pearson,
    simultaneous_bounds,
    skewed_t,
)
from mechdsl.statistics.measurements import (
    NO_INTERVAL_REASONS,
    EffectSums,
    MeasureData,
    Resamples,
    UnitRows,
    Units,
    cells_by_view,
    effect_parts,
    find_units,
)
from mechdsl.vocab.aggregates import AGGREGATES, CellAggregate
from mechdsl.vocab.metrics import EFFECTS


@dataclass(frozen=True)
class NearestRival:
    """The cell that is hardest to distinguish from the leader, and the difference to it."""

    cell: int
    value: float
    low: float
    high: float


def compare_with_each_rival(
    space: ComparisonSample,
    of: SelectedCells,
    leader: int,
    rivals: Ints,
    sign: float,
    confidence: float,
) -> NearestRival:
    """Compute a separate interval of each rival's difference; return the one with the lowest
    end."""
    low, high, value = (np.full(len(rivals), np.nan) for _ in range(3))
    sums = cell_differences(space, of, np.full(len(rivals), leader), rivals, sign, -sign)
    settings = space.settings(confidence)
    step = max(1, 4_000_000 // space.draws.resamples)
    for start in range(0, len(rivals), step):
        block = slice(start, start + step)
        effect_sums = sums.chosen(block)
        inference = infer(effect_sums, settings, space.draws, 1)
        value[block], low[block], high[block] = effect_sums.value, inference.low, inference.high
    least = int(np.argmin(np.where(np.isnan(low), -np.inf, low)))
    return NearestRival(
        int(rivals[least]), float(value[least]), float(low[least]), float(high[least])
    )


def compare_with_rival(
    space: ComparisonSample,
    of: SelectedCells,
    leaders: Ints,
    rival: int,
    sign: float,
    confidence: float,
) -> SimultaneousBounds:
    """Return the differences to one rival with simultaneous bounds. Shape [leader]."""
    rivals = np.full(len(leaders), rival)
    sums = cell_differences(space, of, leaders, rivals, sign, -sign)
    return space.together(sums, confidence)


def compare_sizes(
    space: ComparisonSample, of: SelectedCells, leader: int, confidence: float
) -> Floats:
    """Return simultaneous low bounds of how much the leader's absolute value exceeds that of each
    other cell, NaN without an interval. Shape [other cell]."""
    places = {int(cell): n for n, cell in enumerate(of.cells)}
    mine = space.sums(of).value[places[leader]]
    sign = -1.0 if mine < 0 else 1.0
    rivals = of.cells[of.cells != leader]
    leaders = np.full(len(rivals), leader)
    above = cell_differences(space, of, leaders, rivals, sign, -1.0)
    below = cell_differences(space, of, leaders, rivals, sign, 1.0)
    both = EffectSums(
        np.concatenate([above.top, below.top]),
        above.bottom if len(above.bottom) == 1 else np.concatenate([above.bottom, below.bottom]),
        np.concatenate([above.held, below.held]),
    )
    return space.together(both, confidence).low_together.reshape(2, -1).min(0)


def cell_differences(
    space: ComparisonSample, of: SelectedCells, left: Ints, right: Ints, sign: float, other: float
) -> EffectSums:
    """Return `sign` × the left cell's effect + `other` × the right one's. Shape [pair]."""
    places = {int(cell): n for n, cell in enumerate(of.cells)}
    one = np.array([places[int(cell)] for cell in left], dtype=np.int64)
    two = np.array([places[int(cell)] for cell in right], dtype=np.int64)
    sums = space.sums(of)
    held = np.minimum(sums.held[one], sums.held[two])
    if len(sums.bottom) == 1:
        rounding = np.broadcast_to(sums.rounding, sums.top.shape)
        top = sign * sums.top[one] + other * sums.top[two]
        fixed = np.broadcast_to(sums.fixed, sums.held.shape)
        rounding, fixed = rounding[one] + rounding[two], fixed[one] & fixed[two]
        return EffectSums(top, sums.bottom, held, rounding, fixed)
    # Means over different rows and different ratios are linearised to pseudo-values.
    every = np.ones((1, sums.top.shape[1]))
    values: Floats = sums.value
    moves = sums.top - values[:, None] * sums.bottom
    moves *= sums.top.shape[1] / sums.bottom.sum(1, keepdims=True)
    top = sign * moves[one] + other * moves[two]
    top += (sign * values[one] + other * values[two])[:, None]
    return EffectSums(top, every, held)


def rank_true_cells(
    space: ComparisonSample, of: SelectedCells, truth: Sequence[CellSelection], confidence: float
) -> Estimate:
    """Estimate how often a positive cell has the greater effect. For a perfect order, the
    confidence is that of the differences of all pairs of cells together."""
    true = np.array(
        [
            any(cell_selection.matches(of.result.cells[i]) for cell_selection in truth)
            for i in of.cells
        ]
    )
    if not 0 < true.sum() < len(true):
        which = "none" if not true.sum() else "every one"
        raise NoNumber(f"{which} of the {len(true)} cells is a true one")
    sums = space.sums(of)
    point = float(auroc(sums.value[None], true)[0])
    gap = space.too_few or space.too_unequal(sums, confidence, space.draws.strata)
    if gap is not None:
        return Estimate(point, why=gap)
    if point in (0.0, 1.0):
        sign = 1.0 if point else -1.0
        left, right = np.meshgrid(of.cells[true], of.cells[~true])
        pairs = cell_differences(space, of, left.ravel(), right.ravel(), sign, -sign)
        sure = space.together(pairs, confidence).low_together > 0
        return _perfect_estimate(point, float(sure.mean()))
    true_cells = [
        auroc(sums.under(weights), true) for weights in space.draws.weights(4 * len(sums.top))
    ]
    return _resampled_estimate(space, point, np.concatenate(true_cells), confidence)


def list_truths(result: ExperimentResult, ranking: Ranking) -> list[bool | None]:
    """Return which rows are positive: by a variable of the prompts, or by the answers of a run;
    None for a row without a value."""
    if ranking.run is None:
        return [truth_value(each) for each in result.row_values[ranking.column or ""]]
    ids = result.row_ids or range(result.prompts)
    right = dict(
        zip(
            result.accuracy_rows.get(ranking.run, ids),
            map(truth_value, result.accuracy[ranking.run].tolist()),
            strict=True,
        )
    )
    return [right.get(row) for row in ids]


def rank_true_rows(
    space: ComparisonSample, of: SelectedCells, ranking: Ranking, confidence: float
) -> Estimate:
    """Estimate how often a positive row has the greater effect. In a perfect order, all disjoint
    pairs of units are correct, and the exact limits of their share apply."""
    if len(of.cells) != 1:
        raise NoNumber(f"{len(of.cells)} cells match, not one")
    data = of.result.measures[of.measure]
    parts = effect_parts(data, EFFECTS[data.effect], of.cells)
    if parts.denominator is not None:
        raise NoNumber(f"`{data.effect}` is a ratio of means, which single rows don't have")
    truths = list_truths(of.result, ranking)
    known = parts.present[0] & np.array([truth is not None for truth in truths])
    true: Bools = np.array([bool(truth) for truth in truths]) & known
    false = ~np.array([bool(truth) for truth in truths]) & known
    if not true.any() or not false.any():
        name = ranking.column or f"accuracy({ranking.run})"
        raise NoNumber(f"`{name}` is the same in all {int(known.sum())} rows")
    place = space.place(of.result)
    effects, codes = parts.numerator[0], space.units.codes[place]
    ahead = effects[true][:, None] - effects[false][None]
    wins = (ahead > 0) + 0.5 * (ahead == 0)
    point = float(wins.mean())
    gap = space.too_few
    for words, rows in (("", known), ("positive rows: ", true), ("other rows: ", false)):
        why = space.too_unequal(parts.chosen_rows(rows).sums(space.units, place), confidence)
        gap = gap or (why and words + why)
    if gap is not None:
        return Estimate(point, why=gap)
    if point in (0.0, 1.0):
        pairs = np.array([min(len(np.unique(codes[each])) for each in (true, false))], dtype=float)
        low, high = clopper_pearson(point * pairs, pairs, confidence)
        return _perfect_estimate(point, float(low[0] if point else 1 - high[0]))
    resampled: list[Floats] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for weights in space.draws.weights(4 * len(effects)):
            one, two = weights[:, codes[true]], weights[:, codes[false]]
            resampled.append(((one @ wins) * two).sum(1) / (one.sum(1) * two.sum(1)))
    return _resampled_estimate(space, point, np.concatenate(resampled), confidence)


def _resampled_estimate(
    space: ComparisonSample, point: float, resampled: Floats, confidence: float
) -> Estimate:
    low, high = fisher_interval(2 * point - 1, 2 * resampled - 1, confidence)
    return Estimate(point, None, *space.include((low + 1) / 2, (high + 1) / 2, 0.5, confidence))


def _perfect_estimate(point: float, sure: float) -> Estimate:
    """Return a perfect estimate; `sure` is the share of the order that is certain."""
    return Estimate(point, None, sure, 1.0) if point else Estimate(point, None, 0.0, 1 - sure)


def match_effect_cells(
    mine: ExperimentResult, measure: int, other: ExperimentResult, other_measure: int
) -> tuple[Ints, Ints]:
    """Return the cells of two experiments with equal coordinates and a value in both."""
    places = {tuple(sorted(cell.coords.items())): i for i, cell in enumerate(other.cells)}
    pairs = [
        (i, places[key])
        for i, cell in enumerate(mine.cells)
        if (key := tuple(sorted(cell.coords.items()))) in places
        and np.isfinite(mine.statistics[measure].mean[i])
        and np.isfinite(other.statistics[other_measure].mean[places[key]])
    ]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


@dataclass(frozen=True, eq=False)
class SelectedCells:
    """Some cells of one measure of an experiment."""

    result: ExperimentResult
    measure: int
    cells: Ints


class CellSelector:
    """Selects the cells that an expectation names."""

    def __init__(self, result: ExperimentResult, others: Mapping[str, ExperimentResult]) -> None:
        self.result = result
        self.others = others

    def of(self, value: CellValue | Area | Ranking) -> SelectedCells:
        """Return the named cells that have a value; NoNumber if there are none."""
        result = self.result
        if isinstance(value, CellValue) and value.experiment is not None:
            result = self.other(value.experiment)
        value_cells = select_value_cells(result, value.measure, value.where)
        if not len(value_cells):
            cells = [i for i in range(len(result.cells)) if is_selected(result, i, value.where)]
            reasons = result.statistics[value.measure].reasons
            missing = result.measures[value.measure].missing
            if missing is not None:
                raise NotComputed(f"not computed ({missing.code}): {missing.reason}")
            raise NoNumber((reasons[cells[0]] if cells else None) or "no such cell")
        if isinstance(value, CellValue) and not value.aggregate and len(value_cells) > 1:
            raise NoNumber(f"{len(value_cells)} cells match, not one")
        return SelectedCells(result, value.measure, value_cells)

    def other(self, name: str) -> ExperimentResult:
        if name not in self.others:
            raise NotComputed(f"`{name}` could not be computed")
        return self.others[name]

    def pair(self, value: Correlation) -> tuple[SelectedCells, SelectedCells]:
        """Return the cells that two experiments share, for measures of one effect."""
        other = self.other(value.experiment)
        measure = self.result.measures[value.measure]
        same = [
            i
            for i, m in enumerate(other.measures)
            if m.kind == "number" and m.effect == measure.effect
        ]
        exact = [i for i in same if other.measures[i].label == measure.label]
        candidates = exact or same
        if len(candidates) != 1:
            raise NoNumber(
                f"`{other.name}` has {len(candidates)} measures `as {measure.effect}`, not one"
            )
        for data, of in ((measure, self.result), (other.measures[candidates[0]], other)):
            if data.missing is not None:
                why = f"`{data.effect} of {data.label}` of `{of.name}` could not be computed"
                raise NotComputed(f"{why} ({data.missing.code})")
        mine, theirs = match_effect_cells(self.result, value.measure, other, candidates[0])
        if len(mine) < 3:
            raise NoNumber(f"only {len(mine)} cells have the same coordinates in `{other.name}`")
        return (
            SelectedCells(self.result, value.measure, mine),
            SelectedCells(other, candidates[0], theirs),
        )

    def all_of(self, value: ConditionValue) -> Iterator[SelectedCells]:
        """Yield all cells that a value reads."""
        match value:
            case ConstantValue() | Accuracy():
                return
            case Arithmetic():
                yield from self.all_of(value.left)
                yield from self.all_of(value.right)
            case Absolute():
                yield from self.all_of(value.operand)
            case Correlation():
                yield from self.pair(value)
            case _:
                yield self.of(value)


def average_cells(data: MeasureData, cells: Ints, share: Floats) -> MeasureData | None:
    """Return the weighted average of each row over cells, as a measure of one cell; None if the
    cells have different rows.

    Args:
        data: The measure.
        cells: Indices of its cells.
        share: Weights with the sum 1, shape [cell].
    """
    there = ~np.isnan(data.patched[cells])
    if (there != there[:1]).any():
        return None

    def averaged(values: Floats | None) -> Floats | None:
        if values is None:
            return None
        rows = values[cells] if len(values) > 1 else values
        average = share @ np.broadcast_to(rows, there.shape)
        # Rounding must not turn an average of equal values into another value.
        return np.clip(average, rows.min(0), rows.max(0))[None]

    patched, base = averaged(data.patched), averaged(data.base)
    assert patched is not None
    assert base is not None
    return replace(
        data,
        patched=patched,
        base=base,
        source=averaged(data.source),
        inert=data.inert[cells].all(keepdims=True),
        same=None,
    )


def is_selected(result: ExperimentResult, cell: int, where: Sequence[CellSelection]) -> bool:
    return all(cell_selection.matches(result.cells[cell]) for cell_selection in where)


def select_value_cells(
    result: ExperimentResult, measure: int, where: Sequence[CellSelection]
) -> Ints:
    """Return the selected cells that have a value."""
    means = result.statistics[measure].mean
    value_cells = [
        i for i in range(len(means)) if np.isfinite(means[i]) and is_selected(result, i, where)
    ]
    return np.array(value_cells, dtype=np.int64)


def rounding_bounds(of: SelectedCells) -> Floats:
    """Return the maximum effect of rounding on each cell, 0 if unknown. Shape [cell]."""
    return np.nan_to_num(of.result.statistics[of.measure].rounding[of.cells])


def has_base_run_bounds(result: ExperimentResult, measure: int) -> bool:
    """Whether rounding bounds are those of the base run, which may not hold in cells: `correct` and
    ranks change where two logits are close."""
    return result.measures[measure].unit in ("share", "rank")


class ComparisonSample:
    """The units of everything that one comparison reads, and their draws. Rows of equal content are
    one unit in all experiments, so that differences between experiments are paired."""

    def __init__(self, mine: ExperimentResult, read: Sequence[SelectedCells]) -> None:
        self.mine = mine
        self.read = read
        self.results = [mine]
        for selected_cells in read:
            if all(selected_cells.result is not known for known in self.results):
                self.results.append(selected_cells.result)

    @cached_property
    def units(self) -> Units:
        rows = [self._rows(result) for result in self.results]
        design = None if self.mine.groups is not None else self.mine.strata
        return find_units(rows, design)

    def _rows(self, result: ExperimentResult) -> UnitRows:
        seen = [
            numbers
            for selected_cells in self.read
            if selected_cells.result is result
            for cells, numbers in cells_by_view(result.measures[selected_cells.measure])
            if numbers is not None and np.isin(cells, selected_cells.cells).any()
        ]
        rows = result.sampling.rows(*seen)
        by = self.mine.settings.by if self.mine.settings else None
        if result is self.mine or by is None or by not in result.row_values:
            return rows if result is self.mine else replace(rows, groups=None)
        return replace(rows, groups=np.array([str(value) for value in result.row_values[by]]))

    @cached_property
    def draws(self) -> Resamples:
        whole = all(self._whole(selected_cells) for selected_cells in self.read)
        return self.mine.sampling.draws(self.units, whole=whole)

    def _whole(self, of: SelectedCells) -> bool:
        """Whether its cells have all units, or all of every stratum that they have any of."""
        if of.result is not self.mine:
            return bool((self.sums(of).held == self.units.count).all())
        data = of.result.measures[of.measure]
        present = effect_parts(data, EFFECTS[data.effect], of.cells).present
        return bool(self.mine.sampling.whole(present).all())

    def sums(self, of: SelectedCells) -> EffectSums:
        data = of.result.measures[of.measure]
        parts = effect_parts(data, EFFECTS[data.effect], of.cells)
        return parts.sums(self.units, self.place(of.result))

    def place(self, result: ExperimentResult) -> int:
        return next(i for i, known in enumerate(self.results) if known is result)

    @cached_property
    def held(self) -> int:
        """Smallest number of units of any value that is read."""
        counts = [self._held(selected_cells) for selected_cells in self.read]
        return min(counts, default=0)

    def _held(self, of: SelectedCells) -> int:
        data = of.result.measures[of.measure]
        present = effect_parts(data, EFFECTS[data.effect], of.cells).present
        some = np.atleast_2d(present.any(axis=0))
        return int(self.units.held(some, self.place(of.result))[0])

    @property
    def not_paired(self) -> str | None:
        """A note on comparisons between experiments, or blocks of one, with different rows."""
        cells = [
            selected_cells.result.cells[n]
            for selected_cells in self.read
            if PROMPTS_AXIS in selected_cells.result.axes
            for n in selected_cells.cells
        ]
        blocks = list(dict.fromkeys(str(cell.coords[PROMPTS_AXIS]) for cell in cells))
        if len(blocks) > 1:
            return f"not paired: rows of {name_list(blocks)}"
        read = [
            result
            for result in self.results
            if any(selected_cells.result is result for selected_cells in self.read)
        ]
        units = [
            (result.name, set(self.units.codes[self.place(result)].tolist())) for result in read
        ]
        (_, own), *others = units or [("", set[int]())]
        unit = "prompt" if self.mine.groups is None else self.mine.sampling.unit_word(self.units)
        words = [
            f"`{name}` has {len(own & theirs) or 'none'} of these {count_noun(len(own), unit)}"
            + f" and {count_noun(len(theirs - own), 'other')}" * bool(theirs - own)
            for name, theirs in others
            if theirs != own
        ]
        return f"not all paired: {'; '.join(words)}" if words else None

    @property
    def too_few(self) -> str | None:
        """Why there is no interval, if there is none."""
        if self.held >= MIN_UNITS:
            return None
        return self.gap(self.held, self.mine.sampling.settings.confidence)

    def cell_gap(self, sums: EffectSums, cell: int, confidence: float) -> str:
        """Return why a cell has no interval."""
        is_equal = bool(self.are_equal(sums)[cell])
        return self.gap(int(sums.held[cell]), confidence, is_equal=is_equal)

    def gap(self, held: int, confidence: float, *, is_equal: bool = False) -> str:
        """Return why a value over `held` units, with equal values or not, has no interval."""
        effects = [
            EFFECTS[selected_cells.result.measures[selected_cells.measure].effect]
            for selected_cells in self.read
        ]
        return interval_gap(
            held,
            self.mine.sampling.unit_word(self.units),
            self.settings(confidence),
            is_ratio=any(effect.denominator is not None for effect in effects),
            is_equal=is_equal,
        )

    def too_unequal(
        self, sums: EffectSums, confidence: float, strata: Ints | None = None
    ) -> str | None:
        """Return why cells have no interval by resampling or the jackknife although their units are
        enough: Student's t gives none, because few units hold most of the rows.

        Args:
            sums: Effects of the cells.
            confidence: In percent.
            strata: Strata of the units, shape [unit], if every cell has all units.
        """
        low, _ = skewed_t(sums, strata).interval(confidence, 1)
        if not np.isnan(low).any():
            return None
        effects = [
            EFFECTS[selected_cells.result.measures[selected_cells.measure].effect]
            for selected_cells in self.read
        ]
        return unequal_units(
            int(sums.held[np.isnan(low).argmax()]),
            self.mine.sampling.unit_word(self.units),
            confidence,
            is_ratio=any(effect.denominator is not None for effect in effects),
        )

    def include(
        self, low: float, high: float, value: float, confidence: float
    ) -> tuple[float, float]:
        """Extend an interval to the value that means "no effect" if so few units can't show one:
        they would all be on one side of it by chance too often."""
        level = 1 - confidence / 100
        if smallest_p_value(self.held, self.settings(confidence)) < level:
            return low, high
        return min(low, value), max(high, value)

    def intervals(
        self,
        sums: EffectSums,
        confidence: float,
        *,
        tested: bool = True,
        limits: tuple[float, float] | None = None,
    ) -> Inference:
        """Return the intervals of cells by the method of the table."""
        settings = self.settings(confidence)
        return infer(sums, settings, self.draws, 1, tested=tested, limits=limits)

    def together(
        self,
        sums: EffectSums,
        confidence: float,
        *,
        tested: bool = True,
        limits: tuple[float, float] | None = None,
    ) -> SimultaneousBounds:
        """Return the cells' own intervals, by the method of the table, and simultaneous bounds
        that are never nearer to the values. Those of cells of equal units are by Bonferroni."""
        bounds = simultaneous_bounds(sums, self.draws, confidence).within(limits)
        inference = self.intervals(sums, confidence, tested=tested, limits=limits)
        low = np.minimum(bounds.low_together, inference.low)
        high = np.maximum(bounds.high_together, inference.high)
        equal = np.flatnonzero(self.are_equal(sums))
        if limits is not None and len(equal):
            each = 100 - (100 - confidence) / len(sums.top)
            part = self.intervals(sums.chosen(equal), each, tested=tested, limits=limits)
            low[equal], high[equal] = part.low, part.high
        return SimultaneousBounds(bounds.value, inference.low, inference.high, low, high)

    def are_equal(self, sums: EffectSums) -> Bools:
        """Return whether all units of a cell have the same value within rounding, shape [cell]."""
        flat = skewed_t(sums, self.draws.strata).flat & ~np.asarray(sums.fixed)
        return flat & (sums.held >= MIN_UNITS)

    def settings(self, confidence: float) -> spec.Statistics:
        """Return the settings of the table at another confidence."""
        return self.mine.sampling.settings.model_copy(update={"confidence": confidence})


class _DistanceToOne(CellAggregate):
    """The area between a curve and 1: Σ w |1 − f| of the means f of its cells.

    References: Mueller et al. 2025 (arXiv 2504.13151), section 3.2: the circuit–model distance.
    """

    name = "cmd"

    def __init__(self, share: Floats) -> None:
        """Create the aggregate for [cell] weights."""
        self.share = share

    def combine(self, values: Floats) -> Floats:
        return np.abs(1 - values) @ self.share

    def slope(self, values: Floats) -> Floats:
        return -np.sign(1 - values) * self.share


class ValueReader:
    """Reads the values of one comparison over the same units."""

    def __init__(self, cells: CellSelector, values: Sequence[ConditionValue]) -> None:
        self.cells = cells
        self.space = ComparisonSample(
            cells.result, [read for value in values for read in cells.all_of(value)]
        )
        self.runs = {run for value in values for run in accuracy_runs(value)}
        self.confidence = cells.result.sampling.settings.confidence

    @cached_property
    def effective_n(self) -> int | None:
        """Smallest number of units of any value that is read; None if none is read."""
        counts = [self.cells.result.accuracy_of(run).n for run in self.runs]
        return min([*counts, *([self.space.held] if self.space.read else [])], default=None)

    def estimate(self, value: ConditionValue, confidence: float) -> Estimate:
        """Estimate a value; `confidence` is that of intervals of non-smooth values."""
        match value:
            case ConstantValue():
                return constant_estimate(value.value)
            case Arithmetic():
                left = self.estimate(value.left, confidence)
                right = self.estimate(value.right, confidence)
                if value.operator == "/" and not right.fixed:
                    divisor = self.ended(right, confidence)
                    if divisor.why is None and divisor.low <= 0 <= divisor.high:
                        ends = f"{divisor.point:.3g} [{divisor.low:.3g}, {divisor.high:.3g}]"
                        known = divisor.low == divisor.high
                        zero = (
                            "0" if known else f"a value that can't be distinguished from 0: {ends}"
                        )
                        raise NoNumber(f"it divides by {zero}")
                if left.smooth is None or right.smooth is None:
                    left, right = self.ended(left, confidence), self.ended(right, confidence)
                return combine_estimates(value.operator, left, right)
            case Absolute():
                inner = self.ended(self.estimate(value.operand, confidence), confidence)
                return absolute_estimate(inner, inner.low, inner.high)
            case Accuracy():
                return self.accuracy(value.run, confidence)
            case Correlation():
                return self.correlation(value, confidence)
            case Area():
                return self.area(value)
            case Ranking():
                return self.ranking(value, confidence)
            case CellValue():
                return self.of_cells(value, confidence)

    def ended(self, estimate: Estimate, confidence: float) -> Estimate:
        """Return the estimate with the ends of its interval."""
        if estimate.smooth is None or isinstance(estimate.smooth, FixedNumber):
            return estimate
        ends = exact_interval(estimate.smooth, confidence)
        known = ends is not None and not any(map(math.isnan, ends))
        if ends is not None and known and is_single_cell(estimate.smooth):
            return replace(estimate, low=ends[0], high=ends[1])
        gap = self.space.too_few or self.gap(estimate.smooth, confidence)
        if gap is not None:
            return replace(estimate, why=estimate.why or gap)
        if number_skewed_t(estimate.smooth, self.space.draws, self.space.held).flat[0]:
            if ends is not None and known:
                return replace(estimate, low=ends[0], high=ends[1])
            confidence = self.space.mine.sampling.settings.confidence
            reason = self.space.gap(self.space.held, confidence, is_equal=True)
            return replace(estimate, why=estimate.why or reason)
        ends = map_interval(
            estimate.smooth, lambda number: self.number_interval(number, confidence)
        )
        assert ends is not None
        return replace(estimate, low=ends[0], high=ends[1])

    def number_interval(self, number: SmoothNumber, confidence: float) -> tuple[float, float]:
        """Return the interval of several cells' number. That of a sum or difference of tested
        effects includes 0 if its p isn't below the level, as in the table."""
        draws, held = self.space.draws, self.space.held
        linear = is_linear(number)
        if linear and self.cells.result.sampling.settings.test == "t":
            corrected = number_skewed_t(number, draws, held)
            (low, high), p = corrected.interval(confidence, MIN_UNITS), corrected.p()
        else:
            studentised_cells = studentise_number(number, draws, held)
            (low, high), (p, _) = studentised_cells.interval(confidence), studentised_cells.p()
        effects = [
            selected_cells.result.measures[selected_cells.measure].effect
            for selected_cells in self.space.read
        ]
        is_difference = isinstance(number, CombinedNumbers) and number.sign == "-"
        if linear and (is_difference or all(EFFECTS[name].tested for name in effects)):
            nothing = np.zeros(len(p), dtype=bool)
            cut = Inference.of(low, high, p, nothing, 1 - confidence / 100)
            low, high = cut.low, cut.high
        is_product = isinstance(number, CombinedNumbers) and number.sign in ("*", "/")
        if is_product and any(EFFECTS[name].tested for name in effects):
            return self.space.include(float(low[0]), float(high[0]), 0.0, confidence)
        if isinstance(number, WeightedCells):
            return number.within((float(low[0]), float(high[0])))
        if not isinstance(number, CombinedCells):
            return float(low[0]), float(high[0])
        value = float(combine_cells(number.method, number.sums.value[None])[0])
        least, most = number.method.limits(len(number.sums.top))
        if not least <= value <= most:  # cells without any effect
            return float(low[0]), float(high[0])
        low, high = np.clip(low, least, most), np.clip(high, least, most)
        return float(low[0]), float(high[0])

    def gap(self, number: SmoothNumber, confidence: float) -> str | None:
        """Return why a number has no interval: one of its cells has none."""
        for cells in weighted_cells(number):
            limits = cells.limits if isinstance(cells, WeightedCells) else None
            if limits is not None:
                lacking = np.isnan(limits(confidence)).any(keepdims=True)
            else:
                lacking = np.isnan(self.space.intervals(cells.sums, confidence).low)
            if not is_single_cell(number):  # a cell of equal units doesn't hinder a comparison
                lacking = lacking & ~self.space.are_equal(cells.sums).all()
            if lacking.any():
                return self.space.cell_gap(cells.sums, int(lacking.argmax()), confidence)
        return None

    def of_cells(self, value: CellValue, confidence: float) -> Estimate:
        of = self.cells.of(value)
        method = AGGREGATES[value.aggregate or "mean"]
        if len(of.cells) < method.min_cells:
            raise NoNumber(
                f"{count_noun(len(of.cells), 'cell')}, but at least {method.min_cells} are needed"
            )
        sums, rounding = self.space.sums(of), rounding_bounds(of)
        means = of.result.statistics[of.measure].mean[of.cells]
        spread = of.result.measures[of.measure].spread
        if spread != "rows":
            point = float(combine_cells(method, means[None])[0])
            return (
                constant_estimate(point)
                if spread == "none"
                else Estimate(point, why=NO_INTERVAL_REASONS[spread])
            )
        about = Estimate(math.nan, as_in_base=has_base_run_bounds(of.result, of.measure))
        if value.aggregate in ("", "mean"):
            share = np.full(len(of.cells), 1 / len(of.cells))
            about = replace(about, point=float(means.mean()), rounding=float(rounding.mean()))
            return replace(about, smooth=self.weigh(of, sums, share))
        if not method.extreme:
            point = float(combine_cells(method, means[None])[0])
            slope = cell_slopes(method, means[None])[0]
            about = replace(about, point=point, rounding=float(np.abs(slope) @ rounding))
            return replace(about, smooth=CombinedCells(sums, method))
        largest = method.extreme == "largest"
        point = float(means.max() if largest else means.min())
        about = replace(about, point=point, rounding=float(rounding.max()), why=self.space.too_few)
        if about.why:
            return about
        bounds, equal = self.together(of, sums, confidence), self.space.are_equal(sums)
        few = np.flatnonzero((np.isnan(bounds.low) | np.isnan(bounds.high)) & ~equal)
        if not len(few) and np.isnan(bounds.low).all():
            few = np.arange(1)
        if len(few):
            name = of.result.cells[int(of.cells[few[0]])].name
            reason = self.space.cell_gap(sums, int(few[0]), confidence)
            return replace(about, why=f"{name}: {reason}")
        # The largest value exceeds every cell's simultaneous bound and is below the largest of the
        # separate bounds.
        # Cells of equal units may have any mean: they don't limit it on one side.
        unlimited = bool(np.isnan(bounds.low).any())
        if largest:
            low, high = np.nanmax(bounds.low_together), np.nanmax(bounds.high)
            high = np.inf if unlimited else high
        else:
            low, high = np.nanmin(bounds.low), np.nanmin(bounds.high_together)
            low = -np.inf if unlimited else low
        return replace(about, low=float(low), high=float(high))

    def shares(self, of: SelectedCells, confidence: float) -> tuple[Bools, Floats, Floats] | None:
        """Return which cells are shares, and their exact limits, shape [cell] each; None if none
        is."""
        data = of.result.measures[of.measure]
        units, place = self.space.units, self.space.place(of.result)
        return share_limits(data, EFFECTS[data.effect], of.cells, units, confidence, place)

    def weigh(self, of: SelectedCells, sums: EffectSums, share: Floats) -> WeightedCells:
        """Return a weighted mean of cells, with its limits.

        Cells with the same rows and denominators are averaged to one cell, which has the limits of
        a table row, as with `mean over` and `auc over`. Other cells that are shares have exact
        limits by Bonferroni.
        """
        known = mean_range(of.result.measures[of.measure])
        shares, joined, average = self.shares(of, 95.0), sums.weigh(share), None
        if shares is not None:
            average = average_cells(of.result.measures[of.measure], of.cells, share)
        if joined is not None and (shares is None or average is not None):
            limits = self._row_limits(of, joined, average)
            return WeightedCells(joined, np.ones(1), limits, known)
        if shares is not None and shares[0].all():
            return WeightedCells(sums, share, self._share_limits(of, share), known)
        return WeightedCells(sums, share, range=known)

    def _share_limits(self, of: SelectedCells, share: Floats) -> IntervalFunction:
        def found(confidence: float) -> tuple[float, float]:
            every = self.shares(of, 100 - (100 - confidence) / len(share))
            assert every is not None
            return float(every[1] @ share), float(every[2] @ share)

        return found

    def _row_limits(
        self, of: SelectedCells, sums: EffectSums, average: MeasureData | None
    ) -> IntervalFunction:
        """Return the limits of cells that are averaged to one; `average`: of shares."""
        data = of.result.measures[of.measure]
        effect, known = EFFECTS[data.effect], mean_range(data)
        place, cell = self.space.place(of.result), np.zeros(1, dtype=np.int64)

        def found(confidence: float) -> tuple[float, float]:
            shares = average and share_limits(
                average, effect, cell, self.space.units, confidence, place
            )
            if shares is not None:
                return float(shares[1][0]), float(shares[2][0])
            inference = self.space.intervals(sums, confidence, tested=effect.tested, limits=known)
            return float(inference.low[0]), float(inference.high[0])

        return found

    def together(
        self, of: SelectedCells, sums: EffectSums, confidence: float
    ) -> SimultaneousBounds:
        """Return the cells' own intervals and simultaneous bounds; those of shares are by
        Bonferroni, because no resample of a share of 1 is below 1."""
        tested = EFFECTS[of.result.measures[of.measure].effect].tested
        alone = self.shares(of, confidence)
        known = mean_range(of.result.measures[of.measure])
        if alone is None:
            return self.space.together(sums, confidence, tested=tested, limits=known)
        every = self.shares(of, 100 - (100 - confidence) / len(of.cells))
        assert every is not None
        found = SimultaneousBounds(sums.value, *alone[1:], *every[1:])
        others = np.flatnonzero(~alone[0])
        if not len(others):
            return found
        # Both groups of cells share the level.
        part, rest = 100 - (100 - confidence) * len(others) / len(of.cells), sums.chosen(others)
        inference = self.space.intervals(rest, confidence, tested=tested, limits=known)
        bounds = self.space.together(rest, part, tested=tested, limits=known)
        found.low[others], found.high[others] = inference.low, inference.high
        found.low_together[others] = bounds.low_together
        found.high_together[others] = bounds.high_together
        return found

    def area(self, value: Area) -> Estimate:
        """Estimate an area by trapezoids, divided by the range of the axis."""
        of = self.cells.of(value)
        result, cells = of.result, of.cells
        lacking = [
            i
            for i in range(len(result.cells))
            if is_selected(result, i, value.where) and i not in cells
        ]
        if lacking:
            reason = result.statistics[value.measure].reasons[lacking[0]]
            name = result.cells[lacking[0]].name
            raise NoNumber(f"the curve has no value at {name}: {reason}")
        places = np.array([float(result.cells[i].coords[value.axis]) for i in cells])
        order = np.argsort(places, kind="stable")
        cells, places = cells[order], places[order]
        if len(np.unique(places)) < max(2, len(places)):
            raise NoNumber(f"the cells are not one curve over `{value.axis}`")
        # Each point is weighted with half the distance to either neighbour.
        share = np.zeros(len(places))
        share[1:] += np.diff(places) / 2
        share[:-1] += np.diff(places) / 2
        share /= places[-1] - places[0]
        of = replace(of, cells=cells)
        means, sums = result.statistics[value.measure].mean[cells], self.space.sums(of)
        whole = float(means @ share)
        smooth: SmoothNumber = self.weigh(of, sums, share)
        if value.to_one:
            method = _DistanceToOne(share)
            whole = float(combine_cells(method, means[None])[0])
            smooth = CombinedCells(sums, method)
        return Estimate(
            whole,
            smooth,
            rounding=float(rounding_bounds(of) @ share),
            as_in_base=has_base_run_bounds(result, value.measure),
        )

    # --- non-smooth values

    def accuracy(self, run: str, confidence: float) -> Estimate:
        interval = self.cells.result.accuracy_of(run, confidence)
        why = None if math.isfinite(interval.mean) else "no prompt has an answer"
        unit = "distinct prompts" if self.cells.result.groups is None else "groups"
        few = f"no interval below {MIN_UNITS} {unit}" if math.isnan(interval.low) else None
        return Estimate(
            interval.mean, None, interval.low, interval.high, why or few, rounding=interval.rounding
        )

    def correlation(self, value: Correlation, confidence: float) -> Estimate:
        mine, theirs = self.cells.pair(value)
        correlate = spearman if value.how == "spearman" else pearson
        one, two = self.space.sums(mine), self.space.sums(theirs)
        measured = float(correlate(one.value[None], two.value[None])[0])
        if not math.isfinite(measured):
            raise NoNumber("the effects don't differ between cells")
        if value.how == "spearman":
            return Estimate(
                measured, why="a rank correlation has no interval: it uses the measured effects"
            )
        gap = self.space.too_few
        for sums in (one, two):
            gap = gap or self.space.too_unequal(sums, confidence)
        if gap is not None:
            return Estimate(measured, why=gap)
        correlation = true_correlation(one, two, confidence)
        if math.isnan(correlation.value):
            return Estimate(measured, why="the effects don't differ between cells beyond chance")
        return Estimate(
            correlation.value,
            None,
            *self.space.include(correlation.low, correlation.high, 0.0, confidence),
        )

    def ranking(self, value: Ranking, confidence: float) -> Estimate:
        of = self.cells.of(value)
        if value.truth is None:
            return rank_true_rows(self.space, of, value, confidence)
        return rank_true_cells(self.space, of, value.truth, confidence)


def accuracy_runs(value: ConditionValue) -> Iterator[str]:
    """Yield the runs whose accuracies a value reads."""
    match value:
        case Accuracy():
            yield value.run
        case Arithmetic():
            yield from accuracy_runs(value.left)
            yield from accuracy_runs(value.right)
        case Absolute():
            yield from accuracy_runs(value.operand)
        case _:
            return


def count_intervals(value: ConditionValue) -> int:
    """Count the separate intervals that a value is composed of."""
    if _is_smooth(value):
        return 0 if _is_fixed(value) else 1
    match value:
        case Arithmetic():
            return count_intervals(value.left) + count_intervals(value.right)
        case Absolute():
            return count_intervals(value.operand)
        case _:
            return 1


def _is_fixed(value: ConditionValue) -> bool:
    if isinstance(value, Arithmetic):
        return _is_fixed(value.left) and _is_fixed(value.right)
    return isinstance(value, ConstantValue)


def _is_smooth(value: ConditionValue) -> bool:
    match value:
        case ConstantValue() | Area():
            return True
        case CellValue():
            return not value.aggregate or not AGGREGATES[value.aggregate].extreme
        case Arithmetic():
            return _is_smooth(value.left) and _is_smooth(value.right)
        case _:
            return False
