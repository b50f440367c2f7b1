"""Random files, whose planned runs equal full forward passes of one cell at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from . import support

Case = tuple[str, str, frozenset[str]]
"""(model, file, passes that are switched off in the planned run)"""
Run = Callable[[RunOptions], tuple[FileResult | None, list[Diagnostic]]]
QUIET = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)


def few(cases: st.SearchStrategy[Any], count: int) -> Callable[..., Any]:
    """Check a property for `count` cases, which are the same in each run."""
    ready = settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=QUIET
    )
    return lambda hold: ready(given(case=cases)(hold))


def many(cases: st.SearchStrategy[Any], count: int) -> Callable[..., Any]:
    """Check a property for `count` cases, which differ in each run."""
    count = int(os.environ.get("MECHDSL_RANDOM_FILES", count))
    ready = settings(max_examples=count, deadline=None, suppress_health_check=QUIET)
    return lambda hold: pytest.mark.slow(ready(given(case=cases)(hold)))


def both_ways(
    run: Run, off: frozenset[str], folder: Path, execution: ExecutionOptions | None = None
) -> tuple[FileResult, FileResult] | None:
    """Run a file in full forward passes, and as planned without some passes of the planner.

    Both runs write the same files. None if both are rejected with the same messages."""
    python = CheckSettings(python="run")
    plain, problems = run(replace(support.WITHOUT_PLAN, settings=python))
    files = _taken_away(folder)
    own = RunOptions(without=off, settings=python, execution=execution or ExecutionOptions())
    planned, again = run(own)
    assert [(d.code, d.message) for d in problems] == [(d.code, d.message) for d in again]
    if plain is None or planned is None:
        assert has_errors(problems)
        assert plain is planned
        event("refused: " + next(d.code for d in problems if d.severity == "error"))
        return None
    _same_files(files, _taken_away(folder))
    return plain, planned


def same(one: ExperimentResult, other: ExperimentResult, text: str) -> None:
    """Assert that two results and their null bands are equal, up to 1e-4 and 1e-3 of the effect."""
    assert one.cells == other.cells
    for expected, found in zip(one.measures, other.measures, strict=True):
        assert np.array_equal(np.isnan(expected.patched), np.isnan(found.patched))
        effect = np.abs(expected.patched - expected.base)
        error = np.abs(expected.patched - found.patched)
        assert np.nanmax(error, initial=0) <= support.ABSOLUTE, text
        small = support.SMALL * support.rounding(expected.patched)
        limit = support.RELATIVE * np.maximum(effect, small)
        good = np.isnan(error) | np.isnan(effect) | (error <= limit)
        assert good.all(), f"{text}\n{np.nanmax(error / np.maximum(effect, small))}"
    for expected, found in zip(one.controls, other.controls, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            for name in ("low", "mean", "high"):
                a, b = getattr(expected, name), getattr(found, name)
                np.testing.assert_allclose(a, b, atol=support.ABSOLUTE, rtol=support.RELATIVE)


def _taken_away(folder: Path) -> dict[str, dict[str, Any]]:
    """Read and remove the saved files: file → its tensors, and the lines of its JSON Lines file."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        rows = path.with_suffix(".jsonl")
        found[path.name] = {**load_file(path), "rows": rows.read_text(encoding="utf-8")}
        path.unlink()
        rows.unlink()
    return found


def _same_files(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    """Assert that the vectors of all rows are equal, up to rounding."""
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, values in tensors.items():
            if key == "rows" or values.dtype.kind == "i":
                assert np.array_equal(values, other[name][key])
            else:
                atol, rtol = (5e-2, 5e-3) if values.itemsize == 2 else (2e-4, 1e-3)
                np.testing.assert_allclose(values, other[name][key], rtol, atol)
