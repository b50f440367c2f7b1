"""The name of a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mechdsl.program.lower_other_runs import BLOCKS

Coord = int | float | str
_LETTERS = {"layer": "L", "head": "H", "neuron": "N", "expert": "H"}
"""Before their numbers in the name of a site."""


@dataclass(frozen=True)
class CellKey:
    """Which intervention a cell is."""

    coords: Mapping[str, Coord]
    """One value per axis of the experiment, in the order of its axes."""
    site: str
    """As the model names it, `L2H0.z`; empty in an experiment without a rule."""
    position: str | None = None
    tokens: tuple[str, ...] = ()
    """The distinct texts of the tokens that were hit, commonest first."""
    read: tuple[str, ...] = ()
    """The same in the source run, where tokens of one number are other ones there."""
    also: Mapping[str, int] = field(default_factory=dict[str, int])
    """`item`, where an axis runs over occurrences: which of them, counted from 1."""
    listed: tuple[str, ...] = field(default=(), compare=False)
    """Tokens that an observation lists (`top 10`), the first one first."""
    shares: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    """Of each of them, its mean probability over rows, and the share of rows in which it is the
    most likely; none where rows have no part in the list."""

    @property
    def name(self) -> str:
        """The site, with those coordinates that it doesn't show."""
        shown = [
            f"{axis} {value}" if not isinstance(value, str) else value
            for axis, value in self.coords.items()
            if not self._site_names(axis, value)
        ]
        return " at ".join([self.site, *shown] if self.site else shown) or "the only cell"

    def _site_names(self, axis: str, value: Coord) -> bool:
        """Whether the site says a coordinate: not where a rule hits several layers or heads at
        once and something else, such as a direction, is of one of them."""
        letter = _LETTERS.get(axis)
        if letter is None or not self.site or isinstance(value, str):
            return letter is not None and bool(self.site)
        return re.search(rf"{letter}{value}(?![\d,-])", self.site) is not None


# --- cells of several variants --------------------------------------------------------------------

Labels = tuple[tuple[str, int | str], ...]
"""Axis and label of everything that there are several of."""
NO_VALUE = "-"
"""The coordinate of a cell along an axis that its variant doesn't have."""


def told_apart(parts: Sequence[tuple[Labels, str]]) -> list[str]:
    """What tells runs of a variant from those of one name of the others: its block, its model;
    nothing where there is one. parts: labels and model of each."""
    blocks = [str(dict(labels).get(BLOCKS, "")) for labels, _ in parts]
    models = [model for _, model in parts]
    told = [each if len(set(each)) > 1 else [""] * len(each) for each in (blocks, models)]
    return [", ".join(filter(None, each)) for each in zip(*told, strict=True)]


def joined_axes(parts: Sequence[tuple[Labels, Sequence[str]]]) -> list[str]:
    """The axes of all variants: what there are several of comes first."""
    own = [axis for labels, _ in parts for axis, _ in labels]
    return list(dict.fromkeys([*own, *(axis for _, axes in parts for axis in axes)]))


def joined_cells(
    axes: Sequence[str], parts: Iterable[tuple[Labels, Iterable[CellKey]]]
) -> list[CellKey]:
    """The cells of all variants, one variant after the other."""
    return [
        replace(cell, coords={axis: _coord(axis, dict(labels), cell) for axis in axes})
        for labels, cells in parts
        for cell in cells
    ]


def _coord(axis: str, labels: Mapping[str, int | str], cell: CellKey) -> Coord:
    if axis in labels:
        return labels[axis]
    # A sweep over positions that finds a single one has no axis.
    missing = cell.position if axis == "position" else None
    return cell.coords.get(axis, missing or NO_VALUE)


def averaged_cells(cells: Sequence[CellKey], axis: str) -> tuple[list[CellKey], list[list[int]]]:
    """(cells without an axis, the numbers of the cells that each is the mean of)."""
    groups: dict[tuple[tuple[str, Coord], ...], list[int]] = {}
    for number, cell in enumerate(cells):
        key = tuple((name, value) for name, value in cell.coords.items() if name != axis)
        groups.setdefault(key, []).append(number)
    found = [_mean_of([cells[n] for n in group], dict(key)) for key, group in groups.items()]
    return found, list(groups.values())


def _mean_of(cells: Sequence[CellKey], coords: Mapping[str, Coord]) -> CellKey:
    """What the mean of cells is called: both ends of what they differ in."""

    def ends(values: Sequence[str]) -> str:
        return " … ".join(dict.fromkeys((values[0], values[-1])))

    positions = [cell.position or "" for cell in cells]
    return CellKey(
        coords=coords,
        site=ends([cell.site for cell in cells]),
        position=ends(positions) or None,
        tokens=tuple(dict.fromkeys(text for cell in cells for text in cell.tokens)),
        read=tuple(dict.fromkeys(text for cell in cells for text in cell.read)),
        also={k: v for k, v in cells[0].also.items() if all(c.also.get(k) == v for c in cells)},
    )
