"""Attention of packed and padded tokens over stored keys and values.

The model's attention is replaced by a function that knows the calling block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.attention_hooks import AttentionGroup, AttentionHooks, find_visibility
from mechdsl.forward.hooks.batch import DeviceIndex, WriteMismatch, find_slice
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import (
    AttentionFunction,
    DistanceScores,
    attend_eagerly,
    exchange_modules,
    find_attention_entry,
)

_NAME = "mechdsl"

_IGNORED_ARGUMENTS = frozenset(
    {
        "dropout",  # eval mode
        "sliding_window",  # in the mask already
        "is_causal",
        "position_ids",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "cache_position",
        "logits_to_keep",
        "attention_chunk_size",
        "deterministic",  # of flash kernels
        "vision_feature_layer",  # of Video-LLaVA, which passes them on to its vision encoders
        "vision_feature_select_strategy",
    }
)
"""Arguments of attention functions that have no effect with an explicit mask."""


class CannotPack(Exception):
    """Attention that packed rows can't reproduce."""


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """Attention inputs of one block on the unpatched prompts."""

    keys: Tensor
    """[lane, key-value heads, T, d_head], after rotary."""
    values: Tensor
    mask: Tensor | None
    """[lane or 1, heads or 1, T, T]: true where a query sees a key, or a summand of its score; None
    if every token sees every other. If there are fewer queries, they are the last ones."""

    distances: DistanceScores | None = None
    """Further summands of scores that depend on distance."""

    def part(self, lanes: slice) -> CachedAttention:
        """Select some lanes."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[lanes]
        return CachedAttention(self.keys[lanes], self.values[lanes], mask, self.distances)


@contextmanager
def exchange_attention(
    model: LoadedModel,
    function: AttentionFunction,
    *,
    masked: bool,
    sees_all: Callable[[], bool] | None = None,
) -> Generator[None]:
    """Replace the model's attention by `function`.

    Args:
        masked: Whether masks are explicit; otherwise, they are omitted.
        sees_all: Called in each pass: whether explicit masks may be omitted too, where the
            library omits those of queries that see all keys.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    before = list_implementations(model)
    own = next(iter(before.values()), "eager")

    def attended(part: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        way = before.get(id(getattr(part, "config", None)), own)
        if way == "sdpa":
            kwargs.pop("softcap", None)  # older libraries ignore it for sdpa
        if not masked:
            kwargs["rounds_scores"] = way == "eager"
        return function(part, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(before.get(id(kwargs.get("config")), own))
        if not masked or make is None:
            return unmade
        omits = sees_all is not None and not model.written_out and sees_all()
        skips = omits and kwargs.get("allow_is_causal_skip", True)
        return make(*args, **{**kwargs, "allow_is_causal_skip": skips})

    # Some of these models inspect a mask that they never use.
    unmade = torch.zeros(1, 1, 1, 1, device=model.device) if model.written_out else None
    with ExitStack() as stack:
        stack.enter_context(exchange_modules(model.written_out, function, own, masked=masked))
        AttentionInterface.register(_NAME, attended)
        AttentionMaskInterface.register(_NAME, mask)
        for config in model.attention_configs:
            name = before[id(config)]
            stack.callback(setattr, config, "_attn_implementation_internal", name)
            config._attn_implementation_internal = _NAME
        yield


def list_implementations(model: LoadedModel) -> dict[int, str]:
    """Return attention implementations by config id; an image encoder's may differ."""
    return {id(config): config._attn_implementation for config in model.attention_configs}


def find_cross_attention(model: LoadedModel) -> frozenset[int]:
    """Return the ids of the modules by which a decoder attends to an encoder."""
    if "cross" not in model.others:
        return frozenset()
    blocks = model.stack("cross").anatomy.blocks
    paths = {path.rpartition(".")[0] for block in blocks for path in block.projections}
    return frozenset(id(model.module.get_submodule(path)) for path in paths)


def find_encoder_attention(model: LoadedModel) -> Mapping[int, tuple[str, int]]:
    """Return the stack and layer of each attention module of encoders, by the module's id."""
    return {
        id(model.module.get_submodule(path.rpartition(".")[0])): (stack, layer)
        for stack in ("encoder", "vision")
        if stack in model.others
        for layer, block in enumerate(model.stack(stack).anatomy.blocks)
        for path in block.projections
    }


def get_own_attention(module: nn.Module, own: Mapping[int, str]) -> AttentionFunction:
    """Return the module's attention function; own: `list_implementations` before an exchange."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if find_attention_entry(module) is not None:
        return attend_eagerly
    first = next(iter(own.values()), "eager")
    implementation = own.get(id(getattr(module, "config", None)), first)
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation != "eager":  # masks of other kernels aren't explicit
        raise CannotPack(f"its attention is `{implementation}`")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CannotPack("its attention isn't the library's")
    return eager


def expand_query_mask(mask: Any, count: int) -> Any:
    """Expand a mask of keys alone to a row for each of `count` queries."""
    if isinstance(mask, Tensor) and mask.shape[-2] == 1:
        return mask.expand(*mask.shape[:-2], count, -1)
    return mask


def find_visible_keys(mask: Tensor) -> Tensor:
    """Return whether each query sees each key, given a mask or masked scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def add_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Add a bias of scores to a mask."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


class VisibleKeyCounts:
    """Numbers of keys that the queries of a mask see, counted once and stored on the host."""

    def __init__(self) -> None:
        self._counts: dict[object, tuple[Tensor, Ints]] = {}
        """By memory address of a mask; masks are held, so that addresses aren't reused."""

    def of(self, mask: Tensor) -> Ints:
        """Return [lane or 1, query] for a mask [lane or 1, head or 1, query, key].

        The count is the minimum over heads; a key whose score is changed doesn't count.
        """
        key = mask.data_ptr(), mask.shape, mask.stride()
        if key not in self._counts:
            together = max(1, get_max_scores(mask.device) // mask[:, :, :1].numel())
            counts = [_count_visible(part) for part in mask.split(together, dim=2)]
            self._counts[key] = mask, torch.cat(counts, dim=1).cpu().numpy()
        return self._counts[key][1]


def _count_visible(mask: Tensor) -> Tensor:
    """Return [lane, query]: number of keys seen without a change, the minimum over heads."""
    whole = mask if mask.dtype == torch.bool else mask == 0
    return whole.count_nonzero(-1).amin(1)


class GroupMasks:
    """Masks of groups, cut from the model's mask and cached over the blocks of a pass."""

    def __init__(self, seen: VisibleKeyCounts | None = None) -> None:
        """Prepare the cache; seen: detects masks without effect; None applies every mask."""
        self._seen = seen
        self._cut: dict[object, tuple[AttentionGroup, Tensor | None]] = {}

    def of(self, group: AttentionGroup, mask: Tensor | None, keys: int) -> Tensor | None:
        """Return [lane or 1, head or 1, query, key] for a group's queries and first keys.

        None if the queries see all of these keys.
        """
        if mask is None:
            return None
        key = id(group), mask.data_ptr(), mask.shape, mask.stride(), keys
        if key not in self._cut:
            self._cut[key] = group, self._of(group, mask, keys)
        return self._cut[key][1]

    def _of(self, group: AttentionGroup, mask: Tensor, keys: int) -> Tensor | None:
        every_lane = mask.shape[0] == 1
        first_query = mask.shape[-1] - mask.shape[-2]  # queries are the last columns
        at = group.columns.host[group.queries.host] - first_query
        if self._seen is not None:
            counts = self._seen.of(mask)
            lanes = np.zeros(1, dtype=np.int64) if every_lane else group.lanes.host
            if bool((counts[lanes[:, None], at] == keys).all()):
                return None
        first = int(group.columns.host[0]) if group.every else 0
        mask = mask[..., first : first + keys]
        # Prefer slices to indices, which copy: masks of all heads are large.
        if (queries := find_slice(at)) is not None:
            mask = mask[:, :, queries]
            return mask if every_lane else mask[group.lanes.selection]
        index = group.columns.device[group.queries.device] - first_query
        if every_lane:
            return mask[:, :, index]
        return mask[group.lanes.device[:, None], :, index].transpose(1, 2)


MAX_SCORES = 2**22
"""Maximum number of scores held at once on a CPU; see `get_max_scores` for GPUs."""


def get_max_scores(device: torch.device) -> int:
    """Return how many scores attention holds at once, which bounds memory for any pass."""
    return MAX_SCORES * (1 if device.type == "cpu" else 16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[AttentionGroup],
    kept: CachedAttention,
    out: Tensor,
    *,
    causal: bool = True,
    masks: GroupMasks,
    rounds_scores: bool = False,
    work: AttentionHooks | None = None,
    **arguments: Any,
) -> None:
    """Compute attention of packed tokens into `out`; tokens that don't attend keep their values.

    Args:
        query: [heads, N, d_head].
        key: [key-value heads, N, d_head].
        value: [key-value heads, N, d_head].
        groups: Groups of rows.
        kept: Keys and values of the unpatched prompts.
        out: [N, heads, d_head].
        causal: Whether tokens see no later ones.
        masks: Masks of groups, cached over blocks.
        rounds_scores: Store scores in the type of queries, as eager attention does; 16 bits lose
            small differences between keys that share a large component.
        work: Reads and writes within attention.
        arguments: Further arguments of the model's attention call.
    """
    how = AttentionMethod.of(query, key, causal, rounds_scores, work, arguments)
    if work is not None:
        query, key = work.turned("q_rot", query), work.turned("k_rot", key)
        work.prepared(query.shape[1], len(query), value)
    for group in groups:
        if work is not None:
            work.unseen(group)
        if len(group.queries):
            most = get_max_scores(query.device) // (len(query) * kept.keys.shape[2])
            for part in group.by_lanes(max(1, most)):
                _attend_lanes(query, key, value, part, kept, out, how, masks, max(1, most))


def has_sinks(block: nn.Module) -> bool:
    """Return whether keys of a block's attention compete with a sink (`s_aux` of its calls), which
    models keep as `sinks`."""
    return any(getattr(part, "sinks", None) is not None for part in block.modules())


@dataclass(frozen=True, eq=False)
class AttentionMethod:
    """Parameters of attention in one block."""

    scale: float
    cap: float | None
    sinks: Tensor | None
    shared: int
    """Number of heads that share keys and values."""
    kind: torch.dtype
    """Dtype of scores."""
    wide: torch.dtype
    """Dtype of the softmax."""
    causal: bool
    work: AttentionHooks | None

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        causal: bool,
        rounds_scores: bool,
        work: AttentionHooks | None,
        arguments: dict[str, Any],
    ) -> AttentionMethod:
        """Derive the method from the arguments of a call. Raises CannotPack for unknown ones."""
        scaling = arguments.pop("scaling", None)
        cap = arguments.pop("softcap", None)
        sinks = arguments.pop("s_aux", None)
        for kept_already in ("distances", "position_bias"):  # already stored for whole prompts
            arguments.pop(kept_already, None)
        unknown = [n for n, v in arguments.items() if v is not None and n not in _IGNORED_ARGUMENTS]
        if unknown:
            raise CannotPack(f"its attention takes `{unknown[0]}`")
        wide = torch.promote_types(query.dtype, torch.float32)
        return cls(
            scale=float(query.shape[2] ** -0.5 if scaling is None else scaling),
            cap=cap,
            sinks=sinks,
            shared=query.shape[0] // key.shape[0],
            kind=query.dtype if rounds_scores else wide,
            wide=wide,
            causal=causal,
            work=work,
        )

    def sink(self, scores: Tensor) -> Tensor | None:
        """Return […, 1]: the score of the sink, which competes with the keys."""
        if self.sinks is None:
            return None
        sink = self.sinks.to(scores.dtype).view(1, -1, self.shared, 1, 1, 1)
        return sink.expand(*scores.shape[:-1], 1)

    def weights(self, scores: Tensor, sink: Tensor | None) -> Tensor:
        """Return the softmax of scores, with the sink in its denominator."""
        if sink is None:
            return scores.softmax(-1, dtype=self.wide)
        return torch.cat([scores, sink], dim=-1).softmax(-1, dtype=self.wide)[..., :-1]


@dataclass(frozen=True, eq=False)
class _GroupLanes:
    """Queries, keys and values of a group, and the position of its own keys among all."""

    query: Tensor
    """[lane, key-value head, head of that, row, own, d_head]"""
    key: Tensor
    """[lane, key-value head, row, own, d_head], in the dtype of scores; values in their own."""
    value: Tensor
    old_keys: Tensor
    """[lane, key-value head, column, d_head], in the dtype of scores; values in their own."""
    old_values: Tensor
    suffix: bool
    """Whether own keys follow the stored ones instead of replacing some."""

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of some rows."""
        return self.query[:, :, :, rows], self.key[:, :, rows], self.value[:, :, rows]


def _attend_lanes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: AttentionGroup,
    kept: CachedAttention,
    out: Tensor,
    how: AttentionMethod,
    masks: GroupMasks,
    most: int,
) -> None:
    """Compute rows with tokens in the same columns, which share one product with the stored keys.

    At most `most` queries are computed at once.
    """
    # If own tokens extend from one column to the end, no later stored key is seen, so none is read;
    # if the own tokens are all tokens, no stored key is read at all.
    columns = group.columns.host
    first = int(columns[0])
    suffix = group.every or (how.causal and int(columns[-1]) - first + 1 == len(columns))
    before = kept.keys.shape[2] if not suffix else 0 if group.every else first
    old = group.lanes.selection
    lanes = _GroupLanes(
        query=_select_group(query, group).unflatten(1, (-1, how.shared)),
        key=_select_group(key, group).to(how.kind),
        value=_select_group(value, group),
        old_keys=kept.keys[old, :, :before].to(how.kind),
        old_values=kept.values[old, :, :before],
        suffix=suffix,
    )
    for rows, part in group.by_queries(most):
        _put_output(out, part, _attend_queries(lanes, rows, part, kept, how, masks))


def _attend_queries(
    lanes: _GroupLanes,
    rows: slice,
    group: AttentionGroup,
    kept: CachedAttention,
    how: AttentionMethod,
    masks: GroupMasks,
) -> Tensor:
    """Compute the output of some queries of a group.

    Returns:
        [lane, key-value head, head of that, row, query, d_head].
    """
    q, k, v = lanes.part(rows)
    if len(group.queries) < len(group.columns):
        chosen = group.queries.selection
        q = q[:, :, :, :, chosen] if isinstance(chosen, slice) else q.index_select(4, chosen)
    own, before = len(group.columns), lanes.old_keys.shape[2]
    if how.causal and how.work is None:  # no query sees later keys
        last = int(group.queries.host[-1])
        own = last + 1
        before = before if lanes.suffix else int(group.columns.host[last]) + 1
    k, v = k[:, :, :, :own], v[:, :, :, :own]
    mine = slice(before, None) if lanes.suffix else group.columns.device[:own]
    count = before + own if lanes.suffix else before
    old_keys, old_values = lanes.old_keys[:, :, :before], lanes.old_values[:, :, :before]
    scores = q.new_empty(*q.shape[:-1], count, dtype=how.kind)
    if before:
        flat = q.to(how.kind).reshape(*q.shape[:2], -1, q.shape[-1])
        scores[..., :before] = (flat @ old_keys.transpose(-1, -2)).view(*q.shape[:-1], before)
    scores[..., mine] = _score_own_keys(q.to(how.kind), k)
    if kept.distances is not None:
        at = group.columns.part(slice(0, own))
        queries = q.to(how.kind)
        _add_distances(scores, kept.distances, queries, k, old_keys, group, at.device, mine)
    scores *= how.scale
    if how.cap is not None:
        scores = scores.div_(how.cap).tanh_()  # whose derivative needs this result
        scores = scores.mul(how.cap) if scores.requires_grad else scores.mul_(how.cap)
    scores = apply_mask(scores, masks.of(group, kept.mask, count), how.shared)
    weights = _compute_weights(scores, group, how).to(v.dtype)
    values = _weigh_own_values(weights[..., mine], v)
    if before:
        old = weights[..., :before]
        if isinstance(mine, Tensor):
            old = old.index_fill(-1, mine, 0)
        flat = old.reshape(*q.shape[:2], -1, before)
        values += (flat @ old_values).view(values.shape)
    return values


def _select_group(tensor: Tensor, group: AttentionGroup) -> Tensor:
    """Return [lane, head, row, token, d_head] of [head, N, d_head]."""
    values = tensor[:, group.start : group.start + group.size]
    shape = (len(group.lanes), group.rows, len(group.columns))
    return values.unflatten(1, shape).permute(1, 0, 2, 3, 4)


def apply_mask(scores: Tensor, mask: Tensor | None, shared: int) -> Tensor:
    """Apply the model's mask [lane or 1, head or 1, query, key] to scores."""
    if mask is None:
        return scores
    if mask.shape[1] > 1:  # a separate mask for each head
        mask = mask.unflatten(1, (-1, shared))[:, :, :, None]
    else:
        mask = mask[:, :, None, None]
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, float("-inf"))
    if mask.dtype == scores.dtype:
        return scores.add_(mask)
    return scores + mask  # biases in a wider dtype than queries and keys


def _compute_weights(scores: Tensor, group: AttentionGroup, how: AttentionMethod) -> Tensor:
    """Return the softmax of scores, after reads and writes of scores and weights."""
    if how.work is None:
        return how.weights(scores, how.sink(scores))
    sink = how.work.scored(group, scores, how.sink(scores))
    return how.work.weighed(group, how.weights(scores, sink))


def _put_output(out: Tensor, group: AttentionGroup, output: Tensor) -> None:
    """Write [lane, key-value head, head of that, row, query, d_head] into [N, head, d_head]."""
    lanes, rows, own = len(group.lanes), group.rows, len(group.columns)
    output = output.permute(0, 3, 4, 1, 2, 5).reshape(
        lanes, rows, output.shape[4], out.shape[1], -1
    )
    target = out[group.start : group.start + group.size].view(lanes, rows, own, out.shape[1], -1)
    if len(group.queries) < own:
        target[:, :, group.queries.selection] = output
    else:
        target.copy_(output)


def attend_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    work: AttentionHooks,
    *,
    position_bias: Tensor | None = None,
    distances: DistanceScores | None = None,
    **arguments: Any,
) -> Tensor:
    """Compute attention of whole padded prompts with reads and writes within it.

    With fewer queries than keys, the queries are the last tokens.

    Args:
        query: [B, heads, T, d_head].
        key: [B, key-value heads, T or more, d_head].
        value: [B, key-value heads, T or more, d_head].
        work: Reads and writes within attention.
        position_bias: Summand of scores.
        distances: Summands of scores that depend on distance.
        arguments: Further arguments of the model's attention call.

    Returns:
        [B, T, heads, d_head].
    """
    lanes, heads, count, _ = query.shape
    mask = work.opened(expand_query_mask(mask, count), heads)
    before = key.shape[2] - count
    asking = np.arange(count)
    group = AttentionGroup(
        start=0,
        lanes=DeviceIndex.of(np.arange(lanes), query.device),
        rows=1,
        columns=DeviceIndex.of(asking + before, query.device),
        queries=DeviceIndex.of(asking, query.device),
        every=before == 0,
    )
    kept = CachedAttention(key, value, add_bias(mask, position_bias), distances)
    key, value = key[:, :, before:], value[:, :, before:]
    out = value.new_empty(lanes * count, heads, value.shape[-1])
    attend(
        query.transpose(0, 1).flatten(1, 2),
        key.transpose(0, 1).flatten(1, 2),
        value.transpose(0, 1).flatten(1, 2),
        [group],
        kept,
        out,
        masks=GroupMasks(),
        work=work,
        **arguments,
    )
    return out.unflatten(0, (lanes, count))


def attend_across(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    work: AttentionHooks | None,
    *,
    position_bias: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """Compute attention of a decoder to its encoder, or of a resampler to patches, with reads and
    writes within it.

    Args:
        query: [B, heads, T, d_head].
        key: [B, key-value heads, S, d_head].
        value: [B, key-value heads, S, d_head].
        mask: The model's mask of keys.
        work: Reads and writes within attention, if there are any.
        position_bias: Summand of scores.
        arguments: Further arguments of the model's attention call.

    Returns:
        [B, T, heads, d_head].
    """
    lanes, _, count, _ = query.shape
    flat = query.transpose(0, 1).flatten(1, 2), key.transpose(0, 1).flatten(1, 2)
    how = AttentionMethod.of(*flat, False, False, work, arguments)
    asking = np.arange(count)
    group = AttentionGroup(
        start=0,
        lanes=DeviceIndex.of(np.arange(lanes), query.device),
        rows=1,
        columns=DeviceIndex.of(asking, query.device),
        queries=DeviceIndex.of(asking, query.device),
    )
    if work is not None:
        work.prepared(lanes * count, query.shape[1], value)
    asked = query.to(how.kind).unflatten(1, (-1, how.shared))[:, :, :, None]
    scores = asked @ key.to(how.kind)[:, :, None, None].transpose(-1, -2) * how.scale
    if how.cap is not None:
        scores = scores.div(how.cap).tanh().mul(how.cap)
    seen = add_bias(expand_query_mask(mask, count), position_bias)
    scores = apply_mask(scores, seen, how.shared)
    weights = _compute_weights(scores, group, how).to(value.dtype)
    attended = (weights @ value[:, :, None, None])[:, :, :, 0]
    return attended.flatten(1, 2).transpose(1, 2)


def attend_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    work: AttentionHooks,
    **arguments: Any,
) -> Tensor:
    """Compute attention of patches within tiles or windows, with reads and writes within it.

    A layer may call it several times, for consecutive tokens of the encoder.

    Args:
        query: [tile, heads, T, d_head]; patches of one tile see each other.
        key: [tile, key-value heads, T, d_head].
        value: [tile, key-value heads, T, d_head].
        mask: The model's mask.
        work: Reads and writes within attention.
        arguments: Further arguments of the model's attention call.

    Returns:
        [tile, T, heads, d_head].
    """
    (tiles, heads, size, _), count = query.shape, work.width
    query, key = (
        work.turned(site, each.transpose(0, 1).flatten(1, 2)).unflatten(1, (tiles, size))
        for site, each in (("q_rot", query), ("k_rot", key))
    )
    how = AttentionMethod.of(query.flatten(1, 2), key.flatten(1, 2), False, False, work, arguments)
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    mask = expand_query_mask(mask, size)
    if not work.passed:
        work.prepared(len(work.starts) * count, heads, value)
    queries = DeviceIndex.of(np.arange(size), query.device)
    most = max(1, get_max_scores(query.device) // (heads * size))
    outputs: list[Tensor] = []
    for tile in range(tiles):
        lane, first = divmod(work.passed, count)
        if first + size > count or lane >= len(work.starts):
            raise WriteMismatch("a tile has patches of several images")
        group = AttentionGroup(
            start=work.passed,
            lanes=DeviceIndex.of(np.array([lane]), query.device),
            rows=1,
            columns=DeviceIndex.of(np.arange(first, first + size), query.device),
            queries=queries,
            every=True,
        )
        own = slice(tile, tile + 1)
        given = query[own], key[own], value[own]
        here = mask[own] if isinstance(mask, Tensor) and len(mask) > 1 else mask
        parts = [_attend_in_tile(*given, here, part, how) for _, part in group.by_queries(most)]
        outputs.append(torch.cat(parts, dim=2))
        work.passed += size
    return torch.cat(outputs).transpose(1, 2)


def attend_across_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    work: AttentionHooks,
    *,
    ends: Sequence[int] | None,
    **arguments: Any,
) -> Tensor:
    """Compute attention as `attend_tiles`, with keys that are allowed in other tiles of an image.

    Args:
        query: [tile, heads, T, d_head]; with `ends`, [1, heads, T of all windows, d_head].
        key: [tile, key-value heads, T, d_head].
        value: [tile, key-value heads, T, d_head].
        mask: The model's mask.
        work: Reads and writes within attention.
        ends: As in `join_windows`; None if each row is a tile.
        arguments: Further arguments of the model's attention call.

    Returns:
        [tile, T, heads, d_head].
    """
    tiles, _, size, _ = query.shape
    lanes, count = len(work.starts), work.width
    bounds = range(0, (tiles + 1) * size, size) if ends is None else ends
    sees = find_visibility(mask) if isinstance(mask, Tensor) else query.new_ones(1, 1, 1, 1) > 0
    seen = sees.new_zeros(lanes, sees.shape[1], count, count)
    for tile, (first, last) in enumerate(pairwise(bounds)):
        lane, start = divmod(first, count)
        own = slice(start, start + last - first)
        if own.stop > count or lane >= lanes:
            raise WriteMismatch("a tile has patches of several images")
        seen[lane, :, own, own] = sees[tile % len(sees)]

    def join(given: Tensor) -> Tensor:
        return given.transpose(0, 1).flatten(1, 2).unflatten(1, (lanes, count)).transpose(0, 1)

    across_tiles = attend_full(join(query), join(key), join(value), seen, work, **arguments)
    work.passed = lanes * count
    return across_tiles.flatten(0, 1).unflatten(0, (tiles, size))


_WINDOW_ENDS = "cu_seqlens"
"""Argument of attention modules that call the attention function for each window or frame: [n + 1],
where each of them begins, and the end."""


@contextmanager
def join_windows(
    model: LoadedModel, places: Iterable[tuple[str, int]]
) -> Generator[Mapping[tuple[str, int], Sequence[int]]]:
    """Let layers of encoders call the attention function once for all windows or frames.

    Args:
        model: The model.
        places: The stacks and layers.

    Yields:
        By stack and layer, the first token of each window, and the number of tokens; filled when
        the layer runs. Layers that read tiles as rows of a batch are left out.
    """
    windows: dict[tuple[str, int], Sequence[int]] = {}

    def join(
        place: tuple[str, int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        ends: Tensor | None = kwargs.get(_WINDOW_ENDS)
        if ends is None:
            return None
        windows[place] = ends.tolist()
        return args, {**kwargs, _WINDOW_ENDS: ends[[0, -1]]}

    with ExitStack() as stack:
        for name, layer in places:
            paths = model.stack(name).anatomy.blocks[layer].projections
            for path in {path.rpartition(".")[0] for path in paths}:
                module, hook = model.module.get_submodule(path), partial(join, (name, layer))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield windows


def _attend_in_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    group: AttentionGroup,
    how: AttentionMethod,
) -> Tensor:
    """Return [1, heads, query, d_head]: the output of some queries of one tile.

    Args:
        query: [1, heads, T, d_head] of all patches of the tile.
        key: [1, key-value heads, T, d_head].
        value: [1, key-value heads, T, d_head].
        mask: [1, heads or 1, T, T].
        group: The queries.
        how: Parameters of attention.
    """
    chosen = group.queries.selection
    asked = query[:, :, chosen].to(how.kind).unflatten(1, (-1, how.shared))[:, :, :, None]
    scores = asked @ key.to(how.kind)[:, :, None, None].transpose(-1, -2) * how.scale
    if how.cap is not None:
        scores = scores.div(how.cap).tanh().mul(how.cap)
    scores = apply_mask(scores, None if mask is None else mask[:, :, chosen], how.shared)
    weights = _compute_weights(scores, group, how).to(value.dtype)
    return (weights @ value[:, :, None, None])[:, :, :, 0].flatten(1, 2)


def _add_distances(
    scores: Tensor,
    distances: DistanceScores,
    q: Tensor,
    k: Tensor,
    old_keys: Tensor,
    group: AttentionGroup,
    tensor: Tensor,
    mine: slice | Tensor,
) -> None:
    """Add distance terms to scores [lane, head, 1, row, query, key].

    q is [lane, head, 1, row, query, d_head]; stored keys are [lane, head, key, d_head], own keys
    [lane, head, row, key, d_head].

    Args:
        tensor: Columns of the rows' own keys.
        mine: Their indices among all keys.
    """
    q, added = q.squeeze(2), torch.zeros_like(scores).squeeze(2)
    at, before = group.columns.device[group.queries.device], old_keys.shape[2]
    if before:
        every = torch.arange(before, device=q.device)
        added[..., :before] = distances.scores(q, old_keys[:, :, None], at, every)
    added[..., mine] = distances.scores(q, k, at, tensor)
    scores += added.unsqueeze(2)


def _score_own_keys(q: Tensor, k: Tensor) -> Tensor:
    """Return [lane, kv head, shared, row, query, own] scores.

    q is [lane, kv, shared, row, query, d]; k is [lane, kv, row, own, d].
    """
    if q.shape[4] == 1 == k.shape[3]:  # a matrix product of this size is mostly overhead
        return (q * k[:, :, None]).sum(-1, keepdim=True)
    return q @ k[:, :, None].transpose(-1, -2)


def _weigh_own_values(weights: Tensor, v: Tensor) -> Tensor:
    """Return [lane, kv head, shared, row, query, d]: the values weighted by attention."""
    if weights.shape[5] == 1:
        return weights * v[:, :, None]
    return weights @ v[:, :, None]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Arguments of a call to a block's attention."""

    layer: int
    """Index of the running block; -1 before the first one."""
    across: bool
    """Whether a decoder attends to its encoder."""
    place: tuple[str, int]
    """The stack of the attention, empty for the main one, and the layer in it."""
    module: nn.Module
    query: Tensor
    """[B, heads, T, d_head]; keys and values [B, key-value heads, T, d_head]."""
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]
    """Further arguments, by name."""
    implementations: Mapping[int, str]
    """Attention implementations of the model, by config id."""

    def own_function(self) -> AttentionFunction:
        """Return the module's own attention function. Raises CannotPack if it is unknown."""
        return get_own_attention(self.module, self.implementations)

    def unchanged(self) -> tuple[Tensor, Tensor | None]:
        """Return output and weights of the model's own attention.

        Weights are None if queries are split because of the number of scores.

        Raises:
            CannotPack: The function is unknown.
        """
        function, mask, arguments = self.own_function(), self.mask, self.arguments
        rows, heads, count, _ = self.query.shape
        together = max(1, get_max_scores(self.query.device) // (rows * heads * self.key.shape[2]))
        if together >= count or not isinstance(mask, Tensor) or arguments.get("distances"):
            return function(self.module, self.query, self.key, self.value, mask, **arguments)
        outputs = [
            self._of_queries(function, slice(first, min(first + together, count)))
            for first in range(0, count, together)
        ]
        return torch.cat(outputs, dim=1), None

    def _of_queries(self, function: AttentionFunction, part: slice) -> Tensor:
        """Return the output [B, part, heads, d_head] of some queries.

        Keys later than these queries are left out if none of them is visible.
        """
        keys = self.key.shape[2]
        end = keys - self.query.shape[2] + part.stop
        mask = expand_query_mask(self.mask, self.query.shape[2])[:, :, part]
        if bool(find_visible_keys(mask[..., end:]).any()):
            end = keys
        bias = self.arguments.get("position_bias")
        arguments = self.arguments
        if bias is not None:
            arguments = arguments | {"position_bias": bias[:, :, part, :end]}
        key, value = self.key[:, :, :end], self.value[:, :, :end]
        query = self.query[:, :, part]
        return function(self.module, query, key, value, mask[..., :end], **arguments)[0]


@contextmanager
def replace_block_attention(
    model: LoadedModel,
    attention: Callable[[AttentionCall], tuple[Tensor, Tensor | None]],
    *,
    masked: bool,
    sees_all: Callable[[], bool] | None = None,
) -> Generator[None]:
    """Replace the model's attention; `masked` and `sees_all` are those of `exchange_attention`."""
    block_attentions, crossing = list_implementations(model), find_cross_attention(model)
    encoding = find_encoder_attention(model)

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        across, layer = id(module) in crossing, running()
        place = "cross" if across else "", layer
        where = layer, across, encoding.get(id(module), place), module
        return attention(
            AttentionCall(*where, query, key, value, attention_mask, kwargs, block_attentions)
        )

    exchanged = exchange_attention(model, function, masked=masked, sees_all=sees_all)
    with _track_block(model) as running, exchanged:
        yield


@contextmanager
def _track_block(model: LoadedModel) -> Generator[Callable[[], int]]:
    """Track the index of the running block for attention; -1 before the first block."""
    running = -1

    def enters(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal running
            running = layer

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(model.anatomy.blocks):
            module = model.module.get_submodule(block.path)
            stack.callback(module.register_forward_pre_hook(enters(layer)).remove)
        yield lambda: running
