"""Null bands: the effects of an experiment on targets that were drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.registry import Registry
from mechdsl.statistics.effect_parts import parts
from mechdsl.statistics.measure_data import MeasureData, NullBand
from mechdsl.vocab.effect_kind import EffectKind


def null_bands(
    measures: Sequence[MeasureData],
    drawn: Sequence[Floats],
    draws: int,
    what: str,
    *,
    confidence: float,
    effects: Registry[EffectKind],
) -> tuple[NullBand | None, ...]:
    """Per measure, between which ends the effects of the draws lie; None where there is none.

    measures: of the experiment itself. drawn: per measure, the patched values of its control,
    [draw and cell, prompt], the draws one after another.
    """
    return tuple(
        _band(data, values, draws, what, confidence, effects[data.effect])
        if data.kind == "number" and effects[data.effect].of_intervention
        else None
        for data, values in zip(measures, drawn, strict=True)
    )


def _band(
    data: MeasureData, values: Floats, draws: int, what: str, confidence: float, effect: EffectKind
) -> NullBand:
    cells, prompts = data.patched.shape
    each = [
        parts(replace(data, patched=own), effect, slice(None)).mean()
        for own in values.reshape(draws, cells, prompts)
    ]
    found = np.stack(each)
    found[~np.isfinite(found)] = np.nan
    low, mean, high = (np.full(cells, np.nan) for _ in range(3))
    known = ~np.isnan(found).all(axis=0)
    tail = (100 - confidence) / 2
    low[known], high[known] = np.nanpercentile(found[:, known], [tail, 100 - tail], axis=0)
    mean[known] = np.nanmean(found[:, known], axis=0)
    return NullBand(low=low, high=high, mean=mean, draws=draws, what=what)
