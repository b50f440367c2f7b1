"""Resolve the `save direction` lines of an experiment."""

from __future__ import annotations

import re
from pathlib import PurePath

from mechdsl.program import spec
from mechdsl.program.saves import CONTROL_VECTOR_SUFFIX
from mechdsl.resolve.directions import (
    DirectionError,
    find_use,
    name_coordinate,
    name_tensor_of_member,
    report_direction,
    resolve_family,
)
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import (
    AxisIndices,
    DirectionFamily,
    DirectionMember,
    ResolvedDirectionFile,
    iter_read_points,
)

_RESIDUAL = "resid_post"


def resolve_direction_files(work: ExperimentContext) -> tuple[ResolvedDirectionFile, ...]:
    """Resolve the `save direction` lines of an experiment, without those that have errors.

    Codes: E0341 and E0620.
    """
    found: list[ResolvedDirectionFile] = []
    for save in work.experiment.saved_directions:
        try:
            family = resolve_family(save.direction, work)
            if family is not None:
                found.append(_lay_out(save, family, work))
        except DirectionError as problem:
            report_direction(problem, work)
    return tuple(found)


def _lay_out(
    save: spec.SavedDirection, family: DirectionFamily, work: ExperimentContext
) -> ResolvedDirectionFile:
    """Name the tensors of a file. Raises DirectionError."""
    if PurePath(save.file).suffix.lower() != CONTROL_VECTOR_SUFFIX:
        named = {
            name_tensor_of_member(save.name, family.axes, key): member
            for key, member in family.members.items()
        }
        return ResolvedDirectionFile(save, named, family.width or work.model.shape.d_model)
    width = work.model.shape.d_model
    use = find_use(family)
    if use is not None:
        raise DirectionError(
            save.direction,
            f"it {use.what}, and llama.cpp adds control vectors",
            f'save it as safetensors: `save direction {save.name} to "{save.name}.safetensors"`',
        )
    if family.width not in (None, width) and not work.model.shape.stands_in:
        raise DirectionError(
            save.direction,
            f"it has {family.width} numbers, but the residual stream has {width}",
            "a control vector is added to the residual stream: compute the direction at "
            f"`{_RESIDUAL}`",
        )
    _check_axes(save, family)
    _check_read_site(save, work)
    layers = {_layer(save, family, key, own): own for key, own in family.members.items()}
    waiting = bool(work.sites.onward.stand_ins)  # the first member may stand for a selected one
    if not any(layers) and not waiting:
        raise DirectionError(
            save.direction,
            "its only layer is 0, where llama.cpp can't add a control vector",
            "compute it at a later layer",
        )
    there = {layer: own for layer, own in layers.items() if layer > 0} or layers
    named = {f"direction.{layer}": own for layer, own in there.items()}
    left_out = len(there) < len(layers)
    return ResolvedDirectionFile(save, named, width, control_vector=True, without_first=left_out)


def _check_axes(save: spec.SavedDirection, family: DirectionFamily) -> None:
    """Check that a control vector has one vector per layer. Raises DirectionError."""
    other = next((axis for axis in family.axes if axis.name != "layer"), None)
    if other is not None:
        at = name_coordinate(other, other.labels[0])
        selects = re.fullmatch(r"\w+ -?\d+", at) is not None
        raise DirectionError(
            save.direction,
            f"a control vector has one vector per layer, but `{family.name}` sweeps `{other.name}`",
            f"select one: `save direction {family.name}[{at}] to …`"
            if selects
            else f"compute it at one {other.name}",
        )


def _layer(
    save: spec.SavedDirection, family: DirectionFamily, key: AxisIndices, member: DirectionMember
) -> int:
    """Return the block after which a member of a control vector is added.

    Raises:
        DirectionError: If it isn't a direction of the residual stream after one block.
    """
    points = {*iter_read_points(member.vector)}
    for point in points:
        _check_site(save, point.site)
    if family.axes:
        label = family.axes[0].labels[key[0]]
        if isinstance(label, int):
            return label
    layers = {point.layer for point in points if point.layer is not None}
    if len(layers) != 1:
        reason = "it has no layer" if not layers else "it is computed from several layers"
        raise DirectionError(
            save.direction,
            f"{reason}, but a control vector is added after one block",
            f"compute it at one layer of `{_RESIDUAL}`, or at each: `at {_RESIDUAL} layer *`",
        )
    return layers.pop()


def _check_read_site(save: spec.SavedDirection, work: ExperimentContext) -> None:
    """Check the site of a direction that is read from a file. Raises DirectionError."""
    definition = work.program.directions.get(save.name)
    names = () if definition is None or definition.site is None else definition.site.names
    for name in names[:1]:
        _check_site(save, name.id)


def _check_site(save: spec.SavedDirection, site: str) -> None:
    if site != _RESIDUAL:
        raise DirectionError(
            save.direction,
            f"its site is `{site}`, but llama.cpp adds control vectors to `{_RESIDUAL}`",
            f"compute it at `{_RESIDUAL}`",
        )
