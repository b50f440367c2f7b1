"""Which cells integrated gradients move together: those that write one site of one layer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.resolve.resolved_rule import Place


def sites_of_cells(plan: ExperimentPlan) -> Ints:
    """[cell] equal where cells write one site of one layer by one rule; a cell writes at one."""
    codes: dict[tuple[int, Place | None], int] = {}
    found = np.zeros(plan.n_cells, dtype=np.int64)
    for number, rule in enumerate(plan.rules):
        ends = pairwise(rule.points.offsets.tolist())
        points = [[rule.point_table[at] for at in rule.points.values[a:b]] for a, b in ends]
        places = [(each[0].site, each[0].layer) if each else None for each in points]
        own = np.array([codes.setdefault((number, each), len(codes)) for each in places])
        acts = True if rule.active is None else rule.active
        found = np.where(acts, own[rule.site_of_cell], found)
    return found
