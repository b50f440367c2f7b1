"""Full disks: an OSError, earlier values stay, and the run resumes once there is space."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mechdsl.store.runs import ValueBlock
from mechdsl.store.store import Store
from tests.store.support import cells

LARGE = 2_000
"""Rows of a block: 32 kB."""

[ONE] = cells(1)


def large(number: int) -> ValueBlock:
    rows = np.arange(LARGE, dtype=np.uint64) + np.uint64(number * LARGE)
    return ValueBlock([ONE], np.array([0, LARGE]), rows, rows[:, None] + 0.5)


def whole(store: Store) -> int:
    """Return the number of blocks that a later run finds; assert that they are correct."""
    with store.begin("later", {}) as run:
        found = run.earlier([ONE])
        run.finish({}, {})
    if not found:
        return 0
    rows, values = found[ONE]
    assert np.array_equal(values[:, 0], rows + 0.5)
    assert len(rows) % LARGE == 0
    return len(rows) // LARGE


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(store: Store) -> tuple[int, OSError]:
    """Store blocks until the disk is full; return their number and the error."""
    with store.begin("key", {}) as run:
        for number in range(100):
            try:
                run.keep(large(number))
            except OSError as error:
                return number, error
    raise AssertionError("it wasn't full")


def test_full_disk_keeps_stored_values_and_the_run_resumes(small: Path) -> None:
    with Store(small / "store") as store:
        kept, error = fill(store)
        assert error.errno == errno.ENOSPC
        assert kept > 5
        assert not list((store.folder / "new").iterdir()), "it left a part of what it wrote"
        (small / "more").write_bytes(b"")
        with pytest.raises(OSError, match="No space"):
            (small / "more").write_bytes(bytes(2_000_000))
        (small / "more").unlink()
        with store.begin("key", {}) as run:
            assert run.resumed
            rows, _ = run.own([ONE])[ONE]
            assert len(rows) == kept * LARGE
            with pytest.raises(OSError, match="No space"):
                run.finish({"a": bytes(1_000_000)}, {})
            assert store.finished("key") is None
    subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
    with Store(small / "store") as store, store.begin("key", {}) as run:
        assert run.resumed
        run.keep(large(kept))
        run.finish({"a": bytes(1_000_000)}, {})
        assert whole(store) == kept + 1
        assert store.finished("key") is not None


def test_disk_without_a_free_byte_keeps_stored_values(small: Path) -> None:
    """The index can't be written either."""
    with Store(small / "store") as store, store.begin("key", {}) as run:
        run.keep(large(0))
        run.keep(large(1))
        with (small / "more").open("wb", buffering=0) as file:
            for size in (4096, 512, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        with pytest.raises(OSError, match="No space"):
            run.keep(large(2))
        with pytest.raises(OSError, match=r"No space|full"):
            run.settle({"a": "b" * 100_000})
        assert whole_own(run.own([ONE])) == 2
    with Store(small / "store") as store:  # opening needs no disk space
        (small / "more").unlink()
        assert whole(store) == 2


def whole_own(found: object) -> int:
    rows, values = found[ONE]  # type: ignore[index]
    assert np.array_equal(values[:, 0], rows + 0.5)
    return len(rows) // LARGE


LIMITED = """
import resource, signal, sys
from pathlib import Path
from mechdsl.store.store import Store
from tests.store.test_full_disk import fill, large

folder, most = Path(sys.argv[1]), int(sys.argv[2])
with Store(folder) as store:
    with store.begin("before", {}) as run:
        run.keep(large(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        kept, error = fill(store)
        print(kept, error.errno)
    except OSError as error:
        print(0, error.errno)
"""


@pytest.mark.parametrize("most", [1_000, 20_000, 47_000])
def test_file_size_limit_keeps_stored_values(memory: Path, most: int) -> None:
    """The limit is reached in a blob, or during a transaction of the index."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, str(memory / "store"), str(most)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout.split()
    kept, number = map(int, said)
    assert number in (errno.EFBIG, errno.ENOSPC, errno.EIO)
    with Store(memory / "store") as store:
        assert whole(store) == max(1, kept)
        with store.begin("key", {}) as run:
            run.keep(large(kept))
            run.finish({"a": b"a"}, {})
        assert whole(store) == kept + 1
        assert store.finished("key") is not None


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_failed_system_call_keeps_stored_values(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    with store.begin("key", {}) as run:
        run.keep(large(0))
        before = sorted(path for path in store.folder.rglob("*") if path.suffix == ".safetensors")
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_, **__: (_ for _ in ()).throw(OSError(code, "no")))
            for _ in range(2):
                with pytest.raises(OSError, match="no") as caught:
                    run.keep(large(1))
                assert caught.value.errno == code
                with pytest.raises(OSError, match="no"):
                    run.finish({"a": b"a"}, {})
        left = sorted(path for path in store.folder.rglob("*") if path.suffix == ".safetensors")
        assert left == before
        assert not list((store.folder / "new").iterdir())
        run.keep(large(1))
        run.finish({"a": b"a"}, {})
    assert whole(store) == 2


def test_run_that_cannot_begin_holds_no_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with store.begin("left", {}):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("mechdsl.store.files.Index.writing", full)
        for key in ("new", "left"):
            with pytest.raises(OSError, match="no space"):
                store.begin(key, {})
    assert [run.state for run in store.runs()] == ["unfinished"]
    assert len(list((store.folder / "locks").iterdir())) == 2
    with store.begin("left", {}) as run:
        assert run.resumed


def test_file_size_limit_of_this_process_is_not_altered() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
