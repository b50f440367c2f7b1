"""TransformerLens: `run_with_hooks` per cell, as its own `patching` module does it.

Version 4 has no HookedTransformer any more. TransformerBridge runs as it is built; its
compatibility mode without processing takes the same time and gives the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from benchmarks.model import build
from benchmarks.tools.base import Ids, Loop
from benchmarks.work import Batch, Cell, Work

_NAMES = {"resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out", "z": "attn.hook_z"}


class Bridged(Loop):
    """A whole pass per cell, batched over the prompts."""

    packages = ("transformer-lens", "torch", "transformers")

    def build(self, work: Work) -> None:
        model = build(work.shape)
        self.model: Any = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)

    def begin(self, batch: Batch, ids: Ids) -> None:
        self.length, self.ids = batch.length, ids
        ending = _NAMES[self.work.site]
        names = [self._name(layer) for layer in range(self.work.shape.layers)]
        _, cache = self.model.run_with_cache(
            ids.clean, names_filter=lambda name: name.endswith(ending)
        )
        self.source = {name: cache[name] for name in names}

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        return torch.stack([self._cell(cell) for cell in cells])

    def _cell(self, cell: Cell) -> Tensor:
        hooks = [
            (self._name(layer), partial(self._write, cell=cell, name=self._name(layer)))
            for layer in cell.layers
        ]
        logits = self.model.run_with_hooks(self.ids.corrupted, fwd_hooks=hooks)
        return self.ids.difference(logits[:, -1])

    def _name(self, layer: int) -> str:
        return f"blocks.{layer}.{_NAMES[self.work.site]}"

    def _write(self, value: Tensor, hook: Any, *, cell: Cell, name: str) -> Tensor:
        """value: [row, token, width] or, of z, [row, token, head, d_head]"""
        place = cell.at(self.length)
        if cell.head is None:
            value[:, place] = self.source[name][:, place]
        else:
            value[:, place, cell.head] = self.source[name][:, place, cell.head]
        return value
