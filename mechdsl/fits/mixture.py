"""Clusters of vectors: k-means, whose clusters count as Gaussians of one spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.special
from scipy.cluster.vq import ClusterError, kmeans2

from mechdsl.base.arrays import Floats, Ints
from mechdsl.fits.linear import Scale, standardised

STARTS = 5
"""Of k-means; the one whose clusters are the narrowest is taken."""
STEPS = 50


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians of one variance in all directions, the largest first."""

    scale: Scale
    centres: Floats
    """[cluster, width]"""
    shares: Floats
    """[cluster] of the vectors that it was fitted to."""
    variance: float

    def __call__(self, vectors: Floats) -> Floats:
        """[vector, cluster] how likely each is to be of each cluster."""
        off = _squares(self.scale(vectors), self.centres)
        return scipy.special.softmax(np.log(self.shares) - off / (2 * self.variance), axis=1)


def mixture(vectors: Floats, count: int, seed: int) -> Mixture:
    """`count` clusters of standardised vectors (Lloyd 1982, from starts by Arthur and Vassilvitskii
    2007).

    vectors: [vector, width]. ValueError where they are fewer than clusters, or fall into fewer.
    """
    scale = standardised(vectors)
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
    for start in range(STARTS):
        random = np.random.default_rng([seed, start])
        try:
            with np.errstate(invalid="ignore"):  # fewer distinct vectors than clusters
                centres, _ = kmeans2(x, count, iter=STEPS, minit="++", missing="raise", seed=random)
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
