# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""How attention that a module has written out is exchanged.

The modules are in `written_out_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.hook_points import at_hand, replaced

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, **kwargs), as the model library calls it, to an output
[B, T, heads, d_head] and weights. Query, key and value are [B, heads, T, d_head]."""


class Exchange:
    """What the modules attend with during one pass, and the masks that they share."""

    def __init__(self, function: AttentionFunction, own: str, *, masked: bool) -> None:
        self.attend = function
        self.own = own
        """How the model attends by itself: `eager` or `sdpa`."""
        self.masked = masked
        self.positions: Tensor | None = None
        """[B, T] of the block that runs, where attention has to know them."""
        self._masks: dict[object, tuple[tuple[Tensor, ...], Tensor]] = {}

    def mask(self, make: Callable[..., Tensor], *given: Tensor, by: object = None) -> Tensor | None:
        """`make` of tensors that every block is handed, made once; None in a pass without masks.

        by: what else the mask depends on.
        """
        if not self.masked:
            return None
        key = (by, *(id(tensor) for tensor in given))
        if key not in self._masks:
            mask = make(*given)
            if bool((mask == mask[:1]).all()):
                mask = mask[:1].clone()
            self._masks[key] = given, mask  # what was given is held, so that its id stays its own
        return self._masks[key][1]


@dataclass(frozen=True, eq=False)
class Distances:
    """What is added to scores by distance and content (DeBERTa): queries times a vector of the
    distance to the key, keys times one of the distance to the query."""

    keys: Tensor | None
    """[heads, distance, d_head], what queries are multiplied with."""
    queries: Tensor | None
    """[heads, distance, d_head], what keys are multiplied with."""
    to_key: Tensor
    """[T, T] long, query's column and key's → distance in `keys`."""
    to_query: Tensor
    """[T, T] long, query's column and key's → distance in `queries`."""

    def scores(self, query: Tensor, key: Tensor, at: Tensor, of: Tensor) -> Tensor:
        """[…, query, key] of query and key [lane, heads, …, token, d_head] in these columns."""
        found: list[Tensor] = []
        if self.keys is not None:
            each = query @ self._table(self.keys, query)
            index = self.to_key[at][:, of]
            found.append(each.gather(-1, index.expand(*each.shape[:-1], -1)))
        if self.queries is not None:
            each = key @ self._table(self.queries, key)
            index = self.to_query[at][:, of].t()
            found.append(each.gather(-1, index.expand(*each.shape[:-1], -1)).transpose(-1, -2))
        return sum(found, query.new_zeros(()))

    @staticmethod
    def _table(vectors: Tensor, like: Tensor) -> Tensor:
        """[heads, …, d_head, distance], in the type of what it is multiplied with"""
        return (
            vectors.to(like.dtype)
            .transpose(-1, -2)
            .view(len(vectors), *[1] * (like.dim() - 4), *vectors.shape[:0:-1])
        )


ExchangedAttention = Callable[..., Any]
"""(module, exchange, *args, **kwargs of the module's forward) to what the forward returns."""


@contextmanager
def exchanged_modules(
    entries: Sequence[tuple[nn.Module, ExchangedAttention]],
    function: AttentionFunction,
    own: str,
    *,
    masked: bool,
) -> Generator[None]:
    """Modules attend with `function`, each by its entry."""
    exchange = Exchange(function, own, masked=masked)
    with ExitStack() as stack:
        for part, entry in entries:
            stack.enter_context(replaced(part, _forward(entry, part, exchange)))
        yield


def _forward(
    entry: ExchangedAttention, module: nn.Module, exchange: Exchange
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with at_hand(module):
            return entry(module, exchange, *args, **kwargs)

    return forward


def plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    distances: Distances | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as these modules have it, scores and softmax in float32 at least."""
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)).mul_(scaling)
    if distances is not None:
        every = torch.arange(query.shape[2], device=query.device)
        scores += distances.scores(query, key, every, every) * scaling
    if mask is not None:
        scores = hide(scores, ~mask) if mask.dtype == torch.bool else scores.add_(mask)
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def hide(scores: Tensor, where: Tensor) -> Tensor:
    """The lowest number there is, not infinity: padding sees nothing, and mustn't become NaN."""
    return scores.masked_fill(where, torch.finfo(scores.dtype).min)
