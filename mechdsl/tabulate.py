"""From measured values to a finished experiment: statistics, conventions, expectations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mechdsl import spec
from mechdsl.expectations.evaluate import evaluate
from mechdsl.results.experiment import ExperimentResult
from mechdsl.results.flips import CORRECTIONS
from mechdsl.results.statistics import cell_statistics
from mechdsl.vocab.effects import EFFECTS


def statistics_conventions(result: ExperimentResult) -> dict[str, str]:
    """How means, intervals and p came about, in words, for the block under every table."""
    settings = result.settings
    if settings is None or not result.statistics:
        return {}
    resampling = result.resampling
    drawn = f"{resampling.units:,} groups by {settings.by}" if resampling.grouped else "prompts"
    said = {
        data.effect: EFFECTS[data.effect].per_prompt_formula or ""
        if data.per_prompt
        else EFFECTS[data.effect].formula
        for data in result.measures
        if data.kind == "number"
    }
    found: dict[str, str] = {}
    if said:
        found["effect"] = "; ".join(f"{name} = {formula}" for name, formula in said.items())
        found["interval"] = (
            f"{settings.confidence:g} % percentile bootstrap over {drawn}, "
            f"{settings.resamples:,} resamples"
        )
    test = next((each.test for each in result.statistics if each.test), None)
    tests = max(each.tests for each in result.statistics)
    if test and tests:
        found["p"] = test
        found["correction"] = f"{CORRECTIONS[settings.correction][0]}, over {tests:,} cells"
    found["seed"] = str(result.seed)
    return found


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
    conventions = {**result.conventions, **statistics_conventions(result)}
    outcomes = tuple(evaluate(each, result, others) for each in experiment.expects)
    return replace(result, conventions=conventions, outcomes=outcomes)
