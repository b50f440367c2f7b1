"""CKA, compared with the sums over rows that define it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mechdsl.fits.geometry import cka_per_row, cka_unbiased, linear_kernel

DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(12, 4)) + 2
Y = X @ DRAW.normal(size=(4, 7)) + DRAW.normal(size=(12, 7))


def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The U-statistic, over all ordered choices of four different rows."""
    whole = 0.0
    for i, j, q, r in permutations(range(len(k)), 4):
        whole += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
    n = len(k)
    return whole / (n * (n - 1) * (n - 2) * (n - 3))


def by_fours(x: np.ndarray, y: np.ndarray) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_unbiased_cka_equals_the_u_statistic_over_four_rows() -> None:
    found = cka_unbiased(linear_kernel(X[:8]), linear_kernel(Y[:8]))
    assert np.isclose(found, by_fours(X[:8], Y[:8]))


def test_unbiased_cka_of_independent_vectors_is_near_zero() -> None:
    a, b = DRAW.normal(size=(30, 400)), DRAW.normal(size=(30, 400))
    assert abs(cka_unbiased(linear_kernel(a), linear_kernel(b))) < 0.1
    assert np.isclose(cka_unbiased(linear_kernel(a), linear_kernel(2 * a + 1)), 1)


def test_cka_per_row_equals_jackknife_pseudovalues() -> None:
    x, y = X[:9], Y[:9]
    every = np.arange(9)
    left = np.array(
        [cka_unbiased(linear_kernel(x[every != i]), linear_kernel(y[every != i])) for i in every]
    )
    whole = cka_unbiased(linear_kernel(x), linear_kernel(y))
    found = cka_per_row(linear_kernel(x), linear_kernel(y))
    assert np.isclose(found.mean(), whole)
    assert np.allclose(found, whole + 8 * (left.mean() - left))
    error = np.sqrt(8 / 9 * ((left - left.mean()) ** 2).sum())
    assert np.isclose(found.std(ddof=1) / 3, error)


def test_cka_intervals_of_rows_cover_and_equal_sets_give_1() -> None:
    """Two views of one signal, at 60 rows, with about the nominal coverage."""
    mix = DRAW.normal(size=(3, 5)), DRAW.normal(size=(3, 5))

    def draw(n: int) -> list[np.ndarray]:
        signal = DRAW.normal(size=(n, 3))
        return [linear_kernel(signal @ m + DRAW.normal(size=(n, 5))) for m in mix]

    truth = cka_unbiased(*draw(1500))
    hits = 0
    for _ in range(200):
        found = cka_per_row(*draw(60))
        reach = 2.0 * found.std(ddof=1) / np.sqrt(60)
        hits += abs(found.mean() - truth) <= reach
    assert 178 <= hits <= 200
    assert np.allclose(cka_per_row(linear_kernel(X), linear_kernel(3 * X)), 1)


def test_cka_of_three_rows_is_rejected() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        cka_unbiased(linear_kernel(X[:3]), linear_kernel(Y[:3]))
    with pytest.raises(ValueError, match="3 rows"):
        cka_per_row(linear_kernel(X[:4]), linear_kernel(Y[:4]))
