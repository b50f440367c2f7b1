"""The weights of edited models: directions are computed on the base, and written into a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.execute.vectors import DirectionFits
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.weight_edits import EditKind, WeightEdit, build_edited_model
from mechdsl.program import spec
from mechdsl.resolve.types import DirectionMember, OutputWeights, ResolvedRule


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
