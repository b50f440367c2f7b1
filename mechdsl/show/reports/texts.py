"""`report texts [top n]`: what the base run and each cell wrote behind the first prompts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.visible import visible
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.console import visible_console
from mechdsl.show.reports.reply_rows import Part, WrittenLine, said_of, written_prompts
from mechdsl.show.reports.text import conventions, notes

PROMPT = 160
"""Characters of a prompt's end that are shown."""
WIDTH = 100
"""Of a file of text."""
STYLES = {"same": "", "new": "bold green", "gone": "red"}
SIGNS = {"same": ("", ""), "new": ("{+", "+}"), "gone": ("[-", "-]")}
"""What differs can be told without colours."""


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Per prompt the replies below each other."""
    console.print()
    title = Text(f"{result.name}: ", style="bold").append("replies")
    console.print(title, highlight=False)
    facts = f"{result.model} · {result.direction}"
    console.print(Text(facts, style="dim"), highlight=False)
    shown = written_prompts(result, report)
    for each in shown:
        console.print(Text(f"prompt {each.number}: ", style="bold") + Text(_end(each.text)))
        table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
        table.add_column(max_width=max(20, console.width // 3))
        table.add_column()
        for line in each.lines:
            for label, reply in zip(_labels(line), _replies(line), strict=True):
                table.add_row(Text(label, style="" if line.runs else "dim"), reply)
        console.print(table)
    notes(said_of(result, shown), console)
    conventions(result, report, console)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """As a page, or as plain text."""
    if path.suffix.lower() == ".html":
        from mechdsl.show.reports.texts_page import page

        path.write_text(page(result, report), encoding="utf-8")
        return
    text = io.StringIO()
    render(result, report, visible_console(file=text, width=WIDTH, plain=True))
    path.write_text(text.getvalue().lstrip("\n"), encoding="utf-8")


def _end(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= PROMPT else "…" + shown[1 - PROMPT :]


def _labels(line: WrittenLine) -> Iterator[str]:
    yield visible(line.label)
    yield from [""] * (len(line.replies) - 1)


def _replies(line: WrittenLine) -> Iterator[Text]:
    if not line.replies:
        yield Text("the same", style="dim")
    for reply in line.replies:
        yield Text().join(map(_part, reply)) if reply else Text("nothing", style="dim")


def _part(part: Part) -> Text:
    before, behind = SIGNS[part.kind]
    return Text(before + visible(part.text) + behind, style=STYLES[part.kind])
