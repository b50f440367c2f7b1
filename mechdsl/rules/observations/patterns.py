"""Observations of attention patterns: how wide a query looks, and how far back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SiteTargets
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

    `distance(W)` counts keys that are further back than W as W tokens back.
    returns: the sum of weight times min(query - key, W), in tokens; averaged over heads and queries
        that are joined
    """

    takes: ClassVar = ("arguments",)

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        assert rule.observed is not None
        call = rule.observed.call
        if call is None:
            return found
        one = call.arguments[0] if len(call.arguments) == 1 else None
        node = None if one is None or one.name is not None else one.value
        window = constant(node, work.program.parameters)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            reason, hint = "takes one whole number of tokens, above 0", "write `distance(8)`"
            name = "observe distance"
            problem = BadArgument(span=call.span, name=name, reason=reason, hint=hint)
            work.diagnostics.append(problem)
            return None
        return None if found is None else replace(found, does=Distance(window))

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        weights = seen.vectors
        keys = seen.positions.new_tensor(range(weights.shape[1]))
        back = seen.positions[:, None] - keys  # below 0 where there is no weight, in causal models
        if self.window is not None:
            back = back.clamp(-self.window, self.window)
        return (weights * back).sum(-1)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        if self.window is not None:
            said = f"keys further back than {self.window} tokens count as {self.window} tokens back"
            yield Convention("window", said)
