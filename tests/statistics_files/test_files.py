"""Regression tests of files whose results once contained false claims.

`functions.py` has the metrics. Tests check the meaning of numbers and verdicts, and compute them
independently of the package where possible.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.table import group_by_value
from mechdsl.show.reports.text import is_significant

HERE = Path(__file__).parent

NOISES = ("noise", "again", "once_more")


@cache
def results(name: str) -> mechdsl.Results:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        return mechdsl.run(HERE / f"{name}.mech", allow_python=True, progress=False)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's t interval of independent values."""
    found = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def deltas(result: ExperimentResult, measure: int = 0) -> np.ndarray:
    """[cell, prompt]."""
    data = result.measures[measure]
    return data.patched - data.base


# --- many cells at once


@pytest.mark.parametrize("place", range(5))
def test_noise_has_no_largest_effect(place: int) -> None:
    """Each expectation holds by chance in at most 5 % of experiments, of which there are three."""
    held = [
        results("noise")[name].outcomes[place].holds for name in ("noise", "again", "once_more")
    ]
    assert sum(held) <= 1


def test_noise_metrics_have_no_significant_cell() -> None:
    for name in NOISES:
        found = deltas(results("noise")[name])
        assert found.std() == pytest.approx(np.sqrt(2), rel=0.2)
        assert not is_significant(results("noise")[name], 0).any()


@pytest.mark.slow
def test_clear_effects_are_significant_among_384_cells() -> None:
    result = results("many_cells")["neurons"]
    assert len(result.cells) == 384
    found = deltas(result)
    p = stats.ttest_1samp(found, 0, axis=1).pvalue
    clear = (p * len(p) < 1e-5) & ~result.statistics[0].at_rounding
    assert clear.sum() >= 3
    assert is_significant(result, 0)[clear].all()


# --- shares


def test_accuracy_covers_the_rows_before_keep() -> None:
    result = results("accuracy_of_kept_rows")["kept"]
    (outcome,) = result.outcomes
    assert result.prompts == 3
    assert not outcome.holds
    assert outcome.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("n", [2, 8])
def test_perfect_accuracy_has_the_clopper_pearson_interval(n: int) -> None:
    """The interval is exact for any number of rows; for two of two it begins at 0.158."""
    found = results("all_right")[f"of_{n}"].statistics[0]
    assert (found.mean[0], found.high[0]) == (1.0, 1.0)
    assert found.low[0] == pytest.approx(0.025 ** (1 / n), abs=1e-9)


def test_mean_of_two_prompts_has_no_interval() -> None:
    means = results("all_right")["of_2"].statistics[1]
    assert np.isfinite(means.mean).all()
    assert np.isnan([means.low[0], means.high[0]]).all()
    assert "2 prompts: no interval below 5" in (means.reasons[0] or "")


# --- rows as sampling units


def test_no_head_is_significant_by_count() -> None:
    result = results("few_values")["by_count"]
    assert len(set(result.row_values["a"])) == 7
    # all seven of one sign: 2 of 128 flips
    assert np.nanmin(result.statistics[0].p) >= 2 / 128
    assert not is_significant(result, 0).any()


def test_heads_are_significant_with_all_counts_of_the_domain() -> None:
    """`a in 3..9` is a fixed factor: no warning proposes to take its values as a sample."""
    found = results("few_values")
    assert is_significant(found["by_row"], 0).any()
    assert "W0722" not in [each.code for each in found.diagnostics]


@pytest.mark.parametrize("measure", [0, 1])
def test_rows_of_five_prefixes_count_as_five(measure: int) -> None:
    result = results("five_prefixes")["first_item"]
    values = result.measures[measure].patched[0]
    distinct = np.unique(values.round(4))
    assert (len(values), len(distinct)) == (100, 5)
    found = result.statistics[measure]
    low, high = t_interval(values)
    few_low, few_high = t_interval(distinct)
    width = found.high[0] - found.low[0]
    # as wide as that of five values, far from that of a hundred
    assert width > 3 * (high - low)
    assert 0.5 * (few_high - few_low) < width < 3 * (few_high - few_low)
    if measure == 1:
        assert found.p[0] >= 2 / 2**5


# --- ratios


def test_group_without_a_denominator_has_no_ratio() -> None:
    by_count = group_by_value(results("no_denominator")["by_item"], "count")
    data, found = by_count.measures[0], by_count.statistics[0]
    assert data.source is not None
    for cell, key in enumerate(by_count.cells):
        here = ~np.isnan(data.patched[cell])
        low, high = t_interval((data.source[0] - data.base[0])[here])
        assert (low <= 0 <= high) == (key.coords["count"] == 6)
        empty = np.isnan([found.mean[cell], found.low[cell], found.high[cell], found.p[cell]])
        assert empty.all() if low <= 0 <= high else not empty.any()
        assert bool(found.reasons[cell]) == (low <= 0 <= high)
        assert not (is_significant(by_count, 0)[cell] and low <= 0 <= high)


def test_ratio_over_all_rows_has_an_interval() -> None:
    found = results("no_denominator")["by_item"].statistics[0]
    assert np.isfinite([found.mean[0], found.low[0], found.high[0]]).all()


# --- rounding


def test_difference_in_the_last_bits_is_not_significant() -> None:
    result = results("one_step")["stepped"]
    largest = np.float32(np.abs(result.measures[1].base).max())
    for measure, found in enumerate(result.statistics):
        # a step or two of the largest logit, through all of a head's and a layer's sums
        assert (np.abs(found.mean) < 2 * np.spacing(largest)).all()
        assert found.equal.all()
        assert not is_significant(result, measure).any()


# --- controls


@pytest.mark.parametrize("name", ["head", "inside", "swept"])
def test_random_targets_are_distinct_and_their_number_is_printed(name: str) -> None:
    result = results("random_targets")[name]
    band = result.controls[0]
    assert band is not None
    # 4 layers of 4 heads, without the one that is patched
    assert np.all((band.draws > 0) & (band.draws <= 15))
    assert str(np.max(band.draws)) in result.to_text()


def test_null_band_level_is_limited_by_its_draws() -> None:
    band = results("random_targets")["head"].controls[0]
    assert band is not None
    draws = int(np.max(band.draws))
    # a further draw falls in the range of k draws with a probability of (k - 1) / (k + 1)
    assert np.all(band.level <= (draws - 1) / (draws + 1) + 1e-12)
    assert np.all(band.p >= 1 / (draws + 1))


def test_typical_head_lies_inside_its_null_band() -> None:
    result = results("random_targets")["inside"]
    band, found = result.controls[0], result.statistics[0]
    assert band is not None
    assert found.p[0] < 0.05
    assert band.low[0] <= found.mean[0] <= band.high[0]
    assert np.all(band.inside)
    assert np.all(band.p > 0.05)


# --- intervals of few rows


def test_intervals_of_eight_rows_are_about_as_wide_as_student_t() -> None:
    """A percentile interval of the bootstrap is a fifth narrower."""
    result = results("eight_rows")["few"]
    found = result.statistics[0]
    ends = np.array([t_interval(row) for row in deltas(result)])
    ratio = (found.high - found.low) / (ends[:, 1] - ends[:, 0])
    assert 0.9 < np.exp(np.log(ratio).mean()) < 1.7


# --- correlations


@pytest.mark.parametrize(
    ("name", "with_which"),
    [
        ("same_rows", "one"),
        ("other_rows", "one"),
        ("other_noise", "one"),
        ("twice", "an_effect"),
    ],
)
def test_correlation_expectation_fails_for_noise(name: str, with_which: str) -> None:
    one, other = results("correlations")[with_which], results("correlations")[name]
    effects, ranks = other.outcomes
    means = [deltas(result).mean(1) for result in (one, other)]
    cells = ~one.measures[0].inert
    expected = float(stats.spearmanr(means[0][cells], means[1][cells]).statistic)
    assert ranks.value == pytest.approx(expected, abs=1e-6)
    assert ranks.low is None
    if name == "twice":
        assert effects.low is not None
        assert effects.high is not None
        assert isinstance(effects.value, float)
        assert effects.low <= effects.value <= effects.high <= 1
        assert effects.low < effects.high
        return
    assert not effects.holds
    assert "beyond chance" in (effects.reason or "")


# --- skewed deltas


def test_conventions_state_the_assumption_of_sign_flips() -> None:
    flipped, inverted = results("skewed")["flipped"], results("skewed")["inverted"]
    assert stats.skew(deltas(flipped), axis=1).max() > 1
    assert any("symmetr" in said for said in flipped.conventions.values())
    assert not any("sign-flip" in said for said in inverted.conventions.values())
    tested = ~np.isnan(flipped.statistics[0].p)
    assert np.any(inverted.statistics[0].p[tested] != flipped.statistics[0].p[tested])


def test_bootstrap_p_agrees_with_its_interval() -> None:
    found = results("skewed")["inverted"].statistics[0]
    tested = ~np.isnan(found.p) & (np.abs(found.p - 0.05) > 0.01)
    outside = (found.low > 0) | (found.high < 0)
    assert tested.any()
    assert ((found.p < 0.05) == outside)[tested].all()


# --- order


def test_row_order_of_a_file_does_not_affect_results() -> None:
    one, other = results("in_order")["in_order"], results("in_order")["turned_around"]
    for mine, turned in zip(one.statistics, other.statistics, strict=True):
        for name in ("mean", "low", "high", "p", "p_corrected"):
            pair = getattr(mine, name), getattr(turned, name)
            np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6)
    verdicts = [[each.holds for each in result.outcomes] for result in (one, other)]
    assert verdicts[0] == verdicts[1]


def test_equal_seeds_give_bit_identical_results() -> None:
    again = mechdsl.run(HERE / "eight_rows.mech", allow_python=True, progress=False)
    for name in ("mean", "low", "high", "p", "p_corrected"):
        pair = (getattr(each["few"].statistics[0], name) for each in (results("eight_rows"), again))
        np.testing.assert_array_equal(*pair)
