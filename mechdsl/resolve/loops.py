"""Values of `for` loops, arithmetic on numbers of a file, and layers by relative depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from math import prod
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import Percent, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.rules import BadLoopValue, EmptyRange, loop_hint
from mechdsl.program import spec
from mechdsl.resolve.types import Axis, AxisLabel, LoopCells
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_call
from mechdsl.syntax.traversal import walk


def evaluate_arithmetic(expression: ast.Expr, value: Callable[[ast.Expr], Any]) -> Any:
    """Evaluate an expression.

    Args:
        value: Function that evaluates a leaf; arrays are broadcast.
    """
    match expression:
        case ast.Number(value=number):
            return number
        case ast.Percent(value=percent):
            return percent / 100
        case ast.Negative(operand=operand):
            return -evaluate_arithmetic(operand, value)
        case ast.Not(operand=operand):
            return evaluate_arithmetic(operand, value) == 0
        case ast.Binary(operator=operator, left=left, right=right):
            return _ARITHMETIC[operator](
                evaluate_arithmetic(left, value), evaluate_arithmetic(right, value)
            )
        case ast.Compare(operator=operator, left=left, right=right):
            return (
                _COMPARISONS[operator](
                    evaluate_arithmetic(left, value), evaluate_arithmetic(right, value)
                )
                * 1.0
            )
        case ast.Logical(operator=operator, left=left, right=right):
            a, b = evaluate_arithmetic(left, value) != 0, evaluate_arithmetic(right, value) != 0
            return ((a & b) if operator == "and" else (a | b)) * 1.0
        case ast.Call(name=name, arguments=arguments) if name in _COMBINATIONS:
            terms = (evaluate_arithmetic(cast("ast.Expr", a.value), value) for a in arguments)
            return reduce(_COMBINATIONS[name], terms)
        case _:
            return value(expression)


def iter_divisors(expression: ast.Expr) -> Iterator[ast.Expr]:
    """Yield the divisors of an expression, except those inside its metrics."""
    match expression:
        case ast.Negative(operand=operand) | ast.Not(operand=operand):
            yield from iter_divisors(operand)
        case ast.Binary() | ast.Compare() | ast.Logical():
            yield from iter_divisors(expression.left)
            yield from iter_divisors(expression.right)
            if isinstance(expression, ast.Binary) and expression.operator == "/":
                yield expression.right
        case _:
            return


_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def _log_add(a: Any, b: Any) -> Any:
    """Return log(exp(a) + exp(b)) of arrays, or of tensors with their gradients."""
    if hasattr(a, "logaddexp"):
        return a.logaddexp(b)
    import numpy as np

    return np.logaddexp(a, b)


_COMBINATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "log_sum_exp": _log_add,
}
"""By `MetricForm.joined`: calls that combine the terms of several accepted texts. Files can't
contain them."""

_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}

LoopLabels = tuple[AxisLabel, ...]


class LoopAxes(Record):
    """Loops of an experiment."""

    labels: Mapping[str, LoopLabels]
    """All values of each variable."""
    nested: LoopCells | None
    """None if every combination of values exists."""


def resolve_loops(
    loops: Sequence[spec.Loop], parameters: Mapping[str, Any], diagnostics: list[Diagnostic]
) -> LoopAxes:
    """Resolve the values of loops: numbers, or words such as sites.

    A domain may use variables of the enclosing loops. After an error (E0321, E0322), a loop has one
    value of its domain's type, so that errors inside the loop are reported too.
    """
    outer = {loop.name: _outer_loops(loop) for loop in loops}
    nest = {name for name, around in outer.items() if around}.union(*outer.values())
    before = len(diagnostics)
    labels: dict[str, LoopLabels] = {}
    there: list[dict[str, AxisLabel]] = [{}]
    for loop in loops:
        if loop.name not in nest:
            labels[loop.name] = resolve_loop_values(loop, parameters, {}, diagnostics)
            continue
        there, labels[loop.name] = _extend_combinations(
            there, loop, outer[loop.name], parameters, diagnostics
        )
    if has_errors(diagnostics[before:]):
        return LoopAxes(labels, None)
    names = tuple(loop.name for loop in loops if loop.name in nest)
    index = {name: {label: i for i, label in enumerate(labels[name])} for name in names}
    keys = frozenset(tuple(index[name][cell[name]] for name in names) for cell in there)
    every = prod(len(labels[name]) for name in names)
    return LoopAxes(labels, LoopCells(names, keys) if len(keys) < every else None)


def _outer_loops(loop: spec.Loop) -> tuple[str, ...]:
    """Return the variables of enclosing loops that a loop's domain uses."""
    named = {node.id for node in walk(loop.domain) if isinstance(node, ast.Name)}
    return tuple(name for name in loop.within if name in named)


def _extend_combinations(
    there: list[dict[str, AxisLabel]],
    loop: spec.Loop,
    outer: Sequence[str],
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
) -> tuple[list[dict[str, AxisLabel]], LoopLabels]:
    """Extend the combinations of the outer loops by the values of a loop.

    Returns:
        The combinations and all values of the loop; after an error a single combination.
    """
    known: dict[LoopLabels, LoopLabels] = {}
    longer: list[tuple[dict[str, AxisLabel], AxisLabel]] = []
    for cell in there:
        around = {name: cell[name] for name in outer}
        key = tuple(around.values())
        if key not in known:
            before = len(diagnostics)
            known[key] = resolve_loop_values(loop, parameters, around, diagnostics)
            if len(longer) + len(known[key]) > limits.LOOP:
                reason = f"with the loops around it, it has more than {limits.LOOP:,} values"
                _bad_loop(loop, reason, diagnostics)
            if has_errors(diagnostics[before:]):
                return [{**cell, loop.name: known[key][0]}], known[key]
        longer += ((cell, value) for value in known[key])
    same, labels = _merge_labels(list(known.values()))
    return [{**cell, loop.name: same[value]} for cell, value in longer], labels


def _merge_labels(values: Sequence[LoopLabels]) -> tuple[dict[AxisLabel, AxisLabel], LoopLabels]:
    """Merge values that are equal up to rounding, such as `0.1 + 0.2` and `0.3`.

    Returns:
        Value → its label, and all labels; in ascending order if each list is.
    """
    same: dict[AxisLabel, AxisLabel] = {}
    for value in (value for each in values for value in each):
        if value not in same:
            near = (label for label in same.values() if _is_close(value, label))
            same[value] = next(near, value) if isinstance(value, float) else value
    labels = dict.fromkeys(same.values())
    if all(_ascends(each) for each in values):
        return same, tuple(sorted(labels, key=float))
    return same, tuple(labels)


def _is_close(value: AxisLabel, label: AxisLabel) -> bool:
    if isinstance(value, str) or isinstance(label, str):
        return False
    return math.isclose(value, label, rel_tol=1e-9, abs_tol=1e-12)


def _ascends(values: LoopLabels) -> bool:
    numbers = [value for value in values if not isinstance(value, str)]
    return len(numbers) == len(values) and all(low < high for low, high in pairwise(numbers))


def resolve_loop_values(
    loop: spec.Loop,
    parameters: Mapping[str, Any],
    around: Mapping[str, AxisLabel],
    diagnostics: list[Diagnostic],
) -> LoopLabels:
    """Evaluate the values of one loop; a single value after an error.

    Args:
        around: Values of the outer variables that the domain uses.
    """
    values = {**parameters, **around}
    loop_values = _values(loop, values, around, diagnostics)
    if loop_values is not None:
        return loop_values
    listed = loop.domain.values
    items = listed.items if isinstance(listed, ast.ListLiteral) else ()
    inside = () if isinstance(listed, ast.Call) else walk(loop.domain)  # not the 4 of `range(4)`
    plain = [_plain(node, values) for node in (*items, *inside)]
    ranged = loop.domain.step is not None or isinstance(loop.domain.values, ast.Range)
    plain = [value for value in plain if not (ranged and isinstance(value, str))]
    return (next((value for value in plain if value is not None), 0),)


def _values(
    loop: spec.Loop,
    parameters: Mapping[str, Any],
    around: Mapping[str, AxisLabel],
    diagnostics: list[Diagnostic],
) -> LoopLabels | None:
    values, step = loop.domain.values, loop.domain.step
    if step is not None or isinstance(values, ast.Range):
        return _numbers(loop, values, step, parameters, around, diagnostics)
    items = values.items if isinstance(values, ast.ListLiteral) else (values,)
    labels: list[AxisLabel] = []
    for item in items:
        value = _plain(item, parameters)
        if value is None and isinstance(item, ast.Range):
            part = _numbers(loop, item, None, parameters, around, diagnostics)
            if part is None:
                return None
            labels.extend(part)
            continue
        if value is None:
            sites = "name each site: `group a = L9H9`, `group b = L9H6`, `for g in [a, b]`"
            hint = sites if isinstance(item, ast.ShortSite) else None
            _bad_loop(loop, "this value can't be looped over", diagnostics, hint)
            return None
        labels.append(value)
    return tuple(labels)


def _plain(node: Any, parameters: Mapping[str, Any]) -> AxisLabel | None:
    match node:
        case ast.Percent(value=value):
            return Percent(value)
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Name(id=name):
            return parameters.get(name, name)
        case ast.Call(arguments=arguments) if all(argument.name for argument in arguments):
            return format_call(node)  # a selection of cells of an experiment
        case ast.Negative() | ast.Binary():
            return _evaluate_number(node, parameters)
        case _:
            return None


def _evaluate_number(node: ast.Expr, parameters: Mapping[str, Any]) -> int | float | None:
    """Evaluate a number such as `a + 1`; None if it contains anything but numbers."""
    for part in walk(node):
        if isinstance(part, ast.Negative | ast.Binary):
            continue
        value = _plain(part, parameters)
        if isinstance(value, Percent | bool) or not isinstance(value, int | float):
            return None
    try:
        return evaluate_arithmetic(node, lambda name: parameters[getattr(name, "id", "")])
    except ZeroDivisionError:
        return None


def _numbers(
    loop: spec.Loop,
    values: Any,
    step: ast.Expr | None,
    parameters: Mapping[str, Any],
    around: Mapping[str, AxisLabel],
    diagnostics: list[Diagnostic],
) -> LoopLabels | None:
    if not isinstance(values, ast.Range):
        _bad_loop(loop, "`step` needs a range", diagnostics)
        return None
    bounds = _evaluate_range(loop, values, step, parameters, diagnostics)
    if bounds is None:
        return None
    low, high, width = bounds
    percent = [isinstance(each, Percent) for each in (low, high, width)]
    if step is None and isinstance(low, Percent) and isinstance(high, Percent):
        _bad_loop(
            loop,
            "a range of percentages needs a step",
            diagnostics,
            f"for example `for {loop.name} in {low}..{high} step 5%`",
        )
        return None
    if any(percent) and not all(percent):
        _bad_loop(
            loop,
            "it mixes percentages and numbers",
            diagnostics,
            f"write all of them with the percent sign: `for {loop.name} in 0%..100% step 5%`",
        )
        return None
    if width <= 0:
        example = f"for {loop.name} in {low}..{high} step {'5%' if all(percent) else '1'}"
        _bad_loop(loop, "its step is not above 0", diagnostics, f"for example `{example}`")
        return None
    if high < low:
        span, instead = loop.domain.span, ""
        if around:
            instead = (
                f"there it is `{low}..{high}`; end the enclosing loops earlier, or this range later"
            )
        diagnostics.append(
            EmptyRange(
                span=span,
                text=span.written,
                low=str(high),
                high=str(low),
                where=loop_hint(around),
                instead=instead,
            )
        )
        return None
    count = int((high - low) / width + 1e-9) + 1
    if count > limits.LOOP:
        _bad_loop(loop, f"{count:,} values are more than {limits.LOOP:,}", diagnostics)
        return None
    numbers = (low + i * width for i in range(count))
    return tuple(Percent(value) if all(percent) else value for value in numbers)


def _evaluate_range(
    loop: spec.Loop,
    values: ast.Range,
    step: ast.Expr | None,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
) -> tuple[float, float, float] | None:
    """Return both ends of a range and its step; None after a diagnostic."""
    low, high = _plain(values.low, parameters), _plain(values.high, parameters)
    width = 1 if step is None else _plain(step, parameters)
    if (
        isinstance(low, int | float)
        and isinstance(high, int | float)
        and isinstance(width, int | float)
    ):
        return low, high, width
    names = (node for node in walk((values, step)) if isinstance(node, ast.Name))
    unknown = next((node for node in names if node.id not in parameters), None)
    if unknown is None:
        _bad_loop(loop, "a range needs numbers at both ends", diagnostics)
    else:
        diagnostics.append(_unknown(unknown, loop, parameters))
    return None


def _unknown(node: ast.Name, loop: spec.Loop, parameters: Mapping[str, Any]) -> Diagnostic:
    """Create the error for a name at the end of a range that isn't a number."""
    known = [*loop.within, *(name for name in parameters if name not in loop.within)]
    otherwise = "a range goes from number to number: `0..11`"
    reason = "is neither the variable of an enclosing `for` nor a `param`"
    hint = did_you_mean(
        node.id, known, f"names known here: {name_list(known)}" if known else otherwise
    )
    return BadLoopValue(span=node.span, name=node.id, reason=reason, hint=hint)


def _bad_loop(
    loop: spec.Loop, reason: str, diagnostics: list[Diagnostic], hint: str | None = None
) -> None:
    diagnostics.append(
        BadLoopValue(
            span=loop.domain.span,
            name=loop.name,
            reason=reason,
            hint=hint
            or "for example `for l in 0..11`, `for l in [0, 4, 8]` or "
            "`for c in [attn_out, mlp_out]`",
        )
    )


def label_by_depth(axis: Axis, site: object, n_layers: int) -> Axis:
    """Label an axis with percentages if its layers are written as percentages."""
    for node in walk(site):
        if isinstance(node, ast.Axis) and node.word == "layer" and node.span == axis.span:
            axis_labels = dict(_depths(node, n_layers))
            if axis_labels and set(axis.labels) <= axis_labels.keys():
                labels = tuple(axis_labels[int(label)] for label in axis.labels)
                return replace(axis, labels=labels)
    return axis


def _depths(axis: ast.Axis, n_layers: int) -> Iterator[tuple[int, str]]:
    """Yield layers with their depth as written; layers inside a range with their exact depth."""
    percents = [
        v for v in axis.values if isinstance(v, ast.AxisRange) and v.low.percent is not None
    ]
    if len(percents) < len(axis.values):
        return
    for value in reversed(percents):  # the first percentage that names a layer becomes its label
        low, high = value.low.percent, None if value.high is None else value.high.percent
        assert low is not None
        if high is None:
            yield find_layer_at_depth(low, n_layers), f"{low:g}%"
            continue
        for layer in range(
            find_layer_at_depth(low, n_layers), find_layer_at_depth(high, n_layers) + 1
        ):
            yield layer, f"{100 * layer / max(1, n_layers - 1):.3g}%"


def find_layer_at_depth(percent: float, n_layers: int) -> int:
    """Return the layer at a relative depth, rounded half up as everywhere."""
    return int(percent / 100 * (n_layers - 1) + 0.5)
