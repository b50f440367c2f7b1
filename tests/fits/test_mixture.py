"""Clusters: a fixed point of k-means with Gaussians around the centres."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from mechdsl.fits.geometry import fit_mixture

Array = NDArray[np.float64]
SIZES = (30, 60, 10)


def blobs(apart: float) -> tuple[Array, NDArray[np.int64]]:
    random = np.random.default_rng(2)
    label = np.repeat(np.arange(3), SIZES)
    return random.standard_normal((len(label), 4)) + apart * np.eye(3, 4)[label], label


def test_separated_clusters_are_found_and_sorted_by_size() -> None:
    x, label = blobs(20.0)
    found = fit_mixture(x, 3, 0)
    likely = found(x)
    np.testing.assert_allclose(likely.sum(1), 1)
    assert likely.argmax(1).tolist() == np.array([1, 0, 2])[label].tolist()
    np.testing.assert_allclose(found.shares, [0.6, 0.3, 0.1])


def test_clusters_are_a_fixed_point_with_gaussian_probabilities() -> None:
    x, _ = blobs(2.0)
    found = fit_mixture(x, 4, 1)
    own = (x - x.mean(0)) / x.std(0)
    off = np.array([[((v - centre) ** 2).sum() for centre in found.centres] for v in own])
    nearest = off.argmin(1)
    for number, centre in enumerate(found.centres):
        np.testing.assert_allclose(own[nearest == number].mean(0), centre, atol=1e-8)
    shares = np.bincount(nearest) / len(x)
    np.testing.assert_allclose(found.shares, shares)
    assert (np.diff(shares) <= 0).all()
    variance = off.min(1).mean() / 4
    density = [
        share * multivariate_normal(centre, variance).pdf(own)
        for share, centre in zip(shares, found.centres, strict=True)
    ]
    expected = np.transpose(density) / np.sum(density, axis=0)[:, None]
    np.testing.assert_allclose(found(x), expected, atol=1e-8)
    assert 0.01 < found(x).max(1).min() < 0.9


def test_clusters_with_the_same_seed_are_equal() -> None:
    x, _ = blobs(1.0)
    assert (fit_mixture(x, 5, 3)(x) == fit_mixture(x, 5, 3)(x)).all()


def test_more_clusters_than_distinct_vectors_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 vectors for 3 clusters"):
        fit_mixture(np.eye(2), 3, 0)
    with pytest.raises(ValueError, match="fewer than 3 clusters"):
        fit_mixture(np.repeat(np.eye(2), 5, axis=0), 3, 0)


def test_clusters_of_identical_vectors_have_probability_1() -> None:
    x = np.repeat(np.eye(2), 5, axis=0)
    assert fit_mixture(x, 2, 0)(x).max(1).tolist() == [1.0] * 10
