"""The sign-flip test and the corrections against scipy and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from mechdsl.statistics.corrections import CORRECTIONS, benjamini_hochberg, holm
from mechdsl.statistics.sign_flips import (
    by_saddlepoint,
    flips_for,
    flips_in_words,
    largest_flip,
    saddlepoint,
    sign_flip,
)
from mechdsl.validate.reachable_p import check_cells, out_of_reach

from .synthetic import SPAN, statistics


def scipy_p(deltas: np.ndarray) -> float:
    found = stats.permutation_test(
        (deltas, np.zeros_like(deltas)),
        lambda a, b, axis: np.sum(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    )
    return float(found.pvalue)


@pytest.mark.parametrize("n", [2, 5, 9, 12])
def test_exact_p_is_scipys(n: int) -> None:
    deltas = np.random.default_rng(n).normal(0.5, 1, (3, n))
    assert sign_flip(deltas, 3, 0).p == pytest.approx([scipy_p(row) for row in deltas])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (2, 6), elements=st.integers(-3, 3).map(float)))
def test_exact_p_with_ties_and_zeros(deltas: np.ndarray) -> None:
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    expected = (np.abs(signs @ deltas.T) >= np.abs(deltas.sum(1))).mean(0)
    assert sign_flip(deltas, 2, 0).p == pytest.approx(expected)


def test_zeros_pad_a_cell_of_few_prompts() -> None:
    deltas = np.zeros((1, 60))
    deltas[0, 10:15] = [1.0, 2.0, -0.5, 1.5, 3.0]
    assert sign_flip(deltas, 1, 0).p == pytest.approx([scipy_p(deltas[0, 10:15])])


def test_random_flips_come_near_and_are_never_zero() -> None:
    random = np.random.default_rng(0)
    deltas = random.normal(0.4, 1, (4, 30))
    p = sign_flip(deltas, 4, 0).p
    z = np.abs(deltas.sum(1)) / np.sqrt((deltas**2).sum(1))
    assert p == pytest.approx(2 * stats.norm.sf(z), abs=0.02)
    found = sign_flip(np.ones((1, 30)), 1, 0)
    assert found.p == pytest.approx([1 / 10_001])
    assert found.floor.tolist() == [True]
    assert sign_flip(np.ones((1, 30)), 500, 0).p == pytest.approx([1 / 40_001])
    assert sign_flip(np.ones((1, 30)), 500, 0, 0.01).p == pytest.approx([1 / 200_001])
    assert not sign_flip(deltas, 4, 0).floor.any()


@pytest.mark.parametrize(("tests", "level"), [(384, 0.05), (384, 0.01), (10_000, 0.001)])
def test_there_are_enough_flips_for_the_smallest_p_to_survive(tests: int, level: float) -> None:
    assert tests / (flips_for(tests, level) + 1) < level / 3


@pytest.mark.parametrize(("n", "p"), [(14, 2 / 2**14), (15, 1 / 10_001)])
def test_up_to_fourteen_prompts_all_flips_are_taken(n: int, p: float) -> None:
    """Of equal deltas only the flip of none and of all come as far."""
    assert sign_flip(np.ones((1, n)), 1, 0).p == pytest.approx([p])


def every_p(deltas: np.ndarray) -> np.ndarray:
    """By all flips, drawn up one bit after the other."""
    width = deltas.shape[1]
    sums = np.zeros((len(deltas), 1))
    for unit in range(width):
        own = deltas[:, unit : unit + 1]
        sums = np.concatenate([sums + own, sums - own], axis=1)
    observed = np.abs(deltas.sum(1, keepdims=True))
    return (np.abs(sums) >= observed - 1e-9 * np.abs(deltas).sum(1, keepdims=True)).mean(1)


def test_too_many_cells_take_the_saddlepoint_approximation() -> None:
    deltas = np.random.default_rng(0).normal(0.4, 1, (2, 30))
    assert by_saddlepoint(4000, 30, flips_for(4000, 0.05))
    assert sign_flip(deltas, 4000, 0).p == pytest.approx(saddlepoint(deltas))
    assert not sign_flip(deltas, 4000, 0).floor.any()
    z = np.abs(deltas.sum(1)) / np.sqrt((deltas**2).sum(1))
    assert saddlepoint(deltas) == pytest.approx(2 * stats.norm.sf(z), abs=0.01)
    words = flips_in_words(30, 4000, "prompt", 0.05)
    assert words == (
        "two-sided sign-flip test on the deltas per prompt, saddlepoint approximation "
        "(4,000 cells would need 320,000 flips)"
    )
    assert flips_in_words(30, 1000, "prompt", 0.05).startswith(
        "two-sided sign-flip test on the deltas per prompt, 80,000 random flips"
    )
    assert flips_in_words(14, 4000, "prompt", 0.05).endswith("all flips")


@pytest.mark.parametrize("n", [18, 20])
@pytest.mark.parametrize("shift", [0.2, 0.7, 1.2])
def test_the_saddlepoint_is_near_all_flips(n: int, shift: float) -> None:
    random = np.random.default_rng(n)
    smooth = random.normal(shift, 1, (5, n))
    heavy = random.standard_t(3, (5, n)) + shift
    for deltas, off in ((smooth, 0.06), (heavy, 0.25)):
        expected = every_p(deltas)
        # where single flips count it is coarser, but not much too small
        assert saddlepoint(deltas) == pytest.approx(expected, rel=off, abs=2e-4)
        assert (saddlepoint(deltas) > 0.7 * expected).all()


@pytest.mark.parametrize("values", [[-1, 0, 1, 2, 3], [1, 2, -1], [3, 6, -3, 9, 9]])
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_the_saddlepoint_of_sums_on_a_lattice(values: list[int], step: float) -> None:
    """As of ranks: without a correction p is a third too small."""
    deltas = step * np.random.default_rng(1).choice(values, (6, 18)).astype(float)
    assert saddlepoint(deltas) == pytest.approx(every_p(deltas), rel=0.07)


def test_the_saddlepoint_of_equal_sizes_is_binomial() -> None:
    deltas = np.array([[0.5] * 16 + [-0.5] * 4, [0.5] * 20, [0.5, -0.5] * 10, [0.0] * 20])
    expected = [stats.binomtest(16, 20).pvalue, 2.0**-19, 1.0, 1.0]
    assert saddlepoint(deltas) == pytest.approx(expected)
    assert every_p(deltas) == pytest.approx(expected)


def test_the_saddlepoint_is_near_many_flips_of_forty() -> None:
    random = np.random.default_rng(3)
    deltas = random.exponential(1, (3, 40)) - [[0.7], [0.8], [0.6]]
    extreme = np.zeros(3)
    for _ in range(20):
        signs = random.choice([-1.0, 1.0], (20_000, 40))
        extreme += (np.abs(signs @ deltas.T) >= np.abs(deltas.sum(1))).sum(0)
    expected = extreme / 400_000
    assert saddlepoint(deltas) == pytest.approx(expected, rel=0.05)


def test_where_all_deltas_point_one_way_only_the_flip_of_all_comes_as_far() -> None:
    deltas = np.random.default_rng(1).uniform(0.1, 3, (2, 20))
    assert saddlepoint(deltas) == pytest.approx([2.0**-19] * 2)


def largest_by_hand(deltas: np.ndarray) -> list[float]:
    """Step-down: the largest cell against the largest of all, the next against that of the rest."""
    cells, units = deltas.shape
    sizes = [np.sqrt(sum(d * d for d in row)) for row in deltas]
    statistic = [abs(sum(row)) / size for row, size in zip(deltas, sizes, strict=True)]
    order = sorted(range(cells), key=lambda cell: -statistic[cell])
    p, before = [0.0] * cells, 0.0
    for place, cell in enumerate(order):
        reached = 0
        for signs in itertools.product([1, -1], repeat=units):
            flipped = [
                abs(sum(s * d for s, d in zip(signs, deltas[rest], strict=True))) / sizes[rest]
                for rest in order[place:]
            ]
            reached += max(flipped) >= statistic[cell] - 1e-9
        before = max(before, reached / 2**units)
        p[cell] = before
    return p


def test_the_largest_statistic_is_that_of_every_flip() -> None:
    random = np.random.default_rng(4)
    deltas = random.normal([[1.5], [0.4], [0.0], [0.7]], 1, (4, 8)) * [[1], [100], [1], [0.01]]
    deltas[2, :3] = 0
    expected = largest_by_hand(deltas)
    assert largest_flip(deltas, 10_000, 0) == pytest.approx(expected)
    assert len(set(expected)) > 2
    # of more units than are enumerated, the same by drawing
    wide = np.zeros((4, 30))
    wide[:, 20:28] = deltas
    assert largest_flip(wide, 10_000, 0) == pytest.approx(expected)
    doubled = np.concatenate([deltas, deltas], axis=1)
    drawn = largest_flip(doubled, 40_000, 0)
    signs = random.choice([-1.0, 1.0], (40_000, 16))
    unit = doubled / np.sqrt((doubled**2).sum(1, keepdims=True))
    top = np.abs(signs @ unit.T).max(1)
    first = int(np.abs(unit.sum(1)).argmax())
    assert drawn[first] == pytest.approx((top >= np.abs(unit[first].sum())).mean(), abs=0.003)
    assert largest_flip(np.zeros((2, 5)), 100, 0).tolist() == [1.0, 1.0]


def test_of_equal_cells_the_largest_statistic_corrects_nothing() -> None:
    """Holm would multiply by 50."""
    deltas = np.repeat(np.random.default_rng(0).normal(1, 1, (1, 10)), 50, axis=0)
    alone = sign_flip(deltas[:1], 1, 0).p
    assert largest_flip(deltas, 10_000, 0) == pytest.approx([alone[0]] * 50)


def test_holm_by_hand() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # in order 0.005×4, 0.01×3, 0.03×2, 0.04×1, each at least the one before
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_scipys(p: list[float]) -> None:
    expected = stats.false_discovery_control(p, method="bh")
    assert benjamini_hochberg(np.array(p)) == pytest.approx(expected)
    assert CORRECTIONS["none"](np.array(p)).tolist() == p


def test_too_few_prompts_are_warned_of() -> None:
    assert check_cells([8], statistics(), SPAN) == []
    (found,) = check_cells([8] * 48, statistics(), SPAN)
    assert found.code == "W0720"
    assert found.message == "with 8 prompts no cell can survive the correction"
    assert "0.0078" in found.label_text
    assert check_cells([8] * 48, statistics(correction="bh"), SPAN) == []
    assert check_cells([8] * 48, statistics(correction="max"), SPAN) == []
    assert check_cells([4] * 48, statistics(test="bootstrap"), SPAN) == []
    assert check_cells([30] * 9000, statistics(), SPAN) == []
    (found,) = check_cells([1] * 3, statistics(by="a"), SPAN)
    assert found.message == "with 1 value of a no cell can survive the correction"


def test_cells_that_have_too_few_are_counted() -> None:
    """Holm multiplies by the cells that are left, so a few cells with few prompts come last."""
    units = [7, 64, 64, 5, 7]
    # by hand: 2⁻⁶ × 3 (itself, the other and that of five are left) = 0.047; 2⁻⁴ × 1 = 0.0625
    assert out_of_reach(units, statistics()) == [3]
    assert out_of_reach(units, statistics(confidence=97)) == [0, 3, 4]
    (found,) = check_cells(units, statistics(confidence=97), SPAN)
    assert found.message == "3 of 5 cells have 5 to 7 prompts, and can't survive the correction"
    assert out_of_reach(units, statistics(confidence=90)) == []
