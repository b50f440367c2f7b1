"""Replies to many prompts at once, while rules act on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.generate.acting import Chosen, joined, merged
from mechdsl.generate.cached import CachedPasses
from mechdsl.generate.next_tokens import Writing, next_tokens
from mechdsl.generate.records import Decoding, StepRules
from mechdsl.generate.states import Sharing, States, first_acting
from mechdsl.generate.way import way_of
from mechdsl.generate.whole import WholePasses, blocks_of
from mechdsl.hooks.hook_points import fused
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.memory import out_of_memory, release
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.vocab.sites import WITHIN_ATTENTION

TOKENS = 4096
"""Of one pass, where nothing else is said."""
MEMORY = 2 << 30
"""Bytes that are kept at once, where nothing else is said: of keys, values and logits."""


def write_replies(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    *,
    prefill: RuleWrites | None = None,
    kept: Sequence[SiteWrite] = (),
    steps: Sequence[StepRules] = (),
    random: Sequence[tuple[int, ...]] | None = None,
    groups: Ints | None = None,
    cached: bool = True,
    limit: int = TOKENS,
    memory: int = MEMORY,
) -> list[Reply]:
    """What the model, a causal decoder of text, writes behind each of the prompts.

    The prefill is the pass over the whole prompt (step 0); step s is the pass whose newest token is
    token s of the reply.

    prompts: [row] token ids. prefill: what acts in the prefill, at positions of the prompt. kept:
    edits of the keys and values (`k`, `v`) of the prompt between the prefill and step 1, each made
    on what the layer had. steps: what acts at the newest token of later passes; its rows, as all
    others, count prompts. random: [row] what the random numbers of sampled tokens hang on, beside
    the step. groups: [row] equal where all that acts is equal, so that equal rows are computed once
    until their tokens differ; by default only rows on which nothing has acted yet are. cached: on
    kept keys and values, where `way_of` says that the model does the same then. limit: tokens of
    one pass. memory: bytes for keys, values and logits; less is taken where that isn't there.

    Raises ValueError for what can't be done, WriteMismatch for writes that couldn't happen.
    """
    given = _Given(prefill or RuleWrites(), kept, steps)
    if not given.looks_back:  # in one write, rules couldn't act one after the other
        given = given.merged(len(prompts))
    if not all(prompts):
        raise ValueError("every prompt needs a token")
    if decoding.sampled and (random is None or len(random) != len(prompts)):
        raise ValueError("sampled tokens need a key of random numbers for each row")
    given.check_blocks(decoding.tokens)
    way = way_of(model, inside=given.inside) if cached and not given.looks_back else None
    work = _Work(
        model,
        prompts,
        decoding,
        given,
        [()] * len(prompts) if random is None else random,
        groups,
        partial(CachedPasses, way=way) if way and way.kind == "cached" else WholePasses,
        limit,
    )
    found: list[Reply | None] = [None] * len(prompts)
    for rows in _batches(model, prompts, decoding.tokens, limit, memory):
        for row, reply in work.replies(rows):
            found[row] = reply
    return [reply for reply in found if reply is not None]


def _batches(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    limit: int,
    memory: int,
) -> Iterator[list[int]]:
    """Rows that are written together: prompts of like lengths, equal ones side by side."""
    shape = model.shape
    each = model.dtype.itemsize * 2 * shape.n_layers * shape.n_kv_heads * shape.d_head
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
    def arranged(self, states: States, ids: Ints) -> States: ...
    def logits(self, states: States, ids: Ints) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class _Given:
    """What acts, as it was given."""

    prefill: RuleWrites
    kept: Sequence[SiteWrite]
    steps: Sequence[StepRules]

    @property
    def inside(self) -> bool:
        """Whether anything acts within attention."""
        writes = [*self.prefill.writes, *(each for rules in self.steps for each in rules.writes)]
        edges = [*self.prefill.edges, *(each for rules in self.steps for each in rules.edges)]
        return bool(edges) or any(write.site in WITHIN_ATTENTION for write in writes)

    @property
    def looks_back(self) -> bool:
        """Whether what is written at a newest token hangs on what stands at the one before."""
        return any(write.mode == "step" for rules in self.steps for write in rules.writes)

    def check_blocks(self, tokens: int) -> None:
        """A block that has been left out has no keys and values of the tokens so far."""
        out: set[int] = set()
        for step in range(tokens):
            blocks = blocks_of(self.steps, step) if step else dict(self.prefill.blocks)
            now = {block for block, of in blocks.items() if of is None}
            if out - now:
                raise ValueError(f"block {min(out - now)} is left out, and attends in step {step}")
            out |= now

    def merged(self, count: int) -> _Given:
        """The same in few writes; count: rows."""
        return _Given(
            merged(self.prefill, count),
            merged(RuleWrites(self.kept), count).writes,
            joined(self.steps, count),
        )

    def of(self, chosen: Chosen) -> _Given:
        """The part of some rows."""
        return replace(
            self,
            prefill=chosen.rules(self.prefill),
            kept=[own for write in self.kept if len((own := chosen.write(write)).rows)],
            steps=[chosen.step_rules(rules) for rules in self.steps],
        )


@dataclass(frozen=True, eq=False)
class _Work:
    """All rows, which are written batch by batch."""

    model: LoadedModel
    prompts: Sequence[tuple[int, ...]]
    decoding: Decoding
    given: _Given
    random: Sequence[tuple[int, ...]]
    groups: Ints | None
    passes: Callable[..., _Passes]
    limit: int

    def replies(self, rows: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Rows with their replies; in two halves where memory runs out."""
        try:
            with fused(self.model.module):
                found = self._together(rows)
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not out_of_memory(error):
                raise
            found = None
        if found is not None:
            yield from zip(rows, found, strict=True)
            return
        release()
        half = len(rows) // 2
        yield from self.replies(rows[:half])
        yield from self.replies(rows[half:])

    @torch.inference_mode()
    def _together(self, rows: Sequence[int]) -> list[Reply]:
        """The replies of one batch."""
        prompts = [self.prompts[row] for row in rows]
        given = self.given.of(Chosen(len(self.prompts), rows))
        acting = first_acting(len(rows), given.prefill, given.kept, given.steps)
        groups = None if self.groups is None else self.groups[np.array(rows)]
        sharing = Sharing(prompts, acting, groups)
        passes = self.passes(
            self.model,
            prompts,
            given.prefill,
            given.kept,
            given.steps,
            self.decoding.tokens,
            self.limit,
        )
        writing = Writing(len(rows), self.decoding)
        random = [self.random[row] for row in rows]
        states, step = sharing.first(passes.own), 0
        with closing(passes):
            while len(states):
                states = passes.arranged(states, writing.ids[:, :step])
                logits = passes.logits(states, writing.ids[:, :step])
                keys = [random[row] for row in states.rows.tolist()]
                tokens = next_tokens(logits, states.of, self.decoding, keys, step)
                newest = writing.put(states.rows, tokens)
                step += 1
                states = sharing.follow(states, newest, step)
        return writing.replies()
