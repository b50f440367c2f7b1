"""The skewness-corrected t: against plain Python, and its error rates."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import numpy as np
import pytest
from scipy import stats

from mechdsl.base.arrays import Floats
from mechdsl.statistics.cell_statistics import compute_cell_statistics, infer, infer_shares
from mechdsl.statistics.corrections import correct_by_maximum, holm
from mechdsl.statistics.intervals import skewed_t
from mechdsl.statistics.measurements import EffectSums, Resamples
from mechdsl.vocab.metrics import EFFECTS

from ..quick import some
from .synthetic import measure, statistics

Noise = Callable[[np.random.Generator, tuple[int, int]], Floats]
NOISE: dict[str, Noise] = {
    "normal": lambda random, size: random.normal(0, 1, size),
    "t3": lambda random, size: random.standard_t(3, size),
    "exponential": lambda random, size: random.exponential(1, size) - 1,
    "lognormal": lambda random, size: random.lognormal(0, 1, size) - np.exp(0.5),
    "sparse": lambda random, size: random.normal(0, 1, size) * (random.random(size) < 0.3),
}


def sums(top: Floats, bottom: Floats | None = None) -> EffectSums:
    bottom = np.ones((1, top.shape[1])) if bottom is None else bottom
    return EffectSums(top, bottom, np.full(len(top), top.shape[1]))


def reference_p(
    top: list[float], bottom: list[float], theta: float, strata: list[int] | None = None
) -> float:
    """The p of one hypothesis in plain Python, without its floor."""
    left = [a - theta * b for a, b in zip(top, bottom, strict=True)]
    groups: dict[int, list[float]] = {}
    for place, value in enumerate(left):
        groups.setdefault(0 if strata is None else strata[place], []).append(value)
    variance = third = 0.0
    for own in groups.values():
        n, middle = len(own), mean(own)
        variance += n / (n - 1) * sum((x - middle) ** 2 for x in own)
        third += n * n / (n - 1) / (n - 2) * sum((x - middle) ** 3 for x in own)
    t, skew = sum(left) / variance**0.5, third / variance**1.5
    freedom = len(left) - len(groups)
    against = 1.4 * max(-skew if t > 0 else skew, 0.0) + 1 / (freedom + 1)
    low, high = 0.0, abs(t)
    for _ in range(200):
        q = (low + high) / 2
        reached = q + against * (2 * q * q + 1) / 6 + 0.4 * against**2 * q**3
        low, high = (q, high) if reached < abs(t) else (low, q)
    share = min(0.45 + 0.07 * max(15 - freedom, 0), 1.0)
    corrected = 2 * stats.t.sf((low + high) / 2, share * freedom)
    return max(2 * stats.t.sf(abs(t), freedom), corrected)


@pytest.mark.parametrize("strata", [None, [0, 1, 2] * 7], ids=["plain", "strata"])
@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_p_equals_a_plain_loop(kind: str, strata: list[int] | None) -> None:
    random = np.random.default_rng(0)
    top = random.exponential(1, (4, 21)) - [[0.9], [0.5], [1.4], [1.0]]
    bottom = np.ones((4, 21)) if kind == "mean" else random.normal(4, 1, (4, 21))
    found = skewed_t(sums(top, bottom), None if strata is None else np.array(strata))
    for theta in (0.0, 0.2, -0.3):
        p = found.p_of(np.full(4, theta))
        for cell in range(4):
            wanted = reference_p(top[cell].tolist(), bottom[cell].tolist(), theta, strata)
            assert p[cell] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("strata", [None, [0, 1, 2] * 7], ids=["plain", "strata"])
@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_interval_ends_where_p_reaches_the_level(kind: str, strata: list[int] | None) -> None:
    random = np.random.default_rng(1)
    top = random.exponential(1, (3, 21)) - [[0.9], [0.1], [1.4]]
    bottom = np.ones((3, 21)) if kind == "mean" else random.normal(4, 1, (3, 21))
    found = skewed_t(sums(top, bottom), None if strata is None else np.array(strata))
    for confidence in (80.0, 95.0, 99.0):
        for ends in found.interval(confidence, 5):
            for cell in range(3):
                wanted = reference_p(
                    top[cell].tolist(), bottom[cell].tolist(), float(ends[cell]), strata
                )
                assert wanted == pytest.approx(1 - confidence / 100, rel=1e-6)


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
@pytest.mark.parametrize("noise", NOISE)
def test_p_is_below_the_level_exactly_where_the_interval_excludes_zero(
    test: str, noise: str
) -> None:
    random = np.random.default_rng(2)
    for n in (5, 6, 9, 24):
        top = NOISE[noise](random, (200, n)) + 0.4
        found = infer(sums(top), statistics(test=test), Resamples(n, 1000, 0), 1)
        excludes = (found.low > 0) | (found.high < 0)
        np.testing.assert_array_equal(found.p < 0.05, excludes)


@pytest.mark.parametrize("n", [5, 16])
@pytest.mark.parametrize("noise", ["normal", "lognormal"])
def test_p_and_interval_of_a_ratio_agree(noise: str, n: int) -> None:
    random = np.random.default_rng(3)
    bottom = random.normal(1, 1, (3000, n))
    top = 0.4 * bottom + NOISE[noise](random, bottom.shape)
    found = infer(sums(top, bottom), statistics(), Resamples(n, 100, 0), 1)
    known = ~np.isnan(found.low)
    assert 200 < known.sum() < 3000
    assert np.isnan(found.p[~known]).all()
    excludes = (found.low > 0) | (found.high < 0)
    np.testing.assert_array_equal((found.p < 0.05)[known], excludes[known])


def test_ratio_interval_of_few_units_contains_zero_unless_p_is_small() -> None:
    """A value closer to the ratio than 0 may be rejected although 0 is not."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        bottom = random.uniform(0.5, 2, (1, 7))
        top = random.lognormal(size=(1000, 7)) + random.normal(size=(1000, 1)) * 0.3
        found = skewed_t(sums(top, bottom))
        low, high = found.interval(95.0, 5)
        small = found.p_of(np.zeros(1000)) < 0.05
        np.testing.assert_array_equal(small, (low > 0) | (high < 0))


def test_ratio_with_a_denominator_near_zero_has_no_interval() -> None:
    random = np.random.default_rng(4)
    bottom = random.normal(0, 1, (1, 20))
    found = skewed_t(sums(bottom + random.normal(0, 0.1, (1, 20)), bottom))
    assert np.isnan(found.interval(95.0, 5)).all()


def test_p_and_interval_do_not_depend_on_means_of_strata() -> None:
    random = np.random.default_rng(5)
    strata = np.arange(24) % 3
    inner = random.normal(0, 0.1, (1, 24))
    inner -= np.array([inner[0, strata == s].mean() for s in range(3)])[strata]
    data = [
        measure(inner + 0.05 + np.array([0.0, spread, -spread])[strata], np.zeros(24))
        for spread in (0.0, 2.0)
    ]
    flat, apart = (
        compute_cell_statistics([each], statistics(), 0, effects=EFFECTS, strata=strata)[0]
        for each in data
    )
    assert apart.p == pytest.approx(flat.p)
    assert apart.low == pytest.approx(flat.low)
    assert apart.p[0] < 0.05
    assert apart.low[0] > 0


def test_absent_units_are_ignored() -> None:
    random = np.random.default_rng(6)
    top = random.normal(0.4, 1, (1, 12))
    alone = skewed_t(sums(top))
    wide = np.zeros((1, 20))
    wide[:, 3:15] = top
    among = skewed_t(EffectSums(wide, (wide != 0).astype(float), np.array([12])))
    np.testing.assert_allclose(among.p(), alone.p())
    np.testing.assert_allclose(among.interval(95.0, 5), alone.interval(95.0, 5))


def test_ratio_with_half_the_rows_in_one_unit_has_no_interval() -> None:
    random = np.random.default_rng(7)
    sizes = np.array([[15.0] + [1.0] * 15])
    found = skewed_t(sums(sizes * random.normal(0.2, 1, sizes.shape), sizes))
    assert np.isnan(found.interval(95.0, 5)).all()


def test_p_of_identical_units_is_that_of_their_signs() -> None:
    found = skewed_t(sums(np.full((1, 9), 0.3)))
    assert found.p()[0] == 2.0**-8
    np.testing.assert_allclose(np.ravel(found.interval(95.0, 5)), 0.3)
    few = np.zeros((1, 16))
    few[0, :3] = 1.0
    assert skewed_t(sums(few)).p()[0] >= 0.25
    shares = [sums(np.full((1, 7), share)) for share in (0.0, 1.0)]
    assert infer_shares(*shares, np.array([7]), 95.0).p[0] == 2.0**-6


@pytest.mark.slow
@pytest.mark.parametrize("noise", some(NOISE, ["exponential"]))
def test_false_positives_of_a_family_stay_below_the_level(noise: str) -> None:
    """At 5 %, 20 or more of 200 families have a false positive with a probability of 0.001."""
    random = np.random.default_rng(8)
    found = {"holm": 0, "max": 0}
    for _ in range(200):
        top = NOISE[noise](random, (16, 16))
        p = skewed_t(sums(top)).p()
        found["holm"] += holm(p).min() < 0.05
        found["max"] += correct_by_maximum(p, top - top.mean(1, keepdims=True), 0).min() < 0.05
    assert found["holm"] <= 20
    assert found["max"] <= 20


def test_large_effect_is_significant_among_144_cells() -> None:
    random = np.random.default_rng(9)
    p = skewed_t(sums(random.normal(1.2, 1, (4000, 32)))).p()
    assert np.mean(p < 0.05 / 144) > 0.8


def test_intervals_of_skewed_means_and_ratios_cover_at_their_level() -> None:
    random = np.random.default_rng(10)
    for n in (8, 16, 32):
        low, high = skewed_t(sums(random.lognormal(0, 1, (4000, n)))).interval(95.0, 5)
        assert np.mean((low <= np.exp(0.5)) & (high >= np.exp(0.5))) > 0.92
    bottom = random.normal(1, 1, (4000, 16))
    low, high = skewed_t(sums(0.5 * bottom + random.normal(0, 1, bottom.shape), bottom)).interval(
        95.0, 5
    )
    known = ~np.isnan(low)
    assert np.mean((low[known] <= 0.5) & (high[known] >= 0.5)) > 0.94
