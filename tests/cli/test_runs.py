"""`mechdsl runs`: list, show, export and remove stored runs."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

import mechdsl
from mechdsl.results import results as archive
from mechdsl.results.results import Results, pack_results
from mechdsl.results.runs import about_results, read_export
from mechdsl.store.store import Store

from ..results.archived import TEXTS, written
from .conftest import Command
from .test_commands import imported_by_each

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

NAME = "everything printed"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return mechdsl.run(written(tmp_path_factory.mktemp("files"), NAME))


def keep(folder: Path, results: Results) -> str:
    (file,) = results.files
    about = {
        "file": file.file,
        "path": file.file,
        "settings": {"limit": "8"},
        "versions": {"mechdsl": "0.1", "torch": "2"},
    }
    with Store(folder) as store, store.begin("key", about) as run:
        added = about_results(results, computed=1200, stored=30, seconds=61.26)
        run.finish(pack_results(results, TEXTS[NAME]), added)
        return run.id


@pytest.fixture
def id(results: Results, tmp_path: Path) -> str:
    return keep(tmp_path / "store", results)


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, Path]:
    return "--store", tmp_path / "store"


def test_runs_lists_stored_runs(command: Command, id: str, store: tuple[str, Path]) -> None:
    with Store(store[1]) as opened, opened.begin("other", {"file": "b\x1b[31m.mech"}) as other:
        done = command("runs", *store)
        assert (done.status, done.err) == (0, "")
        assert done.out == command("runs", "list", *store).out
        first, second, third, *_ = done.out.splitlines()
    assert first.split() == ["run", "began", "file", "state", "experiments", "hold", "s", "size"]
    assert second.split()[0] == other.id
    assert second.split()[-1] == "running"
    assert "b\\x1b[31m" in second
    assert third.split()[0] == id
    assert "finished" in third
    assert "  1 of 4  61.3 " in third
    assert max(map(len, done.out.splitlines())) <= 100


def test_runs_json_has_facts_of_stored_runs(
    command: Command, id: str, store: tuple[str, Path]
) -> None:
    (found,) = json.loads(command("runs", "--format", "json", *store).out)
    assert (found["id"], found["state"], found["seconds"]) == (id, "finished", 61.26)
    assert (found["held"], found["expectations"], found["computed"]) == (1, 4, 1200)
    assert found["began"].startswith(f"{id[:4]}-{id[4:6]}-")


def test_runs_without_a_store_prints_a_note_or_an_error(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    done = command("runs")
    assert (done.status, done.out, done.err) == (0, "", ".mechdsl has no stored runs\n")
    assert command("runs", "--format", "json").out == "[]\n"
    for arguments in (("--store", "none"), ("show", "last"), ("gc",), ("rm", "last")):
        done = command("runs", *arguments)
        assert (done.status, done.out) == (2, "")
        assert "error[E0208]: there is no store" in done.err
    assert list(tmp_path.iterdir()) == []


def test_runs_show_prints_facts_and_tables(
    command: Command, results: Results, id: str, store: tuple[str, Path]
) -> None:
    done = command("runs", "show", "last", *store)
    assert done.status == 0
    assert done.err.startswith("warning[")
    assert f"run {id}: finished" in done.out
    said = " ".join(done.out.split())
    assert "settings limit 8 versions mechdsl 0.1, torch 2" in said
    assert "rows 1,200 rows computed, 30 from the store" in said
    (tables,) = [done.out[done.out.index("\nheads: ") :]]
    assert tables == "\n" + results.to_text(100).lstrip("\n")
    assert "hashes" in said
    assert results["heads"].hashes["model"][:12] in said


def test_runs_show_prints_json_and_csv(
    command: Command, results: Results, id: str, store: tuple[str, Path]
) -> None:
    assert command("runs", "show", id, "--format", "json", *store).out == results.to_json() + "\n"
    done = command("runs", "show", id, "--format", "csv", *store)
    assert done.out == results.to_csv()
    assert len(list(csv.reader(done.out.splitlines()))) > 20


def test_runs_show_prints_lost_experiments(command: Command, tmp_path: Path) -> None:
    found = mechdsl.run(written(tmp_path, "lost and missing"), out=tmp_path / "out")
    assert found.files[0].lost
    done = command("runs", "show", tmp_path / "out" / "it")
    assert done.status == 0
    assert "error[E0604]" in done.err
    assert "gone: not computed" in done.out


def test_runs_show_of_an_unfinished_run_has_no_results(
    command: Command, store: tuple[str, Path]
) -> None:
    with Store(store[1]) as opened, opened.begin("k", {"file": "a.mech"}) as run:
        pass
    done = command("runs", "show", run.id, *store)
    assert (done.status, done.err) == (0, "")
    assert f"run {run.id}: unfinished" in done.out
    done = command("runs", "show", run.id, "--format", "json", *store)
    assert (done.status, done.out) == (2, "")
    assert "it has no results" in done.err


def test_run_of_another_version_is_shown_only_as_json(
    command: Command,
    results: Results,
    id: str,
    store: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archive, "ARCHIVE_VERSION", archive.ARCHIVE_VERSION + 1)
    done = command("runs", "show", id, "--format", "json", *store)
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out) == results.to_dict()
    for form in ("table", "csv"):
        done = command("runs", "show", id, "--format", form, *store)
        assert (done.status, done.out) == (2, "")
        assert "archive of a different version" in done.err
        assert "`mechdsl runs show RUN --format json` prints its document" in done.err


def test_runs_export_writes_a_folder(
    command: Command, results: Results, id: str, store: tuple[str, Path]
) -> None:
    folder = store[1].parent / "out"
    done = command("runs", "export", id, folder, *store)
    assert (done.status, done.out) == (0, f"{id} written to {folder / 'it'}\n")
    assert read_export(folder / "it").to_json() == results.to_json()
    assert (folder / "it" / "spots.jsonl").is_file()


def test_runs_rm_removes_only_known_runs(
    command: Command, results: Results, id: str, store: tuple[str, Path]
) -> None:
    other = keep(store[1], results)
    done = command("runs", "rm", other, "nothing", *store)
    assert done.status == 2
    assert "there is no run `nothing`" in done.err
    assert len(json.loads(command("runs", "--format", "json", *store).out)) == 2, "none went"
    done = command("runs", "rm", other, other, *store)
    (file,) = results.files
    assert (done.status, done.out) == (0, f"removed {other} ({file.file})\n")
    (left,) = json.loads(command("runs", "--format", "json", *store).out)
    assert left["id"] == id


def test_running_run_is_not_removed(command: Command, store: tuple[str, Path]) -> None:
    with Store(store[1]) as opened, opened.begin("k", {"file": "a"}) as run:
        done = command("runs", "rm", run.id, *store)
    assert done.status == 2
    assert f"run {run.id} is running" in done.err


def test_runs_gc_removes_runs_over_the_limit(
    command: Command, id: str, store: tuple[str, Path]
) -> None:
    done = command("runs", "gc", *store)
    assert done.status == 0
    assert done.out.startswith("removed 0 runs and the values of 0 passes (0 bytes); ")
    done = command("runs", "gc", "--limit", "1 kB", *store)
    assert done.out.startswith("removed 1 run and the values of 0 passes (")
    assert done.out.endswith("; 0 bytes remain\n")
    assert command("runs", *store).err == f"{store[1]} has no stored runs\n"


@pytest.mark.parametrize("size", ["much", "-1GB", "5XB", ""])
def test_invalid_gc_limit_is_rejected(command: Command, size: str) -> None:
    done = command("runs", "gc", "--limit", size)
    assert done.status == 2
    assert "isn't a size such as `5GB`" in done.err
    assert "`mechdsl runs gc --help` lists its arguments and options" in done.err


def test_mistyped_runs_command_gets_a_suggestion(command: Command) -> None:
    done = command("runs", "shw")
    assert done.status == 2
    assert "did you mean `show`?" in done.err
    assert "did you mean `runs`?" in command("rns").err


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_runs_commands_do_not_import_torch(
    form: str, results: Results, id: str, store: tuple[str, Path]
) -> None:
    where = (str(store[0]), str(store[1]))
    heavy = {"torch", "transformers", "altair", "pandas", "networkx"}
    commands: list[tuple[str, ...]] = [("show", id, "--format", form)]
    if form == "table":
        commands += [("list",), ("export", id, str(store[1] / "x")), ("gc",), ("rm", id)]
    found = imported_by_each([("runs", *arguments, *where) for arguments in commands])
    assert found.isdisjoint(heavy)


def completed(words: str, monkeypatch: pytest.MonkeyPatch, command: Command) -> list[str]:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    monkeypatch.setenv("_MECHDSL_COMPLETE", "bash_complete")
    return [line.partition(",")[2] for line in command().out.splitlines()]


def test_tab_completes_runs_commands_and_ids(
    command: Command, id: str, store: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store[1].parent)
    assert completed("mechdsl runs sh", monkeypatch, command) == ["show"]
    found = completed("mechdsl runs show --store store 2", monkeypatch, command)
    assert id in found
    monkeypatch.setenv("MECHDSL_STORE", os.fspath(store[1]))
    assert "last" in completed("mechdsl runs rm la", monkeypatch, command)
    monkeypatch.setenv("MECHDSL_STORE", "none")
    assert id not in completed("mechdsl runs rm 2", monkeypatch, command)


def train(folder: Path, key: str, name: str = "f", *, finished: bool = True) -> Path:
    """Create a stored training."""
    path = folder / "fits" / (key if finished else f"{key}.part")
    path.mkdir(parents=True)
    card = {"basis": name, "trainer": "sae", "file": "a.mech", "model_name": "m", "prompts": "p"}
    if finished:
        (path / "fit.json").write_text(json.dumps(card), "utf-8")
    (path / "weights").write_bytes(bytes(3000))
    return path


def test_runs_trainings_lists_trainings(command: Command, store: tuple[str, Path]) -> None:
    first = train(store[1], "ab" * 32, "f[layer 3]")
    train(store[1], "ac" * 32, finished=False)
    os.utime(first / "weights", (9e9, 9e9))
    done = command("runs", "trainings", *store)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[1].split()[0] == "abababababab"
    assert "f[layer 3]" in lines[1]
    assert "unfinished" in lines[2]
    found = json.loads(command("runs", "trainings", "--format", "json", *store).out)
    assert [each["finished"] for each in found] == [True, False]
    assert found[0]["size"] > 3000
    assert found[0]["folder"] == str(first)


def test_runs_trainings_removes_by_unique_prefix(command: Command, store: tuple[str, Path]) -> None:
    first, second = train(store[1], "ab" * 32), train(store[1], "ac" * 32, finished=False)
    for text in ("a", "b"):
        done = command("runs", "trainings", "--remove", "ab", "--remove", text, *store)
        assert (done.status, done.out) == (2, "")
        assert f"with `{text}`" in done.err
    assert first.exists()
    done = command("runs", "trainings", "--remove", "ac", *store)
    assert done.out == "removed acacacacacac (unknown, 3.0 kB)\n"
    assert first.exists()
    assert not second.exists()
    command("runs", "trainings", "--remove", "ab", *store)
    assert [*(store[1] / "fits").iterdir()] == []
    assert "has no trainings" in command("runs", "trainings", *store).err


def test_running_training_is_not_removed(command: Command, store: tuple[str, Path]) -> None:
    from mechdsl.store.files import take_lock

    path = train(store[1], "ab" * 32, finished=False)
    lock = take_lock(path.with_name(f"{'ab' * 32}.lock"))
    assert lock is not None
    try:
        done = command("runs", "trainings", "--remove", "ab", *store)
    finally:
        lock.free()
    assert done.status == 2
    assert "another process is training `abababababab`" in done.err
    assert path.exists()
