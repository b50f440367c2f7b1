"""The verdict on each `expect`, printed behind an experiment's reports."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult, LostExperiment
from mechdsl.show.reports.text import hanging, number_format, with_interval


def print_lost(lost: LostExperiment, console: Console) -> None:
    """That an experiment could not be computed and why, with its expectations, which fail."""
    console.print()
    console.print(Text(f"{lost.name}: not computed", style="bold"), highlight=False)
    for missing in lost.reasons:
        hanging(f"{missing.code}: ", missing.reason, console)
    print_verdicts(lost, console)


def print_verdicts(result: ExperimentResult | LostExperiment, console: Console) -> None:
    """One line per expectation, with its value and interval; a reason below where it has one."""
    if not result.outcomes:
        return
    console.print()
    for outcome in result.outcomes:
        word, style = ("holds", "green") if outcome.holds else ("fails", "bold red")
        text = Text().append(word, style=style).append(f"  expect {outcome.text}")
        value = verdict_value(outcome)
        if value:
            text.append(f"  {value}", style="dim")
        console.print(text, highlight=False)
        if outcome.reason:
            hanging(" " * 7, outcome.reason, console)


def verdict_value(outcome: ExpectOutcome) -> str:
    """The number that decides, with its interval; empty where there is none."""
    if outcome.value is None or isinstance(outcome.value, str):
        return outcome.value or ""
    ends = [math.nan if end is None else end for end in (outcome.low, outcome.high)]
    if not all(map(math.isfinite, ends)):
        top = outcome.text.startswith("top ")
        return f"rank {outcome.value:.4g} by absolute value" if top else f"{outcome.value:.4g}"
    write = number_format([outcome.value, *ends])
    return " ".join(with_interval(write, outcome.value, *ends))
