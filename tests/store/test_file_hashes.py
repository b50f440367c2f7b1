"""File hashes are computed once, and again after the file changes."""

from __future__ import annotations

import hashlib
import os
import time
from itertools import count
from pathlib import Path

import pytest

from mechdsl.store import files
from mechdsl.store.files import StoreProblem
from mechdsl.store.store import Store


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of files that are read for hashing."""
    read_files: list[str] = []
    opened = open

    def noting(path: bytes, mode: str) -> object:
        read_files.append(os.path.basename(os.fsdecode(path)))
        return opened(path, mode)

    monkeypatch.setattr(files, "open", noting, raising=False)
    # Hashes of files written a moment ago aren't cached, so pretend that a minute has passed.
    monkeypatch.setattr(files.time, "time", lambda began=time.time: began() + 60)
    return read_files


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_file_is_hashed_once(store: Store, tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "a").write_bytes(b"a" * 3_000_000)
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "link").symlink_to("a")
    for _ in range(2):
        assert store.file_hash(tmp_path / "a") == sha(b"a" * 3_000_000)
        assert store.file_hash(tmp_path / "link") == sha(b"a" * 3_000_000)
        assert store.file_hash(tmp_path / "b") == sha(b"b")
    with Store(store.folder) as again:
        assert again.file_hash(tmp_path / "b") == sha(b"b")
    assert read == ["a", "b"]


def test_modified_file_is_hashed_again(store: Store, tmp_path: Path, read: list[str]) -> None:
    """Size and modification time are equal, but the inode's change time differs."""
    file = tmp_path / "a"
    file.write_bytes(b"a")
    before = file.stat()
    assert store.file_hash(file) == sha(b"a")
    time.sleep(0.02)
    file.write_bytes(b"b")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.file_hash(file) == sha(b"b")
    time.sleep(0.02)
    (tmp_path / "new").write_bytes(b"c")
    os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new").replace(file)
    assert store.file_hash(file) == sha(b"c")
    file.write_bytes(b"cc")
    assert store.file_hash(file) == sha(b"cc")
    assert len(read) == 4


def test_hash_of_a_just_written_file_is_not_cached(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written again within the same tick of the file system's clock."""
    file = tmp_path / "a"
    file.write_bytes(b"a")
    stat = files._mark(file.stat())
    monkeypatch.setattr(files, "_mark", lambda _: stat)
    assert store.file_hash(file) == sha(b"a")
    file.write_bytes(b"b")
    assert store.file_hash(file) == sha(b"b")
    os.utime(file, (1.0, 1.0))  # the inode's change time is still recent
    assert store.file_hash(file) == sha(b"b")
    file.write_bytes(b"c")
    os.utime(file, (time.time() + 1e6, time.time() + 1e6))
    monkeypatch.setattr(files.time, "time", lambda began=time.time: began() + 60)
    assert store.file_hash(file) == sha(b"c"), "one of the future isn't either"
    file.write_bytes(b"d")
    assert store.file_hash(file) == sha(b"d")


@pytest.mark.parametrize("changes", [0, 3, 1_000])
def test_file_modified_during_hashing_is_read_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str], changes: int
) -> None:
    """The file is read up to three times before an error."""
    file = tmp_path / "a"
    file.write_bytes(b"a")
    mark = files._mark
    asked = count()
    monkeypatch.setattr(
        files, "_mark", lambda found: f"{asked}" if next(asked) < changes else mark(found)
    )
    if changes == 1_000:
        with pytest.raises(StoreProblem, match="changes while it is read"):
            store.file_hash(file)
    else:
        assert store.file_hash(file) == sha(b"a")
    assert len(read) == {0: 1, 3: 2, 1_000: 3}[changes]


def test_file_replaced_during_hashing_has_the_hash_of_the_new_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"old")
    opened = open

    def replacing(path: bytes, mode: str) -> object:
        handle = opened(path, mode)
        if file.read_bytes() == b"old":
            (tmp_path / "new").write_bytes(b"new")
            (tmp_path / "new").replace(file)
        return handle

    monkeypatch.setattr(files, "open", replacing, raising=False)
    assert store.file_hash(file) == sha(b"new")


def test_recent_file_is_synced_before_its_hash_is_stored(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    """Otherwise a power cut may revert the hashed content, but not the file's times."""
    (tmp_path / "new").write_bytes(b"a")
    (tmp_path / "old").write_bytes(b"a")
    os.utime(tmp_path / "old", (1.0, 1.0))
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or fsync(handle)
    )
    store.file_hash(tmp_path / "new")
    store.file_hash(tmp_path / "old")
    assert (tmp_path / "new").stat().st_ino in synced
    assert (tmp_path / "old").stat().st_ino not in synced


def test_hash_of_a_missing_file_or_a_folder_raises_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.file_hash(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        store.file_hash(tmp_path)
