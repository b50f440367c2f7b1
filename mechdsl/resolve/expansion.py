"""Expansion of an experiment: cells, measured positions, controls, and tested selections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TypeVar

from mechdsl.base.records import compact_record
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import hit_texts
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.cells import CellKey, counts_positions, find_token_mismatches
from mechdsl.resolve.types import (
    AxisIndices,
    LoopCells,
    MeasureGroup,
    ResolvedExperiment,
    ResolvedRule,
    select_reached,
)

T = TypeVar("T")

TokenTexts = tuple[str, ...]


def name_cells(
    experiment: ResolvedExperiment, open_axes: Collection[str] = (), *, texts: bool = True
) -> Iterator[CellKey]:
    """Yield the key of every cell in grid order, with the last axis varying fastest.

    Args:
        open_axes: Axes with placeholder values, of which only the first and last are used.
        texts: Whether keys contain the texts of the written tokens, which requires all rows.
    """
    rules = [_NamedRule(experiment, rule, texts=texts) for rule in experiment.rules]
    item = experiment.measures[0].item if experiment.place is not None else None
    measured = {} if item is None else {"item": item}
    ranges = [
        dict.fromkeys((0, len(axis) - 1)) if axis.name in open_axes else range(len(axis))
        for axis in experiment.axes
    ]
    picked = "to_layer" in open_axes  # picked receivers may be at any site
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
        tokens, queries, keys, read = (
            tuple(dict.fromkeys(text for rule in rules for text in rule.find(name, index)))
            for name in ("tokens", "queries", "keys", "read")
        )
        site, position = " + ".join(sites), " + ".join(positions) or None
        yield CellKey(coords, site, position, tokens, queries, keys, read, also)


class _NamedRule:
    """Names of a rule's sites, positions and tokens, by the cell's indices along the axes."""

    def __init__(self, experiment: ResolvedExperiment, rule: ResolvedRule, *, texts: bool) -> None:
        names = [axis.name for axis in experiment.axes]
        self.parallel = experiment.model.shape.parallel_block

        def hits(cells: Mapping[AxisIndices, PositionCell]) -> dict[AxisIndices, tuple[str, ...]]:
            base = experiment.spec.base
            if not texts:
                return dict.fromkeys(cells, ())
            return {key: hit_texts(experiment.table, base, cell) for key, cell in cells.items()}

        positions, edge, path = rule.positions, rule.edge, rule.path
        self.sites = self.ends = self.senders = self.receivers = self.keys = self.compared = None
        self.rule, self.names = rule, names
        self.positions = _index_along(positions.written, positions.axes, names)
        unlike = self._unlike(experiment, rule) if texts else dict.fromkeys(positions.written, ())
        ends = {"tokens": rule.named_positions}
        if edge is not None:
            by_key = rule.named_positions is edge.keys
            ends |= {"queries": positions} if by_key else {"keys": edge.keys}
        self.texts = {
            name: _index_along(hits(end.written), end.axes, names) for name, end in ends.items()
        }
        self.texts["read"] = _index_along(unlike, positions.axes, names)
        if rule.sites is not None:
            self.sites = _index_along(rule.sites.labels, rule.sites.axes, names)
            self.senders = _index_along(rule.sites.points, rule.sites.axes, names)
        if (others := rule.compared_sites) is not None:
            self.compared = _index_along(others.labels, others.axes, names)
        if path is not None:
            self.ends = _index_along(path.receivers.labels, path.receivers.axes, names)
            self.receivers = _index_along(path.receivers.points, path.receivers.axes, names)
        if edge is not None:
            self.keys = _index_along(edge.keys.written, edge.keys.axes, names)

    def _unlike(
        self, experiment: ResolvedExperiment, rule: ResolvedRule
    ) -> dict[AxisIndices, TokenTexts]:
        """Return the texts of tokens that are read, where they differ from the written tokens."""
        runs, positions = experiment.table.runs, rule.positions
        base = runs[experiment.spec.base]
        copied = rule.spec.onto is None and rule.external is None and rule.run != base.name
        if not copied or not counts_positions(rule.spec.at):
            return dict.fromkeys(positions.written, ())
        return {
            key: hit_texts(experiment.table, rule.run, positions.read[key])
            if find_token_mismatches(base, runs[rule.run], cell, positions.read[key])
            else ()
            for key, cell in positions.written.items()
        }

    def leads(self, index: AxisIndices, *, to_picked: bool) -> bool:
        """Return whether a path has a receiver after its sender, and compared sites come later."""
        if not self.rule.leads(dict(zip(self.names, index, strict=True))):
            return False
        if self.senders is None or self.receivers is None or to_picked:
            return True
        return bool(
            select_reached(self.senders(index), self.receivers(index), parallel=self.parallel)
        )

    def site(self, index: AxisIndices) -> str:
        name = "input" if self.sites is None else self.sites(index)
        name = name if self.compared is None else f"{name} ~ {self.compared(index)}"
        return name if self.ends is None else f"{name} → {self.ends(index)}"

    def find(self, name: str, index: AxisIndices) -> TokenTexts:
        """Return the texts of a field of `CellKey`; none if the rule has no such tokens."""
        return self.texts[name](index) if name in self.texts else ()

    def position(self, index: AxisIndices) -> str:
        label = self.positions(index).label
        return label if self.keys is None else f"{label} → {self.keys(index).label}"


def _index_along(
    values: Mapping[AxisIndices, T], axes: Sequence[str], names: list[str]
) -> Callable[[AxisIndices], T]:
    """Return a lookup by a cell's full index for values that depend on some axes."""
    places = [names.index(axis) for axis in axes]
    return lambda index: values[tuple(index[place] for place in places)]


def expand_controls(experiments: Iterable[ResolvedExperiment]) -> list[ResolvedExperiment]:
    """Return every experiment, followed by its control and its baselines."""
    return [
        each
        for experiment in experiments
        for each in (
            experiment,
            experiment.control and experiment.control.experiment,
            experiment.bare and experiment.bare.experiment,
            *(
                circuit_baseline.experiment
                for circuit_baseline in experiment.circuit_baselines.values()
            ),
        )
        if each is not None
    ]


def split_by_group(experiment: ResolvedExperiment) -> list[ResolvedExperiment]:
    """Split an experiment by the positions of its measures, if there are several."""
    return [_select_group(experiment, place) for place in experiment.places] or [experiment]


def select_exact_cells(
    experiment: ResolvedExperiment, cells: Iterable[AxisIndices]
) -> ResolvedExperiment:
    """Return an estimated experiment that runs some of its cells instead.

    Args:
        cells: Indices of the cells along all axes.
    """
    said = {"estimator": None, "reports": (), "expects": (), "saves": (), "saved_directions": ()}
    names = tuple(axis.name for axis in experiment.axes)
    return replace(
        experiment,
        spec=experiment.spec.model_copy(update=said),
        nested=LoopCells(names, frozenset(cells)),
        saves=(),
        direction_files=(),
    )


def add_exact_cells(experiments: Iterable[ResolvedExperiment]) -> Iterator[ResolvedExperiment]:
    """Yield experiments, each followed by the cells that `verify` runs.

    The chosen cells aren't known before the run: their places are taken by others of the grid, at
    equal distances.
    """
    for experiment in experiments:
        yield experiment
        said = experiment.spec.estimator
        if said is None or said.verify is None:
            continue
        indices = product(*(range(len(axis)) for axis in experiment.axes))
        there = [index for index in indices if experiment.has(index)]
        count = said.verify.most(len(there))
        chosen = [there[place * len(there) // count] for place in range(count)]
        exact = select_exact_cells(experiment, chosen)
        most = " at most" if said.verify.until else ""
        name = f"{experiment.name}, verified{most}"
        yield replace(exact, spec=exact.spec.model_copy(update={"name": name}))


def get_whole_spec(part: ResolvedExperiment) -> spec.Experiment:
    """Return the specification in the file of an experiment that was split."""
    if part.place is None:
        return part.spec
    count = len(part.spec.variant) - len(part.place.labels)
    return part.spec.model_copy(update={"variant": part.spec.variant[:count]})


def _select_group(experiment: ResolvedExperiment, place: MeasureGroup) -> ResolvedExperiment:
    said = experiment.spec
    said = said.model_copy(update={"variant": (*said.variant, *place.labels)})
    resolved = replace(experiment, spec=said, measures=place.measures, places=(), place=place)

    def there(own: ResolvedExperiment) -> ResolvedExperiment:
        """Select the group in a control or baseline."""
        variant = (*own.spec.variant, *place.labels)
        return replace(
            own,
            spec=own.spec.model_copy(update={"variant": variant}),
            measures=place.measures,
            control_of=resolved.key,
            places=(),
            place=place,
        )

    if experiment.control is not None:
        control = experiment.control
        resolved = replace(resolved, control=replace(control, experiment=there(control.experiment)))
    if experiment.bare is not None:
        bare = experiment.bare
        resolved = replace(resolved, bare=replace(bare, experiment=there(bare.experiment)))
    others = {
        name: replace(circuit_baseline, experiment=there(circuit_baseline.experiment))
        for name, circuit_baseline in experiment.circuit_baselines.items()
    }
    resolved = replace(resolved, circuit_baselines=others)
    return resolved


@compact_record
class Selection:
    """A pick by one experiment that another experiment tests on rows that both share.

    The largest of many effects are partly large by chance, so they are overestimated on shared
    rows.
    """

    of: str
    """The experiment that picked."""
    cells: int
    """Number of cells that it picked from."""
    shared: int
    """Number of tested rows that the pick is based on."""
    rows: int
    """Number of tested rows."""


def find_selections(variants: Sequence[ResolvedExperiment]) -> tuple[Selection, ...]:
    """Find selections in all variants of an experiment, from the files alone and not from a store.

    Tokens are picked separately in each row, so there are no other rows to test them on.
    """
    tables = [variant.table for variant in variants]
    rows = {
        (t.name, row): key for t in tables for row, key in zip(t.row_ids, t.row_keys, strict=True)
    }
    picked = {name: source for variant in variants for name, source in variant.sites_of.items()}
    return tuple(
        Selection(name, source.cells, shared, len(rows))
        for name, source in picked.items()
        if (shared := sum(key in source.row_keys for key in rows.values()))
    )
