"""What is timed: a model's shape, pairs of prompts as token ids, and the cells of a sweep.

Workers of all environments read it, so it needs nothing beyond the standard library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

Site = Literal["resid_pre", "z", "mlp_out"]
Joined = Literal["last", "all"]
"""The last token; every token of the prompt in one cell."""
Picks = list[list[int]]
"""Per batch, indices of cells."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2 model; its weights are drawn from `seed`."""

    layers: int
    heads: int
    width: int
    vocabulary: int = 50257
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One intervention: source values written into the base run."""

    layers: tuple[int, ...]
    """Ascending; several are joined."""
    head: int | None
    position: int | Joined
    """Counted from the prompt's first token."""

    def at(self, length: int) -> slice:
        """The positions in a prompt of `length` tokens; empty where there are none."""
        if self.position == "all":
            return slice(0, length)
        first = length - 1 if self.position == "last" else self.position
        return slice(first, min(first + 1, length))

    def is_in(self, length: int) -> bool:
        """Whether a prompt of `length` tokens has its position."""
        return self.at(length).start < length


@dataclass(frozen=True)
class Batch:
    """Prompts of one length, in tokens; every list has an entry per row."""

    rows: list[int]
    """Their columns in the table."""
    clean: list[list[int]]
    """The source run: [row, token]."""
    corrupted: list[list[int]]
    """The base run: [row, token]."""
    answer: list[int]
    wrong: list[int]
    """Token ids: the metric is logit(answer) - logit(wrong) at the last token."""

    @property
    def length(self) -> int:
        return len(self.clean[0])


@dataclass(frozen=True)
class Work:
    """One sweep. The table of its results is [cell, row]."""

    name: str
    title: str
    rule: str
    """As it stands in the `.mech` file."""
    shape: Shape
    site: Site
    window: int | None
    positions: Joined | Literal["each"]
    """`each` is a cell per position."""
    batches: list[Batch]

    @property
    def n_rows(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def longest(self) -> int:
        return max(batch.length for batch in self.batches)

    @property
    def cells(self) -> list[Cell]:
        """All cells, positions fastest, then heads; some are beyond the end of shorter prompts."""
        layers = [self._joined(layer) for layer in range(self.shape.layers)]
        heads = range(self.shape.heads) if self.site == "z" else (None,)
        positions: Sequence[int | Joined] = (
            range(self.longest) if self.positions == "each" else (self.positions,)
        )
        return [Cell(*each) for each in product(layers, heads, positions)]

    def _joined(self, center: int) -> tuple[int, ...]:
        """`window w` as in a `.mech` file: l - ⌊w/2⌋ … l + ⌈w/2⌉ - 1, cut at the ends."""
        width = self.window or 1
        high = min(self.shape.layers, center + (width + 1) // 2)
        return tuple(range(max(0, center - width // 2), high))

    def picks(self, about: int | None = None) -> Picks:
        """The cells that exist in each batch; of all of them `about` so many, evenly spaced.

        A sample is made of whole layers (of whole heads, where there are positions as well), so
        that tools which batch the cells of a layer can do so.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, batch in enumerate(self.batches):
            for index, cell in enumerate(self.cells):
                if cell.is_in(batch.length):
                    head = cell.head if self.positions == "each" else None
                    groups.setdefault((number, cell.layers, head), []).append(index)
        found = list(groups.items())
        everything = sum(len(group) for group in groups.values())
        if about is not None and about < everything:
            parts = max(1, round(about * len(found) / everything))
            found = [found[int((part + 0.5) * len(found) / parts)] for part in range(parts)]
        picks: Picks = [[] for _ in self.batches]
        for (number, *_), group in found:
            assert isinstance(number, int)
            picks[number].extend(group)
        return picks

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Work:
        values: dict[str, Any] = json.loads(path.read_text())
        values["shape"] = Shape(**values["shape"])
        values["batches"] = [Batch(**batch) for batch in values["batches"]]
        return Work(**values)


def count(picks: Picks) -> int:
    """Forward passes of a loop that runs one per cell and batch."""
    return sum(len(each) for each in picks)
