"""Ridge, logistic and attention-weighted regression, with cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.hashing import digest


def check_vectors(x: Floats, fewest: int = 1) -> Floats:
    """The vectors as float64, [row, width]; ValueError where these aren't at least `fewest` rows of
    finite numbers."""
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"vectors are [row, width], not of {array.ndim} axes")
    if len(array) < fewest:
        raise ValueError(f"{len(array)} rows, where at least {fewest} are needed")
    if not np.isfinite(array).all():
        raise ValueError("a vector isn't finite")
    return array


CONSTANT_TOLERANCE = 1e-12
"""Spreads that are so small beside the largest are rounding: such a dimension says nothing."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """x ↦ x · weights + intercept."""

    weights: Floats
    """[width, target]."""
    intercept: Floats
    """[target]."""

    def __call__(self, x: Floats) -> Floats:
        """x: [row, width]. Returns [row, target]."""
        return np.asarray(x, dtype=np.float64) @ self.weights + self.intercept


def target_matrix(y: Floats) -> Floats:
    """[row, target]: one number per row is one target."""
    array = np.asarray(y, dtype=np.float64)
    return check_vectors(array[:, None] if array.ndim == 1 else array)


def fit_ridge(x: Floats, y: Floats, penalty: float) -> LinearMap:
    """Minimises Σ (y − ŷ)² + penalty · Σ weights² (Hoerl and Kennard 1970); the intercept is free.

    x: [row, width]; y: [row] or [row, target], each target with its own weights. A penalty of 0 is
    least squares, the solution of least norm. ValueError for a negative penalty.
    """
    [found] = fit_ridges(x, y, [penalty])
    return found


def fit_ridges(x: Floats, y: Floats, penalties: Sequence[float]) -> list[LinearMap]:
    """`ridge` with each of the penalties, from one decomposition of the smaller Gram matrix."""
    if min(penalties) < 0:
        raise ValueError("a penalty is 0 or larger")
    rows, wanted = check_vectors(x), target_matrix(y)
    if len(rows) != len(wanted):
        raise ValueError(f"{len(rows)} vectors and {len(wanted)} targets")
    at, to = rows.mean(axis=0), wanted.mean(axis=0)
    rows, wanted = rows - at, wanted - to
    wide = rows.shape[1] > len(rows)
    # In the space of the rows where these are fewer: (XᵀX + λ)⁻¹Xᵀ = Xᵀ(XXᵀ + λ)⁻¹.
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = scipy.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    seen = values > values.max(initial=0.0) * len(gram) * np.finfo(np.float64).eps
    turned = vectors.T @ (wanted if wide else rows.T @ wanted)
    found: list[LinearMap] = []
    for penalty in penalties:
        shrunk = np.zeros_like(values)
        np.divide(1.0, values + penalty, out=shrunk, where=seen)
        weights = vectors @ (shrunk[:, None] * turned)
        weights = rows.T @ weights if wide else weights
        found.append(LinearMap(weights, to - at @ weights))
    return found


@dataclass(frozen=True, eq=False)
class Standardiser:
    """Takes each dimension's mean off and divides by its standard deviation."""

    mean: Floats
    """[width]."""
    by: Floats
    """[width]: 0 for a dimension that is the same in all rows; it becomes 0."""

    def __call__(self, x: Floats) -> Floats:
        """x: [row, width]. Returns [row, width]."""
        return (np.asarray(x, dtype=np.float64) - self.mean) * self.by


def fit_standardiser(x: Floats) -> Standardiser:
    """The scale at which each dimension of these rows has mean 0 and standard deviation 1.

    x: [row, width].
    """
    rows = check_vectors(x)
    spread = rows.std(axis=0)
    # Rounding of a constant that is far from 0 is no spread.
    some = spread > np.maximum(CONSTANT_TOLERANCE * np.abs(rows).max(axis=0), 0.0)
    by = np.zeros_like(spread)
    np.divide(1.0, spread, out=by, where=some)
    return Standardiser(rows.mean(axis=0), by)


LOGISTIC_STEPS = 2000
"""Of Newton's method, at most."""

LOGISTIC_TOLERANCE = 1e-6
"""Largest coordinate of the gradient of the mean loss at which the minimum counts as reached."""


class ConvergenceError(ArithmeticError):
    """The minimum wasn't reached in `STEPS` steps."""


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """The class whose logit is the largest."""

    classes: Ints
    """[class]: what the classes are called, smallest first."""
    logits: LinearMap
    """From [row, width] to [row, class]."""

    def __call__(self, x: Floats) -> Ints:
        """x: [row, width]. Returns [row]: classes; the smaller one where logits are equal."""
        return self.classes[np.argmax(self.logits(x), axis=1)]


def fit_logistic(x: Floats, y: Ints, penalty: float) -> LinearClassifier:
    """Minimises Σ −log softmax(x · weights + intercept)[y] + penalty / 2 · Σ weights² (multinomial,
    also for two classes; the intercepts are free). With two classes, the difference of their
    weights is what logistic regression with half the penalty gives.

    By Newton's method, the steps by conjugate gradients within a trust region (Nocedal and Wright
    2006, alg. 7.2), along the rows' principal axes. Each axis is scaled by the curvature that the
    loss has along it where all classes are equally likely.

    x: [row, width]; y: [row]. One class alone: its logit is 0 everywhere. ValueError for a penalty
    that isn't positive (separable classes have no minimum then); NotConverged.
    """
    rows, names = check_vectors(x), np.asarray(y)
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
        options={"maxiter": LOGISTIC_STEPS, "gtol": LOGISTIC_TOLERANCE / 10},
    )
    steepest = float(np.abs(loss(found.x)[1]).max(initial=0.0))
    if not steepest <= LOGISTIC_TOLERANCE:
        raise ConvergenceError(f"after {found.nit} steps the gradient is {steepest:.1g}")
    whole = found.x.reshape(-1, count)
    weights = axes.T @ (scale[:, None] * whole[:-1])
    assert weights.shape == (width, count)
    # Adding the same to all intercepts changes nothing: they sum to 0, as the weights do.
    return LinearClassifier(
        classes, LinearMap(weights, whole[-1] - whole[-1].mean() - at @ weights)
    )


def _principal(rows: Floats, classes: int, penalty: float) -> tuple[Floats, Floats, Floats]:
    """The rows' principal axes [axis, width], the rows along them [row, axis] and by how much each
    is scaled there [axis]. With an L2 penalty the weights lie in what the rows span, so nothing is
    lost."""
    left, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    scale = np.sqrt(len(rows) / (sizes**2 / classes + penalty))
    return axes, left * (sizes * scale), scale


PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Of a ridge regression on standardised vectors, from which the best is chosen."""

FitFunction = Callable[[Floats, Floats, Ints], Callable[[Floats], Floats]]
"""Of vectors [row, width], targets [row, …] and their folds [row]: what predicts."""


def assign_folds(
    keys: Sequence[bytes], n: int, seed: int, strata: Sequence[object] | None = None
) -> Ints:
    """[row]: in which of `n` folds each row is. Rows of one key are in one fold, and the order of
    rows doesn't matter: distinct keys are put in the order of a digest of key and seed, and dealt.

    keys: a digest of each row's content. strata: [row], for instance classes; each is dealt out
    over the folds (a key belongs to the first of its strata, by their texts). ValueError where
    there are fewer distinct keys than folds.
    """
    own: dict[bytes, str] = {}
    for key, stratum in zip(keys, strata or [""] * len(keys), strict=True):
        own[key] = min(own.get(key, repr(stratum)), repr(stratum))
    if not 2 <= n <= len(own):
        raise ValueError(f"{n} folds of {len(own)} distinct rows")
    order = sorted(own, key=lambda key: (own[key], digest("fold", seed, key), key))
    fold = {key: at % n for at, key in enumerate(order)}
    return np.array([fold[key] for key in keys], dtype=np.int64)


def group_keys(keys: Sequence[bytes], groups: Sequence[str]) -> list[bytes]:
    """[row]: one key for rows of one key or of one group, and for those that share either with them
    by others; the least of their keys, whatever the order of rows."""
    found = list(keys)
    while True:
        before = found
        for partition in (groups, keys):
            least: dict[object, bytes] = {}
            for part, key in zip(partition, found, strict=True):
                least[part] = min(least.get(part, key), key)
            found = [least[part] for part in partition]
        if found == before:
            return found


def shuffle_targets(keys: Sequence[bytes], y: Floats, seed: int) -> Floats:
    """The targets of the shuffled-label control (after Hewitt and Liang 2019), in the shape of y:
    distinct keys get each other's, equal rows get the same, whatever the order of rows.

    y: [row, target]. A key whose rows have several targets gives the smallest away.
    """
    own: dict[bytes, tuple[float, ...]] = {}
    for key, target in zip(keys, map(tuple, y.tolist()), strict=True):
        own[key] = min(own.get(key, target), target)
    order = sorted(own, key=lambda key: (digest("shuffle", seed, key), key))
    gets = dict(zip(sorted(own), order, strict=True))
    return np.array([own[gets[key]] for key in keys])


def cross_validate(x: Floats, y: Floats, fold: Ints, fit: FitFunction) -> Floats:
    """Each row's prediction by a fit to the rows of the other folds.

    x: [row, width]; y: [row] or [row, target]; fold: [row]. Returns the shape of y.
    """
    found = np.empty(np.shape(y), dtype=np.asarray(y).dtype)
    for each in np.unique(fold):
        held = fold == each
        predict = fit(x[~held], y[~held], fold[~held])
        found[held] = predict(x[held]).reshape(found[held].shape)
    return found


@dataclass(frozen=True)
class RidgeProbe:
    """Ridge regression on standardised vectors (the mean and spread of the rows of the fit)."""

    penalty: float | None = None
    """None: of `PENALTIES` the one whose squared error is the least on folds within the rows of the
    fit, the smallest of equals; of one fold alone, 1."""

    def __call__(self, x: Floats, y: Floats, fold: Ints) -> Callable[[Floats], Floats]:
        """A `Fit`: [row, width] to [row, target]."""
        penalty = self._chosen(x, y, fold) if self.penalty is None else self.penalty
        scale, [found] = _scaled_ridges(x, y, [penalty])
        return lambda rows: found(scale(rows))

    def _chosen(self, x: Floats, y: Floats, fold: Ints) -> float:
        inner = np.unique(fold)
        if len(inner) < 2:
            return 1.0
        errors = np.zeros(len(PENALTIES))
        for each in inner:
            held = fold == each
            scale, maps = _scaled_ridges(x[~held], y[~held], PENALTIES)
            rows, wanted = scale(x[held]), target_matrix(y[held])
            errors += [((one(rows) - wanted) ** 2).sum() for one in maps]
        return PENALTIES[int(np.argmin(errors))]


@dataclass(frozen=True)
class LogisticProbe:
    """Logistic regression on standardised vectors."""

    penalty: float = 1.0

    def __call__(self, x: Floats, y: Floats, fold: Ints) -> Callable[[Floats], Floats]:
        """A `Fit`: [row, width] to [row], classes (whole numbers)."""
        scale = fit_standardiser(x)
        found = fit_logistic(scale(x), np.asarray(y, dtype=np.int64), self.penalty)
        return lambda rows: found(scale(rows)).astype(np.float64)


def _scaled_ridges(
    x: Floats, y: Floats, penalties: Sequence[float]
) -> tuple[Standardiser, list[LinearMap]]:
    scale = fit_standardiser(x)
    return scale, fit_ridges(scale(x), y, penalties)


def r_squared(y: Floats, predicted: Floats) -> Floats:
    """[row]: 1 − (y − ŷ)² / mean((y − ȳ)²), whose mean over rows is R². Several targets: squares
    are summed over them. NaN where all targets are equal.

    y, predicted: [row] or [row, target].
    """
    wanted, got = target_matrix(y), target_matrix(predicted)
    around = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=1).mean()
    off = ((wanted - got) ** 2).sum(axis=1)
    return 1 - off / around if around > 0 else np.full(len(off), np.nan)


ROUTING_STEPS = 200
"""Of the optimiser, at most."""


@dataclass(frozen=True, eq=False)
class Routing:
    """x ↦ Σ softmax(x · query) x · weights + intercept, over the tokens of a row."""

    scale: Standardiser
    query: Floats
    """[width]"""
    read: LinearMap

    def weights(self, vectors: Floats, row: Ints) -> Floats:
        """[token] how much of each is taken; those of a row add up to 1.

        vectors: [token, width]; row: [token] ascending from 0, without gaps.
        """
        return _softmax(self.scale(vectors) @ self.query, _row_starts(row), row)

    def __call__(self, vectors: Floats, row: Ints) -> Floats:
        """[row, target]"""
        mixed = np.add.reduceat(
            self.weights(vectors, row)[:, None] * self.scale(vectors), _row_starts(row)
        )
        return self.read(mixed)


def fit_routing(vectors: Floats, row: Ints, y: Floats, penalty: float) -> Routing:
    """Minimises Σ (y − ŷ)² + penalty · (Σ weights² + Σ query²) on standardised vectors and targets,
    from equal weights on; for each query the best weights are those of a ridge regression.

    vectors: [token, width]; row: [token] ascending from 0, without gaps; y: [row] or [row, target].
    ValueError for a penalty that isn't above 0.
    """
    if penalty <= 0:
        raise ValueError("a penalty is above 0")
    scale, to = fit_standardiser(vectors), fit_standardiser(target_matrix(y))
    x, wanted, starts = scale(vectors), to(target_matrix(y)), _row_starts(row)

    def mixed(weights: Floats) -> Floats:
        return np.add.reduceat(weights[:, None] * x, starts)

    def error(query: Floats) -> tuple[float, Floats]:
        weights = _softmax(x @ query, starts, row)
        pooled = mixed(weights)
        read = fit_ridge(pooled, wanted, penalty)
        off = read(pooled) - wanted
        # The ridge's own weights are at their best, so that they add nothing to the slope.
        of_weights = 2 * (x * (off @ read.weights.T)[row]).sum(axis=1)
        around = np.add.reduceat(weights * of_weights, starts)[row]
        slope = x.T @ (weights * (of_weights - around)) + 2 * penalty * query
        size = (off**2).sum() + penalty * ((read.weights**2).sum() + query @ query)
        return float(size), slope

    found = scipy.optimize.minimize(
        error, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": ROUTING_STEPS}
    )
    query = np.asarray(found.x, dtype=np.float64)
    read = fit_ridge(mixed(_softmax(x @ query, starts, row)), wanted, penalty)
    spread = np.divide(1.0, to.by, out=np.zeros_like(to.by), where=to.by > 0)
    own = LinearMap(read.weights * spread, read.intercept * spread + to.mean)
    return Routing(scale, query, own)


def _row_starts(row: Ints) -> Ints:
    """[row] index of its first token."""
    return np.flatnonzero(np.diff(row, prepend=-1))


def _softmax(scores: Floats, starts: Ints, row: Ints) -> Floats:
    """[token] over the tokens of each row."""
    raised = np.exp(scores - np.maximum.reduceat(scores, starts)[row])
    return raised / np.add.reduceat(raised, starts)[row]
