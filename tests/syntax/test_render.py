"""Rendered diagnostics."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from mechdsl.base.text import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import (
    diagnostic_facts,
    needs_ascii,
    render_full,
    render_github,
    render_json,
    render_sarif,
    render_summary,
)
from mechdsl.diagnostics.syntax import MisspeltWord, UnexpectedToken, Unreadable

TEXT = "mech 1\n\nexperiment e {\n  pach layer 0..2 head 14 at last-item token\n}\n"


def wrong(text: str, marked: str, path: str | None = "a.mech") -> Diagnostic:
    source = Source(text, Path(path) if path else None)
    start = text.index(marked)
    span = Span(source, start, start + len(marked))
    return MisspeltWord(word=marked[:5], meant="patch", span=span)


def alone(diagnostic: Diagnostic, width: int = 100) -> str:
    """One diagnostic without the closing count."""
    return render_full([diagnostic], width=width).removesuffix("\n\n1 error\n")


def test_full_format_has_code_position_and_help() -> None:
    assert render_full([wrong(TEXT, "pach")]) == (
        "error[E0102]: `pach` is not a keyword\n ┌─ a.mech:4:3\n4 │   pach layer 0..2 head 14 "
        "at last-item token\n  │   ^^^^ unknown keyword\n  = help: did you mean `patch`?\n\n1 "
        "error\n"
    )


def test_two_digit_line_numbers_shift_the_frame() -> None:
    text = "\n" * 17 + "  pach"
    lines = alone(wrong(text, "pach")).splitlines()
    assert lines[1:] == [
        "  ┌─ a.mech:18:3",
        "18 │   pach",
        "   │   ^^^^ unknown keyword",
        "   = help: did you mean `patch`?",
    ]


def test_diagnostic_without_a_position_has_no_excerpt() -> None:
    text = render_full([Unreadable(path="a.mech", reason="no such file")])
    assert text.splitlines()[:2] == [
        "error[E0112]: cannot read `a.mech`: no such file",
        " = help: check the path; it is relative to the working directory",
    ]


def test_no_diagnostics_render_as_empty() -> None:
    assert render_full([]) == ""
    assert json.loads(render_json([])) == []
    assert render_github([]) == ""
    assert json.loads(render_sarif([]))["runs"][0]["results"] == []


def test_diagnostics_are_sorted_and_counted() -> None:
    second, first = wrong(TEXT, "14"), wrong(TEXT, "pach")
    other = wrong(TEXT, "pach", "b.mech")
    text = render_full([other, second, first])
    assert [line for line in text.splitlines() if "┌─" in line] == [
        " ┌─ a.mech:4:3",
        " ┌─ a.mech:4:24",
        " ┌─ b.mech:4:3",
    ]
    assert text.endswith("\n3 errors\n")
    assert render_summary([]) == ""


@pytest.mark.parametrize(
    ("text", "marked", "line", "carets"),
    [
        ("\tpach", "pach", "1 │     pach", "  │     ^^^^ unknown keyword"),
        ("pa\tch x", "pa\tch", "1 │ pa    ch x", "  │ ^^^^^^^^ unknown keyword"),
        ('"数量" pach', "pach", '1 │ "数量" pach', "  │        ^^^^ unknown keyword"),
        ("é pach", "pach", "1 │ é pach", "  │   ^^^^ unknown keyword"),
        ("e\u0301 pach", "pach", "1 │ e\u0301 pach", "  │   ^^^^ unknown keyword"),
        ("\x1b[31m pach", "pach", "1 │ \\x1b[31m pach", "  │          ^^^^ unknown keyword"),
        ("pach", "", "1 │ pach", "  │ ^ unknown keyword"),
    ],
)
def test_carets_align_with_tabs_and_wide_characters(
    text: str, marked: str, line: str, carets: str
) -> None:
    assert alone(wrong(text, marked)).splitlines()[2:4] == [line, carets]


def test_position_at_the_end_of_the_text_is_marked() -> None:
    source = Source("mech 1\n")
    for offset in (6, 7):
        problem = UnexpectedToken(found="x", expected="y", span=Span(source, offset, offset))
        assert "^ expected y" in alone(problem)


def test_span_of_several_lines_shows_its_ends() -> None:
    text = "a {\n  b\n  c\n} d"
    assert alone(wrong(text, "a {\n  b\n  c\n}")).splitlines()[1:-1] == [
        " ┌─ a.mech:1:1",
        "1 │ a {",
        "  │ ^^^",
        "  │ …",
        "4 │ } d",
        "  │ ^ unknown keyword",
    ]
    assert "│ …" not in alone(wrong(text, "b\n  c"))


def test_long_lines_are_truncated_around_the_span() -> None:
    text = "x" * 500 + " pach " + "y" * 500
    lines = render_full([wrong(text, "pach")], width=80).splitlines()
    shown, carets = lines[2], lines[3]
    assert len(shown) <= 80
    assert shown.count("…") == 2
    assert shown[carets.index("^") :].startswith("pach")
    whole = alone(wrong("z" * 3_000_000, "z" * 3_000_000), width=80)
    assert max(map(len, whole.splitlines()[2:3])) <= 80


def test_colours_appear_only_on_request() -> None:
    plain = render_full([wrong(TEXT, "pach")])
    coloured = render_full([wrong(TEXT, "pach")], color=True)
    assert "\x1b" not in plain
    assert coloured.startswith("\x1b[1;31merror[E0102]\x1b[0m")
    import re

    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_ascii_output_replaces_other_characters() -> None:
    text = render_full([wrong("“ é pach", "pach")], ascii=True)
    assert text.isascii()
    assert "--> a.mech:1:5" in text
    assert needs_ascii(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert needs_ascii(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert not needs_ascii(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_json_format_has_every_field() -> None:
    (found,) = json.loads(render_json([wrong(TEXT, "pach")]))
    assert found == {
        "code": "E0102",
        "severity": "error",
        "message": "`pach` is not a keyword",
        "label": "unknown keyword",
        "help": "did you mean `patch`?",
        "file": "a.mech",
        "line": 4,
        "column": 3,
        "end_line": 4,
        "end_column": 7,
    }
    assert diagnostic_facts(Unreadable(path="x", reason="y"))["line"] is None
    assert diagnostic_facts(wrong(TEXT, "pach", None))["file"] == "<text>"


def test_github_format_escapes_properties() -> None:
    text = render_github([wrong(TEXT, "pach", "a,b:c%.mech"), Unreadable(path="x", reason="100%")])
    assert text.splitlines() == [
        "::error title=E0112::cannot read `x`: 100%25%0Acheck the path; it is relative to the "
        "working directory",
        "::error file=a%2Cb%3Ac%25.mech,line=4,col=3,endLine=4,endColumn=7,title=E0102::`pach` "
        "is not a keyword%0Aunknown keyword%0Adid you mean `patch`?",
    ]


def test_sarif_format_has_rules_and_locations() -> None:
    log = json.loads(
        render_sarif([wrong(TEXT, "pach", "my file.mech"), Unreadable(path="x", reason="y")])
    )
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["E0102", "E0112"]
    nowhere, placed = run["results"]
    assert "locations" not in nowhere
    assert run["tool"]["driver"]["rules"][placed["ruleIndex"]]["id"] == "E0102"
    place = placed["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "my%20file.mech"
    assert place["region"] == {"startLine": 4, "startColumn": 3, "endLine": 4, "endColumn": 7}
