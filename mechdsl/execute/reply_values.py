"""Metrics of what was written: from replies to one number per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.python_metric import of_replies
from mechdsl.resolve.resolved import Atom, Env


def reply_values(
    atom: Atom, replies: Sequence[Reply], prompts: Ints, items: Sequence[Env]
) -> Floats:
    """[row]: the metric of each reply; NaN where it has none, as a reply without a number.

    replies: [row]. prompts: [row] index into the table. items: [row] the occurrence that
    `{item.index}` stands for. E0223 as PythonFailure, with the row that it fails at where there is
    one.
    """
    if atom.python is not None:
        return of_replies(atom, [reply.text for reply in replies], prompts)
    wanted = [
        atom.wanted[item if item in atom.wanted else None][prompt]
        for prompt, item in zip(prompts.tolist(), items, strict=True)
    ]
    return np.array(atom.form.function(replies, wanted), dtype=np.float64)
