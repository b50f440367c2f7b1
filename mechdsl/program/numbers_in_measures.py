"""Names in measures that stand for numbers, which may be those of a `for`."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.template import Placeholder, parse_template
from mechdsl.syntax.walk import numbers_named, walk


def names_counted(measure: spec.Measure) -> set[str]:
    """Names in sites and positions of a measure, and in what its metrics are called with: ends of
    numerals, entries of lists, placeholders of texts."""
    found = {*numbers_named(measure.metric), *numbers_named(measure.at)}
    for call in walk(measure.metric):
        if isinstance(call, ast.Call):
            found.update(name for each in call.arguments for name in names_in(each.value))
    return found


def names_in(argument: ast.Node) -> Iterator[str]:
    """Names in what a metric is called with. One alone is that of a text, or of a run."""
    for node in () if isinstance(argument, ast.Name) else walk(argument):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.String):
            for piece in parse_template(node)[0]:
                inner = piece.expr if isinstance(piece, Placeholder) else None
                yield from (part.id for part in walk(inner) if isinstance(part, ast.Name))
