"""Reports: how the results of an experiment are shown, one entry each.

An entry names the module that draws it, which is imported on use, because drawing needs rich or
altair and checking a file doesn't.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol, cast

from mechdsl import spec
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_statistics import BadReport
from mechdsl.registry import Registry

if TYPE_CHECKING:
    from rich.console import Console

    from mechdsl.results.experiment import ExperimentResult


class _Drawing(Protocol):
    """What the module of a report defines."""

    def render(self, result: ExperimentResult, report: spec.Report, console: Console) -> None: ...

    def save(self, result: ExperimentResult, report: spec.Report, path: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ReportKind:
    """One word behind `report`."""

    name: str
    meaning: str
    example: str
    module: str | None = None
    """None: part of the language, but not drawn yet."""
    suffixes: tuple[str, ...] = ()
    """Endings of the files it can be written to; the first is the usual one."""
    variable: bool = False
    """Whether a variable has to stand behind it, an axis of the experiment."""
    by: bool = False
    """Whether `by` has to follow."""
    by_value: bool = False
    """Whether `by` may name a value of the prompts instead of an axis."""
    file_only: bool = False
    needs: tuple[str, ...] = ()
    """Optional packages, looked for before anything is run."""

    @property
    def supported(self) -> bool:
        return self.module is not None

    def _drawing(self) -> _Drawing:
        if self.module is None:
            raise ValueError(f"`report {self.name}` isn't drawn yet: `check_report` refuses it")
        return cast(_Drawing, import_module(self.module))

    def render(self, result: ExperimentResult, report: spec.Report, console: Console) -> None:
        """Print it."""
        self._drawing().render(result, report, console)

    def save(self, result: ExperimentResult, report: spec.Report, path: Path) -> None:
        """Write it to a file, whose ending says the format."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drawing().save(result, report, path)


REPORTS: Registry[ReportKind] = Registry("report")


def _report(entry: ReportKind) -> None:
    REPORTS.add(entry.name, entry)


_report(
    ReportKind(
        name="table",
        meaning="every cell with its effect, interval and p",
        example="report table top 10",
        module="mechdsl.vocab.reports.table",
        suffixes=(".txt", ".csv", ".svg", ".png"),
        by_value=True,
    )
)
_report(
    ReportKind(
        name="heatmap",
        meaning="the effect over two axes",
        example="report heatmap layer by head",
        module="mechdsl.vocab.reports.heatmap",
        suffixes=(".svg", ".png", ".html"),
        variable=True,
        by=True,
    )
)
_report(
    ReportKind(
        name="lines",
        meaning="the effect along one axis, with its interval",
        example="report lines layer by position",
        module="mechdsl.vocab.reports.lines",
        suffixes=(".svg", ".png", ".html"),
        variable=True,
    )
)
_report(
    ReportKind(
        name="csv",
        meaning="one line per cell and measure",
        example='report csv to "cells.csv"',
        module="mechdsl.vocab.reports.files",
        suffixes=(".csv",),
    )
)
_report(
    ReportKind(
        name="json",
        meaning="the experiment as in `run --format json`",
        example='report json to "cells.json"',
        module="mechdsl.vocab.reports.files",
        suffixes=(".json",),
    )
)
_report(
    ReportKind(
        name="parquet",
        meaning="one row per cell and measure, for data frames (needs mechdsl[frames])",
        example='report parquet to "cells.parquet"',
        module="mechdsl.vocab.reports.files",
        suffixes=(".parquet",),
        file_only=True,
        needs=("pandas", "pyarrow"),
    )
)
_report(ReportKind(name="bars", meaning="the effect as bars", example="report bars position"))
_report(
    ReportKind(
        name="confusion",
        meaning="a value of the sweep against a category",
        example="report confusion item by argmax",
    )
)
_report(
    ReportKind(
        name="overlay",
        meaning="the effect on the image or on the prompt's tokens",
        example="report overlay",
    )
)
_report(
    ReportKind(
        name="graph", meaning="the circuit that was found", example='report graph to "c.svg"'
    )
)
_report(
    ReportKind(name="html", meaning="all reports as one page", example='report html to "r.html"')
)


def check_report(
    report: spec.Report, axes: Sequence[str] | None = None, values: Collection[str] = ()
) -> list[Diagnostic]:
    """What is wrong with a `report` line: E0108, E0203, E0607.

    `axes` are the names that the experiment's axes go by, None while they aren't known; `values`
    those of the prompts block.
    """
    kind = REPORTS.get(report.kind)
    if kind is None:
        hint = did_you_mean(REPORTS.suggest(report.kind), f"reports are {', '.join(REPORTS)}")
        return [UnknownWord(span=report.span, kind="report", word=report.kind, hint=hint)]
    if not kind.supported:
        shown = [name for name, each in REPORTS.items() if each.supported]
        later = f"reports that can be drawn are {', '.join(shown)}"
        return [NotSupported(span=report.span, what=f"`report {kind.name}`", later=later)]
    wrong = _wrong(kind, report, axes, values)
    if wrong is None:
        return []
    reason, hint = wrong
    return [BadReport(span=report.span, kind=report.kind, reason=reason, hint=hint)]


def _wrong(
    kind: ReportKind, report: spec.Report, axes: Sequence[str] | None, values: Collection[str]
) -> tuple[str, str] | None:
    """(What is wrong, what to write), or None."""
    example = f"write it as in `{kind.example}`"
    if kind.variable and report.variable is None:
        return "doesn't say along which axis", example
    if kind.by and report.by is None:
        return "doesn't say by which axis", example
    if kind.variable and report.variable == report.by:
        return f"has `{report.by}` twice", example
    if not kind.variable and report.variable is not None:
        return f"takes no axis, but `{report.variable}` stands behind it", example
    for word, others in ((report.variable, ()), (report.by, values if kind.by_value else ())):
        if axes is not None and word is not None and word not in (*axes, *others):
            listed = ", ".join(f"`{axis}`" for axis in axes) or "none: it has one cell"
            return f"has no axis `{word}` to run along", f"the experiment's axes are {listed}"
    if kind.file_only and report.file is None:
        return "is nothing that can be printed", example
    missing = [module for module in kind.needs if find_spec(module) is None]
    if missing:
        return f"needs {' and '.join(missing)}", 'pip install "mechdsl[frames]"'
    if report.file is not None and PurePath(report.file).suffix.lower() not in kind.suffixes:
        endings = " or ".join(f"`{suffix}`" for suffix in kind.suffixes)
        return f"cannot be written to `{report.file}`", f"its file ends in {endings}"
    return None


def show(
    result: ExperimentResult, report: spec.Report, console: Console, folder: Path | None = None
) -> Path | None:
    """Print a report, or write it where it says `to "file"` (relative to `folder`)."""
    kind = REPORTS[report.kind]
    if report.file is None:
        kind.render(result, report, console)
        return None
    path = (folder or Path()) / report.file
    kind.save(result, report, path)
    return path
