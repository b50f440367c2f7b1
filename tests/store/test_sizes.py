"""The size limit of a store, and the removal of old data beyond it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mechdsl.store import runs
from mechdsl.store import store as store_module
from mechdsl.store.files import INDEX_NAME, StoreProblem, is_held
from mechdsl.store.store import DEFAULT_SIZE_LIMIT, Store, size_limit
from tests.store.support import block, cells, values_of

CELLS = cells(20)
DAY = 86_400.0


class Clock:
    """The time that a store sees."""

    def __init__(self) -> None:
        self.now = 1_795_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (store_module, runs, store_module):
        monkeypatch.setattr(module.time, "time", clock.time)
    return clock


def keep(store: Store, number: int, content: int = 0, key: str = "key") -> str:
    """Store one cell in a run that finishes with `content` bytes; return the run's id."""
    with store.begin(f"{key} {number}", {"number": number}) as run:
        run.keep(block({CELLS[number]: {row: float(number) for row in range(10)}}))
        run.finish({"file": bytes([number]) * content} if content else {}, {})
        return run.id


def there(store: Store) -> list[int]:
    """Return the cells that a new run finds."""
    with store.begin("look", {}, fresh=False) as run:
        found = values_of(run.earlier(CELLS))
        run.finish({}, {})
    for number, cell in enumerate(CELLS):
        assert found.get(cell) in (None, {row: (float(number),) for row in range(10)})
    return [number for number, cell in enumerate(CELLS) if cell in found]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", DEFAULT_SIZE_LIMIT),
        ("20GB", 20_000_000_000),
        ("500 mb", 500_000_000),
        ("1.5k", 1_500),
        ("2TB", 2_000_000_000_000),
        ("123", 123),
        ("0", 0),
    ],
)
def test_size_limit_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    monkeypatch.setenv("MECHDSL_STORE_LIMIT", text)
    assert size_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "1e9", "20GiB", "GB", "nan", "1.GB"])
def test_invalid_size_limit_is_rejected(
    memory: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The error precedes the creation of the store."""
    monkeypatch.setenv("MECHDSL_STORE_LIMIT", text)
    with pytest.raises(StoreProblem, match=f"MECHDSL_STORE_LIMIT is `{text}`.*20GB"):
        Store(memory / "store")
    assert not (memory / "store").exists()


def test_store_size_equals_the_size_of_its_files(store: Store) -> None:
    keep(store, 1, content=5_000)
    du = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    assert store.size() == du > 5_000


def test_gc_removes_the_least_recently_used_values_first(store: Store, clock: Clock) -> None:
    for number in range(6):
        keep(store, number)
        clock.now += 2 * DAY
    with store.begin("use", {}) as run:
        run.earlier([CELLS[0], CELLS[2]])
        run.finish({}, {})
    clock.now += 2 * DAY
    each = store.gc().left // 6
    swept = store.gc(4 * each)
    assert (swept.blocks, swept.files, swept.bytes, swept.left) == (2, 2, 2 * each, 4 * each)
    assert there(store) == [0, 2, 4, 5]
    assert store.gc(4 * each).blocks == 0
    assert store.gc(4 * each - 1).blocks == 1
    assert store.gc(0).left == 0
    assert there(store) == []


def test_use_of_values_is_recorded_once_a_day(store: Store, clock: Clock) -> None:
    def used() -> list[float]:
        blocks = store._index.ask((float,), "SELECT used FROM blocks")
        return [time for (time,) in blocks]

    keep(store, 0)
    began = clock.now
    clock.now += DAY / 2
    there(store)
    assert used() == [began]
    clock.now += DAY
    there(store)
    assert used() == [clock.now]
    clock.now -= 10 * DAY  # the clock was wrong
    there(store)
    assert used() == [clock.now]


def test_recently_read_run_is_removed_last(store: Store, clock: Clock) -> None:
    ids = []
    for number in range(3):
        ids.append(keep(store, number, content=10_000))
        clock.now += 2 * DAY
    first = store.finished("key 0")
    assert first is not None
    store.content(first)
    store.gc(15_000)
    assert [run.id for run in store.runs()] == [ids[0]]
    assert store.content(first) == {"file": bytes(10_000)}
    assert store.finished("key 1") is None


def test_content_shared_by_two_runs_is_removed_with_the_last(store: Store, clock: Clock) -> None:
    for _ in range(2):
        with store.begin("same", {}, fresh=True) as run:
            run.finish({"file": b"a" * 1_000}, {})
        clock.now += DAY
    assert store.gc().left == 1_000
    store.remove(store.runs()[0])
    assert store.gc().left == 1_000
    swept = store.gc(999)
    assert (swept.runs, swept.left) == (1, 0)


def test_gc_spares_running_runs(store: Store, clock: Clock) -> None:
    keep(store, 0)
    with store.begin("goes on", {}) as run, Store(store.folder) as other:
        run.keep(block({CELLS[1]: dict.fromkeys(range(10), 1.0)}))
        clock.now += 100 * DAY
        swept = other.gc(0)
        assert (swept.blocks, swept.runs) == (1, 1)
        assert list(run.own(CELLS)) == [CELLS[1]]
        run.finish({"a": b"a"}, {})
    assert there(store) == [1]
    assert store.finished("goes on") is not None


def test_finishing_a_run_removes_the_oldest_runs_over_the_limit(
    memory: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A finishing run never removes its own data."""
    monkeypatch.setenv("MECHDSL_STORE_LIMIT", "5kB")
    with Store(memory / "store") as store:
        for number in range(8):
            keep(store, number, content=1_000)
            clock.now += DAY
        kept = [run.about["number"] for run in store.runs()]
        assert kept in ([7, 6, 5], [7, 6])
        assert sum(path.stat().st_size for path in (store.folder / "blobs").glob("*/*")) <= 5_000
        keep(store, 9, content=20_000)
        assert [run.about["number"] for run in store.runs()] == [9]
        assert store.finished("key 9") is not None
        assert there(store) == [9]


def test_size_limit_counts_values_without_content(
    memory: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("MECHDSL_STORE_LIMIT", "2kB")
    with Store(memory / "store") as store:
        for number in range(8):
            keep(store, number)
            clock.now += DAY
        assert sum(path.stat().st_size for path in (store.folder / "blobs").glob("*/*")) <= 2_000
        assert 7 in there(store)


def test_store_below_the_limit_is_not_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "sweep", lambda *_: pytest.fail("swept"))
    keep(store, 1, content=100_000)


def test_failed_sweep_leaves_the_run_finished(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setenv("MECHDSL_STORE_LIMIT", "1")
    monkeypatch.setattr(store_module, "sweep", full)
    with Store(memory / "store") as store:
        id = keep(store, 1, content=100)
        assert store.finished("key 1") is not None
        assert not is_held(store.folder / "locks" / id)


def test_gc_removes_old_unfinished_runs_and_keeps_their_values(store: Store, clock: Clock) -> None:
    for key in ("old", "resumed", "goes on"):
        with store.begin(key, {}) as run:
            run.keep(block({CELLS[3]: dict.fromkeys(range(10), 3.0)}))
    clock.now += 20 * DAY
    with store.begin("resumed", {}), store.begin("goes on", {}) as run:
        clock.now += 5 * DAY
    clock.now += 6 * DAY
    swept = store.gc()
    assert (swept.runs, swept.blocks) == (1, 0)
    assert sorted(run.key for run in store.runs()) == ["goes on", "resumed"]
    with store.begin("goes on", {}) as run:
        clock.now += 60 * DAY
        assert store.gc().runs == 1
        assert [run.key for run in store.runs()] == ["goes on"]
        assert run.own(CELLS)
    assert len(list((store.folder / "locks").iterdir())) == 2
    assert there(store) == [3], "values stay"


def test_gc_removes_old_leftover_files(store: Store, clock: Clock) -> None:
    keep(store, 1, content=10)
    aside, blobs = store.folder / "new", store.folder / "blobs"
    (aside / "1-old").write_bytes(b"12345")
    (aside / "1-young").write_bytes(b"12345")
    os.utime(aside / "1-old", (clock.now - 3_700, clock.now - 3_700))
    os.utime(aside / "1-young", (clock.now - 3_500, clock.now - 3_500))
    (blobs / "ab").mkdir(exist_ok=True)
    (blobs / "ab" / f"ab{'0' * 62}.safetensors").write_bytes(b"123")
    (store.folder / "locks" / "20200101-000000-aaaa").write_bytes(b"")
    broken = store.folder / f"{INDEX_NAME}.broken-20200101-000000"
    young = store.folder / f"{INDEX_NAME}.broken-20261121-000000"
    for path, days in ((broken, 31), (young, 29)):
        path.write_bytes(b"1234567")
        os.utime(path, (clock.now - days * DAY, clock.now - days * DAY))
    swept = store.gc()
    assert (swept.files, swept.bytes, swept.runs, swept.blocks) == (3, 15, 0, 0)
    assert [path.name for path in aside.iterdir()] == ["1-young"]
    assert [path.name for path in (store.folder / "locks").iterdir()] == ["store"]
    assert (broken.exists(), young.exists()) == (False, True)
    assert there(store) == [1]
    assert store.finished("key 1") is not None


def test_gc_treats_future_times_as_now(store: Store, clock: Clock) -> None:
    """Values used while the clock was ahead don't stay forever."""
    clock.now += 1000 * DAY
    keep(store, 0)
    clock.now -= 1000 * DAY
    keep(store, 1)
    each = store.gc().left // 2
    assert store.gc(each).blocks == 1
    assert there(store) == [1]


def test_gc_removes_index_rows_of_missing_blocks(store: Store) -> None:
    keep(store, 1)
    keep(store, 2)
    [path] = {
        path
        for path in (store.folder / "blobs").glob("*/*.safetensors")
        if CELLS[1] in path.read_bytes()
    }
    path.unlink()
    assert there(store) == [2]
    assert len(store._index.ask((bytes,), "SELECT cell FROM cells")) == 2
    store.gc()
    assert store._index.ask((bytes,), "SELECT cell FROM cells") == [(CELLS[2],)]
