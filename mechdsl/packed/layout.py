"""Tokens of many rows side by side, without padding: which lie where in each block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.hooks.batch import Index, arrays_on_device
from mechdsl.hooks.inside_attention import AttentionGroup
from mechdsl.packed.activation_cache import ActivationCache
from mechdsl.plan.restart import BlockWork, Mask


@dataclass(frozen=True, eq=False)
class ComputedTokens:
    """Tokens of a block that something is computed for; the others keep the unpatched value."""

    computed: Tensor
    """[n] long, tokens of the block."""
    taken: Tensor
    """[m] long, the other tokens."""
    taken_from: Tensor
    """[m] long, where their values lie in what was kept."""
    lookup: Ints
    """[row, column] → index into `computed`, -1 where it isn't."""


@dataclass(frozen=True, eq=False)
class BlockPack:
    """The tokens of one block, in order."""

    lookup: Ints
    """[row, column] → token, -1 where it isn't there."""
    kept_index: Ints
    """[token], where it lies in what was kept."""
    groups: tuple[AttentionGroup, ...]
    project: ComputedTokens | None
    """None where all tokens are computed."""
    attend: ComputedTokens | None
    output: ComputedTokens | None
    mlp: ComputedTokens | None

    def __len__(self) -> int:
        return len(self.kept_index)


@dataclass(frozen=True, eq=False)
class BlockInput:
    """Where the tokens that enter a block come from."""

    carried: Tensor
    """[n] long, tokens of this block …"""
    carried_from: Tensor
    """… and of the one below."""
    fresh: Tensor
    """[m] long, tokens of this block whose input is the unpatched run's …"""
    fresh_from: Tensor
    """… at this place of what was kept."""


def pack_block(
    work: BlockWork, lanes: Ints, kept: ActivationCache, device: torch.device
) -> BlockPack:
    """Lay the tokens of a block out.

    Rows whose tokens lie in the same columns are put together, and by their lane, so that attention
    needs one call for many of them.
    """
    rows = np.flatnonzero(work.present.any(axis=1))
    pattern = np.packbits(np.hstack([work.present[rows], work.attend[rows]]), axis=1)
    _, which = np.unique(pattern, axis=0, return_inverse=True)
    on_lane = which.reshape(-1) * (int(lanes.max()) + 1) + lanes[rows]
    _, slot, counts = np.unique(on_lane, return_inverse=True, return_counts=True)
    count = counts[slot.reshape(-1)]
    order = np.lexsort((rows, lanes[rows], count, which.reshape(-1)))
    rows, which, count = rows[order], which.reshape(-1)[order], count[order]
    present = work.present[rows]
    row, column = np.nonzero(present)
    token_rows = rows[row]
    lookup = np.full(work.present.shape, -1, dtype=np.int64)
    lookup[token_rows, column] = np.arange(len(column))
    kept_index = lanes[token_rows] * kept.columns + column

    lengths = kept.batch.lengths.numpy()
    edges = np.flatnonzero((np.diff(which) != 0) | (np.diff(count) != 0)) + 1
    groups: list[AttentionGroup] = []
    start = 0
    for begin, end in zip([0, *edges], [*edges, len(rows)], strict=True):
        columns = np.flatnonzero(present[begin])
        own_lanes = lanes[rows[begin : end : count[begin]]]
        asking = work.attend[rows[begin]][columns]
        indices = own_lanes, columns, np.flatnonzero(asking)
        of_lanes, of_columns, queries = Index.together(indices, device)
        group = AttentionGroup(
            start=start,
            lanes=of_lanes,
            rows=int(count[begin]),
            columns=of_columns,
            queries=queries,
            every=bool((lengths[own_lanes] == len(columns)).all()),
        )
        start += group.size
        groups.append(group)

    def part(mask: Mask) -> ComputedTokens | None:
        chosen = mask[token_rows, column]
        if chosen.all():
            return None
        inside = np.full(lookup.shape, -1, dtype=np.int64)
        inside[token_rows[chosen], column[chosen]] = np.arange(int(chosen.sum()))
        taken = np.flatnonzero(~chosen)
        indices = np.flatnonzero(chosen), taken, kept_index[taken]
        computed, others, source = arrays_on_device(indices, device)
        return ComputedTokens(computed=computed, taken=others, taken_from=source, lookup=inside)

    return BlockPack(
        lookup=lookup,
        kept_index=kept_index,
        groups=tuple(groups),
        project=part(work.project),
        attend=part(work.attend),
        output=part(work.output),
        mlp=part(work.mlp),
    )


def entry(
    below: Ints, pack: BlockPack, carried: Mask, device: torch.device, width: int
) -> BlockInput | None:
    """How the tokens of a block are put together; None where they are those of the one below.

    below: [row, column] → token of the block below. width: tokens of it.
    """
    row, column = np.nonzero(pack.lookup >= 0)
    token = pack.lookup[row, column]
    from_below = np.where(carried[row, column], below[row, column], -1)
    source = np.empty(len(token), dtype=np.int64)
    source[token] = from_below
    if len(source) == width and bool((source == np.arange(width)).all()):
        return None
    stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
    indices = stays, source[stays], fresh, pack.kept_index[fresh]
    return BlockInput(*arrays_on_device(indices, device))


def same_work(a: BlockWork, b: BlockWork) -> bool:
    """Whether two blocks have the same tokens and compute the same of them."""
    pairs = (
        (a.present, b.present),
        (a.attend, b.attend),
        (a.project, b.project),
        (a.output, b.output),
        (a.mlp, b.mlp),
    )
    return all(np.array_equal(one, other) for one, other in pairs)


def universe(packs: Sequence[BlockPack | None], outside: Mask) -> tuple[Ints, int]:
    """[row, column] → number of every token that is somewhere in the pass, and how many there are.

    Numbered as in the topmost block, so that there nothing has to be put in order. outside: tokens
    that are read in front of the blocks or behind them.
    """
    found = np.full(outside.shape, -1, dtype=np.int64)
    count = 0
    for pack in reversed(packs):
        if pack is None:
            continue
        new = (pack.lookup >= 0) & (found < 0)
        row, column = np.nonzero(new)
        order = np.argsort(pack.lookup[row, column], kind="stable")
        found[row[order], column[order]] = count + np.arange(len(order))
        count += len(order)
    row, column = np.nonzero(outside & (found < 0))
    found[row, column] = count + np.arange(len(row))
    return found, count + len(row)


def masks_of(
    places: Iterable[tuple[tuple[str, int | None], Ints, Ints]], shape: tuple[int, int]
) -> dict[tuple[str, int | None], Mask]:
    """(site, layer) → [row, column], true at the rows and columns that are given for it."""
    found: dict[tuple[str, int | None], Mask] = {}
    for where, rows, columns in places:
        mask = found.setdefault(where, np.zeros(shape, dtype=np.bool_))
        mask[rows, columns] = True
    return found
