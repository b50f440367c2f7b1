"""What `mechdsl diff` prints: inputs, verdicts, cells, what is new and gone, counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.plural import plural
from mechdsl.results.changed_inputs import RowChange
from mechdsl.results.changed_verdicts import VerdictChange
from mechdsl.results.experiment_result import ExpectOutcome
from mechdsl.results.found_differences import CellDifference, Differences, Place
from mechdsl.show.reports.text import MISSING, hanging, number_format, p_text
from mechdsl.show.reports.verdicts import verdict_value
from mechdsl.show.terminal import Printed, printed

MOST = 20
"""Lines of one section; all of it is in the JSON."""
HASH = re.compile(r"\b[0-9a-f]{64}\b")
SHOWN_OF_HASH = 12
IN_WORDS = {
    "equal": "equal to the bit",
    "rounding": "within rounding",
    "noise": "differ within noise",
    "changed": "changed beyond noise",
    "unclear": "differ, but nothing can be said",
}


def as_text(found: Differences, width: int) -> Printed:
    """All of it, `width` columns wide."""
    return printed(lambda console: print_differences(found, console), width)


def print_differences(found: Differences, console: Console) -> None:
    """Everything but cells that didn't change; the counts have those."""
    for word, side in (("old", found.old), ("new", found.new)):
        note = f" ({side.note})" if side.note else ""
        console.print(Text(f"{word}  {side.name}{note}"), highlight=False)
    _inputs(found, console)
    _verdicts(found.verdicts, console)
    _cells(found, console)
    _places("gone", found.removed, console)
    _places("new", found.added, console)
    _counts(found, console)


def _title(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"), highlight=False)


def _more(count: int, shown: int, noun: str, console: Console) -> None:
    if count > shown:
        console.print(
            Text(f"and {plural(count - shown, noun)} more; `--format json` has all", style="dim"),
            highlight=False,
        )


# --- inputs ---------------------------------------------------------------------------------------


def _inputs(found: Differences, console: Console) -> None:
    _title("changed inputs", console)
    if not found.inputs and not found.rows:
        console.print("none that is known", highlight=False)
        return
    for each in found.inputs:
        where = f" of {_listed(each.experiments)}" if each.experiments else ""
        said = f"{_short(each.old)} → {_short(each.new)}"
        hanging(f"  {each.what}{where}: ", said, console)
    for rows in found.rows:
        hanging(f"  rows of {rows.experiment}: ", _rows(rows), console)


def _rows(rows: RowChange) -> str:
    said = [f"{rows.old:,} → {rows.new:,}, {rows.common or 'none'} of them in both"]
    for word, numbers in (("added", rows.added), ("gone", rows.removed)):
        if numbers:
            said.append(f"{len(numbers):,} {word} ({_listed(map(str, numbers), 6)})")
    return "; ".join(said)


def _short(text: str | None) -> str:
    """Hashes by their beginning."""
    if text is None:
        return "not there"
    return HASH.sub(lambda found: found[0][:SHOWN_OF_HASH] + "…", text) or "empty"


def _listed(names: Iterable[str], most: int = 4) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


# --- verdicts -------------------------------------------------------------------------------------


def _verdicts(verdicts: Sequence[VerdictChange], console: Console) -> None:
    if not verdicts:
        return
    _title("expectations", console)
    styles = {"fails now": "bold red", "holds now": "green"}
    for each in verdicts:
        text = Text("  ").append(each.turn, style=styles.get(each.turn, ""))
        text.append(f"  {each.experiment}: expect {each.text}")
        console.print(text, highlight=False)
        for word, outcome in (("old", each.old), ("new", each.new)):
            if outcome is not None:
                hanging(f"      {word}: ", _outcome(outcome), console)


def _outcome(outcome: ExpectOutcome) -> str:
    parts = ["holds" if outcome.holds else "fails", verdict_value(outcome)]
    said = "  ".join(part for part in parts if part)
    return f"{said}; {outcome.reason}" if outcome.reason else said


# --- cells ----------------------------------------------------------------------------------------


def _cells(found: Differences, console: Console) -> None:
    changed = sorted(found.changed_cells, key=_weight)
    _title(f"changed beyond noise: {plural(len(changed), 'cell')}", console)
    for each in changed[:MOST]:
        _cell(each, console)
    _more(len(changed), MOST, "cell", console)
    unclear = [each for each in found.cells if each.state == "unclear"]
    if unclear:
        _title(f"nothing can be said of {plural(len(unclear), 'cell')} that differ", console)
        for each in unclear[:MOST]:
            _cell(each, console)
        _more(len(unclear), MOST, "cell", console)


def _weight(each: CellDifference) -> tuple[float, float]:
    """The surest first, of equally sure ones the largest."""
    p = 1.0 if each.p_corrected is None else each.p_corrected
    return p, -abs(each.difference or 0.0)


def _cell(each: CellDifference, console: Console) -> None:
    at = "" if each.at is None else f" at {each.at}"
    text = Text(f"  {each.experiment}: {each.cell}  ")
    text.append(f"{each.effect} of {each.label}{at}", style="dim")
    console.print(text, highlight=False)
    hanging("      ", f"{_effect(each)}; {_values(each)}", console)
    if each.reason:
        hanging("      ", each.reason, console)


def _effect(each: CellDifference) -> str:
    numbers = [each.old, each.new, each.difference, each.low, each.high]
    write = number_format([value for value in numbers if value is not None])
    old, new, difference, low, high = (MISSING if v is None else write(v) for v in numbers)
    what = "mean effect" if each.kind == "number" else "share of the old run's commonest"
    said = f"{what} {old} → {new}, difference {difference}"
    if each.low is not None:
        said += f" [{low}, {high}]"
    if each.p_corrected is not None:
        said += f", p corrected {p_text(each.p_corrected, each.p_at_most)}"
    return said


def _values(each: CellDifference) -> str:
    if not each.paired:
        return f"no row is in both runs ({plural(each.rows, 'row')} in the smaller one)"
    said = f"values changed in {each.rows_changed:,} of {plural(each.rows, 'row')}"
    if each.largest:
        said += f", by at most {number_format([each.largest])(each.largest)}"
    if each.rows_beyond != each.rows_changed:
        said += f" ({each.rows_beyond:,} by more than rounding)"
    return said


# --- what there is more and less of, and counts ---------------------------------------------------


def _places(title: str, places: Sequence[Place], console: Console) -> None:
    """Cells of one experiment together, by the reason."""
    if not places:
        return
    _title(title, console)
    groups: dict[tuple[str, str | None, str | None], list[str]] = {}
    for each in places:
        groups.setdefault((each.experiment, each.measure, each.reason), []).append(each.cell or "")
    for number, ((experiment, measure, reason), cells) in enumerate(groups.items()):
        if number == MOST:
            break
        named = [cell for cell in cells if cell]
        said = f"{experiment}: {measure}" if measure else experiment
        if named:
            said += f": {plural(len(named), 'cell')} ({_listed(named)})"
        hanging("  ", f"{said}; {reason}" if reason else said, console)
    _more(len(groups), MOST, "line", console)


def _counts(found: Differences, console: Console) -> None:
    _title(f"{plural(found.compared, 'cell')} compared", console)
    counts = Counter(found.counts)
    said = [f"{counts[state]:,} {words}" for state, words in IN_WORDS.items() if counts[state]]
    if counts["none"]:
        said.append(f"{counts['none']:,} without a number in either run")
    hanging("  ", "; ".join(said) or "the runs have no cell in common", console)
    for name, words in found.conventions.items():
        hanging(f"  {name}: ", words, console)
    console.print()
    verdict = "; ".join(found.reasons) or "nothing changed beyond noise"
    console.print(Text(verdict, style="bold red" if found.changed else "green"), highlight=False)
