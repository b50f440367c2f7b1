"""`report csv`, `report json`, `report parquet`: the numbers themselves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mechdsl.base.text import dump_json, escape_unencodable
from mechdsl.program import spec
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult


def experiment_json(result: ExperimentResult) -> str:
    """Return the experiment's part of the results document."""
    document = experiment_document(result).as_json()
    return dump_json(document, indent=2) + "\n"


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print plain text, neither wrapped nor coloured, for use in pipes."""
    if report.kind == "json":
        text = escape_unencodable(experiment_json(result), console.encoding)
    else:
        text = result.to_csv()
    console.out(text, end="", highlight=False)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write the file in the report's format."""
    if report.kind == "parquet":
        _write_parquet(result, path)
        return
    text = experiment_json(result) if report.kind == "json" else result.to_csv()
    path.write_text(text, encoding="utf-8")


def _write_parquet(result: ExperimentResult, path: Path) -> None:
    try:
        result.to_pandas().to_parquet(path, index=False)
    except ImportError as error:
        raise ImportError(
            'parquet needs pandas and pyarrow, which are optional: pip install "mechdsl[frames]"'
        ) from error
