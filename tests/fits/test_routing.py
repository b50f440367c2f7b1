"""Routing: that it is at its best, by torch's own slopes; that it finds what was put in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mechdsl.fits.regression import fit_routing

Array = NDArray[np.float64]


def drawn(rows: int, seed: int = 0) -> tuple[Array, NDArray[np.int64], Array, NDArray[np.int64]]:
    """Of each row two to five tokens, of which one says that it counts and has two numbers:
    (vectors, row, numbers, the token of each row that counts)."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 6, rows)
    row = np.repeat(np.arange(rows), sizes)
    vectors = random.standard_normal((len(row), 5))
    counts = np.cumsum(sizes) - sizes + random.integers(0, sizes)
    vectors[:, 4] = 0
    vectors[counts, 4] = 3
    return vectors, row, 3 * vectors[counts, :2] + 7, counts


def test_it_finds_the_token_that_counts() -> None:
    vectors, row, y, counts = drawn(200)
    found = fit_routing(vectors, row, y, 0.1)
    weights = found.weights(vectors, row)
    np.testing.assert_allclose(np.add.reduceat(weights, np.unique(row, return_index=True)[1]), 1)
    assert weights[counts].min() > 0.9
    others, row, y, counts = drawn(50, seed=1)
    assert np.abs(found(others, row) - y).max() < 0.7
    assert y.std() > 2


@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_no_slope_is_left(penalty: float) -> None:
    """Of the query, the weights and the intercept together, though only the query was searched."""
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


def test_a_row_of_one_token_and_numbers_that_are_the_same() -> None:
    vectors, row, _, _ = drawn(10)
    row = np.append(row, 10)
    vectors = np.vstack([vectors, np.ones(5)])
    found = fit_routing(vectors, row, np.full(11, 2.5), 1.0)
    assert found.weights(vectors, row)[-1] == 1
    np.testing.assert_allclose(found(vectors, row), 2.5)


def test_a_penalty_of_nothing_is_refused() -> None:
    vectors, row, y, _ = drawn(4)
    with pytest.raises(ValueError, match="above 0"):
        fit_routing(vectors, row, y, 0.0)
