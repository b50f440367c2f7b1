"""How many prompts are read at a time, where vectors of many rows are wanted."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.plan.plan import PROMPT_TOKENS
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved_rule import Place, SitePoint
from mechdsl.vocab.sites import SITES

READ_BYTES = 1 << 28
"""Of the activations that one batch of prompts may have in memory, all tokens and sites of it."""


def read_batches(
    shape: ModelShape,
    itemsize: int,
    run: Run,
    points: Iterable[SitePoint],
    prompts: Ints | None = None,
    tokens: int = PROMPT_TOKENS,
) -> list[Ints]:
    """Prompts, all by default, in the order of the table: of so many tokens at most, and of no more
    than there is room for what is read of them.

    itemsize: bytes of a number of the model.
    """
    prompts = np.arange(len(run.rows), dtype=np.int64) if prompts is None else prompts
    if not len(prompts):
        return []
    longest = int(run.lengths[prompts].max())
    longest *= run.draws
    places = {(point.site, point.layer) for point in points}
    each = sum(numbers(shape, place, longest) for place in places) * itemsize
    room = min(tokens, READ_BYTES // max(1, each))
    size = max(1, room // longest)
    return [prompts[i : i + size] for i in range(0, len(prompts), size)]


def numbers(shape: ModelShape, place: Place, keys: int) -> int:
    """How many numbers there are of a site at one token; keys: that vectors over keys have."""
    one = keys if SITES[place[0]].width == "key" else width(shape, *place)
    return units(shape, *place) * one


def numbers_of(shape: ModelShape, point: SitePoint, keys: int) -> int:
    """The same of one head or neuron, where the point names it."""
    whole = numbers(shape, (point.site, point.layer), keys)
    return whole if point.unit is None else whole // units(shape, point.site, point.layer)
