"""`mechdsl run --against RUN`: only an expectation that held there, or is new, fails the job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mechdsl.pipeline import computation
from mechdsl.results.document import ResultsDocument
from mechdsl.results.results import pack_results
from mechdsl.results.runs import read_export
from mechdsl.store.store import Store

from ..fruit import FRUIT
from ..junit_schema import junit, message, verdicts
from .conftest import Command

HEADS = """
experiment heads {{
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 1 head * at last token
  measure {measure} as recovery
{expects}
}}
"""
GOOD = "logit(answer) - logit(answer of fewer)"
LOST = "logit(answer) - logit(answer)"
HELD, FAILED = "accuracy(clean) > 0.1", "max(recovery) > 5"


def file(name: str, *expects: str, measure: str = GOOD, more: str = "") -> str:
    lines = "\n".join(f"  expect {each}" for each in expects)
    text = FRUIT + HEADS.format(measure=measure, expects=lines) + more
    Path(name).write_text(text, encoding="utf-8")
    return name


@pytest.fixture(autouse=True)
def baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """`kept/a`: a run of `a.mech` in which the first expectation holds, and the second fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHDSL_STORE", "none")
    assert command("run", file("a.mech", HELD, FAILED), "--out", "kept").status == 1


def comparison(out: str) -> str:
    """Return the text after all tables."""
    return "against " + out.partition("\nagainst ")[2]


def test_known_failure_does_not_fail_the_job(command: Command) -> None:
    done = command("run", "a.mech", "--against", "kept/a", "--junit", "r.xml")
    assert done.status == 0
    said = comparison(done.out).splitlines()
    assert said[0] == "against kept/a: 1 expectation holds as before, 1 failed before"
    assert said[1] == "failed before  heads: expect max(recovery) > 5"
    figure = done.out.partition("expect max(recovery) > 5  ")[2].partition("\n")[0]
    assert said[2].strip() == f"now fails: {figure}; then fails: {figure}"
    assert said[3:] == ["expectations that failed before don't fail the job"]
    root = junit(Path("r.xml").read_text())
    assert verdicts(root) == {HELD: "passed", FAILED: "skipped"}
    assert message(root, FAILED).startswith("failed before (")


def test_regression_fails_the_job(command: Command) -> None:
    """The answers of the file are wrong, so the expectation fails now."""
    text = Path("a.mech").read_text().replace('answer " {count}"', 'answer " {count - 1}"')
    Path("a.mech").write_text(text)
    done = command("run", "a.mech", "--against", "kept/a", "--junit", "r.xml")
    assert done.status == 1
    said = comparison(done.out)
    assert "1 regression" in said
    assert "regression     heads: expect accuracy(clean) > 0.1" in said
    assert "now fails: 0.000 [0.000, 0.369]; then holds: 1.000 [0.631, 1.000]" in said
    root = junit(Path("r.xml").read_text())
    assert verdicts(root)[HELD] == "failure"
    assert "; it held before: 1.000 [0.631, 1.000]" in message(root, HELD)


def test_new_expectation_fails_the_job_only_if_it_fails(command: Command) -> None:
    holds, fails = "accuracy(clean) > 0.2", "max(recovery) > 6"
    done = command("run", file("a.mech", HELD, FAILED, holds), "--against", "kept/a")
    assert (done.status, "new            heads: expect accuracy(clean) > 0.2" in done.out) == (
        0,
        True,
    )
    done = command("run", file("a.mech", HELD, FAILED, fails), "--against", "kept/a")
    assert (done.status, "new            heads: expect max(recovery) > 6" in done.out) == (1, True)
    done = command("run", file("a.mech", HELD), "--against", "kept/a")
    assert (done.status, "gone           heads: expect max(recovery) > 5" in done.out) == (0, True)


def test_newly_lost_measure_is_a_regression(command: Command) -> None:
    more = HEADS.replace("heads", "other").format(measure=GOOD, expects="")
    done = command(
        "run",
        file("a.mech", HELD, measure=LOST, more=more),
        *("--against", "kept/a", "--junit", "r.xml", "--format", "json"),
    )
    assert done.status == 3
    document = json.loads(done.out)
    assert ResultsDocument.model_validate(document)
    assert document["against"]["fails"]
    kinds = [(each["kind"], each.get("code")) for each in document["against"]["changes"]]
    assert ("regression", "E0604") in kinds
    assert "regression     heads: not computed" in done.err
    # the file has no other experiment
    done = command("run", file("a.mech", HELD, measure=LOST), "--against", "kept/a")
    assert done.status == 2
    assert "regression     heads: not computed" in done.out


def test_against_leaves_csv_and_json_results_equal(command: Command) -> None:
    for form in ("json", "csv"):
        alone = command("run", "a.mech", "--format", form).out
        done = command("run", "a.mech", "--format", form, "--against", "kept/a")
        assert "against kept/a: " in done.err
        if form == "csv":
            assert done.out == alone
        else:
            with_it = json.loads(done.out)
            assert with_it.pop("against")["runs"] == ["kept/a"]
            assert with_it == json.loads(alone)


def test_experiments_excluded_by_only_are_not_gone(command: Command) -> None:
    more = HEADS.replace("heads", "other").format(measure=GOOD, expects=f"  expect {HELD}")
    assert command("run", file("a.mech", HELD, more=more), "--out", "kept").status == 0
    done = command("run", "a.mech", "--only", "heads", "--against", "kept/a")
    assert comparison(done.out) == "against kept/a: 1 expectation holds as before\n"


def test_files_without_expectations_have_nothing_to_compare(command: Command) -> None:
    assert command("run", file("plain.mech"), "--out", "kept").status == 0
    done = command("run", "plain.mech", "--against", "kept/plain")
    said = "nothing to compare, no file has expectations; `mechdsl diff` compares cells"
    assert comparison(done.out) == f"against kept/plain: {said}\n"


@pytest.mark.slow
def test_several_files_are_compared_with_their_runs(command: Command) -> None:
    """Each file is compared with its run in a folder of exports; without a run it is new."""
    file("b.mech", HELD)
    assert command("run", "b.mech", "--out", "kept").status == 0
    file("c.mech", FAILED)
    done = command("run", "a.mech", "b.mech", "--against", "kept")
    assert done.status == 0
    assert "against kept: 2 expectations hold as before, 1 failed before" in done.out
    done = command("run", "a.mech", "c.mech", "--against", "kept")
    assert done.status == 1
    assert "c.mech isn't in that run: all its expectations are new" in done.out
    assert "new            c.mech: heads: expect max(recovery) > 5" in done.out
    # a run of one file
    done = command("run", "a.mech", "c.mech", "--against", "kept/a")
    assert "c.mech isn't in that run" in done.out
    done = command("run", "b.mech", "c.mech", "--against", "kept/a")
    assert (done.status, done.out) == (2, "")
    assert "`--against kept/a`: it is a run of `a.mech`, which isn't run now" in done.err


def test_earlier_run_is_read_before_out_replaces_it(command: Command) -> None:
    """`--out` and `--against` name the same folder."""
    file("a.mech", HELD, "max(recovery) > 6")
    done = command("run", "a.mech", "--out", "kept", "--against", "kept/a")
    assert done.status == 1
    assert "new            heads: expect max(recovery) > 6" in done.out
    done = command("run", "a.mech", "--out", "kept", "--against", "kept/a")
    assert (done.status, "1 failed before" in done.out) == (0, True)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("kept/aa", "there is no folder `kept/aa`\n = help: did you mean `kept/a`?"),
        ("kept/other", "there is no folder `kept/other`\n = help: it has `kept/a`"),
        ("nowhere/a", "there is no store"),
        ("lst", "there is no store"),
        ("last", "there is no store"),
        ("kept/a.mech", "there is no store"),
        (".", "the folder `.` contains no run"),
        ("", "there is no store"),
    ],
)
def test_unknown_run_is_rejected_before_running(
    named: str, said: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*arguments: Any) -> None:
        raise AssertionError("it is looked for before anything runs")

    monkeypatch.setattr(computation, "run_checked", ran)
    done = command("run", "a.mech", "--against", named, "--junit", "r.xml")
    assert (done.status, done.out) == (2, "")
    assert "error[E0208]" in done.err
    assert said in done.err
    assert verdicts(junit(Path("r.xml").read_text()))["E0208"] == "error"


def test_damaged_run_is_rejected(command: Command) -> None:
    Path("kept/a/archive.json").write_text("{}")
    done = command("run", "a.mech", "--against", "kept/a")
    assert (done.status, done.out) == (2, "")
    assert "the folder `kept/a` can't be read" in done.err


def test_report_into_the_earlier_run_is_rejected(command: Command) -> None:
    before = Path("kept/a/results.json").read_bytes()
    done = command("run", "a.mech", "--against", "kept/a", "--junit", "kept/a/results.json")
    assert done.status == 2
    assert "is in `kept/a`, the run given by `--against`" in done.err
    assert Path("kept/a/results.json").read_bytes() == before


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the id of that run in a store that also has a later run of another file."""
    text = Path("a.mech").read_text()
    results = read_export(Path("kept/a"))
    monkeypatch.setenv("MECHDSL_STORE", "store")
    ids: list[str] = []
    with Store(Path("store")) as store:
        for name, content in (
            ("a", pack_results(results, text)),
            ("b", pack_results(results, text)),
        ):
            path = str(Path(f"{name}.mech").resolve())
            with store.begin(name * 64, {"file": f"{name}.mech", "path": path}) as run:
                run.finish(content, {})
                ids.append(run.id)
    return ids[0]


def test_run_of_a_store_is_found_by_id_last_or_file(stored: str, command: Command) -> None:
    for named in (stored, "last", "a.mech"):
        done = command("run", "a.mech", "--against", named)
        assert done.status == 0, done.err
        assert f"against {named}: 1 expectation holds as before, 1 failed before" in done.out
    done = command("run", "a.mech", "--against", f"{stored[:-1]}x")
    assert (done.status, f"did you mean `{stored}`?" in done.err) == (2, True)
    done = command("run", file("c.mech", HELD), "--against", "last")
    assert (done.status, "no finished run of `c.mech`" in done.err) == (2, True)


def test_untrusted_file_is_compared_with_folders_but_not_its_store(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user names the folder, whereas the store next to the file is untrusted."""
    monkeypatch.delenv("MECHDSL_STORE")
    done = command("run", "a.mech", "--untrusted", "--against", "kept/a")
    assert done.status == 0
    for named in ("last", "2026"):
        done = command("run", "a.mech", "--untrusted", "--against", named)
        assert (done.status, done.out) == (2, "")
        assert "the store next to an untrusted file isn't read" in done.err


def test_mistyped_option_or_experiment_is_rejected(command: Command) -> None:
    assert "did you mean `--against`?" in command("run", "a.mech", "--againts", "kept/a").err
    assert "requires an argument" in command("run", "a.mech", "--against").err
    shutil.copytree("kept", "kept2")
    done = command("run", "a.mech", "--against", "kept/a/..", "--only", "head")
    assert "no experiment of that name" in done.err
