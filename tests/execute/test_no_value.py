"""Measures without a value in some row: errors if that is certain, lost measures if an unpatched
run has none, and cells that state the reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl

from ..cli.conftest import Command, command
from ..fruit import FRUIT

__all__ = ["command"]

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def file(*lines: str, name: str = "e") -> str:
    inside = "".join(f"  {line}\n" for line in lines)
    return f"\nexperiment {name} {{\n  prompts fruit limit 8\n{inside}}}\n"


@pytest.mark.parametrize(
    ("measure", "divisor"),
    [
        ("logit(answer) / 0", "0"),
        ("logit(answer) / (1 - 1)", "1 - 1"),
        ("entropy + logit(answer) / -0", "-0"),
        ("entropy / 0%", "0%"),
        ("entropy + 1 / (2 / 0)", "0"),
        ("entropy / (not 1)", "not 1"),
    ],
)
def test_divisor_that_is_always_zero_is_an_error(measure: str, divisor: str) -> None:
    (found,) = mechdsl.validate(FRUIT + file(f"measure {measure} as raw")).errors
    assert found.code == "E0612"
    assert found.label_text == "it divides by 0"
    assert found.span is not None
    assert found.span.text == divisor


def test_zero_divisor_is_an_error_in_metrics_and_keep() -> None:
    named = FRUIT.replace("\nprompts", "\nmetric half = entropy / 0\n\nprompts", 1)
    assert [d.code for d in mechdsl.validate(named + file("measure half as raw")).errors] == [
        "E0612"
    ]
    kept = file("keep entropy / 0 > 1", "measure entropy as raw")
    assert [d.code for d in mechdsl.validate(FRUIT + kept).errors] == ["E0612"]
    assert mechdsl.validate(FRUIT + file("measure entropy / (2 - 1) as raw")).errors == []


@pytest.mark.parametrize(
    ("condition", "divisor"),
    [
        ("max(delta) / 0 > 1", "0"),
        ("max(delta) > 1 / (2 - 2)", "2 - 2"),
        ("mean(delta) / -0 > 1", "-0"),
    ],
)
def test_expectation_that_always_divides_by_zero_is_an_error(condition: str, divisor: str) -> None:
    lines = "ablate layer 0 head * at last token with zero", "measure entropy as delta"
    (found,) = mechdsl.validate(FRUIT + file(*lines, f"expect {condition}")).errors
    assert found.code == "E0606"
    assert found.span is not None
    assert found.span.text == divisor


def test_expectation_whose_divisor_is_zero_states_the_reason() -> None:
    text = file("measure entropy as raw", "expect raw / (raw - raw) > 1")
    (outcome,) = mechdsl.run(FRUIT + text)["e"].outcomes
    assert (outcome.holds, outcome.reason) == (False, "it divides by 0")


RANK = "measure 1 / (rank(answer) - 1) as raw"
ZEROED = file(
    "ablate layer 0..1 head 0..1 at last token with zero",
    "measure cosine(z layer 1 head 0, clean) as raw",
    "measure entropy as delta",
)


def test_unpatched_run_without_a_value_loses_the_measure(command: Command, tmp_path: Path) -> None:
    """All rows are right in `clean`, so that their rank is 1."""
    path = tmp_path / "a.mech"
    path.write_text(FRUIT + file(RANK, "measure entropy as raw"), encoding="utf-8")
    done = command("run", path)
    assert done.status == 3
    assert "error[E0631]" in done.err
    assert "has no value in run `clean`, row 2 of `fruit`" in done.err
    assert "`rank(answer) - 1`, the divisor, is 0" in done.err
    assert "e: entropy\n" in done.out


def test_keep_condition_without_a_value_loses_its_experiments() -> None:
    kept = file("keep 1 / (rank(answer) - 1) > 0", "measure entropy as raw")
    found = mechdsl.run(FRUIT + kept + file("measure entropy as raw", name="other"))
    assert [each.name for each in found] == ["other"]
    assert [d.code for d in found.diagnostics.errors] == ["E0631"]


def test_cell_without_a_value_states_the_reason(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "a.mech"
    path.write_text(FRUIT + ZEROED, encoding="utf-8")
    done = command("run", path)
    assert done.status == 0
    why = "a vector of `cosine(z layer 1 head 0, clean)` is 0"
    assert f"– where {why}, in 8 rows, first in row 2" in " ".join(done.out.split())
    assert "warning[W0762]" in done.err
    assert "has no value in 1 of 4 cells of `e`" in done.err
    assert f"{why}: first in the patched run of layer 1, head 0, row 2 of `fruit`" in done.err
    assert "no prompt is part" not in done.out
    done = command("run", path, "--format", "json")
    (experiment,) = json.loads(done.out)["files"][0]["experiments"]
    reasons = [cell["measures"][0]["reason"] or "" for cell in experiment["cells"]]
    assert [n for n, reason in enumerate(reasons) if reason.startswith(why)] == [2]
    means = [cell["measures"][0]["mean"] for cell in experiment["cells"]]
    assert [n for n, mean in enumerate(means) if mean is None] == [2]


def test_cell_has_no_value_if_one_row_has_none() -> None:
    """A mean over the other rows would answer a different question."""
    text = file(
        "ablate layer 0..3 head * at last-item token, last token with zero",
        "measure correct as raw",
        "measure entropy / correct as raw",
    )
    found = mechdsl.run(FRUIT + text)["e"]
    correct, divided = (data.patched for data in found.measures)
    wrong = (correct == 0).any(axis=1)
    some = wrong & (correct == 1).any(axis=1)
    assert some.any()
    assert not wrong.all()
    assert np.isnan(divided).all(axis=1).tolist() == wrong.tolist()
    for cell in np.flatnonzero(wrong):
        count = int(np.count_nonzero(correct[cell] == 0))
        rows = "1 row" if count == 1 else f"{count} rows"
        said = found.statistics[1].reasons[cell] or ""
        assert said.startswith(f"`correct`, the divisor, is 0, in {rows}, first in row ")


def test_value_above_the_range_of_numbers_is_an_error() -> None:
    big = "1" + "0" * 290
    lines = f"measure (entropy + 1) * {big} * {big} as raw", "measure entropy as raw"
    found = mechdsl.run(FRUIT + file(*lines))
    problem = found.diagnostics.errors[0]
    assert problem.code == "E0631"
    assert problem.label_text == "it exceeds the range of numbers"


def values(found: Any) -> Any:
    return found.measures[0].patched


def test_quotient_with_values_in_all_rows_is_finite() -> None:
    found = mechdsl.run(FRUIT + file("measure logit(answer) / rank(answer) as raw"))["e"]
    assert np.isfinite(values(found)).all()
    assert not math.isnan(found.statistics[0].mean[0])
    assert set(found.measures[0].gaps) == {""}
