"""That sites were picked on the rows that they are tested on travels with the result."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import mechdsl
from mechdsl.base.source import Source
from mechdsl.resolve.selections import Selection
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.text import survives
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


def test_the_result_says_who_picked_of_how_many_on_which_rows(tmp_path: Path) -> None:
    found = together(tmp_path, text())
    assert found.selected == (Selection("heads", cells=8, shared=16, rows=24),)
    said = "sites that `heads` picked of 8 cells on 16 of these 24 rows"
    assert found.conventions["selection"].startswith(said)
    (outcome,) = found.outcomes
    assert outcome.holds
    assert outcome.reason == said


def test_no_cell_is_said_to_survive(tmp_path: Path) -> None:
    found = together(tmp_path, text())
    assert found.statistics[0].p[0] < 0.05
    assert np.isnan(found.statistics[0].p_corrected).all()
    assert not survives(found, 0).any()


@pytest.mark.parametrize(
    ("sites", "parts"),
    [
        ("top 3 of heads", {"TRAIN": ".train", "TEST": ".test"}),
        ("layer 0..1 head *", {}),
    ],
    ids=["other rows", "all sites"],
)
def test_what_was_not_picked_on_its_rows_is_tested_as_ever(
    tmp_path: Path, sites: str, parts: dict[str, str]
) -> None:
    found = together(tmp_path, text(sites, **parts))
    assert found.selected == ()
    assert "selection" not in found.conventions
    assert not np.isnan(found.statistics[0].p_corrected).any()
    assert found.outcomes[0].reason is None


def test_every_form_of_the_results_says_so(picked: mechdsl.Results) -> None:
    said = "sites that `heads` picked of 8 cells on 16 of these 24 rows"
    document = picked.to_dict()["files"][0]["experiments"][-1]
    assert document["selected"] == [{"of": "heads", "cells": 8, "shared": 16, "rows": 24}]
    assert document["expect"][0]["reason"] == said
    suite = ElementTree.fromstring(picked.to_junit())[-1]
    names = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert names["selection"] == said
    assert said in "".join(suite.itertext())
    assert said in picked._repr_html_()
    assert said.split(" on ")[0] in picked.to_text(200)
