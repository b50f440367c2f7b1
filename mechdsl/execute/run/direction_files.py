"""`save direction` lines: safetensors files, and control vectors of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.files import ReportNotWritable
from mechdsl.execute.run_record import SavedFile
from mechdsl.execute.vectors import DirectionFits
from mechdsl.fits.vectors import split_edit
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.program import spec
from mechdsl.program.paths import path_to_write
from mechdsl.resolve.trainings import name_edit_tensors
from mechdsl.resolve.types import ResolvedDirectionFile, ResolvedExperiment
from mechdsl.store.files import sync_file, write_aside


def write_direction_file(
    file: ResolvedDirectionFile,
    experiment: ResolvedExperiment,
    model: LoadedModel,
    fits: DirectionFits,
) -> tuple[SavedFile | None, list[Diagnostic]]:
    """Compute the directions of a line and write them.

    Args:
        model: The experiment's model.

    Returns:
        The file; E0641 for a direction that can't be computed or is 0, and OSError is passed on.
    """
    span, written = file.spec.span, file.spec.direction.span.written
    found, problems = fits.of_members(list(file.members.values()), span)
    if problems:
        return None, problems
    path, refused = path_to_write("save", file.spec.file, span)
    if path is None:
        return None, refused
    dtype = getattr(torch, file.spec.stored_dtype)
    tensors: dict[str, Tensor] = {}
    for name, member in file.members.items():
        tensors |= _name_tensors(name, found[member.name].to(dtype))
    made = {name: member.made for name, member in file.members.items()}
    metadata = {
        "experiment": experiment.key,
        "model": experiment.model.name,
        "direction": written,
        "made": json.dumps(made, ensure_ascii=False),
    }
    if file.control_vector:
        size = _write_control_vector(path, tensors, metadata, model)
    else:
        size = write_tensors(path, tensors, metadata)
    notes = [f"selected {experiment.picks[written]}"] if written in experiment.picks else []
    notes += ["without layer 0, to which llama.cpp adds nothing"] if file.without_first else []
    return SavedFile(
        experiment=experiment.key,
        kind="control vector" if file.control_vector else "direction",
        direction=written,
        path=path,
        dtype=file.spec.stored_dtype,
        tensors=len(tensors),
        vectors=1,
        bytes=size,
        note="; ".join(notes),
    ), []


def _name_tensors(name: str, vector: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a vector [width], or of the matrix of an edit, by their names."""
    if vector.ndim == 1:
        return {name: vector}
    return dict(zip(name_edit_tensors(name), split_edit(vector), strict=True))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file and return its size. Raises OSError."""
    from safetensors.torch import save

    data = save({name: own.contiguous() for name, own in tensors.items()}, dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        aside.write_bytes(data)
        sync_file(aside)
    return len(data)


def _write_control_vector(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: LoadedModel
) -> int:
    """Write a GGUF file of `direction.LAYER` tensors and return its size. Raises OSError.

    llama.cpp adds `direction.n` to the residual stream after block n, at every token.
    """
    from gguf import GGUFWriter

    config: object = getattr(model.module, "config", None)
    hint = getattr(config, "model_type", None) or model.shape.architecture
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        writer = GGUFWriter(aside, "controlvector")
        writer.add_string("controlvector.model_hint", str(hint))
        writer.add_uint32("controlvector.layer_count", len(tensors))
        for name, text in metadata.items():
            writer.add_string(f"mechdsl.{name}", text)
        for name, vector in tensors.items():
            writer.add_tensor(name, vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync_file(aside)
        return aside.stat().st_size


def report_not_written(save: spec.Save | spec.SavedDirection, error: OSError) -> Diagnostic:
    """Return E0533."""
    reason = (error.strerror or str(error)).lower()
    return ReportNotWritable(span=save.span, construct="save", path=save.file, reason=reason)
