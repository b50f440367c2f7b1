"""The SQLite index of the store, and cached hashes of large files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias, cast


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
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DamagedIndex(f"its index is damaged: {error}") from error
            if not isinstance(found, dict):
                raise DamagedIndex("its index is damaged: an object of JSON is none")
            return cast(dict[str, Any], found)

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

_TRIES = 3

_PART = 1 << 20


def hash_file(index: Index, path: Path, *, writable: bool) -> str:
    """Return SHA-256 in hex. Raises OSError; StoreProblem if the file changes while it is read."""
    place = os.fsencode(path.resolve())
    found = os.stat(place)
    known = index.ask(
        (str,), "SELECT hash FROM files WHERE path = ? AND stat = ?", place, _mark(found)
    )
    if known:
        return str(known[0][0])
    for _ in range(_TRIES):
        now = time.time()
        with open(place, "rb") as file:
            found = os.fstat(file.fileno())
            worked_out = hashlib.sha256()
            while part := file.read(_PART):
                worked_out.update(part)
            if now - found.st_mtime < UNSYNCED_SECONDS:
                with suppress(OSError):  # otherwise a power cut could undo the bytes just read
                    os.fsync(file.fileno())
            same = _mark(found) == _mark(os.stat(place))  # compares the inode too
        if same:
            break
    else:
        raise StoreProblem(f"`{path}` changes while it is read")
    if writable and max(found.st_mtime, found.st_ctime) < now - RACY_SECONDS:
        # The hash is valid even if it can't be cached.
        with suppress(OSError, StoreProblem), index.writing() as write:
            write.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (place, _mark(found), worked_out.hexdigest()),
            )
    return worked_out.hexdigest()


def _mark(found: os.stat_result) -> str:
    """Return the properties that change with a file; users can't set its ctime."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}:{found.st_ctime_ns}"
