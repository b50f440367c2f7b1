"""Requirements of the JUnit XML schemas of CI systems (Jenkins' xunit, Surefire, GitLab, GitHub
actions): elements, their order, attributes and counts."""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element


class Rule(NamedTuple):
    """Schema of one element."""

    required: set[str]
    optional: set[str]
    children: str
    """Regular expression of the names of its children, each followed by a space."""


RULES = {
    "testsuites": Rule({"name", "tests", "failures", "errors"}, set(), "(testsuite )*"),
    "testsuite": Rule(
        {"name", "tests", "failures", "errors", "skipped"}, set(), "(properties )?(testcase )*"
    ),
    "properties": Rule(set(), set(), "(property )+"),
    "property": Rule({"name", "value"}, set(), ""),
    "testcase": Rule(
        {"name", "classname", "file"}, {"line"}, "(failure |error |skipped )?(system-out )?"
    ),
    "failure": Rule({"message", "type"}, set(), ""),
    "error": Rule({"message", "type"}, set(), ""),
    "skipped": Rule({"message"}, set(), ""),
    "system-out": Rule(set(), set(), ""),
}
COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def junit(text: str) -> Element:
    """Parse a report and check that it is valid and can be encoded as UTF-8."""
    root = ElementTree.fromstring(text.encode("utf-8"))
    assert root.tag == "testsuites"
    for element in root.iter():
        rule = RULES[element.tag]
        given = set(element.keys())
        assert rule.required <= given <= rule.required | rule.optional, (element.tag, given)
        inside = "".join(f"{child.tag} " for child in element)
        assert re.fullmatch(rule.children, inside), (element.tag, inside)
        assert element.get("line", "1").isdecimal()
    for element in root.iter():
        if element.tag in ("testsuites", "testsuite"):
            assert int(element.attrib["tests"]) == len(list(element.iter("testcase")))
            for attribute, tag in COUNTED.items():
                if attribute in element.attrib:
                    assert int(element.attrib[attribute]) == len(list(element.iter(tag)))
    for suite in root:
        names = [(case.get("classname"), case.get("name")) for case in suite.iter("testcase")]
        assert len(set(names)) == len(names), "CI systems take two of one name for one"
    return root


def verdicts(root: Element) -> dict[str, str]:
    """Name of a test → `passed`, `failure`, `error` or `skipped`."""
    return {case.attrib["name"]: verdict(case) for case in root.iter("testcase")}


def verdict(case: Element) -> str:
    found = [child.tag for child in case if child.tag != "system-out"]
    return found[0] if found else "passed"


def message(root: Element, name: str) -> str:
    """The message of a test, or the output of a passed test."""
    (case,) = [each for each in root.iter("testcase") if each.get("name") == name]
    return "".join(child.get("message") or child.text or "" for child in case)
