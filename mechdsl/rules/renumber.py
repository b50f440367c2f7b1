"""`renumber POSITIONS from NUMBER`: tokens get other position ids.

What is embedded stays; learned positions and rotations are those of the numbers (PINE, Wang et al.
2024, arXiv 2407.01100).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.models.adapters import adds_positions
from mechdsl.models.shape import ModelShape
from mechdsl.program import spec
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import (
    Amounts,
    Convention,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.resolve.targets import plain_targets
from mechdsl.rules.kind import RuleKind, rule_kind


@rule_kind("renumber")
class RenumberRule(RuleKind, Intervention):
    """These tokens count on from a number, in their order in the text."""

    changes = "positions"
    whole = True
    drawn_positions = False

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        assert rule.fill is not None
        positions = plain_targets(rule.at, work)
        amounts = resolve_amounts(rule.fill, work)
        if positions is None or amounts is None or not _possible(rule, positions, amounts, work):
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=work.experiment.base,
            sites=SiteTargets((), {(): (SitePoint("embed", None, None),)}, {(): "position ids"}),
            positions=positions,
            amounts=amounts,
        )

    def detail(self, rule: ResolvedRule) -> str | None:
        return f"from {super().detail(rule)}"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "position ids",
            "these tokens count on from the number, in their order (a prompt's first is 0); all "
            "others keep theirs, and what a token sees goes by its place as before",
        )
        yield Convention("passes", "rows of `renumber` are whole passes")


def last_position(shape: ModelShape) -> int | None:
    """How many positions there are; where rotations change beyond some, only those before."""
    known = [shape.max_positions]
    for part in (
        shape.config,
        shape.config.get("rope_scaling"),
        shape.config.get("rope_parameters"),
    ):
        own = part.get("original_max_position_embeddings") if isinstance(part, Mapping) else None
        known.append(own if isinstance(own, int) else None)
    return min((each for each in known if each is not None), default=None)


def _possible(rule: spec.Rule, positions: PositionTargets, amounts: Amounts, work: Work) -> bool:
    """E0108, E0207 for models and numbers for which there are no such positions."""
    shape = work.sites.shape
    if not shape.stands_in:
        how = ""
        if adds_positions(shape.family, shape.config):
            how = "that adds positions to scores"
        elif shape.takes != "text":
            how = "that takes more than a text"
        if how:
            what = f"`renumber` in a model {how}"
            work.diagnostics.append(NotSupported(span=rule.span, what=what))
            return False
    assert rule.fill is not None
    hits = [row for cell in positions.written.values() for rows in cell.hits for row in rows]
    longest = 1 if work.model.tokenizer.stands_in else max(map(len, hits), default=1)
    most = last_position(shape)
    for amount in amounts.values.values():
        reason = ""
        if amount < 0 or amount != int(amount):
            reason = f"must be a position, a whole number from 0, not {amount:g}"
        elif most is not None and amount + longest > most:
            reason = (
                f"counts {longest} tokens from {amount:g} on, and the last position is {most - 1}"
            )
        if reason:
            work.diagnostics.append(
                BadArgument(
                    span=rule.fill.span,
                    name="from",
                    reason=reason,
                    hint="name the position of the first token: `renumber subject tokens from 5`",
                )
            )
            return False
    return True
