"""What has changed since an earlier run, printed behind all tables."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mechdsl.base.plural import plural
from mechdsl.results.against import KINDS, Against, Change, Kind
from mechdsl.results.experiment_result import ExpectOutcome
from mechdsl.show.reports.text import hanging
from mechdsl.show.reports.verdicts import verdict_value
from mechdsl.show.terminal import Printed, printed

STYLES: dict[Kind, str] = {"regression": "bold red", "holds now": "green"}
INDENT = " " * (max(map(len, KINDS)) + 2)


def as_text(against: Against, width: int) -> Printed:
    """The comparison without colours."""
    return printed(lambda console: print_against(against, console), width)


def print_against(against: Against, console: Console) -> None:
    """How many verdicts changed, and each that did, with both figures."""
    console.print()
    runs = ", ".join(against.runs)
    console.print(Text(f"against {runs}: {_counts(against)}", style="bold"), highlight=False)
    for file in against.without:
        hanging("", f"{file} is not in that run: all its expectations are new", console)
    several = len({each.file for each in against.changes}) > 1
    for change in against.changes:
        failing = "bold red" if change.fails else ""
        text = Text().append(
            change.kind.ljust(len(INDENT)), style=STYLES.get(change.kind) or failing
        )
        place = f"{change.file}: {change.experiment}" if several else change.experiment
        console.print(text.append(f"{place}: {_what(change)}"), highlight=False)
        for line in _figures(change):
            hanging(INDENT, line, console)
    if against.of_kind("failed before"):
        hanging("", "what failed before doesn't fail the job", console)


def _counts(against: Against) -> str:
    hold = "holds" if against.unchanged == 1 else "hold"
    said = [f"{plural(against.unchanged, 'expectation')} {hold} as before"]
    for kind in KINDS:
        count = len(against.of_kind(kind))
        word = plural(count, kind) if kind == "regression" else f"{count} {kind}"
        said += [word] if count else []
    return ", ".join(said)


def _what(change: Change) -> str:
    if change.lost is None:
        return f"expect {change.text}"
    return f"{change.text}: not computed" if change.text else "not computed"


def _figures(change: Change) -> list[str]:
    """Both figures with their intervals, and why it fails now."""
    if change.lost is not None:
        return [f"{change.lost.code}: {change.lost.reason}", "then it was"]
    now, before = change.now, change.before
    said = "; ".join(
        f"{when} {_verdict(outcome)}"
        for when, outcome in (("now", now), ("then", before))
        if outcome is not None
    )
    reasons = [now.reason] if now is not None and not now.holds and now.reason else []
    return [said, *reasons]


def _verdict(outcome: ExpectOutcome) -> str:
    word = "holds" if outcome.holds else "fails"
    value = verdict_value(outcome)
    return f"{word}: {value}" if value else word
