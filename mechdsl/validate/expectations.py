"""Reading an expectation: names bound to measures, runs and cells, or diagnostics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn

from mechdsl.base.percent import Percent
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import UnknownName, UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_statistics import UnreadableExpectation, WhichMeasure
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
    full_component,
)
from mechdsl.vocab.sites import SHORT_WORDS, SITES, unknown_component

if TYPE_CHECKING:
    from mechdsl.resolve.cell_key import CellKey

Number = int | float | str
FUNCTIONS = (
    "max", "min", "mean", "abs", "auc", "accuracy", "spearman", "pearson", "argmax", "argmin",
)  # fmt: skip
"""What an expectation calculates with."""


@dataclass(frozen=True)
class KnownMeasure:
    """A measure as far as an expectation can name it."""

    label: str
    effect: str
    kind: Literal["number", "category"] = "number"
    word: str = ""
    """`prob` of `prob(answer)`: the metric that it is, empty where it is more than one."""


@dataclass(frozen=True)
class Known:
    """What an experiment has that an expectation may name."""

    measures: Sequence[KnownMeasure]
    axes: Sequence[str] = ()
    runs: Sequence[str] = ()
    """Those with an answer, so with an accuracy."""
    experiments: Sequence[str] = ()
    """The others of the file."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes."""
    cells: Sequence[CellKey] | None = None
    """None as long as they aren't known."""
    perhaps: Collection[str] = ()
    """Axes that the experiment may not have: it isn't known either."""

    @property
    def one_cell(self) -> bool:
        """Whether there is one cell, as far as is known."""
        if self.cells is not None:
            return len(self.cells) == 1
        return all(axis in self.perhaps for axis in self.axes)


class _RefusedCondition(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


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
    except _RefusedCondition as refusal:
        return None, [refusal.diagnostic]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _unreadable(span: Span, reason: str, hint: str) -> NoReturn:
    raise _RefusedCondition(UnreadableExpectation(span=span, reason=reason, hint=hint))


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
                    _unreadable(node.within.span, "not a range", "write both ends: `in 0.2..0.4`")
                low, high = self.constant(node.within.low), self.constant(node.within.high)
                return InBand(self.value(node.value), low, high)
            case _:
                _unreadable(
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
                    _unreadable(
                        node.span, f"`{how}` is a site, not a number", f"write `{how}(…) = L9H9`"
                    )
                measure, where = self.cells(best)
                return BestIs(how, measure, where, self.one_of(site, where), operator == "=")
        return Comparison(operator, self.value(left), self.value(right))

    def top(self, expectation: spec.Expectation) -> TopContains:
        span = expectation.span
        if expectation.top is None:
            _unreadable(span, "it says nothing", "write a condition, or `top 3 contains L9H9`")
        numbers = [i for i, each in enumerate(self.known.measures) if each.kind == "number"]
        if len(numbers) > 1:
            hint = "`contains` can't name one: give the other measures an experiment of their own"
            raise _RefusedCondition(self.which(span, f"top {expectation.top}", numbers, hint))
        if not numbers:
            _unreadable(span, "no measure is a number", "categories have no order")
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
                return Arithmetic("-", Constant(0.0), self.value(node.operand))
            case ast.Binary():
                return Arithmetic(node.operator, self.value(node.left), self.value(node.right))
            case ast.Call():
                return self.call(node)
            case ast.Name() | ast.OfRef():
                return self.only(node)
            case _:
                _unreadable(node.span, "not a number", "compare an effect with a number")

    def call(self, node: ast.Call) -> Value:
        match node.name:
            case "max" | "min" | "mean":
                measure, where = self.cells(node)
                return OfCells(node.name, measure, where)
            case "accuracy":
                return Accuracy(self.run(node))
            case "spearman" | "pearson":
                return self.correlation(node, node.name)
            case "abs":
                return Absolute(self.value(self.argument(node, 0, "abs(max(recovery))")))
            case "argmax" | "argmin":
                hint = f"write `{node.name}(…) = L9H9`"
                _unreadable(node.span, f"`{node.name}` is a site, not a number", hint)
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
            _unreadable(node.span, f"`{text}` has a value in every cell", hint)
        return OfCells("only", measure)

    def correlation(self, node: ast.Call, how: Literal["spearman", "pearson"]) -> Value:
        example = f"{how}(recovery, other_experiment)"
        measure = self.measure(self.argument(node, 0, example))
        other = self.argument(node, 1, example)
        if not isinstance(other, ast.Name):
            _unreadable(other.span, "not the name of an experiment", f"write `{example}`")
        if other.id not in self.known.experiments:
            otherwise = "name another experiment of this file"
            hint = did_you_mean(other.id, self.known.experiments, otherwise)
            found = UnknownName(span=other.span, kind="experiment", name=other.id, hint=hint)
            raise _RefusedCondition(found)
        return Correlation(how, measure, other.id)

    def area(self, node: ast.Call) -> Area:
        """`auc(prob, k)`: a measure, the axis of its curve, and which curve where there are
        several."""
        example = "auc(prob, k)"
        first, named = self.argument(node, 0, example), self.argument(node, 1, example)
        axes = (*self.known.axes, *self.known.aliases)
        if first.span.written in axes and named.span.written not in axes:
            exchanged = f"auc({named.span.written}, {first.span.written})"
            _unreadable(first.span, "`auc` takes the measure first", f"write `{exchanged}`")
        measure = self.measure(first)
        axis = named.id if isinstance(named, ast.Name) else named.span.written
        axis = self.known.aliases.get(axis, axis)
        if axis not in self.known.axes:
            listed = ", ".join(f"`{each}`" for each in self.known.axes)
            sweep = "sweep over something, for example `for k in 0%..100% step 5% { … }`"
            otherwise = f"its axes are: {listed}" if listed else sweep
            hint = did_you_mean(axis, self.known.axes, otherwise)
            kind = "axis of this experiment"
            raise _RefusedCondition(UnknownWord(span=named.span, kind=kind, word=axis, hint=hint))
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
            _unreadable(named.span, reason, hint)
        distinct = set(at)
        if len(distinct) < 2:
            _unreadable(named.span, f"`{axis}` has one value, and a curve two or more", "sweep it")
        if len(distinct) < len(at):
            others = [name for name in self.known.axes if name != axis]
            sized = ", ".join(f"`{name}`" for name in others) or "none"
            count = len(at) // len(distinct)
            hint = f"say which one beside it, as in `auc({node.arguments[0].value.span.written}, "
            hint += f"{axis}, {others[0] if others else axis}: …)`; the other axes are {sized}"
            _unreadable(node.span, f"it has {count} curves over `{axis}`", hint)

    def run(self, node: ast.Call) -> str:
        run = self.argument(node, 0, "accuracy(clean)")
        if not isinstance(run, ast.Name):
            _unreadable(run.span, "not the name of a run", "write `accuracy(clean)`")
        if run.id not in self.known.runs:
            known = ", ".join(f"`{each}`" for each in self.known.runs) or "none with an answer"
            hint = did_you_mean(run.id, self.known.runs, f"the runs are: {known}")
            raise _RefusedCondition(UnknownName(span=run.span, kind="run", name=run.id, hint=hint))
        return run.id

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
                _unreadable(node.span, "not a plain number", "write the number itself")

    def argument(self, node: ast.Call, index: int, example: str) -> ast.Expr:
        if index >= len(node.arguments):
            _unreadable(node.span, f"`{node.name}` is given too little", f"write `{example}`")
        value = node.arguments[index].value
        if isinstance(value, ast.Site) and len(value.names) == 1 and not value.axes:
            return value.names[0]  # a lone word reads as a group of sites too
        if isinstance(value, ast.Range | ast.Quantity | ast.Site):
            _unreadable(value.span, f"`{node.name}` can't read this", f"write `{example}`")
        return value

    # --- measures

    def labelled(self, node: ast.Expr) -> list[int]:
        """Measures whose metric is written exactly so."""
        text = _squeezed(node.span.text)
        return [i for i, m in enumerate(self.known.measures) if _squeezed(m.label) == text]

    def measure(self, node: ast.Expr, *, called: bool = False) -> int:
        """The one measure that a name, `recovery of ld` or a metric as written means.

        called: arguments stand behind it, so that it may have been meant as a function.
        """
        measures = self.known.measures
        text = node.span.written
        found = self.labelled(node)
        if not found and isinstance(node, ast.Name):
            text = node.id
            found = [i for i, m in enumerate(measures) if node.id in (m.effect, m.label)]
            numbers = [i for i in found if measures[i].kind == "number"]
            found = numbers or found
            # `prob` is short for the one `prob(answer)`.
            found = found or [
                i
                for i, m in enumerate(measures)
                if m.word == node.id and not m.label.isidentifier()
            ]
        elif not found and isinstance(node, ast.OfRef):
            found = [
                i
                for i, m in enumerate(measures)
                if m.effect == node.name and m.label == node.of.name
            ]
        if not found:
            words = {m.effect: None for m in measures} | {m.label: None for m in measures}
            listed = "this experiment measures " + ", ".join(f"`{word}`" for word in words)
            hint = did_you_mean(text, [*words, *(FUNCTIONS if called else ())], listed)
            kind = "measure or effect of this experiment"
            raise _RefusedCondition(UnknownWord(span=node.span, kind=kind, word=text, hint=hint))
        if len(found) > 1:
            first = measures[found[0]]
            hint = f"name one, as in `{first.effect} of {first.label}`"
            if not first.label.isidentifier():
                hint = f"give each a name above (`metric ld = …`), then `{first.effect} of ld`"
            raise _RefusedCondition(self.which(node.span, text, found, hint))
        if measures[found[0]].kind == "category":
            hint = "categories have no mean; `correct` or `expected(1..9)` are numbers"
            _unreadable(node.span, f"`{measures[found[0]].label}` is a category", hint)
        return found[0]

    def which(self, span: Span, text: str, found: Sequence[int], hint: str) -> WhichMeasure:
        candidates = " or ".join(
            f"`{self.known.measures[i].effect} of {self.known.measures[i].label}`" for i in found
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
        cells = self.known.cells or ()
        return [i for i, cell in enumerate(cells) if all(each.matches(cell) for each in where)]

    def not_one(self, span: Span, where: Sequence[CellSelection], found: Sequence[int]) -> NoReturn:
        text = ", ".join(each.text for each in where)
        if not found:
            axes = ", ".join(f"`{axis}`" for axis in self.known.axes) or "none"
            hint = f"name a cell of this experiment; its axes are {axes}"
            _unreadable(span, f"no cell is at {text}", hint)
        example = '`position: "last token"` beside it, or `max(…)` over them'
        _unreadable(span, f"{len(found)} cells are at {text}", f"say which with {example}")

    def one_of(
        self, site: ast.Expr | ast.Site, among: Sequence[CellSelection] = ()
    ) -> CellSelection:
        """A site that one of these cells has; of no cell, nothing would ever be found true."""
        selection = self.where(site)
        where = (selection, *among)
        if self.known.cells is not None and not self.find(where):
            self.not_one(site.span, where, [])
        return selection

    def wheres(self, arguments: Sequence[ast.Argument]) -> tuple[CellSelection, ...]:
        return tuple(
            self.where(argument.value)
            if argument.name is None
            else self.named(argument.name, argument)
            for argument in arguments
        )

    def named(self, axis: str, argument: ast.Argument) -> CellSelection:
        """`position: "last token"`, `layer: 2`."""
        number, axis = axis, self.known.aliases.get(axis, axis)  # `item: 3` is a number
        if axis not in self.known.axes:
            listed = ", ".join(f"`{each}`" for each in self.known.axes) or "none"
            hint = did_you_mean(axis, self.known.axes, f"its axes are: {listed}")
            kind = "axis of this experiment"
            raise _RefusedCondition(
                UnknownWord(span=argument.span, kind=kind, word=axis, hint=hint)
            )
        value = argument.value
        text = argument.span.written
        match value:
            case ast.String():
                return CellSelection(text, {axis: ((value.value, value.value),)})
            case ast.Range():
                return CellSelection(text, {number: ((self.end(value.low), self.end(value.high)),)})
            case ast.Number() | ast.Percent():
                return CellSelection(text, {number: ((self.end(value), self.end(value)),)})
            case _:
                hint = f'write `{axis}: 2`, `{axis}: 2..4` or `{axis}: "…"`'
                if isinstance(value, ast.Name):
                    hint = f'write words in quotes: `{axis}: "{value.id}"`'
                _unreadable(argument.span, "not a value of an axis", hint)

    def end(self, node: ast.Expr) -> float:
        """An end of a range of cells: `50%` is 50 on an axis, as its cells say it."""
        return Percent(node.value) if isinstance(node, ast.Percent) else self.constant(node)

    def where(self, node: ast.Expr | ast.Range | ast.Quantity | ast.Site) -> CellSelection:
        """A site as a filter of cells."""
        text = node.span.written
        hint = "write a site such as `L9H9` or `L3.resid`"
        if isinstance(node, ast.ShortSite):
            return self.short(node, text)
        if isinstance(node, ast.Name):
            node = ast.Site(names=(node,), span=node.span)
        if not isinstance(node, ast.Site):
            _unreadable(node.span, f"`{text}` is not a site", hint)
        if node.short is not None:
            return self.short(node.short, text)
        if node.ranked is not None or node.basis is not None or len(node.names) > 1:
            _unreadable(node.span, f"`{text}` is not a plain site", hint)
        ranges = {axis.word: self.axis(axis) for axis in node.axes}
        component = self.component(node.names[0].id, node.names[0].span) if node.names else None
        return CellSelection(text, {word: each for word, each in ranges.items() if each}, component)

    def component(self, name: str, span: Span) -> str:
        """The full name of a component that there is."""
        found = full_component(name)
        if found not in SITES:
            raise _RefusedCondition(unknown_component(name, span, SHORT_WORDS))
        return found

    def axis(self, axis: ast.Axis) -> tuple[tuple[Number, Number], ...]:
        """The ranges of an axis; none for `*`."""
        found: list[tuple[Number, Number]] = []
        for value in axis.values:
            if isinstance(value, ast.Star):
                return ()
            low = self.bound(value.low)
            found.append((low, low if value.high is None else self.bound(value.high)))
        return tuple(found)

    def bound(self, bound: ast.Bound) -> int:
        if bound.value is None or bound.value < 0:
            text = bound.span.text
            _unreadable(bound.span, f"`{text}` is not an index", "write the number, from 0")
        return bound.value

    def short(self, node: ast.ShortSite, text: str) -> CellSelection:
        ranges: dict[str, tuple[tuple[Number, Number], ...]] = {
            "layer": ((node.layer, node.layer),)
        }
        if node.unit is not None and node.index is not None:
            ranges["head" if node.unit == "H" else "neuron"] = ((node.index, node.index),)
        component = self.component(node.component, node.span) if node.component else None
        return CellSelection(text, ranges, component)
