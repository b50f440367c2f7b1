"""Unpatched runs of a batch of prompts: what they compute is kept for the rows that start there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechdsl.columns import Ints
from mechdsl.data.types import Noise, Run
from mechdsl.hooks import Batch, SiteRead, SiteWrite, run_whole
from mechdsl.kept import Kept, keeping
from mechdsl.loaded import LoadedModel
from mechdsl.plan import Place
from mechdsl.resolve.types import Atom, ResolvedMeasure
from mechdsl.taps import fused

Side = Literal["left", "right"]
Spot = Mapping[str, tuple[int, ...]]
"""Run → per prompt, the position that a measure reads; empty for the last token."""


@dataclass(frozen=True, eq=False)
class Lanes:
    """One unpatched run on some prompts. Lane = index of the prompt in `prompts` * draws + draw."""

    run: str
    prompts: Ints
    draws: int
    batch: Batch
    lengths: Ints
    """[lane], tokens of the prompt itself, without a continuation behind it."""
    reads: Mapping[SiteRead, Tensor]
    kept: Kept | None
    """What rows that start from this run take over; None where they are whole passes."""
    logits: Tensor | None
    """[lane, spot, vocab]; None where nothing is measured on this run."""
    tokens: Tensor | None
    """[K] ascending: the tokens whose logits there are; None for the whole vocabulary."""
    loss: Tensor | None

    @cached_property
    def _place(self) -> Ints:
        table = np.full(int(self.prompts.max()) + 1, -1, dtype=np.int64)
        table[self.prompts] = np.arange(len(self.prompts))
        return table

    def lane(self, prompts: Ints, draws: Ints) -> Ints:
        """The lane of each (prompt, draw); a run without noise has one for all draws."""
        return self._place[prompts] * self.draws + (draws if self.draws > 1 else 0)


@dataclass(frozen=True)
class LaneRequest:
    """What is wanted of an unpatched run."""

    reads: frozenset[Place] = frozenset()
    lowest: int | None = None
    """The lowest block that rows start in; None keeps nothing for them."""
    spots: tuple[Spot, ...] = ()
    """Positions whose logits are wanted; with none, the run may stop early."""
    stop: int | None = None
    tokens: Tensor | None = None
    """[K] the only tokens whose logits are wanted, ascending."""
    fuse: bool = False
    loss: Atom | None = None
    continuation: Atom | None = None
    """The text of several tokens that stands behind every prompt."""


def spot_positions(spot: Spot, run: str, prompts: Ints, lengths: Ints) -> Ints:
    """The position that each lane is read at: the spot's, else the last token of the prompt."""
    where = spot.get(run)
    if where is None:
        return lengths - 1
    return np.asarray(where, dtype=np.int64)[prompts]


def continuation_ids(atom: Atom, prompt: int) -> tuple[int, ...]:
    """The token ids of a text that a metric sums over, for one prompt."""
    return atom.texts[None][prompt]


def spots_of(measures: Sequence[ResolvedMeasure]) -> tuple[Spot, ...]:
    """The distinct places that measures read."""
    found: list[Spot] = []
    for measure in measures:
        if measure.at not in found:
            found.append(measure.at)
    return tuple(found)


def compute_lanes(
    model: LoadedModel,
    run: Run,
    prompts: Ints,
    row_ids: Sequence[int],
    request: LaneRequest,
    *,
    seed: int,
    side: Side,
) -> Lanes:
    """Run the unpatched model on these prompts and keep what was asked for.

    `row_ids` are the table's, so that noise hangs on the row and not on the batch.
    """
    draws = run.noise.samples if run.noise is not None else 1
    lanes = np.repeat(prompts, draws)
    ids: list[tuple[int, ...]] = []
    lengths: list[int] = []
    for prompt in lanes:
        own = run.rows[prompt].ids
        behind = (
            ()
            if request.continuation is None
            else continuation_ids(request.continuation, int(prompt))[:-1]
        )
        ids.append(own + behind)
        lengths.append(len(own))
    batch = Batch.of(ids, model.pad_id, side, model.device)
    length = np.array(lengths, dtype=np.int64)
    wanted = [SiteRead(*place) for place in request.reads]
    full = request.loss is not None or SiteRead("logits") in wanted
    at: Tensor | None = None
    if request.spots:
        columns = [spot_positions(spot, run.name, lanes, length) for spot in request.spots]
        at = torch.from_numpy(np.stack(columns, axis=1)).to(model.device)
    if request.continuation is not None:
        at = continuation_positions(request.continuation, lanes, length).to(model.device)
    tokens = None if full or at is None else request.tokens
    noised = [SiteRead("embed")] if run.noise is not None else []
    with ExitStack() as stack:
        kept: Kept | None = None
        if request.lowest is not None:
            kept = stack.enter_context(keeping(model, batch, request.lowest))
        if request.fuse:
            stack.enter_context(fused(model.module))
        result = run_whole(
            model,
            batch,
            stop=request.stop if at is None and not full else None,
            writes=noise_writes(model, run.noise, lanes, draws, row_ids, seed),
            reads=[*wanted, *noised],
            logits_at=None if full else at,
            tokens=tokens,
        )
        if kept is not None and noised:
            kept.embedded = result.reads[noised[0]].flatten(0, 2)
    logits, loss = result.logits, None
    if request.loss is not None and logits is not None:
        loss = prompt_loss(request.loss, logits, batch, run, lanes)
    if full and logits is not None and at is not None:
        logits = at_positions(logits, batch, at)
    return Lanes(
        run=run.name,
        prompts=prompts,
        draws=draws,
        batch=batch,
        lengths=length,
        reads=result.reads,
        kept=kept,
        logits=None if at is None else logits,
        tokens=tokens,
        loss=loss,
    )


def at_positions(logits: Tensor, batch: Batch, at: Tensor) -> Tensor:
    """[B, n, vocab] of [B, T, vocab], at positions [B, n] of the unpadded prompts."""
    rows = torch.arange(len(batch), device=logits.device)[:, None]
    return logits[rows, batch.starts[:, None] + at]


def continuation_positions(atom: Atom, lanes: Ints, lengths: Ints) -> Tensor:
    """[lane, token]: where each token of the text is predicted; the last one is repeated."""
    counts = np.array([len(continuation_ids(atom, int(p))) for p in lanes], dtype=np.int64)
    steps = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
    return torch.from_numpy(lengths[:, None] - 1 + steps)


def prompt_loss(atom: Atom, logits: Tensor, batch: Batch, run: Run, lanes: Ints) -> Tensor:
    """[lane]: the loss over the prompts' own tokens, special ones and continuations aside."""
    mask = torch.zeros_like(batch.mask, dtype=torch.bool)
    for lane, prompt in enumerate(lanes):
        row = run.rows[prompt]
        start = int(batch.starts[lane])
        own = torch.tensor([not special for special in row.special], device=mask.device)
        mask[lane, start : start + len(row.ids)] = own
    return atom.form.function(logits, batch.ids, mask)


def noise_writes(
    model: LoadedModel,
    noise: Noise | None,
    lanes: Ints,
    draws: int,
    row_ids: Sequence[int],
    seed: int,
) -> list[SiteWrite]:
    """The noise of a corrupted run as writes; the same for a row whatever it is batched with.

    `lanes` are prompts, each `draws` times in a row.
    """
    if noise is None:
        return []
    scale = noise_scale(model, noise)
    rows: list[int] = []
    positions: list[int] = []
    values: list[np.ndarray] = []
    for lane, prompt in enumerate(lanes):
        for position in noise.positions[prompt]:
            key = [seed % 2**63, row_ids[prompt], lane % draws, position]
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
            rows.append(lane)
            positions.append(position)
            values.append(random.standard_normal(model.shape.d_model) * scale)
    count = len(rows)
    return [
        SiteWrite(
            noise.site,
            None,
            torch.tensor(rows, dtype=torch.long),
            torch.tensor(positions, dtype=torch.long),
            torch.zeros(count, dtype=torch.long),
            torch.from_numpy(np.stack(values)) if count else torch.zeros(0, model.shape.d_model),
            mode="add",
        )
    ]


def noise_scale(model: LoadedModel, noise: Noise) -> float:
    """The standard deviation of the noise, in units of the activation.

    `3 sd` is three standard deviations, one scalar, of the embeddings of the span's tokens over
    all rows (Meng et al. 2022, arXiv 2202.05262).
    """
    if noise.sds is None:
        return float(noise.std or 0.0)
    embed = model.module.get_submodule(model.anatomy.embedding)
    ids, counts = np.unique(np.array(noise.sd_tokens, dtype=np.int64), return_counts=True)
    with torch.inference_mode():
        vectors = embed(torch.from_numpy(ids).to(model.device)).double().cpu().numpy()
    weights = counts / counts.sum()
    mean = (weights[:, None] * vectors).sum(0).mean()
    variance = (weights[:, None] * (vectors - mean) ** 2).sum(0).mean()
    numbers = counts.sum() * vectors.shape[1]
    return float(noise.sds * np.sqrt(variance * numbers / (numbers - 1)))
