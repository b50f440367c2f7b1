"""Observations of attention patterns: how wide a query looks, and how far back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved import ResolvedRule, SiteTargets
from mechdsl.rules.observations.registry import SiteObservation, every_point, observation

if TYPE_CHECKING:
    from torch import Tensor


class PatternObservation(SiteObservation):
    """A kind that looks at what queries attend to: `observe WORD pattern … at QUERIES`."""

    by_unit = True

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        assert rule.site is not None
        if all(point.site == "pattern" for point in every_point(sites)):
            return True
        reason, hint = "is no attention pattern", "write `pattern layer * head *`"
        name, span = rule.site.span.written, rule.site.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        return False


@observation("entropy", unit="nat")
class Entropy(PatternObservation):
    """The entropy of what the query attends to.

    returns: 0..ln(keys), nats; averaged over heads and queries that are joined
    """

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        weights = seen.vectors
        logs = weights.clamp_min(1e-38).log()
        return -(weights * logs).sum(-1)


@observation("distance", unit="token")
class Distance(PatternObservation):
    """How many tokens back the query attends, on average over its attention.

    returns: the sum of weight times (query - key), in tokens; averaged over heads and queries that
        are joined
    """

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        weights = seen.vectors
        keys = seen.positions.new_tensor(range(weights.shape[1]))
        return (weights * (seen.positions[:, None] - keys)).sum(-1)
