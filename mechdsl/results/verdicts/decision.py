"""Decisions on expectations, with intervals from the resamples of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.base.text import count_noun
from mechdsl.checks.conditions import (
    Absolute,
    Arithmetic,
    BandCondition,
    BestCellCondition,
    Comparison,
    Condition,
    ConditionValue,
    KnownMeasure,
    KnownNames,
    LogicalCondition,
    Negation,
    TopCellsCondition,
)
from mechdsl.checks.expectations import read_expectation
from mechdsl.program import spec
from mechdsl.program.lowering import expectation_experiments
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult, finite_number
from mechdsl.results.statistics_conventions import rank_by_size, selection_text, sign_ranking_note
from mechdsl.results.verdicts.estimates import Estimate, NoNumber, NotComputed, combine_estimates
from mechdsl.results.verdicts.values import (
    CellSelector,
    ComparisonSample,
    SelectedCells,
    ValueReader,
    compare_sizes,
    compare_with_each_rival,
    compare_with_rival,
    count_intervals,
    has_base_run_bounds,
    rounding_bounds,
    select_value_cells,
)


def known_results(
    expectation: spec.Expectation,
    result: ExperimentResult,
    others: Mapping[str, ExperimentResult],
    lost: Collection[str] = (),
) -> KnownNames:
    """Return the names that an expectation of `result` may refer to.

    Args:
        others: Finished experiments of the file by name.
        lost: Experiments that could not be computed.
    """
    names = [name for name in (*others, *lost) if name != result.name]
    return replace(
        _known_names(result),
        experiments=names,
        others={name: _known_names(others[name]) for name in names if name in others},
        groups={group.name: group.sites for group in expectation.groups},
        columns=result.row_values,
    )


def _known_names(result: ExperimentResult) -> KnownNames:
    return KnownNames(
        measures=[KnownMeasure(m.label, m.effect, m.kind, m.word) for m in result.measures],
        axes=result.axes,
        aliases=result.aliases,
        runs=list(result.accuracy),
        cells=result.cells,
        name=result.name,
    )


NEGATED_OPERATORS: Mapping[str, Literal["<", "<=", ">", ">=", "=", "!="]] = {
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
    effective_n: int | None = None
    computed: bool = True
    undecided: bool = False
    """Whether it doesn't hold because the number has no interval."""


def decide_all_expectations(
    expectations: Sequence[spec.Expectation],
    result: ExperimentResult,
    others: Mapping[str, ExperimentResult] | None = None,
    lost: Collection[str] = (),
) -> list[ExpectOutcome]:
    """Decide all expectations of a finished experiment, each at the full level or, with Holm's
    correction (1979), all together at the level of one. Decisions on the mean alone have no level.

    Args:
        others: Finished experiments by name, which correlations may read.
        lost: Experiments that could not be computed.
    """
    confidence = result.settings.confidence if result.settings else 95.0
    outcomes = [
        decide_expectation(expectation, result, others, lost, confidence)
        for expectation in expectations
    ]
    left = [number for number, expectation in enumerate(expectations) if not expectation.on_mean]
    if result.settings is None or result.settings.verdicts == "none" or len(left) < 2:
        return outcomes
    words = f"by Holm's correction of {count_noun(len(left), 'verdict')}"
    while left:
        own = 100 - (100 - confidence) / len(left)
        for number in left:
            outcome = decide_expectation(expectations[number], result, others, lost, own)
            said = f"at {own:.6g} %, {words}"
            outcomes[number] = replace(outcome, reason=_join_reasons(outcome.reason, said))
        still = [number for number in left if not outcomes[number].holds]
        if len(still) == len(left):
            break
        left = still
    return outcomes


def decide_expectation(
    expectation: spec.Expectation,
    result: ExperimentResult,
    others: Mapping[str, ExperimentResult] | None,
    lost: Collection[str],
    confidence: float,
) -> ExpectOutcome:
    """Decide one expectation, with intervals of the given confidence in percent."""
    known = known_results(expectation, result, others or {}, lost)
    condition, diagnostics = read_expectation(expectation, known)
    line = expectation.span.line
    if condition is None:
        reason = diagnostics[0].message
        named = expectation_experiments(expectation, [data.label for data in result.measures])
        verdict = Verdict(False, reason=reason, computed=named.isdisjoint(lost))
        return ExpectOutcome(expectation.text, line=line, **vars(verdict))
    judge = _Judge(result, CellSelector(result, others or {}), expectation.on_mean, confidence)
    verdict = (
        judge.top(condition) if isinstance(condition, TopCellsCondition) else judge.judge(condition)
    )
    if result.selected:
        verdict = replace(verdict, reason=_join_reasons(verdict.reason, selection_text(result)))
    return ExpectOutcome(expectation.text, line=line, **vars(verdict))


def _join_reasons(first: str | None, second: str) -> str:
    return second if first is None else f"{first}; {second}"


@dataclass(frozen=True)
class _Judge:
    result: ExperimentResult
    cells: CellSelector
    on_mean: bool
    confidence: float

    # --- conditions

    def judge(self, condition: Condition) -> Verdict:
        try:
            match condition:
                case Comparison():
                    return self.compare(condition)
                case BandCondition():
                    return self.between(condition, inside=True)
                case BestCellCondition():
                    return self.best(condition)
                case LogicalCondition(operator="and"):
                    left = self.judge(condition.left)
                    return self.judge(condition.right) if left.holds else left
                case LogicalCondition():
                    return self.any_of(_alternatives(condition))
                case Negation():
                    return self.negated(condition.operand)
        except NoNumber as none:
            return Verdict(False, reason=str(none), computed=not isinstance(none, NotComputed))

    def any_of(self, conditions: Sequence[Condition]) -> Verdict:
        """Return the first condition that holds, each at a share of the level (Bonferroni), or the
        last one. Several chances at the full level would inflate the error."""
        part = replace(self, confidence=100 - (100 - self.confidence) / len(conditions))
        verdicts = [part.judge(condition) for condition in conditions]
        verdict = next((each for each in verdicts if each.holds), verdicts[-1])
        said = f"each of {len(conditions)} alternatives at {part.confidence:.6g} %"
        return replace(
            verdict,
            computed=verdict.holds or all(each.computed for each in verdicts),
            reason=verdict.reason if self.on_mean else _join_reasons(verdict.reason, said),
        )

    def negated(self, condition: Condition) -> Verdict:
        """Negate a condition by moving `not` inwards, so that the inner condition must fail on the
        whole interval."""
        match condition:
            case Comparison():
                return self.judge(
                    replace(condition, operator=NEGATED_OPERATORS[condition.operator])
                )
            case BandCondition():
                return self.between(condition, inside=False)
            case BestCellCondition():
                return self.judge(replace(condition, equal=not condition.equal))
            case LogicalCondition():
                swapped: Literal["and", "or"] = "or" if condition.operator == "and" else "and"
                left, right = Negation(condition.left), Negation(condition.right)
                return self.judge(LogicalCondition(swapped, left, right))
            case Negation():
                return self.judge(condition.operand)

    def compare(self, condition: Comparison) -> Verdict:
        reader, sides = self.read(condition.left, condition.right)
        left, right = sides
        if left.smooth is None or right.smooth is None:
            left, right = (reader.ended(side, self.level(condition)) for side in sides)
        difference = reader.ended(combine_estimates("-", left, right), self.confidence)
        shown, reason = difference, None
        if right.fixed:
            shown = left
        elif left.fixed:
            shown = right
        else:
            reason = "the value is the left side minus the right side"
        if _is_folded(condition.left) or _is_folded(condition.right):
            said = self.two_tests()
            reason = reason if said is None else _join_reasons(reason, said)

        unlike = reader.space.not_paired
        if unlike is not None:
            reason = _join_reasons(reason, unlike)

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

        verdict = self.verdict(reader.ended(shown, self.confidence), difference, holds, reason)
        return replace(verdict, effective_n=reader.effective_n)

    def between(self, condition: BandCondition, inside: bool) -> Verdict:
        reader, (value,) = self.read(condition.value)
        value = reader.ended(value, self.confidence)
        # The bounds are sums of decimal numbers, so allow a rounding error.
        slack = 1e-12 * max(1.0, abs(condition.low), abs(condition.high))

        def holds(low: float, high: float) -> bool:
            if inside:
                return low >= condition.low - slack and high <= condition.high + slack
            return high < condition.low - slack or low > condition.high + slack

        said = [each for each in (self.two_tests(), reader.space.not_paired) if each]
        verdict = self.verdict(value, value, holds, "; ".join(said) or None)
        return replace(verdict, effective_n=reader.effective_n)

    def read(self, *values: ConditionValue) -> tuple[ValueReader, list[Estimate]]:
        """Read values over the same units. An interval composed of several intervals has each at a
        level such that all hold together (Bonferroni)."""
        reader = ValueReader(self.cells, values)
        return reader, [reader.estimate(value, self.share(values)) for value in values]

    def share(self, values: tuple[ConditionValue, ...]) -> float:
        return 100 - (100 - self.confidence) / max(1, sum(map(count_intervals, values)))

    def level(self, condition: Comparison) -> float:
        return self.share((condition.left, condition.right))

    def two_tests(self) -> str | None:
        """Return the description of a two-sided test (Schuirmann 1987), if it is one."""
        if self.on_mean:
            return None
        return f"two one-sided tests, each at {(100 - self.confidence) / 2:g} %"

    def verdict(
        self,
        shown: Estimate,
        decides: Estimate,
        holds: Callable[[float, float], bool],
        reason: str | None,
    ) -> Verdict:
        """Decide an estimate; `shown` and `decides` include the ends of their intervals."""
        point, moved = decides.point, decides.rounding
        low, high = (point, point) if self.on_mean else (decides.low, decides.high)
        if not math.isfinite(point):
            return Verdict(False, reason=shown.why or decides.why or "there is no such number")
        ends = (math.nan, math.nan) if shown.fixed else (shown.low, shown.high)
        numbers = (finite_number(shown.point), finite_number(ends[0]), finite_number(ends[1]))
        if math.isnan(low) or math.isnan(high):
            why = shown.why or decides.why or "no interval"
            reason = f"{why}; `on mean` would test the mean alone"
            return Verdict(False, *numbers, reason, undecided=True)
        good = holds(low, high)
        if not good and holds(point, point):
            on = "it holds for the mean, but not for the whole interval"
            reason = on if reason is None else f"{on}; {reason}"
        elif shown.why and None in numbers:
            reason = shown.why
        if moved and any(holds(low + by, high + by) != good for by in (-moved, moved)):
            by = f"it can change the value by {moved:.1e}"
            by += ", in the base run" if decides.as_in_base else ""
            reason = _join_reasons(reason, f"rounding alone may decide it: {by}")
        return Verdict(good, *numbers, reason)

    # --- which cell leads

    def best(self, condition: BestCellCondition) -> Verdict:
        of = self.ranked(
            condition.measure, select_value_cells(self.result, condition.measure, condition.where)
        )
        sign = 1.0 if condition.how == "argmax" else -1.0
        means = sign * self.result.statistics[condition.measure].mean[of.cells]
        winner = int(of.cells[int(means.argmax())])
        name = self.result.cells[winner].name
        mine = np.array([condition.names(self.result.cells[i]) for i in of.cells], bool)
        here = condition.names(self.result.cells[winner])
        said: list[str] = []
        good: bool | None = here == condition.equal
        if good and not self.on_mean and not mine.all() and mine.any():
            space = ComparisonSample(self.result, [of])
            if space.too_few:
                said.append(f"{space.too_few}; `on mean` would test the mean alone")
                good = None
            elif condition.equal:
                good = self.leads(space, of, winner, mine, sign, said)
            else:
                good = self.overtaken(space, of, winner, mine, sign, said)
        for other in self.as_large(of, winner, of.cells, size=False):
            if condition.names(self.result.cells[other]) != here:
                said.append(self.too_close(condition.measure, other))
                break
        reason = "; ".join(said) or None
        return Verdict(bool(good), name, reason=reason, undecided=good is None)

    def leads(
        self,
        space: ComparisonSample,
        of: SelectedCells,
        winner: int,
        mine: np.ndarray,
        sign: float,
        said: list[str],
    ) -> bool | None:
        """Return whether the winner, one of the named cells, exceeds every other cell; None if the
        difference has no interval."""
        # The winner was selected among the named cells.
        confidence = 100 - (100 - self.confidence) / int(mine.sum())
        next_ = compare_with_each_rival(space, of, winner, of.cells[~mine], sign, confidence)
        name = self.result.cells[next_.cell].name
        if math.isnan(next_.low):
            said.append(self.no_difference(space, name, confidence, f" of {next_.value:.3g}"))
            return None
        apart = f"{next_.value:.3g} [{next_.low:.3g}, {next_.high:.3g}]"
        good = next_.low > 0
        word = "ahead of" if good else "by the mean, but can't be distinguished from"
        said.append(f"{word} {name}: {apart}")
        return good

    def overtaken(
        self,
        space: ComparisonSample,
        of: SelectedCells,
        winner: int,
        mine: np.ndarray,
        sign: float,
        said: list[str],
    ) -> bool | None:
        """Return whether one cell exceeds all named cells; None if a difference has no interval."""
        others = of.cells[~mine]
        place = int(np.flatnonzero(others == winner)[0])
        for rival in of.cells[mine].tolist():
            simultaneous_bounds = compare_with_rival(
                space, of, others, rival, sign, self.confidence
            )
            low, name = simultaneous_bounds.low_together[place], self.result.cells[rival].name
            if math.isnan(low):
                said.append(self.no_difference(space, name, self.confidence))
                return None
            if not low > 0:
                said.append(f"by the mean, but can't be distinguished from {name}")
                return False
        return True

    def no_difference(
        self, space: ComparisonSample, name: str, confidence: float, amount: str = ""
    ) -> str:
        """Return why a cell's difference from the cell `name` has no interval."""
        gap = space.gap(space.held, confidence)
        return f"by the mean, but the difference{amount} from {name} has no interval ({gap})"

    def top(self, condition: TopCellsCondition) -> Verdict:
        missing = self.result.measures[condition.measure].missing
        if missing is not None:
            reason = f"not computed ({missing.code}): {missing.reason}"
            return Verdict(False, reason=reason, computed=False)
        of = SelectedCells(
            self.result, condition.measure, select_value_cells(self.result, condition.measure, ())
        )
        ranked = rank_by_size(self.result, condition.measure, len(of.cells))
        worst, said, unsure = 0, list[str](), list[int]()
        doubts: list[str] = []
        space = ComparisonSample(self.result, [of])
        for site in condition.sites:
            ranks = [
                i + 1 for i, cell in enumerate(ranked) if site.matches(self.result.cells[cell])
            ]
            if not ranks:
                said.append(f"no cell matches {site.text}")
                continue
            worst = max(worst, ranks[0])
            neighbour = ranked[condition.top - (ranks[0] > condition.top) :][:1]
            own = int(ranked[ranks[0] - 1])
            unsure += self.as_large(of, own, np.array(neighbour, dtype=np.int64))
            if ranks[0] > condition.top:
                said.append(f"{site.text} has rank {ranks[0]}")
            elif len(of.cells) > condition.top and not self.on_mean:
                doubts += self.among(space, of, own, condition.top, site.text)
        if said:
            first = [self.result.cells[cell].name for cell in ranked[: condition.top]]
            said.append(f"top {condition.top}: {', '.join(first)}")
        said += doubts
        good = not said
        said += [self.too_close(condition.measure, other) for other in unsure[:1]]
        other = sign_ranking_note(self.result, condition.measure, condition.top)
        reason = "; ".join([*said, *([other] if other else [])]) or None
        return Verdict(good, float(worst) if worst else None, reason=reason)

    def among(
        self, space: ComparisonSample, of: SelectedCells, own: int, top: int, name: str
    ) -> list[str]:
        """Return why a cell among the first may not be one of them."""
        if space.too_few:
            return [f"{space.too_few}; `on mean` would test the mean alone"]
        low = compare_sizes(space, of, own, self.confidence)
        larger = int(np.count_nonzero(~(low > 0)))
        if larger < top:
            return []
        if np.isnan(low).any():
            gap = space.gap(space.held, self.confidence)
            text = f"{name} is in the top {top} by its mean, but differences from"
            return [f"{text} other cells have no interval ({gap})"]
        others = count_noun(larger, "other cell")
        return [f"{name} is in the top {top} by its mean, but {others} may be at least as large"]

    # --- cells

    def ranked(self, measure: int, cells: Ints) -> SelectedCells:
        """Return the cells of which one may be the largest; NoNumber if there are none."""
        if len(cells):
            return SelectedCells(self.result, measure, cells)
        missing = self.result.measures[measure].missing
        if missing is not None:
            raise NotComputed(f"not computed ({missing.code}): {missing.reason}")
        raise NoNumber("no cell has a value")

    def as_large(
        self, of: SelectedCells, cell: int, others: Ints, *, size: bool = True
    ) -> list[int]:
        """Return other cells whose effect, or its size, may be equal up to rounding."""
        means = self.result.statistics[of.measure].mean
        sizes = np.abs(means) if size else means
        selected_cells = replace(of, cells=np.array([cell]))
        moved = rounding_bounds(replace(of, cells=others)) + rounding_bounds(selected_cells)
        close = (np.abs(sizes[others] - sizes[cell]) <= moved) & (moved > 0) & (others != cell)
        return others[close].tolist()

    def too_close(self, measure: int, cell: int) -> str:
        name = self.result.cells[cell].name
        said = (
            f"rounding alone may decide it: the difference from {name} is no larger than rounding"
        )
        return f"{said}, in the base run" if has_base_run_bounds(self.result, measure) else said


def _alternatives(condition: Condition) -> list[Condition]:
    """Return the alternatives of `a or b or c`."""
    match condition:
        case LogicalCondition(operator="or", left=left, right=right):
            return [*_alternatives(left), *_alternatives(right)]
        case Negation(operand=LogicalCondition(operator="and", left=left, right=right)):
            return [*_alternatives(Negation(left)), *_alternatives(Negation(right))]
        case Negation(operand=Negation(operand=inner)):
            return _alternatives(inner)
        case _:
            return [condition]


def _is_folded(value: ConditionValue) -> bool:
    """Whether an absolute value is compared."""
    if isinstance(value, Arithmetic):
        return _is_folded(value.left) or _is_folded(value.right)
    return isinstance(value, Absolute)
