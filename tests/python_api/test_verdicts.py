"""`against`, `fail_fast` and `to_junit`, the arguments of `--against`, `--fail-fast`, `--junit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mechdsl

from ..fruit import FRUIT
from ..junit_schema import junit, verdicts

TEXT = (
    FRUIT
    + """
experiment heads {
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 1 head * at last token
  measure logit(answer) - logit(answer of fewer) as recovery
  stats by count
  expect max(recovery) > 5
  expect accuracy(clean) > 0.1
}

experiment other {
  model toy
  prompts fruit limit 8
  measure prob(answer) as raw
  stats by count
  expect accuracy(clean) > 0.1
}
"""
)
WRONG = TEXT.replace('answer " {count}"', 'answer " {count - 1}"')
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def kinds(results: mechdsl.Results) -> list[tuple[str, str]]:
    assert results.against is not None
    return [(each.kind, each.experiment) for each in results.against.changes]


def test_against_compares_with_results_or_an_export(inside: Path) -> None:
    before = mechdsl.run(TEXT, out="kept")
    assert (before.against, before.holds) == (None, False)
    for against in (before, "kept/text", Path("kept", "text")):
        same = mechdsl.run(TEXT, against=against)
        assert same.regressions == ()
        assert same.against is not None
        assert not same.against.fails
        assert kinds(same) == [("failed before", "heads")]
        worse = mechdsl.run(WRONG, against=against)
        assert kinds(worse)[:2] == [("regression", "heads"), ("regression", "other")]
        assert [each.text for each in worse.regressions] == ["accuracy(clean) > 0.1"] * 2
        assert worse.against is not None
        assert worse.against.fails
    assert "\nagainst kept/text: 0 expectations hold as before, 2 regressions" in worse.to_text()
    assert worse.to_text().endswith(worse.against.to_text())
    said = "0 expectations hold as before, 2 regressions, 1 failed before"
    assert repr(worse.against) == f"<VerdictComparison kept/text: {said}>"
    assert worse.to_dict()["against"]["fails"]
    assert verdicts(junit(worse.to_junit()))["accuracy(clean) > 0.1"] == "failure"


def test_regressions_without_against_raises() -> None:
    results = mechdsl.run(TEXT)
    with pytest.raises(ValueError, match="aren't compared with another run"):
        _ = results.regressions


@pytest.mark.parametrize("against", ["kept/nowhere", "lst", "last", "", Path("a.mech")])
def test_unknown_against_run_is_rejected_before_the_run(
    against: Any, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*arguments: object) -> None:
        raise AssertionError("it is looked for before anything runs")

    monkeypatch.setattr("mechdsl.pipeline.computation.run_checked", ran)
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(TEXT, against=against)
    assert [each.code for each in found.value.diagnostics] == ["E0208"]


def test_against_with_a_wrong_type_raises() -> None:
    with pytest.raises(TypeError, match="against"):
        mechdsl.run(TEXT, against=7)  # type: ignore[arg-type]


def test_fail_fast_stops_after_the_first_failure() -> None:
    results = mechdsl.run(TEXT, fail_fast=True)
    assert [each.name for each in results] == ["heads"]
    (left,) = results.files[0].not_run
    assert (left.name, [each.text for each in left.expects]) == ("other", ["accuracy(clean) > 0.1"])
    assert (results.complete, results.holds) == (False, False)
    suites = [suite.get("skipped") for suite in junit(results.to_junit())]
    assert suites == ["0", "1"]
    whole = mechdsl.run(TEXT, fail_fast=True, against=mechdsl.run(TEXT))
    assert [each.name for each in whole] == ["heads", "other"]
    assert whole.complete
    assert mechdsl.run(TEXT, fail_fast=False).complete


def test_fail_fast_stops_after_a_failed_experiment() -> None:
    """Results distinguish failed experiments from those not run."""
    lost = TEXT.replace("logit(answer of fewer) as", "logit(answer) as")
    results = mechdsl.run(lost, fail_fast=True)
    assert len(results) == 0
    assert [each.name for each in results.files[0].lost] == ["heads"]
    assert [each.name for each in results.files[0].not_run] == ["other"]
    assert len(mechdsl.run(lost)) == 1


def test_against_with_only_ignores_other_experiments() -> None:
    before = mechdsl.run(TEXT)
    assert kinds(mechdsl.run(TEXT, only="other", against=before)) == []
