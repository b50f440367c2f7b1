"""Runs of a store: begin, resume, finish, list and remove."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from mechdsl.store.files import FileLock, StoreProblem, is_held, take_lock
from mechdsl.store.runs import check_content_name
from mechdsl.store.store import Store
from tests.store.support import block, cells, values_of

CONTENT = {"results.json": b"{}", "a/b.bin": bytes(1000), "empty": b""}
[ONE] = cells(1)


def test_unfinished_run_is_resumed(store: Store) -> None:
    with store.begin("key", {"file": "a.mech"}) as run:
        assert (run.resumed, run.sizes) == (False, None)
        run.settle({"rows": 7, "of": ["a", 0.1]})
        run.settle({"rows": 8, "of": ["a", 0.1]})
        first = run.id
        [listed] = store.runs()
        assert (listed.id, listed.state, listed.ended) == (first, "running", None)
    [listed] = store.runs()
    assert listed.state == "unfinished"
    assert store.finished("key") is None
    with store.begin("other", {}) as run:
        assert (run.resumed, run.sizes) == (False, None)
    with store.begin("key", {"file": "ignored"}) as run:
        assert (run.id, run.resumed, run.sizes) == (first, True, {"rows": 8, "of": ["a", 0.1]})
        run.finish(CONTENT, {"cells": 3})
    with store.begin("key", {}) as run:
        assert not run.resumed
        assert run.id != first


def test_finished_run_is_found_with_its_content(store: Store) -> None:
    before = time.time()
    with store.begin("key", {"file": "a.mech", "cells": 0}) as run:
        run.finish(CONTENT, {"cells": 3, "text": "é\udc80"})
    found = store.finished("key")
    assert found is not None
    assert found.about == {"file": "a.mech", "cells": 3, "text": "é\udc80"}
    assert (found.state, found.size) == ("finished", 1002)
    assert found.ended is not None
    assert before <= found.began <= found.ended <= time.time()
    assert store.content(found) == CONTENT
    assert store.runs() == [found]
    assert store.finished("other") is None
    assert list((store.folder / "locks").iterdir()) == [store.folder / "locks" / "store"]


def test_latest_finished_run_is_found(store: Store) -> None:
    for number in range(3):
        with store.begin("key", {"number": number}) as run:
            run.finish({"file": b"%d" % number}, {})
    with store.begin("key", {"number": 3}):
        pass
    found = store.finished("key")
    assert found is not None
    assert found.about == {"number": 2}
    assert [run.about["number"] for run in store.runs()] == [3, 2, 1, 0]


def test_simultaneous_runs_of_one_key_are_separate(memory: Path) -> None:
    with Store(memory / "store") as one, Store(memory / "store") as two:
        first = one.begin("key", {})
        second = two.begin("key", {})
        assert first.id != second.id
        assert [run.state for run in one.runs()] == ["running", "running"]
        first.close()
        second.close()
        with one.begin("key", {}) as third, two.begin("key", {}) as fourth:
            assert third.resumed
            assert fourth.resumed
            assert [third.id, fourth.id] == [second.id, first.id], "the newest first"


@pytest.mark.parametrize("how", ["finished", "removed"])
def test_run_finished_or_removed_before_its_lock_is_not_resumed(
    memory: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The run ends between its lookup and its lock."""
    with Store(memory / "store") as one, Store(memory / "store") as two:
        first = one.begin("key", {})

        def first_goes(path: Path, *, shared: bool = False) -> FileLock | None:
            if path.name == first.id and how == "finished":
                first.finish({"file": b"1"}, {})
            elif path.name == first.id:
                monkeypatch.undo()
                first.close()
                one.remove(one.runs()[0])
            return take_lock(path, shared=shared)

        monkeypatch.setattr("mechdsl.store.store.take_lock", first_goes)
        with two.begin("key", {}) as second:
            assert not second.resumed
            assert second.id != first.id
        states = [run.state for run in two.runs()]
        assert states == ["unfinished", "finished"][: 2 if how == "finished" else 1]
        assert len(list((memory / "store" / "locks").iterdir())) == 2


def test_fresh_run_never_resumes(store: Store) -> None:
    with store.begin("key", {}) as run:
        first = run.id
    with store.begin("key", {}, fresh=True) as run:
        assert not run.resumed
        assert run.id != first


def test_closed_run_rejects_writes(store: Store) -> None:
    with store.begin("key", {}) as run:
        pass
    with pytest.raises(ValueError, match="closed"):
        run.keep(block({ONE: {1: 1.0}}))
    with pytest.raises(ValueError, match="closed"):
        run.settle({})
    with store.begin("key", {}) as run:
        run.finish({}, {})
        with pytest.raises(ValueError, match="closed"):
            run.finish({}, {})
    run.close()


def test_exception_leaves_a_run_unfinished(store: Store) -> None:
    with pytest.raises(KeyError), store.begin("key", {}):
        raise KeyError
    [run] = store.runs()
    assert run.state == "unfinished"


def test_run_ids_are_short_and_contain_the_start_time(store: Store) -> None:
    ids: list[str] = []
    for _ in range(3):
        with store.begin("key", {}, fresh=True) as run:
            ids.append(run.id)
    assert len(set(ids)) == 3
    for id, listed in zip(ids, store.runs()[::-1], strict=True):
        assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", id)
        assert id.startswith(time.strftime("%Y%m%d-%H%M%S-", time.gmtime(listed.began)))


def test_run_ids_are_unique(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("mechdsl.store.store.secrets.token_hex", lambda _: next(drawn))
    monkeypatch.setattr("mechdsl.store.store.time.strftime", lambda *_: "20261121-154210")
    with store.begin("a", {}) as one:
        pass
    with store.begin("b", {}) as two:
        assert (one.id, two.id) == ("20261121-154210-aaaa", "20261121-154210-bbbb")


def test_clock_set_back_does_not_affect_the_order_of_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are ordered by when they were written, not by the clock."""
    now = 1_795_000_000.0
    monkeypatch.setattr("mechdsl.store.store.time.time", lambda: now)
    for number in range(3):
        now -= 1_000_000.0
        with store.begin("key", {"number": number}, fresh=True) as run:
            run.keep(block({ONE: {1: float(number)}}))
            run.finish({}, {})
    assert [run.about["number"] for run in store.runs()] == [2, 1, 0]
    found = store.finished("key")
    assert found is not None
    assert found.about["number"] == 2
    with store.begin("other", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (2.0,)}}


def test_removed_run_keeps_its_values(store: Store) -> None:
    runs: list[str] = []
    for content in (b"same", b"same", b"other"):
        with store.begin("key", {}, fresh=True) as run:
            run.keep(block({ONE: {1: 1.0}}))
            run.finish({"file": content}, {})
            runs.append(run.id)
    by_id = {run.id: run for run in store.runs()}
    store.remove(by_id[runs[2]])
    store.remove(by_id[runs[0]])
    assert [run.id for run in store.runs()] == [runs[1]]
    assert store.content(by_id[runs[1]]) == {"file": b"same"}, "two runs had the same file"
    assert len(list((store.folder / "blobs").glob("*/*.data"))) == 1
    with store.begin("later", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (1.0,)}}
    with pytest.raises(StoreProblem, match="there is no run"):
        store.remove(by_id[runs[0]])
    with pytest.raises(StoreProblem, match="there is no finished run"):
        store.content(by_id[runs[0]])


def test_running_run_is_not_removed(store: Store) -> None:
    with store.begin("key", {}):
        [run] = store.runs()
        with pytest.raises(StoreProblem, match="is running"):
            store.remove(run)
        with pytest.raises(StoreProblem, match="there is no finished run"):
            store.content(run)
    store.remove(run)
    assert store.runs() == []


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "../a", "a/../../b", "a\\b", "a\0b", "a//b"])
def test_content_name_outside_the_folder_is_rejected(store: Store, name: str) -> None:
    with store.begin("key", {}) as run:
        with pytest.raises(ValueError, match="can't be the name"):
            run.finish({name: b""}, {})
        assert store.runs()[0].state == "running"


def test_content_name_inside_the_folder_is_accepted() -> None:
    for name in ("a", "a/b.json", "..a", "ä b:c", "a..b/c"):
        check_content_name(name)


def test_run_facts_that_are_not_json_are_rejected(store: Store) -> None:
    with pytest.raises(TypeError):
        store.begin("key", {"a": object()})
    assert store.runs() == []
    assert not list((store.folder / "locks").glob("2*"))


def test_run_facts_round_trip(store: Store) -> None:
    about = {"a": 1 / 3, "b": [1, None, True, "x"], "c": {"d": 2**70}}
    with store.begin("key", about):
        pass
    assert json.dumps(dict(store.runs()[0].about)) == json.dumps(about)


def test_notes_are_stored_and_overwritten(store: Store) -> None:
    assert store.note("device") is None
    store.take_note("device", "cuda")
    store.take_note("device", "cpu\udc80")
    store.take_note("other\udc80", "")
    assert (store.note("device"), store.note("other\udc80")) == ("cpu\udc80", "")


def test_existing_folders_are_synced_once(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process may have created a folder without syncing its parent."""
    folder = memory / "a" / "store"
    for name in range(256):
        (folder / "blobs" / f"{name:02x}").mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr("mechdsl.store.files.sync_folder", synced.append)
    with Store(folder) as store, store.begin("key", {}) as run:
        run.keep(block({ONE: {1: 1.0}}))
        [path] = (folder / "blobs").glob("*/*")
        assert {path.parent, folder / "blobs", folder, folder.parent} <= set(synced)
        synced.clear()
        run.keep(block({ONE: {1: 1.0}}))
        assert synced == [path.parent], "once"


def test_created_parent_folders_are_synced(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("mechdsl.store.files.sync_folder", synced.append)
    Store(memory / "a" / "b" / "store").close()
    assert synced[:3] == [memory, memory / "a", memory / "a" / "b"]


# --- locks ----------------------------------------------------------------------------------------


def test_exclusive_lock_is_taken_once(memory: Path) -> None:
    path = memory / "lock"
    lock = take_lock(path)
    assert lock is not None
    assert is_held(path)
    assert take_lock(path) is None
    assert take_lock(path, shared=True) is None
    lock.free()
    lock.free(remove=True)
    assert path.exists()
    assert not is_held(path)
    shared = [take_lock(path, shared=True) for _ in range(2)]
    assert None not in shared
    assert take_lock(path) is None


def test_lock_is_retried_if_its_file_was_removed(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder may remove the file between its opening and its locking."""
    path = memory / "lock"
    held = take_lock(path)
    assert held is not None
    opened = os.open
    calls: list[object] = []

    def open_and_remove(*given: object) -> int:
        handle = opened(*given)  # type: ignore[arg-type]
        calls.append(given)
        if len(calls) == 1:
            held.free(remove=True)
        return handle

    monkeypatch.setattr("mechdsl.store.files.os.open", open_and_remove)
    lock = take_lock(path)
    assert isinstance(lock, FileLock)
    assert len(calls) == 2
    assert os.path.samestat(path.stat(), os.fstat(lock._handle or -1))
    assert is_held(path)
