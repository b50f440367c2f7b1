"""A report printed or written to its file, by the module that its entry names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from rich.console import Console

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, cannot_write
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult, FileResult
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


def show_report(
    result: ExperimentResult, report: spec.Report, console: Console, folder: Path | None = None
) -> Path | None:
    """Print a report, or write it where it says `to "file"` (relative to `folder`).

    Returns the file. Raises ValueError for a report that `check_report` refuses as not drawn yet.
    """
    kind = REPORTS[report.kind]
    if kind.module is None or kind.signature is None:
        raise ValueError(f"`report {report.kind}` isn't drawn yet: `check_report` refuses it")
    drawing = cast(_ReportModule, import_module(kind.module))
    if kind.signature.variable is not None:  # it has an axis, and no column of tokens
        result = with_tokens(result)
    if report.file is None:
        drawing.render(result, report, console)
        return None
    path = (folder or Path()) / report.file
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(result, report, path)
    return path


def write_files(result: FileResult, folder: Path) -> tuple[list[Path], list[Diagnostic]]:
    """Write the reports of a file that go to a file, relative to `folder`.

    Returns what was written, and E0208 for each that could not be: it costs that one alone.
    """
    console = Console(quiet=True)
    written: list[Path] = []
    problems: list[Diagnostic] = []
    for experiment in result.experiments:
        for report in experiment.reports:
            if report.file is None:
                continue
            try:
                path = show_report(experiment, report, console, folder)
            except OSError as error:
                problems.append(cannot_write(error, folder / report.file))
            except Exception as error:  # whatever a drawing library raises
                reason = f"`report {report.kind}` broke off: {type(error).__name__}: {error}"
                hint = "the numbers are there: `to_csv()` and `to_json()` write them"
                problems.append(BadCommandLine(reason=reason, hint=hint))
            else:
                assert path is not None
                written.append(path)
    return written, problems
