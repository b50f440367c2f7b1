"""The logit lens: vectors of any layer, read as the last layer's are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SiteTargets
from mechdsl.rules.observations.registry import SiteObservation, every_point, joined, observation
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from torch import Tensor


STREAM = (
    *("resid_pre", "resid_mid", "resid_post"),
    *("attn_out", "mlp_out", "mixer_out", "head_out"),
)
"""What is in the residual stream, or is added to it as it is."""


def unembeds(rule: spec.Rule, work: Work) -> bool:
    """E0108 for a model without an unembedding behind its stream."""
    shape = work.sites.shape
    if shape.stands_in or (shape.task == "tokens" and shape.causal and shape.takes == "text"):
        return True
    assert rule.observed is not None
    what = (
        f"`observe {rule.observed.word}` of `{work.model.name}`, which doesn't predict next tokens,"
    )
    work.diagnostics.append(NotSupported(span=rule.observed.span, what=what))
    return False


def in_stream(rule: spec.Rule, sites: SiteTargets, work: Work, *also: str) -> bool:
    """E0207 for sites whose vectors aren't of the residual stream."""
    assert rule.site is not None
    assert rule.observed is not None
    for point in every_point(sites):
        kind = SITES[point.site]
        if point.site in also:
            continue
        if point.site not in STREAM:
            reason = f"is not in the residual stream, and isn't added to it ({kind.shape})"
            hint = "name `resid_post`, `attn_out`, `mlp_out` or `head_out`"
        elif kind.unit is not None and point.unit is None:
            reason = "stands for all of them together"
            hint = f"name one: `{point.site} layer * {kind.axes[-1]} *`"
        else:
            continue
        span = rule.site.span
        found = BadArgument(span=span, name=span.written, reason=reason, hint=hint)
        work.diagnostics.append(found)
        return False
    return True


@observation("logit_lens", unit="probability")
class LogitLens(SiteObservation):
    """The probability of the lens' most likely token.

    The vector goes through the model's own final norm and unembedding, as if its layer were the
    last one. Measures of the experiment read what comes out in place of the model's output.
    source: nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong)
    """

    gives = "logits"
    read_by_measures = True
    takes = ("top",)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        there = unembeds(rule, work)
        found = super().resolve(rule, work)
        return found if there else None

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        return in_stream(rule, sites, work)

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: Work) -> bool:
        assert found.sites is not None
        several = next(joined(found.sites, found.positions), None)
        if several is None:
            return True
        assert rule.observed is not None
        reason, hint = f"reads one vector at a time, not {several}", "sweep them: `layer *`"
        name = f"observe {self.word}"
        span = rule.observed.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        return False

    def lists(self, rule: ResolvedRule) -> int:
        return 0 if rule.spec.observed is None else rule.spec.observed.top or 0

    def logits(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return seen.unembedding.logits(seen.vectors, seen.tokens)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = "the vector through the model's own final norm and unembedding"
        assert rule.sites is not None
        sites = {point.site for point in every_point(rule.sites)}
        if sites - {"resid_pre", "resid_mid", "resid_post"}:
            said += "; the norm has the scale of this vector alone, not that of the stream"
        yield Convention("observed", f"logit lens: {said}; measures read that")
        yield from self.said_of_list(rule)

    def said_of_list(self, rule: ResolvedRule) -> Iterator[Convention]:
        """How a list of tokens is made."""
        if self.lists(rule):
            said = (
                "those of the largest mean probability over rows, which stands behind each; in "
                "brackets the share of rows in which it is the most likely one"
            )
            yield Convention("top tokens", said)
