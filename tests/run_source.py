"""A text checked and run without the command line, the Python interface and what is kept."""

from __future__ import annotations

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.loading.loader import GivenModels
from mechdsl.pipeline.computation import check_with_models
from mechdsl.pipeline.file_run import run_file
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import FileResult


def run_source(
    source: Source, options: RunOptions | None = None, models: GivenModels | None = None
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Check and run one file; None where it, its data or its model is wrong, or none of its
    experiments could be computed. A part that could not be is in the result's `lost` and `missing`,
    and its reason among the diagnostics, as an error."""
    options = options or RunOptions()
    checked, loaded = check_with_models(source, options.settings, models or {})
    if has_errors(checked.diagnostics):
        return None, checked.diagnostics
    ran = run_file(checked, options, loaded)
    return ran.result, [*checked.diagnostics, *ran.diagnostics]
