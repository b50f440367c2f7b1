"""Cells of one measure in two runs: which values differ, and what the effect's difference is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.plural import plural
from mechdsl.program import spec
from mechdsl.results.aligned_measures import AlignedMeasure, AlignedRows, Block
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.matched_runs import Matched
from mechdsl.statistics.cell_inference import Inference, infer_shares
from mechdsl.statistics.cell_statistics import (
    denominator_interval,
    rounding_bound,
    share_limits,
)
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.sign_flips import flips_for, largest_flip
from mechdsl.statistics.two_runs import Both, paired, unpaired
from mechdsl.validate.reachable_p import FEWEST_UNITS

State = Literal["equal", "rounding", "noise", "changed", "unclear", "lost", "found", "none"]
"""What became of a cell. equal: every value is the same to the bit. rounding: rounding alone
explains every difference. noise: values differ, the effect's difference can't be told from 0.
changed: it can. unclear: values differ, and there is no test. lost, found, none: it has a number in
the old run alone, in the new one alone, in neither."""


@dataclass(eq=False)
class Values:
    """How single rows differ: arrays over cells. Of two samples only `n` says something."""

    n: Ints
    """Rows that are in the cell in both runs; of two samples, those of the smaller one."""
    changed: Ints
    """Rows of which a value differs, or that are in the cell in one run alone."""
    beyond: Ints
    """Those of them that rounding doesn't explain."""
    largest: Floats
    """The largest difference of a value; 0 where none differs, NaN of categories."""


@dataclass(eq=False)
class ComparedMeasure:
    """One measure: arrays over the cells that both runs have, NaN where there is no number."""

    old: ExperimentResult
    new: ExperimentResult
    numbers: tuple[int, int]
    """Of the measure, in the old and in the new run."""
    cells: Matched
    rows: AlignedRows
    states: list[State] = field(default_factory=list[State])
    reasons: list[str | None] = field(default_factory=list[str | None])
    values: Values = field(init=False)
    before: Floats = field(init=False)
    """The effect in the old run, on the rows that are compared; of categories the share of that
    which was commonest."""
    after: Floats = field(init=False)
    low: Floats = field(init=False)
    high: Floats = field(init=False)
    p: Floats = field(init=False)
    p_corrected: Floats = field(init=False)
    floor: Bools = field(init=False)
    bound: Floats = field(init=False)
    """How far rounding alone may move the difference."""
    units: Ints = field(init=False)
    word: str = "prompt"
    """What a unit is called."""

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
        self.values = _values(self.aligned)
        self.states = [self._state(cell) for cell in range(count)]
        self._look()

    # --- what is known without a test -------------------------------------------------------------

    @property
    def category(self) -> bool:
        return self.aligned.new.kind == "category"

    @property
    def settings(self) -> spec.Statistics:
        return self.rows.sampling.settings

    @property
    def level(self) -> float:
        """What a corrected p has to stay under."""
        return round(1 - self.settings.confidence / 100, 10)

    def _number(self, result: ExperimentResult, measure: int, cell: int) -> bool:
        found = result.statistics[measure]
        return bool(np.isfinite((found.share if self.category else found.mean)[cell]))

    def _state(self, cell: int) -> State:
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
            self.reasons[cell] = "no row of both runs is part of this cell"
            return "unclear"
        if not self.values.changed[cell]:
            return "equal"
        return "noise" if self.values.beyond[cell] else "rounding"

    def _look(self) -> None:
        """The effects of all cells that have one in both runs, and which can't be tested."""
        known = self.of_state("equal", "rounding", "noise", "unclear")
        if self.category:
            self._look_at_categories(known)
            return
        old, new = self.aligned.old, self.aligned.new
        for block in self.aligned.blocks(known):
            cells, both = block.cells, block.both
            self.before[cells] = _or_nan(both.old.value)
            self.after[cells] = _or_nan(both.new.value)
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
                    self.reasons[cell] = "it can't differ from the base run in either"
                elif why is not None:
                    self.states[cell], self.reasons[cell] = "unclear", why

    def _few(self, units: int, word: str) -> str | None:
        if units >= FEWEST_UNITS:
            return None
        each = "" if self.rows.paired else " in the smaller sample"
        return f"{plural(units, word)}{each}: no claim below {FEWEST_UNITS}"

    def _held(self, block: Block) -> Ints:
        """[cell]: units behind the difference; of two samples, of the smaller one."""
        return np.minimum(block.both.old.held, block.both.new.held)

    def _unbounded(self, block: Block) -> list[str | None]:
        """[cell]: that a ratio's denominator can't be told from 0 on the rows that are compared."""
        found: list[str | None] = [None] * len(block.cells)
        effect = self.aligned.effect
        if effect.denominator is None or self.aligned.new.per_prompt:
            return found
        present = np.stack([each.present for each in self.aligned.parts(block.cells)])
        for sums, there in zip((block.both.old, block.both.new), present, strict=True):
            ones = block.units.total(there.astype(np.float64))
            bottom = Sums(np.broadcast_to(sums.bottom, ones.shape), ones, sums.held)
            strata = block.units.strata if block.whole else None
            low, high = denominator_interval(bottom, strata, self.settings.confidence)
            with np.errstate(invalid="ignore"):
                bounded = (low > 0) | (high < 0)
            for place in np.flatnonzero(~bounded).tolist():
                found[place] = f"{effect.divisor} can't be told from 0 on these rows"
        return found

    # --- categories -------------------------------------------------------------------------------

    def _look_at_categories(self, cells: Ints) -> None:
        """The share of what was commonest, and how many units there are."""
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

    def _category_p(self, cell: int, block: Block, tests: int) -> tuple[float, bool]:
        """Of all categories' shares together: the p of the share that moves most."""
        rows = self._present(cell)
        shown = self._shown(cell)
        every = np.unique(np.concatenate([v[r] for v, r in zip(shown, rows, strict=True)]))
        is_it = [
            np.where(own, value == every[:, None], False).astype(np.float64)
            for value, own in zip(shown, rows, strict=True)
        ]
        tops = [block.units.total(each) for each in is_it]
        if self.rows.paired:
            flips = flips_for(tests, self.level)
            found = float(largest_flip(tops[1] - tops[0], flips, self.new.seed).min())
            return found, found <= 1 / (flips + 1)
        bottoms = [block.units.total(own[None].astype(np.float64)) for own in rows]
        held = [np.full(len(every), np.count_nonzero(each)) for each in bottoms]
        sides = [Sums(*each) for each in zip(tops, bottoms, held, strict=True)]
        return min(1.0, float(unpaired(Both(*sides), block.of_new).p().min()) * len(every)), False

    # --- tests ------------------------------------------------------------------------------------

    def of_state(self, *states: State) -> Ints:
        """Numbers of the cells of these states."""
        return np.array([i for i, s in enumerate(self.states) if s in states], dtype=np.int64)

    @property
    def asked(self) -> Ints:
        """The cells whose difference is tested."""
        return np.array(
            [i for i in self.of_state("noise").tolist() if self.reasons[i] is None], dtype=np.int64
        )

    def test(self, tests: int) -> None:
        """Intervals and p of these cells. tests: of how many p the smallest has to survive."""
        for block in self.aligned.blocks(self.asked):
            if self.category:
                for cell in block.cells.tolist():
                    self.p[cell], self.floor[cell] = self._category_p(cell, block, tests)
                continue
            self._test(block)

    def _test(self, block: Block) -> None:
        cells, both = block.cells, block.both
        confidence, level = self.settings.confidence, 1 - self.settings.confidence / 100
        found = self._share_difference(block)
        if found is None:
            strata = block.units.strata if block.whole else None
            own = paired(both, strata) if self.rows.paired else unpaired(both, block.of_new)
            nothing = np.zeros(len(cells), dtype=bool)
            found = Inference.of(*own.interval(confidence, FEWEST_UNITS), own.p(), nothing, level)
        self.low[cells], self.high[cells] = found.low, found.high
        self.p[cells], self.floor[cells] = found.p, found.floor

    def _share_difference(self, block: Block) -> Inference | None:
        """Of the difference of two shares, from the exact limits of both."""
        confidence, effect = self.settings.confidence, self.aligned.effect
        if effect.name != "raw":
            return None
        for data in (self.aligned.old, self.aligned.new):
            if share_limits(data, effect, block.cells, block.units, confidence) is None:
                return None
        return infer_shares(block.both.new, block.both.old, block.n[1], confidence, block.n[0])

    def decide(self, corrected: Floats) -> None:
        """Which cells changed. corrected: p of the cells that are asked."""
        cells = self.asked
        self.p_corrected[cells] = corrected
        difference = np.abs(self.after - self.before)
        for cell in cells.tolist():
            beyond = self.category or difference[cell] > self.bound[cell]
            if self.p_corrected[cell] < self.level and beyond:
                self.states[cell] = "changed"


def _or_nan(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _values(aligned: AlignedMeasure) -> Values:
    count = len(aligned.new.patched)
    zero = [np.zeros(count, dtype=np.int64) for _ in range(3)]
    found = Values(zero[0], zero[1], zero[2], np.full(count, np.nan))
    old, new = aligned.old, aligned.new
    if not aligned.rows.paired:
        counts = [np.count_nonzero(~np.isnan(each.patched), axis=1) for each in (old, new)]
        found.n = np.minimum(*counts)
        return found
    differs = np.zeros_like(new.patched, dtype=bool)
    beyond = np.zeros_like(differs)
    size = np.zeros_like(new.patched)
    bounds = [each.rounding for each in (old, new)]
    bound = sum((np.nan_to_num(each) for each in bounds if each is not None), np.zeros((1, 1)))
    there = ~np.isnan(old.patched) & ~np.isnan(new.patched)
    for one, two in _runs(aligned):
        alone = np.isnan(one) != np.isnan(two)
        with np.errstate(invalid="ignore"):  # what is infinite in both runs
            moved = np.abs(two - one)
        apart = np.where(np.isnan(moved), 0.0, moved)
        own = apart > 0
        differs |= own | alone
        # a category that rounding may change may become any other
        beyond |= (own & (bound == 0) if new.kind == "category" else apart > bound) | alone
        size = np.maximum(size, np.broadcast_to(apart, size.shape))
    inside = there | (np.isnan(old.patched) != np.isnan(new.patched))
    found.n = np.count_nonzero(there, axis=1)
    found.changed = np.count_nonzero(differs & inside, axis=1)
    found.beyond = np.count_nonzero(beyond & inside, axis=1)
    if new.kind == "number":
        found.largest = np.where(there, size, 0.0).max(axis=1, initial=0.0)
    return found


def _runs(aligned: AlignedMeasure) -> Iterator[tuple[Floats, Floats]]:
    """What the effect is made of, in the old and in the new run."""
    names = ("patched",) if aligned.new.kind == "category" else aligned.effect.reads
    for name in names:
        one, two = getattr(aligned.old, name), getattr(aligned.new, name)
        nothing = np.full((1, 1), np.nan)
        yield nothing if one is None else one, nothing if two is None else two
