"""Intervals of means and ratios against a bootstrap-t in plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechdsl.program import spec
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.intervals import (
    StudentisedCells,
    percentiles,
    simultaneous_bounds,
    skewed_t,
    standard_error,
    studentise,
)
from mechdsl.statistics.measurements import (
    CellStatistics,
    EffectSums,
    MeasureData,
    Resamples,
    UnitRows,
    find_units,
)
from mechdsl.vocab.metrics import EFFECTS

from .synthetic import measure, statistics

RESAMPLES = 4000


def one(
    data: MeasureData, settings: spec.Statistics | None = None, **values: Any
) -> CellStatistics:
    settings = settings or statistics(resamples=RESAMPLES, test="bootstrap")
    return compute_cell_statistics([data], settings, 0, effects=EFFECTS, **values)[0]


Unit = tuple[float, float] | None
"""Sums of numerators and denominators in a unit; None if the cell lacks the unit."""


def ratio_and_error(units: list[Unit], held: int, strata: list[int] | None) -> tuple[float, float]:
    there = [unit for unit in units if unit is not None]
    bottom = sum(b for _, b in there)
    if bottom == 0:
        return 0.0, 0.0
    value = sum(t for t, _ in there) / bottom
    if strata is None:
        variance = held / (held - 1) * sum((t - value * b) ** 2 for t, b in there)
        return value, variance**0.5 / abs(bottom)
    variance = 0.0
    for stratum in set(strata):
        pairs = [unit for unit, own in zip(units, strata, strict=True) if own == stratum]
        left = [unit[0] - value * unit[1] for unit in pairs if unit is not None]
        middle = sum(left) / len(left)
        variance += len(left) / (len(left) - 1) * sum((x - middle) ** 2 for x in left)
    return value, variance**0.5 / abs(bottom)


def reference_interval(
    units: list[Unit],
    strata: list[int] | None = None,
    confidence: float = 95.0,
    own: np.random.Generator | None = None,
) -> tuple[float, float, float, float]:
    """Return value, error, low and high from the program's resamples, or from those of `own`."""
    held = len(units) - units.count(None)
    value, error = ratio_and_error(units, held, strata)
    draws = Resamples(len(units), RESAMPLES, 0, None if strata is None else np.array(strata))
    pivots: list[float] = []
    for drawn in np.concatenate(list(draws.weights())).astype(int):
        if own is None:
            rows = np.repeat(np.arange(len(units)), drawn).tolist()
        else:
            rows = own.integers(0, len(units), len(units)).tolist()
        labels = None if strata is None else [strata[i] for i in rows]
        moved, moved_error = ratio_and_error([units[i] for i in rows], held, labels)
        if moved_error > 1e-9:
            pivots.append((moved - value) / moved_error)
    tail = (100 - confidence) / 2
    lower, upper = np.percentile(pivots, [tail, 100 - tail])
    t = stats.t.ppf(1 - tail / 100, held - (1 if strata is None else len(set(strata))))
    return value, error, value - error * max(upper, t), value - error * min(lower, -t)


def same(found: CellStatistics, cell: int, expected: tuple[float, float, float, float]) -> None:
    value, _, low, high = expected
    assert found.mean[cell] == pytest.approx(value)
    assert [found.low[cell], found.high[cell]] == pytest.approx([low, high])


@pytest.fixture(name="runs")
def _runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    base = random.normal(-1, 1, (1, 24))
    source = base + random.normal(4, 1, (1, 24))
    patched = base + np.array([[0.0], [0.5]]) * (source - base)
    return patched + random.exponential(0.7, patched.shape), base, source


def pairs(top: np.ndarray, bottom: np.ndarray) -> list[Unit]:
    return list(zip(top.tolist(), bottom.tolist(), strict=True))


def test_mean_intervals_equal_a_plain_bootstrap_t(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, _ = runs
    found = one(measure(patched, base))
    for cell in range(2):
        same(found, cell, reference_interval(pairs(patched[cell] - base[0], np.ones(24))))
    wide = one(
        measure(patched, base), statistics(resamples=RESAMPLES, test="bootstrap", confidence=80.0)
    )
    same(wide, 0, reference_interval(pairs(patched[0] - base[0], np.ones(24)), confidence=80.0))


def test_mean_intervals_agree_with_independent_resamples(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, _ = runs
    found = one(measure(patched, base))
    for cell in range(2):
        units = pairs(patched[cell] - base[0], np.ones(24))
        _, error, low, high = reference_interval(units, own=np.random.default_rng(9))
        assert [found.low[cell], found.high[cell]] == pytest.approx([low, high], abs=0.35 * error)


def test_ratio_intervals_equal_a_plain_bootstrap_t(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    base, patched, source = base - 3, patched - 3, source - 3
    found = one(measure(patched, base, source))
    relative = one(measure(patched, base, effect="relative"))
    for cell in range(2):
        top = patched[cell] - base[0]
        same(found, cell, reference_interval(pairs(top, (source - base)[0])))
        assert base.mean() < 0
        same(relative, cell, reference_interval(pairs(top, -base[0])))


def test_cell_with_missing_rows_resamples_all_rows(runs: tuple[np.ndarray, ...]) -> None:
    """A resample draws from all rows, so the number of rows of a cell varies."""
    patched, base, source = (each.copy() for each in runs)
    patched[0, :10] = np.nan
    found = one(measure(patched, base, source))
    present = pairs((patched - base)[0, 10:], (source - base)[0, 10:])
    same(found, 0, reference_interval([*[None] * 10, *present]))
    same(found, 1, reference_interval(pairs((patched - base)[1], (source - base)[0])))
    assert found.units.tolist() == [14, 24]


def test_groups_and_identical_rows_are_resampled_as_units(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    groups = np.array(
        [0] * 5 + [1] * 1 + [2] * 4 + [3] * 2 + [4] * 2 + [5] * 3 + [6, 7, 7, 8, 9, 9, 9]
    )
    top, bottom = patched[1] - base[0], (source - base)[0]
    units: list[Unit] = [
        (float(top[groups == g].sum()), float(bottom[groups == g].sum())) for g in range(10)
    ]
    by_group = one(measure(patched, base, source), groups=groups)
    same(by_group, 1, reference_interval(units))
    assert (by_group.n.tolist(), by_group.units.tolist()) == ([24, 24], [10, 10])
    seen = one(measure(patched, base, source, seen=groups[None]))
    assert seen.low.tolist() == by_group.low.tolist()
    assert seen.p.tolist() == by_group.p.tolist()
    keys = one(measure(patched, base, source), ids=groups.tolist())
    assert keys.low.tolist() == by_group.low.tolist()
    # each cell has separate units: the first all rows, the second the groups
    both = one(measure(patched, base, source, seen=np.stack([np.arange(24), groups])))
    assert both.units.tolist() == [24, 10]
    assert both.low[1] == by_group.low[1]
    assert both.low[0] == one(measure(patched, base, source)).low[0]
    # groups that share identical rows are merged
    crossed = one(measure(patched, base, source, seen=(np.arange(24) // 2)[None]), groups=groups)
    assert crossed.units[0] < 10


def test_strata_are_resampled_separately(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, _ = runs
    strata = np.array([0, 1, 2] * 8)
    moved = patched + 3.0 * strata
    expected = reference_interval(pairs(moved[0] - base[0], np.ones(24)), strata.tolist())
    found = one(measure(moved, base), strata=strata)
    same(found, 0, expected)
    plain = one(measure(moved, base))
    assert (plain.high - plain.low)[0] > 2 * (found.high - found.low)[0]
    # strata this small are ignored, and so are strata under groups
    few = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 3)
    assert one(measure(moved, base), strata=few).low.tolist() == plain.low.tolist()
    groups = np.arange(24) % 12  # each in one stratum
    by_group = one(measure(moved, base), groups=groups)
    assert one(measure(moved, base), groups=groups, strata=strata).low[0] == by_group.low[0]


def test_five_to_seven_units_use_student_t_intervals() -> None:
    values = np.array([[0.2, 0.9, 0.4, 1.3, 0.1, 0.8, 0.5]])
    for n in (5, 6, 7):
        own = values[:, :n]
        found = one(measure(own, np.zeros(n)))
        low, high = stats.t.interval(0.95, n - 1, own.mean(), own.std(ddof=1) / n**0.5)
        low = min(low, 0.0) if n == 5 else low  # p of five is never below 5 %
        assert [found.low[0], found.high[0]] == pytest.approx([low, high])
        tested = one(measure(own, np.zeros(n)), statistics(test="bootstrap"))
        by_t = stats.ttest_1samp(own[0], 0).pvalue
        assert tested.p[0] == pytest.approx(max(by_t, 2.0 ** (1 - n)))
        assert not tested.floor[0]
    found = one(measure(values[:, :4], np.zeros(4)))
    assert np.isnan([found.low[0], found.high[0]]).all()
    assert found.mean[0] == pytest.approx(0.7)
    assert found.reasons == ("4 prompts: no interval below 5",)


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
@pytest.mark.parametrize("correction", ["holm", "max", "bh", "none"])
def test_equal_units_have_neither_interval_nor_p_but_count_as_a_test(
    test: str, correction: str
) -> None:
    deltas = np.stack([np.full(9, 0.3), np.full(9, 0.3) + 1e-6 * np.arange(9), np.arange(9) + 4.0])
    data = replace(measure(deltas, np.zeros(9)), rounding=np.full((1, 9), 5e-6))
    found = one(data, statistics(test=test, correction=correction))
    for values in (found.low, found.high, found.p, found.p_corrected):
        assert np.isnan(values).tolist() == [True, True, False]
    assert found.mean[:2] == pytest.approx([0.3, 0.3], abs=1e-5)
    assert found.reasons[:2] == ("all 9 prompts have the same value",) * 2
    assert found.equal.tolist() == [True, True, False]
    assert found.tests == 3
    if correction == "holm":
        assert found.p_corrected[2] == pytest.approx(3 * found.p[2])


@pytest.mark.parametrize(("value", "n"), [(1.0, 8), (1.0, 5), (-0.4, 20), (0.0, 12), (0.05, 40)])
def test_equal_probabilities_have_the_interval_of_their_range(value: float, n: int) -> None:
    """All n units have one value with probability (1 − q)ⁿ if a share q has another one."""
    data = measure(np.full((1, n), 0.5 + value / 2), np.full(n, 0.5 - value / 2),
                   metric="prob(answer)", unit="probability")  # fmt: skip
    found = one(data)
    q = 1 - 0.025 ** (1 / n)
    ends = value - q * (value + 1), value + q * (1 - value)
    assert (found.low[0], found.high[0]) == pytest.approx(ends)
    levels = np.logspace(-12, 0, 4001)
    reaches = [value - (1 - (a / 2) ** (1 / n)) * (value + 1) <= 0 for a in levels]
    if value > 0:
        assert found.p[0] == pytest.approx(levels[np.argmin(reaches) - 1], rel=0.02)
    assert (found.p[0] < 0.05) == (found.low[0] > 0 or found.high[0] < 0)


@pytest.mark.slow
def test_p_is_below_the_level_where_the_interval_excludes_zero() -> None:
    random = np.random.default_rng(2)
    n = 20
    for deltas in (
        random.normal(0.45, 1, (300, n)),
        random.exponential(1, (300, n)) - 0.6,
        np.where(random.random((300, n)) < 0.9, 1.0, random.normal(0, 1, (300, n))),
    ):
        settings = statistics(test="bootstrap", correction="none", resamples=20_000)
        found = one(measure(deltas, np.zeros(n)), settings)
        excluded = (found.low > 0) | (found.high < 0)
        clear = np.abs(found.p - 0.05) > 0.002
        assert clear.sum() > 200
        assert ((found.p <= 0.05) == excluded)[clear].all()
        assert excluded.sum() > 20


def test_resamples_without_spread_are_ignored() -> None:
    """About a third of the resamples of eight values lack the one value that differs."""
    deltas = np.array([[1.0] * 7 + [0.2]])
    found = one(measure(deltas, np.zeros(8)), statistics(test="bootstrap"))
    assert found.low[0] > 0.3
    assert found.p[0] < 0.05


def made(tops: np.ndarray) -> EffectSums:
    cells, units = tops.shape
    return EffectSums(tops, np.ones((1, units)), np.full(cells, units))


def test_percentiles_equal_numpy() -> None:
    samples = np.random.default_rng(0).normal(0, 1, (333, 7))
    low, high = percentiles(samples, (2.5, 97.5))
    assert [low, high] == pytest.approx(np.percentile(samples, [2.5, 97.5], axis=0))


def test_simultaneous_bounds_equal_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    tops = random.normal(0, 1, (6, 20)) * np.array([[1.0], [5], [1], [0.1], [1], [2]]) + 0.3
    tops[4] = 0.7  # no unit differs
    tops[5] = tops[0] * 3 + 1
    draws = Resamples(20, 3000, 7)
    found = simultaneous_bounds(made(tops), draws, 95.0)
    weights = np.concatenate(list(draws.weights()))
    assert weights.shape == (3000, 20)
    greatest, least = [], []
    errors = [row.std(ddof=1) / 20**0.5 for row in tops]
    for drawn in weights.astype(int):
        pivots = []
        for cell in (0, 1, 2, 3, 5):
            rows = np.repeat(tops[cell], drawn)
            pivots.append((rows.mean() - tops[cell].mean()) / (rows.std(ddof=1) / 20**0.5))
        greatest.append(max(pivots))
        least.append(min(pivots))
    upper, lower = np.percentile(greatest, 97.5), np.percentile(least, 2.5)
    for cell in (0, 1, 2, 3, 5):
        mean = tops[cell].mean()
        assert found.low_together[cell] == pytest.approx(mean - upper * errors[cell])
        assert found.high_together[cell] == pytest.approx(mean - lower * errors[cell])
    assert found.low_together[4] == found.high_together[4] == pytest.approx(0.7)
    alone = studentise(made(tops), draws).interval(95.0)
    assert found.low == pytest.approx(alone[0])
    assert found.high == pytest.approx(alone[1])
    assert (found.low_together <= found.low + 1e-12).all()


def test_simultaneous_bounds_of_few_units_use_bonferroni() -> None:
    tops = np.random.default_rng(3).normal(0.5, 1, (4, 6))
    found = simultaneous_bounds(made(tops), Resamples(6, 500, 0), 95.0)
    t = stats.t.ppf(1 - 0.025 / 4, 5)
    error = tops.std(1, ddof=1) / 6**0.5
    assert found.low_together == pytest.approx(tops.mean(1) - t * error)
    assert found.high_together == pytest.approx(tops.mean(1) + t * error)


def test_simultaneous_bounds_of_sparse_cells_are_finite() -> None:
    sparse = np.zeros((3, 12))
    sparse[0, 0], sparse[1, 1], sparse[2] = 1.0, 1.0, np.arange(12)
    found = simultaneous_bounds(made(sparse), Resamples(12, 2000, 0), 95.0)
    t = stats.t.ppf(1 - 0.025 / 3, 11)
    assert np.isfinite(found.low_together).all()
    assert (found.low_together > -20).all()
    assert found.low_together[0] <= 1 / 12 - t * standard_error(made(sparse))[0] + 1e-12


def test_cell_without_a_bound_keeps_the_bounds_of_other_cells() -> None:
    tops = np.random.default_rng(3).normal(0.5, 1, (3, 20))
    sums = made(tops)
    bottom = np.ones((3, 20))
    bottom[1, 3:], tops[1, 3:] = 0.0, 0.0
    few = replace(sums, top=tops, bottom=bottom, held=np.array([20, 3, 20]))
    found = simultaneous_bounds(few, Resamples(20, 500, 0), 95.0)
    two = simultaneous_bounds(few.chosen(np.array([0, 2])), Resamples(20, 500, 0), 95.0)
    assert np.isnan([found.low_together[1], found.high[1]]).all()
    assert found.low_together[[0, 2]] == pytest.approx(two.low_together)


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
def test_max_correction_lies_between_holm_and_none(test: str) -> None:
    random = np.random.default_rng(4)
    shared = random.normal(0.75, 1, (1, 24))
    deltas = shared + random.normal(0, 0.2, (20, 24))
    data = measure(deltas, np.zeros(24))
    found = {
        name: one(data, statistics(correction=name, test=test)) for name in ("max", "holm", "none")
    }
    p = {name: each.p_corrected for name, each in found.items()}
    assert (p["max"] >= found["max"].p).all()
    assert (p["max"] < 0.7 * p["holm"]).all()
    assert p["none"].tolist() == found["none"].p.tolist()
    raw = one(measure(deltas, np.zeros(24), effect="raw"), statistics(correction="max", test=test))
    assert np.isnan(raw.p_corrected).all()
    assert raw.tests == 0


def test_max_corrected_p_is_never_below_p() -> None:
    """Pairs cancel out in one cell; in the other cell, the rows of a pair are one unit."""
    deltas = np.tile([6.0, -4.0], 12) + np.zeros((2, 1))
    deltas[1] += np.repeat(np.arange(12) * 1e-3, 2)
    seen = np.stack([np.arange(24), np.arange(24) // 2])
    found = one(measure(deltas, np.zeros(24), seen=seen), statistics(correction="max"))
    assert found.p[1] < 1e-3
    assert found.p[0] > 0.2
    assert found.p_corrected[0] >= found.p[0]


def test_stratified_error_is_centred_on_each_stratum_mean() -> None:
    tops = np.array([[1.0, 2.0, 3.0, 10.0, 14.0, 12.0]])
    strata = np.array([0, 0, 0, 1, 1, 1])
    expected = np.sqrt(3 * 1.0 + 3 * 4.0) / 6
    assert standard_error(made(tops), strata) == pytest.approx([expected])
    found = StudentisedCells(np.zeros(1), np.ones(1), np.zeros((0, 1)), np.array([6]), 2)
    assert found.freedom.tolist() == [4]


def test_units_are_numbered_by_content() -> None:
    keys = [50, 10, 30, 10, 20]
    seen = np.array([0, 1, 0, 2, 3])
    units = find_units([UnitRows.of(5, keys, [seen])])
    # 50 and 30 are indistinguishable, 10 occurs twice
    assert units.codes[0].tolist() == [2, 0, 2, 0, 1]
    assert units.count == 3
    values = np.array([[1.0, 2.0, 4.0, 8.0, 16.0]])
    assert units.total(values).tolist() == [[10.0, 16.0, 5.0]]
    assert units.held(~np.isnan(np.array([[1, 1, np.nan, np.nan, np.nan]]))).tolist() == [2]
    two = find_units([UnitRows.of(2, [7, 5]), UnitRows.of(3, [5, 9, 7])])
    assert [each.tolist() for each in two.codes] == [[1, 0], [0, 2, 1]]
    assert two.total(np.array([[1.0, 2.0]])).tolist() == [[2.0, 1.0, 0.0]]


@pytest.mark.parametrize("by", ["rows", "groups", "seen", "strata"])
@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
def test_row_permutation_leaves_statistics_bit_identical(
    by: str, test: str, runs: tuple[np.ndarray, ...]
) -> None:
    patched, base, source = (each.copy() for each in runs)
    patched[1, 3:6] = np.nan
    random = np.random.default_rng(2)
    order = random.permutation(24)
    keys = random.integers(0, 2**62, 24)
    labels = random.permutation(np.arange(24) % 6)
    given: dict[str, np.ndarray] = {by: labels} if by in ("groups", "strata") else {}
    seen = labels[None] if by == "seen" else None
    rounding = random.random((1, 24))
    settings = statistics(test=test, correction="max")
    plain = one(
        measure(patched, base, source, seen=seen, rounding=rounding),
        settings,
        ids=keys.tolist(),
        **given,
    )
    moved = one(
        measure(
            patched[:, order],
            base[:, order],
            source[:, order],
            # the labels of `seen` change with the order
            seen=None if seen is None else 5 - seen[:, order],
            rounding=rounding[:, order],
        ),
        settings,
        ids=keys[order].tolist(),
        **{key: value[order] for key, value in given.items()},
    )
    for key in ("mean", "low", "high", "p", "p_corrected", "base_mean", "source_mean", "rounding"):
        np.testing.assert_array_equal(getattr(moved, key), getattr(plain, key), key)


def test_ratio_with_a_denominator_near_zero_has_no_value() -> None:
    random = np.random.default_rng(4)
    base = np.repeat(random.normal(0, 1, (1, 30)), 3, axis=0)
    source = base + random.normal(3, 1, (3, 30))
    noise = random.normal(0, 1, 30)
    source[1] = base[1] + noise - noise.mean() + 0.1
    source[2] = base[2]
    patched = base + 1 + random.normal(0, 1, base.shape)
    found = one(measure(patched, base, source))
    for key in ("mean", "low", "high", "p", "p_corrected"):
        assert np.isnan(getattr(found, key)).tolist() == [False, True, True], key
    assert found.tests == 1
    bottom = (source - base)[1]
    low, high = (end[0] for end in skewed_t(made(bottom[None])).interval(95.0, 2))
    text = f"m(source) − m(base) is too close to 0 there: {bottom.mean():.3g}"
    assert found.reasons[1] == f"{text} [{low:.3g}, {high:.3g}]"
    assert found.reasons[2] == "m(source) − m(base) is 0"
    # the denominator may be 0 by groups, but not by rows
    groups = np.arange(30) // 6
    shifted = base[:1] + np.repeat([5.0, -1, 4, 2, 0], 6)[None]
    rows = one(measure(patched[:1], base[:1], shifted))
    assert np.isfinite(rows.mean[0])
    whole = one(measure(patched[:1], base[:1], shifted), groups=groups)
    assert np.isnan([whole.mean[0], whole.low[0], whole.p[0]]).all()


def test_cells_with_no_prompts_or_infinite_values_have_no_p() -> None:
    deltas = np.ones((3, 9)) + np.arange(9) * 1e-3
    deltas[0], deltas[1, 2] = np.nan, np.inf
    with np.errstate(all="raise"):
        for test in ("t", "flips", "bootstrap"):
            for correction in ("max", "holm"):
                found = one(
                    measure(deltas, np.zeros(9)), statistics(test=test, correction=correction)
                )
                assert np.isfinite(found.p).tolist() == [False, False, True]
                assert found.low[2] <= found.mean[2] == pytest.approx(1.004)
    none = one(measure(np.zeros((1, 0)), np.zeros((1, 0))))
    assert np.isnan([none.mean[0], none.low[0], none.p[0]]).all()
