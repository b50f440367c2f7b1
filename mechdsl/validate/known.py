"""What an expectation may name: measures, axes and cells, as far as they are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mechdsl.syntax import ast
from mechdsl.validate.known_measures import KnownMeasure

if TYPE_CHECKING:
    from mechdsl.resolve.cell_key import CellKey


@dataclass(frozen=True)
class Known:
    """What an experiment has that an expectation may name."""

    measures: Sequence[KnownMeasure]
    axes: Sequence[str] = ()
    runs: Sequence[str] = ()
    """Where the prompts have no answer, so that none has an accuracy, E0516 says so."""
    experiments: Sequence[str] = ()
    """The others of the file."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes."""
    cells: Sequence[CellKey] | None = None
    """None as long as they aren't known."""
    perhaps: Collection[str] = ()
    """Axes that the experiment may not have: it isn't known either."""
    open_axes: Collection[str] = ()
    """Axes of which a cell may have any value, for it isn't known yet."""
    name: str = ""
    """The experiment's own."""
    others: Mapping[str, Known] = field(default_factory=dict[str, "Known"])
    """What those of the file have whose measures may be named; those that are lost are missing."""
    groups: Mapping[str, Sequence[ast.Site]] = field(default_factory=dict[str, Sequence[ast.Site]])
    """Groups of sites of the file."""
    columns: Mapping[str, Sequence[Any]] | None = field(default_factory=dict[str, Sequence[Any]])
    """Variables of the prompts, row by row; None as long as they aren't known."""
    all_rows: bool = True
    """Whether columns have every row; else some are missing that the run has."""

    @property
    def one_cell(self) -> bool:
        """Whether there is one cell, as far as is known."""
        if self.cells is not None and not self.open_axes:
            return len(self.cells) == 1
        return all(axis in self.perhaps for axis in self.axes)
