"""Sites with their axes: which points of the model each cell of a sweep writes to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_coordinates import (
    AxisDoesNotFit,
    NoComponent,
    TooManyCells,
    UnitOutOfRange,
)
from mechdsl.diagnostics.e04_model import SiteNotInBlock
from mechdsl.models.missing_site import missing_site
from mechdsl.models.shape import ModelShape, units
from mechdsl.resolve.coordinates import (
    AxisValues,
    SiteContext,
    axis_values,
    layer_exists,
    unit_exists,
)
from mechdsl.resolve.open_axes import is_open
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import Key, SitePoint, SiteTargets
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import STACKS
from mechdsl.syntax.walk import numbers_named
from mechdsl.vocab.sites import SHORT_WORDS, SITES, SiteKind, by_short, unknown_component


def resolve_site(
    site: ast.Site, context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """The targets of a site and the axes that it adds; None after an error."""
    if site.short is not None:
        targets, axes = _fixed(site, (site,), context)
    elif site.ranked is not None:
        targets, axes = _picked(site, site.ranked, context), ()
    elif len(site.names) == 1 and not site.axes and site.names[0].id in context.groups:
        targets, axes = _fixed(site, context.groups[site.names[0].id].sites, context)
    else:
        targets, axes = swept(site, context)
    if targets is not None:
        points = (point for here in targets.points.values() for point in here)
        missing = missing_points(points, context.shape, context.model, site.span)
        if missing is not None:
            context.diagnostics.append(missing)
            return None, ()
    return targets, axes


def missing_points(
    points: Iterable[SitePoint], shape: ModelShape, model: str, span: Span
) -> Diagnostic | None:
    """E0301, E0402, E0413 or E0414 for the first point that the model doesn't have."""
    points = list(points)
    for site, layer in dict.fromkeys((point.site, point.layer) for point in points):
        missing = missing_site(shape, site, model=model, span=span)
        if missing is not None:
            return missing
        if not shape.has(site, layer):
            own = sorted(shape.partly[site])
            return SiteNotInBlock(
                span=span,
                model=model,
                site=site,
                layer=layer or 0,
                reason="its blocks are not all built alike",
                layers=f"layer {', '.join(map(str, own))}",
            )
    for point in points:
        last = units(shape, point.site, point.layer) - 1
        if point.unit is not None and point.unit > last:
            word = "neuron" if SITES[point.site].unit == "neuron" else "head"
            return UnitOutOfRange(
                span=span,
                unit=word,
                units=f"{word}s",
                index=point.unit,
                last=last,
                where=f"at `{point.site}` in layer {point.layer}",
                model=model,
            )
    return None


def _fixed(
    site: ast.Site, sites: tuple[ast.Site, ...], context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Short names and groups: joined points without an axis."""
    points: list[SitePoint] = []
    for member in sites:
        if member.short is not None:
            point = _short(member.short, context)
            if point is None:
                return None, ()
            points.append(point)
            continue
        if member.ranked is not None:
            found = context.onward.pick_sites(
                member.ranked, context.parameters, context.diagnostics
            )
            if found is None:
                return None, ()
            points.extend(point for each in found for point in each.points)
            continue
        targets, axes = swept(member, context)
        if targets is None:
            return None, ()
        if axes or targets.axes:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=member.span,
                    site=member.span.written,
                    reason="sweeps inside a group, whose sites are joined",
                    hint="write the plural: `layers`, `heads`",
                )
            )
            return None, ()
        points.extend(targets.points[()])
    points = list(dict.fromkeys(points))  # a group may name what is picked for it too
    plain = len(sites) == 1 and sites[0].ranked is None
    label = points_label(points) if plain else site.span.written
    return SiteTargets((), {(): tuple(points)}, {(): label}), ()


def _picked(site: ast.Site, node: ast.Ranked, context: SiteContext) -> SiteTargets | None:
    """`top 10 of cie`, joined, for every value of the `for` variables that it names."""
    named = set(numbers_named(node))
    loops = tuple(name for name in context.loops if name in named)
    points: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    for key, values in context.combinations(loops):
        here = {**context.parameters, **values}
        found = context.onward.pick_sites(node, here, context.diagnostics)
        if found is None:
            return None
        points[key] = tuple(dict.fromkeys(point for each in found for point in each.points))
        several = context.onward.said(node, here) if loops else site.span.written
        labels[key] = found[0].label if len(found) == 1 else several
    return SiteTargets(loops, points, labels)


def _short(short: ast.ShortSite, context: SiteContext) -> SitePoint | None:
    kind = _short_kind(short, context)
    if kind is None or not layer_exists(short.layer, short.span, context):
        return None
    if not available(kind, short.span, context):
        return None
    unit = short.index if kind.unit is not None else None
    if unit is not None and not unit_exists(kind, unit, short.span, context):
        return None
    return SitePoint(kind.name, short.layer, unit)


def _short_kind(short: ast.ShortSite, context: SiteContext) -> SiteKind | None:
    default = by_short(short.unit or "resid")
    if short.component is None:
        if short.unit is None:
            _no_component(short.span, context)
            return None
        return default
    kind = by_short(short.component) or SITES.get(short.component)
    if kind is None:
        said = unknown_component(short.component, short.span, SHORT_WORDS)
        context.diagnostics.append(said)
        return None
    letter = {"head": "H", "kv_head": "H", "neuron": "N"}.get(kind.unit or "")
    if letter != short.unit:
        names = (
            f"`L{short.layer}{letter}0.{kind.name}`" if letter else f"`L{short.layer}.{kind.name}`"
        )
        context.diagnostics.append(
            AxisDoesNotFit(
                span=short.span,
                site=kind.name,
                reason="has no such coordinate" if short.unit else "needs a head or neuron",
                hint=f"write {names}",
            )
        )
        return None
    return kind


def _no_component(span: Span, context: SiteContext) -> None:
    components = ", ".join(
        f"`{name}`"
        for name, kind in SITES.items()
        if kind.axes == ("layer",) and name in context.shape.sites
    )
    context.diagnostics.append(NoComponent(span=span, components=components))


def component_kinds(site: ast.Site, context: SiteContext) -> list[SiteKind] | None:
    """The component of a site; several where a `for` runs over components."""
    words = list(site.names)
    first = words[0] if words and words[0].id not in context.loops else None
    stacks = [word for word in (first, *words[1:]) if word is not None and word.id in STACKS]
    if stacks and not is_own_stack(stacks[0], context):
        return None
    words = [word for word in words if word not in stacks]
    if not words:
        if any(axis.word == "head" for axis in site.axes):
            return [SITES["z"]]
        if any(axis.word == "neuron" for axis in site.axes):
            return [SITES["mlp_hidden"]]
        _no_component(site.span, context)
        return None
    word = words[0]
    names = context.loops.get(word.id, (word.id,))
    kinds: list[SiteKind] = []
    for name in names:
        kind = SITES.get(str(name))
        if kind is None and re.fullmatch(r"L\d+", str(name)):
            _no_component(word.span, context)  # `L9`, a short name that ends too early
            return None
        if kind is None:
            others = (*context.groups, *context.loops)
            span = context.words.get((word.id, str(name)), word.span)
            context.diagnostics.append(unknown_component(str(name), span, others))
            return None
        if not available(kind, word.span, context):
            return None
        kinds.append(kind)
    if len(words) > 1:
        unknown_stack(words[1], context)
        return None
    return kinds


def is_own_stack(word: ast.Name, context: SiteContext) -> bool:
    """Whether a word in front of the axes says the stack that rules act in anyway, the tower that
    reads the rows of a model with two. Codes: E0108, E0203, E0207."""
    side = context.shape.side
    if word.id not in STACKS:
        unknown_stack(word, context)
    elif word.id == side or (context.shape.stands_in and word.id in ("vision", "text")):
        return True
    elif side and word.id in ("vision", "text"):
        rows, other = ("images", "prompts") if side == "vision" else ("prompts", "images")
        hint = f"leave `{word.id}` out; an experiment on {other} acts in its {word.id} tower"
        if word.id == "text":
            hint += ", with a line `image from …` in its block"
        reason = f"isn't where rules act here: the rows are {rows}"
        bad = BadArgument(span=word.span, name=f"{word.id} layer", reason=reason, hint=hint)
        context.diagnostics.append(bad)
    else:
        what = f"the stack `{word.id}`"
        context.diagnostics.append(NotSupported(span=word.span, what=what))
    return False


def unknown_stack(word: ast.Name, context: SiteContext) -> None:
    """E0203 for a word between a component and its axes that is no stack."""
    hint = did_you_mean(word.id, STACKS, f"leave `{word.id}` out: the axes come next")
    context.diagnostics.append(UnknownWord(span=word.span, kind="stack", word=word.id, hint=hint))


def available(kind: SiteKind, span: Span, context: SiteContext) -> bool:
    """Whether the model has a component; E0402 or its like where not."""
    missing = missing_site(context.shape, kind.name, model=context.model, span=span)
    if missing is not None:
        context.diagnostics.append(missing)
    return missing is None


def with_read_layers(
    read: SiteTargets, into: ast.Star | ast.AxisRange, context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """`into layer L`: what is read stays, what is written lies in other layers; several of them
    are an axis `to_layer`."""
    kinds = [SITES[p.site] for points in read.points.values() for p in points]
    if not all(kind.has_layer for kind in kinds):
        context.diagnostics.append(
            AxisDoesNotFit(
                span=into.span,
                site=kinds[0].name,
                reason="has no layers to be written into",
                hint="leave `into layer …` out",
            )
        )
        return None, ()
    for own in read.points.values():
        if len({p.layer for p in own}) > 1:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=into.span,
                    site=points_label(own),
                    reason="is read in several layers at once, which can't all go into one",
                    hint="sweep with `layer`, the singular, or leave `into layer …` out",
                )
            )
            return None, ()
    word = ast.Axis("layer", False, (into,), span=into.span)
    values = axis_values(word, kinds, context)
    if values is None:
        return None, ()
    axes = () if values.sweep is None else (replace(values.sweep, name="to_layer"),)
    values = replace(values, sweep=axes[0] if axes else None)
    extra = [loop for loop in values.loops if loop not in read.axes]
    names = (*read.axes, *extra, *(axis.name for axis in axes))
    sizes = [len(context.loops[loop]) for loop in extra] + [len(axis) for axis in axes]
    points: dict[Key, tuple[SitePoint, ...]] = {}
    sources: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    for before, own in read.points.items():
        for more in product(*map(range, sizes)):
            key = (*before, *more)
            at = dict(zip(names, key, strict=True))
            (layer,) = values.chosen(at)
            points[key] = tuple(replace(p, layer=layer) for p in own)
            sources[key] = own
            labels[key] = f"{read.labels[before]} → L{layer}"
    return SiteTargets(names, points, labels, sources), axes


def swept(
    site: ast.Site, context: SiteContext, kinds: list[SiteKind] | None = None
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """The points that axes name, of the components that a site names or of these."""
    kinds = component_kinds(site, context) if kinds is None else kinds
    if kinds is None:
        return None, ()
    if not all(_axes_fit(site, kind, context) for kind in kinds):
        return None, ()
    by_word = {axis.word: axis for axis in site.axes}
    layers = axis_values(by_word.get("layer"), kinds, context)
    unit_axis = next((a for a in site.axes if a.word != "layer"), None)
    units_ = axis_values(unit_axis, kinds, context)
    if layers is None or units_ is None:
        return None, ()
    component_loop = site.names[0].id if site.names and site.names[0].id in context.loops else None

    axes: list[Axis] = []
    loops: list[str] = []
    if component_loop is not None:
        loops.append(component_loop)
    for part in (layers, units_):
        loops.extend(loop for loop in part.loops if loop not in loops)
        if part.sweep is not None:
            axes.append(part.sweep)
    names = (*loops, *(axis.name for axis in axes))
    sizes = [len(context.loops[loop]) for loop in loops] + [len(axis) for axis in axes]
    joined = prod(
        max((len(c) for c in part.choices.values()), default=1) for part in (layers, units_)
    )
    if (cells := prod(sizes) * joined) > limits.CELLS:
        counts = (f"{name} ({size:,})" for name, size in zip(names, sizes, strict=True))
        context.diagnostics.append(
            TooManyCells(
                span=site.span,
                of=f"`{site.span.written}`",
                cells=cells,
                most=limits.CELLS,
                axes=" × ".join(counts) or "it joins as many points",
                by_text=not any(is_open(value) for axis in site.axes for value in axis.values),
            )
        )
        return None, ()
    points: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    for key in product(*map(range, sizes)):
        at = dict(zip(names, key, strict=True))
        kind = kinds[at[component_loop] if component_loop is not None else 0]
        here = tuple(
            SitePoint(kind.name, layer, unit)
            for layer in _chosen(layers, at, kind.has_layer)
            for unit in _chosen(units_, at, kind.unit is not None)
        )
        points[key] = here
        labels[key] = points_label(here)
    return SiteTargets(names, points, labels), tuple(axes)


def _chosen(values: AxisValues, at: Mapping[str, int], applies: bool) -> tuple[int | None, ...]:
    """The joined coordinates of one cell; (None,) where the component has no such axis."""
    return values.chosen(at) if applies and values.choices else (None,)


def _axes_fit(site: ast.Site, kind: SiteKind, context: SiteContext) -> bool:
    allowed = set(kind.axes)
    for axis in site.axes:
        if axis.word not in allowed:
            has = " and ".join(f"`{a}`" for a in kind.axes) or "no axes"
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=axis.span,
                    site=kind.name,
                    reason=f"has no axis `{axis.word}`",
                    hint=f"`{kind.name}` has {has}",
                )
            )
            return False
    words = [axis.word for axis in site.axes]
    for word in set(words):
        if words.count(word) > 1:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=site.axes[-1].span,
                    site=kind.name,
                    reason=f"names the axis `{word}` twice",
                    hint=f"write a list: `{word} 0, 3`",
                )
            )
            return False
    if kind.has_layer and "layer" not in words:
        name = kind.name if site.names else site.span.written
        every = f"{name} layer *" if site.names else f"layer * {name}"
        context.diagnostics.append(
            AxisDoesNotFit(
                span=site.span,
                site=name,
                reason="needs a layer",
                hint=f"write `{every}` for every layer, one run each",
            )
        )
        return False
    return True


def points_label(points: tuple[SitePoint, ...] | list[SitePoint]) -> str:
    """`L2H0.z`, `L3.resid_post`, `L0-2.resid_post`, `L3H*.z`, `embed`."""
    site = points[0].site
    layers = sorted({p.layer for p in points if p.layer is not None})
    found = {p.unit for p in points}
    where = "" if not layers else f"L{_numbers(layers)}"
    if SITES[site].unit is not None:
        letter = "N" if SITES[site].unit == "neuron" else "H"
        known = sorted(u for u in found if u is not None)
        where += letter + ("*" if None in found else _numbers(known))
    return f"{where}.{site}" if where else site


def all_points_label(points: Sequence[SitePoint]) -> str:
    """All points, whatever a table could show: `L0H2.z + L1H3.z`."""
    by_layer: dict[tuple[str, int | None], list[SitePoint]] = {}
    for point in points:
        by_layer.setdefault((point.site, point.layer), []).append(point)
    return " + ".join(points_label(each) for each in by_layer.values())


def _numbers(values: list[int]) -> str:
    """`3`, `0-2`, `0,3,7`."""
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ",".join(map(str, values))
