"""Check and run a text without the command line, the Python interface and the store."""

from __future__ import annotations

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.loading.loader import GivenModels
from mechdsl.pipeline.computation import check_with_models
from mechdsl.pipeline.file_run import run_file
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult


def run_source(
    source: Source, options: RunOptions | None = None, models: GivenModels | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Check and run one file. The result is None if the file, its data or its model is invalid, or
    if no experiment could be computed. Parts that failed are listed in `lost` and `missing` of the
    result, with an error among the diagnostics."""
    options = options or RunOptions()
    checked, loaded = check_with_models(source, options.settings, models or {})
    if has_errors(checked.diagnostics):
        return None, checked.diagnostics
    ran = run_file(checked, options, loaded)
    return ran.result, [*checked.diagnostics, *ran.diagnostics]
