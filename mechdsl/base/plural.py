"""Counts in words."""


def plural(count: int, noun: str) -> str:
    """`1 row`, `12 rows`, `1,200 rows`: a noun that takes an `s` behind its number."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
