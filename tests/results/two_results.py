"""Pairs of results with known differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.resolve.cells import CellKey
from mechdsl.results.differences.comparison import CellDifference, Differences, compare_results
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.results import Results
from mechdsl.statistics.measurements import MeasureData

from .synthetic import finished, heads

PROMPTS = 24


def results(*experiments: ExperimentResult, **file: Any) -> Results:
    given: dict[str, Any] = {"file": "a.mech", "hash": "1" * 64, **file}
    return Results((FileResult(experiments=tuple(experiments), **given),))


def plain(*measures: MeasureData, keys: tuple[int, ...] | None = None) -> ExperimentResult:
    """Build an experiment over heads with only these measures."""
    count, prompts = measures[0].patched.shape
    return replace(
        heads(prompts=prompts),
        cells=tuple(
            CellKey({"layer": 0, "head": n}, f"L0H{n}.z", "last-item token") for n in range(count)
        ),
        measures=measures,
        row_keys=tuple(range(100, 100 + prompts)) if keys is None else keys,
        source=None,
        runs={},
        accuracy={},
        row_values={},
    )


def two(
    old: MeasureData, new: MeasureData, *expects: str, keys: Any = None, **settings: Any
) -> Differences:
    """Compare one measure between two runs. keys: row keys of the new run."""
    sides = (plain(old), plain(new, keys=keys))
    one, other = (results(finished(each, *expects, **settings)) for each in sides)
    return compare_results(one, other)


def noise(seed: int, cells: int = 4, prompts: int = PROMPTS) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, (cells, prompts))


BASE = noise(1, 1)
OLD = BASE + noise(2)


def only(found: Differences, state: str) -> CellDifference:
    (cell,) = [each for each in found.cells if each.state == state]
    return cell


def states(found: Differences) -> dict[str, int]:
    return {state: count for state, count in found.counts.items() if count}
