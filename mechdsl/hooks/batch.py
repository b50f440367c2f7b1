"""Rows of token ids, padded to one length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Ints


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy array as a tensor; to a GPU from pinned memory, without waiting for it."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, without waiting for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    # On MPS a copy that doesn't wait may read memory that was freed in the meantime.
    return tensor.to(device, non_blocking=device.type != "mps")


def together_on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape and type on the host; those of a device in one transfer."""
    away = [each for each in values if not each.is_cpu]
    moved = iter(torch.stack(away).cpu() if away else ())
    return [each if each.is_cpu else next(moved) for each in values]


def together_on_device(indices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Indices [n] of the host on a device, in one transfer."""
    if device.type == "cpu" or not indices:
        return tuple(indices)
    sizes = [len(index) for index in indices]
    return to_device(torch.cat([index.long() for index in indices]), device).split(sizes)


def arrays_on_device(arrays: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """Indices [n] as tensors on a device, in one transfer."""
    return together_on_device(
        [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays], device
    )


@dataclass(frozen=True, eq=False)
class Index:
    """[n] indices on the host and on the device, so that no look-up waits for the device."""

    host: Ints
    device: Tensor
    """[n] long."""

    @staticmethod
    def of(values: Ints | Sequence[int], device: torch.device | str = "cpu") -> Index:
        """Indices that are on the host."""
        host = np.asarray(values, dtype=np.int64)
        return Index(host, on_device(host, torch.device(device)))

    @staticmethod
    def together(arrays: Sequence[Ints], device: torch.device) -> tuple[Index, ...]:
        """Several in one transfer."""
        return tuple(map(Index, arrays, arrays_on_device(arrays, device)))

    def __len__(self) -> int:
        return len(self.host)

    def part(self, chosen: slice) -> Index:
        """Some of the indices."""
        return Index(self.host[chosen], self.device[chosen])

    @cached_property
    def selection(self) -> slice | Tensor:
        """What selects these indices of a dimension: a slice of consecutive ones copies nothing."""
        found = consecutive(self.host)
        return self.device if found is None else found


def consecutive(values: Ints) -> slice | None:
    """The slice that selects these indices in this order; None where they aren't consecutive."""
    first, count = int(values[0]), len(values)
    if int(values[-1]) - first + 1 != count or not bool((np.diff(values) == 1).all()):
        return None
    return slice(first, first + count)


@dataclass(frozen=True, eq=False)
class Batch:
    """B prompts of up to T tokens. Positions count from the first real token of each prompt."""

    ids: Tensor
    """[B, T] long, token ids; the pad id where there is none."""
    mask: Tensor
    """[B, T] long, 1 where the token is real."""
    lengths: Tensor
    """[B] long, tokens of each prompt; on the host, so that no look-up waits for the device."""
    starts: Tensor
    """[B] long, column of each prompt's first token, 0 everywhere when padded on the right; on the
    host too."""
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What else the model is called with (`pixel_values`), [B * n, …]: n for each prompt."""
    frames: Mapping[str, Batch] = field(default_factory=dict[str, "Batch"])
    """Tokens of the stacks beside the main one: `encoder`, `vision`."""
    numbers: Tensor | None = None
    """[B, T] long, position ids; None: tokens are counted."""

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
            ids=to_device(ids, torch.device(device)),
            mask=to_device(mask, torch.device(device)),
            lengths=torch.tensor(lengths),
            starts=torch.tensor(starts),
        )

    @staticmethod
    def grid(rows: int, tokens: int, device: torch.device | str = "cpu") -> Batch:
        """Rows of so many tokens that have no ids: patches of images, frames of audio."""
        ids = torch.zeros((rows, tokens), dtype=torch.long, device=device)
        lengths = torch.full((rows,), tokens)
        return Batch(ids, torch.ones_like(ids), lengths, torch.zeros_like(lengths))

    def with_inputs(self, extra: Mapping[str, Tensor], **frames: Batch) -> Batch:
        """The same tokens beside other inputs."""
        return replace(self, extra=dict(extra), frames=frames)

    def take(self, rows: Tensor) -> Batch:
        """The batch with these rows, in this order, with repetition; padding stays as it is."""
        host, device = rows.cpu(), to_device(rows, self.ids.device)
        return self._rows(lambda tensor: tensor[host if tensor.device.type == "cpu" else device])

    def part(self, rows: slice) -> Batch:
        """Some rows side by side, without copying."""
        return self._rows(lambda tensor: tensor[rows])

    def _rows(self, of: Callable[[Tensor], Tensor]) -> Batch:
        each = len(self)
        return Batch(
            ids=of(self.ids),
            mask=of(self.mask),
            lengths=of(self.lengths),
            starts=of(self.starts),
            extra={
                name: of(tensor.unflatten(0, (each, -1))).flatten(0, 1)
                for name, tensor in self.extra.items()
            },
            frames={name: frame._rows(of) for name, frame in self.frames.items()},
            numbers=None if self.numbers is None else of(self.numbers),
        )

    def of_site(self, site: str, stack: str) -> Batch:
        """The tokens that a site of a stack has vectors of."""
        if stack == "cross":
            return self.of_stack("encoder") if site in ("k", "v") else self
        return self.of_stack(stack) if stack else self

    def of_stack(self, stack: str) -> Batch:
        """The tokens of a stack beside the main one; ValueError where nothing is said of them."""
        if stack not in self.frames:
            raise ValueError(f"the batch has no tokens of the stack `{stack}`")
        return self.frames[stack]

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """[K] columns of the padded tensors where `positions` of `rows` lie; all on the host."""
        return self.starts[rows] + positions

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Row and position of all tokens, row by row, on the host."""
        rows = torch.arange(len(self)).repeat_interleave(self.lengths)
        before = self.lengths.cumsum(0) - self.lengths
        return rows, torch.arange(len(rows)) - before[rows]

    @property
    def leading(self) -> int:
        """Size of the first dimension of the model's tensors."""
        return len(self)

    @property
    def lane_starts(self) -> Tensor:
        """[B] long, column of each prompt's first token."""
        return self.starts

    @property
    def key_width(self) -> int:
        """Columns."""
        return int(self.ids.shape[1])

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[row] long, tokens that a site has vectors of."""
        return self.of_site(site, stack).lengths

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each place; all of them are there."""
        columns = self.of_site(site, stack).columns(rows, positions)
        return rows, columns, torch.ones_like(rows, dtype=torch.bool)

    def position_ids(self) -> Tensor:
        """[B, T], 0 at the first real token, whatever stands before it, unless they are given."""
        if self.numbers is not None:
            return self.numbers
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    def numbered(self, rows: Tensor, positions: Tensor, numbers: Tensor) -> Batch:
        """The same tokens, K of them with other position ids; all [K] long."""
        ids = self.position_ids().clone()
        index = rows, self.columns(rows, positions), numbers
        rows, columns, numbers = together_on_device(index, ids.device)
        ids[rows, columns] = numbers
        return replace(self, numbers=ids)


def gather(read: Tensor, batch: Batch, rows: Tensor, positions: Tensor, units: Tensor) -> Tensor:
    """[K, width]: the vectors of a read at K places.

    `read` is [B, T, units, width]; `rows`, `positions` (in the unpadded prompt) and `units` are
    [K] long.
    """
    index = rows, batch.columns(rows, positions), units
    return read[together_on_device(index, read.device)]
