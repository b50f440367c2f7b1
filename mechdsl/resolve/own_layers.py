"""`d[layer own]`: each layer that a rule writes takes the direction of its own layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.rules import BadDirection
from mechdsl.program import spec
from mechdsl.resolve.sites import SiteContext, resolve_site
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite, walk

OWN = "own"
"""The value of a coordinate that stands for the layer of the written vector."""


def expand_own_layers(
    experiment: spec.Experiment, sites: SiteContext
) -> tuple[spec.Experiment, list[Diagnostic]]:
    """Replace each rule on the directions of its own layers by a rule for each of these layers.

    All act in the same cells. Codes: E0341.
    """
    diagnostics: list[Diagnostic] = []

    def expand(rules: tuple[spec.Rule, ...]) -> tuple[spec.Rule, ...]:
        return tuple(each for rule in rules for each in _expand(rule, sites, diagnostics))

    rules = expand(experiment.rules)
    derived = tuple(
        run.model_copy(update={"rules": expand(run.rules)}) for run in experiment.derived
    )
    if rules == experiment.rules and derived == experiment.derived:
        return experiment, diagnostics
    return experiment.model_copy(update={"rules": rules, "derived": derived}), diagnostics


def _expand(
    rule: spec.Rule, sites: SiteContext, diagnostics: list[Diagnostic]
) -> Iterator[spec.Rule]:
    """Yield the rules that a rule stands for; itself if it names no own layers."""
    direction = rule.direction
    own = next((each for each in walk(direction) if _is_own(each)), None) if direction else None
    if direction is None or own is None:
        yield rule
        return
    axes = () if rule.site is None else rule.site.axes
    axis = next((each for each in axes if each.word == "layer"), None)
    if rule.site is None or axis is None or axis.window is not None:
        text = "the rule names no layers" if axis is None else "windows have several layers"
        hint = "name the layers that it writes: `resid_post layers *`"
        diagnostics.append(
            BadDirection(span=own.span, text=direction.span.written, reason=text, hint=hint)
        )
        return
    if not axis.plural:  # the axis of the rule is that of the family
        yield rule.model_copy(update={"direction": _without_layer(direction)})
        return
    silent = replace(sites, diagnostics=[])
    found, _ = resolve_site(rule.site, silent)
    if found is None or has_errors(silent.diagnostics):
        yield rule.model_copy(update={"direction": _without_layer(direction)})  # is reported there
        return
    layers = sorted({point.layer or 0 for points in found.points.values() for point in points})
    for layer in layers:
        bound = ast.Bound(layer, span=axis.span)
        one = replace(axis, values=(ast.AxisRange(bound, span=axis.span),))
        site = replace(
            rule.site, axes=tuple(one if each is axis else each for each in rule.site.axes)
        )
        yield rule.model_copy(update={"site": site, "direction": _of_layer(direction, layer)})


def _is_own(node: ast.Node) -> bool:
    return isinstance(node, ast.Coordinate) and node.value == OWN and node.word == "layer"


def _of_layer(direction: ast.Expr, layer: int) -> ast.Expr:
    """Name the layer's direction."""

    def change(node: ast.Node) -> ast.Node:
        if isinstance(node, ast.Coordinate) and _is_own(node):
            return replace(node, value=layer)
        return node

    return rewrite(direction, change)


def _without_layer(direction: ast.Expr) -> ast.Expr:
    """Name the directions of all layers."""

    def change(node: ast.Node) -> ast.Node:
        if not isinstance(node, ast.Index) or not isinstance(node.index, ast.Coordinates):
            return node
        items = tuple(each for each in node.index.items if not _is_own(each))
        if items:
            return replace(node, index=replace(node.index, items=items))
        return ast.Name(node.name, span=node.span)

    return rewrite(direction, change)
