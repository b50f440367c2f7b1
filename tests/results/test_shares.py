"""Intervals of shares against scipy and reference formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechdsl.program.python_functions import PYTHON_CALL
from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.combination import average_over_axis
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.intervals import clopper_pearson, share_difference, share_interval
from mechdsl.statistics.measurements import CellStatistics, EffectSums, MeasureData
from mechdsl.vocab.metrics import EFFECTS

from .synthetic import finished, heads, measure, statistics
from .two_results import plain


def exact(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    found = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


@pytest.mark.parametrize("confidence", [80.0, 95.0, 99.0])
@pytest.mark.parametrize("n", [1, 2, 7, 32, 200])
def test_clopper_pearson_equals_scipy(n: int, confidence: float) -> None:
    for right in {0, 1, n // 2, n - 1, n}:
        low, high = clopper_pearson(np.array([float(right)]), np.array([float(n)]), confidence)
        assert (low[0], high[0]) == pytest.approx(exact(right, n, confidence / 100))


def of(patched: np.ndarray, base: np.ndarray, **values: Any) -> MeasureData:
    given = {"effect": "raw", "metric": "correct", "label": "correct", "unit": "share", **values}
    return measure(patched, base, **given)


def one(data: MeasureData, **values: Any) -> CellStatistics:
    return compute_cell_statistics([data], statistics(), 0, effects=EFFECTS, **values)[0]


def test_share_of_a_cell_has_the_exact_interval() -> None:
    patched = np.array([[1.0] * 8, [1.0] * 5 + [0.0] * 3, [1.0, 1.0] + [np.nan] * 6])
    found = one(of(patched, np.zeros(8)))
    expected = [exact(8, 8), exact(5, 8), exact(2, 2)]
    assert list(zip(found.low, found.high, strict=True)) == [pytest.approx(e) for e in expected]
    total = one(of(patched[:1], np.zeros(8), effect="total", source=patched[1]))
    raw = one(of(np.full((1, 8), 0.5), np.zeros(8)))
    q = (1 - 0.025 ** (1 / 8)) / 2  # no share of rows: from the range of the mean
    assert (raw.low[0], raw.high[0]) == pytest.approx((0.5 - q, 0.5 + q))
    assert total.mean[0] == pytest.approx(5 / 8)
    assert total.low[0] < 5 / 8 < total.high[0]


@pytest.mark.parametrize("effect", ["raw", "delta"])
def test_interval_of_a_share_does_not_depend_on_other_cells(effect: str) -> None:
    """With several samples per row, rows of one cell may all be 0 or 1 and others not."""
    share, mixed = np.array([1.0] * 6 + [0.0] * 2), np.array([0.5] * 5 + [1.0] * 3)
    base = np.array([1.0] * 2 + [0.0] * 6)
    alone = one(of(share[None], base, effect=effect))
    both = one(of(np.stack([mixed, share, mixed]), base, effect=effect))
    for name in ("mean", "low", "high", "p"):
        assert getattr(both, name)[1] == pytest.approx(getattr(alone, name)[0], nan_ok=True)
    mean = one(of(mixed[None], base, effect=effect, unit=""))
    for name in ("mean", "low", "high", "p"):
        for cell in (0, 2):
            expected = min(getattr(mean, name)[0], 1.0)  # the interval of a share is cut
            assert getattr(both, name)[cell] == pytest.approx(expected, nan_ok=True)
    assert mean.high[0] > 1


def test_expectations_on_shares_do_not_depend_on_other_cells() -> None:
    share, mixed = np.array([1.0] * 8), np.array([0.5] * 5 + [1.0] * 3)
    lines = ("raw(head: 1) > 0.6", "min(raw) > 0", "max(raw) > 0", "max(raw) < 2")
    data = of(np.stack([mixed, share]), np.zeros(8))
    sole, least, most, below = finished(plain(data), *lines).outcomes
    table = one(data)
    assert sole.low == pytest.approx(exact(8, 8)[0])
    assert least.low == pytest.approx(table.low.min())
    assert below.high == pytest.approx(table.high.max())
    # each of the two groups of cells has half of the level
    assert most.low == pytest.approx(max(exact(8, 8, 0.975)[0], table.low[0]), abs=0.03)
    assert "rows that are all 0 or 1" in finished(plain(data)).conventions["interval"]


PYTHON = {"metric": "python", "label": "own", "unit": ""}


def test_python_metric_of_zeros_and_ones_is_a_share() -> None:
    """`own` returns 1 in each of five rows: the mean has the exact limits, not [1, 1]."""
    data = of(np.ones((1, 5)), np.zeros(5), **PYTHON)
    found = finished(plain(data), "raw < 1")
    table = found.statistics[0]
    assert (table.low[0], table.high[0]) == pytest.approx(exact(5, 5))
    assert not found.outcomes[0].holds
    assert "all values of own are 0 or 1: treated as shares" in found.conventions["interval"]
    assert "Student" not in found.conventions["interval"]
    change = one(of(np.ones((1, 5)), np.zeros(5), effect="delta", **PYTHON))
    assert change.low[0] < 1 == change.high[0]


@pytest.mark.parametrize(
    ("patched", "base", "values"),
    [
        (np.array([[1.0] * 8, [2.0] * 8]), np.zeros(8), PYTHON),  # a count
        (np.ones((1, 8)), np.full(8, 0.5), PYTHON),
        (np.ones((1, 8)), np.zeros(8), {"metric": "length", "unit": "token"}),
        (np.ones((1, 8)), np.zeros(8), {"metric": "python(1) - python(2)", "unit": ""}),
    ],
)
def test_numbers_that_happen_to_be_one_are_no_share(
    patched: np.ndarray, base: np.ndarray, values: dict[str, Any]
) -> None:
    found = one(of(patched, base, **values))
    assert found.reasons[0] is not None
    assert found.reasons[0].startswith("all 8 prompts have the same value")
    assert np.isnan([found.low[0], found.high[0]]).all()


def test_rows_outside_a_cell_do_not_make_its_base_run_no_share() -> None:
    patched = np.array([[1.0] * 8 + [np.nan]])
    base = np.array([1.0, 0, 1, 0, 1, 0, 1, 0, 0.5])
    found = one(of(patched, base, effect="delta"))
    alone = one(of(patched[:, :8], base[:8], effect="delta"))
    assert (found.low[0], found.high[0]) == pytest.approx((alone.low[0], alone.high[0]))


def newcombe(a: int, b: int, c: int, d: int) -> tuple[float, float]:
    """Newcombe's limits: `a` correct in both, `b` only in the first, `c` only in the second."""
    n = a + b + c + d
    one, two = (a + b) / n, (a + c) / n
    apart = a * d - b * c
    phi = max(apart - n / 2, 0) if apart > 0 else apart  # corrected for continuity
    phi /= np.sqrt((a + b) * (c + d) * (a + c) * (b + d)) or np.inf
    (l1, u1), (l2, u2) = exact(a + b, n), exact(a + c, n)
    low = np.sqrt((one - l1) ** 2 - 2 * phi * (one - l1) * (u2 - two) + (u2 - two) ** 2)
    high = np.sqrt((two - l2) ** 2 - 2 * phi * (two - l2) * (u1 - one) + (u1 - one) ** 2)
    return one - two - low, one - two + high


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (20, 12, 2, 16), (4, 9, 1, 6)])
def test_difference_of_two_shares_equals_newcombe(table: tuple[int, int, int, int]) -> None:
    """The first table is Newcombe's (1998); exact limits give a slightly wider interval."""
    a, b, c, d = table
    first = np.array([1.0] * (a + b) + [0.0] * (c + d))
    second = np.array([1.0] * a + [0.0] * b + [1.0] * c + [0.0] * d)
    found = one(of(first[None], second, effect="delta"))
    low, high = newcombe(*table)
    assert found.mean[0] == pytest.approx((b - c) / len(first))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))
    turned = one(of(second[None], first, effect="delta"))
    assert (turned.low[0], turned.high[0]) == pytest.approx((-high, -low))
    if table == (36, 12, 2, 0):
        assert found.low[0] == pytest.approx(0.06, abs=0.02)
        assert found.high[0] == pytest.approx(0.32, abs=0.03)


@pytest.mark.parametrize("n", [16, 32, 64])
def test_difference_of_shares_with_rare_changes_covers_at_its_level(n: int) -> None:
    """5 % of the rows with 1 change to 0. Two equal shares of 0.5 had the interval [0, 0]."""
    random = np.random.default_rng(4)
    base = (random.random((2000, n)) < 0.5).astype(np.float64)
    patched = np.where(random.random(base.shape) < 0.05, 0.0, base)
    held = np.full(len(base), n)
    sums = [EffectSums(each, np.ones((1, n)), held) for each in (patched, base)]
    low, high = share_difference(*sums, held, 95.0)
    assert ((low <= -0.025) & (high >= -0.025)).mean() >= 0.93
    assert (low < high).all()


def test_share_of_groups_uses_the_effective_sample_size() -> None:
    """The interval is that of Korn and Graubard (1998)."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    rows = (random.random(120) < random.beta(2, 1, 12)[groups]).astype(float)
    found = one(of(rows[None], np.zeros(120)), groups=groups)
    p = rows.mean()
    sums = np.array([(rows[groups == g] - p).sum() for g in range(12)])
    variance = 12 / 11 * (sums**2).sum() / 120**2
    n = p * (1 - p) / variance * (stats.t.ppf(0.975, 119) / stats.t.ppf(0.975, 11)) ** 2
    assert n < 110
    low = stats.beta.ppf(0.025, p * n, n - p * n + 1)
    high = stats.beta.ppf(0.975, p * n + 1, n - p * n)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high))
    # all correct: the effective sample size is the number of groups
    sure = one(of(np.ones((1, 120)), np.zeros(120)), groups=groups)
    assert (sure.low[0], sure.high[0]) == pytest.approx(exact(12, 12))
    few = one(of(rows[None], np.zeros(120)), groups=groups // 3)
    assert np.isnan([few.low[0], few.high[0]]).all()
    assert "4 groups: no interval below 5" in (few.reasons[0] or "")


def test_share_of_groups_with_little_spread_counts_rows() -> None:
    rows = np.tile([1.0, 0.0], 20)
    found = one(of(rows[None], np.zeros(40)), groups=np.arange(40) // 4)
    assert (found.low[0], found.high[0]) == pytest.approx(exact(20, 40))


def test_share_interval_and_difference_accept_sums() -> None:
    sums = EffectSums(np.array([[1.0, 1, 0, 1]]), np.ones((1, 4)), np.array([4]))
    low, high = share_interval(sums, np.array([4]), 95.0)
    assert (low[0], high[0]) == pytest.approx(exact(3, 4))
    low, high = share_difference(sums, sums, np.array([4]), 95.0)
    assert low[0] <= 0 <= high[0]


def answered(rows: np.ndarray, *expects: str, **values: Any) -> ExperimentResult:
    data = of(rows, np.zeros(rows.shape[1]), **values)
    cells = tuple(CellKey({"head": n}, f"L0H{n}.z") for n in range(len(rows)))
    made = replace(
        heads(prompts=rows.shape[1]), axes=("head",), cells=cells, measures=(data,), accuracy={}
    )
    return finished(replace(made, runs={}), *expects)


def test_expectations_on_shares_use_exact_limits() -> None:
    rows = np.ones((3, 8))
    rows[1, :5], rows[2, :2] = 0.0, 0.0
    found = answered(
        rows,
        "raw(L0H0) > 0.9",
        "raw(L0H0) = 1",
        "1 - 2 * raw(L0H0) < 0",
        "max(raw) >= 1",
        "min(raw) < 0.9",
        "mean(raw, head: 0) > 0.6",
        "raw(L0H0) in 0.6..1",
    )
    one_cell, equal, scaled, largest, smallest, mean, band = found.outcomes
    low, high = exact(8, 8)
    assert (one_cell.low, one_cell.high) == pytest.approx((low, high))
    assert not one_cell.holds
    assert not equal.holds
    assert (scaled.low, scaled.high) == pytest.approx((1 - 2 * high, 1 - 2 * low))
    together = exact(8, 8, 1 - 0.05 / 3)
    assert (largest.low, largest.high) == pytest.approx((together[0], 1.0))
    assert not largest.holds
    together = exact(3, 8, 1 - 0.05 / 3)
    assert (smallest.low, smallest.high) == pytest.approx((exact(3, 8)[0], together[1]))
    assert (mean.low, mean.holds) == (pytest.approx(low), True)
    assert band.holds


def test_mean_of_perfect_shares_has_a_lower_limit_below_one() -> None:
    (found,) = answered(np.ones((4, 10)), "mean(raw) = 1").outcomes
    assert (found.low, found.holds) == (pytest.approx(exact(10, 10)[0]), False)
    rows = np.ones((2, 10))
    rows[1, 5:] = np.nan  # cells with different rows: exact limits at half of the level each
    (found,) = answered(rows, "mean(raw) = 1").outcomes
    ends = [exact(n, n, 1 - 0.05 / 2)[0] for n in (10, 5)]
    assert (found.low, found.holds) == (pytest.approx(np.mean(ends)), False)


def test_mean_of_shares_of_different_rows_with_equal_content_has_exact_limits() -> None:
    """Both cells have one row of each unit, so that their denominators are equal."""
    rows = np.ones((2, 16))
    rows[0, ::2], rows[1, 1::2] = np.nan, np.nan
    made = replace(answered(rows), row_keys=tuple(n // 2 for n in range(16)))
    (found,) = finished(made, "mean(raw) = 1").outcomes
    assert found.low == pytest.approx(exact(8, 8, 1 - 0.05 / 2)[0])


@pytest.mark.parametrize("word", ["", "Python"])
@pytest.mark.parametrize("effect", ["raw", "delta"])
@pytest.mark.parametrize("rows", ["any", "ones", "equal cells", "as in the base run"])
def test_mean_and_area_of_shares_have_the_interval_of_their_table_row(
    rows: str, effect: str, word: str
) -> None:
    """A row with several cells is no longer 0 or 1, so that the mean has the interval of a mean."""
    random = np.random.default_rng(3)
    values = (random.random((12, 16)) < 0.8).astype(float)
    if rows == "ones":
        values[:] = 1.0
    elif rows == "equal cells":
        values[1:] = values[0]
    base = np.zeros(16) if effect == "raw" else np.array([1.0, 0] * 8)
    given: dict[str, Any] = {"unit": "", "metric": f"{PYTHON_CALL}()"} if word else {}
    if rows == "as in the base run":
        base = np.array([1.0, 1, 1, 0] * 4)
        values[:] = base
        given["inert"] = np.arange(12) == 4  # other cells can differ in other rows
    made = answered(values, effect=effect, **given)
    data = of(values, base, effect=effect, **given)
    at = [0.1, 0.7, 0.9, 1.7]
    keys = [CellKey({"layer": n // 4, "k": at[n % 4]}, f"L0H{n}.z") for n in range(12)]
    made = replace(made, axes=("layer", "k"), cells=tuple(keys), measures=(data,))
    for area in (False, True):
        line = f"auc({effect}, k, layer: 1)" if area else f"mean({effect}, layer: 1)"
        (found,) = finished(made, f"{line} > 2").outcomes
        row = finished(average_over_axis(made, "k", area=area)).statistics[0]
        expected = [row.mean[1], row.low[1], row.high[1]]
        assert [found.value, found.low, found.high] == pytest.approx(expected, rel=1e-9)
        assert row.low[1] < row.high[1]


def test_inert_share_has_a_zero_width_interval() -> None:
    base = np.array([1.0, 1, 0, 1, 1, 1, 0, 1])
    found = one(of(base[None], base, effect="delta", inert=np.array([True])))
    assert (found.low[0], found.high[0]) == (0.0, 0.0)
    same = one(of(base[None], base, effect="delta"))
    assert same.low[0] < 0 < same.high[0]


def test_accuracy_interval_uses_groups_of_stats_by() -> None:
    result = heads()
    groups = [i // 8 for i in range(64)]
    rows = np.array([float(group != 3) for group in groups])
    made = replace(result, row_values={"topic": groups}, accuracy={"clean": rows})
    found = finished(made, "accuracy(clean) > 0.5").accuracy_of("clean")
    assert (found.low, found.high) == pytest.approx(exact(56, 64))
    whole = finished(made, by="topic").accuracy_of("clean")
    assert whole.mean == found.mean == 7 / 8
    p, n = 7 / 8, 7 * (stats.t.ppf(0.975, 63) / stats.t.ppf(0.975, 7)) ** 2
    assert whole.low == pytest.approx(stats.beta.ppf(0.025, p * n, n - p * n + 1))
    assert whole.low < found.low - 0.1


def test_accuracy_interval_counts_identical_rows_as_units() -> None:
    """Units have different sizes, some rows have no answer, and identical rows count as one."""
    sizes, right = [1, 4, 2, 3, 2, 5, 1, 2], np.array([1, 0, 1, 1, 0, 1, 1, 1.0])
    units = np.repeat(np.arange(8), sizes)
    rows = np.concatenate([right[units], [np.nan, np.nan]])
    place = np.random.default_rng(0).permutation(22)
    made = replace(
        heads(),
        accuracy={"clean": rows[place]},
        accuracy_units={"clean": np.append(units, [8, 9])[place] * 7},
    )
    found = finished(made).accuracy_of("clean")
    p = np.average(right, weights=sizes)
    variance = 8 / 7 * ((np.array(sizes) * (right - p)) ** 2).sum() / 20**2
    n = p * (1 - p) / variance * (stats.t.ppf(0.975, 19) / stats.t.ppf(0.975, 7)) ** 2
    assert n < 8
    assert (found.mean, found.n) == (pytest.approx(p), 20)
    assert found.low == pytest.approx(stats.beta.ppf(0.025, p * n, n - p * n + 1))
    assert found.high == pytest.approx(stats.beta.ppf(0.975, p * n + 1, n - p * n))
    wider = finished(made).accuracy_of("clean", 99.0)
    assert wider.low < found.low < found.high < wider.high
    none = replace(made, accuracy={"clean": np.full(22, np.nan)})
    unknown = finished(none).accuracy_of("clean")
    assert np.isnan([unknown.mean, unknown.low, unknown.high]).all()
    assert unknown.n == 0


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("units", [8, 24])
def test_share_interval_of_repeated_rows_covers_at_its_level(p: float, units: int) -> None:
    """If repeated rows counted as independent, only 60 % of intervals would contain the share."""
    random = np.random.default_rng([units, int(100 * p)])
    sizes = random.integers(1, 10, (400, units)).astype(float)
    right = sizes * (random.random((400, units)) < p)
    sums = EffectSums(right, sizes, np.full(400, units))
    low, high = share_interval(sums, sizes.sum(1).astype(np.int64), 95.0)
    assert np.mean((low <= p) & (p <= high)) >= 0.92
