"""Rules and measures inside of blocks that hand on what enters them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import SiteNotInBlock
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedMeasure
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
            if other.does.changes == "blocks" or other.sites is None:
                continue
            ends = () if other.path is None else (other.path.receivers,)
            for sites in (other.sites, *ends):
                point = _met(rule.sites, sites)
                if point is not None:
                    yield _refused(point, model, other.spec.span)
                    break
        layers = {point.layer for here in rule.sites.points.values() for point in here}
        for measure in measures:
            points = [atom.point for atom in measure.atoms if atom.point is not None]
            point = next((point for point in points if _within(point, layers)), None)
            if point is not None:
                yield _refused(point, model, measure.expression.span)


def of_runs_without_blocks(experiment: ResolvedExperiment) -> Iterator[Diagnostic]:
    """E0414 for what is written or read in a block that computes nothing in the run itself."""
    model = experiment.model.name
    removed: dict[str | None, set[int | None]] = {}
    for name, run in experiment.derived.items():
        yield from inside_removed(run.rules, (), model)
        removed[name] = _removed(run, removed.get(run.spec.base, set()))
    for one in (*experiment.derived.values(), experiment):
        base = one.spec.base
        yield from _beneath(one, experiment, model)
        for rule in one.rules:
            if rule.sites is None or rule.does.changes == "blocks":
                continue
            places = [(base, rule.sites.points)]
            if rule.path is not None:
                places.append((base, rule.path.receivers.points))
            if rule.apart is None and rule.does.reads is not None:
                places.append((rule.run, rule.sites.sources or rule.sites.points))
            for run, points in places:
                named = [point for here in points.values() for point in here]
                yield from _first(named, removed.get(run, set()), model, rule.spec.span)
        for measure in one.measures:
            for atom in measure.atoms:
                points = (*atom.points.values(), *([] if atom.point is None else [atom.point]))
                layers = removed.get(base, set()) | removed.get(atom.run, set())
                yield from _first(points, layers, model, measure.expression.span)
    for save in experiment.saves:
        yield from _first(save.points, removed.get(save.run, set()), model, save.spec.span)


def _beneath(
    one: ResolvedExperiment, experiment: ResolvedExperiment, model: str
) -> Iterator[Diagnostic]:
    """What the runs that it is based on write in blocks that it takes out itself."""
    removing = [rule for rule in one.rules if rule.does.changes == "blocks"]
    passed: set[str | None] = set()  # a run that is named like its base comes again
    name = one.spec.base
    while name in experiment.derived and name not in passed:
        passed.add(name)
        base = experiment.derived[name]
        written = [rule for rule in base.rules if rule.does.changes != "blocks"]
        yield from inside_removed([*removing, *written], (), model)
        name = base.spec.base


def _removed(run: ResolvedExperiment, before: set[int | None]) -> set[int | None]:
    """The blocks that hand on what enters in a run with rules; before: in its base."""
    found = set(before)
    for rule in run.rules:
        if rule.does.changes == "blocks" and rule.sites is not None:
            layers = {point.layer for here in rule.sites.points.values() for point in here}
            found = found - layers if rule.spec.fill is None else found | layers
    return found


def _first(
    points: Iterable[SitePoint], layers: set[int | None], model: str, span: Span
) -> Iterator[Diagnostic]:
    inside = next((point for point in points if _within(point, layers)), None)
    if inside is not None:
        yield _refused(inside, model, span)


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
