"""The tools by name, and which environment each is in. Imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One line of the results."""

    name: str
    module: str
    attribute: str
    is_peer: bool = False
    """Another library: it lives in `.venv-bench`."""

    def make(self) -> Any:
        """The tool; only in its own environment."""
        return getattr(import_module(f"benchmarks.tools.{self.module}"), self.attribute)()


TOOLS = {
    entry.name: entry
    for entry in (
        Entry("plain", "plain", "Plain"),
        Entry("plain-batched", "plain", "PlainBatched"),
        Entry("expert", "expert", "Expert"),
        Entry("mechdsl", "mechdsl", "Mechdsl"),
        Entry("transformer-lens", "transformer_lens", "Bridged", is_peer=True),
        Entry("nnsight", "nnsight", "Traced", is_peer=True),
        Entry("nnsight-batched", "nnsight", "Invoked", is_peer=True),
        Entry("pyvene", "pyvene", "Intervenable", is_peer=True),
        Entry("pyvene-cached", "pyvene", "Cached", is_peer=True),
    )
}
