"""Verdicts as JUnit XML, which CI systems show: a suite per experiment, a test per `expect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal
from xml.etree import ElementTree

from mechdsl.base.visible import visible
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.results.against import Against, Change
from mechdsl.results.collect import why
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
    NotRun,
)
from mechdsl.results.results import Results
from mechdsl.results.statistics_conventions import selected_words
from mechdsl.show.reports.text import measure_name
from mechdsl.show.reports.verdicts import verdict_value
from mechdsl.statistics.measure_data import Missing

FAIL_FAST = "not run, as an earlier expectation fails (--fail-fast)"
UNDECIDED = "not decided: it names an experiment that was not run (--fail-fast)"


@dataclass(frozen=True)
class Test:
    """One test of a report."""

    name: str
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    message: str = ""
    detail: str = ""
    """Its type, as `E0604`; or what a test that passed has to say."""
    line: int | None = None


@dataclass(frozen=True)
class Suite:
    """Tests of one experiment, or of a file as a whole."""

    file: str
    experiment: str = ""
    tests: Sequence[Test] = ()
    properties: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """`heads.mech: heads`."""
        return f"{self.file}: {self.experiment}" if self.experiment else self.file

    @property
    def classname(self) -> str:
        """`heads.heads`, by which CI systems group tests."""
        stem = PurePath(self.file).stem or self.file
        return f"{stem}.{self.experiment}" if self.experiment else stem


def as_junit(results: Results) -> str:
    """The verdicts of results."""
    return junit_text(suites_of(results.files, results.against))


def suites_of(files: Iterable[FileResult], against: Against | None = None) -> list[Suite]:
    """A suite per experiment of files that were run, in their order."""
    changes = against.changes if against is not None else ()
    known = {id(each.now): each for each in changes if each.now is not None}
    return [suite for file in files for suite in _of_file(file, known)]


def of_diagnostic(problem: Diagnostic) -> Test:
    """What is wrong with a file, or with the command."""
    line = None if problem.span is None else problem.span.line
    said = why(problem)
    return Test(problem.code, "error", f"{said.code}: {said.reason}", problem.code, line)


def _of_file(file: FileResult, changes: Mapping[int, Change]) -> Iterator[Suite]:
    left = {each.name: each for each in file.not_run}
    if not (file.experiments or file.lost or left):
        yield Suite(file.file)
    for each in (*file.experiments, *file.lost):
        waiting = left.pop(each.name, None)
        tests = [*_tests(each, changes), *(_left_out(waiting, UNDECIDED) if waiting else [])]
        yield Suite(file.file, each.name, tests, _properties(file, each))
    for each in left.values():
        yield Suite(file.file, each.name, list(_left_out(each, FAIL_FAST)))


def _properties(file: FileResult, each: ExperimentResult | LostExperiment) -> dict[str, str]:
    found = {"hash": file.hash} if file.hash else {}
    if isinstance(each, ExperimentResult):
        found |= {"model": each.model, "runs": each.direction, "prompts": str(each.prompts)}
        if each.selected:
            found["selection"] = selected_words(each)
    return found


def _tests(
    experiment: ExperimentResult | LostExperiment, changes: Mapping[int, Change]
) -> Iterator[Test]:
    if isinstance(experiment, LostExperiment):
        yield from (_missing(f"{experiment.name} is computed", r) for r in experiment.reasons)
    else:
        for data in experiment.measures:
            if data.missing is not None:
                yield _missing(f"{measure_name(data)} is computed", data.missing)
    for outcome in experiment.outcomes:
        yield _verdict(outcome, changes.get(id(outcome)))


def _missing(name: str, missing: Missing) -> Test:
    return Test(name, "error", f"{missing.code}: {missing.reason}", missing.code)


def _verdict(outcome: ExpectOutcome, change: Change | None) -> Test:
    said = _figure(outcome)
    if outcome.holds:
        detail = "; ".join(each for each in (said, outcome.reason) if each)
        return Test(outcome.text, detail=detail, line=outcome.line)
    message = "; ".join(each for each in (said, outcome.reason) if each) or "it fails"
    if not outcome.computed:
        return Test(outcome.text, "error", message, "not computed", outcome.line)
    if change is not None and change.kind == "failed before":
        before = _figure(change.before) if change.before is not None else ""
        told = f"failed before{f' ({before})' if before else ''}, and fails now: {message}"
        return Test(outcome.text, "skipped", told, line=outcome.line)
    if change is not None and change.kind == "regression" and change.before is not None:
        before = _figure(change.before)
        message += f"; it held before{f': {before}' if before else ''}"
    elif change is not None and change.kind == "new":
        message += "; it is not in the earlier run"
    return Test(outcome.text, "failure", message, "expect", outcome.line)


def _figure(outcome: ExpectOutcome) -> str:
    """`0.41 [0.37, 0.45], effective n = 16`; empty where there is no number."""
    value = verdict_value(outcome)
    if not value or outcome.effective_n is None:
        return value
    return f"{value}, effective n = {outcome.effective_n}"


def _left_out(left: NotRun, why: str) -> Iterator[Test]:
    for each in left.expects:
        yield Test(each.text, "skipped", why, line=each.line)
    if not left.expects:
        yield Test(f"{left.name} is computed", "skipped", why)


# --- the text -----------------------------------------------------------------------------------


def junit_text(suites: Sequence[Suite]) -> str:
    """Suites as a document. What XML can't hold is written out, as `\\x1b`."""
    every = [test for suite in suites for test in suite.tests]
    root = ElementTree.Element("testsuites", {"name": "mechdsl", **_counts(every)})
    for suite in suites:
        skipped = sum(test.outcome == "skipped" for test in suite.tests)
        attributes = {"name": visible(suite.name), **_counts(suite.tests)}
        one = ElementTree.SubElement(root, "testsuite", {**attributes, "skipped": str(skipped)})
        if suite.properties:
            listed = ElementTree.SubElement(one, "properties")
            for name, value in suite.properties.items():
                ElementTree.SubElement(listed, "property", {"name": name, "value": visible(value)})
        names = Counter[str]()
        for test in suite.tests:
            names[test.name] += 1  # CI systems take two tests of one name for one
            count = names[test.name]
            _add(one, suite, test, test.name if count == 1 else f"{test.name} ({count})")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _counts(tests: Sequence[Test]) -> dict[str, str]:
    found = Counter(test.outcome for test in tests)
    return {
        "tests": str(len(tests)),
        "failures": str(found["failure"]),
        "errors": str(found["error"]),
    }


def _add(suite: ElementTree.Element, of: Suite, test: Test, name: str) -> None:
    attributes = {
        "classname": visible(of.classname),
        "name": visible(name),
        "file": visible(of.file),
        **({} if test.line is None else {"line": str(test.line)}),
    }
    case = ElementTree.SubElement(suite, "testcase", attributes)
    if test.outcome == "passed":
        if test.detail:
            ElementTree.SubElement(case, "system-out").text = visible(test.detail)
        return
    said = {"message": visible(test.message)}
    if test.outcome != "skipped":
        said["type"] = visible(test.detail)
    found = ElementTree.SubElement(case, test.outcome, said)
    if test.outcome != "skipped":
        at = of.file if test.line is None else f"{of.file}:{test.line}"
        found.text = visible(f"{at}\n{test.name}\n{test.message}", keep="\n")
