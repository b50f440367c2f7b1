"""The folder in which runs, their values and file hashes are cached."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mechdsl.base.files import write_atomically
from mechdsl.base.text import parse_size
from mechdsl.store.files import (
    CONTENT_SUFFIX,
    INDEX_NAME,
    MAYBE_BYTES,
    MAYBE_TEXT,
    MAYBE_TIME,
    STORE_LOCK,
    VALUES_SUFFIX,
    Blobs,
    DamagedIndex,
    FileLock,
    Index,
    StoreProblem,
    hash_file,
    is_held,
    make_folder,
    sync_folder,
    take_lock,
)
from mechdsl.store.runs import DAY, OpenRun, StoredRun, check_content_name, seal

HOUR = 3_600.0
"""Seconds after which a temporary file counts as abandoned."""

MONTH = 30 * 86_400.0
"""Seconds after which an unfinished run can't be resumed."""


@dataclass(frozen=True)
class SweepResult:
    """The removals from a store."""

    runs: int
    blocks: int
    """Number of passes whose values were removed."""
    files: int
    """Number of files removed from the disk."""
    bytes: int
    """Bytes of the removed files."""
    left: int
    """Bytes that remain, without the index."""


@dataclass(frozen=True)
class _Unit:
    """A unit of removal: a finished run's content, or one block of values."""

    used: float
    number: int
    run: bool
    blobs: tuple[tuple[str, int], ...]
    """Names and sizes."""


def sweep(
    index: Index,
    blobs: Blobs,
    limit: int | None,
    locks: Path,
) -> SweepResult:
    """Remove unreferenced data, then the least recently used values and runs.

    The latter stops at `limit` bytes. Values of active runs stay. Raises OSError, StoreProblem.

    locks: the folder of the runs' locks.
    """
    now = time.time()
    with index.writing() as write:
        query = "SELECT number, id, used, seal IS NOT NULL FROM runs"
        runs = index.ask((int, str, float, int), query)
        held = {row[0] for row in runs if is_held(locks / row[1])}
        gone = {row[0] for row in runs if not row[3] and row[2] < now - MONTH} - held
        units = _units(index, held, now)
        evicted = [] if limit is None else _evicted(index, units, limit)
        gone |= {unit.number for unit in evicted if unit.run}
        dropped = [(unit.number,) for unit in evicted if not unit.run]
        write.executemany("DELETE FROM runs WHERE number = ?", [(number,) for number in gone])
        write.executemany("DELETE FROM contents WHERE run = ?", [(number,) for number in gone])
        write.executemany("DELETE FROM blocks WHERE seq = ?", dropped)
        write.execute("DELETE FROM cells WHERE seq NOT IN (SELECT seq FROM blocks)")
    _remove_locks(locks, {id for number, id, _, _ in runs if number not in gone})
    files, freed, left = remove_unnamed(index, blobs)
    return SweepResult(len(gone), len(dropped), files, freed, left)


def _remove_locks(locks: Path, ids: set[str]) -> None:
    """Remove locks of runs that don't exist any more."""
    for path in locks.iterdir():
        if path.name not in ids | {STORE_LOCK}:
            lock = take_lock(path)
            if lock is not None:
                lock.free(remove=True)


def _units(index: Index, held: set[int], now: float) -> list[_Unit]:
    """Return the removable units, least recently used first.

    Times in the future come from a wrong clock and count as now.
    """
    units = [
        _Unit(min(used, now), seq, False, ((hash.hex() + VALUES_SUFFIX, size),))
        for seq, hash, size, run, used in index.ask(
            (int, bytes, int, int, float), "SELECT seq, hash, size, run, used FROM blocks"
        )
        if run not in held
    ]
    contents: dict[int, list[tuple[str, int]]] = {}
    for run, hash, size in index.ask((int, bytes, int), "SELECT run, hash, size FROM contents"):
        contents.setdefault(run, []).append((hash.hex() + CONTENT_SUFFIX, size))
    finished = "SELECT number, used FROM runs WHERE seal IS NOT NULL"
    for run, used in index.ask((int, float), finished):
        if run not in held:
            units.append(_Unit(min(used, now), run, True, tuple(contents.get(run, ()))))
    return sorted(units, key=lambda unit: (unit.used, unit.run, unit.number))


def _named(index: Index) -> Counter[tuple[str, int]]:
    """Count the index's references to each blob."""
    named = Counter((hash.hex() + VALUES_SUFFIX, size) for hash, size in _rows(index, "blocks"))
    named.update((hash.hex() + CONTENT_SUFFIX, size) for hash, size in _rows(index, "contents"))
    return named


def _rows(index: Index, table: str) -> Iterable[tuple[bytes, int]]:
    return (
        (hash, size) for hash, size in index.ask((bytes, int), f"SELECT hash, size FROM {table}")
    )


def _evicted(index: Index, units: list[_Unit], limit: int) -> list[_Unit]:
    """Return as many of the first units as have to be removed."""
    named = _named(index)
    total = sum(size for _, size in named)
    evicted: list[_Unit] = []
    for unit in units:
        if total <= limit:
            break
        evicted.append(unit)
        for blob in unit.blobs:
            named[blob] -= 1
            if not named[blob]:
                total -= blob[1]
    return evicted


def remove_unnamed(index: Index, blobs: Blobs) -> tuple[int, int, int]:
    """Remove files that the index doesn't reference.

    Writers are locked out: a file is referenced before this runs, or placed afterwards.

    Returns:
        The number of removed files, their bytes and the bytes left.
    """
    files = freed = left = 0
    oldest = time.time() - HOUR
    with index.writing() as write:
        named = {name for name, _ in _named(index)}
        for entry in blobs.files():
            size = entry.stat(follow_symlinks=False).st_size
            if entry.name in named:
                left += size
            elif _removed(Path(entry.path)):
                files, freed = files + 1, freed + size
        for entry in blobs.leftovers():
            status = entry.stat(follow_symlinks=False)
            if status.st_mtime < oldest and _removed(Path(entry.path)):
                files, freed = files + 1, freed + status.st_size
        write.execute("UPDATE kept SET bytes = ?", (left,))
    return files, freed, left


def remove_old_indexes(folder: Path) -> tuple[int, int]:
    """Remove damaged indexes that were set aside a month ago; return their number and bytes."""
    files = freed = 0
    for path in folder.glob(f"{INDEX_NAME}.broken-*"):
        size = path.stat().st_size
        if path.stat().st_mtime < time.time() - MONTH and _removed(path):
            files, freed = files + 1, freed + size
    return files, freed


def _removed(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False


DEFAULT_SIZE_LIMIT = 10_000_000_000
"""Maximum bytes of a store, unless `MECHDSL_STORE_LIMIT` is set."""

_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}

_OURS = ("blobs", "locks", "new", ".gitignore", ".mechdsl-", INDEX_NAME)
"""Prefixes of names in a store; `write_atomically` creates `.mechdsl-` files."""

FITS_FOLDER = "fits"
"""Folder of the trainings in a store, by their keys."""

_TRAINING = re.compile(r"[0-9a-f]{64}(\.part|\.lock)?")
"""Names in the folder of the trainings."""

_ASIDE = ("", "-journal", "-wal", "-shm", ".suspect")

_RUN = "SELECT number, id, key, began, ended, about, seal FROM runs"

_KINDS = (int, str, str, float, MAYBE_TIME, str, MAYBE_BYTES)


def size_limit() -> int:
    """Return the maximum bytes of a store: `MECHDSL_STORE_LIMIT`, such as `20GB`.

    Raises StoreProblem.
    """
    given = os.environ.get("MECHDSL_STORE_LIMIT", "").strip()
    if not given:
        return DEFAULT_SIZE_LIMIT
    size = parse_size(given)
    if size is None:
        raise StoreProblem(
            f"the environment variable MECHDSL_STORE_LIMIT is `{given}`, which isn't a size "
            "such as `20GB` or `500MB`"
        )
    return size


class Store:
    """A store, as a context manager. Several processes and threads may use it at the same time."""

    folder: Path
    writable: bool
    """False if the folder is read-only or can't be created."""

    def __init__(self, folder: Path) -> None:
        """Open a store, or create it. Raises StoreProblem."""
        self.folder = folder.absolute()
        self._limit = size_limit()
        self._blobs = Blobs(self.folder)
        self._using: FileLock | None = None
        try:
            self.writable = self._prepare()
            self._index = self._open()
        except (OSError, StoreProblem) as error:
            self._free()
            if isinstance(error, StoreProblem):
                raise
            raise StoreProblem(_reason(error)) from error

    def _prepare(self) -> bool:
        """Create missing files; return whether the folder is writable."""
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise StoreProblem("it is a file, not a folder")
        self._check_own()
        try:
            make_folder(self.folder / "locks")
            make_folder(self._blobs.folder)
            ignore = self.folder / ".gitignore"
            if not ignore.exists() or not ignore.stat().st_size:
                write_atomically(ignore, "*\n")
            self._using = take_lock(self._lock_path(STORE_LOCK), shared=True)
        except OSError as error:
            if error.errno in _READ_ONLY:
                return False
            raise
        if self._using is None:
            raise StoreProblem("another process is putting its index in order")
        index = self.folder / INDEX_NAME
        own = os.access in os.supports_effective_ids
        return not index.exists() or os.access(index, os.W_OK, effective_ids=own)

    def _check_own(self) -> None:
        """Reject a folder with other files: the store's `.gitignore` would hide them from git."""
        if (self.folder / INDEX_NAME).exists():
            return
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            others = {name for name in os.listdir(self.folder) if not name.startswith(_OURS)}
            if FITS_FOLDER in others and self._has_trainings():
                others.remove(FITS_FOLDER)
            if others:
                raise StoreProblem("it is a folder with other files, and no store")

    def _has_trainings(self) -> bool:
        """Whether the folder of the trainings has nothing else, such as a copy without an index."""
        try:
            return all(map(_TRAINING.fullmatch, os.listdir(self.folder / FITS_FOLDER)))
        except NotADirectoryError:
            return False

    def _open(self) -> Index:
        """Open the index; a damaged one is set aside and replaced by a new one."""
        with suppress(DamagedIndex):
            return Index(self.folder, writable=self.writable)
        if not self.writable:
            raise StoreProblem("its index is damaged, and it can't be written to")
        self._free()
        alone = take_lock(self._lock_path(STORE_LOCK))
        if alone is None:
            raise StoreProblem("its index is damaged, and another process is using it")
        try:
            return Index(self.folder, writable=True)  # another process may have replaced it
        except DamagedIndex:
            self._move_aside()
            return Index(self.folder, writable=True)
        finally:
            alone.free()
            self._using = take_lock(self._lock_path(STORE_LOCK), shared=True)

    def _move_aside(self) -> None:
        name = f"{INDEX_NAME}.broken-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        while (self.folder / name).exists():
            name += "-"
        for end in _ASIDE:
            with suppress(FileNotFoundError):
                (self.folder / (INDEX_NAME + end)).replace(self.folder / (name + end))
        sync_folder(self.folder)

    def _free(self) -> None:
        if self._using is not None:
            self._using.free()
            self._using = None

    def close(self) -> None:
        """Close the store; repeated calls have no effect."""
        self._index.close()
        self._free()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock_path(self, name: str) -> Path:
        if name != STORE_LOCK:
            self._index.check_id(name)
        return self.folder / "locks" / name

    # --- facts ------------------------------------------------------------------------------------

    def file_hash(self, path: Path) -> str:
        """Return SHA-256 of a file in hex, computed once per path, size, times and inode.

        Raises OSError, and StoreProblem if the file changes while it is read.
        """
        return hash_file(self._index, path, writable=self.writable)

    def note(self, key: str) -> str | None:
        """Return the note under a key, or None. Raises OSError, StoreProblem."""
        rows = self._index.ask((bytes,), "SELECT value FROM notes WHERE key = ?", _bytes(key))
        with suppress(UnicodeDecodeError):
            return rows[0][0].decode("utf-8", "surrogatepass") if rows else None
        return None

    def take_note(self, key: str, value: str) -> None:
        """Store a small fact and replace an earlier one; no effect if the store isn't writable.

        Raises OSError, StoreProblem.
        """
        if self.writable:
            with self._index.writing() as write:
                write.execute(
                    "INSERT OR REPLACE INTO notes VALUES (?, ?)", (_bytes(key), _bytes(value))
                )

    # --- runs -------------------------------------------------------------------------------------

    def finished(self, key: str) -> StoredRun | None:
        """Return a key's latest finished run with complete content.

        Raises OSError, StoreProblem.
        """
        rows = self._index.ask(
            _KINDS, f"{_RUN} WHERE key = ? AND seal IS NOT NULL ORDER BY number DESC", key
        )
        for row in rows:
            run = self._stored(row)
            with suppress(StoreProblem):
                self.content(run)
                return run
        return None

    def runs(self) -> list[StoredRun]:
        """Return all runs, newest first. Raises OSError, StoreProblem."""
        return [
            self._stored(row) for row in self._index.ask(_KINDS, f"{_RUN} ORDER BY number DESC")
        ]

    def content(self, run: StoredRun) -> dict[str, bytes]:
        """Return a finished run's files by name.

        Raises OSError, and StoreProblem if any is incomplete.
        """
        rows = self._index.ask(
            (int, str, MAYBE_BYTES), "SELECT number, about, seal FROM runs WHERE id = ?", run.id
        )
        if not rows or rows[0][2] is None:
            raise StoreProblem(f"there is no finished run {run.id}")
        number, about, kept = rows[0]
        files = self._index.ask(
            (str, bytes, int), "SELECT name, hash, size FROM contents WHERE run = ?", number
        )
        if seal(run.id, run.key, about, [(name, hash, size) for name, hash, size in files]) != kept:
            raise StoreProblem(f"what the index says of run {run.id} was changed")
        content: dict[str, bytes] = {}
        for name, hash, _ in files:
            try:
                check_content_name(name)
            except ValueError as error:  # the entry was manipulated
                raise StoreProblem(str(error)) from error
            data = self._blobs.read(hash, CONTENT_SUFFIX)
            if data is None:
                raise StoreProblem(f"`{name}` of run {run.id} is torn or gone")
            content[name] = data
        self._touch(number)
        return content

    def _touch(self, number: int) -> None:
        """Record the use of a run, at most once a day."""
        now = time.time()
        if self.writable and self._index.ask(
            (int,), "SELECT 1 FROM runs WHERE number = ? AND abs(used - ?) > ?", number, now, DAY
        ):
            with suppress(OSError, StoreProblem), self._index.writing() as write:
                write.execute("UPDATE runs SET used = ? WHERE number = ?", (now, number))

    def _stored(self, row: tuple[Any, ...]) -> StoredRun:
        number, id, key, began, ended, about, sealed = row
        query = "SELECT total(size) FROM contents WHERE run = ?"
        [(size,)] = self._index.ask((float,), query, number)
        run = StoredRun(id, key, "finished", began, ended, self._index.read_json(about), int(size))
        if sealed is None:
            running = is_held(self._lock_path(id))
            run = replace(run, state="running" if running else "unfinished")
        return run

    def begin(self, key: str, about: Mapping[str, Any], *, fresh: bool = False) -> OpenRun:
        """Begin a run, or resume the newest unfinished one of this key that is inactive.

        about: JSON. fresh: begin a new run, ignore values of earlier runs and replace them.
        Raises OSError, StoreProblem.
        """
        if not self.writable:
            return self._read_run(key, fresh)
        if not fresh:
            query = "SELECT id FROM runs WHERE key = ? AND seal IS NULL ORDER BY number DESC"
            for (id,) in self._index.ask((str,), query, key):
                lock = take_lock(self._lock_path(id))
                if lock is not None:
                    resumed = self._resume(id, lock)
                    if resumed is not None:
                        return resumed
        return self._begin(key, json.dumps(dict(about)), fresh)

    def _read_run(self, key: str, fresh: bool) -> OpenRun:
        """Open a run of a read-only store.

        It uses the pass layout of the newest unfinished run of this key, because passes of other
        sizes round differently.
        """
        query = (
            "SELECT number, '', baseline, sizes FROM runs "
            "WHERE key = ? AND seal IS NULL AND fresh = 0 ORDER BY number DESC LIMIT 1"
        )
        rows = [] if fresh else self._index.ask((int, str, int, MAYBE_TEXT), query, key)
        if rows:
            return self._open_run(rows[0], None, resumed=True)
        return self._open_run((-1, "", 0 if fresh else self._newest(), None), None)

    def _resume(self, id: str, lock: FileLock) -> OpenRun | None:
        """Resume a run; None if it was finished or removed before its lock was taken."""
        try:
            with self._index.writing() as write:
                write.execute("UPDATE runs SET used = ? WHERE id = ?", (time.time(), id))
                rows = self._index.ask(
                    (int, str, int, MAYBE_TEXT, int),
                    "SELECT number, id, baseline, sizes, fresh FROM runs "
                    "WHERE id = ? AND seal IS NULL",
                    id,
                )
            if not rows:
                lock.free(remove=True)
                return None
            number, id, baseline, sizes, fresh = rows[0]
            row = (number, id, baseline, sizes)
            return self._open_run(row, lock, resumed=True, fresh=bool(fresh))
        except BaseException:
            lock.free()
            raise

    def _begin(self, key: str, about: str, fresh: bool) -> OpenRun:
        now = time.time()
        while True:
            id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(2)}"
            if self._index.ask((int,), "SELECT 1 FROM runs WHERE id = ?", id):
                continue
            lock = take_lock(self._lock_path(id))
            if lock is not None:
                break
        try:
            with self._index.writing() as write:
                baseline = 0 if fresh else self._newest()
                number = write.execute(
                    "INSERT INTO runs(id, key, baseline, fresh, began, used, about) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (id, key, baseline, fresh, now, now, about),
                ).lastrowid
        except BaseException:
            lock.free(remove=True)
            raise
        assert number is not None
        return self._open_run((number, id, baseline, None), lock, fresh=fresh)

    def _newest(self) -> int:
        """Return the largest block number ever assigned."""
        query = "SELECT seq FROM sqlite_sequence WHERE name = 'blocks'"
        rows = self._index.ask((int,), query)
        return rows[0][0] if rows else 0

    def _open_run(
        self,
        row: tuple[int, str, int, str | None],
        lock: FileLock | None,
        *,
        resumed: bool = False,
        fresh: bool = False,
    ) -> OpenRun:
        def tidy() -> None:
            (kept,) = self._index.ask((int,), "SELECT bytes FROM kept")[0]
            if kept > self._limit:  # leaves space, so that the next runs don't have to sweep
                self._sweep(self._limit * 9 // 10)

        return OpenRun(self._index, self._blobs, row, lock, resumed=resumed, fresh=fresh, tidy=tidy)

    # --- size -------------------------------------------------------------------------------------

    def remove(self, run: StoredRun) -> None:
        """Remove a run and its content; its values stay. Raises OSError, StoreProblem."""
        self._check_writable()
        if not self._index.ask((int,), "SELECT 1 FROM runs WHERE id = ?", run.id):
            raise StoreProblem(f"there is no run {run.id}")
        lock = take_lock(self._lock_path(run.id))
        if lock is None:
            raise StoreProblem(f"run {run.id} is running")
        try:
            with self._index.writing() as write:
                of = "(SELECT number FROM runs WHERE id = ?)"
                write.execute(f"DELETE FROM contents WHERE run = {of}", (run.id,))
                write.execute("DELETE FROM runs WHERE id = ?", (run.id,))
            remove_unnamed(self._index, self._blobs)
        finally:
            lock.free(remove=True)

    def gc(self, limit: int | None = None) -> SweepResult:
        """Remove unreferenced data and unfinished runs that are a month old, then the least
        recently used values and runs, until at most `limit` bytes are left.

        Values of active runs stay. Raises OSError, StoreProblem.
        """
        self._check_writable()
        files, freed = remove_old_indexes(self.folder)
        swept = self._sweep(limit)
        return replace(swept, files=swept.files + files, bytes=swept.bytes + freed)

    def _sweep(self, limit: int | None) -> SweepResult:
        return sweep(self._index, self._blobs, limit, self.folder / "locks")

    def _check_writable(self) -> None:
        if not self.writable:
            raise StoreProblem("it can only be read")

    def size(self) -> int:
        """Return the bytes of all its files. Raises OSError."""
        total = 0
        for folder, _, files in os.walk(self.folder):
            for name in files:
                with suppress(FileNotFoundError):
                    total += (Path(folder) / name).lstat().st_size
        return total


def _reason(error: OSError) -> str:
    """Return the reason in lower case; paths stay unchanged."""
    if not error.strerror:
        return str(error)
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return f"{reason}: `{error.filename}`" if error.filename else reason


def _bytes(text: str) -> bytes:
    """Encode a text, including lone surrogates such as in file names."""
    return text.encode("utf-8", "surrogatepass")


STORE_FOLDER = ".mechdsl"
"""The store's folder, next to the `.mech` file."""

STORE_VARIABLE = "MECHDSL_STORE"

STORE_OFF = "none"
"""The value of the variable that disables the store."""

NamedStore = Path | None | Literal[False]
"""A given folder; None: the default folder; False: no store."""


def store_folder(
    file: Path | None, named: NamedStore = None, *, untrusted: bool = False
) -> Path | None:
    """Return the folder of the store, which may not exist yet; None for no store.

    The order of precedence is `named`, the variable `MECHDSL_STORE`, the folder of the file.

    Args:
        file: The `.mech` file, None for text without a file.
        named: The value of `--store` or `store=`.
        untrusted: Ignore the folder of the file: its author may have put a store with arbitrary
            values next to it.
    """
    if named is False:
        return None
    if named is not None:
        return named
    said = os.environ.get(STORE_VARIABLE, "").strip()
    if said:
        return None if said == STORE_OFF else Path(said).expanduser()
    return None if file is None or untrusted else file.parent / STORE_FOLDER
