"""Groups that a training chooses, `group g = fit(mask(size: 4), …)`: their sites, experiment by
experiment.

The sites of a group depend on the model. An experiment is therefore checked with a program whose
groups have the sites for its model: the chosen ones, or the first candidates if the group isn't
trained yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.names import BadArgument
from mechdsl.program import spec
from mechdsl.program.directions import fit_rows_of_basis
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.directions import describe_rows
from mechdsl.resolve.sites import label_all_points
from mechdsl.resolve.trainings import (
    check_held_out,
    check_mask_size,
    describe_training,
    outline_mask,
)
from mechdsl.resolve.types import ResolvedExperiment, SitePoint, TrainedMask
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

Objectives = Mapping[tuple[str, str], ResolvedExperiment]
"""What trainings learn from, by definition and model."""


def used_masks(experiment: spec.Experiment, program: spec.Program) -> list[spec.Basis]:
    """Return the groups that a training chooses and that an experiment names anywhere, also in its
    directions."""
    names = set(_names(experiment)) if program.masks else set[str]()
    for direction in program.directions.values():
        if direction.name in names:
            names |= set(_names(direction))
    return [mask for name, mask in program.masks.items() if name in names]


def _names(part: object) -> Iterator[str]:
    """Yield every name in a part of a program."""
    match part:
        case ast.Node():
            for node in walk(part):
                if isinstance(node, ast.Name):
                    yield node.id
                elif isinstance(node, ast.Index):
                    yield node.name
        case BaseModel():
            for name in type(part).model_fields:
                yield from _names(getattr(part, name))
        case tuple() | list():
            for each in part:  # pyright: ignore[reportUnknownVariableType]
                yield from _names(each)  # pyright: ignore[reportUnknownArgumentType]
        case dict():
            yield from _names(list(part.values()))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        case _:
            pass


def reject_masks(experiment: spec.Experiment, program: spec.Program, what: str) -> list[Diagnostic]:
    """Return E0207 for each group that a training chooses, where something else depends on it that
    isn't an experiment of the file.

    Args:
        what: `the edits of `tuned``
    """
    reason = f"is chosen by a training, and {what} can't depend on it"
    hint = "list the sites: `group movers = L0H1, L1H2`"
    return [
        BadArgument(span=experiment.span, name=mask.name, reason=reason, hint=hint)
        for mask in used_masks(experiment, program)
    ]


@dataclass(frozen=True)
class FilledGroups:
    """An experiment with the sites of its groups."""

    experiment: spec.Experiment
    program: spec.Program
    masks: tuple[TrainedMask, ...]
    """Those whose candidates are known."""
    waits: bool
    """Whether the candidates of some group aren't known: its model or its rows aren't available."""


def fill_groups(
    experiment: spec.Experiment, program: spec.Program, objectives: Objectives
) -> FilledGroups:
    """Insert the sites of the groups that an experiment uses and that a training chooses."""
    used = used_masks(experiment, program)
    if not used:
        return FilledGroups(experiment, program, (), waits=False)
    groups, masks = dict(program.groups), list[TrainedMask]()
    for definition in used:
        objective = objectives.get((definition.name, experiment.model))
        sites = (definition.site,)
        if objective is not None:
            mask = outline_mask(definition, objective, program)
            masks.append(mask)
            sites = tuple(_sites_of(mask.chosen, definition.site, definition.span))
        old = groups[definition.name]
        groups[definition.name] = old.model_copy(update={"sites": sites})
    expects = tuple(
        each.model_copy(update={"groups": tuple(groups[own.name] for own in each.groups)})
        for each in experiment.expects
    )
    return FilledGroups(
        experiment.model_copy(update={"expects": expects}),
        program.model_copy(update={"groups": groups}),
        tuple(masks),
        waits=len(masks) < len(used),
    )


def _sites_of(points: tuple[SitePoint, ...], site: ast.Site, span: Span) -> Iterator[ast.Site]:
    """Yield the candidates' site with the layer and the units of some points, layer by layer."""
    for layer in dict.fromkeys(point.layer for point in points):
        units = tuple(p.unit for p in points if p.layer == layer and p.unit is not None)
        own = {"layer": () if layer is None else (layer,)}
        axes = tuple(
            replace(axis, plural=True, span=span, values=_values(own.get(axis.word, units), span))
            for axis in site.axes
        )
        yield replace(site, axes=axes, excluded=(), span=span)


def _values(numbers: tuple[int, ...], span: Span) -> tuple[ast.AxisRange, ...]:
    return tuple(ast.AxisRange(ast.Bound(number, span=span), span=span) for number in numbers)


def check_masks(
    filled: FilledGroups, table: PromptTable
) -> tuple[tuple[TrainedMask, ...], list[Diagnostic]]:
    """Return the groups with their descriptions, and the problems with them.

    Codes: E0207 for a comparison of models with a group of each, E0342 for a size, E0345 for
    measured training rows.

    Args:
        table: The rows of the experiment.
    """
    experiment, program = filled.experiment, filled.program
    problems: list[Diagnostic] = []
    described: list[TrainedMask] = []
    for mask in filled.masks:
        definition = program.masks[mask.training.definition]
        for problem in (
            check_mask_size(mask),
            check_held_out(definition, mask.training, experiment, table),
            _compared_across_models(definition, experiment),
        ):
            problems += [] if problem is None else [problem]
        read = fit_rows_of_basis(definition, program)
        assert read is not None
        rows = f"{describe_rows(mask.training.sample, read)} at {mask.training.sample.cell.label}"
        made = describe_training(mask, rows, program, experiment, table)
        if mask.is_trained:
            made = f"{label_all_points(mask.chosen)}; {made}"
        described.append(replace(mask, made=made))
    return tuple(described), problems


def _compared_across_models(
    definition: spec.Basis, experiment: spec.Experiment
) -> Diagnostic | None:
    """Return E0207 for an expectation on a group that has other sites in each of several models."""
    if not any(axis == "model" for axis, _ in experiment.variant):
        return None
    for each in experiment.expects:
        if any(group.name == definition.name for group in each.groups):
            reason = "has other sites in each model, and the experiment has several models"
            hint = "write an experiment for each model"
            return BadArgument(span=each.span, name=definition.name, reason=reason, hint=hint)
    return None
