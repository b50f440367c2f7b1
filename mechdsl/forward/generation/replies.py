"""Text generation for many prompts at once under rules, with or without a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechdsl.base.arrays import Ints
from mechdsl.forward.generation.attended_images import (
    AttendedImages,
    align_ends,
    is_of_image,
    list_image_layers,
)
from mechdsl.forward.generation.cached_pass import (
    CachedPass,
    GenerationMethod,
    NewTokens,
    PassArguments,
    choose_method,
    run_cached_pass,
    store_keys,
)
from mechdsl.forward.generation.decoding import Decoding, ReplyBuffer, choose_next_tokens
from mechdsl.forward.generation.key_value_cache import KeyValueCache, is_single_query_supported
from mechdsl.forward.generation.rules import (
    GenerationRules,
    RowChoice,
    RowSharing,
    RowStates,
    SharedBlocks,
    StepRules,
    find_first_step,
    find_lowest_block,
    find_shared_end,
    join_step_rules,
    merge_steps,
    merge_writes,
    number_distinct,
    number_rules,
)
from mechdsl.forward.hooks.batch import (
    Batch,
    BlockPairs,
    BlockPlace,
    RuleWrites,
    SiteRead,
    SiteWrite,
    apply_write,
    array_to_device,
    get_reply_bytes,
    to_device,
    try_pass,
)
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import fuse_activations
from mechdsl.forward.hooks.model import (
    ENCODED,
    IMAGE_TOKENS,
    LoadedModel,
    apply_position_ids,
    build_batch,
    find_given_positions,
    mixes_images,
    record_encoded,
    replace_blocks,
    with_encoded,
)
from mechdsl.forward.hooks.token_copies import find_copies
from mechdsl.models.shape import ModelShape
from mechdsl.vocab.metrics import Reply
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES

StoredVectors = dict[SiteRead, Tensor]
"""Keys and values [token, heads, d_head] of all layers, for the tokens of one state so far."""


@dataclass(frozen=True, eq=False)
class ReplyRequest:
    """Prompts to generate replies after, and the rules that act."""

    prompts: Sequence[tuple[int, ...]]
    """[row] token ids."""
    prefill: RuleWrites = field(default_factory=RuleWrites)
    """Writes of the prefill, at positions of the prompt."""
    later: GenerationRules = field(default_factory=GenerationRules)
    """Edits of keys and values before step 1, each applied to the layer's original values, and
    writes at the newest token of later passes."""
    random: Sequence[tuple[int, ...]] = ()
    """[row] seed of the random numbers of sampled tokens, together with the step; empty without
    sampling."""
    groups: Ints | None = None
    """[row] equal for rows with equal writes, so that equal rows are computed once until their
    tokens differ; by default rows are shared only until a rule acts on them."""
    sources: Sequence[int] = ()
    """[row] number of the prompt's tokens that an encoder reads; empty without an encoder."""

    @property
    def inside(self) -> bool:
        """Whether a rule acts within attention."""
        steps = self.later.steps
        writes = [*self.prefill.writes, *(write for rules in steps for write in rules.writes)]
        edges = [*self.prefill.edges, *(edge for rules in steps for edge in rules.edges)]
        return bool(edges) or any(write.site in ATTENTION_INTERNAL_SITES for write in writes)

    @property
    def looks_back(self) -> bool:
        """Whether writes at the newest token depend on the value at the preceding token."""
        return any(write.mode == "step" for rules in self.later.steps for write in rules.writes)

    def check_blocks(self, tokens: int, shape: ModelShape) -> None:
        """Raise ValueError if a skipped block runs again, as it lacks keys of the tokens so far.

        Blocks that attend to an image, and those that encode it, need no such keys.
        """
        attends = shape.attends_to_image
        out: set[BlockPlace] = set()
        for step in range(tokens):
            blocks = collect_blocks(self.later.steps, step)
            blocks = blocks if step else _collect_decoder_blocks(self.prefill.blocks)
            now = {block for block, of in blocks.items() if of is None}
            if attends:
                now = {(stack, n) for stack, n in now if not stack and shape.has("k", n)}
            if out - now:
                raise ValueError(
                    f"block {min(out - now)[1]} was omitted earlier but attends in step {step}"
                )
            out |= now

    def merged(self) -> ReplyRequest:
        """Merge the rules into few writes."""
        count, later = len(self.prompts), self.later
        kept = merge_writes(RuleWrites(later.kept), count).writes
        later = GenerationRules(tuple(kept), tuple(join_step_rules(later.steps, count)))
        return replace(self, prefill=merge_writes(self.prefill, count), later=later)

    def some(self, rows: Sequence[int]) -> ReplyRequest:
        """Restrict the request to some rows."""
        chosen, later = RowChoice(len(self.prompts), rows), self.later
        kept = tuple(own for write in later.kept if len((own := chosen.write(write)).rows))
        return ReplyRequest(
            [self.prompts[row] for row in rows],
            chosen.rules(self.prefill),
            GenerationRules(kept, tuple(map(chosen.step_rules, later.steps))),
            [self.random[row] for row in rows] if self.random else (),
            None if self.groups is None else self.groups[np.array(rows)],
            [self.sources[row] for row in rows] if self.sources else (),
        )


class FullPasses:
    """Passes that recompute all tokens, with all writes at each of them.

    Earlier tokens may not come out as they were: if cached keys and values were edited after the
    prefill, or if blocks were exchanged in some of the steps. Their keys and values are then
    written as they were, and so are the vectors before any rule that steps are computed from.

    The encoder of an encoder-decoder runs only in the prefill: later passes read its outputs.
    """

    def __init__(
        self,
        model: LoadedModel,
        request: ReplyRequest,
        tokens: int,
        limit: int,
    ) -> None:
        """Prepare passes; tokens: maximum length of a reply; limit: tokens of one pass."""
        self.model = model
        self.prompts = request.prompts
        self.prefill = prefill = request.prefill
        self._sources = request.sources or [0] * len(request.prompts)
        kept, steps = request.later.kept, request.later.steps
        self.kept = [write for write in kept if not write.stack]
        self._across = RuleWrites([write for write in kept if write.stack])
        """Edits of an encoder's keys and values, which later passes project again."""
        self.steps = steps
        self.limit = limit
        before = _collect_decoder_blocks(prefill.blocks)
        mixed = any(collect_blocks(steps, step) != before for step in range(1, tokens))
        self._holds = bool(kept) or mixed
        every = (*prefill.writes, *(write for rules in steps for write in rules.writes))
        stepped = (replace(write.where, before=True) for write in every if write.mode == "step")
        self._stepped = list(dict.fromkeys(stepped))
        """Sites of vectors that steps are computed from."""
        self._held: list[StoredVectors] = []
        """[state] vectors of the preceding step."""
        self._encoded: list[Tensor] = []
        """[state] outputs of the encoder [token, d_model]; empty without an encoder."""

    @property
    def own(self) -> Ints:
        """[row] number of tokens that only its prefill computes."""
        return np.array([len(prompt) for prompt in self.prompts])

    def arranged(self, states: RowStates, ids: Ints) -> RowStates:
        """Return the states: any order works."""
        return states

    def close(self) -> None:
        """Do nothing: every pass removes its hooks."""

    def logits(self, states: RowStates, ids: Ints) -> Tensor:
        """Compute [state, vocab] logits after the newest token of each state.

        Args:
            ids: [row, step] the replies so far.
        """
        rows: list[int] = states.leaders.tolist()
        step = ids.shape[1]
        held = self._before(states, RowChoice(len(self.prompts), rows), step)
        encoded = (
            [self._encoded[parent] for parent in states.parents.tolist()] if self._encoded else []
        )
        longest = max(len(self.prompts[row]) for row in rows) + step
        each = max(1, self.limit // longest)
        self._held, self._encoded = [], []
        parts = [slice(first, first + each) for first in range(0, len(rows), each)]
        return torch.cat([self._part(rows[part], held[part], encoded[part], ids) for part in parts])

    def _part(
        self,
        rows: Sequence[int],
        held: Sequence[StoredVectors],
        encoded: Sequence[Tensor],
        ids: Ints,
    ) -> Tensor:
        """Compute [n, vocab] logits of the states with these leading rows, in one pass."""
        step = ids.shape[1]
        sources = [self._sources[row] for row in rows]
        texts = [(*self.prompts[row], *ids[row].tolist()) for row in rows]
        batch = build_batch(self.model, texts, sources, self.model.calling.side)
        chosen = RowChoice(len(self.prompts), rows)
        lengths = torch.tensor([len(self.prompts[row]) for row in rows])
        later = [
            chosen.step(self.steps, earlier, lengths, lengths + earlier - 1)
            for earlier in range(1, step + 1)
        ]
        acting = merge_steps(chosen.rules(self.prefill), later)
        blocks = collect_blocks(self.steps, step) if step else dict(self.prefill.blocks)
        acting = replace(acting, blocks=tuple(sorted(blocks.items())))
        batch = apply_position_ids(self.model, batch, acting)
        if not self.model.shape.encodes_apart:
            return self._run(acting, batch, held, sources)
        if self.model.shape.attends_to_image:  # it was encoded before all passes
            acting = acting.then(chosen.rules(self._across)) if step else acting
            return self._run(acting, batch, held, sources)
        if encoded:
            acting = acting.outside("encoder").then(chosen.rules(self._across))
            extra = {ENCODED: pad_sequence(list(encoded), batch_first=True)}
            batch = replace(batch, extra=extra)
            self._encoded += encoded
            return self._run(acting, batch, held, sources)
        with record_encoded(self.model) as outputs:
            part = self._run(acting, batch, held, sources)
        # Without rules in the encoder, vectors that it computed before may replace its pass.
        every = outputs[0][0] if outputs else with_encoded(self.model, batch).extra[ENCODED]
        self._encoded += [tensor[:count] for tensor, count in zip(every, sources, strict=True)]
        return part

    def _run(
        self,
        acting: RuleWrites,
        batch: Batch,
        held: Sequence[StoredVectors],
        sources: Sequence[int],
    ) -> Tensor:
        """Run one pass.

        Args:
            acting: All writes of the pass.
            batch: Prompts and replies.
            held: [state] stored vectors, or empty.
            sources: [state] number of tokens that an encoder reads.
        """
        last = (batch.lengths - 1)[:, None]
        every = any(write.site == "logits" for write in acting.writes)
        reads = self._reads(acting) if self._holds else []
        again = [
            _rewrite_vectors(read, [each[read] for each in held], sources) for read in reads if held
        ]
        # Step sources are written before all rules; other stored vectors after them.
        begin, end = again[: len(self._stepped)], again[len(self._stepped) :]
        with replace_blocks(self.model, acting.blocks):
            result = run_full(
                self.model,
                batch,
                writes=[*begin, *acting.writes, *end],
                edges=acting.edges,
                reads=reads,
                logits_at=None if every else last,
            )
        assert result.logits is not None
        given = zip(batch.starts.tolist(), batch.lengths.tolist(), sources, strict=True)
        spans = [slice(start + source, start + length) for start, length, source in given]
        for number, span in enumerate(spans if self._holds else ()):
            tensors = {read: vectors[number, span] for read, vectors in result.reads.items()}
            for read in self._stepped if held else ():  # of each token, from its own pass
                tensors[read] = torch.cat([held[number][read], tensors[read][-1:]])
            self._held.append(tensors)
        if not every:
            return result.logits[:, 0]
        index = torch.arange(len(batch), device=result.logits.device)
        return result.logits[index, to_device(batch.starts + last[:, 0], index.device)]

    def _reads(self, acting: RuleWrites) -> list[SiteRead]:
        """List step sources, and keys and values of all blocks that run."""
        shape, blocks = self.model.shape, {to: of is not None for to, of in acting.blocks}
        layers = [layer for layer in range(shape.n_layers) if blocks.get(("", layer), True)]
        if shape.attends_to_image:  # other blocks attend to the image
            layers = [layer for layer in layers if shape.has("k", layer)]
        every = [SiteRead(site, layer) for layer in layers for site in ("k", "v")]
        if not all(shape.has(read.site, read.layer) for read in every):
            raise ValueError(f"`{self.model.name}` has blocks without keys and values to cache")
        return [*self._stepped, *every]

    def _before(self, states: RowStates, chosen: RowChoice, step: int) -> list[StoredVectors]:
        """Return [state]: vectors stored for tokens before the newest; step 1 applies edits."""
        if not self._holds or step == 0:
            return []
        held = [dict(self._held[parent]) for parent in states.parents.tolist()]
        sources = [self._sources[row] for row in chosen.rows.tolist()]
        for write in map(chosen.write, self.kept if step == 1 else ()):
            for row in write.rows.unique().tolist():
                own, mine = held[row], write.some(write.rows == row)
                index = mine.positions - sources[row], mine.units
                own[write.where] = apply_edit(own[write.where], mine, index)
        return held


def apply_edit(now: Tensor, write: SiteWrite, index: tuple[Tensor, ...]) -> Tensor:
    """Edit stored keys or values at these indices, each [K]."""
    now = now.clone()
    index = tuple(each.to(now.device) for each in index)
    values = write.values.to(now.device)
    if write.mode == "add":
        return now.index_put_(index, values.to(now), accumulate=True)
    to = None if write.to is None else write.to.to(now.device)
    return now.index_put_(index, apply_write(write.mode, now[index], values, to))


def _rewrite_vectors(
    read: SiteRead, vectors: Sequence[Tensor], sources: Sequence[int]
) -> SiteWrite:
    """Write the vectors read at each row's first tokens after those of its encoder.

    Args:
        read: The site.
        vectors: [row] vectors [token, heads, d_head].
        sources: [row] number of tokens that an encoder reads.
    """
    heads = vectors[0].shape[1]
    counts = torch.tensor([len(vector) for vector in vectors])
    rows = torch.arange(len(vectors)).repeat_interleave(counts * heads)
    places = [
        (source + torch.arange(int(count))).repeat_interleave(heads)
        for source, count in zip(sources, counts, strict=True)
    ]
    units = torch.arange(heads).repeat(int(counts.sum()))
    values = torch.cat(list(vectors)).flatten(0, 1)
    return SiteWrite(read.site, read.layer, rows, torch.cat(places), units, values)


def collect_blocks(steps: Sequence[StepRules], step: int) -> dict[BlockPlace, int | None]:
    """Return the block that replaces each exchanged block in a step, in which no encoder runs."""
    blocks: dict[BlockPlace, int | None] = {}
    for rules in steps:
        if rules.acts(step):
            blocks |= _collect_decoder_blocks(rules.blocks)
    return blocks


def _collect_decoder_blocks(pairs: BlockPairs) -> dict[BlockPlace, int | None]:
    return {place: of for place, of in pairs if not place[0]}


MAX_RECOMPUTED_TOKENS = 64
"""Tokens of a prefill that may be recomputed to save a separate pass."""


@dataclass(eq=False)
class _PrecedingStep:
    """The preceding step of generation with cached keys and values."""

    leaders: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[state] its leading rows, which the following fields describe."""
    chosen: RowChoice | None = None
    starting: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[state] columns of first tokens."""
    images: AttendedImages | None = None
    image_writes: Sequence[SiteWrite] = ()
    acts: tuple[bool, ...] | None = None
    """Which rules acted; their writes are in `acting`."""
    acting: RuleWrites = field(default_factory=RuleWrites)
    open_pass: CachedPass | None = None


class CachedPasses:
    """Passes that compute each token once.

    In the prefill, the tokens before the first one of a row at which a rule acts are computed once
    for each distinct prompt, and so are whole prompts without rules.
    """

    def __init__(
        self,
        model: LoadedModel,
        request: ReplyRequest,
        tokens: int,
        limit: int,
        *,
        way: GenerationMethod,
        shares: bool = True,
    ) -> None:
        """Prepare passes.

        Args:
            model: The model.
            request: The rows; their sources are tokens of an image that blocks attend to.
            tokens: Maximum length of a reply.
            limit: Tokens of one pass.
            way: What rows may share.
            shares: Whether equal beginnings of prompts share linear maps.
        """
        self.model = model
        self.prompts = prompts = request.prompts
        self.prefill = prefill = request.prefill
        kept, steps = request.later.kept, request.later.steps
        self.kept = [write for write in kept if not is_of_image(write)]
        self._of_images = [write for write in (*prefill.writes, *kept) if is_of_image(write)]
        """Changes of the images' keys and values, which each pass applies again."""
        self._sources = np.array(request.sources or [0] * len(prompts))
        self.steps = steps
        self.limit = limit
        self._shares = shares
        self._lengths = np.array([len(prompt) for prompt in prompts])
        """[row] number of prompt tokens."""
        self.columns = int((self._lengths - self._sources).max())
        """Width of all texts, padded on the left."""
        table = IMAGE_TOKENS.get(model.module)
        self._saved = None if table is None else np.array(list(map(table.saved, prompts)))
        """[row] as `NewTokens.saved`."""
        self._texts = number_distinct(prompts)
        """[row] the number of its prompt."""
        distinct = dict(zip(prompts, self._sources.tolist(), strict=True))
        self._distinct = list(distinct)
        self._whole = align_ends(model, self._distinct, list(distinct.values()))
        """Distinct prompts."""
        self._way, self._places = way, way.places
        acting = find_first_step(len(prompts), prefill, kept, steps)
        lowest = self._find_lowest_blocks(request)
        numbers = _count_own_tokens(prompts, prefill, self._sources)
        if mixes_images(model, self._whole):  # a pass contains all tokens that attend to each other
            numbers = np.where(numbers > 0, self._lengths, 0)
        self._together = self._can_run_together(numbers, acting, lowest)
        self.own = numbers = np.full_like(numbers, numbers.max()) if self._together else numbers
        """[row] number of tokens that only its prefill computes."""
        self._common = self._count_common_columns()
        """Columns that rows of a prompt have in common throughout."""
        self.keys = self._make_cache(len(prompts), self.columns - self._common, tokens - 1)
        self._blocks = SharedBlocks(self._texts, acting, lowest, model.shape.n_layers)
        self._few: dict[tuple[bool, ...], Sequence[StepRules]] = {}
        """Merged rules, by which rules act."""
        self._step = _PrecedingStep()

    def _count_common_columns(self) -> int:
        """Count the columns that neither rules of the prefill nor edits of keys change in any row;
        0 if rows of a prompt don't share them."""
        several = 2 * len(self._whole) <= len(self.prompts)
        if not (self._way.shares and several and is_single_query_supported(self.model)):
            return 0
        edited = _count_own_tokens(self.prompts, RuleWrites(self.kept), self._sources)
        return self.columns - int(np.maximum(self.own, edited).max())

    def _find_lowest_blocks(self, request: ReplyRequest) -> Ints:
        """Return [row]: the first half block with a rule; 0 if rows share no blocks."""
        count, later = len(request.prompts), request.later
        if self._places is None:
            return np.zeros(count, dtype=np.int64)
        lowest = find_lowest_block(self.model, count, request.prefill, later.kept, later.steps)
        return lowest if self._places.attention else lowest - lowest % 2

    def _can_run_together(self, numbers: Ints, acting: Ints, lowest: Ints) -> bool:
        """Choose whether the prefill shares blocks as steps do, with the same number of tokens per
        prompt.

        This is chosen if it computes less than separate rows. It is impossible for `step` writes,
        which read the preceding token, possibly from the preceding pass.

        Args:
            numbers: [row] number of tokens from the first one at which a rule acts.
            acting: [row] the first step in which a rule acts.
            lowest: [row] the first half block with a rule.
        """
        places, most, half_blocks = self._places, int(numbers.max()), 2 * self.model.shape.n_layers
        begins = np.where(acting == 0, lowest, half_blocks)
        computed = len(self._whole) * half_blocks + int((half_blocks - begins).sum())
        return (
            places is not None
            and (places.several or most == 1)
            and not mixes_images(self.model, self._whole)
            and not self.prefill.numbers
            and most > 0
            and all(write.mode != "step" for write in self.prefill.writes)
            and most * computed <= half_blocks * int(numbers.sum())
        )

    def arranged(self, states: RowStates, ids: Ints) -> RowStates:
        """Order the states of a step for computation.

        Args:
            ids: [row, step] the replies so far.
        """
        step, rows = ids.shape[1], states.leaders
        if step == 0:
            self._blocks.begin(states)
            if not self._together:
                return states
        newest = ids[rows, -1] if step else np.zeros_like(rows)
        return self._blocks.arrange(states, newest, step)

    def logits(self, states: RowStates, ids: Ints) -> Tensor:
        """Compute [state, vocab] logits after the newest token of each state.

        Args:
            ids: [row, step] the replies so far.
        """
        step, rows = ids.shape[1], states.leaders
        if step == 0:
            return self._prefill_together(states) if self._together else self._prefill(states)
        first = self.columns + step - 1
        self.keys.left = len(states.rows)
        self.keys.move(self._blocks.moves, first)
        newest, now = array_to_device(ids[rows, -1:], self.model.device), self._step
        if now.chosen is None or not np.array_equal(rows, now.leaders):
            now.leaders, now.acts = rows, None
            now.chosen, now.starting = RowChoice(len(self.prompts), rows), self._starts(rows)
            now.images = self._images_of(self._batch(rows))
            now.image_writes = now.chosen.rules(RuleWrites(self._of_images)).writes
            if self.keys.shared is not None:
                self.keys.shared.stand(self._texts[rows])
        acts = tuple(rules.acts(step) for rules in self.steps)
        if now.open_pass is not None and self._goes_on(now.open_pass, acts):
            return now.open_pass.run_on(newest)
        saved = None if self._saved is None else torch.from_numpy(self._saved[rows])
        tokens = NewTokens(newest, now.starting, first, saved=saved, images=now.images)
        acting = self._acting(now.chosen, step, acts)
        every, lineup = slice(0, len(states)), self._blocks.lineup
        if now.open_pass is None or not now.open_pass.takes(tokens, every, acting, lineup):
            self.close()
            if step == 1:
                self._edit(states, now.chosen)
            by = every, acting, lineup, self._places
            now.open_pass = CachedPass(self.model, tokens, self.keys, *by)
        return now.open_pass.run()

    def _goes_on(self, before: CachedPass, acts: tuple[bool, ...]) -> bool:
        """Return whether the same rules act on the same rows as in the preceding pass."""
        return before.repeats and acts == self._step.acts and before.lineup is self._blocks.lineup

    def close(self) -> None:
        """Remove all hooks."""
        if self._step.open_pass is not None:
            self._step.open_pass.close()
            self._step.open_pass = None

    def _prefilled(self, chosen: RowChoice) -> RuleWrites:
        """Return the writes of the prefill."""
        return merge_writes(chosen.rules(self.prefill), len(chosen.rows))

    def _acting(self, chosen: RowChoice, step: int, acts: tuple[bool, ...]) -> RuleWrites:
        """Return the writes of a step, which are often those of the preceding step."""
        lengths = self.columns - self._step.starting.cpu()
        newest = lengths + step - 1
        if acts != self._step.acts or self._step.acting.edges:
            every = chosen.step(self._joined(acts), step, lengths, newest)
            self._step.acts, self._step.acting = acts, merge_writes(every, len(chosen.rows))
        writes = [
            replace(write, positions=newest[write.rows]) for write in self._step.acting.writes
        ]
        return replace(self._step.acting, writes=[*self._step.image_writes, *writes])

    def _joined(self, acts: tuple[bool, ...]) -> Sequence[StepRules]:
        """Join the acting rules into few writes, cached because rows change more often."""
        if acts not in self._few:
            now = [rules for rules, does in zip(self.steps, acts, strict=True) if does]
            always = [replace(rules, first=1, last=None) for rules in now]
            self._few[acts] = join_step_rules(always, len(self.prompts))
        return self._few[acts]

    def _starts(self, rows: Ints) -> Tensor:
        """Return [n]: columns of first tokens."""
        return torch.from_numpy(self.columns - self._lengths[rows])

    # --- the prefill ------------------------------------------------------------------------

    def _prefill(self, states: RowStates) -> Tensor:
        rows = states.leaders
        numbers = self.own[rows]
        prefills: list[Tensor] = []
        shared = self._shared(states, numbers)
        if shared is not None:
            prefills.append(shared)
        for part in _split_rows(numbers, self.limit):
            prefills.append(self._suffix(rows, part, int(numbers[part].max())))
        return torch.cat(prefills)

    def _prefill_together(self, states: RowStates, *, keys_only: bool = False) -> Tensor:
        """Run the prefill in shared blocks, some columns at a time.

        keys_only: whether to return no logits, and to run the last block only for its keys.
        """
        rows, lineup = states.leaders, self._blocks.lineup
        self._shared(states, self.own[rows])
        acting, batch = self._prefilled(RowChoice(len(self.prompts), rows)), self._batch(rows)
        if self.keys.shared is not None:
            self.keys.shared.stand(self._texts[rows])

        def part(first: int, end: int) -> PassArguments:
            tokens = self._tokens(batch, slice(first, end))
            every, mine = slice(0, len(rows)), tokens.acting(acting)
            return self.model, tokens, self.keys, every, mine, lineup, self._places

        first, count = self._prefill_headers(rows, acting), max(1, self.limit // len(rows))
        # Only the last token needs all of the last block, whose rows are these states.
        n_layers = self.model.shape.n_layers
        alone = (
            lineup.rows(n_layers - 1) * (self.columns - 1 - first)
            > MAX_RECOMPUTED_TOKENS * n_layers
        )
        last = self.columns - 1 if alone else max(first, self.columns - count)
        last = self.columns if keys_only else last
        while first < last:
            end = min(first + count, last)
            store_keys(*part(first, end))
            first = end
        return torch.zeros(0) if keys_only else run_cached_pass(*part(first, self.columns))

    def _prefill_headers(self, rows: Ints, acting: RuleWrites) -> int:
        """Compute columns in which rows of several prompts have equal tokens and rules.

        Such columns, for example those of a template before its first blank, are computed once.

        Args:
            rows: [state] its leading row.
            acting: Writes of the prefill.

        Returns:
            The first column that isn't computed yet.
        """
        first = self.columns - int(self.own.max())
        host = Batch.of(list(dict.fromkeys(self.prompts)), self.model.pad_id, "left")
        end, texts = find_shared_end(host.ids.numpy(), host.starts.numpy(), first)
        if end == first or acting.edges or self._saved is not None or self._sources.any():
            return first
        writes = self._tokens(self._batch(rows), slice(end)).acting(acting)
        key = np.stack([texts[self._texts[rows]], number_rules(writes.writes, len(rows))])
        _, lead, of = np.unique(key, axis=1, return_index=True, return_inverse=True)
        if (len(rows) - len(lead)) * (end - first) <= MAX_RECOMPUTED_TOKENS:
            return first
        counts = end - self.columns + self._lengths[rows[lead]]
        prompts = [self.prompts[row][:n] for row, n in zip(rows[lead], counts, strict=True)]
        rules = RowChoice(len(rows), lead).rules(writes)
        make = partial(CachedPasses, way=self._way, shares=self._shares)
        passes = make(self.model, ReplyRequest(prompts, rules), 1, self.limit)
        sharing = RowSharing(prompts, find_first_step(len(lead), rules, (), ()), None)
        none = np.zeros((len(lead), 0), dtype=np.int64)
        states = passes.arranged(sharing.first(passes.own), none)
        if passes._together:
            passes._prefill_together(states, keys_only=True)
        else:
            passes._prefill(states)
        state = np.empty(len(lead), dtype=np.int64)
        state[states.rows] = states.of
        mine, its = self._blocks.lineup, passes._blocks.lineup
        blocks = range(self.model.shape.n_layers)
        index = [its.place(state[of.ravel()[: mine.attending(block)]], block) for block in blocks]
        self.keys.fill(passes.keys, index, first, end)
        return end

    def _shared(self, states: RowStates, own: Ints) -> Tensor | None:
        """Compute the common tokens once for each distinct prompt.

        Args:
            own: [state] number of tokens at the end that aren't common.

        Returns:
            [state, vocab] logits of the first states, on which no rule acts; None if there are
            none.
        """
        whole = int((own == 0).sum())
        columns = self.columns if whole else self.columns - int(own.min())
        if columns == 0:
            return None
        rows = states.leaders
        of: list[int] = self._texts[rows].tolist()
        batch = self._whole
        keys = self._make_cache(len(batch), columns)
        acting, index = RuleWrites(blocks=self.prefill.blocks), torch.tensor(of)
        each, outputs = max(1, self.limit // columns), list[Tensor]()
        for first in range(0, len(batch), each):
            part = slice(first, min(first + each, len(batch)))
            tokens = self._tokens(batch.part(part), slice(columns))
            with self._sharing(self._distinct[part], columns):
                if whole:
                    outputs.append(run_cached_pass(self.model, tokens, keys, part, acting))
                else:
                    store_keys(self.model, tokens, keys, part, acting)
        if self._common:
            self.keys.share(keys, self._common, of)
        every = [np.array(of)] * self.model.shape.n_layers
        self.keys.fill(keys, every, self._common, columns)
        return torch.cat(outputs)[to_device(index[:whole], self.model.device)] if whole else None

    def _sharing(
        self, prompts: Sequence[tuple[int, ...]], columns: int
    ) -> AbstractContextManager[None]:
        """Share the linear maps of equal beginnings in a pass of the first columns of prompts,
        without rules."""
        starts = [self.columns - len(prompt) for prompt in prompts]
        begun = [p[: max(0, columns - start)] for p, start in zip(prompts, starts, strict=True)]
        shares = self._shares
        copies = find_copies(self.model, begun, torch.tensor(starts), columns) if shares else None
        return nullcontext() if copies is None else copies.shared(self.model)

    def _suffix(self, rows: Ints, part: slice, count: int) -> Tensor:
        """Compute [n, vocab] logits of some rows: their last tokens, on cached preceding ones."""
        rows = rows[part]
        acting = self._prefilled(RowChoice(len(self.prompts), rows))
        first = self.columns - count
        batch = apply_position_ids(self.model, self._batch(rows), acting)
        tokens = self._tokens(batch, slice(first, self.columns))
        return run_cached_pass(self.model, tokens, self.keys, part, acting)

    def _tokens(self, batch: Batch, columns: slice) -> NewTokens:
        """Return some columns of whole prompts as the tokens of a pass."""
        numbers = find_given_positions(self.model, batch)
        numbers = None if numbers is None else numbers[..., columns]
        given = batch.ids[:, columns], batch.starts, columns.start or 0, numbers
        return NewTokens(*given, images=self._images_of(batch))

    def _images_of(self, batch: Batch) -> AttendedImages | None:
        """Return the images that blocks attend to; None if there are none."""
        return AttendedImages(self.model, batch) if batch.frames else None

    def _make_cache(self, rows: int, columns: int, later: int = 0) -> KeyValueCache:
        """Create an empty cache; later: number of further columns that may be needed."""
        images = list_image_layers(self.model)
        return KeyValueCache(self.model.shape.n_layers, rows, columns, later, images)

    def _batch(self, rows: Ints) -> Batch:
        """Create a batch of whole prompts, as wide as the longest of all."""
        return self._whole.take(torch.from_numpy(self._texts[rows]))

    # --- edits of cached keys and values ----------------------------------------------------

    def _edit(self, states: RowStates, chosen: RowChoice) -> None:
        """Edit keys and values between the prefill and the first step.

        They are read at the output of their projections and edited there. A further pass with the
        edited values gives their cached form, for example after rotary embedding. Layers don't see
        each other's edits: each edit applies to the layer's original values.
        """
        edits = [site_write for each in self.kept if len((site_write := chosen.write(each)).rows)]
        if not edits:
            return
        touched = torch.cat([edit.rows for edit in edits]).unique()
        some = states.leaders[touched.numpy()]
        here = torch.full((len(states),), -1, dtype=torch.long)
        here[touched] = torch.arange(len(touched))
        edits = [edit.moved(here) for edit in edits]
        acting = RowChoice(len(self.prompts), some).rules(self.prefill)
        batch = apply_position_ids(self.model, self._batch(some), acting)
        places = list(dict.fromkeys(edit.where for edit in edits))
        with replace_blocks(self.model, acting.blocks):
            reads = run_full(
                self.model,
                batch,
                writes=acting.writes,
                edges=acting.edges,
                reads=places,
                logits_at=(batch.lengths - 1)[:, None],
            ).reads
        standing = [_stored_edits(place, reads[place], batch, edits) for place in places]
        scratch = self._make_cache(len(some), self.columns)
        tokens = self._tokens(batch, slice(self.columns))
        again = replace(acting, writes=[*acting.writes, *standing])
        store_keys(self.model, tokens, scratch, slice(0, len(some)), again)
        for write in standing:
            columns = batch.columns(write.rows, write.positions)
            which = "keys" if write.site == "k" else "values"
            assert write.layer is not None
            self.keys.put(scratch, which, write.layer, touched[write.rows], write.rows, columns)


def _stored_edits(
    place: SiteRead, vectors: Tensor, batch: Batch, edits: Sequence[SiteWrite]
) -> SiteWrite:
    """Write all heads of each edited token at a site, with their edited values.

    Args:
        vectors: [B, T, heads, d_head] the values that were read.
        edits: Edits of all sites.
    """
    spots: list[Tensor] = []
    for edit in edits:
        if edit.where == place:
            index = edit.rows, batch.columns(edit.rows, edit.positions), edit.units
            vectors = apply_edit(vectors, edit, index)
            spots.append(torch.stack([edit.rows, edit.positions], dim=1))
    rows, positions = torch.cat(spots).unique(dim=0).t()
    heads = vectors.shape[2]
    values = vectors[rows.to(vectors.device), batch.columns(rows, positions)].flatten(0, 1)
    return SiteWrite(
        place.site,
        place.layer,
        rows.repeat_interleave(heads),
        positions.repeat_interleave(heads),
        torch.arange(heads).repeat(len(rows)),
        values,
    )


def _split_rows(numbers: Ints, limit: int) -> Iterable[slice]:
    """Split the states into prefill passes, without states whose tokens are all common.

    Args:
        numbers: [state] number of tokens that aren't common, ascending.
        limit: Tokens of one pass.
    """
    first = int((numbers == 0).sum())
    while first < len(numbers):
        end = first + 1
        while end < len(numbers):
            more = int((numbers[end] - numbers[first:end]).sum())
            wasteful = more > max(MAX_RECOMPUTED_TOKENS, int(numbers[first:end].sum()) // 4)
            if wasteful or int(numbers[end]) * (end + 1 - first) > limit:
                break
            end += 1
        yield slice(first, end)
        first = end


def _count_own_tokens(
    prompts: Sequence[tuple[int, ...]], prefill: RuleWrites, sources: Ints
) -> Ints:
    """Return [row]: number of tokens from the first one at which a rule acts in the prefill.

    All tokens of a text attend to its image.

    Args:
        prompts: [row] token ids.
        prefill: Writes of the prefill.
        sources: [row] number of tokens of an image, which precede the text.
    """
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    first = lengths.copy()
    places = [
        *((write.rows, write.positions - int(write.mode == "step")) for write in prefill.writes),
        *((edge.rows, edge.queries) for edge in prefill.edges),
        *((number.rows, number.positions) for number in prefill.numbers),
    ]
    for rows, positions in places:
        np.minimum.at(first, rows.cpu().numpy(), positions.cpu().numpy().clip(min=0))
    return lengths - np.maximum(first, sources)


DEFAULT_PASS_TOKENS = 4096
"""Default number of tokens in one pass."""


def generate_replies(
    model: LoadedModel,
    request: ReplyRequest,
    decoding: Decoding,
    *,
    cached: bool = True,
    shares: bool = True,
    limit: int = DEFAULT_PASS_TOKENS,
    memory: int | None = None,
) -> list[Reply]:
    """Generate text after each prompt with a causal decoder.

    The prefill is the pass over the whole prompt (step 0); step s is the pass whose newest token is
    token s of the reply.

    Args:
        model: A causal decoder of text, or an encoder-decoder.
        request: The prompts and rules.
        decoding: How tokens are chosen.
        cached: Whether to use a key-value cache, if `choose_method` finds that results agree.
        shares: Whether equal beginnings of prompts share linear maps in a prefill with a cache.
        limit: Tokens of one pass.
        memory: Bytes for keys, values and logits; by default, `get_reply_bytes`. Batches are halved
            if memory runs out.

    Raises:
        ValueError: The request is impossible.
        WriteMismatch: A write couldn't be applied.
    """
    prompts = request.prompts
    if not request.looks_back:  # one merged write couldn't apply rules one after the other
        request = request.merged()
    if not all(prompts):
        raise ValueError("every prompt needs a token")
    if decoding.sampled and len(request.random) != len(prompts):
        raise ValueError("sampled tokens need a key of random numbers for each row")
    request.check_blocks(decoding.tokens, model.shape)
    cached = cached and not request.looks_back
    way = choose_method(model, inside=request.inside) if cached else None
    passes = FullPasses
    if way is not None and way.kind == "cached":
        passes = partial(CachedPasses, way=way, shares=shares)
    work = _GenerationJob(model, request, decoding, passes, limit)
    replies: list[Reply | None] = [None] * len(prompts)
    room = get_reply_bytes(model.device) if memory is None else memory
    for rows in _split_batches(model, prompts, decoding.tokens, limit, room):
        for row, reply in work.replies(rows):
            replies[row] = reply
    return [reply for reply in replies if reply is not None]


def _split_batches(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    limit: int,
    memory: int,
) -> Iterator[list[int]]:
    """Split rows into batches by prompt length, with equal prompts adjacent."""
    shape = model.shape
    each = model.dtype.itemsize * 2 * sum(block.keys for block in shape.blocks)
    logits = 3 * 4 * shape.outputs
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row])):
        most = memory // (each * (len(prompts[row]) + tokens) + logits)
        if batch and len(batch) + 1 > min(limit, most):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _Passes(Protocol):
    @property
    def own(self) -> Ints: ...
    def arranged(self, states: RowStates, ids: Ints) -> RowStates: ...
    def logits(self, states: RowStates, ids: Ints) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class _GenerationJob:
    """Rows to generate text for, batch by batch."""

    model: LoadedModel
    request: ReplyRequest
    decoding: Decoding
    passes: Callable[..., _Passes]
    limit: int

    def replies(self, rows: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Yield rows with their replies; a batch that exceeds memory is halved."""

        def together() -> list[Reply]:
            with fuse_activations(self.model.module):
                return self._together(rows)

        replies = try_pass(together, can_shrink=len(rows) > 1)
        if replies is not None:
            yield from zip(rows, replies, strict=True)
            return
        half = len(rows) // 2
        yield from self.replies(rows[:half])
        yield from self.replies(rows[half:])

    @torch.inference_mode()
    def _together(self, rows: Sequence[int]) -> list[Reply]:
        """Generate the replies of one batch."""
        part = self.request.some(rows)
        acting = find_first_step(len(rows), part.prefill, part.later.kept, part.later.steps)
        sharing = RowSharing(part.prompts, acting, part.groups)
        passes = self.passes(self.model, part, self.decoding.tokens, self.limit)
        writing = ReplyBuffer(len(rows), self.decoding)
        random = part.random or [()] * len(rows)
        states, step = sharing.first(passes.own), 0
        with closing(passes):
            while len(states):
                states = passes.arranged(states, writing.ids[:, :step])
                logits = passes.logits(states, writing.ids[:, :step])
                keys = [random[row] for row in states.rows.tolist()]
                tokens = choose_next_tokens(logits, states.of, self.decoding, keys, step)
                newest = writing.put(states.rows, tokens)
                step += 1
                states = sharing.follow(states, newest, step)
        return writing.replies()
