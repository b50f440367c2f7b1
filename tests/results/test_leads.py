"""Leading cells, differences between experiments, and non-smooth values of expectations."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechdsl.checks.conditions import Arithmetic, CellValue, ConstantValue
from mechdsl.fits.agreement import auroc, pearson, spearman
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.results.verdicts.decision import decide_all_expectations
from mechdsl.results.verdicts.values import (
    CellSelector,
    ComparisonSample,
    SelectedCells,
    ValueReader,
    cell_differences,
    compare_sizes,
    compare_with_each_rival,
    compare_with_rival,
)
from mechdsl.statistics.measurements import Resamples

from .synthetic import expectation, finished, heads, measure


def cells_of(
    patched: np.ndarray,
    *expects: str,
    base: np.ndarray | None = None,
    source: np.ndarray | None = None,
    name: str = "where",
    keys: list[int] | None = None,
    **values: Any,
) -> ExperimentResult:
    count, prompts = patched.shape
    base = np.zeros(prompts) if base is None else base
    data = measure(patched, base, source, label="ld", **values)
    made = replace(
        heads(prompts=prompts),
        name=name,
        axes=("head",),
        cells=tuple(CellKey({"head": head}, f"L0H{head}.z") for head in range(count)),
        measures=(replace(data, effect="delta" if source is None else "recovery"),),
        row_keys=None if keys is None else tuple(keys),
        runs={},
        accuracy={},
    )
    return finished(made, *expects)


def verdict(line: str, result: ExperimentResult, **others: ExperimentResult) -> ExpectOutcome:
    return decide_all_expectations([expectation(line)], result, others)[0]


@pytest.fixture(name="clear", scope="module")
def _clear() -> ExperimentResult:
    """Cells with means 2, −3, 1 and 0 over 30 rows."""
    random = np.random.default_rng(0)
    return cells_of(random.normal([[2.0], [-3.0], [1.0], [0.0]], 0.5, (4, 30)))


@pytest.fixture(name="ties", scope="module")
def _ties() -> ExperimentResult:
    """Two identical cells, a similar one, and a negated one."""
    random = np.random.default_rng(0)
    rows = random.normal(1, 1, (1, 30))
    return cells_of(np.concatenate([rows, rows, rows + random.normal(0, 0.5, (1, 30)), -rows]))


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("argmax(delta) = L0H0", True),
        ("argmin(delta) = L0H1", True),
        ("argmax(delta) != L0H2", True),
        ("argmax(delta) != L0H0", False),
        ("not argmin(delta) = L0H3", True),
        ("top 1 contains L0H1", True),
        ("top 2 contains L0H0, L0H1", True),
        ("top 2 contains L0H2", False),
        ("top 4 contains L0H3", True),
        ("argmax(delta, head: 2..3) = L0H2", True),
    ],
)
def test_clear_order_of_cells_is_decided(clear: ExperimentResult, line: str, holds: bool) -> None:
    assert verdict(line, clear).holds is holds


@pytest.mark.parametrize(
    "line",
    [
        "argmax(delta) = L0H0",
        "argmax(delta) != L0H1",
        "argmax(delta) = L0H2",
        "argmax(delta) != L0H2",
        "top 1 contains L0H2",
        "top 1 contains L0H3",
        "top 3 contains L0H3",
    ],
)
def test_tied_cells_do_not_lead(ties: ExperimentResult, line: str) -> None:
    assert not verdict(line, ties).holds
    if "!= L0H1" in line or "contains L0H2" in line:
        assert verdict(f"{line} on mean", ties).holds


@pytest.fixture(name="close_third", scope="module")
def _close_third() -> ExperimentResult:
    """Cells with means 9, 1, 0.99 and 0."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.5, (4, 30))
    noise -= noise.mean(1, keepdims=True)
    return cells_of(noise + np.array([[9.0], [1.0], [0.99], [0.0]]))


def test_top_k_excludes_a_cell_that_k_others_may_exceed(close_third: ExperimentResult) -> None:
    found = verdict("top 2 contains L0H1", close_third)
    assert not found.holds
    assert (
        found.reason
        == "L0H1 is in the top 2 by its mean, but 2 other cells may be at least as large"
    )
    assert verdict("top 3 contains L0H1", close_third).holds
    assert verdict("top 1 contains L0H0", close_third).holds


def test_top_of_all_cells_needs_no_interval() -> None:
    few = cells_of(np.array([[3.0, 3.1], [2.0, 2.2], [1.0, 0.9]]))
    assert verdict("top 3 contains L0H2", few).holds
    assert not verdict("top 2 contains L0H1", few).holds


def test_top_k_failure_names_the_k_cells_and_the_rank(clear: ExperimentResult) -> None:
    found = verdict("top 2 contains L0H2", clear)
    assert found.value == 3.0
    assert (found.reason or "").startswith("L0H2 has rank 3; top 2: L0H1.z, L0H0.z; ")


@pytest.mark.parametrize(("named", "other"), [("L0H1", "L0H2"), ("L0H2", "L0H1")])
def test_top_k_reports_a_neighbour_within_rounding(named: str, other: str) -> None:
    rows = np.random.default_rng(0).normal(0, 0.5, 30)
    values = rows - rows.mean() + np.array([[3.0], [1.0], [1.0 - 1e-7], [0.0]])
    rounding = np.full((1, 30), 1e-6)
    found = verdict(f"top 2 contains {named} on mean", cells_of(values, rounding=rounding))
    assert f"the difference from {other}" in (found.reason or "")


def test_leading_cell_is_compared_with_each_rival_by_their_difference(
    clear: ExperimentResult,
) -> None:
    of = SelectedCells(clear, 0, np.arange(4))
    space = ComparisonSample(clear, [of])
    found = compare_with_each_rival(space, of, 0, np.array([1, 2, 3]), 1.0, 95.0)
    rows = clear.measures[0].patched
    assert found.cell == 2
    assert found.value == pytest.approx((rows[0] - rows[2]).mean())
    low, _ = stats.t.interval(0.95, 29, found.value, stats.sem(rows[0] - rows[2]))
    assert found.low == pytest.approx(low, abs=0.1)
    assert found.low <= low + 1e-9
    lowest = compare_with_each_rival(space, of, 1, np.array([0, 2, 3]), -1.0, 95.0)
    assert (lowest.cell, lowest.value) == (3, pytest.approx((rows[3] - rows[1]).mean()))
    wider = compare_with_each_rival(space, of, 0, np.array([1, 2, 3]), 1.0, 99.0)
    assert wider.low < found.low
    together = compare_with_rival(space, of, np.array([0, 1]), 2, 1.0, 95.0)
    assert together.value == pytest.approx([(rows[i] - rows[2]).mean() for i in (0, 1)])
    assert together.low_together[0] < low + 1e-9
    assert (compare_sizes(space, of, 1, 95.0) > 0).tolist() == [True, True, True]
    assert (compare_sizes(space, of, 0, 95.0) > 0).tolist() == [False, True, True]


def test_cell_difference_of_ratios_with_missing_rows_is_linearised() -> None:
    """The error of the difference is that of the linearised ratios."""
    random = np.random.default_rng(1)
    base, source = np.zeros((2, 40)), random.normal([[4.0], [8.0]], 0.5, (2, 40))
    patched = random.normal([[2.0], [2.0]], 0.5, (2, 40))
    patched[1, :12] = np.nan
    found = cells_of(patched, base=base, source=source)
    of = SelectedCells(found, 0, np.arange(2))
    space = ComparisonSample(found, [of])
    near = compare_with_each_rival(space, of, 0, np.array([1]), 1.0, 95.0)
    one, two = patched[0].mean() / source[0].mean(), patched[1, 12:].mean() / source[1, 12:].mean()
    assert near.value == pytest.approx(one - two)
    moves = np.zeros(40)
    moves += (patched[0] - one * source[0]) / source[0].mean()
    moves[12:] -= (patched[1] - two * source[1])[12:] / source[1, 12:].mean() * 40 / 28
    error = np.sqrt((moves**2).sum() * 28 / 27) / 40
    assert 2 * 2.05 * error < near.high - near.low < 2 * 2.05 * error * 1.5
    pair = cell_differences(space, of, np.array([0]), np.array([1]), 1.0, -1.0)
    assert pair.held.tolist() == [28]
    assert pair.value == pytest.approx([one - two])


def test_leader_selected_among_several_cells_uses_a_smaller_level() -> None:
    """The leading cell was selected among the matching cells."""
    random = np.random.default_rng(3)
    rows = random.normal([[0.0], [-1], [2], [-2]], 1, (4, 40))
    plain = cells_of(rows)
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    cells = tuple(CellKey({"layer": a, "head": b}, f"L{a}H{b}.z") for a, b in places)
    found = finished(replace(plain, axes=("layer", "head"), cells=cells))
    one, several = (verdict(f"argmax(delta) = {site}", found) for site in ("L1H0", "L1.z"))
    assert one.holds
    assert several.holds
    for each, confidence in ((one, 95.0), (several, 97.5)):
        low, high = interval(rows[2] - rows[0], confidence)
        value = (rows[2] - rows[0]).mean()
        assert each.reason == f"ahead of L0H0.z: {value:.3g} [{low:.3g}, {high:.3g}]"
    assert one.reason != several.reason


def test_rival_selected_among_many_needs_a_larger_lead() -> None:
    """The lead is significant for a single rival, but not for the best of fifteen."""
    noise = np.random.default_rng(3).normal(0, 1, (16, 40))
    rows = (noise - noise.mean(1, keepdims=True)) / noise.std(1, keepdims=True)
    rows[0] *= 0.01
    rows[9] += 0.4
    alone = verdict("argmax(delta) != L0H0", cells_of(rows[[0, 9]]))
    assert (alone.holds, alone.value) == (True, "L0H1.z")
    among = verdict("argmax(delta) != L0H0", cells_of(rows))
    assert (among.holds, among.value) == (False, "L0H9.z")
    assert "can't be distinguished from L0H0.z" in (among.reason or "")


def read(
    result: ExperimentResult, value: object, **others: ExperimentResult
) -> tuple[float, float, float]:
    reader = ValueReader(CellSelector(result, others), [value])  # pyright: ignore[reportArgumentType]
    found = reader.ended(reader.estimate(value, 95.0), 95.0)  # pyright: ignore[reportArgumentType]
    return found.point, found.low, found.high


def difference() -> Arithmetic:
    mine = CellValue(aggregate="mean", measure=0)
    theirs = CellValue(aggregate="mean", measure=0, experiment="other")
    return Arithmetic(operator="-", left=mine, right=theirs)


def test_difference_between_experiments_pairs_equal_rows() -> None:
    random = np.random.default_rng(4)
    shared = random.normal(0, 5, (1, 30))
    one, two = shared + 1, shared + random.normal(0, 0.2, (1, 30))
    keys = random.permutation(1000)[:30].tolist()
    order = random.permutation(30)
    mine = cells_of(one, keys=keys)
    other = cells_of(two[:, order], name="other", keys=[keys[i] for i in order])
    point, low, high = read(mine, difference(), other=other)
    own = cells_of(one - two, keys=keys).statistics[0]
    assert (point, low, high) == pytest.approx((own.mean[0], own.low[0], own.high[0]))
    assert high - low < 0.3
    # different rows are resampled independently
    apart = cells_of(two, name="other", keys=[k + 2000 for k in keys])
    point, low, high = read(mine, difference(), other=apart)
    error = np.sqrt(stats.sem(one[0]) ** 2 + stats.sem(two[0]) ** 2)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 58) * error, rel=0.15)


def test_quotient_with_a_denominator_near_zero_has_no_value(clear: ExperimentResult) -> None:
    found = verdict("delta(L0H0) / delta(L0H3) > 0", clear)
    assert (found.holds, found.value) == (False, None)
    assert "it divides by a value that can't be distinguished from 0" in (found.reason or "")
    good = verdict("delta(L0H0) / delta(L0H2) > 1", clear)
    assert good.holds
    rows = clear.measures[0].patched
    assert good.value == pytest.approx(rows[0].mean() / rows[2].mean())


def test_quotient_of_cells_equals_the_ratio_of_the_table() -> None:
    random = np.random.default_rng(2)
    top, bottom = random.normal(2, 1, 20), random.exponential(1, 20) + 1
    ratio = cells_of(top[None], base=np.zeros(20), source=bottom).statistics[0]
    found = verdict("delta(L0H0) / delta(L0H1) > 0", cells_of(np.stack([top, bottom])))
    assert found.value == pytest.approx(ratio.mean[0])
    assert [found.low, found.high] == pytest.approx([ratio.low[0], ratio.high[0]], rel=0.15)


def test_interval_of_a_product_equals_reference() -> None:
    random = np.random.default_rng(2)
    one, two = random.normal(2, 1, 20), random.exponential(1, 20) + 1
    result = cells_of(np.stack([one, two]))
    found = verdict("delta(L0H0) * delta(L0H1) > 0", result)

    def of(rows: np.ndarray) -> tuple[float, float]:
        a, b = one[rows], two[rows]
        moves = (a - a.mean()) * b.mean() + (b - b.mean()) * a.mean()
        return a.mean() * b.mean(), moves.std(ddof=1) / 20**0.5

    value, error = of(np.arange(20))
    weights = np.concatenate(list(Resamples(20, 1000, 0).weights())).astype(int)
    drawn = [of(np.repeat(np.arange(20), each)) for each in weights]
    pivots = [(moved - value) / own for moved, own in drawn]
    lower, upper = np.percentile(pivots, [2.5, 97.5])
    t = stats.t.ppf(0.975, 19)
    ends = [value - error * max(upper, t), value - error * min(lower, -t)]
    assert [found.low, found.high] == pytest.approx(ends)


def interval(rows: np.ndarray, confidence: float) -> tuple[float, float]:
    table = finished(
        replace(cells_of(rows[None]), statistics=()), confidence=confidence
    ).statistics[0]
    return float(table.low[0]), float(table.high[0])


def test_non_smooth_values_combine_interval_ends_by_bonferroni(clear: ExperimentResult) -> None:
    """Each interval has half the level, so both hold simultaneously (Bonferroni)."""
    rows = clear.measures[0].patched
    found = verdict("abs(delta(L0H1)) + delta(L0H2) > 0", clear)
    (low1, high1), (low2, high2) = interval(rows[1], 97.5), interval(rows[2], 97.5)
    assert [found.low, found.high] == pytest.approx([-high1 + low2, -low1 + high2])
    product = verdict("abs(delta(L0H1)) * delta(L0H3) > 0", clear)
    low3, high3 = interval(rows[3], 97.5)
    ends = [a * b for a in (-high1, -low1) for b in (low3, high3)]
    assert [product.low, product.high] == pytest.approx([min(ends), max(ends)])
    assert low3 < 0 < high3
    none = verdict("abs(delta(L0H1)) / abs(delta(L0H3)) > 0", clear)
    assert not none.holds
    between = verdict("abs(delta(L0H1)) > delta(L0H0)", clear)
    low0, high0 = interval(rows[0], 97.5)
    assert [between.low, between.high] == pytest.approx([-high1 - high0, -low1 - low0])


def test_absolute_value_is_decided_by_two_one_sided_tests(clear: ExperimentResult) -> None:
    rows = clear.measures[0].patched
    low, high = interval(rows[1], 95.0)
    found = verdict("abs(delta(L0H1)) > 2.5", clear)
    assert [found.low, found.high] == pytest.approx([-high, -low])
    assert found.holds
    assert "two one-sided tests, each at 2.5 %" in (found.reason or "")
    low, high = interval(rows[3], 95.0)
    near = verdict("abs(delta(L0H3)) > 0", clear)
    assert [near.low, near.high] == pytest.approx([0.0, max(-low, high)])
    assert not near.holds
    bound = max(-low, high)
    for line, width in (("near 0 within", 0.0), ("in", bound)):
        for off, holds in ((1.01, True), (0.99, False)):
            to = f"{bound * off:.6f}"
            text = f"{line} {to}" if not width else f"in -{to}..{to}"
            said = verdict(f"delta(L0H3) {text}", clear)
            assert said.holds is holds
            assert "two one-sided tests, each at 2.5 %" in (said.reason or "")


def test_noise_of_shared_rows_creates_no_correlation_of_effects() -> None:
    """Shared noise creates no correlation, neither without effects nor of independent effects."""
    keys = list(range(100, 132))
    held = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        noise = random.normal(0, 1, (16, 32))
        one, two = (cells_of(noise, name=name, keys=keys) for name in ("one", "other"))
        nothing = verdict("pearson(delta, other) > 0.5", one, other=two)
        assert not nothing.holds
        assert nothing.reason is not None
        mine = cells_of(noise + random.normal(0, 0.7, (16, 1)), keys=keys)
        other = cells_of(noise + random.normal(0, 0.7, (16, 1)), name="other", keys=keys)
        held += verdict("pearson(delta, other) > 0.6", mine, other=other).holds
    assert held == 0


def test_rank_correlation_has_no_interval() -> None:
    random = np.random.default_rng(1)
    keys = list(range(100, 116))
    mine, other = (
        cells_of(random.normal(0, 1, (8, 16)), name=n, keys=keys) for n in ("e", "other")
    )
    found = verdict("spearman(delta, other) > -1 on mean", mine, other=other)
    expected = stats.spearmanr(mine.statistics[0].mean, other.statistics[0].mean).statistic
    assert found.value == pytest.approx(expected)
    assert found.holds
    assert found.low is None


def test_correlations_and_auroc_equal_scipy() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 5, (2, 3, 9)).astype(float)
    for ours, scipys in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        assert ours(a, b) == pytest.approx(
            [scipys(x, y).statistic for x, y in zip(a, b, strict=True)]
        )
    true = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0], dtype=float)
    for row, found in zip(a, auroc(a, true), strict=True):
        u = stats.mannwhitneyu(row[true > 0], row[true == 0]).statistic
        assert found == pytest.approx(u / 18)


def test_max_names_the_cell_with_too_few_prompts() -> None:
    rows = np.random.default_rng(0).normal(1, 1, (3, 20))
    rows[1, 3:] = np.nan
    found = verdict("max(delta) > 0", cells_of(rows))
    assert not found.holds
    assert "L0H1.z: 3 prompts: no interval below 5" in (found.reason or "")


def test_verdicts_do_not_depend_on_the_block_size(
    clear: ExperimentResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["max(delta) > 1", "argmax(delta) = L0H0", "mean(delta) < 0.2", "top 2 contains L0H0"]
    plain = [verdict(line, clear) for line in lines]
    monkeypatch.setattr("mechdsl.statistics.measurements.BLOCK_NUMBERS", 700)
    monkeypatch.setattr("mechdsl.statistics.intervals.BLOCK_NUMBERS", 700)
    for line, before in zip(lines, plain, strict=True):
        found = verdict(line, clear)
        assert (found.holds, found.reason) == (before.holds, before.reason)
        if before.low is not None:
            assert [found.low, found.high] == pytest.approx([before.low, before.high])


def test_row_permutation_leaves_expectations_bit_identical() -> None:
    random = np.random.default_rng(6)
    patched, base = random.normal(1, 1, (3, 60)), random.normal(0, 1, (1, 60))
    keys, topics = random.permutation(5000)[:60], random.integers(0, 9, 60)
    order = random.permutation(60)

    def bounds(rows: np.ndarray) -> list[object]:
        plain = cells_of(patched[:, rows], base=base[:, rows], keys=keys[rows].tolist())
        made = finished(
            replace(plain, row_values={"topic": topics[rows].tolist()}),
            "mean(delta) > 0",
            "max(delta) > 0",
            "delta(L0H0) > delta(L0H1)",
            by="topic",
        )
        return [(each.low, each.high) for each in made.outcomes]

    assert bounds(order) == bounds(np.arange(60))


def test_value_of_constants_has_a_zero_width_interval(clear: ExperimentResult) -> None:
    value = Arithmetic(operator="*", left=ConstantValue(value=2.0), right=ConstantValue(value=3.0))
    assert read(clear, value) == (6.0, 6.0, 6.0)


def test_argmin_lead_lies_within_its_interval() -> None:
    """The printed lead of argmin is positive, as for argmax."""
    (outcome,) = finished(heads(), "argmin(recovery) = L1H3").outcomes
    assert outcome.holds
    found = re.fullmatch(r"ahead of (\S+): (\S+) \[(\S+), (\S+)\]", outcome.reason or "")
    assert found is not None
    value, low, high = (float(found[n]) for n in (2, 3, 4))
    result = finished(heads())
    means = result.statistics[0].mean
    other = next(i for i, cell in enumerate(result.cells) if cell.name == found[1])
    assert low < value < high
    assert value == pytest.approx(means[other] - means.min(), rel=5e-3)
