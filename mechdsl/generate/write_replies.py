"""Replies to many prompts at once, while rules act on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.generate.acting import Chosen
from mechdsl.generate.next_tokens import Writing, next_tokens
from mechdsl.generate.records import Decoding, StepRules
from mechdsl.generate.states import Sharing, States, first_acting
from mechdsl.generate.whole import WholePasses
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites


class _Passes(Protocol):
    def logits(self, states: States, step: int, ids: Sequence[Sequence[int]]) -> Tensor: ...


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
    limit: int = 1 << 15,
) -> list[Reply]:
    """What the model, a causal decoder of text, writes behind each of the prompts.

    The prefill is the pass over the whole prompt (step 0); step s is the pass whose newest token is
    token s of the reply.

    prompts: [row] token ids. prefill: what acts in the prefill, at positions of the prompt. kept:
    edits of the keys and values (`k`, `v`) of the prompt between the prefill and step 1, each made
    on what the layer had. steps: what acts at the newest token of later passes; its rows, as all
    others, count prompts. random: [row] what the random numbers of sampled tokens hang on, beside
    the step. groups: [row] equal where all that acts is equal, so that equal rows are computed once
    until their tokens differ; by default only rows on which nothing has acted yet are. cached: with
    kept keys and values, where the model allows it. limit: tokens in one pass.

    Raises ValueError for what can't be done, NoNumbers for logits that are none, WriteMismatch for
    writes that couldn't happen.
    """
    every = prefill or RuleWrites()
    if decoding.sampled and (random is None or len(random) != len(prompts)):
        raise ValueError("sampled tokens need a key of random numbers for each row")
    found: list[Reply] = []
    for rows in _batches(prompts, decoding.tokens, limit):
        chosen = Chosen(len(prompts), rows)
        found.extend(
            _write(
                model,
                [prompts[row] for row in rows],
                decoding,
                chosen.rules(every),
                [own for write in kept if len((own := chosen.write(write)).rows)],
                [chosen.step_rules(rules) for rules in steps],
                [() if random is None else random[row] for row in rows],
                None if groups is None else groups[np.array(rows)],
            )
        )
    return found


def _batches(
    prompts: Sequence[tuple[int, ...]], tokens: int, limit: int
) -> Sequence[Sequence[int]]:
    """Rows that are written together, in their order."""
    found: list[list[int]] = []
    longest = 0
    for row, prompt in enumerate(prompts):
        longest = max(longest, len(prompt) + tokens)
        if not found or (len(found[-1]) + 1) * longest > limit:
            found.append([])
            longest = len(prompt) + tokens
        found[-1].append(row)
    return found


@torch.inference_mode()
def _write(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    decoding: Decoding,
    prefill: RuleWrites,
    kept: Sequence[SiteWrite],
    steps: Sequence[StepRules],
    random: Sequence[tuple[int, ...]],
    groups: Ints | None,
) -> list[Reply]:
    """The replies of one batch."""
    sharing = Sharing(prompts, first_acting(len(prompts), prefill, kept, steps), groups)
    passes: _Passes = WholePasses(model, prompts, prefill, kept, steps, decoding.tokens)
    writing = Writing(len(prompts), decoding)
    states = sharing.first()
    step = 0
    while len(states):
        logits = passes.logits(states, step, writing.ids)
        of_row = states.of_row
        rows, keys = list(of_row), [random[row] for row in of_row]
        tokens = next_tokens(logits, list(of_row.values()), decoding, keys, step)
        going = {
            row: token for row, token in zip(rows, tokens, strict=True) if writing.put(row, token)
        }
        step += 1
        states = sharing.follow(states, going, step)
    return writing.replies()
