"""Estimates without an interval: the reason, and expectations and comparisons that depend on it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

from mechdsl.results.differences.comparison import compare_results
from mechdsl.results.experiment_result import ExpectOutcome, ExperimentResult
from mechdsl.statistics.cell_statistics import check_denominator
from mechdsl.statistics.measurements import SamplingDesign
from mechdsl.vocab.metrics import EFFECTS

from .synthetic import SPAN, finished, measure, statistics
from .test_leads import verdict
from .two_results import only, plain, results, states

GROUPS = ["a", "b", "c", "d", "e", "f", *"zzzzzz"]
"""Six groups of one row, and one with half of the rows."""

UNEQUAL = "7 values of g: too unequal numbers of rows for a 95 % interval"
FLIPS = "5 prompts: sign flips of so few give no p below 0.05"


def grouped(*values: np.ndarray, seed: int = 0, **settings: str) -> ExperimentResult:
    rows = len(GROUPS)
    random = np.random.default_rng(seed)
    patched = values or (
        np.stack([2 + 0.1 * random.normal(size=rows), 4 + 0.1 * random.normal(size=rows)]),
    )
    found = plain(measure(patched[0], np.zeros(rows)))
    return replace(found, row_values={"g": GROUPS})


@pytest.mark.parametrize(
    "line",
    [
        "delta(head: 1) > 1",
        "1 < delta(head: 1)",
        "delta(head: 1) - 1 > 0",
        "2 * delta(head: 1) > 2",
        "mean(delta) > 1",
        "max(delta) > 1",
        "min(delta) > 1",
        "delta(head: 1) - delta(head: 0) > 1",
        "delta(head: 1) / delta(head: 0) > 1",
        "delta(head: 1) * delta(head: 0) > 1",
        "abs(delta(head: 1)) > 1",
        "abs(delta(head: 1)) - abs(delta(head: 0)) > 1",
        "delta(head: 1) near 4 within 3",
    ],
)
def test_expectation_fails_with_the_reason_of_the_table(line: str) -> None:
    found = finished(grouped(), line, by="g")
    assert found.statistics[0].reasons == (UNEQUAL, UNEQUAL)
    assert np.isnan(found.statistics[0].low).all()
    (outcome,) = found.outcomes
    assert not outcome.holds
    assert UNEQUAL.split(" for ")[0] in (outcome.reason or "")
    assert (outcome.low, outcome.high) == (None, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("argmax(delta) = L0H1", "by the mean, but the difference of 1.97 from L0H0.z has no"),
        ("argmax(delta) != L0H0", "by the mean, but the difference from L0H0.z has no"),
        ("top 1 contains L0H1", "L0H1 is in the top 1 by its mean, but differences from other"),
    ],
)
def test_ranking_of_cells_without_an_interval_gives_the_reason(line: str, reason: str) -> None:
    (outcome,) = finished(grouped(), line, by="g").outcomes
    assert not outcome.holds
    assert (outcome.reason or "").startswith(reason)
    assert (outcome.reason or "").endswith(f"({UNEQUAL})")


@pytest.mark.parametrize("test", ["t", "flips", "bootstrap"])
def test_auroc_of_cells_over_unequal_groups_is_withheld(test: str) -> None:
    random = np.random.default_rng(5)
    for shift in (4.0, 0.05):  # a perfect order, and an imperfect one
        values = random.normal(size=(4, len(GROUPS))) + shift * np.array([[2], [1.1], [1], [0]])
        line = "auroc(delta, [L0H0, L0H2]) > 0.01"
        (outcome,) = finished(grouped(values), line, by="g", test=test).outcomes
        assert not outcome.holds
        assert (outcome.low, outcome.high) == (None, None)
        assert (outcome.reason or "").startswith(UNEQUAL)


def ranked_rows(values: np.ndarray, large: list[int], groups: list[str]) -> ExpectOutcome:
    made = plain(measure(values[None], np.zeros(len(values))))
    rows = {"g": groups, "large": large}
    line = "auroc(delta, large) > 0.01"
    return finished(replace(made, row_values=rows), line, by="g").outcomes[0]


def test_auroc_of_rows_over_unequal_groups_is_withheld() -> None:
    """If the groups of all rows, of the positive rows or of the other rows are unequal."""
    large = [1, 0] * 6
    values = np.random.default_rng(6).normal(size=12) + np.array(large)
    for perfect in (0, 9):
        outcome = ranked_rows(values + perfect * np.array(large), large, GROUPS)
        assert (outcome.holds, outcome.low, outcome.high) == (False, None, None)
        assert (outcome.reason or "").startswith(UNEQUAL)
    equal = [*"aabbccddeeff"]
    assert ranked_rows(values, large, equal).low is not None


@pytest.mark.parametrize(("positive", "said"), [(1, "positive rows: "), (0, "other rows: ")])
def test_auroc_of_unequal_positive_rows_is_withheld(positive: int, said: str) -> None:
    # eight groups of six rows; those of one kind are mostly in `a`
    groups = [name for name in "abcdefgh" for _ in range(6)]
    large = [
        positive if name == "a" or n % 6 == 0 else 1 - positive for n, name in enumerate(groups)
    ]
    values = np.random.default_rng(7).normal(size=48)
    outcome = ranked_rows(values, large, groups)
    assert (outcome.low, outcome.high) == (None, None)
    assert (outcome.reason or "").startswith(f"{said}8 values of g: too unequal numbers of rows")


@pytest.mark.parametrize("test", ["t", "flips"])
def test_correlation_over_unequal_groups_is_withheld(test: str) -> None:
    random = np.random.default_rng(8)
    cells = random.normal(size=(12, 1)) * 3
    values = [cells + 0.1 * random.normal(size=(12, len(GROUPS))) for _ in range(2)]

    def pair(groups: list[str]) -> ExpectOutcome:
        one, two = (
            finished(replace(grouped(each), row_values={"g": groups}), by="g", test=test)
            for each in values
        )
        return verdict("pearson(delta, other) > 0.5", one, other=replace(two, name="other"))

    outcome = pair(GROUPS)
    assert (outcome.holds, outcome.low, outcome.high) == (False, None, None)
    assert (outcome.reason or "").startswith(UNEQUAL)
    assert pair([*"aabbccddeeff"]).holds


def test_correlation_with_other_rows_in_unequal_groups_is_withheld() -> None:
    """Only the other experiment's groups are unequal."""
    random = np.random.default_rng(8)
    cells = random.normal(size=(12, 1)) * 3
    groups, keys = ([*"aabbccddeeff"], GROUPS), (range(12), range(20, 32))
    one, two = (
        finished(
            replace(
                grouped(cells + 0.1 * random.normal(size=(12, 12))),
                row_values={"g": own},
                row_keys=tuple(rows),
            ),
            by="g",
        )
        for own, rows in zip(groups, keys, strict=True)
    )
    outcome = verdict("pearson(delta, other) > 0.5", one, other=replace(two, name="other"))
    assert (outcome.low, outcome.high) == (None, None)
    assert "too unequal numbers of rows" in (outcome.reason or "")


def test_same_rows_in_groups_of_equal_size_have_an_interval() -> None:
    equal = replace(grouped(), row_values={"g": [*"aabbccddeeff"]})
    assert finished(equal, "delta(head: 1) > 1", by="g").outcomes[0].holds


def test_stricter_level_without_an_interval_is_not_decided_by_another_method() -> None:
    """At 95 % the cell has an interval; at the level of one of ten alternatives it has none."""
    two = ["a", "b", "c", "d", "e", "f", "g", "h", *"zzz"]
    rows = len(two)
    values = 4 + 0.1 * np.random.default_rng(1).normal(size=(1, rows))
    result = replace(plain(measure(values, np.zeros(rows))), row_values={"g": two})
    lines = ["delta(head: 0) > 1", " or ".join(["delta(head: 0) > 1"] * 60)]
    alone, many = finished(result, *lines, by="g").outcomes
    assert alone.holds
    assert not many.holds
    assert "too unequal numbers of rows for a 99.9167 % interval" in (many.reason or "")


def test_differences_of_unequal_groups_are_unclear() -> None:
    rows = len(GROUPS)
    old = np.random.default_rng(2).normal(size=(1, rows))
    new = old + 3 + 0.1 * np.random.default_rng(3).normal(size=(1, rows))
    sides = (finished(grouped(old), by="g"), finished(grouped(new), by="g"))
    found = compare_results(results(sides[0]), results(sides[1]))
    assert states(found) == {"unclear": 1}
    cell = only(found, "unclear")
    assert (cell.low, cell.high, cell.p) == (None, None, None)
    assert cell.reason == UNEQUAL


def test_denominator_without_an_interval_is_rejected_with_the_reason() -> None:
    rows = len(GROUPS)
    base = 5 + np.random.default_rng(4).normal(size=(1, rows))
    sampling = SamplingDesign(rows, statistics(by="g"), 0, groups=np.array(GROUPS))
    (found,) = check_denominator(base, None, sampling, SPAN, effect=EFFECTS["relative"])
    assert found.code == "E0604"
    assert f"without an interval ({UNEQUAL})" in found.label_text
    found = finished(
        replace(
            plain(measure(base + 1, base, effect="relative")),
            row_values={"g": GROUPS},
        ),
        by="g",
    )
    (reason,) = found.statistics[0].reasons
    assert f"without an interval ({UNEQUAL})" in (reason or "")
    assert "nan" not in (reason or "")


@pytest.mark.parametrize("line", ["delta > -100", "abs(delta) > -1", "mean(delta) > -100"])
def test_five_units_have_neither_interval_nor_p_by_sign_flips(line: str) -> None:
    values = np.array([[4.0, 5.0, 5.5, 6.0, 7.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = finished(plain(measure(values, np.zeros(5))), line, test="flips")
    cells = found.statistics[0]
    assert np.isnan([cells.low[0], cells.high[0], cells.p[0]]).all()
    assert cells.reasons == (FLIPS,)
    (outcome,) = found.outcomes
    assert not outcome.holds
    assert FLIPS in (outcome.reason or "")
    assert (outcome.low, outcome.high) == (None, None)


LINES_OF_FEW = {
    "delta(head: 1) * delta(head: 2) > 1": 0.0,
    "delta(head: 1) * delta(head: 1) > 1": 0.0,
    "raw(head: 1) / delta(head: 2) > 0.1": None,
    "auroc(delta, [L0H3, L0H4]) > 0.5": 0.5,
    "pearson(delta, other) > 0.5": 0.0,
}
"""Lines that hold with six units → low end with five, None without an interval."""


@pytest.mark.parametrize("units", [5, 6])
@pytest.mark.parametrize(("line", "least"), LINES_OF_FEW.items())
def test_five_units_show_no_product_auroc_or_correlation(
    line: str, least: float | None, units: int
) -> None:
    """All have the same sign by chance with probability 2⁻⁴, whatever is computed from them."""
    random = np.random.default_rng(9)
    values = np.array([1.0, 5.0, 3.0, 7.0, 4.5, 2.0])[:, None] + 0.01 * random.normal(
        size=(6, units)
    )
    data = measure(values, np.zeros(units))
    one = finished(replace(plain(data), measures=(data, replace(data, effect="raw"))))
    other = finished(plain(measure(values + 0.01 * random.normal(size=(6, units)), [0.0] * units)))
    outcome = verdict(line, one, other=replace(other, name="other"))
    assert outcome.holds == (units == 6)
    if units == 5 and least is not None:
        assert outcome.low == least
        assert outcome.high is not None


def test_six_units_have_interval_and_p_by_sign_flips() -> None:
    values = np.array([[4.0, 5.0, 5.5, 6.0, 7.0, 8.0]])
    found = finished(plain(measure(values, np.zeros(6))), "delta > 3", test="flips")
    assert found.statistics[0].p[0] == pytest.approx(2 / 64)
    assert found.outcomes[0].holds
