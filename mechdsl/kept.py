# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What an unpatched run leaves behind for the rows that start from it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.attention import KeptAttention, exchanged, own_function
from mechdsl.batch import Batch
from mechdsl.loaded import LoadedModel
from mechdsl.taps import given_to


@dataclass(eq=False)
class Kept:
    """Activations of an unpatched run on B lanes of T columns. Token = lane * T + column."""

    batch: Batch
    hidden: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Block → [token, d_model], its input; of the number behind the last, what that returns."""
    outputs: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Path of a linear map or sublayer → [token, width], what it returns."""
    z: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Block → [token, heads, d_head]."""
    attention: dict[int, KeptAttention] = field(default_factory=dict[int, KeptAttention])
    embedded: Tensor | None = None
    """[token, d_model], what the embedding returns, where that isn't the tokens' own (noise)."""

    def part(self, rows: slice, batch: Batch) -> Kept:
        """What was kept of some lanes, without copying."""
        width = self.columns
        tokens = slice(rows.start * width, rows.stop * width)
        return Kept(
            batch,
            {layer: kept[tokens] for layer, kept in self.hidden.items()},
            {path: kept[tokens] for path, kept in self.outputs.items()},
            {layer: kept[tokens] for layer, kept in self.z.items()},
            {layer: kept.part(rows) for layer, kept in self.attention.items()},
            None if self.embedded is None else self.embedded[tokens],
        )

    @property
    def columns(self) -> int:
        return int(self.batch.ids.shape[1])


def parts(model: LoadedModel, layer: int) -> tuple[list[str], str, str]:
    """Paths of one block's (projections of queries, keys, values; output projection; MLP)."""
    anatomy = model.anatomy
    paths = [path.format(layer=layer) for path in anatomy.projections]
    return (
        paths,
        anatomy.output_projection.format(layer=layer),
        anatomy.mlp.format(layer=layer),
    )


@contextmanager
def keeping(model: LoadedModel, batch: Batch, lowest: int) -> Generator[Kept]:
    """What the model computes inside is kept, from block `lowest` on.

    A model that doesn't attend through the library's attention functions leaves `attention` empty.
    """
    kept = Kept(batch)
    current = [-1]
    n_layers = model.shape.n_layers
    implementation = str(getattr(model.module.config, "_attn_implementation", "eager"))

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        function = own_function(module, implementation)
        out, weights = function(module, query, key, value, mask, **kwargs)
        layer = current[0]
        if layer >= lowest:
            kept.attention[layer] = KeptAttention(key, value, mask)
            kept.z[layer] = out.flatten(0, 1)
        return out, weights

    def enters(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current[0] = layer
            if layer >= lowest:
                kept.hidden[layer] = given_to(args, kwargs).flatten(0, 1)

        return hook

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.hidden[n_layers] = hidden.flatten(0, 1)

    def returns(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            kept.outputs[path] = value.flatten(0, 1)

        return hook

    with ExitStack() as stack:
        for layer in range(n_layers):
            block = model.module.get_submodule(model.anatomy.block.format(layer=layer))
            handle = block.register_forward_pre_hook(enters(layer), with_kwargs=True)
            stack.callback(handle.remove)
            if layer == n_layers - 1:
                stack.callback(block.register_forward_hook(leaves).remove)
            if layer >= lowest:
                projections, output, mlp = parts(model, layer)
                for path in (*projections, output, mlp):
                    module = model.module.get_submodule(path)
                    stack.callback(module.register_forward_hook(returns(path)).remove)
        stack.enter_context(exchanged(model, attention, masked=True))
        with torch.inference_mode():
            yield kept
