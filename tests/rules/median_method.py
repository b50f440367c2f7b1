"""A direction method from outside the package: one class, and no other file changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mechdsl.program.direction_methods import FittedMethod, Problem, RowVectors, direction_method
from mechdsl.program.spec import Constant

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


@direction_method("median")
class Median(FittedMethod):
    """The median of the rows, coordinate by coordinate, times a factor."""

    takes = "block"
    example = "median(fruit)"
    options = ("factor", "limit")
    min_rows = 3

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return "a factor is a number", "write `factor: 2`"
        return None

    def fit(self, samples: Sequence[RowVectors], options: Mapping[str, Constant]) -> Floats:
        import numpy as np

        return np.median(samples[0].matrix(), axis=0) * float(options.get("factor", 1))
