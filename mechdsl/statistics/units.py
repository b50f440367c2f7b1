"""What a number is an estimate from: units that were drawn independently, and new draws of them.

A unit is a row of the prompts; or all rows that a measure can't tell apart; or, under `stats by`,
all rows of one value. Estimates are over rows, intervals and p over units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints

BLOCK = 1_000_000
"""Numbers held at once by one intermediate array (8 MB)."""
FEWEST_IN_STRATUM = 4
"""Units below which a stratum says too little of its own spread."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one experiment, as far as their units hang on them."""

    keys: Ints
    """[prompt]: a row's content; rows of one key are one unit."""
    seen: Sequence[Ints] = ()
    """Each [prompt]: rows of one number can't be told apart."""
    groups: NDArray[Any] | None = None
    """[prompt]: the values of `stats by`."""

    @classmethod
    def of(
        cls,
        prompts: int,
        keys: Sequence[int] | None = None,
        seen: Sequence[Ints] = (),
        groups: NDArray[Any] | None = None,
    ) -> Rows:
        own = np.arange(prompts) if keys is None else np.asarray(keys, dtype=np.int64)
        return cls(own.astype(np.int64), seen, groups)


@dataclass(frozen=True, eq=False)
class Units:
    """Which rows belong together."""

    codes: tuple[Ints, ...]
    """Per experiment [prompt]: the number of each row's unit. Numbers hang on the rows' contents
    and not on their places."""
    count: int
    orders: tuple[Ints, ...]
    """Per experiment, its rows by unit and within it by content, so that a sum of them is the same
    in the last bit wherever they stand."""
    strata: Ints | None = None
    """[unit], where new rows have the same design."""

    def total(self, values: Floats, of: int = 0) -> Floats:
        """[cell, prompt] summed within units: [cell, unit]."""
        order = self.orders[of]
        held = self.codes[of][order]
        ordered = values[:, order]
        if np.array_equal(held, np.arange(self.count)):  # every row is a unit
            return np.ascontiguousarray(ordered)
        found = np.zeros((values.shape[0], self.count))
        if not len(held):
            return found
        starts = np.flatnonzero(np.diff(held, prepend=-1))
        found[:, held[starts]] = np.add.reduceat(ordered, starts, axis=1)
        return found

    def held(self, present: Bools, of: int = 0) -> Ints:
        """[cell]: how many units have a row in each cell."""
        return np.count_nonzero(self.total(present.astype(np.float64), of), axis=1)


def units_of(parts: Sequence[Rows], strata: Ints | None = None) -> Units:
    """The units of the rows of several experiments together: equal rows are one unit in all.

    strata: [prompt] of the first; used where every unit lies in one of them and each of them has
    enough.
    """
    lengths = [len(part.keys) for part in parts]
    ends = np.cumsum([0, *lengths])
    keys = np.concatenate([part.keys for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    partitions = [np.unique(keys, return_inverse=True)[1].reshape(-1)]
    for part, start in zip(parts, ends, strict=False):
        for seen in part.seen:
            partitions.append(_among(seen, int(start), len(keys)))
    if any(part.groups is not None for part in parts):
        labels: dict[object, int] = {}
        codes = np.arange(len(keys)) + len(keys)
        for part, start in zip(parts, ends, strict=False):
            for place, label in enumerate([] if part.groups is None else part.groups.tolist()):
                codes[start + place] = labels.setdefault(label, len(labels))
        partitions.append(np.unique(codes, return_inverse=True)[1].reshape(-1))
    joined = _joined(partitions, len(keys))
    # units are numbered by the least of their keys
    least = np.full(len(keys), np.iinfo(np.int64).max)
    np.minimum.at(least, joined, keys)
    first = np.unique(joined)
    rank = np.empty(len(keys), dtype=np.int64)
    rank[first[np.argsort(least[first], kind="stable")]] = np.arange(len(first))
    codes = rank[joined] if len(keys) else joined
    split = [codes[a:b] for a, b in pairwise(ends)]
    orders = [np.lexsort((part.keys, own)) for part, own in zip(parts, split, strict=True)]
    count = len(first)
    return Units(
        codes=tuple(split),
        count=count,
        orders=tuple(orders),
        strata=None if strata is None else _strata(strata, split[0], count),
    )


def _among(codes: Ints, start: int, size: int) -> Ints:
    """A partition of some of all rows; each of the others is alone."""
    own = np.unique(codes, return_inverse=True)[1].reshape(-1)
    found = np.arange(size) + size
    found[start : start + len(own)] = own
    return np.unique(found, return_inverse=True)[1].reshape(-1)


def _joined(partitions: Sequence[Ints], size: int) -> Ints:
    """The finest partition that joins what any of these does; its numbers are row numbers."""
    label = np.arange(size)
    while True:
        before = label
        for partition in partitions:
            least = np.full(int(partition.max(initial=0)) + 1, size)
            np.minimum.at(least, partition, label)
            label = least[partition]
        if np.array_equal(before, label):
            return label


def _strata(strata: Ints, codes: Ints, count: int) -> Ints | None:
    found = np.full(count, -1, dtype=np.int64)
    found[codes] = np.unique(strata, return_inverse=True)[1].reshape(-1)
    own = np.unique(strata, return_inverse=True)[1].reshape(-1)
    if (found < 0).any() or not np.array_equal(found[codes], own):
        return None
    sizes = np.bincount(found)
    return found if len(sizes) > 1 and sizes.min() >= FEWEST_IN_STRATUM else None


@dataclass(frozen=True, eq=False)
class Draws:
    """New samples of units, drawn with replacement: the same draws whatever is computed from them.

    With strata so many are drawn from each as there are.
    """

    units: int
    resamples: int
    seed: int
    strata: Ints | None = None

    @property
    def count(self) -> int:
        """How many strata there are."""
        return 1 if self.strata is None else int(self.strata.max()) + 1

    def weights(self, columns: int = 1) -> Iterator[Floats]:
        """How often each unit was drawn: [resample, unit] in blocks that leave room for `columns`
        numbers per resample."""
        if not self.units:
            return
        left = self.resamples
        step = max(1, BLOCK // max(self.units, columns))
        members = (
            [np.arange(self.units)]
            if self.strata is None
            else [np.flatnonzero(self.strata == each) for each in range(self.strata.max() + 1)]
        )
        # one generator each, or the draws would hang on the size of a block
        seed = self.seed % 2**63
        randoms = [np.random.default_rng([1, seed, each]) for each in range(len(members))]
        while left > 0:
            rows = min(step, left)
            left -= rows
            found = np.empty((rows, self.units))
            for random, among in zip(randoms, members, strict=True):
                found[:, among] = _multinomial(random, rows, len(among))
            yield found


def _multinomial(random: np.random.Generator, rows: int, size: int) -> NDArray[np.int64]:
    drawn = random.integers(0, size, (rows, size))
    drawn += np.arange(rows)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)


def blocks(cells: int, width: int) -> Iterator[slice]:
    """Cells in blocks whose arrays of `width` numbers per cell stay small."""
    step = max(1, 2 * BLOCK // max(width, 1))
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))
