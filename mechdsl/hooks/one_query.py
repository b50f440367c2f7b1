# pyright: reportUnknownMemberType=false
"""Attention of one token of each row, by two products on keys and values that lie side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mechdsl.hooks.attention_functions import AttentionWay, CannotPack, biased, masked
from mechdsl.hooks.block_attention import AttentionCall

_WIDE = (torch.float32, torch.float64)


class OneQuery:
    """In all blocks of one pass."""

    def __init__(self) -> None:
        self._bare: dict[int, bool] = {}
        """Masks of the pass that hide nothing, by where they lie."""

    def attend(self, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor | None:
        """[B, 1, heads, d_head] of what attention is called with; None where it does what isn't
        known.

        keys, values: [B, key-value heads, T or more, width], what the call has, and room behind.
        """
        query, arguments = call.query, dict(call.arguments)
        if query.dtype not in _WIDE or call.across or arguments.get("distances") is not None:
            return None
        try:
            call.own_function()
            bias = arguments.get("position_bias")
            how = AttentionWay.of(query[0], keys[0], True, {}, False, None, arguments)
        except CannotPack:
            return None
        lanes, heads, count, width = call.key.shape
        room = keys.shape[2]
        # [lane and key-value head, head of it, …]
        asked = query.reshape(lanes * heads, how.shared, width)
        every = keys.reshape(lanes * heads, room, width).transpose(1, 2)
        none = asked.new_empty(())
        scores = torch.baddbmm(none, asked, every, beta=0, alpha=how.scale)[..., :count]
        if how.cap is not None:
            scores = (scores / how.cap).tanh() * how.cap
        mask = self._seen(biased(call.mask, bias))
        scores = masked(scores.view(lanes, heads, how.shared, 1, 1, count), mask, how.shared)
        weights = how.weights(scores, how.sink(scores)).to(values.dtype)
        weights = nn.functional.pad(weights, (0, room - count))
        weights = weights.reshape(lanes * heads, how.shared, room)
        found = torch.bmm(weights, values.reshape(lanes * heads, room, -1))
        return found.view(lanes, 1, heads * how.shared, -1)

    def _seen(self, mask: Tensor | None) -> Tensor | None:
        """None for a mask that hides nothing."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        place = mask.data_ptr()
        if place not in self._bare:
            self._bare[place] = bool(mask.all())
        return None if self._bare[place] else mask
