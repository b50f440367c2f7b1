"""A missing brace and a range with one dot are reported on their line, without a second error.

A brace or dot is deleted from an example, one at a time. For a missing `}` three lines are right:
the line of the deleted brace, the line after it, and the line of the `{` that it closed. Braces and
dots in texts and comments are left alone: `tests/syntax/test_template.py` has placeholders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mechdsl.base.text import STRING_PATTERN, Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic, has_errors

from ..parsing import parse

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "examples").rglob("*.mech"))
SHARED = sorted((ROOT.parent / "shared" / "examples").rglob("*.mech"))
RIGHT_LINES = 0.9
SINGLE_ERRORS = 0.95
SAMPLED = {"{": 40, "}": 40, "..": 12}
"""Deletions in the fast test, evenly spaced over all files."""


@dataclass(frozen=True)
class Deletion:
    path: Path
    offset: int
    """Offset of the deleted character."""
    right: frozenset[int]
    """Lines on which its report is right."""


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def deletions(path: Path, mark: str) -> list[Deletion]:
    text = text_of(path)
    code = re.sub(rf"{STRING_PATTERN}|#[^\n]*", lambda match: " " * len(match[0]), text)
    found: list[Deletion] = []
    opened: list[int] = []
    for match in re.finditer(r"\{|\}|\.\.", code):
        line = text.count("\n", 0, match.start()) + 1
        right = {line}
        if match[0] == "{":
            opened.append(line)
        elif match[0] == "}":
            right |= {line + 1, opened.pop()}
        if match[0] == mark:
            found.append(Deletion(path, match.start(), frozenset(right)))
    return found


def errors(deletion: Deletion, mark: str) -> list[Diagnostic]:
    text = text_of(deletion.path)
    changed = text[: deletion.offset] + text[deletion.offset + 1 :]
    source = Source(changed, deletion.path)
    found = parse(source)[1]
    if not has_errors(found) and mark == "..":
        # `expected(1.9)` has the right shape; only the check of its meaning finds the mistake.
        found = check_source(source).diagnostics
    return [each for each in found if has_errors([each])]


def assert_reported(mark: str, cases: list[Deletion]) -> None:
    assert cases
    wrong: list[str] = []
    several: list[str] = []
    for case in cases:
        found = errors(case, mark)
        lines = [each.span.line for each in found if each.span is not None]
        title = f"{case.path.name}:{max(case.right)}: reported on {lines}"
        if not lines or lines[0] not in case.right:
            wrong.append(title)
        if len(lines) > 1:
            several.append(title)
    assert len(wrong) <= (1 - RIGHT_LINES) * len(cases), wrong
    assert len(several) <= (1 - SINGLE_ERRORS) * len(cases), several


@pytest.mark.parametrize("mark", SAMPLED)
def test_deleted_sign_is_reported_on_its_line(mark: str) -> None:
    every = [case for path in FILES for case in deletions(path, mark)]
    assert_reported(mark, every[:: max(1, len(every) // SAMPLED[mark])])


@pytest.mark.slow
@pytest.mark.parametrize("mark", SAMPLED)
def test_each_deleted_sign_in_all_examples_is_reported_on_its_line(mark: str) -> None:
    # The data files of shared examples are missing, so only their syntax is checked.
    shared = SHARED if mark != ".." else []
    assert_reported(mark, [case for path in FILES + shared for case in deletions(path, mark)])
