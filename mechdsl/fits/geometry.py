"""Principal components, ranks, clusters and similarity of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special
from scipy.cluster.vq import ClusterError, kmeans2

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.regression import Standardiser, check_vectors, fit_standardiser

FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
"""What activations are exact to, where nothing else is said: float32."""


def pca(x: Floats, n: int) -> Floats:
    """The first `n` principal components of the rows around their mean (Pearson 1901), those of the
    largest variance first.

    x: [row, width]. Returns [component, width]: unit vectors, orthogonal to each other. Their sign
    is free: here the coordinate of the largest magnitude (the first of several) is positive.
    ValueError where the rows span fewer than `n` dimensions.
    """
    rows = check_vectors(x, 2)
    _, singular, right = scipy.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    spanned = matrix_rank(singular, rows.shape)
    if not 1 <= n <= spanned:
        raise ValueError(f"{n} components of vectors that spread over {spanned} dimensions")
    return np.array([fix_sign(each) for each in right[:n]])


def fix_sign(direction: Floats) -> Floats:
    """A direction or its negative: the one whose coordinate of the largest magnitude is positive.

    Magnitudes that differ by rounding only are equal, and the first of them counts.
    """
    size = np.abs(direction)
    first = int(np.argmax(size >= size.max() * (1 - 1e-9)))
    return -direction if direction[first] < 0 else direction


def singular_values(x: Floats, centred: bool = False) -> Floats:
    """Of a matrix, the largest first; `centred` takes the mean row off before.

    x: [row, column]. Returns [min(row, column)].
    """
    rows = check_vectors(x)
    rows = rows - rows.mean(axis=0) if centred else rows
    return scipy.linalg.svdvals(rows)


def matrix_rank(
    singular: Floats, shape: tuple[int, ...], precision: float = FLOAT32_EPSILON
) -> int:
    """How many singular values are above rounding: larger than max(shape) · precision · the
    largest (Golub and Van Loan 2013, section 5.4.1; numpy's rule).

    singular: [value]; precision: the relative spacing of the type in which the matrix was computed.
    """
    largest = float(singular.max(initial=0.0))
    return int(np.count_nonzero(singular > largest * max(shape) * precision))


def effective_rank(singular: Floats) -> float:
    """exp of the entropy of the singular values, each as a share of their sum: between 1 and how
    many there are (Roy and Vetterli 2007, equation 3). 0 where all are 0.

    singular: [value].
    """
    whole = float(singular.sum())
    if whole == 0:
        return 0.0
    shares = singular[singular > 0] / whole
    return float(np.exp(-(shares * np.log(shares)).sum()))


CKA_MIN_ROWS = 4
"""Of the estimator that corrects for few rows."""


def linear_kernel(x: Floats) -> Floats:
    """[row, row]: inner products of the centred rows, with zeros on the diagonal, as
    `cka_unbiased` takes them.

    x: [row, width].
    """
    rows = _centred(x)
    found = rows @ rows.T
    np.fill_diagonal(found, 0.0)
    return found


def cka_unbiased(k: Floats, other: Floats) -> float:
    """Linear CKA from the unbiased estimator of HSIC (Song et al. 2012, equation 5, as in Nguyen et
    al. 2021, section 2): around 0 for representations that have nothing in common, however few the
    rows, so it can be a little below 0. NaN where one side doesn't vary.

    k, other: [row, row], `linear_kernel`s. ValueError below 4 rows.
    """
    return float(_ratio(*(_hsic(*pair) for pair in _pairs(k, other))))


def cka_per_row(k: Floats, other: Floats) -> Floats:
    """[row] what each row contributes: their mean is `cka_unbiased`, and the standard error of the
    mean is that of the jackknife (Efron and Tibshirani 1993, chapter 11): θ + (n − 1)(mean of θ₋ᵢ −
    θ₋ᵢ), θ₋ᵢ without row i.

    A bootstrap would draw rows twice, and a row is like itself: the estimator, which leaves the
    diagonal out, would no longer be unbiased. k, other: as above. ValueError below 5 rows.
    """
    whole = cka_unbiased(k, other)
    left = _ratio(*(_hsic_without_each(*pair) for pair in _pairs(k, other)))
    return whole + (len(k) - 1) * (left.mean() - left)


def _pairs(k: Floats, other: Floats) -> tuple[tuple[Floats, Floats], ...]:
    return (k, other), (k, k), (other, other)


def _ratio(both: Floats, own: Floats, others: Floats) -> Floats:
    root = np.sqrt(np.maximum(own, 0.0) * np.maximum(others, 0.0))
    return np.divide(both, root, out=np.full_like(root, np.nan), where=root > 0)


def _unbiased(n: int, trace: Floats, one: Floats, two: Floats, crossed: Floats) -> Floats:
    """[tr(KL) + 1ᵀK1·1ᵀL1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀKL1] / (n(n−3)), diagonals 0."""
    if n < CKA_MIN_ROWS:
        raise ValueError(f"{n} rows, where at least {CKA_MIN_ROWS} are needed")
    inner = trace + one * two / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed
    return np.asarray(inner / (n * (n - 3)))


def _hsic(k: Floats, other: Floats) -> Floats:
    """Of all rows."""
    one, two = k.sum(axis=1), other.sum(axis=1)
    return _unbiased(len(k), (k * other).sum(), one.sum(), two.sum(), one @ two)


def _hsic_without_each(k: Floats, other: Floats) -> Floats:
    """[row] of all rows but this one: what it takes part in is taken off the sums."""
    product, one, two = k * other, k.sum(axis=1), other.sum(axis=1)
    trace = product.sum() - 2 * product.sum(axis=1)
    # Σ_j (k_j − K_ij)(l_j − L_ij) over the other rows j.
    crossed = one @ two - one * two - k @ two - other @ one + product.sum(axis=1)
    return _unbiased(len(k) - 1, trace, one.sum() - 2 * one, two.sum() - 2 * two, crossed)


def _centred(x: Floats) -> Floats:
    rows = check_vectors(x, 2)
    return rows - rows.mean(axis=0)


CLUSTER_STARTS = 5
"""Of k-means; the one whose clusters are the narrowest is taken."""

CLUSTER_STEPS = 50


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians of one variance in all directions, the largest first."""

    scale: Standardiser
    centres: Floats
    """[cluster, width]"""
    shares: Floats
    """[cluster] of the vectors that it was fitted to."""
    variance: float

    def __call__(self, vectors: Floats) -> Floats:
        """[vector, cluster] how likely each is to be of each cluster."""
        off = _squares(self.scale(vectors), self.centres)
        return scipy.special.softmax(np.log(self.shares) - off / (2 * self.variance), axis=1)


def fit_mixture(vectors: Floats, count: int, seed: int) -> Mixture:
    """`count` clusters of standardised vectors (Lloyd 1982, from starts by Arthur and Vassilvitskii
    2007).

    vectors: [vector, width]. ValueError where they are fewer than clusters, or fall into fewer.
    """
    scale = fit_standardiser(vectors)
    x = scale(vectors)
    if len(x) < count:
        raise ValueError(f"there are {len(x)} vectors for {count} clusters")
    tried = list(_tries(x, count, seed))
    if not tried:
        raise ValueError(f"the vectors fall into fewer than {count} clusters")
    wide, centres, label = min(tried, key=lambda each: each[0])
    counts = np.bincount(label, minlength=count)
    order = np.argsort(-counts, kind="stable")
    # Vectors that all lie in their centres have no variance beyond rounding.
    variance = max(wide / x.size, float(np.finfo(np.float64).eps))
    return Mixture(scale, centres[order], counts[order] / len(x), variance)


def _tries(x: Floats, count: int, seed: int) -> Iterator[tuple[float, Floats, Ints]]:
    """(Σ squared distances from the centres, [cluster, width] these, [vector] its cluster), of
    starts after which no cluster is empty."""
    for start in range(CLUSTER_STARTS):
        random = np.random.default_rng([seed, start])
        try:
            with np.errstate(invalid="ignore"):  # fewer distinct vectors than clusters
                centres, _ = kmeans2(
                    x, count, iter=CLUSTER_STEPS, minit="++", missing="raise", seed=random
                )
        except ClusterError:  # one of them has lost all its vectors
            continue
        off = _squares(x, centres)
        label = off.argmin(axis=1)
        if len(np.unique(label)) == count:
            yield float(off.min(axis=1).sum()), centres, label


def _squares(x: Floats, centres: Floats) -> Floats:
    """[vector, cluster] squared distances."""
    off = (x**2).sum(axis=1)[:, None] - 2 * x @ centres.T + (centres**2).sum(axis=1)
    return np.maximum(off, 0.0)
