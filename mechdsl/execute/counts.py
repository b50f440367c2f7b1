"""How many rows a run computed, and how many were known before; without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Rows of cells, each once for every rule that they are run with."""

    computed: int = 0
    stored: int = 0
    """Those whose values came from the store."""
