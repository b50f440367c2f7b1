"""Nonnegative and semi-nonnegative factorizations: planted factors and NumPy references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.fits.factors import (
    NotFactored,
    draw_factors,
    factor_nonnegative,
    factor_semi_nonnegative,
)

COUNT, WIDTH = 12, 40


def planted(seed: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Vectors and their factors; a fifth of the factors is active."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64)

    rows = torch.randn(COUNT, WIDTH, generator=random, dtype=torch.float64)
    if not signed:
        rows = rows.abs() * (draw(COUNT, WIDTH) < 0.3)
    rows = rows / rows.norm(dim=1, keepdim=True)
    activations = draw(2000, COUNT) * (draw(2000, COUNT) < 0.2)
    return activations @ rows + 0.01 * draw(2000, WIDTH), rows


def start(seed: int = 0, count: int = COUNT, width: int = WIDTH) -> Tensor:
    return draw_factors(count, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signed", [False, True])
def test_factorization_recovers_planted_factors(signed: bool, seed: int) -> None:
    vectors, rows = planted(seed, signed=signed)
    if signed:
        penalty = 0.02 * float(vectors.square().sum(1).mean().sqrt())
        found = factor_semi_nonnegative(vectors, start(seed), 500, penalty)
    else:
        found = factor_nonnegative(vectors, start(seed).abs(), 500)
    assert found.stopped_early
    cosines = (rows @ found.tensors["W_dec"].double().T).amax(1)
    assert (cosines > 0.95).double().mean() >= 0.9
    chance = (rows @ (start(9) if signed else start(9).abs()).T).amax(1)
    assert (chance < 0.95).all()


def test_semi_nonnegative_steps_equal_a_reference_loop() -> None:
    vectors = planted(1, signed=True)[0][:100]
    found = factor_semi_nonnegative(vectors, start(4), 3, 0.05)
    expected, activations = reference_steps(vectors.numpy(), start(4).numpy().copy(), 3, 0.05)
    order = np.argsort(-(activations**2).sum(0), kind="stable")
    np.testing.assert_allclose(found.tensors["W_dec"].numpy(), expected[order], atol=1e-6)
    assert torch.equal(found.tensors["threshold"], torch.full((COUNT,), 0.05))
    assert not found.tensors["b_dec"].any()


def reference_steps(x: Any, rows: Any, steps: int, penalty: float) -> tuple[Any, Any]:
    """Update activations and factors one by one, each from its residual."""
    a = np.zeros((len(x), len(rows)))
    for _ in range(steps):
        for k in range(len(rows)):
            rest = x - a @ rows + np.outer(a[:, k], rows[k])
            a[:, k] = np.maximum(0, rest @ rows[k] - penalty)
        for k in range(len(rows)):
            rest = x - a @ rows + np.outer(a[:, k], rows[k])
            found = a[:, k] @ rest
            rows[k] = found / np.linalg.norm(found)
    return rows, a


def test_nonnegative_error_equals_multiplicative_updates() -> None:
    """Lee and Seung's updates from the same start reach the same error."""
    vectors = planted(2, signed=False)[0][:300]
    found = factor_nonnegative(vectors, start(5).abs(), 1000).tensors["W_dec"].double()
    assert (found >= 0).all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(COUNT, dtype=torch.float64))
    a, rows = torch.full((300, COUNT), 0.1).double(), start(5).abs()
    for _ in range(3000):
        a = a * (vectors @ rows.T) / (a @ rows @ rows.T + 1e-12)
        rows = rows * (a.T @ vectors) / (a.T @ a @ rows + 1e-12)
    plain = float((vectors - a @ rows).square().sum())
    own = float((vectors - vectors @ torch.linalg.pinv(found) @ found).square().sum())
    assert own <= 1.05 * plain


def test_semi_nonnegative_replaces_an_idle_factor() -> None:
    """A factor without a positive activation is replaced by an active one."""
    vectors, _ = planted(0, signed=True)
    away = start()
    away[0] = -vectors.mean(0) / vectors.mean(0).norm()
    vectors = vectors * (vectors @ away[0] < -0.3)[:, None]
    found = factor_semi_nonnegative(vectors, away, 50, 0.01).tensors["W_dec"]
    assert (found.norm(dim=1) > 0.99).all()


@pytest.mark.parametrize("steps", [0, 5])
def test_negative_or_too_few_vectors_are_rejected(steps: int) -> None:
    vectors, _ = planted(0, signed=True)
    with pytest.raises(NotFactored, match="of their numbers are negative") as found:
        factor_nonnegative(vectors, start().abs(), steps)
    assert "semi_nmf(factors: 12)" in found.value.hint
    for factor, rows in ((factor_nonnegative, vectors.abs()), (factor_semi_nonnegative, vectors)):
        more = (0.0,) if factor is factor_semi_nonnegative else ()
        with pytest.raises(NotFactored, match="12 factors need as many vectors"):
            factor(rows[:11], start().abs(), steps, *more)
