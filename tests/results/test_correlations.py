"""Correlations of true effects against loops over pairs of units, and their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechdsl.statistics.comparisons import true_correlation
from mechdsl.statistics.measurements import EffectSums

LEVEL = 95.0


def sums(rows: np.ndarray, held: np.ndarray | None = None) -> EffectSums:
    """rows: [unit, cell]; held: [unit], 1 for those that the experiment has."""
    held = np.ones(len(rows)) if held is None else held
    count = np.full(rows.shape[1], int(held.sum()))
    return EffectSums((rows * held[:, None]).T, held[None], count)


def centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(1, keepdims=True)


def over_pairs(x: np.ndarray, y: np.ndarray) -> float:
    """The mean of products of different units, by loops."""
    n = len(x)
    products = [float(x[u] @ y[v]) for u in range(n) for v in range(n) if u != v]
    return float(np.mean(products))


def by_loops(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Compute the interval by plain loops: a jackknife over units and a fine grid of values."""
    x, y = centred(x), centred(y)
    n = len(x)

    def three(some: np.ndarray) -> tuple[float, float]:
        one, two = x[some], y[some]
        scale = np.sqrt(over_pairs(one, one) * over_pairs(two, two))
        return over_pairs(one, two), float(scale)

    every = np.arange(n)
    whole = np.array(three(every))
    without = np.array([three(np.delete(every, u)) for u in range(n)])
    unbiased = whole - (n - 1) / n * (without - whole).sum(0)
    one = (x - x.mean(0)) / n / np.sqrt(over_pairs(x, x))
    two = (y - y.mean(0)) / n / np.sqrt(over_pairs(y, y))
    quantile = stats.t.ppf(0.975, n - 1)
    compatible: list[float] = []
    for rho in np.linspace(-1, 1, 4001):
        moved = (without - whole) @ np.array([1, -rho])
        variance = (n - 1) / n * (moved**2).sum()
        kernel = (one @ two.T + two @ one.T) / 2 - rho / 2 * (one @ one.T + two @ two.T)
        np.fill_diagonal(kernel, 0.0)
        variance += 2 * (kernel**2).sum() * whole[1] ** 2
        if abs(unbiased @ np.array([1, -rho])) <= quantile * np.sqrt(variance):
            compatible.append(float(rho))
    return float(unbiased[0] / unbiased[1]), min(compatible), max(compatible)


@pytest.mark.parametrize("seed", range(3))
def test_true_correlation_equals_plain_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    effects = random.normal(0, 1, (2, 9))
    noise = random.normal(0, 1, (14, 9))
    x, y = effects[0] + noise, effects.sum(0) + 0.8 * noise + random.normal(0, 0.5, (14, 9))
    found = true_correlation(sums(x), sums(y), LEVEL)
    value, low, high = by_loops(x, y)
    assert found.value == pytest.approx(value, abs=1e-9)
    assert found.low == pytest.approx(low, abs=1e-3)
    assert found.high == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("true", [0.0, 0.7, 0.95])
def test_true_correlation_interval_covers_at_its_level(true: float, shared: bool) -> None:
    """At most 27 of 300 intervals (9 %) miss the true correlation at a level of 95 %."""
    random = np.random.default_rng(int(100 * true) + shared)
    missed = unknown = 0
    for _ in range(300):
        one = random.normal(0, 1, 24)
        two = true * one + np.sqrt(1 - true**2) * random.normal(0, 1, 24)
        noise = random.normal(0, 1, (48, 24))
        x = one * (1 + 0.5 * random.normal(0, 1, (48, 1))) + noise
        y = two + 0.9 * noise + 0.4 * random.normal(0, 1, (48, 24))
        held = (np.ones(48), np.ones(48))
        if not shared:
            held = ((np.arange(48) < 24).astype(float), (np.arange(48) >= 24).astype(float))
        found = true_correlation(sums(x, held[0]), sums(y, held[1]), LEVEL)
        unknown += np.isnan(found.value)
        truth = np.corrcoef(one, two)[0, 1]
        missed += found.low > truth or found.high < truth
    assert unknown == 0
    assert missed <= 27


def test_true_correlation_of_pure_noise_rarely_has_a_value() -> None:
    random = np.random.default_rng(0)
    found = [
        true_correlation(sums(noise), sums(noise + 0.1 * random.normal(0, 1, noise.shape)), LEVEL)
        for noise in random.normal(0, 1, (200, 16, 48))
    ]
    assert sum(not np.isnan(each.value) for each in found) <= 10


def test_true_correlation_of_an_experiment_with_itself_is_one() -> None:
    random = np.random.default_rng(4)
    bottom = random.uniform(1, 2, (1, 40))
    effects = random.normal(0, 1, (12, 1))
    one = EffectSums(effects * bottom + random.normal(0, 0.3, (12, 40)), bottom, np.full(12, 40))
    same = true_correlation(one, one, LEVEL)
    assert (same.low, same.value, same.high) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    turned = EffectSums(-one.top, bottom, one.held)
    assert true_correlation(one, turned, LEVEL).high == pytest.approx(-1.0, abs=1e-6)
    long = EffectSums(np.tile(one.top, 60), np.tile(bottom, 60), np.full(12, 2_400))
    assert true_correlation(long, long, LEVEL).low == pytest.approx(1.0, abs=1e-6)
