# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
"""Keys and values that are kept from pass to pass, in room that grows now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mechdsl.generate.shared_blocks import Lineup, Moves
from mechdsl.generate.shared_keys import SharedKeys
from mechdsl.hooks.batch import arrays_on_device, to_device, together_on_device
from mechdsl.hooks.site_hooks import PassStopped

WIDE = (torch.float32, torch.float64)
"""Types in which attention is two plain products."""
MORE = 16
"""Columns of room that are taken at once, or half of what there are."""


class _Layer(CacheLayerMixin):
    """One layer's: whole also where the model has a window, whose mask it makes itself."""

    is_sliding = False

    def __init__(self, kept: KeptKeys, number: int) -> None:
        super().__init__()
        self.kept = kept
        self.number = number
        self.length = 0
        self.filled = 0
        """Rows that may be read."""
        self.handed: tuple[Tensor, Tensor] | None = None
        """What the model's attention was given in the pass that runs."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._make(key_states[:0, :, :0], value_states[:0, :, :0])
        self.is_initialized = True

    def fit(self, rows: int, first: int, end: int) -> None:
        """Have room for so many rows, and for the columns that there may be now.

        first, end: the columns that the caller writes next, in all rows that are new.
        """
        assert self.keys is not None
        assert self.values is not None
        if self.kept.room[1] > self.keys.shape[2]:
            self._make(self.keys[: self.filled], self.values[: self.filled])
        if rows > self.filled:
            for each in (self.keys, self.values):
                each[self.filled : rows, :, :first] = 0
                each[self.filled : rows, :, end:] = 0
            self.filled = rows

    def _make(self, keys: Tensor, values: Tensor) -> None:
        """Room that begins with these; zeros where it isn't filled yet, as that is read with a
        weight of 0."""
        count, before = len(keys), keys.shape[2]
        rows, columns = self.kept.room
        self.keys, self.values = (
            each.new_empty(rows, each.shape[1], columns, each.shape[3]) for each in (keys, values)
        )
        self.keys[:count, :, :before], self.keys[:count, :, before:] = keys, 0
        self.values[:count, :, :before], self.values[:count, :, before:] = values, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new ones behind those that are there, and give all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first = self.kept.rows_of(self.number), self.kept.first
        end = first + key_states.shape[2]
        self.fit(rows.stop, first, end)
        assert self.keys is not None
        assert self.values is not None
        self.keys[rows, :, first:end] = key_states
        self.values[rows, :, first:end] = value_states
        self.length = self.kept.common + end
        if self.number == self.kept.stop:
            raise PassStopped
        if self.kept.marked and key_states.dtype in WIDE:
            self.handed = self._marked(key_states), self._marked(value_states)
        else:
            self.handed = self.every()
        return self.handed

    def every(self) -> tuple[Tensor, Tensor]:
        """[n, heads, T, width] of the rows of the pass: views, where nothing is shared."""
        assert self.keys is not None
        assert self.values is not None
        end = self.length - self.kept.common
        rows = self.kept.rows_of(self.number)
        own = self.keys[rows, :, :end], self.values[rows, :, :end]
        if self.kept.shared is None:
            return own
        before = self.kept.shared.of_rows(self.number, rows)
        return torch.cat([before[0], own[0]], dim=2), torch.cat([before[1], own[1]], dim=2)

    def _marked(self, like: Tensor) -> Tensor:
        """Stands for all of them, and spoils whatever is made of it."""
        size = like.shape[0], like.shape[1], self.length, like.shape[3]
        return like.new_full((1, 1, 1, 1), torch.nan).expand(size)

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
        self.shared: SharedKeys | None = None
        """Columns in front, which rows of a prompt have in common; none of their own."""
        self.rows = slice(0, rows)
        """Of the pass that runs."""
        self._lineup: Lineup | None = None
        """Which of these each of its blocks attends with; None: all."""
        self.first = 0
        """Column of its first token, without those that are shared."""
        self.stop: int | None = None
        """The layer whose keys and values end the pass that runs."""
        self.asked = False
        """Whether attention in the pass that runs knows to ask for what is kept."""
        super().__init__(layers=[_Layer(self, n) for n in range(layers)])

    @property
    def common(self) -> int:
        """Columns that are shared."""
        return 0 if self.shared is None else self.shared.columns

    @property
    def marked(self) -> bool:
        """Whether attention in the pass that runs is given nothing, but asks for what is kept."""
        return self.asked and self.shared is not None

    def share(self, other: KeptKeys, columns: int, rows: Sequence[int]) -> None:
        """Rows start with the first columns of these rows of another one."""
        layers = [
            (layer.keys, layer.values) if layer.is_initialized else None for layer in other.layers
        ]
        self.shared = SharedKeys(columns, layers, rows)

    def at(
        self,
        rows: slice,
        first: int,
        count: int,
        lineup: Lineup | None = None,
        stop: int | None = None,
    ) -> KeptKeys:
        """For a pass over some rows, on so many columns from one on.

        lineup: which of the rows blocks compute. stop: the layer whose keys and values end the
        pass, by PassStopped; None: none does.
        """
        self.rows, self.first, self._lineup = rows, first - self.common, lineup
        self.stop = stop
        every, columns = self.room
        if self.first + count > columns:
            self.room = every, min(self._most, columns + max(MORE, columns // 2))
        for layer in self.layers:
            layer.length, layer.handed = first, None
        return self

    def rows_of(self, layer: int) -> slice:
        """Of the pass that runs, in one layer."""
        if self._lineup is None:
            return self.rows
        return slice(self.rows.start, self.rows.start + self._lineup.attending(layer))

    def handed(self, layer: int, keys: Tensor, values: Tensor) -> bool:
        """Whether a block's attention is called with what is kept of it, as it was given."""
        mine = self.layers[layer].handed if 0 <= layer < len(self.layers) else None
        if mine is None:
            return False
        return all(
            (own.data_ptr(), own.shape, own.stride(), own.dtype)
            == (given.data_ptr(), given.shape, given.stride(), given.dtype)
            for own, given in zip(mine, (keys, values), strict=True)
        )

    def every(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, T, width] of the rows of the pass that runs."""
        return self.layers[layer].every()

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same without those that are shared, and with the room behind them: what lies side by
        side is read several times as fast."""
        mine, rows = self.layers[layer], self.rows_of(layer)
        return mine.keys[rows], mine.values[rows]

    def newest(self, layer: int, count: int) -> Tensor:
        """[n, heads, count, width] view of the keys of the pass that runs."""
        return self.layers[layer].keys[self.rows_of(layer), :, self.first : self.first + count]

    def move(self, moves: Sequence[Moves], columns: int) -> None:
        """Copy rows to other places, in each layer its own; what is copied is what stands there
        before."""
        columns -= self.common
        due = [
            (layer, rows)
            for layer, rows in zip(self.layers, moves, strict=True)
            if layer.is_initialized and len(rows[0])
        ]
        if not due:
            return
        device = due[0][0].keys.device
        index = iter(arrays_on_device([each for _, rows in due for each in rows], device))
        for layer, (_, to) in due:
            layer.fit(1 + int(to.max()), 0, columns)
            source, target = next(index), next(index)
            for each in (layer.keys, layer.values):
                each[target, :, :columns] = each[source, :, :columns]

    def fill(self, other: KeptKeys, rows: Tensor, columns: int) -> None:
        """Take these rows ([n] long) of another one's first columns, those that aren't shared, as
        the first n rows here."""
        first, columns = self.common, columns - self.common
        if columns == 0:
            return
        index: Tensor | None = None
        for mine, its in zip(self.layers, other.layers, strict=True):
            if not its.is_initialized:
                continue
            if index is None:
                index = to_device(rows, its.keys.device)
            if not mine.is_initialized:
                mine.lazy_initialization(its.keys, its.values)
            mine.fit(len(rows), 0, columns)
            for own, given in ((mine.keys, its.keys), (mine.values, its.values)):
                more = given[:, :, first : first + columns]
                own[: len(rows), :, :columns] = more[index]

    def put(
        self, other: KeptKeys, which: str, layer: int, rows: Tensor, of: Tensor, columns: Tensor
    ) -> None:
        """Take single vectors of all heads, "keys" or "values" of one layer: here in `rows`, there
        in `of`, in these columns; all [K] long."""
        mine, its = (getattr(each.layers[layer], which) for each in (self, other))
        place, here, there = together_on_device((columns, rows, of), mine.device)
        mine[here, :, place - self.common] = its[there, :, place]
