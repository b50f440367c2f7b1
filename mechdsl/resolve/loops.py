"""What a `for` runs over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechdsl.base import limits
from mechdsl.base.percent import Percent
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import BadLoopValue, EmptyRange
from mechdsl.program import spec
from mechdsl.resolve.resolved import Label
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def loop_values(
    loop: spec.Loop, parameters: Mapping[str, Any], diagnostics: list[Diagnostic]
) -> tuple[Label, ...]:
    """What a `for` runs over: numbers, or words such as components. After an error (E0321, E0322),
    one value of that kind, so that what is wrong inside it can be told too."""
    found = _values(loop, parameters, diagnostics)
    if found is not None:
        return found
    plain = (_plain(node, parameters) for node in walk(loop.domain))
    return (next((value for value in plain if value is not None), 0),)


def _values(
    loop: spec.Loop, parameters: Mapping[str, Any], diagnostics: list[Diagnostic]
) -> tuple[Label, ...] | None:
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
        case ast.Percent(value=value):
            return Percent(value)
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
    if (
        not isinstance(low, int | float)
        or not isinstance(high, int | float)
        or not isinstance(width, int | float)
    ):
        _bad_loop(loop, "a range needs numbers at both ends", diagnostics)
        return None
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
            f"write all with their sign: `for {loop.name} in 0%..100% step 5%`",
        )
        return None
    if width <= 0:
        example = f"for {loop.name} in {low}..{high} step {'5%' if all(percent) else '1'}"
        _bad_loop(loop, "its step is not above 0", diagnostics, f"for example `{example}`")
        return None
    if high < low:
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
    if count > limits.LOOP:
        _bad_loop(loop, f"{count:,} values are more than {limits.LOOP:,}", diagnostics)
        return None
    found = (low + i * width for i in range(count))
    return tuple(Percent(value) if all(percent) else value for value in found)


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
