"""Exact intervals of shares, against scipy's test and against made-up rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mechdsl.statistics.exact_share import exact_share
from scipy.stats import beta, binomtest, t


@pytest.mark.parametrize("confidence", [80.0, 95.0, 99.9])
@pytest.mark.parametrize(("hits", "rows"), [(0, 1), (2, 2), (1, 5), (7, 8), (31, 32), (62, 200)])
def test_rows_that_are_independent(hits: int, rows: int, confidence: float) -> None:
    right = np.arange(rows) < hits
    expected = binomtest(hits, rows).proportion_ci(confidence / 100, "exact")
    for units in (None, np.arange(rows)[::-1] * 7):
        share, low, high = exact_share(right.astype(float), confidence, units)
        assert share == pytest.approx(hits / rows)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_rows_of_units_of_one_size() -> None:
    """The effective n is that of a binomial share with the variance of the units' means, narrowed
    by Student's t."""
    means = np.array([1, 0.5, 0.75, 1, 0.25, 0.75])
    rows = np.concatenate([np.arange(4) < 4 * mean for mean in means]).astype(float)
    share, low, high = exact_share(rows, 95, np.repeat(np.arange(6), 4))
    p = means.mean()
    narrower = (t.ppf(0.975, 23) / t.ppf(0.975, 5)) ** 2
    n = p * (1 - p) / (means.var(ddof=1) / 6) * narrower
    assert n < 24
    assert share == pytest.approx(p)
    assert low == pytest.approx(beta.ppf(0.025, n * p, n - n * p + 1))
    assert high == pytest.approx(beta.ppf(0.975, n * p + 1, n - n * p))


def test_all_are_right() -> None:
    """As much is known as of one row per unit."""
    expected = binomtest(8, 8).proportion_ci(0.95, "exact")
    assert exact_share(np.ones(40), 95, np.repeat(np.arange(8), 5))[1:] == (
        pytest.approx(expected.low),
        1.0,
    )
    assert exact_share(np.ones(40), 95, np.zeros(40, dtype=np.int64))[1:] == (
        pytest.approx(0.025),
        1.0,
    )


def test_equal_units_are_no_more_than_their_rows() -> None:
    rows = np.tile([1.0, 0.0], 10)
    expected = binomtest(10, 20).proportion_ci(0.95, "exact")
    found = exact_share(rows, 95, np.repeat(np.arange(10), 2))
    assert found[1:] == pytest.approx((expected.low, expected.high))


def test_there_are_no_rows() -> None:
    assert all(map(math.isnan, exact_share(np.array([]), 95)))


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("units", [8, 24])
def test_units_of_equal_rows_are_covered(p: float, units: int) -> None:
    """Rows that are printed five times say as much as one; as if independent, 60 % of intervals
    hold the share."""
    random = np.random.default_rng([units, int(100 * p)])
    sizes = random.integers(1, 10, (400, units))
    held = 0
    for size in sizes:
        right = np.repeat((random.random(units) < p).astype(float), size)
        _, low, high = exact_share(right, 95, np.repeat(np.arange(units), size))
        held += low <= p <= high
    assert held / 400 >= 0.92
