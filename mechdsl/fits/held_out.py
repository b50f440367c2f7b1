"""Cross-validation: each row is predicted by a fit that hasn't seen it, nor any row equal to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.digest import digest
from mechdsl.fits.linear import LinearMap, Scale, ridges, standardised, targets
from mechdsl.fits.logistic import logistic

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Of a ridge regression on standardised vectors, from which the best is chosen."""

Fit = Callable[[Floats, Floats, Ints], Callable[[Floats], Floats]]
"""Of vectors [row, width], targets [row, …] and their folds [row]: what predicts."""


def folds(keys: Sequence[bytes], n: int, seed: int, strata: Sequence[object] | None = None) -> Ints:
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


def together(keys: Sequence[bytes], groups: Sequence[str]) -> list[bytes]:
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


def shuffled(keys: Sequence[bytes], y: Floats, seed: int) -> Floats:
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


def cross_validated(x: Floats, y: Floats, fold: Ints, fit: Fit) -> Floats:
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
            rows, wanted = scale(x[held]), targets(y[held])
            errors += [((one(rows) - wanted) ** 2).sum() for one in maps]
        return PENALTIES[int(np.argmin(errors))]


@dataclass(frozen=True)
class LogisticProbe:
    """Logistic regression on standardised vectors."""

    penalty: float = 1.0

    def __call__(self, x: Floats, y: Floats, fold: Ints) -> Callable[[Floats], Floats]:
        """A `Fit`: [row, width] to [row], classes (whole numbers)."""
        scale = standardised(x)
        found = logistic(scale(x), np.asarray(y, dtype=np.int64), self.penalty)
        return lambda rows: found(scale(rows)).astype(np.float64)


def _scaled_ridges(
    x: Floats, y: Floats, penalties: Sequence[float]
) -> tuple[Scale, list[LinearMap]]:
    scale = standardised(x)
    return scale, ridges(scale(x), y, penalties)


def r_squared(y: Floats, predicted: Floats) -> Floats:
    """[row]: 1 − (y − ŷ)² / mean((y − ȳ)²), whose mean over rows is R². Several targets: squares
    are summed over them. NaN where all targets are equal.

    y, predicted: [row] or [row, target].
    """
    wanted, got = targets(y), targets(predicted)
    around = ((wanted - wanted.mean(axis=0)) ** 2).sum(axis=1).mean()
    off = ((wanted - got) ** 2).sum(axis=1)
    return 1 - off / around if around > 0 else np.full(len(off), np.nan)
