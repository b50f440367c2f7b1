"""Sizes of files as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def bytes_of(text: str) -> int | None:
    """`5GB`, `500 MB`, `1.5T` or `1000` in bytes; None for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    return None if found is None else int(float(found[1]) * _UNITS[found[2].upper()])


def size_text(size: int) -> str:
    """`5.2 MB`, with a digit behind the point below 10."""
    unit = next(u for u in ("T", "G", "M", "K", "") if size >= _UNITS[u] or not u)
    if not unit:
        return f"{size} bytes" if size != 1 else "1 byte"
    amount = size / _UNITS[unit]
    name = "k" if unit == "K" else unit
    return f"{amount:.1f} {name}B" if amount < 9.95 else f"{amount:.0f} {name}B"
