"""Reading an expectation: names bound to measures, runs and cells, or diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import add, mul, sub, truediv
from typing import Literal

from mechdsl.base.names import name_list, run_called
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.syntax import ast
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
    Statement,
    TopContains,
    Value,
)
from mechdsl.validate.known import Known
from mechdsl.validate.known_cells import KnownCells
from mechdsl.validate.read_truth import column_of, true_cells
from mechdsl.validate.site_selections import RefusedCondition, unreadable


def check_expectation(expectation: spec.Expectation, known: Known) -> list[Diagnostic]:
    """What is wrong with an expectation, before anything is run: E0108, E02xx, E0605, E0606."""
    return read_expectation(expectation, known)[1]


def read_expectation(
    expectation: spec.Expectation, known: Known
) -> tuple[Statement | None, list[Diagnostic]]:
    """The condition with its names bound, or None and why not."""
    reader = _ConditionReader(known, on_mean=expectation.on_mean)
    try:
        if expectation.condition is None:
            return reader.top(expectation), []
        return reader.condition(expectation.condition), []
    except RefusedCondition as refusal:
        return None, [refusal.diagnostic]


WHOSE = {BLOCKS: "block", "model": "model"}
"""Arguments that tell whose accuracy is meant, and of what they are names."""
_ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}


def _joined(operator: Literal["+", "-", "*", "/"], left: Value, right: Value) -> Value:
    """Plain numbers are calculated at once."""
    if isinstance(left, Constant) and isinstance(right, Constant):
        return Constant(_ARITHMETIC[operator](left.value, right.value))
    return Arithmetic(operator, left, right)


class _ConditionReader(KnownCells):
    def __init__(self, known: Known, *, on_mean: bool) -> None:
        super().__init__(known)
        self.on_mean = on_mean

    # --- conditions

    def condition(self, node: ast.Expr) -> Condition:
        match node:
            case ast.Logical():
                return Both(node.operator, self.condition(node.left), self.condition(node.right))
            case ast.Not():
                return Negation(self.condition(node.operand))
            case ast.Compare():
                return self.comparison(node)
            case ast.Near():
                middle, tolerance = self.constant(node.target), self.constant(node.tolerance)
                if tolerance < 0:
                    raise unreadable(
                        node.tolerance.span, "no number is within less than 0", "leave out the `-`"
                    )
                return InBand(self.value(node.value), middle - tolerance, middle + tolerance)
            case ast.InRange():
                if not isinstance(node.within, ast.Range):
                    raise unreadable(
                        node.within.span, "not a range", "write both ends: `in 0.2..0.4`"
                    )
                low, high = self.constant(node.within.low), self.constant(node.within.high)
                if high < low:
                    span, text = node.within.span, f"{high:g}..{low:g}"
                    raise unreadable(span, "no number is in it", f"write `{text}`")
                return InBand(self.value(node.value), low, high)
            case _:
                raise unreadable(
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
                    raise unreadable(
                        node.span, f"`{how}` is a site, not a number", f"write `{how}(…) = L9H9`"
                    )
                of, measure, where = self.cells(best)
                self.must_be_own(best, of)
                return BestIs(how, measure, where, self.one_of(site, where), operator == "=")
        return Comparison(operator, self.value(left), self.value(right))

    def top(self, expectation: spec.Expectation) -> TopContains:
        span = expectation.span
        if expectation.top is None:
            raise unreadable(span, "it says nothing", "write a condition, or `top 3 contains L9H9`")
        numbers = [i for i, each in enumerate(self.known.measures) if each.kind == "number"]
        if len(numbers) > 1:
            hint = "`contains` can't name one: give the other measures an experiment of their own"
            raise RefusedCondition(self.which(span, f"top {expectation.top}", numbers, hint))
        if not numbers:
            raise unreadable(span, "no measure is a number", "categories have no order")
        sites = tuple(self.one_of(site) for site in expectation.contains)
        return TopContains(expectation.top, numbers[0], sites)

    # --- values

    def value(self, node: ast.Expr) -> Value:
        if self.labelled(node):
            return self.only(node)
        match node:
            case ast.Number():
                return Constant(float(node.value))
            case ast.Percent():
                return Constant(node.value / 100)
            case ast.Negative():
                return _joined("-", Constant(0.0), self.value(node.operand))
            case ast.Binary():
                left, right = self.value(node.left), self.value(node.right)
                if node.operator == "/" and isinstance(right, Constant) and right.value == 0:
                    hint = "write a divisor that isn't 0"
                    raise unreadable(node.right.span, "it divides by 0", hint)
                return _joined(node.operator, left, right)
            case ast.Call():
                return self.call(node)
            case ast.OfExperiment(measure=ast.Call() as call):
                other = self.of_experiment(node)
                return self.only(node) if other.labelled(call) else self.one_cell(call, other)
            case ast.Name() | ast.OfRef() | ast.OfExperiment():
                return self.only(node)
            case _:
                raise unreadable(node.span, "not a number", "compare an effect with a number")

    def call(self, node: ast.Call) -> Value:
        match node.name:
            case "max" | "min" | "mean":
                of, measure, where = self.cells(node)
                return OfCells(node.name, measure, where, of.experiment)
            case "accuracy":
                return Accuracy(self.accuracy(node))
            case "spearman" | "pearson":
                return self.correlation(node, node.name)
            case "abs":
                return Absolute(self.value(self.only_argument(node, "abs(max(recovery))")))
            case "argmax" | "argmin":
                hint = f"write `{node.name}(…) = L9H9`"
                raise unreadable(node.span, f"`{node.name}` is a site, not a number", hint)
            case "auc":
                return self.area(node)
            case "auroc":
                return self.ranking(node)
            case _:
                return self.one_cell(node, self)

    def one_cell(self, node: ast.Call, of: KnownCells) -> OfCells:
        """`recovery(L9H9)`."""
        measure = of.measure(ast.Name(span=node.span, id=node.name), called=True)
        where = of.wheres(node.arguments)
        if where and of.known.cells is not None and len(of.find(where)) != 1:
            of.not_one(node.span, where, of.find(where))
        return OfCells("cell" if where else "only", measure, where, of.experiment)

    def only(self, node: ast.Expr) -> Value:
        """A measure without saying of which cell, so there must be only one."""
        of, measure = self.of_measure(node)
        if not of.known.one_cell:
            text = node.span.written
            at = of.example if of.of_other else "L9H9"
            own = isinstance(node, ast.Name)
            cell = f"{text}({at})" if own else f"mean({text}, {at})"
            hint = f"say which: `max({text})`, `mean({text})`, or one cell, as in `{cell}`"
            raise unreadable(node.span, f"`{text}` has a value in every cell", hint)
        return OfCells("only", measure, experiment=of.experiment)

    def correlation(self, node: ast.Call, how: Literal["spearman", "pearson"]) -> Value:
        example = f"{how}(recovery, other_experiment)"
        measure = self.own_measure(node, example)
        other = self.argument(node, 1, example)
        self.no_more(node, 2, example)
        if not isinstance(other, ast.Name):
            raise unreadable(other.span, "not the name of an experiment", f"write `{example}`")
        if other.id not in self.known.experiments:
            otherwise = "name another experiment of this file"
            hint = did_you_mean(other.id, self.known.experiments, otherwise)
            found = UnknownName(span=other.span, kind="experiment", name=other.id, hint=hint)
            raise RefusedCondition(found)
        if how == "spearman" and not self.on_mean:
            name = self.argument(node, 0, example).span.written
            hint = f"write `pearson({name}, {other.id})`, which has one, or add `on mean` to "
            hint += "compare the number alone"
            raise unreadable(node.span, "a rank correlation has no interval", hint)
        return Correlation(how, measure, other.id)

    def area(self, node: ast.Call) -> Area:
        """`auc(prob, k)`: a measure, the axis of its curve, and which curve where there are
        several."""
        example = "auc(prob, k)"
        first, named = self.argument(node, 0, example), self.argument(node, 1, example)
        axes = (*self.known.axes, *self.known.aliases)
        if first.span.written in axes and named.span.written not in axes:
            exchanged = f"auc({named.span.written}, {first.span.written})"
            raise unreadable(first.span, "`auc` takes the measure first", f"write `{exchanged}`")
        measure = self.own_measure(node, example)
        axis = named.id if isinstance(named, ast.Name) else named.span.written
        axis = self.known.aliases.get(axis, axis)
        if axis not in self.known.axes:
            listed = name_list(self.known.axes)
            sweep = "sweep over something, for example `for k in 0%..100% step 5% { … }`"
            otherwise = f"its axes are: {listed}" if listed else sweep
            hint = did_you_mean(axis, self.known.axes, otherwise)
            kind = "axis of this experiment"
            raise RefusedCondition(UnknownWord(span=named.span, kind=kind, word=axis, hint=hint))
        where = self.wheres(node.arguments[2:])
        if self.known.cells is not None:
            self.curve(node, named, axis, where)
        return Area(measure, axis, where)

    def curve(
        self, node: ast.Call, named: ast.Expr, axis: str, where: Sequence[CellSelection]
    ) -> None:
        """The cells must be one curve over numbers."""
        cells = [self.known.cells[i] for i in self.find(where)] if self.known.cells else []
        if not cells:
            self.not_one(node.span, where, [])
        at = [cell.coords[axis] for cell in cells]
        word = next((value for value in at if isinstance(value, str)), None)
        if word is not None:
            reason = f"`{axis}` runs over words, such as `{word}`, and a curve over numbers"
            hint = "name an axis of numbers, or write `mean(…)` for the mean over cells"
            raise unreadable(named.span, reason, hint)
        if any(each in self.known.axes for each in self.known.open_axes):
            return
        distinct = set(at)
        if len(distinct) < 2:
            raise unreadable(
                named.span, f"`{axis}` has one value, and a curve two or more", "sweep it"
            )
        if len(distinct) < len(at):
            others = [name for name in self.known.axes if name != axis]
            sized = name_list(others) or "none"
            count = len(at) // len(distinct)
            hint = f"say which one beside it, as in `auc({node.arguments[0].value.span.written}, "
            hint += f"{axis}, {others[0] if others else axis}: …)`; the other axes are {sized}"
            raise unreadable(node.span, f"it has {count} curves over `{axis}`", hint)

    def ranking(self, node: ast.Call) -> Ranking:
        """`auroc(recovery, name_movers)`, `auroc(delta, large, L9H9)`: a measure, what says which
        cells or rows are true, and which cells are ranked, or whose rows."""
        measure = self.own_measure(node, f"auroc(recovery, {self.true_example})")
        text = node.arguments[0].value.span.written
        if len(node.arguments) < 2:
            hint = f"write `auroc({text}, {self.true_example})`"
            raise unreadable(node.span, "`auroc` is given too little", hint)
        where = self.wheres(node.arguments[2:])
        column = column_of(node.arguments[1], self)
        if column is None:
            return Ranking(measure, where, truth=true_cells(node.arguments[1], where, self))
        example = f"`auroc({text}, {column}, {self.example})`"
        if not where and not self.known.one_cell:
            hint = f"say whose rows are ranked, as in {example}"
            raise unreadable(node.span, "every cell has a value in each row", hint)
        if where and self.known.cells is not None:
            found = self.find(where)
            if len(found) > 1:
                count = "several" if self.known.open_axes else len(found)
                at = ", ".join(each.text for each in where)
                hint = f"rows are ranked in one cell: say which, as in {example}"
                raise unreadable(node.span, f"{count} cells are at {at}", hint)
            if not found:
                self.not_one(node.span, where, found)
        return Ranking(measure, where, column=column)

    def accuracy(self, node: ast.Call) -> str:
        """The run that it is of: of several blocks, on several models, that of one of them."""
        named = [each for name in WHOSE for each in node.arguments if each.name == name]
        if not named or node.arguments[0] in named or len(node.arguments) != 1 + len(named):
            return self.run(self.only_argument(node, "accuracy(clean)"))
        run = self.argument(node, 0, "accuracy(clean)")
        name = ", ".join(each.value.span.written.strip('"') for each in named)
        whose = WHOSE[named[0].name or ""]
        key = f"{run.span.written} ({name})"
        if key not in self.known.runs:
            own = [each for each in self.known.runs if each.startswith(f"{run.span.written} (")]
            if not own:
                self.run(run)  # which may be unknown
                reason, hint = f"it runs on one {whose}", "leave it out"
                raise unreadable(named[0].span, reason, hint)
            known = [each.removesuffix(")").partition(" (")[2] for each in own]
            hint = did_you_mean(name, known, f"it runs on {name_list(known)}")
            unknown = UnknownName(span=named[0].span, kind=whose, name=name, hint=hint)
            raise RefusedCondition(unknown)
        return key

    def run(self, run: ast.Expr) -> str:
        if not isinstance(run, ast.Name):
            raise unreadable(run.span, "not the name of a run", "write `accuracy(clean)`")
        found = run_called(run.id, self.known.runs)
        own = [each for each in self.known.runs if each.startswith(f"{run.id} (")]
        if found is None and own:
            first = own[0].removesuffix(")").partition(" (")[2]
            words = [w for w in WHOSE if w in self.known.axes] or ["model"]
            of = ", ".join(f"{w}: {x}" for w, x in zip(words, first.split(", "), strict=False))
            hint = f"ask it of one: `accuracy({run.id}, {of})`"
            reason = f"each {WHOSE[words[0]]} has an accuracy of its own"
            raise unreadable(run.span, reason, hint)
        if found is None:
            known = name_list(self.known.runs)
            hint = did_you_mean(run.id, self.known.runs, f"the runs are: {known}")
            raise RefusedCondition(UnknownName(span=run.span, kind="run", name=run.id, hint=hint))
        return found

    def only_argument(self, node: ast.Call, example: str) -> ast.Expr:
        self.no_more(node, 1, example)
        return self.argument(node, 0, example)

    def no_more(self, node: ast.Call, most: int, example: str) -> None:
        if len(node.arguments) > most:
            span = node.arguments[most].span
            raise unreadable(span, f"`{node.name}` is given too much", f"write `{example}`")

    def argument(self, node: ast.Call, index: int, example: str) -> ast.Expr:
        if index >= len(node.arguments):
            raise unreadable(node.span, f"`{node.name}` is given too little", f"write `{example}`")
        value = node.arguments[index].value
        if isinstance(value, ast.Site) and len(value.names) == 1 and not value.axes:
            return value.names[0]  # a lone word reads as a group of sites too
        if isinstance(value, ast.Range | ast.Quantity | ast.Site):
            raise unreadable(value.span, f"`{node.name}` can't read this", f"write `{example}`")
        return value

    # --- cells

    def cells(self, node: ast.Call) -> tuple[KnownCells, int, tuple[CellSelection, ...]]:
        """`(recovery, layer 0..3)`: whose measure, which one, then which of its cells."""
        example = f"{node.name}(recovery, layer 0..3)"
        of, measure = self.of_measure(self.argument(node, 0, example))
        where = of.wheres(node.arguments[1:])
        if where and of.known.cells is not None and not of.find(where):
            of.not_one(node.span, where, [])
        return of, measure, where

    # --- measures of other experiments

    def of_measure(self, node: ast.Expr) -> tuple[KnownCells, int]:
        """Whose measure it is, and which one of theirs.

        `recovery of ld` is this experiment's where `ld` is a measure of it, else that of an
        experiment `ld`.
        """
        if isinstance(node, ast.OfExperiment):
            other = self.of_experiment(node)
            return other, other.measure(node.measure)
        if not isinstance(node, ast.OfRef) or self.labelled(node):
            return self, self.measure(node)
        measures = self.known.measures
        if any(node.of.whole in each.names for each in measures):
            return self, self.measure(node)
        labels = [each.label for each in measures]
        other = self.other(node.of, node.of.whole, node.name, labels)
        start = node.span.start
        span = replace(node.span, end=start + len(node.name))
        return other, other.measure(ast.Name(span=span, id=node.name))

    def of_experiment(self, node: ast.OfExperiment) -> KnownCells:
        return self.other(node.experiment, node.experiment.id, node.measure.span.written)

    def other(
        self, node: ast.Node, name: str, measure: str, labels: Sequence[str] = ()
    ) -> KnownCells:
        """Another experiment of the file. labels: what could stand there too."""
        known = self.known
        if name in known.others:
            return KnownCells(known.others[name], of_other=True)
        if name in known.experiments:
            hint = "see what is said of that experiment"
            raise unreadable(node.span, f"`{name}` could not be computed", hint)
        if name == known.name:
            raise unreadable(node.span, f"`{name}` is this experiment", f"write `{measure}`")
        listed = name_list(known.experiments)
        otherwise = f"other experiments are {listed}" if listed else "the file has no other one"
        if labels:
            otherwise = f"this experiment measures {name_list(labels)}; {otherwise}"
        hint = did_you_mean(name, [*labels, *known.experiments], otherwise)
        kind = "measure or other experiment" if labels else "other experiment"
        raise RefusedCondition(UnknownName(span=node.span, kind=kind, name=name, hint=hint))

    def own_measure(self, node: ast.Call, example: str) -> int:
        """The measure that a function is given first, which has to be of this experiment."""
        of, measure = self.of_measure(self.argument(node, 0, example))
        self.must_be_own(node, of)
        return measure

    def must_be_own(self, node: ast.Call, of: KnownCells) -> None:
        if of.of_other:
            span = node.arguments[0].value.span
            hint = f"write this line in the experiment {of.whose}"
            raise unreadable(span, f"`{node.name}` reads measures of its own experiment", hint)
