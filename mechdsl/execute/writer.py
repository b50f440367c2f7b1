"""Lets the rows of a panel write: `generate n`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import number_of
from mechdsl.execute.step_rules import WhileWriting
from mechdsl.execute.unpatched_batch import noise_writes
from mechdsl.generate.records import Decoding, Reply
from mechdsl.generate.write_replies import write_replies
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.program import spec
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


class Writer:
    """Lets rows write as an experiment says."""

    def __init__(
        self,
        model_of: Callable[[Run], LoadedModel],
        table: PromptTable,
        seed: int,
        generation: spec.Generation,
        *,
        cached: bool,
    ) -> None:
        self.model_of = model_of
        self.table = table
        self.seed = seed
        self.generation = generation
        self.cached = cached
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
                    keys=[number_of("run", run.name)] * len(rows),
                    prefill=RuleWrites(),
                    later=WhileWriting(),
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
        ids = [rows.run.rows[prompt].ids for prompt in rows.prompts for _ in range(samples)]
        draws = zip(rows.prompts.tolist(), rows.draw.tolist(), rows.keys, strict=True)
        replies = write_replies(
            model,
            ids,
            _decoding(model, self.generation),
            prefill=prefill,
            kept=later.kept,
            steps=later.steps,
            random=[
                (self.seed, table.row_keys[prompt], draw, key, sample)
                for prompt, draw, key in draws
                for sample in range(samples)
            ],
            groups=np.repeat(np.arange(count), samples),
            cached=self.cached,
        )
        return [tuple(replies[n : n + samples]) for n in range(0, len(replies), samples)]


def _decoding(model: LoadedModel, generation: spec.Generation) -> Decoding:
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
    found: set[int] = set()
    for config in (getattr(model.module, "generation_config", None), model.module.config):
        named = getattr(config, "eos_token_id", None)
        found.update(named if isinstance(named, list | tuple) else [named])
    if model.tokenizer is not None:
        found.add(model.tokenizer.role_ids.get("eos"))
    return frozenset(token for token in found if token is not None)
