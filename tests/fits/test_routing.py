"""Routing: the fit is a stationary point by autograd, and finds planted tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.fits.regression import fit_routing

Array = NDArray[np.float64]


def drawn(rows: int, seed: int = 0) -> tuple[Array, NDArray[np.int64], Array, NDArray[np.int64]]:
    """Rows of two to five tokens, one of which is marked and determines two numbers.

    Returns:
        (vectors, row of each vector, numbers, index of each row's marked token).
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 6, rows)
    row = np.repeat(np.arange(rows), sizes)
    vectors = random.standard_normal((len(row), 5))
    counts = np.cumsum(sizes) - sizes + random.integers(0, sizes)
    vectors[:, 4] = 0
    vectors[counts, 4] = 3
    return vectors, row, 3 * vectors[counts, :2] + 7, counts


def test_routing_finds_the_marked_token() -> None:
    vectors, row, y, counts = drawn(200)
    found = fit_routing(vectors, row, y, 0.1)
    weights = found.weights(vectors, row)
    np.testing.assert_allclose(np.add.reduceat(weights, np.unique(row, return_index=True)[1]), 1)
    assert weights[counts].min() > 0.9
    others, row, y, counts = drawn(50, seed=1)
    assert np.abs(found(others, row) - y).max() < 0.7
    assert y.std() > 2


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_routing_fit_has_a_near_zero_gradient(penalty: float) -> None:
    """The gradient by query, weights and intercept, although only the query was optimized."""
    vectors, row, y, _ = drawn(40)
    found = fit_routing(vectors, row, y, penalty)
    x = torch.from_numpy((vectors - vectors.mean(0)) / vectors.std(0))
    to = torch.from_numpy((y - y.mean(0)) / y.std(0))
    query = torch.from_numpy(found.query).requires_grad_()
    read = torch.from_numpy(found.read.weights / y.std(0)).requires_grad_()
    free = torch.from_numpy((found.read.intercept - y.mean(0)) / y.std(0)).requires_grad_()
    mixed = [torch.softmax(x[row == n] @ query, 0) @ x[row == n] for n in range(int(row[-1]) + 1)]
    off = torch.stack(mixed) @ read + free - to
    loss = (off**2).sum() + penalty * ((read**2).sum() + (query**2).sum())
    loss.backward()
    for each in (query, read, free):
        assert each.grad is not None
        assert float(each.grad.abs().max()) < 0.02
    assert float(query.detach().norm()) > 0.1


def test_routing_of_single_token_rows_and_constant_targets() -> None:
    vectors, row, _, _ = drawn(10)
    row = np.append(row, 10)
    vectors = np.vstack([vectors, np.ones(5)])
    found = fit_routing(vectors, row, np.full(11, 2.5), 1.0)
    assert found.weights(vectors, row)[-1] == 1
    np.testing.assert_allclose(found(vectors, row), 2.5)


def test_routing_without_penalty_is_rejected() -> None:
    vectors, row, y, _ = drawn(4)
    with pytest.raises(ValueError, match="above 0"):
        fit_routing(vectors, row, y, 0.0)
