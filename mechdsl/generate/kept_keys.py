# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
"""Keys and values that are kept from pass to pass, in room that grows now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

MORE = 32
"""Columns of room that are taken at once, or half of what there are."""


class _Layer(CacheLayerMixin):
    """One layer's: whole also where the model has a window, whose mask it makes itself."""

    is_sliding = False

    def __init__(self, kept: KeptKeys) -> None:
        super().__init__()
        self.kept = kept
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, like: Tensor) -> Tensor:
        """Zeros, as what isn't filled yet is read with a weight of 0."""
        rows, columns = self.kept.room
        return like.new_zeros(rows, like.shape[1], columns, like.shape[3])

    def _widen(self) -> None:
        """To the room that there is now."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new ones behind those that are there, and give all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.keys.shape[2] < self.kept.room[1]:
            self._widen()
        rows, first = self.kept.rows, self.kept.first
        end = first + key_states.shape[2]
        self.keys[rows, :, first:end] = key_states
        self.values[rows, :, first:end] = value_states
        self.length = end
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as older libraries call it


class KeptKeys(Cache):
    """Keys and values of some rows, left-padded to the same column."""

    layers: Any  # of `_Layer`; the library's type holds layers without keys

    def __init__(self, layers: int, rows: int, columns: int, later: int = 0) -> None:
        """layers: of the model. rows, columns: room for so many. later: columns that may be needed
        besides."""
        self.room = rows, columns + min(later, MORE)
        self._most = columns + later
        self.rows = slice(0, rows)
        """Of the pass that runs."""
        self.first = 0
        """Column of its first token."""
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def at(self, rows: slice, first: int, count: int) -> KeptKeys:
        """For a pass over some rows, on so many columns from one on."""
        self.rows, self.first = rows, first
        every, columns = self.room
        if first + count > columns:
            self.room = every, min(self._most, columns + max(MORE, columns // 2))
        for layer in self.layers:
            layer.length = first
        return self

    def _filled(self) -> Sequence[Any]:
        return [layer for layer in self.layers if layer.is_initialized]

    def heads(self, layer: int) -> int:
        """That keys of a layer have, in a pass."""
        return int(self.layers[layer].keys.shape[1])

    def whole(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """[n, heads, room, width] all room of the rows of the pass that runs, of which a block's
        attention was given what is filled; None where it was given something else.

        What lies side by side is read several times as fast.
        """
        mine = self.layers[layer] if 0 <= layer < len(self.layers) else None
        if mine is None or not mine.is_initialized:
            return None
        found = mine.keys[self.rows], mine.values[self.rows]
        for own, given in zip(found, (keys, values), strict=True):
            there = own[:, :, : given.shape[2]]
            if (there.data_ptr(), there.shape, there.stride(), there.dtype) != (
                given.data_ptr(),
                given.shape,
                given.stride(),
                given.dtype,
            ):
                return None
        return found

    def move(self, moves: Sequence[tuple[int, int]], columns: int) -> None:
        """Copy rows to other places, none of which is copied itself."""
        if not moves:
            return
        of, to = torch.tensor(moves).t()
        for layer in self._filled():
            for each in (layer.keys, layer.values):
                there = to.to(each.device), of.to(each.device)
                each[there[0], :, :columns] = each[there[1], :, :columns]

    def fill(self, other: KeptKeys, rows: Tensor, columns: int) -> None:
        """Take these rows ([n] long) of another one's first columns, as the first n rows here."""
        for mine, its in zip(self.layers, other.layers, strict=True):
            if not its.is_initialized:
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(its.keys, its.values)
            for own, given in ((mine.keys, its.keys), (mine.values, its.values)):
                own[: len(rows), :, :columns] = given[rows.to(given.device), :, :columns]

    def put(
        self, other: KeptKeys, which: str, layer: int, rows: Tensor, of: Tensor, columns: Tensor
    ) -> None:
        """Take single vectors of all heads, "keys" or "values" of one layer: here in `rows`, there
        in `of`, in these columns; all [K] long."""
        mine, its = (getattr(each.layers[layer], which) for each in (self, other))
        place = columns.to(mine.device)
        mine[rows.to(mine.device), :, place] = its[of.to(mine.device), :, place]
