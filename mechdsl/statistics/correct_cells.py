"""p of all cells of an experiment, corrected together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.plural import several
from mechdsl.base.registry import Registry
from mechdsl.statistics.corrections import CORRECTIONS, by_maximum
from mechdsl.statistics.effect_parts import parts
from mechdsl.statistics.family_skewness import too_skewed
from mechdsl.statistics.measure_data import CellStatistics, MeasureData, Withheld
from mechdsl.statistics.sampling import Sampling, in_order, partitions
from mechdsl.statistics.units import units_of
from mechdsl.vocab.effect_kind import EffectKind


def with_corrected_p(
    measures: Sequence[MeasureData],
    found: Sequence[CellStatistics],
    sampling: Sampling,
    effects: Registry[EffectKind],
    *,
    picked: bool,
) -> list[CellStatistics]:
    """The same statistics with corrected p, of how many tests, and by which one; without where
    sites were `picked` on the same rows, or effects are too skewed for it."""
    p = np.concatenate([each.p for each in found])
    known = ~np.isnan(p)
    corrected, tests = p.copy(), int(known.sum())
    correction, moves = sampling.settings.correction, _moves(measures, found, sampling, effects)
    values, units = (
        np.concatenate([getattr(each, name) for each in found])[known] for name in ("mean", "units")
    )
    withheld: Withheld = "picked" if picked else ""
    if not picked and correction != "none":
        skewed = too_skewed(moves, values, units, sampling.settings.test)
        withheld = "skewed" if skewed else ""
    if withheld:
        corrected[known] = np.nan
    elif correction == "max":
        corrected[known] = by_maximum(p[known], moves, sampling.seed)
    else:
        corrected[known] = CORRECTIONS[correction](p[known])
    split = np.split(corrected, np.cumsum([len(each.p) for each in found])[:-1])
    return [
        replace(
            each,
            p_corrected=own,
            test=_test_in_words(data, sampling) if _has_p(data, effects) else None,
            tests=tests,
            withheld=withheld,
        )
        for data, each, own in zip(measures, found, split, strict=True)
    ]


def _has_p(data: MeasureData, effects: Registry[EffectKind]) -> bool:
    return data.kind == "number" and effects[data.effect].tested


def _moves(
    measures: Sequence[MeasureData],
    found: Sequence[CellStatistics],
    sampling: Sampling,
    effects: Registry[EffectKind],
) -> Floats:
    """[cell that has a p, unit]: how far each unit is from the cell's value. All cells share their
    units, so the coarsest are taken."""
    tested = [np.flatnonzero(~np.isnan(each.p)) for each in found]
    ordered = [in_order(data, sampling.order) for data in measures]
    own = sampling.ordered
    seen = [
        rows
        for data, cells in zip(ordered, tested, strict=True)
        for some, rows in partitions(data)
        if rows is not None and np.isin(some, cells).any()
    ]
    units = units_of([own.rows(*seen)])
    moves = [np.zeros((0, units.count))]
    for data, cells in zip(ordered, tested, strict=True):
        if len(cells):
            sums = parts(data, effects[data.effect], cells).sums(units)
            moves.append(sums.top - sums.value[:, None] * sums.bottom)
    return np.concatenate(moves)


_TESTS = {
    "t": "Student's t corrected for skewness",
    "flips": "sign flips; assumes that without an effect the deltas are symmetric about 0",
    "bootstrap": "inversion of the bootstrap-t interval",
}


def _test_in_words(data: MeasureData, sampling: Sampling) -> str:
    units = [sampling.units(seen) for _, seen in partitions(data)]
    most = max(units, key=lambda each: each.count)
    words = _TESTS[sampling.settings.test]
    return (
        f"two-sided, over {several(sampling.unit_word(most))}, by {words}; below the level exactly "
        "where the interval excludes 0"
    )
