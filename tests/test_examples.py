"""The shipped examples run, and their results agree with their comments."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from mechdsl import Results
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.syntax.frontend import read_source

from .baseline import compare
from .baseline.runs import EXAMPLES, FROZEN_NAMES, NAMES, run_example
from .quick import some

LONG = ("probes_against_patching", "refusal", "captions", "prices", "edits", "fit", "lens")
"""Examples that train for long; `tests/pipeline` has such trainings of small models."""
QUICK = [name for name in NAMES if name not in LONG]


@cache
def whole(name: str) -> Results:
    return run_example(name)


def results(name: str) -> dict[str, ExperimentResult]:
    return {each.name: each for each in whole(name)}


def means(found: ExperimentResult, measure: int = 0) -> dict[str, float]:
    """Site, and position if there are several, → mean effect."""
    many = "position" in found.axes
    return {
        f"{cell.site} {cell.coords['position']}" if many else cell.site: float(mean)
        for cell, mean in zip(found.cells, found.statistics[measure].mean, strict=True)
    }


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_expectations_of_an_example_hold(name: str) -> None:
    for each in results(name).values():
        assert each.holds, [outcome for outcome in each.outcomes if not outcome.holds]


@pytest.mark.parametrize("name", some(FROZEN_NAMES, QUICK))
def test_values_of_an_example_equal_frozen_values(name: str) -> None:
    """After an intended change, rewrite the values with `python -m tests.baseline --freeze`."""
    expected = json.loads(compare.FROZEN.read_text(encoding="utf-8"))[name]
    found = compare.frozen(whole(name).to_dict())
    assert list(found) == list(expected)
    for key, rows in expected.items():
        for number, (row, values) in enumerate(zip(rows, found[key], strict=True)):
            pairs = list(zip(row, values, strict=True))
            assert all(compare.close(*pair) for pair in pairs), f"{key}, row {number}: {pairs}"


def test_example_without_weights_reports_skipped_checks() -> None:
    source, _ = read_source(EXAMPLES / "gpt2_ioi.mech")
    assert source is not None
    checked = check_source(source)
    assert not has_errors(checked.diagnostics)
    told = render_full(checked.diagnostics, color=False, width=100)
    if checked.unchecked:  # nobody has downloaded it
        assert len(checked.unchecked) == 4
        assert "also checks layers, heads and sites (line" in told


def test_three_methods_find_the_same_induction_circuit() -> None:
    found = results("induction")
    attention = means(found["attention_pattern"])
    assert max(attention, key=attention.__getitem__).startswith("L1H1")
    ablated = means(found["by_ablation"])
    assert set(sorted(ablated, key=ablated.__getitem__)[:2]) == {"L0H2.z", "L1H1.z"}
    assert sorted(ablated.values())[1] < -5 < -0.1 < sorted(ablated.values())[2]
    paths = means(found["by_path"])
    assert min(paths, key=paths.__getitem__) == "L0H2.z → L1H1.k"
    assert sorted(paths.values())[0] < -5 < -0.01 < sorted(paths.values())[1]


def test_countscope_decodes_counts_of_the_first_items() -> None:
    found = results("countscope")
    read = means(found["countscope"])
    assert read["L1.resid_post item 2"] > 0.95
    assert read["L1.resid_post item 4"] > 0.8
    assert read["L3.resid_post item 2"] < 0.05
    commas = found["separators_are_shortcuts"].statistics[0].mean
    assert np.abs(commas).max() < 1e-4


def test_system2_heads_move_parts_without_adding_them() -> None:
    found = results("system2")
    stored = means(found["stored_in_the_last_item"])
    assert stored["L1.resid_post last-item of part1 token"] > 0.7
    assert abs(stored["L1.resid_post first-item of part1 token"]) < 0.05
    moved = means(found["moved_by_heads"])
    assert max(moved, key=moved.__getitem__) == "L3H1.z"
    cut = found["cut_the_route"].statistics[0].mean
    assert cut[0] < -1.5
    assert abs(cut[1]) < 0.05
    assert np.abs(found["aggregated_at_the_end"].statistics[0].mean).max() < 0.1


def test_steering_direction_shifts_the_count_but_is_not_necessary() -> None:
    found = results("steering")
    half, whole_one, twice = found["dose"].statistics[0].mean[1:4]
    assert max(abs(half), abs(whole_one)) < 0.001
    assert round(float(twice), 1) == 1.7
    assert not found["remove"].statistics[0].mean.any()
    selected = found["select"].statistics[0].mean
    assert selected.argmax() == 3
    assert round(float(selected[3]), 1) == 1.1
    tested, band = found["test"].statistics[0].mean, found["test"].control(0)
    assert band is not None
    assert [round(float(each), 1) for each in tested] == [4.8, 4.8, 5.3, 0.8]
    assert band.high.max() < 1.5
    assert np.abs(found["function_vector"].statistics[0].mean).max() < 0.001


@pytest.mark.slow
def test_only_the_refusal_direction_removes_refusals() -> None:
    found = results("refusal")
    selected = found["select"].statistics[0].mean
    assert selected.argmax() == 1
    for name, measure, low, high in (
        ("ablated", 0, 0.95, 1.0),
        ("ablated", 1, 0.0, 0.05),
        ("subtracted", 0, 0.9, 1.0),
        ("added", 0, 0.0, 0.05),
    ):
        band = found[name].control(measure)
        assert band is not None
        assert low <= band.low.min() <= band.high.max() <= high, name
