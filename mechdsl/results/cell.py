"""The name of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Coord = int | float | str


@dataclass(frozen=True)
class CellKey:
    """Which intervention a cell is."""

    coords: Mapping[str, Coord]
    """One value per axis of the experiment, in the order of its axes."""
    site: str
    """As the model names it, `L2H0.z`; empty in an experiment without a rule."""
    position: str | None = None
    tokens: tuple[str, ...] = ()
    """The distinct texts of the tokens that were hit, commonest first."""
