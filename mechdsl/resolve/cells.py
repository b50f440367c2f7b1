"""The cells of an experiment by name: coordinates, site, position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from mechdsl.data.positions import hit_texts
from mechdsl.resolve.paths import reached
from mechdsl.resolve.types import Key, ResolvedExperiment, ResolvedRule
from mechdsl.results.cell import CellKey


def cell_keys(experiment: ResolvedExperiment) -> Iterator[CellKey]:
    """Every cell that there is, in the order of its axes, the last one fastest."""
    names = [axis.name for axis in experiment.axes]
    base = experiment.spec.base
    hits = [
        {
            key: hit_texts(experiment.table, base, cell)
            for key, cell in rule.positions.written.items()
        }
        for rule in experiment.rules
    ]
    keys_hit = [
        {}
        if rule.edge is None
        else {
            key: hit_texts(experiment.table, base, cell)
            for key, cell in rule.edge.keys.written.items()
        }
        for rule in experiment.rules
    ]
    parts = [_parts(rule, names) for rule in experiment.rules]
    parallel = experiment.model.shape.parallel_block
    for index in product(*(range(len(axis)) for axis in experiment.axes)):
        if not all(_leads(rule, names, index, parallel) for rule in experiment.rules):
            continue
        coords = {axis.name: axis.labels[i] for axis, i in zip(experiment.axes, index, strict=True)}
        sites: dict[str, None] = {}
        positions: dict[str, None] = {}
        tokens: dict[str, None] = {}
        for number, rule in enumerate(experiment.rules):
            site_key, position_key = parts[number]
            site = "input" if rule.sites is None else rule.sites.labels[site_key(index)]
            if rule.path is not None:
                receivers = rule.path.receivers
                site += f" → {receivers.labels[_along(receivers.axes, names)(index)]}"
            sites[site] = None
            key = position_key(index)
            label = rule.positions.written[key].label
            if rule.edge is not None:
                keys = rule.edge.keys
                label += f" → {keys.written[_along(keys.axes, names)(index)].label}"
            positions[label] = None
            tokens.update(dict.fromkeys(hits[number][key]))
            if rule.edge is not None:
                keys = rule.edge.keys
                tokens.update(dict.fromkeys(keys_hit[number][_along(keys.axes, names)(index)]))
        yield CellKey(coords, " + ".join(sites), " + ".join(positions) or None, tuple(tokens))


def _parts(
    rule: ResolvedRule, names: list[str]
) -> tuple[Callable[[Key], Key], Callable[[Key], Key]]:
    """How a cell's indices give those of the rule's sites and positions."""
    sites = rule.sites.axes if rule.sites is not None else ()
    return _along(sites, names), _along(rule.positions.axes, names)


def _along(axes: tuple[str, ...], names: list[str]) -> Callable[[Key], Key]:
    places = [names.index(axis) for axis in axes]
    return lambda index: tuple(index[place] for place in places)


def _leads(rule: ResolvedRule, names: list[str], index: Key, parallel: bool) -> bool:
    """Whether a path of this cell has a receiver behind its sender."""
    if rule.path is None or rule.sites is None:
        return True
    senders = rule.sites.points[_along(rule.sites.axes, names)(index)]
    receivers = rule.path.receivers
    ends = receivers.points[_along(receivers.axes, names)(index)]
    return bool(reached(senders, ends, parallel=parallel))
