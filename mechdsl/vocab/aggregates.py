"""Registries of numbers computed from effects: aggregates of cells, and statistics of rows.

An aggregate is a function of the selected cells' effects, such as `mean` in `expect`. Each one is
a class under `aggregate`. A statistic is a further number of one cell, computed from the effects
of its rows, such as their median. Each one is a class under `row_statistic`.

A module outside the package adds either with such a class, when it is imported before a file is
checked. Then `expect rms(delta, layer 3) > 0.1` is valid. A statistic is a further column of tables
and CSV, and JSON documents it as a number in `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from mechdsl.base.records import Registry, attribute_problem
from mechdsl.syntax.words import name_problem

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


class CellAggregate:
    """A number computed from the mean effects of several cells.

    The interval of a smooth aggregate is that of a mean: bootstrap-t, with the aggregate's slope
    in each cell. An aggregate is smooth if a small change of a cell changes it in proportion, as
    in a mean or a root of squares, but not in a largest value or a count above a threshold.
    """

    name: ClassVar[str]
    documentation: ClassVar[str]
    """Description for the language reference."""
    extreme: ClassVar[Literal["", "largest", "smallest"]] = ""
    """For the value of one leading cell: which one. It has simultaneous bounds."""
    min_cells: ClassVar[int] = 1
    """Fewest cells that it is defined for."""

    def limits(self, cells: int) -> tuple[float, float]:
        """Return the smallest and the largest possible aggregate; intervals are cut to them."""
        return -inf, inf

    def combine(self, values: Floats) -> Floats:
        """Return the aggregates, shape [resample], of effects of shape [resample, cell]."""
        raise NotImplementedError

    def slope(self, values: Floats) -> Floats:
        """Return the partial derivatives of `combine` by each cell, shape [resample, cell].

        The default are central differences, with two calls of `combine` per cell.
        """
        import numpy as np

        slope = np.empty(values.shape)
        spread = np.abs(values).max(1, keepdims=True)
        step = 1e-6 * np.where(spread > 0, spread, 1.0)
        for cell in range(values.shape[1]):
            moved = values.copy()
            moved[:, cell] += step[:, 0]
            above = self.combine(moved)
            moved[:, cell] -= 2 * step[:, 0]
            slope[:, cell] = (above - self.combine(moved)) / (2 * step[:, 0])
        return slope


AGGREGATES: Registry[CellAggregate] = Registry("aggregate")

AggregateT = TypeVar("AggregateT", bound=CellAggregate)

_OTHER_FUNCTIONS = (
    *("abs", "auc", "auroc", "accuracy", "cmd", "spearman", "pearson", "argmax", "argmin"),
)

AREA_HINTS = {
    "cpr": "the CPR of MIB is the area under the curve: measure `… as faithfulness`, and write "
    "`expect auc(faithfulness, n) > 0.5`",
    "cmd": "the CMD of MIB is a function of expectations: measure `… as faithfulness`, and write "
    "`expect cmd(faithfulness, n) < 0.5`",
}
"""Names of MIB's areas → how a file has them.

References:
    Mueller et al. 2025 (arXiv 2504.13151), section 3.2.
"""


def expectation_functions() -> tuple[str, ...]:
    """Return the names of all functions of expectations."""
    return (*AGGREGATES, *_OTHER_FUNCTIONS)


def aggregate(name: str) -> Callable[[type[AggregateT]], type[AggregateT]]:
    """Register a subclass of `CellAggregate` as the function `name` of expectations.

    Raises ValueError or TypeError for a class that can't be used.
    """
    return AGGREGATES.class_decorator(name, _aggregate_problem)


def _aggregate_problem(name: str, entry: type[CellAggregate]) -> str | None:
    """Return the reason that a class can't be registered."""
    if name in _OTHER_FUNCTIONS:
        return "its name is already a function of the language"
    wrong = name_problem(name) or attribute_problem(
        entry, texts=("documentation",), counts=("min_cells",)
    )
    if wrong is not None:
        return wrong
    if entry.combine is CellAggregate.combine:
        return "it has no `combine(self, values)`"
    return None


@aggregate("max")
class Largest(CellAggregate):
    documentation = "The largest effect of the cells."
    extreme = "largest"

    def combine(self, values: Floats) -> Floats:
        return values.max(1)


@aggregate("min")
class Smallest(CellAggregate):
    documentation = "The smallest effect of the cells."
    extreme = "smallest"

    def combine(self, values: Floats) -> Floats:
        return values.min(1)


@aggregate("mean")
class Mean(CellAggregate):
    documentation = "The mean effect of the cells."

    def combine(self, values: Floats) -> Floats:
        return values.mean(1)


@aggregate("participation")
class Participation(CellAggregate):
    documentation = (
        "The effective number of cells with an effect: the participation ratio (Σ e²)² / Σ e⁴ of "
        "effects e. Its interval is cut to the possible range, from 1 to the number of cells."
    )

    def limits(self, cells: int) -> tuple[float, float]:
        return 1.0, float(cells)

    def combine(self, values: Floats) -> Floats:
        import numpy as np

        size = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float64).tiny)
        squares = (values / size) ** 2
        return squares.sum(1) ** 2 / np.maximum((squares**2).sum(1), np.finfo(np.float64).tiny)

    def slope(self, values: Floats) -> Floats:
        import numpy as np

        size = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float64).tiny)
        ratio = values / size
        squares = (ratio**2).sum(1, keepdims=True)
        fourth = np.maximum((ratio**4).sum(1, keepdims=True), np.finfo(np.float64).tiny)
        return 4 * squares * (ratio - squares / fourth * ratio**3) / fourth / size


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
    return ROW_STATISTICS.class_decorator(name, _statistic_problem)


def _statistic_problem(name: str, entry: type[RowStatistic]) -> str | None:
    """Return the reason that a class can't be registered."""
    wrong = name_problem(name) or attribute_problem(
        entry, texts=("documentation",), counts=("min_rows",)
    )
    if wrong is not None:
        return wrong
    if entry.compute is RowStatistic.compute:
        return "it has no `compute(self, effects)`"
    return None
