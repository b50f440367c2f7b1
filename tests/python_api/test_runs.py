"""`mechdsl.runs()`: the runs of a store from Python."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

import mechdsl
from mechdsl.results.results import pack_results
from mechdsl.results.runs import about_results
from mechdsl.store.store import Store

from ..results.archived import TEXTS, written
from ..results.exact import same_results

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> mechdsl.Results:
    return mechdsl.run(written(tmp_path_factory.mktemp("files"), "lost and missing"))


@pytest.fixture
def store(results: mechdsl.Results, tmp_path: Path) -> Path:
    """A store with a finished run followed by an unfinished one."""
    folder = tmp_path / "store"
    with Store(folder) as opened:
        with opened.begin("a", {"file": "it.mech", "settings": {"limit": "8"}}) as run:
            about = about_results(results, computed=1, stored=2, seconds=3.0)
            run.finish(pack_results(results, TEXTS["lost and missing"]), about)
        opened.begin("b", {"file": "b.mech"}).close()
    return folder


def test_runs_lists_the_runs_of_a_store(store: Path, results: mechdsl.Results) -> None:
    found = mechdsl.runs(store)
    unfinished, finished = found
    assert (unfinished.state, unfinished.file) == ("unfinished", "b.mech")
    assert (finished.state, finished.file) == ("finished", "it.mech")
    assert finished.about["settings"] == {"limit": "8"}
    assert finished.facts.computed == 1
    assert abs(datetime.now().astimezone() - finished.began) < timedelta(minutes=5)
    same_results(results, finished.results)
    assert finished.results is finished.results
    with pytest.raises(mechdsl.MechdslError, match="it has no results"):
        _ = unfinished.results


def test_runs_repr_lists_each_run(store: Path) -> None:
    found = mechdsl.runs(str(store))
    unfinished, finished = found
    text = repr(found)
    assert text.startswith(f"<Runs {unfinished.id}: b.mech, ")
    assert text.endswith("0 of 2 expectations hold>")
    assert text.splitlines()[0].endswith(", unfinished")
    assert repr(finished) in text.replace("<Runs", "<Run").replace("\n  ", "\n<Run ")
    assert repr(mechdsl.runs(store)[:0]) == "[]"


def test_runs_repr_truncates_long_lists(store: Path) -> None:
    with Store(store) as opened:
        for number in range(25):
            opened.begin(str(number), {"file": "c.mech"}).close()
    found = mechdsl.runs(store)
    assert len(found) == 27
    assert repr(found).endswith("\n  and 7 more>")


def test_stored_run_is_exported_and_removed(store: Path, results: mechdsl.Results) -> None:
    unfinished, finished = mechdsl.runs(store)
    made = finished.export(store.parent / "out")
    assert made == store.parent / "out" / "it"
    assert (made / "heads.jsonl").is_file()
    with pytest.raises(mechdsl.MechdslError, match="it has no results"):
        unfinished.export(store.parent / "other")
    finished.remove()
    unfinished.remove()
    assert mechdsl.runs(store) == []
    assert repr(mechdsl.runs(store)) == "<Runs: none>"
    with pytest.raises(mechdsl.MechdslError, match="can't be read"):
        _ = mechdsl.results.runs.Run(store, finished._stored).results


def test_running_run_cannot_be_removed(store: Path) -> None:
    with Store(store) as opened, opened.begin("c", {"file": "c.mech"}):
        running = mechdsl.runs(store)[0]
        assert running.state == "running"
        with pytest.raises(mechdsl.MechdslError, match="is running"):
            running.remove()


def test_runs_without_a_store_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MECHDSL_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert mechdsl.runs() == []
    with pytest.raises(mechdsl.MechdslError, match="there is no store"):
        mechdsl.runs("nowhere")
    assert list(tmp_path.iterdir()) == []


def test_runs_uses_the_store_of_the_environment(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHDSL_STORE", str(store))
    assert len(mechdsl.runs()) == 2
    monkeypatch.setenv("MECHDSL_STORE", "none")
    with pytest.raises(mechdsl.MechdslError, match="`MECHDSL_STORE` is `none`"):
        mechdsl.runs()
