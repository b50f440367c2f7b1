"""Corrections of p-values for many comparisons, over all cells of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.records import Registry
from mechdsl.base.text import plural_noun
from mechdsl.statistics.measurements import (
    BLOCK_NUMBERS,
    CellStatistics,
    MeasureData,
    SamplingDesign,
    WithheldReason,
    cells_by_view,
    effect_parts,
    find_units,
    reorder_rows,
)
from mechdsl.vocab.metrics import EffectKind

MULTIPLIER_DRAWS = 10_000
"""Number of joint normal draws of `correct_by_maximum`."""


def holm(p: Floats) -> Floats:
    """Apply Holm's step-down correction, which controls the family-wise error rate."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def benjamini_hochberg(p: Floats) -> Floats:
    """Apply Benjamini and Hochberg's step-up correction of the false discovery rate."""
    from scipy.stats import false_discovery_control  # not at the top: slow to import

    return false_discovery_control(p)


def correct_by_maximum(p: Floats, moves: Floats, seed: int) -> Floats:
    """Apply a step-down correction that accounts for the correlation of cells over units.

    Each p is converted to a normal score, and the scores of cells are as correlated as their units.
    The maximum is simulated with Gaussian multipliers (Chernozhukov, Chetverikov and Kato 2013),
    and each cell is compared with the largest of those with no smaller p (Westfall and Young 1993,
    algorithm 4.1). With few units any cells appear correlated, so correlations are shrunk by the
    share that chance explains (Schäfer and Strimmer 2005).

    Args:
        p: Shape [cell].
        moves: Deviation of each unit from the cell's value, shape [cell, unit].
        seed: Seed of the draws.

    Returns:
        Corrected p, no smaller than p. Shape [cell].
    """
    from scipy.special import ndtri  # not at the top: slow to import

    if not len(p):
        return p.copy()
    size = np.sqrt((moves**2).sum(1, keepdims=True))
    unit = np.divide(moves, size, out=np.zeros_like(moves), where=size > 0)
    score = -ndtri(np.maximum(p, 1e-300) / 2)
    order = np.argsort(-score, kind="stable")
    unit, score = unit[order], score[order]
    still = size[order, 0] == 0
    chance = _due_to_chance(unit[~still])
    random = np.random.default_rng([4, seed % 2**63])
    extreme, done = np.zeros(len(p), dtype=np.int64), 0
    step = max(1, BLOCK_NUMBERS // max(len(p), unit.shape[1]))
    while done < MULTIPLIER_DRAWS:
        count = min(step, MULTIPLIER_DRAWS - done)
        shared = random.standard_normal((count, unit.shape[1])) @ unit.T
        own = random.standard_normal((count, len(p)))
        drawn = np.abs(np.sqrt(1 - chance) * shared + np.sqrt(chance) * own)
        largest = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= score, axis=0)
        done += len(drawn)
    joint = np.maximum.accumulate((extreme + 1) / (MULTIPLIER_DRAWS + 1))
    # Cells without variation between units are excluded from the draws; use Bonferroni's
    # correction.
    joint = np.where(still, np.minimum(1.0, p[order] * len(p)), joint)
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.maximum(joint, p[order]))
    return corrected


def _due_to_chance(unit: Floats) -> float:
    """Return the share of the squared correlations that uncorrelated cells with as many units would
    have, at most 1.

    Args:
        unit: Rows of length 1, shape [cell, unit].
    """
    cells, units = unit.shape
    pairs = cells * (cells - 1)
    squared = float(((unit.T @ unit) ** 2).sum()) - cells
    if units < 2 or squared <= 0:
        return 1.0
    return min(1.0, pairs / (units - 1) / squared)


CORRECTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": np.copy,
}
"""Corrections of `stats correct WORD` for all p of an experiment; `max` needs more than p."""

MIN_SKEWED_CELLS = 8
"""Minimum number of cells for the skewness check: with fewer, the smallest p isn't extreme enough
for skewness to matter, and skewness is poorly known."""

SKEWNESS_LIMITS: Mapping[str, tuple[float, float]] = {
    "t": (0.65, 0.4),
    "flips": (0.49, 0.2),
    "bootstrap": (0.49, 0.2),
}
"""`stats test` → (a, b): with n units and a median skewness above a nᵇ, more than 6 % of families
without an effect have a significant cell. From simulation (`benchmarks/coverage`)."""

EFFECT_SIGN_SHARE = 0.7
"""Minimum share of the skewness with the sign of its cell's effect, minus the rest, that is
attributed to an effect in few rows. Such skewness isn't counted against the level."""


def is_too_skewed(moves: Floats, value: Floats, units: Ints, test: str) -> bool:
    """Whether the family's level isn't controlled.

    A sample understates its skewness exactly where its mean is misleading, so one cell can't be
    judged by its own units; the family can.

    Args:
        moves: Deviation of each unit from the cell's value, shape [cell, unit].
        value: The effects, shape [cell].
        units: Number of units, shape [cell].
        test: The word after `stats test`.
    """
    if len(moves) < MIN_SKEWED_CELLS:
        return False
    size = np.sqrt((moves**2).sum(1) / units)
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = np.nan_to_num((moves**3).sum(1) / units / size**3)
    total = float(np.abs(skew).sum())
    factor, power = SKEWNESS_LIMITS[test]
    if float(np.median(np.abs(skew))) <= factor * float(np.median(units)) ** power:
        return False
    return float((np.sign(value) * skew).sum()) < EFFECT_SIGN_SHARE * total


def add_corrected_p(
    measures: Sequence[MeasureData],
    statistics: Sequence[CellStatistics],
    sampling: SamplingDesign,
    effects: Registry[EffectKind],
    *,
    exact: Sequence[Bools],
    first: Sequence[Ints],
    picked: bool,
) -> list[CellStatistics]:
    """Add corrected p, the number of tests and the method.

    There is no corrected p if sites were `picked` on the same rows, for measures whose cells are
    too skewed for the method, and for cells of equal units. Limits of shares are exact, so their p
    hold their level however skewed they are. They are corrected as if each withheld p were 1.

    Args:
        exact: For each measure, the cells whose p comes from exact limits of shares, shape [cell].
        first: For each measure, the first cell with the same number, shape [cell]. A number is one
            test.
        picked: Whether sites were selected on the same rows.
    """
    p, share = np.concatenate([statistic.p for statistic in statistics]), np.concatenate(exact)
    equal = np.concatenate([statistic.equal for statistic in statistics])
    every, lengths = range(len(statistics)), [len(statistic.p) for statistic in statistics]
    known = np.concatenate([statistic.tested & ~statistic.repeated for statistic in statistics])
    of = np.repeat(list(every), lengths)
    correction, moves = (
        sampling.settings.correction,
        _moves(measures, statistics, sampling, effects),
    )
    values, units = (
        np.concatenate([getattr(statistic, name) for statistic in statistics])[known]
        for name in ("mean", "units")
    )
    withheld: list[WithheldReason] = ["picked" if picked else "" for _ in every]
    if not picked and correction != "none":
        by_method = ~share[known]
        cells = moves[by_method], values[by_method], units[by_method]
        if is_too_skewed(*cells, sampling.settings.test):
            skewed = np.unique(of[known & ~share])
            withheld = ["skewed" if each in skewed else "" for each in every]
    hidden = known & (np.array([bool(each) for each in withheld])[of] | equal)
    corrected = np.where(hidden, 1.0, p)
    if correction == "max":
        corrected[known] = correct_by_maximum(corrected[known], moves, sampling.seed)
    else:
        corrected[known] = CORRECTIONS[correction](corrected[known])
    corrected[hidden] = np.nan
    own = np.split(corrected, np.cumsum(lengths)[:-1])
    return [
        replace(
            statistic,
            p_corrected=own[measure][first[measure]],
            test=_test_in_words(data, sampling, share[known])
            if data.kind == "number" and effects[data.effect].tested
            else None,
            tests=int(known.sum()),
            withheld=withheld[measure],
        )
        for measure, (data, statistic) in enumerate(zip(measures, statistics, strict=True))
    ]


def _moves(
    measures: Sequence[MeasureData],
    statistics: Sequence[CellStatistics],
    sampling: SamplingDesign,
    effects: Registry[EffectKind],
) -> Floats:
    """Return the deviation of each unit from the cell's value. Shape [tested number, unit]. Cells
    must share their units, so the coarsest units are used."""
    tested = [np.flatnonzero(statistic.tested & ~statistic.repeated) for statistic in statistics]
    ordered = [reorder_rows(data, sampling.order) for data in measures]
    design = sampling.ordered
    seen = [
        rows
        for data, cells in zip(ordered, tested, strict=True)
        for some, rows in cells_by_view(data)
        if rows is not None and np.isin(some, cells).any()
    ]
    units = find_units([design.rows(*seen)])
    moves = [np.zeros((0, units.count))]
    for data, cells in zip(ordered, tested, strict=True):
        if len(cells):
            sums = effect_parts(data, effects[data.effect], cells).sums(units)
            moves.append(sums.top - sums.value[:, None] * sums.bottom)
    return np.concatenate(moves)


_TESTS = {
    "t": "Student's t corrected for skewness",
    "flips": "sign flips; assumes that without an effect the deltas are symmetric about 0",
    "bootstrap": "inversion of the bootstrap-t interval",
}


def _test_in_words(data: MeasureData, sampling: SamplingDesign, exact: Bools) -> str:
    """Return the methods of p of all tested cells; `exact` are those with exact limits of
    shares."""
    units = [sampling.units(seen) for _, seen in cells_by_view(data)]
    most = max(units, key=lambda each: each.count)
    words = "by the exact limits of shares"
    if not exact.all():
        by_method = f"by {_TESTS[sampling.settings.test]}"
        words = f"of shares {words}, of others {by_method}" if exact.any() else by_method
    return (
        f"two-sided, over {plural_noun(sampling.unit_word(most))}, {words}; "
        "below the level exactly where the interval excludes 0"
    )
