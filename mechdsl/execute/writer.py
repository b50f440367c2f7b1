"""Lets the rows of a panel write: `generate n`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import digest, number_of
from mechdsl.base.reply import Reply
from mechdsl.execute.kept_replies import KeptReplies
from mechdsl.execute.unpatched_batch import noise_writes
from mechdsl.execute.while_writing import WhileWriting
from mechdsl.generate.acting import Chosen
from mechdsl.generate.records import Decoding
from mechdsl.generate.write_replies import write_replies
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.program.spec_replies import Generation
from mechdsl.prompts.prompt_table import PromptTable, Run


@dataclass(frozen=True, eq=False)
class WritingRows:
    """Rows that write, with what acts in them."""

    run: Run
    prompts: Ints
    """[row]"""
    draw: Ints
    """[row] of noise."""
    keys: Sequence[int]
    """[row] what a row is beside its prompt: sampling hangs on it."""
    prefill: RuleWrites
    later: WhileWriting
    contents: Sequence[bytes] | None = None
    """[row] what its reply hangs on, beside what is drawn; None where it isn't kept."""


class Writer:
    """Lets rows write as an experiment says."""

    def __init__(
        self,
        model_of: Callable[[Run], LoadedModel],
        table: PromptTable,
        seed: int,
        generation: Generation,
        *,
        cached: bool,
    ) -> None:
        self.model_of = model_of
        self.table = table
        self.seed = seed
        self.generation = generation
        self.cached = cached
        self.kept: KeptReplies | None = None
        self._of_runs: dict[tuple[object, ...], list[tuple[Reply, ...]]] = {}

    def forget(self) -> None:
        """Free what runs wrote."""
        self._of_runs.clear()

    def of_run(self, run: Run, prompts: Ints) -> list[tuple[Reply, ...]]:
        """Per prompt and draw of noise, side by side, what an unpatched run writes: one text for
        each sample."""
        key = (id(run), prompts.tobytes())
        if key not in self._of_runs:
            rows = np.repeat(prompts, run.draws)
            self._of_runs[key] = self.of_rows(
                WritingRows(
                    run=run,
                    prompts=rows,
                    draw=np.tile(np.arange(run.draws), len(prompts)),
                    keys=[_drawn_by(run, prompt) for prompt in rows.tolist()],
                    prefill=RuleWrites(),
                    later=WhileWriting(),
                    contents=self.kept and self.kept.of_run(run, rows),
                )
            )
        return self._of_runs[key]

    def of_rows(self, rows: WritingRows) -> list[tuple[Reply, ...]]:
        """Per row, one text for each sample."""
        model, samples = self.model_of(rows.run), self.generation.samples
        count, table = len(rows.prompts), self.table
        noise = noise_writes(model, rows.run.noise, rows.prompts, table.row_keys, self.seed)
        prefill, later = RuleWrites(noise).then(rows.prefill), rows.later
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
        asked = _Asked(
            prompts=[rows.run.rows[prompt].ids for prompt, *_ in lanes],
            random=[(self.seed, table.row_keys[prompt], *drawn) for prompt, *drawn in lanes],
            groups=np.repeat(np.arange(count), samples),
            prefill=prefill,
            later=later,
        )
        replies = self._known(model, rows, asked)
        return [tuple(replies[n : n + samples]) for n in range(0, len(replies), samples)]

    def _known(self, model: LoadedModel, rows: WritingRows, asked: _Asked) -> list[Reply]:
        """Replies from the store, and those that have to be written."""
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

    def _write(self, model: LoadedModel, asked: _Asked) -> list[Reply]:
        return write_replies(
            model,
            asked.prompts,
            _decoding(model, self.generation),
            prefill=asked.prefill,
            kept=asked.later.kept,
            steps=asked.later.steps,
            random=asked.random,
            groups=asked.groups,
            cached=self.cached,
        )


@dataclass(frozen=True, eq=False)
class _Asked:
    """Replies that are wanted."""

    prompts: Sequence[tuple[int, ...]]
    random: Sequence[tuple[int, ...]]
    """[row] seed, content of the prompt, draw of noise, content of the cell, sample."""
    groups: Ints
    prefill: RuleWrites
    later: WhileWriting

    def some(self, rows: Sequence[int]) -> _Asked:
        """Those of some rows."""
        chosen, later = Chosen(len(self.prompts), rows), self.later
        return _Asked(
            [self.prompts[row] for row in rows],
            [self.random[row] for row in rows],
            self.groups[np.array(rows)],
            chosen.rules(self.prefill),
            WhileWriting(
                tuple(map(chosen.write, later.kept)), tuple(map(chosen.step_rules, later.steps))
            ),
        )


def _decoding(model: LoadedModel, generation: Generation) -> Decoding:
    assert model.tokenizer is not None
    return Decoding(
        tokens=generation.tokens,
        decode=model.tokenizer.decode,
        ends=ends_of(model),
        stops=generation.stops,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
    )


def ends_of(model: LoadedModel) -> frozenset[int]:
    """The tokens by which a model ends what it writes: those that its configuration names, and the
    end-of-text token of its tokenizer."""
    found: list[Any] = []
    for name in ("generation_config", "config"):
        named = getattr(getattr(model.module, name, None), "eos_token_id", None)
        found += named if isinstance(named, list | tuple) else [named]
    if model.tokenizer is not None:
        found.append(model.tokenizer.role_ids.get("eos"))
    return frozenset(token for token in found if isinstance(token, int))


def _drawn_by(run: Run, prompt: int) -> int:
    """What the reply of an unpatched run is drawn by, beside the row: its tokens and its noise, and
    not its name."""
    noise = run.noise
    said = None if noise is None else (noise.kind, noise.site, noise.std, noise.sds)
    return number_of("run", run.rows[prompt].ids, said)
