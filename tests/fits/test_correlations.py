"""Canonical correlations: planted pairs, NumPy and scikit-learn as references, few vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from torch import Generator, Tensor

from mechdsl.fits.correlations import correlate_sets, correlate_sparse, pair_components
from mechdsl.fits.factors import NotFactored

WIDTHS, AMOUNT, COUNT = (12, 9), 600, 3
CORRELATIONS = (0.95, 0.8, 0.6)


def start(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def planted(seed: int, amount: int = AMOUNT) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two sets of vectors with three correlated pairs of directions, and their encoders."""
    random = start(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    sets: list[Tensor] = []
    shared = draw(amount, COUNT)
    encoders: list[Tensor] = []
    for width in WIDTHS:
        inner = draw(amount, width)
        r = torch.tensor(CORRELATIONS, dtype=torch.float64).sqrt()
        inner[:, :COUNT] = r * shared + (1 - r.square()).sqrt() * inner[:, :COUNT]
        mixed = draw(width, width)
        sets.append(inner @ mixed + draw(width))
        encoders.append(torch.linalg.inv(mixed)[:, :COUNT])
    return sets[0], sets[1], encoders


@pytest.mark.parametrize("seed", range(3))
def test_cca_recovers_planted_pairs(seed: int) -> None:
    every, others, encoders = planted(seed, amount=2 * AMOUNT)
    own, other = every[:AMOUNT], others[:AMOUNT]
    found = correlate_sets(own, other, COUNT, 0.0, 1, start(seed))
    made = found.correlate(every[AMOUNT:], others[AMOUNT:])
    torch.testing.assert_close(made, torch.tensor(CORRELATIONS).double(), atol=0.08, rtol=0)
    for each, encoder, vectors in zip(
        (found.own, found.other), encoders, (own, other), strict=True
    ):
        expected = (vectors - vectors.mean(0)) @ encoder
        alike = np.corrcoef(each.of(vectors).numpy().T, expected.numpy().T)[:COUNT, COUNT:]
        assert (np.abs(np.diag(alike)) > [0.95, 0.9, 0.8]).all()
    random = correlate_sets(own, other, COUNT, 0.0, 0, start(seed)).correlate(own, other)
    components = pair_components(own, other, COUNT).correlate(own, other)
    assert max(random.mean(), components.mean()) < made.mean() - 0.3


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_cca_directions_solve_the_eigenvalue_problem(ridge: float) -> None:
    own, other, _ = planted(1)
    found = correlate_sets(own, other, COUNT, ridge, 1, start())
    x, y = (each.numpy() - each.numpy().mean(0) for each in (own, other))
    covariances = [each.T @ each / AMOUNT for each in (x, y)]
    first, second = (
        each + ridge * np.trace(each) / len(each) * np.eye(len(each)) for each in covariances
    )
    cross = x.T @ y / AMOUNT
    values, vectors = eigh(cross @ np.linalg.solve(second, cross.T), first)
    vectors = vectors[:, ::-1][:, :COUNT]
    mine = found.own.encoder.numpy()
    cosines = np.abs((mine * vectors).sum(0))
    cosines /= np.linalg.norm(mine, axis=0) * np.linalg.norm(vectors, axis=0)
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    correlations = found.correlate(own, other).numpy()
    if ridge == 0:
        np.testing.assert_allclose(correlations, np.sqrt(values[::-1][:COUNT]), atol=1e-8)
    for each, vectors in ((found.own, own), (found.other, other)):
        np.testing.assert_allclose(each.of(vectors).numpy().std(axis=0), 1, atol=1e-6)


def test_cca_correlations_equal_scikit_learn() -> None:
    from sklearn.cross_decomposition import CCA

    own, other, _ = planted(2)
    model = CCA(COUNT, max_iter=5000, tol=1e-12).fit(own.numpy(), other.numpy())
    first, second = model.transform(own.numpy(), other.numpy())
    expected = [np.corrcoef(first[:, n], second[:, n])[0, 1] for n in range(COUNT)]
    found = correlate_sets(own, other, COUNT, 0.0, 1, start()).correlate(own, other)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_cca_decoder_is_least_squares_and_inverts_the_encoder() -> None:
    own, other, _ = planted(0)
    pair = correlate_sets(own, other, COUNT, 0.2, 1, start())
    tensors = {name: each.double() for name, each in pair.solution(own).tensors.items()}
    product = tensors["W_dec"] @ tensors["W_enc"]
    torch.testing.assert_close(product, torch.eye(COUNT).double(), atol=1e-5, rtol=0)
    x, coordinates = (own - own.mean(0)).numpy(), pair.own.of(own).numpy()
    expected = np.linalg.pinv(coordinates) @ x
    np.testing.assert_allclose(tensors["W_dec"].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("method", [correlate_sets, correlate_sparse])
@pytest.mark.parametrize("seed", range(3))
def test_cca_of_swapped_sets_has_the_same_coordinates(method: object, seed: int) -> None:
    assert callable(method)
    own, other, _ = planted(seed)
    found = method(own, other, COUNT, 0.3, 100, start())
    back = method(other, own, COUNT, 0.3, 100, start())
    torch.testing.assert_close(found.own.of(own), back.other.of(own), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.other.of(other), back.own.of(other), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_sparse_cca_recovers_the_planted_dimensions(seed: int) -> None:
    random = start(seed)
    shared = torch.randn(400, 2, generator=random, dtype=torch.float64)
    sets: list[Tensor] = []
    for width in (40, 30):
        noise = torch.randn(400, width, generator=random, dtype=torch.float64)
        noise[:, 0:4] += 2 * shared[:, :1]
        noise[:, 4:8] += 1.5 * shared[:, 1:]
        sets.append(noise * torch.linspace(1, 5, width))
    own, other = sets
    found = correlate_sparse(own, other, 2, 0.7, 200, start(seed))
    assert found.converged
    assert (found.correlate(own, other) > 0.8).all()
    for each in (found.own, found.other):
        weights = each.encoder.abs() * (each.encoder.abs() > 1e-9)
        for number, part in enumerate((slice(0, 4), slice(4, 8))):
            assert weights[part, number].sum() > 0.85 * weights[:, number].sum()
        assert ((weights > 0).sum(0) < 16).all()
    dense = correlate_sparse(own, other, 2, 0.0, 200, start(seed))
    assert ((dense.own.encoder.abs() > 1e-9).sum(0) > 30).all()
    random_pair = correlate_sparse(own, other, 2, 0.7, 0, start(seed))
    assert random_pair.correlate(own, other).mean() < 0.5


def test_sparse_cca_with_the_largest_penalty_keeps_one_dimension() -> None:
    own, other, _ = planted(0)
    found = correlate_sparse(own, other, 1, 0.99, 50, start())
    for each in (found.own, found.other):
        assert (each.encoder.abs() > 1e-9).sum() == 1


@pytest.mark.parametrize("method", [correlate_sets, correlate_sparse])
def test_cca_of_sets_with_few_dimensions_is_rejected(method: object) -> None:
    assert callable(method)
    own, other, _ = planted(0)
    with pytest.raises(NotFactored, match="differ in 2 dimensions only"):
        method(own, other[:, :2], 3, 0.1, 10, start())


def test_cca_without_ridge_on_few_vectors_is_rejected() -> None:
    own, other, _ = planted(0, amount=20)
    with pytest.raises(NotFactored, match="20 vectors that differ in 12 and 9 dimensions") as found:
        correlate_sets(own, other, 2, 0.0, 1, start())
    assert "`ridge: 0.1`" in found.value.hint
    assert correlate_sets(own, other, 2, 0.1, 1, start()).correlate(own, other)[0] < 1
