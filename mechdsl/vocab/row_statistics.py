"""Registry of further statistics of a cell, such as the median of the effects of its rows.

Each statistic is one class under `row_statistic`. A module outside the package adds one with such a
class, when it is imported before a file is checked. Tables and CSV then have a further column, and
JSON documents a further number in `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mechdsl.base.records import Registry, attribute_problem
from mechdsl.syntax.words import name_problem

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


class RowStatistic:
    """A number computed from the effects of the rows of one cell."""

    name: ClassVar[str]
    documentation: ClassVar[str]
    """Description in the conventions of results."""
    min_rows: ClassVar[int] = 1
    """Fewest rows that it is defined for; cells with fewer have no value."""

    def compute(self, effects: Floats) -> float:
        """Return the statistic of the effects of a cell's rows, shape [row]."""
        raise NotImplementedError


ROW_STATISTICS: Registry[RowStatistic] = Registry("statistic")

StatisticT = TypeVar("StatisticT", bound=RowStatistic)


def row_statistic(name: str) -> Callable[[type[StatisticT]], type[StatisticT]]:
    """Register a subclass of `RowStatistic` as the column `name` of results.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return ROW_STATISTICS.class_decorator(name, _class_problem)


def _class_problem(name: str, entry: type[RowStatistic]) -> str | None:
    """Return the reason that a class can't be registered."""
    wrong = name_problem(name) or attribute_problem(
        entry, texts=("documentation",), counts=("min_rows",)
    )
    if wrong is not None:
        return wrong
    if entry.compute is RowStatistic.compute:
        return "it has no `compute(self, effects)`"
    return None
