"""Axes that a rule may add to an experiment, as far as its own line tells."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.verbs import COUNTED
from mechdsl.syntax.walk import walk


def possible_axes(rule: spec.Rule) -> Iterator[str]:
    """Names that reports and expectations may call them by."""
    yield "layer"  # which may have been forgotten
    for site in (rule.site, rule.reading, rule.edge):
        yield from axes_of(site)
    yield from (f"to_{name}" for name in axes_of(rule.receiver))
    if rule.into_layer is not None:
        yield "to_layer"
    if rule.fills:
        yield "fill"
    if rule.observed is not None:
        yield from own_axes(rule.observed)
    yield from position_axes(rule)


def own_axes(observed: spec.Observed) -> Iterator[str]:
    """Those that an observation has by its kind."""
    if observed.word in COUNTED:
        yield COUNTED[observed.word]
    if len(observed.maps) > 1 and not observed.placed:
        yield "map"


def position_axes(rule: spec.Rule) -> Iterator[str]:
    """Those of its positions: how many there are hangs on the tokens of prompts."""
    if may_sweep(rule.at) or (rule.onto is not None and may_sweep(rule.onto)):
        yield "position"
        yield "item"
        if rule.edge is not None:
            yield "from_position"


def axes_of(site: ast.Site | ast.Edge | None) -> Iterator[str]:
    """Those of a site, or of attention."""
    for axis in walk(site):
        if isinstance(axis, ast.Axis) and not axis.plural and _sweeps(axis):
            yield axis.word


def _sweeps(axis: ast.Axis) -> bool:
    return len(axis.values) > 1 or any(
        isinstance(value, ast.Star) or value.high is not None for value in axis.values
    )


def may_sweep(positions: ast.Positions) -> bool:
    """Whether there may be more than one cell, whatever the prompts and their tokens are."""
    return len(positions.items) > 1 or any(map(may_sweep_one, walk(positions)))


def may_sweep_one(node: ast.Node) -> bool:
    """The same of one part of a position."""
    match node:
        case ast.TokenIndex():
            return not node.plural and (node.low is None or node.high is not None)
        case ast.SpanTokens():
            at = node.of.occurrence
            several = at is not None and (at.low is None or at.high is not None)
            ranged = node.high is not None and not node.plural
            return node.each or ranged or (several and not node.plural)
        case ast.Between() | ast.Except():
            return node.each
        case ast.RankedTokens():
            return not node.plural and node.ranked.which != "best"
        case _:
            return isinstance(node, ast.EachTokenOf | ast.EachStep)
