"""Results record that sites were selected on the rows that they are tested on."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.diagnostics import experiments
from mechdsl.resolve.expansion import Selection
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.text import is_significant
from tests.run_source import run_source

FILE = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  split 50%
}

experiment heads {
  prompts fruitTRAIN limit 16
  ablate layer 0..1 head * at last token with zero
  measure -logit(answer) as delta
}

experiment together {
  prompts fruitTEST limit 24
  ablate SITES at last token with zero
  measure -logit(answer) as delta
  expect min(delta) > -2
}
"""
BOTH = {"TRAIN": "", "TEST": ""}


def text(sites: str = "top 3 of heads", **parts: str) -> str:
    found = FILE.replace("SITES", sites)
    for part, word in (BOTH | parts).items():
        found = found.replace(part, word)
    return found


def together(folder: Path, written: str) -> ExperimentResult:
    file, found = run_source(Source(written, folder / "picked.mech"))
    assert file is not None, [str(each) for each in found]
    return next(each for each in file.experiments if each.name == "together")


@pytest.fixture(scope="module")
def picked(tmp_path_factory: pytest.TempPathFactory) -> mechdsl.Results:
    path = tmp_path_factory.mktemp("picked") / "picked.mech"
    path.write_text(text(), encoding="utf-8")
    with pytest.warns(mechdsl.MechdslWarning):
        return mechdsl.run(path, store=None)


def test_result_states_the_selecting_experiment_and_its_rows(tmp_path: Path) -> None:
    found = together(tmp_path, text())
    assert found.selected == (Selection("heads", cells=8, shared=16, rows=24),)
    said = "`heads` picked sites from 8 cells on 16 of these 24 rows"
    assert found.conventions["selection"].startswith(said)
    (outcome,) = found.outcomes
    assert outcome.holds
    assert outcome.reason == said


def test_selected_cell_is_never_significant(tmp_path: Path) -> None:
    found = together(tmp_path, text())
    assert found.statistics[0].p[0] < 0.05
    assert np.isnan(found.statistics[0].p_corrected).all()
    assert not is_significant(found, 0).any()


@pytest.mark.parametrize(
    ("sites", "parts"),
    [
        ("top 3 of heads", {"TRAIN": ".train", "TEST": ".test"}),
        ("layer 0..1 head *", {}),
        ("layer 0 head 1", {}),
    ],
    ids=["other rows", "all sites", "one site"],
)
def test_sites_not_selected_on_their_rows_are_tested(
    tmp_path: Path, sites: str, parts: dict[str, str]
) -> None:
    found = together(tmp_path, text(sites, **parts))
    assert found.selected == ()
    assert "selection" not in found.conventions
    assert not np.isnan(found.statistics[0].p_corrected).any()
    assert found.outcomes[0].reason is None


@pytest.mark.parametrize(
    ("sites", "more"),
    [
        ("best of heads", ""),
        ("movers", "group movers = top 2 of heads\n"),
        ("top n of heads", "param n = 2\n"),
    ],
    ids=["best", "group", "param"],
)
def test_every_type_of_selection_is_recorded(tmp_path: Path, sites: str, more: str) -> None:
    found = together(tmp_path, text(sites) + more)
    assert [each.of for each in found.selected] == ["heads"]


def test_selection_counts_only_the_candidate_cells(tmp_path: Path) -> None:
    found = together(tmp_path, text("top 2 of heads(layer: 1)"))
    assert found.selected == (Selection("heads", cells=4, shared=16, rows=24),)


def test_selection_in_a_loop_names_every_experiment(tmp_path: Path) -> None:
    other = text().replace("heads", "others").split("experiment ")[1]
    written = text().replace(
        "  ablate top 3 of heads at last token with zero\n",
        "  for m in [heads, others] { ablate top 2 of m at last token with zero }\n",
    )
    found = together(tmp_path, (written + "\nexperiment " + other).replace("heads", "some"))
    assert {each.of for each in found.selected} == {"some", "others"}


def test_selection_in_a_derived_run_is_recorded(tmp_path: Path) -> None:
    written = text().replace(
        "  ablate top 3 of heads at last token with zero\n",
        "  run cut { ablate top 3 of heads at last token with zero }\n"
        "  from cut into clean\n  patch resid_post layer 1 at last token\n",
    )
    assert [each.of for each in together(tmp_path, written).selected] == ["heads"]


def test_selection_in_an_imported_file_is_recorded(tmp_path: Path) -> None:
    before, _, after = text("movers").partition("experiment heads")
    group = "group movers = top 3 of heads\n"
    (tmp_path / "choice.mech").write_text(before + group, encoding="utf-8")
    written = f'mech 1\n\nuse "choice.mech"\n\nexperiment heads{after}'
    assert [each.of for each in together(tmp_path, written).selected] == ["heads"]


def test_nested_selection_counts_the_rows_of_the_first_selection(tmp_path: Path) -> None:
    second = """
experiment again {
  prompts fruit.test limit 16
  ablate top 3 of heads at last token with zero
  measure -logit(answer) as delta
}
"""
    written = text("top 1 of again", TRAIN=".train", TEST=".train") + second
    file, found = run_source(Source(written, tmp_path / "picked.mech"))
    assert file is not None
    selected = {each.name: [one.of for one in each.selected] for each in file.experiments}
    assert selected == {"heads": [], "again": [], "together": ["heads"]}
    [warning] = [each for each in found if isinstance(each, experiments.SelectionRowsReused)]
    assert warning.of == "heads"
    assert "add `split" not in warning.hint  # the block has one
    assert "copy of `prompts fruit` with other rows" in warning.hint


def test_selection_matches_rows_of_another_prompt_set_by_content(tmp_path: Path) -> None:
    rows = """
prompts NAME {
  rows "rows.jsonl"
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}
"""
    lines = [f'{{"fruits": "{"fig " * n}pear", "count": {n + 1}}}' for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    written = text().replace("prompts fruit limit 16", "prompts one")
    written = written.replace("prompts fruit limit 24", "prompts other")
    for name in ("one", "other"):
        written += rows.replace("NAME", name)
    (selection,) = together(tmp_path, written).selected
    assert (selection.shared, selection.rows) == (8, 8)


def test_every_output_states_the_selection(picked: mechdsl.Results) -> None:
    said = "`heads` picked sites from 8 cells on 16 of these 24 rows"
    document = picked.to_dict()["files"][0]["experiments"][-1]
    assert document["selected"] == [{"of": "heads", "cells": 8, "shared": 16, "rows": 24}]
    assert document["expect"][0]["reason"] == said
    suite = ElementTree.fromstring(picked.to_junit())[-1]
    names = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert names["selection"] == said
    assert said in "".join(suite.itertext())
    assert said in picked._repr_html_()
    assert f"· {said} (W0721)" in picked.to_text(200)
    assert picked["together"].records()[0]["selected_by"] == "heads"
    assert "selected_by" not in picked["heads"].records()[0]
