"""Aggregates of cells: slopes, intervals, and classes that can't be registered."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.base.arrays import Floats
from mechdsl.results.verdicts.estimates import (
    CombinedCells,
    WeightedCells,
    evaluate_resamples,
    is_linear,
    studentise_number,
)
from mechdsl.statistics.measurements import EffectSums, Resamples
from mechdsl.vocab.aggregates import AGGREGATES, CellAggregate, aggregate, expectation_functions

from .synthetic import finished, measure
from .two_results import plain


class RootMeanSquare(CellAggregate):
    name = "rms"
    documentation = "The root of the mean square."

    def combine(self, values: Floats) -> Floats:
        return np.sqrt((values**2).mean(1))


def sums_of(effects: Floats) -> EffectSums:
    """The sums of cells that have every unit. effects: shape [cell, unit]."""
    cells, units = effects.shape
    return EffectSums(effects, np.ones((1, units)), np.full(cells, units))


def test_slope_equals_the_derivative() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)) * 10.0 ** np.arange(5)[:, None]
    method = RootMeanSquare()
    expected = values / 7 / method.combine(values)[:, None]
    assert method.slope(values) == pytest.approx(expected, rel=1e-6)


def test_participation_counts_equal_cells() -> None:
    method = AGGREGATES["participation"]
    values = np.array([[2.0, -2.0, 2.0, 0.0], [0.0, 1e-200, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert method.combine(values) == pytest.approx([3, 1, 0])
    assert np.isfinite(method.slope(values)).all()


def test_participation_equals_its_formula_and_slope() -> None:
    values = np.random.default_rng(4).normal(size=(5, 7)) * 10.0 ** np.arange(5)[:, None]
    method = AGGREGATES["participation"]
    expected = [(row**2).sum() ** 2 / (row**4).sum() for row in values]
    assert method.combine(values) == pytest.approx(expected)
    assert method.slope(values) == pytest.approx(CellAggregate.slope(method, values), rel=1e-5)


def test_slope_of_zeros_is_finite() -> None:
    assert np.isfinite(RootMeanSquare().slope(np.zeros((2, 3)))).all()


def test_mean_as_an_aggregate_has_the_interval_of_a_weighted_sum() -> None:
    effects = np.random.default_rng(1).exponential(size=(3, 20))
    draws = Resamples(20, 500, 0)
    one = WeightedCells(sums_of(effects), np.full(3, 1 / 3))
    other = CombinedCells(sums_of(effects), AGGREGATES["mean"])
    found, expected = (studentise_number(each, draws, 20) for each in (other, one))
    assert found.value == pytest.approx(expected.value)
    assert found.error == pytest.approx(expected.error, rel=1e-6)
    assert found.pivots == pytest.approx(expected.pivots, rel=1e-5, abs=1e-8)
    assert not is_linear(other)


def test_influence_equals_the_effect_of_one_more_unit() -> None:
    effects = np.random.default_rng(2).normal(size=(4, 12)) + 1
    number = CombinedCells(sums_of(effects), RootMeanSquare())
    weights = np.ones((1, 12))
    value, moves = evaluate_resamples(number, weights)
    for unit in range(12):
        more = weights.copy()
        more[0, unit] += 1e-6
        moved, _ = evaluate_resamples(number, more)
        assert (moved - value)[0] / 1e-6 == pytest.approx(moves[0, unit], rel=1e-3, abs=1e-6)


def test_interval_of_a_root_mean_square_covers_at_its_level() -> None:
    """500 samples of 40 skewed units in 3 cells; 95 % intervals miss in 5 % of them."""
    generator = np.random.default_rng(3)
    truth = float(np.sqrt(np.mean([1.0, 4.0, 9.0])))
    scale = np.array([1.0, 2.0, 3.0])[:, None]
    hits = 0
    for sample in range(500):
        effects = generator.exponential(size=(3, 40)) * scale
        number = CombinedCells(sums_of(effects), RootMeanSquare())
        low, high = studentise_number(number, Resamples(40, 400, sample), 40).interval(95)
        hits += bool(low[0] <= truth <= high[0])
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize(
    ("name", "attributes", "reason"),
    [
        ("r m", {}, "its name must be a word"),
        ("layer", {}, "its name is a keyword"),
        ("auroc", {}, "its name is already a function of the language"),
        ("rms", {"documentation": None}, "`documentation` must be a text"),
        ("rms", {"min_cells": 0}, "`min_cells` must be a whole number of at least 1, not 0"),
        ("rms", {"combine": CellAggregate.combine}, "it has no `combine"),
    ],
)
def test_class_that_cannot_be_used_is_rejected(
    name: str, attributes: dict[str, object], reason: str
) -> None:
    with pytest.raises(TypeError, match=f"aggregate `{name}`: {reason}"):
        aggregate(name)(type("Broken", (RootMeanSquare,), attributes))


def test_duplicate_name_is_rejected() -> None:
    with pytest.raises(ValueError, match="aggregate `mean` is registered twice"):
        aggregate("mean")(RootMeanSquare)


def test_functions_contain_each_aggregate_once() -> None:
    names = expectation_functions()
    assert len(set(names)) == len(names)
    assert {"max", "min", "mean", "auroc"} <= set(names)


def test_interval_of_participation_is_inside_the_possible_range() -> None:
    """Three cells: the number of cells with an effect is from 1 to 3."""
    random = np.random.default_rng(0)
    for means in ([3.0, 3.1, 2.9], [5.0, 0.05, 0.0]):
        values = np.array(means)[:, None] + random.normal(size=(3, 12))
        found = finished(plain(measure(values, np.zeros(12))), "participation(delta) >= 1")
        (outcome,) = found.outcomes
        assert outcome.holds
        assert outcome.low is not None
        assert outcome.high is not None
        assert 1 <= outcome.low <= float(outcome.value or 0) <= outcome.high <= 3
    assert outcome.low == 1
    double = finished(plain(measure(values, np.zeros(12))), "2 * participation(delta) + 1 >= 3")
    assert double.outcomes[0].low == 3


def test_participation_of_cells_without_an_effect_is_zero() -> None:
    found = finished(plain(measure(np.zeros((3, 12)), np.zeros(12))), "participation(delta) <= 0")
    assert (found.outcomes[0].value, found.outcomes[0].word) == (0, "undecided")
