"""Ratios over something that may be 0: refused by the unpatched runs, before a cell is run."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.results.planned_units import sampling_of
from mechdsl.statistics.cell_statistics import check_denominator
from mechdsl.vocab.effects import EFFECTS


def check_denominators(measured: MeasuredValues) -> dict[int, Diagnostic]:
    """By number, the measures whose ratio would be taken over something that may be 0: E0604."""
    experiment = measured.experiment
    found: dict[int, Diagnostic] = {}
    for number, measure in enumerate(experiment.spec.measures):
        effect = EFFECTS[measure.effect]
        source = experiment.spec.source
        if effect.denominator is None or experiment.measures[number].kind == "category":
            continue
        base = measured.unpatched[experiment.spec.base][number]
        other = measured.unpatched[source][number] if source is not None else None
        if effect.needs_source and other is None:
            continue
        if experiment.spec.variant:  # which one of them
            effect = replace(effect, divisor=f"{effect.divisor} of {experiment.key}")
        problems = check_denominator(
            base,
            other,
            sampling_of(experiment, measured.kept),
            measure.span,
            effect=effect,
        )
        if problems:
            found[number] = problems[0]
    return found
