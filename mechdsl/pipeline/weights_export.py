"""`mechdsl export`: a model of a file, for example an edited one, as a transformers folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from mechdsl.base.text import name_list
from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import load_models, silence_libraries
from mechdsl.models.folder import locate_model
from mechdsl.pipeline.loaded_models import check_options, edit_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.program import spec
from mechdsl.prompts.tokens.tokenizer import TOKENIZER_FILES, has_tokenizer


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
    made = [each.name for each in program.models.values() if not each.is_loaded]
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
    name, found = choose_model(checked.program, name)
    found = [*found, *check_options(options), *_check_folder(folder)]
    if name is None or has_errors(found):
        return None, found
    models: dict[str, Any] = {**checked.built, **(loaded or {})}
    edit = partial(edit_model, checked, options.execution, hashes=False)
    found += load_models(
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
        return None, found
    model = cast("LoadedModel", models[name])
    with_tokenizer = _write(model, _find_tokenizer_folder(checked, name), folder)
    distinct = {id(own): own.numel() for own in model.module.parameters()}
    exported = ExportedModel(
        name,
        folder,
        type(model.module).__name__,
        model.provenance.get("source", ""),
        str(model.dtype).removeprefix("torch."),
        sum(distinct.values()),
        with_tokenizer,
    )
    return exported, found


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
