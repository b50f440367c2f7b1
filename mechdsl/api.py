"""The Python API: check a text, run a file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.render import render_full

if TYPE_CHECKING:
    from mechdsl.results.results import Results


class MechdslError(Exception):
    """A file, its data or its model is wrong; `diagnostics` say where and what to write."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = list(diagnostics)
        super().__init__("\n" + render_full(self.diagnostics, color=False, width=100))


def source_of(file: str | Path) -> tuple[Source | None, list[Diagnostic]]:
    """A file by its path, or a text that begins like one (`mech 1`)."""
    from mechdsl.syntax.parse import read_source

    if isinstance(file, str) and ("\n" in file or file.lstrip().startswith("mech ")):
        return Source(file), []
    return read_source(Path(file))


def check(file: str | Path) -> list[Diagnostic]:
    """All errors and warnings of a file (path or text), without weights and without torch."""
    from mechdsl.validate.check_file import Settings, check_source

    source, diagnostics = source_of(file)
    if source is None:
        return diagnostics
    return check_source(source, Settings(python="look")).diagnostics


def run(
    file: str | Path,
    models: Mapping[str, tuple[Any, Any]] | None = None,
    *,
    parameters: Mapping[str, object] | None = None,
    limit: int | None = None,
    only: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    offload: str | Path | None = None,
    out: str | Path | None = None,
    allow_python: bool = False,
    no_pass: Sequence[str] = (),
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    allow_nan: bool = False,
) -> Results:
    """Run a file (path or text) and return its results.

    models: name in the file → (transformers model, fast tokenizer), in place of what the file
        declares under that name. parameters: as `--set`. allow_python: run the Python files that
        it refers to. The other arguments are those of the command line.
    An experiment or a measure that can't be computed costs no other: the results' `complete` is
    False then, `lost` of its file and `missing` of the measure say why, and a warning is shown.
    Raises MechdslError where the file, its data or a model is wrong, where nothing can be computed,
    and where a function of a Python file fails.
    """
    from mechdsl.execute.execute import Options
    from mechdsl.pipeline import RunOptions, run_source
    from mechdsl.program.python_files import PythonFailure
    from mechdsl.results.collect import versions
    from mechdsl.results.results import Results
    from mechdsl.validate.check_file import Settings

    source, diagnostics = source_of(file)
    if source is None:
        raise MechdslError(diagnostics)
    for name, pair in (models or {}).items():
        if not hasattr(pair, "__len__") or len(pair) != 2:
            raise TypeError(
                f"a model comes with its tokenizer: models={{{name!r}: (model, tokenizer)}}"
            )
    given = {name: str(value) for name, value in (parameters or {}).items()}
    options = RunOptions(
        settings=Settings(given, limit, only, "run" if allow_python else "refuse"),
        device=device,
        dtype=dtype,
        offload=None if offload is None else Path(offload),
        out=None if out is None else Path(out),
        without=frozenset(no_pass),
        execution=Options(
            pass_tokens=pass_tokens, prompt_tokens=prompt_tokens, allow_nan=allow_nan
        ),
    )
    try:
        result, diagnostics = run_source(source, options, models)
    except PythonFailure as failure:
        raise MechdslError([failure.diagnostic]) from failure
    errors = [d for d in diagnostics if d.severity == "error"]
    if result is None:
        raise MechdslError(errors)
    if errors:
        said = render_full(errors, color=False, width=100)
        warnings.warn(f"a part could not be computed\n{said}", stacklevel=2)
    return Results((result,), versions())
