# pyright: reportPrivateUsage=false
"""Blocks that compute in the place of others."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mechdsl.hooks.hook_points import Stub, replaced
from mechdsl.hooks.loaded import LoadedModel

BlockPairs = Sequence[tuple[int, int | None]]
"""Blocks, and which compute in their places; None: what enters is handed on."""
_PLACE = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes that say where a module stands, by which a cache finds its keys."""


@contextmanager
def blocks_replaced(model: LoadedModel, pairs: BlockPairs) -> Generator[None]:
    """Blocks compute with the weights of others, for a while; hooks on them stay where they are."""
    with ExitStack() as stack:
        others = [None if of is None else _weights(_block(model, of)) for _, of in pairs]
        for (to, _), weights in zip(pairs, others, strict=True):
            block = _block(model, to)
            if weights is None:
                stack.enter_context(replaced(block, Stub(model.calling.block_returns)))
                continue
            for part, own in zip(block.modules(), weights, strict=True):
                stack.callback(_put, part, _own(part))
                _put(part, own)
        yield


def unlike(model: LoadedModel, to: int, of: int | None) -> str:
    """Why a block can't compute in the place of another; empty where it can."""
    block = _block(model, to)
    every = [block] if of is None else [block, _block(model, of)]
    if any("_hf_hook" in part.__dict__ for each in every for part in each.modules()):
        return "its weights are kept elsewhere while a block isn't running"
    if of is None:
        return ""
    for part, other in zip(*(_parts(each) for each in every), strict=False):
        if part != other:
            return f"`{other[0] or 'the block'}` of block {of} is built in another way"
    if len(list(every[0].modules())) != len(list(every[1].modules())):
        return f"block {of} is built in another way"
    return ""


def _block(model: LoadedModel, layer: int) -> nn.Module:
    return model.module.get_submodule(model.anatomy.blocks[layer].path)


Own = tuple[dict[str, Any], dict[str, Any]]


def _own(part: nn.Module) -> Own:
    return dict(part._parameters), dict(part._buffers)


def _weights(block: nn.Module) -> list[Own]:
    """Of every module in it, in order."""
    return [_own(part) for part in block.modules()]


def _put(part: nn.Module, own: Own) -> None:
    part._parameters.clear()
    part._parameters.update(own[0])
    part._buffers.clear()
    part._buffers.update(own[1])


def _parts(block: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What a block is made of: its modules, their sizes and settings."""
    for name, part in block.named_modules():
        if isinstance(part, nn.Identity | nn.Dropout) or "DropPath" in type(part).__name__:
            yield name, "hands on"  # outside of training, whatever its rate
            continue
        sizes = [
            (key, None if each is None else (each.shape, each.dtype, each.device))
            for key, each in (*part._parameters.items(), *part._buffers.items())
        ]
        settings = [
            (key, value)
            for key, value in sorted(part.__dict__.items())
            if isinstance(value, bool | int | float | str) and key not in _PLACE
        ]
        loose = [key for key, value in part.__dict__.items() if isinstance(value, torch.Tensor)]
        alone = id(part) if loose else None  # tensors of its own that are no weights
        yield name, type(part), sizes, settings, alone
