"""A report printed or written to its file, by the module that its entry names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from rich.console import Console

from mechdsl.base.files import written_aside
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_paths import ReportNotWritten
from mechdsl.program import spec
from mechdsl.program.named_paths import path_to_write
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import with_tokens
from mechdsl.vocab.reports import REPORTS


class _ReportModule(Protocol):
    """What the module of a report defines."""

    def render(self, result: ExperimentResult, report: spec.Report, console: Console) -> None:
        """Print it."""
        ...

    def save(self, result: ExperimentResult, report: spec.Report, path: Path) -> None:
        """Write it to a file, whose ending says the format."""
        ...


@dataclass(frozen=True)
class WrittenReport:
    """What became of a report that goes to a file."""

    experiment: str
    report: spec.Report
    path: Path | None
    """None where it couldn't be written."""
    diagnostics: Sequence[Diagnostic]


def show_report(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print a report. Raises ValueError for one that `check_report` refuses as not drawn yet."""
    _drawing(report).render(with_tokens(result, report), report, console)


def write_reports(experiments: Iterable[ExperimentResult]) -> list[WrittenReport]:
    """Write all reports that go to a file, in their order.

    One that can't be written is missing alone: its `diagnostics` say why, E0531 to E0533 and E0536.
    """
    return [
        _written(result, report, report.file)
        for result in experiments
        for report in result.reports
        if report.file is not None
    ]


def _written(result: ExperimentResult, report: spec.Report, file: str) -> WrittenReport:
    # Looked at before the run too, but links and folders may have changed since.
    name = f"report {report.kind}"
    path, problems = path_to_write(name, file, report.span)
    if path is not None:
        try:
            save_report(result, report, path)
        except Exception as error:
            if os.environ.get("MECHDSL_DEBUG"):
                raise
            reason, hint = _why(error)
            problems = [
                ReportNotWritten(
                    span=report.span, construct=name, path=file, reason=reason, hint=hint
                )
            ]
    return WrittenReport(result.name, report, None if problems else path, problems)


def save_report(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a report to a file, which is whole or not there. Folders are made.

    Raises OSError where the file can't be written, and what drawing raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as made:
        _drawing(report).save(with_tokens(result, report), report, made)


def _drawing(report: spec.Report) -> _ReportModule:
    module = REPORTS[report.kind].module
    if module is None:
        raise ValueError(f"`report {report.kind}` isn't drawn yet: `check_report` refuses it")
    return cast(_ReportModule, import_module(module))


def _why(error: Exception) -> tuple[str, str]:
    """The reason, and what to do."""
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        return reason, "make room, or name a folder that may be written to, and run it again"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}", "set MECHDSL_DEBUG=1 for the traceback"
