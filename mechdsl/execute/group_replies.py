"""Replies of the distinct rows of a group, written before the passes in which these are measured.

A step of writing has one token of each row and a pass of measuring all of its prompt, so that many
more rows write together than are measured together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.pass_size import Sizes
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.share import SharedRows
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.vocab.sites import SITES

Replies = list[tuple[Reply, ...]]
"""[row and draw of noise] a text for each sample."""


class GroupReplies:
    """Writes the rows of a group in their order, as many together as there is room for."""

    def __init__(
        self,
        write: Callable[[Ints], Replies],
        wanted: Callable[[Ints], Ints],
        group: Ints,
        lanes: Ints,
        each: Floats,
        sizes: Sizes,
    ) -> None:
        """Args:
        write: Gives the replies of distinct rows, those of one row adjacent.
        wanted: Gives the rows among some distinct rows that are measured at all.
        group: [row] distinct rows, in the order of their passes.
        lanes: [distinct row] texts that it writes, over draws and samples.
        each: [distinct row] bytes of keys, values and written vectors.
        sizes: How many lanes and bytes there is room for.
        """
        self._write = write
        self._wanted = wanted
        self._group = group
        self._lanes = lanes
        self._each = each
        self._sizes = sizes
        self._found: dict[int, Replies] = {}

    def of(self, chosen: Ints) -> Replies:
        """The replies of some distinct rows, which are written now if they aren't there."""
        while missing := [row for row in chosen.tolist() if row not in self._found]:
            self._write_from(missing[0])
        return [reply for row in chosen.tolist() for reply in self._found.pop(row)]

    def _write_from(self, row: int) -> None:
        """Write a row and those after it that aren't written yet."""
        rest = self._group[int(np.flatnonzero(self._group == row)[0]) :]
        rest = rest[np.isin(rest, list(self._found), invert=True)]
        count = min(
            int(np.searchsorted(self._lanes[rest].cumsum(), self._sizes.pass_tokens, side="right")),
            int(np.searchsorted(self._each[rest].cumsum(), self._sizes.reply_bytes, side="right")),
        )
        rows = self._wanted(rest[: max(1, count)])
        replies = self._write(rows)
        draws = len(replies) // len(rows)
        for number, written in enumerate(rows.tolist()):
            self._found[written] = replies[number * draws : (number + 1) * draws]


def reply_bytes(
    shared: SharedRows, plans: Sequence[ExperimentPlan], itemsize: int, shape: ModelShape
) -> Floats:
    """[distinct row] bytes that it takes to write its replies: keys and values of all tokens, and
    the vectors that rules write."""
    found = np.zeros(len(shared))
    kept = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head
    for number, plan in enumerate(plans):
        own = np.flatnonzero(shared.owner == number)
        generation = plan.experiment.generation
        if not len(own) or generation is None:
            continue
        rows = shared.rows.take(own)
        lengths, lanes = plan.lengths(rows), plan.draws * generation.samples
        vectors = np.zeros(len(own))
        for rule in plan.rules:
            if rule.rule.does.changes == "sites":
                wide = np.array([_numbers(shape, point) for point in rule.point_table])
                row, point = rule.points.expand(rule.site_of_cell[rows.cell])
                vectors += np.bincount(row, wide[point], len(own))
        tokens = kept * (lengths + generation.tokens) + vectors * (lengths + 1)
        found[own] = itemsize * lanes * tokens
    return found


def _numbers(shape: ModelShape, point: SitePoint) -> int:
    """How many numbers are written at a point for each token; those over keys count as one head."""
    if SITES[point.site].width == "key":
        return shape.d_head
    every = units(shape, point.site, point.layer) if point.unit is None else 1
    return every * width(shape, point.site, point.layer)
