"""Rules that change what is there: `add`, `scale`, `project out`, `clamp`, `set … to DIRECTION`.

They act when the pass comes by, as a hook does: on what the rules before them in the file, and at
sites below, have left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, ClassVar

from mechdsl.diagnostics.e03_directions import BadDirection
from mechdsl.program import spec
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.directions import direction_targets
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Amounts,
    Convention,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
    Vectors,
)
from mechdsl.resolve.targets import rule_targets
from mechdsl.rules.kind import HOW, RuleKind, places, rule_kind
from mechdsl.rules.readings import ADDED_VALUE, resolve_reading
from mechdsl.rules.steps import resolve_step
from mechdsl.rules.weights import weight_sites
from mechdsl.vocab.sites import SITES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Steering(Intervention):
    """Changes the current vector of the patched run."""

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run

    def detail(self, rule: ResolvedRule) -> str | None:
        said = [part.span.written for part in (rule.spec.fill, rule.spec.direction) if part]
        return " * ".join(said)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("steering", f"`{self.name}` {HOW}")


class DirectionRule(RuleKind, Steering):
    """A rule with a direction."""

    amount: ClassVar[float] = 0.0
    """Its number, where none is written."""

    def where(
        self, rule: spec.Rule, work: Work
    ) -> tuple[SiteTargets | None, PositionTargets | None]:
        """Its sites and positions; None for what is wrong."""
        return places(rule, work.experiment.base, work)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        base = work.experiment.base
        sites, positions = self.where(rule, work)
        amounts: Amounts | None = Amounts((), {(): self.amount})
        if rule.fill is not None:
            amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or amounts is None:
            return None
        direction = direction_targets(rule, sites, positions, work)
        if direction is None:
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=base,
            sites=sites,
            positions=positions,
            amounts=amounts,
            direction=direction,
        )


def times(vectors: Vectors) -> Tensor:
    """[K, width]: the direction as it is, times the rule's number."""
    return vectors.direction() * vectors.amounts[:, None]


def unit(vectors: Vectors) -> Tensor:
    """[K, width]: the direction, of length 1; 0 stays 0 and changes nothing."""
    direction = vectors.direction()
    length = direction.norm(dim=1, keepdim=True)
    return direction / length.where(length > 0, length + 1)


@rule_kind("add")
class AddRule(DirectionRule):
    """`add NUMBER * DIRECTION to SITE at POSITIONS` (Turner et al. 2023, arXiv 2308.10248)."""

    mode = "add"
    amount = 1.0

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        if rule.reading is not None:
            return resolve_reading(rule, ADDED_VALUE, work)
        if rule.stepped is not None:
            return resolve_step(rule, work)
        return super().resolve(rule, work)

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 0

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return times(vectors)


class SetToDirection(DirectionRule):
    """`set SITE at POSITIONS to NUMBER * DIRECTION`."""

    name = "direction"
    amount = 1.0

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from ()

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return times(vectors)


SET_TO_DIRECTION = SetToDirection()


@rule_kind("scale")
class ScaleRule(RuleKind, Steering):
    """`scale SITE at POSITIONS by NUMBER`."""

    takes = "by"
    mode = "scale"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        sites, positions = places(rule, work.experiment.base, work)
        amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or amounts is None:
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=work.experiment.base,
            sites=sites,
            positions=positions,
            amounts=amounts,
        )

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 1

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return vectors.amounts[:, None]


@rule_kind("project out")
class ProjectOutRule(DirectionRule):
    """`project out DIRECTION from SITE at POSITIONS`: x − (x · u) u, u of length 1 (Arditi et al.
    2024, arXiv 2406.11717)."""

    mode = "along"

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return unit(vectors)


@rule_kind("project out of weights")
class ProjectOutOfWeights(DirectionRule):
    """`project out DIRECTION from weights`: nothing that is added to the residual stream has a
    component along it, as if embeddings and output projections had none (Arditi et al. 2024, arXiv
    2406.11717, section 4.1)."""

    name = "project out"
    mode = "along"
    drawn_positions = False

    def where(
        self, rule: spec.Rule, work: Work
    ) -> tuple[SiteTargets | None, PositionTargets | None]:
        return weight_sites(rule, work), rule_targets(rule, work.experiment.base, work)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "weights",
            "the direction is taken out of embeddings, position embeddings included, and of what "
            "every attention and MLP adds, at all tokens: as if their weights couldn't write it",
        )

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return unit(vectors)


class ClampNumber(Intervention):
    """`clamp mlp_hidden layer 2 neuron 5 at POSITIONS to 5`."""

    name = "clamp"

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return vectors.amounts[:, None].expand(-1, vectors.width)


CLAMP_NUMBER = ClampNumber()


@rule_kind("clamp")
class ClampRule(DirectionRule):
    """`clamp DIRECTION of SITE at POSITIONS to NUMBER`: the component along it, measured in units
    of the activation; `clamp NEURON at POSITIONS to NUMBER`."""

    takes = "to"
    mode = "along"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        if rule.direction is not None:
            return super().resolve(rule, work)
        sites, positions = places(rule, work.experiment.base, work)
        amounts = resolve_amounts(rule.fill, work)
        if sites is None or positions is None or amounts is None or _wide(rule, sites, work):
            return None
        return ResolvedRule(
            spec=rule,
            does=CLAMP_NUMBER,
            run=work.experiment.base,
            sites=sites,
            positions=positions,
            amounts=amounts,
        )

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return unit(vectors)


def _wide(rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
    """E0341 where a site has vectors, which one number is not."""
    named = {point.site for points in sites.points.values() for point in points}
    wide = sorted(site for site in named if SITES[site].width != "one")
    if wide and rule.fill is not None:
        work.diagnostics.append(
            BadDirection(
                span=rule.fill.span,
                text=rule.fill.span.written,
                reason=f"`{wide[0]}` has vectors, and one number doesn't say which",
                hint=f"clamp a neuron, or a component: `clamp DIRECTION of {wide[0]} …`",
            )
        )
    return bool(wide)
