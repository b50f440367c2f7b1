"""`report table [by VAR] [top n]`: every cell with its effect, interval and p.

On a narrow terminal, redundant columns are dropped first, then text wraps; numbers are never
truncated. A table that still doesn't fit is printed as one paragraph per cell.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mechdsl.base.arrays import Floats
from mechdsl.base.text import escape_hidden, escape_xml
from mechdsl.program import spec
from mechdsl.program.spec import SEED_AXIS
from mechdsl.resolve.cells import CellKey, Coord
from mechdsl.results.experiment_result import ActiveText, ExperimentResult
from mechdsl.results.statistics_conventions import sign_ranking_note, statistics_conventions
from mechdsl.results.survival import survival_words
from mechdsl.show.console import visible_console
from mechdsl.show.reports.colours import cell_style, diverging_colour, needs_white_text
from mechdsl.show.reports.grid import hit_tokens_text, listed_tokens_text, sort_key, value_text
from mechdsl.show.reports.text import (
    MISSING,
    equal_rows_note,
    heading_facts,
    inert_note,
    interval_texts,
    mean_texts,
    measure_name,
    null_band_note,
    null_p_texts,
    null_texts,
    number_format,
    p_text,
    print_all_conventions,
    print_missing,
    print_notes,
    print_title,
    rounding_note,
    significance_note,
    verification_notes,
)
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.measurements import MissingReason
from mechdsl.vocab.metrics import EFFECTS

FILE_WIDTH = 120
"""Width of a table in a file, in characters."""

SHOWN_TOKENS = 6
"""Maximum number of distinct tokens of a position in a row; `explain` prints all."""

COLUMN_GAP = 3
"""Characters between two columns."""

SEED_MEANS_TITLE = "means over seeds"
"""Title of a table of means over trainings."""

EXACT_CELLS_TITLE = "verified cells"
"""Title of a table of cells that `verify` has run."""

SINGLE_ROW_COLUMNS = ("tokens hit", "n", "effective n")
"""Columns that are also moved above a single row if there is little room."""

MAX_RELATIVE_END = 10
"""An interval's end beyond this multiple of the largest effect doesn't affect number formats."""

NumberType = TypeVar("NumberType", np.float64, np.int64)


@dataclass(frozen=True)
class Column:
    """One column as text. Without room, the column with the highest `spare` is dropped first."""

    title: str
    cells: list[str]
    numeric: bool = False
    spare: int = 0
    wraps: bool = False
    describes: bool = False
    """Whether it identifies the cell; if equal in all rows, it can be moved above them."""

    @property
    def least(self) -> int:
        """The minimum width."""
        if not self.wraps:
            return max(len(text) for text in (*self.title.split("\n"), *self.cells))
        words = [word for text in self.cells for word in text.split()]
        return min(24, max(len(word) for word in [self.title, *words]))

    @property
    def width(self) -> int:
        return max([len(self.title), *(len(text) for text in self.cells)])


@dataclass(frozen=True)
class PromptExcerpt:
    """Part of a prompt, around the token with the highest activation."""

    highest: float
    pieces: tuple[tuple[str, float | None], ...]
    """Texts and activations of its tokens."""
    place: int
    """Index of the token with the highest activation."""


@dataclass(frozen=True)
class ActiveFeature:
    """A feature with the prompts on which it is most active."""

    title: str
    prompts: Sequence[PromptExcerpt]

    @property
    def limit(self) -> float:
        """The highest activation."""
        return max((each.highest for each in self.prompts), default=0.0)


@dataclass(frozen=True)
class MeasureTable:
    """The table of one measure."""

    title: str
    facts: str = ""
    missing: MissingReason | None = None
    """Why the measure has no table."""
    columns: Sequence[Column] = ()
    notes: Sequence[str] = ()
    seed_means: Sequence[Column] = ()
    """Means over trainings with several seeds; empty without such means."""
    exact: Sequence[Column] = ()
    """Cells that `verify` has run, the largest exact effects first; empty without such cells."""
    exact_notes: Sequence[str] = ()


@dataclass(frozen=True)
class TableFrame:
    """The contents of a table report, which the terminal, files and notebooks draw."""

    name: str
    """The experiment."""
    measures: Sequence[MeasureTable]
    active: Sequence[ActiveFeature]
    conventions: Mapping[str, str]


def table_frame(result: ExperimentResult, report: spec.Report) -> TableFrame:
    """Choose the rows and columns of a report, and format their numbers."""
    shown = _apply_grouping(result, report)
    first = next((number for number, _ in shown.computed()), None)
    order = [] if first is None else _order(shown, first, report)
    return TableFrame(
        result.name,
        [_measure_table(result, shown, n, report, order) for n in range(len(shown.measures))],
        list(_by_feature(shown, order)) if shown.active else [],
        shown.conventions,
    )


def _measure_table(
    result: ExperimentResult,
    shown: ExperimentResult,
    measure: int,
    report: spec.Report,
    first: Sequence[int],
) -> MeasureTable:
    """Return the table of a measure.

    Args:
        shown: The result in groups.
        first: The cells of the first measure's table, in order.
    """
    data = result.measures[measure]
    if data.missing is not None:
        return MeasureTable(measure_name(data), missing=data.missing)
    order = _order(shown, measure, report)
    return MeasureTable(
        measure_name(data),
        heading_facts(result, data),
        columns=_columns(shown, measure, order),
        notes=_notes(shown, measure, order, report),
        seed_means=_seed_mean_columns(shown, measure, first),
        exact=_exact_cell_columns(shown, measure),
        exact_notes=verification_notes(shown, measure),
    )


def render(result: ExperimentResult, report: spec.Report, console: Console) -> None:
    """Print one table per measure, and the conventions below the last."""
    frame = table_frame(result, report)
    for each in frame.measures:
        if each.missing is not None:
            print_missing(f"{frame.name}: {each.title}", [each.missing], console)
            continue
        print_title(frame.name, each.title, each.facts, console)
        _print(each.columns, console)
        print_notes(each.notes, console)
        if each.seed_means:
            print_notes(["", SEED_MEANS_TITLE], console)
            _print(each.seed_means, console)
        if each.exact:
            print_notes(["", EXACT_CELLS_TITLE], console)
            _print(each.exact, console)
            print_notes(each.exact_notes, console)
    _print_active_prompts(frame.active, console)
    print_all_conventions(frame.conventions, console)


def _apply_grouping(result: ExperimentResult, report: spec.Report) -> ExperimentResult:
    """Group the result by the values that the report names."""
    return group_by_value(result, report.by) if report.by in result.row_values else result


def _seed_mean_columns(shown: ExperimentResult, measure: int, order: Sequence[int]) -> list[Column]:
    """Return the columns of the means over trainings with several seeds; none without such means.

    Args:
        order: The displayed cells.
    """
    keys = [_without_seed(shown.cells[i]) for i in order]
    own = [each for each in shown.seed_means if each.measure == measure]
    own = [each for each in own if _without_seed(each.cell) in keys]
    if not own:
        return []
    own.sort(key=lambda each: keys.index(_without_seed(each.cell)))
    columns = [
        Column(axis, [value_text(each.cell.coords[axis]) for each in own], describes=True)
        for axis in own[0].cell.coords
        if axis != "position"
    ]
    if any(each.cell.site for each in own):
        sites = [each.cell.site for each in own]
        columns.append(Column("site", sites, wraps=True, describes=True))
    positions = [value_text(e.cell.coords.get("position", e.cell.position) or "") for e in own]
    if any(positions):
        columns.append(Column("position", positions, wraps=True, describes=True))
    ends = [np.array([[each.low, each.row_low], [each.high, each.row_high]]) for each in own]
    means = np.array([each.mean for each in own])
    write = number_format(_comparable_numbers(means, [end.ravel() for end in ends]))
    over_seeds = [interval_texts(write, each.mean, each.low, each.high)[1] for each in own]
    by_row = [interval_texts(write, each.mean, each.row_low, each.row_high) for each in own]
    confidence = shown.settings.confidence if shown.settings else 95.0
    if any(np.isfinite(each.low) for each in own):
        between = Column(f"{confidence:g} % over seeds", over_seeds, True)
    else:
        between = Column("by seed", [", ".join(map(write, each.values)) for each in own], True)
    return [
        *columns,
        Column("seeds", [str(each.seeds) for each in own], True),
        Column("mean", [mean for mean, _ in by_row], True),
        between,
        Column(f"{confidence:g} % over prompts", [interval for _, interval in by_row], True),
    ]


def _without_seed(cell: CellKey) -> tuple[tuple[str, Coord], ...]:
    """Return the coordinates of a cell without that of its training."""
    return tuple((axis, value) for axis, value in cell.coords.items() if axis != SEED_AXIS)


def save(result: ExperimentResult, report: spec.Report, path: Path) -> None:
    """Write plain text, a picture of it, or all rows as CSV."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        path.write_text(_apply_grouping(result, report).to_csv(), encoding="utf-8")
        return
    text = io.StringIO()
    render(result, report, visible_console(file=text, width=FILE_WIDTH, plain=True))
    if suffix in (".svg", ".png", ".pdf"):
        from mechdsl.show.reports.charts import save_text_picture

        save_text_picture(text.getvalue(), path, report.width)
    else:
        path.write_text(text.getvalue(), encoding="utf-8")


def group_by_value(result: ExperimentResult, by: str | None) -> ExperimentResult:
    """Repeat every cell for each value of the prompts: a further axis, corrected as a whole."""
    if by is None or result.settings is None:
        return result
    labels = np.array([str(value) for value in result.row_values[by]])
    # A list of texts is named by its text: the value of an axis must be a text or a number.
    named = {
        str(value): str(value) if isinstance(value, list) else value
        for value in result.row_values[by]
    }
    values = sorted(named.values(), key=sort_key)
    masks = [labels == str(value) for value in values]

    def rows(data: Floats) -> Floats:
        # Prompts of other values aren't part of the cell: NaN excludes them everywhere.
        return np.concatenate([np.where(mask, data, np.nan) for mask in masks])

    measures = tuple(
        replace(
            data,
            patched=rows(data.patched),
            base=_repeat_rows(data.base, len(values)),
            source=None if data.source is None else _repeat_rows(data.source, len(values)),
            truth=None if data.truth is None else _repeat_rows(data.truth, len(values)),
            inert=np.tile(data.inert, len(values)),
            same=None if data.same is None else np.tile(data.same, len(values)),
            rounding=None if data.rounding is None else _repeat_rows(data.rounding, len(values)),
            gaps=data.gaps * len(values),
            seen=None if data.seen is None else _repeat_rows(data.seen, len(values)),
        )
        for data in result.measures
    )
    cells = tuple(
        replace(cell, coords={by: value, **cell.coords})
        for value in values
        for cell in result.cells
    )
    statistics = compute_cell_statistics(
        measures,
        result.settings,
        result.seed,
        result.groups,
        effects=EFFECTS,
        ids=result.sampling.keys,
        strata=result.strata,
    )
    expanded = replace(
        result,
        axes=(by, *result.axes),
        cells=cells,
        measures=measures,
        statistics=tuple(statistics),
        controls=(),  # draws are for whole cells
        seed_means=(),  # and so are these
        verified=(),
        hits=(),
        active=result.active * len(values),
    )
    said = {**result.conventions, **statistics_conventions(expanded, EFFECTS)}
    return replace(expanded, conventions=said)


def _repeat_rows(data: NDArray[NumberType], times: int) -> NDArray[NumberType]:
    return data if data.shape[0] == 1 else np.tile(data, (times, 1))


# --- which rows and columns ---------------------------------------------------------------------


def _order(result: ExperimentResult, measure: int, report: spec.Report) -> list[int]:
    statistic = result.statistics[measure]
    order = list(range(len(result.cells)))
    axis = result.aliases.get(report.by, report.by) if report.by else None
    if axis in result.axes:
        order.sort(key=lambda i: sort_key(result.cells[i].coords[axis or ""]))
    if report.top is None:
        return order
    size = (
        statistic.share if result.measures[measure].kind == "category" else np.abs(statistic.mean)
    )
    return sorted(order, key=lambda i: -np.nan_to_num(size[i], nan=-1.0))[: report.top]


def _exact_cell_columns(result: ExperimentResult, measure: int) -> list[Column]:
    """Return the columns of the cells that `verify` has run, the largest exact effects first; none
    without such cells."""
    verified = result.verification(measure)
    if verified is None:
        return []
    order = verified.by_size.tolist()
    estimates = result.statistics[measure].mean[order]
    write = number_format(estimates.tolist())
    texts = [interval_texts(write, each, np.nan, np.nan)[0] for each in estimates.tolist()]
    return [
        *_cell_columns(result, order),
        Column("estimate", texts, True),
        *_exact_columns(result, measure, order, intervals=True),
    ]


def _direction(result: ExperimentResult, cell: CellKey) -> str:
    """Return the runs of a cell: of several sources, the one that the cell names."""
    source = cell.coords.get("source")
    if source is None or str(source) not in (result.source or "").split(", "):
        return result.direction
    return f"{result.shown(str(source))} → {result.shown(result.base)}"


def _columns(result: ExperimentResult, measure: int, order: Sequence[int]) -> list[Column]:
    columns = _cell_columns(result, order)
    cells = [result.cells[i] for i in order]
    if result.source:
        columns.append(Column("direction", [_direction(result, cell) for cell in cells], spare=4))
    statistic = result.statistics[measure]
    columns.append(Column("n", [str(int(statistic.n[i])) for i in order], True, describes=True))
    if any(statistic.units[i] not in (0, statistic.n[i]) for i in order):
        texts = [str(int(statistic.units[i])) for i in order]
        columns.append(Column("effective n", texts, True, describes=True))
    if result.measures[measure].kind == "category":
        columns += _category_columns(result, measure, order)
    else:
        columns += _number_columns(result, measure, order)
    if any(cell.listed for cell in cells):
        texts = [listed_tokens_text(cell) for cell in cells]
        columns.append(Column("top tokens", texts, wraps=True))
    return columns


def _cell_columns(result: ExperimentResult, order: Sequence[int]) -> list[Column]:
    """Return the columns that identify cells."""
    cells = [result.cells[i] for i in order]
    columns: list[Column] = []
    for axis in result.axes:
        if axis == "position":
            continue
        texts = [value_text(cell.coords[axis]) for cell in cells]
        numeric = not any(isinstance(cell.coords[axis], str) for cell in cells)
        spare = 3 if _in_sites(result, axis) else 0
        columns.append(Column(axis, texts, numeric, spare, describes=True))
        if axis == "feature" and any(cell.label for cell in cells):
            labels = [escape_hidden(cell.label) for cell in cells]
            columns.append(Column("label", labels, wraps=True, describes=True))
    if any(cell.site for cell in cells):
        columns.append(Column("site", [cell.site for cell in cells], wraps=True, describes=True))
    positions = [value_text(cell.coords.get("position", cell.position) or "") for cell in cells]
    if any(positions):
        columns.append(Column("position", positions, wraps=True, describes=True))
    if any(cell.tokens for cell in cells):
        tokens = [hit_tokens_text(cell, SHOWN_TOKENS) for cell in cells]
        spare = 0 if any(cell.read for cell in cells) else 2
        columns.append(Column("tokens hit", tokens, spare=spare, wraps=True, describes=True))
    return columns


def _in_sites(result: ExperimentResult, axis: str) -> bool:
    """Whether the names of sites contain the values of an axis."""
    if axis.removeprefix("to_") not in ("layer", "head", "neuron"):
        return False
    named = "→" if axis.startswith("to_") else ""
    sites = {cell.site for cell in result.cells}
    pairs = {(cell.site, cell.coords[axis]) for cell in result.cells}
    return len(pairs) == len(sites) and all(site and named in site for site in sites)


def _number_columns(result: ExperimentResult, measure: int, order: Sequence[int]) -> list[Column]:
    statistic, band = result.statistics[measure], result.control(measure)
    ends = [statistic.low, statistic.high, *([band.low, band.high] if band else [])]
    write = number_format(_comparable_numbers(statistic.mean[order], [end[order] for end in ends]))
    confidence = result.settings.confidence if result.settings else 95.0
    shown = mean_texts(result, measure, order, write)
    columns = [
        Column(result.measures[measure].called, [mean for mean, _ in shown], True),
        Column(f"{confidence:g} % interval", [interval for _, interval in shown], True),
    ]
    columns += _exact_columns(result, measure, order, intervals=False)
    columns += [
        Column(
            name, [write(value) if np.isfinite(value) else MISSING for value in each[order]], True
        )
        for name, each in statistic.further.items()
    ]
    if band is not None:
        columns.append(Column(band.title, null_texts(band, statistic, order, write), True))
        if band.title == "null" and np.isfinite(band.p[order]).any():
            columns.append(Column("p null", null_p_texts(band, order), True))
    if statistic.test is None:
        return columns
    correction = result.settings.correction if result.settings else "none"
    words = survival_words(result, measure)
    verdicts = [words[i] or MISSING for i in order]

    def texts(p: Floats) -> list[str]:
        # The max-statistic has separate flips, whose minimum seldom matches that of single cells.
        most = statistic.floor & (p <= statistic.p) if correction == "max" else statistic.floor
        return [p_text(p[i], bool(most[i])) for i in order]

    return [
        *columns,
        Column("p", texts(statistic.p), True, spare=1),
        Column("corrected", texts(statistic.p_corrected), True),
        Column("survives", verdicts),
    ]


def _exact_columns(
    result: ExperimentResult, measure: int, order: Sequence[int], *, intervals: bool
) -> list[Column]:
    """Return the columns of exact effects, with `verify`; without intervals if they are in a
    separate table."""
    verified = result.verification(measure)
    if verified is None:
        return []
    exact_effects = [verified.of_cell(cell) for cell in order]
    known = [exact_effect for exact_effect in exact_effects if exact_effect is not None]
    ends = [np.array([[exact_effect.low, exact_effect.high] for exact_effect in known]).ravel()]
    write = number_format(
        _comparable_numbers(np.array([exact_effect.mean for exact_effect in known]), ends)
    )
    none = (MISSING, MISSING)
    texts = [
        none
        if exact_effect is None
        else interval_texts(write, exact_effect.mean, exact_effect.low, exact_effect.high)
        for exact_effect in exact_effects
    ]
    columns = [Column("exact", [mean for mean, _ in texts], True)]
    if intervals:
        columns.append(Column("exact interval", [interval for _, interval in texts], True))
    choices = [
        "" if exact_effect is None else exact_effect.choice for exact_effect in exact_effects
    ]
    return [*columns, Column("verified", choices, spare=1)]


def _comparable_numbers(means: Floats, ends: Sequence[Floats]) -> list[float]:
    """Return the numbers that determine decimal places. An interval's end far beyond all effects,
    as with few units of a skewed delta, is ignored."""
    finite = np.abs(means[np.isfinite(means)])
    far = MAX_RELATIVE_END * float(finite.max(initial=0.0)) or np.inf
    return [*means.tolist(), *(v for end in ends for v in np.clip(end, -far, far).tolist())]


def _category_columns(result: ExperimentResult, measure: int, order: Sequence[int]) -> list[Column]:
    statistic = result.statistics[measure]
    share, error = number_format(statistic.share[order]), number_format(statistic.mean_error[order])
    commonest = [f"{statistic.commonest[i]:g}" if statistic.n[i] else MISSING for i in order]
    columns = [
        Column("commonest", commonest, True),
        Column("share", [share(statistic.share[i]) for i in order], True),
    ]
    if np.isfinite(statistic.mean_error[order]).any():
        columns.append(
            Column("distance to answer", [error(statistic.mean_error[i]) for i in order], True)
        )
    return columns


def _notes(
    result: ExperimentResult, measure: int, order: Sequence[int], report: spec.Report
) -> list[str]:
    said: list[str] = []
    if len(order) < len(result.cells):
        size = "share" if result.measures[measure].kind == "category" else "absolute value"
        said.append(f"the {len(order)} largest of {len(result.cells)} cells by {size}")
        picked = size != "share" and report.by not in result.row_values  # `top n of` can select
        other = sign_ranking_note(result, measure, len(order)) if picked else None
        said += [other] if other else []
        said += [_selection_note(result, measure)] if size != "share" else []
    null = null_band_note(result, measure)
    remarks = (
        significance_note(result, measure),
        null,
        inert_note(result, measure),
        rounding_note(result, measure),
        equal_rows_note(result, measure),
    )
    for line in remarks:
        if line:
            said.append(line)
    if result.measures[measure].kind == "number":
        statistic = result.statistics[measure]
        reasons = {
            reason
            for i in order
            if (reason := statistic.reasons[i])
            and not np.isfinite([statistic.mean[i], statistic.low[i]]).all()
        }
        said += [f"{MISSING} where {reason}" for reason in sorted(reasons)]
    return said


def _selection_note(result: ExperimentResult, measure: int) -> str:
    """Describe the validity of the numbers of cells that were selected by these numbers."""
    if result.statistics[measure].test is None:
        return "cells were selected by effect size; the intervals don't account for that"
    familywise = result.settings is not None and result.settings.correction not in ("none", "bh")
    only = (
        "only the corrected p-values account"
        if familywise
        else "intervals and p-values don't account"
    )
    return f"cells were selected by effect size; {only} for that"


# --- printing -----------------------------------------------------------------------------------


def _fits(columns: Sequence[Column], width: int) -> bool:
    return sum(column.least + COLUMN_GAP for column in columns) - COLUMN_GAP <= width


def _print(columns: Sequence[Column], console: Console) -> None:
    kept = list(columns)
    for spare in (4, 3):
        if not _has_room(kept, console.width):
            kept = [column for column in kept if column.spare != spare]
    if not _has_room(kept, console.width):
        many = len(kept[0].cells) > 1
        same = [column for column in kept if column.describes and len(set(column.cells)) == 1]
        same = same if many else [column for column in same if column.title in SINGLE_ROW_COLUMNS]
        kept = [column for column in kept if column not in same]
        said = "; ".join(f"{column.title} {column.cells[0]}" for column in same)
        print_notes([f"in every row: {said}" if many else said] if same else [], console)
    full = kept
    for spare in (2, 1):
        if not _fits(kept, console.width):
            kept = [column for column in kept if column.spare != spare]
    if not _fits(kept, console.width):
        _paragraphs(full, console)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for column, width in zip(kept, _widths(kept, console.width), strict=True):
        table.add_column(
            column.title,
            justify="right" if column.numeric else "left",
            no_wrap=not column.wraps,
            width=width,
            overflow="fold",
        )
    dim = next((column.cells for column in kept if column.title == "survives"), None)
    for index, texts in enumerate(zip(*(column.cells for column in kept), strict=True)):
        style = "" if dim is None or dim[index] == "yes" else "dim"
        table.add_row(*(Text(text) for text in texts), style=style)
    console.print(table)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Return the width of every column; columns that wrap share the remaining width.

    Widths are fixed, because shrinking the last column could cut its characters.
    """
    widths = [column.least for column in columns]
    left = width - sum(widths) - COLUMN_GAP * (len(columns) - 1)
    while left > 0:
        short = [i for i, column in enumerate(columns) if widths[i] < column.width]
        if not short:
            break
        for index in short[:left]:
            widths[index] += 1
        left -= len(short[:left])
    return widths


def _has_room(columns: Sequence[Column], width: int) -> bool:
    """Whether no column must wrap."""
    return sum(column.width + COLUMN_GAP for column in columns) - COLUMN_GAP <= width


def _paragraphs(columns: Sequence[Column], console: Console) -> None:
    """Print `title text` pairs, one paragraph per cell, for very narrow terminals."""
    for index in range(len(columns[0].cells)):
        pairs = [f"{column.title} {column.cells[index]}" for column in columns]
        lines, line = list[str](), ""
        for pair in pairs:
            joined = f"{line}  {pair}" if line else pair
            if line and len(joined) > console.width - 2:
                lines.append(line)
                joined = pair
            line = joined
        for number, text in enumerate([*lines, line]):
            console.print(Text(text if number == 0 else f"  {text}"), highlight=False)


# --- most active prompts --------------------------------------------------------------------------


SHOWN_FEATURES = 20
"""Maximum number of features whose prompts are displayed."""

SHOWN_PROMPTS = 3
"""Maximum number of displayed prompts of a feature; JSON has all that are stored."""

SHOWN_BEFORE, SHOWN_AFTER = 24, 8
"""Maximum number of displayed tokens before and after the one with the highest activation."""

CHARACTERS_BEFORE, CHARACTERS_AFTER = 160, 60
"""Maximum length of these tokens together; names of image tokens are long."""


def _excerpt(prompt: ActiveText) -> PromptExcerpt:
    values = [float("-inf") if value is None else value for value in prompt.values]
    highest = max(values)
    place = values.index(highest)
    before = _count_shown(prompt.tokens[:place][::-1], SHOWN_BEFORE, CHARACTERS_BEFORE)
    after = _count_shown(prompt.tokens[place + 1 :], SHOWN_AFTER, CHARACTERS_AFTER)
    begin, end = place - before, place + after + 1
    pieces = list(zip(prompt.tokens[begin:end], prompt.values[begin:end], strict=True))
    if begin:
        pieces[0] = (f"… {pieces[0][0].lstrip()}", pieces[0][1])
    if end < len(values):
        pieces[-1] = (f"{pieces[-1][0].rstrip()} …", pieces[-1][1])
    return PromptExcerpt(highest, tuple(pieces), place - begin)


def _count_shown(tokens: Sequence[str], most: int, characters: int) -> int:
    """Return how many of the first tokens are displayed."""
    lengths = accumulate(map(len, tokens[:most]))
    return sum(length <= characters for length in lengths)


def _by_feature(result: ExperimentResult, order: Sequence[int]) -> Iterator[ActiveFeature]:
    """Yield each feature in the order of the table, with its prompts."""
    done: set[str] = set()
    for cell in order:
        key = result.cells[cell]
        name = f"feature {key.coords['feature']}"
        if name not in done and len(done) < SHOWN_FEATURES:
            done.add(name)
            title = f"{name} · {escape_hidden(key.label)}" if key.label else name
            prompts = [_excerpt(active_text) for active_text in result.active[cell][:SHOWN_PROMPTS]]
            yield ActiveFeature(title, prompts)


def _print_active_prompts(features: Sequence[ActiveFeature], console: Console) -> None:
    """Print the prompts of features; brackets mark the highest activation."""
    highest = [each.highest for feature in features for each in feature.prompts]
    if not highest:
        return
    console.print(Text("\nmost active prompts", style="bold"), highlight=False)
    write = number_format(highest)
    for feature in features:
        console.print(Text(feature.title), highlight=False)
        for each in feature.prompts:
            line = Text(f"  {write(each.highest)}  ")
            for place, (token, value) in enumerate(each.pieces):
                text, space = _split_space(token)
                marked = f"[{text}]" if place == each.place else text
                colour = None if not value else diverging_colour(value, feature.limit)
                line.append(space).append(marked, cell_style(colour))
            console.print(line, highlight=False, soft_wrap=False)


def _split_space(token: str) -> tuple[str, str]:
    """Return a token's text without hidden characters, and the white space before it."""
    text = token.lstrip()
    return escape_hidden(text) or "␣", " " if len(text) < len(token) else ""


def active_prompts_html(features: Sequence[ActiveFeature]) -> str:
    """Return the prompts of features as HTML; every text is escaped."""
    rows: list[str] = []
    for feature in features:
        for each in feature.prompts:
            pieces = "".join(
                _piece_html(token, value, feature.limit) for token, value in each.pieces
            )
            rows.append(
                f'<tr><td style="text-align:left">{escape_xml(feature.title)}</td>'
                f'<td style="text-align:right">{each.highest:.3g}</td>'
                f'<td style="text-align:left">{pieces}</td></tr>'
            )
    if not rows:
        return ""
    return f"<p><b>most active prompts</b></p><table><tbody>{''.join(rows)}</tbody></table>"


def _piece_html(token: str, value: float | None, limit: float) -> str:
    text, space = _split_space(token)
    colour = None if not value else diverging_colour(value, limit)
    if colour is None:
        return f"{space}{escape_xml(text)}"
    ink = "#fff" if needs_white_text(colour) else "#000"
    style = f"background:rgb({','.join(map(str, colour))});color:{ink}"
    return f'{space}<span style="{style}" title="{value:.3g}">{escape_xml(text)}</span>'
