"""Cells in order: by size, as reports and expectations rank them, and by sign, as picks do."""

from __future__ import annotations

import math

from mechdsl.results.experiment_result import ExperimentResult


def first_by_size(result: ExperimentResult, measure: int, count: int) -> list[int]:
    """The cells with the largest means by absolute value; those without one aren't ranked."""
    means = result.statistics[measure].mean
    return sorted(_known(result, measure), key=lambda cell: -abs(means[cell]))[:count]


def by_sign_instead(result: ExperimentResult, measure: int, count: int) -> str | None:
    """What `top n of` picks in place of some of those, as it ranks by sign; None where that makes
    no difference."""
    means = result.statistics[measure].mean
    by_sign = sorted(_known(result, measure), key=lambda cell: -means[cell])[:count]
    by_size = first_by_size(result, measure, count)
    others = [result.cells[cell].name for cell in by_sign if cell not in by_size]
    if not others:
        return None
    pick = f"`top {count} of {result.name}`"
    return f"{pick} ranks by sign, and would have {', '.join(others)} among them"


def _known(result: ExperimentResult, measure: int) -> list[int]:
    means = result.statistics[measure].mean
    return [cell for cell in range(len(means)) if math.isfinite(means[cell])]
