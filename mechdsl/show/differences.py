"""What `mechdsl diff` prints: inputs, verdicts, cells, what is new and gone, counts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from mechdsl.base.plural import plural
from mechdsl.results.changed_inputs import RowChange
from mechdsl.results.changed_verdicts import VerdictChange
from mechdsl.results.compared_cells import State
from mechdsl.results.experiment_result import ExpectOutcome
from mechdsl.results.found_differences import CellDifference, Differences, Place
from mechdsl.show.reports.text import MISSING, hanging, number_format, p_text, with_interval
from mechdsl.show.reports.verdicts import verdict_value
from mechdsl.show.terminal import Printed, printed

MOST = 20
"""Lines of one section; all of it is in the JSON."""
HASH = re.compile(r"\b[0-9a-f]{64}\b")
SHOWN_OF_HASH = 12
IN_WORDS: Mapping[State, str] = {
    "equal": "equal to the bit",
    "rounding": "within rounding",
    "noise": "different within noise",
    "changed": "changed beyond noise",
    "unclear": "different, but too little to say more",
}


def as_text(found: Differences, width: int) -> Printed:
    """All of it, `width` columns wide."""
    return printed(lambda console: print_differences(found, console), width)


def print_differences(found: Differences, console: Console) -> None:
    """Everything but cells that didn't change; the counts have those."""
    for word, side in (("old", found.old), ("new", found.new)):
        note = f" ({side.note})" if side.note else ""
        console.print(Text(f"{word}  {side.name}{note}"), highlight=False, soft_wrap=True)
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


def _line(text: str, console: Console, indent: int = 2, hanging: int = 4) -> None:
    """One paragraph, its further lines further in."""
    lines = wrap(text, max(20, console.width - indent - hanging)) or [""]
    for number, line in enumerate(lines):
        start = " " * (indent + hanging * bool(number))
        console.print(Text(start + line), highlight=False, soft_wrap=True)


# --- inputs ---------------------------------------------------------------------------------------


def _inputs(found: Differences, console: Console) -> None:
    _title("changed inputs", console)
    if not found.inputs and not found.rows:
        _line("none that is known", console)
        return
    for each in found.inputs:
        where = f" of {_listed(each.experiments)}" if each.experiments else ""
        _line(f"{each.what}{where}: {_short(each.old)} → {_short(each.new)}", console)
    for rows in found.rows:
        _line(f"rows of {rows.experiment}: {_rows(rows)}", console)


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
    groups: dict[tuple[str, str, str], list[CellDifference]] = {}
    for each in found.cells:
        if each.state == "unclear":
            key = each.experiment, _measure(each), each.reason or ""
            groups.setdefault(key, []).append(each)
    if groups:
        _title("different, but too little to say more", console)
    for (experiment, measure, reason), cells in groups.items():
        named = f"{plural(len(cells), 'cell')} ({_listed(each.cell for each in cells)})"
        _line(f"{experiment}: {measure}: {named}; {reason}{_moved(cells)}", console)


def _measure(each: CellDifference) -> str:
    at = "" if each.at is None else f" at {each.at}"
    return f"{each.effect} of {each.label}{at}"


def _moved(cells: Sequence[CellDifference]) -> str:
    """How far values of several cells moved, at most."""
    rows = max((each.rows_changed or 0 for each in cells), default=0)
    if not rows:
        return ""
    most = max(each.rows for each in cells)
    largest = max(each.largest or 0.0 for each in cells)
    by = f", by at most {number_format([largest])(largest)}" if largest else ""
    return f"; values changed in up to {rows:,} of {plural(most, 'row')}{by}"


def _weight(each: CellDifference) -> tuple[float, float]:
    """The surest first, of equally sure ones the largest."""
    p = 1.0 if each.p_corrected is None else each.p_corrected
    return p, -abs(each.difference or 0.0)


def _cell(each: CellDifference, console: Console) -> None:
    text = Text(f"  {each.experiment}: {each.cell}  ").append(_measure(each), style="dim")
    console.print(text, highlight=False)
    _line(f"{_effect(each)}; {_values(each)}", console, 6, 0)


def _effect(each: CellDifference) -> str:
    old, new = _written(each.old, each.new)
    difference = MISSING
    if each.difference is not None:
        ends = (math.nan if end is None else end for end in (each.low, each.high))
        known = [v for v in (each.difference, each.low, each.high) if v is not None]
        difference = " ".join(with_interval(number_format(known), each.difference, *ends))
    what = "mean effect" if each.kind == "number" else "share of the old run's commonest"
    said = f"{what} {old} → {new}, difference {difference}"
    if each.p_corrected is not None:
        said += f", p corrected {p_text(each.p_corrected, each.p_at_most)}"
    return said


def _written(*numbers: float | None) -> list[str]:
    """Alike, so that they can be compared by eye."""
    write = number_format([value for value in numbers if value is not None])
    return [MISSING if value is None else write(value) for value in numbers]


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
        _line(f"{said}; {reason}" if reason else said, console)
    _more(len(groups), MOST, "line", console)


def _counts(found: Differences, console: Console) -> None:
    common = any(each.common for each in found.rows)
    where = ", where rows differ on those of both runs" if common else ""
    _title(f"{plural(found.compared, 'cell')} compared{where}", console)
    counts = Counter(found.counts)
    for state, words in IN_WORDS.items():
        if counts[state]:
            moved = _moved([each for each in found.cells if each.state == state])
            _line(f"{words}: {counts[state]:,}{moved}", console)
    if counts["none"]:
        _line(f"without a number in either run: {counts['none']:,}", console)
    for name, words in found.conventions.items():
        hanging(f"  {name}: ", words, console)
    console.print()
    verdict = "; ".join(found.reasons) or "nothing changed beyond noise"
    console.print(Text(verdict, style="bold red" if found.changed else "green"), highlight=False)
