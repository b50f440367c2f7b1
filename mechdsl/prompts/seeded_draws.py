"""Seeded draws: each depends on what it is for, never on batches, limits or Python's `hash`."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from math import comb
from typing import overload

_WORD = (1 << 64) - 1
_ROUNDS = 6


def stable_hash(*parts: object) -> int:
    """A number in 0..2^128-1 that is the same on every machine and in every version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())


class Permutation(Sequence[int]):
    """A seeded permutation of 0..size-1 that is never written out, so `size` may be anything.

    A Feistel network permutes the next power of four; what falls outside is sent round again
    (cycle walking, three times on average at worst).
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = tuple(stable_hash(*key, n) & _WORD for n in range(_ROUNDS))

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not 0 <= index < self.size:
            raise IndexError(index)
        half, mask = self._half, self._mask
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                # The finaliser of splitmix64, written out: a call each round takes twice as long.
                x = ((right ^ key) + 0x9E3779B97F4A7C15) & _WORD
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
                left, right = right, left ^ ((x ^ (x >> 31)) & mask)
            index = left << half | right
            if index < self.size:
                return index


def subset(pool: Sequence[int], size: int, rank: int | None, *key: object) -> tuple[int, ...]:
    """The set of this rank; without one, that of a seeded draw."""
    if rank is not None:
        return combination(pool, size, rank)
    order = Permutation(len(pool), *key)
    return tuple(sorted(pool[order[n]] for n in range(size)))


def combination(pool: Sequence[int], size: int, rank: int) -> tuple[int, ...]:
    """The set of this rank among all sets of this size, in the order of `itertools`."""
    found: list[int] = []
    start = 0
    for left in range(size, 0, -1):
        if left == 1:  # as in most cells: no need to count
            start, rank = start + rank, 0
        while True:
            behind = comb(len(pool) - start - 1, left - 1)
            if rank < behind:
                break
            rank -= behind
            start += 1
        found.append(pool[start])
        start += 1
    return tuple(found)


def place_of(pool: Sequence[int], chosen: Sequence[int]) -> int:
    """The rank of a set, ascending: `combination` of it gives the set."""
    rank, start = 0, 0
    for left, each in zip(range(len(chosen), 0, -1), chosen, strict=True):
        place = pool.index(each)
        rank += comb(len(pool) - start, left) - comb(len(pool) - place, left)
        start = place + 1
    return rank


def random_rank(count: int, *key: object) -> int:
    """A seeded number in 0..count-1, each as likely but for one part in 2^64."""
    words = count.bit_length() // 128 + 2
    drawn = 0
    for word in range(words):
        drawn = drawn << 128 | stable_hash(*key, word)
    return drawn % count
