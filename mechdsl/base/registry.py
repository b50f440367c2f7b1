"""One registry for every vocabulary: unique names, near misses suggested."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one most likely meant: a third of its letters may differ. One
    of two letters has all of its own, and is near a single known word."""
    found = near(word, known)
    if len(word) > 2:
        return next(iter(found), None)
    letters = set(word.lower())
    kept = {each for each in found if letters <= set(each.lower()) or set(each.lower()) < letters}
    return kept.pop() if len(kept) == 1 else None


def near(word: str, known: Iterable[str]) -> list[str]:
    """All known words that a misspelt one may have meant, the nearest first. Nearly every word of
    two letters is near another one, so what is found for those has to be confirmed."""
    most = max(1, (len(word) + 1) // 3)
    alike = (each for each in known if abs(len(each) - len(word)) <= most)
    ranked = sorted((distance(word.lower(), each.lower()), each) for each in alike)
    return [each for apart, each in ranked if apart <= most]


def distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace or swap with a neighbour to get from one to the other.

    source: Damerau 1964, doi.org/10.1145/363958.363994, without changes inside a swapped pair
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


OUTSIDE: set[str] = set()
"""Names of modules outside of this package that have registered an entry, in any registry."""
_PACKAGE = __name__.partition(".")[0]


def _note_outside() -> None:
    """Whoever stands behind an entry: the first caller that isn't a function of this package."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        ours = name.partition(".")[0] == _PACKAGE
        if not ours:
            OUTSIDE.add(name)
        if not ours or frame.f_code.co_name == "<module>":
            return
        frame = frame.f_back


class Registry(Generic[T]):
    """Named entries of one kind (sites, metrics, …) in the order of their registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register an entry; a name that is taken is a mistake of ours, so it raises."""
        if name in self._entries:
            raise ValueError(f"{self.kind} `{name}` is registered twice")
        self._entries[name] = entry
        _note_outside()
        return entry

    def get(self, name: str) -> T | None:
        return self._entries.get(name)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterable[tuple[str, T]]:
        return self._entries.items()
