"""Corrected p is withheld for very skewed families; the others keep their error rate."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from mechdsl.show.output import show_report
from mechdsl.statistics.cell_statistics import compute_cell_statistics
from mechdsl.statistics.measurements import CellStatistics
from mechdsl.vocab.effects import EFFECTS

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
