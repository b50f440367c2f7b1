"""Static types of the Python interface."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest

from mechdsl.results.experiment_result import PlotKind
from mechdsl.vocab.reports import REPORTS

ROOT = Path(__file__).parents[2]


def test_plot_kind_type_equals_the_registry() -> None:
    assert set(get_args(PlotKind)) == {name for name, each in REPORTS.items() if each.picture}


def test_plot_overloads_equal_the_arguments_of_reports() -> None:
    with_by = {name for name in get_args(PlotKind) if REPORTS[name].signature.by is not None}  # type: ignore[union-attr]
    with_top = {name for name in get_args(PlotKind) if REPORTS[name].signature.top}  # type: ignore[union-attr]
    assert with_by == {"heatmap", "lines", "bars", "confusion"}
    assert with_top == {"overlay"}


@pytest.mark.slow  # `make lint` checks the same file
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright isn't installed")
def test_pyright_accepts_valid_calls_and_reports_invalid_ones() -> None:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    found = subprocess.run(
        [*command, "tests/python_api/typed_calls.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "0 errors" in found.stdout, found.stdout
