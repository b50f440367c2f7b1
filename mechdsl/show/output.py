"""Reports of an experiment: printed, written to their files, plotted, or as text.

A report's registry entry names the module that draws it, which is imported on use.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console

from mechdsl.base.files import replace_file
from mechdsl.base.records import closest_name
from mechdsl.base.text import HintedError, Source, Span, count_noun, name_list, quote
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.experiments import BadReport
from mechdsl.diagnostics.files import FormulaCells, ReportNotWritten
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.diagnostics.syntax import UnknownWord
from mechdsl.program import spec
from mechdsl.program.paths import path_to_write
from mechdsl.results.experiment_result import ExperimentResult, list_formulas
from mechdsl.show.reports.drawing import drawing_process
from mechdsl.show.reports.grid import name_positions, quantity_name, value_title
from mechdsl.show.reports.text import measure_name, print_verdicts
from mechdsl.vocab.reports import (
    MAX_COLUMNS,
    REPORTS,
    ReportSignature,
    check_report,
    result_file,
    short_names,
)


class _ReportModule(Protocol):
    """The interface of a report's module."""

    def render(self, result: ExperimentResult, report: spec.Report, console: Console) -> None:
        """Print the report."""
        ...


class _FileModule(_ReportModule, Protocol):
    """The interface of a module with custom file formats; others save their chart."""

    def save(self, result: ExperimentResult, report: spec.Report, path: Path) -> None:
        """Write the report to a file; the extension determines the format."""
        ...


class _ChartModule(_ReportModule, Protocol):
    """The interface of a module that draws a chart."""

    def chart(self, result: ExperimentResult, report: spec.Report) -> Any:
        """Return the altair chart."""
        ...


@dataclass(frozen=True)
class WrittenReport:
    """The outcome of writing a report to a file."""

    experiments: tuple[str, ...]
    """Names of the results in the file; several share a chart."""
    report: spec.Report
    path: Path | None
    """None if the file couldn't be written."""
    diagnostics: Sequence[Diagnostic]
    is_separate: bool = False
    """Whether the report has further results, with a file each."""


def show_report(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print a report; ValueError for one that `check_report` rejects as not implemented."""
    _report_module(report).render(name_positions(result, report), report, console)


def write_reports(experiments: Iterable[ExperimentResult]) -> list[WrittenReport]:
    """Write all reports with a file, in order.

    A failure affects only its report, whose `diagnostics` give the reason (E0531 to E0533 and
    E0536).
    """
    results = dict[Hashable, list[tuple[ExperimentResult, spec.Report]]]()
    for result in experiments:
        for report in result.reports:
            if report.file is not None:
                key = report.span, report.kind, report.file
                results.setdefault(key, []).append((result, report))
    with drawing_process():
        return [written for each in results.values() for written in _write_results(each)]


def _write_results(parts: Sequence[tuple[ExperimentResult, spec.Report]]) -> list[WrittenReport]:
    """Write a report of the results of one experiment: to one file if there is one result or a
    chart that all share, otherwise to `result_file` of each."""
    (first, report), *others = parts
    results = [result for result, _ in parts]
    assert report.file is not None
    if not others:
        return [_write_report(first, report, report.file, (first.name,))]
    if _share_chart(results, report):
        names = tuple(result.name for result in results)
        return [_write_report(*_shared_chart(results, report), report.file, names)]
    files = [(result, result_file(report.file, result.name)) for result in results]
    return [
        replace(_write_report(result, report, file, (result.name,)), is_separate=True)
        for result, file in files
    ]


OBSERVATION_AXIS = "observation"
"""Axis of a chart that several results share."""


def _share_chart(results: Sequence[ExperimentResult], report: spec.Report) -> bool:
    """Whether one chart can show results: of the same axes, units, runs and prompts."""

    def facts(result: ExperimentResult) -> tuple[Any, ...]:
        return (
            (result.axes, result.aliases, result.centres, result.model, result.row_ids),
            (result.base, result.source, result.called, result.left_out, result.selected),
            (result.settings, result.population),
            [(value_title(data), data.called, data.kind) for data in result.measures],
            [(data.per_prompt, data.missing) for data in result.measures],
            [(each.test, each.withheld) for each in result.statistics],
        )

    controlled = any(result.controls or result.verified for result in results)
    return (
        report.kind in ("lines", "bars", "heatmap")
        and not controlled
        and OBSERVATION_AXIS not in results[0].axes
        and all(facts(result) == facts(results[0]) for result in results)
    )


def _shared_chart(
    results: Sequence[ExperimentResult], report: spec.Report
) -> tuple[ExperimentResult, spec.Report]:
    """Combine results along `OBSERVATION_AXIS`, whose values are series, or else panels."""
    from mechdsl.results.assembly.combination import merge_finished

    labels = [result.name.partition(".")[2] or result.name for result in results]
    merged = merge_finished(
        [(((OBSERVATION_AXIS, label),), each) for label, each in zip(labels, results, strict=True)]
    )
    measures = tuple(
        data
        if len({result.measures[n].label for result in results}) == 1
        else replace(data, label=quantity_name(data))
        for n, data in enumerate(merged.measures)
    )
    if report.by is None and set(merged.axes) == {OBSERVATION_AXIS, report.variable}:
        report = report.model_copy(update={"by": OBSERVATION_AXIS})
    return replace(merged, name=merged.name.partition(".")[0], measures=measures), report


def _write_report(
    result: ExperimentResult, report: spec.Report, file: str, names: tuple[str, ...]
) -> WrittenReport:
    # Checked again, because links and folders may have changed since the check before the run.
    name = f"report {report.kind}"
    path, problems = path_to_write(name, file, report.span)
    if path is not None:
        try:
            save_report(result, report, path)
        except Exception as error:
            if os.environ.get("MECHDSL_DEBUG"):
                raise
            reason, hint = _failure_text(error)
            problems = [
                ReportNotWritten(
                    span=report.span, construct=name, path=file, reason=reason, hint=hint
                )
            ]
    if path is None or problems:
        return WrittenReport(names, report, None, problems)
    is_csv = path.suffix.lower() == ".csv"
    warnings = csv_warnings(path.read_text("utf-8"), f"`{file}`", report.span) if is_csv else []
    return WrittenReport(names, report, path, warnings)


def csv_warnings(text: str, name: str, span: Span | None = None) -> list[Diagnostic]:
    """Report W0745 for cells of a CSV that a spreadsheet reads as formulas.

    Args:
        text: The CSV.
        name: Its file in backticks, or `standard output`.
        span: The report, if there is one.
    """
    cells = list_formulas(text)
    if not cells:
        return []
    count = count_noun(len(cells), "distinct cell")
    return [FormulaCells(span=span, file=name, count=count, example=quote(cells[0]))]


def save_report(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a report to a file atomically; folders are created.

    Raises:
        OSError: If the file can't be written. Exceptions of the drawing are passed on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as made:
        named = result if REPORTS[report.kind].picture else name_positions(result, report)
        _save(named, report, made)


def _save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a report in the formats of its module, or its chart as a picture or HTML page."""
    module = _report_module(report)
    if hasattr(module, "save"):
        cast(_FileModule, module).save(result, report, path)
        return
    from mechdsl.show.reports.charts import save_chart

    draw = cast(_ChartModule, module).chart
    save_chart(lambda: draw(result, report), path, report.width)


def _report_module(report: spec.Report) -> _ReportModule:
    module = REPORTS[report.kind].module
    if module is None:
        raise ValueError(f"`report {report.kind}` isn't drawn yet: `check_report` rejects it")
    return cast(_ReportModule, import_module(module))


def _failure_text(error: Exception) -> tuple[str, str]:
    """Return the reason and a fix."""
    if isinstance(error, HintedError):
        return error.reason, error.hint
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        return reason, "free disk space, or name a writable folder, and run it again"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}", "set MECHDSL_DEBUG=1 to see the traceback"


class PrintedText(str):
    """A text that is displayed unquoted, by `print` and as the result of a notebook's cell."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f'<pre style="line-height:1.2">{escape(self)}</pre>'


class PlanText(PrintedText):
    """The text that `mechdsl plan` prints, with the plan as data."""

    cells: Mapping[str, int]
    """Experiment → its number of cells, in the order of the file."""
    passes: tuple[str, ...]
    """Names of the planner passes that apply."""

    def __new__(cls, text: str, cells: Mapping[str, int], passes: tuple[str, ...]) -> PlanText:
        made = super().__new__(cls, text)
        made.cells, made.passes = cells, passes
        return made


class SvgText(PrintedText):
    """An SVG picture, which a notebook displays."""

    def _repr_html_(self) -> str:
        return str(self)


def capture_text(show: Callable[[Console], None], width: int = 100) -> PrintedText:
    """Return what a function prints to a console of `width` columns without colours."""
    text = io.StringIO()
    show(Console(file=text, width=width, color_system=None))
    return PrintedText(text.getvalue())


def experiment_text(result: ExperimentResult, width: int) -> PrintedText:
    """Return all reports of an experiment without a file, and the verdicts."""

    def show(console: Console) -> None:
        for report in result.reports:
            if report.file is None:
                show_report(result, report, console)
        print_verdicts(result, console)

    return capture_text(show, width)


def experiment_chart(
    result: ExperimentResult,
    kind: str,
    axis: str | None,
    by: str | None,
    top: int | None,
    measure: str | None = None,
    width: int | None = None,
) -> Any:
    """Return the altair chart; see `ExperimentResult.plot`."""
    entry = REPORTS.get(kind)
    if entry is None or not entry.picture:
        raise MechdslError([_unknown_picture(kind)])
    assert entry.module is not None
    assert entry.signature is not None
    if measure is not None:
        result = _with_measure(result, kind, measure)
    if axis is None and by is None:
        asked = next((each for each in result.reports if each.kind == kind), None)
        axis, by = (
            _default_axes(result, entry.signature)
            if asked is None
            else (
                asked.variable,
                asked.by,
            )
        )
        top = asked.top if asked is not None and top is None else top
    report = _report_line(kind, axis, by, top)
    problems = _report_problems(result, report, entry.signature)
    if problems:
        raise MechdslError(problems)
    if width is not None and not 1 <= width <= MAX_COLUMNS:
        raise ValueError(f"a paper has 1 or 2 columns, so a chart can't span {width}")
    try:
        import_module("altair")
    except ImportError as error:
        raise ImportError(
            "charts need altair, which is usually installed with mechdsl: pip install altair"
        ) from error
    draw = import_module(entry.module).chart
    if width is None:
        return draw(result, report)
    from mechdsl.show.reports.charts import fit_chart

    return fit_chart(lambda: draw(result, report), width)


def _with_measure(result: ExperimentResult, kind: str, measure: str) -> ExperimentResult:
    """Return the result with only the named measure; MechdslError if it isn't exactly one."""
    names = [
        (
            measure_name(measure_data),
            measure_data.label,
            measure_data.metric,
            measure_data.called,
            measure_data.word,
        )
        for measure_data in result.measures
    ]
    whole = [n for n, name in enumerate(names) if measure == name[0]]
    numbers = whole or [n for n, name in enumerate(names) if measure in name]
    listed = f"measures are {name_list(name[0] for name in names)}"
    if not numbers:
        every = [name for own in names for name in own if name]
        hint = did_you_mean(measure, every, listed)
        raise MechdslError([UnknownWord(kind="measure", word=measure, hint=hint)])
    if len(numbers) > 1:
        span = _report_line(kind, None, None, None).span
        reason = f"draws one measure, but `{measure}` names {len(numbers)}"
        raise MechdslError([BadReport(span=span, kind=kind, reason=reason, hint=listed)])
    chosen = slice(numbers[0], numbers[0] + 1)
    return replace(
        result,
        measures=result.measures[chosen],
        statistics=result.statistics[chosen],
        controls=result.controls[chosen],
    )


def _unknown_picture(kind: str) -> Diagnostic:
    pictures = [name for name, entry in REPORTS.items() if entry.picture]
    near = closest_name(kind, pictures)
    listed = f"pictures are {', '.join(pictures)}"
    hint = f"did you mean `{near}`? {listed}" if near else listed
    return UnknownWord(kind="picture", word=kind, hint=hint)


def _default_axes(
    result: ExperimentResult, signature: ReportSignature
) -> tuple[str | None, str | None]:
    """Return the default axis and `by` of a picture: the first that it can have."""
    first, second, *_ = (*result.axes, None, None)
    if signature.by_category:
        names = [short_names(m.label, m.word) for m in result.measures if m.kind == "category"]
        values = next(iter(result.row_values), None)
        # Without a category, the diagnostic about the first measure explains the problem.
        return first or values, names[0][-1] if names else result.measures[0].label
    if signature.variable is None:
        return None, None
    return first, second if signature.by is not None else None


def _report_line(kind: str, axis: str | None, by: str | None, top: int | None) -> spec.Report:
    """Build a report whose span is the line that would request it in a file."""
    words = ["report", kind, axis, *(["by", by] if by else []), *(["top", str(top)] if top else [])]
    line = " ".join(word for word in words if word)
    span = Span(Source(line), 0, len(line))
    return spec.Report(span=span, kind=kind, variable=axis, by=by, top=top)


def _report_problems(
    result: ExperimentResult, report: spec.Report, signature: ReportSignature
) -> list[Diagnostic]:
    axes = [*result.axes, *result.aliases]
    by = signature.by
    if signature.variable and by and by.needed and by.of != ("category",) and not report.by:
        has = " and ".join(f"`{axis}`" for axis in result.axes) or "none"
        reason = f"needs two axes; this experiment has {has}"
        hint = 'write `plot("lines")` or `plot("bars")`, which need one'
        if len(result.axes) > 1:
            first, second = result.axes[:2]
            hint = f'write both: `plot("{report.kind}", "{first}", by="{second}")`'
        return [BadReport(span=report.span, kind=report.kind, reason=reason, hint=hint)]
    values, writes = list(result.row_values), bool(result.replies)
    circuit = result.circuit is not None
    return check_report(report, axes, values, result.measures, writes=writes, circuit=circuit)
