"""Load the models of a checked file with their weights, and write them to folders.

Edits are written into a copy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mechdsl.base.text import name_list
from mechdsl.checks.file_check import CheckedFile, needed_models
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.execute.vectors import DirectionFits
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import NoteStore
from mechdsl.loading.devices import explain_device_problem
from mechdsl.loading.loader import add_tower_views, check_modules, load_models, silence_libraries
from mechdsl.loading.weight_edits import EditKind, WeightEdit, build_edited_model
from mechdsl.models.folder import FileHasher, hash_file, locate_model
from mechdsl.pipeline.options import RunOptions, check_folders
from mechdsl.planner.passes import check_pass_names
from mechdsl.program import spec
from mechdsl.prompts.tokens.tokenizer import TOKENIZER_FILES, has_tokenizer
from mechdsl.resolve.types import DirectionMember, OutputWeights, ResolvedRule


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
        every = [
            *checked.experiments,
            *(experiment for experiment in checked.saving if not experiment.measures),
        ]
        add_tower_views(every, models)
        diagnostics.extend(check_modules(every, models))
    return (None if has_errors(diagnostics) else models), diagnostics


def check_options(options: RunOptions) -> list[Diagnostic]:
    """Report E0208 for unknown devices and passes, and problems found by `check_folders`."""
    problems = check_pass_names(sorted(options.without))
    problem = explain_device_problem(options.device)
    if problem is not None:
        problems.append(
            BadCommandLine(
                reason=f"`--device {options.device}`: {problem}",
                hint="write `auto`, `cpu`, `cuda` or `cuda:0`",
            )
        )
    problems.extend(check_folders(options))
    return problems


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
    models: list[WeightEdit] = []
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
            models.append(replace(edit, vector=vector))
    return build_edited_model(model, base, models, hashes=hashes)


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


# --- models written to folders --------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedModel:
    """A model that was written to a folder, which transformers loads."""

    name: str
    """Its name in the file."""
    folder: Path
    """Where it was written."""
    architecture: str
    """Its class in transformers."""
    source: str
    """How the file defines it."""
    dtype: str
    """The precision of its weights."""
    parameters: int
    """Number of weights, each shared one once."""
    has_tokenizer: bool
    """Whether the folder has the tokenizer. A model from Python comes without its files."""


def choose_model(program: spec.Program, name: str | None) -> tuple[str | None, list[Diagnostic]]:
    """Return the model to export: the named one, or the only one that is made from others.

    Codes: E0208.
    """
    if name is not None and name in program.models:
        return name, []
    known = list(program.models)
    if name is not None:
        listed = f"the file's models are {name_list(known)}" if known else "the file has no models"
        problem = BadCommandLine(
            reason=f"the file has no model `{name}`", hint=did_you_mean(name, known, listed)
        )
        return None, [problem]
    made = [model.name for model in program.models.values() if not model.is_loaded]
    if len(made) == 1:
        return made[0], []
    reason = f"the file has {len(made) or 'no'} edited models"
    hint = f"name one of its models: `--model {(made or known or ['NAME'])[0]}`"
    return None, [BadCommandLine(reason=reason, hint=hint)]


def export_model(
    checked: CheckedFile,
    name: str | None,
    folder: Path,
    options: RunOptions,
    loaded: dict[str, LoadedModel] | None = None,
) -> tuple[ExportedModel | None, list[Diagnostic]]:
    """Write a model of a checked file to a folder: config, safetensors and tokenizer files.

    Args:
        name: As in `choose_model`.
        folder: A new or empty folder.
        loaded: Models from Python, by name.

    Returns:
        The written model; E0208 for an unknown model or a folder with files, and the diagnostics
        of loading. OSError is passed on.
    """
    name, problems = choose_model(checked.program, name)
    problems = [*problems, *check_options(options), *_check_folder(folder)]
    if name is None or has_errors(problems):
        return None, problems
    models: dict[str, Any] = {**checked.built, **(loaded or {})}
    edit = partial(edit_model, checked, options.execution, hashes=False)
    problems += load_models(
        checked,
        models,
        edit,
        [name],
        device=options.device,
        dtype=options.dtype,
        offload=options.offload,
        hashed=None,
    )
    if name not in models:
        return None, problems
    model = cast("LoadedModel", models[name])
    with_tokenizer = _write(model, _find_tokenizer_folder(checked, name), folder)
    distinct = {id(parameter): parameter.numel() for parameter in model.module.parameters()}
    exported = ExportedModel(
        name,
        folder,
        type(model.module).__name__,
        model.provenance.get("source", ""),
        str(model.dtype).removeprefix("torch."),
        sum(distinct.values()),
        with_tokenizer,
    )
    return exported, problems


def _check_folder(folder: Path) -> list[Diagnostic]:
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return []
    reason = f"`{folder}` is there already, and nothing is overwritten"
    return [BadCommandLine(reason=reason, hint="name a new or empty folder")]


def _find_tokenizer_folder(checked: CheckedFile, name: str) -> Path | None:
    """Return the folder with a model's tokenizer: its own, or that of the first base that has
    one."""
    while True:
        model = checked.program.models[name]
        if model.is_loaded and model.kind != "python":
            folder, _ = locate_model(model, model.span.source.folder)
            if folder is not None and has_tokenizer(folder):
                return folder
        if not model.bases:
            return None
        name = model.bases[0]


def _write(model: LoadedModel, tokenizer: Path | None, folder: Path) -> bool:
    """Write a model, complete or not at all; return whether the folder has a tokenizer."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with silence_libraries():
            cast(Any, model.module).save_pretrained(aside)
        names = () if tokenizer is None else TOKENIZER_FILES
        there = [tokenizer / name for name in names if tokenizer and (tokenizer / name).exists()]
        for file in there:
            if file.is_dir():
                shutil.copytree(file, aside / file.name)
            else:
                shutil.copyfile(file, aside / file.name)
        aside.chmod(0o755)
        for file in aside.iterdir():
            file.chmod(0o755 if file.is_dir() else 0o644)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return bool(there)
