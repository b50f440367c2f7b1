"""Wording of messages, tables and pages: lists of names, counts, banned phrases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mechdsl.base.text import Source, Span, name_list
from mechdsl.checks.expectations import check_cell_units
from mechdsl.checks.file_check import check_source
from mechdsl.cli.entry import app
from mechdsl.program.spec import Statistics

ROOT = Path(__file__).parent.parent
PRINTED = {".md", ".txt", ".err"}
ONE = re.compile(
    r"(?<![\w.,])(?<!layer )(?<!col )1 "
    r"(?:cell|draw|experiment|head|item|layer|model|position|prompt|row|token)s\b"
)
LONG = "a" * 150
TRANSLATED = re.compile(
    r"\b(hangs? on|behind|beside|is said|are said|told apart|made anew|taken up again|so often)\b"
)
CODE = re.compile(r"^(```+|~~~+).*?^\1|(`+)(?!`).+?\2", re.M | re.S)


def test_name_list_is_truncated() -> None:
    assert name_list([]) == ""
    assert name_list(["a", "b"]) == "`a`, `b`"
    assert name_list(["a" * 40, "a" * 41]) == f"`{'a' * 40}`, `{'a' * 39}…`"
    assert name_list(str(n) for n in range(10**9)).endswith("`11` …")


def test_help_text_truncates_long_names() -> None:
    names = [f"{LONG}{n}" for n in range(20)]
    values = "".join(f"  {name} in 1..3\n" for name in names)
    text = (
        'mech 1\n\nmodel m = zoo("counting")\n\nprompts p {\n'
        f'{values}  template "{{nothing}}"\n  answer " 1"\n}}\n\n'
        "experiment e {\n  prompts p\n  measure prob(answer) as raw\n  report table by other\n}\n"
    )
    found = check_source(Source(text)).diagnostics
    assert {"E0501", "E0607"} <= {d.code for d in found}
    assert not [d.code for d in found if d.severity == "error" and LONG in d.help_text]


@pytest.mark.parametrize(
    ("units", "by", "message", "label"),
    [
        ([1], None, "with 1 prompt, no cell can be significant after correction", "at least 5"),
        (
            [5],
            None,
            ("with 5 prompts, no cell can be significant after correction"),
            "(Holm, 1 cell)",
        ),
        (
            [6, 6],
            None,
            ("with 6 prompts, no cell can be significant after correction"),
            "(Holm, 2 cells)",
        ),
        (
            [1],
            "count",
            ("with 1 value of count, no cell can be significant after correction"),
            "at least 5",
        ),
        (
            [5, 5],
            "count",
            ("with 5 values of count, no cell can be significant after correction"),
            "2 cells)",
        ),
        (
            [5, 30],
            None,
            ("1 of 2 cells have only 5 prompts and can't be significant after correction"),
            "2 cells",
        ),
        ([1, 5, 30], None, "2 of 3 cells have only 1 to 5 prompts and can't", "3 cells"),
    ],
)
def test_count_of_one_is_in_the_singular(
    units: list[int], by: str | None, message: str, label: str
) -> None:
    (found,) = check_cell_units(units, Statistics(by=by, span=Span(Source(""), 0, 0)), None)
    assert found.message.startswith(message)
    assert label in found.label_text


def test_pages_have_no_plural_after_1() -> None:
    """Golden files contain the printed texts; a number after a name (`layer 1 heads`) isn't a
    count."""
    pages = [p for f in ("docs", "tests") for p in (ROOT / f).rglob("*") if p.suffix in PRINTED]
    assert len(pages) > 200
    wrong = [
        f"{page.relative_to(ROOT)}: {found[0]}"
        for page in pages
        for found in ONE.finditer(page.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_messages_have_no_translated_phrase() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / "mechdsl").rglob("*.py"))
        if TRANSLATED.search(code := path.read_text(encoding="utf-8"))
        for line, text in literals(code)
        if TRANSLATED.search(text)
    ]
    assert found == []


def literals(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and value of strings, without docstrings and identifiers such as keys."""
    tree = ast.parse(text)
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        if node not in alone and not node.value.strip().isidentifier():
            yield node.lineno, node.value


def test_pages_have_no_translated_phrase() -> None:
    package = [p for p in (ROOT / "mechdsl").rglob("*") if p.suffix in {".md", ".txt", ".j2"}]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *package]
    assert len(pages) > 200
    found = [
        f"{page.relative_to(ROOT)}: {match[0]}"
        for page in pages
        for match in TRANSLATED.finditer(CODE.sub("", page.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize("words", [(), *((name,) for name in sorted(app.commands))], ids=" ".join)
def test_help_has_no_translated_phrase(words: tuple[str, ...]) -> None:
    command = app.commands[words[0]] if words else app
    nested = command.commands if isinstance(command, click.Group) and words else ()
    for further in [(), *((name,) for name in nested)]:
        done = CliRunner().invoke(app, [*words, *further, "--help"])
        assert done.exit_code == 0
        assert "Usage" in done.output
        assert not TRANSLATED.findall(done.output)
