"""Heads by what they are called: in edges of attention, and where a path ends.

A group, or what another experiment found, may name heads by any of their sites: `L9H9`, that is
`z`, stands for the head. Where heads share keys and values, `k` and `v` belong to several heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from mechdsl.diagnostics.e02_names import UnknownName, did_you_mean
from mechdsl.diagnostics.e03_coordinates import AxisDoesNotFit
from mechdsl.models.shape import ModelShape, units
from mechdsl.resolve.coordinates import SiteContext
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import Key, SitePoint, SiteTargets
from mechdsl.resolve.site_targets import (
    available,
    component_kinds,
    is_own_stack,
    missing_points,
    points_label,
    resolve_site,
    swept,
)
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES, SiteKind

_HEADS = ("head", "kv_head")
Resolved = tuple[SiteTargets | None, tuple[Axis, ...]]


def attention_sites(edge: ast.Edge, context: SiteContext) -> Resolved:
    """Layers and heads of a rule on edges of attention, as points of `pattern`; without a head
    axis all heads."""
    pattern = SITES["pattern"]
    if edge.stack is not None and not is_own_stack(edge.stack, context):
        return None, ()
    if not available(pattern, edge.span, context):
        return None, ()
    if edge.heads is not None:
        targets, axes = _named(edge.heads, [pattern], None, context), ()
    elif not any(axis.word == "layer" for axis in edge.axes):
        context.diagnostics.append(
            AxisDoesNotFit(
                span=edge.span,
                site="attention",
                reason="needs a layer",
                hint="write `attention layer * …` for every layer, one run each, or "
                "`attention layers * …` for all of them at once",
            )
        )
        return None, ()
    else:
        site = ast.Site((ast.Name("attention", span=edge.span),), edge.axes, span=edge.span)
        targets, axes = swept(site, context, [pattern])
    if targets is None or not _there(targets, edge, context):
        return None, ()
    labels = {key: label.replace(".pattern", ".attention") for key, label in targets.labels.items()}
    return replace(targets, labels=labels), axes


def receiver_sites(site: ast.Site, context: SiteContext) -> Resolved:
    """Where a path ends: a site, or what heads of a group or of a finding read (`q movers`,
    `q of top 2 of cie`)."""
    if site.ranked is not None and site.names:
        heads = ast.Site(ranked=site.ranked, span=site.ranked.span)
    elif len(site.names) > 1 and not site.axes:
        heads = ast.Site((site.names[1],), span=site.names[1].span)
    else:
        return resolve_site(site, context)
    component = site.names[0]
    kinds = component_kinds(ast.Site((component,), span=component.span), context)
    if kinds is None:
        return None, ()
    without = next((kind for kind in kinds if kind.unit not in _HEADS), None)
    if without is not None:
        hint = "write `q`, `k` or `v`, or the site alone"
        if without.has_layer:
            hint += f": `{without.name} layer 3`"
        context.diagnostics.append(
            AxisDoesNotFit(span=component.span, site=without.name, reason="has no heads", hint=hint)
        )
        return None, ()
    loop = component.id if component.id in context.loops else None
    targets = _named(heads, kinds, loop, context)
    return (targets if targets is not None and _there(targets, site, context) else None), ()


def _there(targets: SiteTargets, node: ast.Edge | ast.Site, context: SiteContext) -> bool:
    """Whether the model has all of the points."""
    points = (point for here in targets.points.values() for point in here)
    missing = missing_points(points, context.shape, context.model, node.span)
    if missing is not None:
        context.diagnostics.append(missing)
    return missing is None


def _named(
    heads: ast.Site, kinds: list[SiteKind], loop: str | None, context: SiteContext
) -> SiteTargets | None:
    """The heads that a group, a short name or a finding names, at other sites of theirs, joined.

    loop: the `for` over these sites, if there is one.
    """
    if heads.names and heads.names[0].id not in context.groups:
        name = heads.names[0]
        known = ", ".join(context.groups)
        otherwise = f"the file has {known}" if known else "name heads: `group movers = L9H9, L9H6`"
        context.diagnostics.append(
            UnknownName(
                span=name.span,
                kind="group",
                name=name.id,
                hint=did_you_mean(name.id, context.groups, otherwise),
            )
        )
        return None
    found, _ = resolve_site(heads, context)
    if found is None:
        return None
    written = heads.span.written
    others = {p.site for here in found.points.values() for p in here}
    wrong = sorted(name for name in others if SITES[name].unit not in _HEADS)
    if wrong:
        context.diagnostics.append(
            AxisDoesNotFit(
                span=heads.span,
                site=written,
                reason=f"is not made of heads alone: it has `{wrong[0]}`",
                hint="name heads, such as `L9H9`, or an experiment that sweeps them",
            )
        )
        return None
    axes = found.axes if loop is None or loop in found.axes else (loop, *found.axes)
    points: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    for number, key in product(range(len(kinds)), found.points):
        here = found.points[key]
        at = key if axes == found.axes else (number, *key)
        alone = len(here) == 1
        own = [
            each for point in here for each in _at(point, kinds[number], context.shape, alone=alone)
        ]
        points[at] = tuple(dict.fromkeys(own))
        plain = here and found.labels[key] == points_label(here)
        label = points_label(points[at]) if plain else found.labels[key]
        labels[at] = label if plain or kinds[number].name == "pattern" else (
            f"{kinds[number].name} of {label}"
        )  # fmt: skip
    return SiteTargets(axes, points, labels)


def _at(point: SitePoint, kind: SiteKind, shape: ModelShape, *, alone: bool) -> Iterator[SitePoint]:
    """The same head at another site; several heads for keys or values that they share.

    alone: nothing else is named, so that a head can't be named twice.
    """
    if point.unit is None:
        every = range(units(shape, kind.name, point.layer))
        yield from (
            SitePoint(kind.name, point.layer, unit) for unit in ([None] if alone else every)
        )
        return
    own, other = units(shape, point.site, point.layer), units(shape, kind.name, point.layer)
    if other <= own:
        yield SitePoint(kind.name, point.layer, point.unit * other // own)
        return
    shared = other // own
    first = point.unit * shared
    yield from (SitePoint(kind.name, point.layer, first + i) for i in range(shared))
