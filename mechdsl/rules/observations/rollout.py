"""`observe rollout from cls token to each token of image`: attention through all layers."""

from __future__ import annotations

from collections.abc import Iterator

from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import OverRows
from mechdsl.resolve.resolved_rule import (
    Convention,
    EdgeTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.resolve.site_targets import missing_points
from mechdsl.resolve.targets import plain_targets
from mechdsl.rules.attention import sweeps
from mechdsl.rules.observations.over_rows import without_rules
from mechdsl.rules.observations.registry import Kind, observation


@observation("rollout", unit="share of attention")
class Rollout(OverRows, Kind):
    """What of a token is mixed into another by attention, through all layers.

    The product over layers of half the pattern, averaged over heads, and half the identity, which
    stands for the residual stream. Several tokens to which it leads are added up.
    returns: 0..1, averaged over the tokens that it is looked at from
    source: Abnar and Zuidema 2020, arXiv 2005.00928, section 3
    """

    leads = True

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.edge is not None
        assert rule.onto is not None
        alone = without_rules(rule, work, "reads no run in which rules act")
        shape = work.sites.shape
        points = layers_of(shape)
        missing = missing_points(points, shape, work.model.name, rule.span)
        if missing is not None:
            work.diagnostics.append(missing)
        both = sweeps(rule.at, work) and sweeps(rule.onto, work)
        queries = plain_targets(rule.at, work, "from_position" if both else "position")
        keys = plain_targets(rule.onto, work)
        if queries is None or keys is None or missing is not None or not alone:
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=work.experiment.base,
            sites=SiteTargets((), {(): points}, {(): "attention"}),
            positions=queries,
            edge=EdgeTargets(None, keys),
        )

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = (
            f"rollout: the product over {n_layers} layers of (pattern averaged over heads + "
            "identity) / 2, each query's weights adding up to 1; MLPs and norms aren't in it"
        )
        cells = rule.positions.written.values()
        if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
            said += "; averaged over the tokens that it is looked at from"
        yield Convention("observed", said)


def layers_of(shape: ModelShape) -> tuple[SitePoint, ...]:
    """The patterns of all layers, all heads of each."""
    return tuple(SitePoint("pattern", layer, None) for layer in range(shape.n_layers))
