"""Walking and rewriting syntax trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from mechdsl.syntax import ast

N = TypeVar("N", bound=ast.Node)


def walk(node: Any) -> Iterator[ast.Node]:
    """The node and everything below it, in the order of the text."""
    if isinstance(node, ast.Node):
        yield node
        for f in fields(node):
            yield from walk(getattr(node, f.name))
    elif isinstance(node, tuple):
        for item in node:  # pyright: ignore[reportUnknownVariableType]
            yield from walk(item)


def rewrite(node: N, change: Callable[[ast.Node], ast.Node]) -> N:
    """The tree with `change` applied to every node, from the leaves up."""

    def visit(value: Any) -> Any:
        if isinstance(value, ast.Node):
            return rewrite(value, change)
        if isinstance(value, tuple):
            return tuple(visit(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
        return value

    changed = {f.name: visit(getattr(node, f.name)) for f in fields(node) if f.name != "span"}
    return change(replace(node, **changed))  # type: ignore[return-value]
