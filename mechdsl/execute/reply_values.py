"""Metrics of what was written: from replies to one number per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechdsl.base import limits
from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.diagnostics.e06_experiment import UnreadableMeasure
from mechdsl.execute.python_metric import of_replies
from mechdsl.resolve.resolved import Atom, Env
from mechdsl.vocab.reply_metrics import TakesTooLong


class SearchFailed(Exception):
    """A search takes too long. Caught where its rows are known."""

    def __init__(self, diagnostic: UnreadableMeasure, row: int) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic
        self.row = row


def reply_values(
    atom: Atom, replies: Sequence[Reply], prompts: Ints, items: Sequence[Env]
) -> Floats:
    """[row]: the metric of each reply; NaN where it has none, as a reply without a number.

    replies: [row]. prompts: [row] index into the table. items: [row] the occurrence that
    `{item.index}` stands for. E0223 as PythonFailure, with the row that it fails at where there is
    one; E0612 as SearchFailed for a search that is cut short.
    """
    if atom.python is not None:
        return of_replies(atom, [reply.text for reply in replies], prompts)
    wanted = [
        atom.wanted[item if item in atom.wanted else None][prompt]
        for prompt, item in zip(prompts.tolist(), items, strict=True)
    ]
    try:
        return np.array(atom.form.function(replies, wanted), dtype=np.float64)
    except TakesTooLong as error:
        raise SearchFailed(_too_long(atom, replies[error.row]), error.row) from error


def _too_long(atom: Atom, reply: Reply) -> UnreadableMeasure:
    span = atom.node.span
    return UnreadableMeasure(
        span=span,
        text=span.written,
        reason=f"in a reply of {len(reply.text):,} letters it takes more than "
        f"{limits.SEARCH_SECONDS:g} s",
        hint="the same letters can be repeated in too many ways: write `a+` for `(a+)+`, or "
        "`(…)++`, which doesn't try others",
    )
