"""Placeholders of texts."""

from __future__ import annotations

import pytest

from mechdsl.base.text import Source, Span
from mechdsl.syntax import ast
from mechdsl.syntax.parser import Placeholder, parse_template

from ..parsing import parse


def text_of(quoted: str) -> ast.String:
    tree, problems = parse(Source(f"mech 1\nprompts p {{\n  template {quoted}\n}}\n"))
    assert not problems
    prompts = tree.statements[1]
    assert isinstance(prompts, ast.PromptsDef)
    (template,) = prompts.lines
    assert isinstance(template, ast.Template)
    return template.text


def shown(quoted: str) -> list[object]:
    pieces, problems = parse_template(text_of(quoted))
    assert not problems
    return [p if isinstance(p, str) else (p.name, p.span.text) for p in pieces]


@pytest.mark.parametrize(
    ("quoted", "expected"),
    [
        ('""', []),
        ('"plain"', ["plain"]),
        ('"a {x} b"', ["a ", ("x", "{x}"), " b"]),
        ('"{s2 = s}"', [("s2", "{s2 = s}")]),
        ('"{count - 1}"', [(None, "{count - 1}")]),
        ('"{item.index}"', [(None, "{item.index}")]),
        (
            '"{again = half}{cue = half[1]}"',
            [("again", "{again = half}"), ("cue", "{cue = half[1]}")],
        ),
        ('"{{x}} {{{x}}}"', ["{x} {", ("x", "{x}"), "}"]),
        (r'"a\n\"{x}\"\\"', ['a\n"', ("x", "{x}"), '"\\']),
        (r'"{if a = 1 then \"x{\" else \"y\"}"', [(None, r"{if a = 1 then \"x{\" else \"y\"}")]),
        (r'"{other(subject)}"', [(None, "{other(subject)}")]),
        ('"{ x }"', [("x", "{ x }")]),
    ],
)
def test_template_is_split_into_texts_and_placeholders(quoted: str, expected: list[object]) -> None:
    assert shown(quoted) == expected


def test_quoted_texts_inside_keep_their_value() -> None:
    pieces, _ = parse_template(text_of(r'"{f(\"a b\")}"'))
    (piece,) = pieces
    assert isinstance(piece, Placeholder)
    assert isinstance(piece.expr, ast.Call)
    value = piece.expr.arguments[0].value
    assert isinstance(value, ast.String)
    assert value.value == "a b"


@pytest.mark.parametrize(
    ("quoted", "code", "marked"),
    [
        ('"a {}"', "E0113", "{}"),
        ('"a {x"', "E0113", "{"),
        ('"a x}"', "E0113", "}"),
        ('"a {x y}"', "E0113", "y"),
        ('"a {x:3}"', "E0113", ":"),
        ('"a {x +}"', "E0113", ""),
        ('"a {x # y}"', "E0113", "{x # y}"),
        ('"a {head}"', "E0106", "head"),
        ('"a {path = x}"', "E0106", "path"),
        ('"a {' + "(" * 300 + '}"', "E0113", "{" + "(" * 300 + "}"),
    ],
)
def test_errors_point_into_the_file(quoted: str, code: str, marked: str) -> None:
    text = text_of(quoted)
    _, problems = parse_template(text)
    (problem,) = problems
    assert problem.code == code
    assert problem.span is not None
    assert problem.span.source is text.span.source
    assert problem.span.line == 3
    assert problem.span.text == marked
    assert problem.message


def test_template_reports_all_errors_at_once() -> None:
    pieces, problems = parse_template(text_of('"{a b} {ok} {} }"'))
    assert [p.code for p in problems] == ["E0113"] * 3
    assert [p.name for p in pieces if isinstance(p, Placeholder)] == ["ok"]


def test_template_from_python_has_its_text_as_source() -> None:
    text = ast.String('say "{x}"', span=Span(Source(""), 0, 0))
    pieces, problems = parse_template(text)
    assert not problems
    assert pieces[0] == 'say "'
    assert isinstance(pieces[1], Placeholder)
    assert pieces[1].span.text == "{x}"


def test_template_with_500_placeholders_is_accepted() -> None:
    _, problems = parse_template(text_of('"' + "{x} " * 500 + '"'))
    assert not problems
