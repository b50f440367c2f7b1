from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.text import Source, Span
from mechdsl.prompts import data_files
from mechdsl.prompts.data_files import DataFile, read_data_file
from mechdsl.syntax import parser as engine
from mechdsl.vocab.corruptions import CHANGES, NOISES


def read(folder: Path, name: str, content: bytes | None) -> tuple[str, str, str]:
    """Code, message and help of the error of a file."""
    if content is not None:
        (folder / name).write_bytes(content)
    source = Source(f'rows "{name}"', folder / "f.mech")
    found, (error,) = read_data_file(name, Span(source, 5, 7 + len(name)))
    assert found is None
    return error.code, error.message, error.help_text


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("d.json", None, "E0504", "there is no such file"),
        ("d.txt", b"x", "E0505", "files end in .jsonl, .json, .csv, .tsv, .parquet"),
        ("d", b"x", "E0505", "files end in"),
        ("d.json", b"[1, 2", "E0505", "it is not JSON (Expecting"),
        ("d.json", b"[1, 2]", "E0505", "record 0 is not an object"),
        ("d.json", b"3", "E0505", "it contains neither a list nor an object"),
        ("d.json", b'{"a": 1}', "E0505", "it is an object that contains no list of records"),
        ("d.json", b'{"a": [{}], "b": [{}]}', "E0505", "contains no list of records"),
        ("d.json", b"[]", "E0505", "it has no records"),
        ("d.jsonl", b'{"a": 1}\n{"a": }\n', "E0505", "line 2 is not JSON"),
        ("d.jsonl", b'{"a": 1}\n\n3\n', "E0505", "line 3 is not an object"),
        ("d.csv", b"a,b\n1,2\n3\n", "E0505", "record 1 has 1 fields, the header 2"),
        ("d.csv", b"a,b\n", "E0505", "it has no records"),
        ("d.csv", b"", "E0505", "it has no records"),
        ("d.tsv", b"a\tb\n\xff\t2\n", "E0505", "byte 4 is not UTF-8"),
        ("d.csv", b"a,b,a\n1,2,3\n", "E0505", "two columns are called `a`"),
        ("d.tsv", b"a\ta\n1\t2\n", "E0505", "two columns are called `a`"),
        ("d.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "E0505", "line 2 has two keys `a`"),
        ("d.json", b'[{"a": 1, "a": 2}]', "E0505", "one of its objects has two keys `a`"),
        ("d.json", b'[{"a": {"b": 1, "b": 2}}]', "E0505", "one of its objects has two keys `b`"),
        (
            "d.json",
            b'{"a": 1, "rows": [{"a": 2}]}',
            "E0505",
            "`a` is a key next to the list `rows`",
        ),
    ],
)
def test_unreadable_data_file_reports_its_cause(
    tmp_path: Path, name: str, content: bytes | None, code: str, message: str
) -> None:
    found, text, _ = read(tmp_path, name, content)
    assert found == code
    assert message in text


def test_parquet_with_duplicate_column_names_is_rejected(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [arrow.array([1]), arrow.array([2])]
    parquet.write_table(arrow.Table.from_arrays(columns, names=["a", "a"]), tmp_path / "d.parquet")
    code, message, _ = read(tmp_path, "d.parquet", None)
    assert code == "E0505"
    assert "two columns are called `a`" in message


def test_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").touch()
    assert read(tmp_path, "fact.jsonl", None)[2] == "did you mean `facts.jsonl`?"


def test_folder_is_rejected_as_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    assert read(tmp_path, "d.json", None)[0] == "E0504"


def test_each_corruption_keyword_of_the_grammar_is_registered() -> None:
    session = engine.load_parser().parse_interactive("", start="change_lines")
    words = {engine.keywords().get(name, "") for name in session.accepts()}
    soft = {"mask", "noise", "silence", "insert"}  # which the lexer knows by their entries
    assert {word for word in words if word.isalpha()} == set(CHANGES) - {"set"} - soft
    assert soft <= set(CHANGES)
    assert all(entry.name == name and entry.usage for name, entry in CHANGES.items())


def test_noise_has_mean_zero_and_standard_deviation_one() -> None:
    import numpy as np

    for _, kind in NOISES.items():
        values = kind.standard(np.random.default_rng(0), (200, 50))
        assert values.shape == (200, 50)
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 1) < 0.05


def test_blocks_that_read_equal_files_share_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records(name: str, content: bytes) -> DataFile:
        (tmp_path / name).write_bytes(content)
        source = Source(f'rows "{name}"', tmp_path / "f.mech")
        found, problems = read_data_file(name, Span(source, 5, 7 + len(name)))
        assert found is not None, problems
        return found

    lines = b'{"a": 1}\n{"a": 3}\n'
    first = records("d.jsonl", lines)
    assert records("copy.jsonl", lines) is first
    assert records("d.csv", lines).columns == ('{"a": 1}',)  # the suffix is the format
    assert records("d.jsonl", b'{"a": 2}\n').records == ({"a": 2},)  # the file has changed
    monkeypatch.setattr(data_files, "CACHED_BYTES", 5)
    assert records("d.jsonl", lines) is not first
