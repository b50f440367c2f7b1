# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
"""Another function in place of the model's attention, which is told what block calls it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mechdsl.hooks.attention_exchange import AttentionFunction
from mechdsl.hooks.attention_functions import (
    cross_modules,
    exchanged,
    implementations,
    own_function,
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
        """Output and weights of the model's own attention. Raises CannotPack as above."""
        function = self.own_function()
        return function(self.module, self.query, self.key, self.value, self.mask, **self.arguments)


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
