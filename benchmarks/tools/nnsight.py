"""nnsight: a trace per cell, and the invokes of a layer's cells batched in one trace.

As its documentation on activation patching does it: the clean run is kept once; for a map over
layers and positions, cells of one layer are invokes of one trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.model import build
from benchmarks.tools.base import Ids, Loop
from benchmarks.work import Batch, Cell, Work


class Traced(Loop):
    """One trace per cell, batched over the prompts."""

    packages = ("nnsight", "torch", "transformers")

    def load(self, work: Work, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json"))
        )
        self.tokenizer.pad_token_id = 0
        super().load(work, folder)

    def build(self, work: Work) -> None:
        self.model = TransformersModel(
            build(work.shape), task="text-generation", tokenizer=self.tokenizer
        )
        self.d_head = work.shape.width // work.shape.heads

    def begin(self, batch: Batch, ids: Ids) -> None:
        self.length, self.ids = batch.length, ids
        blocks: Any = self.model.transformer.h
        site = self.work.site
        with self.model.trace(ids.clean, use_cache=False):
            if site == "resid_pre":
                source = nnsight.save([block.input for block in blocks])
            elif site == "mlp_out":
                source = nnsight.save([block.mlp.output for block in blocks])
            else:
                source = nnsight.save([block.attn.c_proj.input for block in blocks])
        self.source: list[Tensor] = source

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        return torch.stack([self._cell(cell) for cell in cells])

    def _cell(self, cell: Cell) -> Tensor:
        model, ids = self.model, self.ids
        with model.trace(ids.corrupted, use_cache=False):
            self._write(cell)
            found = ids.difference(model.lm_head.output[:, -1]).save()
        return found  # noqa: RET504

    def _write(self, cell: Cell) -> None:
        """Put the source's values in place; inside a trace or an invoke."""
        place = cell.at(self.length)
        for layer in cell.layers:
            block: Any = self.model.transformer.h[layer]
            source = self.source[layer]
            if self.work.site == "resid_pre":
                block.input[:, place] = source[:, place]
            elif self.work.site == "mlp_out":
                block.mlp.output[:, place] = source[:, place]
            else:
                assert cell.head is not None
                part = slice(cell.head * self.d_head, (cell.head + 1) * self.d_head)
                block.attn.c_proj.input[:, place, part] = source[:, place, part]


class Invoked(Traced):
    """Several cells of the same layers as invokes of one trace."""

    together = 16
    """Cells."""

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, cell in enumerate(cells):
            groups.setdefault(cell.layers, []).append(index)
        found = torch.empty(len(cells), len(self.ids.corrupted))
        for group in groups.values():
            for start in range(0, len(group), self.together):
                chosen = group[start : start + self.together]
                found[chosen] = self._several([cells[i] for i in chosen])
        return found

    def _several(self, cells: Sequence[Cell]) -> Tensor:
        model, ids = self.model, self.ids
        with model.trace(use_cache=False) as tracer:
            found = nnsight.save([])
            for cell in cells:
                with tracer.invoke(ids.corrupted):
                    self._write(cell)
                    found.append(ids.difference(model.lm_head.output[:, -1]))
        return torch.stack(found)
