"""Verification of estimated effects: the cells that are also run, and how well both agree.

A correlation's interval is over the cells that were drawn at random. It extends equally to both
sides on Fisher's scale, by the jackknife over cells and Student's t of one degree of freedom fewer
than there are cells.

References:
    Efron, B. and Stein, C. (1981). The jackknife estimate of variance. Ann. Stat. 9, 586-596.
    Fisher, R. A. (1921). On the "probable error" of a coefficient of correlation deduced from a
        small sample. Metron 1, 3-32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.program.significance import MIN_UNITS
from mechdsl.program.spec import Verification
from mechdsl.statistics.comparisons import pearson, spearman
from mechdsl.statistics.intervals import clopper_pearson, student_quantile


@dataclass(frozen=True, eq=False)
class ExactEffects:
    """Effects of cells that were run, with their intervals: NaN where there is none."""

    mean: Floats
    low: Floats
    high: Floats
    n: Ints
    """Number of prompts, shape [cell] as all."""


ExactCells = Callable[[Ints], ExactEffects]
"""Runs cells, by their numbers in the result, and returns their effects."""


@dataclass(frozen=True)
class CorrelationEstimate:
    """A correlation over cells."""

    value: float
    """NaN without one."""
    low: float
    """NaN without an interval."""
    high: float


@dataclass(frozen=True)
class Agreement:
    """The agreement of estimates with exact effects, over some of the verified cells."""

    cells: int
    pearson: CorrelationEstimate
    spearman: CorrelationEstimate


@dataclass(frozen=True)
class TopRecall:
    """The exact effects that the cells with the largest estimates lack."""

    found: int
    """Of as many verified cells with the largest exact effects, those with the largest
    estimates."""
    above: int
    """Random cells whose exact effect exceeds the smallest of the cells with the largest
    estimates, in absolute value."""
    low: float
    """Low end of the Clopper-Pearson interval of their share of all other cells; NaN without
    random cells, and if all others are among them."""
    high: float


@dataclass(frozen=True)
class ExactEffect:
    """The exact effect of one verified cell, with its interval: NaN where there is none."""

    choice: Literal["top", "random"]
    """Why the cell was run."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class VerifiedCells:
    """The cells of one measure that were also run."""

    measure: int
    """Number of the measure."""
    top: int
    """Number of cells with the largest absolute estimates."""
    others: int
    """Number of all other cells that can have an effect; the random ones are drawn from them."""
    cells: Ints
    """Numbers of the verified cells, those with the largest estimates first."""
    exact: Floats
    """Shape [verified cell], as `low` and `high`."""
    low: Floats
    high: Floats
    over_random: Agreement | None
    over_all: Agreement
    recall: TopRecall | None
    fewer_rows: int = 0
    """Number of verified cells whose exact effect is over fewer prompts than the estimate."""

    @property
    def by_size(self) -> Ints:
        """Numbers of the cells, those with the largest absolute exact effects first."""
        size = np.nan_to_num(np.abs(self.exact), nan=-1.0)
        return self.cells[np.argsort(-size, kind="stable")]

    def of_cell(self, cell: int) -> ExactEffect | None:
        """Return the exact effect of a cell by its number; None if it wasn't run."""
        places = np.flatnonzero(self.cells == cell).tolist()
        if not places:
            return None
        (place,) = places
        numbers = (float(each[place]) for each in (self.exact, self.low, self.high))
        return ExactEffect("top" if place < self.top else "random", *numbers)


def choose_cells(estimates: Floats, top: int, random: int, seed: int) -> tuple[Ints, Ints]:
    """Return the cells with the largest absolute estimates, and others that are drawn at random:
    fewer if there are fewer.

    Args:
        estimates: Shape [cell], NaN for cells that are never chosen.
        seed: Seed of the drawing.
    """
    known = np.flatnonzero(np.isfinite(estimates))
    ranked = known[np.argsort(-np.abs(estimates[known]), kind="stable")]
    others = np.sort(ranked[top:])
    drawn = np.random.default_rng(seed).permutation(len(others))[:random]
    return ranked[:top], others[drawn]


def verify_cells(
    measure: int,
    estimates: Floats,
    counts: Ints,
    asked: Verification,
    seed: int,
    confidence: float,
    exact: ExactCells,
) -> VerifiedCells:
    """Run the chosen cells and compare them with their estimates.

    Args:
        measure: Number of the measure.
        estimates: Shape [cell], NaN for cells without an estimate, and for those that can't have an
            effect.
        counts: Number of prompts of each cell.
        asked: The numbers of cells.
        seed: Seed of the drawing.
        confidence: Of intervals, in percent.
    """
    best, drawn = choose_cells(estimates, asked.top, asked.random, seed)
    cells = np.concatenate([best, drawn])
    found = exact(cells)
    pairs = estimates[cells], found.mean
    is_random = np.arange(len(cells)) >= len(best)
    others = int(np.isfinite(estimates).sum()) - len(best)
    sampled = confidence if len(drawn) < others else None
    return VerifiedCells(
        measure=measure,
        top=len(best),
        others=others,
        cells=cells,
        exact=found.mean,
        low=found.low,
        high=found.high,
        over_random=agreement(*pairs, is_random, sampled) if len(drawn) else None,
        over_all=agreement(*pairs, np.ones_like(is_random), None),
        recall=top_recall(found.mean, len(best), sampled) if len(best) else None,
        fewer_rows=int((found.n < counts[cells]).sum()),
    )


def agreement(
    estimates: Floats, exact: Floats, chosen: Bools, confidence: float | None
) -> Agreement:
    """Return the correlations over the chosen cells that have an exact effect.

    Args:
        confidence: Of the intervals, in percent; None if the cells aren't a random sample of
            others, so that there is none.
    """
    own = chosen & np.isfinite(exact)
    pair = estimates[own], exact[own]
    found = (_correlation(of, *pair, confidence) for of in (pearson, spearman))
    return Agreement(int(own.sum()), *found)


def _correlation(
    of: Callable[[Floats, Floats], Floats], one: Floats, two: Floats, confidence: float | None
) -> CorrelationEstimate:
    count = len(one)
    value = float(of(one[None], two[None])[0]) if count > 1 else math.nan
    none = CorrelationEstimate(value, math.nan, math.nan)
    if confidence is None or count < MIN_UNITS or not abs(value) < 1 - 1e-12:
        return none
    without = np.array([np.delete(np.arange(count), place) for place in range(count)])
    left = of(one[without], two[without])
    if not np.isfinite(left).all():
        return none
    most = 1 - 1e-12
    moved = np.arctanh(np.clip(left, -most, most))
    error = math.sqrt((count - 1) / count * float(((moved - moved.mean()) ** 2).sum()))
    far = float(student_quantile(confidence, np.array([count]))[0]) * error
    at = math.atanh(value)
    return CorrelationEstimate(value, math.tanh(at - far), math.tanh(at + far))


def top_recall(exact: Floats, top: int, confidence: float | None) -> TopRecall:
    """Compare the exact effects of the `top` first cells with those of the others, which are
    random.

    Args:
        confidence: Of the interval, in percent; None if the others are all there are.
    """
    size = np.nan_to_num(np.abs(exact), nan=-1.0)
    least, drawn = float(np.nanmin(np.abs(exact[:top]), initial=np.inf)), len(exact) - top
    largest = np.argsort(-size, kind="stable")[:top]
    above = int((size[top:] > least).sum())
    low, high = math.nan, math.nan
    if drawn and confidence is not None:
        count = np.array([drawn], dtype=np.float64)
        ends = clopper_pearson(np.array([above], dtype=np.float64), count, confidence)
        low, high = (float(end[0]) for end in ends)
    return TopRecall(int((largest < top).sum()), above, low, high)
