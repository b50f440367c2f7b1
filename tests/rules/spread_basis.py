"""A basis method from outside the package: one class, and no other file changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechdsl.program.direction_methods import BasisInput, BasisMethod, LinearMap, basis_method
from mechdsl.program.spec import Constant

if TYPE_CHECKING:
    from mechdsl.program.direction_methods import Problem


@basis_method("spread")
class Spread(BasisMethod):
    """The numbers of the vector that differ most between rows."""

    takes = "block"
    example = "spread(fruit, dims: 2)"
    options = ("dims", "limit")
    required = ("dims",)

    def check_option(self, name: str, value: Constant | None) -> Problem | None:
        if name == "dims" and not (isinstance(value, int) and value >= 1):
            return "`dims` is a whole number from 1 on", "write `dims: 2`"
        return None

    def size(self, width: int, rows: int, options: Mapping[str, Constant]) -> int | Problem:
        return min(width, int(options["dims"]))

    def build(self, given: BasisInput, options: Mapping[str, Constant], size: int) -> LinearMap:
        import numpy as np

        largest = np.argsort(-given.matrix().std(axis=0), kind="stable")[:size]
        return LinearMap(np.eye(given.width)[largest])
