"""The base run where effects are set against what it is there, and not against what it is by
itself: as it is observed in the same cells, and behind the same replies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mechdsl.program import spec
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.replies import in_reply, looks, reads_reply
from mechdsl.resolve.resolved import ResolvedExperiment, WithoutRules
from mechdsl.vocab.effects import RAW


def without_rules(experiment: ResolvedExperiment) -> WithoutRules | None:
    """What effects of measures that are observed, or read in replies, set the patched run against;
    None where there are none."""
    own = experiment.spec
    if reads_reply(experiment):
        return _behind_replies(experiment)
    pairs = enumerate(zip(experiment.measures, own.measures, strict=True))
    numbers = tuple(n for n, (found, said) in pairs if looks(found) and said.effect != RAW.name)
    if not numbers:
        return None
    rules = (rule for rule in experiment.rules if isinstance(rule.does, Observation))
    changed = _read_only(experiment)
    changed = replace(changed, spec=changed.spec.model_copy(update={"generation": None}))
    return WithoutRules(replace(changed, rules=tuple(rules)), numbers)


def _behind_replies(experiment: ResolvedExperiment) -> WithoutRules | None:
    """The same rows, with the replies that their rules make, read without these."""
    looking = any(map(in_reply, experiment.rules))
    numbers = tuple(
        n
        for n, each in enumerate(experiment.measures)
        if each.in_reply is not None or (looking and looks(each))
    )
    if all(isinstance(rule.does, Observation) for rule in experiment.rules) or not numbers:
        return None
    return WithoutRules(replace(_read_only(experiment), as_base=True), numbers)


def _read_only(experiment: ResolvedExperiment) -> ResolvedExperiment:
    """The experiment as one that is set beside another, and shown nowhere."""
    own = experiment.spec
    measures = tuple(_raw(own.measures))
    changed = own.model_copy(
        update={
            "name": f"{own.name} without rules",
            "source": None,
            "measures": measures,
            "against": None,
            "reports": (spec.Report(span=own.span, kind="table"),),
            "expects": (),
        }
    )
    return replace(experiment, spec=changed, accuracies={}, saves=(), control_of=experiment.key)


def _raw(measures: Iterable[spec.Measure]) -> Iterable[spec.Measure]:
    return (each.model_copy(update={"effect": RAW.name, "over": None}) for each in measures)
