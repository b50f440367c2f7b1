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
    """In all blocks, pass by pass."""

    def __init__(self, kept: KeptKeys) -> None:
        self.kept = kept
        self._masks: dict[tuple[int, torch.Size] | None, tuple[Tensor | None, Tensor]] = {}
        """Masks of the pass, by where they lie, and what they add to scores. They are held, so that
        no other one comes to lie there."""

    def begin(self) -> None:
        """Of another pass."""
        self._masks.clear()

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
            how = AttentionWay.of(query[0], call.key[0], True, False, None, arguments)
        except CannotPack:
            return None
        queries = query.reshape(rows, heads, how.shared, width) * how.scale
        scores = self._scores(call.layer, queries)
        if how.cap is not None:
            scores = (scores / how.cap).tanh() * how.cap
        mask = self._added(call.mask, scores, count)
        scores = masked(scores[:, :, :, None, None], mask, how.shared)
        weights = how.weights(scores, how.sink(scores)).to(call.value.dtype)
        found = self._values(call.layer, weights[:, :, :, 0, 0])
        return found.view(rows, 1, heads * how.shared, -1)

    def _scores(self, layer: int, queries: Tensor) -> Tensor:
        """[n, key-value heads, head of it, key] of queries [n, key-value heads, head of it,
        width], with the keys that there is room for."""
        own = queries @ self.kept.own(layer)[0].transpose(-1, -2)
        if self.kept.shared is None:
            return own
        before = self.kept.shared.scores(layer, self.kept.rows_of(layer), queries)
        return torch.cat([before, own], dim=-1)

    def _values(self, layer: int, weights: Tensor) -> Tensor:
        """[n, key-value heads, head of it, width] of weights [n, key-value heads, head of it,
        key]."""
        shared, common = self.kept.shared, self.kept.common
        own = weights[..., common:] @ self.kept.own(layer)[1]
        if shared is None:
            return own
        return own.add_(shared.values(layer, self.kept.rows_of(layer), weights[..., :common]))

    def _added(self, mask: Tensor | None, scores: Tensor, count: int) -> Tensor:
        """[n or 1, heads or 1, 1, key] what a mask adds to scores, and that nothing is seen from
        key `count` on."""
        key = None if mask is None else (mask.data_ptr(), mask.shape)
        if key not in self._masks:
            added = scores.new_zeros(1, 1, 1, count) if mask is None else mask
            if added.dtype == torch.bool:
                added = torch.where(added, scores.new_zeros(()), float("-inf"))
            room = scores.shape[-1] - count
            self._masks[key] = mask, nn.functional.pad(added, (0, room), value=float("-inf"))
        return self._masks[key][1]
