"""The cells of an experiment by name: coordinates, site, position."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import TypeVar

from mechdsl.prompts.position_hits import hit_texts
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.cell_key import CellKey
from mechdsl.resolve.path_rules import reached
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import Key, ResolvedRule
from mechdsl.resolve.unlike_tokens import counts, unlike

T = TypeVar("T")
Texts = tuple[str, ...]


def cell_keys(
    experiment: ResolvedExperiment, open_axes: Collection[str] = (), *, texts: bool = True
) -> Iterator[CellKey]:
    """Every cell that there is, in the order of its axes, the last one fastest.

    open_axes: those whose values only stand in for the real ones. Both ends are enough of them.
    texts: with the texts of the tokens that are hit, for which all rows are looked at.
    """
    rules = [_NamedRule(experiment, rule, texts=texts) for rule in experiment.rules]
    item = experiment.measures[0].item if experiment.place is not None else None
    measured = {} if item is None else {"item": item}
    ranges = [
        dict.fromkeys((0, len(axis) - 1)) if axis.name in open_axes else range(len(axis))
        for axis in experiment.axes
    ]
    picked = "to_layer" in open_axes  # receivers that another experiment picks may be anywhere
    for index in product(*ranges):
        leads = (rule.leads(index, to_picked=picked) for rule in rules)
        if not experiment.has(index) or not all(leads):
            continue
        along = list(zip(experiment.axes, index, strict=True))
        coords = {axis.name: axis.labels[i] for axis, i in along}
        also = {axis.alias: axis.items[i] or 0 for axis, i in along if axis.alias is not None}
        also = {**measured, **also}
        sites = dict.fromkeys(rule.site(index) for rule in rules)
        positions = dict.fromkeys(rule.position(index) for rule in rules)
        tokens = dict.fromkeys(text for rule in rules for text in rule.tokens(index))
        position = " + ".join(positions) or None
        read = dict.fromkeys(text for rule in rules for text in rule.unlike(index))
        yield CellKey(coords, " + ".join(sites), position, tuple(tokens), tuple(read), also)


class _NamedRule:
    """What a rule's part of a cell is called, by the cell's indices along the axes."""

    def __init__(self, experiment: ResolvedExperiment, rule: ResolvedRule, *, texts: bool) -> None:
        names = [axis.name for axis in experiment.axes]
        self.parallel = experiment.model.shape.parallel_block

        def hits(cells: Mapping[Key, PositionCell]) -> dict[Key, tuple[str, ...]]:
            base = experiment.spec.base
            if not texts:
                return dict.fromkeys(cells, ())
            return {key: hit_texts(experiment.table, base, cell) for key, cell in cells.items()}

        positions, edge, path = rule.positions, rule.edge, rule.path
        self.sites = self.ends = self.senders = self.receivers = self.keys = self.beside = None
        self.rule, self.names = rule, names
        self.positions = _along(positions.written, positions.axes, names)
        self.texts = [_along(hits(positions.written), positions.axes, names)]
        unlike = self._unlike(experiment, rule) if texts else dict.fromkeys(positions.written, ())
        self.unlike = _along(unlike, positions.axes, names)
        if rule.sites is not None:
            self.sites = _along(rule.sites.labels, rule.sites.axes, names)
            self.senders = _along(rule.sites.points, rule.sites.axes, names)
        if rule.beside is not None:
            self.beside = _along(rule.beside.labels, rule.beside.axes, names)
        if path is not None:
            self.ends = _along(path.receivers.labels, path.receivers.axes, names)
            self.receivers = _along(path.receivers.points, path.receivers.axes, names)
        if edge is not None:
            self.keys = _along(edge.keys.written, edge.keys.axes, names)
            self.texts.append(_along(hits(edge.keys.written), edge.keys.axes, names))

    def _unlike(self, experiment: ResolvedExperiment, rule: ResolvedRule) -> dict[Key, Texts]:
        """The tokens that are read where they are others than those that are written."""
        runs, positions = experiment.table.runs, rule.positions
        base = runs[experiment.spec.base]
        copied = rule.spec.onto is None and rule.apart is None and rule.run != base.name
        if not copied or not counts(rule.spec.at):
            return dict.fromkeys(positions.written, ())
        return {
            key: hit_texts(experiment.table, rule.run, positions.read[key])
            if unlike(base, runs[rule.run], cell, positions.read[key])
            else ()
            for key, cell in positions.written.items()
        }

    def leads(self, index: Key, *, to_picked: bool) -> bool:
        """Whether a path has a receiver behind its sender, and what is compared comes later."""
        if not self.rule.leads(dict(zip(self.names, index, strict=True))):
            return False
        if self.senders is None or self.receivers is None or to_picked:
            return True
        return bool(reached(self.senders(index), self.receivers(index), parallel=self.parallel))

    def site(self, index: Key) -> str:
        name = "input" if self.sites is None else self.sites(index)
        name = name if self.beside is None else f"{name} ~ {self.beside(index)}"
        return name if self.ends is None else f"{name} → {self.ends(index)}"

    def position(self, index: Key) -> str:
        label = self.positions(index).label
        return label if self.keys is None else f"{label} → {self.keys(index).label}"

    def tokens(self, index: Key) -> Iterator[str]:
        """The texts of tokens that are hit: those of queries, then of keys."""
        for texts in self.texts:
            yield from texts(index)


def _along(values: Mapping[Key, T], axes: Sequence[str], names: list[str]) -> Callable[[Key], T]:
    """A cell's value of what depends on some of its axes."""
    places = [names.index(axis) for axis in axes]
    return lambda index: values[tuple(index[place] for place in places)]
