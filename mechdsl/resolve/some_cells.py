"""`caap(a: 1, b: 3)`: some of the cells of another experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any, TypeAlias

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.resolve.findings import Finding, Refused, VariantFinding
from mechdsl.resolve.open_axes import open_axes
from mechdsl.resolve.resolved import Label
from mechdsl.syntax import ast

Coordinates: TypeAlias = tuple[tuple[str, Label], ...]
"""Axes with one value of each."""


def coordinates(node: ast.Ranked | ast.MapOf, values: Mapping[str, Any]) -> Coordinates:
    """What stands in the brackets. Raises Refused.

    values: of the `for` variables around it and of each `param`.
    """
    found: dict[str, Label] = {}
    for argument in node.cell:
        text, axis = argument.span.written, argument.name
        if axis is None:
            reason = f"`{text}` doesn't say along which axis"
            raise Refused(reason, f"name it: `{node.of}(layer: {text})`")
        if axis in found:
            raise Refused(f"`{axis}` is named twice", "leave one of them out")
        found[axis] = _value(argument, values)
    return tuple(found.items())


def _value(argument: ast.Argument, values: Mapping[str, Any]) -> Label:
    value = constant(argument.value, values)
    if value is None or isinstance(value, bool):
        text, hint = argument.value.span.written, f"write one: `{argument.name}: 2`"
        if isinstance(argument.value, ast.Name):
            hint = did_you_mean(
                text, values, f'write a word in quotes: `{argument.name}: "{text}"`'
            )
        raise Refused(f"`{text}` is no value of an axis", hint)
    return value


def in_words(of: str, at: Coordinates) -> str:
    """`caap(a: 1, b: 3)`."""
    said = ", ".join(f"{axis}: {value}" for axis, value in at)
    return f"{of}({said})" if said else of


def cells_at(finding: Finding, at: Coordinates, groups: Mapping[str, spec.Group]) -> Finding:
    """What it found in the cells that have these coordinates. Raises Refused."""
    parts = finding.parts
    for axis, value in at:
        found = [_along(part, axis, value, groups) for part in parts]
        parts = tuple(part for part in found if isinstance(part, VariantFinding))
        if not parts:
            labels = dict.fromkeys(str(label) for each in found for label in _labels(each))
            reason = f"`{finding.name}` has no `{axis}: {value}`"
            raise Refused(reason, f"along `{axis}` it has {name_list(labels)}")
    parts = tuple(part for part in parts if any(True for _ in part.grid()))
    if not parts:
        raise Refused(f"`{finding.name}` has no cell there", "its loops leave it out")
    return Finding(parts)


def _along(
    part: VariantFinding, axis: str, value: Label, groups: Mapping[str, spec.Group]
) -> VariantFinding | tuple[Label, ...]:
    """Its cells that have this value along an axis; the values that there are, where it has none
    of them."""
    own = part.experiment
    variant = dict(own.spec.variant)
    if axis in variant:
        return part if _same(variant[axis], value) else (variant[axis],)
    names = [each.name for each in own.axes]
    if axis not in names:
        known = [*variant, *names]
        hint = f"its axes are {name_list(known)}" if known else "it has one cell: leave it out"
        raise Refused(f"`{own.name}` has no axis `{axis}`", did_you_mean(axis, known, hint))
    labels = own.axes[names.index(axis)].labels
    if own.model.stands_in and axis in open_axes(own.spec, groups, ("shape", "tokens")):
        return part  # which values it has isn't known yet
    number = next((n for n, label in enumerate(labels) if _same(label, value)), None)
    return labels if number is None else replace(part, chosen={**part.chosen, axis: number})


def _labels(found: VariantFinding | tuple[Label, ...]) -> tuple[Label, ...]:
    return () if isinstance(found, VariantFinding) else found


def _same(label: Label, value: Label) -> bool:
    if isinstance(label, str) or isinstance(value, str):
        return label == value
    return isclose(label, value, rel_tol=1e-9, abs_tol=1e-12)
