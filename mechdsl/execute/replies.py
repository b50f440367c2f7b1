"""Generated text of a panel's rows, looked up in the store or generated.

Each reply is stored under its own key, token by token, as soon as its pass is done, so that an
interrupted run resumes there. Metrics of replies are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mechdsl.base.arrays import Ints
from mechdsl.base.hashing import digest, digest_number
from mechdsl.execute.image_vectors import encode_changed_images, provide_images
from mechdsl.execute.unpatched_batch import build_noise_writes
from mechdsl.forward.generation.decoding import Decoding
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules
from mechdsl.forward.hooks.batch import RuleWrites
from mechdsl.forward.hooks.model import LoadedModel, build_batch, replace_blocks, split_vision
from mechdsl.planner.rows import RowTable
from mechdsl.planner.value_keys import ExperimentKeys, RunContents
from mechdsl.program.spec import Generation
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun
from mechdsl.store.runs import OpenRun, ValueBlock
from mechdsl.vocab.metrics import Reply

_END_REASONS = ("end", "stop", "length")


class ReplyCache:
    """Stored replies of one panel."""

    def __init__(
        self,
        run: OpenRun,
        contents: RunContents,
        table: PromptTable,
        settings: tuple[object, ...],
        ends: frozenset[int],
    ) -> None:
        """Open the cache; settings: of `generate`; ends: tokens that end a reply."""
        self._run = run
        self._contents = contents
        self._table = table
        self._shared = digest("reply", settings, ends)
        self.keys: dict[str, ExperimentKeys] = {}
        """By key of an experiment; without experiments whose content has no digest."""

    def of_run(self, run: PromptRun, prompts: Ints) -> list[bytes]:
        """Return, per prompt, the digest that a run's reply depends on, apart from random draws."""
        model = self._contents.models[run.model or self._contents.model]
        rows = self._contents.of(run, self._table)[prompts].tolist()
        return [digest("run", self._shared, model, row) for row in rows]

    def of_rows(self, experiment: str, rows: RowTable) -> list[bytes] | None:
        """Return the digest per row of an experiment; None if there is none."""
        keys = self.keys.get(experiment)
        return None if keys is None else keys.of_rows(rows, self._shared)

    def find(self, keys: Sequence[bytes], model: LoadedModel) -> dict[int, Reply]:
        """Look up replies, by number of the key."""
        found = {**self._run.earlier(keys), **self._run.own(keys)}
        return {
            number: _decode_reply(found[key][1][:, 0].astype(np.int64).tolist(), model)
            for number, key in enumerate(keys)
            if key in found
        }

    def keep(self, keys: Sequence[bytes], replies: Sequence[Reply]) -> None:
        """Store replies on disk."""
        every = zip(keys, replies, strict=True)
        known = {key: reply for key, reply in every if reply.ended != "broken"}
        if not known:
            return
        parts = [
            [_END_REASONS.index(reply.ended), len(reply.text), *reply.ids]
            for reply in known.values()
        ]
        starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        rows = np.concatenate([np.arange(len(part), dtype=np.uint64) for part in parts])
        values = np.concatenate([np.array(part, dtype=np.float64) for part in parts])
        self._run.keep(ValueBlock(list(known), starts, rows, values[:, None]))


def _decode_reply(numbers: Sequence[int], model: LoadedModel) -> Reply:
    ended, length, *ids = numbers
    assert model.tokenizer is not None
    return Reply(tuple(ids), model.tokenizer.decode(ids)[:length], _END_REASONS[ended])


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Rows that generate text, with the rules that act in them."""

    run: PromptRun
    prompts: Ints
    """[row]"""
    draw: Ints
    """[row] noise draw."""
    keys: Sequence[int]
    """[row] digest of the row apart from its prompt, which sampling depends on."""
    prefill: RuleWrites
    later: GenerationRules
    contents: Sequence[bytes] | None = None
    """[row] digest that its reply depends on, apart from random draws; None if it isn't cached."""


class ReplyGenerator:
    """Generator of replies with an experiment's settings."""

    def __init__(
        self,
        model_of: Callable[[PromptRun], LoadedModel],
        table: PromptTable,
        seed: int,
        generation: Generation,
        *,
        cached: bool,
        shares: bool,
    ) -> None:
        self.model_of = model_of
        self.table = table
        self.seed = seed
        self.generation = generation
        self.cached = cached
        self.shares = shares
        self.kept: ReplyCache | None = None
        self._of_runs: dict[tuple[object, ...], list[tuple[Reply, ...]]] = {}

    def forget(self) -> None:
        """Free the replies of runs."""
        self._of_runs.clear()

    def of_run(self, run: PromptRun, prompts: Ints) -> list[tuple[Reply, ...]]:
        """Return the replies of an unpatched run, one for each sample.

        The list is ordered by prompt, then by noise draw.
        """
        key = (id(run), prompts.tobytes())
        if key not in self._of_runs:
            rows = np.repeat(prompts, run.draws)
            self._of_runs[key] = self.of_rows(
                GenerationRequest(
                    run=run,
                    prompts=rows,
                    draw=np.tile(np.arange(run.draws), len(prompts)),
                    keys=[_random_key(run, prompt) for prompt in rows.tolist()],
                    prefill=RuleWrites(),
                    later=GenerationRules(),
                    contents=self.kept and self.kept.of_run(run, rows),
                )
            )
        return self._of_runs[key]

    def of_rows(self, rows: GenerationRequest) -> list[tuple[Reply, ...]]:
        """Return, per row, one reply for each sample."""
        model, samples = self.model_of(rows.run), self.generation.samples
        provide_images(model, (rows.run.rows[prompt] for prompt in rows.prompts.tolist()))
        count, table = len(rows.prompts), self.table
        noise = build_noise_writes(model, rows.run.noise, rows.prompts, table.row_keys, self.seed)
        prefill = self._embedded(model, rows, RuleWrites(noise).then(rows.prefill))
        later = rows.later
        if samples > 1:
            parts = [torch.arange(count) * samples + n for n in range(samples)]
            first, others = parts[0], parts[1:]
            whole, after = prefill.moved(first), later.moved(first)
            for part in others:
                whole, after = whole.then(prefill.moved(part)), after.then(later.moved(part))
            prefill, later = whole, after
        lanes = [
            (prompt, draw, key, sample)
            for prompt, draw, key in zip(
                rows.prompts.tolist(), rows.draw.tolist(), rows.keys, strict=True
            )
            for sample in range(samples)
        ]
        asked = ReplyRequest(
            prompts=[rows.run.rows[prompt].ids for prompt, *_ in lanes],
            sources=[own for prompt, *_ in lanes if (own := rows.run.rows[prompt].source)],
            random=[(self.seed, table.row_keys[prompt], *drawn) for prompt, *drawn in lanes],
            groups=np.repeat(np.arange(count), samples),
            prefill=prefill,
            later=later,
        )
        replies = self._known(model, rows, asked)
        return [tuple(replies[n : n + samples]) for n in range(0, len(replies), samples)]

    @staticmethod
    def _embedded(model: LoadedModel, rows: GenerationRequest, prefill: RuleWrites) -> RuleWrites:
        """Return the changes of prompts, with those in the vision encoder as writes at `embed`."""
        if model.shape.encodes_apart or not _acts_in_vision(prefill):
            return prefill
        ids = [rows.run.rows[prompt].ids for prompt in rows.prompts.tolist()]
        batch = build_batch(model, ids, [0] * len(ids), model.calling.side)
        with replace_blocks(model, prefill.blocks):
            text = split_vision(model, batch, prefill.writes, (), prefill.edges)
        return replace(prefill.outside("vision"), writes=text.writes, edges=text.edges)

    def _known(
        self, model: LoadedModel, rows: GenerationRequest, asked: ReplyRequest
    ) -> list[Reply]:
        """Return replies from the store, and generate missing ones."""
        if self.kept is None or rows.contents is None:
            return self._write(model, asked)
        samples = self.generation.samples
        drawn = asked.random if self.generation.sampled else [own[2::2] for own in asked.random]
        keys = [digest(rows.contents[n // samples], *own) for n, own in enumerate(drawn)]
        found = self.kept.find(keys, model)
        missing = [n for n in range(len(keys)) if n not in found]
        if missing:
            replies = self._write(model, asked.some(missing))
            self.kept.keep([keys[n] for n in missing], replies)
            found |= dict(zip(missing, replies, strict=True))
        return [found[n] for n in range(len(keys))]

    def _write(self, model: LoadedModel, asked: ReplyRequest) -> list[Reply]:
        """Generate replies. If rules act in an encoder of images that blocks attend to, it encodes
        those of each changed row once, before all passes."""
        if not (model.shape.attends_to_image and _acts_in_vision(asked.prefill)):
            return self._generate(model, asked)
        assert asked.groups is not None
        size = max(asked.sources) * model.shape.d_model * model.dtype.itemsize
        most, found = max(1, _MAX_CHANGED_BYTES // size), list[Reply]()
        groups, lane = np.unique(asked.groups, return_inverse=True)
        for first in range(0, len(groups), most):
            lanes = np.flatnonzero((lane >= first) & (lane < first + most))
            part = asked.some(lanes.tolist())
            assert part.groups is not None
            _, leading, row = np.unique(part.groups, return_index=True, return_inverse=True)
            rows = part.some(leading.tolist())
            given = rows.prompts, rows.sources, rows.prefill
            with encode_changed_images(model, *given) as prompts:
                own = [prompts[n] for n in row.tolist()]
                outside = part.prefill.outside("vision")
                found += self._generate(model, replace(part, prompts=own, prefill=outside))
        return found

    def _generate(self, model: LoadedModel, asked: ReplyRequest) -> list[Reply]:
        return generate_replies(
            model,
            asked,
            _build_decoding(model, self.generation),
            cached=self.cached,
            shares=self.shares,
        )


_MAX_CHANGED_BYTES = 1 << 30
"""Bytes of the vectors of changed images that are known at the same time."""


def _acts_in_vision(rules: RuleWrites) -> bool:
    inside = rules.inside("vision")
    return bool(inside.writes or inside.edges or inside.blocks)


def _build_decoding(model: LoadedModel, generation: Generation) -> Decoding:
    assert model.tokenizer is not None
    suppressed, first = (find_suppressed(model, name) for name in SUPPRESSING)
    return Decoding(
        tokens=generation.tokens,
        decode=model.tokenizer.decode,
        ends=find_end_tokens(model),
        stops=generation.stops,
        suppressed=suppressed,
        suppressed_first=first,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
    )


def find_end_tokens(model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end generation, from the configs and the tokenizer (end of text)."""
    found: list[Any] = []
    for name in ("generation_config", "config"):
        named = getattr(getattr(model.module, name, None), "eos_token_id", None)
        found += named if isinstance(named, list | tuple) else [named]
    if model.tokenizer is not None:
        found.append(model.tokenizer.role_ids.get("eos"))
    return frozenset(token for token in found if isinstance(token, int))


SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens")
"""Settings of a generation config with tokens that replies don't contain, or don't begin with."""


def find_suppressed(model: LoadedModel, setting: str) -> frozenset[int]:
    """Return the tokens of a setting in `SUPPRESSING` of a speech model; none of other models."""
    given = getattr(getattr(model.module, "generation_config", None), setting, None) or ()
    follows = model.shape.takes == "sound to text"
    return frozenset(each for each in given if follows and 0 <= each < model.shape.vocab_size)


def _random_key(run: PromptRun, prompt: int) -> int:
    """Return the key for random draws of an unpatched run's reply, apart from the row's key.

    It depends on tokens and noise, but not on the run's name.
    """
    noise = run.noise
    said = None if noise is None else (noise.kind, noise.site, noise.std, noise.sds)
    return digest_number("run", run.rows[prompt].ids, said)
