"""The formatter keeps the program and its comments, and is idempotent."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdsl.base.text import Source, Span
from mechdsl.syntax import ast
from mechdsl.syntax.formatter import FormatError

from ..parsing import format_file, parse
from .snippets import CHANGES, DATA, TOP, all_snippets, experiment_snippets, wrapped

EXAMPLES = sorted((Path(__file__).parent / "examples").rglob("*.mech"))


def formatted(text: str) -> str:
    tree, problems = parse(Source(text))
    assert not problems, [p.message for p in problems]
    return format_file(tree)


def check(text: str) -> str:
    before, problems = parse(Source(text))
    assert not problems, [p.message for p in problems]
    once = format_file(before)
    after, problems = parse(Source(once))
    assert not problems
    assert after.statements == before.statements
    assert sorted(c.text for c in after.comments) == sorted(c.text for c in before.comments)
    assert format_file(after) == once
    return once


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_canonical(path: Path) -> None:
    text = path.read_text("utf-8")
    if path.stem == "steering":
        # Extra spaces there align two blocks of one line.
        text = text.replace("few  {", "few {").replace('"  template', '" template')
    assert check(text) == text


@pytest.mark.parametrize(("kind", "text"), all_snippets())
def test_each_construct_is_formatted_idempotently(kind: str, text: str) -> None:
    check(wrapped(kind, text))


def test_formatter_normalises_layout_and_comments() -> None:
    messy = """# head
mech 1
model  a=zoo( "x" )
model b = zoo("y") # b
prompts p { # the prompts

  x in [ 1,2 , ]  # values


  # about the template
  template "a {x}"
  corrupt c { x = x - 1 }
  # last
}
experiment e
{ model a  from clean
    into c # two lines
  for l in 0..3 { patch resid_post layer l at token 0, token 3
  }
}
# end
"""
    assert (
        check(messy)
        == """# head
mech 1

model a = zoo("x")
model b = zoo("y")  # b

prompts p {  # the prompts
  x in [1, 2]  # values

  # about the template
  template "a {x}"
  corrupt c { x = x - 1 }
  # last
}

experiment e {
  model a
  from clean into c  # two lines
  for l in 0..3 {
    patch resid_post layer l at token 0, 3
  }
}

# end
"""
    )


def test_comments_between_words_move_before_their_statement() -> None:
    text = """mech 1

experiment e {
  measure logit(answer)  # first
    # second
    - logit(wrong) as raw  # third
}
"""
    assert (
        check(text)
        == """mech 1

experiment e {
  # first
  # second
  measure logit(answer) - logit(wrong) as raw  # third
}
"""
    )


def test_long_lists_are_split_over_lines() -> None:
    words = [f'"word number {i}"' for i in range(8)]
    text = "mech 1\nprompts p { x in [" + ", ".join(words) + "] }\n"
    expected = "".join(f"    {word},\n" for word in words)
    assert check(text) == f"mech 1\n\nprompts p {{\n  x in [\n{expected}  ]\n}}\n"


def test_long_circuits_are_split_over_lines() -> None:
    edges = [f"L{n}H{n} -> L{n + 1}H{n}.q at last token" for n in range(4)]
    short = "circuit c = L0H1 -> L1H0.q, L0H1 -> logits\n"
    text = f"mech 1\n\n{short}circuit d = {', '.join(edges)}\n"
    broken = "circuit d =\n" + ",\n".join(f"  {edge}" for edge in edges) + "\n"
    assert check(text) == f"mech 1\n\n{short}\n{broken}"
    assert check(check(text)) == check(text)


def test_formatter_removes_redundant_brackets() -> None:
    assert check("mech 1\nmetric m = (a) - ((b - c)) * (d)\n").endswith("m = a - (b - c) * d\n")
    assert check("mech 1\nmetric m = -(a + b)\n").endswith("m = -(a + b)\n")
    assert check("mech 1\nmetric m = (a > b)\n").endswith("m = (a > b)\n")


def test_file_of_comments_is_formatted() -> None:
    tree, _ = parse(Source("# a\n\n# b\n"))
    assert format_file(tree) == "# a\n\n# b\n"


def test_tree_without_a_textual_form_is_rejected() -> None:
    nowhere = Span(Source(""), 0, 0)
    version = ast.Version(1, span=nowhere)
    param = ast.Param(ast.Name("x", span=nowhere), ast.Number(-1, span=nowhere), span=nowhere)
    with pytest.raises(FormatError):
        format_file(ast.File((version, param), span=nowhere))


def test_tree_without_spans_is_formatted() -> None:
    nowhere = Span(Source(""), 0, 0)
    from dataclasses import fields, replace
    from typing import Any

    def bare(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(bare, value))
        if not isinstance(value, ast.Node):
            return value
        parts = {f.name: bare(getattr(value, f.name)) for f in fields(value) if f.name != "span"}
        return replace(value, **parts, span=nowhere)

    for path in EXAMPLES:
        tree, _ = parse(Source(path.read_text("utf-8")))
        text = format_file(bare(replace(tree, comments=())))
        assert parse(Source(text))[0].statements == tree.statements


# --- random programs --------------------------------------------------------------------------

SPACES = st.sampled_from([" ", "  ", "\n", "\n\n\n", "\t", " \n  "])
COMMENTS = st.sampled_from(["", "", "", "# note\n", " # behind\n", "\n\n# own\n\n", "\n#\n"])


@st.composite
def separated(draw: st.DrawFn, texts: list[str]) -> str:
    """Snippets with comments and white space between them."""
    parts = [draw(COMMENTS)]
    for text in draw(st.lists(st.sampled_from(texts), max_size=6)):
        words = text.split(" ") if '"' not in text else [text]
        for word in words:
            parts += [word, draw(SPACES) if draw(st.integers(0, 5)) == 0 else " "]
            if draw(st.integers(0, 25)) == 0:
                parts.append("# inside\n")
        parts += [draw(SPACES), draw(COMMENTS)]
    return "".join(parts)


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Whole files in any layout."""
    parts = [draw(COMMENTS), "mech 1", draw(SPACES), draw(COMMENTS), draw(SPACES)]
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["top", "data", "corrupt", "experiment", "for"]))
        if kind == "top":
            parts.append(draw(separated(TOP)))
        elif kind == "data":
            parts += ["prompts p {", draw(separated(DATA)), "}"]
        elif kind == "corrupt":
            parts += ["prompts p {", draw(separated(DATA)), "corrupt c {"]
            parts += [draw(separated(CHANGES)), "}", draw(COMMENTS), "}"]
        elif kind == "experiment":
            parts += ["experiment e {", draw(separated(experiment_snippets())), "}"]
        else:
            parts += ["experiment e", draw(SPACES), "{ for l in 0..3", draw(COMMENTS), "{"]
            parts += [draw(separated(experiment_snippets())), "}", draw(COMMENTS), "}"]
        parts += [draw(COMMENTS), draw(SPACES)]
    return "".join(parts)


@settings(max_examples=50, deadline=None)
@given(programs())
def test_programs_in_any_layout_are_formatted_idempotently(text: str) -> None:
    check(text)


LEAVES = st.sampled_from(["a", "1", "2.5", "50%", '"t"', "L9H9.q", "answer of f", "x.y", "f(a)"])
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda e: f"-{e}"),
        st.tuples(inner, inner).map(lambda t: f"[{t[0]}, {t[1]}]"),
        st.tuples(inner, inner, inner).map(lambda t: f"(if {t[0]} then {t[1]} else {t[2]})"),
        st.tuples(inner, st.sampled_from(["=", "!=", "<", ">=", "in"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        inner.map(lambda e: f"(not {e})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} near {t[1]} within {t[2]})"),
        inner.map(lambda e: f"f(x: {e}, {e}..3)"),
        inner.map(lambda e: f"xs[{e}]"),
        inner.map(lambda e: f"first token of ({e})").map(lambda e: f"g({e})"),
    ),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(EXPRESSIONS)
def test_any_expression_is_formatted_idempotently(text: str) -> None:
    check(f"mech 1\nmetric m = {text}\n")


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_quoted_text_round_trips(value: str) -> None:
    nowhere = Span(Source(""), 0, 0)
    use = ast.Use(ast.String(value, span=nowhere), span=nowhere)
    text = format_file(ast.File((ast.Version(1, span=nowhere), use), span=nowhere))
    again = parse(Source(text))[0].statements[1]
    assert isinstance(again, ast.Use)
    assert again.path.value == value


def test_comment_inside_each_step_is_kept() -> None:
    check("mech 1 experiment e { observe norm resid_post layer * at each # a\n step as lengths }")
