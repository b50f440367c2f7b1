"""Which names an expression refers to, and in what way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from mechdsl.base.source import Span
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

Placeholders: TypeAlias = Callable[[ast.String], Sequence[ast.Expr]]
"""What stands in the braces of a text."""


@dataclass(frozen=True)
class NameUse:
    """`value`: the row's value; `item`: what a list draws; `pool`: what `from:` names; `domain`:
    the values it ranges over, as `other(x)` needs them, beside its value."""

    name: str
    how: Literal["value", "item", "pool", "domain"]
    span: Span


def uses(node: Any, placeholders: Placeholders) -> Iterator[NameUse]:
    """Every reference in an expression, in the order of the text."""
    match node:
        case ast.Name(id=name):
            yield NameUse(name, "value", node.span)
        case ast.Attribute(name=name):
            yield NameUse(name, "value", node.span)
        case ast.Index(name=name, index=index):
            yield NameUse(name, "value", node.span)
            yield from uses(index, placeholders)
        case ast.String():
            for inner in placeholders(node):
                yield from uses(inner, placeholders)
        case ast.Call(name="words"):
            return
        case ast.Call(name="list"):
            yield from _list_uses(node, placeholders)
        case ast.Call(name="shuffle", arguments=(shuffled, _)):  # the second is one of its texts
            yield from uses(shuffled.value, placeholders)
        case ast.Call(name="other" | "others", arguments=arguments):
            for n, argument in enumerate(arguments):
                if n == 0 and isinstance(argument.value, ast.Name):
                    yield NameUse(argument.value.id, "domain", argument.value.span)
                yield from uses(argument.value, placeholders)
        case ast.Node():
            for f in fields(node):
                yield from uses(getattr(node, f.name), placeholders)
        case tuple():
            for entry in node:  # pyright: ignore[reportUnknownVariableType]
                yield from uses(entry, placeholders)
        case _:
            return


def _list_uses(node: ast.Call, placeholders: Placeholders) -> Iterator[NameUse]:
    source = next((a for a in node.arguments if a.name == "from"), None)
    for n, argument in enumerate(node.arguments):
        value = argument.value
        if argument is source:
            if isinstance(value, ast.Name):
                yield NameUse(value.id, "pool", value.span)
        elif n == 0 and argument.name is None:
            drawn = [value] if isinstance(value, ast.Name) else []
            if isinstance(value, ast.String):
                drawn = list(placeholders(value))
            for inner in drawn:
                if not isinstance(inner, ast.Name):
                    yield from uses(inner, placeholders)
                elif source is None:
                    yield NameUse(inner.id, "item", inner.span)
        else:
            yield from uses(value, placeholders)


def draws(node: Any, placeholders: Placeholders) -> bool:
    """Whether an expression draws, so that the same combination can give several rows."""
    match node:
        case ast.Call(name="other" | "others" | "choice" | "shuffle"):
            return True
        case ast.Call(name="list", arguments=arguments):
            everything = len([a for a in arguments if a.name is None]) < 2
            return not everything or any(draws(a.value, placeholders) for a in arguments)
        case ast.String():
            return any(draws(inner, placeholders) for inner in placeholders(node))
        case ast.Node():
            return any(draws(getattr(node, f.name), placeholders) for f in fields(node))
        case tuple():
            return any(draws(entry, placeholders) for entry in node)  # pyright: ignore[reportUnknownVariableType]
        case _:
            return False


def calls_in(node: Any, placeholders: Placeholders) -> Iterator[ast.Call]:
    """Every call of an expression, those in the braces of texts too."""
    for part in walk(node):
        if isinstance(part, ast.Call):
            yield part
        elif isinstance(part, ast.String):
            yield from calls_in(tuple(placeholders(part)), placeholders)


def counts_tokens(node: object) -> bool:
    """Whether it is `tokens(…)`, which hangs on the model's tokenizer."""
    return isinstance(node, ast.Call) and node.name == "tokens"
