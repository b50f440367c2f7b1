"""Verification of estimated effects: the cells that are also run, and how well both agree.

A correlation's interval is over the cells that were drawn at random. It extends equally to both
sides on Fisher's scale, by the jackknife over cells and Student's t of one degree of freedom fewer
than there are cells.

`verify until top 20 95%` follows the order of the estimates. After each batch, the exact effects
of all cells that were run are regressed on their estimates: x = a + b·e plus residuals of
Student's t with scale √(c² + d²e²), by maximum likelihood over a, b, c, d and the degrees of
freedom. With T the 20th largest absolute effect that was run, the probability that some other
cell exceeds T is 1 − Π(1 − P(|xᵢ| > T)). This holds for residuals like those that were seen. It
can't hold for a single cell whose estimate says nothing of its effect: no method excludes one
without running all cells.

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
from mechdsl.fits.agreement import pearson, spearman
from mechdsl.program.significance import MIN_UNITS
from mechdsl.program.spec import Verification
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


@dataclass(frozen=True)
class TopSearch:
    """The outcome of a search for the cells with the largest exact effects."""

    until: Literal["bound", "stable"]
    confidence: float
    """In percent, of `bound`."""
    risk: float
    """Estimated probability that a cell that wasn't run is among the largest: 0 if all were run and
    have an effect, NaN without an estimate."""
    freedom: float
    """Degrees of freedom of the residuals; NaN without an estimate."""

    @property
    def is_proved(self) -> bool:
        """Whether every cell that can have an effect was run."""
        return self.risk == 0


@dataclass(frozen=True, eq=False)
class VerifiedCells:
    """The cells of one measure that were also run."""

    measure: int
    """Number of the measure."""
    top: int
    """Number of cells with the largest absolute estimates; of a search, of the largest exact
    effects."""
    ranked: int
    """Number of the cells that were chosen by their estimates."""
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
    search: TopSearch | None = None
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
        return ExactEffect("top" if place < self.ranked else "random", *numbers)


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
    search: TopSearch | None = None
    if asked.until:
        best, drawn, search = search_top(estimates, asked, seed, exact)
    else:
        best, drawn = choose_cells(estimates, asked.top, asked.random, seed)
    cells = np.concatenate([best, drawn])
    exact_effects = exact(cells)
    pairs = estimates[cells], exact_effects.mean
    is_random = np.arange(len(cells)) >= len(best)
    known = int(np.isfinite(estimates).sum())
    top = min(asked.top, known)
    sampled = confidence if len(drawn) < known - top else None
    recall = top_recall(exact_effects.mean, top, sampled) if top and search is None else None
    return VerifiedCells(
        measure=measure,
        top=top,
        ranked=len(best),
        others=known - top,
        cells=cells,
        exact=exact_effects.mean,
        low=exact_effects.low,
        high=exact_effects.high,
        over_random=agreement(*pairs, is_random, sampled) if len(drawn) else None,
        over_all=agreement(*pairs, np.ones_like(is_random), None),
        recall=recall,
        search=search,
        fewer_rows=int((exact_effects.n < counts[cells]).sum()),
    )


SEARCH_SAMPLE = 60
"""Number of random cells that a search with a bound runs first."""


def search_top(
    estimates: Floats, asked: Verification, seed: int, exact: ExactCells
) -> tuple[Ints, Ints, TopSearch]:
    """Run cells in the order of their estimates until those with the largest effects are known.

    Returns:
        The cells that were run in this order, those drawn at random, and the outcome.
    """
    bounded = asked.until == "bound"
    best, drawn = choose_cells(estimates, asked.top, SEARCH_SAMPLE if bounded else 0, seed)
    ranked, _ = choose_cells(estimates, len(estimates), 0, seed)
    rest = ranked[len(best) :]
    rest = rest[~np.isin(rest, drawn)]
    done, model, risk, before = 0, None, math.nan, set[int]()
    while True:
        cells = np.concatenate([best, rest[:done], drawn])
        mean = exact(cells).mean
        left = rest[done:]
        if not len(left):
            risk = 0.0 if np.isfinite(mean).all() else math.nan
            break
        step = asked.top
        if bounded:
            model, risk = estimate_risk(estimates[cells], mean, estimates[left], len(best), model)
            if risk <= 1 - asked.confidence / 100:
                break
            step = max(10, len(ranked) // (20 if risk > 0.9 else 100))
        elif done and _top_cells(cells, mean, len(best)) == before:
            break
        before = _top_cells(cells, mean, len(best))
        done += step
    kind: Literal["bound", "stable"] = "bound" if bounded else "stable"
    freedom = math.nan if model is None else math.exp(float(model[4]))
    outcome = TopSearch(kind, asked.confidence, risk, freedom)
    return np.concatenate([best, rest[:done]]), drawn, outcome


def _top_cells(cells: Ints, exact: Floats, top: int) -> set[int]:
    size = np.nan_to_num(np.abs(exact), nan=-1.0)
    return set(cells[np.argsort(-size, kind="stable")[:top]].tolist())


def estimate_risk(
    estimates: Floats, exact: Floats, others: Floats, top: int, start: Floats | None
) -> tuple[Floats | None, float]:
    """Estimate the probability that a cell that wasn't run has one of the largest effects.

    Args:
        estimates: Of the cells that were run.
        exact: Their effects, NaN where there is none.
        others: Estimates of the other cells.
        top: Number of largest effects.
        start: Parameters of an earlier fit.

    Returns:
        The parameters a, b, ln c, ln d and ln degrees of freedom, of effects and estimates in units
        of their root mean squares; and the probability, 1 without a fit.
    """
    from scipy.optimize import minimize
    from scipy.special import stdtr

    known = np.isfinite(exact)
    e, x = estimates[known], exact[known]
    units = float(np.sqrt((e**2).mean())), float(np.sqrt((x**2).mean()))
    if len(x) < top + MIN_UNITS or min(units) == 0:
        return None, 1.0
    e, x, others = e / units[0], x / units[1], others / units[0]
    if start is None:
        slope = float(e @ x / (e @ e))
        spread = float(np.median(np.abs(x - slope * e)))
        start = np.array([0.0, slope, math.log(spread + 1e-9), -1.5, math.log(8.0)])
    bounds = [(None, None), (None, None), (-25.0, 5.0), (-8.0, 3.0), (0.0, math.log(50.0))]
    fitted = minimize(_misfit, start, args=(e, x), method="L-BFGS-B", bounds=bounds)
    offset, slope, inner, outer, freedom = fitted.x
    scale = np.sqrt(np.exp(2 * inner) + np.exp(2 * outer) * others**2)
    least, middle = float(np.sort(np.abs(x))[-top]), offset + slope * others
    tails = [stdtr(math.exp(freedom), -(least + way * middle) / scale) for way in (-1, 1)]
    within = np.log1p(-np.minimum(np.sum(tails, axis=0), 1 - 1e-12)).sum()
    risk = 1 - math.exp(float(within))
    return fitted.x, risk if math.isfinite(risk) and np.isfinite(fitted.fun) else 1.0


def _misfit(parameters: Floats, estimates: Floats, exact: Floats) -> float:
    """Return the negative log-likelihood of effects."""
    from scipy.special import gammaln

    offset, slope, inner, outer, freedom = parameters
    v = math.exp(freedom)
    squared = np.exp(2 * inner) + np.exp(2 * outer) * estimates**2
    residual = (exact - offset - slope * estimates) ** 2 / squared
    constant = gammaln((v + 1) / 2) - gammaln(v / 2) - 0.5 * math.log(v * math.pi)
    body = 0.5 * np.log(squared) + (v + 1) / 2 * np.log1p(residual / v)
    return float(body.sum() - len(exact) * constant)


MIN_CORRELATED = 3
"""Minimum number of cells for a correlation."""


def agreement(
    estimates: Floats, exact: Floats, chosen: Bools, confidence: float | None
) -> Agreement:
    """Return the correlations over the chosen cells that have an exact effect; NaN over fewer than
    three, because those of two cells are 1 or −1 whatever their effects.

    Args:
        confidence: Of the intervals, in percent; None if the cells aren't a random sample of
            others, so that there is none.
    """
    mask = chosen & np.isfinite(exact)
    pair = estimates[mask], exact[mask]
    correlation_estimates = (_correlation(of, *pair, confidence) for of in (pearson, spearman))
    return Agreement(int(mask.sum()), *correlation_estimates)


def _correlation(
    of: Callable[[Floats, Floats], Floats], one: Floats, two: Floats, confidence: float | None
) -> CorrelationEstimate:
    count = len(one)
    value = float(of(one[None], two[None])[0]) if count >= MIN_CORRELATED else math.nan
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
