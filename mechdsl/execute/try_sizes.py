"""How fast passes of some size are, found by running some."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.pass_size import stopwatch
from mechdsl.execute.reply_values import SearchFailed
from mechdsl.hooks.memory import out_of_memory, release
from mechdsl.program.python_files import PythonFailure

WORTH_MEASURING = 200
"""Passes of a run below which trying other sizes costs more than they save."""
FULL_SHARE = 0.7
"""Of its size, what a pass must hold to tell how fast that size is."""


def try_sizes(
    one_pass: Callable[[Ints], None],
    group: Ints,
    widths: Ints,
    work: Floats,
) -> Callable[[int], float]:
    """What tells the work per second of a pass of so many tokens, the better of two; 0 where there
    is no such pass.

    one_pass: runs these distinct rows. group: rows that may ride together, by width. widths, work:
    [distinct row] tokens, and blocks times tokens.
    """
    group = group[len(group) // 2 :]  # the first ones are the narrowest
    ends = np.cumsum(widths[group])

    def rate(tokens: int) -> float:
        chosen = group[: int(np.searchsorted(ends, tokens, side="right"))]
        if int(widths[chosen].sum()) < FULL_SHARE * tokens:
            return 0.0
        took: list[float] = []
        try:
            for _ in range(2):
                with stopwatch() as seconds:
                    one_pass(chosen)
                took += seconds
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            release()
            return 0.0
        except (PythonFailure, SearchFailed):  # it fails again, where it is told
            return 0.0
        return float(work[chosen].sum()) / max(min(took), 1e-9)

    return rate
