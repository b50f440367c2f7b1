"""Observations of single vectors: norm, neuron value, logit lens, direct logit attribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.resolve.observations import ObservedVectors
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import Convention, ResolvedRule, SiteLayer, SiteTargets
from mechdsl.rules.observations.registry import (
    SiteObservation,
    check_unembedding,
    describe_joined,
    iter_points,
    observation,
)
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    from torch import Tensor


@observation("norm", unit="activation")
class Norm(SiteObservation):
    """The length of the vector (L2).

    returns: at least 0, in the unit of the activation
    """

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return seen.vectors.norm(dim=-1)


@observation("value", unit="activation")
class NeuronValue(SiteObservation):
    """The activation of one neuron, or one coordinate of a vector in a basis.

    returns: any number; averaged over neurons or coordinates that are joined
    """

    by_unit: ClassVar[bool] = True
    of_coordinates = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        assert rule.observed is not None
        if resolved is None or rule.observed.basis is None:
            return resolved
        return replace(resolved, does=COORDINATE_VALUE)

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        assert rule.site is not None
        assert rule.observed is not None
        if rule.observed.basis is not None:
            return True
        for point in iter_points(sites):
            kind = SITES[point.site]
            if kind.width == "one":
                continue
            reason = f"is a vector ({kind.shape}), not a single number"
            hint = "name neurons: `mlp_hidden layer * neuron 5`; `observe norm` needs vectors"
            name, span = rule.site.span.written, rule.site.span
            work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
            return False
        return True

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return seen.vectors[:, 0]


class CoordinateValue(NeuronValue):
    """One coordinate of a vector in a basis."""

    by_unit = False

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.basis is not None
        assert rule.sites is not None
        over = list(describe_joined(rule.sites, rule.positions))
        if any(len(coordinate.which) != 1 for coordinate in rule.basis.coordinates.values()):
            over.insert(0, "the joined coordinates")
        averaged = f", averaged over {' and '.join(over)}" if over else ""
        which = "the number" if rule.basis.definition == ast.STANDARD_BASIS else "the coordinate"
        yield Convention("observed", f"value: {which} of the current vector{averaged}")


COORDINATE_VALUE = CoordinateValue()


STREAM_SITES = (
    *("resid_pre", "resid_mid", "resid_post"),
    *("attn_out", "mlp_out", "mixer_out", "head_out"),
)
"""Sites that are in the residual stream, or are added to it unchanged."""


def check_stream_sites(
    rule: spec.Rule, sites: SiteTargets, work: ExperimentContext, *also: str
) -> bool:
    """Report E0207 for sites whose vectors aren't in the residual stream."""
    assert rule.site is not None
    assert rule.observed is not None
    for point in iter_points(sites):
        kind = SITES[point.site]
        if point.site in also:
            continue
        if kind.stack == "vision":
            reason = "is in the vision encoder, not in the residual stream of the language model"
            hint = "name `resid_post layer *`, at the tokens of the image"
        elif kind.stack == "encoder":
            reason = "is in the encoder, but the unembedding reads only the decoder"
            hint = "write `resid_post layer * at last token`, which is in the decoder"
        elif kind.component not in STREAM_SITES:
            reason = f"is not in the residual stream, and isn't added to it ({kind.shape})"
            hint = "name `resid_post`, `attn_out`, `mlp_out` or `head_out`"
        elif kind.unit is not None and point.unit is None:
            reason = "includes all of them"
            hint = f"name one: `{point.site} layer * {kind.axes[-1]} *`"
        else:
            continue
        span = rule.site.span
        problem = BadArgument(span=span, name=span.written, reason=reason, hint=hint)
        work.diagnostics.append(problem)
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

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        there = check_unembedding(rule, work, decoders=True)
        resolved = super().resolve(rule, work)
        return resolved if there else None

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        return check_stream_sites(rule, sites, work)

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        assert found.sites is not None
        several = next(describe_joined(found.sites, found.positions), None)
        if several is None:
            return True
        assert rule.observed is not None
        reason = f"reads one vector at a time, not {several}"
        swept = "`each token of SPAN`, `token *`" if "tokens" in several else "`layer *`"
        hint = f"sweep them: {swept}"
        name = f"observe {self.word}"
        span = rule.observed.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        return False

    def lists(self, rule: ResolvedRule) -> int:
        return 0 if rule.spec.observed is None else rule.spec.observed.top or 0

    def logits(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return seen.unembedding.logits(seen.vectors, seen.tokens)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = "the vector through the model's final norm, if it has one, and its unembedding"
        assert rule.sites is not None
        sites = {point.site for point in iter_points(rule.sites)}
        if sites - {"resid_pre", "resid_mid", "resid_post"}:
            said += "; the norm uses the scale of this vector, not that of the stream"
        yield Convention("observed", f"logit lens: {said}; measures read that")
        yield from self.said_of_list(rule)

    def said_of_list(self, rule: ResolvedRule) -> Iterator[Convention]:
        """Yield the note on how a list of tokens is computed."""
        if self.lists(rule):
            said = (
                "those with the largest mean probability over rows, given after each token; "
                "in brackets the share of rows in which it is the most likely token"
            )
            yield Convention("top tokens", said)


@observation("direct_logit", unit="logit")
class DirectLogit(SiteObservation):
    """What a component adds to the logits of `toward`, by itself.

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

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        there = check_unembedding(rule, work)
        if rule.observed.toward is None:
            reason, hint = "doesn't name a logit", "write `toward answer - wrong`"
            name = f"observe {self.word}"
            span = rule.observed.span
            work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
            there = False
        resolved = super().resolve(rule, work)
        if resolved is None or resolved.sites is None or not there:
            return None
        return replace(resolved, sites=_use_head_outputs(resolved.sites))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        return check_stream_sites(rule, _use_head_outputs(sites), work, "mlp_hidden")

    def further_sites(self, rule: ResolvedRule, shape: ModelShape) -> tuple[SiteLayer, ...]:
        return (("resid_post", shape.n_layers - 1),)

    def logits(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        (stream,) = seen.further_vectors.values()
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
            "direct logit attribution: the contribution to the stream, through the final "
            "norm (its scale fixed at the stream's, its gain folded in) and the unembedding"
        )
        closing = (
            "biases of the final norm and of the unembedding are excluded; before any cap on logits"
        )
        yield Convention("observed", said, closing)
        if not rule.spec.observed.placed:
            yield Convention("observed at", "the last token, because the line names no position")


def _use_head_outputs(sites: SiteTargets) -> SiteTargets:
    """Replace `z` by `head_out`: here, heads are observed by what they add to the stream."""
    points = {
        key: tuple(replace(p, site="head_out") if p.site == "z" else p for p in here)
        for key, here in sites.points.items()
    }
    labels = {key: label.replace(".z", ".head_out") for key, label in sites.labels.items()}
    return replace(sites, points=points, labels=labels)
