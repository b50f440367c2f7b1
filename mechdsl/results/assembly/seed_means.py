"""Means over trainings with several seeds, `fit(…, seeds: 5)`, with their intervals, and the
agreement of the sets that masks choose.

The interval over seeds is Student's t of the means of single trainings, all on the same prompts,
from five trainings on. It is separate from the interval over prompts, which is of each prompt's
mean over these trainings.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from mechdsl.base.text import count_noun
from mechdsl.program import spec
from mechdsl.program.significance import MIN_UNITS
from mechdsl.program.spec import SEED_AXIS
from mechdsl.resolve.cells import CellKey, average_cells
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.assembly.collection import add_statistics
from mechdsl.results.assembly.combination import average_over_axis
from mechdsl.results.experiment_result import ExperimentResult, SeedMean
from mechdsl.statistics.cell_statistics import mean_range
from mechdsl.statistics.intervals import seed_half_width


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
    text = f"{', '.join(map(str, seeds))}; the interval over prompts is of each prompt's mean over "
    text += "these trainings; "
    if any(np.isfinite(mean.low) for mean in means):
        text += "that over seeds is Student's t over the means of these trainings, on the same "
        text += "prompts, and assumes that no training fails more rarely than these show"
    else:
        text += f"one over seeds needs {MIN_UNITS} trainings that aren't equal"
    return replace(
        result, seed_means=means, conventions={**result.conventions, "seeds of trainings": text}
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
        mean, far = float(known.mean()), seed_half_width(known, single.settings.confidence)
        low, high = np.clip((mean - far, mean + far), *(mean_range(data) or (-np.inf, np.inf)))
        statistic = averaged.statistics[measure]
        ends = float(statistic.low[place]), float(statistic.high[place])
        if ends[0] == ends[1] or len(known) < len(values):
            ends = np.nan, np.nan
        values = tuple(known.tolist())
        yield SeedMean(
            measure, cell, values, mean, float(low), float(high), *ends, int(statistic.n[place])
        )


# --- agreement of chosen sets ---------------------------------------------------------------------


@dataclass(frozen=True)
class SetAgreement:
    """How well the sets that several trainings chose agree."""

    sets: int
    """Number of sets."""
    noun: str
    """What one of their elements is: `site`, `feature`."""
    size: int
    """Elements of the first set."""
    shared: int
    """Elements that all sets have."""
    used: int
    """Elements that at least one set has."""
    jaccard: float
    """Mean over pairs of sets of the number of shared elements divided by that of all elements of
    the pair."""
    chance: float | None
    """The expected value of the same for independent random sets of these sizes; None if the number
    of elements that sets are chosen from isn't known."""

    @property
    def text(self) -> str:
        """The agreement as a line below a table."""
        chance = "" if self.chance is None else f", of random ones {self.chance:.2f}"
        return (
            f"{self.shared:,} of {count_noun(self.size, self.noun)} are chosen with all "
            f"{self.sets} seeds, and {self.used:,} with at least one; mean Jaccard index of two "
            f"choices {self.jaccard:.2f}{chance}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        names = ("sets", "size", "shared", "used", "jaccard", "chance")
        return {name: getattr(self, name) for name in names}


def measure_agreement(
    sets: Sequence[Collection[Hashable]], candidates: int | None, noun: str
) -> SetAgreement:
    """Return how well at least two sets agree, none of which is empty.

    The shared elements of two independent random sets have a hypergeometric distribution.

    Args:
        candidates: Number of elements that each set was chosen from; None if it isn't known.
        noun: What one element is.
    """
    chosen = [set(each) for each in sets]
    pairs = list(combinations(chosen, 2))
    agreements = [len(one & other) / len(one | other) for one, other in pairs]
    chance = None
    if candidates is not None:
        by_pair = [_expected_jaccard(len(one), len(other), candidates) for one, other in pairs]
        chance = float(np.mean(by_pair))
    shared, used = set.intersection(*chosen), set.union(*chosen)
    counts = len(chosen[0]), len(shared), len(used)
    return SetAgreement(len(sets), noun, *counts, float(np.mean(agreements)), chance)


def _expected_jaccard(one: int, other: int, every: int) -> float:
    """Return the expected Jaccard index of two random sets of these sizes."""
    return sum(
        comb(one, k) * comb(every - one, other - k) / comb(every, other) * k / (one + other - k)
        for k in range(max(0, one + other - every), min(one, other) + 1)
    )


def describe_agreements(variants: Sequence[ResolvedExperiment]) -> dict[str, str]:
    """Return the conventions of an experiment on the agreement of its masks over seeds.

    Args:
        variants: All experiments with one name.
    """
    agreements: dict[str, str] = {}
    for model in dict.fromkeys(variant.model.name for variant in variants):
        experiments = [variant for variant in variants if variant.model.name == model]
        several = [
            mask
            for experiment in experiments
            for mask in experiment.masks
            if mask.training.is_one_of_several
        ]
        for name in dict.fromkeys(mask.training.definition for mask in several):
            masks = {m.training.seed: m for m in several if m.training.definition == name}.values()
            first = next(iter(masks))
            where = "" if len(experiments) == len(variants) else f" in {model}"
            is_known = first.noun in ("site", "edge")  # others may change no training row
            count = len(first.candidates) if is_known else None
            agreement = measure_agreement([mask.chosen for mask in masks], count, first.noun)
            agreements[f"agreement of {name}{where}"] = agreement.text
    return agreements
