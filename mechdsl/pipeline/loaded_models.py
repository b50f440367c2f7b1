"""Load the models that a checked file needs, with their weights; edits are written into a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

from torch import Tensor

from mechdsl.checks.file_check import CheckedFile, needed_models
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.execute.vectors import DirectionFits
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import NoteStore
from mechdsl.loading.devices import explain_device_problem
from mechdsl.loading.loader import add_tower_views, check_modules, load_models
from mechdsl.loading.weight_edits import EditKind, WeightEdit, build_edited_model
from mechdsl.models.folder import FileHasher, hash_file
from mechdsl.pipeline.options import RunOptions, check_folders
from mechdsl.planner.passes import check_pass_names
from mechdsl.program import spec
from mechdsl.resolve.types import DirectionMember, OutputWeights, ResolvedExperiment, ResolvedRule


def load_needed_models(
    checked: CheckedFile,
    options: RunOptions,
    loaded: Mapping[str, LoadedModel] | None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> tuple[dict[str, LoadedModel] | None, list[Diagnostic]]:
    """Load the models of a checked file with their weights; None if one is unavailable."""
    diagnostics = check_options(options)
    if has_errors(diagnostics):
        return None, diagnostics
    models = {**cast("dict[str, LoadedModel]", checked.built), **(loaded or {})}
    diagnostics.extend(
        load_models(
            checked,
            models,
            partial(edit_model, checked, options.execution, hashes=hashed is not None),
            needed_models(checked),
            device=options.device,
            dtype=options.dtype,
            offload=options.offload,
            hashed=hashed,
            notes=notes,
        )
    )
    if not has_errors(diagnostics):
        every = [*checked.experiments, *_only_saving(checked)]
        add_tower_views(every, models)
        diagnostics.extend(check_modules(every, models))
    return (None if has_errors(diagnostics) else models), diagnostics


def _only_saving(checked: CheckedFile) -> list[ResolvedExperiment]:
    """Return the experiments without measures."""
    return [each for each in checked.saving if not each.measures]


def check_options(options: RunOptions) -> list[Diagnostic]:
    """Report E0208 for unknown devices and passes, and problems found by `check_folders`."""
    found = check_pass_names(sorted(options.without))
    problem = explain_device_problem(options.device)
    if problem is not None:
        found.append(
            BadCommandLine(
                reason=f"`--device {options.device}`: {problem}",
                hint="write `auto`, `cpu`, `cuda` or `cuda:0`",
            )
        )
    found.extend(check_folders(options))
    return found


def edit_model(
    checked: CheckedFile,
    options: ExecutionOptions,
    model: spec.Model,
    loaded: Mapping[str, LoadedModel],
    *,
    hashes: bool,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Build the model of a statement with edits.

    Args:
        loaded: Models by name, with its base and those that directions are computed on.
        hashes: As in `build_edited_model`.

    Returns:
        The model and its diagnostics: E0344, E0641 for directions that can't be computed, and
        those of the self-check.
    """
    edits = checked.edits.get(model.name)
    if edits is None or edits.model.shape.stands_in:
        raise RuntimeError(f"nothing says why the edits of `{model.name}` can't be applied")
    assert model.base is not None
    base = loaded[model.base]
    others = {name: loaded[name] for name in edits.models[1:]}
    fits = DirectionFits(base, others, edits.seed, options.side)
    found: list[WeightEdit] = []
    for rule in edits.rules:
        own = list(_list_edits(rule))
        members = {member.name: member for _, member in own if member is not None}
        vectors: Mapping[str, Tensor] = {}
        if members:
            vectors, problems = fits.of_members(list(members.values()), rule.spec.span)
            if problems:
                return None, problems
        for edit, member in own:
            vector = None if member is None else vectors[member.name]
            found.append(replace(edit, vector=vector))
    return build_edited_model(model, base, found, hashes=hashes)


_KINDS: Mapping[str, EditKind] = {
    "scale weights": "scale",
    "set weights": "set",
    "add to weights": "add",
}


def _list_edits(rule: ResolvedRule) -> Iterator[tuple[WeightEdit, DirectionMember | None]]:
    """Yield the edits of a rule, with their directions, in the order of its cells."""
    span, sites, basis = rule.spec.span, rule.sites, rule.basis
    assert sites is not None
    assert rule.amounts is not None
    if basis is None:
        assert rule.direction is not None
        for member in rule.direction.members.values():
            yield WeightEdit("project out", span), member
        return
    (amount,) = rule.amounts.values.values()  # a file's top level has no loops
    for key, points in sites.points.items():
        coordinates = basis.coordinates[key]
        for point in points:
            member = basis.at(point, coordinates.basis)
            weights = member.operand
            assert isinstance(weights, OutputWeights)
            made = None
            if weights.vector is not None:
                made = DirectionMember(member.name, weights.vector, member.made)
            yield (
                WeightEdit(
                    _KINDS[rule.spec.verb],
                    span,
                    weights.site,
                    weights.layer,
                    coordinates.which,
                    amount,
                ),
                made,
            )
