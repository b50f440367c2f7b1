"""What of the cells of an experiment hangs on its model: the rest is decided by the text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from mechdsl.diagnostics.core import Unknown
from mechdsl.program import spec
from mechdsl.program.possible_axes import may_sweep_one
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

COMPONENT = "component"
"""Stands among the axes for what a site is called."""
_UNITS = ("layer", "head", "neuron", "expert")


def open_axes(
    experiment: spec.Experiment, groups: Mapping[str, spec.Group], unknown: Collection[Unknown]
) -> frozenset[str]:
    """Coordinates whose values aren't known: those that another experiment picks, and of what
    stands in for something those that it would have to be at hand for."""
    found: set[str] = set()
    for rule in experiment.rules:
        if rule.site is not None:
            found.update(_of_site(rule.site, groups, unknown))
        if rule.receiver is not None:
            own = list(_of_site(rule.receiver, groups, unknown))
            found.update(own, (f"to_{name}" for name in own))
        if rule.edge is not None and rule.edge.heads is not None:
            found.update(_of_site(rule.edge.heads, groups, unknown))
        if "shape" in unknown:
            found.update(_of_axes(rule.edge))
            if rule.into_layer is not None and is_open(rule.into_layer):
                found.update(("layer", "to_layer"))
        for positions in (rule.at, rule.onto):
            if positions is not None and open_positions(positions, unknown):
                found.update(("position", "from_position", "item"))
    if "shape" in unknown and any(axis == "model" for axis, _ in experiment.variant):
        found.update(("layer", "to_layer"))  # by their relative depths
    return frozenset(found)


def open_positions(positions: ast.Positions, unknown: Collection[Unknown]) -> bool:
    """Whether tokens or rows, where they aren't known, decide which cells there are."""
    return any(
        ("tokens" in unknown and _hangs_on_tokens(node))
        or ("rows" in unknown and isinstance(node, ast.SpanTokens))
        or (isinstance(node, ast.RankedTokens) and may_sweep_one(node))
        for node in walk(positions)
    )


def _hangs_on_tokens(node: ast.Node) -> bool:
    match node:
        case ast.TokenIndex():
            return node.low is None
        case ast.Between() | ast.Except():
            return node.each
        case _:
            return isinstance(node, ast.EachTokenOf)


def _of_site(
    site: ast.Site, groups: Mapping[str, spec.Group], unknown: Collection[Unknown]
) -> Iterator[str]:
    members = (each for name in site.names if name.id in groups for each in groups[name.id].sites)
    for part in (site, *members):
        if part.ranked is not None:
            yield from (*_UNITS, COMPONENT)
        if "shape" in unknown:
            yield from _of_axes(part)


def _of_axes(tree: ast.Site | ast.Edge | None) -> Iterator[str]:
    for axis in walk(tree):
        if isinstance(axis, ast.Axis) and any(map(is_open, axis.values)):
            yield axis.word


def from_end(bound: ast.Bound | None) -> bool:
    """Whether the coordinate that it names hangs on how many there are: `-1`, `50%`."""
    return bound is not None and (bound.percent is not None or (bound.value or 0) < 0)


def is_open(value: ast.Star | ast.AxisRange) -> bool:
    """Whether which coordinates it names hangs on the model."""
    return isinstance(value, ast.Star) or from_end(value.low) or from_end(value.high)
