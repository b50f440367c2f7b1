"""Cells of one measure in two runs: matched rows, differing values, differences of effects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.text import count_noun
from mechdsl.program import spec
from mechdsl.program.significance import (
    CORRECTION_NAMES,
    MIN_UNITS,
    interval_gap,
    smallest_p_value,
    unreachable_cells,
)
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.cell_statistics import (
    Denominators,
    Inference,
    cell_shares,
    infer_shares,
    rounding_bound,
)
from mechdsl.statistics.comparisons import RunPair, paired_difference, unpaired_difference
from mechdsl.statistics.corrections import CORRECTIONS
from mechdsl.statistics.intervals import flip_count, joint_sign_flip_p, skewed_t
from mechdsl.statistics.measurements import (
    EffectParts,
    EffectSums,
    MeasureData,
    SamplingDesign,
    Units,
    effect_parts,
    find_units,
    group_cells_by_view,
)
from mechdsl.vocab.metrics import EFFECTS


def index_by_occurrence(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """Map keys to indices; equal keys are distinguished by their occurrence number."""
    counts: Counter[Hashable] = Counter()
    index: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        index[key, counts[key]] = place
        counts[key] += 1
    return index


@dataclass(frozen=True, eq=False)
class IndexMatch:
    """Indices of the items in both runs, as pairs in the order of the new run, and of the items in
    only one run."""

    old: Ints
    new: Ints
    added: tuple[int, ...]
    removed: tuple[int, ...]

    @classmethod
    def of(cls, old: Iterable[Hashable], new: Iterable[Hashable]) -> IndexMatch:
        before, after = index_by_occurrence(old), index_by_occurrence(new)
        common = [key for key in after if key in before]
        return cls(
            old=np.array([before[key] for key in common], dtype=np.int64),
            new=np.array([after[key] for key in common], dtype=np.int64),
            added=tuple(place for key, place in after.items() if key not in before),
            removed=tuple(place for key, place in before.items() if key not in after),
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.old.tolist(), self.new.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.new)


def match_rows(old: ExperimentResult, new: ExperimentResult) -> IndexMatch:
    """Match rows by content, or by number if contents are unknown."""
    if old.row_keys is not None and new.row_keys is not None:
        return IndexMatch.of(old.row_keys, new.row_keys)
    return IndexMatch.of(_row_numbers(old), _row_numbers(new))


def _row_numbers(result: ExperimentResult) -> Sequence[int]:
    return range(result.prompts) if result.row_ids is None else result.row_ids


def match_measures(old: ExperimentResult, new: ExperimentResult) -> IndexMatch:
    """Match measures by label, effect, position and estimator."""
    return IndexMatch.of(map(measure_key, old.measures), map(measure_key, new.measures))


def measure_key(data: MeasureData) -> Hashable:
    return data.label, data.effect, data.per_prompt, data.kind, data.at, data.estimator


def match_cells(old: ExperimentResult, new: ExperimentResult) -> IndexMatch:
    """Match cells by coordinates, site and position."""
    return IndexMatch.of(map(cell_key, old.cells), map(cell_key, new.cells))


def cell_key(cell: CellKey) -> Hashable:
    """Return the coordinates, the site and the position of a cell."""
    coords = tuple(sorted(cell.coords.items()))
    return coords, tuple(sorted(cell.also.items())), cell.site, cell.position


ROW_ARRAYS = ("patched", "base", "source", "truth", "rounding")


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """The rows on which two runs of an experiment are compared, and their sampling design."""

    matched: IndexMatch
    sampling: SamplingDesign
    of_new: Bools
    """Whether a row is of the new run, shape [row]; all True for paired rows."""

    @property
    def paired(self) -> bool:
        """Whether the runs share rows; then only shared rows are compared."""
        return len(self.matched) > 0

    @classmethod
    def of(cls, old: ExperimentResult, new: ExperimentResult) -> AlignedRows:
        rows, settings = match_rows(old, new), new.settings
        if settings is None:
            raise ValueError(f"experiment `{new.name}` has no statistics yet")
        keys, groups = _row_keys(new), new.groups
        if len(rows):
            at = rows.new
            sampling = SamplingDesign(
                len(at),
                settings,
                new.seed,
                keys[at].tolist(),
                None if groups is None else groups[at],
                None if new.strata is None else new.strata[at],
                None if new.blocks is None else new.blocks[at],
            )
            return cls(rows, sampling, np.ones(len(at), dtype=bool))
        of_new = np.arange(new.prompts + old.prompts) < new.prompts
        by = settings.by
        labels = None
        if groups is not None:  # a value in both runs counts as two draws, which is conservative
            theirs = old.row_values.get(by or "", range(old.prompts))
            labels = np.array([f"+{group}" for group in groups] + [f"-{each}" for each in theirs])
        numbers = np.concatenate([keys, _row_keys(old)])
        return cls(
            rows, SamplingDesign(len(numbers), settings, new.seed, numbers.tolist(), labels), of_new
        )


def _row_keys(result: ExperimentResult) -> Ints:
    keys = result.row_ids if result.row_keys is None else result.row_keys
    return np.arange(result.prompts) if keys is None else np.array(keys, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CellBlock:
    """Some cells of a measure that share their units."""

    cells: Ints
    both: RunPair
    units: Units
    whole: bool
    """Whether the cells contain all rows."""
    of_new: Bools
    """Shape [unit]."""
    n: tuple[Ints, Ints]
    """Number of rows in the old and in the new run, each of shape [cell]."""


class AlignedMeasure:
    """One measure of both runs over the compared cells and rows."""

    def __init__(
        self,
        old: tuple[MeasureData, Ints],
        new: tuple[MeasureData, Ints],
        rows: AlignedRows,
    ) -> None:
        """Align a measure; `old` and `new` are the measure and its matched cells."""
        self.rows = rows
        self.effect = EFFECTS[new[0].effect]
        self.old = _align_measure(*old, rows, of_new=False)
        self.new = _align_measure(*new, rows, of_new=True)

    def blocks(self, cells: Ints) -> Iterator[CellBlock]:
        """Yield cells by their units, with numerators and denominators summed within units."""
        if not len(cells):
            return
        sampling = self.rows.sampling
        seen = _join_views(self.old, self.new, cells)
        for some, view in group_cells_by_view(len(cells), seen):
            views = () if view is None else np.split(view, 2)
            design = None if sampling.groups is not None else sampling.strata
            units = find_units([sampling.rows(*views)], design)
            old, new = self.parts(cells[some])
            full = (old.present | new.present).all(1)
            for whole in (True, False):
                indices = np.flatnonzero(full == whole)
                if len(indices):
                    yield self._block(cells[some[indices]], units, whole=whole)

    def _block(self, cells: Ints, units: Units, *, whole: bool) -> CellBlock:
        old, new = self.parts(cells)
        of_new = np.zeros(units.count, dtype=bool)
        of_new[units.codes[0][self.rows.of_new]] = True
        n = np.count_nonzero(old.present, axis=1), np.count_nonzero(new.present, axis=1)
        return CellBlock(cells, RunPair(old.sums(units), new.sums(units)), units, whole, of_new, n)

    def parts(self, cells: Ints) -> tuple[EffectParts, EffectParts]:
        """Return the effect parts of both runs; for paired rows, of rows in both cells."""
        old, new = (effect_parts(data, self.effect, cells) for data in (self.old, self.new))
        if not self.rows.paired:
            return old, new
        present = old.present & new.present
        return _restrict_rows(old, present), _restrict_rows(new, present)


def _restrict_rows(parts: EffectParts, present: Bools) -> EffectParts:
    denominator = parts.denominator
    if denominator is not None and not present.all():
        denominator = np.where(present, denominator, 0.0)
    numerator = np.where(present, parts.numerator, 0.0)
    return replace(parts, numerator=numerator, denominator=denominator, present=present)


def _align_measure(
    data: MeasureData, cells: Ints, rows: AlignedRows, *, of_new: bool
) -> MeasureData:
    """Restrict a measure to cells and compared rows, with NaN in rows of the other sample."""
    places = rows.matched.new if of_new else rows.matched.old
    there = rows.of_new if of_new or rows.paired else ~rows.of_new

    def cut(values: Floats | None) -> Floats | None:
        if values is None:
            return None
        chosen = values[cells] if len(values) > 1 else values
        if rows.paired:
            return chosen[:, places]
        found = np.full((len(chosen), len(there)), np.nan)
        found[:, there] = chosen
        return found

    seen = data.seen
    if seen is not None:
        seen = seen[cells] if len(seen) > 1 else seen
        if rows.paired:
            seen = seen[:, places]
        else:  # rows of the other run get unique codes
            numbers = np.arange(len(there)) + int(seen.max(initial=0)) + 1
            wide = np.repeat(numbers[None], len(seen), axis=0)
            wide[:, there] = seen
            seen = wide
    held = {name: cut(getattr(data, name)) for name in ROW_ARRAYS}
    return replace(data, **held, seen=seen, inert=data.inert[cells], same=None, gaps=())


def _join_views(old: MeasureData, new: MeasureData, cells: Ints) -> Ints | None:
    """Return the codes of rows in either run. Shape [1 or cell, 2 × row]."""
    if old.seen is None and new.seen is None:
        return None
    rows = old.patched.shape[1]
    views = [
        np.arange(rows)[None] if measure_data.seen is None else measure_data.seen
        for measure_data in (old, new)
    ]
    views = [view[cells] if len(view) > 1 else view for view in views]
    most = max(len(view) for view in views)
    return np.concatenate([np.broadcast_to(view, (most, rows)) for view in views], axis=1)


CellState = Literal["equal", "rounding", "noise", "changed", "unclear", "lost", "found", "none"]
"""Result of comparing a cell.

equal: all values are bit-identical. rounding: rounding alone explains every difference. noise:
values differ, but the difference of effects isn't significant. changed: it is significant. unclear:
values differ, and there is no test. lost, found, none: the cell has a number only in the old run,
only in the new run, in neither.
"""


@dataclass(eq=False)
class ValueDifferences:
    """Differences of single rows, as arrays over cells. For two samples only `n` is meaningful."""

    n: Ints
    """Number of rows in the cell in both runs; for two samples, of the smaller one."""
    changed: Ints
    """Number of rows with a different value, or in the cell in only one run."""
    beyond: Ints
    """Number of these rows that rounding doesn't explain."""
    largest: Floats
    """Largest difference of a value; 0 if none differs, NaN for categories."""


@dataclass(eq=False)
class MeasureComparison:
    """The comparison of one measure: arrays over the matched cells, NaN for missing numbers."""

    old: ExperimentResult
    new: ExperimentResult
    numbers: tuple[int, int]
    """Indices of the measure in the old and in the new run."""
    cells: IndexMatch
    rows: AlignedRows
    states: list[CellState] = field(default_factory=list[CellState])
    reasons: list[str | None] = field(default_factory=list[str | None])
    values: ValueDifferences = field(init=False)
    before: Floats = field(init=False)
    """The old run's effect on the compared rows; for categories, the largest share."""
    after: Floats = field(init=False)
    low: Floats = field(init=False)
    high: Floats = field(init=False)
    p: Floats = field(init=False)
    p_corrected: Floats = field(init=False)
    floor: Bools = field(init=False)
    bound: Floats = field(init=False)
    """Maximum effect of rounding on the difference."""
    units: Ints = field(init=False)
    word: str = "prompt"
    """Name of a unit."""

    def __post_init__(self) -> None:
        count = len(self.cells)
        self.aligned = AlignedMeasure(
            (self.old.measures[self.numbers[0]], self.cells.old),
            (self.new.measures[self.numbers[1]], self.cells.new),
            self.rows,
        )
        for name in ("before", "after", "low", "high", "p", "p_corrected"):
            setattr(self, name, np.full(count, np.nan))
        self.floor, self.bound = np.zeros(count, dtype=bool), np.zeros(count)
        self.units = np.zeros(count, dtype=np.int64)
        self.reasons = [None] * count
        self.values = _value_differences(self.aligned)
        self.states = [self._state(cell) for cell in range(count)]
        self._look()

    # --- results without a test -------------------------------------------------------------------

    @property
    def category(self) -> bool:
        return self.aligned.new.kind == "category"

    @property
    def settings(self) -> spec.Statistics:
        return self.rows.sampling.settings

    @property
    def level(self) -> float:
        """Threshold for a corrected p-value."""
        return round(1 - self.settings.confidence / 100, 10)

    def _number(self, result: ExperimentResult, measure: int, cell: int) -> bool:
        statistic = result.statistics[measure]
        return bool(np.isfinite((statistic.share if self.category else statistic.mean)[cell]))

    def _state(self, cell: int) -> CellState:
        sides = (
            (self.old, self.numbers[0], self.cells.old),
            (self.new, self.numbers[1], self.cells.new),
        )
        has = [self._number(result, number, int(places[cell])) for result, number, places in sides]
        if not all(has):
            for here, (result, number, places) in zip(has, sides, strict=True):
                if not here:
                    self.reasons[cell] = result.statistics[number].reasons[int(places[cell])]
            return "lost" if has[0] else "found" if has[1] else "none"
        if not self.rows.paired:
            return "noise"
        if not self.values.n[cell] and self.values.changed[cell] == 0:
            self.reasons[cell] = "this cell has no row of both runs"
            return "unclear"
        if not self.values.changed[cell]:
            return "equal"
        return "noise" if self.values.beyond[cell] else "rounding"

    def _look(self) -> None:
        """Compute the effects of cells with one in both runs, and find the untestable cells."""
        known = self.of_state("equal", "rounding", "noise", "unclear")
        if self.category:
            self._look_at_categories(known)
            return
        old, new = self.aligned.old, self.aligned.new
        for block in self.aligned.blocks(known):
            cells, both = block.cells, block.both
            self.before[cells] = _value_or_nan(both.old.value)
            self.after[cells] = _value_or_nan(both.new.value)
            self.units[cells] = self._held(block)
            for data, parts in zip((old, new), self.aligned.parts(cells), strict=True):
                bound = rounding_bound(data, self.aligned.effect, cells, parts.present)
                self.bound[cells] += np.nan_to_num(bound)
        still = old.inert & new.inert & self.aligned.effect.tested
        for block in self.aligned.blocks(self.of_state("noise")):
            unbounded = self._unbounded(block)
            word = self.word = self.rows.sampling.unit_word(block.units)
            for place, cell in enumerate(block.cells.tolist()):
                why = self._few(int(self.units[cell]), word) or unbounded[place]
                if still[cell]:
                    self.reasons[cell] = "in neither run can it differ from the base run"
                elif why is not None:
                    self.states[cell], self.reasons[cell] = "unclear", why

    def _few(self, units: int, word: str) -> str | None:
        if units >= MIN_UNITS:
            return None
        each = "" if self.rows.paired else " in the smaller sample"
        return f"{count_noun(units, word)}{each}: no claim below {MIN_UNITS}"

    def _held(self, block: CellBlock) -> Ints:
        """Return the units of the difference; for two samples, of the smaller. Shape [cell]."""
        return np.minimum(block.both.old.held, block.both.new.held)

    def _unbounded(self, block: CellBlock) -> list[str | None]:
        """Return a reason for ratios whose denominator can't be distinguished from 0 on the
        compared rows, and for effects that have no interval in one of the runs. Shape [cell]."""
        gaps = self._gaps(block)
        effect = self.aligned.effect
        if effect.denominator is None or self.aligned.new.per_prompt:
            return gaps
        present = np.stack([part.present for part in self.aligned.parts(block.cells)])
        for sums, there in zip((block.both.old, block.both.new), present, strict=True):
            ones = block.units.total(there.astype(np.float64))
            bottom = EffectSums(np.broadcast_to(sums.bottom, ones.shape), ones, sums.held)
            strata = block.units.strata if block.whole else None
            denominators = Denominators.of(bottom, strata, self.settings.confidence)
            for place in np.flatnonzero(denominators.weak).tolist():
                gaps[place] = f"{effect.divisor} is too close to 0 on these rows"
        return gaps

    def _gaps(self, block: CellBlock) -> list[str | None]:
        """Return the reasons of a table for effects of either run without an interval; None for
        shares. Shape [cell]."""
        gaps: list[str | None] = [None] * len(block.cells)
        shares, _ = self._shares(block)
        settings = self.settings.model_copy(update={"test": "t"})
        word = self.rows.sampling.unit_word(block.units)
        is_ratio = self.aligned.effect.denominator is not None and not self.aligned.new.per_prompt
        for sums in (block.both.old, block.both.new):
            strata = block.units.strata if block.whole and self.rows.paired else None
            low, _ = skewed_t(sums, strata).interval(settings.confidence, MIN_UNITS)
            for place in np.flatnonzero(np.isnan(low) & ~shares).tolist():
                held = int(sums.held[place])
                gaps[place] = interval_gap(held, word, settings, is_ratio=is_ratio)
        return gaps

    # --- categories -------------------------------------------------------------------------------

    def _look_at_categories(self, cells: Ints) -> None:
        """Compute the share of the most frequent category, and the number of units."""
        for cell in cells.tolist():
            rows = self._present(cell)
            old, new = self._shown(cell)
            values, counts = np.unique(old[rows[0]], return_counts=True)
            if not len(values) or not rows[1].any():
                continue
            commonest = values[counts.argmax()]
            self.before[cell] = np.mean(old[rows[0]] == commonest)
            self.after[cell] = np.mean(new[rows[1]] == commonest)
        for block in self.aligned.blocks(cells):
            word = self.word = self.rows.sampling.unit_word(block.units)
            self.units[block.cells] = self._held(block)
            for cell in block.cells.tolist():
                few = self._few(int(self.units[cell]), word)
                if few is not None and self.states[cell] == "noise":
                    self.states[cell], self.reasons[cell] = "unclear", few

    def _shown(self, cell: int) -> tuple[Floats, Floats]:
        return self.aligned.old.patched[cell], self.aligned.new.patched[cell]

    def _present(self, cell: int) -> tuple[Bools, Bools]:
        own, other = (~np.isnan(each) for each in self._shown(cell))
        return (own & other, own & other) if self.rows.paired else (own, other)

    def _category_p(self, cell: int, block: CellBlock, tests: int) -> tuple[float, bool]:
        """Test the shares of all categories together; return the p-value of the largest change."""
        rows = self._present(cell)
        shown = self._shown(cell)
        every = np.unique(np.concatenate([v[r] for v, r in zip(shown, rows, strict=True)]))
        is_it = [
            np.where(row, value == every[:, None], False).astype(np.float64)
            for value, row in zip(shown, rows, strict=True)
        ]
        tops = [block.units.total(each) for each in is_it]
        if self.rows.paired:
            flips = flip_count(tests, self.level)
            category_p = float(joint_sign_flip_p(tops[1] - tops[0], flips, self.new.seed).min())
            return category_p, category_p <= 1 / (flips + 1)
        bottoms = [block.units.total(row[None].astype(np.float64)) for row in rows]
        held = [np.full(len(every), np.count_nonzero(each)) for each in bottoms]
        sides = [EffectSums(*each) for each in zip(tops, bottoms, held, strict=True)]
        return min(
            1.0, float(unpaired_difference(RunPair(*sides), block.of_new).p().min()) * len(every)
        ), False

    # --- tests ------------------------------------------------------------------------------------

    def of_state(self, *states: CellState) -> Ints:
        """Return the indices of the cells with these states."""
        return np.array([i for i, s in enumerate(self.states) if s in states], dtype=np.int64)

    @property
    def asked(self) -> Ints:
        """The cells whose difference is tested."""
        return np.array(
            [i for i in self.of_state("noise").tolist() if self.reasons[i] is None], dtype=np.int64
        )

    def test(self, tests: int) -> None:
        """Compute intervals and p-values; `tests` is the number of p-values in the correction."""
        for block in self.aligned.blocks(self.asked):
            if self.category:
                for cell in block.cells.tolist():
                    self.p[cell], self.floor[cell] = self._category_p(cell, block, tests)
                continue
            self._test(block)

    def _test(self, block: CellBlock) -> None:
        cells, both = block.cells, block.both
        confidence, level = self.settings.confidence, 1 - self.settings.confidence / 100
        strata = block.units.strata if block.whole else None
        difference = (
            paired_difference(both, strata)
            if self.rows.paired
            else unpaired_difference(both, block.of_new)
        )
        nothing = np.zeros(len(cells), dtype=bool)
        inference = Inference.of(
            *difference.interval(confidence, MIN_UNITS), difference.p(), nothing, level
        )
        shares, rows = self._shares(block)
        exact = np.flatnonzero(shares)
        if len(exact):
            old, new = (sums.chosen(exact) for sums in (rows.old, rows.new))
            old_rows, new_rows = (rows[exact] for rows in block.n)
            inference.fill(exact, infer_shares(new, old, new_rows, confidence, old_rows))
        self.low[cells], self.high[cells] = inference.low, inference.high
        self.p[cells], self.floor[cells] = inference.p, inference.floor

    def _shares(self, block: CellBlock) -> tuple[Bools, RunPair]:
        """Return which cells are shares in both runs, shape [cell], and the sums of these shares.
        Their exact limits give those of the difference.

        `delta` and `total` subtract a second share. If it is equal in both runs on every row, it
        cancels, and the difference is that of the first shares.
        """
        mask, sums = np.full(len(block.cells), not self.category), list[EffectSums]()
        subtracted: list[Floats] = []
        parts = self.aligned.parts(block.cells)
        for data, part in zip((self.aligned.old, self.aligned.new), parts, strict=True):
            shares = cell_shares(data, self.aligned.effect, block.cells)
            if shares is None:
                return np.zeros_like(mask), block.both
            mask &= shares.exact
            sums.append(replace(shares, present=part.present).sums(block.units)[0])
            subtracted += [np.where(part.present, run, 0.0) for run in shares.runs[1:]]
        if subtracted:
            mask &= self.rows.paired & (subtracted[0] == subtracted[1]).all(axis=1)
        return mask, RunPair(*sums)

    def decide(self, corrected: Floats) -> None:
        """Decide which cells changed; `corrected` are the p-values of the tested cells."""
        cells = self.asked
        self.p_corrected[cells] = corrected
        difference = np.abs(self.after - self.before)
        for cell in cells.tolist():
            beyond = self.category or difference[cell] > self.bound[cell]
            if self.p_corrected[cell] < self.level and beyond:
                self.states[cell] = "changed"


def _value_or_nan(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _value_differences(aligned: AlignedMeasure) -> ValueDifferences:
    count = len(aligned.new.patched)
    zero = [np.zeros(count, dtype=np.int64) for _ in range(3)]
    differences = ValueDifferences(zero[0], zero[1], zero[2], np.full(count, np.nan))
    old, new = aligned.old, aligned.new
    if not aligned.rows.paired:
        counts = [
            np.count_nonzero(~np.isnan(measure_data.patched), axis=1) for measure_data in (old, new)
        ]
        differences.n = np.minimum(*counts)
        return differences
    differs = np.zeros_like(new.patched, dtype=bool)
    beyond = np.zeros_like(differs)
    size = np.zeros_like(new.patched)
    bounds = [measure_data.rounding for measure_data in (old, new)]
    bound = sum((np.nan_to_num(each) for each in bounds if each is not None), np.zeros((1, 1)))
    there = ~np.isnan(old.patched) & ~np.isnan(new.patched)
    for one, two in _run_values(aligned):
        alone = np.isnan(one) != np.isnan(two)
        with np.errstate(invalid="ignore"):  # values that are infinite in both runs
            moved = np.abs(two - one)
        apart = np.where(np.isnan(moved), 0.0, moved)
        mask = apart > 0
        differs |= mask | alone
        # A category that rounding may change may become any other one.
        beyond |= (mask & (bound == 0) if new.kind == "category" else apart > bound) | alone
        size = np.maximum(size, np.broadcast_to(apart, size.shape))
    inside = there | (np.isnan(old.patched) != np.isnan(new.patched))
    differences.n = np.count_nonzero(there, axis=1)
    differences.changed = np.count_nonzero(differs & inside, axis=1)
    differences.beyond = np.count_nonzero(beyond & inside, axis=1)
    if new.kind == "number":
        differences.largest = np.where(there, size, 0.0).max(axis=1, initial=0.0)
    return differences


def _run_values(aligned: AlignedMeasure) -> Iterator[tuple[Floats, Floats]]:
    """Yield the components of the effect in the old and in the new run."""
    names = ("patched",) if aligned.new.kind == "category" else aligned.effect.reads
    for name in names:
        one, two = getattr(aligned.old, name), getattr(aligned.new, name)
        nothing = np.full((1, 1), np.nan)
        yield nothing if one is None else one, nothing if two is None else two


def decide_changes(measures: Sequence[MeasureComparison]) -> dict[str, str]:
    """Test the differences, decide which cells changed, and describe the methods.

    The family consists of the cells whose values differ by more than rounding. In other cells no
    sign can be flipped, so they can't be false positives and need no share of the level (Tarone
    1990).
    """
    asked = [len(measure.asked) for measure in measures]
    tests = sum(asked)
    if not tests:
        return {}
    correction = shared_correction(
        [measure.settings for measure, n in zip(measures, asked, strict=True) if n]
    )
    for measure in measures:
        measure.test(1 if correction == "none" else tests)
    p = np.concatenate([measure.p[measure.asked] for measure in measures])
    corrected = CORRECTIONS[correction](p)
    reach = _is_out_of_reach(measures, correction)
    ends = np.cumsum(asked)
    for measure, values, lost in zip(
        measures, np.split(corrected, ends[:-1]), np.split(reach, ends[:-1]), strict=True
    ):
        cells = measure.asked
        measure.decide(values)
        for cell in cells[lost].tolist():
            if measure.states[cell] == "noise":
                measure.states[cell] = "unclear"
                units = count_noun(int(measure.units[cell]), measure.word)
                measure.reasons[cell] = f"{units}: too few for a significant p after correction"
    return dict(_correction_texts(measures, correction, tests))


def shared_correction(settings: Sequence[spec.Statistics]) -> str:
    """Return the common correction of all experiments, or Holm's; also for `max`, which applies
    only within one experiment."""
    corrections = {setting.correction for setting in settings}
    only = corrections.pop() if len(corrections) == 1 else "holm"
    return only if only in CORRECTIONS else "holm"


def _is_out_of_reach(measures: Sequence[MeasureComparison], correction: str) -> NDArray[np.bool_]:
    """Return whether a tested cell's units all indicate a change but are too few for a significant
    p. Shape [tested cell]."""
    mask = np.zeros(sum(len(measure.asked) for measure in measures), dtype=bool)
    units = [int(measure.units[cell]) for measure in measures for cell in measure.asked.tolist()]
    settings = next(measure.settings for measure in measures if len(measure.asked))
    statistics = settings.model_copy(update={"correction": correction})
    mask[unreachable_cells(units, statistics)] = True
    p = np.concatenate([measure.p[measure.asked] for measure in measures])
    least = np.array([smallest_p_value(unit, statistics) for unit in units])
    level = 1 - statistics.confidence / 100
    return mask & ((p < level) | (p <= least * (1 + 1e-9)))


def _correction_texts(
    measures: Sequence[MeasureComparison], correction: str, tests: int
) -> Iterator[tuple[str, str]]:
    tested = [measure for measure in measures if len(measure.asked) or "changed" in measure.states]
    apart = [comparison for comparison in tested if not comparison.rows.paired]
    confidence = " or ".join(
        dict.fromkeys(f"{comparison.settings.confidence:g} %" for comparison in tested)
    )
    yield (
        "difference",
        "new minus old, on the rows that both runs have, paired by row",
    )
    yield (
        "interval",
        f"{confidence}, Student's t corrected for skewness over distinct rows or values of "
        "`stats by`; shares, and their differences from a run that is equal in both: from the "
        "exact limits of both; categories: none",
    )
    yield (
        "p",
        "two-sided, the level at which the interval would end at 0; categories: by sign "
        "flips, because without a change, old and new are exchangeable in each",
    )
    if apart:
        names = ", ".join(dict.fromkeys(f"`{comparison.new.name}`" for comparison in apart))
        yield (
            "not paired",
            f"{names}: no row is in both runs, so they are two samples, with Welch's degrees of "
            "freedom",
        )
    yield (
        "correction",
        f"{CORRECTION_NAMES[correction]}, over {count_noun(tests, 'cell')} whose values differ "
        "by more than rounding; a cell is changed if p corrected is below "
        + " or ".join(dict.fromkeys(f"{comparison.level:g}" for comparison in tested)),
    )
