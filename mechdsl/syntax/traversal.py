"""Functions that traverse, measure and rewrite syntax trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar

from mechdsl.syntax import ast

NodeT = TypeVar("NodeT", bound=ast.Node)

_BELOW = "_below"
"""The attribute in which a node caches its descendants."""


@cache
def field_names(kind: type[ast.Node]) -> tuple[str, ...]:
    """Return the fields of a node type that may hold nodes, in source order."""
    return tuple(f.name for f in fields(kind) if f.name != "span")


def walk(node: Any) -> Iterator[ast.Node]:
    """Yield the node and all its descendants, in source order."""
    if isinstance(node, ast.Node):
        yield node
        yield from _below(node)
    elif isinstance(node, tuple):
        for item in node:  # pyright: ignore[reportUnknownVariableType]
            yield from walk(item)


def _below(node: ast.Node) -> tuple[ast.Node, ...]:
    """Return all descendants of a node, cached on the node: many checks traverse the same trees.

    The node itself is excluded, because a reference cycle would never be freed while garbage
    collection is disabled.
    """
    stored: tuple[ast.Node, ...] | None = node.__dict__.get(_BELOW)
    if stored is None:
        nodes: list[ast.Node] = []
        left: list[Any] = [getattr(node, name) for name in reversed(field_names(type(node)))]
        while left:
            item = left.pop()
            if isinstance(item, ast.Node):
                nodes.append(item)
                left.extend([getattr(item, name) for name in reversed(field_names(type(item)))])
            elif isinstance(item, tuple):
                left.extend(reversed(item))  # pyright: ignore[reportUnknownArgumentType]
        stored = node.__dict__[_BELOW] = tuple(nodes)
    return stored


def number_names(node: Any) -> Iterator[str]:
    """Yield the names used as numbers (from a `for` or a `param`) in sites, positions and members
    of directions, including the name after `top n of`, which may come from a `for`."""
    for part in walk(node):
        match part:
            case ast.Bound(name=str(name)) | ast.Variable(name=name):
                yield name
            case ast.RankedSelection():  # `of` may name the variable of a `for` over experiments
                yield from (part.amount, part.of) if isinstance(part.amount, str) else (part.of,)
                yield from (a.value.id for a in part.cell if isinstance(a.value, ast.Name))
            case ast.Coordinate(value=str(name)) | ast.Axis(window=str(name)):
                yield name
            case _:
                pass


def depth(node: ast.Node) -> int:
    """Return the maximum nesting depth of a node."""
    deepest = 0
    left: list[tuple[Any, int]] = [(node, 0)]
    while left:
        item, above = left.pop()
        if isinstance(item, ast.Node):
            deepest = max(deepest, above + 1)
            left.extend((getattr(item, name), above + 1) for name in field_names(type(item)))
        elif isinstance(item, tuple):
            left.extend((each, above) for each in item)  # pyright: ignore[reportUnknownVariableType]
    return deepest


def rewrite(node: NodeT, change: Callable[[ast.Node], ast.Node]) -> NodeT:
    """Return the tree with `change` applied to every node, leaves first."""
    return _rewritten(node, change)


def _rewritten(value: Any, change: Callable[[ast.Node], ast.Node]) -> Any:
    # A comprehension would take one more stack frame per level of a deep tree.
    if isinstance(value, ast.Node):
        changed: dict[str, Any] = {}
        for name in field_names(type(value)):
            before = getattr(value, name)
            after = _rewritten(before, change)
            if after is not before:
                changed[name] = after
        return change(replace(value, **changed) if changed else value)
    if isinstance(value, tuple):
        items: list[Any] = []
        same = True
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            items.append(_rewritten(item, change))
            same = same and items[-1] is item
        return value if same else tuple(items)  # pyright: ignore[reportUnknownVariableType]
    return value
