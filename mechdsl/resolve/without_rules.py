"""The base run as it is observed, for effects of observations: the same cells, without rules."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.program import spec
from mechdsl.resolve.observation import Observation
from mechdsl.resolve.resolved import ResolvedExperiment, ResolvedMeasure, WithoutRules
from mechdsl.vocab.effects import RAW


def looks(measure: ResolvedMeasure) -> bool:
    """Whether it reads what is observed."""
    return measure.observed or any(atom.form.takes == "observation" for atom in measure.atoms)


def without_rules(experiment: ResolvedExperiment) -> WithoutRules | None:
    """What effects of observed measures set the patched run against; None where there are none."""
    own = experiment.spec
    pairs = enumerate(zip(experiment.measures, own.measures, strict=True))
    numbers = tuple(n for n, (found, said) in pairs if looks(found) and said.effect != RAW.name)
    if not numbers:
        return None
    measures = tuple(
        each.model_copy(update={"effect": RAW.name, "over": None}) for each in own.measures
    )
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
    bare = replace(
        experiment,
        spec=changed,
        rules=tuple(rule for rule in experiment.rules if isinstance(rule.does, Observation)),
        accuracies={},
        saves=(),
        control_of=experiment.key,
    )
    return WithoutRules(bare, numbers)
