"""Which effects survive the correction: the words of tables and of the JSON."""

from __future__ import annotations

from typing import Literal

import numpy as np

from mechdsl.base.arrays import Bools
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.vocab.metrics import EFFECTS

Survival = Literal["yes", "no", "inert", "rounding", "in band", "above band", "below band", ""]
"""Whether an effect survives the correction; in words if random targets reach it, or if it can't be
told from rounding. Empty if its p isn't corrected."""


def significance_level(result: ExperimentResult) -> float:
    """Return the threshold for a corrected p: 0.05 for intervals of 95 %."""
    confidence = result.settings.confidence if result.settings else 95.0
    return round(1 - confidence / 100, 10)


def is_significant(result: ExperimentResult, measure: int) -> Bools:
    """Return whether a corrected effect is significant and exceeds rounding. Shape [cell]."""
    statistic = result.statistics[measure]
    with np.errstate(invalid="ignore"):
        return (statistic.p_corrected < significance_level(result)) & ~statistic.at_rounding


def is_within_random(result: ExperimentResult, measure: int) -> Bools:
    """Return whether the effect is significant after correction, but random targets reach it: it is
    in its null band, or weaker than the band. Bands of too few draws don't count. Shape
    [cell]."""
    band, survived = result.control(measure), is_significant(result, measure)
    if band is None:
        return np.zeros_like(survived)
    return survived & band.decides & (band.inside | band.weaker)


def survival_words(result: ExperimentResult, measure: int) -> list[Survival]:
    """Return whether each cell survives the correction; nothing for a measure without a test."""
    statistic, band = result.statistics[measure], result.control(measure)
    if statistic.test is None:
        return []
    by_zero = EFFECTS[result.measures[measure].effect].is_shown_by_zero
    weaker: Survival = "above band" if by_zero else "below band"
    survived, alike = is_significant(result, measure), is_within_random(result, measure)
    words: list[Survival] = []
    for cell, inert in enumerate(result.measures[measure].inert):
        if inert:
            words.append("inert")
        elif statistic.at_rounding[cell]:
            words.append("rounding")
        elif np.isnan(statistic.p_corrected[cell]):
            words.append("")
        elif alike[cell]:
            words.append("in band" if band is not None and band.inside[cell] else weaker)
        else:
            words.append("yes" if survived[cell] else "no")
    return words
