"""Linear maps of a model as matrices: heads, neurons, norms, the unembedding.

Each is found by what a module does to the unit vectors, whatever class the module is of and however
it stores its weights: `module(unit) − module(0)`. Biases are so left out.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.anatomy import BlockAnatomy, Layout

LARGE = 1e3
"""Size of the numbers that norms are tried with: what they add to a variance is nothing beside."""
EXACT = 1e-3
"""How far, relative to its size, what a module does may be from what its map says."""


class NoMap(ValueError):
    """A part of the model isn't a linear map, or isn't there; the text says which."""


class WeightMaps:
    """Maps of one model, as matrices from rows: a vector goes in on the left. In float32, on the
    model's device."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.shape = model.shape
        self.output = lru_cache(maxsize=2)(self._output)
        self.projected = lru_cache(maxsize=6)(self._projected)

    def query(self, layer: int, head: int) -> Tensor:
        """[d_model, d_head] of the query: behind the attention norm's gain, before rotary."""
        return self.gained(layer, self.projected(layer, "q")[head])

    def key(self, layer: int, head: int) -> Tensor:
        """[d_model, d_head] of the key that the head attends with, before rotary."""
        return self.gained(layer, self.projected(layer, "k")[self._shared(layer, "k", head)])

    def value(self, layer: int, head: int) -> Tensor:
        """[d_model, d_value] of its value."""
        return self.gained(layer, self.projected(layer, "v")[self._shared(layer, "v", head)])

    def out(self, layer: int, head: int) -> Tensor:
        """[d_value, d_model]: what the head adds to the stream, of `z`."""
        return self.output(layer)[head]

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as one observation
    def neurons(self, layer: int) -> Tensor:
        """[neuron, d_model]: what a neuron of activation 1 adds to the stream."""
        block = self._block(layer)
        if block.down is None:
            raise NoMap(f"layer {layer} has no neurons with a map of their own")
        module = self._module(block.down)
        found = self._map(module, self.model.tap("mlp_hidden", layer).layout.end, block.down)
        return self._behind(found, block.mlp_behind)

    def first_mlp(self, vectors: Tensor) -> Tensor:
        """[..., d_model]: what the MLP of the first block makes of the stream, norms and biases as
        they are."""
        block = self._block(0)
        if "mlp_out" not in block.taps or len(block.mlp) != 1:
            raise NoMap("the first block has no MLP that is a part of its own")
        found = vectors.to(self.model.dtype)
        for path in (block.mlp_norm, *block.mlp, block.mlp_behind):
            found = found if path is None else self._module(path)(found)
            found = found[0] if isinstance(found, tuple) else found
        return found.float()

    @cached_property
    def final_gain(self) -> tuple[Tensor, bool]:
        """([d_model] what the final norm multiplies with, whether it takes the mean off)."""
        path = self.model.anatomy.final_norm
        if path is None:
            return torch.ones(self.shape.d_model, device=self.model.device), False
        return self._gain(path)

    def to_logits(self, vectors: Tensor) -> Tensor:
        """[..., vocabulary] of [..., d_model]: through the final norm's gain and the unembedding,
        not divided by the norm's scale, without biases."""
        gain, centred = self.final_gain
        vectors = vectors.to(gain)
        vectors = vectors - vectors.mean(-1, keepdim=True) if centred else vectors
        path = self.model.anatomy.unembedding
        if path is None:
            raise NoMap("the model has no unembedding")
        module, kind = self._module(path), self.model.dtype
        zero = module(torch.zeros(1, self.shape.d_model, dtype=kind, device=self.model.device))
        found = module((vectors * gain).to(kind)).float() - zero.float()[0]
        return found[..., : self.shape.vocab_size]

    @cached_property
    def unembedding(self) -> Tensor:
        """[d_model, vocabulary], the final norm's gain in it."""
        return self.to_logits(torch.eye(self.shape.d_model, device=self.model.device))

    @cached_property
    def token_map(self) -> Tensor:
        """[d_model, d_model]: W_U W_E, what tokens go out by with what they come in by."""
        return self.unembedding.double() @ self.vocabulary.double()

    @cached_property
    def token_gram(self) -> Tensor:
        """[d_model, d_model]: W_Eᵀ W_E."""
        whole = self.vocabulary.double()
        return whole.T @ whole

    @cached_property
    def vocabulary(self) -> Tensor:
        """[vocabulary, d_model]: the embedding of every token."""
        return self.embedded(torch.arange(self.shape.vocab_size))

    def embedded(self, ids: Tensor) -> Tensor:
        """[token, d_model]: what the token embedding returns."""
        path = self.model.anatomy.embedding
        if path is None or self.shape.d_embed != self.shape.d_model:
            raise NoMap("tokens aren't looked up in an embedding of the stream's width")
        return self._module(path)(ids.to(self.model.device)).float()

    def gained(self, layer: int, matrix: Tensor) -> Tensor:
        """[d_model, width] behind the gain of the norm that attention reads through."""
        block = self._block(layer)
        if block.attn_norm is None:
            return matrix
        gain, centred = self._gain(block.attn_norm)
        matrix = gain[:, None] * matrix
        return matrix - matrix.mean(0, keepdim=True) if centred else matrix

    # --- parts ---

    def _output(self, layer: int) -> Tensor:
        """[head, d_value, d_model]."""
        block = self._block(layer)
        if block.output is None:
            raise NoMap(f"layer {layer} has no output projection")
        layout = self.model.tap("z", layer).layout
        whole = self._map(self._module(block.output), layout.end, block.output)
        return _units(self._behind(whole, block.attn_behind), layout)

    def _behind(self, matrix: Tensor, norm: str | None) -> Tensor:
        """[width, d_model] behind the gain of the norm between a sublayer and the stream."""
        if norm is None:
            return matrix
        gain, centred = self._gain(norm)
        matrix = matrix - matrix.mean(-1, keepdim=True) if centred else matrix
        return matrix * gain

    def _projected(self, layer: int, site: str) -> Tensor:
        """[unit, d_model, width] of queries, keys or values."""
        tap = self.model.tap(site, layer)
        if tap.path not in self._block(layer).projections or tap.side != "out":
            raise NoMap(f"`{site}` of layer {layer} isn't what a linear map of the stream returns")
        whole = self._map(self._module(tap.path), self.shape.d_model, tap.path)
        return _units(whole.T, tap.layout).transpose(1, 2)

    def _shared(self, layer: int, site: str, head: int) -> int:
        """The key or value that a head has, maybe with others."""
        count = self.projected(layer, site).shape[0]
        return head * count // self.model.tap("z", layer).layout.units

    def _block(self, layer: int) -> BlockAnatomy:
        return self.model.anatomy.blocks[layer]

    def _module(self, path: str) -> Any:
        return self.model.module.get_submodule(path)

    def _map(self, module: Any, width: int, path: str) -> Tensor:
        """[width, out] of a module; NoMap where it does something else to another vector."""
        kind, device = self.model.dtype, self.model.device
        units = torch.eye(width, dtype=kind, device=device)
        zero = module(torch.zeros(1, width, dtype=kind, device=device)).float()
        found = module(units).float() - zero
        tried = torch.linspace(-1, 1, width, dtype=kind, device=device)[None]
        got = module(tried).float() - zero
        if not torch.allclose(got, tried.float() @ found, atol=self._close(got)):
            raise NoMap(f"`{path}` is no linear map")
        return found

    @lru_cache(maxsize=4)  # noqa: B019
    def _gain(self, path: str) -> tuple[Tensor, bool]:
        """([d_model] what a norm multiplies with, whether it takes the mean off)."""
        module, width = self._module(path), self.shape.d_model
        tried = torch.full((1, width), LARGE, dtype=self.model.dtype, device=self.model.device)
        zero = module(torch.zeros_like(tried)).float()
        ones = module(tried).float() - zero
        tried[0, ::2] = -LARGE / 2
        got = module(tried).float() - zero
        centred = bool(ones.abs().max() <= EXACT * got.abs().max())
        vector = tried.float()
        vector = vector - vector.mean() if centred else vector
        gain = (got * vector.square().mean().sqrt() / vector)[0]
        twice = module(tried.flip(-1) * 2).float() - zero
        other = tried.float().flip(-1)
        other = other - other.mean() if centred else other
        wanted = gain * other / other.square().mean().sqrt()
        if not torch.allclose(twice, wanted, atol=self._close(wanted)):
            raise NoMap(f"`{path}` isn't a norm of the whole vector with a gain")
        return gain, centred

    def _close(self, values: Tensor) -> float:
        rounding = max(EXACT, 8 * torch.finfo(self.model.dtype).eps)
        return rounding * float(values.abs().max())


def _units(whole: Tensor, layout: Layout) -> Tensor:
    """[unit, width, rest] of [features, rest], as the layout has the features."""
    found: list[Tensor] = []
    for unit in range(layout.units):
        begin = layout.offset + unit // layout.group * layout.stride
        begin += unit % layout.group * layout.width
        found.append(whole[begin : begin + layout.width])
    return torch.stack(found)
