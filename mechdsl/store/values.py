"""Values of cells: how those of a pass are kept, and how those of several passes come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

KEY = 16
"""Bytes of a cell's key."""

Rows: TypeAlias = tuple[NDArray[np.uint64], NDArray[np.float64]]
"""Keys of rows, each once, and values [row, column]."""
Found: TypeAlias = Mapping[bytes, Rows]
"""Per cell that has any."""


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


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several blocks, in the order of their keys; the first block with a row counts.

    A part whose number of columns isn't that of the first one is left out.
    """
    columns = parts[0][1].shape[1]
    fitting = [part for part in parts if part[1].shape[1] == columns]
    rows = np.concatenate([part[0] for part in fitting])
    values = np.concatenate([part[1] for part in fitting])
    distinct, first = np.unique(rows, return_index=True)
    return distinct, values[first]
