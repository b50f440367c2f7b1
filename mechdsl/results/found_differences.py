"""What `mechdsl diff` finds between two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechdsl.base.files import write_whole
from mechdsl.base.plural import plural
from mechdsl.base.visible import json_text
from mechdsl.results.changed_inputs import InputChange, RowChange
from mechdsl.results.changed_verdicts import VerdictChange
from mechdsl.results.compared_cells import State
from mechdsl.results.shown import AS_DIFFERENCES, shown_by

COMPARED: tuple[State, ...] = ("equal", "rounding", "noise", "changed", "unclear")
"""States of cells that have a number in both runs."""


@dataclass(frozen=True)
class Side:
    """One of the two runs, as people call it."""

    name: str
    note: str = ""
    """What is to be known of it: that its file has changed since."""
    options: Mapping[str, str] | None = None
    """What it was asked for beside the file; None where that isn't known, as of a folder."""


@dataclass(frozen=True)
class Place:
    """An experiment, a measure of one or a cell of one, that one of the runs alone has."""

    experiment: str
    measure: str | None = None
    """`recovery of logit(answer)`; None where all measures are meant."""
    cell: str | None = None
    reason: str | None = None
    """Why the other run has no number of it, though its file has it."""


@dataclass(frozen=True)
class CellDifference:
    """One effect in one cell; None where there is no such number."""

    experiment: str
    cell: str
    coords: Mapping[str, int | float | str]
    site: str
    position: str | None
    label: str
    effect: str
    at: str | None
    kind: str
    state: State
    paired: bool
    """Whether both runs have rows in common, which alone are compared then."""
    rows: int
    """Rows behind the comparison: of both runs where it is paired, of the smaller sample else."""
    units: int
    """Independent units behind it."""
    rows_changed: int | None
    """Rows of which a value differs; None where no rows are common."""
    rows_beyond: int | None
    """Those of them that rounding doesn't explain."""
    largest: float | None
    """The largest difference of a value, in the metric's unit; None of categories, and where no
    rows are common."""
    old: float | None
    """The effect on the rows that are compared; of categories, the share of the commonest."""
    new: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    p_at_most: bool
    """Whether p is the least that so many flips give, and may be smaller."""
    rounding: float | None
    """How far rounding alone may move the difference."""
    reason: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Differences:
    """What `mechdsl.diff` returns."""

    old: Side
    new: Side
    inputs: tuple[InputChange, ...]
    rows: tuple[RowChange, ...]
    verdicts: tuple[VerdictChange, ...]
    cells: tuple[CellDifference, ...]
    """Those that aren't equal to the bit."""
    added: tuple[Place, ...]
    removed: tuple[Place, ...]
    counts: Mapping[State, int]
    """How many cells are in which state, each measure counted by itself."""
    conventions: Mapping[str, str]
    """How the figures came about, in words."""

    @property
    def changed_cells(self) -> tuple[CellDifference, ...]:
        """Those of which the effect changed beyond noise."""
        return tuple(each for each in self.cells if each.state == "changed")

    @property
    def compared(self) -> int:
        """Cells that have a number in both runs."""
        return sum(self.counts.get(state, 0) for state in COMPARED)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the exit status is 1, in words; empty where it is 0."""
        failing = sum(each.turn == "fails now" for each in self.verdicts)
        cells, gone = len(self.changed_cells), len(self.removed)
        return tuple(
            said
            for count, said in (
                (cells, f"{plural(cells, 'cell')} changed beyond noise"),
                (failing, f"{plural(failing, 'expectation')} held before and not now"),
                (gone, f"{gone:,} {'thing' if gone == 1 else 'things'} gone"),
            )
            if count
        )

    @property
    def changed(self) -> bool:
        """Whether the exit status is 1: an effect changed beyond noise, an expectation that held
        fails, or something is gone."""
        return bool(self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """The document of `mechdsl diff --format json`."""
        from mechdsl.results.differences_document import differences_document

        return differences_document(self).as_json()

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 2) -> str:
        """The document as text, also written to `path` if one is given."""
        text = json_text(self.to_dict(), indent)
        if path is not None:
            write_whole(Path(path), text + "\n")
        return text

    def to_text(self, width: int = 100) -> str:
        """What the command line prints, `width` columns wide."""
        return shown_by(AS_DIFFERENCES)(self, width)

    def __repr__(self) -> str:
        said = "; ".join(self.reasons) or "nothing changed beyond noise"
        return f"<Differences {self.old.name} → {self.new.name}: {said}>"
