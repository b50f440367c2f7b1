"""Rows of token ids, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy array as a tensor; to a GPU from pinned memory, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, eq=False)
class Batch:
    """B prompts of up to T tokens. Positions count from the first real token of each prompt."""

    ids: Tensor
    """[B, T] long, token ids; the pad id where there is none."""
    mask: Tensor
    """[B, T] long, 1 where the token is real."""
    lengths: Tensor
    """[B] long, tokens of each prompt."""
    starts: Tensor
    """[B] long, column of each prompt's first token; 0 everywhere when padded on the right."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @staticmethod
    def of(
        rows: Sequence[Sequence[int]],
        pad_id: int,
        side: Literal["left", "right"],
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Pad `rows` to the longest of them. Every row needs a token (ValueError)."""
        lengths = [len(row) for row in rows]
        if not lengths or min(lengths) == 0:
            raise ValueError("a batch needs rows, and every row a token")
        longest = max(lengths)
        starts = [longest - n if side == "left" else 0 for n in lengths]
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, starts[i] : starts[i] + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, starts[i] : starts[i] + len(row)] = 1
        return Batch(
            ids=ids.to(device),
            mask=mask.to(device),
            lengths=torch.tensor(lengths, device=device),
            starts=torch.tensor(starts, device=device),
        )

    def take(self, rows: Tensor) -> Batch:
        """The batch with these rows, in this order, with repetition; padding stays as it is."""
        index = rows.to(self.ids.device)
        return Batch(
            ids=self.ids[index],
            mask=self.mask[index],
            lengths=self.lengths[index],
            starts=self.starts[index],
        )

    def part(self, rows: slice) -> Batch:
        """Some rows side by side, without copying."""
        return Batch(self.ids[rows], self.mask[rows], self.lengths[rows], self.starts[rows])

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """[K] columns of the padded tensors where `positions` of `rows` lie."""
        return self.starts[rows] + positions

    def locate(
        self, where: object, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each place, whatever the site; all of them are there."""
        return rows, self.columns(rows, positions), torch.ones_like(rows, dtype=torch.bool)

    def position_ids(self) -> Tensor:
        """[B, T], 0 at the first real token, whatever stands before it."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)


def gather(read: Tensor, batch: Batch, rows: Tensor, positions: Tensor, units: Tensor) -> Tensor:
    """[K, width]: the vectors of a read at K places.

    `read` is [B, T, units, width]; `rows`, `positions` (in the unpadded prompt) and `units` are
    [K] long.
    """
    device = batch.ids.device
    rows, positions, units = (t.to(device) for t in (rows, positions, units))
    columns = batch.columns(rows, positions)
    index = (t.to(read.device) for t in (rows, columns, units))
    return read[tuple(index)]
