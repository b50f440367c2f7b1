"""The difference of one effect in two runs: its error, its interval, its p."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mechdsl.base.arrays import Floats
from mechdsl.statistics.comparisons import RunPair, paired_difference, unpaired_difference
from mechdsl.statistics.corrections import holm
from mechdsl.statistics.intervals import skewed_t
from mechdsl.statistics.measurements import EffectSums

CELLS, FAMILIES, LEVEL = 8, 250, 0.05
MOST_FALSE = 25
"""At 5 %, this number of families with a false positive has a probability of 0.0001."""


def sums(top: Floats, bottom: Floats | None = None) -> EffectSums:
    """[cell, unit]; of a mean without `bottom`."""
    bottom = np.ones((1, top.shape[1])) if bottom is None else bottom
    return EffectSums(top, bottom, np.full(len(top), top.shape[1]))


def samples(old: EffectSums, new: EffectSums) -> tuple[RunPair, np.ndarray]:
    """Concatenate two samples without common rows, the new sample first."""
    ends = old.top.shape[1], new.top.shape[1]

    def wide(values: Floats, before: int, after: int) -> Floats:
        return np.pad(
            np.broadcast_to(values, (len(old.top), values.shape[1])), ((0, 0), (before, after))
        )

    sides = [
        EffectSums(wide(side.top, *around), wide(side.bottom, *around), side.held)
        for side, around in ((old, (ends[1], 0)), (new, (0, ends[0])))
    ]
    return RunPair(*sides), np.arange(sum(ends)) < ends[1]


def ratios(random: np.random.Generator, cells: int, units: int) -> EffectSums:
    """Ratios of 0.5 with noise."""
    bottom = random.normal(5, 1, (cells, units))
    return sums(bottom / 2 + random.normal(0, 1, bottom.shape), bottom)


# --- paired units ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strata", [None, np.arange(24) % 3], ids=["plain", "design"])
def test_paired_means_equal_the_test_of_their_differences(strata: np.ndarray | None) -> None:
    random = np.random.default_rng(1)
    old = random.normal(0, 1, (4, 24))
    new = old + random.exponential(0.3, old.shape)
    found = paired_difference(RunPair(sums(old), sums(new)), strata)
    wanted = skewed_t(sums(new - old), strata)
    np.testing.assert_allclose(found.interval(95, 5), wanted.interval(95, 5), rtol=1e-9)
    np.testing.assert_allclose(found.p(), wanted.p(), rtol=1e-9)


def test_paired_ratios_have_the_error_of_a_jackknife() -> None:
    random = np.random.default_rng(2)
    old = ratios(random, 1, 60)
    new = sums(old.top + random.normal(0.2, 0.3, old.top.shape), old.bottom)
    found = paired_difference(RunPair(old, new), None)
    left_out = [
        np.delete(new.top[0], u).sum() / np.delete(new.bottom[0], u).sum()
        - np.delete(old.top[0], u).sum() / np.delete(old.bottom[0], u).sum()
        for u in range(60)
    ]
    jackknife = np.sqrt(59 / 60 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert np.sqrt(found.squares[0, 0]) == pytest.approx(jackknife, rel=0.03)


def test_tiny_difference_keeps_its_precision() -> None:
    random = np.random.default_rng(2)
    old = random.normal(0, 1, (1, 24))
    moved = 1e-10 * random.normal(1, 1, (1, 24))
    found = paired_difference(RunPair(sums(old), sums(old + moved)), None).interval(95, 5)
    wanted = skewed_t(sums(moved)).interval(95, 5)
    np.testing.assert_allclose(np.ravel(found), np.ravel(wanted), rtol=1e-4)


def test_identical_shift_in_every_unit_has_a_zero_width_interval_and_a_p() -> None:
    old = np.random.default_rng(3).normal(0, 1, (1, 10))
    found = paired_difference(RunPair(sums(old), sums(old + 0.25)), None)
    np.testing.assert_allclose(np.ravel(found.interval(95, 5)), 0.25)
    assert found.p()[0] == 2.0**-9


def test_constant_ratio_of_moving_means_has_no_difference() -> None:
    old = ratios(np.random.default_rng(4), 1, 16)
    found = paired_difference(RunPair(old, sums(3 * old.top, 3 * old.bottom)), None)
    assert found.value[0] == pytest.approx(0, abs=1e-12)
    assert found.p()[0] > 0.2


# --- two samples ----------------------------------------------------------------------------------


def test_two_samples_have_the_error_and_the_freedom_of_welch() -> None:
    from scipy.stats import ttest_ind

    random = np.random.default_rng(5)
    old, new = random.normal(0, 3, (1, 9)), random.normal(1, 1, (1, 30))
    both, of_new = samples(sums(old), sums(new))
    found = unpaired_difference(both, of_new)
    wanted = ttest_ind(new[0], old[0], equal_var=False)
    assert found.statistic(-found.value)[0][0] == pytest.approx(wanted.statistic, rel=1e-9)
    assert found.freedom[0] == pytest.approx(wanted.df, rel=1e-9)
    assert found.p()[0] >= wanted.pvalue


def test_two_samples_have_the_third_cumulant_of_their_difference() -> None:
    """The cumulant is that of the new mean minus that of the old mean."""
    random = np.random.default_rng(6)
    old, new = random.exponential(1, (1, 30)), random.exponential(2, (1, 20))
    both, of_new = samples(sums(old), sums(new))
    found = unpaired_difference(both, of_new)

    def cumulant(values: np.ndarray) -> float:
        n = len(values)
        third = n / (n - 1) / (n - 2) * ((values - values.mean()) ** 3).sum()
        return float(third / n**2)

    assert found.cubes[0, 0] == pytest.approx(cumulant(new[0]) - cumulant(old[0]), rel=1e-9)


def test_p_of_two_constant_samples_is_that_of_their_signs() -> None:
    both, of_new = samples(sums(np.zeros((1, 8))), sums(np.ones((1, 8))))
    assert unpaired_difference(both, of_new).p()[0] == 2.0**-7
    same, _ = samples(sums(np.ones((1, 8))), sums(np.ones((1, 8))))
    assert unpaired_difference(same, of_new).p()[0] == 1


# --- error rates ----------------------------------------------------------------------------------


def false_families(p: Floats) -> int:
    """Return the number of families with a significant cell."""
    return sum(bool(holm(family).min() < LEVEL) for family in p.reshape(FAMILIES, CELLS))


Noise = Callable[[np.random.Generator, tuple[int, int]], Floats]
PAIRED: dict[str, Noise] = {
    "normal": lambda random, size: random.normal(0, 1, size),
    "heavy tails": lambda random, size: random.standard_t(3, size),
    "rare": lambda random, size: random.normal(0, 1, size) * (random.random(size) < 0.3),
}
ANY: dict[str, Noise] = {
    "normal": PAIRED["normal"],
    "exponential": lambda random, size: random.exponential(1, size),
    "shares": lambda random, size: (random.random(size) < 0.9).astype(np.float64),
}


@pytest.mark.parametrize("name", PAIRED)
def test_noise_on_paired_rows_is_rarely_significant(name: str) -> None:
    random = np.random.default_rng(10)
    old = random.normal(0, 1, (FAMILIES * CELLS, 12))
    both = RunPair(sums(old), sums(old + PAIRED[name](random, old.shape)))
    assert false_families(paired_difference(both, None).p()) <= MOST_FALSE


def test_noise_in_paired_ratios_is_rarely_significant() -> None:
    random = np.random.default_rng(11)
    true = random.normal(5, 1, (FAMILIES * CELLS, 12))

    def run() -> EffectSums:
        bottom = true + random.normal(0, 0.5, true.shape)
        return sums(bottom / 2 + random.normal(0, 1, true.shape), bottom)

    both = RunPair(run(), run())
    assert false_families(paired_difference(both, None).p()) <= MOST_FALSE
    low, high = paired_difference(both, None).interval(95, 5)
    assert np.mean((low <= 0) & (high >= 0)) > 0.93


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("sizes", [(12, 12), (6, 24)], ids=["as many", "fewer and more"])
def test_two_samples_of_one_distribution_rarely_differ(name: str, sizes: tuple[int, int]) -> None:
    random = np.random.default_rng(12)
    old, new = (sums(ANY[name](random, (FAMILIES * CELLS, n))) for n in sizes)
    both, of_new = samples(old, new)
    assert false_families(unpaired_difference(both, of_new).p()) <= MOST_FALSE


def test_two_samples_of_ratios_rarely_differ() -> None:
    random = np.random.default_rng(13)
    both, of_new = samples(*(ratios(random, FAMILIES * CELLS, n) for n in (10, 16)))
    assert false_families(unpaired_difference(both, of_new).p()) <= MOST_FALSE
    low, high = unpaired_difference(both, of_new).interval(95, 5)
    assert np.mean((low <= 0) & (high >= 0)) > 0.93


def test_samples_with_different_variance_alone_rarely_differ() -> None:
    random = np.random.default_rng(14)
    old = sums(random.normal(0, 3, (FAMILIES * CELLS, 8)))
    both, of_new = samples(old, sums(random.normal(0, 1, (FAMILIES * CELLS, 32))))
    assert false_families(unpaired_difference(both, of_new).p()) <= MOST_FALSE


def test_real_difference_is_significant() -> None:
    random = np.random.default_rng(15)
    old = random.normal(0, 1, (FAMILIES * CELLS, 16))
    moved = old + random.normal(0.75, 0.3, old.shape)
    found = paired_difference(RunPair(sums(old), sums(moved)), None).p()
    assert np.mean(found < LEVEL / CELLS) > 0.95
    both, of_new = samples(sums(old), sums(random.normal(2.2, 1, old.shape)))
    assert np.mean(unpaired_difference(both, of_new).p() < LEVEL / CELLS) > 0.95
