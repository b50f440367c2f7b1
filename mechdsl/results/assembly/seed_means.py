"""Means over trainings with several seeds, `fit(…, seeds: 5)`, with their intervals.

The interval over seeds is Student's t of the means of single trainings, all on the same prompts. It
is separate from the interval over prompts, which is of each prompt's mean over these trainings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mechdsl.program import spec
from mechdsl.resolve.cells import SEED_AXIS, CellKey, average_cells
from mechdsl.results.assembly.collection import add_statistics
from mechdsl.results.assembly.combination import average_over_axis
from mechdsl.results.experiment_result import ExperimentResult, SeedMean
from mechdsl.statistics.intervals import mean_half_width


def add_statistics_over_seeds(
    whole: ExperimentResult, experiment: spec.Experiment, seed: int, seeds: tuple[int, ...]
) -> ExperimentResult:
    """Add statistics as `add_statistics` does, and the means over the axis `seed`.

    Args:
        whole: A result with this axis, on which `mean over seed` isn't applied yet.
        seeds: Values of the axis.
    """
    single = add_statistics(whole, experiment, seed)
    averaged = average_over_axis(whole, SEED_AXIS)
    if experiment.over != SEED_AXIS:
        averaged = replace(averaged, drawn=None)
    averaged = add_statistics(averaged, experiment, seed)
    cells, groups = average_cells(single.cells, SEED_AXIS)
    means = tuple(
        mean
        for place, (cell, group) in enumerate(zip(cells, groups, strict=True))
        for mean in _means_of_cell(single, averaged, place, cell, group)
    )
    result = averaged if experiment.over == SEED_AXIS else single
    said = f"{', '.join(map(str, seeds))}; the interval over seeds is Student's t over the "
    said += "means of these trainings, on the same prompts; that over prompts is of each prompt's "
    said += "mean over these trainings. There is no interval where all of them are equal"
    return replace(
        result, seed_means=means, conventions={**result.conventions, "seeds of trainings": said}
    )


def _means_of_cell(
    single: ExperimentResult,
    averaged: ExperimentResult,
    place: int,
    cell: CellKey,
    group: list[int],
) -> Iterator[SeedMean]:
    """Yield the mean of each measure over the cells of one group.

    Args:
        place: Number of the cell in `averaged`.
        group: Numbers of the cells in `single`.
    """
    for measure, data in single.computed():
        if data.kind == "category":
            continue
        values = single.statistics[measure].mean[group]
        known = values[np.isfinite(values)]
        if len(known) < 2:
            continue
        assert single.settings is not None
        mean, far = float(known.mean()), mean_half_width(known, single.settings.confidence)
        found = averaged.statistics[measure]
        ends = float(found.low[place]), float(found.high[place])
        if ends[0] == ends[1] or len(known) < len(values):
            ends = np.nan, np.nan
        yield SeedMean(
            measure, cell, len(known), mean, mean - far, mean + far, *ends, int(found.n[place])
        )
