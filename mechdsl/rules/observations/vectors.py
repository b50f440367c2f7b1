"""Observations of vectors by themselves: their length, their value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import ResolvedRule, SiteTargets
from mechdsl.rules.observations.registry import SiteObservation, every_point, observation
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from torch import Tensor


@observation("norm", unit="activation")
class Norm(SiteObservation):
    """The length of the vector (L2).

    returns: at least 0, in the unit of the activation
    """

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return seen.vectors.norm(dim=-1)


@observation("value", unit="activation")
class Value(SiteObservation):
    """The activation of one neuron.

    returns: any number; averaged over neurons that are joined
    """

    by_unit = True

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        assert rule.site is not None
        for point in every_point(sites):
            kind = SITES[point.site]
            if kind.width == "one":
                continue
            reason = f"is a vector ({kind.shape}), and no single number"
            hint = "name neurons: `mlp_hidden layer * neuron 5`; `observe norm` is of vectors"
            name, span = rule.site.span.written, rule.site.span
            work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
            return False
        return True

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return seen.vectors[:, 0]
