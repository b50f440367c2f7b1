"""Cells arranged along axes, counts of categories, and titles of axes, for reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from textwrap import shorten

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.text import escape_hidden, mixes_counts_and_shares, shown_token
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey, Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.text import (
    MISSING,
    has_fewer_prompts,
    is_thin,
    map_format,
    map_texts,
    mean_texts,
    null_p_texts,
    null_texts,
    number_format,
    significance_marks,
)
from mechdsl.statistics.measurements import MeasureData
from mechdsl.vocab.metrics import EFFECTS
from mechdsl.vocab.reports import REPORTS, short_names

DEPTH_PATTERN = re.compile(r"[0-9.]+%")


QUERY_AXIS = "from_position"
"""Axis of the queries of attention, if the keys vary too."""


@dataclass(frozen=True)
class GridPanel:
    """The cells that share all coordinates except those along the drawn axes."""

    title: str
    """The shared coordinates; empty if there are none."""
    cells: dict[tuple[Coord, ...], int]
    """Coordinates along the drawn axes → index of the cell."""


def axis_name(result: ExperimentResult, word: str) -> str:
    """Return the axis that a report's word refers to (`item` may mean `position`)."""
    return word if word in result.axes else result.aliases.get(word, word)


def axis_title(result: ExperimentResult, word: str) -> str:
    """Return an axis's title in a figure: `layer (centre)` if its values are centres of windows."""
    return f"{word} (centre)" if axis_name(result, word) in result.centres else word


def axis_values(result: ExperimentResult, axis: str) -> list[Coord]:
    """Return the values of an axis: numbers sorted by size, words in source order."""
    seen = dict.fromkeys(cell.coords[axis] for cell in result.cells)
    values = list(seen)
    return sorted(values, key=numeric_value) if is_numeric(values) else values


def is_numeric(values: Sequence[Coord]) -> bool:
    """Whether the values are numbers on one scale, or relative depths such as `33.3%`."""
    return not mixes_counts_and_shares(values) and not any(
        isinstance(value, str) and not DEPTH_PATTERN.fullmatch(value) for value in values
    )


def numeric_value(value: Coord) -> float:
    """Return the coordinate of a value on a numeric axis."""
    return float(value.rstrip("%")) if isinstance(value, str) else value


def grid_panels(
    result: ExperimentResult, drawn: Sequence[str], names: Mapping[Coord, str] | None = None
) -> list[GridPanel]:
    """Return one panel per combination of the other axes' values; `names` are those of positions,
    if they differ from the values."""
    others = [axis for axis in result.axes if axis not in drawn]

    def text(axis: str, value: Coord) -> str:
        return names[value] if names and axis == "position" else coordinate_text(axis, value)

    panels: dict[tuple[Coord, ...], GridPanel] = {}
    for index, cell in enumerate(result.cells):
        key = tuple(cell.coords[axis] for axis in others)
        if key not in panels:
            panels[key] = GridPanel(", ".join(map(text, others, key)), {})
        panels[key].cells[tuple(cell.coords[axis] for axis in drawn)] = index
    return list(panels.values())


def coordinate_text(axis: str, value: Coord) -> str:
    """Format a coordinate: `head 3`; a position without its axis, and the query of attention as
    `from 3`."""
    if axis == "position":
        return value_text(value)
    return f"{'from' if axis == QUERY_AXIS else axis} {value_text(value)}"


def value_text(value: Coord) -> str:
    """Format a value of an axis, which may be text from a prompt."""
    return escape_hidden(str(value))


def hit_tokens_text(cell: CellKey, most: int) -> str:
    """Return the most frequent tokens that a cell hits: of attention, the queries, an arrow and the
    keys; of others, after an arrow those of the source run, if its tokens at the same positions
    differ."""
    ends = [cell.tokens]
    if cell.queries:
        ends = [cell.queries, cell.tokens]
    elif cell.keys:
        ends = [cell.tokens, cell.keys]
    hit = " → ".join(_token_list(tokens, most) or NO_TEXT for tokens in ends)
    return f"{hit} ← {_token_list(cell.read, most)}" if cell.read else hit


NO_TEXT = "∅"
"""Stands for tokens that cover no text, such as `<s>`."""


def listed_tokens_text(cell: CellKey) -> str:
    """Return the tokens that an observation lists for a cell."""
    if not cell.shares:
        return _token_list(cell.listed, len(cell.listed))
    parts = zip(cell.listed, cell.shares, strict=True)
    return ", ".join(
        f"{shown_token(text)} {mean:.2f} ({first:.0%})" for text, (mean, first) in parts
    )


def _token_list(tokens: Sequence[str], most: int) -> str:
    shown = [shown_token(token) for token in tokens[:most]]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _commonest_token(tokens: Sequence[str]) -> str:
    return _token_list(tokens[:1], 1) + "…" * (len(tokens) > 1)


@dataclass(frozen=True)
class FigureCell:
    """One cell of a measure, as heatmaps, lines and bars show it."""

    value: float
    """The mean effect, or the most common category."""
    share: float
    """Share of the most common category."""
    low: float
    high: float
    null: tuple[float, float]
    """Ends of the null band."""
    n: int
    has_fewer: bool
    """Whether it has fewer prompts than the fullest cell."""
    is_thin: bool
    mark: str
    """As in `significance_marks`."""
    value_text: str
    interval_text: str
    null_text: str
    map_text: str
    """The value with the digits of a map."""
    hover: str
    """Tooltip: the cell's name, its numbers, and its number of prompts."""


@dataclass(frozen=True)
class FigureFrame:
    """One measure as heatmaps, lines and bars show it, in the terminal and as charts."""

    measure: int
    data: MeasureData
    cells: Sequence[FigureCell]
    """In the order of the result."""
    interval_title: str
    null_title: str
    """Heading of the null bands; empty without any."""
    write: Callable[[float], str]
    """Format of the numbers of lines and bars."""
    write_map: Callable[[float], str]
    """Format of the numbers of a map."""

    @property
    def is_category(self) -> bool:
        return self.data.kind == "category"

    @property
    def values(self) -> Floats:
        """Shape [cell]."""
        return np.array([cell.value for cell in self.cells])

    @property
    def has_fewer(self) -> bool:
        """Whether any cell has fewer prompts than the fullest."""
        return any(cell.has_fewer for cell in self.cells)


def figure_frame(result: ExperimentResult, measure: int) -> FigureFrame:
    """Format the numbers of a measure for figures."""
    data, found, band = (
        result.measures[measure],
        result.statistics[measure],
        result.control(measure),
    )
    count = range(len(result.cells))
    low, high = np.full((2, len(count)), np.nan) if band is None else (band.low, band.high)
    write = number_format(np.concatenate([found.mean, found.low, found.high, low, high]))
    category = data.kind == "category"
    values = found.commonest if category else found.mean
    texts = mean_texts(result, measure, count, write)
    nulls = [""] * len(count) if band is None else null_texts(band, found, count, write)
    write_map: Callable[[float], str] = "{:g}".format if category else map_format(values)
    maps = [*map(write_map, values)] if category else map_texts(result, measure, write_map)
    few, thin = has_fewer_prompts(result, measure), is_thin(result, measure)
    marks, hovers = significance_marks(result, measure), _hover_texts(result, measure)
    cells = [
        FigureCell(
            value=float(values[cell]),
            share=float(found.share[cell]),
            low=float(found.low[cell]),
            high=float(found.high[cell]),
            null=(float(low[cell]), float(high[cell])),
            n=int(found.n[cell]),
            has_fewer=bool(few[cell]),
            is_thin=bool(thin[cell]),
            mark=marks[cell],
            value_text=texts[cell][0],
            interval_text=texts[cell][1],
            null_text=nulls[cell],
            map_text=maps[cell],
            hover=hovers[cell],
        )
        for cell in count
    ]
    confidence = result.settings.confidence if result.settings else 95.0
    title = "" if band is None else band.title
    return FigureFrame(measure, data, cells, f"{confidence:g} % interval", title, write, write_map)


def _hover_texts(result: ExperimentResult, measure: int) -> list[str]:
    """Return the tooltip of each cell."""
    found, band = result.statistics[measure], result.control(measure)
    names = [escape_hidden(cell.name) for cell in result.cells]
    counts = [f"n = {int(n)}" for n in found.n]
    if result.measures[measure].kind == "category":
        texts = [
            f"{value:g} in {share:.0%}" if np.isfinite(value) else "no value"
            for value, share in zip(found.commonest, found.share, strict=True)
        ]
        return [", ".join(parts) for parts in zip(names, texts, counts, strict=True)]
    write = number_format([*found.mean, *found.low, *found.high])
    texts = [
        "no value" if mean == MISSING else mean if interval == MISSING else f"{mean} {interval}"
        for mean, interval in mean_texts(result, measure, range(len(names)), write)
    ]
    if band is not None:
        nulls = null_texts(band, found, range(len(names)), write)
        ranks = null_p_texts(band, range(len(names)))
        ranks = ranks if band.title == "null" else [MISSING] * len(names)
        bands = [
            f"{band.title} {null}, p null {p}" if p != MISSING else f"{band.title} {null}"
            for null, p in zip(nulls, ranks, strict=True)
        ]
        insides = [", inside" if inside else "" for inside in band.inside & band.decides]
        counts = ["".join((n, ", ", *t)) for n, *t in zip(counts, bands, insides, strict=True)]
    return [", ".join(parts) for parts in zip(names, texts, counts, strict=True)]


COUNTED_TOKEN = re.compile(r"(token )?-?[0-9]+")
"""Positions that count tokens instead of naming them."""

MAX_TOKEN_LENGTH = 14
"""Maximum number of characters of a token in a label."""


def token_label(token: str) -> str:
    """Return a token for a label: spaces as `·`, other white space by name, at most
    `MAX_TOKEN_LENGTH` characters."""
    text = escape_hidden(token.replace(" ", "·")) or NO_TEXT
    return text if len(text) <= MAX_TOKEN_LENGTH else text[: MAX_TOKEN_LENGTH - 1] + "…"


def position_names(result: ExperimentResult, axis: str = "position") -> dict[Coord, str]:
    """Return the names of positions in charts.

    A numbered token has its text, `4: ·plum`, or the most frequent one if prompts differ,
    `4: ·plum, …`; after an arrow, that of the source run. Other positions have tokens only if
    those of the source run differ.

    Args:
        axis: `position`, or `QUERY_AXIS`.
    """
    hit: dict[Coord, dict[str, None]] = {}
    read: dict[Coord, dict[str, None]] = {}
    for cell in result.cells:
        value = cell.coords.get(axis)
        if value is not None:
            tokens = cell.queries if axis == QUERY_AXIS else cell.tokens
            hit.setdefault(value, {}).update(dict.fromkeys(tokens))
            read.setdefault(value, {}).update(dict.fromkeys(cell.read))

    def listed(tokens: Sequence[str]) -> str:
        return token_label(tokens[0]) + ", …" * (len(tokens) > 1)

    def name(value: Coord) -> str:
        counted = COUNTED_TOKEN.fullmatch(str(value))
        if not hit[value] or not (counted or read[value]):
            return value_text(value)
        source = f" ← {listed(list(read[value]))}" if read[value] else ""
        return f"{value}: {listed(list(hit[value]))}{source}"

    return {value: name(value) for value in hit}


def value_names(result: ExperimentResult, axis: str) -> dict[Coord, str]:
    """Return the text of each value of an axis in charts."""
    if axis in ("position", QUERY_AXIS):
        return position_names(result, axis)
    return {value: value_text(value) for value in axis_values(result, axis)}


def name_positions(result: ExperimentResult, report: spec.Report) -> ExperimentResult:
    """Add tokens to the numbers of a position axis: those that a number hits in each run, if the
    source run's differ. Reports without axes have a token column instead."""
    signature = REPORTS[report.kind].signature
    if signature is None or signature.variable is None or "position" not in result.axes:
        return result
    if not any(cell.read for cell in result.cells):
        return result
    names = {
        cell.coords["position"]: f"{cell.coords['position']} "
        f"({_commonest_token(cell.tokens)} ← {_commonest_token(cell.read)})"
        for cell in result.cells
        if cell.read
    }

    def named(cell: CellKey) -> CellKey:
        value = cell.coords["position"]
        return replace(cell, coords={**cell.coords, "position": names.get(value, value)})

    return replace(result, cells=tuple(map(named, result.cells)))


UPWARD_AXES = {"layer", "to_layer"}
"""Axes drawn with 0 at the bottom."""


def is_upward(result: ExperimentResult, axis: str) -> bool:
    """Whether the first value of an axis belongs at the bottom."""
    return axis in UPWARD_AXES and is_numeric(axis_values(result, axis))


def row_order(result: ExperimentResult, axis: str) -> list[Coord]:
    """Return the values from the top of the map to its bottom."""
    values = axis_values(result, axis)
    return values[::-1] if is_upward(result, axis) else values


def drawn_axes(result: ExperimentResult, report: spec.Report) -> tuple[str, ...]:
    """Return the axis of the bars, and that of the series if there is one."""
    words = [report.variable or "", *([report.by] if report.by else [])]
    return tuple(axis_name(result, word) for word in words)


def sort_key(value: object) -> tuple[int, float, str]:
    """Sort numbers by size before words."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, str(value)


MAX_COLUMNS = 30
"""Maximum number of integers between the smallest and largest category that all get a column."""


@dataclass(frozen=True)
class ConfusionCounts:
    """Counts of one panel."""

    title: str
    rows: tuple[Coord, ...]
    columns: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    """Shape [row][column]."""
    own: tuple[int | None, ...]
    """Per row, the column of the number in the row's name."""

    def total(self, row: int) -> int:
        """Return the number of the row's prompts."""
        return sum(self.counts[row])

    def share(self, row: int, column: int) -> float:
        """Return the share of a column, NaN in a row without prompts."""
        total = self.total(row)
        return self.counts[row][column] / total if total else float("nan")


def count_confusions(
    result: ExperimentResult, report: spec.Report
) -> Mapping[int, list[ConfusionCounts]]:
    """Count categories.

    Returns:
        Measure → one table per combination of the remaining axes, after that of the base run, which
        shows the state without intervention. If the base runs differ (their rows are those of the
        cell), each combination has its own.
    """
    word = report.variable or ""
    axis = axis_name(result, word)
    confusions: dict[int, list[ConfusionCounts]] = {}
    for measure, data in enumerate(result.measures):
        if data.kind != "category" or report.by not in short_names(data.label, data.word):
            continue
        base = np.where(np.isfinite(data.patched), data.base, np.nan)
        if axis in result.axes:
            values = row_order(result, axis)
            split, titled = partial(_values_by_axis, values), grid_panels(result, (axis,))
        else:
            split = partial(_values_by_row, result.row_values.get(word, ()))
            titled = grid_panels(result, ())
        named = [(panel.title, split(data.patched, panel)) for panel in titled]
        acts = any(cell.site for cell in result.cells) and not data.inert.all()
        if acts or not np.array_equal(base, data.patched, equal_nan=True):  # else: the base run
            named = _add_base_run(named, [split(base, panel) for panel in titled], result)
        names = dict.fromkeys(name for _, rows in named for name in rows)
        # A layer has a number too, but a category can't be correct about it.
        counts = word not in result.axes
        numbers = {name: _row_number(name, word) if counts else None for name in names}
        shown = np.concatenate([values for _, rows in named for values in rows.values()] or [[]])
        seen = [float(v) for v in np.unique(shown[np.isfinite(shown)])]
        columns = _category_columns(
            seen, [number for number in numbers.values() if number is not None]
        )
        confusions[measure] = [_count_panel(title, rows, columns, numbers) for title, rows in named]
    return confusions


def _add_base_run(
    named: list[tuple[str, Mapping[Coord, Floats]]],
    bases: Sequence[Mapping[Coord, Floats]],
    result: ExperimentResult,
) -> list[tuple[str, Mapping[Coord, Floats]]]:
    title = f"base run: {result.shown(result.base)}"
    first = bases[0]
    if all(
        each.keys() == first.keys()
        and all(np.array_equal(each[name], first[name], equal_nan=True) for name in first)
        for each in bases
    ):
        return [(title, first), *((name or "patched", rows) for name, rows in named)]
    pairs = zip(named, bases, strict=True)
    return [
        each for (name, rows), base in pairs for each in ((f"{name}, {title}", base), (name, rows))
    ]


def _values_by_axis(
    names: Sequence[Coord], values: Floats, panel: GridPanel
) -> Mapping[Coord, Floats]:
    return {name: values[panel.cells[name,]] for name in names if (name,) in panel.cells}


def _values_by_row(
    values: Sequence[object], found: Floats, panel: GridPanel
) -> Mapping[Coord, Floats]:
    plain = [value if isinstance(value, int | float | str) else str(value) for value in values]
    row = found[panel.cells[()]]
    return {
        name: row[np.array([value == name for value in plain])]
        for name in sorted(dict.fromkeys(plain), key=sort_key)
    }


def _row_number(name: Coord, word: str) -> float | None:
    """Return the number in a row's name: 3, or `item 3 token` on the axis `item`."""
    if not isinstance(name, str):
        return float(name)
    match = re.match(rf"{re.escape(word)} (\d+)\b", name)
    return float(match[1]) if match else None


def _category_columns(seen: Sequence[float], rows: Sequence[float]) -> tuple[float, ...]:
    """Return the observed categories and the numbers of rows, with the integers in between."""
    values = sorted({*seen, *rows})
    whole = all(value.is_integer() for value in values)
    if values and whole and values[-1] - values[0] < MAX_COLUMNS:
        return tuple(map(float, range(int(values[0]), int(values[-1]) + 1)))
    return tuple(sorted(seen))


def _count_panel(
    title: str,
    rows: Mapping[Coord, Floats],
    columns: tuple[float, ...],
    numbers: Mapping[Coord, float | None],
) -> ConfusionCounts:
    place = {column: index for index, column in enumerate(columns)}
    own = [numbers[name] for name in rows]
    return ConfusionCounts(
        title,
        tuple(rows),
        columns,
        tuple(
            tuple(int(np.count_nonzero(values == column)) for column in columns)
            for values in rows.values()
        ),
        tuple(None if number is None else place.get(number) for number in own),
    )


# --- titles of axes and scales --------------------------------------------------------------------


AXIS_TITLES = {
    "layer": "Layer",
    "to_layer": "Layer of the receiver",
    "head": "Head",
    "to_head": "Head of the receiver",
    "neuron": "Neuron",
    "to_neuron": "Neuron of the receiver",
    "expert": "Expert",
    "feature": "Feature",
    "position": "Token position",
    QUERY_AXIS: "Query position",
    "model": "Model",
    "prompts": "Prompts",
}
"""Titles of the language's axes. The name of a loop variable is the user's, so it stays."""

QUANTITIES = {
    "prob": "probability",
    "logprob": "log-probability",
    "logit": "logit",
    "score": "class logit",
    "rank": "rank",
    "correct": "share of correct answers",
    "exact_match": "share of exact matches",
    "expected": "expected number",
    "argmax": "most likely number",
    "absolute_error": "absolute error of the number",
    "kl": "KL divergence",
    "js": "Jensen-Shannon divergence",
    "entropy": "entropy",
    "loss": "loss",
    "top_margin": "logit margin of the first token",
    "attention": "attention weight",
    "received": "attention received",
    "rollout": "attention rollout",
    "value_norm": "norm of the attended value",
    "direct_logit": "direct logit contribution",
    "norm": "norm",
    "cosine": "cosine similarity",
    "length": "length",
    "probe": "probe score",
    "shuffled": "probe score of shuffled values",
}
"""Metrics and observations in words; others have the name from the file."""

UNIT_QUANTITIES = {"logit": "logit", "probability": "probability"}
"""Quantities of expressions by their unit; a subtraction is a difference."""

UNIT_NAMES = {
    "logit": "logits",
    "nat": "nats",
    "token": "tokens",
    "activation": "activation units",
    "R²": "R²",
    "CKA": "CKA",
    "dimensions": "dimensions",
    "share": "share",
}
"""Units in titles. The others repeat the quantity, or are plain numbers."""

MAX_QUANTITY_LENGTH = 40
"""Maximum length of a name from the file in a title."""


def chart_axis_title(result: ExperimentResult, word: str) -> str:
    """Return the title of an axis in a chart, such as `Layer` or `Layer (centre of the window)`."""
    axis = axis_name(result, word)
    title = AXIS_TITLES.get(axis, escape_hidden(word))
    if axis == "position" and any(cell.queries for cell in result.cells):
        title = "Key position"
    elif axis == "position" and any(cell.keys for cell in result.cells):
        title = "Query position"
    if axis in result.centres:
        return f"{title} (centre of the window)"
    values = {cell.coords[axis] for cell in result.cells if axis in cell.coords}
    return f"{title} (relative depth)" if values and all(map(_is_depth, values)) else title


def _is_depth(value: Coord) -> bool:
    return isinstance(value, str) and DEPTH_PATTERN.fullmatch(value) is not None


def quantity_name(data: MeasureData) -> str:
    """Return what a measure's metric measures, in words: `logit difference`, `probability`. A
    metric without such words has its name from the file."""
    for word in (data.word, data.label):
        if word in QUANTITIES:
            return QUANTITIES[word]
    if data.unit in UNIT_QUANTITIES and " - " in data.metric:
        return f"{UNIT_QUANTITIES[data.unit]} difference"
    return shorten(escape_hidden(data.label), MAX_QUANTITY_LENGTH, placeholder=" …")


def value_title(data: MeasureData) -> str:
    """Return the title of an effect's axis or colour scale: what is shown, and its unit."""
    quantity, unit = quantity_name(data), UNIT_NAMES.get(data.unit, "")
    if data.called not in (data.effect, f"estimated {data.effect}"):  # not in the metric's unit
        return capitalise(f"{data.called} of {quantity}")
    title = {
        "raw": quantity,
        "delta": f"change in {quantity}",
        "total": f"difference in {quantity} between the runs",
        "recovery": "share of the effect recovered",
        "relative": f"change in {quantity}",
    }.get(data.effect, f"{data.effect} of {quantity}")
    if EFFECTS[data.effect].scale_free:
        unit = {"recovery": "1 = all", "relative": "fraction of the base run"}.get(data.effect, "")
    if data.estimator:
        title = f"estimated {title}"
    shown = title if title == data.label else capitalise(title)  # a name from the file stays
    return shown if not unit or unit in title else f"{shown} ({unit})"


def capitalise(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]
