"""Command output for experiments with several models or sources, or runs of other blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mechdsl.cli.entry import app

from ..fruit import FRUIT

TEXT = (
    FRUIT
    + """
model twin = zoo("counting")

prompts blank {
  template "Part 1: fig Count 1:"
  corrupt pear { template "Part 1: pear Count 1:" }
}

experiment compare {
  model toy, twin
  prompts fruit limit 8
  from clean, blank.pear into fewer
  patch resid_post layer 50%, 100% at last token
  measure logit(answer) as delta
  report heatmap layer by model
  report lines model by layer
}

experiment other {
  model toy
  prompts fruit limit 8
  from fruit into blank
  patch resid_post layer 2 at last token
  measure logit(answer) as delta
}

experiment across {
  prompts fruit limit 8
  from twin into toy
  patch resid_post layer 2 at last token
  measure logit(answer) as delta
}
"""
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.mech"
    path.write_text(TEXT, encoding="utf-8")
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_validate_plan_and_graph_show_variants(file: Path) -> None:
    assert "no errors" in call("validate", file).stdout
    shown = call("plan", file).stdout
    assert "compare (model: toy, source: blank.pear)" in " ".join(shown.split())
    assert "Forward · twin on clean" in shown
    assert "toy on blank.pear" in call("graph", file, "--format", "dot").stdout


def test_explain_shows_variants_and_runs_of_other_blocks(file: Path) -> None:
    shown = call("explain", file).stdout
    assert "experiment compare (model: twin, source: clean)" in shown
    assert "blank.pear, row 0: 'Part 1: pear Count 1:'" in shown
    found = json.loads(call("explain", file, "--format", "json").stdout)["experiments"]
    assert [e.get("variant") for e in found[:2]] == [
        {"model": "toy", "source": "clean"},
        {"model": "toy", "source": "blank.pear"},
    ]
    assert set(found[4]["runs"]) == {"clean", "fewer", "blank"}
    assert set(found[5]["runs"]) == {"clean", "fewer", "twin"}


def test_run_only_reports_all_variants_of_the_experiment(file: Path) -> None:
    done = call("run", file, "--only", "compare", "--format", "json")
    (found,) = json.loads(done.stdout)["files"][0]["experiments"]
    assert found["axes"] == ["model", "source", "layer"]
    assert found["model"] == "toy, twin"
    assert found["source"] == "clean, blank.pear"
    assert len(found["cells"]) == 8
    assert found["cells"][5]["coords"] == {"model": "twin", "source": "clean", "layer": "100%"}
    twice = [[m["mean"] for m in cell["measures"]] for cell in found["cells"]]
    assert twice[:4] == twice[4:]
    assert set(found["runs"]) == {
        f"{run} ({model})" for run in ("clean", "fewer", "blank.pear") for model in ("toy", "twin")
    }
    shown = call("run", file, "--only", "compare").stdout
    assert "toy, twin · clean, blank.pear → fewer" in shown
    assert "rows of blank.pear" in shown


def test_run_shows_source_block_and_model(file: Path) -> None:
    shown = call("run", file, "--only", "other").stdout
    assert "toy · fruit → blank" in shown
    assert "its only row, paired with each row of `fruit`" in " ".join(shown.split())
    shown = call("run", file, "--only", "across").stdout
    assert "toy · twin → toy" in shown
    assert "model twin" in shown
