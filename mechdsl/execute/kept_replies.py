"""The executor's side of the store for what rows write: a reply that is known isn't written again.

A reply is kept under a key of its own, token by token, as soon as its pass is done: a run that was
cut short goes on where it was. What is measured of replies is worked out again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.base.digest import digest
from mechdsl.base.reply import Reply
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.value_keys import Contents, ExperimentKeys
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.store.runs import OpenRun
from mechdsl.store.values import Block

_ENDED = ("end", "stop", "length")


class KeptReplies:
    """Replies of one panel in the store."""

    def __init__(
        self,
        run: OpenRun,
        contents: Contents,
        table: PromptTable,
        settings: tuple[object, ...],
        ends: frozenset[int],
    ) -> None:
        """settings: of `generate`. ends: the tokens that end a reply."""
        self._run = run
        self._contents = contents
        self._table = table
        self._shared = digest("reply", settings, ends)
        self.keys: dict[str, ExperimentKeys] = {}
        """By the key of an experiment; without those that can't be told apart by their content."""

    def of_run(self, run: Run, prompts: Ints) -> list[bytes]:
        """Per prompt, what a run's reply hangs on, beside what is drawn."""
        model = self._contents.models[run.model or self._contents.model]
        rows = self._contents.of(run, self._table)[prompts].tolist()
        return [digest("run", self._shared, model, row) for row in rows]

    def of_rows(self, experiment: str, rows: Rows) -> list[bytes] | None:
        """Per row of an experiment the same; None where that can't be said."""
        keys = self.keys.get(experiment)
        return None if keys is None else keys.of_rows(rows, self._shared)

    def find(self, keys: Sequence[bytes], model: LoadedModel) -> dict[int, Reply]:
        """Number of a key → its reply, where there is one."""
        found = {**self._run.earlier(keys), **self._run.own(keys)}
        return {
            number: _reply(found[key][1][:, 0].astype(np.int64).tolist(), model)
            for number, key in enumerate(keys)
            if key in found
        }

    def keep(self, keys: Sequence[bytes], replies: Sequence[Reply]) -> None:
        """Keep replies; they are on the disk when this returns."""
        every = zip(keys, replies, strict=True)
        known = {key: reply for key, reply in every if reply.ended != "broken"}
        if not known:
            return
        parts = [
            [_ENDED.index(reply.ended), len(reply.text), *reply.ids] for reply in known.values()
        ]
        starts = np.cumsum([0, *map(len, parts)]).astype(np.int64)
        rows = np.concatenate([np.arange(len(part), dtype=np.uint64) for part in parts])
        values = np.concatenate([np.array(part, dtype=np.float64) for part in parts])
        self._run.keep(Block(list(known), starts, rows, values[:, None]))


def _reply(numbers: Sequence[int], model: LoadedModel) -> Reply:
    ended, length, *ids = numbers
    assert model.tokenizer is not None
    return Reply(tuple(ids), model.tokenizer.decode(ids)[:length], _ENDED[ended])
