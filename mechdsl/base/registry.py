"""One registry for every vocabulary: unique names, near misses suggested."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one most likely meant, if any is near."""
    found = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


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

    def suggest(self, word: str) -> str | None:
        """The registered name nearest to a misspelt one."""
        return nearest(word, self._entries)
