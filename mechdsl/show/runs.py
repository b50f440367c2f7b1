"""Tables of stored runs: their list, one run, and the differences between two."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.text import count_noun, format_size
from mechdsl.results.differences.cells import CellState
from mechdsl.results.differences.comparison import (
    CellDifference,
    Differences,
    RowChange,
    UnmatchedItem,
    VerdictChange,
)
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
    MISSING,
    interval_texts,
    number_format,
    p_text,
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
    several = len({expectation_change.file for expectation_change in against.changes}) > 1
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
    value = verdict_text(outcome)
    return f"{outcome.word}: {value}" if value else outcome.word


MAX_SECTION_LINES = 20
"""Maximum number of lines of a section; the JSON contains all."""

HASH_PATTERN = re.compile(r"\b[0-9a-f]{64}\b")

HASH_DIGITS = 12

STATE_TEXTS: Mapping[CellState, str] = {
    "equal": "equal bit for bit",
    "rounding": "within rounding",
    "noise": "different within noise",
    "changed": "changed beyond noise",
    "unclear": "different, but with too few prompts or no test",
}


def differences_text(differences: Differences, width: int) -> PrintedText:
    """Return the complete output, `width` columns wide."""
    return capture_text(lambda console: print_differences(differences, console), width)


def print_differences(differences: Differences, console: Console) -> None:
    """Print all differences; unchanged cells are only counted."""
    for word, side in (("old", differences.old), ("new", differences.new)):
        note = f" ({side.note})" if side.note else ""
        console.print(Text(f"{word}  {side.name}{note}"), highlight=False, soft_wrap=True)
    _print_inputs(differences, console)
    _print_verdict_changes(differences.verdicts, console)
    _print_cells(differences, console)
    _print_unmatched("gone", differences.removed, console)
    _print_unmatched("new", differences.added, console)
    _print_counts(differences, console)


def _print_title(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"), highlight=False)


def _print_more(count: int, shown: int, noun: str, console: Console) -> None:
    if count > shown:
        console.print(
            Text(
                f"and {count_noun(count - shown, noun)} more; `--format json` has all", style="dim"
            ),
            highlight=False,
        )


def _print_line(text: str, console: Console, indent: int = 2, hanging: int = 4) -> None:
    """Print a paragraph with a hanging indent."""
    lines = wrap(text, max(20, console.width - indent - hanging)) or [""]
    for number, line in enumerate(lines):
        start = " " * (indent + hanging * bool(number))
        console.print(Text(start + line), highlight=False, soft_wrap=True)


# --- inputs ---------------------------------------------------------------------------------------


def _print_inputs(differences: Differences, console: Console) -> None:
    _print_title("changed inputs", console)
    if not differences.inputs and not differences.rows:
        _print_line("none known", console)
        return
    for change in differences.inputs:
        where = f" of {_name_list(change.experiments)}" if change.experiments else ""
        _print_line(
            f"{change.what}{where}: {_shorten_hashes(change.old)} → {_shorten_hashes(change.new)}",
            console,
        )
    for rows in differences.rows:
        _print_line(f"rows of {rows.experiment}: {_rows_text(rows)}", console)


def _rows_text(rows: RowChange) -> str:
    said = [f"{rows.old:,} → {rows.new:,}, {rows.common or 'none'} of them in both"]
    for word, numbers in (("added", rows.added), ("gone", rows.removed)):
        if numbers:
            said.append(f"{len(numbers):,} {word} ({_name_list(map(str, numbers), 6)})")
    return "; ".join(said)


def _shorten_hashes(text: str | None) -> str:
    """Shorten hashes to a prefix."""
    if text is None:
        return "not there"
    return HASH_PATTERN.sub(lambda match: match[0][:HASH_DIGITS] + "…", text) or "empty"


def _name_list(names: Iterable[str], most: int = 4) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


# --- verdicts -------------------------------------------------------------------------------------


def _print_verdict_changes(verdicts: Sequence[VerdictChange], console: Console) -> None:
    if not verdicts:
        return
    _print_title("expectations", console)
    styles = {"fails now": "bold red", "holds now": "green"}
    for verdict in verdicts:
        text = Text("  ").append(verdict.turn, style=styles.get(verdict.turn, ""))
        text.append(f"  {verdict.experiment}: expect {verdict.text}")
        console.print(text, highlight=False)
        for word, outcome in (("old", verdict.old), ("new", verdict.new)):
            if outcome is not None:
                print_hanging(f"      {word}: ", _outcome_text(outcome), console)


def _outcome_text(outcome: ExpectOutcome) -> str:
    parts = [outcome.word, verdict_text(outcome)]
    said = "  ".join(part for part in parts if part)
    return f"{said}; {outcome.reason}" if outcome.reason else said


# --- cells ----------------------------------------------------------------------------------------


def _print_cells(differences: Differences, console: Console) -> None:
    changed = sorted(differences.changed_cells, key=_sort_weight)
    _print_title(f"changed beyond noise: {count_noun(len(changed), 'cell')}", console)
    for difference in changed[:MAX_SECTION_LINES]:
        _print_cell(difference, console)
    _print_more(len(changed), MAX_SECTION_LINES, "cell", console)
    groups: dict[tuple[str, str, str], list[CellDifference]] = {}
    for cell in differences.cells:
        if cell.state == "unclear":
            key = cell.experiment, _measure_text(cell), cell.reason or ""
            groups.setdefault(key, []).append(cell)
    if groups:
        _print_title("different, but with too few prompts or no test", console)
    for (experiment, measure, reason), cells in groups.items():
        named = f"{count_noun(len(cells), 'cell')} ({_name_list(cell.cell for cell in cells)})"
        _print_line(f"{experiment}: {measure}: {named}; {reason}{_move_text(cells)}", console)


def _measure_text(difference: CellDifference) -> str:
    at = "" if difference.at is None else f" at {difference.at}"
    return f"{difference.effect} of {difference.label}{at}"


def _move_text(cells: Sequence[CellDifference]) -> str:
    """Describe the maximum change of values in several cells."""
    rows = max((cell.rows_changed or 0 for cell in cells), default=0)
    if not rows:
        return ""
    most = max(cell.rows for cell in cells)
    largest = max(cell.largest or 0.0 for cell in cells)
    by = f", by at most {number_format([largest])(largest)}" if largest else ""
    return f"; values changed in up to {rows:,} of {count_noun(most, 'row')}{by}"


def _sort_weight(difference: CellDifference) -> tuple[float, float]:
    """Sort by certainty, then by size, both descending."""
    p = 1.0 if difference.p_corrected is None else difference.p_corrected
    return p, -abs(difference.difference or 0.0)


def _print_cell(difference: CellDifference, console: Console) -> None:
    text = Text(f"  {difference.experiment}: {difference.cell}  ").append(
        _measure_text(difference), style="dim"
    )
    console.print(text, highlight=False)
    _print_line(f"{_effect_text(difference)}; {_value_text(difference)}", console, 6, 0)


def _effect_text(cell_difference: CellDifference) -> str:
    old, new = _number_texts(cell_difference.old, cell_difference.new)
    difference = MISSING
    if cell_difference.difference is not None:
        ends = (
            math.nan if end is None else end for end in (cell_difference.low, cell_difference.high)
        )
        known = [
            v
            for v in (cell_difference.difference, cell_difference.low, cell_difference.high)
            if v is not None
        ]
        difference = " ".join(
            interval_texts(number_format(known), cell_difference.difference, *ends)
        )
    what = (
        "mean effect"
        if cell_difference.kind == "number"
        else "share of the old run's most common category"
    )
    said = f"{what} {old} → {new}, difference {difference}"
    if cell_difference.p_corrected is not None:
        said += f", p corrected {p_text(cell_difference.p_corrected, cell_difference.p_at_most)}"
    return said


def _number_texts(*numbers: float | None) -> list[str]:
    """Format numbers alike, so that they are easy to compare."""
    write = number_format([value for value in numbers if value is not None])
    return [MISSING if value is None else write(value) for value in numbers]


def _value_text(difference: CellDifference) -> str:
    if not difference.paired:
        return f"no row is in both runs ({count_noun(difference.rows, 'row')} in the smaller one)"
    said = f"values changed in {difference.rows_changed:,} of {count_noun(difference.rows, 'row')}"
    if difference.largest:
        said += f", by at most {number_format([difference.largest])(difference.largest)}"
    if difference.rows_beyond != difference.rows_changed:
        said += f" ({difference.rows_beyond:,} by more than rounding)"
    return said


# --- added and missing items, and counts ----------------------------------------------------------


def _print_unmatched(title: str, places: Sequence[UnmatchedItem], console: Console) -> None:
    """Print unmatched items; cells of one experiment are grouped by reason."""
    if not places:
        return
    _print_title(title, console)
    groups: dict[tuple[str, str | None, str | None], list[str]] = {}
    for place in places:
        groups.setdefault((place.experiment, place.measure, place.reason), []).append(
            place.cell or ""
        )
    for number, ((experiment, measure, reason), cells) in enumerate(groups.items()):
        if number == MAX_SECTION_LINES:
            break
        named = [cell for cell in cells if cell]
        said = f"{experiment}: {measure}" if measure else experiment
        if named:
            said += f": {count_noun(len(named), 'cell')} ({_name_list(named)})"
        _print_line(f"{said}; {reason}" if reason else said, console)
    _print_more(len(groups), MAX_SECTION_LINES, "line", console)


def _print_counts(differences: Differences, console: Console) -> None:
    common = any(row.common for row in differences.rows)
    where = "; if rows differ, on those of both runs" if common else ""
    _print_title(f"{count_noun(differences.compared, 'cell')} compared{where}", console)
    counts = Counter(differences.counts)
    for state, words in STATE_TEXTS.items():
        if counts[state]:
            moved = _move_text([cell for cell in differences.cells if cell.state == state])
            _print_line(f"{words}: {counts[state]:,}{moved}", console)
    if counts["none"]:
        _print_line(f"without a number in either run: {counts['none']:,}", console)
    for name, words in differences.conventions.items():
        print_hanging(f"  {name}: ", words, console)
    console.print()
    verdict = "; ".join(differences.reasons) or "nothing changed beyond noise"
    console.print(
        Text(verdict, style="bold red" if differences.changed else "green"), highlight=False
    )
