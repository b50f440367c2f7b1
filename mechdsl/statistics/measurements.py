"""Measured values as arrays over cells and prompts, and the statistics made of them.

Numerators and denominators of effects are here too, per prompt and summed within sampling units,
with the units themselves: a unit is a row of the prompts; or all rows that a measure can't
distinguish; or, under `stats by`, all rows of one value. Estimates are over rows, intervals and
p-values over units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, CellIndex, Floats, Ints
from mechdsl.program import spec
from mechdsl.program.spec import NON_EFFECT_ESTIMATORS
from mechdsl.vocab.effects import EffectKind

WithheldReason: TypeAlias = Literal["", "skewed", "picked"]

SpreadSource: TypeAlias = Literal["rows", "unknown", "none"]
"""Where intervals come from: how rows differ; nowhere, as a cell has one number of all rows; or a
number isn't of rows, so that others would change nothing."""

NO_INTERVAL_REASONS: Mapping[SpreadSource, str] = {
    "unknown": "one number of all rows: no interval",
    "none": "a number of the weights alone: no interval",
}


@dataclass(frozen=True)
class MissingReason:
    """Why something could not be computed."""

    code: str
    reason: str
    """In words, without the code."""


@dataclass(frozen=True, eq=False)
class MeasureData:
    """What was measured: one value per cell and prompt, with the two runs it is set against."""

    label: str
    metric: str
    """As written."""
    effect: str
    kind: Literal["number", "category"]
    per_prompt: bool
    patched: Floats
    """[cell, prompt], NaN where the prompt is not part of the cell."""
    base: Floats
    """[1 or cell, prompt]."""
    source: Floats | None
    """[1 or cell, prompt]."""
    inert: Bools
    """[cell]: by structure the same as the base run; stays in the table, out of the correction."""
    truth: Floats | None = None
    """[1 or cell, prompt], for categories: the number that would be right."""
    unit: str = ""
    """The metric's unit, for axes of plots."""
    word: str = ""
    """`prob` of `prob(answer)`: the metric that it is, empty where it is more than one."""
    rounding: Floats | None = None
    """[1 or cell, prompt]: how far rounding may move the metric; None where that isn't known."""
    gaps: tuple[str, ...] = ()
    """[cell]: why it has no value of this one though it has of others, empty where it has."""
    missing: MissingReason | None = None
    """Why it could not be computed; then no cell has a value."""
    seen: Ints | None = None
    """[1 or cell, prompt]: rows of one number are the same to this measure, as it sees the same
    tokens of them; None where no two are."""
    at: str | None = None
    """The position that it is read at, as written; None where none is."""
    spread: SpreadSource = "rows"
    as_patched: bool = False
    """Whether the base run is read behind the replies that patched rows wrote, not behind its own
    prompts."""
    estimator: str = ""
    """`gradient_input`: what the effects are estimated by; empty where each cell was run. `patched`
    is the base run's value plus the estimate then; of `NO_EFFECTS` their number itself."""

    @property
    def called(self) -> str:
        """The effect as people read it: `delta`, `estimated delta`, `gradient`."""
        if self.estimator in NON_EFFECT_ESTIMATORS:
            return NON_EFFECT_ESTIMATORS[self.estimator]
        return f"estimated {self.effect}" if self.estimator else self.effect


@dataclass(frozen=True, eq=False)
class CellStatistics:
    """The statistics of one measure: arrays over cells, NaN where `reasons` says why."""

    mean: Floats
    low: Floats
    high: Floats
    p: Floats
    p_corrected: Floats
    n: Ints
    base_mean: Floats
    """Over the same prompts as the cell's mean."""
    source_mean: Floats
    commonest: Floats
    """Categories: the commonest value (of several, the smallest), its share of the prompts, and
    the mean absolute error to the truth."""
    share: Floats
    mean_error: Floats
    reasons: tuple[str | None, ...]
    test: str | None
    """How p was computed, in words; None where nothing was tested."""
    tests: int
    """Over how many cells, of all measures, p was corrected."""
    units: Ints
    """How many independent units stand behind each cell: distinct prompts, or groups."""
    floor: Bools
    """[cell]: p is the least that so many flips or resamples give, and may be smaller."""
    rounding: Floats
    """How far rounding alone may move the mean, in the effect's own unit, or, of categories, the
    share of the prompts whose category it may change; NaN where that isn't known or can't be."""
    withheld: WithheldReason = ""
    """Why no p is corrected: effects are too skewed for the level to hold over all cells, or sites
    were picked on the same rows."""

    @property
    def tested(self) -> Bools:
        """[cell] whether there is a p."""
        return ~np.isnan(self.p)

    @property
    def at_rounding(self) -> Bools:
        """[cell] whether rounding alone explains an effect of this size. Where nothing rounds, as
        for a rank that no other token is close to, an effect of 0 is exact."""
        return self.tested & (np.abs(self.mean) <= self.rounding) & (self.rounding > 0)


def may_round_differently(data: MeasureData, found: CellStatistics) -> Bools:
    """[cell] whether rounding alone may change what counts as right, or the category, in some
    prompt of the base run."""
    counts = data.kind == "category" or data.unit == "share"
    return (found.rounding > 0) & ~found.tested & counts


@dataclass(frozen=True, eq=False)
class RandomControlValues:
    """What `against random(n)` measured: the same experiment on targets drawn at random."""

    values: tuple[Floats, ...]
    """Per measure [draw, cell, prompt]; NaN where a cell has no such draw."""
    counts: Ints
    """[cell]: how many different draws were made."""
    asked: int
    """How many the file asks for."""
    what: str
    """What was drawn, in words: `random heads`."""


@dataclass(frozen=True, eq=False)
class NullBand:
    """The same effect on targets that were drawn at random: arrays over cells, NaN where nothing
    could be drawn."""

    low: Floats
    """From the `rank`-th lowest to the `rank`-th highest draw; rank 1 is the whole range."""
    high: Floats
    mean: Floats
    draws: Ints
    """How many draws have a value: k."""
    level: Floats
    """With what probability the band holds a further draw: (k + 1 - 2 rank)/(k + 1)."""
    rank: Ints
    p: Floats
    """(1 + b)/(1 + k), b of the draws at least as large in size as the effect; NaN where the effect
    has no 0 that means "no effect"."""
    inside: Bools
    """Whether the effect lies in the band."""
    nearer: Bools
    """Whether it lies between 0 and the band: random targets have more of it."""
    made: Ints
    """How many different draws were made."""
    asked: int
    """How many the file asks for; cells that have no more others have fewer."""
    what: str
    """What was drawn, in words: `random heads`."""
    fewest: int
    """Draws from which a band holds a further one with the confidence."""

    @property
    def decides(self) -> Bools:
        """[cell] whether there are enough draws to say that the effect lies in the band, or not."""
        return self.draws >= self.fewest


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its interval, of an unpatched run."""

    mean: float
    low: float
    high: float
    n: int
    rounding: float = 0.0
    """How far rounding alone may move the mean."""


BLOCK_NUMBERS = 1_000_000
"""Numbers held at once by one intermediate array (8 MB)."""

MIN_STRATUM_UNITS = 4
"""Units below which a stratum says too little of its own spread."""


@dataclass(frozen=True, eq=False)
class UnitRows:
    """The rows of one experiment, as far as their units hang on them."""

    keys: Ints
    """[prompt]: a row's content; rows of one key are one unit."""
    seen: Sequence[Ints] = ()
    """Each [prompt]: rows of one number can't be told apart."""
    groups: NDArray[Any] | None = None
    """[prompt]: the values of `stats by`."""

    @classmethod
    def of(
        cls,
        prompts: int,
        keys: Sequence[int] | None = None,
        seen: Sequence[Ints] = (),
        groups: NDArray[Any] | None = None,
    ) -> UnitRows:
        own = np.arange(prompts) if keys is None else np.asarray(keys, dtype=np.int64)
        return cls(own.astype(np.int64), seen, groups)


@dataclass(frozen=True, eq=False)
class Units:
    """Which rows belong together."""

    codes: tuple[Ints, ...]
    """Per experiment [prompt]: the number of each row's unit. Numbers hang on the rows' contents
    and not on their places."""
    count: int
    orders: tuple[Ints, ...]
    """Per experiment, its rows by unit and within it by content, so that a sum of them is the same
    in the last bit wherever they stand."""
    strata: Ints | None = None
    """[unit], where new rows have the same design."""

    def total(self, values: Floats, of: int = 0) -> Floats:
        """[cell, prompt] summed within units: [cell, unit]."""
        order = self.orders[of]
        held = self.codes[of][order]
        ordered = values[:, order]
        if np.array_equal(held, np.arange(self.count)):  # every row is a unit
            return np.ascontiguousarray(ordered)
        found = np.zeros((values.shape[0], self.count))
        if not len(held):
            return found
        starts = np.flatnonzero(np.diff(held, prepend=-1))
        found[:, held[starts]] = np.add.reduceat(ordered, starts, axis=1)
        return found

    def held(self, present: Bools, of: int = 0) -> Ints:
        """[cell]: how many units have a row in each cell."""
        return np.count_nonzero(self.total(present.astype(np.float64), of), axis=1)


def find_units(parts: Sequence[UnitRows], strata: Ints | None = None) -> Units:
    """The units of the rows of several experiments together: equal rows are one unit in all.

    strata: [prompt] of the first; used where every unit lies in one of them and each of them has
    enough.
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
    # units are numbered by the least of their keys
    least = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(least, joined, keys)
    first = np.unique(joined)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[first[np.argsort(least[first], kind="stable")]] = np.arange(len(first))
    codes = rank[joined] if len(keys) else joined
    split = [codes[a:b] for a, b in pairwise(ends)]
    orders = [np.lexsort((part.keys, own)) for part, own in zip(parts, split, strict=True)]
    count = len(first)
    return Units(
        codes=tuple(split),
        count=count,
        orders=tuple(orders),
        strata=None if strata is None else _unit_strata(strata, split[0], count),
    )


def _among(codes: Ints, start: int, size: int) -> Ints:
    """A partition of some of all rows; each of the others is alone."""
    own = np.unique(codes, return_inverse=True)[1].reshape(-1)
    found = np.arange(size) + size
    found[start : start + len(own)] = own
    return np.unique(found, return_inverse=True)[1].reshape(-1)


def _join_partitions(partitions: Sequence[Ints], size: int) -> Ints:
    """The finest partition that joins what any of these does; its numbers are row numbers."""
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
    own = np.unique(strata, return_inverse=True)[1].reshape(-1)
    if (found < 0).any() or not np.array_equal(found[codes], own):
        return None
    sizes = np.bincount(found)
    return found if len(sizes) > 1 and sizes.min() >= MIN_STRATUM_UNITS else None


@dataclass(frozen=True, eq=False)
class Resamples:
    """New samples of units, drawn with replacement: the same draws whatever is computed from them.

    With strata so many are drawn from each as there are.
    """

    units: int
    resamples: int
    seed: int
    strata: Ints | None = None

    @property
    def count(self) -> int:
        """How many strata there are."""
        return 1 if self.strata is None else int(self.strata.max()) + 1

    def weights(self, columns: int = 1) -> Iterator[Floats]:
        """How often each unit was drawn: [resample, unit] in blocks that leave room for `columns`
        numbers per resample."""
        if not self.units:
            return
        left = self.resamples
        step = max(1, BLOCK_NUMBERS // max(self.units, columns))
        members = (
            [np.arange(self.units)]
            if self.strata is None
            else [np.flatnonzero(self.strata == each) for each in range(self.strata.max() + 1)]
        )
        # one generator each, or the draws would hang on the size of a block
        seed = self.seed % 2**63
        randoms = [np.random.default_rng([1, seed, each]) for each in range(len(members))]
        while left > 0:
            rows = min(step, left)
            left -= rows
            found = np.empty((rows, self.units))
            for random, among in zip(randoms, members, strict=True):
                found[:, among] = _multinomial(random, rows, len(among))
            yield found


def _multinomial(random: np.random.Generator, rows: int, size: int) -> NDArray[np.int64]:
    drawn = random.integers(0, size, (rows, size))
    drawn += np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def cell_blocks(cells: int, width: int) -> Iterator[slice]:
    """Cells in blocks whose arrays of `width` numbers per cell stay small."""
    step = max(1, 2 * BLOCK_NUMBERS // max(width, 1))
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))


@dataclass(frozen=True, eq=False)
class EffectParts:
    """Numerator and denominator of an effect per prompt, 0 where a prompt is not in the cell."""

    effect: EffectKind
    numerator: Floats
    """[cell, prompt]."""
    denominator: Floats | None
    """[1 or cell, prompt]."""
    present: Bools
    """[cell, prompt]."""
    undefined: Ints
    """[cell]: prompts whose own denominator is 0 (`per prompt` only)."""

    def mean(self) -> Floats:
        """[cell]: the effect itself; NaN where no prompt is in the cell, or the denominator is
        0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            count = np.count_nonzero(self.present, axis=1)
            top = self.numerator.sum(1) / count
            if self.denominator is None:
                return top
            return self.effect.divide(top, self.denominator.sum(1) / count)

    def sums(self, units: Units, of: int = 0) -> EffectSums:
        """The same by unit."""
        if self.denominator is None:
            full = self.present.all()
            rows = self.present[:1] if full else self.present
            bottom = units.total(rows.astype(np.float64), of)
        else:
            bottom = units.total(self.denominator, of)
            if self.effect.absolute:
                bottom = bottom * np.where(bottom.sum(1, keepdims=True) < 0, -1.0, 1.0)
        top = units.total(self.numerator, of)
        return EffectSums(top, bottom, units.held(self.present, of))


@dataclass(frozen=True, eq=False)
class EffectSums:
    """A mean, or a ratio of means, per cell: the sum of `top` over that of `bottom`."""

    top: Floats
    """[cell, unit]."""
    bottom: Floats
    """[1 or cell, unit]."""
    held: Ints
    """[cell]: units that have a row in it."""

    @property
    def value(self) -> Floats:
        """[cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.top.sum(1) / self.bottom.sum(1)

    def under(self, weights: Floats) -> Floats:
        """[resample, cell] of resamples [resample, unit]; NaN where none of a cell's is drawn."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ self.top.T) / (weights @ self.bottom.T)

    def chosen(self, cells: CellIndex) -> EffectSums:
        """Some of its cells."""
        bottom = self.bottom if len(self.bottom) == 1 else self.bottom[cells]
        return EffectSums(self.top[cells], bottom, self.held[cells])


def effect_parts(data: MeasureData, effect: EffectKind, cells: CellIndex) -> EffectParts:
    """The rows of some cells of a measure."""

    def rows(values: Floats | None) -> Floats:
        if values is None:
            return np.full((1, data.patched.shape[1]), np.nan)
        return values[cells] if values.shape[0] > 1 else values

    patched, base, source = rows(data.patched), rows(data.base), rows(data.source)
    numerator = np.asarray(effect.numerator(patched, base, source), dtype=np.float64)
    numerator = np.broadcast_to(numerator, patched.shape)
    present = ~np.isnan(patched) & ~np.isnan(numerator)
    undefined = np.zeros(patched.shape[0], dtype=np.int64)
    if effect.denominator is None:
        return EffectParts(effect, np.where(present, numerator, 0.0), None, present, undefined)
    denominator = np.asarray(effect.denominator(patched, base, source), dtype=np.float64)
    present = present & ~np.isnan(denominator)
    if data.per_prompt:
        ratios = effect.divide(numerator, denominator)
        undefined = np.count_nonzero(present & np.isnan(ratios), axis=1)
        return EffectParts(effect, np.where(present, ratios, 0.0), None, present, undefined)
    if not present.all():  # a prompt outside the cell is outside its denominator too
        denominator = np.where(present, denominator, 0.0)
    return EffectParts(effect, np.where(present, numerator, 0.0), denominator, present, undefined)


def numerators(data: MeasureData, effect: EffectKind, cells: CellIndex) -> EffectParts:
    """What the effect's test is about: its numerator alone."""
    plain = EffectKind(name="", meaning="", formula="", numerator=effect.numerator)
    return effect_parts(data, plain, cells)


@dataclass(frozen=True, eq=False)
class SamplingDesign:
    """What intervals and p of one experiment hang on beside its values."""

    prompts: int
    settings: spec.Statistics
    seed: int
    keys: Sequence[int] | None = None
    """[prompt]: contents of rows; what is drawn hangs on them. Without them all rows differ."""
    groups: NDArray[Any] | None = None
    """[prompt]: the values of `stats by`."""
    strata: Ints | None = None
    """[prompt]: what the block deals out evenly."""
    blocks: Ints | None = None
    """[prompt]: of which block it is, where several stand side by side."""

    @cached_property
    def known(self) -> dict[bytes, Units]:
        return {}

    @cached_property
    def order(self) -> Ints | None:
        """Rows by content, so that sums of them are the same in the last bit wherever they stand;
        None where they are in order."""
        if self.keys is None:
            return None
        order = np.argsort(np.asarray(self.keys), kind="stable")
        return None if np.array_equal(order, np.arange(self.prompts)) else order

    @cached_property
    def ordered(self) -> SamplingDesign:
        """The same of the rows in order."""
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
        """The rows, those of one number in any of `seen` being one unit."""
        return UnitRows.of(self.prompts, self.keys, seen, self.groups)

    def units(self, seen: Ints | None = None) -> Units:
        """The units of a measure that sees no difference between rows of one number."""
        key = b"" if seen is None else np.ascontiguousarray(seen).tobytes()
        if key not in self.known:
            own = self.rows() if seen is None else self.rows(seen)
            design = None if self.groups is not None else self.strata
            self.known[key] = find_units([own], design)
        return self.known[key]

    def whole(self, present: Bools) -> Bools:
        """[cell] whether it has all rows, of every block that it has any of, so that new samples
        have as many of them. present: [cell, prompt]"""
        if self.blocks is None or self.groups is not None:
            return np.asarray(present.all(1))
        found: Bools = np.asarray(present.any(1))
        for block in np.unique(self.blocks):
            own = present[:, self.blocks == block]
            found = found & (own.all(1) | ~own.any(1))
        return found

    def draws(self, units: Units, *, whole: bool = True, resamples: int = 0) -> Resamples:
        """New samples; of cells that aren't `whole` without the design."""
        count = resamples or self.settings.resamples
        return Resamples(units.count, count, self.seed, units.strata if whole else None)

    def unit_word(self, units: Units) -> str:
        """What one unit is called."""
        if self.groups is not None:
            return f"value of {self.settings.by}" if self.settings.by else "group"
        return "prompt" if units.count == self.prompts else "distinct prompt"


def reorder_rows(data: MeasureData, order: Ints | None) -> MeasureData:
    """A measure with its rows in another order."""
    if order is None:
        return data
    rows = ("patched", "base", "source", "truth", "rounding", "seen")
    held = {name: getattr(data, name) for name in rows}
    return replace(
        data, **{name: each[:, order] for name, each in held.items() if each is not None}
    )


def cells_by_view(data: MeasureData) -> Iterator[tuple[Ints, Ints | None]]:
    """(cells, [prompt] what the measure sees of rows there), of all cells."""
    return group_cells_by_view(len(data.patched), data.seen)


def group_cells_by_view(count: int, seen: Ints | None) -> Iterator[tuple[Ints, Ints | None]]:
    """The same of so many cells. seen: [1 or cell, prompt], as in `MeasureData`."""
    cells = np.arange(count)
    if seen is None or len(seen) == 1:
        yield cells, None if seen is None else seen[0]
        return
    rows, which = np.unique(seen, axis=0, return_inverse=True)
    for number, seen in enumerate(rows):
        yield cells[which.reshape(-1) == number], seen
