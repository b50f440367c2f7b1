"""Direct logit attribution: what components add to logits by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, Place, ResolvedRule, SiteTargets
from mechdsl.rules.observations.lenses import in_stream, unembeds
from mechdsl.rules.observations.registry import SiteObservation, observation

if TYPE_CHECKING:
    from torch import Tensor


@observation("direct_logit", unit="logit")
class DirectLogit(SiteObservation):
    """What a component adds to the logits that stand behind `toward`, by itself.

    Its output goes through the final norm, whose scale is held at that of the stream, and the
    unembedding. Embeddings (`resid_pre layer 0`), attention and MLPs of all layers add up to the
    logit, with the biases of the norm and the unembedding, which are in none of them.
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework; Wang et al. 2022,
        arXiv 2211.00593
    """

    gives = "logits"
    adds_up = True
    unplaced = "last token"
    takes = ("toward",)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.observed is not None
        there = unembeds(rule, work)
        if rule.observed.toward is None:
            reason, hint = "doesn't say which logit", "write `toward answer - wrong`"
            name = f"observe {self.word}"
            span = rule.observed.span
            work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
            there = False
        found = super().resolve(rule, work)
        if found is None or found.sites is None or not there:
            return None
        return replace(found, sites=_of_heads(found.sites))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        return in_stream(rule, _of_heads(sites), work, "mlp_hidden")

    def beside(self, rule: ResolvedRule, shape: ModelShape) -> tuple[Place, ...]:
        return (("resid_post", shape.n_layers - 1),)

    def logits(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        (stream,) = seen.beside.values()
        vectors = seen.vectors
        site, layer = seen.place
        if site == "mlp_hidden":
            assert seen.units is not None
            assert layer is not None
            vectors = seen.unembedding.neurons_out(layer, seen.units, vectors)
        return seen.unembedding.share(vectors, stream, seen.tokens)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.observed is not None
        said = (
            "direct logit attribution: what is added to the stream, through the final norm with "
            "its scale held at the stream's and its gain folded in, and the unembedding"
        )
        closing = (
            "biases of the final norm and of the unembedding are in no part; before any cap on "
            "logits"
        )
        yield Convention("observed", said, closing)
        if not rule.spec.observed.placed:
            yield Convention("observed at", "the last token, as no position is written")


def _of_heads(sites: SiteTargets) -> SiteTargets:
    """`layer * head *` means what heads add to the stream."""
    points = {
        key: tuple(replace(p, site="head_out") if p.site == "z" else p for p in here)
        for key, here in sites.points.items()
    }
    labels = {key: label.replace(".z", ".head_out") for key, label in sites.labels.items()}
    return replace(sites, points=points, labels=labels)
