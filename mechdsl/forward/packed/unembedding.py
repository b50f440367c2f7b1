"""Computation of a model after its last block, applied to vectors of any layer.

The model itself runs on rows of one token. The vectors replace the stream after the last block, or
the input of the unembedding.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.backward_rules import catch_autograd_errors
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import ENCODED, LoadedModel
from mechdsl.forward.hooks.module_exchange import BlockStub, replace_forward
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.models.restart import Shortcuts
from mechdsl.models.shape import ATTENDED, TILES, unit_count

MAX_VECTORS = 1024
"""Maximum number of vectors in one pass."""

LINEAR_TOLERANCE = 1e-3
"""How far a norm may be from a linear map, relative to its output."""

SOFTCAP_KEY = "final_logit_softcapping"
"""Key of configs: logits are `cap * tanh(logits / cap)` (Gemma 2)."""


def uncap_logits(model: LoadedModel, logits: Tensor) -> Tensor:
    """Return logits before the model's cap, if it has one, at least in 32 bits."""
    cap = model.shape.config.get(SOFTCAP_KEY)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if not cap else cap * torch.atanh(wide / cap)


class ModelUnembedding:
    """Implementation of `mechdsl.resolve.observations.Unembedding`."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def logits(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Implement the protocol."""
        last = self.model.shape.n_layers - 1
        return self._logits_after(SiteRead("resid_post", last), vectors, tokens)

    def differentiable_logits(self, vectors: Tensor) -> Tensor:
        """Return the logits of `logits`, which carry gradients of the vectors if these do.

        Raises AutogradFailed.
        """
        place = SiteRead("resid_post", self.model.shape.n_layers - 1)
        write = self._write(place, vectors)
        with catch_autograd_errors():
            return self._full_pass(write, len(vectors), None, gradients=True)

    def share(self, vectors: Tensor, stream: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Implement the protocol: the norm is a linear map with its scale on the stream.

        Caps on logits are not applied.

        References:
            Elhage et al. 2021, transformer-circuits.pub/2021/framework
        """
        norm = self._norm
        along = norm.linear(stream)
        scale = (norm.of(stream) - norm.bias) * along
        scale = scale.sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True)
        return self.unembedded(norm.linear(vectors) * scale, tokens)

    def unembedded(self, vectors: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return [K, tokens]: contributions of unembedding inputs [K, d_model] to logits.

        Bias and cap are left out.
        """
        place = SiteRead("final_norm")
        zero = self._logits_after(place, torch.zeros_like(vectors[:1]), tokens)
        logits = self._logits_after(place, vectors, tokens)
        return uncap_logits(self.model, logits) - uncap_logits(self.model, zero)

    def neurons_out(self, layer: int, units: Tensor, values: Tensor) -> Tensor:
        """Return [K, d_model]: contributions of neurons `units` [K] to the stream.

        values: [K, 1] their activations.
        """
        path = self.model.anatomy.blocks[layer].down
        assert path is not None
        down = self.model.module.get_submodule(path)
        kind = next(down.parameters())
        distinct, where = units.unique(return_inverse=True)
        count = unit_count(self.model.shape, "mlp_hidden", layer)
        one = torch.zeros(len(distinct) + 1, count).to(kind)
        one[torch.arange(len(distinct)), distinct] = 1
        with torch.inference_mode():
            output = down(one).to(values)
        tap = self.model.tap("mlp_out", layer)
        return (output[:-1] - output[-1])[where] * values * tap.scale

    # --- through the model ------------------------------------------------------------------------

    def _logits_after(self, place: SiteRead, vectors: Tensor, tokens: Tensor | None) -> Tensor:
        """Return [K, tokens]: logits after vectors [K, d_model] are written at a site."""
        logits = [self._rows(place, part, tokens) for part in vectors.split(MAX_VECTORS)]
        return torch.cat(logits) if logits else vectors.new_zeros(0, self.model.shape.outputs)

    def _rows(self, place: SiteRead, vectors: Tensor, tokens: Tensor | None) -> Tensor:
        count = len(vectors)
        write = self._write(place, vectors)
        if self._kept is None:
            return self._full_pass(write, count, tokens)
        rows = np.arange(count)
        final = rows, np.zeros_like(rows)
        lanes = np.zeros_like(rows)
        return run_packed(
            self.model,
            self._kept,
            lanes,
            writes=[write],
            final=final,
            tokens=tokens,
            shortcuts=Shortcuts(),
            fuse=False,
        ).logits

    def _write(self, place: SiteRead, vectors: Tensor) -> SiteWrite:
        """Write vectors [K, d_model] at the only token of K rows, or of their decoders."""
        count, first = len(vectors), torch.zeros(len(vectors), dtype=torch.long)
        tokens = first + self._token
        return SiteWrite(place.site, place.layer, torch.arange(count), tokens, first, vectors)

    def _full_pass(
        self, write: SiteWrite, count: int, tokens: Tensor | None, *, gradients: bool = False
    ) -> Tensor:
        """Return [K, tokens]: logits after a write, in passes without blocks if possible."""
        model, batch = self.model, self._batch.take(torch.zeros(count, dtype=torch.long))
        at = torch.full((count, 1), self._token)
        with ExitStack() as stack:
            for block in model.anatomy.blocks if model.restartable else ():
                module = model.module.get_submodule(block.path)
                stub = BlockStub(model.calling.block_returns)
                stack.enter_context(replace_forward(module, stub))
            logits = run_full(
                model, batch, writes=[write], logits_at=at, tokens=tokens, gradients=gradients
            ).logits
        assert logits is not None
        return logits[:, 0]

    @cached_property
    def _batch(self) -> Batch:
        """A row of one token; in an encoder-decoder, one of the decoder, after one of an encoder
        that doesn't run. Blocks that attend to an image get vectors of 0."""
        model = self.model
        batch = Batch.of([(0,)], model.pad_id, model.calling.side, model.device)
        if not model.shape.encodes_apart:
            return batch
        if model.shape.attends_to_image:
            tiles = torch.ones(1, 1, model.shape.tiles, dtype=torch.long, device=model.device)
            size = 1, model.shape.attended, model.shape.d_model
            image = torch.zeros(size, dtype=model.dtype, device=model.device)
            return replace(batch, extra={ATTENDED: image, TILES: tiles})
        width = model.shape.others["encoder"].d_model
        encoded = torch.zeros(1, 1, width, dtype=model.dtype, device=model.device)
        return replace(batch, extra={ENCODED: encoded}).after(batch)

    @property
    def _token(self) -> int:
        """The position of the only token, which in a decoder follows that of the encoder."""
        return int(self._batch.lengths[0]) - 1

    @cached_property
    def _kept(self) -> ActivationCache | None:
        """Cache that rows of one token start from; None if they are full passes."""
        if not self.model.restartable or self.model.shape.encodes_apart:
            return None
        with record_activations(self.model, self._batch, self.model.shape.n_layers - 1) as kept:
            run_full(self.model, self._batch)
        return kept

    # --- the norm ---------------------------------------------------------------------------------

    @cached_property
    def _norm(self) -> FoldedNorm:
        path = self.model.anatomy.final_norm
        assert path is not None
        return FoldedNorm(self.model.module.get_submodule(path), self.model.shape.d_model)

    @property
    def folds(self) -> bool:
        """Whether the final norm is a scale times a linear map."""
        return self._norm.error < LINEAR_TOLERANCE


class FoldedNorm:
    """A norm as a linear map: optional centering, a gain, and a scale that depends on the input."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module = copy.deepcopy(module).float()
        kind = next(self.module.parameters(), None)
        self.device = torch.device("cpu") if kind is None else kind.device
        # Numbers of equal size with mean 0, large enough that ε is negligible.
        sign = torch.ones(width, device=self.device)
        sign[1::2] = -1
        if width % 2:
            sign[-1] = 0
        probe = 1000 * sign
        self.bias = self.of(torch.zeros_like(probe)[None])[0]
        raised = self.of((probe + 500)[None])[0]
        plain = self.of(probe[None])[0]
        self.centred = bool(torch.allclose(raised, plain, rtol=1e-3, atol=1e-3))
        other = torch.roll(probe, 1) if width % 2 else probe
        gain = (plain - self.bias) * sign
        if width % 2:  # the shifted probe covers the entry that is 0 in the first one
            gain[-1] = ((self.of(other[None])[0] - self.bias) * torch.roll(sign, 1))[-1]
        self.gain = gain
        """[d_model], up to a common factor."""

    def of(self, vectors: Tensor) -> Tensor:
        """Return [K, d_model]: the norm's output."""
        with torch.inference_mode():
            return self.module(vectors.to(self.device).float()).clone()

    def linear(self, vectors: Tensor) -> Tensor:
        """Return [K, d_model]: the output without bias and scale."""
        vectors = vectors.to(self.device).float()
        if self.centred:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors * self.gain

    @property
    def error(self) -> float:
        """Deviation from the linear form on random vectors, relative to their size."""
        draw = torch.Generator().manual_seed(0)
        vectors = torch.randn(4, len(self.gain), generator=draw).to(self.device) * 3 + 1
        given, along = self.of(vectors) - self.bias, self.linear(vectors)
        scale = (given * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True)
        return float((given - along * scale).abs().max() / given.abs().max())
