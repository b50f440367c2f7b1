"""Reading names of measures and cells of one experiment, as expectations write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NoReturn

from mechdsl.base.names import name_list
from mechdsl.base.percent import Percent
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_statistics import WhichMeasure
from mechdsl.resolve.resolved import Label
from mechdsl.syntax import ast
from mechdsl.validate.conditions import CellSelection
from mechdsl.validate.known import Known
from mechdsl.validate.known_measures import how_to_name
from mechdsl.validate.site_selections import RefusedCondition, selection, unreadable, upwards

FUNCTIONS = (
    "max", "min", "mean", "abs", "auc", "auroc", "accuracy", "spearman", "pearson", "argmax",
    "argmin",
)  # fmt: skip
"""What an expectation calculates with."""


def _written(axis: str, value: Label) -> str:
    """How a value of an axis is named: `layer: 2`, `position: "last token"`."""
    return f'{axis}: "{value}"' if isinstance(value, str) else f"{axis}: {value}"


def _squeezed(text: str) -> str:
    return "".join(text.split())


class KnownCells:
    """Reads measures and cells of one experiment: of the one that expects, or of another one."""

    def __init__(self, known: Known, *, of_other: bool = False) -> None:
        self.known = known
        self.of_other = of_other
        self.whose = f"`{known.name}`" if of_other else "this experiment"

    @property
    def experiment(self) -> str | None:
        """The name of another experiment; None is the one that expects."""
        return self.known.name if self.of_other else None

    @property
    def example(self) -> str:
        """How one of its cells is named."""
        if not self.known.cells or self.known.open_axes:
            return "L9H9"
        return ", ".join(_written(axis, at) for axis, at in self.known.cells[0].coords.items())

    @property
    def true_example(self) -> str:
        """What may be true in `auroc(measure, …)`: a group, else a site."""
        if self.known.groups:
            return next(iter(self.known.groups))
        cells = () if self.known.open_axes else self.known.cells or ()
        return f"[{cells[0].site}]" if len(cells) > 1 else "[L9H9]"

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
            listed = f"{self.whose} measures {name_list(words)}"
            short = [m.word for m in measures if m.word]
            hint = did_you_mean(text, [*words, *short, *(FUNCTIONS if called else ())], listed)
            kind = f"measure or effect of {self.whose}"
            raise RefusedCondition(UnknownWord(span=node.span, kind=kind, word=text, hint=hint))
        if len(found) > 1:
            end = f" of {self.known.name}" if self.of_other else ""
            hint = how_to_name(measures, found, end)
            raise RefusedCondition(self.which(node.span, text, found, hint))
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
            hint = f"name a cell of {self.whose}; its axes are {axes}"
            raise unreadable(span, f"no cell is at {text}", hint)
        count = "several" if self.known.open_axes else len(found)
        example = f"say which with `{self._apart(found)}` beside it, or `max(…)` over them"
        raise unreadable(span, f"{count} cells are at {text}", example)

    def _apart(self, found: Sequence[int]) -> str:
        """What tells one of these cells from another."""
        cells = self.known.cells or ()
        coords = [cells[number].coords for number in found]
        for axis, value in coords[0].items():
            if axis not in self.known.open_axes and any(at.get(axis) != value for at in coords):
                return _written(axis, value)
        return _written("position", "last token")

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
            kind = f"axis of {self.whose}"
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
            case (
                ast.Number()
                | ast.Percent()
                | ast.Negative(operand=ast.Number())
                | ast.Negative(operand=ast.Percent())
            ):
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
            kind = f"`{axis}` in {self.whose}"
            raise RefusedCondition(
                UnknownWord(span=value.span, kind=kind, word=value.value, hint=hint)
            )

    def end(self, node: ast.Expr) -> float:
        """An end of a range of cells: `50%` is 50 on an axis, as its cells say it."""
        match node:
            case ast.Percent():
                return Percent(node.value)
            case ast.Negative(operand=ast.Percent(value=value)):
                return Percent(-value)
            case _:
                return self.constant(node)

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
