"""The benchmark for GPUs on a machine without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import benchmarks.gpu
from benchmarks.gpu import largest_difference, main, tolerance


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_benchmark_names_the_small_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert main() == 2
    said = capsys.readouterr().err
    assert "No GPU was found" in said
    assert "`python -m benchmarks.gpu --small`" in said


def test_small_version_checks_and_measures_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "lines.json"
    given = ["gpu", "--small", "--works", "W2", "--dtypes", "fp32", "--json", str(to)]
    monkeypatch.setattr(sys, "argv", given)
    assert main() == 0
    said = capsys.readouterr().out
    assert "No GPU was found" in said
    assert "W2 fp32: off by" in said
    lines = json.loads(to.read_text())
    tools = [(line["work"], line["tool"]) for line in lines]
    assert {("W2", "mechdsl"), ("W2", "plain-batched"), ("replies", "mechdsl")} <= {*tools}
    (mine,) = (line for line in lines if (line["work"], line["tool"]) == ("W2", "mechdsl"))
    assert mine["waits"] < 20
    assert mine["seconds"] > 0


def test_results_that_differ_end_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--works", "W2", "--seconds", "-1"])
    monkeypatch.setattr(benchmarks.gpu, "_checked", lambda *_: "W2 fp32: off by 1.0e+00")
    assert main() == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("W2 fp32: off by 1.0e+00")
    assert "left out: the time is up" in printed.out


def test_tolerance_grows_with_the_step_of_the_type() -> None:
    assert tolerance(torch.float32, 50.0) == 1e-3
    assert tolerance(torch.bfloat16, 1.0) == 8 * tolerance(torch.float16, 1.0)


def test_tables_with_other_missing_cells_differ_infinitely() -> None:
    import numpy as np

    one, other = np.array([[1.0, np.nan]]), np.array([[1.5, 2.0]])
    assert largest_difference(one, other) == float("inf")
    assert largest_difference(one[:, :1], other[:, :1]) == 0.5
