"""Reading an expectation: names bound to measures, runs and cells, or diagnostics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, mul, sub, truediv
from typing import TYPE_CHECKING, Literal, NoReturn

from mechdsl.base.names import name_list, run_called
from mechdsl.base.percent import Percent
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_statistics import WhichMeasure
from mechdsl.program import spec
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
    Statement,
    TopContains,
    Value,
)
from mechdsl.validate.known_measures import KnownMeasure, how_to_name
from mechdsl.validate.site_selections import RefusedCondition, selection, unreadable, upwards

if TYPE_CHECKING:
    from mechdsl.resolve.cell_key import CellKey

FUNCTIONS = (
    "max", "min", "mean", "abs", "auc", "accuracy", "spearman", "pearson", "argmax", "argmin",
)  # fmt: skip
"""What an expectation calculates with."""


@dataclass(frozen=True)
class Known:
    """What an experiment has that an expectation may name."""

    measures: Sequence[KnownMeasure]
    axes: Sequence[str] = ()
    runs: Sequence[str] = ()
    """Where the prompts have no answer, so that none has an accuracy, E0516 says so."""
    experiments: Sequence[str] = ()
    """The others of the file."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes."""
    cells: Sequence[CellKey] | None = None
    """None as long as they aren't known."""
    perhaps: Collection[str] = ()
    """Axes that the experiment may not have: it isn't known either."""
    open_axes: Collection[str] = ()
    """Axes of which a cell may have any value, for it isn't known yet."""

    @property
    def one_cell(self) -> bool:
        """Whether there is one cell, as far as is known."""
        if self.cells is not None and not self.open_axes:
            return len(self.cells) == 1
        return all(axis in self.perhaps for axis in self.axes)


def check_expectation(expectation: spec.Expectation, known: Known) -> list[Diagnostic]:
    """What is wrong with an expectation, before anything is run: E0108, E02xx, E0605, E0606."""
    return read_expectation(expectation, known)[1]


def read_expectation(
    expectation: spec.Expectation, known: Known
) -> tuple[Statement | None, list[Diagnostic]]:
    """The condition with its names bound, or None and why not."""
    reader = _ConditionReader(known)
    try:
        if expectation.condition is None:
            return reader.top(expectation), []
        return reader.condition(expectation.condition), []
    except RefusedCondition as refusal:
        return None, [refusal.diagnostic]


def _squeezed(text: str) -> str:
    return "".join(text.split())


_ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}


def _joined(operator: Literal["+", "-", "*", "/"], left: Value, right: Value) -> Value:
    """Plain numbers are calculated at once."""
    if isinstance(left, Constant) and isinstance(right, Constant):
        return Constant(_ARITHMETIC[operator](left.value, right.value))
    return Arithmetic(operator, left, right)


class _ConditionReader:
    def __init__(self, known: Known) -> None:
        self.known = known

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
                return InBand(self.value(node.value), middle - tolerance, middle + tolerance)
            case ast.InRange():
                if not isinstance(node.within, ast.Range):
                    raise unreadable(
                        node.within.span, "not a range", "write both ends: `in 0.2..0.4`"
                    )
                low, high = self.constant(node.within.low), self.constant(node.within.high)
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
                measure, where = self.cells(best)
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
            case ast.Name() | ast.OfRef():
                return self.only(node)
            case _:
                raise unreadable(node.span, "not a number", "compare an effect with a number")

    def call(self, node: ast.Call) -> Value:
        match node.name:
            case "max" | "min" | "mean":
                measure, where = self.cells(node)
                return OfCells(node.name, measure, where)
            case "accuracy":
                return Accuracy(self.run(self.only_argument(node, "accuracy(clean)")))
            case "spearman" | "pearson":
                return self.correlation(node, node.name)
            case "abs":
                return Absolute(self.value(self.only_argument(node, "abs(max(recovery))")))
            case "argmax" | "argmin":
                hint = f"write `{node.name}(…) = L9H9`"
                raise unreadable(node.span, f"`{node.name}` is a site, not a number", hint)
            case "auc":
                return self.area(node)
            case _:
                measure = self.measure(ast.Name(span=node.span, id=node.name), called=True)
                where = self.wheres(node.arguments)
                if where and self.known.cells is not None and len(self.find(where)) != 1:
                    self.not_one(node.span, where, self.find(where))
                return OfCells("cell" if where else "only", measure, where)

    def only(self, node: ast.Expr) -> Value:
        """A measure without saying of which cell, so there must be only one."""
        measure = self.measure(node)
        if not self.known.one_cell:
            text = node.span.written
            cell = f"{text}(L9H9)" if isinstance(node, ast.Name) else f"mean({text}, L9H9)"
            hint = f"say which: `max({text})`, `mean({text})`, or one cell, as in `{cell}`"
            raise unreadable(node.span, f"`{text}` has a value in every cell", hint)
        return OfCells("only", measure)

    def correlation(self, node: ast.Call, how: Literal["spearman", "pearson"]) -> Value:
        example = f"{how}(recovery, other_experiment)"
        measure = self.measure(self.argument(node, 0, example))
        other = self.argument(node, 1, example)
        self.no_more(node, 2, example)
        if not isinstance(other, ast.Name):
            raise unreadable(other.span, "not the name of an experiment", f"write `{example}`")
        if other.id not in self.known.experiments:
            otherwise = "name another experiment of this file"
            hint = did_you_mean(other.id, self.known.experiments, otherwise)
            found = UnknownName(span=other.span, kind="experiment", name=other.id, hint=hint)
            raise RefusedCondition(found)
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
        measure = self.measure(first)
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

    def run(self, run: ast.Expr) -> str:
        if not isinstance(run, ast.Name):
            raise unreadable(run.span, "not the name of a run", "write `accuracy(clean)`")
        found = run_called(run.id, self.known.runs)
        if found is None:
            known = name_list(self.known.runs)
            hint = did_you_mean(run.id, self.known.runs, f"the runs are: {known}")
            raise RefusedCondition(UnknownName(span=run.span, kind="run", name=run.id, hint=hint))
        return found

    def constant(self, node: ast.Expr) -> float:
        """A number, also one with a sign or written as a sum."""
        match node:
            case ast.Number():
                return float(node.value)
            case ast.Percent():
                return node.value / 100
            case ast.Negative():
                return -self.constant(node.operand)
            case _:
                raise unreadable(node.span, "not a plain number", "write the number itself")

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

    # --- measures

    def labelled(self, node: ast.Expr) -> list[int]:
        """Measures whose metric is written exactly so."""
        text = _squeezed(node.span.written)
        measures = self.known.measures
        return [i for i, m in enumerate(measures) if text in map(_squeezed, m.names)]

    def measure(self, node: ast.Expr, *, called: bool = False) -> int:
        """The one measure that a name, `recovery of ld` or a metric as written means.

        called: arguments stand behind it, so that it may have been meant as a function.
        """
        measures = self.known.measures
        text = node.span.written
        found = self.labelled(node)
        if not found and isinstance(node, ast.Name):
            text = node.id
            found = [i for i, m in enumerate(measures) if node.id in (m.effect, *m.names)]
            numbers = [i for i in found if measures[i].kind == "number"]
            found = numbers or found
            # `prob` is short for the one `prob(answer)`.
            found = found or [
                i
                for i, m in enumerate(measures)
                if m.word == node.id and not m.metric.isidentifier()
            ]
        elif not found and isinstance(node, ast.OfRef):
            found = [
                i
                for i, m in enumerate(measures)
                if m.effect == node.name and node.of.name in m.names
            ]
        if not found:
            words = {m.effect: None for m in measures} | {m.metric: None for m in measures}
            listed = "this experiment measures " + name_list(words)
            hint = did_you_mean(text, [*words, *(FUNCTIONS if called else ())], listed)
            kind = "measure or effect of this experiment"
            raise RefusedCondition(UnknownWord(span=node.span, kind=kind, word=text, hint=hint))
        if len(found) > 1:
            raise RefusedCondition(self.which(node.span, text, found, how_to_name(measures, found)))
        if measures[found[0]].kind == "category":
            hint = "categories have no mean; `correct` or `expected(1..9)` are numbers"
            raise unreadable(node.span, f"`{measures[found[0]].label}` is a category", hint)
        return found[0]

    def which(self, span: Span, text: str, found: Sequence[int], hint: str) -> WhichMeasure:
        named = [self.known.measures[i] for i in found]
        count = Counter(f"`{each.effect} of {each.label}`" for each in named)
        candidates = " or ".join(
            f"{name} ({n} times)" if n > 1 else name for name, n in count.items()
        )
        return WhichMeasure(
            span=span, text=text, count=len(found), candidates=candidates, hint=hint
        )

    # --- cells

    def cells(self, node: ast.Call) -> tuple[int, tuple[CellSelection, ...]]:
        """`(recovery, layer 0..3)`: a measure, then which of its cells."""
        example = f"{node.name}(recovery, layer 0..3)"
        measure = self.measure(self.argument(node, 0, example))
        where = self.wheres(node.arguments[1:])
        if where and self.known.cells is not None and not self.find(where):
            self.not_one(node.span, where, [])
        return measure, where

    def find(self, where: Sequence[CellSelection]) -> list[int]:
        """The cells that are meant, once each where they differ in nothing that is known."""
        cells, unknown = self.known.cells or (), self.known.open_axes
        found: dict[object, int] = {}
        for i, cell in enumerate(cells):
            if all(each.matches(cell, unknown) for each in where):
                apart = tuple(v for axis, v in cell.coords.items() if axis not in unknown)
                found.setdefault(apart if unknown else i, i)
        return list(found.values())

    def not_one(self, span: Span, where: Sequence[CellSelection], found: Sequence[int]) -> NoReturn:
        text = ", ".join(each.text for each in where)
        if not found:
            axes = name_list(self.known.axes) or "none"
            hint = f"name a cell of this experiment; its axes are {axes}"
            raise unreadable(span, f"no cell is at {text}", hint)
        example = '`position: "last token"` beside it, or `max(…)` over them'
        count = "several" if self.known.open_axes else len(found)
        raise unreadable(span, f"{count} cells are at {text}", f"say which with {example}")

    def one_of(
        self, site: ast.Expr | ast.Site, among: Sequence[CellSelection] = ()
    ) -> CellSelection:
        """A site that one of these cells has; of no cell, nothing would ever be found true."""
        own = selection(site)
        where = (own, *among)
        if self.known.cells is not None and not self.find(where):
            self.not_one(site.span, where, [])
        return own

    def wheres(self, arguments: Sequence[ast.Argument]) -> tuple[CellSelection, ...]:
        return tuple(
            selection(argument.value)
            if argument.name is None
            else self.named(argument.name, argument)
            for argument in arguments
        )

    def named(self, axis: str, argument: ast.Argument) -> CellSelection:
        """`position: "last token"`, `layer: 2`."""
        number, axis = axis, self.known.aliases.get(axis, axis)  # `item: 3` is a number
        if axis not in self.known.axes:
            listed = name_list(self.known.axes) or "none"
            hint = did_you_mean(axis, self.known.axes, f"its axes are: {listed}")
            kind = "axis of this experiment"
            raise RefusedCondition(UnknownWord(span=argument.span, kind=kind, word=axis, hint=hint))
        value = argument.value
        text = argument.span.written
        match value:
            case ast.String():
                self.label(value, axis)
                return CellSelection(text, {axis: ((value.value, value.value),)})
            case ast.Range():
                ends = upwards(self.end(value.low), self.end(value.high), value.span)
                return CellSelection(text, {number: ends})
            case ast.Number() | ast.Percent():
                return CellSelection(text, {number: ((self.end(value), self.end(value)),)})
            case _:
                hint = f'write `{axis}: 2`, `{axis}: 2..4` or `{axis}: "…"`'
                if isinstance(value, ast.Name):
                    hint = f'write words in quotes: `{axis}: "{value.id}"`'
                raise unreadable(argument.span, "not a value of an axis", hint)

    def label(self, value: ast.String, axis: str) -> None:
        """E0203 for a word that an axis doesn't have, as far as its values are known."""
        if self.known.cells is None or axis in self.known.open_axes:
            return
        found = (cell.coords[axis] for cell in self.known.cells if axis in cell.coords)
        labels = list(dict.fromkeys(map(str, found)))
        if labels and value.value not in labels:
            listed = f"it has {name_list(labels)}"
            hint = did_you_mean(value.value, labels, listed)
            kind = f"`{axis}` in this experiment"
            raise RefusedCondition(
                UnknownWord(span=value.span, kind=kind, word=value.value, hint=hint)
            )

    def end(self, node: ast.Expr) -> float:
        """An end of a range of cells: `50%` is 50 on an axis, as its cells say it."""
        return Percent(node.value) if isinstance(node, ast.Percent) else self.constant(node)
