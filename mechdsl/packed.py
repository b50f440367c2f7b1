# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Patched rows: only what changes is computed, for many rows in one pass.

Rows join the pass in the block of their lowest write, with the input that the unpatched run kept.
All tokens of all rows lie side by side, without padding, and go through the model's own blocks:
projections and MLPs run on those tokens alone whose input changed and whose output is seen, the
others get the value of the unpatched run. Only attention knows of rows (`attention`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.attention import attend, exchanged
from mechdsl.batch import on_device
from mechdsl.columns import Ints
from mechdsl.hooks import ReadMismatch, SiteRead, SiteWork, SiteWrite, call, narrowed
from mechdsl.kept import Kept, parts
from mechdsl.loaded import LoadedModel
from mechdsl.pack import (
    BlockPack,
    Entry,
    Part,
    entry,
    masks_of,
    pack_block,
    same_work,
    universe,
)
from mechdsl.restart import BlockWork, RowMasks, Shortcuts, block_work
from mechdsl.taps import Stub, fused, given_again, given_to, replaced

Places = tuple[Ints, Ints]
"""Rows and the positions in their prompts, as parallel columns."""


@dataclass(frozen=True, eq=False)
class PackedResult:
    """What measures read of packed rows."""

    logits: Tensor
    """[n, vocab], or [n, K] of the K tokens asked for, in the order of `final`."""
    reads: Mapping[SiteRead, Tensor]
    """[places of that site, units, width], in the order asked for."""
    work: tuple[int, ...]
    """Tokens that passed through each block."""


def run_packed(
    model: LoadedModel,
    kept: Kept,
    lanes: Ints,
    *,
    writes: Sequence[SiteWrite],
    final: Places,
    reads: Mapping[SiteRead, Places] | None = None,
    tokens: Tensor | None = None,
    shortcuts: Shortcuts | None = None,
    fuse: bool = True,
) -> PackedResult:
    """Run rows that start from kept lanes.

    lanes: [row], the lane that each starts from.
    final: places whose logits are wanted. tokens: [K] long, the only tokens whose logits are.
    """
    columns = _Columns(kept, lanes)
    reads = reads or {}
    read_columns = {r: (places[0], columns.of(*places)) for r, places in reads.items()}
    shape = (len(lanes), kept.columns)
    written = [
        ((w.site, w.layer), w.rows.cpu().numpy(), columns.of(w.rows, w.positions)) for w in writes
    ]
    final_columns = columns.of(*final)
    read_behind = np.zeros(shape, dtype=np.bool_)
    read_behind[final[0], final_columns] = True
    pass_ = _Pass(
        model,
        kept,
        lanes,
        RowMasks(
            real=columns.real,
            writes=masks_of(written, shape),
            reads=masks_of([((r.site, r.layer), *p) for r, p in read_columns.items()], shape),
            final=read_behind,
        ),
        shortcuts or Shortcuts(),
    )
    logits, found = pass_.run(writes, list(reads), tokens, fuse=fuse)
    at = on_device(pass_.final[final[0], final_columns], logits.device)
    return PackedResult(
        logits[at],
        {read: found[read][0][pass_.present(read, *read_columns[read])] for read in reads},
        tuple(0 if pack is None else len(pack) for pack in pass_.packs),
    )


class _Columns:
    """From positions in prompts to columns of what was kept."""

    def __init__(self, kept: Kept, lanes: Ints) -> None:
        self.starts = kept.batch.starts.cpu().numpy()[lanes]
        self.real = kept.batch.mask.cpu().numpy().astype(np.bool_)[lanes]

    def of(self, rows: Ints | Tensor, positions: Ints | Tensor) -> Ints:
        """[n] columns; ValueError for a position that isn't in its prompt."""
        row, position = np.asarray(rows), np.asarray(positions)
        if ((position < 0) | (position >= self.real.sum(axis=1)[row])).any():
            raise ValueError("a position is not in its prompt")
        return self.starts[row] + position


class _Pass:
    """One pass over packed rows. It is a `Frame`: it knows where tokens lie in each block."""

    def __init__(
        self, model: LoadedModel, kept: Kept, lanes: Ints, rows: RowMasks, shortcuts: Shortcuts
    ) -> None:
        self.model = model
        self.kept = kept
        self.lanes = lanes
        self.rows = rows
        self.device = model.device
        n_layers = model.shape.n_layers
        self.packs: list[BlockPack | None] = []
        self.work: list[BlockWork] = []
        for work in block_work(rows, n_layers, parallel=model.parallel, shortcuts=shortcuts):
            below = self.packs[-1] if self.packs else None
            if below is not None and same_work(work, self.work[-1]):
                self.packs.append(below)
            elif work.present.any():
                self.packs.append(pack_block(work, lanes, kept, self.device))
            else:
                self.packs.append(None)
            self.work.append(work)
        self.universe, self.size = universe(self.packs, rows.final)
        self.final = np.full(rows.final.shape, -1, dtype=np.int64)
        row, column = np.nonzero(rows.final)
        self.final[row, column] = np.arange(len(row))
        self.layer = -1
        self.masks: dict[object, Tensor | None] = {}

    # --- where tokens lie -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def lengths(self) -> Tensor:
        """[row] tokens of each prompt."""
        return self.kept.batch.lengths[on_device(self.lanes, self.device)]

    def locate(
        self, where: SiteRead, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero, the token, and whether it is there: all rows are one for the model."""
        row = rows.cpu().numpy()
        column = _Columns(self.kept, self.lanes).of(row, positions.cpu().numpy())
        index = self.index(where, row, column).to(rows.device)
        return torch.zeros_like(index), index, index >= 0

    def index(self, where: SiteRead, rows: Ints, columns: Ints) -> Tensor:
        """[n] token of the tensor tapped at a site, -1 where it isn't there."""
        if where.layer is None:
            lookup = self.universe if where.site == "embed" else self.final
        else:
            pack = self.packs[where.layer]
            if pack is None:
                return torch.full((len(rows),), -1)
            inside = where.site == "mlp_hidden" and pack.mlp is not None
            lookup = pack.mlp.lookup if inside and pack.mlp is not None else pack.lookup
        return torch.from_numpy(lookup[rows, columns])

    def present(self, where: SiteRead, rows: Ints, columns: Ints) -> Tensor:
        """[n] token of the tapped tensor; ReadMismatch where one isn't computed."""
        index = self.index(where, rows, columns)
        if bool((index < 0).any()):
            raise ReadMismatch(f"`{where.site}` is read at a token that isn't in the pass")
        return index.to(self.device)

    # --- running ----------------------------------------------------------------------------------

    def run(
        self,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        tokens: Tensor | None,
        *,
        fuse: bool,
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        """([final token, vocab], what was read)."""
        row, column = np.nonzero(self.universe >= 0)
        order = np.argsort(self.universe[row, column])
        row, column = row[order], column[order]
        lane = on_device(self.lanes[row], self.device)
        at = on_device(column, self.device)
        work = SiteWork(self.model, self, writes, reads)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(exchanged(self.model, self._attention, masked=False))
            if fuse:
                stack.enter_context(fused(self.model.module))
            stack.enter_context(self._embedded(lane * self.kept.columns + at))
            stack.enter_context(self._blocks())
            stack.enter_context(work.installed())
            stack.enter_context(self._top())
            stack.enter_context(narrowed(self.model, tokens))
            logits = call(
                self.model,
                self.kept.batch.ids[lane, at][None],
                None,
                self.kept.batch.position_ids()[lane, at][None],
            )
        logits = work.output(logits)
        work.check()
        return logits[0], work.found

    def _module(self, path: str) -> nn.Module:
        return self.model.module.get_submodule(path)

    @contextmanager
    def _embedded(self, index: Tensor) -> Generator[None]:
        """Tokens are embedded as in the unpatched run, with its noise."""
        embedded = self.kept.embedded
        if embedded is None:
            yield
            return

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return embedded[index][None]

        handle = self._module(self.model.anatomy.embedding).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _blocks(self) -> Generator[None]:
        """Every block gets its tokens, and computes what has to be computed of them."""
        anatomy = self.model.anatomy
        with ExitStack() as stack:
            below, width = self.universe, self.size
            for layer, pack in enumerate(self.packs):
                block = self._module(anatomy.block.format(layer=layer))
                if pack is None:
                    stub = Stub(self.model.calling.block_returns)
                    stack.enter_context(replaced(block, stub))
                    continue
                carried = self.work[layer].carried
                source = entry(below, pack, carried, self.device, width)
                hook = self._enter(layer, pack, source)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                projections, output, mlp = parts(self.model, layer)
                for path, part in (
                    *((path, pack.project) for path in projections),
                    (output, pack.output),
                    (mlp, pack.mlp),
                ):
                    if part is not None:
                        module = self._module(path)
                        forward = _partly(module.forward, part, self.kept.outputs[path])
                        stack.enter_context(replaced(module, forward))
                below, width = pack.lookup, len(pack)
            self.top = below
            yield

    def _enter(self, layer: int, pack: BlockPack, source: Entry | None) -> Any:
        """A hook that hands a block its tokens, and what the model knows about them."""
        row, column = np.nonzero(pack.lookup >= 0)
        known = np.empty(len(pack), dtype=np.int64)
        known[pack.lookup[row, column]] = self.universe[row, column]
        size = self.size
        same = len(known) == size and bool((known == np.arange(size)).all())
        index = None if same else on_device(known, self.device)
        hidden_below = self.kept.hidden.get(layer)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.layer = layer
            hidden = _assembled(given_to(args, kwargs), source, hidden_below)
            if index is not None:
                args = tuple(_selected(value, index, size) for value in args)
                kwargs = {name: _selected(value, index, size) for name, value in kwargs.items()}
            return given_again(args, kwargs, hidden)

        return hook

    @contextmanager
    def _top(self) -> Generator[None]:
        """Behind the last block only the tokens that are read go on."""
        below = self.top
        row, column = np.nonzero(self.final >= 0)
        source = below[row, column] if self.packs[-1] is not None else np.full(len(row), -1)
        stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
        places = self.lanes[row] * self.kept.columns + column
        put = Entry(
            *(
                on_device(index, self.device)
                for index in (stays, source[stays], fresh, places[fresh])
            )
        )
        count, size = len(row), self.size
        anatomy, n_layers = self.model.anatomy, self.model.shape.n_layers

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = given_to(args, kwargs)
            hidden = _assembled(hidden, put, self.kept.hidden[n_layers])
            return given_again(args, kwargs, hidden)

        def spread(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Some models give what comes out the shape that went in.
            rest = output.new_zeros(1, size - count, output.shape[2])
            return torch.cat([output, rest], dim=1)

        def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return given_again(args, kwargs, given_to(args, kwargs)[:, :count])

        norm, unembedding = self._module(anatomy.final_norm), self._module(anatomy.unembedding)
        with ExitStack() as stack:
            handle = norm.register_forward_pre_hook(gather, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            if size > count:
                stack.callback(norm.register_forward_hook(spread).remove)
                handle = unembedding.register_forward_pre_hook(cut, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        pack = self.packs[self.layer]
        assert pack is not None
        _, heads, count, width = query.shape
        out = query.new_empty(count, heads, width)
        if pack.attend is not None:
            out[pack.attend.taken] = self.kept.z[self.layer][pack.attend.taken_from]
        attend(
            query[0],
            key[0],
            value[0],
            pack.groups,
            self.kept.attention[self.layer],
            out,
            masks=self.masks,
            **kwargs,
        )
        return out[None], None


def _partly(forward: Any, part: Part, kept: Tensor) -> Any:
    """A module's forward on some tokens; the others get what was kept."""

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = kept.new_empty(1, hidden.shape[1], kept.shape[1])
        out[0, part.taken] = kept[part.taken_from]
        if len(part.computed):
            out[0, part.computed] = forward(hidden[:, part.computed], *args, **kwargs)[0]
        return out

    return run


def _assembled(below: Tensor, source: Entry | None, kept: Tensor | None) -> Tensor:
    """[1, N, d_model]: the tokens of a block."""
    if source is None:
        return below
    assert kept is not None
    count = len(source.carried) + len(source.fresh)
    hidden = below.new_empty(1, count, below.shape[2])
    hidden[0, source.carried] = below[0, source.carried_from]
    hidden[0, source.fresh] = kept[source.fresh_from]
    return hidden


def _selected(value: Any, index: Tensor, size: int) -> Any:
    """What the model hands its blocks for all `size` tokens, for some of them."""
    if isinstance(value, Tensor):
        if value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == size:
            return value.index_select(1, index)
        return value
    if isinstance(value, tuple):
        return tuple(_selected(one, index, size) for one in value)
    return value
