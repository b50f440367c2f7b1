"""Measures that are read at several places: an experiment for each, put together when all are
measured, as variants are. Rows that they have in common are run once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mechdsl.diagnostics.e03_coordinates import AxesCollide
from mechdsl.program import spec
from mechdsl.program.numbers_in_measures import names_counted
from mechdsl.program.possible_axes import may_sweep
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.measure_context import MeasureContext, refuse
from mechdsl.resolve.measured_places import MEASURED
from mechdsl.resolve.measures import resolve_everywhere
from mechdsl.resolve.resolved import Axis, Labels, MeasuredPart, ResolvedExperiment, ResolvedMeasure
from mechdsl.syntax import ast


def measured_parts(
    work: Work, context: MeasureContext
) -> tuple[tuple[ResolvedMeasure | None, ...], tuple[MeasuredPart, ...]]:
    """The measures at the first of the places that they are read at, and all of these, none where
    it is one. After an error, which is in the diagnostics, measures are None."""
    experiment = work.experiment
    runs = tuple(dict.fromkeys(r for r in (experiment.base, experiment.source, "clean") if r))
    loops = [name for name in work.loops if name in loops_measured(work)]
    first: tuple[ResolvedMeasure | None, ...] | None = None
    parts: list[MeasuredPart] = []
    there = None if work.sites.nested is None else work.sites.nested.along(loops)
    for key, values in work.sites.combinations(loops):
        fixed = dict(zip(loops, key, strict=True))
        if there is not None and not there.has(fixed):
            continue
        own = _in_loops(context, values)
        found = [
            resolve_everywhere(
                m.metric, own, label=m.label, at=m.at, runs=runs, observed=m.observed
            )
            for m in experiment.measures
        ]
        here = tuple(None if each is None else each[0][1] for each in found)
        first = first or here
        whole = [each for each in found if each is not None]
        if len(whole) < len(found) or not _alike(whole, experiment, context):
            return tuple(None for _ in here) if len(whole) == len(found) else here, ()
        _no_second_sweep(whole, work)
        for place in zip(*whole, strict=True):
            labels = (*values.items(), *place[0][0])
            parts.append(MeasuredPart(labels, tuple(measure for _, measure in place), fixed))
    several = len(parts) > 1 or bool(loops)
    return first or (), tuple(parts) if several else ()


def _in_loops(context: MeasureContext, values: dict[str, int | float | str]) -> MeasureContext:
    """What measures are resolved against in the cells of these values of loops."""
    if not values:
        return context
    loops = {**context.sites.loops, **{name: (value,) for name, value in values.items()}}
    return replace(
        context, sites=replace(context.sites, loops=loops, nested=None), loop_values=values
    )


def _alike(
    found: list[list[tuple[Labels, ResolvedMeasure]]],
    experiment: spec.Experiment,
    context: MeasureContext,
) -> bool:
    """Whether all measures are read at the same places; E0612 where they aren't."""
    places = [[labels for labels, _ in each] for each in found]
    for said, own in zip(experiment.measures, places, strict=True):
        if own != places[0]:
            reason = f"it isn't read at the same places as `{experiment.measures[0].label}`"
            hint = "write an experiment of its own for it, or read both at the same places"
            refuse(context, said.span, reason, hint)
            return False
    return True


def _no_second_sweep(found: list[list[tuple[Labels, ResolvedMeasure]]], work: Work) -> None:
    """E0320 where measures sweep what rules sweep too."""
    names = {name for each in found for labels, _ in each for name, _ in labels}
    for name in sorted(names.intersection(work.axes)):
        first, letter = work.axes[name], name[0]
        said = work.experiment.measures[0]
        problem = AxesCollide(
            span=said.span,
            axis=name,
            shared=f"for {letter} in … {{ … {name} {letter} … }}",
            plural=f"{name}s",
            first=first.span.line,
        )
        if problem not in work.diagnostics:
            work.diagnostics.append(problem)


def loops_measured(work: Work) -> set[str]:
    """The loops whose variables measures name."""
    found = {name for each in work.experiment.measures for name in names_counted(each)}
    return found.intersection(work.loops)


def perhaps_measured(work: Work, measures: tuple[ResolvedMeasure | None, ...]) -> frozenset[str]:
    """The axis of measured positions, where how many there are isn't known."""
    unknown = work.model.tokenizer.stands_in or work.table.stands_in or None in measures
    positions = [m.at for m in work.experiment.measures if m.at is not None]
    some = any(may_sweep(ast.Positions((at,), span=at.span)) for at in positions)
    return frozenset({MEASURED, "item"}) if unknown and some else frozenset()


def axes_of(
    places: tuple[MeasuredPart, ...], experiment: spec.Experiment, axes: tuple[Axis, ...]
) -> Iterator[Axis]:
    """The axes that measures add to those of the rules."""
    known = {axis.name for axis in axes}
    for name in dict.fromkeys(name for place in places for name, _ in place.labels):
        if name in known:
            continue
        values = dict.fromkeys(dict(place.labels)[name] for place in places)
        span = next((m.at.span for m in experiment.measures if m.at is not None), experiment.span)
        items = {place.measures[0].item for place in places} - {None}
        alias = "item" if name == MEASURED and items else None
        yield Axis(name, tuple(values), span, alias=alias)


def in_parts(experiment: ResolvedExperiment) -> list[ResolvedExperiment]:
    """The experiment at each of the places that its measures are read at; itself where that is
    one."""
    return [_at(experiment, place) for place in experiment.places] or [experiment]


def whole_spec(part: ResolvedExperiment) -> spec.Experiment:
    """The experiment that it is a part of, as the file has it."""
    if part.place is None:
        return part.spec
    count = len(part.spec.variant) - len(part.place.labels)
    return part.spec.model_copy(update={"variant": part.spec.variant[:count]})


def _at(experiment: ResolvedExperiment, place: MeasuredPart) -> ResolvedExperiment:
    said = experiment.spec
    said = said.model_copy(update={"variant": (*said.variant, *place.labels)})
    found = replace(experiment, spec=said, measures=place.measures, places=(), place=place)

    def there(own: ResolvedExperiment) -> ResolvedExperiment:
        """What stands beside it."""
        variant = (*own.spec.variant, *place.labels)
        return replace(
            own,
            spec=own.spec.model_copy(update={"variant": variant}),
            measures=place.measures,
            control_of=found.key,
            places=(),
            place=place,
        )

    if experiment.control is not None:
        own = experiment.control
        found = replace(found, control=replace(own, experiment=there(own.experiment)))
    if experiment.bare is not None:
        bare = experiment.bare
        found = replace(found, bare=replace(bare, experiment=there(bare.experiment)))
    return found
