"""`add NUMBER * step(q) to SITE at POSITIONS`: how far a vector is from the one before it.

Momentum attention adds such steps to queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mechdsl.diagnostics.e03_directions import BadDirection
from mechdsl.program import spec
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Amounts,
    Convention,
    Intervention,
    ResolvedRule,
    SiteTargets,
    Vectors,
)
from mechdsl.rules.kind import places
from mechdsl.vocab.sites import NO_STEPS, SITES, unknown_component

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class AddedStep(Intervention):
    """Adds what is there minus what is there one position before, both in the patched run."""

    name = "add step"
    mode = "step"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.stepped is not None
        yield Convention(
            "step",
            f"`step({rule.spec.stepped.id})` is the vector that is there when the pass comes by, "
            "minus that of the position before, as both are before this rule writes; at the first "
            "position it is 0",
        )

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 0

    def values(self, rule: ResolvedRule, vectors: Vectors) -> Tensor:
        return vectors.amounts[:, None]


ADDED_STEP = AddedStep()


def resolve_step(rule: spec.Rule, work: Work) -> ResolvedRule | None:
    """None after E0203 for a component that there isn't, E0341 for another than is written."""
    base = work.experiment.base
    sites, positions = places(rule, base, work)
    amounts: Amounts | None = Amounts((), {(): 1.0})
    if rule.fill is not None:
        amounts = resolve_amounts(rule.fill, work)
    if sites is None or positions is None or amounts is None or not _itself(rule, sites, work):
        return None
    return ResolvedRule(
        spec=rule, does=ADDED_STEP, run=base, sites=sites, positions=positions, amounts=amounts
    )


def _itself(rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
    """Whether what is written is a step of its own component."""
    assert rule.stepped is not None
    name, span = rule.stepped.id, rule.stepped.span
    if name not in SITES:
        work.diagnostics.append(unknown_component(name, span))
        return False
    there = sorted({point.site for points in sites.points.values() for point in points})
    written = next((site for site in there if site != name), None)
    if written is not None:
        reason = f"what is written is `{written}`, and steps are those of what is written"
        hint = f"write `step({written})`"
    elif name in NO_STEPS and there:
        reason = f"no steps are taken of `{name}`"
        can = (s for s in SITES if s in work.sites.shape.sites and s not in NO_STEPS)
        own = ", ".join(f"`{site}`" for site in can)
        hint = f"steps can be taken of {own}"
    else:
        return True
    work.diagnostics.append(BadDirection(span=span, text=f"step({name})", reason=reason, hint=hint))
    return False
