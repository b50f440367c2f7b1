"""The numbers that an expectation names, with what their intervals come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.names import name_list
from mechdsl.base.plural import plural
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.results.estimates import (
    Estimate,
    Fixed,
    Limits,
    NoNumber,
    NotComputed,
    OfSums,
    absolute,
    combined,
    constant,
    is_linear,
    is_one,
    own_limits,
    pearson,
    skewed_t_of_number,
    spearman,
    studentise_number,
)
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.matched_cells import matched
from mechdsl.results.rankings import ranking_of_cells, ranking_of_rows
from mechdsl.statistics.bootstrap import Simultaneous, simultaneous
from mechdsl.statistics.cell_inference import infer
from mechdsl.statistics.cell_statistics import share_limits
from mechdsl.statistics.correlations import true_correlation
from mechdsl.statistics.effect_parts import Sums, parts
from mechdsl.statistics.measure_data import NO_INTERVAL
from mechdsl.statistics.sampling import partitions
from mechdsl.statistics.units import Draws, Rows, Units, units_of
from mechdsl.validate.conditions import (
    Absolute,
    Accuracy,
    Area,
    Arithmetic,
    CellSelection,
    Constant,
    Correlation,
    OfCells,
    Ranking,
    Value,
)
from mechdsl.validate.reachable_p import FEWEST_UNITS
from mechdsl.vocab.effects import EFFECTS


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some cells of a measure of an experiment."""

    result: ExperimentResult
    measure: int
    cells: Ints


class Cells:
    """Finds the cells that an expectation names."""

    def __init__(self, result: ExperimentResult, others: Mapping[str, ExperimentResult]) -> None:
        self.result = result
        self.others = others

    def of(self, value: OfCells | Area | Ranking) -> Chosen:
        """The cells that are meant and have a value; NoNumber where there is none."""
        result = self.result
        if isinstance(value, OfCells) and value.experiment is not None:
            result = self.other(value.experiment)
        found = chosen(result, value.measure, value.where)
        if not len(found):
            cells = [i for i in range(len(result.cells)) if at(result, i, value.where)]
            reasons = result.statistics[value.measure].reasons
            missing = result.measures[value.measure].missing
            if missing is not None:
                raise NotComputed(f"not computed ({missing.code}): {missing.reason}")
            raise NoNumber((reasons[cells[0]] if cells else None) or "no such cell")
        if isinstance(value, OfCells) and value.how in ("cell", "only") and len(found) > 1:
            raise NoNumber(f"{len(found)} cells are meant, not one")
        return Chosen(result, value.measure, found)

    def other(self, name: str) -> ExperimentResult:
        if name not in self.others:
            raise NotComputed(f"`{name}` could not be computed")
        return self.others[name]

    def pair(self, value: Correlation) -> tuple[Chosen, Chosen]:
        """The cells that two experiments have in common, of measures of one effect."""
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
        mine, theirs = matched(self.result, value.measure, other, candidates[0])
        if len(mine) < 3:
            raise NoNumber(f"only {len(mine)} cells have the same coordinates in `{other.name}`")
        return (
            Chosen(self.result, value.measure, mine),
            Chosen(other, candidates[0], theirs),
        )

    def all_of(self, value: Value) -> Iterator[Chosen]:
        """Everything that a value reads."""
        match value:
            case Constant() | Accuracy():
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


def at(result: ExperimentResult, cell: int, where: Sequence[CellSelection]) -> bool:
    return all(each.matches(result.cells[cell]) for each in where)


def chosen(result: ExperimentResult, measure: int, where: Sequence[CellSelection]) -> Ints:
    """The cells that are meant and have a value."""
    means = result.statistics[measure].mean
    found = [i for i in range(len(means)) if np.isfinite(means[i]) and at(result, i, where)]
    return np.array(found, dtype=np.int64)


def bounds(of: Chosen) -> Floats:
    """[cell]: how far rounding alone may move them; 0 where that isn't known."""
    return np.nan_to_num(of.result.statistics[of.measure].rounding[of.cells])


def as_in_base(result: ExperimentResult, measure: int) -> bool:
    """Whether rounding may do something else to cells than to the base run, which its bounds are
    of: `correct` and ranks change where two logits are close."""
    return result.measures[measure].unit in ("share", "rank")


class Space:
    """The units of all that one comparison reads, and their draws: rows of equal content are one
    unit in all experiments, so that differences between experiments are paired."""

    def __init__(self, mine: ExperimentResult, read: Sequence[Chosen]) -> None:
        self.mine = mine
        self.read = read
        self.results = [mine]
        for each in read:
            if all(each.result is not known for known in self.results):
                self.results.append(each.result)

    @cached_property
    def units(self) -> Units:
        rows = [self._rows(result) for result in self.results]
        design = None if self.mine.groups is not None else self.mine.strata
        return units_of(rows, design)

    def _rows(self, result: ExperimentResult) -> Rows:
        seen = [
            own
            for each in self.read
            if each.result is result
            for cells, own in partitions(result.measures[each.measure])
            if own is not None and np.isin(cells, each.cells).any()
        ]
        own = result.sampling.rows(*seen)
        by = self.mine.settings.by if self.mine.settings else None
        if result is self.mine or by is None or by not in result.row_values:
            return own if result is self.mine else replace(own, groups=None)
        return replace(own, groups=np.array([str(value) for value in result.row_values[by]]))

    @cached_property
    def draws(self) -> Draws:
        whole = all(self._whole(each) for each in self.read)
        return self.mine.sampling.draws(self.units, whole=whole)

    def _whole(self, of: Chosen) -> bool:
        """Whether its cells have all units, or all of every stratum that they have any of."""
        if of.result is not self.mine:
            return bool((self.sums(of).held == self.units.count).all())
        data = of.result.measures[of.measure]
        present = parts(data, EFFECTS[data.effect], of.cells).present
        return bool(self.mine.sampling.whole(present).all())

    def sums(self, of: Chosen) -> Sums:
        data = of.result.measures[of.measure]
        found = parts(data, EFFECTS[data.effect], of.cells)
        return found.sums(self.units, self.place(of.result))

    def place(self, result: ExperimentResult) -> int:
        return next(i for i, known in enumerate(self.results) if known is result)

    @cached_property
    def held(self) -> int:
        """The fewest units that stand behind anything that is read."""
        counts = [self._held(each) for each in self.read]
        return min(counts, default=0)

    def _held(self, of: Chosen) -> int:
        data = of.result.measures[of.measure]
        present = parts(data, EFFECTS[data.effect], of.cells).present
        some = np.atleast_2d(present.any(axis=0))
        return int(self.units.held(some, self.place(of.result))[0])

    @property
    def not_paired(self) -> str | None:
        """What is said where experiments, or blocks of one, are set against each other that have
        other rows."""
        cells = [
            each.result.cells[n]
            for each in self.read
            if BLOCKS in each.result.axes
            for n in each.cells
        ]
        blocks = list(dict.fromkeys(str(cell.coords[BLOCKS]) for cell in cells))
        if len(blocks) > 1:
            return f"not paired: rows of {name_list(blocks)}"
        read = [
            result for result in self.results if any(each.result is result for each in self.read)
        ]
        found = [(each.name, set(self.units.codes[self.place(each)].tolist())) for each in read]
        (_, own), *others = found or [("", set[int]())]
        unit = "prompt" if self.mine.groups is None else self.mine.sampling.unit_word(self.units)
        words = [
            f"`{name}` has {len(own & theirs) or 'none'} of these {plural(len(own), unit)}"
            + f" and {len(theirs - own)} of its own" * bool(theirs - own)
            for name, theirs in others
            if theirs != own
        ]
        return f"not all paired: {'; '.join(words)}" if words else None

    @property
    def too_few(self) -> str | None:
        """Why there is no interval."""
        if self.held >= FEWEST_UNITS:
            return None
        words = plural(self.held, self.mine.sampling.unit_word(self.units))
        return f"{words}: no interval below {FEWEST_UNITS}"


class Reader:
    """Reads the values of one comparison, all in one space."""

    def __init__(self, cells: Cells, values: Sequence[Value]) -> None:
        self.cells = cells
        self.space = Space(cells.result, [read for value in values for read in cells.all_of(value)])
        self.runs = {run for value in values for run in runs_of(value)}
        self.confidence = cells.result.sampling.settings.confidence

    @cached_property
    def effective_n(self) -> int | None:
        """The fewest units behind anything that is read; None where nothing is."""
        counts = [self.cells.result.accuracy_of(run).n for run in self.runs]
        return min([*counts, *([self.space.held] if self.space.read else [])], default=None)

    def estimate(self, value: Value, confidence: float) -> Estimate:
        """confidence: of intervals of what isn't smooth."""
        match value:
            case Constant():
                return constant(value.value)
            case Arithmetic():
                left = self.estimate(value.left, confidence)
                right = self.estimate(value.right, confidence)
                if value.operator == "/" and not right.fixed:
                    divisor = self.ended(right, confidence)
                    if divisor.why is None and divisor.low <= 0 <= divisor.high:
                        ends = f"{divisor.point:.3g} [{divisor.low:.3g}, {divisor.high:.3g}]"
                        known = divisor.low == divisor.high
                        zero = "0" if known else f"what can't be told from 0: {ends}"
                        raise NoNumber(f"it divides by {zero}")
                if left.smooth is None or right.smooth is None:
                    left, right = self.ended(left, confidence), self.ended(right, confidence)
                return combined(value.operator, left, right)
            case Absolute():
                inner = self.ended(self.estimate(value.operand, confidence), confidence)
                return absolute(inner, inner.low, inner.high)
            case Accuracy():
                return self.accuracy(value.run, confidence)
            case Correlation():
                return self.correlation(value, confidence)
            case Area():
                return self.area(value)
            case Ranking():
                return self.ranking(value, confidence)
            case OfCells():
                return self.of_cells(value, confidence)

    def ended(self, estimate: Estimate, confidence: float) -> Estimate:
        """With the ends of its interval."""
        if estimate.smooth is None or isinstance(estimate.smooth, Fixed):
            return estimate
        ends, few = own_limits(estimate.smooth, confidence), self.space.too_few
        known = ends is not None and not any(map(math.isnan, ends))
        if ends is not None and known and is_one(estimate.smooth):
            return replace(estimate, low=ends[0], high=ends[1])
        if few is not None:
            return replace(estimate, why=estimate.why or few)
        draws, held = self.space.draws, self.space.held
        found = studentise_number(estimate.smooth, draws, held)
        if ends is not None and known and found.error[0] == 0:
            return replace(estimate, low=ends[0], high=ends[1])
        low, high = found.interval(confidence)
        by_t = self.cells.result.sampling.settings.test == "t"
        if by_t and is_linear(estimate.smooth):
            corrected = skewed_t_of_number(estimate.smooth, draws, held)
            low, high = corrected.interval(confidence, FEWEST_UNITS)
        return replace(estimate, low=float(low[0]), high=float(high[0]))

    def of_cells(self, value: OfCells, confidence: float) -> Estimate:
        of = self.cells.of(value)
        sums, rounding = self.space.sums(of), bounds(of)
        means = of.result.statistics[of.measure].mean[of.cells]
        spread = of.result.measures[of.measure].spread
        if spread != "rows":
            over = {"max": np.max, "min": np.min}.get(value.how, np.mean)
            point = float(over(means))
            return constant(point) if spread == "none" else Estimate(point, why=NO_INTERVAL[spread])
        about = Estimate(math.nan, as_in_base=as_in_base(of.result, of.measure))
        if value.how not in ("max", "min"):
            share = np.full(len(of.cells), 1 / len(of.cells))
            about = replace(about, point=float(means.mean()), rounding=float(rounding.mean()))
            return replace(about, smooth=OfSums(sums, share, self.limits(of, sums, share)))
        largest = value.how == "max"
        point = float(means.max() if largest else means.min())
        about = replace(about, point=point, rounding=float(rounding.max()), why=self.space.too_few)
        if about.why:
            return about
        found = self.together(of, sums, confidence)
        few = np.flatnonzero(np.isnan(found.low) | np.isnan(found.high))
        if len(few):
            name = of.result.cells[int(of.cells[few[0]])].name
            reason = of.result.statistics[of.measure].reasons[int(of.cells[few[0]])]
            return replace(about, why=f"{name}: {reason}" if reason else "no interval")
        # the largest is above every cell's bound that holds for all, and below the largest of
        # bounds that each hold alone
        low, high = (
            (found.low_together.max(), found.high.max())
            if largest
            else (found.low.min(), found.high_together.min())
        )
        return replace(about, low=float(low), high=float(high))

    def shares(self, of: Chosen, confidence: float) -> tuple[Floats, Floats] | None:
        """[cell] each: the exact limits of cells that are shares; None where they aren't."""
        data = of.result.measures[of.measure]
        units, place = self.space.units, self.space.place(of.result)
        return share_limits(data, EFFECTS[data.effect], of.cells, units, confidence, place)

    def limits(self, of: Chosen, sums: Sums, share: Floats) -> Limits | None:
        """Of a weighted mean of cells that are shares: exact of one cell, by Bonferroni of more. Of
        one cell of anything else: those of its row in the table."""
        if self.shares(of, 95.0) is None:
            effect = EFFECTS[of.result.measures[of.measure].effect]
            return self._row_limits(sums, effect.tested) if len(share) == 1 else None

        def found(confidence: float) -> tuple[float, float]:
            every = self.shares(of, 100 - (100 - confidence) / len(share))
            assert every is not None
            return float(every[0] @ share), float(every[1] @ share)

        return found

    def _row_limits(self, sums: Sums, tested: bool) -> Limits:
        settings = self.cells.result.sampling.settings

        def found(confidence: float) -> tuple[float, float]:
            own = settings.model_copy(update={"confidence": confidence})
            inference = infer(sums, own, self.space.draws, 1, tested=tested)
            return float(inference.low[0]), float(inference.high[0])

        return found

    def together(self, of: Chosen, sums: Sums, confidence: float) -> Simultaneous:
        """Bounds of cells that hold for all; of shares by Bonferroni, as resamples of a share that
        is 1 never lie below."""
        alone = self.shares(of, confidence)
        if alone is None:
            return simultaneous(sums, self.space.draws, confidence)
        every = self.shares(of, 100 - (100 - confidence) / len(of.cells))
        assert every is not None
        return Simultaneous(sums.value, *alone, *every)

    def area(self, value: Area) -> Estimate:
        """Trapezoids, divided by the range of the axis."""
        of = self.cells.of(value)
        result, cells = of.result, of.cells
        lacking = [
            i for i in range(len(result.cells)) if at(result, i, value.where) and i not in cells
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
        # Each point counts with half the way to either neighbour.
        share = np.zeros(len(places))
        share[1:] += np.diff(places) / 2
        share[:-1] += np.diff(places) / 2
        share /= places[-1] - places[0]
        of = replace(of, cells=cells)
        means, sums = result.statistics[value.measure].mean[cells], self.space.sums(of)
        return Estimate(
            float(means @ share),
            OfSums(sums, share, self.limits(of, sums, share)),
            rounding=float(bounds(of) @ share),
            as_in_base=as_in_base(result, value.measure),
        )

    # --- what isn't smooth

    def accuracy(self, run: str, confidence: float) -> Estimate:
        found = self.cells.result.accuracy_of(run, confidence)
        why = None if math.isfinite(found.mean) else "no prompt has an answer"
        unit = "distinct prompts" if self.cells.result.groups is None else "groups"
        few = f"no interval below {FEWEST_UNITS} {unit}" if math.isnan(found.low) else None
        return Estimate(
            found.mean, None, found.low, found.high, why or few, rounding=found.rounding
        )

    def correlation(self, value: Correlation, confidence: float) -> Estimate:
        mine, theirs = self.cells.pair(value)
        correlate = spearman if value.how == "spearman" else pearson
        one, two = self.space.sums(mine), self.space.sums(theirs)
        measured = float(correlate(one.value[None], two.value[None])[0])
        if not math.isfinite(measured):
            raise NoNumber("the effects don't differ between cells")
        if value.how == "spearman":
            return Estimate(measured, why="a rank correlation is of the effects as measured")
        if self.space.too_few:
            return Estimate(measured, why=self.space.too_few)
        found = true_correlation(one, two, confidence)
        if math.isnan(found.value):
            return Estimate(measured, why="the effects don't differ between cells beyond chance")
        return Estimate(found.value, None, found.low, found.high)

    def ranking(self, value: Ranking, confidence: float) -> Estimate:
        of = self.cells.of(value)
        if value.column is not None:
            return ranking_of_rows(self.space, of, value.column, confidence)
        return ranking_of_cells(self.space, of, value.truth or (), confidence)


def runs_of(value: Value) -> Iterator[str]:
    """The runs whose accuracies a value reads."""
    match value:
        case Accuracy():
            yield value.run
        case Arithmetic():
            yield from runs_of(value.left)
            yield from runs_of(value.right)
        case Absolute():
            yield from runs_of(value.operand)
        case _:
            return


def pieces(value: Value) -> int:
    """How many intervals of their own a value is put together from."""
    if _smooth(value):
        return 0 if _fixed(value) else 1
    match value:
        case Arithmetic():
            return pieces(value.left) + pieces(value.right)
        case Absolute():
            return pieces(value.operand)
        case _:
            return 1


def _fixed(value: Value) -> bool:
    if isinstance(value, Arithmetic):
        return _fixed(value.left) and _fixed(value.right)
    return isinstance(value, Constant)


def _smooth(value: Value) -> bool:
    match value:
        case Constant() | Area():
            return True
        case OfCells():
            return value.how not in ("max", "min")
        case Arithmetic():
            return _smooth(value.left) and _smooth(value.right)
        case _:
            return False
