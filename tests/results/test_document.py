"""The JSON document, its schema, and results in memory."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from mechdsl.results.document import experiment_document, results_schema
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.results import Results

from .synthetic import counted, finished, heads, measure, positions, with_controls


@pytest.fixture(name="results", scope="module")
def _results() -> Results:
    first = finished(heads(), "max(recovery) > 0.3", "recovery(L2H1) > 0.9")
    second = finished(positions())
    versions = {"mechdsl": "0.1.0", "torch": "2.13.0"}
    return Results((FileResult("counting.mech", (first, second), "sha256:3", 0),), versions)


def validate(document: dict[str, Any]) -> None:
    schema = results_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)


def test_json_document_matches_its_schema(results: Results) -> None:
    document = json.loads(results.to_json())
    validate(document)
    assert document["schema"] == 2
    assert document["mechdsl"] == "0.1.0"
    file = document["files"][0]
    assert file["file"] == "counting.mech"
    assert (file["hash"], file["seed"]) == ("sha256:3", 0)
    found = file["experiments"][0]
    assert found["name"] == "where"
    assert found["axes"] == ["layer", "head"]
    assert found["hashes"] == {"model": "sha256:1", "data": "sha256:2"}
    cell = found["cells"][9]
    assert list(cell["coords"]) == found["axes"]
    assert cell["coords"] == {"layer": 2, "head": 1}
    assert cell["site"] == "L2H1.z"
    assert cell["at"] == {"position": "last-item token", "tokens": ["fig", "plum"]}
    assert cell["n"] == 64
    (each,) = cell["measures"]
    assert each["label"] == "ld"
    assert each["metric"] == "logit(answer) - logit(wrong)"
    assert each["effect"] == "recovery"
    assert each["low"] < each["mean"] < each["high"]
    assert each["p"] <= each["p_corrected"] < 0.05
    assert "reason" not in each
    assert "commonest" not in each
    clean = {entry["label"]: entry for entry in found["runs"]["clean"]}
    assert clean["ld"]["mean"] == pytest.approx(each["source"])
    assert clean["accuracy"]["mean"] == pytest.approx(60 / 64)
    assert clean["accuracy"]["n"] == 64
    assert found["conventions"]["dtype"] == "float32"
    assert found["conventions"]["correction"] == "Holm, over 8 cells"
    first, second = found["expect"]
    assert first["text"] == "max(recovery) > 0.3"
    assert first["holds"] is True
    assert first["low"] < first["value"] < first["high"]
    assert second["holds"] is False


def test_swept_position_is_an_axis(results: Results) -> None:
    found = json.loads(results.to_json())["files"][0]["experiments"][1]
    assert found["axes"] == ["layer", "position"]
    assert found["cells"][1]["coords"] == {"layer": 0, "position": "last-item of part1 token"}


def test_missing_statistics_are_null_with_a_reason() -> None:
    result = heads()
    data = result.measures[0]
    patched = data.patched.copy()
    patched[5], patched[6, 1:] = np.nan, np.nan
    raw = replace(data, effect="raw", source=None, label="raw ld", patched=patched)
    result = finished(replace(result, measures=(replace(data, patched=patched), raw)))
    found = Results((FileResult("x.mech", (result,)),), {"mechdsl": "0.1.0"}).to_dict()
    validate(found)
    cells = found["files"][0]["experiments"][0]["cells"]
    assert cells[0]["measures"][0]["inert"] is True
    assert cells[5]["n"] == 0
    assert cells[5]["measures"][0]["mean"] is None
    assert cells[6]["measures"][0]["low"] is None
    for cell in cells:
        for each in cell["measures"]:
            numbers = [each[key] for key in ("mean", "low", "high", "p", "p_corrected")]
            assert all(number is None or math.isfinite(number) for number in numbers)
            if None in numbers:
                assert each["reason"]


def test_category_measures_have_commonest_share_and_mean_error() -> None:
    result = heads()
    random = np.random.default_rng(0)
    values = random.integers(3, 6, result.measures[0].patched.shape).astype(float)
    data = measure(
        values,
        values[:1],
        label="argmax(1..9)",
        metric="argmax(1..9)",
        effect="raw",
        kind="category",
        truth=np.full((1, 64), 4.0),
    )
    runs = {"clean": {"argmax(1..9)": values[0]}}
    result = finished(replace(result, measures=(data,), runs=runs))
    document = experiment_document(result).as_json()
    each = document["cells"][0]["measures"][0]
    assert each["commonest"] in (3.0, 4.0, 5.0)
    assert 0 < each["share"] < 1
    assert each["mean"] is None
    assert each["reason"].startswith("a category has no mean")
    run = document["runs"]["clean"][0]
    assert run["commonest"] == each["commonest"]
    assert run["mean_error"] == pytest.approx(np.abs(values[0] - 4).mean())


def test_null_band_is_part_of_its_measure_in_json() -> None:
    result = finished(with_controls(counted()))
    found = Results((FileResult("x.mech", (result,)),), {"mechdsl": "0.1.0"}).to_dict()
    validate(found)
    number, category = found["files"][0]["experiments"][0]["cells"][0]["measures"]
    band = number["null"]
    assert band["low"] < band["mean"] < band["high"]
    assert (band["draws"], band["what"]) == (39, "random heads")
    assert "null" not in category
    first, second = result.records()[:2]
    assert first["null_low"] == band["low"]
    assert second["null_low"] is None
    assert "null_low" not in finished(counted()).records()[0]


def test_experiment_without_rules_has_one_cell() -> None:
    result = heads()
    data = measure(np.ones((1, 64)), np.ones(64), effect="raw", label="correct")
    cell = replace(result.cells[0], coords={}, site="", position=None, tokens=())
    result = finished(replace(result, axes=(), cells=(cell,), measures=(data,), source=None))
    document = experiment_document(result).as_json()
    assert document["cells"][0]["coords"] == {}
    assert document["cells"][0]["at"] == {"position": None, "tokens": []}


def test_results_are_indexed_by_experiment_name(results: Results, tmp_path: Path) -> None:
    assert isinstance(results["where"], ExperimentResult)
    assert [each.name for each in results] == ["where", "where_is_the_count"]
    assert len(results) == 2
    assert not results.holds
    with pytest.raises(KeyError, match="`where`, `where_is_the_count`"):
        results["nowhere"]
    path = tmp_path / "out.json"
    assert results.to_json(path) + "\n" == path.read_text(encoding="utf-8")
    assert results._repr_html_().count("<thead>") == 2
    assert "<td>L2H1.z</td>" in plain(results["where"]._repr_html_())


def plain(html: str) -> str:
    """Remove attributes from HTML tags."""
    return re.sub(r"<(\w+) [^>]*>", r"<\1>", html)


def test_to_pandas_has_one_row_per_cell(results: Results) -> None:
    frame = results.to_pandas()
    assert len(frame) == 12 + 12
    row = frame[(frame.layer == 2) & (frame["head"] == 1)].iloc[0]
    assert row["effect"] == "recovery"
    assert row["mean"] == pytest.approx(0.6, abs=0.05)


def test_total_effect_is_tested_in_inert_cells() -> None:
    result = heads()
    total = replace(result.measures[0], effect="total")
    result = finished(replace(result, measures=(total,)))
    assert result.statistics[0].tests == 1, "one number in every cell"
    assert result.statistics[0].tested.all()
    assert set(result.statistics[0].reasons) == {None}


def test_axis_named_like_a_column_gets_a_prefix() -> None:
    cells = tuple(
        replace(cell, coords={"n": cell.coords["layer"], "head": cell.coords["head"]})
        for cell in heads().cells
    )
    result = finished(replace(heads(), axes=("n", "head"), cells=cells))
    record = result.records()[9]
    assert (record["axis_n"], record["head"], record["n"]) == (2, 1, 64)
    assert "<td>2</td><td>1</td><td>L2H1.z</td>" in plain(result._repr_html_())


def test_to_pandas_without_pandas_names_the_extra(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"mechdsl\[frames\]"):
        results.to_pandas()


def test_sampling_before_statistics_raises_an_error() -> None:
    with pytest.raises(ValueError, match="no statistics yet"):
        _ = heads().sampling


def test_records_have_effective_n_and_flag_p_at_its_floor() -> None:
    plain = finished(heads())
    grouped = finished(
        replace(heads(), row_values={"a": [i % 6 for i in range(64)]}), by="a", correction="none"
    )
    assert {each["effective_n"] for each in plain.records()} == {64}
    assert {each["effective_n"] for each in grouped.records()} == {6}
    flips = finished(heads(), test="flips")
    found = flips.records()[9]  # a clear effect: none of 10,000 flips is as far from 0
    assert (found["p_at_most"], found["p"]) == (True, pytest.approx(2 / 10_001))
    assert not any(each["p_at_most"] for each in (*plain.records(), *grouped.records()))
