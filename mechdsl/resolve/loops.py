"""What a `for` runs over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechdsl import spec
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e03_coordinates import (
    BadLoopValue,
    EmptyRange,
)
from mechdsl.resolve.types import (
    Label,
)
from mechdsl.syntax import ast

MOST_VALUES = 1_000_000


def loop_values(
    loop: spec.Loop, parameters: Mapping[str, Any], diagnostics: list[Diagnostic]
) -> tuple[Label, ...] | None:
    """What a `for` runs over: numbers, or words such as components."""
    values, step = loop.domain.values, loop.domain.step
    if step is not None or isinstance(values, ast.Range):
        return _numbers(loop, values, step, parameters, diagnostics)
    items = values.items if isinstance(values, ast.ListOf) else (values,)
    found: list[Label] = []
    for item in items:
        value = _plain(item, parameters)
        if value is None and isinstance(item, ast.Range):
            part = _numbers(loop, item, None, parameters, diagnostics)
            if part is None:
                return None
            found.extend(part)
            continue
        if value is None:
            _bad_loop(loop, "this value can't be looped over", diagnostics)
            return None
        found.append(value)
    return tuple(found)


def _plain(node: Any, parameters: Mapping[str, Any]) -> Label | None:
    match node:
        case ast.Number(value=value) | ast.String(value=value):
            return value
        case ast.Negative(operand=ast.Number(value=value)):
            return -value
        case ast.Name(id=name):
            return parameters.get(name, name)
        case _:
            return None


def _numbers(
    loop: spec.Loop,
    values: Any,
    step: ast.Expr | None,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
) -> tuple[Label, ...] | None:
    if not isinstance(values, ast.Range):
        _bad_loop(loop, "`step` needs a range", diagnostics)
        return None
    low, high = _plain(values.low, parameters), _plain(values.high, parameters)
    width = 1 if step is None else _plain(step, parameters)
    if isinstance(values.low, ast.Percent):
        diagnostics.append(NotSupported(span=loop.domain.span, what="a `for` over percentages"))
        return None
    if (
        not isinstance(low, int | float)
        or not isinstance(high, int | float)
        or not isinstance(width, int | float)
    ):
        _bad_loop(loop, "a range needs numbers at both ends", diagnostics)
        return None
    if high < low or width <= 0:
        diagnostics.append(
            EmptyRange(
                span=loop.domain.span,
                text=loop.domain.span.written,
                low=str(high),
                high=str(low),
            )
        )
        return None
    count = int((high - low) / width + 1e-9) + 1
    if count > MOST_VALUES:
        _bad_loop(loop, f"{count:,} values are more than {MOST_VALUES:,}", diagnostics)
        return None
    return tuple(low + i * width for i in range(count))


def _bad_loop(loop: spec.Loop, reason: str, diagnostics: list[Diagnostic]) -> None:
    diagnostics.append(
        BadLoopValue(
            span=loop.domain.span,
            name=loop.name,
            reason=reason,
            hint="for example `for l in 0..11`, `for l in [0, 4, 8]` or "
            "`for c in [attn_out, mlp_out]`",
        )
    )
