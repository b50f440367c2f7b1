"""Ridge and logistic regression, compared with normal equations, gradients and Newton steps."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.fits.regression import fit_logistic, fit_ridge, fit_ridges, fit_standardiser

NORMAL = np.random.default_rng(1).normal


@pytest.mark.parametrize("shape", [(40, 5), (6, 30)])
@pytest.mark.parametrize("penalty", [0.3, 25.0])
def test_ridge_equals_the_normal_equations(shape: tuple[int, int], penalty: float) -> None:
    """Vectors are extended by a 1, whose weight has no penalty."""
    x, y = NORMAL(size=shape) + 3, NORMAL(size=(shape[0], 2)) - 8
    longer = np.hstack([x, np.ones((shape[0], 1))])
    penalties = np.diag([penalty] * shape[1] + [0.0])
    wanted = np.linalg.solve(longer.T @ longer + penalties, longer.T @ y)
    found = fit_ridge(x, y, penalty)
    assert np.allclose(found.weights, wanted[:-1])
    assert np.allclose(found.intercept, wanted[-1])
    assert np.allclose(found(x), longer @ wanted)


def test_ridges_of_several_penalties_equal_single_fits() -> None:
    x, y = NORMAL(size=(20, 4)), NORMAL(size=20)
    for one, penalty in zip(fit_ridges(x, y, [0.1, 2.0]), [0.1, 2.0], strict=True):
        assert np.allclose(one.weights, fit_ridge(x, y, penalty).weights)
        assert one(x).shape == (20, 1)


def test_ridge_without_penalty_is_the_minimum_norm_solution() -> None:
    x = NORMAL(size=(5, 12))
    y = NORMAL(size=5)
    around = x - x.mean(axis=0)
    assert np.allclose(fit_ridge(x, y, 0).weights[:, 0], np.linalg.pinv(around) @ (y - y.mean()))


def test_ridge_rejects_negative_penalty_and_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="penalty"):
        fit_ridge(np.ones((3, 2)), np.ones(3), -1)
    with pytest.raises(ValueError, match="3 vectors and 2 targets"):
        fit_ridge(np.ones((3, 2)), np.ones(2), 1)


def test_standardiser_sets_constant_dimensions_to_zero() -> None:
    x = NORMAL(size=(30, 3))
    x[:, 1] = 1e6 + 0.1
    scale = fit_standardiser(x)
    assert np.allclose(scale(x).std(axis=0), [1, 0, 1])
    assert np.allclose(scale(x).mean(axis=0), 0)
    assert (scale(x + 5)[:, 1] == 0).all()


def loss(x: np.ndarray, y: np.ndarray, weights: np.ndarray, intercept: np.ndarray, penalty: float):
    """The loss of logistic regression, computed in a loop."""
    whole = penalty / 2 * float((weights**2).sum())
    for row, own in zip(x, y, strict=True):
        powers = [np.exp(row @ weights[:, k] + intercept[k]) for k in range(len(intercept))]
        whole -= float(np.log(powers[own] / sum(powers)))
    return whole


@pytest.mark.parametrize(("shape", "classes"), [((40, 3), 2), ((50, 4), 5), ((12, 25), 3)])
def test_logistic_fit_is_a_minimum_of_the_loss(shape: tuple[int, int], classes: int) -> None:
    x, y = NORMAL(size=shape) * 2 + 4, np.arange(shape[0]) % classes
    found = fit_logistic(x, y, 0.7)
    weights, intercept = found.logits.weights, found.logits.intercept
    least = loss(x, y, weights, intercept, 0.7)
    for k in range(classes):
        for d in range(shape[1] + 1):
            for step in (-1e-3, 1e-3):
                moved, shifted = weights.copy(), intercept.copy()
                if d == shape[1]:
                    shifted[k] += step
                else:
                    moved[d, k] += step
                assert loss(x, y, moved, shifted, 0.7) > least


def test_logistic_fit_of_two_classes_equals_newton_steps() -> None:
    """The weight difference of two classes equals binary regression with half the penalty."""
    x = NORMAL(size=(60, 3))
    y = (x[:, 0] + NORMAL(size=60) > 0).astype(int)
    found = fit_logistic(x, y, 2.0)
    longer = np.hstack([x, np.ones((60, 1))])
    own = np.zeros(4)
    for _ in range(50):
        p = 1 / (1 + np.exp(-longer @ own))
        slope = longer.T @ (p - y) + np.append(own[:3], 0)
        bend = longer.T @ (longer * (p * (1 - p))[:, None]) + np.diag([1.0, 1, 1, 0])
        own = own - np.linalg.solve(bend, slope)
    weights = found.logits.weights
    assert np.allclose(weights[:, 1] - weights[:, 0], own[:3], atol=1e-4)
    got = found.logits.intercept
    assert np.isclose(got[1] - got[0], own[3], atol=1e-4)


def test_logistic_fit_predicts_the_original_class_numbers() -> None:
    x = np.array([[-2.0], [-1.9], [5.0], [5.2], [0.9], [1.1]])
    y = np.array([7, 7, 3, 3, 40, 40])
    found = fit_logistic(x, y, 1e-3)
    assert found(x).tolist() == y.tolist()
    assert fit_logistic(x, np.full(6, 9), 1.0)(x).tolist() == [9] * 6


@pytest.mark.parametrize("penalty", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_logistic_fit_converges_for_vectors_of_any_scale(size: float, penalty: float) -> None:
    """With gradients of very different sizes along the axes, and with separable classes."""
    x = NORMAL(size=(400, 60)) * size * np.geomspace(1, 1e-3, 60)
    y = np.digitize(x[:, 0] / size, [-1, 0, 1])
    found = fit_logistic(x, y, penalty)
    logits = found.logits(x)
    parts = np.exp(logits - logits.max(axis=1, keepdims=True))
    off = parts / parts.sum(axis=1, keepdims=True) - np.eye(4)[y]
    slope = x.T @ off + penalty * found.logits.weights
    assert np.abs(off.mean(axis=0)).max() < 1e-6
    assert np.abs(slope).max() < 1e-6 * np.abs(x).sum(axis=0).max()


def test_logistic_rejects_zero_penalty_and_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="larger than 0"):
        fit_logistic(np.ones((2, 1)), np.array([0, 1]), 0)
    with pytest.raises(ValueError, match="2 vectors and 3 classes"):
        fit_logistic(np.ones((2, 1)), np.array([0, 1, 1]), 1)
