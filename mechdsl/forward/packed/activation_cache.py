"""Activations of an unpatched run, stored for the rows that start from it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.attention import (
    AttentionCall,
    CachedAttention,
    VisibleKeyCounts,
    add_bias,
    expand_query_mask,
    find_cross_attention,
    replace_block_attention,
)
from mechdsl.forward.hooks.batch import Batch
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import get_activation


@dataclass(eq=False)
class ActivationCache:
    """Activations of an unpatched run on B lanes of T columns. Token = lane * T + column."""

    batch: Batch
    hidden: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Block → [token, d_model], its input; key `n_layers`: the output of the last block."""
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Path of a linear map or sublayer → [token, width], its output."""
    z: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Block → [token, heads, d_head]."""
    attention: dict[int, CachedAttention] = field(default_factory=dict[int, CachedAttention])
    across: dict[int, CachedAttention] = field(default_factory=dict[int, CachedAttention])
    """Block → keys and values of the encoder's tokens, in its attention to the encoder."""
    embedded: Tensor | None = None
    """[token, d_model], the embedding's output, if it differs from the tokens' own (noise,
    images)."""
    tuples: dict[str, int] = field(default_factory=dict[str, int])
    """Path in `outputs` → length of the tuple that the module returns, if it returns one."""
    positions: Tensor | None = None
    """[…, lane, column], positions given to a language model with images."""
    encoded: Any = None
    """Output of an encoder-decoder's encoder, the library's object of tensors."""
    seen: VisibleKeyCounts = field(default_factory=VisibleKeyCounts)
    """Counts for the masks of `attention`."""

    def part(self, rows: slice, batch: Batch) -> ActivationCache:
        """Select the activations of some lanes without copying."""
        width = self.columns
        tokens = slice(rows.start * width, rows.stop * width)
        return ActivationCache(
            batch,
            {layer: kept[tokens] for layer, kept in self.hidden.items()},
            {path: kept[tokens] for path, kept in self.outputs.items()},
            {layer: kept[tokens] for layer, kept in self.z.items()},
            {layer: kept.part(rows) for layer, kept in self.attention.items()},
            {layer: kept.part(rows) for layer, kept in self.across.items()},
            None if self.embedded is None else self.embedded[tokens],
            self.tuples,
            None if self.positions is None else self.positions[..., rows, :],
            None if self.encoded is None else self.encoded_of(rows),
            self.seen,
        )

    def encoded_of(self, lanes: slice) -> Any:
        """Return the encoder's output for some lanes."""
        own, count = self.encoded, len(self.batch)

        def part(value: Any) -> Any:
            lying = isinstance(value, Tensor) and value.shape[0] == count
            return value[lanes] if lying else value

        return type(own)(**{name: part(value) for name, value in own.items()})

    @property
    def columns(self) -> int:
        return int(self.batch.ids.shape[1])

    @cached_property
    def sees_later(self) -> bool:
        """Whether a token attends to a later one."""
        masks = {id(one.mask): one.mask for one in self.attention.values()}
        real = self.batch.mask.bool()[:, None, :, None]
        for mask in masks.values():
            if mask is None:
                return True
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            if bool((seen & real).triu(1).any()):
                return True
        return False


def list_block_paths(
    model: LoadedModel, layer: int
) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Return the paths of a block's projections, output projection and MLP.

    The projections are those of queries, keys and values. The MLP may be given by its linear maps.
    """
    block = model.anatomy.blocks[layer]
    return block.projections, block.output, block.mlp


@contextmanager
def record_activations(model: LoadedModel, batch: Batch, lowest: int) -> Generator[ActivationCache]:
    """Record the model's activations from block `lowest` on while the context is open.

    `attention` stays empty for a model that doesn't attend through the library's functions.
    """
    kept = ActivationCache(batch)
    with ExitStack() as stack:
        keeper = _AttentionRecorder(kept, lowest)
        stack.enter_context(replace_block_attention(model, keeper, masked=True))
        _record_streams(kept, model, lowest, stack)
        _record_outputs(kept, model, lowest, stack)
        _record_encoder(kept, model, stack)
        _record_embedding(kept, model, stack)
        with torch.inference_mode():
            yield kept


def _record_streams(
    kept: ActivationCache, model: LoadedModel, lowest: int, stack: ExitStack
) -> None:
    """Record the input of each block, and the output of the last."""
    blocks = [model.module.get_submodule(block.path) for block in model.anatomy.blocks]

    def enters(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.hidden[layer] = get_activation(args, kwargs).flatten(0, 1)

        return hook

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        kept.hidden[len(blocks)] = hidden.flatten(0, 1)

    for layer, block in enumerate(blocks[lowest:], lowest):
        stack.callback(block.register_forward_pre_hook(enters(layer), with_kwargs=True).remove)
    stack.callback(blocks[-1].register_forward_hook(leaves).remove)


def _record_outputs(
    kept: ActivationCache, model: LoadedModel, lowest: int, stack: ExitStack
) -> None:
    """Record the outputs of projections and MLPs."""

    def returns(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(output, (tuple, list)):
                kept.tuples[path] = len(output)
            value = value.reshape(-1, value.shape[-1])
            # Parallel sublayers may be added to each other in place.
            kept.outputs[path] = value.clone() if model.parallel else value

        return hook

    for layer in range(lowest, len(model.anatomy.blocks)):
        projections, output, mlp = list_block_paths(model, layer)
        for path in (*projections, *([output] if output else []), *mlp):
            module = model.module.get_submodule(path)
            stack.callback(module.register_forward_hook(returns(path)).remove)


def _record_encoder(kept: ActivationCache, model: LoadedModel, stack: ExitStack) -> None:
    """Record the encoder's output, if there is an encoder."""
    if not find_cross_attention(model):
        return

    def encodes(module: nn.Module, args: Any, output: Any) -> None:
        kept.encoded = output

    encoder: Any = model.module
    stack.callback(encoder.get_encoder().register_forward_hook(encodes).remove)


def _record_embedding(kept: ActivationCache, model: LoadedModel, stack: ExitStack) -> None:
    """Record a language model's input with an image merged into its text."""
    embed = model.anatomy.taps.get("embed")
    if not kept.batch.extra or embed is None or embed.side != "in":
        return

    def merges(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.embedded = get_activation(args, kwargs).flatten(0, 1)
        places = kwargs.get("position_ids")
        if places is not None:
            kept.positions = places.expand(*places.shape[:-2], len(kept.batch), -1)

    merged = model.module.get_submodule(embed.path)
    stack.callback(merged.register_forward_pre_hook(merges, with_kwargs=True).remove)


class _AttentionRecorder:
    """The model's own attention, with its inputs and outputs recorded."""

    def __init__(self, kept: ActivationCache, lowest: int) -> None:
        self.kept = kept
        self.lowest = lowest
        self.joined: dict[tuple[int, int], tuple[Any, Tensor, Any]] = {}
        """Masks with biases, by the ids of both tensors, which are held so that ids aren't
        reused."""

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        out, weights = call.unchanged()
        layer, arguments = call.layer, call.arguments
        if layer >= self.lowest:
            mask = expand_query_mask(call.mask, call.query.shape[2])
            if (bias := arguments.get("position_bias")) is not None:
                mask = self._with_bias(mask, bias)
            if call.across:
                self.kept.across[layer] = CachedAttention(call.key, call.value, mask)
                return out, weights
            distances = arguments.get("distances")
            self.kept.attention[layer] = CachedAttention(call.key, call.value, mask, distances)
            self.kept.z[layer] = out.flatten(0, 1)
        return out, weights

    def _with_bias(self, mask: Any, bias: Tensor) -> Any:
        """Add a bias to a mask, once for all blocks that share both."""
        key = id(mask), id(bias)
        if key not in self.joined:
            self.joined[key] = mask, bias, add_bias(mask, bias)
        return self.joined[key][2]
