"""`mechdsl run --junit FILE`: a report of verdicts for CI, even if the run fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest

from mechdsl.base.files import write_atomically
from mechdsl.cli.output import INCOMPLETE, OutputLost
from mechdsl.pipeline import computation

from ..fruit import FRUIT
from ..junit_schema import junit, message, verdicts
from .conftest import Command

EXPERIMENT = """
experiment {name} {{
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 1 head * at last token
  measure {measure} as recovery
  {report}
{expects}
}}
"""
GOOD = "logit(answer) - logit(answer of fewer)"
LOST = "logit(answer) - logit(answer)"


def experiment(name: str, *expects: str, measure: str = GOOD, report: str = "report table") -> str:
    lines = "\n".join(f"  expect {each}" for each in expects)
    return EXPERIMENT.format(name=name, measure=measure, expects=lines, report=report)


HOLDS = experiment("holds", "accuracy(clean) > 0.1")
WRITES = experiment("holds", "accuracy(clean) > 0.1", report='report csv to "holds.csv"')
FAILS = experiment("fails", "max(recovery) > 5")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, *experiments: str) -> str:
    Path(name).write_text(FRUIT + "".join(experiments), encoding="utf-8")
    return name


def report() -> Element:
    return junit(Path("r.xml").read_text(encoding="utf-8"))


def test_junit_has_a_suite_per_experiment(command: Command) -> None:
    files = written("a.mech", HOLDS, FAILS), written("b.mech", experiment("bare"))
    assert command("run", *files, "--junit", "r.xml").status == 1
    root = report()
    assert [(suite.get("name"), suite.get("tests")) for suite in root] == [
        ("a.mech: holds", "1"),
        ("a.mech: fails", "1"),
        ("b.mech: bare", "0"),
    ]
    assert verdicts(root) == {"accuracy(clean) > 0.1": "passed", "max(recovery) > 5": "failure"}
    case = next(root.iter("testcase"))
    line = next(n for n, s in enumerate(Path("a.mech").read_text().split("\n"), 1) if "> 0.1" in s)
    assert (case.get("file"), case.get("line")) == ("a.mech", str(line))


def test_junit_message_equals_the_printed_verdict(command: Command) -> None:
    done = command("run", written("a.mech", FAILS), "--junit", "r.xml")
    said = message(report(), "max(recovery) > 5")
    figure, _, rest = said.partition(", effective n = ")
    assert f"fails  expect max(recovery) > 5  {figure}" in done.out
    assert rest.startswith("8")


def test_junit_does_not_affect_json_output(command: Command) -> None:
    file = written("a.mech", HOLDS)
    outs = [
        command("run", file, "--format", "json", *more).out for more in ([], ["--junit", "r.xml"])
    ]
    assert outs[0] == outs[1]
    assert verdicts(report()) == {"accuracy(clean) > 0.1": "passed"}


def test_junit_lost_experiment_is_an_error(command: Command) -> None:
    lost = experiment("lost", "max(recovery) > 0", measure=LOST)
    assert command("run", written("a.mech", HOLDS, lost), "--junit", "r.xml").status == 3
    assert verdicts(report()) == {
        "accuracy(clean) > 0.1": "passed",
        "lost is computed": "error",
        "max(recovery) > 0": "error",
    }
    assert message(report(), "lost is computed").startswith("E0604: ")
    # the file has no other experiment
    assert command("run", written("b.mech", lost), "--junit", "r.xml").status == 2
    assert verdicts(report()) == {"lost is computed": "error", "max(recovery) > 0": "error"}
    assert message(report(), "lost is computed").startswith("E0604: ")


def test_junit_expectation_on_a_lost_measure_is_an_error(command: Command) -> None:
    both = experiment(
        "both",
        "max(recovery) > 0",
        "not (max(recovery) > 0)",
        "max(delta) > 100 or max(recovery) > 0",
        "argmax(recovery) = L1H1",
        "max(delta) > 100",
        "accuracy(clean) > 0.1",
        measure=f"logit(answer) as delta\n  measure {LOST}",
    )
    other = experiment("other", "max(recovery) > mean(recovery of both)")
    assert command("run", written("a.mech", both, other), "--junit", "r.xml").status == 3
    found = verdicts(report())
    errors = [name for name, each in found.items() if each == "error"]
    assert "max(delta) > 100" not in errors
    assert found["max(delta) > 100"] == "failure"
    assert found["accuracy(clean) > 0.1"] == "passed"
    assert len(errors) == 5 + 1  # with the measure itself


def test_junit_invalid_file_is_an_error_and_others_are_skipped(command: Command) -> None:
    Path("r.xml").write_text("from the run before")
    wrong = written("a.mech", HOLDS.replace("head *", "head 14"))
    assert command("run", wrong, written("b.mech", HOLDS), "--junit", "r.xml").status == 2
    root = report()
    assert [suite.get("name") for suite in root] == ["a.mech", "b.mech"]
    assert verdicts(root) == {"E0301": "error", "the file runs": "skipped"}
    assert "head 14" in message(root, "E0301")
    case = next(root.iter("testcase"))
    assert int(case.get("line", "0")) > 1


def test_junit_missing_file_is_an_error(command: Command) -> None:
    assert command("run", "nowhere.mech", "--junit", "r.xml").status == 2
    assert "error" in verdicts(report()).values()


def test_junit_invalid_option_is_an_error(command: Command) -> None:
    done = command("run", written("a.mech", HOLDS), "--only", "hold", "--junit", "r.xml")
    assert done.status == 2
    root = report()
    assert verdicts(root) == {"the file runs": "skipped", "E0208": "error"}
    assert "no experiment of that name" in message(root, "E0208")


def test_junit_unknown_device_is_an_error(command: Command) -> None:
    file = Path(written("a.mech", HOLDS))
    done = command("run", file, "--device", "cuda:99", "--junit", "r.xml")
    assert done.status == 2
    assert set(verdicts(report()).values()) == {"error"}


Ran = Callable[..., Any]


def stopped(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str = "b.mech") -> None:
    """Make the run of one file raise; the report must contain an error before that."""
    run: Ran = computation.run_checked

    def ran(checked: Any, *arguments: Any, **named: Any) -> Any:
        if checked.source.name == at:
            assert verdicts(report())["the file runs"] == "error"
            raise error
        return run(checked, *arguments, **named)

    monkeypatch.setattr(computation, "run_checked", ran)


def test_junit_internal_error_is_an_error(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, RuntimeError("no room"))
    files = [written(name, HOLDS) for name in ("a.mech", "b.mech", "c.mech")]
    assert command("run", *files, "--junit", "r.xml").status == 3
    root = report()
    assert [suite.get("errors") for suite in root] == ["0", "1", "0"]
    assert "no room" in message(root, "the run completes")


def test_junit_interrupted_run_is_an_error(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, KeyboardInterrupt())
    files = [written(name, HOLDS) for name in ("a.mech", "b.mech", "c.mech")]
    assert command("run", *files, "--junit", "r.xml").status == 130
    root = report()
    assert [suite.get("name") for suite in root] == ["a.mech: holds", "b.mech", "c.mech"]
    assert [suite.get("errors") for suite in root] == ["0", "1", "1"]
    assert {each.get("message") for each in root.iter("error")} == {"the run was interrupted"}


def test_junit_failed_report_is_an_error(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written("a.mech", WRITES)
    run: Ran = computation.run_checked

    def ran(*arguments: Any, **named: Any) -> Any:
        Path("holds.csv").mkdir()
        return run(*arguments, **named)

    monkeypatch.setattr(computation, "run_checked", ran)
    assert command("run", file, "--junit", "r.xml").status == 3
    assert verdicts(report())["the run completes"] == "error"
    assert message(report(), "the run completes") == "a report could not be made"


def test_junit_is_written_if_output_is_closed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files without other outputs are run for the JUnit report."""

    def closed(*arguments: Any, **others: Any) -> None:
        raise OutputLost("is closed")

    monkeypatch.setattr("mechdsl.cli.run._show", closed)
    # pytest's output has no file descriptor
    monkeypatch.setattr("mechdsl.cli.run.report_lost_output", lambda error: INCOMPLETE)
    files = [written(name, HOLDS) for name in ("a.mech", "b.mech")]
    done = command("run", *files, "--junit", "r.xml")
    assert (done.status, "not run" in done.err) == (3, False)
    assert [suite.get("name") for suite in report()] == ["a.mech: holds", "b.mech: holds"]
    assert ("not run because output is lost and nothing would be saved: b.mech") in command(
        "run", *files
    ).err


def test_junit_full_disk_is_an_error(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file, count = written("a.mech", HOLDS), [0]

    def full(path: Path, text: str) -> None:
        count[0] += 1
        if count[0] > 1:
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, text)

    monkeypatch.setattr("mechdsl.base.files.write_atomically", full)
    done = command("run", file, "--junit", "r.xml")
    assert done.status == 3
    assert done.err.count("E0208") == 1
    assert "`--junit r.xml`: no space left on device" in done.err
    assert "holds  expect accuracy" in done.out
    assert verdicts(report()) == {"the file runs": "error"}


# --- rejected paths -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("below", "it is a folder"),
        ("a.mech/r.xml", "`a.mech` is not a folder"),
        ("/dev/zero", "it is a device; reports are written to regular files"),
        ("a.mech", "`--junit a.mech` would overwrite `a.mech`, a `.mech` file that the run reads"),
        ("below/../a.mech", "would overwrite `a.mech`, a `.mech` file that the run reads"),
        ("rows.csv", "would overwrite `rows.csv`, the rows of prompts `own`"),
        ("holds.csv", "would overwrite `holds.csv`, the report on line"),
        ("kept/a/results.json", "is in `kept/a`, the `--out` folder of a.mech"),
    ],
)
def test_junit_path_of_an_input_or_output_is_rejected(
    path: str, reason: str, command: Command
) -> None:
    Path("below").mkdir()
    Path("rows.csv").write_text("count\n3\n")
    own = 'prompts own {\n  rows "rows.csv"\n  template "Part {count}"\n}\n'
    before = Path(written("a.mech", own, WRITES)).read_text()
    done = command("run", "a.mech", "--out", "kept", "--junit", path)
    assert done.status == 2
    assert "error[E0208]" in done.err
    assert reason in " ".join(done.err.split())
    assert done.out == ""
    assert Path("a.mech").read_text() == before
    assert Path("rows.csv").read_text() == "count\n3\n"
    assert not Path("holds.csv").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_junit_in_a_read_only_folder_is_rejected(command: Command) -> None:
    Path("below").mkdir(mode=0o500)
    done = command("run", written("a.mech", HOLDS), "--junit", "below/r.xml")
    assert (done.status, done.out) == (2, "")
    assert "may not be written to" in done.err


def test_junit_link_to_an_input_is_rejected(command: Command) -> None:
    file = written("a.mech", HOLDS)
    Path("r.xml").symlink_to(file)
    done = command("run", file, "--junit", "r.xml")
    assert done.status == 2
    assert "would overwrite `a.mech`" in done.err
    assert Path(file).read_text().startswith("mech 1")


@pytest.mark.parametrize("switch", ["--untrusted", None])
def test_junit_may_be_written_outside_the_folder(
    switch: str | None, command: Command, inside: Path
) -> None:
    """The user gives this path, unlike paths in a file."""
    (inside / "here").mkdir()
    (inside / "there").mkdir()
    file = Path("here", "a.mech")
    written(str(file), HOLDS)
    target = inside / "there" / "new" / "r.xml"
    os.chdir("here")
    done = command("run", "a.mech", "--junit", target, *([switch] if switch else []))
    assert done.status == 0
    assert verdicts(junit(target.read_text())) == {"accuracy(clean) > 0.1": "passed"}


def test_mistyped_junit_option_gets_a_suggestion(command: Command) -> None:
    file = written("a.mech", HOLDS)
    done = command("run", file, "--junitt", "r.xml")
    assert (done.status, "did you mean `--junit`?" in done.err) == (2, True)
    assert "requires an argument" in command("run", file, "--junit").err


def test_junit_leaves_no_other_file(command: Command, inside: Path) -> None:
    done = command("run", written("a.mech", FAILS), "--junit", "r.xml")
    assert done.status == 1
    assert verdicts(report()) == {"max(recovery) > 5": "failure"}
    assert {path.name for path in inside.iterdir()} == {"a.mech", "r.xml"}
