# pyright: reportUnknownMemberType=false
"""Packed rows of models that can't be called with tokens of many rows side by side.

Some count positions by themselves or look at the whole prompt before their first block, and images
have no tokens. Such a model is called with one prompt, whose tokens are exchanged in front of the
first block; rows that are written in the embedding go through what lies below as whole prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.hooks.batch import on_device
from mechdsl.hooks.calls import text_inputs
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.packed.activation_cache import ActivationCache


def prompt_of(model: LoadedModel, kept: ActivationCache) -> tuple[dict[str, Any], int]:
    """What the model is called with, the longest prompt or any image, and its number of tokens."""
    batch = kept.batch
    if model.shape.takes == "image":
        return dict(batch.part(slice(0, 1)).extra), int(batch.ids.shape[1])
    lane = int(batch.lengths.argmax())
    if kept.encoded is not None:  # any prompt's: what is attended to was kept
        encoded = kept.encoded_of(slice(lane, lane + 1))
        ids = batch.ids[lane][None]
        return {"encoder_outputs": encoded, "decoder_input_ids": ids}, int(ids.shape[1])
    if model.calling.first_position is None:  # columns are counted, those of padding too
        ids = batch.ids[lane][None]
        return text_inputs(model, ids, None), int(ids.shape[1])
    ids = batch.ids[lane][batch.mask[lane].bool()][None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return text_inputs(model, ids, positions), int(ids.shape[1])


def entering(
    model: LoadedModel,
    kept: ActivationCache,
    lanes: Ints,
    universe: Ints,
    size: int,
    writes: Sequence[SiteWrite],
    reads: Sequence[SiteRead],
) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
    """([1, token, d_model] that enters the first block, what is read at `embed`).

    universe: [row, column] → token. writes, reads: at `embed`.
    """
    row, column = np.nonzero(universe >= 0)
    index = np.empty(size, dtype=np.int64)
    index[universe[row, column]] = lanes[row] * kept.columns + column
    hidden = kept.hidden.get(0)
    if hidden is None:
        entered = torch.zeros(1, size, model.shape.d_model, device=model.device, dtype=model.dtype)
    else:
        entered = hidden[on_device(index, model.device)][None]
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
    noise = _with_noise(kept, lanes[chosen], own)
    stream = SiteRead("resid_pre", 0)
    batch = kept.batch.take(torch.from_numpy(lanes[chosen]))
    found = run_whole(model, batch, stop=0, writes=[*noise, *own], reads=[stream, *reads]).reads

    def put(into: Tensor, value: Tensor, rows: Ints, columns: Ints) -> None:
        there = universe[rows, columns] >= 0
        rows, columns = rows[there], columns[there]
        token = on_device(universe[rows, columns], model.device)
        places = on_device(number[rows], model.device), on_device(columns, model.device)
        into[0, token] = value[places]

    put(entered, found[stream].squeeze(2), *np.nonzero(written))
    seen: dict[SiteRead, Tensor] = {}
    for read in reads:
        value = found[read]
        seen[read] = value.new_zeros(1, size, *value.shape[2:])
        put(seen[read], value, row, column)
    return entered, seen


def _with_noise(kept: ActivationCache, lanes: Ints, writes: Sequence[SiteWrite]) -> list[SiteWrite]:
    """What the unpatched run's embedding was, where that isn't the tokens' own and nothing else is
    set."""
    if kept.embedded is None:
        return []
    real = kept.batch.mask.cpu().numpy().astype(np.bool_)[lanes]
    starts = kept.batch.starts.numpy()[lanes]
    for write in writes:
        if write.mode == "set":
            rows = write.rows.numpy()
            real[rows, starts[rows] + write.positions.numpy()] = False
    row, column = np.nonzero(real)
    values = kept.embedded[on_device(lanes[row] * kept.columns + column, kept.embedded.device)]
    rows, positions = torch.from_numpy(row), torch.from_numpy(column - starts[row])
    return [SiteWrite("embed", None, rows, positions, torch.zeros_like(rows), values)]


def placed(value: Any, positions: Tensor, count: int) -> Any:
    """What the model hands its blocks for the `count` tokens of the prompt, for the tokens of a
    pass, which stand at these places of theirs."""
    if isinstance(value, tuple):
        parts = cast("tuple[Any, ...]", value)
        if len(parts) == 2 and _turns(parts[0], count) and _turns(parts[1], count):
            # Rotary of an image's patches: the tokens in front of them aren't turned.
            cos, sin = parts
            front = count - len(cos)
            cos = torch.cat([cos.new_ones(front, cos.shape[1]), cos])
            sin = torch.cat([sin.new_zeros(front, sin.shape[1]), sin])
            return cos[positions], sin[positions]
        return tuple(placed(part, positions, count) for part in parts)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.shape[0] == 1 and value.shape[1] == count:
        return value.index_select(1, positions)
    if value.dim() > 2 and value.numel() == count * value.shape[-1]:  # [1, 1, token, width]
        return value.index_select(-2, positions)
    return value


def _turns(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and 1 < value.shape[0] <= count
