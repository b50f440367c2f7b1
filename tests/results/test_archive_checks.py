"""Results with an inconsistent part are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.base import limits
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import check_file_result
from mechdsl.statistics.measurements import RandomControlValues

from .archived import written

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

Change = Callable[[ExperimentResult], dict[str, Any]]


@cache
def results(name: str) -> mechdsl.Results:
    return mechdsl.run(written(Path(mkdtemp()), name), write_reports=False)


def of_measure(**parts: Callable[[Any], Any]) -> Change:
    """Return a change that replaces attributes of the first measure."""

    def change(found: ExperimentResult) -> dict[str, Any]:
        first, *rest = found.measures
        new = {name: make(getattr(first, name)) for name, make in parts.items()}
        return {"measures": (replace(first, **new), *rest)}

    return change


def of_statistics(found: ExperimentResult) -> dict[str, Any]:
    first, *rest = found.statistics
    return {"statistics": (replace(first, p_corrected=first.p_corrected[1:]), *rest)}


def of_band(found: ExperimentResult) -> dict[str, Any]:
    (band,) = found.controls
    assert band is not None
    return {"controls": (replace(band, rank=band.rank[1:]),)}


def drawn(**parts: Any) -> Change:
    def change(found: ExperimentResult) -> dict[str, Any]:
        cells, prompts = found.measures[0].patched.shape
        whole = RandomControlValues(
            (np.zeros((2, cells, prompts)),), np.zeros(cells, np.int64), 2, "heads"
        )
        check_file_result(
            replace(results("plain").files[0], experiments=(replace(found, drawn=whole),))
        )
        return {"drawn": replace(whole, **parts)}

    return change


def shorter(values: Any) -> Any:
    return values[..., 1:]


def of_run(field: str) -> Change:
    """Return a change that removes one entry of a run's values."""

    def change(found: ExperimentResult) -> dict[str, Any]:
        own = dict(getattr(found, field))
        run = next(iter(own))
        return {field: {**own, run: own[run][1:]}}

    return change


CHANGES: dict[str, tuple[str, Change]] = {
    "statistics": ("plain", lambda found: {"statistics": found.statistics * 2}),
    "statistics' arrays": ("plain", of_statistics),
    "controls": ("controls", lambda found: {"controls": found.controls * 2}),
    "bands": ("controls", of_band),
    "runs": ("plain", lambda found: {"runs": {"clean": {"a": np.zeros(7)}}}),
    "strata": ("plain", lambda found: {"strata": np.zeros(7, np.int64)}),
    "row keys": ("plain", lambda found: {"row_keys": (1, 2)}),
    "draws": ("plain", drawn(values=())),
    "drawn cells": ("plain", drawn(values=(np.zeros((2, 1, 8)),))),
    "drawn counts": ("plain", drawn(counts=np.zeros(1, np.int64))),
    "base": ("plain", of_measure(base=shorter)),
    "source": ("plain", of_measure(source=lambda values: values.repeat(2, axis=0))),
    "rounding": ("plain", of_measure(rounding=shorter)),
    "truth": ("plain", of_measure(truth=lambda _: np.zeros((1, 7)))),
    "seen": ("plain", of_measure(seen=lambda _: np.zeros((1, 7), np.int64))),
    "inert": ("plain", of_measure(inert=shorter)),
    "gaps": ("plain", of_measure(gaps=lambda _: ("",))),
    "accuracy": ("everything printed", of_run("accuracy")),
    "accuracy's rounding": ("everything printed", of_run("accuracy_rounding")),
    "accuracy's units": ("everything printed", of_run("accuracy_units")),
    "accuracy's rows": ("everything printed", of_run("accuracy_rows")),
    "texts": ("everything printed", lambda found: {"texts": found.texts[1:]}),
    "hits": ("everything printed", lambda found: {"hits": found.hits[1:]}),
    "hits of rows": ("everything printed", lambda found: {"hits": ((),) * len(found.hits)}),
    "a hit behind the text": (
        "everything printed",
        lambda found: {"hits": (((99,),) * found.prompts,) * len(found.hits)},
    ),
    "a hit before it": (
        "everything printed",
        lambda found: {"hits": (((-1,),) * found.prompts,) * len(found.hits)},
    ),
}


@pytest.mark.parametrize("part", CHANGES)
def test_results_with_an_inconsistent_part_are_rejected(part: str) -> None:
    name, change = CHANGES[part]
    (file,) = results(name).files
    check_file_result(file)
    experiment = file.experiments[0 if part.startswith("accuracy") else -1]
    with pytest.raises(ValueError, match=f"the parts of `{experiment.name}` are inconsistent"):
        check_file_result(replace(file, experiments=(replace(experiment, **change(experiment)),)))


@pytest.mark.parametrize("limit", ["CELLS", "ROWS"])
def test_results_over_the_size_limits_are_rejected(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = results("plain").files
    monkeypatch.setattr(limits, limit, 3)
    with pytest.raises(ValueError, match="are inconsistent"):
        check_file_result(file)


def test_duplicate_experiment_name_is_rejected() -> None:
    (file,) = results("plain").files
    with pytest.raises(ValueError, match="two experiments have the same name"):
        check_file_result(replace(file, experiments=file.experiments * 2))
