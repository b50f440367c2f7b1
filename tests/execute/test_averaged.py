"""`mean over`: each row's mean along an axis, before any statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mechdsl.results.assembly.combination import average_over_axis
from mechdsl.statistics.measurements import RandomControlValues

from ..quick import in_turn
from ..rules.support import QUICK, experiment, run_file, try_file, write_data

PATCH = ("from longer into other", "patch resid_post layer 0..1 at each item token")
MEASURES = {
    "delta": "measure logit(answer) - logit(wrong) as delta",
    "relative": "measure entropy as relative",
    "raw": "measure entropy as raw",
}
UNCORRECTED = "stats correct none"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("measure", "mode"), in_turn(MEASURES, QUICK))
def test_mean_over_items_equals_the_mean_of_each_row(folder: Path, measure: str, mode: str) -> None:
    """Rows with fewer items are averaged over those that they have."""
    line = MEASURES[measure]
    text = experiment("every", *PATCH, measure=line, stats=UNCORRECTED)
    text += experiment("mean", *PATCH, measure=f"{line} mean over item", stats=UNCORRECTED)
    found = run_file(text, folder, "llama", mode)
    every, mean = found["every"], found["mean"]
    assert every.axes == ("layer", "position")
    assert mean.axes == ("layer",)
    assert [dict(cell.coords) for cell in mean.cells] == [{"layer": 0}, {"layer": 1}]
    data = every.measures[0]
    values = data.patched.reshape(2, -1, every.prompts)
    assert np.isnan(values).any(), "no row lacks an item"
    expected, base = np.nanmean(values, axis=1), data.base[0]
    np.testing.assert_allclose(mean.measures[0].patched, expected, atol=1e-9)
    np.testing.assert_allclose(mean.measures[0].base, [base, base], atol=1e-9)
    assert mean.statistics[0].n.tolist() == [every.prompts] * 2
    point = expected.mean(1) - (0 if measure == "raw" else base.mean())
    if measure == "relative":
        point /= abs(base.mean())
    np.testing.assert_allclose(mean.statistics[0].mean, point, atol=1e-9)
    assert "over position, per row" in mean.conventions["mean"]


def test_mean_over_measured_items_has_base_values_and_a_band(folder: Path) -> None:
    """The items are positions of the measure; the experiment has a random control."""
    lines = ("ablate z layer 1 head 1 at subject token with zero", "against random(2)")
    measure = "measure entropy at each item token as delta"
    text = experiment("every", *lines, measure=measure, stats=UNCORRECTED)
    averaged = f"{measure} mean over item"
    text += experiment("mean", *lines, measure=averaged, stats=UNCORRECTED)
    found = run_file(text, folder, "gpt2", "planned")
    every, mean = found["every"].measures[0], found["mean"].measures[0]
    np.testing.assert_allclose(mean.patched[0], np.nanmean(every.patched, axis=0), atol=1e-9)
    there = np.where(np.isnan(every.patched), np.nan, every.base)
    np.testing.assert_allclose(mean.base[0], np.nanmean(there, axis=0), atol=1e-9)
    (band,) = found["mean"].controls
    assert band is not None
    assert band.low.shape == (1,)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("measure entropy as raw mean over head", "no axis `head`"),
        ("measure argmax(1..2) as raw mean over item", "categories have no mean"),
        ("measure entropy as raw mean over item measure loss as raw", "averaged differently"),
    ],
)
def test_invalid_mean_over_is_an_error(folder: Path, measure: str, words: str) -> None:
    result, diagnostics = try_file(experiment("e", *PATCH, measure=measure), folder, "llama")
    assert result is None
    (error,) = [d for d in diagnostics if d.severity == "error"]
    assert error.code == "E0612"
    assert words in error.message


def test_mean_over_aggregates_inert_marks_rounding_gaps_and_draws(folder: Path) -> None:
    """A mean is inert if all of its cells are; rounding, gaps and draws are those of all cells."""
    whole = experiment("every", *PATCH, measure="measure entropy as delta", stats=UNCORRECTED)
    every = run_file(whole, folder, "llama", "planned")["every"]
    data = every.measures[0]
    cells, prompts = data.patched.shape
    size = cells // 2
    there = ~np.isnan(data.patched)
    generator = np.random.default_rng(0)
    rounding = generator.random((cells, prompts))
    inert = np.arange(cells) >= size - 1
    gaps = tuple("not measured" if n == cells - 1 else "" for n in range(cells))
    seen = np.zeros((cells, prompts), dtype=np.int64)
    seen[1, 0] = seen[size + 1, prompts - 1] = 1
    draws = generator.random((3, cells, prompts))
    counts = np.array([2 if n == 1 else 3 for n in range(cells)])
    made = replace(
        every,
        measures=(replace(data, rounding=rounding, inert=inert, gaps=gaps, seen=seen),),
        drawn=RandomControlValues((draws,), counts, 3, "random heads"),
    )
    found = average_over_axis(made, "item")
    mean = found.measures[0]
    assert mean.inert.tolist() == [False, True]
    assert mean.gaps == ("", "not measured")
    of_rows = np.where(there, rounding, np.nan).reshape(2, size, prompts)
    np.testing.assert_allclose(mean.rounding, np.nanmean(of_rows, axis=1))
    assert mean.seen is not None
    for cell, own in enumerate((0, prompts - 1)):
        others = [n for n in range(prompts) if n != own]
        assert len(set(mean.seen[cell, others].tolist())) == 1
        assert mean.seen[cell, own] != mean.seen[cell, others[0]]
    assert found.drawn is not None
    assert found.drawn.counts.tolist() == [2, 3]
    expected = draws.reshape(3, 2, size, prompts).mean(2)
    expected[2, 0] = np.nan
    np.testing.assert_allclose(found.drawn.values[0], expected)
