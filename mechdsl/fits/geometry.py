"""Principal components, ranks, clusters and similarity of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.regression import Standardiser, check_vectors, fit_standardiser

FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
"""Default precision of activations."""


def pca(x: Floats, n: int) -> Floats:
    """Compute the first `n` principal components (Pearson 1901), largest variance first.

    Args:
        x: Vectors, [row, width].

    Returns:
        Orthogonal unit vectors, [component, width], with the sign of `fix_sign`.

    Raises:
        ValueError: If the centred rows span fewer than `n` dimensions.
    """
    rows = check_vectors(x, 2)
    _, singular, right = scipy.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    spanned = matrix_rank(singular, rows.shape)
    if not 1 <= n <= spanned:
        raise ValueError(f"{n} components of vectors that spread over {spanned} dimensions")
    return np.array([fix_sign(each) for each in right[:n]])


def principal_axes(products: Floats, n: int) -> Floats:
    """Return the first `n` eigenvectors of a mean of products xxᵀ, largest eigenvalue first.

    Args:
        products: The mean, symmetric, [width, width].

    Returns:
        Orthogonal unit vectors, [vector, width], with the sign of `fix_sign`.

    Raises:
        ValueError: If the factors span fewer than `n` dimensions.
    """
    values, vectors = scipy.linalg.eigh(check_vectors(products))
    sizes = np.sqrt(np.clip(values[::-1], 0, None))
    spanned = matrix_rank(sizes, products.shape)
    if not 1 <= n <= spanned:
        raise ValueError(f"{n} dimensions of vectors that span {spanned}")
    return np.array([fix_sign(each) for each in vectors.T[::-1][:n]])


def fix_sign(direction: Floats) -> Floats:
    """Choose the sign for which the coordinate with the largest magnitude is positive.

    Magnitudes that differ only by rounding count as equal; the first of them determines the sign.
    """
    size = np.abs(direction)
    first = int(np.argmax(size >= size.max() * (1 - 1e-9)))
    return -direction if direction[first] < 0 else direction


def singular_values(x: Floats, centred: bool = False) -> Floats:
    """Compute the singular values of a matrix, largest first: [min(row, column)].

    Args:
        x: The matrix, [row, column].
        centred: Whether to subtract the mean row first.
    """
    rows = check_vectors(x)
    rows = rows - rows.mean(axis=0) if centred else rows
    return scipy.linalg.svdvals(rows)


def matrix_rank(
    singular: Floats, shape: tuple[int, ...], precision: float = FLOAT32_EPSILON
) -> int:
    """Count the singular values larger than max(shape) · precision · the largest one.

    This is numpy's rule (Golub and Van Loan 2013, section 5.4.1).

    Args:
        singular: Singular values, [value].
        shape: The shape of the matrix.
        precision: Relative spacing of the dtype in which the matrix was computed.
    """
    largest = float(singular.max(initial=0.0))
    return int(np.count_nonzero(singular > largest * max(shape) * precision))


def effective_rank(singular: Floats) -> float:
    """Compute exp of the entropy of the singular values as shares of their sum.

    The result is between 1 and the number of singular values (Roy and Vetterli 2007, equation 3),
    or 0 if all are 0.

    Args:
        singular: Singular values, [value].
    """
    whole = float(singular.sum())
    if whole == 0:
        return 0.0
    shares = singular[singular > 0] / whole
    return float(np.exp(-(shares * np.log(shares)).sum()))


CKA_MIN_ROWS = 4
"""Minimum number of rows for the unbiased estimator."""


def linear_kernel(x: Floats) -> Floats:
    """Compute inner products of centred rows with a zero diagonal, the input of `cka_unbiased`.

    Args:
        x: Vectors, [row, width].

    Returns:
        The kernel, [row, row].
    """
    rows = _centred(x)
    kernel = rows @ rows.T
    np.fill_diagonal(kernel, 0.0)
    return kernel


def cka_unbiased(k: Floats, other: Floats) -> float:
    """Compute linear CKA with the unbiased estimator of HSIC.

    The estimator is equation 5 of Song et al. 2012, used as in Nguyen et al. 2021, section 2. For
    unrelated representations it is around 0 for any number of rows, so it may be slightly negative.
    NaN if one side doesn't vary.

    Args:
        k: Kernel from `linear_kernel`, [row, row].
        other: Kernel of the other representation, [row, row].

    Raises:
        ValueError: If there are fewer than 4 rows.
    """
    return float(_ratio(*(_hsic(*pair) for pair in _pairs(k, other))))


def cka_per_row(k: Floats, other: Floats) -> Floats:
    """Compute the contribution of each row to CKA: [row].

    The mean of the contributions is `cka_unbiased`. The standard error of the mean is that of the
    jackknife (Efron and Tibshirani 1993, chapter 11): θ + (n − 1)(mean of θ₋ᵢ − θ₋ᵢ), with θ₋ᵢ
    computed without row i. A bootstrap would sample rows twice. Because a row is identical to
    itself and the estimator omits only the diagonal, it would then be biased.

    Args:
        k: Kernel from `linear_kernel`, [row, row].
        other: Kernel of the other representation, [row, row].

    Raises:
        ValueError: If there are fewer than 5 rows.
    """
    whole = cka_unbiased(k, other)
    left = _ratio(*(_hsic_without_each(*pair) for pair in _pairs(k, other)))
    return whole + (len(k) - 1) * (left.mean() - left)


def _pairs(k: Floats, other: Floats) -> tuple[tuple[Floats, Floats], ...]:
    return (k, other), (k, k), (other, other)


def _ratio(both: Floats, values: Floats, others: Floats) -> Floats:
    root = np.sqrt(np.maximum(values, 0.0) * np.maximum(others, 0.0))
    return np.divide(both, root, out=np.full_like(root, np.nan), where=root > 0)


def _unbiased(n: int, trace: Floats, one: Floats, two: Floats, crossed: Floats) -> Floats:
    """[tr(KL) + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3)), with zero diagonals."""
    if n < CKA_MIN_ROWS:
        raise ValueError(f"{n} rows, where at least {CKA_MIN_ROWS} are needed")
    inner = trace + one * two / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed
    return np.asarray(inner / (n * (n - 3)))


def _hsic(k: Floats, other: Floats) -> Floats:
    """Compute HSIC from all rows."""
    one, two = k.sum(axis=1), other.sum(axis=1)
    return _unbiased(len(k), (k * other).sum(), one.sum(), two.sum(), one @ two)


def _hsic_without_each(k: Floats, other: Floats) -> Floats:
    """Compute HSIC without each row: [row]. The terms of the row are subtracted from the sums."""
    product, one, two = k * other, k.sum(axis=1), other.sum(axis=1)
    trace = product.sum() - 2 * product.sum(axis=1)
    # Σ_j (k_j − K_ij)(l_j − L_ij) over the other rows j
    crossed = one @ two - one * two - k @ two - other @ one + product.sum(axis=1)
    return _unbiased(len(k) - 1, trace, one.sum() - 2 * one, two.sum() - 2 * two, crossed)


def _centred(x: Floats) -> Floats:
    rows = check_vectors(x, 2)
    return rows - rows.mean(axis=0)


CLUSTER_STARTS = 50
"""Number of k-means starts, of which the one with the least squared distances is selected."""

CLUSTER_STEPS = 300
"""Maximum number of k-means iterations of a start; most starts converge in fewer than 30."""

EQUAL_FITS = 1e-9
"""Difference between the squared distances of two starts that count as equal, as a share of the
vectors' total variance."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussian mixture with one isotropic variance, largest cluster first."""

    scale: Standardiser
    centres: Floats
    """[cluster, width]"""
    shares: Floats
    """[cluster] share of the vectors that the mixture was fitted to."""
    variance: float
    reached: int
    """Number of starts of `CLUSTER_STARTS` that have the least sum of squared distances."""

    def __call__(self, vectors: Floats) -> Floats:
        """Compute the probability of each cluster for each vector: [vector, cluster]."""
        off = _squares(self.scale(vectors), self.centres)
        return scipy.special.softmax(np.log(self.shares) - off / (2 * self.variance), axis=1)


def fit_mixture(vectors: Floats, count: int, seed: int) -> Mixture:
    """Fit `count` clusters to standardised vectors.

    The method is k-means (Lloyd 1982) with the greedy starts of Arthur and Vassilvitskii 2007,
    section 5.

    Args:
        vectors: Vectors, [vector, width].

    Raises:
        ValueError: If there are fewer vectors, or fewer distinct groups, than clusters.
    """
    scale = fit_standardiser(vectors)
    x = scale(vectors)
    if len(x) < count:
        raise ValueError(f"there are {len(x)} vectors for {count} clusters")
    starts = [_run_lloyd(x, count, np.random.default_rng([seed, n])) for n in range(CLUSTER_STARTS)]
    fits = [each for each in starts if each is not None]
    if not fits:
        raise ValueError(f"the vectors fall into fewer than {count} clusters")
    least, centres, label = min(fits, key=lambda each: each[0])
    counts = np.bincount(label, minlength=count)
    order = np.argsort(-counts, kind="stable")
    # Vectors that all equal their centres have no variance beyond rounding.
    variance = max(least / x.size, float(np.finfo(np.float64).eps))
    limit = least + EQUAL_FITS * float((x**2).sum())
    reached = sum(each[0] <= limit for each in fits)
    return Mixture(scale, centres[order], counts[order] / len(x), variance, reached)


def _run_lloyd(
    x: Floats, count: int, random: np.random.Generator
) -> tuple[float, Floats, Ints] | None:
    """Run k-means from one start until no vector changes its cluster.

    Returns:
        Sum of squared distances from the centres, the centres [cluster, width] and the clusters of
        the vectors [vector]. None if a cluster becomes empty.
    """
    centres = x[choose_starts(x, count, random)]
    off = _squares(x, centres)
    label = off.argmin(axis=1)
    for _ in range(CLUSTER_STEPS):
        counts = np.bincount(label, minlength=count)
        if not counts.all():
            return None
        centres = np.array([x[label == number].mean(axis=0) for number in range(count)])
        off, before = _squares(x, centres), label
        label = off.argmin(axis=1)
        if (label == before).all():
            break
    if not np.bincount(label, minlength=count).all():
        return None
    return float(off.min(axis=1).sum()), centres, label


def choose_starts(x: Floats, count: int, random: np.random.Generator) -> list[int]:
    """Choose vectors as starting centres by greedy k-means++.

    Each further centre leaves the least squared distances among 2 + ln(count) candidates, as in
    scikit-learn. Candidates are drawn with probabilities proportional to the squared distances from
    the nearest centre.

    Args:
        x: Vectors, [vector, width].

    Returns:
        Numbers of `count` vectors.
    """
    chosen = [int(random.integers(len(x)))]
    off = _squares(x, x[chosen])[:, 0]
    for _ in range(count - 1):
        total = off.sum()
        drawn = random.choice(len(x), 2 + int(np.log(count)), p=off / total if total > 0 else None)
        left = np.minimum(off[:, None], _squares(x, x[drawn]))
        best = int(left.sum(axis=0).argmin())
        chosen.append(int(drawn[best]))
        off = left[:, best]
    return chosen


def _squares(x: Floats, centres: Floats) -> Floats:
    """Compute squared distances: [vector, cluster]."""
    own, others = (np.einsum("ij,ij->i", each, each) for each in (x, centres))
    return np.maximum(own[:, None] - x @ (2 * centres.T) + others, 0.0)


def split_by_rows(vectors: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Split vectors into their parts in the row space and in the null space of a matrix.

    Args:
        vectors: [K, width].
        weights: [output, width].

    Returns:
        Two arrays [K, width], whose sum is `vectors`.
    """
    _, values, rows = np.linalg.svd(weights, full_matrices=False)
    rows = rows[: matrix_rank(values, weights.shape)]
    read = (vectors @ rows.T) @ rows
    return read, vectors - read
