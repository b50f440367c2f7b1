"""Independent components: planted sources, whitening compared with NumPy, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from torch import Generator, Tensor

from mechdsl.fits.factors import NotFactored, median_kurtosis, separate_sources

COUNT, WIDTH = 8, 24


def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Vectors, and the directions of their sparse, nonnegative sources."""
    random = Generator().manual_seed(seed)
    rows = torch.randn(COUNT, WIDTH, generator=random, dtype=torch.float64)
    sources = torch.empty(2000, COUNT, dtype=torch.float64).exponential_(generator=random)
    sources *= torch.rand(2000, COUNT, generator=random, dtype=torch.float64) < 0.3
    noise = torch.randn(2000, WIDTH, generator=random, dtype=torch.float64)
    return sources @ rows + 0.01 * noise + 3, rows / rows.norm(dim=1, keepdim=True)


def start(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_ica_recovers_planted_sources_with_their_signs(seed: int) -> None:
    vectors, rows = planted(seed)
    found = separate_sources(vectors, COUNT, 500, start(seed))
    assert found.stopped_early
    made = found.tensors["W_dec"].double()
    made = made / made.norm(dim=1, keepdim=True)
    assert ((rows @ made.T).amax(1) > 0.95).all()
    random = separate_sources(vectors, COUNT, 0, start(seed)).tensors["W_dec"].double()
    random = random / random.norm(dim=1, keepdim=True)
    assert ((rows @ random.T).amax(1) < 0.95).all()


@pytest.mark.parametrize("steps", [0, 500])
def test_ica_coordinates_are_white_and_decode_like_principal_components(steps: int) -> None:
    vectors, _ = planted(1)
    found = separate_sources(vectors, 5, steps, start())
    own = {name: each.double().numpy() for name, each in found.tensors.items()}
    x = vectors.numpy()
    center = x.mean(0)
    np.testing.assert_allclose(own["b_dec"], center, atol=1e-6)
    coordinates = (x - center) @ own["W_enc"]
    np.testing.assert_allclose(np.cov(coordinates.T, bias=True), np.eye(5), atol=1e-4)
    assert ((coordinates**3).mean(0) > 0).all()
    np.testing.assert_allclose(own["W_dec"] @ own["W_enc"], np.eye(5), atol=1e-5)
    lengths = np.linalg.norm(own["W_dec"], axis=1)
    assert (np.diff(lengths) <= 1e-6).all()
    axes = np.linalg.svd(x - center, full_matrices=False)[2][:5]
    made = coordinates @ own["W_dec"]
    np.testing.assert_allclose(made, (x - center) @ axes.T @ axes, atol=1e-4)


def test_median_kurtosis_equals_scipy() -> None:
    values = torch.randn(500, 5, generator=start(), dtype=torch.float64) ** 3 - 0.5
    expected = np.median(np.abs(kurtosis(values.numpy())))
    assert median_kurtosis(values) == pytest.approx(expected)


def test_ica_of_dependent_dimensions_is_rejected() -> None:
    vectors, _ = planted(0)
    flat = torch.cat([vectors[:, :6], vectors[:, :6].sum(1, keepdim=True), vectors[:, :1] * 0], 1)
    with pytest.raises(NotFactored, match="that differ in 6 dimensions only") as found:
        separate_sources(flat, 7, 10, start())
    assert "`ica(components: 6)`" in found.value.hint
    with pytest.raises(NotFactored, match="differ in 3 dimensions only"):
        separate_sources(vectors[:4], 4, 10, start())
