"""The results as a table on the terminal and as Markdown for the README."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.measure import EXPERT, OURS, REFERENCE, Measured, Runs
from benchmarks.tools.names import TOOLS
from benchmarks.work import count

HEADINGS = (
    "tool",
    "seconds",
    "× plain",
    "× expert",
    "mechdsl is",
    "of the bound",
    "peak MiB",
    "above the model",
    "largest difference",
    "cells",
)
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def lines(measured: Measured) -> list[tuple[str, ...]]:
    """One row of text per tool, as HEADINGS."""
    return [_line(measured, runs) for runs in measured.runs.values()]


def _line(measured: Measured, runs: Runs) -> tuple[str, ...]:
    name = runs.tool
    if runs.failure is not None or not runs.seconds:
        return (name, runs.failure or "not run", *("" for _ in HEADINGS[2:]))
    seconds = median(runs.seconds)
    faster = measured.ratio(REFERENCE, name)
    ours = measured.ratio(name, OURS) if name != OURS else None
    return (
        name,
        f"{seconds:.2f}",
        _times(faster),
        _times(measured.ratio(EXPERT, name) if measured.is_right(EXPERT) else None),
        "" if ours is None else f"{_times(ours)} faster",
        f"{measured.bound / seconds:.2f}",
        f"{runs.peak:.0f}",
        f"{runs.peak - runs.before:.0f}",
        "" if name == REFERENCE else f"{runs.difference:.1e}",
        f"{count(runs.picks)} of {runs.everything}" if runs.sampled else f"all {runs.everything}",
    )


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def summary(measured: Measured) -> list[str]:
    """The sentences below a table."""
    found = [*_headline(measured)]
    found += [
        f"Lower bound: {measured.multiply_adds / 1e9:.1f} G multiply-adds, "
        f"{measured.bound:.2f} s at {median(measured.rates) / 1e9:.0f} G/s; {_rounds(measured)}.",
        f"Patching moves the metric by {measured.spread:.2g} logits "
        "(standard deviation over cells).",
    ]
    plain = measured.runs.get(REFERENCE)
    if plain is not None and plain.seconds:
        reached = median(plain.seconds) / measured.bound
        found.append(f"A run at the bound would be {reached:.1f}× the plain loop.")
    sampled = [runs for runs in measured.runs.values() if runs.sampled and runs.seconds]
    if sampled:
        names = ", ".join(runs.tool for runs in sampled)
        found.append(
            f"{names}: timed on an even sample of {count(sampled[0].picks)} of "
            f"{sampled[0].everything} cells and scaled up to all (a loop takes the same time for "
            "every cell; unpatched runs aren't scaled); tables are compared on those cells."
        )
    return found


def _headline(measured: Measured) -> list[str]:
    """mechdsl against the plain loop, the fastest other library and the bound."""
    if OURS not in measured.runs or not measured.runs[OURS].seconds:
        return []
    parts = [f"{_times(measured.ratio(REFERENCE, OURS))} the plain loop"]
    if measured.is_right(EXPERT):
        reached = _times(measured.ratio(EXPERT, OURS))
        parts.append(f"{reached} the expert's loop (target {_times(measured.target)})")
    peer = measured.fastest_peer
    if peer is not None:
        parts.append(f"{_times(measured.ratio(peer, OURS))} the fastest other library ({peer})")
    fraction = measured.bound / median(measured.runs[OURS].seconds)
    return [f"mechdsl: {', '.join(parts)}, {fraction:.2f} of the bound."]


def _rounds(measured: Measured) -> str:
    counts = {name: len(runs.seconds) for name, runs in measured.runs.items() if runs.seconds}
    if len(set(counts.values())) == 1:
        return f"medians of {max(counts.values())} rounds"
    peers = [n for name, n in counts.items() if TOOLS[name].is_peer]
    others = [n for name, n in counts.items() if not TOOLS[name].is_peer]
    return f"medians of {max(others)} rounds, other libraries of {max(peers)}"


def show(measured: Measured, console: Console) -> None:
    """Print the table of one work."""
    work = measured.work
    table = Table(title=f"{work.name}: {work.title}", title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for line in lines(measured):
        table.add_row(*line)
    console.print(table)
    for sentence in summary(measured):
        console.print(sentence, highlight=False)
    console.print()


def markdown(everything: Sequence[Measured], threads: int, skipped: Sequence[str]) -> str:
    """The results section of the README."""
    parts = [conditions(everything, threads)]
    for measured in everything:
        work = measured.work
        parts.append(f"### {work.name}: {work.title}\n\n`{work.rule}`")
        rule = ["---", *("---:" for _ in HEADINGS[1:])]
        rows = [HEADINGS, rule, *lines(measured)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts.append(" ".join(summary(measured)))
    parts.extend(skipped)
    return "\n\n".join(parts)


def conditions(everything: Sequence[Measured], threads: int) -> str:
    """When, on what and with which versions."""
    versions: dict[str, set[str]] = {}
    for measured in everything:
        for runs in measured.runs.values():
            for package, number in runs.versions.items():
                versions.setdefault(package, set()).add(number)
    listed = ", ".join(f"{name} {' and '.join(sorted(n))}" for name, n in versions.items())
    return (
        f"{date.today().isoformat()}; {os.cpu_count()} cores ({platform.machine()}), "
        f"{_gibibytes():.0f} GiB, no GPU; {threads} threads, fp32; "
        f"Python {platform.python_version()}, {listed}."
    )


def _gibibytes() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def rewrite(readme: Path, section: str) -> None:
    """Put a section between the two marks of the README."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}")
