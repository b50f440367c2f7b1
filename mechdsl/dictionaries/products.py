"""Products with all or with named rows and columns of a matrix, and distinct vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from mechdsl.dictionaries.folder import MAX_GATHERED


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


def distinct_rows(vectors: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the rows that differ in any bit, and [K] the number of each row among them.

    None if all rows are different.

    Args:
        vectors: [K, width] float32 or float64.
    """
    if len(vectors) < 2:
        return None
    bits = vectors.contiguous().view(torch.int32 if vectors.element_size() == 4 else torch.int64)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=random).to(bits.device)
    _, number = torch.unique((bits * factors).sum(1), return_inverse=True)
    rows = torch.arange(len(bits), device=bits.device)
    count = int(number.max()) + 1
    first = rows.new_full((count,), len(bits)).scatter_reduce(0, number, rows, "amin")
    if count == len(bits) or not torch.equal(bits[first][number], bits):
        return None
    return vectors[first], number
