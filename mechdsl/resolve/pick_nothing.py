"""Cells that pick no site, `patch top 0 of cie`."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.resolved_rule import Key, PositionTargets, SitePoint, SiteTargets

EMBED = SitePoint("embed", None, None)


def pick_nothing(
    sites: SiteTargets | None,
    positions: PositionTargets | None,
    otherwise: SitePoint = EMBED,
) -> tuple[SiteTargets | None, PositionTargets | None]:
    """Cells that pick no site write at no token: any site stands in for them.

    A cell has sites and positions of its own in every stage behind this one.

    otherwise: where no cell picks any.
    """
    if sites is None or positions is None or all(sites.points.values()):
        return sites, positions
    some = next((p for p in sites.points.values() if p), (otherwise,))
    points = {key: here or some for key, here in sites.points.items()}
    sources = sites.sources
    if sources is not None:
        read = next((p for p in sources.values() if p), some)
        sources = {key: here or read for key, here in sources.items()}
    axes = (*positions.axes, *(a for a in sites.axes if a not in positions.axes))
    sizes = {axis: 1 + max(key[i] for key in sites.points) for i, axis in enumerate(sites.axes)}
    more = axes[len(positions.axes) :]
    written: dict[Key, PositionCell] = {}
    read_at: dict[Key, PositionCell] = {}
    for before in positions.written:
        for behind in product(*(range(sizes[axis]) for axis in more)):
            key = (*before, *behind)
            at = dict(zip(axes, key, strict=True))
            empty = not sites.points[tuple(at[axis] for axis in sites.axes)]
            for cells, into in ((positions.written, written), (positions.read, read_at)):
                cell = cells[before]
                into[key] = _without_tokens(cell) if empty else cell
    labels = {key: label if sites.points[key] else "nothing" for key, label in sites.labels.items()}
    return (
        replace(sites, points=points, labels=labels, sources=sources),
        replace(positions, axes=axes, written=written, read=read_at),
    )


def _without_tokens(cell: PositionCell) -> PositionCell:
    return replace(cell, hits=tuple(((),) if row else () for row in cell.hits))
