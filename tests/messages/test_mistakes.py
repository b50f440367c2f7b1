"""Likely mistakes of newcomers: each is reported on its line, and almost all with the right fix."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.command_line import find_page
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full

TABLE = Path(__file__).parent.parent / "data" / "mistakes.txt"
RIGHT_FIXES = 0.9


@dataclass(frozen=True)
class Slip:
    name: str
    old: str
    new: str
    line: int
    """Line of the report; 0 if the replacement is valid."""
    fix: str
    """Regular expression of the fix."""


@cache
def table() -> tuple[str, tuple[Slip, ...]]:
    """The base file and its mistakes."""
    base, rest = TABLE.read_text(encoding="utf-8").split("\n---\n", 1)
    rows: list[Slip] = []
    for block in rest.strip().split("\n\n"):
        name, old, new, line, fix = block.split("\n")
        rows.append(
            Slip(name, ast.literal_eval(old[2:]), ast.literal_eval(new[2:]), int(line[5:]), fix[4:])
        )
    return base + "\n", tuple(rows)


@cache
def report(slip: Slip) -> tuple[Diagnostic, ...]:
    base, _ = table()
    assert slip.old in base
    return tuple(check_source(Source(base.replace(slip.old, slip.new, 1))).diagnostics)


def has_fix(slip: Slip) -> bool:
    return re.search(slip.fix, render_full(report(slip), width=400)) is not None


def test_base_file_has_no_mistake() -> None:
    base, _ = table()
    assert not check_source(Source(base)).diagnostics


@pytest.mark.parametrize("slip", table()[1], ids=lambda slip: slip.name)
def test_mistake_is_reported_on_its_line(slip: Slip) -> None:
    lines = [each.span.line for each in report(slip) if each.span is not None]
    if slip.line:
        assert slip.line in lines
    else:
        assert not lines


def test_mistakes_have_the_right_fix() -> None:
    rows = [slip for slip in table()[1] if slip.line]
    missing = [slip.name for slip in rows if not has_fix(slip)]
    assert len(missing) <= (1 - RIGHT_FIXES) * len(rows), missing


@pytest.mark.parametrize("word", ["patch", "recovery", "z", "top", "delta", "heatmap", "ablate"])
def test_explain_word_prints_its_rows(word: str) -> None:
    text, problems = find_page(word)
    assert not problems
    assert f"# `{word}`" in text
    assert re.search(rf"^`.*\b{word}\b.*`\n    \S", text, re.MULTILINE)


@pytest.mark.parametrize(("word", "fix"), [("ptach", "`patch`"), ("hook_z", "`z layer *`")])
def test_explain_unknown_word_suggests_one(word: str, fix: str) -> None:
    text, problems = find_page(word)
    assert not text
    assert fix in render_full(problems)
