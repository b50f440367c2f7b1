"""Nonnegative least squares of many vectors, compared with SciPy for each vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from mechdsl.dictionaries.features import solve_nonnegative

SIZES = ((1, 3), (8, 32), (32, 32), (40, 64))


def problem(factors: int, width: int, seed: int, *, signed: bool) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((factors, width))
    vectors = 10 * random.standard_normal((60, width))
    if not signed:
        rows, vectors = abs(rows), abs(vectors)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vectors[0], vectors[1] = 0, 3 * rows[-1]
    return vectors, rows


def solve(vectors: Any, rows: Any, penalty: float = 0.0, dtype: Any = torch.float64) -> Any:
    given = torch.as_tensor(vectors, dtype=dtype)
    return solve_nonnegative(given, torch.as_tensor(rows), torch.full((len(rows),), penalty))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("factors", "width"), SIZES)
def test_nonnegative_solution_without_penalty_equals_scipy(
    factors: int, width: int, signed: bool
) -> None:
    vectors, rows = problem(factors, width, 0, signed=signed)
    expected = np.array([nnls(rows.T, each)[0] for each in vectors])
    found = solve(vectors, rows).numpy()
    assert (expected == 0).mean() > 0.1 or factors == 1
    np.testing.assert_allclose(found, expected, atol=1e-8)
    single = solve(vectors, rows, dtype=torch.float32)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("penalty", [0.5, 5.0, 1e3])
def test_nonnegative_solution_with_penalty_equals_a_shifted_problem(penalty: float) -> None:
    """With square, invertible factors, the penalty is equivalent to a shift of the vector."""
    vectors, rows = problem(32, 32, 1, signed=True)
    shift = np.linalg.solve(rows, np.full(32, penalty))
    expected = np.array([nnls(rows.T, each - shift)[0] for each in vectors])
    np.testing.assert_allclose(solve(vectors, rows, penalty).numpy(), expected, atol=1e-6)


def test_nonnegative_solution_does_not_depend_on_other_vectors() -> None:
    vectors, rows = problem(12, 20, 2, signed=True)
    together = solve(vectors, rows)
    for number in range(5):
        torch.testing.assert_close(solve(vectors[number : number + 1], rows)[0], together[number])
    assert solve(vectors[:0], rows).shape == (0, 12)


def test_dependent_factors_reconstruct_as_well_as_scipy() -> None:
    vectors, rows = problem(12, 20, 3, signed=False)
    rows[1], rows[2], rows[3] = rows[0], rows[0] * (1 + 1e-9), 0
    rows = np.vstack([rows, np.eye(20)])
    found = solve(vectors, rows).numpy()
    expected = np.array([nnls(rows.T, each)[0] for each in vectors])
    assert (found[:, 3] == 0).all()
    errors = [np.linalg.norm(vectors - each @ rows, axis=1) for each in (found, expected)]
    np.testing.assert_allclose(errors[0], errors[1], atol=1e-6)


def test_nonnegative_gradient_equals_that_of_the_active_factors() -> None:
    vectors, rows = problem(6, 10, 4, signed=True)
    own = torch.tensor(vectors[2:5], requires_grad=True)
    found = solve_nonnegative(own, torch.tensor(rows), torch.zeros(6))
    (gradient,) = torch.autograd.grad(found[:, :].sum(), own)
    for number in range(3):
        active = (found[number] > 0).numpy()
        expected = np.linalg.pinv(rows[active]).sum(1)
        np.testing.assert_allclose(gradient[number].numpy(), expected, atol=1e-9)
