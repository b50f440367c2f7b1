"""Logistic regression: from vectors to one of two or more classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.linear import LinearMap
from mechdsl.fits.vectors import checked

STEPS = 2000
"""Of L-BFGS, at most."""
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
    """Minimises Σ −log softmax(x · weights + intercept)[y] + penalty / 2 · Σ weights² with L-BFGS
    (multinomial, also for two classes; the intercepts are free). With two classes, the difference
    of their weights is what logistic regression with half the penalty gives.

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
    basis, short = _row_space(rows - at)
    is_own = np.zeros((n, count))
    is_own[np.arange(n), own] = 1.0

    def loss(flat: Floats) -> tuple[float, Floats]:
        """Of the mean over rows, and its gradient."""
        whole = flat.reshape(short.shape[1] + 1, count)
        weights, intercept = whole[:-1], whole[-1]
        logits = short @ weights + intercept
        surprise = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(n), own]
        off = (scipy.special.softmax(logits, axis=1) - is_own) / n
        gradient = np.vstack([short.T @ off + penalty / n * weights, off.sum(axis=0)])
        value = surprise.mean() + penalty / (2 * n) * (weights**2).sum()
        return float(value), gradient.ravel()

    start = np.zeros((short.shape[1] + 1) * count)
    found = scipy.optimize.minimize(
        loss,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "maxfun": 2 * STEPS, "gtol": TOLERANCE / 10, "ftol": 0.0},
    )
    steepest = float(np.abs(loss(found.x)[1]).max(initial=0.0))
    if not steepest <= TOLERANCE:
        raise NotConverged(f"after {found.nit} steps the gradient is {steepest:.1g}")
    whole = found.x.reshape(short.shape[1] + 1, count)
    weights = basis @ whole[:-1] if basis is not None else whole[:-1]
    assert weights.shape == (width, count)
    # Adding the same to all intercepts changes nothing: they sum to 0, as the weights do.
    return Classifier(classes, LinearMap(weights, whole[-1] - whole[-1].mean() - at @ weights))


def _row_space(rows: Floats) -> tuple[Floats | None, Floats]:
    """An orthonormal basis of what the rows span, [width, k], and the rows in it, [row, k], where
    that is narrower: with an L2 penalty the weights lie in it, so nothing is lost."""
    if rows.shape[1] <= len(rows):
        return None, rows
    basis = np.linalg.qr(rows.T)[0]
    return basis, rows @ basis
