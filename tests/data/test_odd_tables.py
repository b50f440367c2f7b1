"""Tables from other programs: separators, encodings, headers, and numbers stored as texts."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechdsl
from mechdsl.base.text import Source, Span
from mechdsl.prompts.data_files import DataFile, read_data_file
from mechdsl.prompts.expressions import parse_number

from ..parsing import format_file, parse

FILE = """mech 1

model toy = zoo("counting")

prompts counted {{
  rows "{name}"
{lines}
  template "Part 1: {{item}} {{item}} {{item}} Count 1:"
  answer " {{count}}"
}}

experiment heads {{
  model toy
  prompts counted
  ablate mlp_out layer 0 at last token with zero
  measure logit(answer) as raw
}}
"""

EXPECTED = ({"item": "apple", "count": 3}, {"item": "pear", "count": 4})


def read(folder: Path, name: str, content: bytes) -> DataFile:
    (folder / name).write_bytes(content)
    found, problems = read_data_file(name, Span(Source(name, folder / "f.mech"), 0, 1))
    assert problems == []
    assert found is not None
    return found


def problem(folder: Path, name: str, content: bytes) -> tuple[str, str]:
    (folder / name).write_bytes(content)
    found, (error,) = read_data_file(name, Span(Source(name, folder / "f.mech"), 0, 1))
    assert found is None
    return error.message, error.help_text


def check(folder: Path, name: str, content: bytes, *lines: str) -> mechdsl.Diagnostics:
    (folder / name).write_bytes(content)
    path = folder / "f.mech"
    path.write_text(FILE.format(name=name, lines="\n".join(lines)), encoding="utf-8")
    return mechdsl.validate(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"item,count\napple,3\npear,4\n"),
        ("t.csv", b"\xef\xbb\xbfitem,count\r\napple,3\r\npear,4\r\n"),
        ("t.csv", "item,count\napple,3\npear,4\n".encode("utf-16")),
        ("t.tsv", "item\tcount\napple\t3\npear\t4\n".encode("utf-16")),
        ("t.csv", b"item;count\napple;3\npear;4\n"),
        ("t.csv", b'"item";"count"\n"apple";"3"\n"pear";"4"\n'),
        ("t.csv", b"item\tcount\napple\t3\npear\t4\n"),
        ("t.csv", b"item|count\napple|3\npear|4\n"),
        ("t.csv", b"item , count\napple,3\npear,4\n"),
        ("t.csv", b"\nitem,count\n\napple,3\n\npear,4\n"),
        ("t.csv", b"item,count,\napple,3,\npear,4,\n"),
        ("t.csv", b"item,count,,\napple,3,,\npear,4,,\n"),
    ],
)
def test_table_is_read_with_any_separator_encoding_and_header(
    tmp_path: Path, name: str, content: bytes
) -> None:
    assert read(tmp_path, name, content).records == EXPECTED


def test_unnamed_index_column_is_kept(tmp_path: Path) -> None:
    found = read(tmp_path, "t.csv", b",item\n0,apple\n1,pear\n")
    assert found.columns == ("", "item")


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b",item,\n0,apple,x\n", "2 of its columns have no name", "name them in the first line"),
        (
            b"item, item\na,b\n",
            "two columns are called `item`",
            "give each column a different name",
        ),
        (b"item\nb\xe9\n", "byte 6 is not UTF-8", "in Excel: `CSV UTF-8`"),
        (b"\xff\xfei\x00t\x00e", "byte 6 is not UTF-16", "save the file in UTF-8"),
    ],
)
def test_unreadable_table_reports_cause_and_fix(
    tmp_path: Path, content: bytes, message: str, hint: str
) -> None:
    found, advice = problem(tmp_path, "t.csv", content)
    assert message in found
    assert hint in advice


def test_separator_within_texts_does_not_split_columns(tmp_path: Path) -> None:
    found = read(tmp_path, "t.csv", b"a; b\nx; y\nz\n")
    assert found.records == ({"a; b": "x; y"}, {"a; b": "z"})


# --- names of columns -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    ["the item", "item-name", "Wörter", "2nd", "model", 'the "item"', "a, b", "täg\tlich", ""],
)
def test_quoted_csv_column_is_renamed(tmp_path: Path, column: str) -> None:
    quoted = '"' + column.replace('"', '""') + '"'
    written = column.replace('"', '\\"').replace("\t", "\\t")
    line = f'  rename {{ item = "{written}" }}'
    content = f"{quoted},count\napple,3\npear,4\n".encode()
    assert check(tmp_path, "t.csv", content, line) == []


@pytest.mark.parametrize("column", ["the item", "model", 'the "item"', ""])
def test_quoted_parquet_column_is_renamed(tmp_path: Path, column: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array(["apple", "pear"]), arrow.array([3, 4])]
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.Table.from_arrays(columns, names=[column, "count"]), path)
    written = column.replace('"', '\\"')
    line = f'  rename {{ item = "{written}" }}'
    assert check(tmp_path, "t.parquet", path.read_bytes(), line) == []


def test_formatter_keeps_quotes_of_renamed_columns() -> None:
    text = 'mech 1\n\nprompts p {\n  rows "t.csv"\n  rename { a = "the a", b = c }\n}\n'
    tree, problems = parse(Source(text))
    assert problems == []
    assert format_file(tree) == text


def test_unknown_name_suggests_renaming_a_quoted_column(tmp_path: Path) -> None:
    (found, *_) = check(tmp_path, "t.csv", b"I-Tem,count\napple,3\npear,4\n").errors
    assert found.code == "E0501"
    assert found.help_text == 'write `rename { item = "I-Tem" }` for this column'


def test_missing_renamed_column_suggests_a_similar_one(tmp_path: Path) -> None:
    content = b"the item,count\napple,3\npear,4\n"
    (found, *_) = check(tmp_path, "t.csv", content, '  rename { item = "the itm" }').errors
    assert found.help_text == "did you mean `the item`?"


# --- numbers as texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("03", 3),
        ("-4", -4),
        ("+4", 4),
        ("3.50", 3.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("", None),
        ("3,5", None),
        ("1_000", None),
        ("nan", None),
        ("inf", None),
        ("0x10", None),
        ("३", None),
        ("1e999", None),
        ("three", None),
    ],
)
def test_parse_number_accepts_only_decimal_digits(text: str, number: float | None) -> None:
    found = parse_number(text)
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"item,count\napple, 3\npear,04\n"),
        ("t.jsonl", b'{"item": "apple", "count": "3"}\n{"item": "pear", "count": "4"}\n'),
    ],
)
@pytest.mark.parametrize(
    ("line", "with_number"),
    [
        ("  where count > 2", "  where number(count) > 2"),
        ("  where 2 < count", "  where 2 < number(count)"),
        ("  corrupt fewer { count = count - 1 }", "  corrupt fewer { count = number(count) - 1 }"),
    ],
)
def test_numeric_text_needs_number_function_and_errors_suggest_it(
    tmp_path: Path, name: str, content: bytes, line: str, with_number: str
) -> None:
    (found, *_) = check(tmp_path, name, content, line).errors
    assert found.code == "E0503"
    assert "write `number(count)`" in found.help_text
    others = check(tmp_path, name, content, with_number).errors
    assert "E0503" not in [each.code for each in others]


def test_non_numeric_text_is_reported_with_its_record(tmp_path: Path) -> None:
    content = b"item,count\napple,3\npear,\n"
    (found,) = check(tmp_path, "t.csv", content, "  where number(count) > 2").errors
    assert "'' is not a number" in found.message
    assert "in record 1" in found.label_text
    lines = '  where count != ""', "  where number(count) > 2"
    assert check(tmp_path, "t.csv", content, *lines).errors == []


def test_numeric_column_needs_no_number_function(tmp_path: Path) -> None:
    content = b'item,count\napple,"3"\npear,4\n'
    assert check(tmp_path, "t.csv", content, "  where count > 2").errors == []
