"""What an experiment that writes replies asks of its model, rules and measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import ResolvedRule


def in_steps(rule: ResolvedRule) -> ResolvedRule:
    """The rule with the steps in which it acts."""
    during = rule.spec.during
    if during is None:
        return rule
    return replace(rule, steps=(during.first, during.last), after_prefill=during.after_prefill)


def of_generation(rules: Sequence[ResolvedRule | None], work: Work) -> Iterator[Diagnostic]:
    """What can't be done while a reply is written."""
    if work.experiment.generation is None:
        return
    yield from ()
