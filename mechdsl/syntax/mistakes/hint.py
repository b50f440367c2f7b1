"""What one hint is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hint:
    """Applies where `before` matches up to the place where the parser stopped and `after` from
    there on; `{0}` and so on in `text` are their groups, in order."""

    before: str
    after: str
    text: str
    accepts: str = ""
    """A terminal that has to be possible there."""
