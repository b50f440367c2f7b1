"""What a tool has to do. Workers import it in every environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.work import Batch, Cell, Picks, Work

Table = NDArray[np.float64]
"""[cell, row], logits; NaN where a cell doesn't exist for a row or wasn't run."""


@dataclass(frozen=True)
class Timed:
    """One run of a work."""

    table: Table
    fixed: float
    """Seconds that don't depend on the number of cells: unpatched runs."""
    cells: float
    """Seconds in cells."""


class Tool(ABC):
    """One tool in a worker process: loaded once (not timed), then run."""

    packages: Sequence[str] = ()
    """Distributions whose versions are shown."""
    whole = False
    """Can't run a part of the cells."""

    @abstractmethod
    def load(self, work: Work, folder: Path) -> None:
        """Build the model and whatever else users do once; ends with a short warm-up."""

    @abstractmethod
    def run(self, picks: Picks) -> Timed:
        """Run these cells, timed."""


class Loop(Tool):
    """A tool with which users write the loop over cells."""

    work: Work

    def load(self, work: Work, folder: Path) -> None:
        self.work = work
        self.cells = work.cells
        self.build(work)
        first = [picks[:1] for picks in work.picks()]
        self.run(first)

    @abstractmethod
    def build(self, work: Work) -> None:
        """Build the model."""

    @abstractmethod
    def begin(self, batch: Batch, ids: Ids) -> None:
        """The unpatched runs of a batch, and what is kept of them."""

    @abstractmethod
    def patch(self, cells: Sequence[Cell]) -> Tensor:
        """logit(answer) - logit(wrong) per cell and row of the batch: [cell, row], in logits."""

    def end(self) -> None:
        """Let go of what was kept of a batch."""

    def run(self, picks: Picks) -> Timed:
        table = np.full((len(self.cells), self.work.n_rows), np.nan)
        fixed = cells = 0.0
        for batch, chosen in zip(self.work.batches, picks, strict=True):
            if not chosen:
                continue
            ids = Ids.of(batch)
            start = _now()
            with torch.inference_mode():
                self.begin(batch, ids)
            begun = _now()
            with torch.inference_mode():
                values = self.patch([self.cells[i] for i in chosen])
            done = _now()
            self.end()
            fixed += begun - start
            cells += done - begun
            table[np.ix_(chosen, batch.rows)] = values.float().cpu().numpy()
        return Timed(table, fixed, cells)


def _now() -> float:
    """Seconds, after the work that a GPU has been given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


@dataclass(frozen=True)
class Ids:
    """A batch as tensors of token ids."""

    clean: Tensor
    """[row, token]"""
    corrupted: Tensor
    """[row, token]"""
    answer: Tensor
    """[row]"""
    wrong: Tensor
    """[row]"""

    @staticmethod
    def of(batch: Batch) -> Ids:
        columns = (batch.clean, batch.corrupted, batch.answer, batch.wrong)
        return Ids(*(torch.tensor(column) for column in columns))

    def difference(self, logits: Tensor) -> Tensor:
        """logit(answer) - logit(wrong). logits: [row, vocabulary]; returns [row], in fp32."""
        rows = torch.arange(len(logits))
        return logits[rows, self.answer].float() - logits[rows, self.wrong].float()
