"""Counts in words."""


def plural(count: int, noun: str) -> str:
    """`1 row`, `12 rows`, `1,200 values of a`: a noun that takes an `s` behind its number."""
    return f"{count:,} {noun if count == 1 else several(noun)}"


def several(noun: str) -> str:
    """`rows`, `values of a`."""
    word, of, name = noun.partition(" of ")
    return f"{word}s{of}{name}"
