"""Rows cut into passes: which may ride together, in which order, and how many tokens they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.wanted_places import Member
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Plan
from mechdsl.plan.restart import Shortcuts
from mechdsl.plan.share import SharedRows
from mechdsl.prompts.prompt_table import Run


def extent(
    shared: SharedRows, shortcuts: Shortcuts | None, plans: Sequence[ExperimentPlan]
) -> tuple[Ints, Floats]:
    """Per distinct row: (tokens that it takes along, blocks times tokens)."""
    widths = np.zeros(len(shared), dtype=np.int64)
    blocks = np.zeros(len(shared), dtype=np.int64)
    for number, each in enumerate(plans):
        own = np.flatnonzero(shared.owner == number)
        if not len(own):
            continue
        rows = shared.rows.take(own)
        lengths = each.lengths(rows)
        own_cuts = None if each.whole else shortcuts
        first = each.leftmost(rows) if own_cuts and own_cuts.prefix else np.zeros_like(lengths)
        widths[own] = np.maximum(1, lengths - first) * each.draws
        low = each.lowest[rows.cell] if own_cuts and own_cuts.resume else 0
        blocks[own] = np.maximum(1, each.experiment.model.shape.n_layers - low)
    return widths, widths * blocks.astype(np.float64)


def groups(
    shared: SharedRows, plan: Plan, plans: Sequence[ExperimentPlan], widths: Ints
) -> Iterator[tuple[Run, Ints]]:
    """Rows that can share passes: they start from the same run, are whole passes or not, have the
    same blocks, and are of one cell if rows don't join. Those that end up in the same columns come
    together."""
    runs: list[Run] = []
    start = np.zeros(len(shared), dtype=np.int64)
    draws = np.zeros(len(shared), dtype=np.int64)
    whole = np.zeros(len(shared), dtype=np.int64)
    blocks = np.zeros(len(shared), dtype=np.int64)
    numbered: dict[tuple[tuple[int, int | None], ...], int] = {}
    for number, each in enumerate(plans):
        own = np.flatnonzero(shared.owner == number)
        which = each.starting_run(shared.rows.take(own))
        numbers: list[int] = []
        for run in each.starting_runs:
            known = [n for n, other in enumerate(runs) if other is run]
            numbers.append(known[0] if known else len(runs))
            if not known:
                runs.append(run)
        if len(own):
            start[own] = np.array(numbers, dtype=np.int64)[which]
            draws[own] = each.draws
            whole[own] = each.whole
        cells = shared.rows.cell[own]
        for cell in np.unique(cells).tolist():
            pairs = each.replaced_blocks(cell)
            blocks[own[cells == cell]] = numbered.setdefault(pairs, len(numbered))
    keys = [start, draws, whole, blocks]
    if not plan.joins_rows:
        keys += [shared.owner, shared.rows.cell]
    _, group = np.unique(np.stack(keys), axis=1, return_inverse=True)
    group = group.reshape(-1)
    order = np.lexsort((shared.rows.prompt, widths, group))
    for own in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(own):
            yield runs[int(start[own[0]])], own


def members_of(shared: SharedRows, chosen: Ints) -> list[Member]:
    """The rows that these distinct rows stand for, by experiment."""
    place = np.full(len(shared), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    found: list[Member] = []
    for number, (distinct, rows) in enumerate(shared.members):
        own = np.flatnonzero(place[distinct] >= 0)
        if len(own):
            found.append(Member(number, rows.take(own), place[distinct[own]]))
    return found
