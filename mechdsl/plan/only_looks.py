"""Panels whose experiments only look: their rows need no unpatched run beside them."""

from __future__ import annotations

from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Panel


def only_looks(panel: Panel) -> bool:
    """Whether all that is wanted is seen in rows to which nothing is done: they are whole passes
    then, one for each prompt. Runs with rules read others beside them."""
    return not panel.derived and all(map(_looks, panel.experiments))


def _looks(plan: ExperimentPlan) -> bool:
    experiment = plan.experiment
    if plan.observes is None or len(plan.rules) > 1 or experiment.keep or experiment.accuracies:
        return False
    atoms = [(measure, atom) for measure in experiment.measures for atom in measure.atoms]
    return all(
        (measure.observed or atom.form.takes == "observation")
        and atom.run is None
        and atom.point is None
        for measure, atom in atoms
    )
