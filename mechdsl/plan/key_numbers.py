"""Numbers of 64 bits that stand for what rows hold, put together column by column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import digest
from mechdsl.plan.columns import Ragged

Numbers = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mixed(numbers: Numbers, more: Numbers | Ints) -> Numbers:
    """Both in one, so that equal results mean equal pairs: splitmix64's finalizer (Steele et al.
    2014, doi.org/10.1145/2660193.2660195) on the first, moved on, with the second."""
    with np.errstate(over="ignore"):
        found = (numbers + _STEP) ^ _scattered(np.asarray(more).astype(np.uint64) + _STEP)
        return _scattered(found)


def _scattered(numbers: Numbers) -> Numbers:
    found = (numbers ^ (numbers >> np.uint64(30))) * _FIRST
    found = (found ^ (found >> np.uint64(27))) * _SECOND
    return found ^ (found >> np.uint64(31))


def filled(number: int, count: int) -> Numbers:
    """One number so many times."""
    return np.full(count, number, dtype=np.uint64)


def of_lists(lists: Ragged) -> Numbers:
    """[list] a number for what is in it."""
    every = np.arange(len(lists.offsets) - 1)
    counts = lists.counts(every)
    found = counts.astype(np.uint64)
    for place in range(int(counts.max(initial=0))):
        longer = np.flatnonzero(counts > place)
        values = lists.values[lists.offsets[longer] + place]
        found[longer] = mixed(found[longer], values)
    return found


def per_list(lists: Ragged, table: Sequence[bytes]) -> list[bytes]:
    """A digest of each list of what stands in a table."""
    values = lists.values.tolist()
    return [
        digest(b"".join([table[i] for i in values[begin:end]]))
        for begin, end in pairwise(lists.offsets.tolist())
    ]
