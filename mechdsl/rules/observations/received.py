"""`observe received pattern layer * at token *`: how much attention later tokens pay to a token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.pick_nothing import pick_nothing
from mechdsl.resolve.resolved_rule import Convention, EdgeTargets, PositionTargets, ResolvedRule
from mechdsl.resolve.site_targets import resolve_site
from mechdsl.resolve.targets import later_targets
from mechdsl.rules.observations.attention_weight import weight_of_keys
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.patterns import PatternObservation
from mechdsl.rules.observations.registry import observation
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor

LATER, OTHER = "later tokens", "other tokens"


@observation("received", unit="share of attention")
class Received(PatternObservation):
    """How much attention each later token pays to this one, on average.

    Over all tokens behind it, or, with `received(LOW..HIGH)`, those that lie LOW to HIGH tokens
    behind it (future attention influence). In models that see both sides over all other tokens, or
    those that lie so far away.
    returns: 0..1, averaged over these tokens, heads and layers that are joined; rows in which no
        token lies there aren't part of the cell
    source: Li et al. 2025, arXiv 2510.13554, section 3
    """

    takes: ClassVar = ("arguments",)

    def __init__(self, low: int = 1, high: int | None = None, *, causal: bool = True) -> None:
        self.low, self.high, self.causal = low, high, causal

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        fits = self.clauses_fit(rule, work)
        window = _window(rule, work)
        assert rule.site is not None
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            work.add_axis(axis)
        if window is None or not fits:
            return None
        causal = work.model.shape.causal
        sites, keys = pick_nothing(sites, later_targets(rule.at, *window, work, both=not causal))
        if sites is None or keys is None or not self.sites_fit(rule, sites, work):
            return None
        if not work.model.tokenizer.stands_in and not _one_each(rule, keys, work):
            return None
        label = LATER if causal else OTHER
        later = {key: replace(cell, label=label) for key, cell in keys.read.items()}
        return ResolvedRule(
            spec=rule,
            does=Received(*window, causal=causal),
            run=work.experiment.base,
            sites=sites,
            positions=replace(keys, written=later, read=later),
            edge=EdgeTargets(None, replace(keys, read=keys.written)),
        )

    def each(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        return weight_of_keys(seen)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.sites is not None
        behind = "all tokens behind it" if self.causal else "all other tokens"
        if (self.low, self.high) != (1, None):
            side = "behind it" if self.causal else "away from it, to either side"
            behind = f"the tokens that lie {self.low} to {self.high} {side}"
        said = f"received: the attention that a token gets, averaged over {behind}"
        points = [point for here in rule.sites.points.values() for point in here]
        if any(point.unit is None for point in points):
            said += " and all heads"
        if any(len(here) > 1 for here in rule.sites.points.values()):
            said += " and the joined sites"
        yield Convention("observed", said, "rows without such tokens aren't part of the cell")


def _window(rule: spec.Rule, work: Work) -> tuple[int, int | None] | None:
    """How far behind it tokens are looked at; None after E0207."""
    assert rule.observed is not None
    call = rule.observed.call
    if call is None:
        return 1, None
    if isinstance(work.model.tokenizer, ImageReader):
        reason = "counts tokens along a text, and images have rows and columns"
        refuse(rule, work, reason, "write `received` for all other tokens")
        return None
    one = call.arguments[0] if len(call.arguments) == 1 else None
    node = None if one is None or one.name is not None else one.value
    if isinstance(node, ast.Range):
        low, high = (constant(end, work.program.parameters) for end in (node.low, node.high))
        whole = [end for end in (low, high) if isinstance(end, int) and not isinstance(end, bool)]
        if len(whole) == 2 and 1 <= whole[0] <= whole[1]:
            return whole[0], whole[1]
    reason = "takes a range of distances in tokens, from 1 on"
    refuse(rule, work, reason, "write `received(1..8)`, or `received` for all later tokens")
    return None


def _one_each(rule: spec.Rule, keys: PositionTargets, work: Work) -> bool:
    """E0207 for several tokens at once, each of which has other tokens behind it."""
    hits = (hit for cell in keys.written.values() for hit in cell.hits)
    if all(sum(map(len, hit)) <= 1 for hit in hits):
        return True
    reason = "is of one token at a time"
    refuse(rule, work, reason, "sweep them: `at each SPAN token`, `at token *`")
    return False
