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
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.loaded import LoadedModel

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, **kwargs), as the model library calls it, to an output
[B, T, heads, d_head] and weights. Query, key and value are [B, heads, T, d_head]."""

_NAME = "mechdsl"
_NO_MATTER = frozenset(
    {
        "dropout",  # eval mode
        "sliding_window",  # in the mask already
        "is_causal",
        "position_ids",
        "output_attentions",
        "output_router_logits",
        "use_cache",
        "cache_position",
        "attention_chunk_size",
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

    def part(self, lanes: slice) -> KeptAttention:
        """Of some lanes."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[lanes]
        return KeptAttention(self.keys[lanes], self.values[lanes], mask)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows whose tokens lie in the same columns, equally many on each lane; tokens of a group lie
    side by side, by lane, row and column."""

    start: int
    """Its first token in the pack."""
    lanes: Tensor
    """[lane]"""
    rows: int
    """Rows on each lane."""
    columns: Tensor
    """[own]: columns of a row's own tokens."""
    queries: Tensor
    """[query]: which of the own tokens attend."""

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.lanes) * self.rows * len(self.columns)


@contextmanager
def exchanged(model: LoadedModel, function: AttentionFunction, *, masked: bool) -> Generator[None]:
    """The model attends with `function`; masks are written out if `masked`, else not made."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    configs = _configs(model.module)
    before = [config._attn_implementation for config in configs]
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(before[0] if before else "eager")

    def mask(*args: Any, **kwargs: Any) -> Any:
        if not masked or make is None:
            return None
        return make(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register(_NAME, function)
    AttentionMaskInterface.register(_NAME, mask)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _configs(module: nn.Module) -> list[Any]:
    """The distinct configs that modules read their attention function from."""
    found: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def own_function(module: nn.Module, implementation: str) -> AttentionFunction:
    """The function that the module would attend with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    if implementation != "eager":  # masks of other kernels aren't written out
        raise CannotPack(f"its attention is `{implementation}`")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise CannotPack("its attention isn't the library's")
    return eager


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    kept: KeptAttention,
    out: Tensor,
    *,
    masks: dict[object, Tensor | None],
    **arguments: Any,
) -> None:
    """Attention of packed tokens, written to `out`; tokens that don't attend stay as they are.

    query: [heads, N, d_head]; key, value: [key-value heads, N, d_head]; out: [N, heads, d_head].
    masks: those of groups, kept from block to block. arguments: as the model calls attention.
    """
    scaling = arguments.pop("scaling", None)
    cap = arguments.pop("softcap", None)
    sinks = arguments.pop("s_aux", None)
    unknown = [n for n, v in arguments.items() if v is not None and n not in _NO_MATTER]
    if unknown:
        raise CannotPack(f"its attention takes `{unknown[0]}`")
    heads, _, width = query.shape
    scale = float(width**-0.5 if scaling is None else scaling)
    shared = heads // key.shape[0]
    for group in groups:
        own, asking = len(group.columns), len(group.queries)
        if not asking:
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
        # Own tokens from one column on: nothing behind them is seen, so no kept key there is read.
        suffix = int(group.columns[-1]) - first + 1 == own
        before = first if suffix else kept.keys.shape[2]
        old_keys = kept.keys[group.lanes, :, :before]
        old_values = kept.values[group.lanes, :, :before]
        flat = q.reshape(lanes, q.shape[1], shared * rows * asking, width)
        shape = (lanes, q.shape[1], shared, rows, asking)
        scores = query.new_empty(*shape, before + own if suffix else before)
        if before:
            old = flat @ old_keys.transpose(-1, -2)
            scores[..., :before] = old.view(*shape, before)
        mine = slice(before, None) if suffix else group.columns
        scores[..., mine] = _own_scores(q, k)
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
            else:
                scores += mask
        wide = torch.float32 if scores.element_size() < 4 else scores.dtype
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, -1, shared, 1, 1, 1).expand(*shape, 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=wide)[..., :-1]
        else:
            weights = scores.softmax(-1, dtype=wide)
        weights = weights.to(value.dtype)
        found = _own_values(weights[..., mine], v)
        if before:
            old = weights[..., :before]
            if not suffix:
                old = old.clone()
                old[..., mine] = 0
            old = old.reshape(lanes, q.shape[1], shared * rows * asking, before)
            found += (old @ old_values).view(*shape, width)
        # back to [lane, row, token, head, d_head]
        found = found.permute(0, 3, 4, 1, 2, 5).reshape(lanes, rows, asking, heads, width)
        target = out[span].view(lanes, rows, own, heads, width)
        if asking < own:
            target[:, :, group.queries] = found
        else:
            target.copy_(found)


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
    )
    if key not in masks:
        mask = kept.mask[group.lanes] if kept.mask.shape[0] > 1 else kept.mask
        mask = mask[:, :, columns]
        if before is not None:
            mask = mask[..., : before + len(group.columns)]
        bare = bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())
        masks[key] = None if bare else mask
    return masks[key]
