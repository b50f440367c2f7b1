"""Attributes of a verdict: line, effective sample size, and whether it was computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mechdsl.results.assembly.collection import build_lost_experiment
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.statistics.measurements import MissingReason

from .synthetic import experiment, finished, heads

WHY = MissingReason("E0604", "the denominator is 0")


def fewer_answers() -> ExperimentResult:
    """Of 64 rows, 60 have an answer."""
    found = heads()
    accuracy = {run: rows.copy() for run, rows in found.accuracy.items()}
    accuracy["clean"][:4] = np.nan
    return replace(found, accuracy=accuracy)


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("max(recovery) > 0.3", 64),
        ("accuracy(clean) > 0.3", 60),
        ("accuracy(fewer) > 0.3", 64),
        ("accuracy(clean) > max(recovery)", 60),
        ("abs(accuracy(clean)) > 0.3", 60),
        ("max(recovery) near 0.6 within 0.1", 64),
        ("1 > 0", None),
        ("argmax(recovery) = L2H1", None),
    ],
)
def test_effective_n_of_a_verdict_is_the_smallest_of_its_values(
    line: str, units: int | None
) -> None:
    (found,) = finished(fewer_answers(), line).outcomes
    assert found.effective_n == units


def test_effective_n_of_a_verdict_counts_values_of_stats_by() -> None:
    (found,) = finished(heads(), "max(recovery) > 0.3", by="count").outcomes
    assert found.effective_n == 3


def outcome(line: str, *, missing: bool) -> ExpectOutcome:
    found = heads()
    if missing:
        nothing = np.full_like(found.measures[0].patched, np.nan)
        found = replace(found, measures=(replace(found.measures[0], missing=WHY, patched=nothing),))
    return finished(found, line).outcomes[0]


@pytest.mark.parametrize(
    "line",
    [
        "max(recovery) > 5",
        "not (max(recovery) < 5)",
        "max(recovery) > 5 or accuracy(clean) > 1",
        "accuracy(clean) > 1 or max(recovery) > 5",
        "accuracy(clean) > 0 and max(recovery) > 5",
        "argmax(recovery) = L0H0",
        "top 1 contains L0H0",
        "max(recovery) near 5 within 0.1",
    ],
)
def test_verdict_on_a_lost_measure_is_not_computed(line: str) -> None:
    for missing in (False, True):
        found = outcome(line, missing=missing)
        assert (found.holds, found.computed) == (False, not missing)


@pytest.mark.parametrize(
    "line", ["accuracy(clean) > 1 and max(recovery) > 5", "accuracy(clean) > 1"]
)
def test_verdict_decided_without_the_lost_measure_is_computed(line: str) -> None:
    assert outcome(line, missing=True).computed


def test_verdict_of_a_lost_experiment_is_not_computed() -> None:
    (found,) = build_lost_experiment(experiment(("max(recovery) > 5",)), []).outcomes
    assert (found.computed, found.line) == (False, 3)
