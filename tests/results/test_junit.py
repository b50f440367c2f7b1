"""Verdicts as JUnit XML: the status of each outcome, and hostile text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mechdsl.results.experiment_result import (
    EarlierRun,
    ExpectOutcome,
    FileResult,
    LostExperiment,
    SkippedExperiment,
    UndecidedExpectation,
)
from mechdsl.results.results import Results
from mechdsl.statistics.measurements import MissingReason

from ..junit_schema import junit, message, verdicts
from .synthetic import finished, heads

WHY = MissingReason("E0604", "the denominator is 0")
HOSTILE = "\x00\x1b[31m ]]> & <b> \"'\n\t\r\u202e\ud800 \ufffe\U0001f34e \x85 é"


def read(*files: FileResult, **values: object) -> dict[str, str]:
    return verdicts(junit(Results(files, **values).to_junit()))  # type: ignore[arg-type]


def test_junit_messages_have_value_interval_and_sample_size() -> None:
    """Messages print a computed verdict like tables."""
    found = finished(heads(), "max(recovery) > 0.3", "accuracy(clean) > 0.99")
    root = junit(Results((FileResult("x/a.mech", (found,), hash="1234"),)).to_junit())
    assert verdicts(root) == {"max(recovery) > 0.3": "passed", "accuracy(clean) > 0.99": "failure"}
    assert message(root, "max(recovery) > 0.3") == "0.600 [0.590, 0.608], effective n = 64"
    said = message(root, "accuracy(clean) > 0.99")
    assert said.startswith("0.938 [0.848, 0.983], effective n = 64")
    (suite,) = root
    assert suite.get("name") == "x/a.mech: where"
    case = next(suite.iter("testcase"))
    assert (case.get("classname"), case.get("file")) == ("a.where", "x/a.mech")
    given = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert given == {"hash": "1234", "model": "toy", "runs": "clean → fewer", "prompts": "64"}


def test_junit_lost_measure_or_experiment_is_an_error() -> None:
    whole = heads()
    less = replace(whole.measures[0], missing=WHY)
    outcomes = (
        ExpectOutcome("a > 1", False, None, None, None, "not computed (E0604): …", computed=False),
        ExpectOutcome("b > 1", False, None, None, None, "no such cell"),
    )
    part = replace(whole, measures=(less,), outcomes=outcomes)
    lost = LostExperiment("lost", (WHY,), (replace(outcomes[0], text="c > 1"),))
    assert read(FileResult("a.mech", (part,), lost=(lost,))) == {
        "recovery of ld is computed": "error",
        "a > 1": "error",
        "b > 1": "failure",
        "lost is computed": "error",
        "c > 1": "error",
    }
    text = Results((FileResult("a.mech", (part,), lost=(lost,)),)).to_junit()
    assert message(junit(text), "lost is computed").startswith("E0604: the denominator is 0")


def test_junit_skips_expectations_that_failed_before() -> None:
    held, failed = (ExpectOutcome("x", each, 0.25, 0.1, 0.4) for each in (True, False))
    old = [replace(held, text="a > 1"), replace(failed, text="b > 1"), replace(failed, text="d")]
    new = [replace(failed, text=text) for text in ("a > 1", "b > 1", "c > 1", "d")]
    new[3] = replace(new[3], computed=False)
    before = FileResult("a.mech", (replace(heads(), outcomes=tuple(old)),))
    now = FileResult("a.mech", (replace(heads(), outcomes=tuple(new)),))
    against = EarlierRun(("then",), {"a.mech": before}, {}).compare([now])
    root = junit(Results((now,), against=against).to_junit())
    assert list(verdicts(root).values()) == ["failure", "skipped", "failure", "error"]
    figure = "0.250 [0.100, 0.400]"
    assert f"{figure}; it held before: {figure}" in message(root, "a > 1")
    assert message(root, "b > 1") == f"failed before ({figure}), and fails now: {figure}"
    assert "it isn't in the earlier run" in message(root, "c > 1")


def test_junit_skips_expectations_of_experiments_not_run() -> None:
    left = (
        SkippedExperiment("where", (UndecidedExpectation("a > 1", 7),)),
        SkippedExperiment("other", ()),
    )
    found = read(FileResult("a.mech", (heads(),), not_run=left))
    assert found == {"a > 1": "skipped", "other is computed": "skipped"}


@pytest.mark.parametrize("files", [[], [FileResult("a.mech", (heads(),))]])
def test_junit_without_expectations_has_no_tests(files: list[FileResult]) -> None:
    root = junit(Results(tuple(files)).to_junit())
    assert (root.get("tests"), len(root)) == ("0", len(files))


def test_junit_suite_of_a_file_without_experiments_has_its_name() -> None:
    (suite,) = junit(Results((FileResult("a.mech", ()),)).to_junit())
    assert (suite.get("name"), suite.get("tests")) == ("a.mech", "0")


def test_junit_numbers_identical_expectations() -> None:
    one = ExpectOutcome("a > 1", True, 2.0, None, None)
    found = replace(heads(), outcomes=(one, one, one))
    assert list(read(FileResult("a.mech", (found,)))) == ["a > 1", "a > 1 (2)", "a > 1 (3)"]


def test_junit_escapes_hostile_text() -> None:
    outcomes = tuple(
        ExpectOutcome(HOSTILE + str(holds), holds, HOSTILE, None, None, HOSTILE, 3)
        for holds in (True, False)
    )
    found = replace(heads(), name=HOSTILE, model=HOSTILE, outcomes=outcomes)
    lost = LostExperiment("lost", (MissingReason("E0604", HOSTILE),))
    file = FileResult(HOSTILE, (found,), lost=(lost,))
    root = junit(Results((file,)).to_junit())
    shown = "\\x00\\x1b[31m ]]> & <b> \"'\\n\\t\\r\\u202e\\ud800 \\ufffe\U0001f34e \\x85 é"
    assert f"{shown}True" in verdicts(root)
    assert shown in message(root, f"{shown}False")


def test_to_junit_writes_a_file(tmp_path: Path) -> None:
    results = Results((FileResult("a.mech", (heads(),)),))
    path = tmp_path / "below" / "report.xml"
    assert results.to_junit(path) == path.read_text(encoding="utf-8")
    assert [each.name for each in path.parent.iterdir()] == ["report.xml"]
    with pytest.raises(OSError, match=r"report\.xml|directory"):
        results.to_junit(tmp_path)
