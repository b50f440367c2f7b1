"""A read-only store is readable, and none of its bytes change."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mechdsl.store.files import INDEX_NAME, StoreProblem
from mechdsl.store.store import Store
from tests.store import writer

NOBODY = 65534
BLOCKS = 3


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root rights, since no file is read-only for root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(params=["rights", "mount"])
def read_only(memory: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Yield a folder with a store; `closed` makes the folder read-only."""
    memory.chmod(0o755)
    folder = memory / "place"
    folder.mkdir()
    with Store(folder / "store") as store:
        with store.begin("other", {}) as run:
            for number in range(BLOCKS):
                run.keep(writer.block_of(number))
        with store.begin(writer.KEY, {"file": "a.mech"}) as run:
            run.finish(writer.CONTENT, {})
        with store.begin(writer.KEY, {}) as run:
            run.settle(writer.SIZES)
            run.keep(writer.block_of(BLOCKS))
        store.take_note("device", "cpu")
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True)
    subprocess.run(["chmod", "-R", "u+w", str(folder)], check=True)


@contextmanager
def closed(folder: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Make the folder read-only within the context."""
    if request.node.callspec.params["read_only"] == "rights":
        subprocess.run(["chmod", "-R", "a-w,a+rX", str(folder)], check=True)
        with as_nobody():
            yield
        return
    for options in ("bind", "remount,bind,ro"):
        command = ["mount", "-o", options, str(folder), str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no folder can be mounted")
    yield


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


def read_all(store: Store) -> None:
    assert not store.writable
    found = store.finished(writer.KEY)
    assert found is not None
    assert store.content(found) == writer.CONTENT
    assert [run.state for run in store.runs()] == ["unfinished", "finished", "unfinished"]
    assert store.note("device") == "cpu"
    with store.begin(writer.KEY, {}) as run:
        assert (run.id, run.resumed, run.sizes) == ("", True, writer.SIZES)
        wanted = writer.cells_of(BLOCKS + 2)
        for _ in ("before writing", "after writing"):
            assert writer.blocks_in(run.earlier(wanted), BLOCKS + 2) == set(range(BLOCKS))
            assert writer.blocks_in(run.own(wanted), BLOCKS + 2) == {BLOCKS}
            run.settle(writer.SIZES)
            run.keep(writer.block_of(BLOCKS + 1))
        assert run.sizes == writer.SIZES
        with pytest.raises(ValueError, match="can't be the name"):
            run.finish({"../a": b""}, {})
        run.finish(writer.CONTENT, {})
    with store.begin(writer.KEY, {}, fresh=True) as run:
        assert (run.resumed, run.sizes) == (False, None)
        assert not run.earlier(wanted)
    with store.begin("other key", {}) as run:
        assert (run.resumed, run.sizes) == (False, None)
        assert writer.blocks_in(run.earlier(wanted), BLOCKS + 2) == set(range(BLOCKS + 1))


def test_read_only_store_is_read_without_modification(
    read_only: Path, request: pytest.FixtureRequest
) -> None:
    before = snapshot(read_only)
    with closed(read_only, request), Store(read_only / "store") as store:
        read_all(store)
        store.take_note("device", "cuda")
        assert store.note("device") == "cpu"
        file = read_only / "store" / ".gitignore"
        assert len(store.file_hash(file)) == 64
        for change in (store.gc, lambda: store.remove(store.runs()[0])):
            with pytest.raises(StoreProblem, match="it can only be read"):
                change()
    assert snapshot(read_only) == before


def test_torn_block_in_a_read_only_store_is_ignored_and_kept(
    read_only: Path, request: pytest.FixtureRequest
) -> None:
    [first, *_] = sorted((read_only / "store" / "blobs").glob("*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    before = snapshot(read_only)
    with closed(read_only, request), Store(read_only / "store") as store:
        with store.begin("key", {}) as run:
            found = run.earlier(writer.cells_of(BLOCKS))
        assert len(writer.blocks_in(found, BLOCKS)) == BLOCKS - 1
    assert snapshot(read_only) == before


def test_interrupted_transaction_in_a_read_only_store_is_not_visible(
    read_only: Path, request: pytest.FixtureRequest
) -> None:
    """The journal can't be rolled back in a read-only folder."""
    index = read_only / "store" / INDEX_NAME
    connection = sqlite3.connect(index, isolation_level=None)
    for line in ("journal_mode = PERSIST", "cache_size = 1", "cache_spill = 1"):
        connection.execute(f"PRAGMA {line}")
    connection.execute("BEGIN")
    connection.execute("DELETE FROM cells")
    connection.execute("DELETE FROM blocks")
    connection.execute("UPDATE runs SET key = 'gone'")
    for number in range(3000):
        connection.execute("INSERT INTO notes VALUES (?, ?)", (b"%d" % number, bytes(1000)))
    ends = ("", "-journal")
    data = {end: Path(f"{index}{end}").read_bytes() for end in ends}
    connection.execute("ROLLBACK")
    connection.close()
    assert data["-journal"][:8] == bytes.fromhex("d9d505f920a163d7"), "not a hot journal"
    for end in ends:
        Path(f"{index}{end}").write_bytes(data[end])
    before = snapshot(read_only)
    with closed(read_only, request), Store(read_only / "store") as store:
        read_all(store)
    assert snapshot(read_only) == before
    assert not (read_only / "store" / f"{INDEX_NAME}.suspect").exists()
    with Store(read_only / "store") as store:
        assert (
            store.writable == (request.node.callspec.params["read_only"] == "rights")
            or os.geteuid() != 0
        )


@pytest.mark.parametrize("content", [None, b""])
def test_missing_store_in_a_read_only_folder_reads_as_empty(
    read_only: Path, request: pytest.FixtureRequest, content: bytes | None
) -> None:
    """No folder can be created, or the existing folder has no complete store."""
    (read_only / "empty").mkdir()
    if content is not None:
        (read_only / "empty" / INDEX_NAME).write_bytes(content)
    with closed(read_only, request):
        for folder in ("empty", "nowhere"):
            with Store(read_only / folder) as store:
                assert not store.writable
                assert store.runs() == []
                assert store.finished("key") is None
                with store.begin("key", {}) as run:
                    assert not run.earlier(writer.cells_of(1))
                    run.finish({}, {})
            assert not (read_only / "nowhere").exists()


def test_damaged_index_in_a_read_only_store_is_an_error(
    read_only: Path, request: pytest.FixtureRequest
) -> None:
    (read_only / "store" / INDEX_NAME).write_bytes(b"garbage" * 1000)
    with (
        closed(read_only, request),
        pytest.raises(StoreProblem, match="its index is damaged, and it can't be written to"),
    ):
        Store(read_only / "store")


def test_store_with_a_read_only_index_is_read_only(memory: Path) -> None:
    """The folder is writable, but the index belongs to another user."""
    memory.chmod(0o755)
    folder = memory / "store"
    with Store(folder) as store, store.begin("key", {}):
        pass
    subprocess.run(["chmod", "-R", "a+rwX", str(folder)], check=True)
    (folder / INDEX_NAME).chmod(0o444)
    with as_nobody(), Store(folder) as store:
        assert not store.writable
        assert len(store.runs()) == 1
        with store.begin("key", {}) as run:
            assert run.id == ""


def test_unreadable_store_folder_is_an_error(memory: Path) -> None:
    memory.chmod(0o755)
    (memory / "private").mkdir(mode=0o700)
    with as_nobody(), pytest.raises(StoreProblem, match="permission denied"):
        Store(memory / "private" / "store")
