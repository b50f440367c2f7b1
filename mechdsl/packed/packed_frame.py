# pyright: reportUnknownMemberType=false
"""Where the tokens of packed rows lie in each block, and in the tensors that are tapped there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.hooks.batch import to_device
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import ReadMismatch, SiteRead
from mechdsl.packed.activation_cache import ActivationCache
from mechdsl.packed.behind_last_block import End, is_causal
from mechdsl.packed.layout import BlockPack, pack_block, same_work, universe
from mechdsl.plan.restart import BlockWork, RowMasks, Shortcuts, block_work
from mechdsl.vocab.sites import SITES


class PromptColumns:
    """From positions in prompts to columns of what was kept."""

    def __init__(self, kept: ActivationCache, lanes: Ints) -> None:
        self._kept, self._lanes = kept, lanes
        self.starts = kept.batch.starts.numpy()[lanes]
        self.lengths = kept.batch.lengths.numpy()[lanes]
        column = np.arange(kept.columns) - self.starts[:, None]
        self.real = (column >= 0) & (column < self.lengths[:, None])

    def ids(self) -> Ints:
        """[row, column] token ids."""
        return self._kept.batch.ids.cpu().numpy()[self._lanes]

    def of(self, rows: Ints | Tensor, positions: Ints | Tensor) -> Ints:
        """[n] columns; ValueError for a position that isn't in its prompt."""
        row, position = np.asarray(rows), np.asarray(positions)
        if ((position < 0) | (position >= self.lengths[row])).any():
            raise ValueError("a position is not in its prompt")
        return self.starts[row] + position


class PackedFrame:
    """The `Frame` of one pass over packed rows: which tokens each block computes, and where."""

    def __init__(
        self,
        model: LoadedModel,
        kept: ActivationCache,
        lanes: Ints,
        rows: RowMasks,
        shortcuts: Shortcuts,
        end: End,
    ) -> None:
        self.model = model
        self.kept = kept
        self.lanes = lanes
        self.device = model.device
        self.end = end
        self.causal = is_causal(model, kept)
        self.prompts = PromptColumns(kept, lanes)
        self.packs: list[BlockPack | None] = []
        """[block]; None for one that computes nothing."""
        self.work: list[BlockWork] = []
        for work in block_work(
            rows,
            model.shape.n_layers,
            parallel=model.parallel,
            causal=self.causal,
            shortcuts=shortcuts,
        ):
            below = self.packs[-1] if self.packs else None
            if below is not None and same_work(work, self.work[-1]):
                self.packs.append(below)
            elif work.present.any():
                self.packs.append(pack_block(work, lanes, kept, self.device))
            else:
                self.packs.append(None)
            self.work.append(work)
        embedded = rows.reads.get(("embed", None))
        outside = rows.final if embedded is None else rows.final | embedded
        self.universe, self.size = universe(self.packs, outside)
        self.final = np.full(rows.final.shape, -1, dtype=np.int64)
        """[row, column] → which of the tokens behind the last block, -1 for none."""
        row, column = np.nonzero(rows.final)
        self.final[row, column] = np.arange(len(row))

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def leading(self) -> int:
        """All rows are one for the model."""
        return 1

    @property
    def lane_starts(self) -> Tensor:
        """[lane] column of each kept prompt's first token."""
        return self.kept.batch.starts

    @property
    def key_width(self) -> int:
        """Columns of the kept prompts."""
        return self.kept.columns

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Columns of the kept prompts in which the rows' positions lie."""
        return torch.from_numpy(self.prompts.of(rows, positions))

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[row] tokens of each prompt."""
        return torch.from_numpy(self.prompts.lengths)

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero, the token, and whether it is there: all rows are one for the model, but for what
        they are in the end."""
        row = rows.numpy()
        column = self.prompts.of(row, positions)
        if (located := self.end.located(site, rows, positions)) is not None:
            return *located, rows >= 0
        index = self.index(SiteRead(site, layer, stack), row, column)
        return torch.zeros_like(index), index, index >= 0

    def index(self, where: SiteRead, rows: Ints, columns: Ints) -> Tensor:
        """[n] token of the tensor tapped at a site, -1 where it isn't there."""
        if (index := self.end.index(where.site, self.final, rows, columns)) is not None:
            return torch.from_numpy(index)
        if where.layer is None:
            lookup = self.universe if where.site == "embed" else self.final
        else:
            pack = self.packs[where.layer]
            if pack is None:
                return torch.full((len(rows),), -1)
            whole = len(self.model.anatomy.blocks[where.layer].mlp) == 1
            inside = SITES[where.site].stage == "in_mlp" and whole and pack.mlp is not None
            lookup = pack.mlp.lookup if inside and pack.mlp is not None else pack.lookup
        return torch.from_numpy(lookup[rows, columns])

    def taken(self, where: SiteRead, found: Tensor, rows: Ints, columns: Ints) -> Tensor:
        """[n, units, width] of what was read; ReadMismatch where a token isn't computed."""
        index = self.index(where, rows, columns)
        if bool((index < 0).any()):
            raise ReadMismatch(f"`{where.site}` is read at a token that isn't in the pass")
        taken = self.end.taken(where.site, found, rows, columns)
        return found[0][to_device(index, self.device)] if taken is None else taken
