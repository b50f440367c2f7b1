"""A batch of token ids, and the reads and writes of a pass over it.

Every other module needs the helpers that move arrays to a device and report free memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.vocab.sites import EdgeChange, stop_layer


def array_to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A numpy array as a tensor; to a GPU from pinned memory, without waiting for it."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU from pinned memory, without waiting for it."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    # On MPS a copy that doesn't wait may read memory that was freed in the meantime.
    return tensor.to(device, non_blocking=device.type != "mps")


def tensors_to_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one shape and type on the host; those of a device in one transfer."""
    away = [each for each in values if not each.is_cpu]
    moved = iter(torch.stack(away).cpu() if away else ())
    return [each if each.is_cpu else next(moved) for each in values]


def indices_to_device(indices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Indices [n] of the host on a device, in one transfer."""
    if device.type == "cpu" or not indices:
        return tuple(indices)
    sizes = [len(index) for index in indices]
    return to_device(torch.cat([index.long() for index in indices]), device).split(sizes)


def arrays_to_device(arrays: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """Indices [n] as tensors on a device, in one transfer."""
    return indices_to_device(
        [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays], device
    )


@dataclass(frozen=True, eq=False)
class DeviceIndex:
    """[n] indices on the host and on the device, so that no look-up waits for the device."""

    host: Ints
    device: Tensor
    """[n] long."""

    @staticmethod
    def of(values: Ints | Sequence[int], device: torch.device | str = "cpu") -> DeviceIndex:
        """Indices that are on the host."""
        host = np.asarray(values, dtype=np.int64)
        return DeviceIndex(host, array_to_device(host, torch.device(device)))

    @staticmethod
    def together(arrays: Sequence[Ints], device: torch.device) -> tuple[DeviceIndex, ...]:
        """Several in one transfer."""
        return tuple(map(DeviceIndex, arrays, arrays_to_device(arrays, device)))

    def __len__(self) -> int:
        return len(self.host)

    def part(self, chosen: slice) -> DeviceIndex:
        """Some of the indices."""
        return DeviceIndex(self.host[chosen], self.device[chosen])

    @cached_property
    def selection(self) -> slice | Tensor:
        """What selects these indices of a dimension: a slice of consecutive ones copies nothing."""
        found = find_slice(self.host)
        return self.device if found is None else found


def find_slice(values: Ints) -> slice | None:
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
        rows, columns, numbers = indices_to_device(index, ids.device)
        ids[rows, columns] = numbers
        return replace(self, numbers=ids)


def gather_vectors(
    read: Tensor, batch: Batch, rows: Tensor, positions: Tensor, units: Tensor
) -> Tensor:
    """[K, width]: the vectors of a read at K places.

    `read` is [B, T, units, width]; `rows`, `positions` (in the unpadded prompt) and `units` are
    [K] long.
    """
    index = rows, batch.columns(rows, positions), units
    return read[indices_to_device(index, read.device)]


WriteMode = Literal["set", "add", "scale", "along", "step"]
"""How what is written meets what is there: it replaces it, is added to it, or multiplies it; along
directions of length 1, only the component along these is set; steps from the position before are
multiplied, and added."""


class WriteMismatch(RuntimeError):
    """A write didn't happen, or happened more than once; the run's numbers mean nothing."""


class ReadMismatch(RuntimeError):
    """A site that was to be read was not passed, or more than once."""


@dataclass(frozen=True, eq=False)
class SiteWrite:
    """K vectors written at one site of one layer.

    At one site, writes act in the order in which they are given, each on what those before it left.
    """

    site: str
    layer: int | None
    """None for `embed`, `final_norm`, `logits`."""
    rows: Tensor
    """[K] long, row of the batch."""
    positions: Tensor
    """[K] long, token position in the unpadded prompt."""
    units: Tensor
    """[K] long, head or neuron; 0 for whole vectors."""
    values: Tensor
    """[K, width], cast to the activation's dtype and device; of `scale` and `step` [K, 1], the
    factors."""
    mode: WriteMode = "set"
    to: Tensor | None = None
    """[K] of `along`: the component along `values` afterwards."""
    stack: str = ""
    """Of which stack; the main one has no name."""
    rule: int = -1
    """The number of the rule that writes, in the order of the file; of rules whose vectors are one
    write, the last one. -1 is before all rules."""

    @property
    def where(self) -> SiteRead:
        """The site that is written."""
        return SiteRead(self.site, self.layer, self.stack)

    def moved(self, rows: Tensor) -> SiteWrite:
        """The same writes where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> SiteWrite:
        """Some of the vectors, by [K] bool."""
        index = there.nonzero()[:, 0]
        if len(index) == len(there):
            return self
        return replace(
            self,
            rows=self.rows[index],
            positions=self.positions[index],
            units=self.units[index],
            values=self.values[to_device(index, self.values.device)],
            to=None if self.to is None else self.to[to_device(index, self.to.device)],
        )


def apply_write(
    mode: WriteMode,
    now: Tensor,
    values: Tensor,
    to: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """[K, width]: what stands where `now` [K, width] stood, in its precision.

    values, to: as in `SiteWrite`, on the device of `now`. before: [K, width] of `step`, what stands
    one position before; what stands there itself, where there is none.
    """
    match mode:
        case "set":
            return values.to(now).expand_as(now)
        case "add":
            return now + values.to(now)
        case "scale":
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            return (wide * values.to(wide)).to(now)
        case "along":
            assert to is not None
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            along = values.to(wide)
            left = to.to(wide)[:, None] - (wide * along).sum(-1, keepdim=True)
            return (wide + left * along).to(now)
        case "step":
            assert before is not None
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            return (wide + (wide - before.to(wide)) * values.to(wide)).to(now)


@dataclass(frozen=True)
class SiteRead:
    """One site of one layer, on all rows and positions."""

    site: str
    layer: int | None = None
    stack: str = ""
    before: bool = False
    """What comes by before anything is written there."""

    @property
    def quoted(self) -> str:
        """What messages call it, as `resid_pre layer 3`."""
        words = [self.site]
        if self.stack:
            words.append(self.stack)
        if self.layer is not None:
            words.append(f"layer {self.layer}")
        return f"`{' '.join(words)}`"


class TokenFrame(Protocol):
    """Where the tokens of a pass lie in the model's tensors."""

    def __len__(self) -> int:
        """Rows."""
        ...

    @property
    def leading(self) -> int:
        """Size of the first dimension of the model's tensors."""
        ...

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[row] long, tokens of each row that a site has vectors of."""
        ...

    @property
    def lane_starts(self) -> Tensor:
        """[lane] long, column of the first token of each prompt that keys lie in."""
        ...

    @property
    def key_width(self) -> int:
        """Columns of these prompts."""
        ...

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Columns of the padded prompts in which positions lie."""
        ...

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the first two dimensions of the tensor tapped at a site, and which of the
        places are there at all; the others can't be seen by any measure."""
        ...


@dataclass(frozen=True, eq=False)
class EdgeWrite:
    """K queries of one layer whose weights on some keys are changed.

    allow: the keys are seen, where the model hides them. block: no weight, the others (and a sink)
    share it out. reweight: times `amounts`, and the same. uniform: the keys share what they have
    together evenly. weight: each gets `amounts`, the others share what is left in their old
    proportions. Other keys that a query doesn't see are left alone.
    """

    layer: int
    change: EdgeChange
    rows: Tensor
    """[K] long, row of the batch."""
    queries: Tensor
    """[K] long, token position in the unpadded prompt."""
    heads: Tensor
    """[K] long."""
    entries: Tensor
    """[E] long, which of the K each key belongs to …"""
    keys: Tensor
    """… [E] long, and its position in the unpadded prompt."""
    amounts: Tensor
    """[K]."""

    def moved(self, rows: Tensor) -> EdgeWrite:
        """The same where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> EdgeWrite:
        """Of some of the queries, by [K] bool."""
        place = torch.cumsum(there, 0) - 1
        kept = there[self.entries]
        return replace(
            self,
            rows=self.rows[there],
            queries=self.queries[there],
            heads=self.heads[there],
            entries=place[self.entries[kept]],
            keys=self.keys[kept],
            amounts=self.amounts[there],
        )


RowPositions = tuple[Ints, Ints]
"""Rows and the positions in their prompts, as parallel columns."""


class PassStopped(Exception):
    """Everything that was asked for has been computed."""


BlockPairs = Sequence[tuple[int, int | None]]
"""Blocks, and which compute in their places; None: what enters is handed on."""


@dataclass(frozen=True, eq=False)
class PositionIdWrite:
    """K tokens with other position ids."""

    rows: Tensor
    """[K] long, row of the pass."""
    positions: Tensor
    """[K] long, place in the unpadded prompt."""
    numbers: Tensor
    """[K] long."""

    def moved(self, rows: Tensor) -> PositionIdWrite:
        """The same where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> PositionIdWrite:
        """Some of the tokens, by [K] bool."""
        return PositionIdWrite(self.rows[there], self.positions[there], self.numbers[there])


@dataclass(frozen=True, eq=False)
class RuleWrites:
    """What rules write into the rows of a pass, in their order."""

    writes: Sequence[SiteWrite] = ()
    edges: Sequence[EdgeWrite] = ()
    numbers: Sequence[PositionIdWrite] = ()
    """Tokens with other position ids."""
    blocks: BlockPairs = ()
    """Which blocks compute in the places of others, in all rows."""

    def then(self, later: RuleWrites) -> RuleWrites:
        """With rules that stand behind them, and act on what these leave."""
        return RuleWrites(
            [*self.writes, *later.writes],
            [*self.edges, *later.edges],
            [*self.numbers, *later.numbers],
            tuple(sorted({**dict(self.blocks), **dict(later.blocks)}.items())),
        )

    def moved(self, rows: Tensor) -> RuleWrites:
        """The same where row i is row `rows[i]`."""
        return RuleWrites(
            [write.moved(rows) for write in self.writes],
            [edge.moved(rows) for edge in self.edges],
            [numbers.moved(rows) for numbers in self.numbers],
            self.blocks,
        )

    def below(self, stop: int | None, n_layers: int) -> RuleWrites:
        """Without what lies above where a pass stops."""
        if stop is None:
            return self

        def runs(site: str, layer: int | None) -> bool:
            needed = stop_layer(site, layer, n_layers)
            return needed is not None and needed <= stop

        return replace(
            self,
            writes=[write for write in self.writes if runs(write.site, write.layer)],
            edges=[edge for edge in self.edges if edge.layer < stop],
        )

    def numbered(self, batch: Batch) -> Batch:
        """The tokens with their position ids."""
        for each in self.numbers:
            batch = batch.numbered(each.rows, each.positions, each.numbers)
        return batch


def get_free_memory(device: torch.device) -> int:
    """Bytes that can be had without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line.split() for line in lines if line.startswith("MemAvailable"))
        available = int(found[1]) * 1024
    except (OSError, StopIteration, ValueError):
        available = 4 << 30
    return min(available, _get_container_limit())


def _get_container_limit() -> int:
    """What a container leaves."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 1 << 62


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
