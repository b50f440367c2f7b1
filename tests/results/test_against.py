"""Comparison of verdicts with those of an earlier run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.results.document import VerdictComparisonDocument, results_document
from mechdsl.results.experiment_result import (
    EarlierRun,
    ExpectOutcome,
    FileResult,
    LostExperiment,
    SkippedExperiment,
    UndecidedExpectation,
    VerdictComparison,
    stop_condition,
)
from mechdsl.results.results import Results
from mechdsl.results.runs import FileToRun, earlier_run_from_results
from mechdsl.statistics.measurements import MissingReason

from .synthetic import heads

WHY = MissingReason("E0604", "the denominator is 0")


def outcome(text: str, holds: bool, value: float = 0.5) -> ExpectOutcome:
    return ExpectOutcome(text, holds, value, value - 0.1, value + 0.1)


def file(*outcomes: ExpectOutcome, name: str = "a.mech", lost: bool = False) -> FileResult:
    """One experiment, `where`, with these verdicts."""
    if lost:
        return FileResult(name, (), lost=(LostExperiment("where", (WHY,), outcomes),))
    return FileResult(name, (replace(heads(), outcomes=outcomes),))


def compared(
    now: FileResult, before: FileResult | None, unasked: tuple[str, ...] = ()
) -> VerdictComparison:
    return EarlierRun(("then",), {now.file: before}, {now.file: unasked}).compare([now])


def kinds(against: VerdictComparison) -> list[tuple[str, str, bool]]:
    return [(each.kind, each.text, each.fails) for each in against.changes]


def test_verdict_comparison_classifies_each_pair_of_verdicts() -> None:
    now = file(
        outcome("a > 1", True),
        outcome("b > 1", False),
        outcome("c > 1", True),
        outcome("d > 1", False),
        outcome("e > 1", True),
        outcome("f > 1", False),
    )
    before = file(
        outcome("a > 1", True),
        outcome("b > 1", True),
        outcome("c > 1", False),
        outcome("d > 1", False),
        outcome("g > 1", True),
        outcome("h > 1", False),
    )
    found = compared(now, before)
    assert kinds(found) == [
        ("regression", "b > 1", True),
        ("failed before", "d > 1", False),
        ("new", "e > 1", False),
        ("new", "f > 1", True),
        ("holds now", "c > 1", False),
        ("gone", "g > 1", False),
        ("gone", "h > 1", False),
    ]
    assert found.unchanged == 1
    assert [each.text for each in found.regressions] == ["b > 1"]
    assert found.fails


@pytest.mark.parametrize(
    ("now", "before", "fails"),
    [(True, True, False), (True, False, False), (False, False, False), (False, True, True)],
)
def test_job_fails_only_for_an_expectation_that_held_before(
    now: bool, before: bool, fails: bool
) -> None:
    found = compared(file(outcome("a > 1", now)), file(outcome("a > 1", before)))
    assert found.fails is fails


@pytest.mark.parametrize("holds", [True, False])
def test_new_expectation_fails_the_job_only_if_it_fails(holds: bool) -> None:
    assert compared(file(outcome("a > 1", holds)), file()).fails is not holds


def test_expectations_match_regardless_of_white_space() -> None:
    found = compared(file(outcome("a  >\n 1", False)), file(outcome("a > 1", True)))
    assert kinds(found) == [("regression", "a  >\n 1", True)]


def test_identical_expectations_are_paired_in_order() -> None:
    now = file(outcome("a > 1", True), outcome("a > 1", False), outcome("a > 1", False))
    before = file(outcome("a > 1", True), outcome("a > 1", False))
    found = compared(now, before)
    assert kinds(found) == [("failed before", "a > 1", False), ("new", "a > 1", True)]
    assert found.unchanged == 1
    turned = compared(before, now)
    assert kinds(turned) == [("failed before", "a > 1", False), ("gone", "a > 1", False)]


def test_expectations_of_different_experiments_are_not_paired() -> None:
    other = replace(heads(), name="other", outcomes=(outcome("a > 1", True),))
    found = compared(file(outcome("a > 1", False)), FileResult("a.mech", (other,)))
    assert kinds(found) == [("new", "a > 1", True), ("gone", "a > 1", False)]


def test_newly_lost_experiment_is_a_regression() -> None:
    found = compared(file(outcome("a > 1", False), lost=True), file(outcome("a > 1", True)))
    assert kinds(found) == [("regression", "", True), ("regression", "a > 1", True)]
    assert found.changes[0].lost == WHY
    without = compared(file(lost=True), file())
    assert kinds(without) == [("regression", "", True)]


def test_experiment_lost_in_both_runs_is_no_regression() -> None:
    found = compared(
        file(outcome("a > 1", False), lost=True), file(outcome("a > 1", False), lost=True)
    )
    assert kinds(found) == [("failed before", "a > 1", False)]
    again = compared(file(outcome("a > 1", True)), file(outcome("a > 1", False), lost=True))
    assert kinds(again) == [("holds now", "a > 1", False)]


def test_newly_lost_measure_is_a_regression() -> None:
    whole = heads()
    first = replace(whole.measures[0], missing=WHY)
    less = replace(whole, measures=(first, *whole.measures[1:]))
    found = compared(FileResult("a.mech", (less,)), FileResult("a.mech", (whole,)))
    assert kinds(found) == [("regression", f"{first.effect} of {first.label}", True)]
    assert compared(FileResult("a.mech", (less,)), FileResult("a.mech", (less,))).changes == ()
    assert compared(FileResult("a.mech", (whole,)), FileResult("a.mech", (less,))).changes == ()


@pytest.mark.parametrize("other", [{"label": "other"}, {"effect": "delta"}, {"at": "last token"}])
def test_measures_match_only_by_label_effect_and_position(other: dict[str, str]) -> None:
    """A lost measure is no regression if the earlier run has only a similar measure."""
    whole = heads()
    lost = replace(whole.measures[0], missing=WHY)
    before = replace(whole, measures=(replace(whole.measures[0], **other),))
    now = replace(whole, measures=(lost,))
    assert compared(FileResult("a.mech", (now,)), FileResult("a.mech", (before,))).changes == ()


def test_unselected_experiment_is_not_reported_as_gone() -> None:
    now, before = FileResult("a.mech", ()), file(outcome("a > 1", True))
    assert compared(now, before, ("where",)).changes == ()
    assert kinds(compared(now, before)) == [("gone", "a > 1", False)]


def test_undecided_expectation_is_not_reported_as_gone() -> None:
    left = (SkippedExperiment("where", (UndecidedExpectation("a  > 1", 3),)),)
    now = FileResult("a.mech", (), not_run=left)
    before = file(outcome("a > 1", True), outcome("a > 1", True), outcome("b > 1", False))
    found = compared(now, before)
    assert kinds(found) == [("gone", "a > 1", False), ("gone", "b > 1", False)]


def test_file_absent_from_the_earlier_run_has_new_expectations() -> None:
    found = compared(file(outcome("a > 1", False)), None)
    assert kinds(found) == [("new", "a > 1", True)]
    assert found.without == ("a.mech",)


def test_stop_condition_ignores_expectations_that_failed_before() -> None:
    before = file(outcome("a > 1", True), outcome("b > 1", False))
    ends = stop_condition(EarlierRun(("then",), {"a.mech": before}, {}))
    assert not ends("a.mech", "where", [outcome("a > 1", True), outcome("b > 1", False)])
    assert ends("a.mech", "where", [outcome("a > 1", False)])
    assert ends("a.mech", "where", [outcome("c > 1", False)])
    assert ends("a.mech", "other", [outcome("b > 1", False)])
    always = stop_condition(None)
    assert always("a.mech", "where", [outcome("a > 1", True), outcome("b > 1", False)])
    assert not always("a.mech", "where", [outcome("a > 1", True)])


def test_text_lists_regressions_and_known_failures_with_values() -> None:
    now = file(outcome("a > 1", False, 0.25), outcome("b > 1", True), outcome("c > 1", False))
    before = file(outcome("a > 1", True, 2.5), outcome("b > 1", True), outcome("c > 1", False))
    assert compared(now, before).to_text() == (
        "\n"
        "against then: 1 expectation holds as before, 1 regression, 1 failed before\n"
        "regression     where: expect a > 1\n"
        "               now fails: 0.250 [0.150, 0.350]; then holds: 2.500 [2.400, 2.600]\n"
        "failed before  where: expect c > 1\n"
        "               now fails: 0.500 [0.400, 0.600]; then fails: 0.500 [0.400, 0.600]\n"
        "expectations that failed before don't fail the job\n"
    )


def test_text_states_why_an_experiment_is_lost() -> None:
    said = compared(file(lost=True), file()).to_text()
    assert "regression     where: not computed\n               E0604: the denominator is 0" in said


def test_json_document_contains_the_comparison() -> None:
    found = compared(file(outcome("a > 1", False), lost=True), file(outcome("a > 1", True)))
    document = results_document([], {}, found).as_json()["against"]
    assert VerdictComparisonDocument.model_validate(document)
    whole, one = document["changes"]
    assert (whole["kind"], whole["code"], whole["fails"]) == ("regression", "E0604", True)
    assert (one["now"]["holds"], one["before"]["holds"]) == (False, True)
    assert "against" not in results_document([], {}).as_json()


# --- matching of files ----------------------------------------------------------------------------


def asked(*names: str) -> list[FileToRun]:
    return [FileToRun(name, Path(name)) for name in names]


def test_single_file_is_compared_with_any_earlier_file() -> None:
    found = earlier_run_from_results(Results((file(name="x/b.mech"),)), asked("a.mech"), "kept")
    assert found.files["a.mech"] is not None
    assert found.runs == ("kept, a run of `x/b.mech`",)
    same = earlier_run_from_results(Results((file(name="x/a.mech"),)), asked("a.mech"), "kept")
    assert same.runs == ("kept",)


def test_several_files_are_matched_by_name() -> None:
    run = Results((file(name="old/b.mech"),))
    found = earlier_run_from_results(run, asked("a.mech", "new/b.mech"), "kept")
    assert found.files["a.mech"] is None
    assert found.files["new/b.mech"] is run.files[0]
    both = Results((file(name="x/a.mech"), file(name="y/a.mech")))
    own = earlier_run_from_results(both, asked("y/a.mech", "z/a.mech"))
    assert [own.files[name] for name in ("y/a.mech", "z/a.mech")] == [both.files[1], both.files[0]]


def test_earlier_run_without_a_matching_file_is_rejected() -> None:
    with pytest.raises(MechdslError, match=r"a run of `c\.mech`") as found:
        earlier_run_from_results(Results((file(name="c.mech"),)), asked("a.mech", "b.mech"), "kept")
    assert found.value.diagnostics[0].code == "E0208"
