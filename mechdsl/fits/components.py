"""Principal components, singular values, and how many dimensions vectors take up."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from mechdsl.base.arrays import Floats
from mechdsl.fits.vectors import checked

SINGLE = float(np.finfo(np.float32).eps)
"""What activations are exact to, where nothing else is said: float32."""


def pca(x: Floats, n: int) -> Floats:
    """The first `n` principal components of the rows around their mean (Pearson 1901), those of the
    largest variance first.

    x: [row, width]. Returns [component, width]: unit vectors, orthogonal to each other. Their sign
    is free: here the coordinate of the largest magnitude (the first of several) is positive.
    ValueError where the rows span fewer than `n` dimensions.
    """
    rows = checked(x, 2)
    _, singular, right = scipy.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    spanned = rank(singular, rows.shape)
    if not 1 <= n <= spanned:
        raise ValueError(f"{n} components of vectors that spread over {spanned} dimensions")
    return np.array([signed(each) for each in right[:n]])


def signed(direction: Floats) -> Floats:
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
    rows = checked(x)
    rows = rows - rows.mean(axis=0) if centred else rows
    return scipy.linalg.svdvals(rows)


def rank(singular: Floats, shape: tuple[int, ...], precision: float = SINGLE) -> int:
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
