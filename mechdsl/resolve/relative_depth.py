"""Layers by their relative depth, where models of different depth are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mechdsl.resolve.resolved import Axis
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def relative(axis: Axis, site: object, n_layers: int) -> Axis:
    """The axis with percentages for labels, if its layers are written as percentages."""
    for node in walk(site):
        if isinstance(node, ast.Axis) and node.word == "layer" and node.span == axis.span:
            found = dict(_depths(node, n_layers))
            if found and set(axis.labels) <= found.keys():
                labels = tuple(found[int(label)] for label in axis.labels)
                return replace(axis, labels=labels)
    return axis


def _depths(axis: ast.Axis, n_layers: int) -> Iterator[tuple[int, str]]:
    """Layers with their depth as written; those within a range as what they are."""
    percents = [
        v for v in axis.values if isinstance(v, ast.AxisRange) and v.low.percent is not None
    ]
    if len(percents) < len(axis.values):
        return
    for value in reversed(percents):  # the first one that names a layer gives it its label
        low, high = value.low.percent, None if value.high is None else value.high.percent
        assert low is not None
        if high is None:
            yield layer_at(low, n_layers), f"{low:g}%"
            continue
        for layer in range(layer_at(low, n_layers), layer_at(high, n_layers) + 1):
            yield layer, f"{100 * layer / max(1, n_layers - 1):.3g}%"


def layer_at(percent: float, n_layers: int) -> int:
    """Rounded half up, as everywhere."""
    return int(percent / 100 * (n_layers - 1) + 0.5)
