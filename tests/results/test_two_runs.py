"""The difference of one effect in two runs: its error, its interval, its p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from mechdsl.base.arrays import Floats
from mechdsl.results.estimates import Joined, OfSums, studentise_number
from mechdsl.statistics import two_runs
from mechdsl.statistics.bootstrap import studentise
from mechdsl.statistics.corrections import holm
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.sign_flips import sign_flip
from mechdsl.statistics.two_runs import Both, apart, apart_p, paired, paired_p
from mechdsl.statistics.units import Draws

CELLS, FAMILIES, LEVEL = 8, 250, 0.05
MOST_FALSE = 25
"""Of 250 families so many have a false positive in one of 10,000 simulations, at a level of 5 %."""


def sums(top: Floats, bottom: Floats | None = None) -> Sums:
    """[cell, unit]; of a mean without `bottom`."""
    bottom = np.ones((1, top.shape[1])) if bottom is None else bottom
    return Sums(top, bottom, np.full(len(top), top.shape[1]))


def samples(old: Sums, new: Sums) -> tuple[Both, np.ndarray]:
    """Two samples end to end, as the two runs of no common row are; the new one first."""
    ends = old.top.shape[1], new.top.shape[1]

    def wide(values: Floats, before: int, after: int) -> Floats:
        return np.pad(
            np.broadcast_to(values, (len(old.top), values.shape[1])), ((0, 0), (before, after))
        )

    sides = [
        Sums(wide(side.top, *around), wide(side.bottom, *around), side.held)
        for side, around in ((old, (ends[1], 0)), (new, (0, ends[0])))
    ]
    return Both(*sides), np.arange(sum(ends)) < ends[1]


def ratios(random: np.random.Generator, cells: int, units: int) -> Sums:
    """Half of what they are divided by, with noise."""
    bottom = random.normal(5, 1, (cells, units))
    return sums(bottom / 2 + random.normal(0, 1, bottom.shape), bottom)


# --- against what expectations are decided by -----------------------------------------------------


@pytest.mark.parametrize("strata", [None, np.arange(24) % 3], ids=["plain", "design"])
@pytest.mark.parametrize("shared", [True, False], ids=["one divisor", "two divisors"])
def test_a_difference_is_that_of_an_expectation(strata: np.ndarray | None, shared: bool) -> None:
    """`expect recovery - recovery of other < 0` has the same error, draws and interval."""
    random = np.random.default_rng(0)
    old = ratios(random, 3, 24)
    bottom = old.bottom if shared else old.bottom + random.normal(0, 0.3, old.bottom.shape)
    both = Both(old, sums(old.top + random.normal(0.2, 0.3, old.top.shape), bottom))
    draws = Draws(24, 500, 0, strata)
    found = paired(both, draws)
    for cell in range(3):
        sides = [OfSums(side.chosen(np.array([cell])), np.ones(1)) for side in (both.new, both.old)]
        wanted = studentise_number(Joined("-", *sides), draws, 24)
        assert found.value[cell] == pytest.approx(wanted.value[0], rel=1e-12)
        assert found.error[cell] == pytest.approx(wanted.error[0], rel=1e-12)
        np.testing.assert_allclose(found.pivots[:, cell], wanted.pivots[:, 0], rtol=1e-9, atol=1e-9)
        assert found.freedom[cell] == wanted.freedom[0]


def test_a_difference_of_means_is_the_mean_of_differences() -> None:
    random = np.random.default_rng(1)
    old = random.normal(0, 1, (4, 20))
    new = old + random.normal(0.1, 0.3, old.shape)
    draws = Draws(20, 500, 0)
    found, wanted = paired(Both(sums(old), sums(new)), draws), studentise(sums(new - old), draws)
    np.testing.assert_allclose(found.interval(95), wanted.interval(95), rtol=1e-9)
    flips = paired_p(Both(sums(old), sums(new)), 4, 0, LEVEL)
    np.testing.assert_array_equal(flips.p, sign_flip(new - old, 4, 0, LEVEL).p)


def test_a_tiny_difference_keeps_its_digits() -> None:
    random = np.random.default_rng(2)
    old = ratios(random, 2, 24)
    moved = [1e-10 * random.normal(1, 1, (2, 24)) for _ in range(2)]
    both = Both(old, sums(old.top + moved[0], old.bottom + moved[1]))
    low, high = paired(both, Draws(24, 500, 0)).interval(95)
    for cell in range(2):
        sides = [OfSums(side.chosen(np.array([cell])), np.ones(1)) for side in (both.new, both.old)]
        wanted = studentise_number(Joined("-", *sides), Draws(24, 500, 0), 24).interval(95)
        np.testing.assert_allclose([low[cell], high[cell]], np.ravel(wanted), rtol=0.02)


def test_one_change_in_every_unit_has_an_interval_of_no_width_and_a_p() -> None:
    old = np.random.default_rng(3).normal(0, 1, (1, 10))
    both = Both(sums(old), sums(old + 0.25))
    found = paired(both, Draws(10, 2000, 0))
    assert found.error[0] == 0
    np.testing.assert_allclose(np.ravel(found.interval(95)), 0.25)
    assert paired_p(both, 1, 0, LEVEL).p[0] == 2.0**-9
    assert found.p()[0][0] == 2.0**-9


def test_a_ratio_that_stays_is_no_change_though_both_its_means_move() -> None:
    old = ratios(np.random.default_rng(4), 1, 16)
    both = Both(old, sums(3 * old.top, 3 * old.bottom))
    assert paired(both, Draws(16, 200, 0)).value[0] == pytest.approx(0, abs=1e-12)
    assert paired_p(both, 1, 0, LEVEL).p[0] > 0.2


def test_two_samples_have_the_error_and_the_freedom_of_welch() -> None:
    from scipy.stats import ttest_ind

    random = np.random.default_rng(5)
    old, new = random.normal(0, 3, (1, 9)), random.normal(1, 1, (1, 30))
    both, of_new = samples(sums(old), sums(new))
    found = apart(both, of_new, Draws(39, 200, 0))
    wanted = ttest_ind(new[0], old[0], equal_var=False)
    assert found.ratio[0] == pytest.approx(wanted.statistic, rel=1e-9)
    assert found.freedom[0] == int(wanted.df)
    assert apart_p(both, of_new, 1, 0, LEVEL).p[0] >= wanted.pvalue


def test_two_samples_are_drawn_each_by_itself() -> None:
    random = np.random.default_rng(7)
    old, new = random.normal(0, 1, (1, 9)), random.normal(1, 1, (1, 12))
    both, of_new = samples(sums(old), sums(new))
    found = apart(both, of_new, Draws(21, 40, 0))
    (weights,) = Draws(21, 40, 0, np.where(of_new, 0, 1)).weights()
    for number, times in enumerate(weights.astype(int)):
        drawn = [np.repeat(v[0], t) for v, t in ((new, times[:12]), (old, times[12:]))]
        assert [len(each) for each in drawn] == [12, 9]
        spread = np.sqrt(sum(each.var(ddof=1) / len(each) for each in drawn))
        moved = drawn[0].mean() - drawn[1].mean() - (new.mean() - old.mean())
        assert found.pivots[number, 0] == pytest.approx(moved / spread, rel=1e-9)


@pytest.mark.parametrize("tied", [True, False], ids=["shares", "numbers"])
def test_p_of_two_samples_is_the_share_of_all_deals_as_far_from_0(tied: bool) -> None:
    random = np.random.default_rng(31)
    old = np.array([[0.0, 0, 0, 1, 0, 0, 1, 0, 0]]) if tied else random.normal(0, 1, (1, 9))
    new = np.array([[1.0, 1, 0]]) if tied else random.normal(0.5, 2, (1, 3))
    both, of_new = samples(sums(old), sums(new))
    every = np.concatenate([new[0], old[0]])

    def ratio(chosen: Sequence[int]) -> float:
        sides = every[list(chosen)], np.delete(every, list(chosen))
        apart = abs(sides[0].mean() - sides[1].mean())
        spread = float(np.sqrt(sum(each.var(ddof=1) / len(each) for each in sides)))
        return apart / spread if spread else np.inf

    own = ratio(range(3))
    deals = [ratio(chosen) >= own * (1 - 1e-9) for chosen in combinations(range(12), 3)]
    found = two_runs.apart_p(both, of_new, 1, 0, LEVEL).p[0]
    assert found == pytest.approx(np.mean(deals), rel=0.03)


def test_two_samples_that_are_flat_and_differ_are_told_apart() -> None:
    both, of_new = samples(sums(np.zeros((1, 8))), sums(np.ones((1, 8))))
    assert apart_p(both, of_new, 1, 0, LEVEL).p[0] == pytest.approx(2 / 12870, abs=4e-4)
    same, _ = samples(sums(np.ones((1, 8))), sums(np.ones((1, 8))))
    assert apart_p(same, of_new, 1, 0, LEVEL).p[0] == 1


def test_welch_stands_in_where_deals_are_too_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.stats import ttest_ind

    random = np.random.default_rng(6)
    old, new = random.normal(0, 1, (1, 12)), random.normal(1, 1, (1, 12))
    both, of_new = samples(sums(old), sums(new))
    monkeypatch.setattr(two_runs, "MOST_WORK", 0)
    found = apart_p(both, of_new, 1, 0, LEVEL)
    wanted = ttest_ind(new[0], old[0], equal_var=False).pvalue
    assert found.p[0] == pytest.approx(wanted, rel=0.05)  # degrees of freedom are whole here


# --- how often it is wrong ------------------------------------------------------------------------


def false_families(p: Floats) -> int:
    """In how many families any cell is found."""
    return sum(bool(holm(family).min() < LEVEL) for family in p.reshape(FAMILIES, CELLS))


Noise = Callable[[np.random.Generator, tuple[int, int]], Floats]
SYMMETRIC: dict[str, Noise] = {
    "normal": lambda random, size: random.normal(0, 1, size),
    "heavy tails": lambda random, size: random.standard_t(3, size),
    "rare": lambda random, size: random.normal(0, 1, size) * (random.random(size) < 0.3),
}
ANY: dict[str, Noise] = {
    "normal": SYMMETRIC["normal"],
    "exponential": lambda random, size: random.exponential(1, size),
    "shares": lambda random, size: (random.random(size) < 0.9).astype(np.float64),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_noise_on_the_same_rows_is_no_change(name: str) -> None:
    random = np.random.default_rng(10)
    old = random.normal(0, 1, (FAMILIES * CELLS, 12))
    both = Both(sums(old), sums(old + SYMMETRIC[name](random, old.shape)))
    assert false_families(paired_p(both, CELLS, 0, LEVEL).p) <= MOST_FALSE


def test_noise_in_ratios_of_the_same_rows_is_no_change() -> None:
    random = np.random.default_rng(11)
    true = random.normal(5, 1, (FAMILIES * CELLS, 12))

    def run() -> Sums:
        bottom = true + random.normal(0, 0.5, true.shape)
        return sums(bottom / 2 + random.normal(0, 1, true.shape), bottom)

    both = Both(run(), run())
    assert false_families(paired_p(both, CELLS, 0, LEVEL).p) <= MOST_FALSE
    low, high = paired(both, Draws(12, 500, 0)).interval(95)
    assert np.mean((low <= 0) & (high >= 0)) > 0.93


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("sizes", [(12, 12), (6, 24)], ids=["as many", "fewer and more"])
def test_two_draws_of_rows_are_no_change(name: str, sizes: tuple[int, int]) -> None:
    random = np.random.default_rng(12)
    old, new = (sums(ANY[name](random, (FAMILIES * CELLS, n))) for n in sizes)
    both, of_new = samples(old, new)
    assert false_families(apart_p(both, of_new, CELLS, 0, LEVEL).p) <= MOST_FALSE


def test_two_draws_of_ratios_are_no_change() -> None:
    random = np.random.default_rng(13)
    both, of_new = samples(*(ratios(random, FAMILIES * CELLS, n) for n in (10, 16)))
    assert false_families(apart_p(both, of_new, CELLS, 0, LEVEL).p) <= MOST_FALSE
    low, high = apart(both, of_new, Draws(26, 500, 0)).interval(95)
    assert np.mean((low <= 0) & (high >= 0)) > 0.93


def test_another_spread_alone_is_no_change() -> None:
    """Dealt anew they would look alike; Welch's t knows better."""
    random = np.random.default_rng(14)
    old = sums(random.normal(0, 3, (FAMILIES * CELLS, 8)))
    both, of_new = samples(old, sums(random.normal(0, 1, (FAMILIES * CELLS, 32))))
    assert false_families(apart_p(both, of_new, CELLS, 0, LEVEL).p) <= MOST_FALSE


def test_a_change_is_found() -> None:
    random = np.random.default_rng(15)
    old = random.normal(0, 1, (FAMILIES * CELLS, 16))
    moved = old + random.normal(0.5, 0.3, old.shape)
    found = paired_p(Both(sums(old), sums(moved)), CELLS, 0, LEVEL).p
    assert np.mean(found < LEVEL / CELLS) > 0.95
    both, of_new = samples(sums(old), sums(random.normal(2, 1, old.shape)))
    assert np.mean(apart_p(both, of_new, CELLS, 0, LEVEL).p < LEVEL / CELLS) > 0.95
