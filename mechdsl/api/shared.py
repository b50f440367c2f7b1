"""What the functions of the Python API share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e04_model import NoTokenizer
from mechdsl.diagnostics.raised import MechdslError, warn
from mechdsl.loading.when_needed import build_when_needed

if TYPE_CHECKING:
    from mechdsl.hooks.loaded import LoadedModel
    from mechdsl.program.python_files import Mode
    from mechdsl.validate.check_file import Checked, Settings


Models = Mapping[str, tuple[Any, Any]]
"""Name in the file → (transformers model, fast tokenizer)."""
Values = Mapping[str, object]
"""Name of a `param` → its value."""


def source_of(file: str | Path) -> tuple[Source | None, list[Diagnostic]]:
    """A file by its path, or a text that begins like one (`mech 1`)."""
    from mechdsl.syntax.parse import read_source

    if isinstance(file, str) and ("\n" in file or file.lstrip().startswith("mech ")):
        return Source(file), []
    return read_source(Path(file))


def read_file(file: str | Path) -> Source:
    source, found = source_of(file)
    if source is None:
        raise MechdslError(found)
    return source


def check_with(
    source: Source, models: Models | None, settings: Settings
) -> tuple[Checked, dict[str, LoadedModel]]:
    if not models:  # and so without torch
        from mechdsl.validate.check_file import check_source

        return check_source(source, settings), {}
    with borrowed_models(models):
        from mechdsl.pipeline.compute import check_with_models

        return check_with_models(source, settings, pairs_of(models))


def borrowed_models(models: Models | None) -> AbstractContextManager[None]:
    """Models of Python's, which are afterwards as they were; without any, torch isn't needed."""
    pairs = pairs_of(models)
    if not pairs:
        return nullcontext()
    from mechdsl.loading.borrowed import borrowed

    return borrowed(module for module, _ in pairs.values())


def checked_file(
    source: Source, models: Models | None, settings: Settings
) -> tuple[Checked, dict[str, LoadedModel]]:
    """A file without errors, its warnings shown; MechdslError where it has some."""
    checked, loaded = check_with(source, models, settings)
    if has_errors(checked.diagnostics):
        raise MechdslError(checked.diagnostics)
    warn(checked.diagnostics)
    return checked, loaded


def checked_alone(file: str | Path, models: Models | None, settings: Settings) -> Checked:
    return checked_file(read_file(file), models, settings)[0]


def pairs_of(models: Any) -> Models:
    """Models with their tokenizers; MechdslError (E0412) for those that have none, TypeError for
    what is no dict."""
    if models is None:
        return {}
    if not isinstance(models, Mapping):
        raise TypeError('models are a dict: `models={"toy": (model, tokenizer)}`')
    found: list[Diagnostic] = []
    for name, pair in cast("Mapping[str, Any]", models).items():
        hint = f'write `models={{"{name}": (model, tokenizer)}}`'
        if not isinstance(pair, tuple | list) or len(cast("Sequence[Any]", pair)) != 2:
            reason = "it was handed over alone"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif pair[1] is None:
            reason = "`None` stands where the tokenizer should"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
        elif hasattr(pair[0], "encode") and hasattr(pair[1], "forward"):
            reason = "the model stands where the tokenizer should"
            found.append(NoTokenizer(model=name, reason=reason, hint=hint))
    refuse(found)
    return cast("Models", models)


def settings_of(
    set: Values | None,
    limit: int | None = None,
    only: str | None = None,
    python: Mode = "refuse",
    *,
    require_models: bool = True,
    allow_outside: bool,
    untrusted: bool,
) -> Settings:
    from mechdsl.validate.check_file import Settings

    given = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in (set or {}).items()
    }
    return Settings(
        given,
        limit,
        only,
        python,
        require_models,
        allow_outside,
        untrusted,
        build=build_when_needed,
    )


def mode_of(allow_python: bool) -> Mode:
    return "run" if allow_python else "refuse"


def refuse(*found: Sequence[Diagnostic]) -> None:
    """MechdslError where anything was found."""
    problems = [each for some in found for each in some]
    if problems:
        raise MechdslError(problems)
