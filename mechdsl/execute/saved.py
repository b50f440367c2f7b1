"""What a `save` line has written; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechdsl.base.byte_sizes import size_text
from mechdsl.base.plural import plural


@dataclass(frozen=True)
class Saved:
    """One file of activations."""

    experiment: str
    site: str
    """As the line says it, and so are `at` and `run`."""
    at: str
    run: str
    path: Path
    """Of the safetensors file."""
    rows_path: Path
    """Of what stands beside it: a line of JSON for each row, with its number and its text."""
    dtype: str
    """Of the vectors' numbers."""
    tensors: int
    """Sites."""
    vectors: int
    """Of each site."""
    rows: int
    """With a vector."""
    bytes: int
    """Of the safetensors file."""

    @property
    def line(self) -> str:
        """What is said of it below the tables."""
        sites, vectors = plural(self.tensors, "site"), plural(self.vectors, "vector")
        amount = f"{vectors} of {sites} ({plural(self.rows, 'row')}, {size_text(self.bytes)})"
        return (
            f"{self.experiment}: {self.site} of {self.run} at {self.at}: {amount} as {self.dtype} "
            f"written to {self.path}, rows to {self.rows_path.name}"
        )
