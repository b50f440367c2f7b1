"""The table on the terminal and in `docs/statistics.md`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

import numpy as np
import scipy
from rich.console import Console
from rich.table import Table

from benchmarks.coverage.setting import SURE, Judgement, Outcome

BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
HEADINGS = ("setting", "figure", "%", f"{SURE:g} %", "bound", "none", "repetitions", "verdict")
SAID = {"holds": "holds", "fails": "**fails**", "printed": ""}


def line(outcome: Outcome) -> tuple[str, ...]:
    """One row, as HEADINGS."""
    low, high = outcome.interval
    none = outcome.repetitions - outcome.of
    return (
        outcome.setting.name,
        outcome.figure.name,
        f"{outcome.share:.1f}" if outcome.of else "",
        f"{low:.1f} to {high:.1f}" if outcome.of else "",
        outcome.figure.bound,
        f"{100 * none / outcome.repetitions:.1f} %" if none else "",
        f"{outcome.repetitions:,}",
        SAID[outcome.verdict],
    )


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print a table per group."""
    for group, members in groupby(outcomes, lambda each: each.setting.group):
        table = Table(title=group, title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if number < 2 else "right")
        for each in members:
            style = "red" if each.verdict == "fails" else None
            table.add_row(*(cell.strip("*") for cell in line(each)), style=style)
        console.print(table)


def summary(judgement: Judgement, reasons: dict[str, str]) -> list[str]:
    """What all of it comes to, a sentence each."""
    found = [f"{len(judgement.failing)} of {judgement.judged} judged figures fall short."]
    found += [f"{key}: {reasons[key]}" for key in judgement.failing if key in reasons]
    found += [f"{key}: no reason is known." for key in judgement.without_reason]
    return found


def markdown(outcomes: Sequence[Outcome], sentences: Sequence[str], seed: int) -> str:
    """The section of `docs/statistics.md`."""
    head = (
        f"{date.today().isoformat()}, seed {seed}; Python {platform.python_version()}, "
        f"numpy {np.__version__}, scipy {scipy.__version__}. Percentages of repetitions with their "
        f"{SURE:g} % intervals; *none*: repetitions in which mechdsl prints nothing."
    )
    parts = [head]
    for group, members in groupby(outcomes, lambda each: each.setting.group):
        rule = ["---", "---", *("---:" for _ in HEADINGS[2:])]
        rows = [HEADINGS, rule, *map(line, members)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"### {group[0].upper()}{group[1:]}\n\n{table}")
    parts.append("\n".join(f"- {sentence}" for sentence in sentences))
    return "\n\n".join(parts)


def rewrite(page: Path, section: str) -> None:
    """Put the section between the two marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}", encoding="utf-8")
