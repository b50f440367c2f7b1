"""From measured values to a finished experiment: statistics, conventions, expectations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.program import spec
from mechdsl.results.collect import why
from mechdsl.results.decide_expectations import evaluate_all
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult, LostExperiment
from mechdsl.results.statistics_conventions import statistics_conventions
from mechdsl.statistics.cell_statistics import cell_statistics
from mechdsl.statistics.measure_data import NullBand
from mechdsl.statistics.null_bands import null_bands
from mechdsl.vocab.effects import EFFECTS


def with_statistics(
    result: ExperimentResult, experiment: spec.Experiment, seed: int
) -> ExperimentResult:
    """The result with means, intervals and p, and how they came about among its conventions."""
    measures = tuple(
        data
        if EFFECTS[data.effect].of_intervention
        else replace(data, inert=np.zeros_like(data.inert))
        for data in result.measures
    )
    result = replace(
        result,
        measures=measures,
        settings=experiment.statistics,
        seed=seed,
        reports=result.reports or experiment.reports,
    )
    statistics = cell_statistics(
        result.measures,
        experiment.statistics,
        seed,
        result.groups,
        effects=EFFECTS,
        ids=result.sampling.keys,
        strata=result.strata,
        blocks=result.blocks,
        picked=bool(result.selected),
    )
    result = replace(result, statistics=tuple(statistics))
    result = replace(result, controls=_bands(result), drawn=None)
    conventions = {
        **result.conventions,
        **statistics_conventions(result, EFFECTS),
        **_verdict_words(experiment),
    }
    return replace(result, conventions=conventions)


def _verdict_words(experiment: spec.Experiment) -> dict[str, str]:
    """At which level several `expect` lines are decided."""
    count = sum(not each.on_mean for each in experiment.expects)
    if count < 2:
        return {}
    if experiment.statistics.verdicts == "holm":
        return {"verdicts": f"{count} `expect` lines share the level of one, by Holm's correction"}
    return {
        "verdicts": f"each of {count} `expect` lines at a level of its own; with `stats verdicts "
        "holm` they share one"
    }


def _bands(result: ExperimentResult) -> tuple[NullBand | None, ...]:
    """The null band of every measure; empty where no targets were drawn."""
    if result.drawn is None or result.settings is None:
        return ()
    return null_bands(
        result.measures,
        result.drawn,
        means=[each.mean for each in result.statistics],
        confidence=result.settings.confidence,
        effects=EFFECTS,
    )


def with_verdicts(
    result: ExperimentResult,
    experiment: spec.Experiment,
    others: Mapping[str, ExperimentResult] | None = None,
    lost: Collection[str] = (),
) -> ExperimentResult:
    """The result with verdicts on its expectations.

    `others` are experiments with statistics, which an expectation may name
    (`spearman(recovery, other)`); `lost` those that could not be computed.
    """
    outcomes = tuple(evaluate_all(experiment.expects, result, others, lost))
    return replace(result, outcomes=outcomes)


def lost_experiment(experiment: spec.Experiment, reasons: Sequence[Diagnostic]) -> LostExperiment:
    """An experiment that could not be computed: its expectations fail."""
    said = f"`{experiment.name}` could not be computed"
    outcomes = [
        ExpectOutcome(each.text, False, None, None, None, said, line=each.span.line, computed=False)
        for each in experiment.expects
    ]
    return LostExperiment(experiment.name, tuple(map(why, reasons)), tuple(outcomes))
