"""Expressions of a prompts block, evaluated on one row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.plural import plural
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e05_data import BadValue, UnknownFunction
from mechdsl.prompts import functions
from mechdsl.prompts.row_scope import Key, Refusal, Scope
from mechdsl.prompts.values import Items, Value, is_whole, plain
from mechdsl.syntax import ast

_LARGEST = 10**limits.DIGITS

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def bad(span: Span, reason: str, hint: str) -> Refusal:
    """E0503 at an expression."""
    return Refusal(BadValue, span, expression=span.text, reason=reason, hint=hint)


def evaluate(node: ast.Expr, scope: Scope, key: Key) -> Value:
    """The value of an expression. Refusals: E0501, E0503, E0506, E0512 to E0515."""
    match node:
        case ast.Number(value=number) | ast.Percent(value=number):
            return number
        case ast.String():
            return scope.text(node, key)
        case ast.Name(id=name):
            return scope.value(name, node.span)
        case ast.Attribute(name=name, attribute=attribute):
            return scope.attribute(name, attribute, node.span)
        case ast.Index():
            return _index(node, scope, key)
        case ast.Call():
            return _call(node, scope, key)
        case ast.ListOf():
            return [
                value
                for item in node.items
                for value in (
                    _range(item, scope, key)
                    if isinstance(item, ast.Range)
                    else [evaluate(item, scope, key)]
                )
            ]
        case ast.Negative(operand=operand):
            return -number_of(operand, scope, key)
        case ast.Binary():
            return _binary(node, scope, key)
        case ast.Conditional(condition=condition, then=then, otherwise=otherwise):
            return evaluate(then if holds(condition, scope, key) else otherwise, scope, key)
        case ast.Compare() | ast.InRange() | ast.Near() | ast.Logical() | ast.Not():
            return _condition(node, scope, key)
        case (
            ast.ShortSite()
            | ast.OfRef()
            | ast.OfExperiment()
            | ast.EdgeTokenOf()
            | ast.ClassOutput()
        ):
            raise bad(node.span, "prompts have no such thing", "write a value of the row")


def holds(node: ast.Expr, scope: Scope, key: Key) -> bool:
    """The truth of a condition."""
    value = evaluate(node, scope, key)
    if not isinstance(value, bool):
        raise bad(node.span, "it is neither true nor false", "compare it: `count > 3`")
    return value


def number_of(node: ast.Expr, scope: Scope, key: Key) -> int | float:
    """The value of an expression that has to be a number."""
    value = evaluate(node, scope, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = plain(value)
        hint = 'numbers are written without quotes; texts are put together in quotes: `"{a} {b}"`'
        raise bad(node.span, f"it is {shown!r}, not a number", hint)
    return value


def whole_number(node: ast.Expr, scope: Scope, key: Key) -> int:
    """The value of an expression that has to be a whole number."""
    value = number_of(node, scope, key)
    if not is_whole(value):
        raise bad(node.span, f"{value} is not a whole number", "counts are whole numbers")
    return int(value)


def _binary(node: ast.Binary, scope: Scope, key: Key) -> int | float:
    try:
        found = _calculated(node, scope, key)
    except OverflowError:
        found = inf
    if not abs(found) < _LARGEST:  # nor NaN
        reason = f"it has more than {limits.DIGITS} digits"
        raise bad(node.span, reason, "calculate with smaller numbers")
    return found


def _calculated(node: ast.Binary, scope: Scope, key: Key) -> int | float:
    left = number_of(node.left, scope, key)
    right = number_of(node.right, scope, key)
    match node.operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            if right == 0:
                raise bad(node.span, "it divides by zero", "leave these rows out with `where`")
            exact = isinstance(left, int) and isinstance(right, int) and left % right == 0
            return left // right if exact else left / right


def _index(node: ast.Index, scope: Scope, key: Key) -> Value:
    value = scope.value(node.name, node.span)
    if isinstance(node.index, ast.Ranked | ast.Coordinates):
        what = "ranking" if isinstance(node.index, ast.Ranked) else "layers or heads"
        raise bad(node.span, f"prompts have no {what}", "write a number: `xs[2]`")
    at = whole_number(node.index, scope, key)
    entries = [i.value for i in value.items] if isinstance(value, Items) else value
    if not isinstance(entries, list):
        raise bad(node.span, f"`{node.name}` is not a list", "index what `list(…)` gives")
    if not 1 <= at <= len(entries):
        reason = f"`{node.name}` has {plural(len(entries), 'item')}"
        raise bad(node.span, reason, "items count from 1; leave short rows out with `where`")
    return entries[at - 1]


def _range(node: ast.Range, scope: Scope, key: Key) -> range:
    low = whole_number(node.low, scope, key)
    high = whole_number(node.high, scope, key)
    functions.check_length(high - low + 1, node.span)
    return range(low, high + 1)


def _is_one(found: object, item: ast.Expr | ast.Range, scope: Scope, key: Key) -> bool:
    """Whether a value is what a list has in one place, or one of a range there."""
    if isinstance(item, ast.Range):
        return found in _range(item, scope, key)
    return found == plain(evaluate(item, scope, key))


def _condition(node: ast.Expr, scope: Scope, key: Key) -> bool:
    match node:
        case ast.Compare(operator=sign, left=left, right=right):
            a, b = plain(evaluate(left, scope, key)), plain(evaluate(right, scope, key))
            try:
                return bool(_COMPARE[sign](a, b))
            except TypeError:
                reason = f"{a!r} and {b!r} have no order"
                hint = "compare numbers with numbers and texts with texts"
                raise bad(node.span, reason, hint) from None
        case ast.InRange(value=inner, within=ast.Range() as within):
            number = number_of(inner, scope, key)
            low, high = number_of(within.low, scope, key), number_of(within.high, scope, key)
            return low <= number <= high
        case ast.InRange(value=inner, within=ast.ListOf(items=items)):
            found = plain(evaluate(inner, scope, key))
            # A range of many numbers isn't written out for every row.
            return True in [_is_one(found, item, scope, key) for item in items]
        case ast.InRange(value=inner, within=within):
            values = plain(evaluate(cast("ast.Expr", within), scope, key))
            if not isinstance(values, list):
                raise bad(node.span, "what stands behind `in` is no list", "write `x in [1, 2]`")
            return plain(evaluate(inner, scope, key)) in values
        case ast.Near(value=inner, target=target, tolerance=tolerance):
            distance = number_of(inner, scope, key) - number_of(target, scope, key)
            return abs(distance) <= number_of(tolerance, scope, key)
        case ast.Logical(operator="and", left=left, right=right):
            return holds(left, scope, key) and holds(right, scope, key)
        case ast.Logical(left=left, right=right):
            return holds(left, scope, key) or holds(right, scope, key)
        case ast.Not(operand=operand):
            return not holds(operand, scope, key)
        case _:
            raise AssertionError(f"{type(node).__name__} is no condition")


def _call(node: ast.Call, scope: Scope, key: Key) -> Value:
    function = functions.FUNCTIONS.get(node.name)
    if function is None:
        known = ", ".join(f"`{name}`" for name in functions.FUNCTIONS)
        hint = did_you_mean(node.name, functions.FUNCTIONS, f"there are {known}")
        raise Refusal(UnknownFunction, node.span, name=node.name, hint=hint)
    return function.apply(functions.CallSite(node, function, scope, key.call(), evaluate))
