"""The sign-flip test and the corrections against scipy and plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from mechdsl.checks.expectations import check_cell_units
from mechdsl.program.significance import unreachable_cells
from mechdsl.statistics.cell_statistics import infer
from mechdsl.statistics.corrections import CORRECTIONS, benjamini_hochberg, holm
from mechdsl.statistics.intervals import (
    SignFlipResult,
    flip_count,
    joint_sign_flip_p,
    sign_flip_inference,
)
from mechdsl.statistics.measurements import EffectSums, SamplingDesign

from .synthetic import SPAN, statistics


def sign_flip(deltas: np.ndarray, flips: int = 10_000) -> SignFlipResult:
    held = np.full(len(deltas), deltas.shape[1])
    return sign_flip_inference(
        EffectSums(deltas, np.ones((1, deltas.shape[1])), held), flips, 0, 95.0
    )


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
def test_exact_p_equals_scipy(n: int) -> None:
    deltas = np.random.default_rng(n).normal(0.5, 1, (3, n))
    assert sign_flip(deltas).p == pytest.approx([scipy_p(row) for row in deltas])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (2, 6), elements=st.integers(-3, 3).map(float)))
def test_exact_p_counts_ties_and_zeros(deltas: np.ndarray) -> None:
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    expected = (np.abs(signs @ deltas.T) >= np.abs(deltas.sum(1))).mean(0)
    assert sign_flip(deltas).p == pytest.approx(expected)


def test_random_flip_p_approximates_the_normal_p_and_is_never_zero() -> None:
    random = np.random.default_rng(0)
    deltas = random.normal(0.4, 1, (4, 30))
    p = sign_flip(deltas).p
    z = np.abs(deltas.sum(1)) / np.sqrt((deltas**2).sum(1))
    assert p == pytest.approx(2 * stats.norm.sf(z), abs=0.02)
    found = sign_flip(np.ones((1, 30)))
    assert found.p == pytest.approx([2 / 10_001])
    assert found.floor.tolist() == [True]
    assert not sign_flip(deltas).floor.any()


def test_flip_count_lets_the_smallest_p_be_significant() -> None:
    for tests, level in ((384, 0.05), (384, 0.02)):
        assert 2 * tests / (flip_count(tests, level) + 1) < level
    assert flip_count(10_000, 0.001) == 100_000


@pytest.mark.parametrize(("n", "p"), [(14, 2 / 2**14), (15, 2 / 10_001)])
def test_all_flips_are_enumerated_up_to_fourteen_prompts(n: int, p: float) -> None:
    """With equal deltas, only flipping none or all signs is as extreme."""
    assert sign_flip(np.ones((1, n))).p == pytest.approx([p])


@pytest.mark.parametrize("n", [6, 9, 12])
def test_flip_interval_contains_the_means_not_rejected(n: int) -> None:
    """At the ends of the interval, the p of shifted deltas crosses the level."""
    deltas = np.random.default_rng(n).normal(0.5, 1, (3, n))
    found = sign_flip(deltas)
    for cell in range(3):
        for end, inward in ((found.low[cell], 1), (found.high[cell], -1)):
            inside = scipy_p(deltas[cell] - end - inward * 1e-6)
            outside = scipy_p(deltas[cell] - end + inward * 1e-6)
            assert outside < 0.05 <= inside


def test_flip_interval_of_a_ratio_contains_the_ratios_not_rejected() -> None:
    random = np.random.default_rng(3)
    bottom = random.normal(5, 1, (1, 10))
    top = 0.5 * bottom + random.normal(0, 1, (1, 10))
    found = sign_flip_inference(EffectSums(top, bottom, np.array([10])), 10_000, 0, 95.0)
    for end, inward in ((found.low[0], 1), (found.high[0], -1)):
        assert scipy_p((top - (end - inward * 1e-6) * bottom)[0]) < 0.05
        assert scipy_p((top - (end + inward * 1e-6) * bottom)[0]) >= 0.05


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
@pytest.mark.parametrize("n", [8, 10, 30])
def test_inference_of_a_ratio_ignores_the_sign_of_its_denominator(test: str, n: int) -> None:
    """`from abc into clean` divides by a negative change: top and bottom both change sign."""
    random = np.random.default_rng(n)
    bottom = random.normal(5, 1, (1, n))
    top, held = 0.5 * bottom + random.normal(0, 1, (2, n)), np.array([n, n])
    method = statistics(test=test)
    design = SamplingDesign(n, method, 0)
    draws = design.draws(design.units(), whole=True)
    found, negated = (
        infer(EffectSums(sign * top, sign * bottom, held), method, draws, 2) for sign in (1, -1)
    )
    for name in ("low", "high", "p"):
        assert np.isfinite(getattr(found, name)).all()
        assert getattr(negated, name) == pytest.approx(getattr(found, name))


def reference_step_down_p(deltas: np.ndarray) -> list[float]:
    """Step-down: compare the largest cell with the maximum over all, the next with the rest."""
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


def test_joint_sign_flip_p_equals_a_step_down_over_all_flips() -> None:
    random = np.random.default_rng(4)
    deltas = random.normal([[1.5], [0.4], [0.0], [0.7]], 1, (4, 8)) * [[1], [100], [1], [0.01]]
    deltas[2, :3] = 0
    expected = reference_step_down_p(deltas)
    assert joint_sign_flip_p(deltas, 10_000, 0) == pytest.approx(expected)
    assert len(set(expected)) > 2
    # units of zeros don't count; flips of 16 units are drawn, not enumerated
    wide = np.zeros((4, 30))
    wide[:, 20:28] = deltas
    assert joint_sign_flip_p(wide, 10_000, 0) == pytest.approx(expected)
    doubled = np.concatenate([deltas, deltas], axis=1)
    drawn = joint_sign_flip_p(doubled, 40_000, 0)
    signs = random.choice([-1.0, 1.0], (40_000, 16))
    unit = doubled / np.sqrt((doubled**2).sum(1, keepdims=True))
    top = np.abs(signs @ unit.T).max(1)
    first = int(np.abs(unit.sum(1)).argmax())
    assert drawn[first] == pytest.approx((top >= np.abs(unit[first].sum())).mean(), abs=0.003)
    assert joint_sign_flip_p(np.zeros((2, 5)), 100, 0).tolist() == [1.0, 1.0]


def test_joint_sign_flip_p_of_identical_cells_equals_uncorrected_p() -> None:
    """Holm would multiply by 50."""
    deltas = np.repeat(np.random.default_rng(0).normal(1, 1, (1, 10)), 50, axis=0)
    alone = sign_flip(deltas[:1]).p
    assert joint_sign_flip_p(deltas, 10_000, 0) == pytest.approx([alone[0]] * 50)


def test_holm_equals_a_worked_example() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    # in order 0.005×4, 0.01×3, 0.03×2, 0.04×1, each at least the one before
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_equals_scipy(p: list[float]) -> None:
    expected = stats.false_discovery_control(p, method="bh")
    assert benjamini_hochberg(np.array(p)) == pytest.approx(expected)
    assert CORRECTIONS["none"](np.array(p)).tolist() == p


def test_too_few_prompts_for_significance_is_a_warning() -> None:
    assert check_cell_units([8], statistics(), SPAN) == []
    (found,) = check_cell_units([8] * 48, statistics(), SPAN)
    assert found.code == "W0720"
    assert found.message == (
        "with 8 prompts, no cell can be significant after correction if more than 6 of the 48 "
        "cells are tested"
    )
    assert "0.0078" in found.label_text
    assert check_cell_units([8] * 48, statistics(correction="bh"), SPAN) == []
    assert check_cell_units([8] * 48, statistics(correction="max"), SPAN) == []
    (found,) = check_cell_units([4] * 48, statistics(test="bootstrap"), SPAN)
    assert found.message == "with 4 prompts, no cell can be significant after correction"
    assert check_cell_units([30] * 9000, statistics(), SPAN) == []
    (found,) = check_cell_units([1] * 3, statistics(by="a"), SPAN)
    assert found.message == "with 1 value of a, no cell can be significant after correction"


@pytest.mark.parametrize(("units", "most"), [(6, 1), (7, 3), (8, 6), (9, 12)])
def test_warning_names_the_number_of_tested_cells_that_can_be_significant(
    units: int, most: int
) -> None:
    """Inert cells aren't corrected for; after the run, their number is known."""
    (found,) = check_cell_units([units] * 40, statistics(), SPAN)
    assert f"if more than {most} of the 40 cells are tested" in found.message
    assert found.label_text.endswith("; cells without any possible effect aren't tested")
    assert unreachable_cells([units] * most, statistics()) == []
    assert unreachable_cells([units] * (most + 1), statistics()) != []
    (found,) = check_cell_units([units] * 40, statistics(), SPAN, measured=True)
    assert found.message == f"with {units} prompts, no cell can be significant after correction"
    assert "aren't tested" not in found.label_text


@pytest.mark.parametrize(("units", "warned"), [(15, True), (16, False)])
def test_warning_accounts_for_the_p_floor_above_fourteen_units(units: int, warned: bool) -> None:
    """2^(1 − 15) × 1,536 = 0.094 and 2^(1 − 16) × 1,536 = 0.047."""
    assert bool(check_cell_units([units] * 1536, statistics(), SPAN)) is warned


def test_cells_with_too_few_prompts_are_counted() -> None:
    """Holm multiplies by the number of remaining cells, and cells with few prompts come last."""
    units = [7, 64, 64, 5, 7]
    # 2⁻⁶ × 3 (two cells of 7 prompts and one of 5 remain) = 0.047; 2⁻⁴ × 1 = 0.0625
    assert unreachable_cells(units, statistics()) == [3]
    assert unreachable_cells(units, statistics(confidence=97)) == [0, 3, 4]
    (found,) = check_cell_units(units, statistics(confidence=97), SPAN)
    assert found.message == (
        "3 of 5 cells have only 5 to 7 prompts and can't be significant after correction if all "
        "5 cells are tested"
    )
    assert unreachable_cells(units, statistics(confidence=90)) == []
