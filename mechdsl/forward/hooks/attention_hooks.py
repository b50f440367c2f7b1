"""Reads and writes inside one layer's attention: queries, keys, scores, weights and edges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.forward.hooks.batch import (
    Batch,
    DeviceIndex,
    EdgeWrite,
    PatchPools,
    SiteWrite,
    TokenFrame,
    WriteMismatch,
    WriteMode,
    apply_write,
    indices_to_device,
    to_device,
)
from mechdsl.vocab.metrics import compute_pattern_entropy
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, EdgeChange


@dataclass(frozen=True, eq=False)
class AttentionGroup:
    """Rows whose tokens are in the same columns, with the same number of rows on each lane.

    Tokens of a group are adjacent in the pack, ordered by lane, row and column.
    """

    start: int
    """Index of its first token in the pack."""
    lanes: DeviceIndex
    """[lane]"""
    rows: int
    """Number of rows on each lane."""
    columns: DeviceIndex
    """[own]: columns of a row's own tokens."""
    queries: DeviceIndex
    """[query]: indices of the own tokens that attend."""
    every: bool = False
    """Whether the own tokens are all tokens of the prompt."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.lanes) * self.rows * len(self.columns)

    def by_lanes(self, most: int) -> Iterator[AttentionGroup]:
        """Split the group into parts of whole lanes.

        A part has up to `most` queries, or one lane if that has more.
        """
        each = self.rows * len(self.queries)
        together = max(1, most // each)
        if together >= len(self.lanes):
            yield self
            return
        tokens = self.rows * len(self.columns)
        for first in range(0, len(self.lanes), together):
            lanes = self.lanes.part(slice(first, first + together))
            yield replace(self, start=self.start + first * tokens, lanes=lanes)

    def by_queries(self, most: int) -> Iterator[tuple[slice, AttentionGroup]]:
        """Yield parts of up to `most` queries, of whole rows or within one row, with the rows."""
        asking = len(self.queries)
        if len(self.lanes) * self.rows * asking <= most:
            yield slice(0, self.rows), self
            return
        together = max(1, most // asking)
        for row in range(0, self.rows, together):
            rows = slice(row, min(row + together, self.rows))
            start = self.start + row * len(self.columns)
            for query in range(0, asking, most):
                queries = self.queries.part(slice(query, query + most))
                part = replace(self, start=start, rows=rows.stop - row, queries=queries)
                yield rows, part


@dataclass(eq=False)
class _AttentionChange:
    """Change made by one rule in one layer, by token of the pass."""

    token: Tensor
    """[K]"""
    head: Tensor
    """[K]"""
    change: EdgeChange | Literal["scores", "pattern"]
    entries: Tensor
    columns: Tensor
    amounts: Tensor
    values: Tensor | None = None
    """[K, key position], for written vectors."""
    starts: Tensor | None = None
    """[K] column of position 0, for written vectors."""
    mode: WriteMode = "set"
    """How written vectors combine with existing values."""


@dataclass(eq=False)
class AttentionHooks:
    """Reads and writes within the attention of one layer."""

    starts: Tensor
    """[lane] column of each prompt's first token."""
    width: int
    """Number of key positions in a vector over keys."""
    rotated: dict[str, list[tuple[Tensor, Tensor, SiteWrite]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """q_rot, k_rot → (token, head, write)."""
    changes: list[_AttentionChange] = field(default_factory=list[_AttentionChange])
    wanted: frozenset[str] = frozenset()
    found: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[token, heads, width] values that were read; `entropy` is that of patterns, with width 1,
    `tokens` are their weights without the padding after each tile."""
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """Whether each query of the current group sees each key."""
    done: int = 0
    """Number of vectors written and queries changed so far …"""
    due: int = 0
    """… and expected in total."""
    passed: int = 0
    """Number of patches in earlier calls of this layer, in an encoder that calls its attention for
    each tile or window."""
    pools: PatchPools | None = None
    """Tokens between which weights are read, as in `Batch`; None if none are."""
    pooled: Tensor | None = None
    """[lane * token, heads, token] these weights."""
    tiles: tuple[int, int] | None = None
    """Tiles of the keys, as in `Batch`; then key 0 of a vector is the first column of the query's
    image, and padding after tiles counts."""

    def opened(self, mask: Any, heads: int) -> Any:
        """Add allowed keys to a mask of whole prompts [lane or 1, head or 1, query, key].

        If keys are added, each head of the result has a separate mask.
        """
        allowed = [change for change in self.changes if change.change == "allow"]
        if not allowed:
            return mask
        if not isinstance(mask, Tensor):
            raise WriteMismatch("attention has no mask, so no key can be allowed")
        find_visibility(mask)
        mask = mask.expand(len(self.starts), heads, -1, -1).clone()
        count = mask.shape[2]
        for change in allowed:
            token, head = change.token[change.entries], change.head[change.entries]
            index = token // count, head, token % count, change.columns
            mask[indices_to_device(index, mask.device)] = mask.dtype == torch.bool
            self.done += len(change.token)
        return mask

    def turned(self, site: str, vectors: Tensor) -> Tensor:
        """Apply writes to queries or keys [heads, token, d_head]; in an encoder that calls its
        attention for each tile or window, those of one call."""
        first, writes = self.passed, self.rotated.get(site, ())
        if writes:
            vectors = vectors.clone()
        for token, head, write in writes:
            there = (token >= first) & (token < first + vectors.shape[1])
            indices = torch.nonzero(there)[:, 0]
            index = indices_to_device((head[indices], token[indices] - first), vectors.device)
            values = write.values[to_device(indices, write.values.device)]
            to = None if write.to is None else write.to[to_device(indices, write.to.device)]
            now = vectors[index]
            to = None if to is None else to_device(to, now.device)
            vectors[index] = apply_write(write.mode, now, to_device(values, now.device), to)
            self.done += len(indices)
        if site in self.wanted:
            earlier = [self.found[site]] if first else []
            self.found[site] = torch.cat([*earlier, vectors.transpose(0, 1)])
        return vectors

    def unseen(self, group: AttentionGroup) -> None:
        """Count changes at tokens that don't attend, because no measure depends on them."""
        for change in self.changes:
            token = change.token - group.start
            token = token[(token >= 0) & (token < group.size)] % len(group.columns)
            self.done += int((~np.isin(token.numpy(), group.queries.host)).sum())

    def scored(self, group: AttentionGroup, scores: Tensor, sink: Tensor | None) -> Tensor | None:
        """Change masked scores in place.

        Args:
            scores: [lane, key-value head, head of that, row, query, key].
            sink: [… , 1] score of the sink, if there is one.

        Returns:
            The changed score of the sink.
        """
        self.seen = _is_visible(scores)
        for change in self.changes:
            if change.change in ("pattern", "allow"):
                continue
            tensor, index = self._of(group, change, scores)
            if not len(tensor):
                continue
            seen = self.seen[index]
            rows = scores[index].masked_fill(~seen, float("-inf"))
            if change.change == "scores":
                rows = torch.where(seen, self._vectors(group, change, tensor, rows), rows)
            else:
                keys = self._keys(group, change, tensor, rows) & seen
                own_sink = None if sink is None else sink[index]
                rows, own_sink = _change_scores(
                    change,
                    to_device(change.amounts[tensor].to(rows.dtype), rows.device),
                    rows,
                    keys,
                    own_sink,
                )
                if sink is not None and own_sink is not None:
                    sink = sink.clone()
                    sink[index] = own_sink
            scores[index] = rows
        self._keep("scores", group, scores.masked_fill(~self.seen, 0))
        return sink

    def weighed(self, group: AttentionGroup, weights: Tensor) -> Tensor:
        """Apply writes to weights, which have the shape of the scores given last.

        A query that sees no key has weights of 0.
        """
        weights = weights.nan_to_num(0.0)  # also for padding, which sees nothing
        for change in self.changes:
            if change.change != "pattern":
                continue
            tensor, index = self._of(group, change, weights)
            if len(tensor):
                rows = weights[index]
                vectors = self._vectors(group, change, tensor, rows)
                weights[index] = torch.where(self.seen[index], vectors, rows)
        self._keep("pattern", group, weights)
        return weights

    def _of(
        self, group: AttentionGroup, change: _AttentionChange, like: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Find a change's queries in the group.

        Returns:
            Their numbers in the change, and their indices [lane, key-value head, head of that, row,
            query].
        """
        token = change.token
        indices = torch.nonzero((token >= group.start) & (token < group.start + group.size))[:, 0]
        at, count = token[indices] - group.start, len(group.columns)
        place = torch.full((count,), -1)
        place[torch.from_numpy(group.queries.host)] = torch.arange(len(group.queries))
        query = place[at % count]
        asks = query >= 0  # others are in other parts of the group, or irrelevant to measures
        indices, at, query = indices[asks], at[asks], query[asks]
        self.done += len(indices)
        head = change.head[indices]
        shared = like.shape[2]
        index = (
            at // (count * group.rows),
            head // shared,
            head % shared,
            at // count % group.rows,
            query,
        )
        return indices, indices_to_device(index, like.device)

    def _keys(
        self, group: AttentionGroup, change: _AttentionChange, tensor: Tensor, rows: Tensor
    ) -> Tensor:
        """Return [n, key]: whether a key is affected by the change."""
        place = torch.full((len(change.token),), -1, dtype=torch.long)
        place[tensor] = torch.arange(len(tensor))
        row = place[change.entries]
        column = change.columns - self._first(group)
        good = (row >= 0) & (column >= 0) & (column < rows.shape[1])
        keys = torch.zeros(rows.shape, dtype=torch.bool)
        keys[row[good], column[good]] = True
        return to_device(keys, rows.device)

    def _vectors(
        self, group: AttentionGroup, change: _AttentionChange, own: Tensor, rows: Tensor
    ) -> Tensor:
        """Return [n, key]: values of written vectors over key positions."""
        assert change.values is not None
        assert change.starts is not None
        column = torch.arange(rows.shape[1])[None] + self._first(group)
        starts = change.starts[own][:, None]
        if self.tiles is not None:
            starts = torch.full_like(starts, self._first(group))
        position = column - starts
        inside = position.clamp(0, change.values.shape[1] - 1)
        vectors = to_device(change.values[own].gather(1, inside).to(rows.dtype), rows.device)
        return apply_write(change.mode, rows, vectors)

    def _keep(self, site: str, group: AttentionGroup, found: Tensor) -> None:
        """Store values that are read, by key position."""
        if site == "pattern" and self.pools is not None:
            assert self.pooled is not None
            count, keys = self.pools.tokens, torch.from_numpy(group.columns.host)
            asking = keys[torch.from_numpy(group.queries.host)]
            for lane, tensor in zip(group.lanes.host.tolist(), found, strict=True):
                pooled = self.pools.pool(tensor[:, :, 0].flatten(0, 1), asking, keys)
                self.pooled[lane * count : (lane + 1) * count] += pooled
        if site == "pattern" and "entropy" in self.wanted:
            self._store("entropy", group, compute_pattern_entropy(found)[..., None])
        if site == "pattern" and "tokens" in self.wanted:
            self._store_keys("tokens", group, found)
        if site in self.wanted:
            self._store_keys(site, group, found)

    def _store_keys(self, name: str, group: AttentionGroup, found: Tensor) -> None:
        """Store values [lane, key-value head, head of that, row, query, key] by key position."""
        lanes, kinds, shared, rows, asking, keys = found.shape
        position = torch.arange(self.width, device=found.device)
        first = self.starts[torch.from_numpy(group.lanes.host)] - self._first(group)
        if name == "tokens":
            assert self.tiles is not None
            position = position // self.tiles[0] * self.tiles[1] + position % self.tiles[0]
        elif self.tiles is not None:
            first = torch.zeros_like(first)
        column = position[None] + to_device(first, found.device)[:, None]
        inside = (column >= 0) & (column < keys)
        index = column.clamp(0, keys - 1)[:, None, None, None, None]
        shape = (lanes, kinds, shared, rows, asking, self.width)
        taken = found.gather(-1, index.expand(shape))
        taken = torch.where(inside[:, None, None, None, None], taken, taken.new_zeros(()))
        self._store(name, group, taken)

    def _store(self, name: str, group: AttentionGroup, values: Tensor) -> None:
        """Store values [lane, key-value head, head of that, row, query, width] in `found`."""
        values = values.permute(0, 3, 4, 1, 2, 5).flatten(3, 4)
        lanes, rows, _, *size = values.shape
        span = slice(group.start, group.start + group.size)
        target = self.found[name][span].view(lanes, rows, -1, *size)
        target[:, :, group.queries.selection] = values.to(target)

    def prepared(self, tokens: int, heads: int, like: Tensor) -> None:
        """Allocate storage for values read at this many tokens."""
        for site in self.wanted & {"scores", "pattern", "tokens"}:
            self.found[site] = like.new_zeros(tokens, heads, self.width)
        if "entropy" in self.wanted:
            self.found["entropy"] = like.new_zeros(
                tokens, heads, 1, dtype=torch.promote_types(like.dtype, torch.float32)
            )
        if self.pools is not None:
            count = self.pools.tokens
            self.pooled = like.new_zeros(len(self.starts) * count, heads, count)

    @staticmethod
    def _first(group: AttentionGroup) -> int:
        """Return the column of the first key in a group's scores."""
        return int(group.columns.host[0]) if group.every else 0


def build_attention_hooks(
    layer: int,
    frame: TokenFrame,
    tokens: int,
    starts: Tensor,
    width: int,
    *,
    writes: Sequence[SiteWrite],
    edges: Sequence[EdgeWrite],
    reads: Sequence[str],
    pools: PatchPools | None = None,
    tiles: tuple[int, int] | None = None,
) -> AttentionHooks:
    """Build the reads and writes within one layer's attention.

    Args:
        frame: The tokens of the pass.
        tokens: Second dimension of the model's tensors.
        starts: Column of each prompt's first key, as `lane_starts` of `TokenFrame`.
        width: Number of key columns, as `key_width` of `TokenFrame`.
        writes: Writes of this layer.
        edges: Changed edges of this layer.
        reads: Names of sites to read; `entropy` for that of patterns, `tokens` for patterns without
            padding.
        pools: Tokens that patterns between patches are read for.
        tiles: Tiles of the keys, as in `Batch`.
    """
    wanted = frozenset(reads) & {*ATTENTION_INTERNAL_SITES, "entropy", "tokens"}
    work = AttentionHooks(starts.cpu(), width, wanted=wanted, pools=pools, tiles=tiles)
    for write in writes:
        rows, positions = write.rows, write.positions
        first, second, there = frame.locate(write.site, layer, write.stack, rows, positions)
        token, head = (first * tokens + second)[there].cpu(), write.units[there].cpu()
        index = torch.nonzero(there)[:, 0]
        values = write.values[to_device(index, write.values.device)]
        work.due += len(token)
        if write.site in ("q_rot", "k_rot"):
            to = None if write.to is None else write.to[to_device(index, write.to.device)]
            here = replace(write, values=values, to=to)
            work.rotated[write.site].append((token, head, here))
            continue
        begin = _first_columns(frame.keys_of(write.stack), rows, positions)[there.cpu()]
        none = torch.zeros(0, dtype=torch.long)
        kind = "scores" if write.site == "scores" else "pattern"
        change = _AttentionChange(
            token, head, kind, none, none, none, values.cpu(), begin, write.mode
        )
        work.changes.append(change)
    for edge in edges:
        change = _build_edge_change(edge, layer, frame, tokens)
        work.due += len(change.token)
        work.changes.append(change)
    return work


def _first_columns(frame: TokenFrame, rows: Tensor, positions: Tensor) -> Tensor:
    """Return [K]: the column of key 0, which in a decoder is before the first column."""
    if isinstance(frame, Batch):
        return frame.starts[rows]
    return frame.columns(rows, torch.zeros_like(positions)).cpu()


def _build_edge_change(
    edge: EdgeWrite, layer: int, frame: TokenFrame, tokens: int
) -> _AttentionChange:
    """Build the change of an edge's pattern; see `build_attention_hooks` for the arguments."""
    first, second, there = frame.locate("pattern", layer, edge.stack, edge.rows, edge.queries)
    if not bool(there.all()):  # some queries are irrelevant to measures
        edge = edge.some(there.cpu())
        first, second = first[there], second[there]
    return _AttentionChange(
        (first * tokens + second).cpu(),
        edge.heads.cpu(),
        edge.change,
        edge.entries.cpu(),
        frame.keys_of(edge.stack).columns(edge.rows[edge.entries], edge.keys).cpu(),
        edge.amounts.cpu(),
    )


def find_visibility(mask: Tensor) -> Tensor:
    """Return whether queries see keys, by a mask. Raises WriteMismatch if it also adds to scores of
    visible keys: those of hidden keys aren't known."""
    if mask.dtype == torch.bool:
        return mask
    sees = mask == 0
    if bool((~sees & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise WriteMismatch("a mask contains more than visibility, so no key can be allowed")
    return sees


def _is_visible(scores: Tensor) -> Tensor:
    """Return whether a query sees each key, by masked scores."""
    return scores > torch.finfo(scores.dtype).min / 2


def _change_scores(
    change: _AttentionChange, amounts: Tensor, scores: Tensor, keys: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Change attention weights by changes of scores.

    Scores avoid a division by a remainder that has underflowed.

    Args:
        amounts: [n] its amounts.
        scores: [n, key].
        keys: [n, key] visible keys that are changed.
        sink: [n, 1] score of the sink, if there is one.

    Returns:
        Scores [n, key] and the sink's [n, 1], whose softmax gives the changed weights.
    """
    gone = float("-inf")
    match change.change:
        case "block":
            return scores.masked_fill(keys, gone), sink
        case "reweight":
            return torch.where(keys, scores + amounts.log()[:, None], scores), sink
        case "uniform":
            together = scores.masked_fill(~keys, gone).logsumexp(-1, keepdim=True)
            count = keys.sum(-1, keepdim=True)
            return torch.where(keys, together - count.log(), scores), sink
        case _:
            others = scores.masked_fill(keys, gone)
            whole = others if sink is None else torch.cat([others, sink], dim=-1)
            rest = whole.logsumexp(-1, keepdim=True)
            taken = amounts[:, None] * keys.sum(-1, keepdim=True)
            left = 1 - taken
            level = amounts.log()[:, None] + rest - left.clamp(min=1e-12).log()
            new = torch.where(keys, level, scores)
            # Nothing is left for other keys, or there are none.
            alone = ((left < 1e-6) | rest.isinf()) & keys.any(-1, keepdim=True)
            new = torch.where(alone, torch.where(keys, torch.zeros_like(scores), gone), new)
            return new, None if sink is None else sink.masked_fill(alone, gone)


def group_by_layer(edges: Sequence[EdgeWrite]) -> Mapping[tuple[str, int], list[EdgeWrite]]:
    """Group edges by stack and layer, in order."""
    edges_of_layer: dict[tuple[str, int], list[EdgeWrite]] = defaultdict(list)
    for edge in edges:
        edges_of_layer[edge.stack, edge.layer].append(edge)
    return edges_of_layer
