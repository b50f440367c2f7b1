"""What a `save` line has written; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechdsl.base.plural import plural


@dataclass(frozen=True)
class Saved:
    """One file of activations."""

    experiment: str
    path: Path
    tensors: int
    """Sites."""
    vectors: int
    """Of each site."""
    rows: int
    """With a vector."""
    bytes: int

    @property
    def said(self) -> str:
        """In words: `256 vectors of 12 sites (64 rows, 9.4 MB)`."""
        size = f"{self.bytes / 1e6:,.1f} MB"
        sites, vectors = plural(self.tensors, "site"), plural(self.vectors, "vector")
        return f"{vectors} of {sites} ({plural(self.rows, 'row')}, {size})"
