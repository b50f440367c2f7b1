"""Keys and values stored from pass to pass, shared between rows of one prompt.

Blocks and attention can run on the first rows of a pass, whose results are copied to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from mechdsl.base.arrays import Ints
from mechdsl.forward.generation.rules import RowLineup, RowMoves
from mechdsl.forward.hooks.attention import (
    AttentionCall,
    AttentionMethod,
    CannotPack,
    apply_mask,
    list_implementations,
)
from mechdsl.forward.hooks.batch import (
    PassStopped,
    array_to_device,
    arrays_to_device,
    indices_to_device,
)
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import (
    get_activation,
    replace_activation,
    replace_forward,
)
from mechdsl.models.shape import BlockAnatomy


@dataclass(frozen=True, eq=False)
class _PromptGroup:
    """Prompts with similar numbers of rows."""

    prompts: Tensor | None
    """[prompt] long; None for all prompts in order."""
    count: int
    """Number of prompts."""
    rows: int
    """Number of slots for rows of each prompt."""


@dataclass(frozen=True, eq=False)
class _PromptLayout:
    """Layout of rows' heads by prompt, so that each head of a prompt has a separate block."""

    groups: Sequence[_PromptGroup]
    of: Tensor
    """[slot] long, row · heads + head."""
    at: Tensor
    """[row · heads + head] long, its slot."""

    @classmethod
    def by(cls, prompts: Ints, every: int, heads: int, device: torch.device) -> _PromptLayout:
        """Build the layout for [row] prompts, out of `every` ones.

        Prompts form one group if that leaves fewer empty slots than there are rows; otherwise,
        prompts with similar numbers of rows form groups.
        """
        known, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
        order = np.argsort(prompts, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        together = counts.max() * len(counts) < 2 * len(prompts)
        size = np.zeros_like(counts) if together else np.ceil(np.log2(counts))
        rows, begins = np.empty_like(counts), np.empty_like(counts)
        groups, total = list[_PromptGroup](), 0
        for each in np.unique(size):
            mine = np.flatnonzero(size == each)
            rows[mine] = most = int(counts[mine].max())
            begins[mine] = total + np.arange(len(mine)) * most * heads
            whole = len(mine) == every and len(known) == every
            index = None if whole else array_to_device(known[mine], device)
            groups.append(_PromptGroup(index, len(mine), most))
            total += len(mine) * most * heads
        head = np.arange(heads)
        at = ((begins[which] + rank)[:, None] + rows[which][:, None] * head).ravel()
        of = np.zeros(total, dtype=np.int64)
        of[at] = np.arange(len(at))
        return cls(groups, *arrays_to_device((of, at), device))


class SharedKeyValues:
    """Keys and values of the first columns of some prompts."""

    def __init__(
        self, columns: int, layers: Sequence[tuple[Tensor, Tensor] | None], prompts: Sequence[int]
    ) -> None:
        """Store the columns.

        Args:
            columns: Number of columns.
            layers: Keys and values [prompt, heads, columns or more, width] of each layer; None for
                layers without them.
            prompts: [row] the prompt that it begins with.
        """
        self.columns = columns
        self.layers = [
            None if layer is None else tuple(each[:, :, :columns].contiguous() for each in layer)
            for layer in layers
        ]
        self.stand(prompts)

    def stand(self, prompts: Sequence[int] | Ints) -> None:
        """Set the prompts of rows from now on."""
        self._prompts = np.array(prompts, dtype=np.int64)
        self._places: dict[tuple[int, int, int], _PromptLayout] = {}

    def of_rows(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, heads, columns, width] of these rows."""
        keys, values = self._of(layer)
        index = array_to_device(self._prompts[rows], keys.device)
        return keys[index], values[index]

    def scores(self, layer: int, rows: slice, queries: Tensor) -> Tensor:
        """Return [n, key-value heads, head of that, columns] scores.

        queries: [n, key-value heads, head of that, width].
        """
        return self._times(rows, queries, self._of(layer)[0].transpose(-1, -2))

    def values(self, layer: int, rows: slice, weights: Tensor) -> Tensor:
        """Return [n, key-value heads, head of that, width] for weights of the scores' shape."""
        return self._times(rows, weights, self._of(layer)[1])

    def _of(self, layer: int) -> tuple[Tensor, Tensor]:
        tensors = self.layers[layer]
        assert tensors is not None
        return tensors[0], tensors[1]

    def _times(self, rows: slice, vectors: Tensor, matrices: Tensor) -> Tensor:
        """Multiply vectors [n, heads, k, a] by their prompt's matrix [prompt, heads, a, b]."""
        heads, shared = vectors.shape[1:3]
        key = rows.start, rows.stop, heads
        if key not in self._places:
            mine = self._prompts[rows]
            self._places[key] = _PromptLayout.by(mine, len(matrices), heads, matrices.device)
        places = self._places[key]
        laid = vectors.flatten(2).flatten(0, 1).index_select(0, places.of)
        outputs, first = list[Tensor](), 0
        for group in places.groups:
            end = first + group.count * heads * group.rows
            each = laid[first:end].view(group.count, heads, group.rows * shared, -1)
            tensor = matrices if group.prompts is None else matrices[group.prompts]
            outputs.append((each @ tensor).view(end - first, -1))
            first = end
        every = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return every.index_select(0, places.at).view(len(vectors), heads, shared, -1)


WIDE_DTYPES = (torch.float32, torch.float64)
"""Dtypes in which attention equals two plain matrix products."""

MIN_NEW_COLUMNS = 16
"""Minimum number of columns that are allocated at once; otherwise, half of the existing ones."""


class _CacheLayer(CacheLayerMixin):
    """Cache of one layer; complete even with a sliding window, which the model's mask applies."""

    is_sliding = False

    def __init__(self, kept: KeyValueCache, number: int) -> None:
        super().__init__()
        self.kept = kept
        self.number = number
        self.length = 0
        self.filled = 0
        """Number of rows that may be read."""
        self.handed: tuple[Tensor, Tensor] | None = None
        """Keys and values given to the model's attention in the current pass."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._make(key_states[:0, :, :0], value_states[:0, :, :0])
        self.is_initialized = True

    def fit(self, rows: int, first: int) -> None:
        """Allocate space for these rows and the current maximum of columns.

        Args:
            rows: Number of rows.
            first: First column that the caller writes next, in all new rows.
        """
        assert self.keys is not None
        assert self.values is not None
        if self.kept.room[1] > self.keys.shape[2]:
            self._make(self.keys[: self.filled], self.values[: self.filled])
        if rows > self.filled:
            for each in (self.keys, self.values):
                each[self.filled : rows, :, :first] = 0
            self.filled = rows

    def _make(self, keys: Tensor, values: Tensor) -> None:
        """Allocate space that begins with these values."""
        count, before = len(keys), keys.shape[2]
        rows, columns = self.kept.room
        self.keys, self.values = (
            each.new_empty(rows, each.shape[1], columns, each.shape[3]) for each in (keys, values)
        )
        self.keys[:count, :, :before] = keys
        self.values[:count, :, :before] = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first = self.kept.rows_of(self.number), self.kept.first
        end = first + key_states.shape[2]
        assert self.keys is not None
        if self.kept.room[1] > self.keys.shape[2]:
            # Only a step grows the cache, and it runs all rows that later steps can read.
            self.filled = min(self.filled, rows.stop)
        self.fit(rows.stop, first)
        assert self.values is not None
        self.keys[rows, :, first:end] = key_states
        self.values[rows, :, first:end] = value_states
        self.length = self.kept.common + end
        if self.number == self.kept.stop:
            raise PassStopped
        if self.kept.marked and key_states.dtype in WIDE_DTYPES:
            self.handed = self._marked(key_states), self._marked(value_states)
        else:
            self.handed = self.every()
        return self.handed

    def every(self) -> tuple[Tensor, Tensor]:
        """Return [n, heads, T, width] of the pass's rows: views, if no columns are shared."""
        tensors = self.own()
        if self.kept.shared is None:
            return tensors
        before = self.kept.shared.of_rows(self.number, self.kept.rows_of(self.number))
        return torch.cat([before[0], tensors[0]], dim=2), torch.cat([before[1], tensors[1]], dim=2)

    def own(self) -> tuple[Tensor, Tensor]:
        """Return views of them without shared columns."""
        assert self.keys is not None
        assert self.values is not None
        rows, end = self.kept.rows_of(self.number), self.length - self.kept.common
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def _marked(self, like: Tensor) -> Tensor:
        """Return a placeholder for all of them; NaN reveals any use of its values."""
        size = like.shape[0], like.shape[1], self.length, like.shape[3]
        return like.new_full((1, 1, 1, 1), torch.nan).expand(size)

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # as older libraries call it


class _ImageLayer(_CacheLayer):
    """Layer that attends to an image, whose keys and values each pass provides."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the pass, and cache nothing."""
        if self.number == self.kept.stop:
            raise PassStopped
        return key_states, value_states


class KeyValueCache(Cache):
    """Keys and values of some rows, left-padded to the same column."""

    layers: Any  # `_CacheLayer`; the library's type has layers without keys

    def __init__(
        self, layers: int, rows: int, columns: int, later: int = 0, images: Collection[int] = ()
    ) -> None:
        """Create the cache.

        Args:
            layers: Number of the model's layers.
            rows: Number of rows with space.
            columns: Number of columns with space.
            later: Number of further columns that may be needed.
            images: Layers that attend to an image in place of earlier tokens.
        """
        self.room = rows, columns + min(later, MIN_NEW_COLUMNS)
        self._most = columns + later
        self.left = rows
        """Largest number of rows that later passes can have."""
        self.shared: SharedKeyValues | None = None
        """First columns, which rows of a prompt share; None if all columns are separate."""
        self.rows = slice(0, rows)
        """Rows of the current pass."""
        self._lineup: RowLineup | None = None
        """Which of these rows attend in each block; None: all."""
        self.first = 0
        """Column of the pass's first token, without the shared columns."""
        self.stop: int | None = None
        """The layer whose keys and values end the current pass."""
        self.asked = False
        """Whether attention in the current pass reads the cache itself."""
        self.holds_earlier = True
        """Whether the model may assume earlier tokens; otherwise it reads the token types."""
        kinds = [_ImageLayer if n in images else _CacheLayer for n in range(layers)]
        super().__init__(layers=[kind(self, n) for n, kind in enumerate(kinds)])

    @property
    def is_initialized(self) -> bool:
        """Whether the cache holds earlier tokens; PaliGemma then builds causal masks only."""
        return self.holds_earlier and super().is_initialized

    @property
    def common(self) -> int:
        """Number of shared columns."""
        return 0 if self.shared is None else self.shared.columns

    @property
    def marked(self) -> bool:
        """Whether attention in the current pass gets placeholders and reads the cache itself."""
        return self.asked and self.shared is not None

    def share(self, other: KeyValueCache, columns: int, rows: Sequence[int]) -> None:
        """Let rows begin with the first columns of these rows of another cache."""
        layers = [
            (layer.keys, layer.values) if layer.is_initialized else None for layer in other.layers
        ]
        self.shared = SharedKeyValues(columns, layers, rows)

    def at(
        self,
        rows: slice,
        first: int,
        count: int,
        lineup: RowLineup | None = None,
        stop: int | None = None,
    ) -> KeyValueCache:
        """Prepare a pass over some rows and the columns from `first` on.

        Args:
            count: Number of columns.
            lineup: Which of the rows blocks compute.
            stop: The layer whose keys and values end the pass, by PassStopped; None: the pass is
                complete.
        """
        self.rows, self.first, self._lineup = rows, first - self.common, lineup
        self.stop = stop
        every, columns = self.room
        if self.first + count > columns:
            self.room = (
                min(every, self.left),
                min(self._most, columns + max(MIN_NEW_COLUMNS, columns // 2)),
            )
        for layer in self.layers:
            layer.length, layer.handed = first, None
        return self

    def rows_of(self, layer: int) -> slice:
        """Return the rows of the current pass in one layer."""
        if self._lineup is None:
            return self.rows
        return slice(self.rows.start, self.rows.start + self._lineup.attending(layer))

    def handed(self, layer: int, keys: Tensor, values: Tensor) -> bool:
        """Return whether a block's attention was called with exactly the cached tensors."""
        mine = self.layers[layer].handed if 0 <= layer < len(self.layers) else None
        if mine is None:
            return False
        return all(
            (own.data_ptr(), own.shape, own.stride(), own.dtype)
            == (given.data_ptr(), given.shape, given.stride(), given.dtype)
            for own, given in zip(mine, (keys, values), strict=True)
        )

    def every(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [n, heads, T, width] of the rows of the current pass."""
        return self.layers[layer].every()

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return them without shared columns."""
        return self.layers[layer].own()

    def newest(self, layer: int, count: int) -> Tensor:
        """Return a view [n, heads, count, width] of the keys of the current pass."""
        return self.layers[layer].keys[self.rows_of(layer), :, self.first : self.first + count]

    def move(self, moves: Sequence[RowMoves], columns: int) -> None:
        """Copy rows to new indices in each layer; sources are read before they are overwritten."""
        columns -= self.common
        due = [
            (layer, rows)
            for layer, rows in zip(self.layers, moves, strict=True)
            if layer.is_initialized and len(rows[0])
        ]
        if not due:
            return
        device = due[0][0].keys.device
        index = iter(arrays_to_device([row for _, rows in due for row in rows], device))
        for layer, (_, to) in due:
            layer.fit(1 + int(to.max()), 0)
            source, target = next(index), next(index)
            for each in (layer.keys, layer.values):
                own = each[:, :, :columns]
                own.index_copy_(0, target, own.index_select(0, source))  # twice as fast as []

    def fill(self, other: KeyValueCache, rows: Sequence[Ints], first: int, end: int) -> None:
        """Copy some columns of another cache's rows into the first rows here.

        Args:
            rows: [layer] rows of the other cache.
            first: First column; neither cache shares it or later ones.
            end: End of the columns.
        """
        due = [
            each
            for each in zip(self.layers, other.layers, rows, strict=True)
            if each[1].is_initialized
        ]
        if end == first or not due:
            return
        here, there = (slice(first - cache.common, end - cache.common) for cache in (self, other))
        index = arrays_to_device([numbers for _, _, numbers in due], due[0][1].keys.device)
        for (mine, its, _), tensor in zip(due, index, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(its.keys, its.values)
            mine.fit(len(tensor), here.start)
            for to, of in ((mine.keys, its.keys), (mine.values, its.values)):
                to[: len(tensor), :, here] = of[:, :, there].index_select(0, tensor)

    def put(
        self,
        other: KeyValueCache,
        which: str,
        layer: int,
        rows: Tensor,
        of: Tensor,
        columns: Tensor,
    ) -> None:
        """Copy single vectors of all heads from another cache.

        Args:
            which: "keys" or "values".
            rows: [K] long, rows here.
            of: [K] long, rows of the other cache.
            columns: [K] long.
        """
        mine, its = (getattr(cache.layers[layer], which) for cache in (self, other))
        place, here, there = indices_to_device((columns, rows, of), mine.device)
        mine[here, :, place - self.common] = its[there, :, place]


MIN_PRODUCTS = 400
"""Multiply-adds of one product of a batch below which torch doesn't call its fast library: it adds
products in a plain loop, which takes two to six times as long for one query."""


def sum_weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Return `weights @ values` [n, heads, queries, width], also fast with few keys.

    Args:
        weights: [n, heads, queries, key].
        values: [n, heads, key, width].
    """
    _, _, queries, keys = weights.shape
    products = queries * keys * values.shape[-1]
    if not products or products >= MIN_PRODUCTS or weights.device.type != "cpu":
        return weights @ values
    if keys <= 4:
        sums = weights[..., 0, None] * values[:, :, None, 0]
        for key in range(1, keys):
            sums.addcmul_(weights[..., key, None], values[:, :, None, key])
        return sums
    copies = -(-MIN_PRODUCTS // products)
    return (weights.repeat(1, 1, copies, 1) @ values)[:, :, :queries]


_SUPPORTED_ATTENTION = {"eager", "sdpa"}
"""Attention implementations whose masks are available in full."""


def is_single_query_supported(model: LoadedModel) -> bool:
    """Return whether the model's attention of one query can be computed here.

    In 16 bits, the model's own attention rounds at different points.
    """
    return (
        model.dtype in WIDE_DTYPES
        and set(list_implementations(model).values()) <= _SUPPORTED_ATTENTION
    )


class SingleQueryAttention:
    """Attention of one query in all blocks, pass by pass."""

    def __init__(self, kept: KeyValueCache) -> None:
        self.kept = kept
        self._masks: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        """Masks of the pass by memory address, and what they add to scores. Masks are held, so that
        addresses aren't reused."""

    def begin(self) -> None:
        """Start a further pass."""
        self._masks.clear()

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Compute [n, 1, heads, d_head] on cached keys; None if the call has unknown arguments."""
        query, arguments = call.query, dict(call.arguments)
        more = [arguments.get(name) for name in ("distances", "position_bias")]
        if query.dtype not in WIDE_DTYPES or call.across or any(each is not None for each in more):
            return None
        rows, heads, _, width = call.key.shape
        try:
            call.own_function()
            how = AttentionMethod.of(query[0], call.key[0], True, False, None, arguments)
        except CannotPack:
            return None
        queries = query.reshape(rows, heads, how.shared, width) * how.scale
        scores = self._scores(call.layer, queries)
        if how.cap is not None:
            scores = (scores / how.cap).tanh() * how.cap
        scores = apply_mask(scores[:, :, :, None, None], self._added(call.mask), how.shared)
        weights = how.weights(scores, how.sink(scores)).to(call.value.dtype)
        values = self._values(call.layer, weights[:, :, :, 0, 0])
        return values.reshape(rows, 1, heads * how.shared, -1)

    def _scores(self, layer: int, queries: Tensor) -> Tensor:
        """Return [n, key-value heads, head of that, key] scores.

        queries: [n, key-value heads, head of that, width].
        """
        scores = queries @ self.kept.own(layer)[0].transpose(-1, -2)
        if self.kept.shared is None:
            return scores
        before = self.kept.shared.scores(layer, self.kept.rows_of(layer), queries)
        return torch.cat([before, scores], dim=-1)

    def _values(self, layer: int, weights: Tensor) -> Tensor:
        """Return [n, key-value heads, head of that, width].

        weights: [n, key-value heads, head of that, key].
        """
        shared, common = self.kept.shared, self.kept.common
        values = sum_weighted(weights[..., common:], self.kept.own(layer)[1])
        if shared is None:
            return values
        return values.add_(shared.values(layer, self.kept.rows_of(layer), weights[..., :common]))

    def _added(self, mask: Tensor | None) -> Tensor | None:
        """Return [n or 1, heads or 1, 1, key]: the mask's summands; None if there is no mask."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        key = mask.data_ptr(), mask.shape
        if key not in self._masks:
            self._masks[key] = mask, torch.where(mask, 0.0, float("-inf"))
        return self._masks[key][1]


ArgumentPath = tuple[int | str, ...]
"""Location of a tensor in a module's arguments: (0,), ("position_embeddings", 1)."""

RowLengths = Mapping[ArgumentPath, int]
"""Tensors with a fixed number of adjacent vectors per row of the pass: one, or one for each of its
heads."""


@dataclass(frozen=True)
class RowArguments:
    """Row dimensions in calls of modules that can compute only some of the rows."""

    blocks: tuple[RowLengths, ...]
    """[block]"""
    attention: tuple[RowLengths, ...] = ()
    """[block] of its attention; empty if attention computes the same rows as the block."""
    several: bool = True
    """Whether that holds for several tokens of each row too."""


def find_attention_path(block: BlockAnatomy) -> str | None:
    """Return the path of the module that projects queries, attends, and projects `z`.

    None if there is no such module within the block.
    """
    z = block.taps.get("z")
    if z is None or z.side != "in" or z.path != block.output or not block.projections:
        return None
    parts = [path.split(".") for path in (*block.projections, z.path)]
    common = list(takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False)))
    path = ".".join(names[0] for names in common)
    return path if path.startswith(f"{block.path}.") and path != z.path else None


@contextmanager
def limit_to_first_rows(
    model: LoadedModel, lineup: RowLineup, places: RowArguments, running: Callable[[int], None]
) -> Generator[None]:
    """Restrict blocks, and their attention, to the rows that they have in `lineup`.

    running: called with the number of rows whenever it changes.
    """
    with ExitStack() as stack:
        for number, (block, each) in enumerate(
            zip(model.anatomy.blocks, places.blocks, strict=True)
        ):
            few, count = lineup.attending(number), lineup.rows(number)
            if count < len(lineup):
                module = model.module.get_submodule(block.path)
                some = partial(
                    _run_block, module.forward, count, lineup.like[count:], each, running
                )
                stack.enter_context(replace_forward(module, some))
            if places.attention and few < count:
                stack.enter_context(
                    _limit_attention(
                        model, block, lineup, number, places.attention[number], running
                    )
                )
        yield


def _run_block(
    forward: Callable[..., Any],
    count: int,
    others: Ints,
    places: RowLengths,
    running: Callable[[int], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a block on the first rows, and copy the result to the others.

    others: [further row] the row that it equals.
    """
    every = len(get_activation(args, kwargs))
    running(count)
    output = _call_first_rows(forward, count, places, args, kwargs)
    running(every)
    several = isinstance(output, (tuple, list))
    hidden = _append_copies(output[0] if several else output, others)
    return type(output)([hidden, *output[1:]]) if several else hidden


@contextmanager
def _limit_attention(
    model: LoadedModel,
    block: BlockAnatomy,
    lineup: RowLineup,
    number: int,
    places: RowLengths,
    running: Callable[[int], None],
) -> Generator[None]:
    """Restrict a block's attention to fewer rows up to `z`, then continue with the block's rows."""
    few, count = lineup.attending(number), lineup.rows(number)
    path = find_attention_path(block)
    assert path is not None
    assert block.output is not None
    attention, output = (model.module.get_submodule(each) for each in (path, block.output))
    forward = attention.forward

    def attend(*args: Any, **kwargs: Any) -> Any:
        running(few)
        return _call_first_rows(forward, few, places, args, kwargs)

    def grow(module: nn.Module, args: Any, kwargs: Any) -> Any:
        running(count)
        z = _append_copies(get_activation(args, kwargs), lineup.like[few:count])
        return replace_activation(args, kwargs, z)

    # Before hooks that read and write `z`.
    handle = output.register_forward_pre_hook(grow, prepend=True, with_kwargs=True)
    try:
        with replace_forward(attention, attend):
            yield
    finally:
        handle.remove()


def _call_first_rows(
    forward: Callable[..., Any], count: int, places: RowLengths, args: Any, kwargs: Any
) -> Any:
    """Call a module with the first rows only."""
    every = len(get_activation(args, kwargs))

    def cut(value: Any, place: ArgumentPath) -> Any:
        if isinstance(value, Tensor):
            location = places.get(place, 0)
            return (
                value[: location * count] if location and len(value) == location * every else value
            )
        if type(value) in (tuple, list):
            return type(value)(cut(each, (*place, n)) for n, each in enumerate(value))
        if type(value) is dict:
            return {name: cut(each, (*place, name)) for name, each in value.items()}
        return value

    return forward(
        *(cut(each, (n,)) for n, each in enumerate(args)),
        **{name: cut(each, (name,)) for name, each in kwargs.items()},
    )


def _append_copies(rows: Tensor, others: Ints) -> Tensor:
    """Append rows, each a copy of one of the given rows."""
    every = np.concatenate([np.arange(len(rows)), others])
    return rows.index_select(0, array_to_device(every, rows.device))


@contextmanager
def record_lengths(
    model: LoadedModel, paths: Sequence[str]
) -> Generator[list[dict[ArgumentPath, int]]]:
    """Record, per path, the first dimensions of tensors in the arguments of modules."""
    lengths: list[dict[ArgumentPath, int]] = [{} for _ in paths]
    with ExitStack() as stack:
        for number, path in enumerate(paths):

            def note(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                for name, value in (*enumerate(args), *kwargs.items()):
                    for place, tensor in _iter_tensors(value, (name,)):
                        lengths[number][place] = len(tensor) if tensor.dim() else 0

            module = model.module.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield lengths


def compute_row_lengths(
    few: dict[ArgumentPath, int], rows: int, more: dict[ArgumentPath, int]
) -> RowLengths:
    """Return the vectors per row of tensors that grow with the number of rows.

    Args:
        few: Lengths in a pass of `rows` rows.
        rows: Number of rows.
        more: Lengths in a pass of one more row.
    """
    return {
        place: length // rows
        for place, length in few.items()
        if length and length % rows == 0 and more.get(place) == length + length // rows
    }


def _iter_tensors(value: Any, place: ArgumentPath) -> Iterator[tuple[ArgumentPath, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif type(value) in (tuple, list):
        for n, each in enumerate(value):
            yield from _iter_tensors(each, (*place, n))
    elif type(value) is dict:
        for name, each in value.items():
            yield from _iter_tensors(each, (*place, name))
