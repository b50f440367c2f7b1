"""Measured values as arrays over cells and prompts, and the statistics computed from them.

Numerators and denominators of effects are here too, per prompt and summed within sampling units,
with the units themselves. A unit is a row of the prompts, or all rows that a measure can't
distinguish, or, with `stats by`, all rows of one value. Estimates are over rows, intervals and
p-values over units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, CellIndex, Floats, Ints
from mechdsl.base.text import plural_noun
from mechdsl.program import spec
from mechdsl.program.estimators import find_estimator
from mechdsl.vocab.metrics import ControlTitle, EffectKind

WithheldReason: TypeAlias = Literal["", "skewed", "picked"]

SpreadSource: TypeAlias = Literal["rows", "unknown", "none"]
"""Origin of intervals. rows: differences between rows. unknown: none, because a cell has one number
for all rows. none: the number isn't computed from rows, so that other rows wouldn't change it."""

NO_INTERVAL_REASONS: Mapping[SpreadSource, str] = {
    "unknown": "one number of all rows: no interval",
    "none": "a number of weights or circuits alone: no interval",
}


@dataclass(frozen=True)
class MissingReason:
    """Why something could not be computed."""

    code: str
    reason: str
    """The reason in words, without the code."""


@dataclass(frozen=True, eq=False)
class MeasureData:
    """Measured values: one per cell and prompt, with the two runs for comparison."""

    label: str
    metric: str
    """The metric as written in the source."""
    effect: str
    kind: Literal["number", "category"]
    per_prompt: bool
    patched: Floats
    """Shape [cell, prompt], NaN if the prompt isn't part of the cell."""
    base: Floats
    """Shape [1 or cell, prompt]."""
    source: Floats | None
    """Shape [1 or cell, prompt]."""
    inert: Bools
    """Whether a cell's structure makes it equal to the base run, shape [cell]; such a cell is
    reported but excluded from the correction."""
    truth: Floats | None = None
    """For categories: the correct number, shape [1 or cell, prompt]."""
    unit: str = ""
    """The metric's unit, for axes of plots."""
    most: float | None = None
    """The largest possible value of a metric that is 0 at least, if the unit doesn't say it: the
    number of tokens of a reply."""
    word: str = ""
    """The metric of a single term (`prob` of `prob(answer)`); empty for other expressions."""
    rounding: Floats | None = None
    """Maximum effect of rounding on the metric, shape [1 or cell, prompt]; None if unknown."""
    gaps: tuple[str, ...] = ()
    """Why a cell has no value of this measure but of others, shape [cell]; empty if it has one."""
    missing: MissingReason | None = None
    """Why the measure could not be computed; then no cell has a value."""
    seen: Ints | None = None
    """Codes that are equal for rows whose visible tokens are equal for this measure, shape [1 or
    cell, prompt]; None if all rows differ."""
    same: Ints | None = None
    """Codes that are equal for cells whose patched rows are equal, because they differ only in what
    is observed, shape [cell]; None if there are no such cells."""
    at: str | None = None
    """The position as written in the source, if any."""
    spread: SpreadSource = "rows"
    as_patched: bool = False
    """Whether the base run is read after replies of patched rows, not after its own prompts."""
    estimator: str = ""
    """The estimator of the effects, such as `gradient_input`; empty if each cell was run. `patched`
    is then the base run's value plus the estimate, or their value if that isn't an effect."""

    @property
    def called(self) -> str:
        """Display name of the effect: `delta`, `estimated delta`, `gradient`."""
        kind = find_estimator(self.estimator)
        if kind is not None and not kind.is_effect:
            return kind.value_name
        return f"estimated {self.effect}" if self.estimator else self.effect


@dataclass(frozen=True, eq=False)
class CellStatistics:
    """Statistics of one measure: arrays over cells, NaN with a reason in `reasons`."""

    mean: Floats
    low: Floats
    high: Floats
    p: Floats
    p_corrected: Floats
    n: Ints
    base_mean: Floats
    """Mean of the base run over the prompts of the cell."""
    source_mean: Floats
    commonest: Floats
    """For categories: the most frequent value (of several, the smallest), its share of the prompts,
    and the mean absolute error."""
    share: Floats
    mean_error: Floats
    reasons: tuple[str | None, ...]
    test: str | None
    """The method of p, in words; None if nothing was tested."""
    tests: int
    """Number of distinct numbers, over the cells of all measures, in the correction of p."""
    units: Ints
    """Number of independent units of each cell: distinct prompts, or groups."""
    floor: Bools
    """Whether p is the smallest value for this number of flips or resamples, shape [cell]."""
    equal: Bools
    """Whether there is no interval and no p because all units have the same value within rounding,
    and don't show how other units differ; shape [cell]."""
    has_p: bool
    """Whether 0 means "no effect", so that other cells have a p."""
    repeated: Bools
    """Whether the number is that of an earlier cell, which the measure can't differ from, shape
    [cell]; it is no further test."""
    rounding: Floats
    """Maximum effect of rounding on the mean, in the effect's unit, or, for categories, the share
    of the prompts whose category it may change; NaN if unknown."""
    withheld: WithheldReason = ""
    """Why no p is corrected: effects are too skewed to control the level over all cells, or sites
    were selected on the same rows."""
    further: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """The statistics of `ROW_STATISTICS` by name, shape [cell]; NaN if a cell has none."""
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why a statistic of `ROW_STATISTICS` couldn't be computed in some cell, by name."""

    @property
    def tested(self) -> Bools:
        """Whether the cell is a test of the correction, shape [cell]: it has a p, or none only
        because its units are equal, which is a p of 1."""
        return ~np.isnan(self.p) | (self.equal & self.has_p)

    @property
    def at_rounding(self) -> Bools:
        """Whether rounding alone explains an effect of this size, shape [cell]. Without rounding,
        as for a rank with no close tokens, an effect of 0 is exact."""
        return self.tested & (np.abs(self.mean) <= self.rounding) & (self.rounding > 0)


def may_round_differently(data: MeasureData, statistics: CellStatistics) -> Bools:
    """Return whether rounding alone may change the correctness, or the category, in some prompt of
    the base run. Shape [cell]."""
    counts = data.kind == "category" or data.unit == "share"
    return (statistics.rounding > 0) & ~statistics.tested & counts


@dataclass(frozen=True, eq=False)
class RandomControlValues:
    """Measurements of `against random(n)`: the same experiment on random targets."""

    values: tuple[Floats, ...]
    """Per measure, shape [draw, cell, prompt]; NaN if a cell has no such draw."""
    counts: Ints
    """Number of different draws, shape [cell]."""
    asked: int
    """Number of draws that the file requests."""
    what: str
    """The drawn targets in words: `random heads`."""
    title: ControlTitle = "null"


def rounding_slack(rounding: Floats) -> Floats:
    """Return the largest difference of two means that rounding alone explains; 0 if unknown.

    Args:
        rounding: Maximum effect of rounding on one mean, of any shape; NaN if unknown.
    """
    return 2 * np.nan_to_num(rounding)


@dataclass(frozen=True, eq=False)
class NullBand:
    """The same effect on random targets: arrays over cells, NaN if there are no draws."""

    low: Floats
    """From the `rank`-th lowest to the `rank`-th highest draw; rank 1 is the whole range."""
    high: Floats
    mean: Floats
    draws: Ints
    """k, the number of draws with a value."""
    level: Floats
    """Probability that the band contains a further draw: (k + 1 - 2 rank)/(k + 1)."""
    rank: Ints
    p: Floats
    """(1 + b)/(1 + k), with b draws at least as large in absolute value as the effect, or at least
    as small if values near 0 show it; sizes that differ by no more than rounding are equal. NaN if
    an effect of 0 doesn't mean "no effect"."""
    inside: Bools
    """Whether the effect is in the band, or outside of it by no more than rounding."""
    weaker: Bools
    """Whether the effect is between 0 and the band: random targets have more of it. If values near
    0 show it: whether the effect is beyond the band, away from 0."""
    made: Ints
    """Number of different draws."""
    asked: int
    """Number of requested draws; cells with too few other targets have fewer."""
    what: str
    """The drawn targets in words: `random heads`."""
    fewest: int
    """Minimum number of draws for a band that contains a further one with the confidence."""
    title: ControlTitle = "null"
    """Heading of its column: "null" with `against`, "random" or "untrained" of a control that was
    added for something trained."""

    @property
    def decides(self) -> Bools:
        """Whether there are enough draws to decide if the effect is in the band, shape [cell]."""
        return self.draws >= self.fewest

    def is_one_value(self, rounding: Floats) -> Bools:
        """Return whether the draws of the band are equal within rounding, shape [cell]: they don't
        show how much random targets differ.

        Args:
            rounding: Maximum effect of rounding on the mean, shape [cell].
        """
        width = self.high - self.low
        return (self.draws > 1) & (width <= rounding_slack(rounding))

    def is_inside_by_rounding(self, means: Floats) -> Bools:
        """Return whether the effect counts as inside only because its distance from the band is no
        larger than rounding, shape [cell].

        Args:
            means: Printed means, shape [cell].
        """
        return self.inside & ((means < self.low) | (means > self.high))


@dataclass(frozen=True)
class Interval:
    """A mean over prompts of an unpatched run, with its interval."""

    mean: float
    low: float
    high: float
    n: int
    rounding: float = 0.0
    """Maximum effect of rounding on the mean."""


BLOCK_NUMBERS = 1_000_000
"""Maximum size of an intermediate array (8 MB)."""

MIN_STRATUM_UNITS = 4
"""Minimum number of units for estimating the spread of a stratum."""


@dataclass(frozen=True, eq=False)
class UnitRows:
    """The properties of an experiment's rows that determine their units."""

    keys: Ints
    """Key of each row's content, shape [prompt]; rows with equal keys are one unit."""
    seen: Sequence[Ints] = ()
    """Codes of shape [prompt] each; rows with equal codes can't be distinguished."""
    groups: NDArray[Any] | None = None
    """Values of `stats by`, shape [prompt]."""

    @classmethod
    def of(
        cls,
        prompts: int,
        keys: Sequence[int] | None = None,
        seen: Sequence[Ints] = (),
        groups: NDArray[Any] | None = None,
    ) -> UnitRows:
        numbers = np.arange(prompts) if keys is None else np.asarray(keys, dtype=np.int64)
        return cls(numbers.astype(np.int64), seen, groups)


@dataclass(frozen=True, eq=False)
class Units:
    """Assignment of rows to units."""

    codes: tuple[Ints, ...]
    """Unit of each row per experiment, shape [prompt]. Numbers depend on the rows' contents, not on
    their order."""
    count: int
    orders: tuple[Ints, ...]
    """Per experiment, its rows sorted by unit and content, so that a sum is bit-identical for any
    order of the rows."""
    strata: Ints | None = None
    """Shape [unit], if new rows have the same design."""

    def total(self, values: Floats, of: int = 0) -> Floats:
        """Sum values [cell, prompt] within units. Shape [cell, unit]."""
        order = self.orders[of]
        held = self.codes[of][order]
        ordered = values[:, order]
        if np.array_equal(held, np.arange(self.count)):  # every row is a unit
            return np.ascontiguousarray(ordered)
        total = np.zeros((values.shape[0], self.count))
        if not len(held):
            return total
        starts = np.flatnonzero(np.diff(held, prepend=-1))
        total[:, held[starts]] = np.add.reduceat(ordered, starts, axis=1)
        return total

    def held(self, present: Bools, of: int = 0) -> Ints:
        """Return the number of units with a row in each cell. Shape [cell]."""
        return np.count_nonzero(self.total(present.astype(np.float64), of), axis=1)


def find_units(parts: Sequence[UnitRows], strata: Ints | None = None) -> Units:
    """Return the units of the rows of several experiments together; equal rows are one unit.

    Args:
        strata: Strata of the first experiment's rows, shape [prompt]. They are used if every unit
            is in
            one stratum and each stratum has enough units.
    """
    lengths = [len(part.keys) for part in parts]
    ends = np.cumsum([0, *lengths])
    keys = np.concatenate([part.keys for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    partitions = [np.unique(keys, return_inverse=True)[1].reshape(-1)]
    for part, start in zip(parts, ends, strict=False):
        for seen in part.seen:
            partitions.append(_among(seen, int(start), len(keys)))
    if any(part.groups is not None for part in parts):
        labels: dict[object, int] = {}
        codes = np.arange(len(keys)) + len(keys)
        for part, start in zip(parts, ends, strict=False):
            for place, label in enumerate([] if part.groups is None else part.groups.tolist()):
                codes[start + place] = labels.setdefault(label, len(labels))
        partitions.append(np.unique(codes, return_inverse=True)[1].reshape(-1))
    joined = _join_partitions(partitions, len(keys))
    # Units are numbered by their smallest key.
    least = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(least, joined, keys)
    first = np.unique(joined)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[first[np.argsort(least[first], kind="stable")]] = np.arange(len(first))
    codes = rank[joined] if len(keys) else joined
    split = [codes[a:b] for a, b in pairwise(ends)]
    orders = [np.lexsort((part.keys, numbers)) for part, numbers in zip(parts, split, strict=True)]
    count = len(first)
    return Units(
        codes=tuple(split),
        count=count,
        orders=tuple(orders),
        strata=None if strata is None else _unit_strata(strata, split[0], count),
    )


def _among(codes: Ints, start: int, size: int) -> Ints:
    """Extend a partition of some rows to all rows; each of the others is alone."""
    numbers = np.unique(codes, return_inverse=True)[1].reshape(-1)
    places = np.arange(size) + size
    places[start : start + len(numbers)] = numbers
    return np.unique(places, return_inverse=True)[1].reshape(-1)


def _join_partitions(partitions: Sequence[Ints], size: int) -> Ints:
    """Return the finest partition coarser than all given ones, with row numbers as codes."""
    label = np.arange(size)
    while True:
        before = label
        for partition in partitions:
            least = np.full(int(partition.max(initial=0)) + 1, size)
            np.minimum.at(least, partition, label)
            label = least[partition]
        if np.array_equal(before, label):
            return label


def _unit_strata(strata: Ints, codes: Ints, count: int) -> Ints | None:
    found = np.full(count, -1, dtype=np.int64)
    found[codes] = np.unique(strata, return_inverse=True)[1].reshape(-1)
    numbers = np.unique(strata, return_inverse=True)[1].reshape(-1)
    if (found < 0).any() or not np.array_equal(found[codes], numbers):
        return None
    sizes = np.bincount(found)
    return found if len(sizes) > 1 and sizes.min() >= MIN_STRATUM_UNITS else None


@dataclass(frozen=True, eq=False)
class Resamples:
    """Samples of units, drawn with replacement; the draws don't depend on what is computed from
    them.

    With strata, the number of units per stratum is fixed.
    """

    units: int
    resamples: int
    seed: int
    strata: Ints | None = None

    @property
    def count(self) -> int:
        """Number of strata."""
        return 1 if self.strata is None else int(self.strata.max()) + 1

    def weights(self, columns: int = 1) -> Iterator[Floats]:
        """Yield the counts of drawn units, shape [resample, unit], in blocks that leave room for
        `columns` numbers per resample."""
        if not self.units:
            return
        left = self.resamples
        step = max(1, BLOCK_NUMBERS // max(self.units, columns))
        members = (
            [np.arange(self.units)]
            if self.strata is None
            else [np.flatnonzero(self.strata == each) for each in range(self.strata.max() + 1)]
        )
        # A single generator's draws would depend on the size of a block.
        seed = self.seed % 2**63
        randoms = [np.random.default_rng([1, seed, each]) for each in range(len(members))]
        while left > 0:
            rows = min(step, left)
            left -= rows
            weights = np.empty((rows, self.units))
            for random, among in zip(randoms, members, strict=True):
                weights[:, among] = _multinomial(random, rows, len(among))
            yield weights


def _multinomial(random: np.random.Generator, rows: int, size: int) -> NDArray[np.int64]:
    drawn = random.integers(0, size, (rows, size))
    drawn += np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def cell_blocks(cells: int, width: int) -> Iterator[slice]:
    """Yield blocks of cells whose arrays of `width` numbers per cell are small."""
    step = max(1, 2 * BLOCK_NUMBERS // max(width, 1))
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))


@dataclass(frozen=True, eq=False)
class EffectParts:
    """Numerator and denominator of an effect per prompt, 0 if a prompt isn't in the cell."""

    effect: EffectKind
    numerator: Floats
    """Shape [cell, prompt]."""
    denominator: Floats | None
    """Shape [1 or cell, prompt]."""
    present: Bools
    """Shape [cell, prompt]."""
    undefined: Ints
    """Number of prompts whose own denominator is 0 (`per prompt` only), shape [cell]."""
    rounding: Floats
    """Maximum effect of rounding on the numerator, shape [1 or cell, prompt]."""
    fixed: Bools
    """Whether the cell equals an unpatched run by its structure, shape [cell]."""

    def chosen_rows(self, rows: Bools) -> EffectParts:
        """Select some rows of a mean, shape [prompt]; the others are in no cell."""
        return replace(
            self,
            numerator=np.where(rows, self.numerator, 0.0),
            present=self.present & rows,
        )

    def mean(self) -> Floats:
        """Return the effect, NaN without prompts or with a denominator of 0. Shape [cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            count = np.count_nonzero(self.present, axis=1)
            top = self.numerator.sum(1) / count
            if self.denominator is None:
                return top
            return self.effect.divide(top, self.denominator.sum(1) / count)

    def sums(self, units: Units, of: int = 0) -> EffectSums:
        """Sum both within units."""
        if self.denominator is None:
            full = self.present.all()
            rows = self.present[:1] if full else self.present
            bottom = units.total(rows.astype(np.float64), of)
        else:
            bottom = units.total(self.denominator, of)
            if self.effect.absolute:
                bottom = bottom * np.where(bottom.sum(1, keepdims=True) < 0, -1.0, 1.0)
        top, rounding = units.total(self.numerator, of), units.total(self.rounding, of)
        return EffectSums(top, bottom, units.held(self.present, of), rounding, self.fixed)


@dataclass(frozen=True, eq=False)
class EffectSums:
    """A mean, or a ratio of means, per cell: the sum of `top` divided by that of `bottom`."""

    top: Floats
    """Shape [cell, unit]."""
    bottom: Floats
    """Shape [1 or cell, unit]."""
    held: Ints
    """Number of units with a row in the cell, shape [cell]."""
    rounding: Floats | float = 0.0
    """Maximum effect of rounding on `top`, shape [1 or cell, unit]."""
    fixed: Bools | Literal[False] = False
    """Whether the cell's value is the same in all rows by its structure, shape [cell]."""

    @property
    def value(self) -> Floats:
        """The effect, shape [cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.top.sum(1) / self.bottom.sum(1)

    def under(self, weights: Floats) -> Floats:
        """Return the effect under resamples [resample, unit], NaN if no unit of a cell is drawn.
        Shape [resample, cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ self.top.T) / (weights @ self.bottom.T)

    def chosen(self, cells: CellIndex) -> EffectSums:
        """Select some cells."""
        bottom = self.bottom if len(self.bottom) == 1 else self.bottom[cells]
        rounding, fixed = self.rounding, self.fixed
        if isinstance(rounding, np.ndarray) and len(rounding) > 1:
            rounding = rounding[cells]
        fixed = fixed if fixed is False else fixed[cells]
        return EffectSums(self.top[cells], bottom, self.held[cells], rounding, fixed)

    def weigh(self, share: Floats) -> EffectSums | None:
        """Return the weighted mean of the cells as one cell; None if their denominators differ.

        Args:
            share: Weights with the sum 1, shape [cell].
        """
        if (self.bottom != self.bottom[:1]).any():
            return None
        top, rounding = (
            (share @ np.broadcast_to(values, self.top.shape))[None]
            for values in (self.top, self.rounding)
        )
        fixed = np.all(self.fixed, keepdims=True)
        return EffectSums(top, self.bottom[:1], self.held.min(keepdims=True), rounding, fixed)


def effect_parts(data: MeasureData, effect: EffectKind, cells: CellIndex) -> EffectParts:
    """Return the effect parts of some cells of a measure."""

    def rows(values: Floats | None) -> Floats:
        if values is None:
            return np.full((1, data.patched.shape[1]), np.nan)
        return values[cells] if values.shape[0] > 1 else values

    patched, base, source = rows(data.patched), rows(data.base), rows(data.source)
    numerator = np.asarray(effect.numerator(patched, base, source), dtype=np.float64)
    numerator = np.broadcast_to(numerator, patched.shape)
    present = ~np.isnan(patched) & ~np.isnan(numerator)
    undefined = np.zeros(patched.shape[0], dtype=np.int64)
    rounding = 2 * np.nan_to_num(rows(data.rounding))  # of both runs
    is_effect = effect.of_intervention and effect.tested
    fixed = data.inert[cells] if is_effect else np.zeros(len(patched), dtype=bool)
    if effect.denominator is None:
        numerator = np.where(present, numerator, 0.0)
        return EffectParts(effect, numerator, None, present, undefined, rounding, fixed)
    denominator = np.asarray(effect.denominator(patched, base, source), dtype=np.float64)
    present = present & ~np.isnan(denominator)
    if data.per_prompt:
        ratios = effect.divide(numerator, denominator)
        undefined = np.count_nonzero(present & np.isnan(ratios), axis=1)
        ratios = np.where(present, ratios, 0.0)
        none = np.zeros_like(rounding)
        return EffectParts(effect, ratios, None, present, undefined, none, fixed)
    if not present.all():  # the denominator also excludes prompts outside the cell
        denominator = np.where(present, denominator, 0.0)
    numerator = np.where(present, numerator, 0.0)
    return EffectParts(effect, numerator, denominator, present, undefined, rounding, fixed)


def find_repeated_cells(data: MeasureData, effect: EffectKind) -> Ints:
    """Return the first cell with the same number, because the measure can't differ between the two.
    Shape [cell].

    Cells are equal by structure: an effect of unpatched runs doesn't depend on the rules, and
    others don't depend on what is observed. Equal values alone don't count.
    """
    codes, cells = data.same, len(data.patched)
    if not effect.of_intervention:
        codes = np.zeros(cells, dtype=np.int64)
    if codes is None or len(np.unique(codes)) == cells:
        return np.arange(cells)
    parts = effect_parts(data, effect, slice(None))
    arrays: list[NDArray[Any]] = [parts.numerator, parts.present]
    arrays += [each for each in (parts.denominator, data.seen) if each is not None]
    wide = [np.broadcast_to(array, (cells, array.shape[1])) for array in arrays]
    first: dict[tuple[int | bytes, ...], int] = {}
    keys = ((int(codes[cell]), *(each[cell].tobytes() for each in wide)) for cell in range(cells))
    return np.array([first.setdefault(key, cell) for cell, key in enumerate(keys)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class SamplingDesign:
    """The properties of an experiment, besides its values, that its intervals and p depend on."""

    prompts: int
    settings: spec.Statistics
    seed: int
    keys: Sequence[int] | None = None
    """Hashes of row contents for draws, shape [prompt]; without them all rows differ."""
    groups: NDArray[Any] | None = None
    """Values of `stats by`, shape [prompt]."""
    strata: Ints | None = None
    """Strata of evenly assigned values, shape [prompt]."""
    blocks: Ints | None = None
    """Prompt block of each row, if there are several, shape [prompt]."""

    @cached_property
    def known(self) -> dict[bytes, Units]:
        return {}

    @cached_property
    def order(self) -> Ints | None:
        """Order of rows by content, so that sums are bit-identical for any order of the rows; None
        if they are sorted."""
        if self.keys is None:
            return None
        order = np.argsort(np.asarray(self.keys), kind="stable")
        return None if np.array_equal(order, np.arange(self.prompts)) else order

    @cached_property
    def ordered(self) -> SamplingDesign:
        """The design with sorted rows."""
        order = self.order
        if order is None or self.keys is None:
            return self
        return replace(
            self,
            keys=[self.keys[i] for i in order],
            groups=None if self.groups is None else self.groups[order],
            strata=None if self.strata is None else self.strata[order],
            blocks=None if self.blocks is None else self.blocks[order],
        )

    def rows(self, *seen: Ints) -> UnitRows:
        """Return the rows; those with equal codes in any of `seen` are one unit."""
        return UnitRows.of(self.prompts, self.keys, seen, self.groups)

    def units(self, seen: Ints | None = None) -> Units:
        """Return the units of a measure that can't distinguish rows with equal codes."""
        key = b"" if seen is None else np.ascontiguousarray(seen).tobytes()
        if key not in self.known:
            rows = self.rows() if seen is None else self.rows(seen)
            design = None if self.groups is not None else self.strata
            self.known[key] = find_units([rows], design)
        return self.known[key]

    def whole(self, present: Bools) -> Bools:
        """Return whether a cell has all rows of every block that it has any of, so that new samples
        have the same numbers of rows. Shape [cell].

        Args:
            present: Shape [cell, prompt].
        """
        if self.blocks is None or self.groups is not None:
            return np.asarray(present.all(1))
        mask: Bools = np.asarray(present.any(1))
        for block in np.unique(self.blocks):
            own = present[:, self.blocks == block]
            mask = mask & (own.all(1) | ~own.any(1))
        return mask

    def draws(self, units: Units, *, whole: bool = True, resamples: int = 0) -> Resamples:
        """Return new samples; for cells that aren't `whole`, without strata."""
        count = resamples or self.settings.resamples
        return Resamples(units.count, count, self.seed, units.strata if whole else None)

    def unit_word(self, units: Units) -> str:
        """Return the name of one unit.

        Rows that are equal join the values of `stats by` that they have.
        """
        if self.groups is not None:
            word = f"value of {self.settings.by}" if self.settings.by else "group"
            joined = self.settings.by and units.count < len(set(self.groups.tolist()))
            return f"group of {plural_noun(word)}" if joined else word
        return "prompt" if units.count == self.prompts else "distinct prompt"


def reorder_rows(data: MeasureData, order: Ints | None) -> MeasureData:
    """Reorder the rows of a measure."""
    if order is None:
        return data
    rows = ("patched", "base", "source", "truth", "rounding", "seen")
    held = {name: getattr(data, name) for name in rows}
    return replace(
        data, **{name: each[:, order] for name, each in held.items() if each is not None}
    )


def cells_by_view(data: MeasureData) -> Iterator[tuple[Ints, Ints | None]]:
    """Yield (cells, codes of rows that the measure distinguishes there, shape [prompt])."""
    return group_cells_by_view(len(data.patched), data.seen)


def group_cells_by_view(count: int, seen: Ints | None) -> Iterator[tuple[Ints, Ints | None]]:
    """Group `count` cells by their codes `seen`, shape [1 or cell, prompt], as in `MeasureData`."""
    cells = np.arange(count)
    if seen is None or len(seen) == 1:
        yield cells, None if seen is None else seen[0]
        return
    rows, which = np.unique(seen, axis=0, return_inverse=True)
    for number, seen in enumerate(rows):
        yield cells[which.reshape(-1) == number], seen
