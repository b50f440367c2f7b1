# pyright: reportUnknownMemberType=false
"""Keys and values that rows of one prompt have in common: each prompt's are kept once, and one
product serves all of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints


@dataclass(frozen=True, eq=False)
class _Group:
    """Prompts with about as many rows each."""

    prompts: Tensor | None
    """[prompt] long; None for all, in their order."""
    count: int
    """Prompts."""
    rows: int
    """Places for rows of each."""


@dataclass(frozen=True, eq=False)
class _Places:
    """Rows laid out by their prompts, so that each has a block of its own."""

    groups: Sequence[_Group]
    of: Tensor | None
    """[place] long, which row; None where places are rows."""
    at: Tensor
    """[row] long, its place."""

    @classmethod
    def by(cls, prompts: Ints, every: int, device: torch.device) -> _Places:
        """prompts: [row] which of `every` ones. Prompts are taken together where they have equally
        many rows, or would with less than as many places besides."""
        known, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
        order = np.argsort(prompts, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        size = np.zeros_like(counts) if len(set(counts)) == 1 else np.ceil(np.log2(counts))
        at, groups, total = np.empty_like(order), list[_Group](), 0
        for each in np.unique(size):
            mine = np.flatnonzero(size == each)
            rows = int(counts[mine].max())
            number = np.full(len(known), -1)
            number[mine] = np.arange(len(mine))
            there = number[which] >= 0
            at[there] = total + number[which[there]] * rows + rank[there]
            whole = len(mine) == every and len(known) == every
            index = None if whole else torch.from_numpy(known[mine]).to(device)
            groups.append(_Group(index, len(mine), rows))
            total += len(mine) * rows
        of = np.zeros(total, dtype=np.int64)
        of[at] = np.arange(len(at))
        plain = total == len(at) and bool((at == np.arange(total)).all())
        return cls(
            groups,
            None if plain else torch.from_numpy(of).to(device),
            torch.from_numpy(at).to(device),
        )


class SharedKeys:
    """Of the first columns of some prompts."""

    def __init__(
        self, columns: int, layers: Sequence[tuple[Tensor, Tensor] | None], prompts: Sequence[int]
    ) -> None:
        """layers: keys and values [prompt, heads, columns or more, width] of each layer; None where
        there are none. prompts: [row] which one it starts with."""
        self.columns = columns
        self.layers = [
            None if layer is None else tuple(each[:, :, :columns].contiguous() for each in layer)
            for layer in layers
        ]
        self.stand(prompts)

    def stand(self, prompts: Sequence[int] | Ints) -> None:
        """From now on, these are the prompts of rows."""
        self._prompts = np.array(prompts, dtype=np.int64)
        self._places: dict[tuple[int, int], _Places] = {}

    def of_rows(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """[n, heads, columns, width] of each of these rows."""
        keys, values = self._of(layer)
        index = torch.from_numpy(self._prompts[rows]).to(keys.device)
        return keys[index], values[index]

    def scores(self, layer: int, rows: slice, queries: Tensor) -> Tensor:
        """[n, key-value heads, head of it, columns] of queries [n, key-value heads, head of it,
        width]."""
        return self._times(rows, queries, self._of(layer)[0].transpose(-1, -2))

    def values(self, layer: int, rows: slice, weights: Tensor) -> Tensor:
        """[n, key-value heads, head of it, width] of weights of the shape of scores."""
        return self._times(rows, weights, self._of(layer)[1])

    def _of(self, layer: int) -> tuple[Tensor, Tensor]:
        found = self.layers[layer]
        assert found is not None
        return found[0], found[1]

    def _times(self, rows: slice, vectors: Tensor, matrices: Tensor) -> Tensor:
        """Vectors [n, heads, k, a] times their prompt's matrix [prompt, heads, a, b]."""
        key = rows.start, rows.stop
        if key not in self._places:
            mine = self._prompts[rows]
            self._places[key] = _Places.by(mine, len(matrices), matrices.device)
        places = self._places[key]
        if places.of is not None:
            vectors = vectors.index_select(0, places.of)
        found, first = list[Tensor](), 0
        for group in places.groups:
            end = first + group.count * group.rows
            shape = group.count, group.rows, *vectors.shape[1:3]
            each = vectors[first:end].view(*shape, -1).transpose(1, 2)
            own = matrices if group.prompts is None else matrices[group.prompts]
            product = each.flatten(2, 3) @ own
            product = product.unflatten(2, shape[1:4:2]).transpose(1, 2)
            found.append(product.flatten(0, 1))
            first = end
        every = found[0] if len(found) == 1 else torch.cat(found)
        return every if places.of is None else every.index_select(0, places.at)
