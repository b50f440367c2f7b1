"""Means, intervals, masks, groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from mechdsl.program import spec
from mechdsl.statistics.cell_statistics import (
    check_denominator,
    compute_category_statistics,
    compute_cell_statistics,
)
from mechdsl.statistics.intervals import percentiles
from mechdsl.statistics.measurements import CellStatistics, MeasureData, Resamples, SamplingDesign
from mechdsl.vocab.metrics import EFFECTS

from .synthetic import SPAN, measure, statistics


def one(
    data: MeasureData, settings: spec.Statistics | None = None, seed: int = 0, **values: Any
) -> CellStatistics:
    found = compute_cell_statistics(
        [data], settings or statistics(), seed, effects=EFFECTS, **values
    )
    return found[0]


@pytest.fixture(name="runs")
def _runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    base = random.normal(-1, 1, (1, 40))
    source = base + random.normal(4, 1, (1, 40))
    patched = base + np.array([[0.0], [0.5], [1.0]]) * (source - base)
    return patched + random.normal(0, 0.2, patched.shape), base, source


def test_effects_are_computed_on_means(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    p, b, s = patched.mean(1), base.mean(), source.mean()
    expected = {
        "raw": p,
        "total": np.full(3, s - b),
        "delta": p - b,
        "recovery": (p - b) / (s - b),
        "faithfulness": (p - s) / (b - s),
        "completeness": (p - s) / (b - s),
        "minimality": (b - p) / s,
        "relative": (p - b) / abs(b),
    }
    assert list(expected) == list(EFFECTS)
    for effect, values in expected.items():
        found = one(measure(patched, base, source, effect=effect))
        assert found.mean == pytest.approx(values), effect
        assert EFFECTS[effect].of_means(p, b, s) == pytest.approx(values)
        assert found.base_mean == pytest.approx([b] * 3)
        assert found.source_mean == pytest.approx([s] * 3)
        assert (found.low <= found.mean).all()
        assert (found.high >= found.mean).all()


def test_relative_per_prompt_is_the_mean_of_ratios(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, _ = runs
    found = one(measure(patched, base, effect="relative", per_prompt=True))
    assert found.mean == pytest.approx(((patched - base) / np.abs(base)).mean(1))
    base = base.copy()
    base[0, 3] = 0.0
    found = one(measure(patched, base, effect="relative", per_prompt=True))
    assert found.n.tolist() == [40] * 3
    assert found.reasons[0] == "the base run's value is 0 in 1 of 40 prompts"


@pytest.mark.parametrize("prompts", [8, 40])
def test_coverage_is_near_the_confidence(prompts: int) -> None:
    random = np.random.default_rng(5)
    # 2000 experiments at once: each is a cell, and cells share weights only
    deltas = random.gamma(2.0, 1.0, (2000, prompts))
    found = one(measure(deltas, np.zeros(prompts)), statistics(resamples=1500, confidence=90.0))
    covered = ((found.low <= 2.0) & (found.high >= 2.0)).mean()
    assert 0.88 < covered < 0.97


def test_results_do_not_depend_on_blocks(
    runs: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = measure(*runs)
    whole = one(data)
    monkeypatch.setattr("mechdsl.statistics.measurements.BLOCK_NUMBERS", 500)
    monkeypatch.setattr("mechdsl.statistics.intervals.BLOCK_NUMBERS", 500)
    monkeypatch.setattr("mechdsl.statistics.intervals.BLOCK_NUMBERS", 500)
    parts = one(data)
    for key in ("mean", "low", "high", "p"):
        assert getattr(parts, key) == pytest.approx(getattr(whole, key), abs=1e-12)
    patched, base, source = runs
    steps = np.arange(3.0)
    each = one(measure(patched, base + steps[:, None], source - steps[:, None]))
    assert each.base_mean == pytest.approx(base.mean() + steps)
    assert each.source_mean == pytest.approx(source.mean() - steps)


def test_percentiles_ignore_missing_resamples() -> None:
    random = np.random.default_rng(6)
    samples = random.normal(0, 1, (200, 4)) * [1, 2, 3, 4]
    samples[::3, 1], samples[:, 2] = np.nan, np.nan
    low, high = percentiles(samples, (5.0, 95.0))
    for cell in (0, 1, 3):
        own = samples[:, cell]
        expected = np.percentile(own[~np.isnan(own)], [5, 95])
        assert [low[cell], high[cell]] == pytest.approx(expected)
    assert np.isnan([low[2], high[2]]).all()


def test_row_order_does_not_affect_statistics(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    ids = list(range(100, 140))
    order = np.random.default_rng(2).permutation(40)
    groups = np.array([i % 7 for i in range(40)])
    for by, shuffled in ((None, None), (groups, groups[order])):
        plain = one(measure(patched, base, source), ids=ids, groups=by)
        moved = one(
            measure(patched[:, order], base[:, order], source[:, order]),
            ids=[ids[i] for i in order],
            groups=shuffled,
        )
        for key in ("mean", "low", "high", "p", "p_corrected"):
            assert getattr(moved, key).tolist() == getattr(plain, key).tolist(), key


def test_missing_rows_are_dropped_from_base_and_source(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = (array.copy() for array in runs)
    patched[1, :15] = np.nan
    found = one(measure(patched, base, source))
    assert found.n.tolist() == [40, 25, 40]
    p, b, s = (array[..., 15:].mean(-1) for array in (patched[1], base[0], source[0]))
    assert found.mean[1] == pytest.approx((p - b) / (s - b))
    assert found.base_mean[1] == pytest.approx(b)
    total = one(measure(patched, base, source, effect="total"))
    assert total.n.tolist() == [40, 25, 40], "also where what is patched doesn't matter"
    assert total.mean[1] == pytest.approx(s - b)
    alone = one(measure(patched[1:2, 15:], base[:, 15:], source[:, 15:]))
    width = alone.high[0] - alone.low[0]
    assert found.low[1] == pytest.approx(alone.low[0], abs=0.15 * width)
    assert found.p[1] == pytest.approx(alone.p[0], abs=0.01)
    assert found.units.tolist() == [40, 25, 40]


def test_base_and_source_may_differ_between_cells(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    bases, sources = np.repeat(base, 3, 0), np.repeat(source, 3, 0)
    same = one(measure(patched, bases, sources))
    assert same.mean == pytest.approx(one(measure(patched, base, source)).mean)
    bases[2] += 1.0
    moved = one(measure(patched, bases, sources))
    assert moved.mean[:2].tolist() == same.mean[:2].tolist()
    assert moved.base_mean[2] == pytest.approx(base.mean() + 1)


def test_cell_without_prompts_is_nan_with_a_reason(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    empty = patched.copy()
    empty[0], empty[1, 1:] = np.nan, np.nan
    found = one(measure(empty, base, source))
    assert found.reasons[0] == "no prompt is part of this cell"
    assert np.isnan([found.mean[0], found.low[0], found.p[0], found.p_corrected[0]]).all()
    assert found.reasons[1] == "1 prompt: no interval below 5"
    assert np.isfinite(found.mean[1])
    assert np.isnan([found.low[1], found.high[1]]).all()
    assert np.isnan(found.p[1])


def test_infinite_values_are_nan_with_a_reason(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, _ = (array.copy() for array in runs)
    patched[0, 0] = -np.inf
    found = one(measure(patched, base))
    assert np.isnan([found.mean[0], found.low[0], found.p[0]]).all()
    assert found.reasons[0] == "infinite for at least one prompt"
    assert np.isfinite(found.mean[1:]).all()


def test_inert_cells_stay_out_of_the_correction(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = (array.copy() for array in runs)
    patched[0] = base
    inert = np.array([True, False, False])
    found = one(measure(patched, base, source, inert=inert))
    assert found.tests == 2
    assert [found.mean[0], found.low[0], found.high[0]] == [0.0, 0.0, 0.0]
    assert np.isnan(found.p[0])
    assert found.reasons[0] == "cannot differ from the base run: not tested"
    assert found.p_corrected[1] == pytest.approx(2 * found.p[1])


@pytest.mark.parametrize("out", ["inert", "missing"])
def test_correction_counts_only_tested_cells(out: str) -> None:
    base, inert = np.zeros((1, 40)), np.zeros(80, dtype=bool)
    patched = np.ones((80, 40)) + np.arange(40) * 1e-3
    if out == "inert":
        inert[:20], patched[:20] = True, 0
    else:
        patched[:20] = np.nan
    found = one(measure(patched, base, inert=inert))
    assert found.tests == 60
    assert 0 < found.p[-1] < 1e-9
    assert found.p_corrected[-1] == pytest.approx(60 * found.p[-1])


def test_correction_runs_over_all_measures(runs: tuple[np.ndarray, ...]) -> None:
    patched, base, source = runs
    measures = [
        measure(patched, base),
        measure(patched, base, source),
        measure(patched, base, effect="raw"),
    ]
    found = compute_cell_statistics(measures, statistics(), 0, effects=EFFECTS)
    assert [each.tests for each in found] == [6, 6, 6]
    assert np.isnan(found[2].p).all()
    assert found[2].reasons[0] == "`raw` is not a difference: no p"
    assert found[0].p_corrected.min() == pytest.approx(6 * found[0].p.min())


def test_groups_are_resampled_as_units() -> None:
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(8), 10)
    deltas = random.normal(0, 1, 8)[groups] + random.normal(0, 0.01, 80)
    rows = one(measure(deltas[None], np.zeros(80)))
    whole = one(measure(deltas[None], np.zeros(80)), groups=groups)
    # all variance is between groups, so rows overstate the sample size by a factor of 10, and
    # with 8 groups the interval is asymmetric
    ratio = (whole.high[0] - whole.low[0]) / (rows.high[0] - rows.low[0])
    assert 2.4 < ratio < 6
    sums = np.array([deltas[groups == g].sum() for g in range(8)])
    assert whole.p == pytest.approx(one(measure(sums[None], np.zeros(8))).p)
    assert rows.test is not None
    assert whole.test is not None
    assert "over prompts," in rows.test
    assert "over groups," in whole.test
    named = one(measure(deltas[None], np.zeros(80)), statistics(by="topic"), groups=groups)
    assert "over values of topic," in (named.test or "")
    assert (whole.n.tolist(), whole.units.tolist()) == ([80], [8])
    few = one(measure(deltas[None], np.zeros(80)), groups=groups // 2)
    assert few.reasons == ("4 groups: no interval below 5",)
    assert np.isnan([few.low, few.high]).all(), "its prompts were drawn together"


def test_weights_are_draws_with_replacement() -> None:
    draws = Resamples(9, 5000, 4)
    weights = np.concatenate(list(draws.weights()))
    assert weights.shape == (5000, 9)
    assert (weights.sum(1) == 9).all()
    assert weights.mean(0) == pytest.approx(1.0, abs=0.06)
    assert weights.var(0) == pytest.approx(8 / 9, abs=0.1)
    other = Resamples(9, 5000, 5)
    assert (weights != np.concatenate(list(other.weights()))).any()
    cut = list(draws.weights(100_000))
    assert len(cut) > 10
    assert np.array_equal(np.concatenate(cut), weights)


def test_resamples_keep_the_size_of_each_stratum() -> None:
    strata = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1])
    draws = Resamples(9, 5000, 4, strata)
    weights = np.concatenate(list(draws.weights()))
    assert (weights[:, strata == 0].sum(1) == 4).all()
    assert (weights[:, strata == 1].sum(1) == 5).all()
    assert weights[:, strata == 0].var(0) == pytest.approx(3 / 4, abs=0.1)
    assert weights.mean(0) == pytest.approx(1.0, abs=0.06)
    cut = list(draws.weights(100_000))
    assert len(cut) > 10
    assert np.array_equal(np.concatenate(cut), weights)


def test_category_statistics_have_commonest_value_and_share() -> None:
    values = np.array([[3, 3, 4, 2, 3], [1, 2, np.nan, 2, 1], [np.nan] * 5], dtype=float)
    truth = np.array([[3, 3, 3, 3, 3]], dtype=float)
    found = compute_category_statistics(values, truth)
    assert found.commonest[:2].tolist() == [3, 1]  # of 1 and 2, equally common, the smaller
    assert found.share[:2] == pytest.approx([0.6, 0.5])
    assert found.mean_error[:2] == pytest.approx([0.4, 1.5])
    assert found.n.tolist() == [5, 4, 0]
    assert found.reasons == (
        "a category has no mean",
        "a category has no mean",
        "no prompt is part of this cell",
    )
    assert np.isnan(compute_category_statistics(values, None).mean_error).all()


def test_category_errors_use_the_truth_of_each_cell() -> None:
    """If a position names an item, the correct number differs between cells."""
    values = np.array([[3, 4], [3, 4]], dtype=float)
    found = compute_category_statistics(values, np.array([[3, 4], [5, 8]], dtype=float))
    assert found.mean_error.tolist() == [0, 3]


def test_denominator_near_zero_is_rejected(runs: tuple[np.ndarray, ...]) -> None:
    _, base, source = runs
    sampling, recovery = SamplingDesign(40, statistics(), 0), EFFECTS["recovery"]
    assert check_denominator(base, source, sampling, SPAN, effect=recovery) == []
    near = base + np.random.default_rng(0).normal(0, 1, base.shape)
    (found,) = check_denominator(base, near, sampling, SPAN, effect=recovery)
    assert found.code == "E0604"
    (found,) = check_denominator(base, base, sampling, SPAN, effect=recovery)
    assert "0" in found.message
    relative = EFFECTS["relative"]
    assert check_denominator(base, None, sampling, SPAN, effect=relative) == []
    (found,) = check_denominator(base - base.mean(), None, sampling, SPAN, effect=relative)
    assert "m(base)" in found.label_text
    assert check_denominator(base, None, sampling, SPAN, effect=EFFECTS["delta"]) == []
    lone = check_denominator(
        base[:, :1], base[:, :1], SamplingDesign(1, statistics(), 0), SPAN, effect=recovery
    )
    assert [each.code for each in lone] == ["E0604"]


def test_denominator_near_zero_by_groups_is_rejected() -> None:
    """The denominator differs from 0 by prompts, but not by the four groups."""
    groups = np.repeat(np.arange(4), 20)
    base = np.array([-1.0, 0.5, 2.0, 1.5])[groups][None]
    relative = EFFECTS["relative"]
    rows, by = (
        SamplingDesign(80, statistics(), 0),
        SamplingDesign(80, statistics(), 0, groups=groups),
    )
    assert check_denominator(base, None, rows, SPAN, effect=relative) == []
    (found,) = check_denominator(base, None, by, SPAN, effect=relative)
    assert found.code == "E0604"
    order = np.random.default_rng(0).permutation(80)
    by = SamplingDesign(80, statistics(), 0, order.tolist(), groups[order])
    (moved,) = check_denominator(base[:, order], None, by, SPAN, effect=relative)
    assert moved.label_text == found.label_text
    means = np.array([-1.0, 0.5, 2.0, 1.5])
    width = stats.t.ppf(0.975, 3) * means.std(ddof=1) / 2
    assert f"[{0.75 - width:.3g}, {0.75 + width:.3g}]" in found.label_text
