"""The pages of E01xx say what the tool says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mechdsl.diagnostics import CODES, Diagnostic
from mechdsl.diagnostics.render import render_one
from mechdsl.source import Source
from mechdsl.syntax import ast
from mechdsl.syntax.parse import parse
from mechdsl.syntax.template import parse_template
from mechdsl.syntax.walk import walk

PAGES = sorted((Path(__file__).parents[2] / "docs" / "errors").glob("E01*.md"))
FENCE = re.compile(r"(\w+:)\n\n```mech\n(.*?)```\n(?:\n```text\n(.*?)\n```)?", re.DOTALL)


def problems(text: str) -> list[Diagnostic]:
    tree, found = parse(Source(text, Path("$FILE")))
    if not found:
        for node in walk(tree):
            if isinstance(node, ast.Template):
                found += parse_template(node.text)[1]
    return found


def test_a_page_for_each_code() -> None:
    codes = {code for code in CODES if code.startswith("E01")}
    assert {page.stem for page in PAGES} == codes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.startswith(f"# {page.stem}: ")
    fences = {label: (program, error) for label, program, error in FENCE.findall(text)}
    if page.stem in ("E0108", "E0110", "E0112"):
        # Not found by parsing a text; tested where they are raised.
        return
    program, error = fences["Fails:"]
    assert [render_one(problem) for problem in problems(program)] == [error]
    assert problems(fences["Corrected:"][0]) == []
