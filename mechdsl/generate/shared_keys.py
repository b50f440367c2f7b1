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
from mechdsl.hooks.batch import arrays_on_device, on_device


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
    """Heads of rows laid out by their prompts, so that each head of a prompt has a block of its
    own."""

    groups: Sequence[_Group]
    of: Tensor
    """[place] long, row · heads + head."""
    at: Tensor
    """[row · heads + head] long, its place."""

    @classmethod
    def by(cls, prompts: Ints, every: int, heads: int, device: torch.device) -> _Places:
        """prompts: [row] which of `every` ones. Prompts are taken together where that leaves fewer
        places empty than there are rows: all of them, or those with about as many rows."""
        known, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
        order = np.argsort(prompts, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        together = counts.max() * len(counts) < 2 * len(prompts)
        size = np.zeros_like(counts) if together else np.ceil(np.log2(counts))
        rows, begins = np.empty_like(counts), np.empty_like(counts)
        groups, total = list[_Group](), 0
        for each in np.unique(size):
            mine = np.flatnonzero(size == each)
            rows[mine] = most = int(counts[mine].max())
            begins[mine] = total + np.arange(len(mine)) * most * heads
            whole = len(mine) == every and len(known) == every
            index = None if whole else on_device(known[mine], device)
            groups.append(_Group(index, len(mine), most))
            total += len(mine) * most * heads
        head = np.arange(heads)
        at = ((begins[which] + rank)[:, None] + rows[which][:, None] * head).ravel()
        of = np.zeros(total, dtype=np.int64)
        of[at] = np.arange(len(at))
        return cls(groups, *arrays_on_device((of, at), device))


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
        self._places: dict[tuple[int, int, int], _Places] = {}

    def of_rows(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """[n, heads, columns, width] of each of these rows."""
        keys, values = self._of(layer)
        index = on_device(self._prompts[rows], keys.device)
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
        heads, shared = vectors.shape[1:3]
        key = rows.start, rows.stop, heads
        if key not in self._places:
            mine = self._prompts[rows]
            self._places[key] = _Places.by(mine, len(matrices), heads, matrices.device)
        places = self._places[key]
        laid = vectors.flatten(2).flatten(0, 1).index_select(0, places.of)
        found, first = list[Tensor](), 0
        for group in places.groups:
            end = first + group.count * heads * group.rows
            each = laid[first:end].view(group.count, heads, group.rows * shared, -1)
            own = matrices if group.prompts is None else matrices[group.prompts]
            found.append((each @ own).view(end - first, -1))
            first = end
        every = found[0] if len(found) == 1 else torch.cat(found)
        return every.index_select(0, places.at).view(len(vectors), heads, shared, -1)
