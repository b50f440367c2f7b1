"""Null bands: the effects of an experiment on randomly drawn targets.

k draws are made without replacement with equal probability of each target, so they and one further
draw are exchangeable: each of the k + 1 is the r-th lowest with the same probability. So the range
from the r-th lowest to the r-th highest of k contains a further draw with probability
(k + 1 − 2r)/(k + 1), and more with ties (order statistics, Wilks 1941; the conformal prediction
interval of Vovk, Gammerman and Shafer 2005). The rank p is Phipson and Smyth's (2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.records import Registry
from mechdsl.statistics.measurements import (
    MeasureData,
    NullBand,
    RandomControlValues,
    effect_parts,
    rounding_slack,
)
from mechdsl.vocab.metrics import EffectKind


def compute_null_bands(
    measures: Sequence[MeasureData],
    drawn: RandomControlValues,
    *,
    means: Sequence[Floats],
    rounding: Sequence[Floats],
    confidence: float,
    effects: Registry[EffectKind],
) -> tuple[NullBand | None, ...]:
    """Compute the band of draws of every cell, per measure; None for categories, and for effects
    that don't depend on the intervention.

    Args:
        measures: Measures of the experiment itself.
        means: Printed means of each measure, shape [cell]. If one is missing (a ratio whose
            denominator can't be distinguished from 0), draws have none either, and there is no
            band.
        rounding: Maximum effect of rounding on each mean, shape [cell]; NaN if unknown. Effects
            that differ by no more than rounding are equal.
        confidence: In percent.
    """
    return tuple(
        _band(data, (mean, rounding_slack(bound)), values, drawn, confidence, effects[data.effect])
        if data.kind == "number" and data.missing is None and effects[data.effect].of_intervention
        else None
        for data, mean, bound, values in zip(measures, means, rounding, drawn.values, strict=True)
    )


def band_rank(draws: int, confidence: float) -> int:
    """Return r: the band is from the r-th lowest to the r-th highest draw. It is the largest rank
    whose band contains a further draw with the confidence, in percent; 1, the whole range, if none
    does."""
    return max(1, int(_outside(confidence) * (draws + 1) / 2))


def min_draws(confidence: float) -> int:
    """Return the smallest number of draws whose whole range contains a further one with the
    confidence, in percent: 39 at 95 %."""
    return ceil(2 / _outside(confidence)) - 1


def _outside(confidence: float) -> Fraction:
    return 1 - Fraction(str(confidence)) / 100


def band_level(draws: int, rank: int) -> float:
    """Return the probability that a band of this rank contains a further draw."""
    return max(0, draws + 1 - 2 * rank) / (draws + 1)


def rank_p(own: float, draws: Floats, *, near_zero: bool = False, slack: float = 0.0) -> float:
    """Return two-sided p by absolute value: (1 + b)/(1 + k), where b of the k draws, shape [k], are
    at least as far from 0 as the effect, or with `near_zero` at least as near. At least 1/(1 + k).

    Args:
        slack: Sizes that differ by no more than this are equal.
    """
    sizes, size = np.abs(draws), abs(own)
    beyond = sizes <= size + slack if near_zero else sizes >= size - slack
    return (1 + int(np.count_nonzero(beyond))) / (1 + len(draws))


def _band(
    data: MeasureData,
    printed: tuple[Floats, Floats],
    values: Floats,
    drawn: RandomControlValues,
    confidence: float,
    effect: EffectKind,
) -> NullBand:
    """Compute one band. `printed`: means and their `rounding_slack`, both [cell]; `values`: [draw,
    cell, prompt]."""
    own, slack = printed
    cells = len(data.patched)

    def means(patched: Floats) -> Floats:
        averages = effect_parts(replace(data, patched=patched), effect, slice(None)).mean()
        return np.where(np.isfinite(averages) & np.isfinite(own), averages, np.nan)

    each = [means(one) for one in values]
    found = np.stack(each) if each else np.full((0, cells), np.nan)
    low, mean, high, level, p = (np.full(cells, np.nan) for _ in range(5))
    draws = np.zeros(cells, dtype=np.int64)
    rank = np.ones(cells, dtype=np.int64)
    for cell in range(cells):
        here = np.sort(found[~np.isnan(found[:, cell]), cell])
        k = draws[cell] = len(here)
        if not k:
            continue
        rank[cell] = r = band_rank(k, confidence)
        low[cell], high[cell], mean[cell] = here[r - 1], here[k - r], here.mean()
        level[cell] = band_level(k, r)
        if effect.tested and drawn.title != "untrained":
            near_zero, size = effect.is_shown_by_zero, float(own[cell])
            p[cell] = rank_p(size, here, near_zero=near_zero, slack=float(slack[cell]))
    with np.errstate(invalid="ignore"):
        below, above = own < low - slack, own > high + slack
        inside = ~(below | above) & ~np.isnan(own) & (draws > 0)
        nearer = ((own >= 0) & below) | ((own <= 0) & above)
        farther = ((own >= 0) & above) | ((own <= 0) & below)
    return NullBand(
        low=low,
        high=high,
        mean=mean,
        draws=draws,
        level=level,
        rank=rank,
        p=p,
        inside=inside,
        weaker=farther if effect.is_shown_by_zero else nearer,
        made=drawn.counts,
        asked=drawn.asked,
        what=drawn.what,
        fewest=min_draws(confidence),
        title=drawn.title,
    )
