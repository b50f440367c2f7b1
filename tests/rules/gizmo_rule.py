"""A rule type that one class outside the package defines.

Syntax: `stretch SITE at POSITIONS by NUMBER`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.resolve.types import ResolvedRule, VectorBatch
from mechdsl.rules.kinds import SiteRule, rule_kind


@rule_kind("stretch")
class Stretch(SiteRule):
    """Vectors of the base run, multiplied."""

    takes = "by"
    reads = "run"

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 1

    def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
        read = vectors.read()
        return read * vectors.amounts[:, None].to(read)
