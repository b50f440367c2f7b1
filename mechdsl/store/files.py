"""Files of the store: durable writes, content-addressed blobs, large tensor files and locks; its
SQLite index, and cached hashes of large files.

The system releases a lock whenever its process ends, for any reason.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias, cast

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if sys.platform == "darwin":

    def sync(handle: int) -> None:
        """Make an open file durable; fsync would leave data in the drive's cache."""
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)

else:

    def sync(handle: int) -> None:
        """Make an open file durable."""
        os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in a folder durable. Not needed on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably. Raises OSError."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    if not folder.is_dir():
        raise FileExistsError(f"`{folder}` is a file, not a folder")
    sync_folder(folder.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file whose bytes, but not yet its name, are durable. OSError leaves no file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            sync(handle)
        finally:
            os.close(handle)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


VALUES_SUFFIX = ".safetensors"

CONTENT_SUFFIX = ".data"


@dataclass(frozen=True)
class StagedBlob:
    """Bytes that are durable in a temporary file, and not yet available under their hash."""

    hash: bytes
    """SHA-256."""
    size: int
    at: Path
    suffix: str


class Blobs:
    """The blobs of a store: `blobs/ab/abcd….safetensors`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "blobs"
        self.aside = folder / "new"
        """Folder of files that don't have their final names yet."""
        self._durable: set[Path] = set()
        """Folders whose names this process has synced: their creators may not have done so."""

    def stage(self, data: bytes, suffix: str) -> StagedBlob:
        """Write bytes to a temporary file. Raises OSError."""
        make_folder(self.aside)
        at = self.aside / f"{os.getpid()}-{secrets.token_hex(8)}"
        write_synced(at, data)
        return StagedBlob(hashlib.sha256(data).digest(), len(data), at, suffix)

    def place(self, staged: list[StagedBlob]) -> None:
        """Move files to their final names durably. Raises OSError.

        An existing file is replaced, because it may be incomplete.
        """
        folders: set[Path] = set()
        for blob in staged:
            path = self.path(blob.hash, blob.suffix)
            self._make_durable(path.parent)
            blob.at.replace(path)
            folders.add(path.parent)
        for folder in folders:
            sync_folder(folder)

    def _make_durable(self, folder: Path) -> None:
        if folder not in self._durable:
            make_folder(folder)
            if folder != self.folder.parent:
                self._make_durable(folder.parent)
            sync_folder(folder.parent)
            self._durable.add(folder)

    def drop(self, staged: list[StagedBlob]) -> None:
        """Remove files that didn't get their final names."""
        for blob in staged:
            with suppress(OSError):
                blob.at.unlink()

    def path(self, hash: bytes, suffix: str) -> Path:
        name = hash.hex()
        return self.folder / name[:2] / (name + suffix)

    def read(self, hash: bytes, suffix: str) -> bytes | None:
        """Return the bytes; None if they are missing or don't match the hash. Raises OSError."""
        try:
            data = self.path(hash, suffix).read_bytes()
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).digest() == hash else None

    def files(self) -> Iterator[os.DirEntry[str]]:
        """Yield everything in the folders of blobs."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir(follow_symlinks=False):
                    with os.scandir(folder) as files:
                        yield from files

    def leftovers(self) -> Iterator[os.DirEntry[str]]:
        """Yield temporary files, of active writers and of interrupted ones."""
        with suppress(FileNotFoundError), os.scandir(self.aside) as files:
            yield from files


TENSOR_TYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""Bytes per number, by the format's name of the type."""

_ALIGNED = 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file."""

    kind: str
    """A key of `TENSOR_TYPE_BYTES`."""
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of one row."""
        size = TENSOR_TYPE_BYTES[self.kind]
        for length in self.shape[1:]:
            size *= length
        return size

    @property
    def size(self) -> int:
        return self.shape[0] * self.row


class TensorFile:
    """A file of tensors with known sizes, written in blocks of rows."""

    def __init__(
        self, handle: int, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]
    ) -> None:
        self._handle = handle
        self._tensors = tensors
        self._begins: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        at = 0
        for name, tensor in tensors.items():
            self._begins[name] = at
            header[name] = {
                "dtype": tensor.kind,
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.size],
            }
            at += tensor.size
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._data = 8 + len(text)
        self.size = self._data + at
        _room(handle, self.size)
        _write(handle, len(text).to_bytes(8, "little") + text, 0)

    def put(self, name: str, row: int, data: bytes | memoryview) -> None:
        """Write rows of a tensor, from `row` on."""
        tensor = self._tensors[name]
        begin = row * tensor.row
        if begin + len(data) > tensor.size or len(data) % tensor.row:
            raise ValueError(f"these aren't rows of `{name}`")
        _write(self._handle, data, self._data + self._begins[name] + begin)


def _room(handle: int, size: int) -> None:
    """Reserve disk space if the system supports it. Raises OSError if there isn't enough."""
    if hasattr(os, "posix_fallocate"):
        with _where_unsupported():
            os.posix_fallocate(handle, 0, size)
            return
    os.ftruncate(handle, size)


@contextmanager
def _where_unsupported() -> Generator[None]:
    """Ignore errors of file systems that can't reserve space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write(handle: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data).cast("B")
    os.lseek(handle, at, os.SEEK_SET)
    while left:
        left = left[os.write(handle, left) :]


@contextmanager
def write_aside(path: Path) -> Generator[Path]:
    """Yield a temporary path whose file replaces `path` at the end, or is removed after an error or
    an interrupt."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def create_tensor_file(
    path: Path, tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> Generator[TensorFile]:
    """Create a safetensors file. Raises OSError if there is no space for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    try:
        yield TensorFile(handle, tensors, metadata)
        sync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a written file durable."""
    with path.open("rb+") as file:
        sync(file.fileno())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a new text file durably."""
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{line}\n")
        file.flush()
        sync(file.fileno())


# --- locks ----------------------------------------------------------------------------------------

STORE_LOCK = "store"
"""The lock that all users of a store share; other locks have the names of their runs."""

_LOCK_TRIES = 5

_PAUSE = 0.01
"""Seconds. A check whether a run is active holds its lock for a moment."""


class FileLock:
    """A lock that this process holds, exclusively or shared."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle

    def free(self, *, remove: bool = False) -> None:
        """Release the lock, and remove its file if `remove` is set; repeated calls do nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if remove and os.name != "nt":  # before the release, so that no other process locks it
            self.path.unlink(missing_ok=True)
        os.close(handle)
        if remove and os.name == "nt":
            self.path.unlink(missing_ok=True)


def take_lock(path: Path, *, shared: bool = False) -> FileLock | None:
    """Take the lock of a file, which is created if missing; None if another process holds it.

    shared: allow other holders that share it. Raises OSError if the file can't be created or
    locked.
    """
    for attempt in range(_LOCK_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(handle, shared) and _is_at(handle, path):
                return FileLock(path, handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def is_held(path: Path) -> bool:
    """Return whether any process holds a lock, as far as is detectable."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _lock(handle, shared=False)
    except OSError:
        return False
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether the open file is still at its path: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":

    def _lock(handle: int, shared: bool) -> bool:
        if shared:  # open files can't be moved on Windows, so no shared lock is needed
            return True
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _lock(handle: int, shared: bool) -> bool:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class StoreProblem(Exception):
    """The store can't be used; the text is the reason, in lower case."""


INDEX_NAME = "index.sqlite"

INDEX_SCHEMA = 1
"""Increased if an older version couldn't read the new format, or would read it incorrectly."""

APPLICATION_ID = 0x6D656368
"""SQLite's `application_id`."""

WRITE_TIMEOUT = 60.0
"""Seconds to wait for another process that is writing."""

_TABLES = f"""
CREATE TABLE blocks(
  seq INTEGER PRIMARY KEY AUTOINCREMENT, hash BLOB NOT NULL, size INTEGER NOT NULL,
  run INTEGER NOT NULL, fresh INTEGER NOT NULL, used REAL NOT NULL);
CREATE TABLE cells(
  cell BLOB NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (cell, seq)) WITHOUT ROWID;
CREATE TABLE runs(
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL,
  baseline INTEGER NOT NULL, fresh INTEGER NOT NULL, began REAL NOT NULL, ended REAL,
  used REAL NOT NULL, about TEXT NOT NULL, sizes TEXT, seal BLOB);
CREATE INDEX runs_key ON runs(key, number);
CREATE TABLE contents(
  run INTEGER NOT NULL, name TEXT NOT NULL, hash BLOB NOT NULL, size INTEGER NOT NULL,
  PRIMARY KEY (run, name)) WITHOUT ROWID;
CREATE TABLE files(path BLOB PRIMARY KEY, stat TEXT NOT NULL, hash TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE notes(key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE kept(bytes INTEGER NOT NULL);
INSERT INTO kept VALUES (0);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {INDEX_SCHEMA};
"""

_DISK = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
}

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}

ColumnTypes: TypeAlias = tuple[type | tuple[type, ...], ...]
"""Types of the columns of a query: SQLite doesn't enforce them for a damaged file."""

MAYBE_TEXT = (str, NoneType)

MAYBE_BYTES = (bytes, NoneType)

MAYBE_TIME = (float, NoneType)

_COLUMNS: dict[str, ColumnTypes] = {
    "blocks": (int, bytes, int, int, int, float),
    "cells": (bytes, int),
    "runs": (int, str, str, int, int, float, MAYBE_TIME, float, str, MAYBE_TEXT, MAYBE_BYTES),
    "contents": (int, str, bytes, int),
    "files": (bytes, str, str),
    "notes": (bytes, bytes),
    "kept": (int,),
}

_NEW, _LOOKED, _AGAIN = "new", "looked through", "again"
"""States of the file that records damage."""

_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")


class DamagedIndex(StoreProblem):
    """The file isn't a valid index any more."""


@contextmanager
def _translated() -> Generator[None]:
    """Convert SQLite's errors: OSError for disk or permission problems, else StoreProblem.

    Queries are known to be correct, so all other errors mean that the file is damaged.
    """
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except UnicodeDecodeError as error:
        raise DamagedIndex(f"its index is damaged: {error}") from error
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if kind in _DISK:
            raise OSError(
                _DISK[kind], f"{os.strerror(_DISK[kind])} ({error})", INDEX_NAME
            ) from error
        if kind in _BUSY:
            raise StoreProblem(
                f"another process has held its index for {WRITE_TIMEOUT:.0f} s"
            ) from error
        raise DamagedIndex(f"its index is damaged: {error}") from error


class Index:
    """A connection to the index, for all threads of a process."""

    def __init__(self, folder: Path, *, writable: bool) -> None:
        """Open the index, or create it if it is missing and `writable` is set.

        Raises:
            StoreProblem: The index can't be used; DamagedIndex if it is damaged.
            OSError: The index can't be created.
        """
        self._lock = threading.RLock()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._suspect = folder / f"{INDEX_NAME}.suspect"
        path = folder / INDEX_NAME
        try:
            with _translated():
                if writable:
                    self._connect(str(path))
                    self._prepare()
                else:
                    self._open_to_read(path)
                self._check_version()
        except BaseException:
            self.close()
            raise

    def _connect(self, name: str, *, uri: bool = False) -> None:
        self._connection = sqlite3.connect(
            name, timeout=WRITE_TIMEOUT, isolation_level=None, check_same_thread=False, uri=uri
        )

    def _prepare(self) -> None:
        """Configure the connection, check suspected damage, and create the tables of a new file.

        The rollback journal is overwritten, not removed, so that readers need no file next to the
        index. The end of a transaction is synced.
        """
        for line in (
            "trusted_schema = OFF",
            "journal_mode = PERSIST",
            "journal_size_limit = 4000000",
            "synchronous = EXTRA",
            "fullfsync = ON",
            "temp_store = MEMORY",
            "cache_size = -32000",
        ):
            self._connection.execute(f"PRAGMA {line}").fetchall()
        suspected = self._suspicion()
        if suspected == _AGAIN:
            raise DamagedIndex("its index is damaged")
        if suspected == _NEW:
            self._look_through()
            self._suspect.write_text(_LOOKED, encoding="ascii")
        if self._version() == (0, 0):
            self._make_tables()

    def _look_through(self) -> None:
        """Raise DamagedIndex if any content is detectably damaged."""
        [(said,)] = self._connection.execute("PRAGMA integrity_check(1)").fetchall()
        if said != "ok":
            raise DamagedIndex(f"its index is damaged: {said}")
        for table, kinds in _COLUMNS.items():
            self.ask(kinds, f"SELECT * FROM {table}")
        query = "SELECT id, about, sizes FROM runs"
        for id, about, sizes in self.ask((str, str, MAYBE_TEXT), query):
            self.check_id(id)
            self.read_json(about)
            self.read_json(sizes or "{}")

    def _suspicion(self) -> str:
        try:
            return self._suspect.read_text(encoding="ascii", errors="replace")
        except OSError:
            return ""

    def _make_tables(self) -> None:
        with self.writing():
            if self._version() == (0, 0):  # otherwise another process created them first
                for line in filter(str.strip, _TABLES.split(";\n")):
                    self._connection.execute(line)

    def _version(self) -> tuple[int, int]:
        """Return the application id and the schema version; zeros for a new file."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return (application, version) if (application or version or not tables) else (-1, 0)

    def _check_version(self) -> None:
        application, version = self._version()
        if application != APPLICATION_ID:
            raise StoreProblem(f"its `{INDEX_NAME}` is a database of another program")
        if version > INDEX_SCHEMA:
            raise StoreProblem(
                f"it was written by a newer version of mechdsl: its format is {version}, "
                f"and this version reads up to {INDEX_SCHEMA}"
            )

    def _open_to_read(self, path: Path) -> None:
        """Open the index read-only.

        A copy is opened if a journal has to be rolled back or if locks aren't available; an empty
        index if there is no file.
        """
        if not path.exists() or not path.stat().st_size:
            self._connect(":memory:")
            self._make_tables()
            return
        with suppress(sqlite3.OperationalError):
            self._connect(path.absolute().as_uri() + "?mode=ro", uri=True)
            self._connection.execute("SELECT bytes FROM kept").fetchone()
            return
        self._connection.close()
        self._copy = tempfile.TemporaryDirectory(prefix="mechdsl-")
        for end in ("", "-journal"):
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{end}", Path(self._copy.name) / f"{INDEX_NAME}{end}")
        self._connect(str(Path(self._copy.name) / INDEX_NAME))

    def close(self) -> None:
        with self._lock:
            if hasattr(self, "_connection"):
                with suppress(sqlite3.Error):
                    self._connection.close()
            if self._copy is not None:
                self._copy.cleanup()
                self._copy = None

    def ask(self, kinds: ColumnTypes, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query. Raises OSError, StoreProblem."""
        with self._guarded():
            return _checked(kinds, self._connection.execute(query, values).fetchall())

    def ask_of(
        self, cells: Sequence[bytes], kinds: ColumnTypes, query: str, *values: Any
    ) -> list[tuple[Any, ...]]:
        """Return all rows of a query that joins `asked(cell)`, a table of these cells."""
        with self._guarded():
            self._connection.execute(
                "CREATE TEMP TABLE IF NOT EXISTS asked(cell BLOB PRIMARY KEY) WITHOUT ROWID"
            )
            self._connection.execute("BEGIN")
            try:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO asked VALUES (?)", ((cell,) for cell in cells)
                )
                return _checked(kinds, self._connection.execute(query, values).fetchall())
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def _guarded(self) -> Generator[None]:
        """Allow one thread at a time, and record damage.

        After damage, the next process to open the index checks all of it. If the check finds
        nothing and damage occurs again, the index is replaced by a new one.
        """
        with self._lock:
            try:
                with _translated():
                    yield
            except DamagedIndex:
                with suppress(OSError):
                    looked = self._suspicion() in (_LOOKED, _AGAIN)
                    self._suspect.write_text(_AGAIN if looked else _NEW, encoding="ascii")
                raise

    def read_json(self, text: str) -> dict[str, Any]:
        """Parse an object stored as JSON. Raises DamagedIndex."""
        with self._guarded():
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DamagedIndex(f"its index is damaged: {error}") from error
            if not isinstance(document, dict):
                raise DamagedIndex("its index is damaged: an object of JSON is none")
            return cast(dict[str, Any], document)

    def check_id(self, id: str) -> None:
        """Raise DamagedIndex unless this is the id of a run, which names its lock file."""
        with self._guarded():
            if not _ID.fullmatch(id):
                raise DamagedIndex(f"its index is damaged: {id!a} isn't the id of a run")

    @contextmanager
    def writing(self) -> Generator[sqlite3.Connection]:
        """Run one transaction: durable and complete at the end of the block, or without effect.

        No other process writes at the same time. Raises OSError, StoreProblem.
        """
        with self._guarded():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise


def _checked(kinds: ColumnTypes, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    for row in rows:
        if len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
            raise DamagedIndex("its index is damaged: a value has the wrong type")
    return rows


RACY_SECONDS = 2.0
"""Seconds after a write in which another write may leave the same times."""

UNSYNCED_SECONDS = 120.0
"""Seconds after which the system has written its buffers to disk."""

_HASH_TRIES = 3

_PART = 1 << 20


def hash_file(index: Index, path: Path, *, writable: bool) -> str:
    """Return SHA-256 in hex. Raises OSError; StoreProblem if the file changes while it is read."""
    place = os.fsencode(path.resolve())
    status = os.stat(place)
    known = index.ask(
        (str,), "SELECT hash FROM files WHERE path = ? AND stat = ?", place, _mark(status)
    )
    if known:
        return str(known[0][0])
    for _ in range(_HASH_TRIES):
        now = time.time()
        with open(place, "rb") as file:
            status = os.fstat(file.fileno())
            worked_out = hashlib.sha256()
            while part := file.read(_PART):
                worked_out.update(part)
            if now - status.st_mtime < UNSYNCED_SECONDS:
                with suppress(OSError):  # otherwise a power cut could undo the bytes just read
                    os.fsync(file.fileno())
            same = _mark(status) == _mark(os.stat(place))  # compares the inode too
        if same:
            break
    else:
        raise StoreProblem(f"`{path}` changes while it is read")
    if writable and max(status.st_mtime, status.st_ctime) < now - RACY_SECONDS:
        # The hash is valid even if it can't be cached.
        with suppress(OSError, StoreProblem), index.writing() as write:
            write.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (place, _mark(status), worked_out.hexdigest()),
            )
    return worked_out.hexdigest()


def _mark(status: os.stat_result) -> str:
    """Return the properties that change with a file; users can't set its ctime."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}:{status.st_ctime_ns}"
