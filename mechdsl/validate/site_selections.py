"""A site in an expectation: which cells it means."""

from __future__ import annotations

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import EmptyRange
from mechdsl.diagnostics.e06_statistics import UnreadableExpectation
from mechdsl.syntax import ast
from mechdsl.validate.conditions import CellSelection, full_component
from mechdsl.vocab.sites import SHORT_WORDS, SITES, unknown_component

Number = int | float | str
Ranges = tuple[tuple[Number, Number], ...]


class RefusedCondition(Exception):
    """Why an expectation can't be read."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


def unreadable(span: Span, reason: str, hint: str) -> RefusedCondition:
    """E0606."""
    return RefusedCondition(UnreadableExpectation(span=span, reason=reason, hint=hint))


def selection(node: ast.Expr | ast.Range | ast.Quantity | ast.Site) -> CellSelection:
    """A site as a filter of cells. Raises RefusedCondition with E0203, E0321 or E0606."""
    text = node.span.written
    hint = "write a site such as `L9H9` or `L3.resid`"
    if isinstance(node, ast.ShortSite):
        return _short(node, text)
    if isinstance(node, ast.String):
        hint += f", or the value of an axis: `position: {text}`"
    if isinstance(node, ast.EdgeTokenOf):
        hint = f'a position is a value of its axis, in quotes: `position: "{text}"`'
    if isinstance(node, ast.Name):
        node = ast.Site(names=(node,), span=node.span)
    if not isinstance(node, ast.Site):
        raise unreadable(node.span, f"`{text}` is not a site", hint)
    if node.short is not None:
        return _short(node.short, text)
    if node.ranked is not None or node.basis is not None or len(node.names) > 1:
        raise unreadable(node.span, f"`{text}` is not a plain site", hint)
    ranges = {axis.word: _axis(axis) for axis in node.axes}
    component = _component(node.names[0].id, node.names[0].span) if node.names else None
    return CellSelection(text, {word: each for word, each in ranges.items() if each}, component)


def upwards(low: Number, high: Number, span: Span) -> tuple[tuple[Number, Number]]:
    """A range of an axis; E0321 where it holds nothing."""
    if isinstance(low, int | float) and isinstance(high, int | float) and high < low:
        found = EmptyRange(span=span, text=span.written, low=f"{high:g}", high=f"{low:g}")
        raise RefusedCondition(found)
    return ((low, high),)


def _component(name: str, span: Span) -> str:
    """The full name of a component that there is."""
    found = full_component(name)
    if found not in SITES:
        raise RefusedCondition(unknown_component(name, span, SHORT_WORDS))
    return found


def _axis(axis: ast.Axis) -> Ranges:
    """The ranges of an axis; none for `*`."""
    found: list[tuple[Number, Number]] = []
    for value in axis.values:
        if isinstance(value, ast.Star):
            return ()
        low = _bound(value.low)
        found += upwards(low, low if value.high is None else _bound(value.high), value.span)
    return tuple(found)


def _bound(bound: ast.Bound) -> int:
    if bound.value is None or bound.value < 0:
        text = bound.span.text
        raise unreadable(bound.span, f"`{text}` is not an index", "write the number, from 0")
    return bound.value


def _short(node: ast.ShortSite, text: str) -> CellSelection:
    ranges: dict[str, Ranges] = {"layer": ((node.layer, node.layer),)}
    if node.unit is not None and node.index is not None:
        ranges["head" if node.unit == "H" else "neuron"] = ((node.index, node.index),)
    component = _component(node.component, node.span) if node.component else None
    return CellSelection(text, ranges, component)
