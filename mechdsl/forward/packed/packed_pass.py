"""Packed forward passes: only tokens that the patch changes are computed, for many rows at once.

Rows join the pass in the block of their lowest write, with the input that the unpatched run
stored. All tokens of all rows are adjacent, without padding, and pass through the model's own
blocks: projections and MLPs run only on tokens whose input changed and whose output is read; all
others take the value of the unpatched run. Only attention distinguishes rows.

Some models count positions themselves or read the whole prompt before their first block, and
images have no tokens. Such a model is called with one prompt, whose tokens are exchanged before
the first block; rows written in the embedding run through the layers below it as full prompts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.attention import (
    AttentionCall,
    CannotPack,
    GroupMasks,
    attend,
    replace_block_attention,
)
from mechdsl.forward.hooks.attention_hooks import AttentionGroup
from mechdsl.forward.hooks.batch import (
    CircuitWrite,
    DeviceIndex,
    EdgeWrite,
    ReadMismatch,
    RowPositions,
    SiteRead,
    SiteWrite,
    array_to_device,
    arrays_to_device,
    to_device,
)
from mechdsl.forward.hooks.coordinates import CoordinateWrite
from mechdsl.forward.hooks.full_pass import SiteHooks, run_full
from mechdsl.forward.hooks.hook_points import fuse_activations
from mechdsl.forward.hooks.model import (
    LoadedModel,
    build_text_inputs,
    call_model,
    mixes_images,
    narrow_unembedding,
    number_positions,
    select_token_logits,
)
from mechdsl.forward.hooks.module_exchange import (
    BlockStub,
    get_activation,
    replace_activation,
    replace_forward,
)
from mechdsl.forward.packed.activation_cache import ActivationCache, list_block_paths
from mechdsl.forward.packed.output_tokens import (
    BlockInput,
    OutputReader,
    OutputTokens,
    assemble_tokens,
    choose_output,
)
from mechdsl.models.restart import (
    BlockWork,
    HeldSublayers,
    RowMasks,
    Shortcuts,
    TokenMask,
    block_work,
)
from mechdsl.vocab.sites import SITES


@dataclass(frozen=True, eq=False)
class ComputedTokens:
    """Tokens of a block that are computed; the others keep the unpatched value."""

    computed: Tensor
    """[n] long, tokens of the block."""
    taken: Tensor
    """[m] long, the other tokens."""
    taken_from: Tensor
    """[m] long, their indices in the activation cache."""
    lookup: Ints
    """[row, column] → index into `computed`, -1 if missing."""


@dataclass(frozen=True, eq=False)
class BlockPack:
    """Tokens of one block, in order."""

    lookup: Ints
    """[row, column] → token, -1 if missing."""
    kept_index: Ints
    """[token], its index in the activation cache."""
    groups: tuple[AttentionGroup, ...]
    project: ComputedTokens | None
    """None if all tokens are computed."""
    attend: ComputedTokens | None
    output: ComputedTokens | None
    mlp: ComputedTokens | None

    def __len__(self) -> int:
        return len(self.kept_index)


def pack_block(
    work: BlockWork, lanes: Ints, kept: ActivationCache, device: torch.device
) -> BlockPack:
    """Arrange the tokens of a block.

    Rows with tokens in the same columns are adjacent, ordered by lane, so that attention needs one
    call for many of them.
    """
    rows, which, count = _order_rows(work, lanes)
    present = work.present[rows]
    row, column = np.nonzero(present)
    token_rows = rows[row]
    lookup = np.full(work.present.shape, -1, dtype=np.int64)
    lookup[token_rows, column] = np.arange(len(column))
    kept_index = lanes[token_rows] * kept.columns + column

    lengths = kept.batch.lengths.numpy()
    edges = np.flatnonzero((np.diff(which) != 0) | (np.diff(count) != 0)) + 1
    groups: list[AttentionGroup] = []
    start = 0
    for begin, end in zip([0, *edges], [*edges, len(rows)], strict=True):
        columns = np.flatnonzero(present[begin])
        own_lanes = lanes[rows[begin : end : count[begin]]]
        asking = work.attend[rows[begin]][columns]
        indices = own_lanes, columns, np.flatnonzero(asking)
        of_lanes, of_columns, queries = DeviceIndex.together(indices, device)
        group = AttentionGroup(
            start=start,
            lanes=of_lanes,
            rows=int(count[begin]),
            columns=of_columns,
            queries=queries,
            every=bool((lengths[own_lanes] == len(columns)).all()),
        )
        start += group.size
        groups.append(group)

    def part(mask: TokenMask) -> ComputedTokens | None:
        chosen = mask[token_rows, column]
        if chosen.all():
            return None
        inside = np.full(lookup.shape, -1, dtype=np.int64)
        inside[token_rows[chosen], column[chosen]] = np.arange(int(chosen.sum()))
        taken = np.flatnonzero(~chosen)
        indices = np.flatnonzero(chosen), taken, kept_index[taken]
        computed, others, source = arrays_to_device(indices, device)
        return ComputedTokens(computed=computed, taken=others, taken_from=source, lookup=inside)

    return BlockPack(
        lookup=lookup,
        kept_index=kept_index,
        groups=tuple(groups),
        project=part(work.project),
        attend=part(work.attend),
        output=part(work.output),
        mlp=part(work.mlp),
    )


def _order_rows(work: BlockWork, lanes: Ints) -> tuple[Ints, Ints, Ints]:
    """Order the rows that a block computes by their columns, then by lane.

    Returns:
        The rows; for each, the number of its pattern of columns, and the number of rows with this
        pattern on its lane.
    """
    rows = np.flatnonzero(work.present.any(axis=1))
    pattern = np.packbits(np.hstack([work.present[rows], work.attend[rows]]), axis=1)
    _, which = np.unique(pattern, axis=0, return_inverse=True)
    on_lane = which.reshape(-1) * (int(lanes.max()) + 1) + lanes[rows]
    _, slot, counts = np.unique(on_lane, return_inverse=True, return_counts=True)
    count = counts[slot.reshape(-1)]
    order = np.lexsort((rows, lanes[rows], count, which.reshape(-1)))
    return rows[order], which.reshape(-1)[order], count[order]


def build_block_input(
    below: Ints, pack: BlockPack, carried: TokenMask, device: torch.device, width: int
) -> BlockInput | None:
    """Determine where the tokens of a block come from; None if they equal those of the one below.

    Args:
        below: [row, column] → token of the block below.
        pack: Tokens of the block.
        carried: [row, column] whether the token comes from the block below.
        device: The device of indices.
        width: Number of tokens in the block below.
    """
    row, column = np.nonzero(pack.lookup >= 0)
    token = pack.lookup[row, column]
    from_below = np.where(carried[row, column], below[row, column], -1)
    source = np.empty(len(token), dtype=np.int64)
    source[token] = from_below
    if len(source) == width and bool((source == np.arange(width)).all()):
        return None
    stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
    indices = stays, source[stays], fresh, pack.kept_index[fresh]
    return BlockInput(*arrays_to_device(indices, device))


def is_same_work(a: BlockWork, b: BlockWork) -> bool:
    """Return whether two blocks have the same tokens and compute the same of them."""
    pairs = (
        (a.present, b.present),
        (a.attend, b.attend),
        (a.project, b.project),
        (a.output, b.output),
        (a.mlp, b.mlp),
    )
    return all(np.array_equal(one, other) for one, other in pairs)


def number_tokens(packs: Sequence[BlockPack | None], outside: TokenMask) -> tuple[Ints, int]:
    """Number all tokens of the pass: [row, column] → number, and their count.

    Numbers follow the topmost block, so that its tokens need no reordering.

    Args:
        packs: Tokens of the blocks.
        outside: Tokens that are read before or after the blocks.
    """
    tokens = np.full(outside.shape, -1, dtype=np.int64)
    count = 0
    for pack in reversed(packs):
        if pack is None:
            continue
        new = (pack.lookup >= 0) & (tokens < 0)
        row, column = np.nonzero(new)
        order = np.argsort(pack.lookup[row, column], kind="stable")
        tokens[row[order], column[order]] = count + np.arange(len(order))
        count += len(order)
    row, column = np.nonzero(outside & (tokens < 0))
    tokens[row, column] = count + np.arange(len(row))
    return tokens, count + len(row)


def build_masks(
    places: Iterable[tuple[tuple[str, int | None], Ints, Ints]], shape: tuple[int, int]
) -> dict[tuple[str, int | None], TokenMask]:
    """Return (site, layer) → [row, column], true at the given rows and columns."""
    masks: dict[tuple[str, int | None], TokenMask] = {}
    for where, rows, columns in places:
        mask = masks.setdefault(where, np.zeros(shape, dtype=np.bool_))
        mask[rows, columns] = True
    return masks


def is_causal(model: LoadedModel, kept: ActivationCache) -> bool:
    """Return whether no token sees a later one; tokens of an image in a text may see each other."""
    seeing = model.shape.takes == "image and text" and (
        bool(kept.batch.extra) or mixes_images(model, kept.batch)
    )
    return model.shape.causal and not (seeing and kept.sees_later)


class PromptColumns:
    """Map from positions in prompts to columns of the activation cache."""

    def __init__(self, kept: ActivationCache, lanes: Ints) -> None:
        self._kept, self._lanes = kept, lanes
        self.starts = kept.batch.starts.numpy()[lanes]
        self.lengths = kept.batch.lengths.numpy()[lanes]
        column = np.arange(kept.columns) - self.starts[:, None]
        self.real = (column >= 0) & (column < self.lengths[:, None])

    def ids(self) -> Ints:
        """Return [row, column] token ids."""
        return self._kept.batch.ids.cpu().numpy()[self._lanes]

    def of(self, rows: Ints | Tensor, positions: Ints | Tensor) -> Ints:
        """Return [n] columns. Raises ValueError for a position outside its prompt."""
        row, position = np.asarray(rows), np.asarray(positions)
        if ((position < 0) | (position >= self.lengths[row])).any():
            raise ValueError("a position is not in its prompt")
        return self.starts[row] + position


class PackedFrame:
    """`TokenFrame` of a pass over packed rows: the tokens that each block computes."""

    def __init__(
        self,
        model: LoadedModel,
        kept: ActivationCache,
        lanes: Ints,
        rows: RowMasks,
        shortcuts: Shortcuts,
        end: OutputReader,
    ) -> None:
        self.model = model
        self.kept = kept
        self.lanes = lanes
        self.device = model.device
        self.end = end
        self.causal = is_causal(model, kept)
        self.prompts = PromptColumns(kept, lanes)
        self.packs: list[BlockPack | None] = []
        """[block]; None for a block that computes nothing."""
        self.work: list[BlockWork] = []
        for work in block_work(
            rows,
            model.shape.n_layers,
            parallel=model.parallel,
            causal=self.causal,
            shortcuts=shortcuts,
        ):
            below = self.packs[-1] if self.packs else None
            if below is not None and is_same_work(work, self.work[-1]):
                self.packs.append(below)
            elif work.present.any():
                self.packs.append(pack_block(work, lanes, kept, self.device))
            else:
                self.packs.append(None)
            self.work.append(work)
        embedded = rows.reads.get(("embed", None))
        outside = rows.final if embedded is None else rows.final | embedded
        self.universe, self.size = number_tokens(self.packs, outside)
        self.final = np.full(rows.final.shape, -1, dtype=np.int64)
        """[row, column] → index among the tokens after the last block, -1 for none."""
        row, column = np.nonzero(rows.final)
        self.final[row, column] = np.arange(len(row))

    def __len__(self) -> int:
        return len(self.lanes)

    @property
    def leading(self) -> int:
        """Size of the model's first dimension: all rows form one sequence."""
        return 1

    @property
    def lane_starts(self) -> Tensor:
        """[lane] column of each stored prompt's first token."""
        return self.kept.batch.starts

    @property
    def key_width(self) -> int:
        """Number of columns of the stored prompts."""
        return self.kept.columns

    def keys_of(self, stack: str) -> PackedFrame:
        """Return the pass itself: attention of every stack has the keys of stored prompts."""
        return self

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the columns of the rows' positions in the stored prompts."""
        return torch.from_numpy(self.prompts.of(rows, positions))

    def lengths_of(self, site: str, stack: str) -> Tensor:
        """Return [row]: number of tokens of each prompt."""
        return torch.from_numpy(self.prompts.lengths)

    def locate(
        self, site: str, layer: int | None, stack: str, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return 0, the token, and whether it is present.

        All rows form one sequence, except for outputs that have a row dimension.
        """
        row = rows.numpy()
        column = self.prompts.of(row, positions)
        if (located := self.end.located(site, rows, positions)) is not None:
            return *located, rows >= 0
        index = self.index(SiteRead(site, layer, stack), row, column)
        return torch.zeros_like(index), index, index >= 0

    def index(self, where: SiteRead, rows: Ints, columns: Ints) -> Tensor:
        """Return [n]: token in a site's tapped tensor, -1 if missing."""
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
        """Return [n, units, width] of a read. Raises ReadMismatch if a token isn't computed."""
        index = self.index(where, rows, columns)
        if bool((index < 0).any()):
            raise ReadMismatch(f"`{where.site}` is read at a token that isn't in the pass")
        taken = self.end.taken(where.site, found, rows, columns)
        return found[0][to_device(index, self.device)] if taken is None else taken


def build_prompt_arguments(model: LoadedModel, kept: ActivationCache) -> tuple[dict[str, Any], int]:
    """Build the model's arguments for the longest prompt or any image, with its token count."""
    batch = kept.batch
    if model.shape.takes == "image":
        return dict(batch.part(slice(0, 1)).extra), int(batch.ids.shape[1])
    lane = int(batch.lengths.argmax())
    if kept.encoded is not None:  # any prompt works, because attention uses stored encoder outputs
        encoded = kept.encoded_of(slice(lane, lane + 1))
        ids = batch.ids[lane][None]
        return {"encoder_outputs": encoded, "decoder_input_ids": ids}, int(ids.shape[1])
    if model.calling.first_position is None:  # columns are counted, including padding
        ids = batch.ids[lane][None]
        return build_text_inputs(model, ids, None), int(ids.shape[1])
    ids = batch.ids[lane][batch.mask[lane].bool()][None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return build_text_inputs(model, ids, positions), int(ids.shape[1])


def compute_block_entry(
    model: LoadedModel,
    kept: ActivationCache,
    lanes: Ints,
    universe: Ints,
    size: int,
    writes: Sequence[SiteWrite],
    reads: Sequence[SiteRead],
) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
    """Compute the input of the first block.

    Args:
        lanes: [row] its lane.
        universe: [row, column] → token.
        size: Number of tokens.
        writes: Writes at `embed`.
        reads: Reads at `embed`.

    Returns:
        [1, token, d_model] input of the first block, and the values read at `embed`.
    """
    row, column = np.nonzero(universe >= 0)
    index = np.empty(size, dtype=np.int64)
    index[universe[row, column]] = lanes[row] * kept.columns + column
    hidden = kept.hidden.get(0)
    if hidden is None:
        entered = torch.zeros(1, size, model.shape.d_model, device=model.device, dtype=model.dtype)
    else:
        entered = hidden[array_to_device(index, model.device)][None]
    written = np.zeros(universe.shape, dtype=np.bool_)
    starts = kept.batch.starts.numpy()[lanes]
    for write in writes:
        rows = write.rows.numpy()
        written[rows, starts[rows] + write.positions.numpy()] = True
    chosen = np.arange(len(lanes)) if reads else np.flatnonzero(written.any(axis=1))
    if not len(chosen):
        return entered, {}
    number = np.full(len(lanes), -1, dtype=np.int64)
    number[chosen] = np.arange(len(chosen))
    own = [replace(w, rows=torch.from_numpy(number[w.rows.numpy()])) for w in writes]
    noise = _write_noise(kept, lanes[chosen], own)
    stream = SiteRead("resid_pre", 0)
    batch = kept.batch.take(torch.from_numpy(lanes[chosen]))
    tensors = run_full(model, batch, stop=0, writes=[*noise, *own], reads=[stream, *reads]).reads

    def put(into: Tensor, value: Tensor, rows: Ints, columns: Ints) -> None:
        there = universe[rows, columns] >= 0
        rows, columns = rows[there], columns[there]
        token = array_to_device(universe[rows, columns], model.device)
        places = array_to_device(number[rows], model.device), array_to_device(columns, model.device)
        into[0, token] = value[places]

    put(entered, tensors[stream].squeeze(2), *np.nonzero(written))
    seen: dict[SiteRead, Tensor] = {}
    for read in reads:
        value = tensors[read]
        seen[read] = value.new_zeros(1, size, *value.shape[2:])
        put(seen[read], value, row, column)
    return entered, seen


def _write_noise(
    kept: ActivationCache, lanes: Ints, writes: Sequence[SiteWrite]
) -> list[SiteWrite]:
    """Write the unpatched run's embedding where it isn't the tokens' own and isn't set."""
    if kept.embedded is None:
        return []
    real = kept.batch.mask.cpu().numpy().astype(np.bool_)[lanes]
    starts = kept.batch.starts.numpy()[lanes]
    for write in writes:
        if write.mode == "set":
            rows = write.rows.numpy()
            real[rows, starts[rows] + write.positions.numpy()] = False
    row, column = np.nonzero(real)
    values = kept.embedded[
        array_to_device(lanes[row] * kept.columns + column, kept.embedded.device)
    ]
    rows, positions = torch.from_numpy(row), torch.from_numpy(column - starts[row])
    return [SiteWrite("embed", None, rows, positions, torch.zeros_like(rows), values)]


def select_token_arguments(value: Any, positions: Tensor, count: int) -> Any:
    """Select a block argument for the tokens of a pass.

    Args:
        value: Argument for the `count` tokens of the prompt.
        positions: Positions of the pass's tokens in the prompt.
        count: Number of tokens of the prompt.
    """
    if isinstance(value, tuple):
        parts = cast("tuple[Any, ...]", value)
        if len(parts) == 2 and _is_rotary(parts[0], count) and _is_rotary(parts[1], count):
            # Rotary of image patches: preceding tokens aren't rotated.
            cos, sin = parts
            front = count - len(cos)
            cos = torch.cat([cos.new_ones(front, cos.shape[1]), cos])
            sin = torch.cat([sin.new_zeros(front, sin.shape[1]), sin])
            return cos[positions], sin[positions]
        return tuple(select_token_arguments(part, positions, count) for part in parts)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == 1 and value.shape[1] == count:
        return value.index_select(1, positions)
    if value.dim() > 2 and value.numel() == count * value.shape[-1]:  # [1, 1, token, width]
        return value.index_select(-2, positions)
    return value


def _is_rotary(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and 1 < value.shape[0] <= count


@dataclass(frozen=True, eq=False)
class PackedResult:
    """Values that measures read of packed rows."""

    logits: Tensor
    """[n, vocab], or [n, K] for K requested tokens, in the order of `final`; [row, labels] for
    images with one output."""
    reads: Mapping[SiteRead, Tensor]
    """[positions of the site, units, width], in the requested order."""
    work: tuple[int, ...]
    """Number of tokens that passed through each block."""


def _build_row_masks(
    columns: PromptColumns,
    writes: Sequence[SiteWrite],
    edges: Sequence[EdgeWrite],
    circuits: Sequence[CircuitWrite],
    reads: Mapping[SiteRead, tuple[Ints, Ints]],
    final: tuple[Ints, Ints],
    held: HeldSublayers | None,
) -> RowMasks:
    """Mark the tokens that rows write, read and give logits of.

    Args:
        reads: Rows and columns that are read, by site.
        final: Rows and columns whose logits are requested.
    """
    written: list[tuple[tuple[str, int | None], Ints, Ints]] = [
        ((w.site, w.layer), w.rows.cpu().numpy(), columns.of(w.rows, w.positions)) for w in writes
    ]
    written += [
        (("pattern", e.layer), e.rows.cpu().numpy(), columns.of(e.rows, e.queries)) for e in edges
    ]
    written += [
        (("resid_pre", 0), c.rows.numpy(), columns.of(c.rows, c.positions)) for c in circuits
    ]
    looked_at = [((r.site, r.layer), *tokens) for r, tokens in reads.items()]
    looked_at += [
        ((w.site, w.layer), *_previous_positions(w, columns)) for w in writes if w.mode == "step"
    ]
    looked_at += [
        (
            (w.mode.reads, w.mode.find_layer(w.layer)),
            w.rows.numpy(),
            columns.of(w.rows, w.positions),
        )
        for w in writes
        if isinstance(w.mode, CoordinateWrite) and w.mode.reads
    ]
    if circuits:  # each block computes the same tokens
        written += [(("resid_pre", 0), rows, at) for _, rows, at in looked_at]
    outputs = np.zeros_like(columns.real)
    outputs[final] = True
    for read, tokens in reads.items():
        if read.site == "final_norm":
            outputs[tokens] = True
    return RowMasks(
        real=columns.real,
        writes=build_masks(written, outputs.shape),
        reads=build_masks(looked_at, outputs.shape),
        final=outputs,
        held=held,
    )


def run_packed(
    model: LoadedModel,
    kept: ActivationCache,
    lanes: Ints,
    *,
    writes: Sequence[SiteWrite],
    final: RowPositions,
    reads: Mapping[SiteRead, RowPositions] | None = None,
    tokens: Tensor | None = None,
    shortcuts: Shortcuts | None = None,
    fuse: bool = True,
    edges: Sequence[EdgeWrite] = (),
    circuits: Sequence[CircuitWrite] = (),
    held: HeldSublayers | None = None,
) -> PackedResult:
    """Run rows that start from stored lanes.

    Args:
        lanes: [row], the lane that each row starts from.
        writes: Writes at sites.
        final: Positions whose logits are requested.
        reads: Positions to read, per site.
        tokens: [K] long, the only tokens whose logits are requested.
        shortcuts: Which computations may be skipped.
        fuse: Whether to run activation functions in fused kernels.
        edges: Changed attention edges.
        circuits: Edges that carry other values.
        held: Rows whose sublayers keep the lane's values.
    """
    columns = PromptColumns(kept, lanes)
    reads = reads or {}
    if stack := next((one.stack for one in (*writes, *reads) if one.stack), ""):
        raise ValueError(f"rows of sites of the stack `{stack}` are full forward passes")
    end = choose_output(model)
    final = end.made_of(final, columns.ids, columns.real)
    read_columns = {r: (places[0], columns.of(*places)) for r, places in reads.items()}
    final_columns = columns.of(*final)
    output_tokens = final[0], final_columns
    shortcuts = shortcuts or Shortcuts()
    if circuits:
        shortcuts = shortcuts.of_circuits()
    frame = PackedFrame(
        model,
        kept,
        lanes,
        _build_row_masks(columns, writes, edges, circuits, read_columns, output_tokens, held),
        shortcuts,
        end,
    )
    if circuits and any(pack is not frame.packs[0] for pack in frame.packs):
        raise ValueError("blocks of a row whose circuit is ablated differ in tokens")
    logits, tensors = _PackedRun(model, kept, frame).run(
        writes, list(reads), tokens, fuse=fuse, edges=edges, circuits=circuits
    )
    at = array_to_device(frame.final[final[0], final_columns], logits.device)
    return PackedResult(
        end.asked(logits, at),
        {read: frame.taken(read, tensors[read], *read_columns[read]) for read in reads},
        tuple(0 if pack is None else len(pack) for pack in frame.packs),
    )


def _previous_positions(write: SiteWrite, columns: PromptColumns) -> RowPositions:
    """Return rows and columns of the positions before written ones, which must be present too."""
    rows, positions = write.rows.numpy(), write.positions.numpy()
    return rows, columns.of(rows, np.maximum(positions - 1, 0))


class _PackedRun:
    """One pass over packed rows."""

    def __init__(self, model: LoadedModel, kept: ActivationCache, frame: PackedFrame) -> None:
        self.model = model
        self.kept = kept
        self.frame = frame
        self.masks = GroupMasks(kept.seen)
        alone = model.calling.packs == "one prompt"
        self.prompt = build_prompt_arguments(model, kept) if alone else None
        self.entered: Tensor | None = None

    def run(
        self,
        writes: Sequence[SiteWrite],
        reads: Sequence[SiteRead],
        tokens: Tensor | None,
        *,
        fuse: bool,
        edges: Sequence[EdgeWrite] = (),
        circuits: Sequence[CircuitWrite] = (),
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        """Run the pass; returns [final token, vocab] logits and the values read."""
        frame = self.frame
        row, column = np.nonzero(frame.universe >= 0)
        order = np.argsort(frame.universe[row, column])
        row, column = row[order], column[order]
        lane, at = arrays_to_device((frame.lanes[row], column), frame.device)
        seen: Mapping[SiteRead, Tensor] = {}
        if self.prompt is not None:
            outside = [write for write in writes if write.site == "embed"]
            looked = [read for read in reads if read.site == "embed"]
            with torch.inference_mode():
                self.entered, seen = compute_block_entry(
                    self.model, self.kept, frame.lanes, frame.universe, frame.size, outside, looked
                )
            writes = [write for write in writes if write.site != "embed"]
            reads = [read for read in reads if read.site != "embed"]
        work = self.sites = SiteHooks(
            self.model, frame, writes, reads, edges=edges, circuits=circuits
        )
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(replace_block_attention(self.model, self._attention, masked=False))
            if fuse:
                stack.enter_context(fuse_activations(self.model.module))
            stack.enter_context(self._blocks())
            stack.enter_context(work.installed())
            stack.enter_context(self._embedded(lane * self.kept.columns + at))
            stack.enter_context(self._top())
            stack.enter_context(narrow_unembedding(self.model, tokens))
            logits = call_model(self.model, self._inputs(lane, at))
        logits = self.top.collected(work.output(logits))
        work.check()
        return select_token_logits(self.model, logits, tokens), {**work.found, **seen}

    def _inputs(self, lane: Tensor, at: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs: the tokens of the pass, or one prompt."""
        if self.prompt is not None:
            return self.prompt[0]
        batch, places = self.kept.batch, self.kept.positions
        positions = number_positions(self.model, batch)[..., lane, at][..., None, :]
        given = build_text_inputs(self.model, batch.ids[lane, at][None], positions)
        if places is not None:
            given["position_ids"] = places[..., lane, at][..., None, :]
        return given

    def _module(self, path: str) -> nn.Module:
        return self.model.module.get_submodule(path)

    @contextmanager
    def _embedded(self, index: Tensor) -> Generator[None]:
        """Replace embeddings by those of the unpatched run, with its noise or its images."""
        embedded = self.kept.embedded
        if embedded is None or self.prompt is not None:
            yield
            return
        tap = self.model.anatomy.taps["embed"]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return embedded[index][None]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return replace_activation(args, kwargs, embedded[index][None])

        # Before reads and writes at this site.
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
        """Pass every block its tokens, and restrict its modules to those that must be computed."""
        anatomy, frame = self.model.anatomy, self.frame
        with ExitStack() as stack:
            below, width = frame.universe, frame.size
            for layer, pack in enumerate(frame.packs):
                block = self._module(anatomy.blocks[layer].path)
                if pack is None:
                    stub = BlockStub(self.model.calling.block_returns)
                    stack.enter_context(replace_forward(block, stub))
                    continue
                carried = frame.work[layer].carried
                source = build_block_input(below, pack, carried, frame.device, width)
                hook = self._enter(layer, pack, source)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                projections, output, mlp = list_block_paths(self.model, layer)
                for path, part in (
                    *((path, pack.project) for path in projections),
                    (output, pack.output),
                    *((path, pack.mlp) for path in mlp),
                ):
                    if part is not None and path is not None:
                        module = self._module(path)
                        several = self.kept.tuples.get(path, 0)
                        forward = _compute_part(
                            module.forward, part, self.kept.outputs[path], several
                        )
                        stack.enter_context(replace_forward(module, forward))
                below, width = pack.lookup, len(pack)
            self.last = below
            yield

    def _enter(self, layer: int, pack: BlockPack, source: BlockInput | None) -> Any:
        """Build a hook that passes a block its tokens and their arguments."""
        frame = self.frame
        row, column = np.nonzero(pack.lookup >= 0)
        known = np.empty(len(pack), dtype=np.int64)
        known[pack.lookup[row, column]] = frame.universe[row, column]
        size = frame.size
        same = len(known) == size and bool((known == np.arange(size)).all())
        index = None if same else array_to_device(known, frame.device)
        hidden_below = self.kept.hidden.get(layer)
        first = all(below is None for below in frame.packs[:layer])
        place = np.empty(len(pack), dtype=np.int64)
        counts_columns = self.model.calling.first_position is None
        starts = 0 if counts_columns else frame.prompts.starts[row]
        place[pack.lookup[row, column]] = column - starts
        positions = array_to_device(place, frame.device) if self.prompt is not None else None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            below = get_activation(args, kwargs)
            if first and self.entered is not None:
                below = self.entered
            hidden = assemble_tokens(below, source, hidden_below)
            if self.prompt is not None:
                assert positions is not None
                count = self.prompt[1]
                args = tuple(select_token_arguments(value, positions, count) for value in args)
                kwargs = {
                    name: select_token_arguments(value, positions, count)
                    for name, value in kwargs.items()
                }
            elif index is not None:
                args = tuple(_select_tokens(value, index, size) for value in args)
                kwargs = {
                    name: _select_tokens(value, index, size) for name, value in kwargs.items()
                }
            return replace_activation(args, kwargs, hidden)

        return hook

    @contextmanager
    def _top(self) -> Generator[None]:
        """Continue after the last block with only the tokens that are read."""
        anatomy, frame, n_layers = self.model.anatomy, self.frame, self.model.shape.n_layers
        row, column = np.nonzero(frame.final >= 0)
        below = self.last
        source = below[row, column] if frame.packs[-1] is not None else np.full(len(row), -1)
        stays, fresh = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
        places = frame.lanes[row] * self.kept.columns + column
        indices = stays, source[stays], fresh, places[fresh]
        put = BlockInput(*arrays_to_device(indices, frame.device))
        size = frame.size if self.prompt is None else max(len(row), self.prompt[1])
        left, width = self.kept.hidden[n_layers], self.kept.columns
        self.top = frame.end.top(OutputTokens(put, row, column, frame.lanes, left, width, size))
        with ExitStack() as stack:
            # After all writes at this point.
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
            raise CannotPack(
                "a block uses a different attention implementation than the preceding block"
            )
        attend(
            query[0],
            given.key[0],
            value[0],
            pack.groups,
            kept,
            out,
            causal=self.frame.causal,
            masks=self.masks,
            work=self.sites.layer(("", layer), query),
            **given.arguments,
        )
        return out[None], None

    def _across(self, pack: BlockPack, given: AttentionCall) -> tuple[Tensor, None]:
        """Attend to the encoder's tokens, which differ by lane."""
        kept, columns, query = self.kept.across[given.layer], self.kept.columns, given.query
        function = given.own_function()
        rest = {name: value for name, value in given.arguments.items() if name != "position_bias"}
        heads = query.shape[1]
        out = query.new_empty(1, query.shape[2], heads, kept.values.shape[-1])
        for lane in np.unique(pack.kept_index // columns).tolist():
            tokens = np.flatnonzero(pack.kept_index // columns == lane)
            at = array_to_device(tokens, self.frame.device)
            attention, mask = kept.part(slice(lane, lane + 1)), None
            if attention.mask is not None:
                columns_at = array_to_device(pack.kept_index[tokens] % columns, self.frame.device)
                mask = attention.mask[:, :, columns_at]
            attended, _ = function(
                given.module, query[:, :, at], attention.keys, attention.values, mask, **rest
            )
            out[:, at] = attended
        return out, None


def _compute_part(forward: Any, part: ComputedTokens, kept: Tensor, several: int) -> Any:
    """Build a module's forward for some tokens; the others get stored values.

    several: length of the tuple that it returns, 0 for a tensor.
    """

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        shape = hidden.shape[:-1]
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        out = kept.new_empty(1, flat.shape[1], kept.shape[1])
        out[0, part.taken] = kept[part.taken_from]
        if len(part.computed):
            output = forward(flat[:, part.computed], *args, **kwargs)
            if isinstance(output, tuple):  # further items aren't used
                out[0, part.computed] = output[0].reshape(-1, out.shape[2])
                return (out.view(*shape, -1), *output[1:])
            out[0, part.computed] = output[0]
        whole = out.view(*shape, -1)
        return (whole, *[None] * (several - 1)) if several else whole

    return run


def _select_tokens(value: Any, index: Tensor, size: int) -> Any:
    """Select a block argument for some of all `size` tokens."""
    if isinstance(value, Tensor):
        if value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == size:
            return value.index_select(1, index)
        return value
    if isinstance(value, tuple):
        return tuple(_select_tokens(one, index, size) for one in value)
    return value
