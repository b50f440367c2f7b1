"""What a statement that intervenes has to say of itself; its entries are in `mechdsl.rules`."""

from __future__ import annotations

from typing import ClassVar, Literal

from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved_rule import ResolvedRule


class RuleKind:
    """A kind of rule: what its first words mean."""

    takes: ClassVar[Literal["", "to", "by"]] = ""
    """The word before its number, of kinds that the grammar reads as `WORD SITE at POSITIONS`."""
    once: ClassVar[bool] = False
    """An experiment has one of them at most …"""
    once_because: ClassVar[str] = ""
    """… and why, or what to write instead."""
    within_prompt: ClassVar[str] = ""
    """Why it can't act on the tokens of an answer, behind the prompt; empty where it can."""

    reads_replies: ClassVar[bool] = False
    """Whether it can look at tokens of a reply."""

    def observes(self, rule: spec.Rule) -> Observation | None:
        """What it looks at, where it is measured by that; None for rules that act."""
        return None

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        """The rule with its targets; its sweeps become axes of the experiment.

        None after an error, which is in `work.diagnostics`; what else can be found wrong with the
        rule is found in any case.
        """
        raise NotImplementedError
