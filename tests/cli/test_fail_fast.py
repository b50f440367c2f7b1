"""`mechdsl run --fail-fast`: the run stops after the first expectation that fails the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mechdsl.execute.run.panel import Execution
from mechdsl.pipeline import computation
from mechdsl.results.document import ResultsDocument

from ..fruit import FRUIT
from ..junit_schema import junit, verdicts
from .conftest import Command

EXPERIMENT = """
experiment {name} {{
  model toy
  prompts fruit limit 8
  from clean into fewer
{body}
  measure logit(answer) - logit(answer of fewer) as recovery
{expects}
}}
"""
HOLDS, FAILS = "accuracy(clean) > 0.1", "max(recovery) > 5"
PATCH = "  patch layer 1 head * at last token"


def experiment(name: str, *expects: str, body: str = PATCH) -> str:
    lines = "\n".join(f"  expect {each}" for each in expects)
    return EXPERIMENT.format(name=name, body=body, expects=lines)


def written(name: str, *experiments: str) -> str:
    Path(name).write_text(FRUIT + "".join(experiments), encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHDSL_STORE", "none")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the executed experiments, one entry per call of the executor."""
    names: list[str] = []
    execute: Callable[..., Execution] = computation.execute

    def told(plan: Any, *arguments: Any, **others: Any) -> Execution:
        keys = [p.experiment.name for panel in plan.panels for p in panel.experiments]
        names.append(" ".join(dict.fromkeys(keys)))
        return execute(plan, *arguments, **others)

    monkeypatch.setattr(computation, "execute", told)
    return names


def test_fail_fast_stops_at_the_first_failed_expectation(command: Command, ran: list[str]) -> None:
    text = (experiment("one", HOLDS), experiment("two", FAILS, HOLDS), experiment("three", HOLDS))
    files = written("a.mech", *text), written("b.mech", experiment("four", HOLDS))
    done = command("run", *files, "--fail-fast", "--junit", "r.xml")
    assert done.status == 1
    assert ran == ["one", "two"]
    assert done.out.endswith("\nnot run after a failed expectation: a.mech: three, b.mech\n")
    assert done.out.count("\nholds  expect ") == 2  # `two` is decided completely
    suites = [
        (suite.get("name"), suite.get("skipped")) for suite in junit(Path("r.xml").read_text())
    ]
    assert suites == [
        ("a.mech: one", "0"),
        ("a.mech: two", "0"),
        ("a.mech: three", "1"),
        ("b.mech: four", "1"),
    ]


def test_fail_fast_without_a_failure_runs_everything(command: Command, ran: list[str]) -> None:
    file = written("a.mech", experiment("one", HOLDS), experiment("two", HOLDS))
    done = command("run", file, "--fail-fast")
    assert (done.status, "not run" in done.out) == (0, False)
    assert ran == ["one", "two"]
    alone = command("run", file)
    assert ran[2:] == ["one two"]
    assert done.out == alone.out


def test_run_without_fail_fast_runs_everything(command: Command, ran: list[str]) -> None:
    file = written("a.mech", experiment("one", FAILS), experiment("two", HOLDS))
    assert command("run", file).status == 1
    assert ran == ["one two"]


def test_expectation_waits_for_the_experiment_it_names(command: Command, ran: list[str]) -> None:
    """The failing expectation refers to a later experiment."""
    later = "max(recovery) > mean(recovery of three) + 5"
    file = written(
        "a.mech",
        experiment("one", later, HOLDS),
        experiment("two", HOLDS),
        experiment("three", HOLDS),
        experiment("four", HOLDS),
    )
    done = command("run", file, "--fail-fast")
    assert done.status == 1
    assert ran == ["one", "two", "three"]
    assert f"fails  expect {later}" in done.out
    assert done.out.endswith("not run after a failed expectation: four\n")


def test_expectation_on_an_experiment_not_run_is_undecided(
    command: Command, ran: list[str]
) -> None:
    """The expectation is neither a failure nor an error."""
    later = "max(recovery) > mean(recovery of two)"
    file = written("a.mech", experiment("one", later, FAILS), experiment("two", HOLDS))
    done = command("run", file, "--fail-fast", "--junit", "r.xml", "--format", "json")
    assert done.status == 1
    assert ran == ["one"]
    assert done.err.endswith(
        "not run after a failed expectation: two\nnot decided after a failed expectation: one: "
        f"expect {later}\n"
    )
    document = json.loads(done.out)
    assert ResultsDocument.model_validate(document)
    (found,) = document["files"]
    assert [each["text"] for each in found["experiments"][0]["expect"]] == [FAILS]
    assert found["not_run"] == [
        {"experiment": "one", "expect": [later]},
        {"experiment": "two", "expect": [HOLDS]},
    ]
    root = junit(Path("r.xml").read_text())
    assert verdicts(root) == {FAILS: "failure", later: "skipped", HOLDS: "skipped"}


def test_experiment_runs_after_the_one_it_selects_from(command: Command, ran: list[str]) -> None:
    """It runs after the experiment that it selects from, and before later experiments."""
    picking = experiment("picks", HOLDS, body="  patch top 2 of two at last token")
    file = written(
        "a.mech", picking, experiment("one", HOLDS), experiment("two", HOLDS), experiment("four")
    )
    assert command("run", file, "--fail-fast").status == 0
    assert ran == ["one", "two", "picks", "four"]


def test_fail_fast_runs_all_variants_together(command: Command, ran: list[str]) -> None:
    body = "  for k in 1..2 {\n    patch layer k head * at last token\n  }"
    file = written("a.mech", experiment("one", HOLDS, body=body), experiment("two", HOLDS))
    assert command("run", file, "--fail-fast").status == 0
    assert ran == ["one", "two"]


def test_lost_experiment_with_expectations_stops_the_run(command: Command, ran: list[str]) -> None:
    """Its expectations fail; a lost experiment without expectations stops nothing."""
    lost = experiment("lost", FAILS).replace("logit(answer of fewer)", "logit(answer)")
    file = written("a.mech", lost, experiment("two", HOLDS))
    done = command("run", file, "--fail-fast", "--junit", "r.xml")
    assert done.status == 3
    assert ran == ["lost"]
    assert "lost: not computed" in done.out
    assert done.out.endswith("not run after a failed expectation: two\n")
    found = verdicts(junit(Path("r.xml").read_text()))
    assert found == {"lost is computed": "error", FAILS: "error", HOLDS: "skipped"}
    ran.clear()
    written("a.mech", lost.replace(f"  expect {FAILS}\n", ""), experiment("two", HOLDS))
    assert command("run", file, "--fail-fast").status == 3
    assert ran == ["lost", "two"]


def test_expectation_on_a_lost_experiment_is_an_error(command: Command, ran: list[str]) -> None:
    """The expectation no longer waits for the lost experiment."""
    lost = experiment("lost").replace("logit(answer of fewer)", "logit(answer)")
    read = "max(recovery) > mean(recovery of lost)"
    file = written("a.mech", lost, experiment("two", HOLDS, read), experiment("three", HOLDS))
    done = command("run", file, "--fail-fast", "--junit", "r.xml")
    assert (done.status, ran) == (3, ["lost", "two"])
    found = verdicts(junit(Path("r.xml").read_text()))
    assert found[read] == "error"
    assert found[HOLDS] in ("passed", "skipped")
    assert "not decided" not in done.out


def test_fail_fast_ignores_dependencies_of_only(command: Command, ran: list[str]) -> None:
    """An experiment that runs only as a dependency has no verdicts under `--only`."""
    picking = experiment("picks", HOLDS, body="  patch top 2 of one at last token")
    file = written("a.mech", experiment("one", FAILS), picking)
    done = command("run", file, "--fail-fast", "--only", "picks")
    assert (done.status, ran) == (0, ["one", "picks"])


def test_fail_fast_ignores_expectations_that_failed_before(
    command: Command, ran: list[str]
) -> None:
    """A known failure doesn't stop the run; a regression or a new failure does."""
    file = written("a.mech", experiment("one", FAILS), experiment("two", HOLDS))
    assert command("run", file, "--out", "kept").status == 1
    ran.clear()
    assert command("run", file, "--fail-fast", "--against", "kept/a").status == 0
    assert ran == ["one", "two"]
    ran.clear()
    written("a.mech", experiment("one", "max(recovery) > 6"), experiment("two", HOLDS))
    done = command("run", file, "--fail-fast", "--against", "kept/a")
    assert (done.status, ran) == (1, ["one"])
    assert "gone           two" not in done.out


def test_stopped_run_writes_no_export(command: Command) -> None:
    """A stopped run is incomplete, so the earlier export stays."""
    file = written("a.mech", experiment("one", HOLDS), experiment("two", HOLDS))
    assert command("run", file, "--out", "kept").status == 0
    before = Path("kept/a/results.json").read_bytes()
    written("a.mech", experiment("one", FAILS), experiment("two", HOLDS))
    done = command("run", file, "--out", "kept", "--fail-fast")
    assert done.status == 1
    assert "nothing was written to kept because a.mech was stopped" in done.err
    assert Path("kept/a/results.json").read_bytes() == before
    # a failure in the last experiment leaves a complete run
    written("a.mech", experiment("one", HOLDS), experiment("two", FAILS))
    done = command("run", file, "--out", "kept", "--fail-fast")
    assert (done.status, "nothing was written" in done.err) == (1, False)
    assert Path("kept/a/results.json").read_bytes() != before


def test_fail_fast_values_equal_those_of_a_full_run(command: Command) -> None:
    """Values are equal up to rounding, since batches are formed per experiment."""
    file = written("a.mech", experiment("one", HOLDS), experiment("two", FAILS))
    found: list[Mapping[str, Any]] = []
    for more in ([], ["--fail-fast"]):
        found.append(json.loads(command("run", file, "--format", "json", *more).out))
    means = [
        [
            m["mean"]
            for e in each["files"][0]["experiments"]
            for c in e["cells"]
            for m in c["measures"]
        ]
        for each in found
    ]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


def test_mistyped_fail_fast_gets_a_suggestion(command: Command) -> None:
    done = command("run", written("a.mech", experiment("one")), "--failfast")
    assert (done.status, "did you mean `--fail-fast`?" in done.err) == (2, True)
