"""The independent units behind each cell, before anything is run: as the run will count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.seen_rows import SeenRows
from mechdsl.statistics.sampling import Sampling, by_seen


@dataclass(frozen=True, eq=False)
class PlannedUnits:
    """Of one measure."""

    counts: Ints
    """[cell] units of the cells that can differ from the base run."""
    codes: Ints
    """[row] the number of its unit, where it has most of them."""


def planned_units(
    plan: ExperimentPlan, number: int, kept: Ints, causal: Callable[[str | None], bool]
) -> PlannedUnits:
    """number: of the measure. kept: the rows that are in the experiment. causal: whether a token of
    this model (None is the experiment's own) sees no later one."""
    there = plan.exists
    sampling = sampling_of(plan.experiment, kept)
    seen = SeenRows(plan, kept, causal).of(number, there)
    present = plan.present(kept)[there]
    counts = np.zeros(len(present), dtype=np.int64)
    every = {
        tuple(cells.tolist()): sampling.units(own) for cells, own in by_seen(len(present), seen)
    }
    for cells, units in every.items():
        counts[list(cells)] = units.held(present[list(cells)])
    most = max(every.values(), key=lambda units: units.count, default=sampling.units())
    return PlannedUnits(counts[~plan.inert[there]], most.codes[0])


def sampling_of(experiment: ResolvedExperiment, kept: Ints) -> Sampling:
    """What intervals of these rows hang on, but for their design."""
    keys = experiment.table.row_keys
    return Sampling(
        len(kept),
        experiment.spec.statistics,
        experiment.seed,
        [keys[i] for i in kept.tolist()],
        _groups(experiment, kept),
    )


def _groups(experiment: ResolvedExperiment, kept: Ints) -> np.ndarray | None:
    """The groups that `stats by` resamples."""
    by, rows = experiment.spec.statistics.by, experiment.table.runs["clean"].rows
    if by is None or not all(by in rows[i].values for i in kept):
        return None
    return np.array([str(rows[i].values[by]) for i in kept])
