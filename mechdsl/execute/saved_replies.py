"""Runs with what they wrote behind their prompts, whose vectors are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.prompts.prompt_table import Hits, PositionCell, Run
from mechdsl.prompts.reply_positions import tokens_in_reply
from mechdsl.resolve.resolved import ResolvedSave


@dataclass(frozen=True, eq=False)
class SavedRows:
    """What a `save` line reads: rows of a run, or, where it reads replies, one row for each."""

    save: ResolvedSave
    """Its cells are of these rows."""
    run: Run
    of: Ints
    """[row] its number in the table."""
    replies: Sequence[Reply] = ()
    """[row] what stands behind its prompt; none where no reply is read."""
    told_apart: Mapping[str, Ints] = field(default_factory=dict[str, Ints])
    """[row] which draw and sample it is, where there are several replies of a prompt."""


def rows_to_save(
    save: ResolvedSave, run: Run, runs: UnpatchedRuns, batches: Sequence[Ints]
) -> SavedRows:
    """The rows that a line reads: those of its run, or, where it reads replies, a row for each
    draw and sample, with its places in the reply found.

    batches: rows that write together, all of them in their order.
    """
    prompts = np.arange(len(run.rows), dtype=np.int64)
    if runs.writer is None or not save.in_reply:
        return SavedRows(save, run, prompts)
    samples, draws = runs.writer.generation.samples, run.draws
    replies = [
        reply for batch in batches for own in runs.writer.of_run(run, batch) for reply in own
    ]
    of = np.repeat(prompts, draws * samples)
    draw = np.tile(np.repeat(np.arange(draws), samples), len(prompts))
    sample = np.tile(np.arange(samples), len(prompts) * draws)
    tokenizer = runs.model_of(run).tokenizer
    assert tokenizer is not None
    decode = tokenizer.decode
    own = of.tolist()

    def found(cell: PositionCell) -> PositionCell:
        if cell.reply is None:
            return replace(cell, hits=tuple(cell.hits[row] for row in own))
        hits: list[Hits] = []
        for row, reply in zip(own, replies, strict=True):
            tokens = tokens_in_reply(cell.reply, reply.ids, reply.text, decode)
            behind = tuple(len(run.rows[row].ids) - 1 + token for token in tokens)
            hits.append((behind,) if behind else ())
        return replace(cell, hits=tuple(hits), reply=None)

    rows = tuple(
        replace(
            run.rows[row],
            ids=(*run.rows[row].ids, *reply.ids),
            offsets=(*run.rows[row].offsets, *((0, 0) for _ in reply.ids)),
            special=(*run.rows[row].special, *(False for _ in reply.ids)),
        )
        for row, reply in zip(own, replies, strict=True)
    )
    noise = run.noise
    if noise is not None:
        keys = runs.table.row_keys if noise.row_keys is None else noise.row_keys
        noise = replace(
            noise,
            positions=tuple(noise.positions[row] for row in own),
            row_keys=tuple(keys[row] for row in own),
            samples=1,
            drawn=tuple(draw.tolist()),
        )
    return SavedRows(
        replace(save, cells=tuple(map(found, save.cells))),
        replace(run, rows=rows, noise=noise),
        of,
        replies,
        {
            name: which
            for name, which, count in (("draw", draw, draws), ("sample", sample, samples))
            if count > 1
        },
    )
