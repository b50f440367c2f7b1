"""Principal components, singular values, ranks: compared with closed forms and NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.fits.geometry import (
    effective_rank,
    fix_sign,
    matrix_rank,
    pca,
    principal_axes,
    singular_values,
)
from mechdsl.fits.regression import check_vectors

NORMAL = np.random.default_rng(0).normal


@pytest.mark.parametrize(
    "x", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]]), np.array([[np.inf]])]
)
def test_empty_one_dimensional_or_infinite_vectors_are_rejected(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"row|axes|finite"):
        check_vectors(x)


@pytest.mark.parametrize("shape", [(30, 6), (5, 40)])
def test_pca_equals_eigenvectors_of_the_covariance(shape: tuple[int, int]) -> None:
    x = NORMAL(size=shape) * np.linspace(3, 1, shape[1]) + 7
    found = pca(x, 3)
    _, vectors = np.linalg.eigh(np.cov(x.T))
    for k in range(3):
        own = vectors[:, -1 - k]
        assert np.isclose(abs(found[k] @ own), 1)
        assert found[k][np.abs(found[k]).argmax()] > 0
    assert np.allclose(found @ found.T, np.eye(3))


def test_pca_does_not_depend_on_row_order_or_sign() -> None:
    x = NORMAL(size=(20, 4))
    assert np.allclose(pca(x, 2), pca(x[::-1], 2))
    assert np.allclose(pca(x, 2), pca(-x, 2))


def test_fix_sign_uses_the_first_of_equal_magnitudes() -> None:
    assert fix_sign(np.array([-1.0, 1.0 + 1e-12])).tolist() == [1.0, -1.0 - 1e-12]
    assert fix_sign(np.array([0.5, -1.0])).tolist() == [-0.5, 1.0]


def test_pca_with_more_components_than_dimensions_is_rejected() -> None:
    line = np.outer(np.arange(5.0), [1.0, 2.0, 0.0])
    assert np.allclose(np.abs(pca(line, 1)), np.array([[1, 2, 0]]) / np.sqrt(5))
    with pytest.raises(ValueError, match="2 components of vectors that spread over 1"):
        pca(line, 2)


def test_singular_values_with_and_without_centring_equal_numpy() -> None:
    x = NORMAL(size=(9, 4)) + 5
    assert np.allclose(singular_values(x) ** 2, np.linalg.eigvalsh(x.T @ x)[::-1])
    around = x - x.mean(axis=0)
    assert np.allclose(singular_values(x, centred=True), np.linalg.svd(around)[1])


def test_matrix_rank_ignores_values_below_rounding() -> None:
    low = NORMAL(size=(12, 3)) @ NORMAL(size=(3, 8))
    assert matrix_rank(singular_values(low), low.shape, np.finfo(np.float64).eps) == 3
    single = low.astype(np.float32).astype(np.float64)
    assert matrix_rank(singular_values(single), low.shape, np.finfo(np.float64).eps) == 8
    assert matrix_rank(singular_values(single), low.shape) == 3
    assert matrix_rank(np.zeros(4), (4, 4)) == 0


def test_effective_rank_equals_the_exponential_of_entropy() -> None:
    assert np.isclose(effective_rank(np.ones(5)), 5)
    assert np.isclose(effective_rank(np.array([3.0, 0, 0])), 1)
    shares = np.array([0.75, 0.25])
    wanted = 2 ** (-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25))
    assert np.isclose(effective_rank(8 * shares), wanted)
    assert effective_rank(np.zeros(3)) == 0


def test_principal_axes_equal_singular_vectors() -> None:
    """Sorted by singular value, with a positive largest entry; too many axes are rejected."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((4, 6)) * [5, 3, 1, 1, 1, 1]
    found = principal_axes(rows.T @ rows / 4, 4)
    singular = np.linalg.svd(rows)
    np.testing.assert_allclose(np.abs(found @ singular.Vh[:4].T), np.eye(4), atol=1e-8)
    assert all(each[np.abs(each).argmax()] > 0 for each in found)
    with pytest.raises(ValueError, match="span 4"):
        principal_axes(rows.T @ rows / 4, 5)
