"""Cells laid out along axes, for reports that draw them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechdsl.base.visible import visible
from mechdsl.program import spec
from mechdsl.resolve.cell_key import CellKey, Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.tokens import shown_token
from mechdsl.vocab.reports import REPORTS

DEPTH = re.compile(r"[0-9.]+%")


@dataclass(frozen=True)
class GridPanel:
    """The cells that share every coordinate but those along the drawn axes."""

    title: str
    """The shared coordinates, empty where there are none."""
    cells: dict[tuple[Coord, ...], int]
    """Coordinates along the drawn axes -> index of the cell."""


def axis_name(result: ExperimentResult, word: str) -> str:
    """The axis that a report's word means (`item` may stand for `position`)."""
    return word if word in result.axes else result.aliases.get(word, word)


def axis_title(result: ExperimentResult, word: str) -> str:
    """How an axis is called in a figure: `layer (centre)` where its values are those of windows."""
    return f"{word} (centre)" if axis_name(result, word) in result.centres else word


def values_of(result: ExperimentResult, axis: str) -> list[Coord]:
    """The values of an axis in order: numbers by size, words as they were written."""
    seen = dict.fromkeys(cell.coords[axis] for cell in result.cells)
    values = list(seen)
    return sorted(values, key=number) if numeric(values) else values


def numeric(values: Sequence[Coord]) -> bool:
    """Whether they are numbers, or layers by their relative depth such as `33.3%`."""
    return not any(isinstance(value, str) and not DEPTH.fullmatch(value) for value in values)


def number(value: Coord) -> float:
    """Where a value of a numeric axis stands."""
    return float(value.rstrip("%")) if isinstance(value, str) else value


def panels(result: ExperimentResult, drawn: Sequence[str]) -> list[GridPanel]:
    """One panel per combination of the other axes' values."""
    others = [axis for axis in result.axes if axis not in drawn]
    found: dict[tuple[Coord, ...], GridPanel] = {}
    for index, cell in enumerate(result.cells):
        key = tuple(cell.coords[axis] for axis in others)
        if key not in found:
            found[key] = GridPanel(", ".join(map(coordinate, others, key)), {})
        found[key].cells[tuple(cell.coords[axis] for axis in drawn)] = index
    return list(found.values())


def coordinate(axis: str, value: Coord) -> str:
    """`head 3`; a position speaks for itself."""
    return value_text(value) if axis == "position" else f"{axis} {value_text(value)}"


def value_text(value: Coord) -> str:
    """A value of an axis as text, which may come from a prompt."""
    return visible(str(value))


def tokens_hit(cell: CellKey, most: int) -> str:
    """The commonest tokens that a cell hits; behind an arrow those of the source run, where tokens
    of one number are others there."""
    hit = _listed(cell.tokens, most)
    return f"{hit} ← {_listed(cell.read, most)}" if cell.read else hit


def tokens_listed(cell: CellKey) -> str:
    """The tokens that an observation lists of a cell."""
    if not cell.shares:
        return _listed(cell.listed, len(cell.listed))
    parts = zip(cell.listed, cell.shares, strict=True)
    return ", ".join(
        f"{shown_token(text)} {mean:.2f} ({first:.0%})" for text, (mean, first) in parts
    )


def _listed(tokens: Sequence[str], most: int) -> str:
    shown = [shown_token(token) for token in tokens[:most]]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _commonest(tokens: Sequence[str]) -> str:
    return _listed(tokens[:1], 1) + "…" * (len(tokens) > 1)


def with_tokens(result: ExperimentResult, report: spec.Report) -> ExperimentResult:
    """The result as a report draws it: along the axis of positions, a number says which tokens it
    hits in each run, where those of the source run are others. Reports without axes have a column
    of tokens instead."""
    signature = REPORTS[report.kind].signature
    if signature is None or signature.variable is None or "position" not in result.axes:
        return result
    if not any(cell.read for cell in result.cells):
        return result
    names = {
        cell.coords["position"]: f"{cell.coords['position']} "
        f"({_commonest(cell.tokens)} ← {_commonest(cell.read)})"
        for cell in result.cells
        if cell.read
    }

    def named(cell: CellKey) -> CellKey:
        value = cell.coords["position"]
        return replace(cell, coords={**cell.coords, "position": names.get(value, value)})

    return replace(result, cells=tuple(map(named, result.cells)))


UPWARDS = {"layer", "to_layer"}
"""Axes drawn with 0 at the bottom."""


def row_order(result: ExperimentResult, axis: str) -> list[Coord]:
    """Values from the top of the map to its bottom."""
    values = values_of(result, axis)
    return values[::-1] if axis in UPWARDS and numeric(values) else values


def drawn_axes(result: ExperimentResult, report: spec.Report) -> tuple[str, ...]:
    """The axis of the bars, and that of the series where there is one."""
    words = [report.variable or "", *([report.by] if report.by else [])]
    return tuple(axis_name(result, word) for word in words)
