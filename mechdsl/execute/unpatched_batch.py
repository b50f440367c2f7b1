"""Unpatched runs of one batch of prompts.

One pass computes the logits, the activations and the cache that patched rows start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.image_vectors import provide_images
from mechdsl.forward.hooks.batch import Batch, RuleWrites, SiteRead, SiteWrite, to_device
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.hook_points import fuse_activations
from mechdsl.forward.hooks.model import (
    LoadedModel,
    apply_position_ids,
    build_batch,
    has_single_output,
    replace_blocks,
)
from mechdsl.forward.hooks.token_copies import TokenCopies, find_batch_copies
from mechdsl.forward.packed.activation_cache import ActivationCache, record_activations
from mechdsl.images.pixels import model_input
from mechdsl.models.shape import PaddingSide
from mechdsl.prompts.runs import PromptRun, RunNoise, RunRow
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.types import MetricTerm, ResolvedMeasure, SiteLayer
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES

MeasuredPosition = Mapping[str, tuple[int, ...]]
"""Run → per prompt, the position that a measure reads; empty for the last token."""


@dataclass(frozen=True, eq=False)
class UnpatchedBatch:
    """One unpatched run on some prompts. Lane = index of the prompt in `prompts` * draws + draw."""

    run: str
    prompts: Ints
    draws: int
    batch: Batch
    lengths: Ints
    """[lane] number of prompt tokens, without a continuation."""
    reads: Mapping[SiteRead, Tensor]
    kept: ActivationCache | None
    """Activations that rows reuse when they start from this run; None if rows are full passes."""
    logits: Tensor | None
    """[lane, spot, vocab]; None if nothing is measured on this run."""
    tokens: Tensor | None
    """[K] ascending: the tokens that `logits` holds; None for the whole vocabulary."""
    loss: Tensor | None
    largest: Tensor | None = None
    """[lane, spot], with `tokens`: magnitude of the largest logit of the whole vocabulary."""
    patches: int = 1
    """Number of patches of the vision encoder that a token of an image is made from."""

    @cached_property
    def _place(self) -> Ints:
        table = np.full(int(self.prompts.max()) + 1, -1, dtype=np.int64)
        table[self.prompts] = np.arange(len(self.prompts))
        return table

    def lane(self, prompts: Ints, draws: Ints) -> Ints:
        """Return the lane of each (prompt, draw); without noise, all draws share one lane."""
        return self._place[prompts] * self.draws + (draws if self.draws > 1 else 0)


@dataclass(frozen=True)
class UnpatchedRequest:
    """Values requested of an unpatched run."""

    reads: frozenset[SiteLayer] = frozenset()
    lowest: int | None = None
    """The lowest block that rows start in; None stores nothing for rows."""
    spots: tuple[MeasuredPosition, ...] = ()
    """Positions whose logits are requested; if there are none, the run may stop early."""
    stop: int | None = None
    tokens: Tensor | None = None
    """[K] ascending: the only tokens whose logits are requested."""
    fuse: bool = False
    shares: bool = False
    """Whether equal beginnings of prompts are computed once."""
    loss: MetricTerm | None = None
    continuation: MetricTerm | None = None
    """Metric whose text of several tokens follows every prompt."""


def find_positions(spot: MeasuredPosition, run: str, prompts: Ints, lengths: Ints) -> Ints:
    """Return the position at which each lane is read: the spot's, else the last prompt token."""
    where = spot.get(run)
    if where is None:
        return lengths - 1
    return np.asarray(where, dtype=np.int64)[prompts]


@dataclass(frozen=True, eq=False)
class Continuation:
    """Text of several tokens after the prompts of a pass."""

    number: int
    """Number of the metric that reads it, among the atoms of a readout."""
    atom: MetricTerm


def count_fed_tokens(text: Continuation | None, prompts: Ints) -> Ints:
    """Return [prompt]: number of the text's tokens that the model is given."""
    if text is None:
        return np.zeros(len(prompts), dtype=np.int64)
    return np.array(text.atom.appended, dtype=np.int64)[prompts]


def get_continuation_ids(atom: MetricTerm, prompt: int) -> tuple[int, ...]:
    """Return the token ids of a text that a metric sums over, for one prompt."""
    return atom.texts[None][prompt]


def collect_measured_positions(measures: Sequence[ResolvedMeasure]) -> tuple[MeasuredPosition, ...]:
    """Collect the distinct positions that measures read."""
    positions: list[MeasuredPosition] = []
    for measure in measures:
        if measure.at not in positions:
            positions.append(measure.at)
    return tuple(positions)


def compute_unpatched(
    model: LoadedModel,
    runs: Sequence[tuple[PromptRun, UnpatchedRequest]],
    prompts: Ints,
    row_keys: Sequence[int],
    *,
    seed: int,
    side: PaddingSide | None,
    rules: RuleWrites | None = None,
) -> list[UnpatchedBatch]:
    """Run the unpatched model on these prompts, with all runs in one pass.

    Args:
        runs: The runs with the values requested of each.
        row_keys: Keys of the table's rows, so that noise depends on a row's content and not on the
            batch.
        seed: Seed of noise.
        side: As in `ExecutionOptions`.
        rules: Writes of a derived run, which must be the only run; their rows are its lanes.
    """
    parts = [_RunPart.of(model, run, request, prompts) for run, request in runs]
    ids = [row for part in parts for row in part.ids]
    acting = rules or RuleWrites()
    rows = [part.run.rows[p] for part in parts for p in part.lanes]
    batch = build_batch(model, ids, [row.source for row in rows], side or model.calling.side)
    batch = apply_position_ids(model, add_images(model, batch, rows), acting)
    begins = np.cumsum([0, *(len(part.ids) for part in parts)]).tolist()
    noise: list[SiteWrite] = []
    for part, begin in zip(parts, begins, strict=False):
        rows = torch.arange(begin, begin + len(part.ids))
        added = build_noise_writes(model, part.run.noise, part.lanes, row_keys, seed)
        noise += [write.moved(rows) for write in added]
    plain = rules is None and all(part.asked.shares for part in parts)
    copies = _find_copies(model, batch, parts) if plain else None
    with replace_blocks(model, acting.blocks):
        done = _run_pass(model, batch, parts, RuleWrites(noise).then(acting), copies)
    patches = model.shape.merged_side**2
    return [
        replace(part.found(done, slice(begin, begin + len(part.ids))), patches=patches)
        for part, begin in zip(parts, begins, strict=False)
    ]


def add_images(model: LoadedModel, batch: Batch, rows: Sequence[RunRow]) -> Batch:
    """Add the pixels of rows that are images, whose tokens have equal numbers, and compute the
    vectors of images within prompts."""
    provide_images(model, rows)
    known = [row.image for row in rows if row.image is not None]
    if not known:
        return batch
    reader = model.tokenizer
    assert isinstance(reader, ImageTokenizer)
    images = np.stack([model_input(picture, reader.processing) for picture in known])
    pixels = to_device(torch.from_numpy(images).to(model.dtype), model.device)
    assert bool((batch.lengths == batch.ids.shape[1]).all()), "images have no padding"
    inserted = batch.ids.shape[1] - reader.layout.tokens
    return replace(batch.with_inputs({"pixel_values": pixels}), inserted=inserted)


def sort_requested_sites(request: UnpatchedRequest) -> list[SiteLayer]:
    """Sort the requested sites, so that their order doesn't depend on the set."""
    return sorted(request.reads, key=lambda place: (place[0], -1 if place[1] is None else place[1]))


@dataclass(frozen=True, eq=False)
class _RunPart:
    """One of several runs in a pass."""

    run: PromptRun
    asked: UnpatchedRequest
    prompts: Ints
    lanes: Ints
    """[lane] its prompt."""
    ids: list[tuple[int, ...]]
    lengths: Ints
    """[lane] number of prompt tokens, without a continuation."""
    at: Tensor | None
    """[lane, n] positions whose logits are requested."""

    @staticmethod
    def of(
        model: LoadedModel, run: PromptRun, request: UnpatchedRequest, prompts: Ints
    ) -> _RunPart:
        lanes = np.repeat(prompts, run.draws)
        text = request.continuation
        ids = [
            run.rows[p].ids + (() if text is None else get_continuation_ids(text, int(p))[:-1])
            for p in lanes
        ]
        lengths = np.array([len(run.rows[p].ids) for p in lanes], dtype=np.int64)
        at: Tensor | None = None
        if request.spots:
            columns = [find_positions(spot, run.name, lanes, lengths) for spot in request.spots]
            at = torch.from_numpy(np.stack(columns, axis=1))
        if text is not None:
            at = find_continuation_positions(text, lanes, lengths)
        return _RunPart(run, request, prompts, lanes, ids, lengths, at)

    def found(self, done: _BatchPass, rows: slice) -> UnpatchedBatch:
        """Extract this run's values from the pass; rows: its rows in the batch."""
        batch, result = done.batch.part(rows), done.result
        logits = None if result.logits is None else result.logits[rows]
        loss = None
        if self.asked.loss is not None and logits is not None:
            loss = compute_prompt_loss(self.asked.loss, logits, batch, self.run, self.lanes)
        if done.full and logits is not None and self.at is not None:
            logits = select_positions(logits, batch, self.at)
        kept = None if self.asked.lowest is None else done.kept
        return UnpatchedBatch(
            run=self.run.name,
            prompts=self.prompts,
            draws=self.run.draws,
            batch=batch,
            lengths=self.lengths,
            reads={read: vectors[rows] for read, vectors in done.reads.items()},
            kept=None if kept is None else kept.part(rows, batch),
            logits=None if self.at is None else logits,
            tokens=done.tokens,
            loss=loss,
            largest=None if result.largest is None else result.largest[rows],
        )


@dataclass(frozen=True, eq=False)
class _BatchPass:
    """Result of one pass over all runs."""

    batch: Batch
    result: FullPassResult
    reads: Mapping[SiteRead, Tensor]
    kept: ActivationCache | None
    full: bool
    """Whether `result` has the logits of all positions."""
    tokens: Tensor | None


def _find_copies(model: LoadedModel, batch: Batch, parts: Sequence[_RunPart]) -> TokenCopies | None:
    """Find the tokens of equal beginnings of prompts; None if they aren't shared."""
    ids = [row for part in parts for row in part.ids]
    noised = np.repeat([part.run.noise is not None for part in parts], [len(p.ids) for p in parts])
    return find_batch_copies(model, batch, ids, noised)


def _run_pass(
    model: LoadedModel,
    batch: Batch,
    parts: Sequence[_RunPart],
    rules: RuleWrites,
    copies: TokenCopies | None,
) -> _BatchPass:
    """Run the pass, up to the last block that is needed."""
    requests = [part.asked for part in parts]
    every = list(
        dict.fromkeys(SiteRead(*place) for r in requests for place in sort_requested_sites(r))
    )
    wanted = [read for read in every if read.site not in ATTENTION_INTERNAL_SITES]
    within = [read for read in every if read.site in ATTENTION_INTERNAL_SITES]
    noised = [SiteRead("embed")] if any(part.run.noise is not None for part in parts) else []
    full = SiteRead("logits") in wanted or any(r.loss is not None for r in requests)
    full |= any(write.site == "logits" for write in rules.writes)
    measured = any(part.at is not None for part in parts)
    full |= measured and has_single_output(model)
    at = _stack_positions(parts) if measured and not full else None
    tokens = requests[0].tokens if measured and not full else None
    stops = [part.asked.stop if part.at is None else None for part in parts]
    stop = None if full or None in stops else max(stop for stop in stops if stop is not None)
    lowest = [r.lowest for r in requests if r.lowest is not None]
    kept: ActivationCache | None = None
    with ExitStack() as stack:
        if copies is not None:
            stack.enter_context(copies.shared(model))
        if lowest:
            kept = stack.enter_context(record_activations(model, batch, min(lowest)))
        if requests[0].fuse:
            stack.enter_context(fuse_activations(model.module))
        due = rules.below(stop, model.shape.n_layers)
        result = run_full(
            model,
            batch,
            stop=stop,
            writes=due.writes,
            reads=[*wanted, *noised],
            logits_at=at,
            tokens=tokens,
            ends=True,
            edges=due.edges,
        )
        if kept is not None and noised:
            kept.embedded = result.reads[noised[0]].flatten(0, 2)
    reads = dict(result.reads)
    if within:  # separate from the activation cache, because both replace attention
        # Encoders come before all blocks of the decoder.
        before = ("encoder", "vision")
        last = max(-1 if r.stack in before else r.layer for r in within if r.layer is not None)
        due = rules.below(last + 1, model.shape.n_layers)
        with nullcontext() if copies is None else copies.shared(model):
            stopped = run_full(
                model, batch, stop=last + 1, writes=due.writes, reads=within, edges=due.edges
            )
        reads |= stopped.reads
    return _BatchPass(batch, result, {read: reads[read] for read in every}, kept, full, tokens)


def _stack_positions(parts: Sequence[_RunPart]) -> Tensor:
    """Return [lane of all runs, n]; unmeasured runs use the last token, whose value is ignored."""
    width = max(part.at.shape[1] for part in parts if part.at is not None)
    every = [
        torch.from_numpy(part.lengths - 1)[:, None].expand(-1, width)
        if part.at is None
        else part.at
        for part in parts
    ]
    return torch.cat(every)


def select_positions(logits: Tensor, batch: Batch, at: Tensor) -> Tensor:
    """Select [B, n, vocab] from [B, T, vocab].

    Args:
        logits: The logits of all columns, or one output for a whole image.
        at: [B, n] positions in the unpadded prompts, on the host.
    """
    if logits.dim() == 2:  # one output for a whole image
        return logits[:, None].expand(-1, at.shape[1], -1)
    rows = torch.arange(len(batch), device=logits.device)[:, None]
    return logits[rows, to_device(batch.starts[:, None] + at, logits.device)]


def find_continuation_positions(atom: MetricTerm, lanes: Ints, lengths: Ints) -> Tensor:
    """Return [lane, token]: where each token of the text is predicted, padded with the last one."""
    counts = np.array([len(get_continuation_ids(atom, int(p))) for p in lanes], dtype=np.int64)
    steps = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
    return torch.from_numpy(lengths[:, None] - 1 + steps)


def compute_prompt_loss(
    atom: MetricTerm, logits: Tensor, batch: Batch, run: PromptRun, lanes: Ints
) -> Tensor:
    """Return [lane]: the loss over the prompts' own tokens of text, without special ones, tokens of
    images and continuations. An image's token in a text has no logit."""
    mask = torch.zeros(batch.mask.shape, dtype=torch.bool)
    for lane, prompt in enumerate(lanes):
        row = run.rows[prompt]
        start = int(batch.starts[lane])
        tensor = torch.tensor(_predicted(row)[row.source :])
        mask[lane, start + row.source : start + len(row.ids)] = tensor
    known = batch.ids < logits.shape[-1]
    ids, mask = batch.ids.where(known, 0), to_device(mask, known.device) & known
    return atom.form.function(logits, ids, mask)


def _predicted(row: RunRow) -> list[bool]:
    """Return [token]: whether it is text that a preceding token of the decoder's predicts."""
    return [
        n > row.source and not special and token < IMAGE_TOKEN
        for n, (token, special) in enumerate(zip(row.ids, row.special, strict=True))
    ]


def has_loss(run: PromptRun, prompts: Ints) -> Bools:
    """Return [prompt]: whether a token of its text is predicted, so that a loss exists."""
    return np.array([any(_predicted(run.rows[prompt])) for prompt in prompts], dtype=np.bool_)


def build_noise_writes(
    model: LoadedModel,
    noise: RunNoise | None,
    lanes: Ints,
    row_keys: Sequence[int],
    seed: int,
) -> list[SiteWrite]:
    """Build the noise of a corrupted run, which is the same for a row in any batch.

    Args:
        noise: The noise; None for no writes.
        lanes: Prompts, each repeated once per draw. Noise of a single draw is the same for all.
        row_keys: Keys of the table's rows.
        seed: Seed of noise.
    """
    if noise is None:
        return []
    draws = noise.samples
    scale = compute_noise_scale(model, noise)
    row_keys = row_keys if noise.row_keys is None else noise.row_keys
    rows: list[int] = []
    positions: list[int] = []
    values: list[np.ndarray] = []
    for lane, prompt in enumerate(lanes):
        draw = lane % draws if noise.drawn is None else noise.drawn[prompt]
        for position in noise.positions[prompt]:
            key = [seed % 2**63, row_keys[prompt], draw, position]
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


def compute_noise_scale(model: LoadedModel, noise: RunNoise) -> float:
    """Compute the standard deviation of the noise, in units of the activation.

    `3 sd` is three times one scalar: the standard deviation of the embeddings of the span's tokens
    over all rows (Meng et al. 2022, arXiv 2202.05262); for images, of the site's values there.
    """
    if noise.sds is None:
        return float(noise.std or 0.0)
    if noise.sd_images:
        known = _IMAGE_DEVIATIONS.setdefault(model, {})
        if noise.sd_tokens not in known:
            known[noise.sd_tokens] = _image_deviation(model, noise)
        return noise.sds * known[noise.sd_tokens]
    assert model.anatomy.embedding is not None  # true for models of tokens
    embed = model.module.get_submodule(model.anatomy.embedding)
    ids, counts = np.unique(np.array(noise.sd_tokens, dtype=np.int64), return_counts=True)
    with torch.inference_mode():
        vectors = embed(torch.from_numpy(ids).to(model.device)).double().cpu().numpy()
    weights = counts / counts.sum()
    mean = (weights[:, None] * vectors).sum(0).mean()
    variance = (weights[:, None] * (vectors - mean) ** 2).sum(0).mean()
    numbers = counts.sum() * vectors.shape[1]
    return float(noise.sds * np.sqrt(variance * numbers / (numbers - 1)))


_IMAGE_DEVIATIONS: WeakKeyDictionary[LoadedModel, dict[tuple[int, ...], float]] = (
    WeakKeyDictionary()
)
"""Computed standard deviations, by the tokens that they are over."""

_IMAGES_PER_PASS = 32
"""Number of images in a pass that only embeds them."""


def _image_deviation(model: LoadedModel, noise: RunNoise) -> float:
    """Compute the standard deviation of the site's values at image tokens, without noise."""
    run = PromptRun("", tuple(row for row, _ in noise.sd_images))
    asked = UnpatchedRequest(reads=frozenset({(noise.site, None)}), stop=0)
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, len(run.rows), _IMAGES_PER_PASS):
        prompts = np.arange(first, min(first + _IMAGES_PER_PASS, len(run.rows)), dtype=np.int64)
        [seen] = compute_unpatched(model, [(run, asked)], prompts, (), seed=0, side=None)
        vectors = seen.reads[SiteRead(noise.site)].double().cpu().numpy()
        for vector, prompt in zip(vectors, prompts, strict=True):
            deviation = vector[list(noise.sd_images[prompt][1])]
            count, total = count + deviation.size, total + float(deviation.sum())
            squares += float((deviation**2).sum())
    return float(np.sqrt((squares - total**2 / count) / (count - 1)))
