"""References to stored runs, and errors for unknown or ambiguous references."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mechdsl
from mechdsl.results.results import Results, pack_results
from mechdsl.results.runs import (
    about_results,
    export_results,
    find_run,
    find_store_folder,
    load_results,
    open_store,
    read_facts,
)
from mechdsl.store.store import Store

from .archived import TEXTS, written
from .exact import same_results

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return mechdsl.run(written(tmp_path_factory.mktemp("files"), "plain"))


def keep(folder: Path, results: Results, of: Path, **about: Any) -> str:
    """Store a finished run of a file and return its id."""
    said: Mapping[str, Any] = {"file": of.name, "path": os.path.realpath(of), **about}
    with Store(folder) as store, store.begin(os.urandom(8).hex(), said) as run:
        run.finish(
            pack_results(results, TEXTS["plain"]),
            about_results(results, computed=5, stored=3, seconds=1.5),
        )
        return run.id


def refused(text: str, store: Path | None = None) -> str:
    """Return message and help of the error for a run reference."""
    with pytest.raises(mechdsl.MechdslError) as found:
        load_results(text, store)
    (problem,) = found.value.diagnostics
    assert problem.code == "E0208"
    return f"{problem.message} | {problem.help_text}"


def test_run_is_loaded_by_id_or_unique_prefix(results: Results, tmp_path: Path) -> None:
    id = keep(tmp_path, results, tmp_path / "a.mech")
    for text in (id, id[:-1], id[:9]):
        same_results(results, load_results(text, tmp_path))
    other = keep(tmp_path, results, tmp_path / "a.mech")
    said = refused("2", tmp_path)
    assert "`2` is the beginning of 2 runs" in said
    assert id in said
    assert other in said
    assert "there is no run `` in" in refused("", tmp_path)


def test_mistyped_run_id_gets_a_suggestion(results: Results, tmp_path: Path) -> None:
    id = keep(tmp_path, results, tmp_path / "a.mech")
    assert f"did you mean `{id}`?" in refused(id[:-1] + "x", tmp_path)
    assert "a run is its id or the beginning of one, `last`" in refused("nothing", tmp_path)


def test_last_is_the_latest_finished_run(results: Results, tmp_path: Path) -> None:
    with Store(tmp_path) as store, store.begin("k", {"file": "x"}):
        pass
    assert "is finished" in refused("last", tmp_path)
    keep(tmp_path, results, tmp_path / "a.mech")
    id = keep(tmp_path, results, tmp_path / "b.mech")
    with Store(tmp_path) as store, store.begin("k", {"file": "x"}):
        assert find_run(store, "last").id == id


def test_file_name_refers_to_its_latest_finished_run(results: Results, tmp_path: Path) -> None:
    keep(tmp_path, results, tmp_path / "a.mech")
    id = keep(tmp_path, results, tmp_path / "a.mech")
    keep(tmp_path, results, tmp_path / "b.mech")
    with Store(tmp_path) as store:
        store.begin("k", {"file": "a.mech", "path": str(tmp_path / "a.mech")}).close()
        assert find_run(store, str(tmp_path / "a.mech")).id == id
    assert "did you mean `a.mech`?" in refused("aa.mech", tmp_path)
    assert "no finished run of `far/off.mech`" in refused("far/off.mech", tmp_path)


def test_file_moved_with_its_store_still_finds_its_run(results: Results, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    id = keep(tmp_path / "old" / ".mechdsl", results, tmp_path / "old" / "a.mech")
    (tmp_path / "old").rename(tmp_path / "new")
    store = find_store_folder(str(tmp_path / "new" / "a.mech"), tmp_path / "new" / ".mechdsl")
    with open_store(store) as opened:
        assert find_run(opened, str(tmp_path / "new" / "a.mech")).id == id


def test_files_of_equal_name_are_distinguished_by_path(results: Results, tmp_path: Path) -> None:
    """Both are in one store, and a third path of that name matches neither."""
    one = keep(tmp_path, results, tmp_path / "one" / "a.mech")
    two = keep(tmp_path, results, tmp_path / "two" / "a.mech")
    with Store(tmp_path) as store:
        assert find_run(store, str(tmp_path / "one" / "a.mech")).id == one
        assert find_run(store, str(tmp_path / "two" / "a.mech")).id == two
    said = refused(str(tmp_path / "three" / "a.mech"), tmp_path)
    assert "several files called `a.mech`" in said
    assert one in said
    assert two in said


def test_run_of_a_text_is_not_found_by_file_name(results: Results, tmp_path: Path) -> None:
    keep(tmp_path, results, tmp_path / "a.mech", path=None, file="<text>")
    assert "no finished run of `a.mech`" in refused("a.mech", tmp_path)


def test_exported_folder_is_loaded_as_a_run(results: Results, tmp_path: Path) -> None:
    made = export_results(results, tmp_path / "out", TEXTS["plain"])
    same_results(results, load_results(str(made)))
    said = refused(str(tmp_path / "out"))
    assert "contains no run" in said
    assert f"did you mean `{made}`?" in said
    (made / "arrays.safetensors").write_bytes(b"torn")
    assert "can't be read" in refused(str(made))


def test_store_is_searched_next_to_the_file_or_in_the_working_folder(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_store_folder("sub/a.mech") == Path("sub/.mechdsl")
    assert find_store_folder("last") == find_store_folder(None) == Path(".mechdsl")
    assert find_store_folder("last", Path("named")) == Path("named")
    keep(tmp_path / "sub" / ".mechdsl", results, tmp_path / "sub" / "a.mech")
    same_results(results, load_results("sub/a.mech"))
    assert "there is no store `.mechdsl`" in refused("last")
    assert not (tmp_path / ".mechdsl").exists(), "looking makes none"
    monkeypatch.setenv("MECHDSL_STORE", "sub/.mechdsl")
    same_results(results, load_results("last"))
    monkeypatch.setenv("MECHDSL_STORE", "none")
    assert "`MECHDSL_STORE` is `none`" in refused("last")


def test_lookup_creates_no_store(tmp_path: Path) -> None:
    assert "there is no store" in refused("last", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_named_last_is_loaded_only_by_path(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = keep(tmp_path / "store", results, tmp_path / "a.mech")
    monkeypatch.chdir(tmp_path)
    export_results(mechdsl.run(written(tmp_path, "variants")), tmp_path, TEXTS["variants"])
    (tmp_path / "it").rename(tmp_path / "last")
    assert load_results("./last")["heads"].axes == ("source", "head")
    assert load_results("last", tmp_path / "store")["heads"].axes == ("head",)
    with Store(tmp_path / "store") as store:
        assert find_run(store, "last").id == id


def test_unfinished_run_is_rejected(tmp_path: Path) -> None:
    with Store(tmp_path) as store, store.begin("k", {"file": "x"}) as run:
        assert "is still running: it has no results" in refused(run.id, tmp_path)
    assert "was not finished: it has no results" in refused(run.id, tmp_path)


def test_torn_results_of_a_run_are_rejected(results: Results, tmp_path: Path) -> None:
    id = keep(tmp_path, results, tmp_path / "a.mech")
    for path in (tmp_path / "blobs").rglob("*.data"):
        path.write_bytes(path.read_bytes()[:-1])
    assert f"the results of run `{id}` can't be read" in refused(id, tmp_path)


def test_copied_store_is_readable(results: Results, tmp_path: Path) -> None:
    id = keep(tmp_path / "one", results, tmp_path / "a.mech")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    same_results(results, load_results(id[:15], tmp_path / "two"))


def test_run_facts_summarise_a_stored_run(results: Results, tmp_path: Path) -> None:
    keep(tmp_path, results, tmp_path / "a.mech", settings={"limit": 8}, versions={"mechdsl": "0"})
    with Store(tmp_path) as store:
        (run,) = store.runs()
    facts = read_facts(run)
    assert (facts.file, facts.state, facts.seconds) == ("a.mech", "finished", 1.5)
    assert (facts.experiments, facts.held, facts.expectations) == (1, 0, 0)
    assert facts.rows == "5 rows computed, 3 from the store"
    assert replace(facts, stored=5600).rows == "5 rows computed, 5,600 from the store"
    assert facts.settings == {"limit": "8"}
    assert facts.size == run.size > 0


def test_expectations_of_a_lost_experiment_do_not_hold(tmp_path: Path) -> None:
    found = mechdsl.run(written(tmp_path, "lost and missing"))
    about = about_results(found, computed=1, stored=0, seconds=0.1)
    assert (about["experiments"], about["lost"]) == (1, 1)
    assert (about["held"], about["expectations"]) == (0, 2)


@pytest.mark.parametrize(
    "about",
    [
        {"file": 3, "seconds": "x", "experiments": 1.5, "settings": [], "versions": "a"},
        {"file": None, "seconds": None, "held": True, "settings": {"a": None}, "hashes": {"a": 1}},
        {},
    ],
)
def test_malformed_run_facts_read_as_empty(about: dict[str, Any], tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.begin("k", about).close()
        facts = read_facts(store.runs()[0])
    assert facts.file == ""
    assert facts.held is None
    assert facts.settings == {}
    assert facts.rows == facts.verdict == ""
