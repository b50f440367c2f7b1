"""The tokens that a lens lists of each cell: those of the largest mean probability over rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Floats, Ints
from mechdsl.hooks.batch import on_device
from mechdsl.plan.rule_rows import Rows


@dataclass(frozen=True)
class ListedToken:
    """A token of a cell's list."""

    token: int
    over_rows: tuple[float, float] | None = None
    """Its mean probability over the rows of the cell, and the share of these in which it is the
    most likely token; None where rows have no part in it."""


@dataclass(frozen=True, eq=False)
class TokenMeans:
    """Sums over the rows of cells, as passes over them are done; equal rows count each."""

    top: int
    """How many are listed of a cell; 0 for none."""
    sums: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] probabilities."""
    firsts: dict[int, Floats] = field(default_factory=dict[int, Floats])
    """Cell → [vocab] rows in which the token is the most likely one."""
    rows: dict[int, float] = field(default_factory=dict[int, float])

    def add(self, rows: Rows, whole: Rows, found: Tensor) -> None:
        """Take rows of a pass. whole: all rows of these cells and prompts; of several runs of one
        prompt (the middle tokens of a span) each counts as a part of it. found: [row, vocab]."""
        weights = on_device(_weights(rows, whole), found.device).to(found.dtype)
        cells, place = np.unique(rows.cell, return_inverse=True)
        index = on_device(place.reshape(-1), found.device)
        sums = found.new_zeros(len(cells), found.shape[1])
        firsts = torch.zeros_like(sums)
        sums.index_add_(0, index, found * weights[:, None])
        firsts.index_put_((index, found.argmax(-1)), weights, accumulate=True)
        counts = weights.new_zeros(len(cells)).index_add_(0, index, weights).tolist()
        for number, cell in enumerate(cells.tolist()):
            for total, own in ((self.sums, sums), (self.firsts, firsts)):
                more = own[number].double().cpu().numpy()
                total[cell] = total[cell] + more if cell in total else more
            self.rows[cell] = self.rows.get(cell, 0.0) + counts[number]

    def forget(self) -> None:
        """List nothing: rows that are in the sums have been left out."""
        for each in (self.sums, self.firsts, self.rows):
            each.clear()

    def listed(self) -> dict[int, list[ListedToken]]:
        """Cell → its tokens, the most likely one first."""
        return {
            cell: [
                ListedToken(
                    token,
                    (float(sums[token]) / count, float(self.firsts[cell][token]) / count),
                )
                for token in np.argsort(-sums, kind="stable")[: self.top].tolist()
            ]
            for (cell, sums), count in zip(self.sums.items(), self.rows.values(), strict=True)
        }


def _weights(rows: Rows, whole: Rows) -> Floats:
    """[row] 1 over how many runs there are of its prompt in its cell."""
    width = 1 + int(whole.prompt.max())
    every, counts = np.unique(whole.cell * width + whole.prompt, return_counts=True)
    found: Ints = counts[np.searchsorted(every, rows.cell * width + rows.prompt)]
    return 1 / found
