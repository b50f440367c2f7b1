"""A loop that an expert writes for GPT-2: rows restart where they are patched, layers are joined.

The base run's activations, keys and values are cached. A row begins at the layer that it patches
and at its leftmost patched position. Rows that begin at one position share a batch, which starts
with the rows of the lowest layer; those of each next layer are appended on the way up. In the last
block only the last token goes on, and only the two tokens of the metric are unembedded. Rows whose
source can't differ from the base are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.model import build
from benchmarks.tools.base import Ids, Loop
from benchmarks.work import Batch, Cell, Work

TOKENS = 2048
"""In one batch, at most."""


@dataclass(frozen=True)
class Unpatched:
    """What an unpatched run leaves: a list has an entry per block."""

    resid_pre: list[Tensor] = field(default_factory=list[Tensor])
    """[prompt, token, width]; one more, of what leaves the last block."""
    keys: list[Tensor] = field(default_factory=list[Tensor])
    """[prompt, head, token, d_head]"""
    values: list[Tensor] = field(default_factory=list[Tensor])
    """[prompt, head, token, d_head]"""
    z: list[Tensor] = field(default_factory=list[Tensor])
    """[prompt, token, width], heads side by side."""
    mlp_out: list[Tensor] = field(default_factory=list[Tensor])
    """[prompt, token, width]"""


@dataclass(frozen=True)
class Rows:
    """One batch: cells on prompts that begin at one position, by their lowest layer."""

    index: Tensor
    """[row] of the cell, among those asked for."""
    prompt: Tensor
    """[row]"""
    lowest: Tensor
    """[row] layer"""
    highest: Tensor
    """[row] layer"""
    head: Tensor
    """[row]; 0 for sites without heads."""
    place: slice
    """Positions that are patched."""

    @staticmethod
    def of(rows: Sequence[tuple[int, int]], cells: Sequence[Cell], length: int) -> Rows:
        """rows: (index of a cell, prompt)."""
        patched = [cells[index] for index, _ in rows]
        columns = (
            *zip(*rows, strict=True),
            [cell.layers[0] for cell in patched],
            [cell.layers[-1] for cell in patched],
            [cell.head or 0 for cell in patched],
        )
        index, prompt, lowest, highest, head = (torch.tensor(column) for column in columns)
        return Rows(index, prompt, lowest, highest, head, patched[0].at(length))


class Expert(Loop):
    """Restarted rows of all layers, in batches of one leftmost position."""

    packages = ("torch", "transformers")

    def build(self, work: Work) -> None:
        model: Any = build(work.shape)
        self.transformer = model.transformer
        self.blocks: list[Any] = list(model.transformer.h)
        self.unembedding: Tensor = model.lm_head.weight
        self.heads = work.shape.heads
        self.units = self.heads if work.site == "z" else 1
        """Parts of the site's vector that are patched by themselves."""

    # --- unpatched runs ---------------------------------------------------------------------------

    def begin(self, batch: Batch, ids: Ids) -> None:
        self.length, self.ids = batch.length, ids
        self.source, self.base = self._unpatched(ids.clean), self._unpatched(ids.corrupted)
        self.differs = ids.clean != ids.corrupted
        """[prompt, token]"""
        self.reached = self.differs.cumsum(1).bool()
        """[prompt, token], whether this token or an earlier one differs."""

    def _unpatched(self, ids: Tensor) -> Unpatched:
        run = Unpatched()
        hidden = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(self.length))
        for block in self.blocks:
            query, key, value = self._projected(block, hidden)
            z = _joined(F.scaled_dot_product_attention(query, key, value, is_causal=True))
            middle = hidden + block.attn.c_proj(z)
            mlp_out = _mlp(block, middle)
            run.resid_pre.append(hidden)
            run.keys.append(key)
            run.values.append(value)
            run.z.append(z)
            run.mlp_out.append(mlp_out)
            hidden = middle + mlp_out
        run.resid_pre.append(hidden)
        return run

    # --- patched rows -----------------------------------------------------------------------------

    def patch(self, cells: Sequence[Cell]) -> Tensor:
        prompts = torch.arange(len(self.ids.corrupted))
        found = self._metric(self.base.resid_pre[-1][:, -1], prompts).repeat(len(cells), 1)
        for rows in self._batches(cells):
            found[rows.index, rows.prompt] = self._metric(self._run(rows), rows.prompt)
        return found

    def _batches(self, cells: Sequence[Cell]) -> Iterator[Rows]:
        starting: dict[int, list[tuple[int, int]]] = {}
        for index, cell in enumerate(cells):
            place = cell.at(self.length)
            at_input = self.work.site == "resid_pre" and cell.layers[0] == 0
            changes = self.differs[:, place].any(1) if at_input else self.reached[:, place.stop - 1]
            rows = [(index, prompt) for prompt in changes.nonzero()[:, 0].tolist()]
            starting.setdefault(place.start, []).extend(rows)
        for start, rows in starting.items():
            rows.sort(key=lambda row: cells[row[0]].layers[0])
            count = max(1, TOKENS // (self.length - start))
            for first in range(0, len(rows), count):
                yield Rows.of(rows[first : first + count], cells, self.length)

    def _run(self, rows: Rows) -> Tensor:
        """[row, width]: what leaves the last block at the last token."""
        base, source, site, start = self.base, self.source, self.work.site, rows.place.start
        hidden = base.resid_pre[0].new_empty(0, self.length - start, self.work.shape.width)
        joined = torch.bincount(rows.lowest, minlength=len(self.blocks)).cumsum(0).tolist()
        for layer, block in enumerate(self.blocks):
            below, entered = len(hidden), joined[layer]
            if not entered:
                continue
            own = slice(below, entered)
            new, first = rows.prompt[own], start
            if site == "resid_pre":
                fresh = base.resid_pre[layer][new, first:]
                self._write(fresh, source.resid_pre[layer], rows, own, first)
                hidden = torch.cat([hidden, fresh])
            if layer == len(self.blocks) - 1:  # only the last token goes on
                first = self.length - 1
            z = self._attention(layer, hidden, rows.prompt[: len(hidden)], start, first)
            hidden = hidden[:, first - start :]
            if site == "z":
                fresh = base.z[layer][new, first:]
                self._write(fresh, source.z[layer], rows, own, first)
                z = torch.cat([z, fresh])
                hidden = torch.cat([hidden, base.resid_pre[layer][new, first:]])
            hidden = hidden + block.attn.c_proj(z)
            mlp_out = _mlp(block, hidden)
            if site == "mlp_out":
                inside = (rows.highest[:below] >= layer).nonzero()[:, 0]
                self._write(mlp_out, source.mlp_out[layer], rows, inside, first)
                fresh = base.mlp_out[layer][new, first:]
                unpatched = fresh.clone()
                self._write(fresh, source.mlp_out[layer], rows, own, first)
                fresh += base.resid_pre[layer + 1][new, first:] - unpatched
                hidden = torch.cat([hidden + mlp_out, fresh])
            else:
                hidden = hidden + mlp_out
        return hidden[:, -1]

    def _write(
        self, values: Tensor, source: Tensor, rows: Rows, which: slice | Tensor, first: int
    ) -> None:
        """Put the source's values in place.

        Args:
            values: [row, token, width], tokens from position `first` on; of the chosen rows if
                `which` is a slice, else of all.
            source: [prompt, token, width]
            which: The rows that are patched.
        """
        place = slice(max(first, rows.place.start), rows.place.stop)
        at = torch.arange(self.length)[place]
        targets = torch.arange(len(values)) if isinstance(which, slice) else which
        row, head = targets[:, None], rows.head[which][:, None]
        given = source.unflatten(-1, (self.units, -1))[rows.prompt[which][:, None], at, head]
        values.unflatten(-1, (self.units, -1))[row, at - first, head] = given

    def _attention(
        self, layer: int, hidden: Tensor, prompts: Tensor, start: int, first: int
    ) -> Tensor:
        """[row, token, width], z from position `first` on of rows that begin at `start`."""
        if not len(hidden):  # PyTorch 2.11 gives None for 16 bits on a GPU
            return hidden[:, first - start :]
        query, key, value = self._projected(self.blocks[layer], hidden)
        query = query[:, :, first - start :]
        if start:
            key = torch.cat([self.base.keys[layer][prompts, :, :start], key], dim=2)
            value = torch.cat([self.base.values[layer][prompts, :, :start], value], dim=2)
        mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()[first:]
        given = None if len(mask) == 1 else mask
        return _joined(F.scaled_dot_product_attention(query, key, value, attn_mask=given))

    def _projected(self, block: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [row, head, token, d_head]."""
        every = block.attn.c_attn(block.ln_1(hidden)).unflatten(-1, (3, self.heads, -1))
        return every.permute(2, 0, 3, 1, 4).unbind()

    def _metric(self, last: Tensor, prompts: Tensor) -> Tensor:
        """[row] logit(answer) - logit(wrong) of what leaves the last block, [row, width]."""
        answer, wrong = self.ids.answer[prompts], self.ids.wrong[prompts]
        axis = self.unembedding[answer] - self.unembedding[wrong]
        return (self.transformer.ln_f(last) * axis).sum(-1)


def _joined(z: Tensor) -> Tensor:
    """[row, token, width] of [row, head, token, d_head]."""
    return z.transpose(1, 2).flatten(2)


def _mlp(block: Any, hidden: Tensor) -> Tensor:
    """The MLP, its activation in one kernel."""
    inside = F.gelu(block.mlp.c_fc(block.ln_2(hidden)), approximate="tanh")
    return block.mlp.c_proj(inside)
