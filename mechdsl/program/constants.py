"""Values that a file fixes before any data is read: parameters, limits, arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from mechdsl.base.percent import Percent
from mechdsl.syntax import ast

Constant: TypeAlias = int | float | str | bool
WORDS: Mapping[str, bool] = {"true": True, "false": False}


def constant(node: object, parameters: Mapping[str, Constant]) -> Constant | None:
    """The value of a literal, a parameter or a negative number; None where it is none of these."""
    match node:
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Percent(value=value):
            return Percent(value)
        case ast.Name(id=name):
            return parameters.get(name, WORDS.get(name, None))
        case ast.Negative(operand=operand):
            inner = constant(operand, parameters)
            return (
                -inner if isinstance(inner, int | float) and not isinstance(inner, bool) else None
            )
        case _:
            return None


def whole_number(node: int | str | None, parameters: Mapping[str, Constant]) -> int | None:
    """A count that is written as a number or as the name of a parameter."""
    if isinstance(node, str):
        value = parameters.get(node)
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return node
