"""Values of cells: how those of a pass are kept, and how those of several passes come together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

KEY = 16
"""Bytes of a cell's key."""

Found: TypeAlias = Mapping[bytes, tuple[NDArray[np.uint64], NDArray[np.float64]]]
"""Per cell that has any: keys of rows, each once, and values [row, column]."""


@dataclass(frozen=True, eq=False)
class Block:
    """Values of some cells on some rows: what one pass gave."""

    cells: Sequence[bytes]
    """16-byte keys, distinct."""
    starts: NDArray[np.int64]
    """[cell + 1] where each cell's rows begin."""
    rows: NDArray[np.uint64]
    """[row] key of the row's content, within its cell."""
    values: NDArray[np.float64]
    """[row, column]; 1 or 2 columns."""

    def problem(self) -> str | None:
        """What is wrong with its shapes; None where nothing is."""
        if any(len(cell) != KEY for cell in self.cells):
            return f"a cell's key has {KEY} bytes"
        if len(set(self.cells)) != len(self.cells):
            return "a cell is there twice"
        if self.starts.shape != (len(self.cells) + 1,):
            return "each cell has a start, and the last one an end"
        if self.values.ndim != 2 or self.values.shape[1] not in (1, 2):
            return "values have 1 or 2 columns"
        if self.rows.shape != (len(self.values),):
            return "each row has a key"
        ends = (int(self.starts[0]), int(self.starts[-1]))
        if ends != (0, len(self.rows)) or bool((np.diff(self.starts) < 0).any()):
            return "starts grow from 0 to the number of rows"
        return None


def pack_block(block: Block) -> bytes:
    """A block as the bytes of a safetensors file. Raises ValueError where its shapes are wrong."""
    problem = block.problem()
    if problem:
        raise ValueError(f"not a block of values: {problem}")
    keys = np.frombuffer(b"".join(block.cells), np.uint8).reshape(-1, KEY)
    return save(
        {
            "cells": keys,
            "starts": np.ascontiguousarray(block.starts, np.int64),
            "rows": np.ascontiguousarray(block.rows, np.uint64),
            "values": np.ascontiguousarray(block.values, np.float64),
        }
    )


def unpack_block(data: bytes) -> Block | None:
    """What `pack_block` wrote; None where these bytes are something else."""
    try:
        found = load(data)
        keys = found["cells"].astype(np.uint8, casting="no", copy=False)
        block = Block(
            [key.tobytes() for key in keys],
            found["starts"].astype(np.int64, casting="no", copy=False),
            found["rows"].astype(np.uint64, casting="no", copy=False),
            found["values"].astype(np.float64, casting="no", copy=False),
        )
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return None if block.problem() else block


def merged(cells: Sequence[bytes], blocks: Iterable[Block]) -> Found:
    """What blocks hold of these cells, rows in the order of their keys.

    Where several hold a row, the first of them counts. So it does for the number of columns of a
    cell: what has another one is left out.
    """
    numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
    columns = np.zeros(len(numbers), np.int64)
    parts = [part for block in blocks if (part := _part(block, numbers, columns)) is not None]
    if not parts:
        return {}
    of_cell = np.concatenate([part[0] for part in parts])
    rows = np.concatenate([part[1] for part in parts])
    values = np.concatenate([part[2] for part in parts])
    order = np.lexsort((rows, of_cell))  # stable: equal ones stay in the order of their blocks
    of_cell, rows = of_cell[order], rows[order]
    first = np.ones(len(rows), bool)
    first[1:] = (of_cell[1:] != of_cell[:-1]) | (rows[1:] != rows[:-1])
    of_cell, rows, values = of_cell[first], rows[first], values[order][first]
    ends = np.searchsorted(of_cell, np.arange(len(columns) + 1)).tolist()
    return {
        cell: (rows[begin:end], np.ascontiguousarray(values[begin:end, :width]))
        for cell, begin, end, width in zip(
            numbers, ends[:-1], ends[1:], columns.tolist(), strict=True
        )
        if begin < end
    }


def _part(
    block: Block, numbers: Mapping[bytes, int], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.float64]] | None:
    """Of a block: numbers of cells, keys and values of rows, those in two columns; None where it
    has none of these cells. columns: of each cell, which is written where it isn't known yet."""
    width = block.values.shape[1]
    of_block = np.array([numbers.get(cell, -1) for cell in block.cells], np.int64)
    filled = of_block[(of_block >= 0) & (np.diff(block.starts) > 0)]
    columns[filled[columns[filled] == 0]] = width
    wanted = np.zeros(len(of_block), bool)
    wanted[of_block >= 0] = columns[of_block[of_block >= 0]] == width
    of_row = np.repeat(np.where(wanted, of_block, -1), np.diff(block.starts))
    taken = of_row >= 0
    if not taken.any():
        return None
    values = np.zeros((int(taken.sum()), 2))
    values[:, :width] = block.values[taken]
    return of_row[taken], block.rows[taken], values
