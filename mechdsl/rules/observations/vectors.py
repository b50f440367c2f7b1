"""Observations of vectors by themselves: their length, their value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved import ResolvedRule
from mechdsl.rules.observations.registry import SiteObservation, observation

if TYPE_CHECKING:
    from torch import Tensor


@observation("norm", unit="activation")
class Norm(SiteObservation):
    """The length of the vector (L2).

    returns: at least 0, in the unit of the activation
    """

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return seen.vectors.norm(dim=-1)
