"""The sign-flip test and the corrections against scipy and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from mechdsl.statistics.sign_flips import (
    CORRECTIONS,
    benjamini_hochberg,
    flips_in_words,
    holm,
    sign_flip,
)
from mechdsl.validate.reachable_p import check_prompts

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
    assert sign_flip(deltas, 3, 0) == pytest.approx([scipy_p(row) for row in deltas])


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (2, 6), elements=st.integers(-3, 3).map(float)))
def test_exact_p_with_ties_and_zeros(deltas: np.ndarray) -> None:
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    expected = (np.abs(signs @ deltas.T) >= np.abs(deltas.sum(1))).mean(0)
    assert sign_flip(deltas, 2, 0) == pytest.approx(expected)


def test_zeros_pad_a_cell_of_few_prompts() -> None:
    deltas = np.zeros((1, 60))
    deltas[0, 10:15] = [1.0, 2.0, -0.5, 1.5, 3.0]
    assert sign_flip(deltas, 1, 0) == pytest.approx([scipy_p(deltas[0, 10:15])])


def test_random_flips_come_near_and_are_never_zero() -> None:
    random = np.random.default_rng(0)
    deltas = random.normal(0.4, 1, (4, 30))
    p = sign_flip(deltas, 4, 0)
    z = np.abs(deltas.sum(1)) / np.sqrt((deltas**2).sum(1))
    assert p == pytest.approx(2 * stats.norm.sf(z), abs=0.02)
    assert sign_flip(np.ones((1, 30)), 1, 0) == pytest.approx([1 / 10_001])
    assert sign_flip(np.ones((1, 30)), 2000, 0) == pytest.approx([1 / 40_001])


@pytest.mark.parametrize(("n", "p"), [(14, 2 / 2**14), (15, 1 / 10_001)])
def test_up_to_fourteen_prompts_all_flips_are_taken(n: int, p: float) -> None:
    """Of equal deltas only the flip of none and of all come as far."""
    assert sign_flip(np.ones((1, n)), 1, 0) == pytest.approx([p])


def test_too_many_cells_take_the_normal_approximation() -> None:
    deltas = np.random.default_rng(0).normal(0.4, 1, (2, 30))
    z = np.abs(deltas.sum(1)) / np.sqrt((deltas**2).sum(1))
    assert sign_flip(deltas, 10_001, 0) == pytest.approx(2 * stats.norm.sf(z))
    assert "normal approximation" in flips_in_words(30, 10_001, "prompt")
    assert flips_in_words(30, 10_000, "prompt").startswith(
        "two-sided sign-flip test on the per-prompt deltas, 200,000 random flips"
    )
    assert sign_flip(np.ones((1, 30)), 10_000, 0) == pytest.approx([1 / 200_001])
    assert flips_in_words(14, 10_001, "prompt").endswith("all flips")


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
    assert check_prompts(8, 1, statistics(), SPAN) == []
    (found,) = check_prompts(8, 48, statistics(), SPAN)
    assert found.code == "W0720"
    assert "0.0078" in found.label_text
    assert check_prompts(8, 48, statistics(correction="bh"), SPAN) == []
    assert check_prompts(30, 9000, statistics(), SPAN) == []
