"""Mixtures of Gaussians: planted components, SciPy densities, and shuffled vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from torch import Generator, Tensor

from mechdsl.dictionaries.features import assign_components, log_densities, mean_log_likelihood
from mechdsl.fits.factors import RIDGE, NotFactored, fit_mixture, shuffle_axes

COUNT, WIDTH, AMOUNT = 4, 6, 800
KINDS = ["full", "diag", "spherical"]


def start(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def planted(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, the means of their components, and the component of each vector."""
    random = start(seed)
    means = 4 * torch.randn(COUNT, WIDTH, generator=random, dtype=torch.float64) + 7
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    label = torch.multinomial(shares, AMOUNT, replacement=True, generator=random)
    noise = torch.randn(AMOUNT, WIDTH, generator=random, dtype=torch.float64)
    return means[label] + noise, means, label


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_mixture_recovers_planted_components_sorted_by_share(kind: str, seed: int) -> None:
    vectors, means, label = planted(seed)
    found = fit_mixture(vectors, COUNT, kind, 200, start(seed))
    own = found.tensors
    assert found.stopped_early
    made = (own["W_dec"] + own["b_dec"]).double()
    torch.testing.assert_close(made, means, atol=0.5, rtol=0)  # shares are planted in this order
    parts = own["W_dec"], own["precision"], own["log_weights"]
    probabilities = assign_components(vectors - own["b_dec"], *parts)
    assert (probabilities.argmax(1) == label).double().mean() > 0.98
    random = fit_mixture(vectors, COUNT, kind, 0, start(seed)).tensors
    assert mean_log_likelihood(vectors, random) < mean_log_likelihood(vectors, own) - 1


def test_mixture_of_fewer_components_than_clusters_is_the_most_likely_of_many_starts() -> None:
    random, clusters, rows, count = start(), 12, 120, 6
    means = 4 * torch.randn(clusters, WIDTH, generator=random, dtype=torch.float64)
    vectors = means[torch.randint(clusters, (rows,), generator=random)]
    vectors += torch.randn(rows, WIDTH, generator=random, dtype=torch.float64)
    made = fit_mixture(vectors, count, "spherical", 200, start(5)).tensors  # 5 starts miss it
    centred = (vectors - vectors.mean(0)).numpy()
    ridge = RIDGE * float((centred**2).mean())
    best = max(
        GaussianMixture(
            count, covariance_type="spherical", reg_covar=ridge, max_iter=200, random_state=seed
        )
        .fit(centred)
        .score(centred)
        for seed in range(1000, 1040)
    )
    assert mean_log_likelihood(vectors, made) > best - 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_densities_equal_scipy(kind: str) -> None:
    vectors, _, _ = planted(0)
    own = fit_mixture(vectors, COUNT, kind, 5, start()).tensors
    parts = own["W_dec"], own["precision"], own["log_weights"]
    found = log_densities(vectors - own["b_dec"], *parts).numpy()
    expected = []
    for mean, factor, weight in zip(*(each.double().numpy() for each in parts), strict=True):
        p = factor if kind == "full" else np.diag(np.broadcast_to(factor, WIDTH))
        covariance = np.linalg.inv(p @ p.T)
        center = mean + own["b_dec"].double().numpy()
        normal = multivariate_normal(center, covariance)
        expected.append(weight + normal.logpdf(vectors.numpy()))
    expected = np.stack(expected, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    likelihood = mean_log_likelihood(vectors, own)
    assert likelihood == pytest.approx(logsumexp(expected, axis=1).mean(), abs=1e-4)
    probabilities = assign_components(vectors - own["b_dec"], *parts).numpy()
    share = np.exp(expected - logsumexp(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, share, atol=1e-4)
    assert (probabilities[share < 1e-7] == 0).all()
    assert (probabilities == 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_of_one_component_equals_a_gaussian_fit(kind: str) -> None:
    vectors, _, _ = planted(1)
    x = vectors.numpy()
    own = fit_mixture(vectors, 1, kind, 1, start()).tensors
    covariance = np.cov(x.T, bias=True)
    if kind == "diag":
        covariance = np.diag(np.diag(covariance))
    if kind == "spherical":
        covariance = np.eye(WIDTH) * np.diag(covariance).mean()
    covariance = covariance + RIDGE * x.var(axis=0).mean() * np.eye(WIDTH)
    expected = multivariate_normal(x.mean(0), covariance).logpdf(x).mean()
    assert mean_log_likelihood(vectors, own) == pytest.approx(expected, abs=1e-3)


def test_shuffled_axes_keep_the_covariance_but_lose_the_components() -> None:
    vectors, _, _ = planted(2)
    centred = vectors - vectors.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2]
    found = shuffle_axes(vectors, axes, start())
    torch.testing.assert_close(found.mean(0), vectors.mean(0))
    before, after = (torch.from_numpy(np.cov(each.numpy().T)) for each in (vectors, found))
    assert (before - after).abs().max() < 0.15 * before.diagonal().max()
    torch.testing.assert_close((found @ axes.T).sort(0)[0], (vectors @ axes.T).sort(0)[0])
    gains = [
        mean_log_likelihood(x, fit_mixture(x, COUNT, "full", 200, start()).tensors)
        - mean_log_likelihood(x, fit_mixture(x, 1, "full", 1, start()).tensors)
        for x in (vectors, found)
    ]
    assert gains[0] > gains[1] + 0.5
    few = shuffle_axes(vectors, axes[:2], start())
    torch.testing.assert_close(few @ axes[2:].T, vectors @ axes[2:].T)


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_of_vectors_on_a_line_has_a_finite_density(kind: str) -> None:
    line = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None] * torch.ones(1, WIDTH)
    own = fit_mixture(line, 2, kind, 50, start()).tensors
    assert np.isfinite(mean_log_likelihood(line, own))


def test_mixture_of_too_few_distinct_vectors_is_rejected() -> None:
    two = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(5, 1)
    with pytest.raises(NotFactored, match="3 components of 2 different vectors") as problem:
        fit_mixture(two, 3, "diag", 10, start())
    assert "`mixture(components: 2)`" in problem.value.hint
    with pytest.raises(NotFactored, match="all of its vectors are equal"):
        fit_mixture(torch.ones(5, 2), 1, "diag", 10, start())


def test_same_seed_gives_the_same_mixture() -> None:
    vectors, _, _ = planted(0)
    first, again = (fit_mixture(vectors, COUNT, "diag", 50, start()) for _ in range(2))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
