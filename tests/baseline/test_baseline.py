"""Tests of the comparison with a baseline."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .__main__ import main
from .compare import close, difference, frozen
from .devices import compare_file
from .runs import again, example, random_files

DOCUMENT: dict[str, Any] = {
    "files": [
        {
            "experiments": [
                {
                    "name": "e",
                    "cells": [
                        {
                            "measures": [
                                {
                                    "label": "delta",
                                    "mean": 1.2345678,
                                    "low": 0.0,
                                    "high": 2.5,
                                    "base": -3.0,
                                    "source": None,
                                }
                            ]
                        }
                    ],
                    "runs": {"clean": [{"label": "delta", "mean": 0.1}]},
                }
            ]
        }
    ]
}


def measure(document: dict[str, Any]) -> dict[str, Any]:
    return document["files"][0]["experiments"][0]["cells"][0]["measures"][0]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "the last bit": (lambda m: m.update(mean=float(np.nextafter(m["mean"], 2))), ".mean: 1.23"),
    "the sign of zero": (lambda m: m.update(low=-0.0), ".low: 0.0 in the baseline, -0.0"),
    "a number that is none": (lambda m: m.update(source=1.0), ".source: null in the baseline"),
    "a key too few": (lambda m: m.pop("base"), ".base: only in the baseline"),
    "a key too many": (lambda m: m.update(more=1), ".more: only in this run"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=list(CHANGES))
def test_difference_finds_an_edited_value(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    found = copy.deepcopy(DOCUMENT)
    assert difference(DOCUMENT, found) is None
    change(measure(found))
    where = difference(DOCUMENT, found)
    assert where is not None
    assert where.startswith(".files[0].experiments[0].cells[0].measures[0]" + said)


def test_difference_finds_an_additional_cell() -> None:
    found = copy.deepcopy(DOCUMENT)
    cells = found["files"][0]["experiments"][0]["cells"]
    cells.append(cells[0])
    where = difference(DOCUMENT, found)
    assert where == ".files[0].experiments[0].cells: 1 in the baseline, 2 in this run"


def test_frozen_values_are_rounded_and_compared_with_tolerance() -> None:
    values = frozen(DOCUMENT)
    assert values == {"e: 0 delta": [[1.2346, 0.0, 2.5, -3.0, None]], "e: run clean": [[0.1]]}
    assert close(1.2346, 1.2345678)
    assert not close(1.2346, 1.2349)
    assert not close(0.0, 1e-4)
    assert not close(None, 0.0)


def test_rerun_equals_the_case_and_an_edited_hash_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = random_files(1)
    assert difference(case["found"], again(case)["found"]) is None
    path = tmp_path / "random-000.json"
    path.write_text(json.dumps(case), encoding="utf-8")
    assert main(["--against", str(tmp_path)]) == 0
    case["found"]["values"]["e"]["0 " + _first_label(case)]["patched"] = "0" * 64
    path.write_text(json.dumps(case), encoding="utf-8")
    assert main(["--against", str(tmp_path)]) == 1
    assert "random-000.json differs: .values.e.0 " in capsys.readouterr().out
    assert main(["--against", str(tmp_path), "--only", "examples"]) == 2


def _first_label(case: dict[str, Any]) -> str:
    cells = case["found"]["files"][0]["experiments"][0]["cells"]
    return cells[0]["measures"][0]["label"]


@pytest.mark.slow
def test_device_values_are_compared_with_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "function_vectors.json"
    case = example("function_vectors")
    path.write_text(json.dumps(case), encoding="utf-8")
    found = compare_file(path, "cpu")
    assert (found.problem, found.worst) == (None, 0)
    assert found.values > 20
    one = case["found"]["files"][0]["experiments"][0]["cells"][0]["measures"][0]
    one["mean"] += 0.01
    path.write_text(json.dumps(case), encoding="utf-8")
    found = compare_file(path, "cpu")
    assert found.problem is not None
    assert found.worst == pytest.approx(0.01)
