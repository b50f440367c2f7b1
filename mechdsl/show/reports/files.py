"""`report csv`, `report json`, `report parquet`: the numbers themselves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.console import Console

from mechdsl.base.visible import encodable_json, json_text
from mechdsl.program import spec
from mechdsl.results.document import experiment_document
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import Results


def write_csv(result: ExperimentResult) -> str:
    """One line per cell and measure; what doesn't exist is empty."""
    return _csv(result.records())


def _csv(records: list[dict[str, Any]]) -> str:
    columns = dict.fromkeys(key for record in records for key in record)
    lines = _Lines()
    writer = csv.DictWriter(lines, list(columns), lineterminator="\r\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return "".join(lines.written)


class _Lines:
    """Ends records with `\\n`. The writer is told `\\r\\n`, so that it quotes what holds either."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, line: str) -> None:
        self.written.append(line.removesuffix("\r\n") + "\n")


def results_csv(results: Results) -> str:
    """The cells of all experiments of a run; an axis that an experiment lacks is empty."""
    records = [
        {"file": file.file, **record}
        for file in results.files
        for each in file.experiments
        for record in each.records()
    ]
    return _csv(records)


def write_json(result: ExperimentResult) -> str:
    """The experiment as it stands in the results document."""
    document = experiment_document(result).as_json()
    return json_text(document, indent=2) + "\n"


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Plain text, neither wrapped nor coloured, so that it can be piped on."""
    if report.kind == "json":
        text = encodable_json(write_json(result), console.encoding)
    else:
        text = write_csv(result)
    console.out(text, end="", highlight=False)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """In the format that the report names."""
    if report.kind == "parquet":
        _write_parquet(result, path)
        return
    text = write_json(result) if report.kind == "json" else write_csv(result)
    path.write_text(text, encoding="utf-8")


def _write_parquet(result: ExperimentResult, path: Path) -> None:
    try:
        result.to_pandas().to_parquet(path, index=False)
    except ImportError as error:
        raise ImportError(
            'parquet needs pandas and pyarrow, which are optional: pip install "mechdsl[frames]"'
        ) from error
