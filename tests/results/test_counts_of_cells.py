"""Prompt counts of cells: in captions, in cells with fewer prompts, and in JSON."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mechdsl.program import spec
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.results import Results
from mechdsl.show.output import save_report, show_report
from mechdsl.show.reports.charts import MAX_COUNTED_MARKS
from mechdsl.show.reports.map_charts import heatmap_chart
from mechdsl.show.reports.series_charts import bars_chart, lines_chart

from .svg_text import texts_of
from .synthetic import counted, finished, heads, measure, report, swept

SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
MAP = report("heatmap", variable="layer", by="item")


def uneven() -> ExperimentResult:
    """Item k has the rows of at least k items: 96, 96, 76, 57, 38, 19."""
    return finished(counted())


def printed(result: ExperimentResult, line: spec.Report, width: int = 120) -> str:
    out = io.StringIO()
    show_report(result, line, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def drawn(result: ExperimentResult, line: spec.Report, folder: Path) -> list[str]:
    path = folder / "picture.svg"
    save_report(result, line, path)
    return [each.text for each in texts_of(path.read_text(encoding="utf-8"))]


def expected(result: ExperimentResult, measure: int = 0) -> list[int]:
    """Count prompts directly, without the statistics."""
    return [int(np.count_nonzero(~np.isnan(row))) for row in result.measures[measure].patched]


def test_terminal_heatmap_shows_n_in_cells_with_fewer_prompts() -> None:
    result = uneven()
    said = printed(result, MAP)
    n = expected(result)
    assert "n = 19 to 96" in said
    assert "subscripts: n of cells with fewer than 96 prompts" in said
    rows = [line for line in said.splitlines() if re.match(r"[012] +\d\.\d", line)][:3]
    for layer, line in zip((2, 1, 0), rows, strict=True):
        cells = re.findall(r"~?\d\.\d\d([₀-₉]*)", line)
        own = [int(text.translate(SUBSCRIPTS)) if text else 96 for text in cells]
        assert own == n[6 * layer : 6 * layer + 6]
    assert len({len(line.rstrip()) for line in rows}) == 1


@pytest.mark.parametrize("kind", ["heatmap", "lines", "bars"])
def test_equal_counts_appear_only_in_the_caption(kind: str, tmp_path: Path) -> None:
    result = finished(heads())
    line = report(kind, variable="layer", by="head")
    said = printed(result, line)
    assert "· n = 64" in said
    assert not re.search("[₀-₉]", said)
    assert not re.search(r"^layer.*\bn\b", said, re.MULTILINE)
    texts = drawn(result, line, tmp_path)
    assert any("· n = 64" in text for text in texts)
    assert not any("fewer than" in text for text in texts)
    assert "64" not in texts


def test_heatmap_picture_shows_n_in_cells_with_fewer_prompts(tmp_path: Path) -> None:
    result = uneven()
    texts = drawn(result, MAP, tmp_path)
    assert texts.count("small: n of cells with fewer than 96 prompts") == 2
    for n in (76, 57, 38, 19):
        assert texts.count(str(n)) == 2 * 3  # measures and layers
    assert "96" not in texts


def test_dense_heatmap_marks_the_corner_instead_of_n() -> None:
    result = swept(20, 20)
    (data,) = result.measures
    patched = data.patched.copy()
    patched[7, 5:] = np.nan
    result = finished(replace(result, measures=(replace(data, patched=patched),)), resamples=100)
    chart = heatmap_chart(result, report("heatmap", variable="layer", by="head")).to_dict()
    (each,) = chart["vconcat"]
    marks = [layer["mark"] for layer in each["layer"]]
    shapes = [mark["shape"] for mark in marks if "shape" in mark]
    assert shapes == ["triangle-left"]
    assert (
        "corner (under the pointer): n of cells with fewer than 24 prompts"
        in each["title"]["subtitle"]
    )
    (fewer,) = [row for row in values(chart) if row["fewer"]]
    assert (fewer["n"], fewer["hover"].split("n = ")[1]) == ("5", "5")


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_terminal_lines_and_bars_have_a_column_n(kind: str) -> None:
    result = uneven()
    said = printed(result, report(kind, variable="item"))
    n = expected(result)[:6]
    rows = re.findall(r"^item \d token +(\d+) ", said, re.MULTILINE)
    assert [int(each) for each in rows[:6]] == n
    assert re.search(r"^(item|position) +n +mean", said, re.MULTILINE)


@pytest.mark.slow
def test_bars_picture_shows_n_of_cells_with_fewer_prompts(tmp_path: Path) -> None:
    result = uneven()
    texts = drawn(result, report("bars", variable="item", by="layer"), tmp_path)
    assert texts.count("76") == 3 + 3  # bars of three layers, and three panels of stacks
    assert texts.count("19") == 3 + 3
    assert "96" not in texts


def values(part: Any) -> list[dict[str, Any]]:
    """The records of a chart."""
    if isinstance(part, dict) and isinstance(part.get("hover"), str):
        return [part]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [record for each in parts for record in values(each)]


def test_lines_show_n_at_points_or_in_line_names() -> None:
    result = uneven()
    n = expected(result)
    words = lines_chart(result, report("lines", variable="item", by="layer")).to_dict()
    shown = [row for row in values(words) if row["n"]]
    # one label per position, since all layers have the same n there
    assert sorted(str(row["n"]) for row in shown) == ["19", "38", "57", "76"]
    numbers = lines_chart(result, report("lines", variable="layer", by="item")).to_dict()
    names = {str(row["line"]) for row in values(numbers)}
    assert names == {f"item {k + 1} token (n = {n[k]})" for k in range(6)}
    assert not any(row["n"] for row in values(numbers))


def test_chart_with_too_many_marks_shows_n_in_tooltips() -> None:
    result = swept(12, 12)
    (data,) = result.measures
    patched = data.patched.copy()
    patched[1:, 5] = np.nan
    result = finished(replace(result, measures=(replace(data, patched=patched),)), resamples=100)
    chart = bars_chart(result, report("bars", variable="layer", by="head")).to_dict()
    assert len(patched) > MAX_COUNTED_MARKS
    assert not any(row["n"] for row in values(chart))
    assert "under the pointer: n of cells with fewer than 24 prompts" in json.dumps(chart)


def test_json_has_n_per_measure_where_it_differs_from_the_cell() -> None:
    """A cell has the largest n; a measure has an `n` only if it is smaller."""
    result = heads()
    (data,) = result.measures
    patched = data.patched.copy()
    patched[4, 10:], patched[9, :3] = np.nan, np.nan
    other = replace(data, label="other", patched=patched)
    result = finished(replace(result, measures=(data, other)), resamples=100)
    found = Results((FileResult("x.mech", (result,)),), {"mechdsl": "0.1.0"}).to_dict()
    cells = found["files"][0]["experiments"][0]["cells"]
    for number, cell in enumerate(cells):
        counts = [expected(result, m)[number] for m in (0, 1)]
        assert cell["n"] == max(counts)
        assert [each.get("n", cell["n"]) for each in cell["measures"]] == counts
        assert all("n" not in each for each in cell["measures"]) == (number not in (4, 9))
    rows = {
        (r["axis_n"] if "axis_n" in r else r["site"], r["label"]): r["n"] for r in result.records()
    }
    assert rows[result.cells[4].site, "other"] == 10
    assert rows[result.cells[4].site, "ld"] == 64


@pytest.mark.slow
def test_measures_have_independent_colour_scales() -> None:
    """Regression: a category next to a number was coloured on the scale of the number."""
    result = uneven()
    for chart in (
        heatmap_chart(result, MAP),
        bars_chart(result, report("bars", variable="item", by="layer")),
    ):
        scales = chart.to_dict()["resolve"]["scale"]
        assert (scales["color"], scales["shape"]) == ("independent", "independent")


@pytest.mark.parametrize(
    ("correction", "said"),
    [
        ("holm", "only the corrected p-values account for that\n"),
        ("bh", "intervals and p-values don't account for that\n"),
        ("none", "intervals and p-values don't account for that\n"),
    ],
)
def test_table_states_that_rows_were_selected_by_effect_size(correction: str, said: str) -> None:
    result = finished(heads(), correction=correction)
    assert said in printed(result, report("table", top=3), 140)
    assert "selected by effect size" not in printed(result, report("table"), 140)
    assert "selected by effect size" not in printed(result, report("table", top=12), 140)


def test_selected_rows_without_a_test_mention_only_intervals() -> None:
    result = heads()
    raw = measure(result.measures[0].patched, result.measures[0].base, effect="raw")
    result = finished(replace(result, measures=(raw,)))
    said = printed(result, report("table", top=3), 140)
    assert "cells were selected by effect size; the intervals don't account for that\n" in said
