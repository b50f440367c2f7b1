"""Logistic regression: from vectors to one of two or more classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.linear import LinearMap
from mechdsl.fits.vectors import checked

STEPS = 2000
"""Of Newton's method, at most."""
TOLERANCE = 1e-6
"""Largest coordinate of the gradient of the mean loss at which the minimum counts as reached."""


class NotConverged(ArithmeticError):
    """The minimum wasn't reached in `STEPS` steps."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """The class whose logit is the largest."""

    classes: Ints
    """[class]: what the classes are called, smallest first."""
    logits: LinearMap
    """From [row, width] to [row, class]."""

    def __call__(self, x: Floats) -> Ints:
        """x: [row, width]. Returns [row]: classes; the smaller one where logits are equal."""
        return self.classes[np.argmax(self.logits(x), axis=1)]


def logistic(x: Floats, y: Ints, penalty: float) -> Classifier:
    """Minimises Σ −log softmax(x · weights + intercept)[y] + penalty / 2 · Σ weights² (multinomial,
    also for two classes; the intercepts are free). With two classes, the difference of their
    weights is what logistic regression with half the penalty gives.

    By Newton's method, the steps by conjugate gradients within a trust region (Nocedal and Wright
    2006, alg. 7.2), along the rows' principal axes. Each axis is scaled by the curvature that the
    loss has along it where all classes are equally likely.

    x: [row, width]; y: [row]. One class alone: its logit is 0 everywhere. ValueError for a penalty
    that isn't positive (separable classes have no minimum then); NotConverged.
    """
    rows, names = checked(x), np.asarray(y)
    if penalty <= 0:
        raise ValueError("the penalty of a logistic regression is larger than 0")
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} vectors and {len(names)} classes")
    classes, own = np.unique(names, return_inverse=True)
    n, width, count = len(rows), rows.shape[1], len(classes)
    at = rows.mean(axis=0)
    axes, short, scale = _principal(rows - at, count, penalty)
    inputs = np.hstack([short, np.ones((n, 1))])
    pull = np.append(penalty / n * scale**2, 0.0)[:, None]
    is_own = np.zeros((n, count))
    is_own[np.arange(n), own] = 1.0

    def probabilities(flat: Floats) -> tuple[Floats, Floats]:
        """[row, class], and [row]: −log of that of the row's own class."""
        logits = inputs @ flat.reshape(-1, count)
        logits -= logits.max(axis=1, keepdims=True)
        parts = np.exp(logits)
        whole = parts.sum(axis=1)
        return parts / whole[:, None], np.log(whole) - logits[np.arange(n), own]

    def loss(flat: Floats) -> tuple[float, Floats]:
        """Of the mean over rows, and its gradient."""
        weights = flat.reshape(-1, count)
        shares, surprise = probabilities(flat)
        gradient = inputs.T @ (shares - is_own) / n + pull * weights
        return float(surprise.mean() + (pull * weights**2).sum() / 2), gradient.ravel()

    def curvature(flat: Floats, step: Floats) -> Floats:
        """The loss's second derivatives, times a step."""
        shares, along = probabilities(flat)[0], step.reshape(-1, count)
        moved = inputs @ along
        moved = shares * (moved - (shares * moved).sum(axis=1, keepdims=True))
        return (inputs.T @ moved / n + pull * along).ravel()

    found = scipy.optimize.minimize(
        loss,
        np.zeros(inputs.shape[1] * count),
        jac=True,
        hessp=curvature,
        method="trust-ncg",
        options={"maxiter": STEPS, "gtol": TOLERANCE / 10},
    )
    steepest = float(np.abs(loss(found.x)[1]).max(initial=0.0))
    if not steepest <= TOLERANCE:
        raise NotConverged(f"after {found.nit} steps the gradient is {steepest:.1g}")
    whole = found.x.reshape(-1, count)
    weights = axes.T @ (scale[:, None] * whole[:-1])
    assert weights.shape == (width, count)
    # Adding the same to all intercepts changes nothing: they sum to 0, as the weights do.
    return Classifier(classes, LinearMap(weights, whole[-1] - whole[-1].mean() - at @ weights))


def _principal(rows: Floats, classes: int, penalty: float) -> tuple[Floats, Floats, Floats]:
    """The rows' principal axes [axis, width], the rows along them [row, axis] and by how much each
    is scaled there [axis]. With an L2 penalty the weights lie in what the rows span, so nothing is
    lost."""
    left, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    scale = np.sqrt(len(rows) / (sizes**2 / classes + penalty))
    return axes, left * (sizes * scale), scale
