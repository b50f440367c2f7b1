"""Runs of a store as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.byte_sizes import size_text
from mechdsl.results.results import Results
from mechdsl.results.run_facts import RunFacts
from mechdsl.show.reports.verdicts import print_lost, print_verdicts
from mechdsl.show.show_report import show_report


def print_runs(runs: Sequence[RunFacts], console: Console) -> None:
    """A line per run, in the order given."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("began", no_wrap=True)
    table.add_column("file", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("experiments", "hold", "s", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.id,
            f"{run.began:%b %d %H:%M}",  # the year is in the id
            run.file,
            run.state,
            "" if run.experiments is None else str(run.experiments),
            run.verdict,
            "" if run.seconds is None else f"{run.seconds:.1f}",
            size_text(run.size) if run.size else "",
        )
    console.print(table)


def print_facts(run: RunFacts, console: Console) -> None:
    """All that the store says of a run."""
    console.print(Text(f"run {run.id}: {run.state}", style="bold"), highlight=False)
    took = "" if run.seconds is None else f", {run.seconds:.1f} s"
    lines = {
        "file": run.file,
        "began": f"{run.began:%Y-%m-%d %H:%M:%S}{took}",
        "settings": _listed(run.settings),
        "parameters": _listed(run.parameters),
        "versions": _listed(run.versions),
        "hashes": _listed({name: value[:12] for name, value in run.hashes.items()}),
        "rows": run.rows,
        "expectations": f"{run.verdict} hold" if run.verdict else "",
        "size": size_text(run.size) if run.size else "",
    }
    table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in lines.items():
        if text:
            table.add_row(name, text)
    console.print(table)


def _listed(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def print_results(results: Results, console: Console) -> None:
    """Tables and verdicts, as they were printed by the run: reports that go to a file aren't."""
    for experiment in results:
        for report in experiment.reports:
            if report.file is None:
                show_report(experiment, report, console)
        print_verdicts(experiment, console)
    for file in results.files:
        for lost in file.lost:
            print_lost(lost, console)
