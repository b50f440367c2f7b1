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
from mechdsl.hooks.attention_functions import CannotPack, GroupMasks, attend
from mechdsl.hooks.batch import arrays_on_device, on_device
from mechdsl.hooks.block_attention import AttentionCall, block_attention
from mechdsl.hooks.calls import call, chosen, narrowed, text_inputs
from mechdsl.hooks.hook_points import Stub, fused, given_again, given_to, replaced
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.site_hooks import SiteWork
from mechdsl.packed.activation_cache import ActivationCache, parts
from mechdsl.packed.behind_last_block import Finals, Places, assembled, end_of
from mechdsl.packed.layout import BlockInput, BlockPack, ComputedTokens, entry, masks_of
from mechdsl.packed.packed_frame import PackedFrame, PromptColumns
from mechdsl.packed.through_one_prompt import entering, placed, prompt_of
from mechdsl.plan.restart import Held, RowMasks, Shortcuts


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
    columns = PromptColumns(kept, lanes)
    reads = reads or {}
    if stack := next((one.stack for one in (*writes, *reads) if one.stack), ""):
        raise ValueError(f"rows of sites of the stack `{stack}` are whole passes")
    end = end_of(model)
    final = end.made_of(final, columns.ids, columns.real)
    read_columns = {r: (places[0], columns.of(*places)) for r, places in reads.items()}
    looked_at = [((r.site, r.layer), *places) for r, places in read_columns.items()]
    looked_at += [((w.site, w.layer), *_before(w, columns)) for w in writes if w.mode == "step"]
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
    for read, (rows, at) in read_columns.items():
        if read.site == "final_norm":
            read_behind[rows, at] = True
    frame = PackedFrame(
        model,
        kept,
        lanes,
        RowMasks(
            real=columns.real,
            writes=masks_of(written, shape),
            reads=masks_of(looked_at, shape),
            final=read_behind,
            held=held,
        ),
        shortcuts or Shortcuts(),
        end,
    )
    logits, found = _Pass(model, kept, frame).run(
        writes, list(reads), tokens, fuse=fuse, edges=edges
    )
    at = on_device(frame.final[final[0], final_columns], logits.device)
    return PackedResult(
        end.asked(logits, at),
        {read: frame.taken(read, found[read], *read_columns[read]) for read in reads},
        tuple(0 if pack is None else len(pack) for pack in frame.packs),
    )


def _before(write: SiteWrite, columns: PromptColumns) -> Places:
    """Rows, and columns of the position before each that is written: it has to be there too."""
    rows, positions = write.rows.numpy(), write.positions.numpy()
    return rows, columns.of(rows, np.maximum(positions - 1, 0))


class _Pass:
    """One pass over packed rows."""

    def __init__(self, model: LoadedModel, kept: ActivationCache, frame: PackedFrame) -> None:
        self.model = model
        self.kept = kept
        self.frame = frame
        self.masks = GroupMasks(kept.seen)
        alone = model.calling.packs == "one prompt"
        self.prompt = prompt_of(model, kept) if alone else None
        self.entered: Tensor | None = None

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
        frame = self.frame
        row, column = np.nonzero(frame.universe >= 0)
        order = np.argsort(frame.universe[row, column])
        row, column = row[order], column[order]
        lane, at = arrays_on_device((frame.lanes[row], column), frame.device)
        seen: Mapping[SiteRead, Tensor] = {}
        if self.prompt is not None:
            outside = [write for write in writes if write.site == "embed"]
            looked = [read for read in reads if read.site == "embed"]
            with torch.inference_mode():
                self.entered, seen = entering(
                    self.model, self.kept, frame.lanes, frame.universe, frame.size, outside, looked
                )
            writes = [write for write in writes if write.site != "embed"]
            reads = [read for read in reads if read.site != "embed"]
        work = self.sites = SiteWork(self.model, frame, writes, reads, edges=edges)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(block_attention(self.model, self._attention, masked=False))
            if fuse:
                stack.enter_context(fused(self.model.module))
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
        anatomy, frame = self.model.anatomy, self.frame
        with ExitStack() as stack:
            below, width = frame.universe, frame.size
            for layer, pack in enumerate(frame.packs):
                block = self._module(anatomy.blocks[layer].path)
                if pack is None:
                    stub = Stub(self.model.calling.block_returns)
                    stack.enter_context(replaced(block, stub))
                    continue
                carried = frame.work[layer].carried
                source = entry(below, pack, carried, frame.device, width)
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
        frame = self.frame
        row, column = np.nonzero(pack.lookup >= 0)
        known = np.empty(len(pack), dtype=np.int64)
        known[pack.lookup[row, column]] = frame.universe[row, column]
        size = frame.size
        same = len(known) == size and bool((known == np.arange(size)).all())
        index = None if same else on_device(known, frame.device)
        hidden_below = self.kept.hidden.get(layer)
        first = all(below is None for below in frame.packs[:layer])
        place = np.empty(len(pack), dtype=np.int64)
        counts_columns = self.model.calling.first_position is None
        starts = 0 if counts_columns else frame.prompts.starts[row]
        place[pack.lookup[row, column]] = column - starts
        positions = on_device(place, frame.device) if self.prompt is not None else None

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
        anatomy, frame, n_layers = self.model.anatomy, self.frame, self.model.shape.n_layers
        row, column = np.nonzero(frame.final >= 0)
        below = self.last
        source = below[row, column] if frame.packs[-1] is not None else np.full(len(row), -1)
        stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
        places = frame.lanes[row] * self.kept.columns + column
        indices = stays, source[stays], fresh, places[fresh]
        put = BlockInput(*arrays_on_device(indices, frame.device))
        size = frame.size if self.prompt is None else max(len(row), self.prompt[1])
        left, width = self.kept.hidden[n_layers], self.kept.columns
        self.top = frame.end.top(Finals(put, row, column, frame.lanes, left, width, size))
        with ExitStack() as stack:
            # Behind all that is written there.
            handle = self._module(anatomy.blocks[-1].path).register_forward_hook(self.top.gather)
            stack.callback(handle.remove)
            if anatomy.unembedding is not None:
                unembedding = self._module(anatomy.unembedding)
                handle = unembedding.register_forward_pre_hook(self.top.cut, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _attention(self, given: AttentionCall) -> tuple[Tensor, None]:
        layer, query, value = given.layer, given.query, given.value
        pack = self.frame.packs[layer]
        assert pack is not None
        if given.across:
            return self._across(pack, given)
        _, heads, count, _ = query.shape
        out = value.new_empty(count, heads, value.shape[-1])
        if pack.attend is not None:
            out[pack.attend.taken] = self.kept.z[layer][pack.attend.taken_from]
        kept = self.kept.attention.get(layer)
        if kept is None:
            raise CannotPack("a block attends in another way than the one before")
        attend(
            query[0],
            given.key[0],
            value[0],
            pack.groups,
            kept,
            out,
            causal=self.frame.causal,
            masks=self.masks,
            work=self.sites.layer(layer, query),
            **given.arguments,
        )
        return out[None], None

    def _across(self, pack: BlockPack, given: AttentionCall) -> tuple[Tensor, None]:
        """Attention to the encoder's tokens, which each lane has its own of."""
        kept, columns, query = self.kept.across[given.layer], self.kept.columns, given.query
        function = given.own_function()
        rest = {name: value for name, value in given.arguments.items() if name != "position_bias"}
        heads = query.shape[1]
        out = query.new_empty(1, query.shape[2], heads, kept.values.shape[-1])
        for lane in np.unique(pack.kept_index // columns).tolist():
            tokens = np.flatnonzero(pack.kept_index // columns == lane)
            at = on_device(tokens, self.frame.device)
            own, mask = kept.part(slice(lane, lane + 1)), None
            if own.mask is not None:
                columns_at = on_device(pack.kept_index[tokens] % columns, self.frame.device)
                mask = own.mask[:, :, columns_at]
            found, _ = function(given.module, query[:, :, at], own.keys, own.values, mask, **rest)
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
