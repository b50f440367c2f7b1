"""Prompts in which observed features are most active: in text, HTML, JSON and stored runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mechdsl
from mechdsl.results.document import results_schema
from mechdsl.results.experiment_result import ActiveText, ExperimentResult
from mechdsl.show.reports.table import (
    CHARACTERS_AFTER,
    CHARACTERS_BEFORE,
    SHOWN_AFTER,
    SHOWN_BEFORE,
)

from ..fruit import FRUIT

FILE = (
    FRUIT
    + """
basis numbers = pca(fruit, dims: 4, limit: 16) at resid_post layer 2 at last token
experiment seen {
  model toy
  prompts fruit limit 8
  observe features of numbers at tokens * top 2
  REPORT
}
"""
)

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def observed(report: str = "", **options: Any) -> ExperimentResult:
    return mechdsl.run(FILE.replace("REPORT", report), **options)["seen"]


def test_text_brackets_the_highest_activation_of_each_prompt() -> None:
    result = observed()
    text = result.to_text(200)
    block = text.partition("most active prompts")[2].partition("conventions")[0]
    lines = [line for line in block.splitlines() if "[" in line]
    assert len(lines) == 2 * 3
    first = result.active[0][0]
    values = [value or 0 for value in first.values]
    token = first.tokens[values.index(max(values))].strip()
    assert re.findall(r"\[(.*?)\]", lines[0]) == [token]
    assert f"feature {result.cells[0].coords['feature']}" in block


def test_only_displayed_features_have_prompts() -> None:
    result = observed("report table top 1")
    block = result.to_text(200).partition("most active prompts")[2]
    assert len(re.findall(r"^feature ", block, re.MULTILINE)) == 1


def test_table_by_a_value_has_the_prompts_once() -> None:
    block = observed("report table by count").to_text(200).partition("most active prompts")[2]
    assert len(re.findall(r"^feature ", block, re.MULTILINE)) == 2


def test_long_prompts_are_cut_around_the_highest_activation() -> None:
    from dataclasses import replace

    result = observed()
    size = 200
    tokens = tuple(f" t{n}" for n in range(size))
    values = tuple(5.0 if n == 100 else 0.5 for n in range(size))
    long = replace(result, active=((ActiveText(3, tokens, values),), ()))
    text = " ".join(long.to_text(400).partition("most active prompts")[2].split())
    assert "[t100]" in text
    assert f"… t{100 - SHOWN_BEFORE} " in text
    assert f"t{100 + SHOWN_AFTER} …" in text
    assert f"t{100 - SHOWN_BEFORE - 1} " not in text
    assert f"t{100 + SHOWN_AFTER + 1}" not in text


def test_long_tokens_are_cut_by_their_characters() -> None:
    from dataclasses import replace

    result = observed()
    tokens = tuple(f" photo row {n} col {n}" for n in range(10, 50))  # 20 characters each
    values = tuple(5.0 if n == 30 else 0.5 for n in range(10, 50))
    long = replace(result, active=((ActiveText(3, tokens, values),), ()))
    text = " ".join(long.to_text(400).partition("most active prompts")[2].split())
    assert f"… photo row {30 - CHARACTERS_BEFORE // 20} col" in text
    assert f"photo row {30 + CHARACTERS_AFTER // 20} col {30 + CHARACTERS_AFTER // 20} …" in text


def test_html_shades_tokens_and_escapes_them() -> None:
    from dataclasses import replace

    result = observed()
    page = result._repr_html_()
    assert page.count("<span style=") > 6
    assert "background:rgb(" in page
    hostile = ActiveText(0, (" <script>", " a&b"), (1.0, None))
    page = replace(result, active=((hostile,), (hostile,)))._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_json_has_tokens_and_activations() -> None:
    results = mechdsl.run(FILE.replace("REPORT", ""))
    document = json.loads(results.to_json())
    jsonschema.validate(document, results_schema())
    cells = document["files"][0]["experiments"][0]["cells"]
    for cell, prompts in zip(cells, results["seen"].active, strict=True):
        assert [each["row"] for each in cell["active"]] == [each.row for each in prompts]
        assert cell["active"][0]["tokens"] == list(prompts[0].tokens)
        assert cell["active"][0]["values"] == pytest.approx(list(prompts[0].values))


def test_stored_run_has_the_same_prompts_and_features(tmp_path: Path) -> None:
    path = tmp_path / "seen.mech"
    path.write_text(FILE.replace("REPORT", ""), encoding="utf-8")
    first, again = (mechdsl.run(path, store=tmp_path / "store") for _ in range(2))
    assert any("unchanged since" in note for note in again.notes)
    assert again["seen"].active == first["seen"].active
    assert again["seen"].cells == first["seen"].cells
    assert again["seen"].to_text(120) == first["seen"].to_text(120)


def test_features_do_not_depend_on_another_experiment(tmp_path: Path) -> None:
    """The second run reads the experiment's values from the store and selects features again."""
    path, text = tmp_path / "seen.mech", FILE.replace("REPORT", "")
    path.write_text(text, encoding="utf-8")
    first = mechdsl.run(path, store=tmp_path / "store")["seen"]
    more = "experiment more { model toy prompts fruit limit 8 measure entropy as raw }\n"
    path.write_text(text + more, encoding="utf-8")
    again = mechdsl.run(path, store=tmp_path / "store")["seen"]
    assert again.cells == first.cells
    assert again.active == first.active


def test_edited_labels_are_reread(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1].parent / "examples" / "systems" / "induction-features"
    path = tmp_path / "seen.mech"
    path.write_text(
        f"""mech 1
model lm = zoo("induction")
prompts words {{ template "one two three" }}
basis f = sae("{folder}", labels: "labels.jsonl") at z layer 1
experiment seen {{
  model lm
  prompts words
  observe features of f at last token
}}
""",
        encoding="utf-8",
    )
    for label in ("first", "second"):
        line = json.dumps({"index": 3, "description": label})
        (tmp_path / "labels.jsonl").write_text(line, encoding="utf-8")
        results = mechdsl.run(path, store=tmp_path / "store")
        assert results["seen"].cells[3].label == label


def test_two_models_have_separate_features(tmp_path: Path) -> None:
    text = FILE.replace("REPORT", "").replace(
        "experiment seen {\n  model toy",
        'model twin = zoo("counting")\nexperiment seen {\n  model toy, twin',
    )
    result = mechdsl.run(text)["seen"]
    assert len(result.cells) == 4
    assert len(result.active) == 4
    assert [cell.coords["model"] for cell in result.cells] == ["toy", "toy", "twin", "twin"]
    assert result.active[:2] == result.active[2:]
