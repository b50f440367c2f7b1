"""What was measured, and what statistics make of it: arrays over cells and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.program.spec import NO_EFFECTS

Withheld: TypeAlias = Literal["", "skewed", "picked"]
Spread: TypeAlias = Literal["rows", "unknown", "none"]
"""Where intervals come from: how rows differ; nowhere, as a cell has one number of all rows; or a
number isn't of rows, so that others would change nothing."""
NO_INTERVAL: Mapping[Spread, str] = {
    "unknown": "one number of all rows: no interval",
    "none": "a number of the weights alone: no interval",
}


@dataclass(frozen=True)
class Missing:
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
    missing: Missing | None = None
    """Why it could not be computed; then no cell has a value."""
    seen: Ints | None = None
    """[1 or cell, prompt]: rows of one number are the same to this measure, as it sees the same
    tokens of them; None where no two are."""
    at: str | None = None
    """The position that it is read at, as written; None where none is."""
    spread: Spread = "rows"
    as_patched: bool = False
    """Whether the base run is read behind the replies that patched rows wrote, not behind its own
    prompts."""
    estimator: str = ""
    """`gradient_input`: what the effects are estimated by; empty where each cell was run. `patched`
    is the base run's value plus the estimate then; of `NO_EFFECTS` their number itself."""

    @property
    def called(self) -> str:
        """The effect as people read it: `delta`, `estimated delta`, `gradient`."""
        if self.estimator in NO_EFFECTS:
            return NO_EFFECTS[self.estimator]
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
    withheld: Withheld = ""
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


def may_change(data: MeasureData, found: CellStatistics) -> Bools:
    """[cell] whether rounding alone may change what counts as right, or the category, in some
    prompt of the base run."""
    counts = data.kind == "category" or data.unit == "share"
    return (found.rounding > 0) & ~found.tested & counts


@dataclass(frozen=True, eq=False)
class DrawnValues:
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
