"""Likely mistakes of newcomers: each is reported on its line, and its fix gives the meant program.

`tests/data/mistakes.txt` has a base file and, for each mistake, a replaced text (`-`), the mistake
(`+`), a definition that both need (`&`), and its line, 0 if it is valid. `=` is what was meant,
which the fix must give when it replaces the marked text; several are equally right. A fix that
isn't a replacement matches the regular expression after `fix`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.command_line import find_page
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full

from ..parsing import parse

TABLE = Path(__file__).parent.parent / "data" / "mistakes.txt"


@dataclass(frozen=True)
class Slip:
    name: str
    old: str
    new: str
    definition: str
    line: int
    meant: tuple[str, ...]
    fix: str

    def program(self, text: str) -> str:
        base = table()[0]
        assert self.old in base
        program = base.replace(self.old, text, 1)
        if not self.definition:
            return program
        return program.replace("experiment heads", f"{self.definition}\n\nexperiment heads", 1)


@cache
def table() -> tuple[str, tuple[Slip, ...]]:
    """The base file and its mistakes."""
    base, rest = TABLE.read_text(encoding="utf-8").split("\n---\n", 1)
    rows: list[Slip] = []
    for block in rest.strip().split("\n\n"):
        name, *lines = block.split("\n")
        texts = [(line[0], ast.literal_eval(line[2:])) for line in lines if line[0] in "-+&="]
        last = dict(texts)
        meant = tuple(text for sign, text in texts if sign == "=")
        line = next(int(each[5:]) for each in lines if each.startswith("line "))
        fix = next((each[4:] for each in lines if each.startswith("fix ")), "")
        rows.append(Slip(name, last["-"], last["+"], last.get("&", ""), line, meant, fix))
    return base + "\n", tuple(rows)


def errors(program: str) -> list[Diagnostic]:
    return [d for d in check_source(Source(program)).diagnostics if d.severity == "error"]


def on_line(problems: list[Diagnostic], line: int) -> list[Diagnostic]:
    return [each for each in problems if each.span is not None and each.span.line == line]


def tree(program: str) -> Any:
    """The syntax tree without spans; None if the program is invalid."""
    file, problems = parse(Source(program))
    return None if problems else plain(file)


def plain(node: Any) -> Any:
    if dataclasses.is_dataclass(node):
        names = [each.name for each in dataclasses.fields(node) if each.name != "span"]
        return type(node).__name__, *(plain(getattr(node, name)) for name in names)
    return [plain(each) for each in node] if isinstance(node, (tuple, list)) else node


def applied(program: str, problem: Diagnostic) -> str:
    """The program with the marked text replaced by the first text that the help proposes."""
    assert problem.span is not None
    quoted = re.search(r"`([^`]*)`", problem.help_text)
    text = quoted[1] if quoted and not problem.rewrite_help else problem.rewrite
    return program[: problem.span.start] + text + program[problem.span.end :]


def test_base_file_has_no_mistake() -> None:
    assert not check_source(Source(table()[0])).diagnostics


@pytest.mark.parametrize("slip", table()[1], ids=lambda slip: slip.name)
def test_mistake_is_reported_on_its_line_with_the_right_fix(slip: Slip) -> None:
    program = slip.program(slip.new)
    problems = errors(program)
    if not slip.line:
        assert not problems
        return
    first, *_ = on_line(problems, slip.line)
    assert problems[0] is first or not slip.meant
    if not slip.meant:
        assert re.search(slip.fix, render_full(problems, width=400))
        return
    meant = [slip.program(text) for text in slip.meant]
    trees = [tree(each) for each in meant]
    assert None not in trees
    assert tree(applied(program, first)) in trees
    for each in meant:
        assert not [d.message for d in on_line(errors(each), slip.line)]


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
