"""Exports of `--out` and `runs export`: values per prompt, and results to read back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.pipeline.options import RunOptions
from mechdsl.results import runs as module
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import ArchiveError
from mechdsl.results.runs import EXPORT_FILES, export_results, export_stem, is_export, read_export

from ..execute.conftest import folder
from ..execute.support import DIFFERENCE, bare, experiment, run_file
from .archived import TEXTS, written
from .exact import same_results

__all__ = ["folder"]

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

SECOND = "measure prob(answer) as raw"
TEXT = experiment(
    "items", "prompts p", "from longer into clean", "patch layer 1 head * at each item token",
    DIFFERENCE, SECOND,
) + experiment(
    "parts", "prompts p", "from other into clean",
    "patch attn_out layer * at each token of subject", DIFFERENCE,
)  # fmt: skip


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def arrays(found: list[dict[str, Any]], result: ExperimentResult) -> list[np.ndarray]:
    """Per measure, [cell, prompt] rebuilt from the lines."""
    assert result.row_ids is not None
    place = {row: n for n, row in enumerate(result.row_ids)}
    values = [np.full((len(result.cells), len(place)), np.nan) for _ in result.measures]
    cells = [line for line in found if "cell" in line]
    assert [line["cell"] for line in cells] == list(range(len(result.cells)))
    for line in cells:
        assert line["coords"] == dict(result.cells[line["cell"]].coords)
        for own, kept in zip(line["values"], values, strict=True):
            for row, value in zip(line["rows"], own, strict=True):
                kept[line["cell"], place[row]] = np.nan if value is None else value
    return values


@pytest.mark.parametrize("tokens", [20, 4096])
def test_exported_lines_equal_the_arrays(folder: Path, tokens: int) -> None:
    options = RunOptions(
        out=folder / "out", execution=ExecutionOptions(pass_tokens=tokens, prompt_tokens=tokens)
    )
    for name, result in run_file(TEXT, folder, bare("gpt2"), options).items():
        header, *found = lines(folder / "out" / "file", name)
        assert header["schema"] == 2
        assert header["experiment"] == name
        assert header["axes"] == list(result.axes)
        assert [m["label"] for m in header["measures"]] == [m.label for m in result.measures]
        for measure, values in zip(result.measures, arrays(found, result), strict=True):
            np.testing.assert_array_equal(values, measure.patched)
        base = next(line for line in found if line.get("run") == "clean")
        order = np.argsort(base["rows"])  # in the order of `run_file`
        assert np.array(base["rows"])[order].tolist() == list(result.row_ids or ())
        for measure, values in zip(result.measures, base["values"], strict=True):
            np.testing.assert_array_equal(np.array(values)[order], measure.base[0])
        assert {line["run"] for line in found if "run" in line} == {"clean", str(result.source)}


def test_exported_cell_lists_only_its_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "gaps")
    results = mechdsl.run(path, out=tmp_path / "out")
    _, *found = lines(tmp_path / "out" / "it", "heads")
    (patched, divided, _) = (data.patched for data in results["heads"].measures)
    cells = [line for line in found if "cell" in line]
    assert any(np.isnan(divided).all(axis=1))
    for line, own, second in zip(cells, patched, divided, strict=True):
        assert len(line["rows"]) == np.count_nonzero(~np.isnan(own))
        assert [v is None for v in line["values"][1]] == np.isnan(second).tolist()


@pytest.mark.parametrize("name", ["everything printed", "lost and missing", "variants"])
def test_exported_results_round_trip(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name)
    results = replace(mechdsl.run(path, out=tmp_path / "out", write_reports=False), written=())
    same_results(results, read_export(tmp_path / "out" / "it"))
    document = (tmp_path / "out" / "it" / "results.json").read_text(encoding="utf-8")
    assert document == results.to_json() + "\n"
    tables = (tmp_path / "out" / "it" / "tables.txt").read_text(encoding="utf-8")
    assert tables == results.to_text(100)
    names = {f"{each.name}.jsonl" for each in results}
    assert set(os.listdir(tmp_path / "out" / "it")) == {*EXPORT_FILES, *names}
    assert os.listdir(tmp_path / "out") == ["it"]


def test_interrupted_run_keeps_the_earlier_export(folder: Path) -> None:
    whole = RunOptions(out=folder / "out", execution=ExecutionOptions(pass_tokens=40))
    run_file(TEXT, folder, bare("gpt2"), whole)
    before = everything(folder / "out")

    def stop(rows: int, total: int) -> None:
        raise KeyboardInterrupt

    broken = replace(whole, execution=replace(whole.execution, on_progress=stop))
    with pytest.raises(KeyboardInterrupt):
        run_file(TEXT, folder, bare("gpt2"), broken)
    assert everything(folder / "out") == before
    run_file(TEXT, folder, bare("gpt2"), whole)
    assert everything(folder / "out") == before


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def plain(tmp_path: Path) -> mechdsl.Results:
    return mechdsl.run(written(tmp_path, "plain"))


def test_full_disk_keeps_the_earlier_export(
    plain: mechdsl.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at each file of the export in turn."""
    out = tmp_path / "out"
    export_results(plain, out, TEXTS["plain"])
    before = everything(out)
    write = module._write_synced
    for full in range(len(EXPORT_FILES) + 1):
        calls = count()

        def until_full(
            path: Path, parts: Any, calls: Iterator[int] = calls, full: int = full
        ) -> None:
            if next(calls) == full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, parts)

        monkeypatch.setattr(module, "_write_synced", until_full)
        with pytest.raises(OSError, match="No space"):
            export_results(plain, out, TEXTS["plain"] + "# other\n")
        assert everything(out) == before


@pytest.mark.slow
def test_later_export_replaces_an_earlier_one(plain: mechdsl.Results, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = export_results(mechdsl.run(written(tmp_path, "everything printed")), out, "mech 1\n")
    assert made == out / "it"
    assert "spots.jsonl" in os.listdir(made)
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    (made / "mine.jsonl").write_text("mine", encoding="utf-8")
    (made / "state.json").write_text("{}", encoding="utf-8")
    (made / "folder").mkdir()
    (made / "folder" / "notes.txt").write_text("mine", encoding="utf-8")
    export_results(plain, out, TEXTS["plain"])
    own = {"notes.txt", "mine.jsonl", "folder"}
    assert set(os.listdir(made)) == {*EXPORT_FILES, "heads.jsonl", *own}
    assert (made / "folder" / "notes.txt").read_text("utf-8") == "mine"
    same_results(plain, read_export(made))
    assert os.listdir(out) == ["it"]


def test_export_keeps_foreign_files_in_its_folder(plain: mechdsl.Results, tmp_path: Path) -> None:
    """`--out .` with an existing folder of the file's name."""
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "thesis.tex").write_text("years", encoding="utf-8")
    export_results(plain, tmp_path, TEXTS["plain"])
    assert (tmp_path / "it" / "thesis.tex").read_text("utf-8") == "years"
    assert is_export(tmp_path / "it")


def test_leftovers_of_a_killed_export_are_removed(
    plain: mechdsl.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed while writing, between the two renames, and after them."""
    monkeypatch.setattr(module, "STALE_SECONDS", 0.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out = tmp_path / "out"
    made = export_results(plain, out, TEXTS["plain"])
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    made.replace(out / f".it-{ended.pid}-0123abcd.before")  # the earlier run has no other name now
    (out / f".it-{ended.pid}-0123abcd.new").mkdir()
    (out / f".it-{ended.pid}-0123abcd.new" / "archive.json").write_text("{", encoding="utf-8")
    export_results(plain, out, TEXTS["plain"])
    assert os.listdir(out) == ["it"]
    assert (made / "notes.txt").read_text("utf-8") == "mine"

    before = out / f".it-{os.getpid()}-0123abcd.before"  # process ids are reused
    shutil.copytree(made, before, ignore=shutil.ignore_patterns("notes.txt"))
    (before / "more.txt").write_text("mine too", encoding="utf-8")
    export_results(plain, out, TEXTS["plain"])
    assert os.listdir(out) == ["it"]
    assert (made / "more.txt").read_text("utf-8") == "mine too"


def test_temporary_folders_that_may_be_in_use_stay(
    plain: mechdsl.Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {f".it-{ended.pid}-0123abcd.new"}  # may belong to another machine
    (tmp_path / "out" / names.copy().pop()).mkdir(parents=True)
    export_results(plain, tmp_path / "out", TEXTS["plain"])
    assert {*os.listdir(tmp_path / "out")} == {*names, "it"}
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(module, "STALE_SECONDS", 0.0)
    names = {
        f".it-{os.getppid()}-0123abcd.new",
        f".other-{ended.pid}-0123abcd.new",
        f".it-{ended.pid}.before",
    }
    for name in names:
        (tmp_path / "out" / name).mkdir(parents=True)
    export_results(plain, tmp_path / "out", TEXTS["plain"])
    assert {*os.listdir(tmp_path / "out")} == {*names, "it"}


def test_export_onto_a_file_is_an_error_and_keeps_the_file(
    plain: mechdsl.Results, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "it").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match="Not a directory"):
        export_results(plain, tmp_path / "out", TEXTS["plain"])
    assert (tmp_path / "out" / "it").read_text("utf-8") == "mine"
    assert os.listdir(tmp_path / "out") == ["it"]


@pytest.mark.parametrize(
    ("file", "stem"),
    [("a/heads.mech", "heads"), ("<text>", "text"), ("<stdin>", "stdin"), ("<../../x>", "x")],
)
def test_export_folder_is_named_after_the_file(file: str, stem: str) -> None:
    assert export_stem(file) == stem


@pytest.mark.parametrize("file", ["..", "", "/", "<>", "<..>", "a/.."])
def test_export_name_outside_the_folder_is_rejected(file: str) -> None:
    with pytest.raises(ArchiveError, match="is not the name of a file"):
        export_stem(file)


def test_folder_without_an_export_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"`archive\.json` is missing"):
        read_export(tmp_path)
    (tmp_path / "archive.json").mkdir()
    assert not is_export(tmp_path)
    with pytest.raises(ArchiveError, match=r"`archive\.json`: is a directory"):
        read_export(tmp_path)
