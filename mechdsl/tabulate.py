"""From measured values to a finished experiment: statistics, conventions, expectations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mechdsl import spec
from mechdsl.expectations.evaluate import evaluate
from mechdsl.results.conventions import statistics_conventions
from mechdsl.results.experiment import ExperimentResult
from mechdsl.results.statistics import cell_statistics
from mechdsl.vocab.effects import EFFECTS


def finish(
    result: ExperimentResult,
    experiment: spec.Experiment,
    seed: int,
    others: Mapping[str, ExperimentResult] | None = None,
) -> ExperimentResult:
    """The result with statistics, conventions and verdicts on its expectations.

    `others` are finished experiments that an expectation may name (`spearman(…, other)`).
    """
    result = replace(
        result,
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
        ids=result.row_ids,
    )
    result = replace(result, statistics=tuple(statistics))
    conventions = {**result.conventions, **statistics_conventions(result, EFFECTS)}
    outcomes = tuple(evaluate(each, result, others) for each in experiment.expects)
    return replace(result, conventions=conventions, outcomes=outcomes)
