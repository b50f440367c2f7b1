"""How a kind of rule is registered, and what most of them share.

Entries lie beside this file, one class each. Outside of the package, an entry is made by importing
a module with such a class before a file is checked (`tests/rules/gizmo_rule.py` is one). Its word
is a new one, that is then read as `WORD SITE at POSITIONS [to NUMBER | by NUMBER]`.
"""

from __future__ import annotations

from collections.abc import Callable

from mechdsl.base.registry import Registry
from mechdsl.program import spec
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.kinds import RuleKind
from mechdsl.resolve.pick_nothing import pick_nothing
from mechdsl.resolve.resolved_rule import (
    Apart,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
)
from mechdsl.resolve.site_targets import resolve_site, with_read_layers
from mechdsl.resolve.targets import rule_targets
from mechdsl.rules.checks import equally_long, even
from mechdsl.syntax.reserved import RESERVED, RULE_WORDS, SOFT_WORDS
from mechdsl.syntax.verbs import VERBS

HOW = "acts on what is there when the pass comes by, whatever other rules have done below"
"""What rules that change what is there say of it."""

RULES: Registry[RuleKind] = Registry("rule")


def rule_kind(words: str) -> Callable[[type[RuleKind]], type[RuleKind]]:
    """Register a kind of rule under its first words; ValueError for one that has another use."""
    if words in RESERVED and words not in (*RULE_WORDS, "observe"):
        raise ValueError(f"`{words}` is a word of the language")

    def register(entry: type[RuleKind]) -> type[RuleKind]:
        if issubclass(entry, Intervention) and not hasattr(entry, "name"):
            entry.name = words
        RULES.add(words, entry())
        if words not in SOFT_WORDS:  # the grammar has them
            VERBS.add(words, entry.takes)
        return entry

    return register


def places(
    rule: spec.Rule,
    run: str,
    work: Work,
    apart: Apart | None = None,
    *,
    exchanged: bool = False,
) -> tuple[SiteTargets | None, PositionTargets | None]:
    """Sites and positions that a rule writes at, and reads in `run`; None for what is wrong."""
    assert rule.site is not None
    sites, axes = resolve_site(rule.site, work.sites)
    if sites is not None and rule.into_layer is not None:
        sites, more = with_read_layers(sites, rule.into_layer, work.sites)
        axes = (*axes, *more)
    for axis in axes:
        work.add_axis(axis)
    return pick_nothing(sites, rule_targets(rule, run, work, apart, exchanged=exchanged))


class SiteRule(RuleKind, Intervention):
    """A kind that changes vectors at sites of the base run, by a number if it has one.

    One class says all: `takes`, `reads = "run"` if it makes something of what was there, `values`,
    and `unchanged` for the numbers that leave everything as it was.
    """

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        base = work.experiment.base
        sites, positions = places(rule, base, work)
        amounts = None if rule.fill is None else resolve_amounts(rule.fill, work)
        if sites is None or positions is None or (amounts is None and rule.fill is not None):
            return None
        if self.over_rows:
            even(rule, positions, work)
        equally_long(rule, sites, self, Apart(work.table, base), work)
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=sites, positions=positions, amounts=amounts
        )
