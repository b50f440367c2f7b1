"""The SQLite file that says which blob holds what."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mechdsl.store.problem import StoreProblem

NAME = "index.sqlite"
SCHEMA = 1
"""Raised whenever an older version couldn't read what is written, or would read it wrong."""
APPLICATION = 0x6D656368
"""What SQLite calls the application's id."""
WAIT = 60.0
"""Seconds for another process that is writing."""

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
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {SCHEMA};
"""
_FULL = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}
_DENIED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class DamagedIndex(StoreProblem):
    """The file isn't an index any more."""


@contextmanager
def _translated() -> Generator[None]:
    """What SQLite says, as OSError where the disk or its rights are at fault, or StoreProblem."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind = None if code is None else code & 0xFF
        if kind in _FULL:
            raise OSError(_FULL[kind], f"{os.strerror(_FULL[kind])} ({error})", NAME) from error
        if kind in _DENIED:
            raise OSError(errno.EROFS, str(error), NAME) from error
        if kind in _BUSY:
            raise StoreProblem(f"another process has held its index for {WAIT:.0f} s") from error
        if kind in _DAMAGED:
            raise DamagedIndex(f"its index is damaged: {error}") from error
        raise


class Index:
    """A connection to the index, for all threads of a process."""

    def __init__(self, folder: Path, *, writable: bool) -> None:
        """Open it, and make it where it is missing and may be written.

        Raises StoreProblem, DamagedIndex, or OSError where it can't be made.
        """
        self._lock = threading.RLock()
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        path = folder / NAME
        try:
            if writable:
                self._connect(str(path))
                with _translated():
                    self._prepare()
            elif path.exists():
                self._open_to_read(path)
            else:
                self._connect(":memory:")
                self._make_tables()
            self._check_version()
        except BaseException:
            self.close()
            raise

    def _connect(self, name: str, *, uri: bool = False) -> None:
        with _translated():
            self._connection = sqlite3.connect(
                name, timeout=WAIT, isolation_level=None, check_same_thread=False, uri=uri
            )

    def _prepare(self) -> None:
        """A rollback journal that is overwritten, not removed: it needs no file beside it to be
        read, and what ends a transaction is synced."""
        for line in (
            "trusted_schema = OFF",
            "journal_mode = PERSIST",
            "journal_size_limit = 4000000",
            "synchronous = EXTRA",
            "temp_store = MEMORY",
        ):
            self._connection.execute(f"PRAGMA {line}").fetchall()
        if self._version() == (0, 0):
            self._make_tables()

    def _make_tables(self) -> None:
        with self.writing():
            if self._version() == (0, 0):  # otherwise somebody else was faster
                for line in filter(str.strip, _TABLES.split(";\n")):
                    self._connection.execute(line)

    def _version(self) -> tuple[int, int]:
        """The application's id and the version of the schema; zeros of a new file."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return (application, version) if (application or version or not tables) else (-1, 0)

    def _check_version(self) -> None:
        with _translated():
            application, version = self._version()
        if application != APPLICATION:
            raise StoreProblem(f"its `{NAME}` is a database of another program")
        if version > SCHEMA:
            raise StoreProblem(
                f"it was written by a newer version of mechdsl: its format is {version}, "
                f"and this version reads up to {SCHEMA}"
            )

    def _open_to_read(self, path: Path) -> None:
        """Where a journal is left that must be played back, or locks can't be had: a copy."""
        with suppress(sqlite3.OperationalError):
            self._connect(path.absolute().as_uri() + "?mode=ro", uri=True)
            self._connection.execute("SELECT bytes FROM kept").fetchone()
            return
        self._connection.close()
        self._copy = tempfile.TemporaryDirectory(prefix="mechdsl-")
        journal = path.with_name(path.name + "-journal")
        shutil.copyfile(path, Path(self._copy.name) / NAME)
        if journal.exists():
            shutil.copyfile(journal, Path(self._copy.name) / journal.name)
        self._connect(str(Path(self._copy.name) / NAME))

    def close(self) -> None:
        with self._lock:
            if hasattr(self, "_connection"):
                with suppress(sqlite3.Error):
                    self._connection.close()
            if self._copy is not None:
                self._copy.cleanup()
                self._copy = None

    def ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query. Raises OSError, StoreProblem."""
        with self._lock, _translated():
            return self._connection.execute(query, values).fetchall()

    def ask_of(self, cells: Sequence[bytes], query: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of a query that joins `asked(cell)`, which holds these cells."""
        with self._lock, _translated():
            self._connection.execute(
                "CREATE TEMP TABLE IF NOT EXISTS asked(cell BLOB PRIMARY KEY) WITHOUT ROWID"
            )
            self._connection.execute("BEGIN")
            try:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO asked VALUES (?)", ((cell,) for cell in cells)
                )
                return self._connection.execute(query, values).fetchall()
            finally:
                self._connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Generator[sqlite3.Connection]:
        """One transaction: durable and whole when the block ends, or nothing of it.

        Nobody else writes meanwhile. Raises OSError, StoreProblem.
        """
        with self._lock, _translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
