# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
"""Another function in place of the model's attention, which is told what block calls it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.attention_exchange import AttentionFunction
from mechdsl.hooks.attention_functions import (
    cross_modules,
    exchanged,
    implementations,
    of_queries,
    own_function,
    scores_at_once,
    seen_keys,
)
from mechdsl.hooks.loaded import LoadedModel


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a block's attention is called with."""

    layer: int
    """The block that runs; -1 in front of them."""
    across: bool
    """Whether it is a decoder's attention to its encoder."""
    module: nn.Module
    query: Tensor
    """[B, heads, T, d_head]; keys and values [B, key-value heads, T, d_head]."""
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]
    """The others, by name."""
    implementations: Mapping[int, str]
    """How modules attend by themselves, by their config's id."""

    def own_function(self) -> AttentionFunction:
        """What the module attends with by itself. Raises CannotPack where that isn't known."""
        return own_function(self.module, self.implementations)

    def unchanged(self) -> tuple[Tensor, Tensor | None]:
        """Output and weights of the model's own attention; without weights where scores are so many
        that some queries are asked at a time. Raises CannotPack as above."""
        function, mask, arguments = self.own_function(), self.mask, self.arguments
        rows, heads, count, _ = self.query.shape
        together = max(1, scores_at_once(self.query.device) // (rows * heads * self.key.shape[2]))
        if together >= count or not isinstance(mask, Tensor) or arguments.get("distances"):
            return function(self.module, self.query, self.key, self.value, mask, **arguments)
        found = [
            self._of_queries(function, slice(first, min(first + together, count)))
            for first in range(0, count, together)
        ]
        return torch.cat(found, dim=1), None

    def _of_queries(self, function: AttentionFunction, part: slice) -> Tensor:
        """The output of some queries, [B, part, heads, d_head], as if the keys that are later than
        these weren't there yet, where none of them is seen."""
        keys = self.key.shape[2]
        end = keys - self.query.shape[2] + part.stop
        mask = of_queries(self.mask, self.query.shape[2])[:, :, part]
        if bool(seen_keys(mask[..., end:]).any()):
            end = keys
        bias = self.arguments.get("position_bias")
        arguments = self.arguments
        if bias is not None:
            arguments = arguments | {"position_bias": bias[:, :, part, :end]}
        key, value = self.key[:, :, :end], self.value[:, :, :end]
        query = self.query[:, :, part]
        return function(self.module, query, key, value, mask[..., :end], **arguments)[0]


@contextmanager
def block_attention(
    model: LoadedModel,
    attention: Callable[[AttentionCall], tuple[Tensor, Tensor | None]],
    *,
    masked: bool,
) -> Generator[None]:
    """The model attends with `attention`; masks are written out if `masked`, else not made."""
    own, crossing = implementations(model), cross_modules(model)

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        across = id(module) in crossing
        return attention(
            AttentionCall(running(), across, module, query, key, value, attention_mask, kwargs, own)
        )

    with _current_block(model) as running, exchanged(model, function, masked=masked):
        yield


@contextmanager
def _current_block(model: LoadedModel) -> Generator[Callable[[], int]]:
    """A look-up of which block runs, for attention, which isn't told; -1 in front of them."""
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
