"""Linear maps of a model as matrices, and norms frozen at the scales of a different pass."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Bools
from mechdsl.forward.hooks.batch import array_to_device
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import get_activation
from mechdsl.models.shape import BlockAnatomy, TensorLayout

TRIAL_SIZE = 1e3
"""Size of trial inputs for norms, at which the ε added to a variance is negligible."""

MAP_TOLERANCE = 1e-3
"""How far a module's output may be from its linear map, relative to the output's size."""


class NoLinearMap(ValueError):
    """A component that is missing or isn't a linear map; the text names it."""


class WeightMaps:
    """Maps of one model as matrices for row vectors, in float32 on the model's device."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.shape = model.shape
        self.output = lru_cache(maxsize=2)(self._output)
        self.projected = lru_cache(maxsize=6)(self._projected)

    def query(self, layer: int, head: int) -> Tensor:
        """Return [d_model, d_head]: the query map with the attention norm's gain, before rotary."""
        return self.gained(layer, self.projected(layer, "q")[head])

    def key(self, layer: int, head: int) -> Tensor:
        """Return [d_model, d_head]: the map of the head's key, before rotary."""
        return self.gained(layer, self.projected(layer, "k")[self._shared(layer, "k", head)])

    def value(self, layer: int, head: int) -> Tensor:
        """Return [d_model, d_value]: the map of the head's value."""
        return self.gained(layer, self.projected(layer, "v")[self._shared(layer, "v", head)])

    def out(self, layer: int, head: int) -> Tensor:
        """Return [d_value, d_model]: the map from `z` to what the head adds to the stream."""
        return self.output(layer)[head]

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as one observation
    def neurons(self, layer: int) -> Tensor:
        """Return [neuron, d_model]: what a neuron of activation 1 adds to the stream."""
        block = self._block(layer)
        if block.down is None:
            raise NoLinearMap(f"layer {layer} has no neurons with a separate map")
        module = self._module(block.down)
        neurons = self._map(module, self.model.tap("mlp_hidden", layer).layout.end, block.down)
        return self._scale_by_norm(neurons, block.mlp_output_norm)

    def first_mlp(self, vectors: Tensor) -> Tensor:
        """Return [..., d_model]: the output of the first block's MLP for stream vectors.

        Norms and biases are applied unchanged.
        """
        block = self._block(0)
        if "mlp_out" not in block.taps or len(block.mlp) != 1:
            raise NoLinearMap("the first block has no MLP as a separate component")
        hidden = vectors.to(self.model.dtype)
        for path in (block.mlp_norm, *block.mlp, block.mlp_output_norm):
            hidden = hidden if path is None else self._module(path)(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden.float()

    @cached_property
    def final_gain(self) -> tuple[Tensor, bool]:
        """([d_model] gain of the final norm, whether the norm subtracts the mean)."""
        path = self.model.anatomy.final_norm
        if path is None:
            return torch.ones(self.shape.d_model, device=self.model.device), False
        return self._gain(path)

    def to_logits(self, vectors: Tensor) -> Tensor:
        """Map [..., d_model] to [..., vocabulary], by the final norm's gain and the unembedding.

        Biases are left out, and vectors aren't divided by the norm's scale.
        """
        gain, centred = self.final_gain
        vectors = vectors.to(gain)
        vectors = vectors - vectors.mean(-1, keepdim=True) if centred else vectors
        path = self.model.anatomy.unembedding
        if path is None:
            raise NoLinearMap("the model has no unembedding")
        module, kind = self._module(path), self.model.dtype
        zero = module(torch.zeros(1, self.shape.d_model, dtype=kind, device=self.model.device))
        logits = module((vectors * gain).to(kind)).float() - zero.float()[0]
        return logits[..., : self.shape.vocab_size]

    @cached_property
    def unembedding(self) -> Tensor:
        """[d_model, vocabulary], including the final norm's gain."""
        return self.to_logits(torch.eye(self.shape.d_model, device=self.model.device))

    @cached_property
    def token_map(self) -> Tensor:
        """[d_model, d_model]: W_U W_E, the product of unembedding and embedding."""
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
        """Return [token, d_model]: the token embeddings."""
        path = self.model.anatomy.embedding
        if path is None or self.shape.d_embed != self.shape.d_model:
            raise NoLinearMap("tokens aren't looked up in an embedding of the stream's width")
        return self._module(path)(ids.to(self.model.device)).float()

    def gained(self, layer: int, matrix: Tensor) -> Tensor:
        """Multiply [d_model, width] by the gain of the norm before attention."""
        block = self._block(layer)
        if block.attn_norm is None:
            return matrix
        gain, centred = self._gain(block.attn_norm)
        matrix = gain[:, None] * matrix
        return matrix - matrix.mean(0, keepdim=True) if centred else matrix

    # --- components ---

    def _output(self, layer: int) -> Tensor:
        """Return [head, d_value, d_model]."""
        block = self._block(layer)
        if block.output is None:
            raise NoLinearMap(f"layer {layer} has no output projection")
        layout = self.model.tap("z", layer).layout
        whole = self._map(self._module(block.output), layout.end, block.output)
        return _split_units(self._scale_by_norm(whole, block.attn_output_norm), layout)

    def _scale_by_norm(self, matrix: Tensor, norm: str | None) -> Tensor:
        """Multiply [width, d_model] by the gain of the norm between a sublayer and the stream."""
        if norm is None:
            return matrix
        gain, centred = self._gain(norm)
        matrix = matrix - matrix.mean(-1, keepdim=True) if centred else matrix
        return matrix * gain

    def _projected(self, layer: int, site: str) -> Tensor:
        """Return [unit, d_model, width] for queries, keys or values."""
        tap = self.model.tap(site, layer)
        if tap.path not in self._block(layer).projections or tap.side != "out":
            raise NoLinearMap(
                f"`{site}` of layer {layer} isn't the output of a linear map of the stream"
            )
        whole = self._map(self._module(tap.path), self.shape.d_model, tap.path)
        return _split_units(whole.T, tap.layout).transpose(1, 2)

    def _shared(self, layer: int, site: str, head: int) -> int:
        """Return the index of the key or value that a head uses, possibly a shared one."""
        count = self.projected(layer, site).shape[0]
        return head * count // self.model.tap("z", layer).layout.units

    def _block(self, layer: int) -> BlockAnatomy:
        return self.model.anatomy.blocks[layer]

    def _module(self, path: str) -> Any:
        return self.model.module.get_submodule(path)

    @torch.no_grad()
    def _map(self, module: Any, width: int, path: str) -> Tensor:
        """Return [width, out] for a module. Raises NoLinearMap if a trial vector maps otherwise."""
        kind, device = self.model.dtype, self.model.device
        units = torch.eye(width, dtype=kind, device=device)
        zero = module(torch.zeros(1, width, dtype=kind, device=device)).float()
        output = module(units).float() - zero
        tried = torch.linspace(-1, 1, width, dtype=kind, device=device)[None]
        got = module(tried).float() - zero
        if not torch.allclose(got, tried.float() @ output, atol=self._close(got)):
            raise NoLinearMap(f"`{path}` isn't a linear map")
        return output

    @lru_cache(maxsize=4)  # noqa: B019
    @torch.no_grad()
    def _gain(self, path: str) -> tuple[Tensor, bool]:
        """Return ([d_model] gain of a norm, whether it subtracts the mean)."""
        module, width = self._module(path), self.shape.d_model
        tried = torch.full((1, width), TRIAL_SIZE, dtype=self.model.dtype, device=self.model.device)
        zero = module(torch.zeros_like(tried)).float()
        ones = module(tried).float() - zero
        tried[0, ::2] = -TRIAL_SIZE / 2
        got = module(tried).float() - zero
        centred = bool(ones.abs().max() <= MAP_TOLERANCE * got.abs().max())
        vector = tried.float()
        vector = vector - vector.mean() if centred else vector
        gain = (got * vector.square().mean().sqrt() / vector)[0]
        twice = module(tried.flip(-1) * 2).float() - zero
        other = tried.float().flip(-1)
        other = other - other.mean() if centred else other
        wanted = gain * other / other.square().mean().sqrt()
        if not torch.allclose(twice, wanted, atol=self._close(wanted)):
            raise NoLinearMap(f"`{path}` isn't a norm of the whole vector with a gain")
        return gain, centred

    def _close(self, values: Tensor) -> float:
        rounding = max(MAP_TOLERANCE, 8 * torch.finfo(self.model.dtype).eps)
        return rounding * float(values.abs().max())


def _split_units(whole: Tensor, layout: TensorLayout) -> Tensor:
    """Return [unit, width, rest] of [features, rest], with features in the layout's order."""
    units: list[Tensor] = []
    for unit in range(layout.units):
        begin = layout.offset + unit // layout.group * layout.stride
        begin += unit % layout.group * layout.width
        units.append(whole[begin : begin + layout.width])
    return torch.stack(units)


NORM_TOLERANCE = 1e-3
"""How far a norm may be from a linear map divided by a scale, relative to its output."""

SMALL_VECTOR_SIZE, LARGE_VECTOR_SIZE = 1e-3, 1e3
"""Sizes of vectors that reveal ε: it matters for the first and is negligible for the second."""

NormScales = Mapping[str, list[Tensor]]
"""By path of a norm, the divisors of its calls, [..., 1]."""


class FrozenNorms:
    """Norms of a model, whose scales some rows of a pass can take from a different pass."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @cached_property
    def _norms(self) -> dict[str, _NormMap]:
        wide = torch.promote_types(self.model.dtype, torch.float32)
        return {path: _NormMap(module, wide) for path, module in list_norms(self.model.module)}

    @contextmanager
    def recorded(self, rows: Bools) -> Generator[NormScales]:
        """Record the norms' divisors in passes while the context is open, if any row needs them."""
        recorded_scales: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            for path, norm in self._norms.items() if rows.any() else ():
                tensors = recorded_scales.setdefault(path, [])

                def record(
                    module: nn.Module, args: Any, kwargs: Any, out: Tensor,
                    norm: _NormMap = norm, own: list[Tensor] = tensors,
                ) -> None:  # fmt: skip
                    own.append(norm.scale(get_activation(args, kwargs)))

                module = self.model.module.get_submodule(path)
                handle = module.register_forward_hook(record, with_kwargs=True)
                stack.callback(handle.remove)
            yield recorded_scales

    @contextmanager
    def kept(self, rows: Bools, scales: NormScales) -> Generator[None]:
        """Divide these rows by the divisors recorded in a pass over the same tokens."""
        with ExitStack() as stack:
            for path, tensors in scales.items():
                due = iter(tensors)

                def divide(
                    module: nn.Module, args: Any, kwargs: Any, out: Tensor,
                    norm: _NormMap = self._norms[path], due: Any = due,
                ) -> Tensor:  # fmt: skip
                    # A clone, because tensors created in inference mode can't be differentiated.
                    given, scale = get_activation(args, kwargs), next(due).clone()
                    frozen = norm.divided(given, out, scale)
                    each = np.repeat(rows, out.shape[0] // len(rows))
                    chosen = array_to_device(each, out.device)
                    return torch.where(chosen.view(-1, *[1] * (out.dim() - 1)), frozen, out)

                module = self.model.module.get_submodule(path)
                handle = module.register_forward_hook(divide, with_kwargs=True)
                stack.callback(handle.remove)
            yield


def list_norms(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List every norm of a model with its path."""
    return [
        (path, part)
        for path, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and not any(part.children())
    ]


def find_nonlinear_norm(module: nn.Module, width: int) -> str | None:
    """Return the path of a norm that isn't a linear map divided by a scale; None if all are.

    Args:
        width: Width of vectors for norms without weights.
    """
    for path, norm in list_norms(module):
        try:
            own = next((p.shape[-1] for p in norm.parameters()), width)
            error = _NormMap(norm, torch.float32).error(own)
        except (TypeError, RuntimeError, ValueError):
            return path
        if not error < NORM_TOLERANCE:
            return path
    return None


class _NormMap:
    """Norm of the form g · (x − mean or x) / √(mean square + ε) + b; any term may be missing."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(module).to(dtype)
        self.dtype = dtype
        self._found: dict[int, tuple[bool, float, Tensor]] = {}

    def scale(self, given: Tensor) -> Tensor:
        """Return [..., 1]: the divisors of vectors [..., width]."""
        centred, epsilon, _ = self._of(given)
        wide = given.to(self.dtype)
        if centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()

    def divided(self, given: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        """Rescale the norm's output `out` to a different divisor."""
        bias = self._of(given)[2]
        frozen = bias + (out.to(self.dtype) - bias) * (self.scale(given) / scale)
        return frozen.to(out)

    def error(self, width: int) -> float:
        """Measure the deviation from that form on random vectors, relative to outputs."""
        draw = torch.Generator().manual_seed(0)
        worst = 0.0
        for size in (1e-3, 1.0, 30.0):
            a, b = (torch.randn(1, width, generator=draw, dtype=self.dtype) for _ in range(2))
            a, b = (size * (each + 1).to(self._device) for each in (a, b))
            parts = [self._linear(each) for each in (a, b, a + b)]
            off = (parts[0] + parts[1] - parts[2]).abs().max() / parts[2].abs().max()
            worst = max(worst, float(off))
        return worst

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _linear(self, vectors: Tensor) -> Tensor:
        return (self._given(vectors) - self._of(vectors)[2]) * self.scale(vectors)

    def _given(self, vectors: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.module(vectors).clone()

    def _of(self, like: Tensor) -> tuple[bool, float, Tensor]:
        """Return (whether the mean is subtracted, ε, bias)."""
        width = like.shape[-1]
        if width not in self._found:
            sign = torch.ones(width, dtype=self.dtype, device=like.device)
            sign[1::2] = -1
            sign[width - width % 2 :] = 0  # its mean is 0
            bias = self._given(torch.zeros_like(sign)[None])
            small, large, raised = (
                self._given(each[None]) - bias
                for each in (
                    SMALL_VECTOR_SIZE * sign,
                    LARGE_VECTOR_SIZE * sign,
                    LARGE_VECTOR_SIZE * (sign + 0.5),
                )
            )
            centred = bool(torch.allclose(raised, large, rtol=1e-3, atol=1e-3))
            share = float(small.norm() / large.norm())
            square = float(sign.square().mean()) * SMALL_VECTOR_SIZE**2
            epsilon = max(0.0, square * (1 / share**2 - 1)) if share > 0 else float("nan")
            self._found[width] = centred, epsilon, bias
        return self._found[width]
