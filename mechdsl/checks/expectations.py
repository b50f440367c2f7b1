"""Checks of measures, reports, statistics, p-values and expectations before the run. No numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import add, mul, sub, truediv
from typing import Any, Literal

from mechdsl.base.records import closest_name
from mechdsl.base.text import Span, count_noun, find_run, mixes_counts_and_shares, name_list
from mechdsl.checks.conditions import (
    Absolute,
    Accuracy,
    Area,
    Arithmetic,
    BandCondition,
    BestCellCondition,
    CellReader,
    CellSelection,
    CellValue,
    Comparison,
    Condition,
    ConditionValue,
    ConstantValue,
    Correlation,
    ExpectStatement,
    KnownMeasure,
    KnownNames,
    LogicalCondition,
    Negation,
    Ranking,
    RefusedCondition,
    TopCellsCondition,
    true_cells,
    truth_column,
    unreadable_expectation,
)
from mechdsl.diagnostics.core import Diagnostic, UnknownFact, did_you_mean, filter_certain
from mechdsl.diagnostics.experiments import TooFewPrompts, UnreadableMeasure
from mechdsl.diagnostics.prompts import EqualPairedValues
from mechdsl.diagnostics.syntax import BadArgument, UnknownName, UnknownWord
from mechdsl.program import spec
from mechdsl.program.lowering import compared_experiments
from mechdsl.program.significance import (
    CORRECTION_NAMES,
    MIN_UNITS,
    smallest_p_value,
    unreachable_cells,
)
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow
from mechdsl.resolve.cells import (
    average_cells,
    distinguish_variants,
    find_open_axes,
    join_axes,
    join_cells,
)
from mechdsl.resolve.expansion import name_cells, split_by_group
from mechdsl.resolve.types import (
    ExperimentOutline,
    ResolvedExperiment,
    ResolvedMeasure,
)
from mechdsl.syntax import ast
from mechdsl.vocab.aggregates import AGGREGATES
from mechdsl.vocab.metrics import EFFECTS, FAITHFULNESS, METRICS
from mechdsl.vocab.reports import check_report


def check_reachable_p(variants: Sequence[ResolvedExperiment]) -> list[Diagnostic]:
    """Report W0720 if the p-values of an experiment, or of one of its blocks, can't be small enough
    for any effect size."""
    experiment = variants[0]
    tested = tested_measures(experiment)
    if not tested or not experiment.rules:
        return []
    settings = experiment.spec.statistics
    blocks: dict[object, list[ResolvedExperiment]] = {}
    for variant in variants:
        blocks.setdefault(dict(variant.spec.variant).get(PROMPTS_AXIS), []).append(variant)
    units: list[int] = []
    for block in blocks.values():
        count = _count_units(block[0].table.runs["clean"].rows, settings)
        units += [count] * _count_tests(block)
    problems = check_cell_units(units, settings, tested[0].span, row_unit(experiment))
    return problems or _check_groups(blocks.values())


def _count_units(rows: Sequence[RunRow], settings: spec.Statistics) -> int:
    """Count rows, or values of the variable in `stats by`."""
    if settings.by is None or not rows or settings.by not in rows[0].values:
        return len(rows)
    return len({str(row.values.get(settings.by)) for row in rows})


def _check_groups(blocks: Iterable[Sequence[ResolvedExperiment]]) -> list[Diagnostic]:
    """Report W0720 for each table by values of the prompts in which no cell can be significant. All
    its cells are one family, except those with too few rows for a p-value."""
    blocks = list(blocks)
    experiment = blocks[0][0]
    settings, problems = experiment.spec.statistics, list[Diagnostic]()
    for report in experiment.spec.reports:
        by, units = report.by, list[int]()
        if by is None:
            continue
        for block in blocks:
            groups: dict[str, list[RunRow]] = {}
            for row in block[0].table.runs["clean"].rows:
                if by in row.values:
                    groups.setdefault(str(row.values[by]), []).append(row)
            for rows in groups.values():
                units += [_count_units(rows, settings)] * _count_tests(block)
        units = [each for each in units if each >= MIN_UNITS] or units
        if units and len(unreachable_cells(units, settings)) == len(units):
            where = f"in the table by {by}, "
            unit = row_unit(experiment)
            problems += check_cell_units(units, settings, report.span, unit, where)
    return problems


def _count_tests(variants: Sequence[ResolvedExperiment]) -> int:
    """Count the numbers of the measures with a p-value: an effect of unpatched runs is one number,
    and a metric doesn't depend on what is observed."""
    first, count = variants[0], 0
    for said, measure in zip(first.spec.measures, first.measures, strict=True):
        if said.effect not in EFFECTS or not EFFECTS[said.effect].tested:
            continue
        one = not EFFECTS[said.effect].of_intervention and not measure.observed
        count += 1 if one else _count_cells(variants, observed=measure.observed)
    return count


def _count_cells(variants: Sequence[ResolvedExperiment], *, observed: bool) -> int:
    """Count the cells of the results; a part for one value has only that value's cells.

    Args:
        observed: Whether to distinguish cells that differ only in what is observed.
    """
    over, count = variants[0].spec.over, 0
    for variant in variants:
        fixed = {} if variant.place is None else variant.place.fixed
        left_out = fixed.keys() | (frozenset() if observed else variant.observed_axes)
        counted = [axis for axis in variant.axes if axis.name not in left_out]
        if over is not None:
            counted = [axis for axis in counted if over not in (axis.name, axis.alias)]
        count += variant.count_along([axis.name for axis in counted])
    labels = {str(dict(variant.spec.variant).get(over or "", "")) for variant in variants}
    return count // len(labels)


def row_unit(experiment: ResolvedExperiment) -> str:
    """Return the name of one row."""
    return "image" if experiment.model.shape.takes == "image" else "prompt"


def tested_measures(experiment: ResolvedExperiment) -> list[spec.Measure]:
    """Return the measures that have a p-value."""
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    return [m for m in known if EFFECTS[m.effect].tested]


def check_cell_units(
    units: Sequence[int],
    settings: spec.Statistics,
    span: Span | None,
    unit: str = "prompt",
    where: str = "",
    *,
    measured: bool = False,
) -> list[Diagnostic]:
    """Report W0720 if cells have so few prompts (or groups) that no p-value can be small enough.

    Args:
        units: Number of units of every cell that may be tested.
        unit: Name of one row.
        where: Description of the cells.
        measured: Whether all these cells are tested; before a run, some may prove to be inert.
    """
    lost = unreachable_cells(units, settings)
    if not lost:
        return []
    few = sorted({units[place] for place in lost})
    have = " to ".join(str(each) for each in dict.fromkeys((few[0], few[-1])))
    several = "s" if have != "1" else ""
    word = f"value{several} of {settings.by}" if settings.by is not None else f"{unit}{several}"
    have = f"{have} {word}"
    smallest, level = smallest_p_value(few[-1], settings), 1 - settings.confidence / 100
    is_certain = measured or smallest >= level
    about = f"{where}with {have}, no cell can be significant after correction"
    if len(lost) < len(units):
        about = (
            f"{len(lost)} of {len(units)} cells have only {have} and can't be significant "
            "after correction"
        )
        about += "" if is_certain else f" if all {len(units)} cells are tested"
    elif not is_certain:
        most = math.ceil(level / smallest) - 1  # Holm rejects the smallest p first
        about += f" if more than {most} of the {len(units)} cells are tested"
    corrected = smallest * (len(units) if settings.correction == "holm" else 1)
    name, cells = CORRECTION_NAMES[settings.correction], count_noun(len(units), "cell")
    reach = (
        f"the smallest possible p is {smallest:.3g}, or {min(1, corrected):.3g} after "
        f"correction ({name}, {cells})"
    )
    if few[-1] < MIN_UNITS:
        reach = f"intervals and p-values need at least {MIN_UNITS}"
    if not is_certain:
        reach += "; cells without any possible effect aren't tested"
    return [
        TooFewPrompts(
            span=span,
            about=about,
            reach=reach,
            unit=unit,
        )
    ]


def check_expectation(expectation: spec.Expectation, known: KnownNames) -> list[Diagnostic]:
    """Check an expectation before the run: E0108, E02xx, E0605, E0606."""
    return read_expectation(expectation, known)[1]


def read_expectation(
    expectation: spec.Expectation, known: KnownNames
) -> tuple[ExpectStatement | None, list[Diagnostic]]:
    """Return the condition with bound names, or None and the diagnostics."""
    reader = _ConditionReader(known, on_mean=expectation.on_mean)
    try:
        if expectation.condition is None:
            return reader.top(expectation), []
        return reader.condition(expectation.condition), []
    except RefusedCondition as refusal:
        return None, [refusal.diagnostic]


ACCURACY_ARGUMENTS = {PROMPTS_AXIS: "block", "model": "model"}
"""Arguments that select an accuracy → the type of name they take."""

_ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}


def _joined(
    operator: Literal["+", "-", "*", "/"], left: ConditionValue, right: ConditionValue
) -> ConditionValue:
    """Combine two values; constants are folded."""
    if isinstance(left, ConstantValue) and isinstance(right, ConstantValue):
        return ConstantValue(_ARITHMETIC[operator](left.value, right.value))
    return Arithmetic(operator, left, right)


class _ConditionReader(CellReader):
    def __init__(self, known: KnownNames, *, on_mean: bool) -> None:
        super().__init__(known)
        self.on_mean = on_mean

    # --- conditions

    def condition(self, node: ast.Expr) -> Condition:
        match node:
            case ast.Logical():
                return LogicalCondition(
                    node.operator, self.condition(node.left), self.condition(node.right)
                )
            case ast.Not():
                return Negation(self.condition(node.operand))
            case ast.Compare():
                return self.comparison(node)
            case ast.Near():
                middle, tolerance = self.constant(node.target), self.constant(node.tolerance)
                if tolerance < 0:
                    raise unreadable_expectation(
                        node.tolerance.span, "a tolerance can't be negative", "remove the `-`"
                    )
                return BandCondition(self.value(node.value), middle - tolerance, middle + tolerance)
            case ast.InRange():
                if not isinstance(node.within, ast.Range):
                    raise unreadable_expectation(
                        node.within.span, "not a range", "write both bounds: `in 0.2..0.4`"
                    )
                low, high = self.constant(node.within.low), self.constant(node.within.high)
                if high < low:
                    span, text = node.within.span, f"{high:g}..{low:g}"
                    raise unreadable_expectation(span, "the range is empty", f"write `{text}`")
                return BandCondition(self.value(node.value), low, high)
            case _:
                raise unreadable_expectation(
                    node.span,
                    "it doesn't compare anything",
                    "write a condition, such as `max(recovery) > 0.3`",
                )

    def comparison(self, node: ast.Compare) -> Condition:
        left, right, operator = node.left, node.right, node.operator
        for best, site in ((left, right), (right, left)):
            if isinstance(best, ast.Call) and best.name in ("argmax", "argmin"):
                if self.labelled(best):
                    continue
                how: Literal["argmax", "argmin"] = "argmax" if best.name == "argmax" else "argmin"
                if operator not in ("=", "!="):
                    raise unreadable_expectation(
                        node.span, f"`{how}` is a site, not a number", f"write `{how}(…) = L9H9`"
                    )
                of, measure, where = self.cells(best)
                self.must_be_own(best, of)
                named = self.named_cells(site, measure, where)
                return BestCellCondition(how, measure, where, named, operator == "=")
        return Comparison(operator, self.value(left), self.value(right))

    def named_cells(
        self, node: ast.Expr, measure: int, among: Sequence[CellSelection]
    ) -> tuple[CellSelection, ...]:
        """Read the other side of an `argmax`: a site, or a cell of the measure, as in
        `recovery(c: 2)`."""
        known = self.known.measures[measure]
        if isinstance(node, ast.String):
            text = node.span.written
            hint = f"write a cell: `{known.effect}({self.axis_of(node)}: {text})`"
            raise unreadable_expectation(node.span, f"`{text}` is not a site", hint)
        if not isinstance(node, ast.Call) or node.name not in (known.effect, *known.names):
            return (self.one_of(node, among),)
        named = self.wheres(node.arguments)
        self.must_select(node.span, named, among)
        return named

    def top(self, expectation: spec.Expectation) -> TopCellsCondition:
        span = expectation.span
        if expectation.top is None:
            raise unreadable_expectation(
                span, "it states no condition", "write a condition, or `top 3 contains L9H9`"
            )
        numbers = [i for i, measure in enumerate(self.known.measures) if measure.kind == "number"]
        if len(numbers) > 1:
            hint = (
                "`contains` can't name a measure: move the other measures to a separate experiment"
            )
            raise RefusedCondition(self.which(span, f"top {expectation.top}", numbers, hint))
        if not numbers:
            raise unreadable_expectation(
                span, "no measure is a number", "categories can't be ranked"
            )
        sites = tuple(self.one_of(site) for site in expectation.contains)
        return TopCellsCondition(expectation.top, numbers[0], sites)

    # --- values

    def value(self, node: ast.Expr) -> ConditionValue:
        if self.labelled(node):
            return self.only(node)
        match node:
            case ast.Number():
                return ConstantValue(float(node.value))
            case ast.Percent():
                return ConstantValue(node.value / 100)
            case ast.Negative():
                return _joined("-", ConstantValue(0.0), self.value(node.operand))
            case ast.Binary():
                left, right = self.value(node.left), self.value(node.right)
                if node.operator == "/" and isinstance(right, ConstantValue) and right.value == 0:
                    hint = "use a nonzero divisor"
                    raise unreadable_expectation(node.right.span, "it divides by 0", hint)
                return _joined(node.operator, left, right)
            case ast.Call():
                return self.call(node)
            case ast.ExperimentMeasure(measure=ast.Call() as call):
                other = self.of_experiment(node)
                return self.only(node) if other.labelled(call) else self.one_cell(call, other)
            case ast.Name() | ast.QualifiedRef() | ast.ExperimentMeasure():
                return self.only(node)
            case _:
                raise unreadable_expectation(
                    node.span, "not a number", "compare an effect with a number"
                )

    def call(self, node: ast.Call) -> ConditionValue:
        match node.name:
            case name if name in AGGREGATES:
                return self.aggregate(node)
            case "accuracy":
                return Accuracy(self.accuracy(node))
            case "spearman" | "pearson":
                return self.correlation(node, node.name)
            case "abs":
                return Absolute(self.value(self.only_argument(node, "abs(max(recovery))")))
            case "argmax" | "argmin":
                hint = f"write `{node.name}(…) = L9H9`"
                raise unreadable_expectation(
                    node.span, f"`{node.name}` is a site, not a number", hint
                )
            case "auc" | "cmd":
                return self.area(node)
            case "auroc":
                return self.ranking(node)
            case _:
                return self.one_cell(node, self)

    def aggregate(self, node: ast.Call) -> CellValue:
        """Read `mean(recovery, layer 3)`."""
        of, measure, where = self.cells(node)
        needed = AGGREGATES[node.name].min_cells
        if of.known.cells is not None and not of.known.open_axes:
            count = len(of.find(where))
            if 0 < count < needed:
                raise unreadable_expectation(
                    node.span,
                    f"`{node.name}` needs {count_noun(needed, 'cell')}, and this is {count}",
                    "name more cells, or write another function",
                )
        return CellValue(node.name, measure, where, of.experiment)

    def one_cell(self, node: ast.Call, of: CellReader) -> CellValue:
        """Read `recovery(L9H9)`."""
        measure = of.measure(ast.Name(span=node.span, id=node.name), called=True)
        where = of.wheres(node.arguments)
        if where and of.known.cells is not None and len(of.find(where)) != 1:
            of.not_one(node.span, where, of.find(where))
        return CellValue("", measure, where, of.experiment)

    def only(self, node: ast.Expr) -> ConditionValue:
        """Read a measure without a selection, which is valid only for a single cell."""
        of, measure = self.of_measure(node)
        if not of.known.one_cell:
            text = node.span.written
            at = of.example if of.of_other else "L9H9"
            own = isinstance(node, ast.Name)
            cell = f"{text}({at})" if own else f"mean({text}, {at})"
            hint = (
                f"reduce it to one number: `max({text})`, `mean({text})`, or one cell, as "
                f"in `{cell}`"
            )
            raise unreadable_expectation(node.span, f"`{text}` has one value per cell", hint)
        return CellValue("", measure, experiment=of.experiment)

    def correlation(self, node: ast.Call, how: Literal["spearman", "pearson"]) -> ConditionValue:
        example = f"{how}(recovery, other_experiment)"
        measure = self.own_measure(node, example)
        other = self.argument(node, 1, example)
        self.no_more(node, 2, example)
        if not isinstance(other, ast.Name):
            raise unreadable_expectation(
                other.span, "not the name of an experiment", f"write `{example}`"
            )
        if other.id not in self.known.experiments:
            otherwise = "name another experiment of this file"
            hint = did_you_mean(other.id, self.known.experiments, otherwise)
            problem = UnknownName(span=other.span, kind="experiment", name=other.id, hint=hint)
            raise RefusedCondition(problem)
        if how == "spearman" and not self.on_mean:
            name = self.argument(node, 0, example).span.written
            hint = (
                f"write `pearson({name}, {other.id})`, which has an interval, or add `on mean` to "
            )
            hint += "compare the estimate alone"
            raise unreadable_expectation(node.span, "a rank correlation has no interval", hint)
        return Correlation(how, measure, other.id)

    def area(self, node: ast.Call) -> Area:
        """Read `auc(prob, k)` or `cmd(faithfulness, n)`: a measure, the axis of its curve and, if
        there are several curves, a selection of one."""
        to_one = node.name == "cmd"
        example = "cmd(faithfulness, n)" if to_one else "auc(prob, k)"
        first, named = self.argument(node, 0, example), self.argument(node, 1, example)
        axes = (*self.known.axes, *self.known.aliases)
        if first.span.written in axes and named.span.written not in axes:
            exchanged = f"{node.name}({named.span.written}, {first.span.written})"
            raise unreadable_expectation(
                first.span,
                f"the first argument of `{node.name}` is the measure",
                f"write `{exchanged}`",
            )
        measure = self.own_measure(node, example)
        if to_one and self.known.measures[measure].effect != FAITHFULNESS.name:
            reason = "only `faithfulness` has a distance from 1, the whole model"
            raise unreadable_expectation(node.span, reason, "measure `… as faithfulness`")
        axis = named.id if isinstance(named, ast.Name) else named.span.written
        axis = self.known.aliases.get(axis, axis)
        if axis in self.known.averaged:
            reason = f"each measure is already one number for all values of `{axis}`"
            label = self.known.measures[measure].label
            hint = f"remove `… over {axis}` from the measures, or test this number: `{label} > 0.5`"
            raise unreadable_expectation(named.span, reason, hint)
        if axis not in self.known.axes:
            listed = name_list(self.known.axes)
            sweep = "add a sweep, for example `for k in 0%..100% step 5% { … }`"
            otherwise = f"its axes are {listed}" if listed else sweep
            hint = did_you_mean(axis, self.known.axes, otherwise)
            kind = "axis of this experiment"
            raise RefusedCondition(UnknownWord(span=named.span, kind=kind, word=axis, hint=hint))
        where = self.wheres(node.arguments[2:])
        if self.known.cells is not None:
            self.curve(node, named, axis, where)
        return Area(measure, axis, where, to_one)

    def curve(
        self, node: ast.Call, named: ast.Expr, axis: str, where: Sequence[CellSelection]
    ) -> None:
        """Check that the cells form one curve over numbers."""
        cells = [self.known.cells[i] for i in self.find(where)] if self.known.cells else []
        if not cells:
            self.not_one(node.span, where, [])
        at = [cell.coords[axis] for cell in cells]
        word = next((value for value in at if isinstance(value, str)), None)
        if word is not None:
            reason = f"values of `{axis}` are words, such as `{word}`, but a curve needs numbers"
            hint = "name a numeric axis, or write `mean(…)` for the mean over cells"
            raise unreadable_expectation(named.span, reason, hint)
        if mixes_counts_and_shares(at):
            raise unreadable_expectation(named.span, *_mixture(axis))
        if any(open_axis in self.known.axes for open_axis in self.known.open_axes):
            return
        distinct = set(at)
        if len(distinct) < 2:
            raise unreadable_expectation(
                named.span, f"`{axis}` has one value, but a curve needs at least two", "sweep it"
            )
        if len(distinct) < len(at):
            others = [name for name in self.known.axes if name != axis]
            sized = name_list(others) or "none"
            count = len(at) // len(distinct)
            hint = f"select one, as in `auc({node.arguments[0].value.span.written}, "
            hint += f"{axis}, {others[0] if others else axis}: …)`; the other axes are {sized}"
            raise unreadable_expectation(
                node.span, f"it matches {count} curves over `{axis}`", hint
            )

    def ranking(self, node: ast.Call) -> Ranking:
        """Read `auroc(recovery, name_movers)`, `auroc(delta, large, L9H9)`: a measure, the positive
        cells or rows, and the ranked cells or the cell whose rows are ranked."""
        measure = self.own_measure(node, f"auroc(recovery, {self.true_example})")
        text = node.arguments[0].value.span.written
        if len(node.arguments) < 2:
            hint = f"write `auroc({text}, {self.true_example})`"
            raise unreadable_expectation(node.span, "`auroc` needs more arguments", hint)
        where = self.wheres(node.arguments[2:])
        truth, run = node.arguments[1].value, None
        if isinstance(truth, ast.Call) and truth.name == "accuracy":
            column, run = truth.span.written, self.accuracy(truth)
        else:
            column = truth_column(node.arguments[1], self)
        if column is None:
            return Ranking(measure, where, truth=true_cells(node.arguments[1], where, self))
        example = f"`auroc({text}, {column}, {self.example})`"
        if not where and not self.known.one_cell:
            hint = f"name the cell whose rows are ranked, as in {example}"
            if "position" in self.known.axes:
                map_example = f"observe auroc of {self.known.name or 'map'} in SPAN tokens"
                hint += f"; to rank the positions of each row, write `{map_example}`"
            raise unreadable_expectation(node.span, "every cell has a value in each row", hint)
        if where and self.known.cells is not None:
            cells = self.find(where)
            if len(cells) > 1:
                count = "several" if self.known.open_axes else len(cells)
                at = ", ".join(cell_selection.text for cell_selection in where)
                hint = f"rows are ranked within one cell: name it, as in {example}"
                raise unreadable_expectation(node.span, f"{at} matches {count} cells", hint)
            if not cells:
                self.not_one(node.span, where, cells)
        return Ranking(measure, where, column=None if run else column, run=run)

    def accuracy(self, node: ast.Call) -> str:
        """Return the run of an accuracy; with several blocks or models, the run of one of them."""
        named = [
            argument
            for name in ACCURACY_ARGUMENTS
            for argument in node.arguments
            if argument.name == name
        ]
        if not named or node.arguments[0] in named or len(node.arguments) != 1 + len(named):
            return self.run(self.only_argument(node, "accuracy(clean)"))
        run = self.argument(node, 0, "accuracy(clean)")
        name = ", ".join(argument.value.span.written.strip('"') for argument in named)
        whose = ACCURACY_ARGUMENTS[named[0].name or ""]
        key = f"{run.span.written} ({name})"
        if key not in self.known.runs:
            runs = [each for each in self.known.runs if each.startswith(f"{run.span.written} (")]
            if not runs:
                self.run(run)  # reports an unknown run
                reason, hint = f"it runs on one {whose}", "leave it out"
                raise unreadable_expectation(named[0].span, reason, hint)
            known = [each.removesuffix(")").partition(" (")[2] for each in runs]
            hint = did_you_mean(name, known, f"it runs on {name_list(known)}")
            unknown = UnknownName(span=named[0].span, kind=whose, name=name, hint=hint)
            raise RefusedCondition(unknown)
        return key

    def run(self, run: ast.Expr) -> str:
        if not isinstance(run, ast.Name):
            raise unreadable_expectation(
                run.span, "not the name of a run", "write `accuracy(clean)`"
            )
        run_name = find_run(run.id, self.known.runs)
        runs = [each for each in self.known.runs if each.startswith(f"{run.id} (")]
        if run_name is None and runs:
            first = runs[0].removesuffix(")").partition(" (")[2]
            words = [w for w in ACCURACY_ARGUMENTS if w in self.known.axes] or ["model"]
            of = ", ".join(f"{w}: {x}" for w, x in zip(words, first.split(", "), strict=False))
            hint = f"name one: `accuracy({run.id}, {of})`"
            reason = f"each {ACCURACY_ARGUMENTS[words[0]]} has a separate accuracy"
            raise unreadable_expectation(run.span, reason, hint)
        if run_name is None:
            known = name_list(self.known.runs)
            hint = did_you_mean(run.id, self.known.runs, f"the runs are: {known}")
            raise RefusedCondition(UnknownName(span=run.span, kind="run", name=run.id, hint=hint))
        return run_name

    def only_argument(self, node: ast.Call, example: str) -> ast.Expr:
        self.no_more(node, 1, example)
        return self.argument(node, 0, example)

    def no_more(self, node: ast.Call, most: int, example: str) -> None:
        if len(node.arguments) > most:
            span = node.arguments[most].span
            raise unreadable_expectation(
                span, f"`{node.name}` has too many arguments", f"write `{example}`"
            )

    def argument(self, node: ast.Call, index: int, example: str) -> ast.Expr:
        if index >= len(node.arguments):
            raise unreadable_expectation(
                node.span, f"`{node.name}` needs more arguments", f"write `{example}`"
            )
        value = node.arguments[index].value
        if isinstance(value, ast.Site) and len(value.names) == 1 and not value.axes:
            return value.names[0]  # a lone word also parses as a group of sites
        if isinstance(value, ast.Range | ast.Quantity | ast.SiteValue):
            raise unreadable_expectation(
                value.span, f"`{node.name}` doesn't accept this argument", f"write `{example}`"
            )
        return value

    # --- cells

    def cells(self, node: ast.Call) -> tuple[CellReader, int, tuple[CellSelection, ...]]:
        """Read `(recovery, layer 0..3)` as experiment, measure and selected cells."""
        example = f"{node.name}(recovery, layer 0..3)"
        of, measure = self.of_measure(self.argument(node, 0, example))
        where = of.wheres(node.arguments[1:])
        if where and of.known.cells is not None and not of.find(where):
            of.not_one(node.span, where, [])
        return of, measure, where

    # --- measures of other experiments

    def of_measure(self, node: ast.Expr) -> tuple[CellReader, int]:
        """Return the experiment of a measure and the measure's index.

        `recovery of ld` refers to this experiment if `ld` is one of its measures, otherwise to an
        experiment `ld`.
        """
        if isinstance(node, ast.ExperimentMeasure):
            other = self.of_experiment(node)
            return other, other.measure(node.measure)
        if not isinstance(node, ast.QualifiedRef) or self.labelled(node):
            return self, self.measure(node)
        measures = self.known.measures
        if any(node.of.whole in measure.names for measure in measures):
            return self, self.measure(node)
        labels = [measure.label for measure in measures]
        other = self.other(node.of, node.of.whole, node.name, labels)
        start = node.span.start
        span = replace(node.span, end=start + len(node.name))
        return other, other.measure(ast.Name(span=span, id=node.name))

    def of_experiment(self, node: ast.ExperimentMeasure) -> CellReader:
        return self.other(node.experiment, node.experiment.id, node.measure.span.written)

    def other(
        self, node: ast.Node, name: str, measure: str, labels: Sequence[str] = ()
    ) -> CellReader:
        """Return the reader of another experiment; `labels`: other names that are valid there."""
        known = self.known
        if name in known.others:
            return CellReader(known.others[name], of_other=True)
        if name in known.experiments:
            hint = "see the message about that experiment"
            raise unreadable_expectation(node.span, f"`{name}` could not be computed", hint)
        if name == known.name:
            raise unreadable_expectation(
                node.span, f"`{name}` is the experiment itself", f"write `{measure}`"
            )
        listed = name_list(known.experiments)
        otherwise = (
            f"other experiments are {listed}" if listed else "the file has no other experiment"
        )
        if labels:
            otherwise = f"this experiment measures {name_list(labels)}; {otherwise}"
        hint = did_you_mean(name, [*labels, *known.experiments], otherwise)
        kind = "measure or other experiment" if labels else "other experiment"
        raise RefusedCondition(UnknownName(span=node.span, kind=kind, name=name, hint=hint))

    def own_measure(self, node: ast.Call, example: str) -> int:
        """Return the measure in a function's first argument, which must be of this experiment."""
        of, measure = self.of_measure(self.argument(node, 0, example))
        self.must_be_own(node, of)
        return measure

    def must_be_own(self, node: ast.Call, of: CellReader) -> None:
        if of.of_other:
            span = node.arguments[0].value.span
            hint = f"move this line to the experiment {of.whose}"
            raise unreadable_expectation(
                span, f"`{node.name}` reads only measures of its own experiment", hint
            )


ExperimentVariants = Mapping[str, Sequence[ExperimentOutline]]
"""The experiments of a file by name, each with its variants."""


def check_results(
    variants: Sequence[ExperimentOutline], program: spec.Program, every: ExperimentVariants
) -> list[Diagnostic]:
    """Check an experiment's use of its results."""
    undecided = _undecided(variants, program)
    problems = _against_axes(variants, program, every)
    resolved = [variant.resolved for variant in variants if variant.resolved is not None]
    unknown: list[UnknownFact] = [what for variant in variants for what in variant.unknown]
    if len(resolved) == len(variants):
        counted = not undecided and "count" not in unknown
        few = check_reachable_p(resolved)
        problems += [replace(problem, by_text=counted) for problem in few]
    return filter_certain(problems, unknown)


def _undecided(variants: Sequence[ExperimentOutline], program: spec.Program) -> set[str]:
    """Return the coordinates of cells with unknown values."""
    return {axis for e in variants for axis in find_open_axes(e.spec, program.groups, e.unknown)}


def _effects_of_categories(
    measures: Sequence[KnownMeasure], experiment: spec.Experiment
) -> Iterator[UnreadableMeasure]:
    """Yield a problem for each category that is measured with an effect."""
    for measure, each in zip(measures, experiment.measures, strict=True):
        if measure.kind == "category" and each.effect != "raw":
            yield UnreadableMeasure(
                span=each.span,
                text=each.metric.span.written,
                reason="it is categorical, so differences are undefined",
                hint="measure it `as raw`, or use `expected(…)`, which is a number",
            )


def _facts_for_reports(
    variants: Sequence[ExperimentOutline], program: spec.Program
) -> dict[str, bool]:
    """Return whether an experiment generates replies, whether it has a circuit, and whether
    positions of this circuit depend on parameters."""
    said = variants[0].spec
    graph = any(rule.observed is not None and rule.observed.facts.has_graph for rule in said.rules)
    resolved = [variant.resolved for variant in variants if variant.resolved is not None]
    circuits = [rule.circuit for experiment in resolved for rule in experiment.rules]
    return {
        "writes": said.generation is not None,
        "circuit": graph or any(rule.circuit_name in program.circuits for rule in said.rules),
        "has_parameters": any(
            circuit is not None and "" in circuit.place_texts for circuit in circuits
        ),
    }


def _against_axes(
    variants: Sequence[ExperimentOutline], program: spec.Program, every: ExperimentVariants
) -> list[Diagnostic]:
    """Check that reports and expectations name existing axes, measures, runs and values."""
    experiment = variants[0]
    said = experiment.spec
    own, aliases, perhaps = _axes(variants)
    axes = list(dict.fromkeys([*own, *aliases, *sorted(perhaps)]))
    tables = list({id(variant.table): variant.table for variant in variants}.values())
    rows = [row for table in tables for row in table.runs["clean"].rows]
    of_all = rows[0].values if rows else {}
    for row in rows:
        if not of_all.keys() <= row.values.keys():
            of_all = {name: value for name, value in of_all.items() if name in row.values}
    values = list(of_all)
    columns_unknown = any(table.columns_unknown for table in tables)
    measures = _measures(experiment)
    problems: list[Diagnostic] = [*_effects_of_categories(measures, said)]
    all_known = None not in experiment.measures
    facts = _facts_for_reports(variants, program)
    for report in said.reports:
        of = measures if all_known else None
        problems.extend(check_report(report, axes, values, of, **facts))
    by = said.statistics.by
    if by is not None and by not in values and not columns_unknown:
        problems.append(
            UnknownName(
                span=said.statistics.span,
                kind="value of the prompts",
                name=by,
                hint=did_you_mean(
                    by,
                    values,
                    f"values of {_called(tables)} are {name_list(values)}",
                ),
            )
        )
    problems.extend(_of_several_images(by, tables, said))
    problems.extend(_averaged(variants))
    problems.extend(_paired_alike(variants, axes))
    if said.expects and measures:
        known = _known(variants, program)
        names = compared_experiments(said).intersection(every) - {experiment.name}
        others = {name: _known(every[name], program) for name in sorted(names)}
        groups = dict(program.groups)
        groups |= {group.name: group for expect in said.expects for group in expect.groups}
        truths = {
            "groups": {name: group.sites for name, group in groups.items()},
            "columns": None
            if columns_unknown or any(table.stands_in for table in tables)
            else {name: [row.values.get(name) for row in rows] for name in values},
            "all_rows": "count" not in experiment.unknown,
        }
        known = replace(known, others=others, **truths)
        for expectation in said.expects:
            problems.extend(check_expectation(expectation, known))
    return problems


def _of_several_images(
    by: str | None, tables: Sequence[PromptTable], said: spec.Experiment
) -> Iterator[Diagnostic]:
    """Report E0207 for `stats by` a value that differs between tiles of one image."""
    for table in tables:
        rows = table.runs["clean"].rows
        pairs = {
            (image, str(row.values.get(by or "")))
            for image, row in zip(table.cut_from, rows, strict=False)
        }
        if by is not None and len(pairs) > len({image for image, _ in pairs}):
            reason = "differs between tiles of one image, which are not independent observations"
            hint = "remove it: tiles of one image then count as one unit"
            yield BadArgument(span=said.statistics.span, name=by, reason=reason, hint=hint)
            return


def _called(tables: Sequence[PromptTable]) -> str:
    """Describe the blocks and what they have in common."""
    names = list(dict.fromkeys(table.name for table in tables))
    return f"`{names[0]}`" if len(names) == 1 else f"all of {name_list(names)}"


def _check_over(variants: Sequence[ExperimentOutline]) -> str | None:
    """Return the axis that measures are averaged over, by its main name."""
    over = variants[0].spec.over
    aliases = {a.alias: a.name for e in variants for a in e.axes if a.alias is not None}
    return None if over is None else aliases.get(over, over)


def _axes(variants: Sequence[ExperimentOutline]) -> tuple[list[str], dict[str, str], set[str]]:
    """Return (axes of the results, their second names, axes that may exist)."""
    axes = join_axes([(e.spec.variant, [axis.name for axis in e.axes]) for e in variants])
    aliases = {a.alias: a.name for e in variants for a in e.axes if a.alias is not None}
    perhaps = {name for e in variants for name in e.perhaps}
    over = _check_over(variants)
    axes = [name for name in axes if name != over]
    aliases = {name: of for name, of in aliases.items() if of != over}
    return axes, aliases, perhaps - {over}


def _averaged(variants: Sequence[ExperimentOutline]) -> Iterator[Diagnostic]:
    """Report E0612 for measures of one experiment with different averages or without their axis."""
    said, every = (
        variants[0].spec,
        join_axes([(e.spec.variant, [axis.name for axis in e.axes]) for e in variants]),
    )
    aliases = [a.alias for e in variants for a in e.axes if a.alias is not None]
    perhaps = {name for e in variants for name in e.perhaps}
    kinds = [each.kind for each in _measures(variants[0])]
    for measure, kind in zip(said.measures, kinds, strict=True):
        reason = hint = ""
        if (measure.over, measure.area) != (said.over, said.area):
            reason = f"`{said.measures[0].label}` is averaged differently, and both share one table"
            hint = "average all measures of an experiment over the same axis, or none of them"
        elif measure.over == PROMPTS_AXIS and PROMPTS_AXIS in every:
            reason = "rows of several blocks can't be averaged row by row"
            hint = 'compare cells of two blocks: `expect prob(prompts: "a") - …`'
        elif measure.over is not None and kind == "category":
            what = "area" if measure.area else "mean"
            reason, hint = f"categories have no {what}", "use `expected(…)`, which is a number"
        elif measure.over is not None and measure.over not in (*every, *aliases, *perhaps):
            reason = f"the experiment has no axis `{measure.over}`"
            known = [*every, *aliases]
            hint = did_you_mean(measure.over, known, f"its axes are: {name_list(known) or 'none'}")
        elif measure.over is not None and measure.area:
            reason, hint = _no_curve(variants, measure.over)
        if reason:
            yield UnreadableMeasure(
                span=measure.span, text=measure.span.written, reason=reason, hint=hint
            )


def _mixture(axis: str) -> tuple[str, str]:
    """Return why counts and shares form no curve, and a fix."""
    reason = f"values of `{axis}` are counts and percentages, but a curve needs one scale"
    return reason, "write all of them as counts, or all as percentages"


def _no_curve(variants: Sequence[ExperimentOutline], named: str) -> tuple[str, str]:
    """Return why measures aren't curves over an axis, and a fix; empty if they are."""
    axes = [axis for e in variants for axis in e.axes if named in (axis.name, axis.alias)]
    over = next((axis for axis in axes), None)
    word = next((v for axis in axes for v in axis.labels if isinstance(v, str)), None)
    if over is None or word is not None:
        said = f", such as `{word}`" if word is not None else ""
        reason = f"values of `{named}` are words{said}, but a curve needs numbers"
        return reason, "name a numeric axis, or write `mean over`"
    if mixes_counts_and_shares(value for axis in axes for value in axis.labels):
        return _mixture(named)
    if len(over) < 2:
        return f"`{named}` has one value, but a curve needs at least two", "sweep over more values"
    return "", ""


def _measures(experiment: ExperimentOutline) -> list[KnownMeasure]:
    pairs = zip(experiment.measures, experiment.spec.measures, strict=True)
    return [_known_measure(*pair) for pair in pairs]


def _known(variants: Sequence[ExperimentOutline], program: spec.Program) -> KnownNames:
    """Return the names in an experiment that expectations may refer to."""
    experiment = variants[0]
    undecided = _undecided(variants, program)
    names, aliases, perhaps = _axes(variants)
    over = _check_over(variants)
    seconds = {a.alias for e in variants for a in e.axes if a.alias is not None and a.name == over}
    resolved = [e.resolved for e in variants if e.resolved is not None]
    cells = None
    if len(resolved) == len(variants):
        every = [part for e in resolved for part in split_by_group(e)]
        parts = [(e.spec.variant, name_cells(e, undecided, texts=False)) for e in every]
        cells = join_cells(names if over is None else [*names, over], parts)
        cells = cells if over is None else average_cells(cells, over)[0]
    return KnownNames(
        _measures(experiment),
        list(dict.fromkeys([*names, *aliases, *sorted(perhaps)])) if perhaps else names,
        _runs(variants),
        [e.name for e in program.experiments if e.name != experiment.name],
        aliases,
        cells,
        perhaps,
        undecided,
        () if over is None else {over, *seconds},
        experiment.name,
    )


def _runs(variants: Sequence[ExperimentOutline]) -> list[str]:
    """Return the names of runs in results; each block or model has separate runs."""
    told = distinguish_variants(
        [(variant.spec.variant, variant.model.name) for variant in variants]
    )
    return list(
        dict.fromkeys(
            f"{run} ({whose})" if whose else run
            for variant, whose in zip(variants, told, strict=True)
            for run in variant.table.runs
        )
    )


def _known_measure(resolved: ResolvedMeasure | None, said: spec.Measure) -> KnownMeasure:
    """Return a measure's names for reports and expectations; for a rejected one, from its line."""
    effect = (
        said.effect if said.effect in EFFECTS else closest_name(said.effect, EFFECTS) or said.effect
    )
    if resolved is not None:
        return KnownMeasure(resolved.label, effect, resolved.kind, resolved.word)
    match said.metric:
        case ast.Call(name=word) | ast.Name(id=word):
            metric = METRICS.get(word)
        case _:
            word, metric = "", None
    kinds = {form.kind for form in metric.forms.values()} if metric is not None else set[str]()
    return KnownMeasure(said.label, effect, "category" if kinds == {"category"} else "number", word)


def _paired_alike(
    variants: Sequence[ExperimentOutline], axes: Sequence[str]
) -> Iterator[Diagnostic]:
    """Report W0704 for confusions of a value that source and base share in every row although they
    are of two blocks: the category is then the value with and without an effect."""
    for report in variants[0].spec.reports:
        name = report.variable
        if report.kind != "confusion" or name is None or name in axes:
            continue
        for variant in variants:
            source, base = variant.spec.source, variant.spec.base
            runs = variant.table.runs
            if source is None or variant.table.stands_in or not {source, base} <= runs.keys():
                continue
            values = [row.values.get(name) for row in runs["clean"].rows]
            between = runs[source].prompts != runs[base].prompts
            varied = any(value != values[0] for value in values[1:])
            if between and varied and all(_has(runs[run], values, name) for run in (source, base)):
                yield EqualPairedValues(span=report.span, source=source, base=base, name=name)
                break


def _has(run: PromptRun, values: Sequence[Any], name: str) -> bool:
    """Whether every row of the run has this value, possibly under another name in another block."""
    names = [name] if run.prompts is None else list(run.rows[0].values)
    return any(
        all(row.values.get(own) == value for row, value in zip(run.rows, values, strict=True))
        for own in names
    )
