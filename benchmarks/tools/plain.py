"""The loop without any library: source values kept once, one hooked forward pass per cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model import build
from benchmarks.tools.base import Ids, Loop
from benchmarks.work import Batch, Cell, Work


class Plain(Loop):
    """A whole pass of the transformers model per cell, batched over the prompts."""

    packages = ("torch", "transformers")

    def build(self, work: Work) -> None:
        self.model = build(work.shape)
        self.d_head = work.shape.width // work.shape.heads
        self.blocks: list[Any] = list(self.model.transformer.h)

    def begin(self, batch: Batch, ids: Ids) -> None:
        self.length, self.ids = batch.length, ids
        kept: list[Tensor] = []
        handles = [
            self.hook(layer, lambda value: kept.append(value))
            for layer in range(self.work.shape.layers)
        ]
        self.model(ids.clean, use_cache=False)
        for handle in handles:
            handle.remove()
        self.source = kept

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        return torch.stack([self._cell(cell) for cell in cells])

    def _cell(self, cell: Cell) -> Tensor:
        handles = [self._write(layer, cell) for layer in cell.layers]
        try:
            logits = self.model(self.ids.corrupted, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return self.ids.difference(logits[:, -1])

    def _write(self, layer: int, cell: Cell) -> Any:
        part = self.part(cell)
        source, place = self.source[layer], cell.at(self.length)

        def write(value: Tensor) -> Tensor:
            value = value.clone()
            value[:, place, part] = source[:, place, part]
            return value

        return self.hook(layer, write)

    def part(self, cell: Cell) -> slice:
        """The cell's slice of the site's vector."""
        if cell.head is None:
            return slice(None)
        return slice(cell.head * self.d_head, (cell.head + 1) * self.d_head)

    def hook(self, layer: int, change: Any) -> Any:
        """`change` sees the site's value [row, token, width]; a tensor it returns is put there."""
        block = self.blocks[layer]
        if self.work.site == "mlp_out":
            return block.mlp.register_forward_hook(lambda _m, _a, output: change(output))
        target: nn.Module = block if self.work.site == "resid_pre" else block.attn.c_proj

        def before(_module: nn.Module, arguments: tuple[Any, ...]) -> Any:
            changed = change(arguments[0])
            return None if changed is None else (changed, *arguments[1:])

        return target.register_forward_pre_hook(before)


class PlainBatched(Plain):
    """The same with several cells of the same layers in one pass."""

    together = 16
    """Cells."""

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, cell in enumerate(cells):
            groups.setdefault(cell.layers, []).append(index)
        rows = len(self.ids.corrupted)
        found = torch.empty(len(cells), rows)
        for group in groups.values():
            for start in range(0, len(group), self.together):
                chosen = group[start : start + self.together]
                found[chosen] = self._several([cells[i] for i in chosen], rows)
        return found

    def _several(self, cells: Sequence[Cell], rows: int) -> Tensor:
        handles = [self._write_all(layer, cells, rows) for layer in cells[0].layers]
        ids = self.ids
        try:
            logits = self.model(ids.corrupted.repeat(len(cells), 1), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        logits = logits[:, -1].unflatten(0, (len(cells), rows))
        return torch.stack([ids.difference(each) for each in logits])

    def _write_all(self, layer: int, cells: Sequence[Cell], rows: int) -> Any:
        source = self.source[layer]

        def write(value: Tensor) -> Tensor:
            value = value.clone()
            for number, cell in enumerate(cells):
                place, part = cell.at(self.length), self.part(cell)
                own = slice(number * rows, (number + 1) * rows)
                value[own, place, part] = source[:, place, part]
            return value

        return self.hook(layer, write)
