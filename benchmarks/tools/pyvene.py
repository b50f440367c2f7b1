"""pyvene: an IntervenableModel per set of joined layers, called once per cell.

As in its tutorials the source goes in with every call and runs every time; `Cached` hands over
activations that were collected once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyvene as pv
import torch
from torch import Tensor

from benchmarks.model import build
from benchmarks.tools.base import Ids, Loop
from benchmarks.work import Batch, Cell, Work

_COMPONENTS = {
    "resid_pre": "block_input",
    "mlp_out": "mlp_output",
    "z": "head_attention_value_output",
}
_COLLECTED = {**_COMPONENTS, "z": "attention_value_output"}


class Intervenable(Loop):
    """The source runs in every cell."""

    packages = ("pyvene", "torch", "transformers")
    grouped = True
    """Joined layers take their source from one run."""

    def build(self, work: Work) -> None:
        self.model = build(work.shape)
        joined = sorted({cell.layers for cell in self.cells})
        self.intervenables = {layers: self._intervenable(layers) for layers in joined}

    def _unit(self) -> str:
        if self.work.site != "z":
            return "pos"
        return "h" if self.work.positions == "all" else "h.pos"

    def _intervenable(self, layers: tuple[int, ...]) -> Any:
        representations: list[dict[str, Any]] = [
            {
                "layer": layer,
                "component": _COMPONENTS[self.work.site],
                "unit": self._unit(),
                "intervention_type": pv.VanillaIntervention,
                **({"group_key": 0} if self.grouped else {}),
            }
            for layer in layers
        ]
        return pv.IntervenableModel(representations, self.model, use_fast=True)

    def begin(self, batch: Batch, ids: Ids) -> None:
        self.length, self.ids = batch.length, ids

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        return torch.stack([self._cell(cell) for cell in cells])

    def _cell(self, cell: Cell) -> Tensor:
        _, output = self.intervenables[cell.layers](
            base={"input_ids": self.ids.corrupted},
            unit_locations={"sources->base": self._locations(cell)},
            use_cache=False,
            **self._source(cell),
        )
        return self.ids.difference(output.logits[:, -1])

    def _source(self, cell: Cell) -> dict[str, Any]:
        return {"sources": [{"input_ids": self.ids.clean}]}

    def _locations(self, cell: Cell) -> Any:
        """As pyvene takes them: a position, a head, or lists [intervention, level, row, unit]."""
        if cell.head is not None and cell.position == "all":
            return cell.head
        position = cell.at(self.length).start
        if cell.head is None:
            return position
        rows = len(self.ids.corrupted)
        levels = [[[[cell.head]] * rows, [[position]] * rows]]
        return (levels, levels)


class Cached(Intervenable):
    """The source runs once; its activations are collected and handed over."""

    grouped = False

    def build(self, work: Work) -> None:
        super().build(work)
        self.collector = pv.IntervenableModel(
            [
                {
                    "layer": layer,
                    "component": _COLLECTED[work.site],
                    "unit": "pos",
                    "max_number_of_units": work.longest,  # with less, values are cut off
                    "intervention_type": pv.CollectIntervention,
                }
                for layer in range(work.shape.layers)
            ],
            self.model,
        )

    def begin(self, batch: Batch, ids: Ids) -> None:
        super().begin(batch, ids)
        (_, collected), _ = self.collector(
            base={"input_ids": ids.clean},
            unit_locations={"base": list(range(batch.length))},
            use_cache=False,
        )
        heads = self.work.shape.heads
        if self.work.site == "z":
            # [row, head, token, d_head], as pyvene splits heads
            collected = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in collected]
        self.source: list[Tensor] = collected

    def _source(self, cell: Cell) -> dict[str, Any]:
        intervenable = self.intervenables[cell.layers]
        found = {
            key: self._at(cell, intervenable.representations[key].layer)
            for key in intervenable.sorted_keys
        }
        return {"source_representations": found}

    def _at(self, cell: Cell, layer: int) -> Tensor:
        source, place = self.source[layer], cell.at(self.length)
        if cell.head is None:
            return source[:, place]
        return source[:, cell.head : cell.head + 1, place]
