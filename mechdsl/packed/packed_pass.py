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

from mechdsl.base.arrays import Ints
from mechdsl.hooks.attention_functions import (
    CannotPack,
    attend,
    cross_modules,
    current_block,
    exchanged,
    implementations,
    own_function,
)
from mechdsl.hooks.batch import on_device
from mechdsl.hooks.calls import call, chosen, narrowed, text_inputs
from mechdsl.hooks.hook_points import Stub, fused, given_again, given_to, replaced
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import ReadMismatch, SiteRead, SiteWrite
from mechdsl.hooks.site_hooks import SiteWork
from mechdsl.packed.activation_cache import ActivationCache, parts
from mechdsl.packed.behind_last_block import End, Finals, Places, assembled, end_of, is_causal
from mechdsl.packed.layout import (
    BlockInput,
    BlockPack,
    ComputedTokens,
    entry,
    masks_of,
    pack_block,
    same_work,
    universe,
)
from mechdsl.packed.through_one_prompt import entering, placed, prompt_of
from mechdsl.plan.restart import BlockWork, Held, RowMasks, Shortcuts, block_work
from mechdsl.vocab.sites import SITES


@dataclass(frozen=True, eq=False)
class PackedResult:
    """What measures read of packed rows."""

    logits: Tensor
    """[n, vocab], or [n, K] of the K tokens asked for, in the order of `final`; [row, labels] of
    images that have one output."""
    reads: Mapping[SiteRead, Tensor]
    """[places of that site, units, width], in the order asked for."""
    work: tuple[int, ...]
    """Tokens that passed through each block."""


def run_packed(
    model: LoadedModel,
    kept: ActivationCache,
    lanes: Ints,
    *,
    writes: Sequence[SiteWrite],
    final: Places,
    reads: Mapping[SiteRead, Places] | None = None,
    tokens: Tensor | None = None,
    shortcuts: Shortcuts | None = None,
    fuse: bool = True,
    edges: Sequence[EdgeWrite] = (),
    held: Held | None = None,
) -> PackedResult:
    """Run rows that start from kept lanes.

    lanes: [row], the lane that each starts from.
    final: places whose logits are wanted. tokens: [K] long, the only tokens whose logits are.
    edges: of attention, that are changed. held: rows whose sublayers keep the lane's values.
    """
    columns = _Columns(kept, lanes)
    reads = reads or {}
    if stack := next((one.stack for one in (*writes, *reads) if one.stack), ""):
        raise ValueError(f"rows of sites of the stack `{stack}` are whole passes")
    end = end_of(model)
    final = end.made_of(final, columns.real)
    read_columns = {r: (places[0], columns.of(*places)) for r, places in reads.items()}
    shape = (len(lanes), kept.columns)
    written = [
        ((w.site, w.layer), w.rows.cpu().numpy(), columns.of(w.rows, w.positions)) for w in writes
    ]
    written += [
        (("pattern", e.layer), e.rows.cpu().numpy(), columns.of(e.rows, e.queries)) for e in edges
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
            held=held,
        ),
        shortcuts or Shortcuts(),
        end,
    )
    logits, found = pass_.run(writes, list(reads), tokens, fuse=fuse, edges=edges)
    at = on_device(pass_.final[final[0], final_columns], logits.device)
    return PackedResult(
        end.asked(logits, at),
        {read: pass_.taken(read, found[read], *read_columns[read]) for read in reads},
        tuple(0 if pack is None else len(pack) for pack in pass_.packs),
    )


class _Columns:
    """From positions in prompts to columns of what was kept."""

    def __init__(self, kept: ActivationCache, lanes: Ints) -> None:
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
        self.rows = rows
        self.device = model.device
        n_layers = model.shape.n_layers
        self.end = end
        self.causal = is_causal(model, kept)
        self.packs: list[BlockPack | None] = []
        self.work: list[BlockWork] = []
        for work in block_work(
            rows,
            n_layers,
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
        self.universe, self.size = universe(self.packs, rows.final)
        self.final = np.full(rows.final.shape, -1, dtype=np.int64)
        row, column = np.nonzero(rows.final)
        self.final[row, column] = np.arange(len(row))
        self.crossing = cross_modules(model)
        self.own = implementations(model)
        self.masks: dict[object, Tensor | None] = {}
        alone = model.calling.packs == "one prompt"
        self.prompt = prompt_of(model, kept) if alone else None
        self.entered: Tensor | None = None

    # --- where tokens lie -------------------------------------------------------------------------

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
        row = rows.cpu().numpy()
        return torch.from_numpy(_Columns(self.kept, self.lanes).of(row, positions.cpu().numpy()))

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """[row] tokens of each prompt."""
        return self.kept.batch.lengths[on_device(self.lanes, self.device)]

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Zero, the token, and whether it is there: all rows are one for the model, but for what
        they are in the end."""
        row = rows.cpu().numpy()
        column = _Columns(self.kept, self.lanes).of(row, positions.cpu().numpy())
        if (located := self.end.located(site, rows, positions)) is not None:
            return *located, rows >= 0
        index = self.index(SiteRead(site, layer, stack), row, column).to(rows.device)
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
        return found[0][index.to(self.device)] if taken is None else taken

    # --- running ----------------------------------------------------------------------------------

    def run(
        self,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        tokens: Tensor | None,
        *,
        fuse: bool,
        edges: Sequence[EdgeWrite] = (),
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        """([final token, vocab], what was read)."""
        row, column = np.nonzero(self.universe >= 0)
        order = np.argsort(self.universe[row, column])
        row, column = row[order], column[order]
        lane = on_device(self.lanes[row], self.device)
        at = on_device(column, self.device)
        seen: Mapping[SiteRead, Tensor] = {}
        if self.prompt is not None:
            outside = [write for write in writes if write.site == "embed"]
            looked = [read for read in reads if read.site == "embed"]
            with torch.inference_mode():
                self.entered, seen = entering(
                    self.model, self.kept, self.lanes, self.universe, self.size, outside, looked
                )
            writes = [write for write in writes if write.site != "embed"]
            reads = [read for read in reads if read.site != "embed"]
        work = self.sites = SiteWork(self.model, self, writes, reads, edges=edges)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(exchanged(self.model, self._attention, masked=False))
            if fuse:
                stack.enter_context(fused(self.model.module))
            self.running = stack.enter_context(current_block(self.model))
            stack.enter_context(self._blocks())
            stack.enter_context(work.installed())
            stack.enter_context(self._embedded(lane * self.kept.columns + at))
            stack.enter_context(self._top())
            stack.enter_context(narrowed(self.model, tokens))
            logits = call(self.model, self._inputs(lane, at))
        logits = self.top.collected(work.output(logits))
        work.check()
        return chosen(self.model, logits, tokens), {**work.found, **seen}

    def _inputs(self, lane: Tensor, at: Tensor) -> dict[str, Tensor]:
        """What the model is called with: the tokens of the pass, or one prompt."""
        if self.prompt is not None:
            return self.prompt[0]
        batch, places = self.kept.batch, self.kept.positions
        positions = batch.position_ids()[lane, at][None]
        given = text_inputs(self.model, batch.ids[lane, at][None], positions)
        if places is not None:
            given["position_ids"] = places[..., lane, at][..., None, :]
        return given

    def _module(self, path: str) -> nn.Module:
        return self.model.module.get_submodule(path)

    @contextmanager
    def _embedded(self, index: Tensor) -> Generator[None]:
        """Tokens are embedded as in the unpatched run, with its noise or its images."""
        embedded = self.kept.embedded
        if embedded is None or self.prompt is not None:
            yield
            return
        tap = self.model.anatomy.taps["embed"]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return embedded[index][None]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return given_again(args, kwargs, embedded[index][None])

        # In front of what is read and written there.
        module = self._module(tap.path)
        if tap.side == "in":
            handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(hook, prepend=True)
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
                block = self._module(anatomy.blocks[layer].path)
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
                    *((path, pack.mlp) for path in mlp),
                ):
                    if part is not None and path is not None:
                        module = self._module(path)
                        several = self.kept.tuples.get(path, 0)
                        forward = _partly(module.forward, part, self.kept.outputs[path], several)
                        stack.enter_context(replaced(module, forward))
                below, width = pack.lookup, len(pack)
            self.last = below
            yield

    def _enter(self, layer: int, pack: BlockPack, source: BlockInput | None) -> Any:
        """A hook that hands a block its tokens, and what the model knows about them."""
        row, column = np.nonzero(pack.lookup >= 0)
        known = np.empty(len(pack), dtype=np.int64)
        known[pack.lookup[row, column]] = self.universe[row, column]
        size = self.size
        same = len(known) == size and bool((known == np.arange(size)).all())
        index = None if same else on_device(known, self.device)
        hidden_below = self.kept.hidden.get(layer)
        first = all(below is None for below in self.packs[:layer])
        place = np.empty(len(pack), dtype=np.int64)
        counts_columns = self.model.calling.first_position is None
        starts = 0 if counts_columns else _Columns(self.kept, self.lanes).starts[row]
        place[pack.lookup[row, column]] = column - starts
        positions = on_device(place, self.device) if self.prompt is not None else None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            below = given_to(args, kwargs)
            if first and self.entered is not None:
                below = self.entered
            hidden = assembled(below, source, hidden_below)
            if self.prompt is not None:
                assert positions is not None
                count = self.prompt[1]
                args = tuple(placed(value, positions, count) for value in args)
                kwargs = {name: placed(value, positions, count) for name, value in kwargs.items()}
            elif index is not None:
                args = tuple(_selected(value, index, size) for value in args)
                kwargs = {name: _selected(value, index, size) for name, value in kwargs.items()}
            return given_again(args, kwargs, hidden)

        return hook

    @contextmanager
    def _top(self) -> Generator[None]:
        """Behind the last block only the tokens that are read go on."""
        anatomy, n_layers = self.model.anatomy, self.model.shape.n_layers
        row, column = np.nonzero(self.final >= 0)
        below = self.last
        source = below[row, column] if self.packs[-1] is not None else np.full(len(row), -1)
        stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
        places = self.lanes[row] * self.kept.columns + column
        put = BlockInput(
            *(
                on_device(index, self.device)
                for index in (stays, source[stays], fresh, places[fresh])
            )
        )
        size = self.size if self.prompt is None else max(len(row), self.prompt[1])
        left, width = self.kept.hidden[n_layers], self.kept.columns
        self.top = self.end.top(Finals(put, row, column, self.lanes, left, width, size))
        with ExitStack() as stack:
            # Behind all that is written there.
            handle = self._module(anatomy.blocks[-1].path).register_forward_hook(self.top.gather)
            stack.callback(handle.remove)
            if anatomy.unembedding is not None:
                unembedding = self._module(anatomy.unembedding)
                handle = unembedding.register_forward_pre_hook(self.top.cut, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = self.running()
        pack = self.packs[layer]
        assert pack is not None
        if id(module) in self.crossing:
            return self._across(pack, module, query, kwargs)
        _, heads, count, _ = query.shape
        out = value.new_empty(count, heads, value.shape[-1])
        if pack.attend is not None:
            out[pack.attend.taken] = self.kept.z[layer][pack.attend.taken_from]
        kept = self.kept.attention.get(layer)
        if kept is None:
            raise CannotPack("a block attends in another way than the one before")
        attend(
            query[0],
            key[0],
            value[0],
            pack.groups,
            kept,
            out,
            causal=self.causal,
            masks=self.masks,
            work=self.sites.layer(layer, query),
            **kwargs,
        )
        return out[None], None

    def _across(
        self, pack: BlockPack, module: nn.Module, query: Tensor, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, None]:
        """Attention to the encoder's tokens, which each lane has its own of."""
        kept, columns = self.kept.across[self.running()], self.kept.columns
        function = own_function(module, self.own)
        rest = {name: value for name, value in arguments.items() if name != "position_bias"}
        heads = query.shape[1]
        out = query.new_empty(1, query.shape[2], heads, kept.values.shape[-1])
        for lane in np.unique(pack.kept_index // columns).tolist():
            tokens = np.flatnonzero(pack.kept_index // columns == lane)
            at = on_device(tokens, self.device)
            own, mask = kept.part(slice(lane, lane + 1)), None
            if own.mask is not None:
                mask = own.mask[:, :, on_device(pack.kept_index[tokens] % columns, self.device)]
            found, _ = function(module, query[:, :, at], own.keys, own.values, mask, **rest)
            out[:, at] = found
        return out, None


def _partly(forward: Any, part: ComputedTokens, kept: Tensor, several: int) -> Any:
    """A module's forward on some tokens; the others get what was kept.

    several: length of the tuple that it returns, 0 for a tensor.
    """

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = hidden.shape[:-1]
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        out = kept.new_empty(1, flat.shape[1], kept.shape[1])
        out[0, part.taken] = kept[part.taken_from]
        if len(part.computed):
            found = forward(flat[:, part.computed], *args, **kwargs)
            if isinstance(found, tuple):  # what else it returns is of no use here
                out[0, part.computed] = found[0].reshape(-1, out.shape[2])
                return (out.view(*shape, -1), *found[1:])
            out[0, part.computed] = found[0]
        whole = out.view(*shape, -1)
        return (whole, *[None] * (several - 1)) if several else whole

    return run


def _selected(value: Any, index: Tensor, size: int) -> Any:
    """What the model hands its blocks for all `size` tokens, for some of them."""
    if isinstance(value, Tensor):
        if value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == size:
            return value.index_select(1, index)
        return value
    if isinstance(value, tuple):
        return tuple(_selected(one, index, size) for one in value)
    return value
