"""The multiply-adds that no restart can avoid, and the rate at which this machine multiplies.

Counted per row (one cell on one prompt) of a GPT-2 of width d, with one multiply-add as unit:

- a position of a block is 12 d²: 3 d² for queries, keys and values, d² for the output projection,
  8 d² for the MLP; a query that sees k keys is 2 d k more (scores and values);
- from the block where a write joins, positions before it are the unpatched run's; in that block
  queries, keys and values are new at the written positions alone;
- the last block makes keys and values of every position that changed, and the rest of it (query,
  attention, projection, MLP) at the last token alone, where the metric reads two logits;
- both unpatched runs are whole passes with two logits at the last token.

Rows whose write by structure changes nothing (before the first differing token, at layer 0 where
the tokens are equal, after the last reader) count nothing.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

from benchmarks.work import Batch, Cell, Shape, Work

SIDE = 2048
"""Of the square matrices whose product gives the rate."""


def unpatched(shape: Shape, length: int) -> int:
    """A whole pass over one prompt, in multiply-adds."""
    d = shape.width
    block = 12 * d * d * length + 2 * d * _pairs(0, length)
    return shape.layers * block + 2 * d


def restarted(shape: Shape, layer: int, written: range, length: int) -> int:
    """A row whose input of block `layer` is new at the `written` positions, in multiply-adds.

    `layer` may be the number of blocks: then only what the metric reads is left.
    """
    d = shape.width
    last = length - 1
    if layer == shape.layers:
        return 2 * d if last in written else 0
    first = written.start
    changed = length - first
    total = 2 * d
    for block in range(layer, shape.layers):
        joins = len(written) if block == layer else changed
        if block < shape.layers - 1:
            total += 3 * d * d * joins + 2 * d * _pairs(first, length) + 9 * d * d * changed
        else:
            query = d * d if block > layer or last in written else 0
            total += 2 * d * d * joins + query + 2 * d * length + 9 * d * d
    return total


def _pairs(first: int, length: int) -> int:
    """(query, key) pairs of causal attention for queries from `first` on."""
    return sum(query + 1 for query in range(first, length))


def patched(work: Work, cell: Cell, written: range, length: int) -> int:
    """A row of a cell that changes something, in multiply-adds."""
    shape = work.shape
    layer = cell.layers[0]
    if work.site == "resid_pre":
        return restarted(shape, layer, written, length)
    rest = restarted(shape, layer + 1, written, length)
    if work.site == "mlp_out" or rest == 0:
        return rest
    d = shape.width
    read = 1 if layer == shape.layers - 1 else len(written)
    return (d * (d // shape.heads) + 8 * d * d) * read + rest


def inert(work: Work, cell: Cell, written: range, batch: Batch, row: int) -> bool:
    """Whether the row can't differ from its base run, by structure."""
    clean, corrupted = batch.clean[row], batch.corrupted[row]
    if clean[: written.stop] == corrupted[: written.stop]:
        return True
    at_input = work.site == "resid_pre" and cell.layers[0] == 0
    return at_input and all(clean[p] == corrupted[p] for p in written)


def multiply_adds(work: Work) -> int:
    """The lower bound of a whole work, in multiply-adds."""
    total = 0
    for batch in work.batches:
        length = batch.length
        total += 2 * len(batch.rows) * unpatched(work.shape, length)
        for cell in work.cells:
            if not cell.is_in(length):
                continue
            written = range(length)[cell.at(length)]
            rows = range(len(batch.rows))
            changing = sum(not inert(work, cell, written, batch, row) for row in rows)
            total += changing * patched(work, cell, written, length)
    return total


def matmul_rate(repeats: int = 7) -> float:
    """Multiply-adds per second of a 2048³ product in fp32, the median of `repeats`."""
    import torch

    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    torch.mm(a, b, out=out)
    times: list[float] = []
    for _ in range(repeats):
        start = perf_counter()
        torch.mm(a, b, out=out)
        times.append(perf_counter() - start)
    return SIDE**3 / median(times)
