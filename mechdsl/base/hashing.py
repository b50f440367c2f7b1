"""Stable digests, and seeded draws that depend only on their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from math import comb
from typing import TYPE_CHECKING, Any, cast, overload

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


DIGEST_BYTES = 16
"""Length of a digest."""


def digest(*parts: object) -> bytes:
    """Return a digest of 16 bytes.

    Parts are numbers, texts, bytes, arrays, records, functions, classes, and sequences, sets and
    mappings of them. The digest of a record includes its class and its compared fields.

    Raises:
        TypeError: A part has another type; no part is ignored silently.
    """
    made = blake2b(digest_size=DIGEST_BYTES)
    _feed(made, parts)
    return made.digest()


def digest_number(*parts: object) -> int:
    """Return a digest as a number in 0..2^64-1."""
    return int.from_bytes(digest(*parts)[:8], "little")


def _feed(made: Any, value: object) -> None:
    """Hash a value with its type and length, so that adjacent values can't be confused."""
    match value:
        case None | bool() | int() | float():
            _write(made, "v", f"{type(value).__name__} {value!r}".encode())
        case str():
            _write(made, "s", value.encode("utf-8", "surrogatepass"))
        case bytes():
            _write(made, "b", value)
        case Mapping():
            pairs = cast("Mapping[object, object]", value)
            each = sorted(digest(key) + digest(pair) for key, pair in pairs.items())
            _write(made, "m", b"".join(each))
        case Set():
            _write(made, "e", b"".join(sorted(map(digest, cast("Iterable[object]", value)))))
        case list() | tuple():
            items = cast("tuple[object, ...]", value)
            _write(made, "l", str(len(items)).encode())
            for item in items:
                _feed(made, item)
        case _:
            _feed_object(made, value)


def _feed_object(made: Any, value: object) -> None:
    import numpy as np  # lazy: most checks don't need NumPy

    if isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        if array.dtype == object:
            raise TypeError("an array of objects has no digest")
        _write(made, "a", f"{array.dtype.str} {array.shape}".encode())
        _write(made, "d", np.ascontiguousarray(array).tobytes())
    elif isinstance(value, np.generic):
        _feed(made, cast(object, value.item()))
    elif is_dataclass(value) and not isinstance(value, type):
        _write(made, "r", _name(type(value)).encode())
        _feed(made, [(f.name, getattr(value, f.name)) for f in fields(value) if f.compare])
    else:
        _write(made, "f", _name(value).encode())


def _name(value: object) -> str:
    """Return the full name of a class or function; TypeError for anything without a unique name."""
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise TypeError(f"a {type(value).__name__} has no digest")
    return f"{getattr(value, '__module__', '')}.{name}"


def _write(made: Any, kind: str, content: bytes) -> None:
    made.update(f"{kind}{len(content)}:".encode())
    made.update(content)


_WORD = (1 << 64) - 1

_ROUNDS = 6

_CACHED_HALF = 12
"""Maximum bits of half an index for which a permutation caches the mixed halves of each round."""


def stable_hash(*parts: object) -> int:
    """Return a number in 0..2^128-1 that is the same on every machine and in every version."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def stable_hashes(numbers: Iterable[int], *parts: object) -> Iterator[int]:
    """Yield `stable_hash(*parts, number)` for each number, in half the time."""
    text = "".join(f"{part}\x1f" for part in parts)
    start = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
    for number in numbers:
        made = start.copy()
        made.update(str(number).encode())
        yield int.from_bytes(made.digest())


class Permutation(Sequence[int]):
    """A seeded permutation of 0..size-1 that is never stored, so `size` is unlimited.

    A Feistel network permutes the next power of four; results outside the range are permuted again
    (cycle walking, at most three times on average).
    """

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        keys = stable_hashes(range(_ROUNDS), *key)
        self._rounds = [(number & _WORD, dict[int, int]()) for number in keys]

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
        caches = half <= _CACHED_HALF
        while True:
            left, right = index >> half, index & mask
            for key, known in self._rounds:
                mixed = known.get(right)
                if mixed is None:
                    # The finaliser of splitmix64, inlined: a call per round would double the time.
                    x = ((right ^ key) + 0x9E3779B97F4A7C15) & _WORD
                    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
                    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
                    mixed = (x ^ (x >> 31)) & mask
                    if caches:
                        known[right] = mixed
                left, right = right, left ^ mixed
            index = left << half | right
            if index < self.size:
                return index


def choose_subset(
    pool: Sequence[int], size: int, rank: int | None, *key: object
) -> tuple[int, ...]:
    """Return the subset of this rank, or a seeded random one without a rank."""
    if rank is not None:
        return unrank_subset(pool, size, rank)
    order = Permutation(len(pool), *key)
    return tuple(sorted(pool[order[n]] for n in range(size)))


def unrank_subset(pool: Sequence[int], size: int, rank: int) -> tuple[int, ...]:
    """Return the subset of this rank among all of this size, in the order of `itertools`."""
    members: list[int] = []
    start = 0
    for left in range(size, 0, -1):
        if left == 1:  # the common case needs no counting
            start, rank = start + rank, 0
        while True:
            following = comb(len(pool) - start - 1, left - 1)
            if rank < following:
                break
            rank -= following
            start += 1
        members.append(pool[start])
        start += 1
    return tuple(members)


def rank_subset(pool: Sequence[int], chosen: Sequence[int]) -> int:
    """Return the rank of an ascending subset: the inverse of `unrank_subset`."""
    rank, start = 0, 0
    for left, each in zip(range(len(chosen), 0, -1), chosen, strict=True):
        place = pool.index(each)
        rank += comb(len(pool) - start, left) - comb(len(pool) - place, left)
        start = place + 1
    return rank


def random_rank(count: int, *key: object) -> int:
    """Return a seeded number in 0..count-1, uniform up to a relative error of 2^-64."""
    words = count.bit_length() // 128 + 2
    drawn = 0
    for word in range(words):
        drawn = drawn << 128 | stable_hash(*key, word)
    return drawn % count
