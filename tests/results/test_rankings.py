"""`auroc` of effects that rank perfectly: its interval is not that of resamples, a point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult

from .synthetic import statistics
from .test_leads import cells_of, verdict


def rows_of(values: list[float], large: list[int], **settings: Any) -> ExperimentResult:
    """One cell with these deltas, and a variable of the prompts."""
    made = cells_of(np.array([values]))
    used: spec.Statistics = statistics(**settings)
    return replace(
        made,
        row_values={"large": large, "topic": [n // 2 for n in range(len(large))]},
        settings=used,
    )


def ends(found: ExpectOutcome) -> tuple[float | None, float | None, float | None]:
    assert not isinstance(found.value, str)
    return found.value, found.low, found.high


@pytest.mark.parametrize(("ones", "zeros"), [(3, 3), (8, 8), (4, 28)])
def test_a_perfect_order_of_rows_has_the_exact_limits_of_pairs(ones: int, zeros: int) -> None:
    values = [2.0 + n for n in range(ones)] + [-1.0 - n for n in range(zeros)]
    large = [1] * ones + [0] * zeros
    limit = stats.binomtest(ones, ones).proportion_ci(0.95, method="exact").low
    right = verdict("auroc(delta, large) > 0.999", rows_of(values, large))
    assert not right.holds
    assert ends(right) == pytest.approx((1.0, limit, 1.0))
    wrong = verdict("auroc(delta, large) < 0.001", rows_of([-v for v in values], large))
    assert not wrong.holds
    assert ends(wrong) == pytest.approx((0.0, 0.0, 1 - limit))


def test_rows_of_one_group_are_one_of_the_pairs() -> None:
    values = [2.0 + n for n in range(8)] + [-1.0 - n for n in range(8)]
    grouped = rows_of(values, [1] * 8 + [0] * 8, by="topic")
    found = verdict("auroc(delta, large) > 0.3", grouped)
    limit = stats.binomtest(4, 4).proportion_ci(0.95, method="exact").low
    assert ends(found) == pytest.approx((1.0, limit, 1.0))


def test_rows_that_are_nearly_sorted_keep_the_interval_of_resamples() -> None:
    values = [2.0 + n for n in range(8)] + [-1.0 - n for n in range(7)] + [2.5]
    found = verdict("auroc(delta, large) > 0.5", rows_of(values, [1] * 8 + [0] * 8))
    value, low, high = ends(found)
    assert value == 63 / 64
    assert low is not None
    assert high is not None
    assert 0 < low < 63 / 64 < high < 1


def test_a_perfect_order_of_cells_is_as_sure_as_their_differences() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, (4, 12))
    noise -= noise.mean(1, keepdims=True)
    clear = cells_of(noise * 0.01 + np.array([[3.0], [2.0], [1.0], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) > 0.9", clear)
    assert (found.holds, *ends(found)) == (True, 1.0, 1.0, 1.0)
    # the second true cell is ahead of neither other one beyond doubt, the first of both
    close = cells_of(noise + np.array([[9.0], [0.02], [0.01], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) > 0.9", close)
    assert (found.holds, *ends(found)) == (False, 1.0, 0.5, 1.0)
    turned = cells_of(-noise - np.array([[9.0], [0.02], [0.01], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) < 0.1", turned)
    assert (found.holds, *ends(found)) == (False, 0.0, 0.0, 0.5)


def test_too_few_rows_have_no_interval_of_a_perfect_order() -> None:
    found = verdict("auroc(delta, large) > 0.5", rows_of([2.0, 3.0, -1.0, -2.0], [1, 1, 0, 0]))
    assert not found.holds
    assert found.low is None
    assert "4 prompts: no interval below 5" in (found.reason or "")


def test_auroc_of_rows_counts_ties_as_half() -> None:
    values = [1.0, 1.0, 2.0, 3.0, 1.0, 1.0, 2.0, 0.0]
    found = verdict("auroc(delta, large) > 0.1", rows_of(values, [1] * 4 + [0] * 4))
    u = stats.mannwhitneyu(values[:4], values[4:]).statistic
    assert found.value == pytest.approx(u / 16) == 0.71875


def test_auroc_of_cells_counts_ties_as_half() -> None:
    rows = np.tile([0.5, 1.5, 0.0, 1.0, 2.0, 1.0], (4, 1)) + np.array([[1.0], [2.0], [1.0], [0.0]])
    found = verdict("auroc(delta, [L0H0, L0H1]) > 0.1", cells_of(rows))
    assert found.value == 0.875
