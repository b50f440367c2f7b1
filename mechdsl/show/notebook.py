"""An experiment as HTML for notebooks, with the tables of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mechdsl.base.text import Source, Span, escape_xml
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.table import (
    EXACT_CELLS_TITLE,
    SEED_MEANS_TITLE,
    Column,
    MeasureTable,
    active_prompts_html,
    table_frame,
)
from mechdsl.show.reports.text import verdict_text

MAX_ROWS = 100
"""Maximum number of displayed rows of a table."""

DEFAULT_TOP = 20
"""Number of displayed cells if the file requests no table."""

QUIET_STYLE = 'style="color:#767676"'


def experiment_html(result: ExperimentResult) -> str:
    """Return a table for each measure per `report table` of the file (by default, the largest
    effects), then the conventions and the verdicts. Every text is escaped."""
    parts: list[str] = []
    conventions: Mapping[str, str] = {}
    for report in _tables(result):
        frame = table_frame(result, report)
        for each in frame.measures:
            parts += _measure_html(frame.name, each)
        parts.append(active_prompts_html(frame.active))
        conventions = frame.conventions
    parts += _conventions(conventions)
    parts += _paragraph(list(_verdicts(result)))
    return f'<div class="mechdsl">{"".join(parts)}</div>'


def _measure_html(name: str, table: MeasureTable) -> Iterator[str]:
    """Yield the parts of a measure's table."""
    title = f"<b>{escape_xml(name)}:</b> {escape_xml(table.title)}"
    if table.missing is not None:
        why = escape_xml(f"{table.missing.code}: {table.missing.reason}")
        yield f"<p>{title}: <b>not computed</b><br/><span {QUIET_STYLE}>{why}</span></p>"
        return
    yield f"<p>{title}<br/><span {QUIET_STYLE}>{escape_xml(table.facts)}</span></p>"
    yield _table(table.columns)
    cut = len(table.columns[0].cells) - MAX_ROWS
    more = [f"and {cut} more rows: `to_pandas()` has them all"] if cut > 0 else []
    yield from _paragraph([escape_xml(line) for line in (*more, *table.notes)])
    if table.seed_means:
        yield from _paragraph([SEED_MEANS_TITLE])
        yield _table(table.seed_means)
    if table.exact:
        yield from _paragraph([EXACT_CELLS_TITLE])
        yield _table(table.exact)
    yield from _paragraph(list(map(escape_xml, table.exact_notes)))


def _tables(result: ExperimentResult) -> list[spec.Report]:
    """Return the tables that the file requests, without duplicates."""
    asked = [report for report in result.reports if report.kind == "table"]
    if asked:
        return list({(report.by, report.top): report for report in asked}.values())
    top = DEFAULT_TOP if len(result.cells) > DEFAULT_TOP else None
    line = f"report table top {top}" if top else "report table"
    return [spec.Report(span=Span(Source(line), 0, len(line)), kind="table", top=top)]


def _table(columns: Sequence[Column]) -> str:
    alignments = ["right" if column.numeric else "left" for column in columns]
    heads = "".join(
        f'<th style="text-align:{side}">{escape_xml(column.title)}</th>'
        for column, side in zip(columns, alignments, strict=True)
    )
    survives = next((column.cells for column in columns if column.title == "survives"), None)
    rows: list[str] = []
    for index, texts in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if index == MAX_ROWS:
            break
        style = "" if survives is None or survives[index] == "yes" else f" {QUIET_STYLE}"
        cells = "".join(
            f'<td style="text-align:{side}">{escape_xml(text)}</td>'
            for text, side in zip(texts, alignments, strict=True)
        )
        rows.append(f"<tr{style}>{cells}</tr>")
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _paragraph(lines: Sequence[str]) -> list[str]:
    """Join lines of HTML to a paragraph."""
    return [f"<p {QUIET_STYLE}>{'<br/>'.join(lines)}</p>"] if lines else []


def _conventions(conventions: Mapping[str, str]) -> list[str]:
    if not conventions:
        return []
    rows = "".join(
        f'<tr {QUIET_STYLE}><td style="text-align:left">{escape_xml(key)}</td>'
        f'<td style="text-align:left">{escape_xml(str(value))}</td></tr>'
        for key, value in conventions.items()
    )
    return [f"<p {QUIET_STYLE}><b>conventions</b></p><table><tbody>{rows}</tbody></table>"]


def _verdicts(result: ExperimentResult) -> Iterator[str]:
    for outcome in result.outcomes:
        word = outcome.word if outcome.holds else f"<b>{outcome.word}</b>"
        reason = f" ({outcome.reason})" if outcome.reason else ""
        yield f"{word} {escape_xml(f'expect {outcome.text} {verdict_text(outcome)}{reason}')}"
