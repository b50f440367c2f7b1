"""Runs of a store as tables, and verdicts that changed since an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.text import count_noun, format_size
from mechdsl.results.experiment_result import (
    CHANGE_TYPES,
    ChangeType,
    ExpectationChange,
    ExpectOutcome,
    VerdictComparison,
)
from mechdsl.results.results import Results
from mechdsl.results.runs import RunFacts
from mechdsl.show.output import PrintedText, capture_text, show_report
from mechdsl.show.reports.text import (
    print_hanging,
    print_lost_experiment,
    print_verdicts,
    verdict_text,
)


def print_runs(runs: Sequence[RunFacts], console: Console) -> None:
    """Print a line per run, in the given order."""
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
            format_size(run.size) if run.size else "",
        )
    console.print(table)


def print_facts(run: RunFacts, console: Console) -> None:
    """Print everything that the store contains on a run."""
    console.print(Text(f"run {run.id}: {run.state}", style="bold"), highlight=False)
    took = "" if run.seconds is None else f", {run.seconds:.1f} s"
    lines = {
        "file": run.file,
        "began": f"{run.began:%Y-%m-%d %H:%M:%S}{took}",
        "settings": _fact_list(run.settings),
        "parameters": _fact_list(run.parameters),
        "versions": _fact_list(run.versions),
        "hashes": _fact_list({name: value[:12] for name, value in run.hashes.items()}),
        "rows": run.rows,
        "expectations": f"{run.verdict} hold" if run.verdict else "",
        "size": format_size(run.size) if run.size else "",
    }
    table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in lines.items():
        if text:
            table.add_row(name, text)
    console.print(table)


def _fact_list(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def print_results(results: Results, console: Console) -> None:
    """Print tables and verdicts as the run printed them, without reports that go to a file."""
    for experiment in results:
        for report in experiment.reports:
            if report.file is None:
                show_report(experiment, report, console)
        print_verdicts(experiment, console)
    for file in results.files:
        for lost in file.lost:
            print_lost_experiment(lost, console)


CHANGE_STYLES: dict[ChangeType, str] = {"regression": "bold red", "holds now": "green"}

CHANGE_INDENT = " " * (max(map(len, CHANGE_TYPES)) + 2)


def verdict_comparison_text(against: VerdictComparison, width: int) -> PrintedText:
    """Format the comparison without colours."""
    return capture_text(lambda console: print_verdict_comparison(against, console), width)


def print_verdict_comparison(against: VerdictComparison, console: Console) -> None:
    """Print the number of changed verdicts, and each change with both figures."""
    console.print()
    runs = ", ".join(against.runs)
    console.print(Text(f"against {runs}: {_count_text(against)}", style="bold"), highlight=False)
    for file in against.without:
        print_hanging("", f"{file} isn't in that run: all its expectations are new", console)
    several = len({each.file for each in against.changes}) > 1
    for change in against.changes:
        failing = "bold red" if change.fails else ""
        text = Text().append(
            change.kind.ljust(len(CHANGE_INDENT)), style=CHANGE_STYLES.get(change.kind) or failing
        )
        place = f"{change.file}: {change.experiment}" if several else change.experiment
        console.print(text.append(f"{place}: {_change_text(change)}"), highlight=False)
        for line in _change_figures(change):
            print_hanging(CHANGE_INDENT, line, console)
    if against.of_kind("failed before"):
        print_hanging("", "expectations that failed before don't fail the job", console)


def _count_text(against: VerdictComparison) -> str:
    if not against.unchanged and not against.changes:
        return "nothing to compare, no file has expectations; `mechdsl diff` compares cells"
    hold = "holds" if against.unchanged == 1 else "hold"
    said = [f"{count_noun(against.unchanged, 'expectation')} {hold} as before"]
    for kind in CHANGE_TYPES:
        count = len(against.of_kind(kind))
        word = count_noun(count, kind) if kind == "regression" else f"{count} {kind}"
        said += [word] if count else []
    return ", ".join(said)


def _change_text(change: ExpectationChange) -> str:
    if change.lost is None:
        return f"expect {change.text}"
    return f"{change.text}: not computed" if change.text else "not computed"


def _change_figures(change: ExpectationChange) -> list[str]:
    """Format both figures with their intervals, and the reason for a failure."""
    if change.lost is not None:
        return [f"{change.lost.code}: {change.lost.reason}", "in the earlier run it was"]
    now, before = change.now, change.before
    said = "; ".join(
        f"{when} {_verdict_text(outcome)}"
        for when, outcome in (("now", now), ("then", before))
        if outcome is not None
    )
    reasons = [now.reason] if now is not None and not now.holds and now.reason else []
    return [said, *reasons]


def _verdict_text(outcome: ExpectOutcome) -> str:
    word = "holds" if outcome.holds else "fails"
    value = verdict_text(outcome)
    return f"{word}: {value}" if value else word
