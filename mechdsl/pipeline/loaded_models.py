"""Load the models that a checked file needs, with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

from mechdsl.checks.file_check import CheckedFile, needed_models
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.anatomy_proof import NoteStore
from mechdsl.loading.devices import explain_device_problem
from mechdsl.loading.loader import add_tower_views, check_modules, load_models
from mechdsl.models.folder import FileHasher, hash_file
from mechdsl.pipeline.edited_models import edit_model
from mechdsl.pipeline.options import RunOptions, check_folders
from mechdsl.planner.passes import check_pass_names
from mechdsl.resolve.types import ResolvedExperiment


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
