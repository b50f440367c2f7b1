"""Loops over percentages, and the area under their curves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from mechdsl.base.text import Percent
from mechdsl.checks.conditions import CellSelection
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.results import Results
from mechdsl.show.reports.grid import is_numeric

from ..quick import some
from .support import HERE, MODES, Array, checked, experiment, patched, run
from .test_tokens import PLACES, expected, orders

CURVE = experiment(
    "curve",
    "for k in 0%..100% step 20% {",
    "  ablate embed at top k of places tokens with zero",
    "}",
    "measure prob(answer) as raw",
    "measure logit(answer) as delta",
    "expect auc(prob, k) < 0.9",
    "expect auc(delta, k) in -20..0",
    "expect auc(prob, k) = 0.5",
    prompts="fruit limit 6",
)
SHARES = [0, 20, 40, 60, 80, 100]


def trapezoid(values: Array) -> float:
    """Area under values at every 20%, divided by the range."""
    at = np.array(SHARES) / 100
    return float(sum((at[i + 1] - at[i]) * (values[i] + values[i + 1]) / 2 for i in range(5)))


@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
def test_points_of_a_curve_equal_reference(mode: str) -> None:
    text = CURVE + PLACES
    found = run(text, without=MODES[mode])
    rows = patched(found["curve"])
    ranked = orders(found["places"])
    for cell, share in zip(range(6), SHARES, strict=True):
        own = {
            row: order[: max(1, int(share * len(order) / 100 + 0.5)) if share else 0]
            for row, order in ranked.items()
        }
        assert np.allclose(rows[cell], expected(text, "curve", own, of=1), atol=1e-5)
        logits = patched(found["curve"], 1)[cell]
        assert np.allclose(logits, expected(text, "curve", own), atol=1e-4)
    assert np.array_equal(rows[0], found["curve"].measures[0].base[0])
    assert found["curve"].measures[0].inert.tolist() == [True, False, False, False, False, False]


def test_percentage_axis_has_text_labels_and_numeric_json() -> None:
    found = run(CURVE + PLACES)["curve"]
    assert [str(cell.coords["k"]) for cell in found.cells] == [f"{k}%" for k in SHARES]
    assert [cell.coords["k"] for cell in found.cells] == SHARES
    assert [str(r["k"]) for r in found.records()][::2] == [f"{float(k)}" for k in SHARES]

    document = json.loads(Results((FileResult("a.mech", (found,)),)).to_json())
    cells = document["files"][0]["experiments"][0]["cells"]
    assert [cell["coords"]["k"] for cell in cells] == SHARES


def test_mean_over_part_of_a_curve_equals_reference() -> None:
    lines = ["expect mean(prob, k: 0%..40%) > 0", "expect mean(prob, k: 0..40) > 0"]
    lines += ["expect prob(k: 40%) > 0"]
    text = CURVE.replace("expect auc(prob, k) < 0.9", "\n  ".join(lines))
    found = run(text + PLACES)["curve"]
    percent, plain, one, *_ = (outcome.value for outcome in found.outcomes)
    means = patched(found).mean(axis=1)
    assert percent == pytest.approx(means[:3].mean()) == plain
    assert one == pytest.approx(means[2])


def test_relative_depth_range_selects_cells() -> None:
    cells = [CellKey({"layer": depth}, "L0.z") for depth in ("0%", "33.3%", "66.7%", "100%")]
    half = CellSelection("", {"layer": ((Percent(0), Percent(50)),)})
    assert half.find(cells) == [0, 1]
    assert CellSelection("", {"layer": ((Percent(100), Percent(100)),)}).find(cells) == [3]
    assert CellSelection("", {"layer": ((0.0, 50.0),)}).find(cells) == []


def test_auc_expectation_equals_reference() -> None:
    text = CURVE.replace(
        "expect auc(prob, k) < 0.9", "stats test bootstrap\n  expect auc(prob, k) < 0.9"
    )
    found = run(text + PLACES)["curve"]
    below, within, equal = found.outcomes
    values = patched(found)
    assert below.value == pytest.approx(trapezoid(values.mean(axis=1)))
    # The area is linear, so it equals the mean of the areas of the rows.
    areas = np.array([trapezoid(row) for row in values.T])
    random = np.random.default_rng(0)
    drawn = areas[random.integers(0, len(areas), (10_000, len(areas)))]
    error = areas.std(ddof=1) / np.sqrt(len(areas))
    with np.errstate(divide="ignore", invalid="ignore"):
        pivots = (drawn.mean(1) - areas.mean()) / drawn.std(1, ddof=1) * np.sqrt(len(areas))
    upper, lower = np.percentile(pivots[np.isfinite(pivots)], [97.5, 2.5])
    t = stats.t.ppf(0.975, len(areas) - 1)
    if len(areas) < 8:
        upper, lower = t, -t
    assert below.low == pytest.approx(areas.mean() - error * max(upper, t), abs=0.2 * error)
    assert below.high == pytest.approx(areas.mean() - error * min(lower, -t), abs=0.2 * error)
    assert below.holds
    assert within.holds
    assert not equal.holds
    deltas = found.measures[1].patched - found.measures[1].base
    assert within.value == pytest.approx(trapezoid(deltas.mean(axis=1)))


def test_tokens_except_top_100_percent_is_the_base_run() -> None:
    """At 100%, no token is written, so the value is that of the base run."""
    text = CURVE.replace("at top k", "at tokens except top k") + PLACES
    found = run(text)["curve"]
    assert np.array_equal(patched(found)[-1], found.measures[0].base[0])
    assert not np.array_equal(patched(found)[0], found.measures[0].base[0])


def test_auc_expectation_selects_one_of_several_curves() -> None:
    text = experiment(
        "curve",
        "for k in 0%..100% step 50% {",
        "  ablate resid_post layer 0..1 at top k of places tokens with zero",
        "}",
        "measure prob(answer) as raw",
        "expect auc(prob, k, layer 1) < 2",
        "expect auc(prob, k, layer: 0) < 2",
        prompts="fruit limit 6",
    )
    found: ExperimentResult = run(text + PLACES)["curve"]
    means = patched(found).mean(axis=1)
    by_layer = {
        layer: [m for m, c in zip(means, found.cells, strict=True) if c.coords["layer"] == layer]
        for layer in (0, 1)
    }
    for outcome, layer in zip(found.outcomes, (1, 0), strict=True):
        a, b, c = by_layer[layer]
        assert outcome.value == pytest.approx((a + 2 * b + c) / 4)
    prob = experiment(
        "x",
        "for l in [0, 3] {",
        "  ablate mlp_out layer l at last token with zero",
        "}",
        "measure prob(answer) as raw",
        "expect auc(prob, l) < 2",
    )
    one = run(prob)["x"]
    assert one.outcomes[0].value == pytest.approx(patched(one).mean())


def test_expectation_at_a_percentage_selects_one_cell() -> None:
    text = CURVE.replace("expect auc(prob, k) = 0.5", "expect prob(k: 100%) < 0.5") + PLACES
    assert not [d for d in checked(text).diagnostics if d.severity == "error"]
    found = run(text)["curve"]
    assert found.outcomes[2].value == pytest.approx(patched(found)[-1].mean())


def test_expectation_over_a_range_of_percentages_selects_its_cells() -> None:
    """Both ends of the range are percentages."""
    lines = CURVE.replace("expect auc(prob, k) = 0.5", "expect mean(prob, k: 0%..40%) > 2")
    found = run(lines + PLACES)["curve"]
    (outcome,) = (each for each in found.outcomes if "0%..40%" in each.text)
    assert outcome.value == pytest.approx(float(patched(found)[:3].mean()))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ("[0, 2, 25%, 100%]", "measure prob(answer) as raw  expect auc(prob, k) < 2"),
        ("[0, 2, 25%, 100%]", "measure prob(answer) as raw auc over k"),
        ("[0%, 2]", "measure prob(answer) as raw  expect auc(prob, k) < 2"),
    ],
)
def test_curve_over_counts_and_percentages_is_an_error(values: str, line: str) -> None:
    rule = "ablate embed at top k of places tokens with zero"
    text = experiment("mixed", f"for k in {values} {{ {rule} }}", line) + PLACES
    (problem,) = (each for each in checked(text).diagnostics if each.severity == "error")
    assert "values of `k` are counts and percentages, but a curve needs one scale" in (
        problem.message
    )
    assert problem.help_text == "write all of them as counts, or all as percentages"


def test_counts_and_percentages_without_a_curve_are_separate_cells() -> None:
    rule = "ablate embed at top k of places tokens with zero"
    line = "measure prob(answer) as raw"
    text = experiment("mixed", f"for k in [2, 50%] {{ {rule} }}", line, prompts="fruit limit 6")
    found = run(text + PLACES)["mixed"]
    assert [cell.coords["k"] for cell in found.cells] == [2, Percent(50)]
    assert not is_numeric([cell.coords["k"] for cell in found.cells])


def test_curve_file_holds() -> None:
    found = run("", head=(HERE / "curve.mech").read_text(encoding="utf-8"))
    assert found["curve"].holds


def test_blocked_edges_to_no_keys_equal_the_base_run() -> None:
    text = experiment(
        "cut",
        "for k in 0%..50% step 25% {",
        "  block attention layers * from last token to top k of places tokens",
        "}",
        "measure logit(answer) as delta",
        prompts="fruit limit 6",
    )
    measure = run(text + PLACES)["cut"].measures[0]
    assert measure.inert.tolist() == [True, False, False]
    assert np.array_equal(measure.patched[0], np.broadcast_to(measure.base, (1, 6))[0])
    assert np.abs(measure.patched[1:] - measure.base).max() > 0.1
