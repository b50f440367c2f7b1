"""Rules that write what a run has: `patch`, `swap`, `freeze`."""

from __future__ import annotations

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import Apart, Intervention, ResolvedRule
from mechdsl.rules.checks import equally_long
from mechdsl.rules.kind import RuleKind, places, rule_kind


class CopyingRule(RuleKind, Intervention):
    """Vectors of one run are written into another, as they are."""

    name = "source"
    reads = "run"
    copies = True
    exchanged = False
    """Whether two positions are written, each with what is read at the other."""

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        run = rule.source or work.experiment.base
        sites, positions = places(rule, run, work, exchanged=self.exchanged)
        if sites is None or positions is None:
            return None
        equally_long(rule, sites, self, Apart(work.table, run), work)
        return ResolvedRule(spec=rule, does=self, run=run, sites=sites, positions=positions)

    def detail(self, rule: ResolvedRule) -> str | None:
        return None


@rule_kind("patch")
class PatchRule(CopyingRule):
    """`patch SITE at POSITIONS onto POSITIONS into layer L with RUN`: another run's vectors."""


@rule_kind("swap")
class SwapRule(CopyingRule):
    """`swap SITE at POSITIONS with POSITIONS`: the base run's vectors at two places, exchanged."""

    exchanged = True
    drawn_positions = False


@rule_kind("freeze")
class FreezeRule(CopyingRule):
    """`freeze SITE at POSITIONS`: the base run's vectors, whatever other rules do before."""
