"""How often each category is found: the numbers of `report confusion`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import GridPanel, axis_name, panels, values_of
from mechdsl.show.reports.text import sortable
from mechdsl.vocab.reports import short_names

MOST_COLUMNS = 30
"""Numbers between the least and the greatest category up to which all have a column."""


@dataclass(frozen=True)
class Confusion:
    """Counts of one panel."""

    title: str
    rows: tuple[Coord, ...]
    columns: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    """[row][column]."""
    own: tuple[int | None, ...]
    """Per row, the column of the number that the row is called by."""

    def total(self, row: int) -> int:
        """The row's prompts."""
        return sum(self.counts[row])

    def share(self, row: int, column: int) -> float:
        """NaN in a row without prompts."""
        total = self.total(row)
        return self.counts[row][column] / total if total else float("nan")


def confusions(result: ExperimentResult, report: spec.Report) -> Mapping[int, list[Confusion]]:
    """Measure -> one table of counts per combination of the axes that aren't drawn, behind that of
    the base run: what is there without intervention. Where the base run differs between these
    (its rows are those of the cell), each has its own."""
    word = report.variable or ""
    axis = axis_name(result, word)
    found: dict[int, list[Confusion]] = {}
    for measure, data in enumerate(result.measures):
        if data.kind != "category" or report.by not in short_names(data.label, data.word):
            continue
        base = np.where(np.isfinite(data.patched), data.base, np.nan)
        if axis in result.axes:
            values = values_of(result, axis)
            split, titled = partial(_along_axis, values), panels(result, (axis,))
        else:
            split = partial(_along_values, result.row_values.get(word, ()))
            titled = panels(result, ())
        named = [(panel.title, split(data.patched, panel)) for panel in titled]
        acts = any(cell.site for cell in result.cells) and not data.inert.all()
        if acts or not np.array_equal(base, data.patched, equal_nan=True):  # else it is the base
            named = _beside_base(named, [split(base, panel) for panel in titled], result)
        names = dict.fromkeys(name for _, rows in named for name in rows)
        # a layer has a number too, but none that a category could be right about
        counts = word not in result.axes
        numbers = {name: _number(name, word) if counts else None for name in names}
        shown = np.concatenate([values for _, rows in named for values in rows.values()] or [[]])
        seen = [float(v) for v in np.unique(shown[np.isfinite(shown)])]
        columns = _columns(seen, [number for number in numbers.values() if number is not None])
        found[measure] = [_counted(title, rows, columns, numbers) for title, rows in named]
    return found


def _beside_base(
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
        return [(title, first), *((own or "patched", rows) for own, rows in named)]
    pairs = zip(named, bases, strict=True)
    return [
        each for (own, rows), base in pairs for each in ((f"{own}, {title}", base), (own, rows))
    ]


def _along_axis(names: Sequence[Coord], found: Floats, panel: GridPanel) -> Mapping[Coord, Floats]:
    return {name: found[panel.cells[name,]] for name in names if (name,) in panel.cells}


def _along_values(
    values: Sequence[object], found: Floats, panel: GridPanel
) -> Mapping[Coord, Floats]:
    plain = [value if isinstance(value, int | float | str) else str(value) for value in values]
    row = found[panel.cells[()]]
    return {
        name: row[np.array([value == name for value in plain])]
        for name in sorted(dict.fromkeys(plain), key=sortable)
    }


def _number(name: Coord, word: str) -> float | None:
    """The number that a row is called by: 3, or `item 3 token` of the axis `item`."""
    if not isinstance(name, str):
        return float(name)
    found = re.match(rf"{re.escape(word)} (\d+)\b", name)
    return float(found[1]) if found else None


def _columns(seen: Sequence[float], rows: Sequence[float]) -> tuple[float, ...]:
    """What was found and what rows are called by, with the whole numbers in between."""
    values = sorted({*seen, *rows})
    whole = all(value.is_integer() for value in values)
    if values and whole and values[-1] - values[0] < MOST_COLUMNS:
        return tuple(map(float, range(int(values[0]), int(values[-1]) + 1)))
    return tuple(sorted(seen))


def _counted(
    title: str,
    rows: Mapping[Coord, Floats],
    columns: tuple[float, ...],
    numbers: Mapping[Coord, float | None],
) -> Confusion:
    place = {column: index for index, column in enumerate(columns)}
    own = [numbers[name] for name in rows]
    return Confusion(
        title,
        tuple(rows),
        columns,
        tuple(
            tuple(int(np.count_nonzero(values == column)) for column in columns)
            for values in rows.values()
        ),
        tuple(None if number is None else place.get(number) for number in own),
    )
