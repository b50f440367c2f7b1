# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Attention of tokens that are packed without padding, on keys and values that were kept.

The model library lets the attention function be exchanged. Two are put in here: one that keeps what
attention reads and returns while it does what it always does, and one for packed rows. Masks are
always those that the model makes for whole prompts, so windows, chunks and biases by position are
the model's; everything before and behind attention is the model's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.attention_modules import (
    AttentionFunction,
    Distances,
    entry_of,
    exchanged_modules,
    plain,
)
from mechdsl.hooks.inside_attention import Group, LayerWork
from mechdsl.hooks.loaded import LoadedModel

_NAME = "mechdsl"
_NO_MATTER = frozenset(
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
    }
)
"""Arguments of attention functions that change nothing where the mask is written out."""


class CannotPack(Exception):
    """The model's attention does something that packed rows can't."""


@dataclass(frozen=True, eq=False)
class KeptAttention:
    """What one block's attention had on the unpatched prompts."""

    keys: Tensor
    """[lane, key-value heads, T, d_head], after rotary."""
    values: Tensor
    mask: Tensor | None
    """[lane or 1, heads or 1, T, T]: true where a query sees a key, or what is added to its score;
    None where every token sees every other."""

    distances: Distances | None = None
    """What is added to scores besides."""

    def part(self, lanes: slice) -> KeptAttention:
        """Of some lanes."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[lanes]
        return KeptAttention(self.keys[lanes], self.values[lanes], mask, self.distances)


@contextmanager
def exchanged(model: LoadedModel, function: AttentionFunction, *, masked: bool) -> Generator[None]:
    """The model attends with `function`; masks are written out if `masked`, else not made."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    configs = _configs(model.module)
    before = implementations(model)
    own = next(iter(before.values()), "eager")

    def attended(part: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        way = before.get(id(getattr(part, "config", None)), own)
        if way == "sdpa":
            kwargs.pop("softcap", None)  # older libraries pass it over there
        if not masked:
            kwargs["rounds_scores"] = way == "eager"
        return function(part, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(before.get(id(kwargs.get("config")), own))
        if not masked or make is None:
            return unmade
        return make(*args, **{**kwargs, "allow_is_causal_skip": False})

    with ExitStack() as stack:
        written_out = stack.enter_context(
            exchanged_modules(model.module, function, own, masked=masked)
        )
        # Some of these models look into a mask that is never used.
        unmade = torch.zeros(1, 1, 1, 1, device=model.device) if written_out else None
        AttentionInterface.register(_NAME, attended)
        AttentionMaskInterface.register(_NAME, mask)
        for config in configs:
            name = before[id(config)]
            stack.callback(setattr, config, "_attn_implementation_internal", name)
            config._attn_implementation_internal = _NAME
        yield


def _configs(module: nn.Module) -> list[Any]:
    """The distinct configs that modules read their attention function from."""
    found: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def implementations(model: LoadedModel) -> dict[int, str]:
    """How modules attend, by their config's id: an image encoder otherwise than the text, say."""
    return {id(config): config._attn_implementation for config in _configs(model.module)}


def cross_modules(model: LoadedModel) -> frozenset[int]:
    """Ids of the modules by which a decoder attends to an encoder."""
    if "cross" not in model.others:
        return frozenset()
    blocks = model.stack("cross").anatomy.blocks
    paths = {path.rpartition(".")[0] for block in blocks for path in block.projections}
    return frozenset(id(model.module.get_submodule(path)) for path in paths)


def own_function(module: nn.Module, own: Mapping[int, str]) -> AttentionFunction:
    """The function that the module would attend with; own: `implementations` before an exchange."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if entry_of(module) is not None:
        return plain
    first = next(iter(own.values()), "eager")
    implementation = own.get(id(getattr(module, "config", None)), first)
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation != "eager":  # masks of other kernels aren't written out
        raise CannotPack(f"its attention is `{implementation}`")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CannotPack("its attention isn't the library's")
    return eager


def of_queries(mask: Any, count: int) -> Any:
    """A mask with a row for each of `count` queries, where it has one of keys alone."""
    if isinstance(mask, Tensor) and mask.shape[-2] == 1:
        return mask.expand(*mask.shape[:-2], count, -1)
    return mask


def biased(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask with what is added to scores besides."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    kept: KeptAttention,
    out: Tensor,
    *,
    causal: bool = True,
    masks: dict[object, Tensor | None],
    rounds_scores: bool = False,
    work: LayerWork | None = None,
    **arguments: Any,
) -> None:
    """Attention of packed tokens, written to `out`; tokens that don't attend stay as they are.

    query: [heads, N, d_head]; key, value: [key-value heads, N, d_head]; out: [N, heads, d_head].
    causal: no token sees a later one. masks: those of groups, kept from block to block.
    rounds_scores: they are kept in the type of queries, as eager attention does; in 16 bits they
    lose what tells keys apart where all have something large in common. work: what is read and
    written within attention. arguments: as the model calls attention.
    """
    scaling = arguments.pop("scaling", None)
    cap = arguments.pop("softcap", None)
    sinks = arguments.pop("s_aux", None)
    for kept_already in ("distances", "position_bias"):  # those of whole prompts
        arguments.pop(kept_already, None)
    unknown = [n for n, v in arguments.items() if v is not None and n not in _NO_MATTER]
    if unknown:
        raise CannotPack(f"its attention takes `{unknown[0]}`")
    heads, _, width = query.shape
    scale = float(width**-0.5 if scaling is None else scaling)
    wide = torch.promote_types(query.dtype, torch.float32)
    kind = query.dtype if rounds_scores else wide
    shared = heads // key.shape[0]
    if work is not None:
        query, key = work.turned("q_rot", query), work.turned("k_rot", key)
        work.prepared(query.shape[1], heads, value)
    for group in groups:
        own, asking = len(group.columns), len(group.queries)
        if not asking:
            if work is not None:
                work.unseen(group)
            continue
        lanes, rows = len(group.lanes), group.rows
        span = slice(group.start, group.start + group.size)
        # [lane, key-value head, head of it, row, token, d_head]
        q = query[:, span].unflatten(1, (lanes, rows, own)).unflatten(0, (-1, shared))
        q = q.permute(2, 0, 1, 3, 4, 5)
        k = key[:, span].unflatten(1, (lanes, rows, own)).permute(1, 0, 2, 3, 4)
        v = value[:, span].unflatten(1, (lanes, rows, own)).permute(1, 0, 2, 3, 4)
        if asking < own:
            q = q.index_select(4, group.queries)
        first = int(group.columns[0])
        # Own tokens from one column on: nothing behind them is seen, so no kept key there is read;
        # and none at all where the own ones are all that there are.
        suffix = group.every or (causal and int(group.columns[-1]) - first + 1 == own)
        before = kept.keys.shape[2] if not suffix else 0 if group.every else first
        old_keys = kept.keys[group.lanes, :, :before]
        old_values = kept.values[group.lanes, :, :before]
        flat = q.reshape(lanes, q.shape[1], shared * rows * asking, width)
        shape = (lanes, q.shape[1], shared, rows, asking)
        scores = query.new_empty(*shape, before + own if suffix else before, dtype=kind)
        if before:
            old = flat.to(kind) @ old_keys.to(kind).transpose(-1, -2)
            scores[..., :before] = old.view(*shape, before)
        mine = slice(before, None) if suffix else group.columns
        scores[..., mine] = _own_scores(q.to(kind), k.to(kind))
        if kept.distances is not None:
            _add_distances(scores, kept.distances, q, k, old_keys, group, mine)
        scores *= scale
        if cap is not None:
            scores = (scores / cap).tanh() * cap
        mask = _mask(group, kept, before if suffix else None, masks)
        if mask is not None:
            if mask.shape[1] > 1:  # a mask of its own for each head
                mask = mask.unflatten(1, (-1, shared))
                mask = mask[:, :, :, None]
            else:
                mask = mask[:, :, None, None]
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, float("-inf"))
            elif mask.dtype == scores.dtype:
                scores += mask
            else:  # biases in a wider type than queries and keys
                scores = scores + mask
        sink = None
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, -1, shared, 1, 1, 1).expand(*shape, 1)
        if work is not None:
            sink = work.scored(group, scores, sink)
        if sink is not None:
            weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=wide)[..., :-1]
        else:
            weights = scores.softmax(-1, dtype=wide)
        if work is not None:
            weights = work.weighed(group, weights)
        weights = weights.to(value.dtype)
        found = _own_values(weights[..., mine], v)
        if before:
            old = weights[..., :before]
            if not suffix:
                old = old.clone()
                old[..., mine] = 0
            old = old.reshape(lanes, q.shape[1], shared * rows * asking, before)
            found += (old @ old_values).view(*shape, value.shape[-1])
        # back to [lane, row, token, head, d_head]
        found = found.permute(0, 3, 4, 1, 2, 5).reshape(lanes, rows, asking, heads, -1)
        target = out[span].view(lanes, rows, own, heads, -1)
        if asking < own:
            target[:, :, group.queries] = found
        else:
            target.copy_(found)


def attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    work: LayerWork,
    *,
    position_bias: Tensor | None = None,
    distances: Distances | None = None,
    **arguments: Any,
) -> Tensor:
    """Attention of whole padded prompts, [B, T, heads, d_head], with what is read and written
    within it.

    query: [B, heads, T, d_head]; key, value: [B, key-value heads, T, d_head]. mask: written out.
    """
    lanes, heads, count, _ = query.shape
    mask = of_queries(mask, count)
    every = torch.arange(count, device=query.device)
    group = Group(0, torch.arange(lanes, device=query.device), 1, every, every, every=True)
    kept = KeptAttention(key, value, biased(mask, position_bias), distances)
    out = value.new_empty(lanes * count, heads, value.shape[-1])
    attend(
        query.transpose(0, 1).flatten(1, 2),
        key.transpose(0, 1).flatten(1, 2),
        value.transpose(0, 1).flatten(1, 2),
        [group],
        kept,
        out,
        masks={},
        work=work,
        **arguments,
    )
    return out.unflatten(0, (lanes, count))


def _add_distances(
    scores: Tensor,
    distances: Distances,
    q: Tensor,
    k: Tensor,
    old_keys: Tensor,
    group: Group,
    mine: slice | Tensor,
) -> None:
    """To scores [lane, head, 1, row, query, key] of q [lane, head, 1, row, query, d_head] with
    kept keys [lane, head, key, d_head] and the rows' own [lane, head, row, key, d_head]."""
    q, added = q.squeeze(2), torch.zeros_like(scores).squeeze(2)
    at, before = group.columns[group.queries], old_keys.shape[2]
    if before:
        every = torch.arange(before, device=q.device)
        added[..., :before] = distances.scores(q, old_keys[:, :, None], at, every)
    added[..., mine] = distances.scores(q, k, at, group.columns).to(added.dtype)
    scores += added.unsqueeze(2)


def _own_scores(q: Tensor, k: Tensor) -> Tensor:
    """[lane, kv head, shared, row, query, own] of q [lane, kv, shared, row, query, d] and
    k [lane, kv, row, own, d]."""
    if q.shape[4] == 1 == k.shape[3]:  # small products cost more than they do
        return (q * k[:, :, None]).sum(-1, keepdim=True)
    return q @ k[:, :, None].transpose(-1, -2)


def _own_values(weights: Tensor, v: Tensor) -> Tensor:
    """[lane, kv head, shared, row, query, d]."""
    if weights.shape[5] == 1:
        return weights * v[:, :, None]
    return weights @ v[:, :, None]


def _mask(
    group: Group, kept: KeptAttention, before: int | None, masks: dict[object, Tensor | None]
) -> Tensor | None:
    """[lane or 1, head or 1, query, key] of a group's queries; None where they see all keys."""
    if kept.mask is None:
        return None
    columns = group.columns[group.queries]
    key = (
        kept.mask.data_ptr(),  # blocks share it, cut anew for each
        before,
        tuple(group.lanes.tolist()) if kept.mask.shape[0] > 1 else (),
        tuple(columns.tolist()),
        len(group.columns),
        group.every,
    )
    if key not in masks:
        mask = kept.mask if before is None else kept.mask[..., : before + len(group.columns)]
        if group.every:
            mask = kept.mask.index_select(-1, group.columns)
        if mask.shape[0] > 1:  # at once: masks of all heads are large
            mask = mask[group.lanes[:, None], :, columns].transpose(1, 2).contiguous()
        else:
            mask = mask[:, :, columns]
        bare = bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
        masks[key] = None if bare else mask
    return masks[key]
