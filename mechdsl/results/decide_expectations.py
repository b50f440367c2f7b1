"""Deciding expectations on the results, with intervals from the same draws as the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.program import spec
from mechdsl.results.estimates import Estimate, combined, pearson, spearman
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.results.known_results import known_results
from mechdsl.results.matched_cells import draws_of, matched
from mechdsl.results.ranking import by_sign_instead, first_by_size
from mechdsl.statistics.bootstrap import Parts, Resampling, blocks, parts
from mechdsl.validate.conditions import (
    Absolute,
    Accuracy,
    Area,
    Arithmetic,
    BestIs,
    Both,
    CellSelection,
    Comparison,
    Condition,
    Constant,
    Correlation,
    InBand,
    Negation,
    OfCells,
    Ranking,
    TopContains,
    Value,
)
from mechdsl.validate.expectations import read_expectation
from mechdsl.vocab.effects import EFFECTS

OPPOSITE: Mapping[str, Literal["<", "<=", ">", ">=", "=", "!="]] = {
    "<": ">=",
    "<=": ">",
    ">": "<=",
    ">=": "<",
    "=": "!=",
    "!=": "=",
}


@dataclass(frozen=True)
class Verdict:
    holds: bool
    value: float | str | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def evaluate(
    expectation: spec.Expectation,
    result: ExperimentResult,
    others: Mapping[str, ExperimentResult] | None = None,
    lost: Collection[str] = (),
) -> ExpectOutcome:
    """The verdict on one expectation of a finished experiment.

    `others` are finished experiments by name, which correlations may read; `lost` those that could
    not be computed.
    """
    known = known_results(expectation, result, others or {}, lost)
    condition, diagnostics = read_expectation(expectation, known)
    if condition is None:
        reason = diagnostics[0].message
        return ExpectOutcome(expectation.text, False, None, None, None, reason)
    judge = _Judge(result, others or {}, expectation.on_mean)
    top = isinstance(condition, TopContains)
    verdict = judge.top(condition) if top else judge.judge(condition)
    return ExpectOutcome(
        expectation.text,
        verdict.holds,
        verdict.value,
        verdict.low,
        verdict.high,
        verdict.reason,
    )


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first}; {second}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class _Judge:
    def __init__(
        self, result: ExperimentResult, others: Mapping[str, ExperimentResult], on_mean: bool
    ) -> None:
        self.result = result
        self.others = others
        self.on_mean = on_mean

    # --- conditions

    def judge(self, condition: Condition) -> Verdict:
        match condition:
            case Comparison():
                return self.compare(condition)
            case InBand():
                return self.between(condition, inside=True)
            case BestIs():
                return self.best(condition)
            case Both():
                left, right = self.judge(condition.left), self.judge(condition.right)
                if condition.operator == "and":
                    return right if left.holds else left
                return left if left.holds else right
            case Negation():
                return self.negated(condition.operand)

    def negated(self, condition: Condition) -> Verdict:
        """`not` moves inwards, so that what it denies must fail on the whole interval."""
        match condition:
            case Comparison():
                return self.judge(replace(condition, operator=OPPOSITE[condition.operator]))
            case InBand():
                return self.between(condition, inside=False)
            case BestIs():
                return self.judge(replace(condition, equal=not condition.equal))
            case Both():
                swapped: Literal["and", "or"] = "or" if condition.operator == "and" else "and"
                left, right = Negation(condition.left), Negation(condition.right)
                return self.judge(Both(swapped, left, right))
            case Negation():
                return self.judge(condition.operand)

    def compare(self, condition: Comparison) -> Verdict:
        left, right = self.value(condition.left), self.value(condition.right)
        difference = combined("-", left, right)
        shown, reason = difference, None
        if right.samples is None:
            shown = left
        elif left.samples is None:
            shown = right
        else:
            reason = "the value is the left side less the right side"
        low, high = self.ends(difference)

        def holds(low: float, high: float) -> bool:
            match condition.operator:
                case ">":
                    return low > 0
                case ">=":
                    return low >= 0
                case "<":
                    return high < 0
                case "<=":
                    return high <= 0
                case "=":
                    return abs(low) <= 1e-9 and abs(high) <= 1e-9
                case "!=":
                    return low > 1e-9 or high < -1e-9

        return self.verdict(shown, difference, low, high, holds, reason)

    def between(self, condition: InBand, inside: bool) -> Verdict:
        value = self.value(condition.value)
        low, high = self.ends(value)
        # the bounds are sums of decimal numbers, so they give way by a rounding error
        slack = 1e-12 * max(1.0, abs(condition.low), abs(condition.high))

        def holds(low: float, high: float) -> bool:
            if inside:
                return low >= condition.low - slack and high <= condition.high + slack
            return high < condition.low - slack or low > condition.high + slack

        return self.verdict(value, value, low, high, holds, None)

    def ends(self, value: Estimate) -> tuple[float, float]:
        """What a condition is tested on: the interval, or the mean alone with `on mean`."""
        if self.on_mean or value.samples is None:
            return value.point, value.point
        low, high = self.result.resampling.interval(value.samples)
        return float(low), float(high)

    def verdict(
        self,
        shown: Estimate,
        decides: Estimate,
        low: float,
        high: float,
        holds: Callable[[float, float], bool],
        reason: str | None,
    ) -> Verdict:
        point, moved = decides.point, decides.rounding
        if shown.samples is None:
            shown_low, shown_high = math.nan, math.nan
        else:
            shown_low, shown_high = (
                float(end) for end in self.result.resampling.interval(shown.samples)
            )
        if not math.isfinite(point):
            return Verdict(False, reason=shown.why or "there is no such number")
        numbers = (_finite(shown.point), _finite(shown_low), _finite(shown_high))
        if math.isnan(low) or math.isnan(high):
            why = f"{shown.why or 'no interval'}; `on mean` would decide it on the mean alone"
            return Verdict(False, *numbers, why)
        good = holds(low, high)
        if not good and holds(point, point):
            reason = "it holds on the mean, but not on the interval's near end"
        elif shown.why and None in numbers:
            reason = shown.why
        if moved and any(holds(low + by, high + by) != good for by in (-moved, moved)):
            by = f"it moves this by {moved:.1e}"
            by += ", in the base run" if decides.as_in_base else ""
            reason = _joined(reason, f"rounding alone may decide it: {by}")
        return Verdict(good, *numbers, reason)

    def best(self, condition: BestIs) -> Verdict:
        cells = self.chosen(condition.measure, condition.where)
        if not len(cells):
            missing = self.result.measures[condition.measure].missing
            why = f"not computed ({missing.code}): {missing.reason}" if missing else None
            return Verdict(False, reason=why or "no cell has a value")
        sign = 1.0 if condition.how == "argmax" else -1.0
        means = sign * self.result.statistics[condition.measure].mean[cells]
        winner = int(cells[int(means.argmax())])
        cell = self.result.cells[winner]
        # the share of resamples in which the same kind of cell wins is said, not tested
        leader = np.full(self.result.settings.resamples if self.result.settings else 0, -np.inf)
        index = np.zeros(len(leader), dtype=np.int64)
        for these, rows, values in self.sampled(condition.measure, cells):
            signed = np.where(np.isnan(values), -np.inf, sign * values)
            best = signed.max(1)
            better = best > leader[rows]
            index[rows] = np.where(better, cells[these][signed.argmax(1)], index[rows])
            leader[rows] = np.where(better, best, leader[rows])
        stable = float((index == winner).mean()) if len(index) else math.nan
        here = condition.site.matches(cell)
        reason = None if stable == 1 else f"the same cell in {stable:.0%} of the resamples"
        for other in self.as_large(condition.measure, winner, cells, size=False):
            if condition.site.matches(self.result.cells[other]) != here:
                reason = _joined(reason, self.too_close(condition.measure, other))
                break
        return Verdict(here == condition.equal, cell.name, reason=reason)

    def top(self, condition: TopContains) -> Verdict:
        missing = self.result.measures[condition.measure].missing
        if missing is not None:
            return Verdict(False, reason=f"not computed ({missing.code}): {missing.reason}")
        cells = self.chosen(condition.measure, ())
        ranked = first_by_size(self.result, condition.measure, len(cells))
        worst, said, unsure = 0, list[str](), list[int]()
        for site in condition.sites:
            ranks = [
                i + 1 for i, cell in enumerate(ranked) if site.matches(self.result.cells[cell])
            ]
            if not ranks:
                said.append(f"no cell is at {site.text}")
                continue
            worst = max(worst, ranks[0])
            beside = ranked[condition.top - (ranks[0] > condition.top) :][:1]
            own = int(ranked[ranks[0] - 1])
            unsure += self.as_large(condition.measure, own, np.array(beside, dtype=np.int64))
            if ranks[0] > condition.top:
                said.append(f"{site.text} is number {ranks[0]}")
        if said:
            first = [self.result.cells[cell].name for cell in ranked[: condition.top]]
            said.append(f"top {condition.top}: {', '.join(first)}")
        good = not said
        said += [self.too_close(condition.measure, other) for other in unsure[:1]]
        other = by_sign_instead(self.result, condition.measure, condition.top)
        reason = "; ".join([*said, *([other] if other else [])]) or None
        return Verdict(good, float(worst) if worst else None, reason=reason)

    # --- values

    def value(self, value: Value) -> Estimate:
        match value:
            case Constant():
                return Estimate(value.value)
            case Arithmetic():
                return combined(value.operator, self.value(value.left), self.value(value.right))
            case Absolute():
                inner = self.value(value.operand)
                samples = None if inner.samples is None else np.abs(inner.samples)
                return replace(inner, point=abs(inner.point), samples=samples)
            case Accuracy():
                return self.accuracy(value.run)
            case Correlation():
                return self.correlation(value)
            case Area():
                return self.area(value)
            case Ranking():
                raise NotImplementedError
            case OfCells():
                return self.of_cells(value)

    def accuracy(self, run: str) -> Estimate:
        settings = self.result.settings
        assert settings is not None
        ids = self.result.accuracy_rows.get(run, self.result.row_ids)
        rows = self.result.accuracy[run]
        resampling = Resampling(len(rows), settings, self.result.seed, ids=ids)
        rows = rows[resampling.order]
        known = ~np.isnan(rows)
        filled = np.where(known, rows, 0.0)
        if not known.any():
            return Estimate(math.nan, why="no prompt has an answer")
        with np.errstate(invalid="ignore"):
            samples = np.concatenate(
                [(w @ filled) / (w @ known.astype(np.float64)) for w in resampling.weights()]
            )
        point = float(filled[known].sum() / known.sum())
        return Estimate(point, samples, rounding=self.result.accuracy_bound(run))

    def estimate(
        self, point: float, samples: Floats, present: Any, rounding: float = 0.0
    ) -> Estimate:
        """Without an interval where only one prompt or group stands behind the number."""
        resampling = self.result.resampling
        if resampling.units_of(present.any(0)[None])[0] < 2:
            unit = "group" if resampling.grouped else "prompt"
            why = f"one {unit}: no interval"
            return Estimate(point, np.full_like(samples, np.nan), why, rounding)
        return Estimate(point, samples, rounding=rounding)

    def of_cells(self, value: OfCells) -> Estimate:
        if value.experiment is not None:
            raise NotImplementedError
        cells = self.chosen(value.measure, value.where)
        if not len(cells):
            found = [i for i in range(len(self.result.cells)) if self.at(i, value.where)]
            reasons = self.result.statistics[value.measure].reasons
            return Estimate(math.nan, why=reasons[found[0]] if found else "no such cell")
        if value.how in ("cell", "only") and len(cells) > 1:
            return Estimate(math.nan, why=f"{len(cells)} cells are meant, not one")
        means = self.result.statistics[value.measure].mean[cells]
        resamples = self.result.resampling.resamples
        total, count = np.zeros(resamples), np.zeros(resamples)
        greatest, least = np.full(resamples, -np.inf), np.full(resamples, np.inf)
        present = np.zeros((1, self.result.prompts), dtype=bool)
        for these, rows, values in self.sampled(value.measure, cells):
            known = ~np.isnan(values)
            total[rows] += np.where(known, values, 0.0).sum(1)
            count[rows] += known.sum(1)
            greatest[rows] = np.maximum(greatest[rows], np.where(known, values, -np.inf).max(1))
            least[rows] = np.minimum(least[rows], np.where(known, values, np.inf).min(1))
            if rows.start == 0:
                present |= self.parts(value.measure, cells[these]).present.any(0)
        with np.errstate(invalid="ignore"):
            samples = {"max": greatest, "min": least}.get(value.how, total / count)
        samples = np.where(count > 0, samples, np.nan)
        point = {"max": means.max(), "min": means.min()}.get(value.how, means.mean())
        bounds = self.bounds(value.measure, cells)
        bound = bounds.max() if value.how in ("max", "min") else bounds.mean()
        found = self.estimate(float(point), samples, present, float(bound))
        return replace(found, as_in_base=self.as_in_base(value.measure))

    def correlation(self, value: Correlation) -> Estimate:
        if value.experiment not in self.others:
            return Estimate(math.nan, why=f"`{value.experiment}` could not be computed")
        other = self.others[value.experiment]
        measure = self.result.measures[value.measure]
        same = [
            i
            for i, m in enumerate(other.measures)
            if m.kind == "number" and m.effect == measure.effect
        ]
        exact = [i for i in same if other.measures[i].label == measure.label]
        candidates = exact or same
        if len(candidates) != 1:
            why = f"`{other.name}` has {len(candidates)} measures `as {measure.effect}`, not one"
            return Estimate(math.nan, why=why)
        for data, of in ((measure, self.result), (other.measures[candidates[0]], other)):
            if data.missing is not None:
                why = f"`{data.effect} of {data.label}` of `{of.name}` could not be computed"
                return Estimate(math.nan, why=f"{why} ({data.missing.code})")
        mine, theirs = matched(self.result, value.measure, other, candidates[0])
        if len(mine) < 3:
            why = f"only {len(mine)} cells have the same coordinates in `{other.name}`"
            return Estimate(math.nan, why=why)
        here = self.parts(value.measure, mine)
        there_draws = draws_of(other, self.result)
        there = _parts(other, candidates[0], theirs, there_draws.order)
        correlate = spearman if value.how == "spearman" else pearson
        point = correlate(here.mean()[None], there.mean()[None])[0]
        columns = max(len(mine), self.result.prompts, other.prompts)  # so that blocks are equal
        pairs = zip(
            self.result.resampling.weights(columns),
            there_draws.weights(columns),
            strict=True,
        )
        found = [correlate(here.weighted(a), there.weighted(b)) for a, b in pairs]
        why = None if math.isfinite(point) else "the effects don't differ between cells"
        estimate = self.estimate(float(point), np.concatenate(found), here.present)
        return replace(estimate, why=why or estimate.why)

    def area(self, value: Area) -> Estimate:
        """Trapezoids, divided by the range of the axis."""
        cells = [i for i in range(len(self.result.cells)) if self.at(i, value.where)]
        chosen = self.chosen(value.measure, value.where)
        lacking = [i for i in cells if i not in chosen]
        if lacking:
            reason = self.result.statistics[value.measure].reasons[lacking[0]]
            name = self.result.cells[lacking[0]].name
            return Estimate(math.nan, why=f"the curve has no value at {name}: {reason}")
        at = np.array([float(self.result.cells[i].coords[value.axis]) for i in chosen])
        order = np.argsort(at, kind="stable")
        chosen, at = chosen[order], at[order]
        if len(np.unique(at)) < max(2, len(at)):
            return Estimate(math.nan, why=f"the cells are not one curve over `{value.axis}`")
        # Each point counts with half the way to either neighbour.
        share = np.zeros(len(at))
        share[1:] += np.diff(at) / 2
        share[:-1] += np.diff(at) / 2
        share /= at[-1] - at[0]
        means = self.result.statistics[value.measure].mean[chosen]
        samples = np.zeros(self.result.resampling.resamples)
        present = np.zeros((1, self.result.prompts), dtype=bool)
        for these, rows, values in self.sampled(value.measure, chosen):
            samples[rows] += values @ share[these]
            if rows.start == 0:
                present |= self.parts(value.measure, chosen[these]).present.any(0)
        bound = float(self.bounds(value.measure, chosen) @ share)
        found = self.estimate(float(means @ share), samples, present, bound)
        return replace(found, as_in_base=self.as_in_base(value.measure))

    # --- cells and their draws

    def at(self, cell: int, where: Sequence[CellSelection]) -> bool:
        return all(each.matches(self.result.cells[cell]) for each in where)

    def chosen(self, measure: int, where: Sequence[CellSelection]) -> Ints:
        """The cells that are meant and have a value."""
        means = self.result.statistics[measure].mean
        found = [i for i in range(len(means)) if np.isfinite(means[i]) and self.at(i, where)]
        return np.array(found, dtype=np.int64)

    def bounds(self, measure: int, cells: Ints) -> Floats:
        """How far rounding alone may move these cells; 0 where that isn't known."""
        return np.nan_to_num(self.result.statistics[measure].rounding[cells])

    def as_large(self, measure: int, cell: int, others: Ints, *, size: bool = True) -> list[int]:
        """Those of other cells whose effect, or its size, may be the same but for rounding."""
        means = self.result.statistics[measure].mean
        sizes = np.abs(means) if size else means
        moved = self.bounds(measure, others) + self.bounds(measure, np.array([cell]))
        close = (np.abs(sizes[others] - sizes[cell]) <= moved) & (moved > 0) & (others != cell)
        return others[close].tolist()

    def too_close(self, measure: int, cell: int) -> str:
        name = self.result.cells[cell].name
        said = f"rounding alone may decide it: no more than that is between it and {name}"
        return f"{said}, in the base run" if self.as_in_base(measure) else said

    def as_in_base(self, measure: int) -> bool:
        """Whether rounding may do something else to cells than to the base run, which its bounds
        are of: `correct` and ranks change where two logits are close."""
        return self.result.measures[measure].unit in ("share", "rank")

    def parts(self, measure: int, cells: Ints) -> Parts:
        return _parts(self.result, measure, cells, self.result.resampling.order)

    def sampled(self, measure: int, cells: Ints) -> Any:
        """(block of cells, block of resamples, effects [resample, cell]), all of them."""
        for block in blocks(len(cells), self.result.prompts):
            rows = self.parts(measure, cells[block])
            done = 0
            for weights in self.result.resampling.weights(rows.present.shape[0]):
                here = slice(done, done + len(weights))
                done = here.stop
                yield block, here, rows.weighted(weights)


def _parts(result: ExperimentResult, measure: int, cells: Ints, order: Ints) -> Parts:
    data = result.measures[measure]
    return parts(data, EFFECTS[data.effect], cells, order)
