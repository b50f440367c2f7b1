"""Cells of two experiments with equal coordinates."""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.results.experiment_result import ExperimentResult


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
