"""Parsing invalid text: all errors at once, recovery, limits. Messages: `tests/messages`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mechdsl.base import limits
from mechdsl.base.records import close_names, closest_name, edit_distance
from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse_setting, read_source
from mechdsl.syntax.mistakes.hints import HINTS
from mechdsl.syntax.mistakes.recovery import SLIPS, replace_slips
from tests.messages.cases import all_cases, program

from ..parsing import parse
from .snippets import all_snippets, wrapped


def codes(text: str) -> list[str]:
    return [problem.code for problem in parse(Source(text))[1]]


def test_parser_reports_all_errors_and_keeps_valid_statements() -> None:
    source = Source(program("many_at_once", "Spelling, signs and quotes through a whole file"))
    tree, problems = parse(source)
    lines = {p.span.line for p in problems if p.span}
    marked = {
        number
        for number, line in enumerate(source.text.splitlines(), 1)
        if line.rstrip().endswith("# wrong")
    }
    assert lines == marked
    assert [type(s).__name__ for s in tree.statements] == [
        "Version",
        "ModelDef",
        "PromptsDef",
        "ExperimentDef",
        "Seed",
    ]
    prompts, experiment = tree.statements[2:4]
    assert isinstance(prompts, ast.PromptsDef)
    assert [type(line).__name__ for line in prompts.lines] == [
        "DomainDef",
        "Template",
        "Text",
        "Corrupt",
    ]
    assert isinstance(experiment, ast.ExperimentDef)
    kinds = [type(s).__name__ for s in experiment.statements]
    assert kinds == ["UseModel", "UsePrompts", "For", "Measure", "Report", "Expect"]
    loop = experiment.statements[2]
    assert isinstance(loop, ast.For)
    assert len(loop.body) == 2


@pytest.mark.parametrize("word", ["expriment", "experiement", "experimnt"])
def test_spans_after_a_misspelt_keyword_are_exact(word: str) -> None:
    source = Source(f"mech 1\n{word} name {{\n  modle toy\n  mesuure correct as raw\n}}\nseed 3")
    tree, problems = parse(source)
    assert [p.span.text for p in problems if p.span] == [word, "modle", "mesuure"]
    experiment = tree.statements[1]
    assert isinstance(experiment, ast.ExperimentDef)
    assert experiment.span.text.startswith(word)
    assert experiment.name.span.text == "name"
    assert [each.span.text for each in experiment.statements] == [
        "modle toy",
        "mesuure correct as raw",
    ]
    assert tree.lost == ()


def test_lost_statements_record_their_names() -> None:
    tree, problems = parse(
        Source(
            "mech 1\nprompts p {\n  a, b = = 3\n  span s t\n  template {x}\n  split half\n}\n"
            "experiment e {\n  for l in {\n    keep x = = 3\n  }\n}\ngroup g = L0H0,, L1H1"
        )
    )
    assert len(problems) == 7
    assert {name for each in tree.lost for name in each.names} == {
        *("a", "b", "s", "train", "test", "half", "l", "g"),
    }


@pytest.mark.parametrize(("kind", "text"), all_snippets()[::3])
def test_errors_do_not_affect_neighbouring_statements(kind: str, text: str) -> None:
    # A statement on separate lines survives errors before and after it.
    good, problems = parse(Source(wrapped(kind, text)))
    assert not problems
    tree, problems = parse(Source(wrapped(kind, f"jumble thing )\n{text}\njumble 3 thing")))
    assert problems
    assert len(tree.statements) == len(good.statements)
    assert tree.statements == good.statements


def test_errors_are_sorted_without_duplicates() -> None:
    _, problems = parse(Source("mech 1\nexperiment e {\n pach x\n}\nprams x\nexperiment f {\n"))
    starts = [p.span.start for p in problems if p.span]
    assert starts == sorted(starts)
    assert len(problems) == len(set(problems)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "mech 1\nexperiment e " + "{" * 10_000,
        "mech 1\nparam x = " + "[" * 10_000,
        "mech 1\nparam x = " + "(" * 201 + "1" + ")" * 201,
        "mech 1\n" + "param a = 3\n" * 420_000,
        "mech 1\nparam x = " + "1+" * 5_000 + "1",
        "mech 1\nparam x = " + "-" * 5_000 + "1",
        "mech 1\nparam x = " + "if a then b else " * 2_000 + "1",
        "mech 1\nprompts p { where " + "not " * 4_000 + "a }",
        "mech 1\nprompts p { where a" + " and a" * 4_000 + " }",
        "mech 1\nexperiment e { patch L0 at " + "tokens except " * 600 + "last token }",
        "mech 1\nparam x = 1\n" + "# nothing\n" * 20_000,
        "mech 1\n" + "x, " * 5_000,
        "mech 1\nparam " + "x" * 201 + " = 1",
        'mech 1\nprompts p { template "' + "{x} " * 501 + '" }',
    ],
)
def test_oversized_input_is_rejected_quickly(text: str) -> None:
    # CPU time, so that other work on the machine makes no difference.
    started = time.process_time()
    assert codes(text) == ["E0109"]
    assert time.process_time() - started < 2


def test_input_below_the_limits_is_accepted() -> None:
    assert codes("mech 1\nparam x = " + "[" * 99 + "1" + "]" * 99) == []
    assert codes("mech 1\nparam x = " + "1+" * 150 + "1") == []


def test_number_of_errors_is_limited() -> None:
    found = codes("mech 1\n" + ";" * 5_000)
    assert len(found) == limits.SYNTAX_ERRORS + 1
    assert found[-1] == "E0109"


def test_many_errors_are_reported_quickly() -> None:
    started = time.process_time()
    found = codes("mech 1\nexperiment e {\n" + "pach layer 3 at last token\n" * 500 + "}")
    assert found == ["E0102"] * 500
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "  # a\n\n# b"])
def test_empty_file_is_an_error(text: str) -> None:
    tree, problems = parse(Source(text))
    assert [p.code for p in problems] == ["E0111"]
    assert len(tree.comments) == text.count("#")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seed 0", ["E0107"]),
        ("mech 2\nseed 0", ["E0107"]),
        ("mech\nseed 0", ["E0107"]),
        ("mech 1.0\nseed 0", ["E0107"]),
        ("mech v1\nseed 0", ["E0107"]),
        ("mech 1\nmech 1\nseed 0", ["E0107"]),
        ("# a comment\nmech 1\nseed 0", []),
        ("mech 1 seed 0", []),
    ],
)
def test_version_line_is_required_once(text: str, found: list[str]) -> None:
    tree, problems = parse(Source(text))
    assert [p.code for p in problems] == found
    assert isinstance(tree.statements[-1], ast.Seed)


def test_reserved_names_are_rejected() -> None:
    assert codes('mech 1\nprompts p { head in 1..3 template "{head}" }') == ["E0106"]
    assert codes("mech 1\nprompts p { x = path + 1 }") == ["E0106"]
    assert codes('mech 1\nprompts p { rows "x.csv" rename { h = head } }') == []
    assert codes('mech 1\nprompts p { text in ["a"] group = text }') == []
    assert codes("mech 1\nparam layer = 3") == ["E0106"]


def test_too_large_numbers_are_rejected() -> None:
    assert codes("mech 1\nseed " + "9" * 400) == ["E0114"]
    assert codes("mech 1\nparam x = 1e999") == ["E0114"]
    assert codes("mech 1\nexperiment e { patch L" + "9" * 400 + "H1 at last token }") == ["E0109"]


def test_every_hint_and_slip_has_a_case() -> None:
    texts = "\n".join(case.said.content for case in all_cases() if case.said is not None)
    for known in HINTS:
        fixed = known.text.split("{")[0]
        assert f"= help: {fixed}" in texts, known
    for slip in SLIPS:
        assert f"= help: {slip.hint}" in texts, slip


def test_replaced_slips_keep_the_text_length() -> None:
    text = "mech 1; “a” == 50 % “ 'b' x := 3 && é 10–20 a≥b \"open\n\"also \\\n/* c */ // d\n…→"
    clean, problems = replace_slips(Source(text))
    assert len(clean) == len(text)
    assert len(problems) > 12


def test_edit_distance_finds_the_closest_name() -> None:
    assert edit_distance("exepct", "expect") == 1
    assert edit_distance("pach", "patch") == 1
    assert edit_distance("", "abc") == 3
    assert closest_name("experimnt", {"experiment", "expect"}) == "experiment"
    assert closest_name("Patch", {"patch"}) == "patch"
    assert closest_name("xyz", {"patch"}) is None
    assert closest_name("fruti", ["Fruit", "froth"]) == "Fruit"
    assert closest_name("ca", {"cat"}) == "cat"
    assert closest_name("ld", {"dl", "cat"}) == "dl"
    assert closest_name("zz", {"z"}) == "z"
    assert closest_name("ca", {"cat", "can"}) is None
    assert closest_name("ca", {"cx", "c"}) == "c"
    assert close_names("ca", {"cat", "dog", "at", "a"}) == ["a", "cat"]


def test_parse_setting_accepts_only_single_values() -> None:
    assert parse_setting("12") == ast.Number(12, span=ast.Name("x", span=None).span)  # type: ignore[arg-type]
    assert isinstance(parse_setting("[1, 2]"), ast.ListLiteral)
    assert isinstance(parse_setting("resid_post"), ast.Name)
    assert isinstance(parse_setting('"text"'), ast.String)
    assert isinstance(parse_setting("-3"), ast.Negative)
    for wrong in ("", "[1", "x = 3", "3 4", "head", "(" * 1000, "a\0", "…"):
        assert parse_setting(wrong) is None


def test_read_source_normalises_text_and_rejects_unreadable_files(tmp_path: Path) -> None:
    good = tmp_path / "good.mech"
    good.write_bytes(b"\xef\xbb\xbfmech 1\r\nseed 0\r\n")
    source, problems = read_source(good)
    assert source is not None
    assert (source.text, problems) == ("mech 1\nseed 0\n", [])
    for name, data, code in [
        ("nul.mech", b"mech 1\0", "E0110"),
        ("latin.mech", "mech 1 # ä".encode("latin-1"), "E0110"),
    ]:
        (tmp_path / name).write_bytes(data)
        source, problems = read_source(tmp_path / name)
        assert source is None
        assert [p.code for p in problems] == [code]
    for path, reason in [(tmp_path / "none.mech", "no such file"), (tmp_path, "it is a folder")]:
        source, problems = read_source(path)
        assert source is None
        assert problems[0].code == "E0112"
        assert reason in problems[0].message


@pytest.mark.parametrize("seed", range(8))
def test_damaged_programs_never_raise(seed: int) -> None:
    # Random damage to valid programs gives a tree and messages, never an exception.
    import random

    draw = random.Random(seed)
    examples = sorted((Path(__file__).parent / "examples").rglob("*.mech"))
    for _ in range(25):
        text = draw.choice(examples).read_text("utf-8")
        for _ in range(draw.randint(1, 4)):
            a = draw.randrange(len(text))
            b = min(len(text), a + draw.randint(0, 12))
            junk = draw.choice(["", "}", "{", "(", '"', "x", "3", ";", "at", "=", "é", "\n", ","])
            text = text[:a] + junk + text[b:]
        tree, problems = parse(Source(text))
        assert isinstance(tree, ast.File)
        for problem in problems:
            assert problem.message
        render_full(problems)
