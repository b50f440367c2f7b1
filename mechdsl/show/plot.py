"""`plot` of an experiment's results: the chart of a report that need not stand in the file."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mechdsl.base.registry import nearest
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import UnknownWord
from mechdsl.diagnostics.e06_statistics import BadReport
from mechdsl.diagnostics.raised import MechdslError
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import with_tokens
from mechdsl.vocab.reports import REPORTS, ReportSignature, check_report, short_names


def as_chart(
    result: ExperimentResult, kind: str, axis: str | None, by: str | None, top: int | None
) -> Any:
    """The altair chart; see `ExperimentResult.plot`."""
    entry = REPORTS.get(kind)
    if entry is None or not entry.picture:
        raise MechdslError([_no_picture(kind)])
    assert entry.module is not None
    assert entry.signature is not None
    if axis is None and by is None:
        asked = next((each for each in result.reports if each.kind == kind), None)
        axis, by = (
            _fitting(result, entry.signature)
            if asked is None
            else (
                asked.variable,
                asked.by,
            )
        )
        top = asked.top if asked is not None and top is None else top
    report = _line(kind, axis, by, top)
    problems = _problems(result, report, entry.signature)
    if problems:
        raise MechdslError(problems)
    try:
        import_module("altair")
    except ImportError as error:
        raise ImportError(
            "charts need altair, which is usually installed with mechdsl: pip install altair"
        ) from error
    return import_module(entry.module).chart(with_tokens(result, report), report)


def _no_picture(kind: str) -> Diagnostic:
    pictures = [name for name, entry in REPORTS.items() if entry.picture]
    near = nearest(kind, pictures)
    listed = f"pictures are {', '.join(pictures)}"
    hint = f"did you mean `{near}`? {listed}" if near else listed
    return UnknownWord(kind="picture", word=kind, hint=hint)


def _fitting(result: ExperimentResult, signature: ReportSignature) -> tuple[str | None, str | None]:
    """The axis and the `by` of a picture where neither is said: the first that it could have."""
    first, second, *_ = (*result.axes, None, None)
    if signature.by_category:
        names = [short_names(m.label, m.word) for m in result.measures if m.kind == "category"]
        values = next(iter(result.row_values), None)
        # where none is a category, what is said of the first measure says so
        return first or values, names[0][-1] if names else result.measures[0].label
    if signature.variable is None:
        return None, None
    return first, second if signature.by is not None else None


def _line(kind: str, axis: str | None, by: str | None, top: int | None) -> spec.Report:
    """The report, with the line that would ask for it in a file as its place."""
    words = ["report", kind, axis, *(["by", by] if by else []), *(["top", str(top)] if top else [])]
    line = " ".join(word for word in words if word)
    span = Span(Source(line), 0, len(line))
    return spec.Report(span=span, kind=kind, variable=axis, by=by, top=top)


def _problems(
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
    return check_report(report, axes, values, result.measures, writes=writes)
