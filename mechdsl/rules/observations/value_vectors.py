"""`observe value_vectors layer 3 neuron * toward answer - wrong`: what neurons say of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SiteTargets
from mechdsl.rules.observations.lenses import unembeds
from mechdsl.rules.observations.registry import observation
from mechdsl.rules.observations.weights import OfWeights, one_each


@observation("value_vectors", unit="logit")
class ValueVectors(OfWeights):
    """What a neuron of activation 1 adds to the logit of the token that it raises most.

    Its output weights go through the final norm's gain and the unembedding, and through nothing
    else: not the norm's scale, no bias. `toward answer - wrong` reads these tokens of each row.
    source: Geva et al. 2022, arXiv 2203.14680
    """

    takes: ClassVar = ("toward", "top")
    folded: ClassVar = (
        "the output weights through the final norm's gain and the unembedding, without the norm's "
        "scale and without biases; a neuron whose activation is negative does the opposite"
    )

    def __init__(self, top: int = 0) -> None:
        """top: how many tokens are listed."""
        self.top = top

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        there, said = unembeds(rule, work), rule.observed
        found = super().resolve(rule, work)
        if found is None or not there:
            return None
        assert said is not None
        kind = ValueVectors if said.toward is None else TowardTokens
        return replace(found, does=kind(said.top or 0))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        hint = "write `layer * neuron *`"
        return one_each(rule, sites, work, "mlp_hidden", "neuron", hint)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        if self.top:
            yield Convention("top tokens", "those whose logits the neuron raises most")


class TowardTokens(ValueVectors):
    """What it adds to the logits that stand behind `toward`, which are those of each row."""

    gives: ClassVar[Literal["number", "logits"]] = "logits"
    spread: Literal["rows", "unknown", "none"] = "rows"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = "what a neuron of activation 1 adds to the logits that are named"
        yield Convention("observed", f"{self.word}: {said}; {self.folded}")
        if self.top:
            yield Convention("top tokens", "those whose logits the neuron raises most")
