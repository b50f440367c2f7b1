"""Runs with what they wrote behind their prompts, whose vectors are saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.prompts.prompt_table import Hits, PositionCell, Run
from mechdsl.prompts.reply_positions import tokens_in_reply
from mechdsl.resolve.resolved import ResolvedSave


def with_replies(
    save: ResolvedSave, run: Run, runs: UnpatchedRuns, batches: Sequence[Ints]
) -> tuple[ResolvedSave, Run, list[Reply]]:
    """The line with its places in replies found, its run with the replies behind the prompts, and
    these, row by row; as they are, and none, where no reply is read.

    batches: rows that write together, all of them in their order.
    """
    if runs.writer is None or all(cell.reply is None for cell in save.cells):
        return save, run, []
    replies = [reply for batch in batches for (reply,) in runs.writer.of_run(run, batch)]
    tokenizer = runs.model_of(run).tokenizer
    assert tokenizer is not None
    decode = tokenizer.decode

    def found(cell: PositionCell) -> PositionCell:
        if cell.reply is None:
            return cell
        hits: list[Hits] = []
        for row, reply in zip(run.rows, replies, strict=True):
            tokens = tokens_in_reply(cell.reply, reply.ids, reply.text, decode)
            own = tuple(len(row.ids) - 1 + token for token in tokens)
            hits.append((own,) if own else ())
        return replace(cell, hits=tuple(hits), reply=None)

    rows = tuple(
        replace(
            row,
            ids=(*row.ids, *reply.ids),
            offsets=(*row.offsets, *((0, 0) for _ in reply.ids)),
            special=(*row.special, *(False for _ in reply.ids)),
        )
        for row, reply in zip(run.rows, replies, strict=True)
    )
    cells = tuple(found(cell) for cell in save.cells)
    return replace(save, cells=cells), replace(run, rows=rows), replies
