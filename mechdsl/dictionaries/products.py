"""Products with all or with named rows and columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_GATHERED = 16
"""Named coordinates of a vector up to which only their own directions are used."""


def project_some(vectors: Tensor, columns: Tensor, which: Tensor | None) -> Tensor:
    """Return products with the columns of a matrix: [K, size], or [K, m] with named columns.

    Args:
        vectors: [K, width].
        columns: [width, size].
        which: [K, m] long; None for all.
    """
    if which is None:
        return vectors @ columns
    if which.shape[1] > MAX_GATHERED:
        return (vectors @ columns).gather(1, which)
    return torch.einsum("kw,kmw->km", vectors, columns.T[which])


def combine_some(numbers: Tensor, rows: Tensor, which: Tensor | None) -> Tensor:
    """Return sums of rows times numbers: [K, width].

    Args:
        numbers: [K, size], or [K, m] for named rows.
        rows: [size, width].
        which: [K, m] long; None for all.
    """
    if which is None:
        return numbers @ rows
    if which.shape[1] > MAX_GATHERED:
        every = numbers.new_zeros(len(numbers), len(rows))
        return every.scatter_add(1, which, numbers) @ rows
    return torch.einsum("km,kmw->kw", numbers, rows[which])
