"""`set SITE at POSITIONS to NUMBER * value(SITE at POSITIONS) of RUN`, `add … to SITE`: what a run
has elsewhere.

The run is an unpatched one: the base run, where none is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from mechdsl.diagnostics.e03_rules import BadAmount
from mechdsl.models.shape import units, width
from mechdsl.program import spec
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Amounts,
    Convention,
    Intervention,
    Key,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    Vectors,
)
from mechdsl.resolve.site_targets import points_label, resolve_site
from mechdsl.resolve.targets import rule_targets
from mechdsl.rules.kind import HOW
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class ReadValue(Intervention):
    """`to 0.5 * value(SITE)`: the vector of another site, times a number."""

    name = "value"
    reads = "run"

    def detail(self, rule: ResolvedRule) -> str | None:
        return "" if rule.spec.fill is None else f"times {rule.spec.fill.span.written}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.reading is not None
        site = rule.spec.reading.span.written
        yield Convention("value", f"`{site}` is what the unpatched run {rule.run} has there")

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        read = vectors.read()
        return read * vectors.amounts[:, None].to(read)


class AddedValue(ReadValue):
    """`add 0.3 * value(attn_out layer 8) of clean to SITE`: a row's own activation as its
    direction."""

    name = "add value"
    mode = "add"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        yield Convention("steering", f"`add` {HOW}")

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 0


ADDED_VALUE = AddedValue()


def resolve_reading(rule: spec.Rule, does: Intervention, work: Work) -> ResolvedRule | None:
    """The rule with what it reads; E0337 where that has another width than what is written."""
    assert rule.site is not None
    assert rule.reading is not None
    run = rule.source or work.experiment.base
    written, axes = resolve_site(rule.site, work.sites)
    read, more = resolve_site(rule.reading, work.sites)
    for axis in (*axes, *more):
        if axis.name not in work.loops:
            work.add_axis(axis)
    positions = rule_targets(rule, run, work)
    amounts: Amounts | None = Amounts((), {(): 1.0})
    if rule.fill is not None:
        amounts = resolve_amounts(rule.fill, work)
    if written is None or read is None or positions is None or amounts is None:
        return None
    sites = _paired(written, read)
    if not _fit(rule, sites, work):
        return None
    return ResolvedRule(
        spec=rule, does=does, run=run, sites=sites, positions=positions, amounts=amounts
    )


def _paired(written: SiteTargets, read: SiteTargets) -> SiteTargets:
    """Every combination of what is written and what is read, along the axes of both."""
    extra = [name for name in read.axes if name not in written.axes]
    points: dict[Key, tuple[SitePoint, ...]] = {}
    sources: dict[Key, tuple[SitePoint, ...]] = {}
    labels: dict[Key, str] = {}
    for to, of in product(written.points, read.points):
        along = dict(zip(written.axes, to, strict=True))
        there = dict(zip(read.axes, of, strict=True))
        if any(along[name] != there[name] for name in along.keys() & there.keys()):
            continue
        key = (*to, *(there[name] for name in extra))
        points[key] = written.points[to]
        own = read.points[of]
        sources[key] = own * len(points[key]) if len(own) == 1 else own
        labels[key] = f"{read.labels[of]} → {written.labels[to]}"
    return replace(
        written, axes=(*written.axes, *extra), points=points, sources=sources, labels=labels
    )


def _fit(rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
    assert rule.reading is not None
    assert sites.sources is not None
    for key, points in sites.points.items():
        reason = _misfit(points, sites.sources[key], work)
        if reason is not None:
            text = rule.reading.span.written
            hint = "name sites of one width, and as many to be read as to be written, or one"
            work.diagnostics.append(
                BadAmount(span=rule.reading.span, text=text, reason=reason, hint=hint)
            )
            return False
    return True


def _misfit(
    points: tuple[SitePoint, ...], sources: tuple[SitePoint, ...], work: Work
) -> str | None:
    """Why these vectors can't be written there."""
    if len(points) != len(sources):
        return f"{len(sources)} vectors are read, and {len(points)} are written"
    shape = work.sites.shape
    for to, of in zip(points, sources, strict=True):
        if "key" in (SITES[to.site].width, SITES[of.site].width):
            return "vectors over keys belong to one prompt"
        ours, theirs = width(shape, to.site, to.layer), width(shape, of.site, of.layer)
        if ours != theirs:
            return f"{points_label((of,))} has {theirs} numbers, {points_label((to,))} {ours}"
        each = units(shape, of.site, of.layer)
        if of.unit is None and each > 1 and (to.unit is not None or each != units(shape, to.site)):
            return f"{points_label((of,))} are {each} vectors"
    return None
