"""Ridge, logistic and attention-weighted regression, with cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.hashing import digest


def check_vectors(x: Floats, fewest: int = 1) -> Floats:
    """Return the vectors as float64, [row, width].

    Raises:
        ValueError: If there are fewer than `fewest` rows, or numbers that aren't finite.
    """
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"vectors are [row, width], not of {array.ndim} axes")
    if len(array) < fewest:
        raise ValueError(f"{len(array)} rows, where at least {fewest} are needed")
    if not np.isfinite(array).all():
        raise ValueError("a vector isn't finite")
    return array


CONSTANT_TOLERANCE = 1e-12
"""Spreads below this share of the largest are rounding errors, so the dimension is constant."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """Affine map x ↦ x · weights + intercept."""

    weights: Floats
    """[width, target]"""
    intercept: Floats
    """[target]"""

    def __call__(self, x: Floats) -> Floats:
        """Map x, [row, width], to [row, target]."""
        return np.asarray(x, dtype=np.float64) @ self.weights + self.intercept


def target_matrix(y: Floats) -> Floats:
    """Return targets as a matrix, [row, target]; one number per row is a single target."""
    array = np.asarray(y, dtype=np.float64)
    return check_vectors(array[:, None] if array.ndim == 1 else array)


def fit_ridge(x: Floats, y: Floats, penalty: float) -> LinearMap:
    """Fit a ridge regression (Hoerl and Kennard 1970) with an unpenalised intercept.

    It minimises Σ (y − ŷ)² + penalty · Σ weights². A penalty of 0 gives the least-squares solution
    with the smallest norm.

    Args:
        x: Vectors, [row, width].
        y: Targets, [row] or [row, target]. Each target has separate weights.
        penalty: The penalty, 0 or larger.

    Raises:
        ValueError: If the penalty is negative.
    """
    [linear_map] = fit_ridges(x, y, [penalty])
    return linear_map


def fit_ridges(x: Floats, y: Floats, penalties: Sequence[float]) -> list[LinearMap]:
    """Fit a ridge regression for each penalty, from one decomposition of a Gram matrix."""
    if min(penalties) < 0:
        raise ValueError("a penalty is 0 or larger")
    rows, wanted = check_vectors(x), target_matrix(y)
    if len(rows) != len(wanted):
        raise ValueError(f"{len(rows)} vectors and {len(wanted)} targets")
    at, to = rows.mean(axis=0), wanted.mean(axis=0)
    rows, wanted = rows - at, wanted - to
    wide = rows.shape[1] > len(rows)
    # With fewer rows than dimensions, solve in row space: (XᵀX + λ)⁻¹Xᵀ = Xᵀ(XXᵀ + λ)⁻¹.
    gram = rows @ rows.T if wide else rows.T @ rows
    values, vectors = scipy.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    seen = values > values.max(initial=0.0) * len(gram) * np.finfo(np.float64).eps
    turned = vectors.T @ (wanted if wide else rows.T @ wanted)
    ridges: list[LinearMap] = []
    for penalty in penalties:
        shrunk = np.zeros_like(values)
        np.divide(1.0, values + penalty, out=shrunk, where=seen)
        weights = vectors @ (shrunk[:, None] * turned)
        weights = rows.T @ weights if wide else weights
        ridges.append(LinearMap(weights, to - at @ weights))
    return ridges


@dataclass(frozen=True, eq=False)
class Standardiser:
    """Map that subtracts each dimension's mean and divides by its standard deviation."""

    mean: Floats
    """[width]"""
    by: Floats
    """[width] factor; 0 for a dimension that is constant over the rows, which becomes 0."""

    def __call__(self, x: Floats) -> Floats:
        """Standardise x, [row, width]."""
        return (np.asarray(x, dtype=np.float64) - self.mean) * self.by

    def before(self, read: LinearMap) -> LinearMap:
        """Return the map that standardises vectors and applies another map to them."""
        weights = self.by[:, None] * read.weights
        return LinearMap(weights, read.intercept - self.mean @ weights)


def fit_standardiser(x: Floats) -> Standardiser:
    """Fit the scale at which each dimension of these rows has mean 0 and standard deviation 1.

    Args:
        x: Vectors, [row, width].
    """
    rows = check_vectors(x)
    spread = rows.std(axis=0)
    # The rounding error of a constant far from 0 isn't a spread.
    some = spread > np.maximum(CONSTANT_TOLERANCE * np.abs(rows).max(axis=0), 0.0)
    by = np.zeros_like(spread)
    np.divide(1.0, spread, out=by, where=some)
    return Standardiser(rows.mean(axis=0), by)


LOGISTIC_STEPS = 2000
"""Maximum number of steps of Newton's method."""

LOGISTIC_TOLERANCE = 1e-6
"""Convergence criterion: the largest coordinate of the gradient of the mean loss."""


class ConvergenceError(ArithmeticError):
    """Error if the minimum isn't reached in `LOGISTIC_STEPS` steps."""


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Classifier that selects the class with the largest logit."""

    classes: Ints
    """[class] class numbers, ascending."""
    logits: LinearMap
    """Map from [row, width] to [row, class]."""

    def __call__(self, x: Floats) -> Ints:
        """Predict classes, [row], of x, [row, width]; the smaller class if logits are equal."""
        return self.classes[np.argmax(self.logits(x), axis=1)]


@dataclass(frozen=True, eq=False)
class _LogisticLoss:
    """Mean loss of a multinomial logistic regression over rows, as a function of its weights.

    Weights are flat: [column, class] in this order.
    """

    inputs: Floats
    """[row, column]"""
    is_own: Floats
    """[row, class] 1 for the row's class, otherwise 0."""
    pull: Floats
    """[column, 1] penalty of the squared weights of a column."""

    def _logits(self, flat: Floats) -> Floats:
        """Return logits, [row, class], shifted so that the largest of a row is 0."""
        logits = self.inputs @ flat.reshape(-1, self.is_own.shape[1])
        logits -= logits.max(axis=1, keepdims=True)
        return logits

    def __call__(self, flat: Floats) -> tuple[float, Floats]:
        """Return the loss and its gradient."""
        weights = flat.reshape(-1, self.is_own.shape[1])
        logits = self._logits(flat)
        parts = np.exp(logits)
        whole = parts.sum(axis=1)
        surprise = np.log(whole) - logits[self.is_own > 0]
        gradient = self.inputs.T @ (parts / whole[:, None] - self.is_own) / len(logits)
        gradient += self.pull * weights
        return float(surprise.mean() + (self.pull * weights**2).sum() / 2), gradient.ravel()

    def curvature(self, flat: Floats, step: Floats) -> Floats:
        """Multiply the Hessian of the loss by a step."""
        parts = np.exp(self._logits(flat))
        shares, along = parts / parts.sum(axis=1)[:, None], step.reshape(-1, parts.shape[1])
        moved = self.inputs @ along
        moved = shares * (moved - (shares * moved).sum(axis=1, keepdims=True))
        return (self.inputs.T @ moved / len(parts) + self.pull * along).ravel()


def fit_logistic(x: Floats, y: Ints, penalty: float) -> LinearClassifier:
    """Fit a multinomial logistic regression with unpenalised intercepts.

    It minimises Σ −log softmax(x · weights + intercept)[y] + penalty / 2 · Σ weights². With two
    classes, the difference of their weights equals the weights of a binary logistic regression with
    half the penalty.

    Newton's method runs along the rows' principal axes, with steps by conjugate gradients within a
    trust region (Nocedal and Wright 2006, alg. 7.2). Each axis is scaled by the curvature of the
    loss along it at equal class probabilities.

    Args:
        x: Vectors, [row, width].
        y: Classes, [row]. With a single class, its logit is 0 everywhere.
        penalty: The penalty, above 0. Without one, separable classes have no minimum.

    Raises:
        ValueError: If the penalty isn't positive.
        ConvergenceError: If the minimum isn't reached.
    """
    rows, names = check_vectors(x), np.asarray(y)
    if penalty <= 0:
        raise ValueError("the penalty of a logistic regression is larger than 0")
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} vectors and {len(names)} classes")
    classes, numbers = np.unique(names, return_inverse=True)
    n, width, count = len(rows), rows.shape[1], len(classes)
    at = rows.mean(axis=0)
    axes, short, scale = _principal(rows - at, count, penalty)
    inputs = np.hstack([short, np.ones((n, 1))])
    pull = np.append(penalty / n * scale**2, 0.0)[:, None]
    is_own = np.zeros((n, count))
    is_own[np.arange(n), numbers] = 1.0
    loss = _LogisticLoss(inputs, is_own, pull)
    found = scipy.optimize.minimize(
        loss,
        np.zeros(inputs.shape[1] * count),
        jac=True,
        hessp=loss.curvature,
        method="trust-ncg",
        options={"maxiter": LOGISTIC_STEPS, "gtol": LOGISTIC_TOLERANCE / 10},
    )
    steepest = float(np.abs(loss(found.x)[1]).max(initial=0.0))
    if not steepest <= LOGISTIC_TOLERANCE:
        raise ConvergenceError(f"after {found.nit} steps the gradient is {steepest:.1g}")
    whole = found.x.reshape(-1, count)
    weights = axes.T @ (scale[:, None] * whole[:-1])
    assert weights.shape == (width, count)
    # A constant added to all intercepts changes nothing, so they are centred like the weights.
    return LinearClassifier(
        classes, LinearMap(weights, whole[-1] - whole[-1].mean() - at @ weights)
    )


def _principal(rows: Floats, classes: int, penalty: float) -> tuple[Floats, Floats, Floats]:
    """Return the principal axes of the rows and their scales.

    With an L2 penalty, the weights are in the span of the rows, so this loses nothing.

    Returns:
        The axes, [axis, width]; the scaled coordinates of the rows, [row, axis]; and the scale of
        each axis, [axis].
    """
    left, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    scale = np.sqrt(len(rows) / (sizes**2 / classes + penalty))
    return axes, left * (sizes * scale), scale


PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Penalties that a ridge regression on standardised vectors chooses from."""

FitFunction = Callable[[Floats, Floats, Ints], Callable[[Floats], Floats]]
"""Fit to vectors [row, width], targets [row, …] and folds [row]; returns a predictor."""


def assign_folds(
    keys: Sequence[bytes], n: int, seed: int, strata: Sequence[object] | None = None
) -> Ints:
    """Assign rows to `n` folds: [row].

    Rows with equal keys are in one fold, and the order of rows doesn't matter. Distinct keys are
    sorted by a digest of key and seed, and dealt to the folds.

    Args:
        keys: A digest of each row's content.
        strata: Stratum of each row, for example its class; each stratum is dealt separately. A key
            in several strata belongs to the first one by text.

    Raises:
        ValueError: If there are fewer distinct keys than folds.
    """
    own: dict[bytes, str] = {}
    for key, stratum in zip(keys, strata or [""] * len(keys), strict=True):
        own[key] = min(own.get(key, repr(stratum)), repr(stratum))
    if not 2 <= n <= len(own):
        raise ValueError(f"{n} folds of {len(own)} distinct rows")
    order = sorted(own, key=lambda key: (own[key], digest("fold", seed, key), key))
    fold = {key: at % n for at, key in enumerate(order)}
    return np.array([fold[key] for key in keys], dtype=np.int64)


def hold_out(
    keys: Sequence[bytes], share: float, seed: int, strata: Sequence[object] | None = None
) -> Bools:
    """Choose rows that a fit doesn't use: [row].

    Rows with equal keys are together, and the order of rows doesn't matter. Of each stratum with
    at least two distinct keys, the given share is held out, at least one key and not all; with a
    share of 0, none.

    Args:
        keys: A digest of each row's content.
        share: Share of the distinct keys, from 0 to 1.
        strata: As in `assign_folds`.
    """
    own: dict[bytes, str] = {}
    for key, stratum in zip(keys, strata or [""] * len(keys), strict=True):
        own[key] = min(own.get(key, repr(stratum)), repr(stratum))
    held: set[bytes] = set()
    for stratum in {*own.values()} if share > 0 else set[str]():
        order = sorted(
            (key for key in own if own[key] == stratum),
            key=lambda key: (digest("hold out", seed, key), key),
        )
        held |= {*order[: min(len(order) - 1, max(1, round(share * len(order))))]}
    return np.array([key in held for key in keys], dtype=bool)


def group_keys(keys: Sequence[bytes], groups: Sequence[Collection[str]]) -> list[bytes]:
    """Return a common key for rows that share a key or a group, directly or through others: [row].

    It is the smallest of their keys, so the order of rows doesn't matter.

    Args:
        keys: A digest of each row's content.
        groups: The groups that each row belongs to.
    """
    nested_keys, parts = (
        list(keys),
        [[key, *group] for key, group in zip(keys, groups, strict=True)],
    )
    while True:
        least: dict[bytes | str, bytes] = {}
        for own, key in zip(parts, nested_keys, strict=True):
            for part in own:
                least[part] = min(least.get(part, key), key)
        before, nested_keys = nested_keys, [min(least[part] for part in own) for own in parts]
        if nested_keys == before:
            return nested_keys


def shuffle_targets(keys: Sequence[bytes], y: Floats, seed: int) -> Floats:
    """Return the targets of the shuffled-label control (after Hewitt and Liang 2019).

    Distinct keys exchange their targets and equal keys receive equal targets. The order of rows
    doesn't matter.

    Args:
        keys: A digest of each row's content.
        y: Targets, [row, target]. A key with several targets contributes the smallest.

    Returns:
        Targets in the shape of y.
    """
    own: dict[bytes, tuple[float, ...]] = {}
    for key, target in zip(keys, map(tuple, y.tolist()), strict=True):
        own[key] = min(own.get(key, target), target)
    order = sorted(own, key=lambda key: (digest("shuffle", seed, key), key))
    gets = dict(zip(sorted(own), order, strict=True))
    return np.array([own[gets[key]] for key in keys])


def cross_validate(x: Floats, y: Floats, fold: Ints, fit: FitFunction) -> Floats:
    """Predict each row with a fit to the rows of the other folds.

    Args:
        x: Vectors, [row, width].
        y: Targets, [row] or [row, target].
        fold: Fold of each row, [row].

    Returns:
        Predictions, in the shape of y.
    """
    predictions = np.empty(np.shape(y), dtype=np.asarray(y).dtype)
    for each in np.unique(fold):
        held = fold == each
        predict = fit(x[~held], y[~held], fold[~held])
        predictions[held] = predict(x[held]).reshape(predictions[held].shape)
    return predictions


@dataclass(frozen=True)
class RidgeProbe:
    """Ridge regression on vectors standardised with the rows of the fit."""

    penalty: float | None = None
    """None selects the member of `PENALTIES` with the least squared error on folds within the rows
    of the fit, or the smallest of several. With a single fold, the penalty is 1."""

    def __call__(self, x: Floats, y: Floats, fold: Ints) -> Callable[[Floats], Floats]:
        """Fit as a `FitFunction`, from [row, width] to [row, target]."""
        scale, linear_map = self._fitted(x, y, fold)
        return lambda rows: linear_map(scale(rows))

    def fit(self, x: Floats, y: Floats, fold: Ints) -> LinearMap:
        """Return the same fit as one map of vectors that aren't standardised."""
        scale, linear_map = self._fitted(x, y, fold)
        return scale.before(linear_map)

    def _fitted(self, x: Floats, y: Floats, fold: Ints) -> tuple[Standardiser, LinearMap]:
        penalty = self._chosen(x, y, fold) if self.penalty is None else self.penalty
        scale, [linear_map] = _scaled_ridges(x, y, [penalty])
        return scale, linear_map

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
        """Fit as a `FitFunction`, from [row, width] to class numbers [row]."""
        scale, classifier = self._fitted(x, y)
        return lambda rows: classifier(scale(rows)).astype(np.float64)

    def fit(self, x: Floats, y: Floats) -> LinearMap:
        """Return the logits of the same fit as one map of vectors that aren't standardised."""
        scale, classifier = self._fitted(x, y)
        return scale.before(classifier.logits)

    def _fitted(self, x: Floats, y: Floats) -> tuple[Standardiser, LinearClassifier]:
        scale = fit_standardiser(x)
        return scale, fit_logistic(scale(x), np.asarray(y, dtype=np.int64), self.penalty)


def _scaled_ridges(
    x: Floats, y: Floats, penalties: Sequence[float]
) -> tuple[Standardiser, list[LinearMap]]:
    scale = fit_standardiser(x)
    return scale, fit_ridges(scale(x), y, penalties)


def r_squared(y: Floats, predicted: Floats) -> Floats:
    """Compute R² plus the first-order influence of each row on it, [row]; their mean is R².

    R² = 1 − Σe² / Σd² is a ratio of sums over rows, with errors e = y − ŷ and deviations d = y − ȳ.
    A row's value is R² + ((1 − R²) d² − e²) / mean(d²): the linearised ratio, so that the spread of
    these values over rows includes that of the denominator. The mean ȳ has no influence of first
    order. Squares are summed over targets. NaN if all targets are equal.

    Args:
        y: Targets, [row] or [row, target].
        predicted: Predictions, in the same shape.

    References:
        Cochran, W. G. (1977). Sampling Techniques, section 6.4.
    """
    wanted, got = target_matrix(y), target_matrix(predicted)
    around = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=1)
    scale = around.mean()
    if scale == 0:
        return np.full(len(around), np.nan)
    errors = ((wanted - got) ** 2).sum(axis=1)
    unexplained = errors.mean() / scale
    return 1 - unexplained + (unexplained * around - errors) / scale


ROUTING_STEPS = 200
"""Maximum number of steps of the optimiser."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Map x ↦ Σ softmax(x · query) x · weights + intercept, summed over the tokens of a row."""

    scale: Standardiser
    query: Floats
    """[width]"""
    read: LinearMap

    def weights(self, vectors: Floats, row: Ints) -> Floats:
        """Compute the weight of each token, [token]; the weights of a row sum to 1.

        Args:
            vectors: Vectors, [token, width].
            row: Row of each token, [token], ascending from 0 without gaps.
        """
        return _softmax(self.scale(vectors) @ self.query, _row_starts(row), row)

    def __call__(self, vectors: Floats, row: Ints) -> Floats:
        """Predict the targets: [row, target]."""
        mixed = np.add.reduceat(
            self.weights(vectors, row)[:, None] * self.scale(vectors), _row_starts(row)
        )
        return self.read(mixed)


def fit_routing(vectors: Floats, row: Ints, y: Floats, penalty: float) -> Routing:
    """Fit a `Routing` to standardised vectors and targets, starting from equal token weights.

    It minimises Σ (y − ŷ)² + penalty · (Σ weights² + Σ query²). For a given query, the best weights
    are those of a ridge regression.

    Args:
        vectors: Vectors, [token, width].
        row: Row of each token, [token], ascending from 0 without gaps.
        y: Targets, [row] or [row, target].
        penalty: The penalty, above 0.

    Raises:
        ValueError: If the penalty isn't positive.
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
        # The ridge weights are optimal, so they contribute nothing to the gradient.
        of_weights = 2 * (x * (off @ read.weights.T)[row]).sum(axis=1)
        around = np.add.reduceat(weights * of_weights, starts)[row]
        slope = x.T @ (weights * (of_weights - around)) + 2 * penalty * query
        size = (off**2).sum() + penalty * ((read.weights**2).sum() + query @ query)
        return float(size), slope

    result = scipy.optimize.minimize(
        error, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": ROUTING_STEPS}
    )
    query = np.asarray(result.x, dtype=np.float64)
    read = fit_ridge(mixed(_softmax(x @ query, starts, row)), wanted, penalty)
    spread = np.divide(1.0, to.by, out=np.zeros_like(to.by), where=to.by > 0)
    linear_map = LinearMap(read.weights * spread, read.intercept * spread + to.mean)
    return Routing(scale, query, linear_map)


def _row_starts(row: Ints) -> Ints:
    """Return the index of each row's first token: [row]."""
    return np.flatnonzero(np.diff(row, prepend=-1))


def _softmax(scores: Floats, starts: Ints, row: Ints) -> Floats:
    """Compute the softmax over the tokens of each row: [token]."""
    raised = np.exp(scores - np.maximum.reduceat(scores, starts)[row])
    return raised / np.add.reduceat(raised, starts)[row]
