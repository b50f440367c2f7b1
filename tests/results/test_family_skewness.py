"""Corrected p is withheld for very skewed families; the others keep their error rate."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from mechdsl.show.output import show_report
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.corrections import CORRECTIONS
from mechdsl.statistics.measurements import CellStatistics, MeasureData
from mechdsl.vocab.metrics import EFFECTS

from ..statistics_files.skewed_family import too_skewed
from .synthetic import measure, report, statistics

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
SHAPE = (48, 32)
FAMILIES = 60


def sparse(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One value in ten is far from the others, which are equal."""
    return random.exponential(size=shape) * (random.random(shape) < 0.1) - 0.1


def very_skewed(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.lognormal(0, 2, shape) - np.exp(2)


def mostly_zero(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.normal(size=shape) * (random.random(shape) < 0.15)


def heavy_tails(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.standard_t(3, shape)


def exponential(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return random.exponential(size=shape) - 1


def corrected(deltas: np.ndarray, **settings: object) -> CellStatistics:
    data = measure(deltas, np.zeros((1, deltas.shape[1])))
    return compute_cell_statistics([data], statistics(**settings), 0, effects=EFFECTS)[0]


def families(draw: Draw, **settings: object) -> tuple[int, int]:
    """Return the number of withheld families, and of other families with a significant cell."""
    random = np.random.default_rng(7)
    found = [corrected(draw(random, SHAPE), **settings) for _ in range(FAMILIES)]
    survivors = [bool((each.p_corrected < 0.05).any()) for each in found if not each.withheld]
    return sum(bool(each.withheld) for each in found), sum(survivors)


@pytest.mark.parametrize("draw", [sparse, very_skewed])
def test_corrected_p_of_very_skewed_families_is_withheld(draw: Draw) -> None:
    withheld, survivors = families(draw)
    assert withheld > 0.9 * FAMILIES
    assert survivors <= 2
    without = families(draw, correction="none")
    assert without[0] == 0, "each cell is on its own"


@pytest.mark.parametrize("draw", [exponential, mostly_zero, heavy_tails])
def test_corrected_p_of_moderately_skewed_families_is_printed(draw: Draw) -> None:
    withheld, survivors = families(draw)
    assert withheld == 0
    assert survivors <= 8  # at 5 % of 60, more have a probability of 0.2 %


def test_sign_flip_p_is_withheld_at_less_skewness() -> None:
    random = np.random.default_rng(3)
    deltas = exponential(random, SHAPE)
    assert corrected(deltas, test="flips").withheld
    assert not corrected(deltas).withheld
    assert not corrected(heavy_tails(random, SHAPE), test="flips").withheld


def test_skewness_in_the_direction_of_the_effect_is_not_withheld() -> None:
    """Skewness with the sign of the effect is no reason to withhold p."""
    random = np.random.default_rng(5)
    deltas = random.exponential(size=SHAPE) * (random.random(SHAPE) < 0.2)
    assert not corrected(deltas).withheld


def shares(
    random: np.random.Generator, right: float, wrong: float, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return patched and base answers, right with equal probability: `wrong` is the probability
    that a right answer changes."""
    base = (random.random((1, shape[1])) < right).astype(float)
    chance = np.where(base == 1, wrong, wrong * right / (1 - right))
    return np.where(random.random(shape) < chance, 1 - base, base), base


def share_measure(patched: np.ndarray, base: np.ndarray) -> MeasureData:
    return measure(patched, base, unit="share", metric="correct", label="correct")


@pytest.mark.parametrize(("right", "wrong"), [(0.97, 0.01), (0.5, 0.4)])
def test_corrected_p_of_shares_is_printed_and_holds_its_level(right: float, wrong: float) -> None:
    """Their p come from exact limits, which no skewness makes too small."""
    random, survivors = np.random.default_rng(7), 0
    for _ in range(FAMILIES // 6):
        data = share_measure(*shares(random, right, wrong, SHAPE))
        (found,) = compute_cell_statistics([data], statistics(), 0, effects=EFFECTS)
        assert not found.withheld
        survivors += bool((found.p_corrected < 0.05).any())
    assert survivors <= 2  # at 5 % of 10, more have a probability of 1 %


def test_very_skewed_shares_with_an_effect_have_corrected_p() -> None:
    """All cells lose almost all answers: each has two rows that don't change."""
    base, patched = np.ones((1, 32)), np.zeros((16, 32))
    patched[:, 30:] = 1
    (found,) = compute_cell_statistics(
        [share_measure(patched, base)], statistics(), 0, effects=EFFECTS
    )
    assert not found.withheld
    assert (found.p_corrected < 0.001).all()
    assert found.test is not None
    assert "exact limits of shares" in found.test
    assert "Student" not in found.test


@pytest.mark.parametrize("correction", ["holm", "bh", "max"])
def test_shares_next_to_a_skewed_measure_are_corrected_over_both(correction: str) -> None:
    random = np.random.default_rng(5)
    skewed = measure(very_skewed(random, SHAPE), np.zeros((1, SHAPE[1])))
    patched = np.ones((2, SHAPE[1]))
    patched[0, 7:], patched[1, :1] = 0, 0
    share = share_measure(patched, np.ones((1, SHAPE[1])))
    first, second = compute_cell_statistics(
        [skewed, share], statistics(correction=correction), 0, effects=EFFECTS
    )
    assert first.withheld == "skewed"
    assert np.isnan(first.p_corrected).all()
    assert not second.withheld
    assert second.tests == SHAPE[0] + 2
    p = np.concatenate([np.ones(SHAPE[0]), second.p])
    if correction != "max":
        assert second.p_corrected == pytest.approx(CORRECTIONS[correction](p)[-2:])
    assert second.p_corrected[0] < 0.05 < second.p_corrected[1]


def test_skewed_family_after_a_measure_without_p_is_reported() -> None:
    """`raw` has no p: the warning is about the cells and the line of the skewed measure. Runs a
    file (2 s), because the warning is built from all its measures."""
    measures = ("correct as raw", "correct as delta", "skewed as raw", "skewed as delta")
    results, (warning,) = too_skewed("\n  ".join(f"measure {each}" for each in measures))
    assert warning.code == "W0723"
    assert "16 cells" in warning.message
    assert warning.span is not None
    assert warning.span.written == "measure skewed as delta"
    (found,) = results.files[0].experiments
    assert "over 32 cells; withheld for delta of skewed, as" in found.conventions["correction"]
    assert "of shares by" in found.conventions["p"]


def test_withheld_p_is_reported_in_every_output() -> None:
    results, (warning,) = too_skewed()
    assert warning.code == "W0723"
    assert "16 cells" in warning.message
    (found,) = results.files[0].experiments
    assert "withheld" in found.conventions["correction"]
    cell = results.to_dict()["files"][0]["experiments"][0]["cells"][0]["measures"][0]
    assert cell["p_corrected"] is None
    assert cell["p"] is not None
    text = io.StringIO()
    show_report(found, report("table"), Console(file=text, width=120))
    assert "no cell is reported as significant: effects are too skewed" in text.getvalue()
    assert " yes" not in text.getvalue()
