"""`report texts [top n]`: completions of the first prompts, in the terminal and as a page.

Each reply is compared with the base run's, and the differing words are marked.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.text import count_noun, escape_hidden, escape_xml
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey
from mechdsl.resolve.measures import MEASURED_AXIS, STEP_AXIS
from mechdsl.results.experiment_result import DEFAULT_SHOWN_PROMPTS, ExperimentResult
from mechdsl.show.console import visible_console
from mechdsl.show.reports.canvas import FONT, INK, MONO_FONT, QUIET_INK
from mechdsl.show.reports.text import print_conventions, print_notes, print_title
from mechdsl.vocab.metrics import Reply

_WORD = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""A word or sign with the preceding white space: the unit of comparison."""

_MIN_EQUAL_SHARE = 0.5
"""Minimum share of equal words for marking single words instead of the whole text."""

_MAX_NAMED_CELLS = 3
"""Maximum number of cells named for a common reply."""

LENGTH_MARK = "…"
"""Mark after a reply of the maximum length."""

BROKEN_MARK = " (NaN or infinite)"
"""Mark after a reply that could not be continued."""


class ReplyPart(NamedTuple):
    """A piece of a reply: the same as in the base run, new, or removed."""

    text: str
    kind: Literal["same", "new", "gone"] = "same"


@dataclass(frozen=True)
class ReplyLine:
    """The replies of a run or of some cells to a prompt."""

    label: str
    replies: tuple[tuple[ReplyPart, ...], ...]
    """One per sample and draw of noise; empty if all equal those of the base run."""
    runs: bool
    """Whether it is an unpatched run."""


@dataclass(frozen=True)
class PromptReplies:
    """A prompt with all its replies."""

    number: int
    """1-based number in the order of the experiment."""
    text: str
    lines: tuple[ReplyLine, ...]


@dataclass(frozen=True)
class RepliesFrame:
    """The contents of a report of replies, for the terminal and pages."""

    name: str
    """The experiment."""
    facts: str
    prompts: Sequence[PromptReplies]
    notes: Sequence[str]


def replies_frame(result: ExperimentResult, report: spec.Report) -> RepliesFrame:
    """Choose the replies and mark their differences."""
    shown = prompt_replies(result, report)
    facts = f"{result.model} · {result.direction}"
    return RepliesFrame(result.name, facts, shown, _reply_notes(result, shown))


def prompt_replies(result: ExperimentResult, report: spec.Report) -> list[PromptReplies]:
    """Return the first prompts, `top n` of them."""
    rows = list(result.replies.prompts)[: report.top or DEFAULT_SHOWN_PROMPTS]
    return [
        PromptReplies(n, result.replies.prompts[row], tuple(_reply_lines(result, row)))
        for n, row in enumerate(rows, start=1)
    ]


def _reply_notes(result: ExperimentResult, shown: Sequence[PromptReplies]) -> list[str]:
    """Describe the content and marks of the report."""
    if not shown:
        return ["no replies to show: these results don't contain them"]
    count = f"{len(shown)} of {count_noun(len(result.replies.prompts), 'prompt')}, the first ones"
    said = [count]
    if not all(line.runs for each in shown for line in each.lines):
        base = result.shown(result.base)
        said = [
            f"{count}; differences from {base} are marked, word by word if at least half of "
            "the words are equal"
        ]
    if any(len(line.replies) > 1 for each in shown for line in each.lines):
        said.append("one line for each sample and each draw of noise")
    if any(part.text == LENGTH_MARK for each in shown for line in each.lines
           for reply in line.replies for part in reply):  # fmt: skip
        said.append(f"{LENGTH_MARK} after a reply that reached the length limit")
    return said


def _reply_lines(result: ExperimentResult, row: int) -> Iterator[ReplyLine]:
    """Yield the unpatched runs, then the cells; those with equal replies share a line."""
    written_replies = result.replies
    for run, texts in written_replies.runs.items():
        if row in texts:
            plain = tuple((ReplyPart(reply.text), *_end_mark(reply)) for reply in texts[row])
            yield ReplyLine(result.shown(run), plain, runs=True)
    alike: dict[tuple[object, ...], list[CellKey]] = {}
    first: dict[tuple[object, ...], tuple[Sequence[Reply], Sequence[Reply]]] = {}
    for cell, texts in zip(result.cells, written_replies.cells, strict=False):
        if row not in texts or not (cell.site or cell.coords):
            continue  # without rules the only cell is the base run
        base = _base_replies(result, row, cell)
        key = (tuple((reply.text, reply.ended) for reply in texts[row]), id(base))
        alike.setdefault(key, []).append(cell)
        first[key] = (texts[row], base)
    for key, cells in alike.items():
        replies, base = first[key]
        parts = tuple(
            (
                *mark_differences(base[n % len(base)].text if base else None, reply.text),
                *_end_mark(reply),
            )
            for n, reply in enumerate(replies)
        )
        same = bool(base) and all(
            _is_equal(reply, base[n % len(base)]) for n, reply in enumerate(replies)
        )
        yield ReplyLine(_cells_label(cells), () if same else parts, runs=False)


def _is_equal(one: Reply, other: Reply) -> bool:
    return (one.text, one.ended) == (other.text, other.ended)


def _end_mark(reply: Reply) -> tuple[ReplyPart, ...]:
    mark = {"length": LENGTH_MARK, "broken": BROKEN_MARK}.get(reply.ended)
    return () if mark is None else (ReplyPart(mark),)


def _base_replies(result: ExperimentResult, row: int, cell: CellKey) -> Sequence[Reply]:
    """Return the replies of the cell's base run; empty if it can't be identified."""
    runs: Mapping[str, Mapping[int, tuple[Reply, ...]]] = result.replies.runs
    names = result.base.split(", ")
    there = [run for run in runs if run.partition(" (")[0] in names and row in runs[run]]
    if len(there) > 1:
        values = {str(value) for value in cell.coords.values()}
        there = [run for run in there if values.issuperset(run[:-1].partition(" (")[2].split(", "))]
    return runs[there[0]][row] if len(there) == 1 else ()


def _cells_label(cells: Sequence[CellKey]) -> str:
    """Name cells without the positions at which measures are read: they share the replies."""
    names = list(dict.fromkeys(_without_read_positions(cell).name for cell in cells))
    more = len(names) - _MAX_NAMED_CELLS
    return ", ".join(names[:_MAX_NAMED_CELLS]) + (f" and {more} more" if more > 0 else "")


def _without_read_positions(cell: CellKey) -> CellKey:
    axes = (MEASURED_AXIS, STEP_AXIS)
    return replace(cell, coords={k: v for k, v in cell.coords.items() if k not in axes})


def mark_differences(base: str | None, text: str) -> tuple[ReplyPart, ...]:
    """Mark new and removed words in a text; the whole text if less than half of its words are those
    of the base run."""
    if base is None or text == base:
        return (ReplyPart(text),) if text else ()
    before, now = _WORD.findall(base), _WORD.findall(text)
    matcher = SequenceMatcher(None, before, now, autojunk=False)
    if matcher.ratio() < _MIN_EQUAL_SHARE:
        return (ReplyPart(text, "new"),) if text else (ReplyPart(base, "gone"),)
    parts: list[ReplyPart] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            parts.append(ReplyPart("".join(now[c:d])))
            continue
        gone, new = "".join(before[a:b]), "".join(now[c:d])
        parts += [ReplyPart(gone, "gone")] if gone else []
        parts += [ReplyPart(new, "new")] if new else []
    return tuple(parts)


PROMPT_CHARACTERS = 160
"""Maximum number of characters of a prompt's end."""

FILE_WIDTH = 100
"""Width of a text file."""

PART_STYLES = {"same": "", "new": "bold green", "gone": "red"}

PART_SIGNS = {"same": ("", ""), "new": ("{+", "+}"), "gone": ("[-", "-]")}
"""Signs of differing parts, so that they are recognisable without colours."""


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print each prompt with its replies below one another."""
    frame = replies_frame(result, report)
    print_title(frame.name, "replies", frame.facts, console)
    for each in frame.prompts:
        console.print(Text(f"prompt {each.number}: ", style="bold") + Text(_prompt_end(each.text)))
        table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
        table.add_column(max_width=max(20, console.width // 3))
        table.add_column()
        for line in each.lines:
            for label, reply in zip(_line_labels(line), _reply_texts(line), strict=True):
                table.add_row(Text(label, style="" if line.runs else "dim"), reply)
        console.print(table)
    print_notes(frame.notes, console)
    print_conventions(result, report, console)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write a page or plain text."""
    if path.suffix.lower() == ".html":
        path.write_text(_page(replies_frame(result, report)), encoding="utf-8")
        return
    text = io.StringIO()
    render(result, report, visible_console(file=text, width=FILE_WIDTH, plain=True))
    path.write_text(text.getvalue().lstrip("\n"), encoding="utf-8")


def _prompt_end(text: str) -> str:
    shown = escape_hidden(text)
    return shown if len(shown) <= PROMPT_CHARACTERS else "…" + shown[1 - PROMPT_CHARACTERS :]


def _line_labels(line: ReplyLine) -> Iterator[str]:
    yield escape_hidden(line.label)
    yield from [""] * (len(line.replies) - 1)


def _reply_texts(line: ReplyLine) -> Iterator[Text]:
    if not line.replies:
        yield Text("the same", style="dim")
    for reply in line.replies:
        yield Text().join(map(_part_text, reply)) if reply else Text("nothing", style="dim")


def _part_text(part: ReplyPart) -> Text:
    before, after = PART_SIGNS[part.kind]
    return Text(before + escape_hidden(part.text) + after, style=PART_STYLES[part.kind])


TEXTS_STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; margin: 24px; }}
h1 {{ font-size: 18px; margin: 24px 0 4px; }}
h2 {{ font-size: 13px; margin: 20px 0 4px; }}
p, small, i {{ color: {QUIET_INK}; font-size: 12px; margin: 2px 0; }}
table {{ border-collapse: collapse; }}
th {{ text-align: left; vertical-align: top; font-weight: normal; font-size: 12px; }}
th, td {{ padding: 3px 16px 3px 0; border-top: 1px solid #ddd; vertical-align: top; }}
pre, td {{ font-family: {MONO_FONT}; font-size: 13px; white-space: pre-wrap; margin: 0; }}
ins {{ background: #d6f2d9; text-decoration: none; font-weight: bold; }}
del {{ background: #fbdcdc; }}
"""

_TAGS = {"same": "{}", "new": "<ins>{}</ins>", "gone": "<del>{}</del>"}


def _page(frame: RepliesFrame) -> str:
    """Return a standalone HTML page: the base run's replies and each cell's differences."""
    title, facts = escape_xml(f"{frame.name}: replies"), escape_xml(frame.facts)
    notes = "".join(f"<p>{escape_xml(line)}</p>" for line in frame.notes)
    body = "".join(map(_prompt_html, frame.prompts))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{TEXTS_STYLE}</style></head>\n<body><h1>{title}</h1><p>{facts}</p>{notes}{body}"
        "</body></html>\n"
    )


def _prompt_html(each: PromptReplies) -> str:
    rows = "".join(map(_line_html, each.lines))
    return f"<h2>prompt {each.number}</h2><pre>{_text_html(each.text)}</pre><table>{rows}</table>\n"


def _text_html(text: str) -> str:
    return "\n".join(map(escape_xml, text.split("\n")))


def _line_html(line: ReplyLine) -> str:
    replies = [
        "".join(map(_part_html, reply)) if reply else "<i>nothing</i>" for reply in line.replies
    ] or ["<i>the same</i>"]
    first, *more = (f"<td>{reply}</td>" for reply in replies)
    head = f'<th rowspan="{len(replies)}">{escape_xml(line.label)}</th>'
    return f"<tr>{head}{first}</tr>" + "".join(f"<tr>{reply}</tr>" for reply in more)


def _part_html(part: ReplyPart) -> str:
    return _TAGS[part.kind].format(escape_xml(part.text))
