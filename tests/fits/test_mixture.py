"""Clusters: a fixed point of k-means with Gaussians around the centres."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans, kmeans_plusplus

from mechdsl.fits.geometry import CLUSTER_STARTS, choose_starts, fit_mixture

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


@pytest.mark.parametrize(("apart", "count"), [(2.0, 3), (2.0, 4), (3.0, 2)])
def test_clusters_have_the_least_squares_of_many_starts(apart: float, count: int) -> None:
    x, _ = blobs(apart)
    found = fit_mixture(x, count, 0)
    own = (x - x.mean(0)) / x.std(0)
    starts: Any = 300
    best: Any = KMeans(count, n_init=starts, tol=0, random_state=1).fit(own).inertia_
    assert found.variance * x.size == pytest.approx(best, rel=1e-9)


def test_number_of_starts_that_reach_the_best_equals_scikit_learn() -> None:
    x = np.random.default_rng(4).standard_normal((60, 3))
    own = (x - x.mean(0)) / x.std(0)
    sums: list[Any] = []
    one: Any = 1
    for number in range(CLUSTER_STARTS):
        random = np.random.default_rng([7, number])
        centres = own[choose_starts(own, 4, random)]
        sums.append(KMeans(4, init=centres, n_init=one, tol=0).fit(own).inertia_)
    reached = sum(np.isclose(sums, min(sums), rtol=1e-9, atol=0))
    assert 1 < reached < CLUSTER_STARTS
    assert fit_mixture(x, 4, 7).reached == reached


def test_starting_centres_are_as_near_as_those_of_scikit_learn() -> None:
    """Greedy k-means++ on vectors without clusters; plain k-means++ is worse by a tenth."""
    x = np.random.default_rng(4).standard_normal((80, 3))

    def mean(choose: Callable[[int], Any]) -> float:
        off = [((x[:, None] - x[choose(n)]) ** 2).sum(2).min(1).sum() for n in range(150)]
        return float(np.mean(off))

    own = mean(lambda n: choose_starts(x, 8, np.random.default_rng(n)))
    greedy, plain = (
        mean(lambda n, t=trials: kmeans_plusplus(x, 8, random_state=n, n_local_trials=t)[1])
        for trials in (None, 1)
    )
    assert own == pytest.approx(greedy, rel=0.03)
    assert plain > 1.1 * greedy


def test_starting_centres_are_the_best_of_candidates_far_from_the_others() -> None:
    """Three tight groups: each start has a centre in each of them."""
    x, label = blobs(200.0)
    for number in range(20):
        chosen = choose_starts(x, 3, np.random.default_rng(number))
        assert sorted(label[chosen].tolist()) == [0, 1, 2]


def test_more_clusters_than_distinct_vectors_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 vectors for 3 clusters"):
        fit_mixture(np.eye(2), 3, 0)
    with pytest.raises(ValueError, match="fewer than 3 clusters"):
        fit_mixture(np.repeat(np.eye(2), 5, axis=0), 3, 0)


def test_clusters_of_identical_vectors_have_probability_1() -> None:
    x = np.repeat(np.eye(2), 5, axis=0)
    found = fit_mixture(x, 2, 0)
    assert found(x).max(1).tolist() == [1.0] * 10
    assert found.reached == CLUSTER_STARTS
