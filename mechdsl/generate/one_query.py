# pyright: reportUnknownMemberType=false
"""Attention of one token of each row, by plain products on what is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mechdsl.generate.kept_keys import WIDE, KeptKeys
from mechdsl.hooks.attention_functions import (
    AttentionWay,
    CannotPack,
    implementations,
    masked,
)
from mechdsl.hooks.block_attention import AttentionCall
from mechdsl.hooks.loaded import LoadedModel

_WRITTEN_OUT = {"eager", "sdpa"}
"""Ways of attention whose masks can be had in full."""


def can_be_asked(model: LoadedModel) -> bool:
    """Whether a model's attention of one query can be computed here: in 16 bits its own rounds in
    other places."""
    return model.dtype in WIDE and set(implementations(model).values()) <= _WRITTEN_OUT


class OneQuery:
    """In all blocks of one pass."""

    def __init__(self, kept: KeptKeys) -> None:
        self.kept = kept
        self._bare: dict[int, bool] = {}
        """Masks of the pass: whether they hide nothing, by where they lie. Of the first rows they
        hide something where they do of all: each prompt has a row among these."""

    def attend(self, call: AttentionCall) -> Tensor | None:
        """[n, 1, heads, d_head] of what attention is called with, which is kept; None where it does
        what isn't known."""
        query, arguments = call.query, dict(call.arguments)
        more = [arguments.get(name) for name in ("distances", "position_bias")]
        if query.dtype not in WIDE or call.across or any(each is not None for each in more):
            return None
        rows, heads, count, width = call.key.shape
        try:
            call.own_function()
            how = AttentionWay.of(query[0], call.key[0], True, {}, False, None, arguments)
        except CannotPack:
            return None
        queries = query.reshape(rows, heads, how.shared, width) * how.scale
        scores = self._scores(call.layer, queries, count)
        if how.cap is not None:
            scores = (scores / how.cap).tanh() * how.cap
        mask = self._seen(call.mask)
        scores = masked(scores[:, :, :, None, None], mask, how.shared)
        weights = how.weights(scores, how.sink(scores)).to(call.value.dtype)
        found = self._values(call.layer, weights[:, :, :, 0, 0])
        return found.view(rows, 1, heads * how.shared, -1)

    def _scores(self, layer: int, queries: Tensor, count: int) -> Tensor:
        """[n, key-value heads, head of it, key] of queries [n, key-value heads, head of it,
        width]."""
        shared, common = self.kept.shared, self.kept.common
        own = (queries @ self.kept.own(layer)[0].transpose(-1, -2))[..., : count - common]
        if shared is None:
            return own
        before = shared.scores(layer, self.kept.rows_of(layer), queries)
        return torch.cat([before, own], dim=-1)

    def _values(self, layer: int, weights: Tensor) -> Tensor:
        """[n, key-value heads, head of it, width] of weights [n, key-value heads, head of it,
        key]."""
        shared, common = self.kept.shared, self.kept.common
        values = self.kept.own(layer)[1]
        room = values.shape[2] + common - weights.shape[3]
        own = nn.functional.pad(weights[..., common:], (0, room)) @ values
        if shared is None:
            return own
        before = shared.values(layer, self.kept.rows_of(layer), weights[..., :common])
        return own.add_(before)

    def _seen(self, mask: Tensor | None) -> Tensor | None:
        """None for a mask that hides nothing."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        place = mask.data_ptr()
        if place not in self._bare:
            self._bare[place] = bool(mask.all())
        return None if self._bare[place] else mask
