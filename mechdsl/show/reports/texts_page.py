"""Replies side by side as a page."""

from __future__ import annotations

from mechdsl.base.visible import xml_text
from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.charts import FONT, INK, QUIET
from mechdsl.show.reports.overlay_page import MONO
from mechdsl.show.reports.reply_rows import (
    Part,
    WrittenLine,
    WrittenPrompt,
    said_of,
    written_prompts,
)

STYLE = f"""
body {{ font-family: {FONT}; color: {INK}; margin: 24px; }}
h1 {{ font-size: 18px; margin: 24px 0 4px; }}
h2 {{ font-size: 13px; margin: 20px 0 4px; }}
p, small, i {{ color: {QUIET}; font-size: 12px; margin: 2px 0; }}
table {{ border-collapse: collapse; }}
th {{ text-align: left; vertical-align: top; font-weight: normal; font-size: 12px; }}
th, td {{ padding: 3px 16px 3px 0; border-top: 1px solid #ddd; vertical-align: top; }}
pre, td {{ font-family: {MONO}; font-size: 13px; white-space: pre-wrap; margin: 0; }}
ins {{ background: #d6f2d9; text-decoration: none; font-weight: bold; }}
del {{ background: #fbdcdc; }}
"""
_TAGS = {"same": "{}", "new": "<ins>{}</ins>", "gone": "<del>{}</del>"}


def page(result: ExperimentResult, report: spec.Report) -> str:
    """HTML on its own: what the base run wrote, and beside each cell what differs from that."""
    shown = written_prompts(result, report)
    title = xml_text(f"{result.name}: replies")
    facts = xml_text(f"{result.model} · {result.direction}")
    notes = "".join(f"<p>{xml_text(line)}</p>" for line in said_of(result, shown))
    body = "".join(map(_prompt, shown))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1><p>{facts}</p>{notes}{body}"
        "</body></html>\n"
    )


def _prompt(each: WrittenPrompt) -> str:
    rows = "".join(map(_line, each.lines))
    return f"<h2>prompt {each.number}</h2><pre>{_lines(each.text)}</pre><table>{rows}</table>\n"


def _lines(text: str) -> str:
    return "\n".join(map(xml_text, text.split("\n")))


def _line(line: WrittenLine) -> str:
    replies = [
        "".join(map(_part, reply)) if reply else "<i>nothing</i>" for reply in line.replies
    ] or ["<i>the same</i>"]
    first, *more = (f"<td>{reply}</td>" for reply in replies)
    head = f'<th rowspan="{len(replies)}">{xml_text(line.label)}</th>'
    return f"<tr>{head}{first}</tr>" + "".join(f"<tr>{reply}</tr>" for reply in more)


def _part(part: Part) -> str:
    return _TAGS[part.kind].format(xml_text(part.text))
