"""Rules and measures inside of blocks that hand on what enters them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import SiteNotInBlock
from mechdsl.resolve.resolved import ResolvedMeasure
from mechdsl.resolve.resolved_rule import ResolvedRule, SitePoint, SiteTargets

_AROUND = ("resid_pre", "resid_post")
"""What is there all the same."""


def inside_removed(
    rules: Sequence[ResolvedRule], measures: Sequence[ResolvedMeasure], model: str
) -> Iterator[Diagnostic]:
    """E0414 for what is written or read in a block that computes nothing, in some cell."""
    for rule in rules:
        if rule.does.changes != "blocks" or rule.sites is None or rule.spec.fill is None:
            continue
        for other in rules:
            if other.does.changes != "blocks" and other.sites is not None:
                point = _met(rule.sites, other.sites)
                if point is not None:
                    yield _refused(point, model, other.spec.span)
        layers = {point.layer for here in rule.sites.points.values() for point in here}
        for measure in measures:
            points = [atom.point for atom in measure.atoms if atom.point is not None]
            point = next((point for point in points if _within(point, layers)), None)
            if point is not None:
                yield _refused(point, model, measure.expression.span)


def _refused(point: SitePoint, model: str, span: Span) -> Diagnostic:
    return SiteNotInBlock(
        span=span,
        model=model,
        site=point.site,
        layer=point.layer or 0,
        reason="that block is replaced with identity",
        layers="blocks that stay as they are",
    )


def _within(point: SitePoint, layers: set[int | None]) -> bool:
    return point.layer in layers and point.layer is not None and point.site not in _AROUND


def _met(removed: SiteTargets, other: SiteTargets) -> SitePoint | None:
    """A site that lies in a removed block in a cell that both have."""
    shared = [axis for axis in removed.axes if axis in other.axes]
    first = [removed.axes.index(axis) for axis in shared]
    second = [other.axes.index(axis) for axis in shared]
    for (key, blocks), (at, points) in product(removed.points.items(), other.points.items()):
        if [key[i] for i in first] != [at[i] for i in second]:
            continue
        layers = {block.layer for block in blocks}
        inside = next((point for point in points if _within(point, layers)), None)
        if inside is not None:
            return inside
    return None
