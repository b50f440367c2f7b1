"""An internal error fails one experiment and those that depend on it, not the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.base.text import Source
from mechdsl.execute.run import saves
from mechdsl.pipeline import computation
from mechdsl.pipeline.options import RunOptions

from ..cli.conftest import Command, command
from ..execute.breaking import HEAD, SAID, TWO, breaking, experiment
from ..one_by_one import as_shipped
from ..run_source import run_source

__all__ = ["command"]


@pytest.fixture(autouse=True)
def _as_shipped() -> Iterator[None]:
    with as_shipped():
        yield


def values(of: Any) -> Any:
    return of.measures[0].patched


def test_failed_experiment_keeps_the_results_of_others() -> None:
    alone, _ = run_source(Source(HEAD + experiment("second", "pears")))
    result, found = run_source(Source(TWO), models={"toy": breaking()})
    assert result is not None
    assert alone is not None
    assert [each.name for each in result.experiments] == ["second"]
    np.testing.assert_allclose(
        values(result.experiments[0]), values(alone.experiments[0]), atol=1e-5
    )
    assert [(each.name, each.reasons[0].code) for each in result.lost] == [("first", "E0650")]
    (said,) = [each for each in found if each.code == "E0650"]
    assert said.message == f"`first` failed: ValueError: {SAID}"


def test_experiment_that_selects_from_a_failed_one_fails_too() -> None:
    picking = experiment("third", "pears").replace("z layer 1 head * at", "top 2 of first at")
    result, found = run_source(Source(TWO + picking), models={"toy": breaking()})
    assert result is not None
    assert [each.name for each in result.experiments] == ["second"]
    assert [each.name for each in result.lost] == ["first", "third"]
    assert {each.code for each in found if each.severity == "error"} == {"E0650", "E0622"}


def test_run_raises_if_every_experiment_fails() -> None:
    with pytest.raises(ValueError, match=SAID):
        run_source(Source(HEAD + experiment("first", "figs")), models={"toy": breaking()})


def failing(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception = ZeroDivisionError("a mistake of ours"),  # noqa: B008
) -> None:
    """Make collecting the results of an experiment fail."""
    collect = computation.collect_result

    def failed(plan: Any, *given: Any) -> Any:
        if plan.experiment.name == name:
            raise error
        return collect(plan, *given)

    monkeypatch.setattr(computation, "collect_result", failed)


def test_command_line_prints_results_of_other_experiments(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tables and as JSON; the report file and the JUnit file are written."""
    failing(monkeypatch, "second")
    path = tmp_path / "two.mech"
    first = experiment("first", "figs", "report table", 'report table to "first.csv"')
    path.write_text(HEAD + first + experiment("second", "pears"), encoding="utf-8")
    done = command("run", path, "--no-store", "--junit", tmp_path / "tests.xml")
    assert done.status == 3
    assert "first: delta of logit(answer)" in done.out
    assert "second: not computed" in done.out
    assert "error[E0650]: `second` failed: ZeroDivisionError: a mistake of ours" in done.err
    assert (tmp_path / "first.csv").stat().st_size
    assert "a mistake of ours" in (tmp_path / "tests.xml").read_text(encoding="utf-8")
    done = command("run", path, "--no-store", "--format", "json")
    assert done.status == 3
    (file,) = json.loads(done.out)["files"]
    assert [each["name"] for each in file["experiments"]] == ["first"]
    assert [(each["experiment"], each["code"]) for each in file["missing"]] == [("second", "E0650")]


def test_python_run_returns_other_experiments_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, "second")
    with pytest.warns(mechdsl.MechdslWarning, match="E0650"):
        results = mechdsl.run(TWO, store=None)
    assert [each.name for each in results] == ["first"]


def test_failed_save_keeps_the_results(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(saves, "select_rows_to_save", failed)
    path = tmp_path / "one.mech"
    save = 'save resid_post layer 1 of clean at last token to "a.safetensors"'
    path.write_text(HEAD + experiment("first", "figs", save), encoding="utf-8")
    done = command("run", path, "--no-store")
    assert done.status == 3
    assert "first: delta of logit(answer)" in done.out
    assert "error[E0650]" in done.err


def test_full_disk_aborts_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if only the second experiment meets the error."""
    failing(monkeypatch, "second", OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        run_source(Source(TWO), RunOptions())
