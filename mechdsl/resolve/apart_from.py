"""`against random(39) apart from top 5 of X, movers`: what is never drawn as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechdsl.diagnostics.core import has_errors
from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.resolve.coordinates import SiteContext
from mechdsl.resolve.matched_draws import UNIT_WORDS, Slot
from mechdsl.resolve.picks import Onward
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES


@dataclass(frozen=True)
class LeftOut:
    """One part of it, with all that it names."""

    site: ast.Site
    points: tuple[SitePoint, ...]


def left_out(control: spec.Control | None, context: SiteContext) -> tuple[LeftOut, ...]:
    """All points behind `apart from`; diagnostics go to the context. What other experiments picked
    is no part of what this one tests. Codes: E0203, E0301 to E0313, E0402, E0620."""
    if control is None:
        return ()
    whole = context.onward
    apart = Onward(whole.found, whole.called, whole.groups, whole.picks)
    # It stands behind every `for`, whose variables mean nothing here.
    here = replace(context, loops={}, onward=apart)
    found: list[LeftOut] = []
    for site in control.apart:
        targets, _ = resolve_site(site, here)
        if targets is not None:
            points = dict.fromkeys(point for each in targets.points.values() for point in each)
            found.append(LeftOut(site, tuple(points)))
    return () if has_errors(context.diagnostics) else tuple(found)


def units_of(parts: Sequence[LeftOut], shape: ModelShape) -> dict[Slot, tuple[int, ...]]:
    """Heads, neurons and experts, where they could be drawn. A head goes with its query, key and
    value: with a key-value head go all heads that share it."""
    found: dict[Slot, set[int]] = {}
    for point in (point for part in parts for point in part.points):
        kind = SITES[point.site].unit
        if kind is None or point.unit is None:
            continue
        size = units(shape, point.site, point.layer)
        sizes = {size, shape.n_heads, shape.n_kv_heads} if UNIT_WORDS[kind] == "heads" else {size}
        for other in sizes:
            slot = Slot(UNIT_WORDS[kind], other, point.layer)
            same = range(point.unit * other // size, -(-(point.unit + 1) * other // size))
            found.setdefault(slot, set()).update(same)
    return {slot: tuple(sorted(here)) for slot, here in found.items()}


def layers_of(parts: Sequence[LeftOut]) -> frozenset[int]:
    """Layers that are named without a unit, whatever the component."""
    return frozenset(
        point.layer
        for part in parts
        for point in part.points
        if point.layer is not None and point.unit is None
    )


def words_of(part: LeftOut) -> set[spec.Drawn]:
    """What it names, as it could be drawn."""
    kinds = {(SITES[p.site].unit if p.unit is not None else None) for p in part.points}
    return {"layers" if kind is None else UNIT_WORDS[kind] for kind in kinds}
