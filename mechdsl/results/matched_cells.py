"""Cells of two experiments with equal coordinates, and the draws that they share."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.bootstrap import Resampling


def matched(
    mine: ExperimentResult, measure: int, other: ExperimentResult, other_measure: int
) -> tuple[Ints, Ints]:
    """Cells of two experiments that have equal coordinates, and a value in both."""
    places = {tuple(sorted(cell.coords.items())): i for i, cell in enumerate(other.cells)}
    pairs = [
        (i, places[key])
        for i, cell in enumerate(mine.cells)
        if (key := tuple(sorted(cell.coords.items()))) in places
        and np.isfinite(mine.statistics[measure].mean[i])
        and np.isfinite(other.statistics[other_measure].mean[places[key]])
    ]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def draws_of(other: ExperimentResult, mine: ExperimentResult) -> Resampling:
    """The other experiment's draws: the same prompts together, or else independent ones."""
    draws = other.resampling
    shared = (
        mine.row_ids is not None
        and other.row_ids is not None
        and sorted(mine.row_ids) == sorted(other.row_ids)
        and not draws.grouped
        and not mine.resampling.grouped
    )
    ids = list(range(other.prompts)) if other.row_ids is None else other.row_ids
    settings = mine.settings if mine.settings is not None else other.settings
    if settings is None:
        raise ValueError("a correlation needs finished experiments")
    seed = mine.seed if shared else mine.seed + 1
    return Resampling(other.prompts, settings, seed, ids=ids, groups=other.groups)
