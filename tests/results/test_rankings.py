"""`auroc` of perfectly ranked effects: its interval doesn't collapse to a point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import mechdsl
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
def test_perfect_auroc_of_rows_has_exact_limits_over_pairs(ones: int, zeros: int) -> None:
    values = [2.0 + n for n in range(ones)] + [-1.0 - n for n in range(zeros)]
    large = [1] * ones + [0] * zeros
    limit = stats.binomtest(ones, ones).proportion_ci(0.95, method="exact").low
    right = verdict("auroc(delta, large) > 0.999", rows_of(values, large))
    assert not right.holds
    assert ends(right) == pytest.approx((1.0, limit, 1.0))
    wrong = verdict("auroc(delta, large) < 0.001", rows_of([-v for v in values], large))
    assert not wrong.holds
    assert ends(wrong) == pytest.approx((0.0, 0.0, 1 - limit))


def test_auroc_counts_rows_of_one_group_as_one() -> None:
    values = [2.0 + n for n in range(8)] + [-1.0 - n for n in range(8)]
    grouped = rows_of(values, [1] * 8 + [0] * 8, by="topic")
    found = verdict("auroc(delta, large) > 0.3", grouped)
    limit = stats.binomtest(4, 4).proportion_ci(0.95, method="exact").low
    assert ends(found) == pytest.approx((1.0, limit, 1.0))


def test_imperfect_auroc_has_a_bootstrap_interval() -> None:
    values = [2.0 + n for n in range(8)] + [-1.0 - n for n in range(7)] + [2.5]
    found = verdict("auroc(delta, large) > 0.5", rows_of(values, [1] * 8 + [0] * 8))
    value, low, high = ends(found)
    assert value == 63 / 64
    assert low is not None
    assert high is not None
    assert 0 < low < 63 / 64 < high < 1


def test_perfect_auroc_of_cells_is_limited_by_cell_differences() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 1, (4, 12))
    noise -= noise.mean(1, keepdims=True)
    clear = cells_of(noise * 0.01 + np.array([[3.0], [2.0], [1.0], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) > 0.9", clear)
    assert (found.holds, *ends(found)) == (True, 1.0, 1.0, 1.0)
    # the first true cell is clearly ahead of both others, the second of neither
    close = cells_of(noise + np.array([[9.0], [0.02], [0.01], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) > 0.9", close)
    assert (found.holds, *ends(found)) == (False, 1.0, 0.5, 1.0)
    turned = cells_of(-noise - np.array([[9.0], [0.02], [0.01], [0.0]]))
    found = verdict("auroc(delta, [L0H0, L0H1]) < 0.1", turned)
    assert (found.holds, *ends(found)) == (False, 0.0, 0.0, 0.5)


def test_perfect_auroc_of_too_few_rows_has_no_interval() -> None:
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


def test_auroc_with_accuracy_uses_correct_rows_as_positives() -> None:
    """The accuracy has its rows in another order, and one row that `keep` dropped."""
    values, large = [3.0, -1.0, 2.0, 0.5, -2.0, 1.0], [1, 0, 1, 0, 0, 1]
    by_column = rows_of(values, large)
    order = [4, 2, 0, 1, 5, 3]
    ids = by_column.row_ids or tuple(range(6))
    result = replace(
        by_column,
        row_ids=ids,
        accuracy={"clean": np.array([*(float(large[n]) for n in order), 1.0])},
        accuracy_rows={"clean": (*(ids[n] for n in order), 99)},
    )
    expected = verdict("auroc(delta, large) > 0.5", result)
    found = verdict("auroc(delta, accuracy(clean)) > 0.5", result)
    assert ends(found) == ends(expected)
    assert found.value == 1.0
    every = replace(result, accuracy={"clean": np.ones(7)})
    same = verdict("auroc(delta, accuracy(clean)) > 0.5", every)
    assert "`accuracy(clean)` is the same in all 6 rows" in (same.reason or "")


FLAGGED = """mech 1
model tiny = zoo("induction")
prompts repeats {
  word in words(tiny)
  half = list(word, 4, sep: " ", distinct: true)
  right in [0, 1]
  template "{half} {cue = half[1]}"
  answer if right = 1 then " {half[2]}" else " {half[4]}"
}
experiment e {
  prompts repeats limit 24
  observe norm resid_post layer 1 at last token as size
  expect auroc(size, accuracy(clean)) > 0
  expect auroc(size, right) > 0
}
"""


def test_auroc_by_accuracy_equals_auroc_by_the_deciding_variable(tmp_path: Path) -> None:
    file = tmp_path / "e.mech"
    file.write_text(FLAGGED, "utf-8")
    (result,) = mechdsl.run(file, store=None).files[0].experiments
    correct = result.accuracy["clean"]
    assert 0 < correct.sum() < len(correct)
    assert correct.tolist() == [float(each) for each in result.row_values["right"]]
    size = result.measures[0].patched[0]
    ahead = size[correct == 1][:, None] - size[correct == 0]
    expected = np.mean((ahead > 0) + 0.5 * (ahead == 0))
    assert [each.value for each in result.outcomes] == pytest.approx([expected, expected])
