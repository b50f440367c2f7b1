"""Verdicts as JUnit XML for CI systems: a suite per experiment, a test per `expect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal
from xml.etree import ElementTree

from mechdsl.base.text import escape_hidden
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.results.experiment_result import (
    ExpectationChange,
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
    SkippedExperiment,
    VerdictComparison,
    missing_reason,
)
from mechdsl.results.results import Results
from mechdsl.results.statistics_conventions import selection_text
from mechdsl.show.reports.text import measure_name, verdict_text
from mechdsl.statistics.measurements import MissingReason

SKIPPED_TEXT = "not run, because an earlier expectation fails (--fail-fast)"

UNDECIDED_TEXT = "no verdict: it names an experiment that was not run (--fail-fast)"


@dataclass(frozen=True)
class JunitTest:
    """One test of a report."""

    name: str
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    message: str = ""
    detail: str = ""
    """Type of the failure, such as `E0604`; or a note on a passed test."""
    line: int | None = None


@dataclass(frozen=True)
class JunitSuite:
    """Tests of one experiment, or of a whole file."""

    file: str
    experiment: str = ""
    tests: Sequence[JunitTest] = ()
    properties: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def name(self) -> str:
        """Display name: `heads.mech: heads`."""
        return f"{self.file}: {self.experiment}" if self.experiment else self.file

    @property
    def classname(self) -> str:
        """Name by which CI systems group tests: `heads.heads`."""
        stem = PurePath(self.file).stem or self.file
        return f"{stem}.{self.experiment}" if self.experiment else stem


def results_junit(results: Results) -> str:
    """Format the verdicts of results."""
    return junit_text(build_suites(results.files, results.against))


def build_suites(
    files: Iterable[FileResult], against: VerdictComparison | None = None
) -> list[JunitSuite]:
    """Return a suite per experiment of files that were run, in order."""
    changes = against.changes if against is not None else ()
    known = {id(change.now): change for change in changes if change.now is not None}
    return [suite for file in files for suite in _file_suites(file, known)]


def diagnostic_suite(problem: Diagnostic) -> JunitTest:
    """Return a failed test for an error in a file or in the command."""
    line = None if problem.span is None else problem.span.line
    said = missing_reason(problem)
    return JunitTest(problem.code, "error", f"{said.code}: {said.reason}", problem.code, line)


def _file_suites(
    file: FileResult, changes: Mapping[int, ExpectationChange]
) -> Iterator[JunitSuite]:
    left = {skipped_experiment.name: skipped_experiment for skipped_experiment in file.not_run}
    if not (file.experiments or file.lost or left):
        yield JunitSuite(file.file)
    for experiment in (*file.experiments, *file.lost):
        waiting = left.pop(experiment.name, None)
        tests = [
            *_tests(experiment, changes),
            *(_skipped_tests(waiting, UNDECIDED_TEXT) if waiting else []),
        ]
        yield JunitSuite(file.file, experiment.name, tests, _properties(file, experiment))
    for skipped_experiment in left.values():
        yield JunitSuite(
            file.file,
            skipped_experiment.name,
            list(_skipped_tests(skipped_experiment, SKIPPED_TEXT)),
        )


def _properties(file: FileResult, each: ExperimentResult | LostExperiment) -> dict[str, str]:
    properties = {"hash": file.hash} if file.hash else {}
    if isinstance(each, ExperimentResult):
        properties |= {"model": each.model, "runs": each.direction, "prompts": str(each.prompts)}
        if each.selected:
            properties["selection"] = selection_text(each)
    return properties


def _tests(
    experiment: ExperimentResult | LostExperiment, changes: Mapping[int, ExpectationChange]
) -> Iterator[JunitTest]:
    if isinstance(experiment, LostExperiment):
        yield from (_missing_test(f"{experiment.name} is computed", r) for r in experiment.reasons)
    else:
        for data in experiment.measures:
            if data.missing is not None:
                yield _missing_test(f"{measure_name(data)} is computed", data.missing)
    for outcome in experiment.outcomes:
        yield _verdict(outcome, changes.get(id(outcome)))


def _missing_test(name: str, missing: MissingReason) -> JunitTest:
    return JunitTest(name, "error", f"{missing.code}: {missing.reason}", missing.code)


def _verdict(outcome: ExpectOutcome, change: ExpectationChange | None) -> JunitTest:
    said = _figure(outcome)
    if outcome.holds:
        detail = "; ".join(each for each in (said, outcome.reason) if each)
        return JunitTest(outcome.text, detail=detail, line=outcome.line)
    message = "; ".join(each for each in (said, outcome.reason) if each) or "it fails"
    message = f"undecided: {message}" if outcome.undecided else message
    if not outcome.computed:
        return JunitTest(outcome.text, "error", message, "not computed", outcome.line)
    if change is not None and change.kind == "failed before":
        before = _figure(change.before) if change.before is not None else ""
        told = f"failed before{f' ({before})' if before else ''}, and fails now: {message}"
        return JunitTest(outcome.text, "skipped", told, line=outcome.line)
    if change is not None and change.kind == "regression" and change.before is not None:
        before = _figure(change.before)
        message += f"; it held before{f': {before}' if before else ''}"
    elif change is not None and change.kind == "new":
        message += "; it isn't in the earlier run"
    return JunitTest(outcome.text, "failure", message, "expect", outcome.line)


def _figure(outcome: ExpectOutcome) -> str:
    """Format `0.41 [0.37, 0.45], effective n = 16`; empty without a number."""
    value = verdict_text(outcome)
    if not value or outcome.effective_n is None:
        return value
    return f"{value}, effective n = {outcome.effective_n}"


def _skipped_tests(left: SkippedExperiment, why: str) -> Iterator[JunitTest]:
    for expect in left.expects:
        yield JunitTest(expect.text, "skipped", why, line=expect.line)
    if not left.expects:
        yield JunitTest(f"{left.name} is computed", "skipped", why)


# --- the text -----------------------------------------------------------------------------------


def junit_text(suites: Sequence[JunitSuite]) -> str:
    """Format suites as a document. Characters that are invalid in XML are escaped as `\\x1b`."""
    every = [test for suite in suites for test in suite.tests]
    root = ElementTree.Element("testsuites", {"name": "mechdsl", **_counts(every)})
    for suite in suites:
        skipped = sum(test.outcome == "skipped" for test in suite.tests)
        attributes = {"name": escape_hidden(suite.name), **_counts(suite.tests)}
        one = ElementTree.SubElement(root, "testsuite", {**attributes, "skipped": str(skipped)})
        if suite.properties:
            listed = ElementTree.SubElement(one, "properties")
            for name, value in suite.properties.items():
                ElementTree.SubElement(
                    listed, "property", {"name": name, "value": escape_hidden(value)}
                )
        names = Counter[str]()
        for test in suite.tests:
            names[test.name] += 1  # CI systems merge two tests of one name
            count = names[test.name]
            _add(one, suite, test, test.name if count == 1 else f"{test.name} ({count})")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _counts(tests: Sequence[JunitTest]) -> dict[str, str]:
    counts = Counter(test.outcome for test in tests)
    return {
        "tests": str(len(tests)),
        "failures": str(counts["failure"]),
        "errors": str(counts["error"]),
    }


def _add(suite: ElementTree.Element, of: JunitSuite, test: JunitTest, name: str) -> None:
    attributes = {
        "classname": escape_hidden(of.classname),
        "name": escape_hidden(name),
        "file": escape_hidden(of.file),
        **({} if test.line is None else {"line": str(test.line)}),
    }
    case = ElementTree.SubElement(suite, "testcase", attributes)
    if test.outcome == "passed":
        if test.detail:
            ElementTree.SubElement(case, "system-out").text = escape_hidden(test.detail)
        return
    said = {"message": escape_hidden(test.message)}
    if test.outcome != "skipped":
        said["type"] = escape_hidden(test.detail)
    element = ElementTree.SubElement(case, test.outcome, said)
    if test.outcome != "skipped":
        at = of.file if test.line is None else f"{of.file}:{test.line}"
        element.text = escape_hidden(f"{at}\n{test.name}\n{test.message}", keep="\n")
