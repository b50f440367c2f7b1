"""Batches of token ids, and the reads and writes of a pass over them.

The module also has helpers that move arrays to a device and report free memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.fits.vectors import low_rank_change
from mechdsl.forward.hooks.coordinates import CoordinateWrite, EarlierChange, FeatureSplit
from mechdsl.models.shape import PaddingSide
from mechdsl.vocab.sites import EdgeChange, stop_layer

T = TypeVar("T")


def array_to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Convert a numpy array to a tensor; copies to a GPU use pinned memory and don't block."""
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; copies to a GPU use pinned memory and don't block."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()  # one that is expanded can't be pinned
    # On MPS, a copy that doesn't block may read memory that was freed in the meantime.
    return tensor.to(device, non_blocking=device.type != "mps")


def tensors_to_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors of one shape and dtype to the host, with one transfer from the device."""
    away = [value for value in values if not value.is_cpu]
    moved = iter(torch.stack(away).cpu() if away else ())
    return [value if value.is_cpu else next(moved) for value in values]


def indices_to_device(indices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Move indices [n] from the host to a device, in one transfer."""
    if device.type == "cpu" or not indices:
        return tuple(indices)
    sizes = [len(index) for index in indices]
    return to_device(torch.cat([index.long() for index in indices]), device).split(sizes)


def arrays_to_device(arrays: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """Convert index arrays [n] to tensors on a device, in one transfer."""
    return indices_to_device(
        [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays], device
    )


@dataclass(frozen=True, eq=False)
class DeviceIndex:
    """[n] indices on both the host and the device, so that no look-up waits for the device."""

    host: Ints
    device: Tensor
    """[n] long."""

    @staticmethod
    def of(values: Ints | Sequence[int], device: torch.device | str = "cpu") -> DeviceIndex:
        """Copy indices from the host to a device."""
        host = np.asarray(values, dtype=np.int64)
        return DeviceIndex(host, array_to_device(host, torch.device(device)))

    @staticmethod
    def together(arrays: Sequence[Ints], device: torch.device) -> tuple[DeviceIndex, ...]:
        """Copy several index arrays in one transfer."""
        return tuple(map(DeviceIndex, arrays, arrays_to_device(arrays, device)))

    def __len__(self) -> int:
        return len(self.host)

    def part(self, chosen: slice) -> DeviceIndex:
        """Select some of the indices."""
        return DeviceIndex(self.host[chosen], self.device[chosen])

    @cached_property
    def selection(self) -> slice | Tensor:
        """Selector of these indices; a slice, if possible, because it copies nothing."""
        rows = find_slice(self.host)
        return self.device if rows is None else rows


def find_slice(values: Ints) -> slice | None:
    """Return the slice that selects these indices in order; None if they aren't consecutive."""
    first, count = int(values[0]), len(values)
    if int(values[-1]) - first + 1 != count or not bool((np.diff(values) == 1).all()):
        return None
    return slice(first, first + count)


@dataclass(frozen=True, eq=False)
class PatchPools:
    """Tokens of an image, which stand for equal numbers of patches of an encoder."""

    of_patch: Tensor
    """[patch] long: the token that each patch is a part of; `tokens` for other tokens of the
    encoder, such as class tokens."""
    tokens: int
    """Number of tokens."""
    each: int
    """Number of patches of a token."""

    def pool(self, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Return [token, head, token]: the sum over the patches of a key, averaged over those of a
        query.

        Args:
            weights: [head, query, key].
            queries: [query] the columns of the queries, on the host.
            keys: [key] the columns of the keys, on the host.
        """
        heads, asking, _ = weights.shape
        size = self.tokens + 1
        tensor = to_device(self.of_patch[keys], weights.device)
        pooled = weights.new_zeros(heads, asking, size).index_add_(2, tensor, weights)
        tensor = to_device(self.of_patch[queries], weights.device)
        pooled = weights.new_zeros(heads, size, size).index_add_(1, tensor, pooled) / self.each
        return pooled[:, :-1, :-1].transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Batch:
    """B prompts of up to T tokens. Positions count from the first real token of each prompt."""

    ids: Tensor
    """[B, T] long, token ids; the pad id in the padding."""
    mask: Tensor
    """[B, T] long, 1 for real tokens."""
    lengths: Tensor
    """[B] long, tokens of each prompt; on the host, so that no look-up waits for the device."""
    starts: Tensor
    """[B] long, column of each prompt's first token, 0 everywhere when padded on the right; also on
    the host. In a decoder after an encoder (`after`), the column that position 0 would have:
    positions and `lengths` are counted from the encoder's first token."""
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Further inputs of the model (`pixel_values`), [B * n, …]: n for each prompt."""
    frames: Mapping[str, Batch] = field(default_factory=dict[str, "Batch"])
    """Tokens of stacks other than the main one: `encoder`, `vision`. Without those of `vision`, the
    patches of images are tokens of the prompts."""
    numbers: Tensor | None = None
    """[B, T] long, position ids, or [3, B, T] of frames, rows and columns; None: the model's
    own."""
    inserted: int = 0
    """Number of tokens after each image for which the model's embedding returns no vector."""
    tiles: tuple[int, int] | None = None
    """Number of tokens of a tile, and of columns, which padding follows; None without tiles."""
    pools: PatchPools | None = None
    """Of an encoder's patches, the tokens that pooled weights are read for."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @staticmethod
    def of(
        rows: Sequence[Sequence[int]],
        pad_id: int,
        side: PaddingSide,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Pad `rows` to the longest one. Raises ValueError if a row is empty."""
        lengths = [len(row) for row in rows]
        if not lengths or min(lengths) == 0:
            raise ValueError("a batch needs rows, and every row a token")
        count, column = torch.tensor(lengths), torch.arange(max(lengths))
        starts = len(column) - count if side == "left" else torch.zeros_like(count)
        there = (column >= starts[:, None]) & (column < (starts + count)[:, None])
        ids = torch.full(there.shape, pad_id, dtype=torch.long)
        ids[there] = torch.tensor([*chain.from_iterable(rows)])
        return Batch(
            ids=to_device(ids, torch.device(device)),
            mask=to_device(there.long(), torch.device(device)),
            lengths=count,
            starts=starts,
        )

    @staticmethod
    def grid(rows: int, tokens: int, device: torch.device | str = "cpu") -> Batch:
        """Create rows of tokens without ids: patches of images, frames of audio."""
        ids = torch.zeros((rows, tokens), dtype=torch.long, device=device)
        lengths = torch.full((rows,), tokens)
        return Batch(ids, torch.ones_like(ids), lengths, torch.zeros_like(lengths))

    def with_inputs(self, extra: Mapping[str, Tensor], **frames: Batch) -> Batch:
        """Replace the further inputs and frames; tokens stay the same."""
        return replace(self, extra=dict(extra), frames=frames)

    def take(self, rows: Tensor) -> Batch:
        """Select rows in this order, possibly repeated; padding stays the same."""
        host, device = rows.cpu(), to_device(rows, self.ids.device)
        return self._rows(lambda tensor: tensor[host if tensor.device.type == "cpu" else device])

    def after(self, source: Batch) -> Batch:
        """Return the tokens of a decoder, whose positions continue those of its encoder."""
        lengths = self.lengths + source.lengths
        moved = replace(self, starts=self.starts - source.lengths, lengths=lengths)
        return moved.with_inputs(self.extra, encoder=source)

    def part(self, rows: slice) -> Batch:
        """Select consecutive rows without copying."""
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
            numbers=(
                None if self.numbers is None else of(self.numbers.movedim(-2, 0)).movedim(0, -2)
            ),
            inserted=self.inserted,
            tiles=self.tiles,
            pools=self.pools,
        )

    def of_site(self, site: str, stack: str) -> Batch:
        """Return the tokens that a site of a stack has vectors for."""
        if stack == "cross":
            return self.of_stack("encoder") if site in ("k", "v") else self
        if stack == "vision" and stack not in self.frames:  # patches are tokens of the prompt
            return self
        return self.of_stack(stack) if stack else self

    def of_read(self, read: SiteRead) -> Batch:
        """Return the tokens that a read has vectors for."""
        return self.of_site(read.site, read.stack)

    def keys_of(self, stack: str) -> Batch:
        """Return the tokens that attention of a stack attends to."""
        return self.of_site("k", stack)

    def of_stack(self, stack: str) -> Batch:
        """Return the tokens of a stack other than the main one. Raises ValueError if unknown."""
        if stack not in self.frames:
            raise ValueError(f"the batch has no tokens of the stack `{stack}`")
        return self.frames[stack]

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return [K] columns in the padded tensors for `positions` of `rows`; all on the host.

        Raises:
            ValueError: A decoder has no vector of the position, which is the encoder's.
        """
        if self.tiles is not None:
            tokens, columns = self.tiles
            return positions // tokens * columns + positions % tokens
        place = self.starts[rows] + positions
        if "encoder" in self.frames and bool((place < 0).any()):
            raise ValueError("a position of the encoder's text is not one of the decoder")
        return place

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return row and position of all tokens, row by row, on the host."""
        first = self.frames["encoder"].lengths if "encoder" in self.frames else 0
        counts = self.lengths - first
        rows = torch.arange(len(self)).repeat_interleave(counts)
        before = counts.cumsum(0) - self.lengths
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
        """Number of columns; in a decoder after an encoder, those of the encoder are added."""
        return int(self.ids.shape[1]) - int(self.starts.clamp(max=0).amin())

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """Return [row] long: number of tokens that a site has vectors for."""
        return self.of_site(site, stack).lengths

    def first_positions(self, site: str, stack: str) -> Tensor:
        """Return [row] long: first position that a site has a vector for; in a decoder, the one
        after the encoder's tokens."""
        batch = self.of_site(site, stack)
        encoded = batch.frames.get("encoder")
        return torch.zeros_like(batch.lengths) if encoded is None else encoded.lengths

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return row and column of each position, and that all of them are present."""
        columns = self.of_site(site, stack).columns(rows, positions)
        return rows, columns, torch.ones_like(rows, dtype=torch.bool)

    def position_ids(self) -> Tensor:
        """Return the given position ids, or [B, T] counted from 0 at the first real token."""
        if self.numbers is not None:
            return self.numbers
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    def numbered(self, rows: Tensor, positions: Tensor, numbers: Tensor) -> Batch:
        """Replace the position ids of K tokens, of an encoder or of its decoder; all arguments are
        [K] long."""
        source = self.frames.get("encoder")
        encoded = torch.zeros_like(rows) if source is None else source.lengths[rows]
        within = positions < encoded
        if source is not None and bool(within.any()):
            tensors = rows[within], positions[within], numbers[within]
            moved = replace(self, frames={**self.frames, "encoder": source.numbered(*tensors)})
            return moved.numbered(rows[~within], positions[~within], numbers[~within])
        ids = self.position_ids().clone()
        index = rows, self.columns(rows, positions), numbers
        rows, columns, numbers = indices_to_device(index, ids.device)
        ids[..., rows, columns] = numbers
        return replace(self, numbers=ids)


def gather_vectors(
    read: Tensor, batch: Batch, rows: Tensor, positions: Tensor, units: Tensor
) -> Tensor:
    """Return [K, width]: vectors of a read at K places.

    Args:
        read: [B, T, units, width].
        rows: [K] long.
        positions: [K] long, in the unpadded prompt.
        units: [K] long.
    """
    index = rows, batch.columns(rows, positions), units
    return read[indices_to_device(index, read.device)]


def split_stack(place: SiteRead | SiteWrite) -> None:
    """Split the name of a site of another stack, `z cross`, into the site and the stack."""
    site, _, stack = place.site.partition(" ")
    if stack:
        object.__setattr__(place, "site", site)
        object.__setattr__(place, "stack", stack)


@dataclass(frozen=True, eq=False)
class EditWrite:
    """Addition of what an edit of low rank computes from the current vectors."""

    matrix: Tensor
    """[2 rank + 1, width] as in `mechdsl.fits.vectors.LowRankEdit`."""

    def apply(self, now: Tensor, factors: Tensor) -> Tensor:
        """Return [K, width]: x + f Δ(x) for vectors x of `now` and their factors f [K, 1]."""
        wide = now.to(torch.promote_types(now.dtype, torch.float32))
        change = low_rank_change(wide, self.matrix.to(wide))
        return (wide + factors.to(wide) * change).to(now)


WriteMode = Literal["set", "add", "scale", "along", "onto", "step"] | CoordinateWrite | EditWrite
"""How written values combine with existing ones: `set` replaces, `add` adds and `scale` multiplies;
`along` sets the component along directions of length 1, `onto` keeps only it; `step` adds a
multiple of the difference to the preceding position; `CoordinateWrite` changes coordinates in a
basis; `EditWrite` adds a multiple of what an edit computes."""


class WriteMismatch(RuntimeError):
    """A write didn't happen, or happened more than once; the run's numbers are invalid."""


class ReadMismatch(RuntimeError):
    """A requested site wasn't reached, or was reached more than once."""


@dataclass(frozen=True, eq=False)
class SiteWrite:
    """K vectors written at one site of one layer.

    Writes at one site act in the given order, each on the result of the preceding ones.
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
    """[K, width], cast to the activation's dtype and device; for `step` and edits [K, 1]
    factors, for `scale` also [K, 1]; for coordinates [K, m] or [K, 1]."""
    mode: WriteMode = "set"
    to: Tensor | None = None
    """[K] for `along`: the resulting component along `values`; [K, m] long for coordinates: which
    ones, None for all."""
    stack: str = ""
    """Name of the stack; the main one's is empty."""
    rule: int = -1
    """Number of the writing rule, in the order of the file; the last one for vectors of several
    rules in one write. -1 is before all rules."""
    holds: bool = False
    """Whether it is the first write of its site and replaces all vectors of the pass, so that no
    gradient passes what the model computed."""
    alike: Tensor | None = None
    """[row of the batch] long, the first row that gets the same vectors in the same images, for a
    site of a vision encoder; the others share its pass. None: each row has a separate pass."""

    def __post_init__(self) -> None:
        split_stack(self)

    @property
    def where(self) -> SiteRead:
        """The written site."""
        return SiteRead(self.site, self.layer, self.stack)

    def moved(self, rows: Tensor) -> SiteWrite:
        """Renumber rows: row i becomes row `rows[i]`."""
        return replace(self, rows=rows[self.rows], alike=None)

    def some(self, there: Tensor, rows: Tensor | None = None) -> SiteWrite:
        """Select some of the vectors, by [K] bool; rows: as in `moved`."""
        index = there.nonzero()[:, 0]
        if len(index) == len(there):
            return self if rows is None else self.moved(rows)
        row = self.rows[index]
        return replace(
            self,
            rows=row if rows is None else rows[row],
            positions=self.positions[index],
            units=self.units[index],
            values=self.values[to_device(index, self.values.device)],
            to=None if self.to is None else self.to[to_device(index, self.to.device)],
            alike=None,
        )


def apply_write(
    mode: WriteMode,
    now: Tensor,
    values: Tensor,
    to: Tensor | None = None,
    before: Tensor | None = None,
    inputs: Tensor | None = None,
    earlier: Sequence[EarlierChange] = (),
) -> Tensor:
    """Return [K, width]: the new values, in the precision of `now`.

    Args:
        mode: How values combine.
        now: [K, width] current values.
        values: As in `SiteWrite`, on the device of `now`.
        to: As in `SiteWrite`, on the device of `now`.
        before: [K, width] for `step`, the values one position before; the current values at a
            prompt's first position.
        inputs: [K, …] for coordinates of another site, its current values.
        earlier: As in `CoordinateWrite.apply`.
    """
    match mode:
        case CoordinateWrite():
            return mode.apply(now, values, to, inputs, earlier)
        case EditWrite():
            return mode.apply(now, values)
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
        case "onto":
            wide = now.to(torch.promote_types(now.dtype, torch.float32))
            along = values.to(wide)
            return ((wide * along).sum(-1, keepdim=True) * along).to(now)
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
    """Whether to read the value before any write."""
    pooled: bool = False
    """Whether weights between patches are read between tokens of images: see `Batch.pools`."""
    entropy: bool = False
    """Whether the entropy of each pattern, [unit, 1], is read in place of its weights,
    whose number grows with the square of the number of tokens."""

    def __post_init__(self) -> None:
        split_stack(self)

    @property
    def quoted(self) -> str:
        """Name for messages, as `resid_pre layer 3`."""
        words = [self.site]
        if self.stack:
            words.append(self.stack)
        if self.layer is not None:
            words.append(f"layer {self.layer}")
        return f"`{' '.join(words)}`"


class TokenFrame(Protocol):
    """Location of a pass's tokens in the model's tensors."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    @property
    def leading(self) -> int:
        """Size of the first dimension of the model's tensors."""
        ...

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """Return [row] long: number of tokens that a site has vectors for."""
        ...

    @property
    def lane_starts(self) -> Tensor:
        """[lane] long, column of the first token of each prompt that contains keys."""
        ...

    @property
    def key_width(self) -> int:
        """Number of columns of these prompts."""
        ...

    def keys_of(self, stack: str) -> TokenFrame:
        """Return the tokens that attention of a stack attends to."""
        ...

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the columns of positions in the padded prompts."""
        ...

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the indices of positions in a site's tapped tensor.

        Returns:
            Indices into its first two dimensions, and whether each position is present; no measure
            depends on the others.
        """
        ...


@dataclass(frozen=True, eq=False)
class EdgeWrite:
    """K queries of one layer whose weights on some keys are changed.

    - allow: makes keys visible that the model hides.
    - block: sets weights to 0; the other keys (and a sink) share the rest.
    - reweight: multiplies weights by `amounts`, and renormalizes.
    - uniform: distributes the keys' total weight evenly among them.
    - weight: sets each weight to `amounts`; others share the rest in their old proportions.

    Except for `allow`, keys that a query doesn't see are not changed.
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
    """[E] long, which of the K queries each key belongs to …"""
    keys: Tensor
    """… and [E] long, the key's position in the unpadded prompt."""
    amounts: Tensor
    """[K]"""
    stack: str = ""
    """Name of the stack; the main one's is empty."""

    def moved(self, rows: Tensor) -> EdgeWrite:
        """Renumber rows: row i becomes row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> EdgeWrite:
        """Select some of the queries, by [K] bool."""
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
    """Signal that everything requested has been computed."""


BlockPlace = tuple[str, int]
"""Stack (empty for the main one) and layer of a block."""

BlockPairs = Sequence[tuple[BlockPlace, int | None]]
"""Blocks, and the layers of their replacements in the same stack; None: the block passes its input
on."""


@dataclass(frozen=True, eq=False)
class PositionIdWrite:
    """K tokens with changed position ids."""

    rows: Tensor
    """[K] long, row of the pass."""
    positions: Tensor
    """[K] long, position in the unpadded prompt."""
    numbers: Tensor
    """[K] long, the new ids."""

    def moved(self, rows: Tensor) -> PositionIdWrite:
        """Renumber rows: row i becomes row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> PositionIdWrite:
        """Select some of the tokens, by [K] bool."""
        return PositionIdWrite(self.rows[there], self.positions[there], self.numbers[there])


@dataclass(frozen=True, eq=False)
class SenderFill:
    """Other values of some senders of edges, at the tokens of a `CircuitWrite`."""

    where: SiteRead
    units: tuple[int, ...]
    """Heads or neurons; 0 for whole vectors; of an output in `CircuitWrite.features`, features or
    `OTHERS`."""
    values: Tensor
    """[K, unit, width], of features what they add to the stream; those of `others` follow those of
    `units`."""
    others: tuple[int, ...] = ()
    """Neurons that are one more sender together, after the units."""

    @property
    def count(self) -> int:
        """The number of senders."""
        return len(self.units) + bool(self.others)

    def take(self, index: Tensor) -> SenderFill:
        """Return the values at the tokens of some numbers."""
        return replace(self, values=self.values[to_device(index, self.values.device)])


def number_senders(fills: Sequence[SenderFill]) -> dict[SiteRead, slice]:
    """Return the columns of senders in masks and tables of edges, which are in the order of fills,
    unit by unit."""
    ends = accumulate((fill.count for fill in fills), initial=0)
    return {fill.where: slice(*own) for fill, own in zip(fills, pairwise(ends), strict=True)}


def stream_of(fills: Sequence[SenderFill]) -> str:
    """Return the stack whose stream senders add to: `encoder`, `vision`, or empty for the main
    one."""
    return next((fill.where.stack for fill in fills if fill.where.stack != "cross"), "")


SplitOutputs: TypeAlias = Mapping[tuple[str, int | None], FeatureSplit]
"""Site (`mlp_out` or `attn_out`) and layer of an output → its features that are nodes."""


@dataclass(frozen=True, eq=False)
class CircuitWrite:
    """K tokens at which some edges carry other values of their senders, in one stream.

    Each receiver reads the stream plus the sum of mask * (fill - value) over its senders, where the
    value of a sender is that of the same pass.
    """

    rows: Tensor
    """[K] long, row of the batch."""
    positions: Tensor
    """[K] long, token position in the unpadded prompt."""
    fills: tuple[SenderFill, ...]
    """The senders; their columns of the mask are in this order, unit by unit."""
    receivers: tuple[tuple[SiteRead, int], ...]
    """Sites that read the stream, with their heads or neurons: `q`, `k`, `v`, `mlp_norm`,
    `mlp_hidden` or `logits`. Those of an encoder's output are `k cross` and `v cross`. Nodes of
    `attn_out` read the heads of its layer."""
    mask: Tensor
    """[receiver, sender], 1 for an edge that carries the fill; [K, receiver, sender] if tokens
    differ. A share between 0 and 1 adds this share of fill - value."""
    source: str = ""
    """The run whose values at the same tokens are the fills; empty if they are others."""
    outputs: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    """[K, d_model] outputs of MLPs, by layer, which aren't computed at these tokens."""
    heads: tuple[SenderFill, ...] = ()
    """Heads whose outputs are written, not computed; the tokens are then all of their rows."""
    others: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """The neurons that the receiver `OTHERS` of `mlp_hidden` stands for, by layer."""
    features: SplitOutputs = field(default_factory=dict[tuple[str, int | None], FeatureSplit])
    """The features that are nodes, by output; `OTHERS` is the rest of the output. Heads send only
    to the nodes of the output of their attention, if it has some."""

    @property
    def stack(self) -> str:
        """The stack whose stream its edges are in: empty, `encoder` or `vision`."""
        return stream_of(self.fills)

    def moved(self, rows: Tensor) -> CircuitWrite:
        """Renumber rows: row i becomes row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> CircuitWrite:
        """Select some of the tokens, by [K] bool; only if every node is computed at each token."""
        index = there.nonzero()[:, 0]
        fills = tuple(fill.take(index) for fill in self.fills)
        mask = self.mask
        if mask.dim() == 3:
            mask = mask[to_device(index, mask.device)]
        return replace(
            self,
            rows=self.rows[index],
            positions=self.positions[index],
            fills=fills,
            mask=mask,
        )


@dataclass(frozen=True, eq=False)
class EdgeTap:
    """The input of some receivers in a pass with gradients, as their module sees it."""

    tensor: Tensor
    """The tensor that is differentiated by."""
    receivers: list[int]
    """Their numbers in the `CircuitRead`."""
    to_stream: Callable[[Tensor], Tensor]
    """Gradient by `tensor` → [receiver, K, d_model] gradients by what each receiver reads."""
    senders: slice | None = None
    """The columns of the senders that the receivers read; None for all before them."""
    sublayers: int = 0
    """Number of sublayers before the receivers, if norms follow the sums of the stream."""


@dataclass(eq=False)
class CircuitRead:
    """K tokens at which a pass reads what edges would carry, and the inputs of their receivers.

    The pass itself stays as it is. `changes`, `activations` and `taps` are results; a further pass
    with the same `changes` reads only `taps`.
    """

    rows: Tensor
    """[K] long, row of the batch."""
    positions: Tensor
    """[K] long, token position in the unpadded prompt."""
    fills: tuple[SenderFill, ...]
    """The senders, in forward order."""
    receivers: tuple[tuple[SiteRead, int], ...]
    """As in `CircuitWrite`."""
    places: Tensor | None = None
    """[K] long, numbers of positions whose tokens are summed separately; None for one sum."""
    changes: Tensor | None = None
    """[sender, K, d_model]: what the stream would gain with the fills, or the sum before a norm."""
    activations: dict[SiteRead, Tensor] = field(default_factory=dict[SiteRead, Tensor])
    """[K, unit]: fill - value of neurons that a norm follows, in the order of `SenderFill`."""
    taps: list[EdgeTap] = field(default_factory=list[EdgeTap])
    to_senders: Callable[[Tensor, int], Iterator[tuple[slice, Tensor]]] | None = None
    """If norms follow the sums of the stream: gradients by what receivers read, and the number of
    sublayers before them → columns of senders, gradients by what these senders add."""
    features: SplitOutputs = field(default_factory=dict[tuple[str, int | None], FeatureSplit])
    """As in `CircuitWrite`."""
    parts: list[tuple[Tensor, CircuitRead]] = field(
        default_factory=lambda: list[tuple[Tensor, "CircuitRead"]]()
    )
    """In a vision encoder: the numbers of the tokens of each pass on some images, and its read."""

    @property
    def stack(self) -> str:
        """As in `CircuitWrite`."""
        return stream_of(self.fills)

    def open_part(self, index: Tensor, rows: Tensor, positions: Tensor) -> CircuitRead:
        """Add a part with the tokens of some numbers, whose results are separate.

        Args:
            index: [token] the numbers.
            rows: [token] their rows of another batch.
            positions: [token] their positions there.
        """
        known = self.changes
        part = replace(
            self,
            rows=rows,
            positions=positions,
            fills=tuple(fill.take(index) for fill in self.fills),
            changes=None if known is None else known[:, to_device(index, known.device)],
            activations={},
            taps=[],
            parts=[],
        )
        self.parts.append((index, part))
        return part

    def join_parts(self) -> None:
        """Join the changes of the parts, after the first pass."""
        if self.changes is not None:
            return
        for index, part in self.parts:
            changes = part.changes
            assert changes is not None
            if self.changes is None:
                self.changes = changes.new_zeros(changes.shape[0], len(self.rows), changes.shape[2])
            self.changes[:, to_device(index, changes.device)] = changes


@dataclass(frozen=True, eq=False)
class RuleWrites:
    """Changes that rules make in the rows of a pass, in order."""

    writes: Sequence[SiteWrite] = ()
    edges: Sequence[EdgeWrite] = ()
    numbers: Sequence[PositionIdWrite] = ()
    """Tokens with changed position ids."""
    blocks: BlockPairs = ()
    """Replaced blocks, in all rows."""
    circuits: Sequence[CircuitWrite] = ()
    """Edges that carry other values."""

    def then(self, later: RuleWrites) -> RuleWrites:
        """Append rules that act on the result of these."""
        return RuleWrites(
            [*self.writes, *later.writes],
            [*self.edges, *later.edges],
            [*self.numbers, *later.numbers],
            tuple(sorted({**dict(self.blocks), **dict(later.blocks)}.items())),
            [*self.circuits, *later.circuits],
        )

    def moved(self, rows: Tensor) -> RuleWrites:
        """Renumber rows: row i becomes row `rows[i]`."""
        return RuleWrites(
            [write.moved(rows) for write in self.writes],
            [edge.moved(rows) for edge in self.edges],
            [numbers.moved(rows) for numbers in self.numbers],
            self.blocks,
            [circuit.moved(rows) for circuit in self.circuits],
        )

    def below(self, stop: int | None, n_layers: int) -> RuleWrites:
        """Remove changes above the point where a pass stops."""
        if stop is None:
            return self

        def runs(write: SiteWrite) -> bool:
            site = f"{write.site} {write.stack}" if write.stack else write.site
            needed = stop_layer(site, write.layer, n_layers)
            return needed is not None and needed <= stop

        return replace(
            self,
            writes=[write for write in self.writes if runs(write)],
            edges=[e for e in self.edges if e.layer < stop or e.stack in ("encoder", "vision")],
        )

    def outside(self, stack: str) -> RuleWrites:
        """Remove changes in a stack that doesn't run."""
        return replace(
            self,
            writes=[write for write in self.writes if write.stack != stack],
            edges=[edge for edge in self.edges if edge.stack != stack],
            blocks=[pair for pair in self.blocks if pair[0][0] != stack],
        )

    def inside(self, stack: str) -> RuleWrites:
        """Return only the changes of sites, attention edges and blocks of a stack."""
        return RuleWrites(
            [write for write in self.writes if write.stack == stack],
            [edge for edge in self.edges if edge.stack == stack],
            blocks=[pair for pair in self.blocks if pair[0][0] == stack],
        )

    def numbered(self, batch: Batch) -> Batch:
        """Apply the position ids to a batch."""
        for number in self.numbers:
            batch = batch.numbered(number.rows, number.positions, number.numbers)
        return batch


def get_free_memory(device: torch.device) -> int:
    """Return the number of bytes available without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = next(line.split() for line in lines if line.startswith("MemAvailable"))
        available = int(fields[1]) * 1024
    except (OSError, StopIteration, ValueError):
        available = 4 << 30
    return min(available, _get_container_limit())


def _get_container_limit() -> int:
    """Return the number of bytes left in the container's limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 1 << 62


REPLY_BYTES = 2 << 30
"""Limit for rows that generate text together; on a CPU, larger batches aren't faster."""


def get_reply_bytes(device: torch.device) -> int:
    """Return the limit for rows that generate text together: with CUDA, a quarter of what is free.

    These are bytes of keys, values, written vectors and logits.
    """
    return get_free_memory(device) // 4 if device.type == "cuda" else REPLY_BYTES


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def try_pass(one_pass: Callable[[], T], *, can_shrink: bool) -> T | None:
    """Return what a pass returns; None if memory ran out, unless the pass can't be smaller.

    Args:
        one_pass: Runs the pass; it never returns None.
        can_shrink: Whether the caller can run the same rows in smaller passes.
    """
    try:
        return one_pass()
    except (RuntimeError, MemoryError) as error:
        if not can_shrink or not is_out_of_memory(error):
            raise
    release_memory()  # outside of the handler, whose exception refers to the tensors of the pass
    return None


def release_memory() -> None:
    """Release unused memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
