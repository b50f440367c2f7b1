"""`rows "text/*.jsonl"`: matching files as one table, loaded or streamed; data sets on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mechdsl.base import limits
from mechdsl.base.text import AllowedFolders, Source, Span
from mechdsl.prompts import data_files
from mechdsl.prompts.data_files import DataFile, read_data_file, read_dataset
from mechdsl.syntax import ast

from .support import blocks
from .test_hub_datasets import TRAIN, both

Records = list[dict[str, Any]]


def write(folder: Path, name: str, *records: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records), "utf-8")


def write_parquet(path: Path, records: Records, size: int) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(records), str(path), row_group_size=size)


def read(
    folder: Path, pattern: str, *, streamed: bool = False, reach: AllowedFolders | None = None
) -> tuple[DataFile | None, list[str]]:
    source = Source(pattern, folder / "f.mech")
    if reach is not None:
        object.__setattr__(source, "reach", reach)
    found, problems = read_data_file(pattern, Span(source, 0, 1), streamed=streamed)
    return found, [f"{each.code} {each.message} {each.help_text}" for each in problems]


def data_of(folder: Path, pattern: str, *, streamed: bool = False) -> DataFile:
    found, problems = read(folder, pattern, streamed=streamed)
    assert found is not None, problems
    return found


def texts(found: DataFile) -> list[object]:
    return [record["text"] for record in found.records]


@pytest.mark.parametrize("streamed", [False, True])
def test_pattern_reads_files_in_natural_order(streamed: bool, tmp_path: Path) -> None:
    for name, text in (("a10", "c"), ("a9", "b"), ("a1", "a"), ("b1", "not")):
        write(tmp_path, f"text/{name}.jsonl", {"text": text}, {"text": f"{text}2"})
    write(tmp_path, "text/.a0.jsonl", {"text": "hidden"})
    (tmp_path / "text" / "a5.jsonl").mkdir()  # a folder isn't a data file
    found = data_of(tmp_path, "text/a*.jsonl", streamed=streamed)
    assert texts(found) == ["a", "a2", "b", "b2", "c", "c2"]
    assert [found.digest_of(number) for number in (0, 1, 2)] == [
        found.files[0].digest, found.files[0].digest, found.files[1].digest
    ]  # fmt: skip
    assert texts(data_of(tmp_path, "*/b*.jsonl", streamed=streamed)) == ["not", "not2"]
    one = data_of(tmp_path, "text/b*.jsonl", streamed=streamed)
    assert one.digest == data_of(tmp_path, "text/b1.jsonl", streamed=streamed).digest


@pytest.mark.parametrize("streamed", [False, True])
def test_digest_depends_on_the_matched_files(streamed: bool, tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"text": "x"})
    write(tmp_path, "b.jsonl", {"text": "y"})
    digests = [data_of(tmp_path, "*.jsonl", streamed=streamed).digest]
    write(tmp_path, "c.jsonl", {"text": "z"})
    digests.append(data_of(tmp_path, "*.jsonl", streamed=streamed).digest)
    write(tmp_path, "b.jsonl", {"text": "w"})
    digests.append(data_of(tmp_path, "*.jsonl", streamed=streamed).digest)
    (tmp_path / "a.jsonl").unlink()
    digests.append(data_of(tmp_path, "*.jsonl", streamed=streamed).digest)
    write(tmp_path, "other.txt", {"text": "z"})
    assert len(set(digests)) == 4
    assert data_of(tmp_path, "*.jsonl", streamed=streamed).digest == digests[-1]


def test_brackets_and_question_marks_match_literally(tmp_path: Path) -> None:
    write(tmp_path, "[a]?1.jsonl", {"text": "x"})
    write(tmp_path, "ab1.jsonl", {"text": "y"})
    assert texts(data_of(tmp_path, "[a]?*.jsonl")) == ["x"]


def test_streamed_pattern_reads_jsonl_and_parquet_files(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"text": "x"}, {"text": "y"})
    write_parquet(tmp_path / "b.parquet", [{"text": str(n)} for n in range(5)], 2)
    found = data_of(tmp_path, "*", streamed=True)
    assert texts(found) == ["x", "y", "0", "1", "2", "3", "4"]
    records = found.records
    assert isinstance(records, data_files.StreamedRecords)
    assert [group.count for group in records.groups] == [2, 2, 2, 1]
    assert [record["said"] for record in records.renamed({"text": "said"})[1:3]] == ["y", "0"]


def test_row_groups_over_the_memory_limit_are_reread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values don't depend on how many row groups fit in memory."""
    monkeypatch.setattr(data_files, "GROUP_BYTES", 1)
    write_parquet(tmp_path / "b.parquet", [{"text": str(n)} for n in range(9)], 2)
    found = data_of(tmp_path, "b.parquet", streamed=True)
    order = [8, 0, 3, 8, 1, 7]
    assert [found.records[number]["text"] for number in order] == [str(n) for n in order]
    assert isinstance(found.records, data_files.StreamedRecords)
    assert len(found.records._open._open) == 1


def test_missing_columns_name_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", {"text": "x", "n": 1}, {"text": "y", "m": 2})
    write(tmp_path, "b.jsonl", {"n": 1, "m": 3})
    write(tmp_path, "c.jsonl")
    found = data_of(tmp_path, "*.jsonl", streamed=True)
    assert found.lacking == {
        "n": "`a.jsonl`, line 2", "m": "`a.jsonl`, line 1", "text": "`b.jsonl`"
    }  # fmt: skip
    assert data_of(tmp_path, "a.jsonl", streamed=True).lacking == {"n": "line 2", "m": "line 1"}


@pytest.mark.parametrize("streamed", [False, True])
def test_invalid_pattern_or_matched_file_is_rejected(
    streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, (problem,) = read(tmp_path, "text/*.jsonl", streamed=streamed)
    assert found is None
    assert problem.startswith("E0504 `text/*.jsonl` can't be read: no file matches")
    write(tmp_path, "a.jsonl", {"text": "x"})
    _, (problem,) = read(tmp_path, "**/*.jsonl", streamed=streamed)
    assert problem.startswith("E0504 `**/*.jsonl` can't be read: `**` isn't supported")
    (tmp_path / "b.jsonl").write_text('{"text": \n', "utf-8")
    _, (problem,) = read(tmp_path, "*.jsonl", streamed=streamed)
    assert problem.startswith("E0505 `b.jsonl` has no readable data: line 1 is not JSON")
    (tmp_path / "b.csv").write_text("text\nx\n", "utf-8")
    _, (problem,) = read(tmp_path, "*.csv", streamed=streamed)
    assert problem.startswith("E0505 `b.csv` has no readable data: files of")
    (tmp_path / "b.jsonl").write_text("\n", "utf-8")
    _, (problem,) = read(tmp_path, "b*.jsonl", streamed=streamed)
    assert problem.startswith("E0505 `b*.jsonl` has no readable data: it has no records")
    monkeypatch.setattr(limits, "DATA_FILES", 1)
    _, (problem,) = read(tmp_path, "*.jsonl", streamed=streamed)
    assert problem.startswith("E0506 `*.jsonl`: 2 files exceed the limit of 1")


def test_untrusted_pattern_cannot_read_files_outside_its_folder(tmp_path: Path) -> None:
    """Other folders and symbolic links to them are rejected."""
    write(tmp_path, "secret/a.jsonl", {"text": "x"})
    write(tmp_path, "in/text/a.jsonl", {"text": "y"})
    (tmp_path / "in" / "text" / "b.jsonl").symlink_to(tmp_path / "secret" / "a.jsonl")
    reach = AllowedFolders(reads=((tmp_path / "in").resolve(),), writes=())
    for pattern in ("../secret/*.jsonl", f"{tmp_path}/secret/*.jsonl", "text/*.jsonl"):
        found, (problem,) = read(tmp_path / "in", pattern, reach=reach)
        assert found is None
        assert problem.startswith("E0535")
    assert texts(data_of(tmp_path / "in", "text/*.jsonl")) == ["y", "x"]


def dataset(folder: Path, what: str, *, streamed: bool) -> tuple[DataFile | None, list[str]]:
    (block,) = blocks(f'prompts p {{ rows {what} template "x" }}', folder / "a.mech").values()
    assert isinstance(block.rows, ast.Call)
    found, problems = read_dataset(block.rows, streamed=streamed)
    return found, [f"{each.code} {each.message} {each.help_text}" for each in problems]


def test_dataset_on_disk_is_streamed(tmp_path: Path) -> None:
    """Covers files of `save_to_disk` and folders of Parquet files."""
    both(tmp_path / "pairs")
    for n in range(2):
        (tmp_path / "d").mkdir(exist_ok=True)
        write_parquet(tmp_path / "d" / f"train-{n}.parquet", TRAIN[n * 4 : n * 4 + 4], 2)
    for name in ("pairs", "d"):
        call = f'hf_dataset("{name}", split: "train")'
        found, problems = dataset(tmp_path, call, streamed=True)
        assert found is not None, problems
        assert list(found.records) == TRAIN
        whole, _ = dataset(tmp_path, call, streamed=False)
        assert whole is not None
        assert whole.digest == found.digest
        assert whole.columns == found.columns


def test_dataset_of_csv_files_is_not_streamed(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("input\nx\n", "utf-8")
    found, (problem,) = dataset(tmp_path, 'hf_dataset("d", split: "train")', streamed=True)
    assert found is None
    assert (
        "files of streamed rows end in .jsonl, .parquet, .arrow, but it has `train.csv`" in problem
    )
