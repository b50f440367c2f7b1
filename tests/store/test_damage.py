"""Torn, altered or missing blobs and indexes are detected and never used."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from mechdsl.store.files import INDEX_NAME, INDEX_SCHEMA, StoreProblem
from mechdsl.store.runs import pack_values
from mechdsl.store.store import Store
from tests.store import writer
from tests.store.support import block, cells, values_of

ONE, TWO = cells(2)
BLOCKS = 3


def blobs(folder: Path, suffix: str) -> list[Path]:
    return sorted((folder / "blobs").glob(f"*/*{suffix}"))


def flip(path: Path, at: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def written(folder: Path) -> None:
    """A store with two runs: an unfinished one with values, and a finished one."""
    with Store(folder) as store:
        with store.begin("other", {}) as run:
            for number in range(BLOCKS):
                run.keep(writer.block_of(number))
        with store.begin(writer.KEY, {"file": "a.mech"}) as run:
            run.settle(writer.SIZES)
            run.finish(writer.CONTENT, {"done": True})


HARM = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "last bit": lambda path: flip(path, -1, 0x80),
    "gone": lambda path: path.unlink(),
    "another": lambda path: path.write_bytes(pack_values(block({ONE: {1: 99.0}}))),
}


@pytest.mark.parametrize("how", HARM)
def test_damaged_block_is_treated_as_missing(store: Store, how: str) -> None:
    with store.begin("a", {}) as run:
        run.keep(block({ONE: {1: 1.0}, TWO: {1: 2.0}}))
        [first] = blobs(store.folder, ".safetensors")
        run.keep(block({ONE: {1: -1.0, 2: 3.0}}))
    HARM[how](first)
    with store.begin("b", {}) as run:
        assert values_of(run.earlier([ONE, TWO])) == {ONE: {1: (-1.0,), 2: (3.0,)}}
        assert values_of(run.earlier([ONE, TWO])) == {ONE: {1: (-1.0,), 2: (3.0,)}}
        run.keep(block({ONE: {1: 1.0}, TWO: {1: 2.0}}))  # under the same name
        assert values_of(run.own([ONE, TWO])) == {ONE: {1: (1.0,)}, TWO: {1: (2.0,)}}
    with store.begin("c", {}) as run:
        assert values_of(run.earlier([TWO])) == {TWO: {1: (2.0,)}}
    with store.begin("a", {}) as run:
        assert values_of(run.own([ONE, TWO])) == {ONE: {1: (-1.0,), 2: (3.0,)}}


def test_temporarily_unreadable_block_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.begin("a", {}) as run:
        run.keep(block({ONE: {1: 1.0}}))
    with store.begin("b", {}) as run:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError))
            assert not run.earlier([ONE])
        assert values_of(run.earlier([ONE])) == {ONE: {1: (1.0,)}}


@pytest.mark.parametrize("how", HARM)
@pytest.mark.parametrize("which", range(len(writer.CONTENT)))
def test_finished_run_with_damaged_content_is_not_found(memory: Path, how: str, which: int) -> None:
    written(memory / "store")
    HARM[how](blobs(memory / "store", ".data")[which])
    with Store(memory / "store") as store:
        assert store.finished(writer.KEY) is None
        [run, _] = store.runs()
        with pytest.raises(StoreProblem, match="is torn or gone"):
            store.content(run)
        with store.begin(writer.KEY, {}) as again:
            assert not again.resumed
            again.finish(writer.CONTENT, {})
        found = store.finished(writer.KEY)
        assert found is not None
        assert store.content(found) == writer.CONTENT


def test_earlier_run_is_found_if_the_latest_is_torn(store: Store) -> None:
    for content in (b"first", b"second"):
        with store.begin("key", {}) as run:
            run.finish({"file": content}, {})
    latest = store.finished("key")
    assert latest is not None
    assert store.content(latest) == {"file": b"second"}
    for path in blobs(store.folder, ".data"):
        if path.read_bytes() == b"second":
            path.unlink()
    found = store.finished("key")
    assert found is not None
    assert store.content(found) == {"file": b"first"}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE runs SET key = 'another'",
        "UPDATE runs SET about = '{}'",
        "UPDATE contents SET name = 'other' WHERE name = 'results.json'",
        "DELETE FROM contents WHERE name = 'results.json'",
        "UPDATE contents SET hash = (SELECT hash FROM contents WHERE name = 'results.json')",
    ],
)
def test_finished_run_altered_in_the_index_is_not_found(memory: Path, change: str) -> None:
    written(memory / "store")
    with sqlite3.connect(memory / "store" / INDEX_NAME) as index:
        index.execute(change)
    index.close()
    with Store(memory / "store") as store:
        assert store.finished(writer.KEY) is None
        assert store.finished("another") is None


def test_stored_content_name_outside_the_folder_is_rejected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a forged run with valid hashes is rejected."""
    with store.begin("key", {}) as run, monkeypatch.context() as patch:
        patch.setattr("mechdsl.store.runs.check_content_name", lambda _: None)
        run.finish({"../../evil": b""}, {})
    assert store.finished("key") is None
    with pytest.raises(StoreProblem, match="can't be the name of a file"):
        store.content(store.runs()[0])


def test_block_assigned_to_another_cell_in_the_index_is_ignored(store: Store) -> None:
    with store.begin("a", {}) as run:
        run.keep(block({ONE: {1: 1.0}}))
    with sqlite3.connect(store.folder / INDEX_NAME) as index:
        index.execute("UPDATE cells SET cell = ?", (TWO,))
    index.close()
    with store.begin("b", {}) as run:
        assert TWO not in run.earlier([ONE, TWO])
        assert not run.earlier([TWO])


# --- the index ------------------------------------------------------------------------------------


def use(folder: Path) -> str:
    """Read everything from a store and assert that returned values are correct."""
    with Store(folder) as store:
        wanted = writer.cells_of(BLOCKS)
        store.runs()
        store.size()
        store.note("device")
        found = store.finished(writer.KEY)
        if found is not None:
            assert store.content(found) == writer.CONTENT
        with store.begin("later", {}) as run:
            writer.blocks_in(run.earlier(wanted), BLOCKS)
            run.keep(writer.block_of(0))
            run.finish({}, {})
        with store.begin("other", {}) as run:
            writer.blocks_in(run.own(wanted), BLOCKS)
        store.gc(0)
    return "used"


@pytest.mark.parametrize("garbage", [b"garbage", b"garbage" * 10_000, b"\0" * 4096])
def test_invalid_index_is_moved_aside(memory: Path, garbage: bytes) -> None:
    folder = memory / "store"
    written(folder)
    (folder / INDEX_NAME).write_bytes(garbage)
    use(folder)
    [aside] = [path for path in folder.glob(f"{INDEX_NAME}.broken-*") if "journal" not in path.name]
    assert aside.read_bytes() == garbage


def test_damaged_index_in_use_is_not_moved(memory: Path) -> None:
    """SQLite finds its journal by name, so an index in use must not be moved."""
    folder = memory / "store"
    with Store(folder):
        data = (folder / INDEX_NAME).read_bytes()
        (folder / INDEX_NAME).write_bytes(b"garbage")
        with pytest.raises(StoreProblem, match="another process is using it"):
            Store(folder)
        assert not list(folder.glob("*.broken-*"))
        (folder / INDEX_NAME).write_bytes(data)
    (folder / INDEX_NAME).write_bytes(b"garbage")
    with Store(folder) as store:
        assert store.runs() == []


def test_internally_damaged_index_is_replaced_by_the_next_run(memory: Path) -> None:
    """The first run fails with a reason, and the next run starts a new index."""
    folder = memory / "store"
    written(folder)
    size = (folder / INDEX_NAME).stat().st_size
    with (folder / INDEX_NAME).open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(StoreProblem, match="its index is damaged"):
        use(folder)
    assert use(folder) == "used"
    assert list(folder.glob(f"{INDEX_NAME}.broken-*"))
    assert not (folder / f"{INDEX_NAME}.suspect").exists()


DAMAGE = {
    "UPDATE runs SET id = '../../../evil' WHERE key = 'other'": "isn't the id of a run",
    "UPDATE blocks SET hash = 'text'": "wrong type",
    "UPDATE runs SET about = '[]'": "object of JSON",
    "UPDATE runs SET about = '{'": "Expecting",
}


def damaged(folder: Path, change: str) -> None:
    written(folder)
    with sqlite3.connect(folder / INDEX_NAME) as index:
        index.execute(change)
    index.close()


@pytest.mark.parametrize("change", DAMAGE)
def test_damage_undetected_by_sqlite_is_an_error_and_replaces_the_index(
    memory: Path, change: str
) -> None:
    """The first run fails with a reason, and the next run starts a new index."""
    folder = memory / "deep" / "down" / "store"
    damaged(folder, change)
    with Store(folder) as store:
        ask = store.runs if "runs" in change else store.begin("later", {}).earlier
        with pytest.raises(StoreProblem, match=DAMAGE[change]):
            ask(*([] if "runs" in change else [writer.cells_of(BLOCKS)]))
    assert not list(memory.rglob("evil"))
    assert use(folder) == "used"
    assert len(list(folder.glob(f"{INDEX_NAME}.broken-*[0-9]"))) == 1
    with Store(folder) as store:
        assert store.finished(writer.KEY) is None


def test_index_is_replaced_after_the_second_undiagnosed_failure(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The integrity check finds nothing, but the index is replaced after the second failure."""
    folder = memory / "store"
    damaged(folder, "UPDATE blocks SET hash = 'text'")
    monkeypatch.setattr("mechdsl.store.files.Index._look_through", lambda _: None)
    for _ in range(2):
        with pytest.raises(StoreProblem, match="wrong type"):
            use(folder)
        assert not list(folder.glob("*.broken-*"))
    assert use(folder) == "used"
    assert list(folder.glob("*.broken-*"))


def test_suspect_index_without_damage_is_kept(memory: Path) -> None:
    folder = memory / "store"
    written(folder)
    (folder / f"{INDEX_NAME}.suspect").write_text("new")
    with Store(folder) as store:
        assert store.finished(writer.KEY) is not None
    assert not list(folder.glob("*.broken-*"))


def damage_at_random(folder: Path, seed: int) -> str:
    draw = random.Random(seed)
    index = folder / INDEX_NAME
    for _ in range(draw.choice([1, 1, 3, 30])):
        flip(index, draw.randrange(index.stat().st_size), 1 << draw.randrange(8))
    said = ""
    for _ in range(4):
        try:
            said += use(folder)
        except (StoreProblem, OSError) as problem:
            if "newer version" in str(problem):  # the index is kept as it is
                return "used"
            said += type(problem).__name__
    return said


def sweep_damage(memory: Path, seeds: range) -> set[str]:
    written(memory / "store")
    said: set[str] = set()
    for seed in seeds:
        shutil.copytree(memory / "store", memory / "copy")
        said.add(damage_at_random(memory / "copy", seed))
        shutil.rmtree(memory / "copy")
    return said


def test_flipped_index_bits_raise_only_store_errors(memory: Path) -> None:
    """Each use gives correct values or a store error, and the fourth use succeeds."""
    said = sweep_damage(memory, range(30))
    assert "used" * 4 in said
    assert len(said) > 1
    assert all(each.endswith("used") for each in said), said


@pytest.mark.slow
def test_many_flipped_index_bits_raise_only_store_errors(memory: Path) -> None:
    said = sweep_damage(memory, range(1000, 3000))
    assert all(each.endswith("used") for each in said), said


def test_index_of_a_newer_version_is_rejected(memory: Path) -> None:
    folder = memory / "store"
    written(folder)
    with sqlite3.connect(folder / INDEX_NAME) as index:
        index.execute(f"PRAGMA user_version = {INDEX_SCHEMA + 1}")
    index.close()
    before = (folder / INDEX_NAME).read_bytes()
    with pytest.raises(StoreProblem, match="newer version of mechdsl: its format is 2"):
        Store(folder)
    assert (folder / INDEX_NAME).read_bytes() == before
    assert not list(folder.glob("*.broken-*"))


def test_database_of_another_program_is_rejected(memory: Path) -> None:
    folder = memory / "store"
    folder.mkdir()
    with sqlite3.connect(folder / INDEX_NAME) as index:
        index.execute("CREATE TABLE holidays(day TEXT)")
    index.close()
    with pytest.raises(StoreProblem, match="a database of another program"):
        Store(folder)
    with sqlite3.connect(folder / INDEX_NAME) as index:
        index.execute("SELECT day FROM holidays")
    index.close()


def test_file_as_store_is_rejected(memory: Path) -> None:
    (memory / "Store").write_text("a")
    with pytest.raises(StoreProblem, match="it is a file, not a folder"):
        Store(memory / "Store")
    with pytest.raises(StoreProblem, match="/Store` is a file, not a folder"):
        Store(memory / "Store" / "below")


def test_folder_with_other_files_is_rejected_as_store(memory: Path) -> None:
    """`--store ""` is the working folder."""
    (memory / "thesis.tex").write_text("years")
    with pytest.raises(StoreProblem, match="a folder with other files, and no store"):
        Store(memory)
    assert [path.name for path in memory.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "name", ["blobs", "locks", ".gitignore", ".mechdsl-12-34", f"{INDEX_NAME}.broken-1"]
)
def test_partially_created_store_is_completed(memory: Path, name: str) -> None:
    """A process may be killed after creating any of these names."""
    folder = memory / "store"
    folder.mkdir()
    (folder / name).mkdir() if name in ("blobs", "locks") else (folder / name).touch()
    written(folder)
    (folder / "notes.txt").write_text("mine")  # foreign files are allowed next to an index
    Store(folder).close()


def test_copied_store_is_complete(memory: Path) -> None:
    """A store depends on no paths or locks, even with an unfinished run."""
    written(memory / "store")
    shutil.copytree(memory / "store", memory / "elsewhere")
    shutil.rmtree(memory / "store")
    with Store(memory / "elsewhere") as store:
        found = store.finished(writer.KEY)
        assert found is not None
        assert store.content(found) == writer.CONTENT
        with store.begin("other", {}) as run:
            assert run.resumed
            assert writer.blocks_in(run.own(writer.cells_of(BLOCKS)), BLOCKS) == {0, 1, 2}
