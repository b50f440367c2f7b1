"""Rows whose numbers can't be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unusable:
    """A row with NaN, or with an infinity that a metric can't use."""

    row: int
    """Of the table."""
    run: str
    cell: str | None = None
    """The cell's coordinates, where it is the patched run; empty where it has none."""
    place: str = ""
    """Where in the model, as far as was looked."""
