"""Descriptions of features from a file, in tables, JSON and data frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.results.experiment_result import ExperimentResult

from .support import codes, experiment, run_file, try_file
from .test_dictionaries import LAYER, make
from .test_inactive_features import width_of

BASIS = f'basis f = sae("sae", labels: "labels.jsonl") at resid_post layer {LAYER}\n'
OBSERVED = experiment("e", "observe features of f at last token", measure="", stats="")
RULE = experiment("e", "ablate feature 0..3 of f at last token with zero")


def labelled(folder: Path, *lines: object) -> None:
    make(folder, "standard", width_of("llama"))
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    (folder / "labels.jsonl").write_text(text + "\n", encoding="utf-8")


def ran(text: str, folder: Path) -> ExperimentResult:
    return run_file(BASIS + text, folder, "llama", "planned")["e"]


NEURONPEDIA = [
    {"modelId": "m", "layer": "1-res", "index": "2", "description": "months\n of  the year"},
    {"modelId": "m", "layer": "1-res", "index": "2", "description": "a second one"},
    {"index": 0, "description": None},
    {"feature": 1, "label": "words [bold]in brackets[/bold]"},
    {"index": 400, "description": "of no feature here"},
]


@pytest.mark.parametrize("text", [OBSERVED, RULE], ids=["observed", "rule"])
def test_labels_appear_in_tables_cells_and_records(text: str, data: Path) -> None:
    labelled(data, *NEURONPEDIA, "")
    found = ran(text, data)
    labels = {cell.coords["feature"]: cell.label for cell in found.cells if cell.label}
    assert labels == {2: "months of the year", 1: "words [bold]in brackets[/bold]"}
    table = found.to_text(160)
    assert "months of the year" in table
    assert "words [bold]in brackets[/bold]" in table
    assert "3 labels" in found.conventions["basis f"]
    by_feature = {each["feature"]: each["feature_label"] for each in found.records()}
    assert by_feature[2] == "months of the year"
    assert by_feature[3] == ""


def test_joined_features_have_no_label(data: Path) -> None:
    labelled(data, *NEURONPEDIA)
    found = ran(experiment("e", "ablate features 1, 2 of f at last token with zero"), data)
    assert [cell.label for cell in found.cells] == [""]


def found(text: str, folder: Path) -> Diagnostic:
    result, (diagnostic,) = try_file(text, folder, "llama")
    assert result is None
    return diagnostic


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1 of `labels.jsonl` has no description"),
        ([{"index": 1, "description": "a"}, [2]], "line 2 of"),
        ([{"index": "x", "description": "a"}], "line 1 of"),
        ([{"description": "a"}], "line 1 of"),
        ([{"index": 1}], "line 1 of"),
        ([""], "describes no feature"),
        ([{"index": 1, "description": " "}], "describes no feature"),
    ],
)
def test_invalid_label_files_are_errors(lines: list[object], said: str, data: Path) -> None:
    labelled(data, *lines)
    problem = found(BASIS + OBSERVED, data)
    assert problem.code == "E0342"
    assert said in problem.message
    assert '{"index": 12, "description"' in problem.help_text


def test_missing_label_file_is_an_error(data: Path) -> None:
    make(data, "standard", width_of("llama"))
    (data / "labels.jsonl").unlink(missing_ok=True)
    problem = found(BASIS + OBSERVED, data)
    assert problem.code == "E0342"
    assert "`labels.jsonl` can't be read" in problem.message


def test_invalid_labels_option_is_an_error(data: Path) -> None:
    labelled(data, *NEURONPEDIA)
    assert codes(BASIS.replace('"labels.jsonl"', "3") + OBSERVED, data) == ["E0342"]
    assert codes(BASIS.replace("labels:", "label:") + OBSERVED, data) == ["E0207"]
