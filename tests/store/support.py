"""Helpers that convert between dictionaries and value blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from mechdsl.store.runs import CachedValues, ValueBlock


def cells(count: int, start: int = 0) -> list[bytes]:
    """Return deterministic keys of cells."""
    numbers = range(start, start + count)
    return [hashlib.sha256(b"%d" % number).digest()[:16] for number in numbers]


def block(values: Mapping[bytes, Mapping[int, float | tuple[float, float]]]) -> ValueBlock:
    """Build the block of one forward pass from values per cell and row."""
    lengths = [len(rows) for rows in values.values()]
    flat = [value for rows in values.values() for value in rows.values()]
    columns = [value if isinstance(value, tuple) else (value,) for value in flat]
    return ValueBlock(
        list(values),
        np.cumsum([0, *lengths]).astype(np.int64),
        np.array([row for rows in values.values() for row in rows], np.uint64),
        np.array(columns, np.float64),
    )


def values_of(found: CachedValues) -> dict[bytes, dict[int, tuple[float, ...]]]:
    """Per cell and row, as Python numbers."""
    return {
        cell: {int(row): tuple(map(float, of)) for row, of in zip(rows, values, strict=True)}
        for cell, (rows, values) in found.items()
    }
