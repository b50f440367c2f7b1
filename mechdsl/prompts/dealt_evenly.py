"""Which variables of a block are dealt out evenly: each of their combinations as often as the next.

Rows are drawn round after round, and a round has every combination of the block's own values once.
So a table that holds a whole round at least is balanced by how it is made; one that stops before is
a random sample of the combinations, and a data file is as somebody wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.rows import Row

MOVED = 0.1
"""Part of the rows that may have to be of another combination for all to have the same number."""


def dealt_evenly(block: PromptsBlock, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the variables, in the order of the file; none of a data file.

    rows: at least a whole round, without those that are left out.
    """
    if block.data is not None:
        return ()
    names = [name for name, _ in block.axes]
    places = {name: [row.places[name] for row in rows] for name in names}
    names = [name for name in names if len(set(places[name])) > 1]
    while names and not _even([places[name] for name in names]):
        names.remove(max(names, key=lambda name: len(set(places[name]))))
    return tuple(names)


def exhausted(block: PromptsBlock, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the variables of which rows have every value that the block declares; none of a data
    file, whose values are those that somebody found."""
    if block.data is not None:
        return ()
    return tuple(
        name
        for name, values in block.axes
        if len({row.places[name] for row in rows}) == len(values)
    )


def _even(columns: Sequence[Sequence[int]]) -> bool:
    """Whether each combination that there is has as many rows as the next, or one more, as of the
    last round there may be a part; or nearly as many, as rows that were there already are left out.
    Where a combination has too few different rows, these soon make it rare."""
    counts = Counter(zip(*columns, strict=True)).values()
    rows, mean = sum(counts), sum(counts) / len(counts)
    moved = sum(abs(count - mean) for count in counts) / 2
    return max(counts) - min(counts) <= 1 or moved <= MOVED * rows
