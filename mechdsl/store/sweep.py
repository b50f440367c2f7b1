"""Removing what nothing refers to, and the oldest-used where a store is too large."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.store.blobs import CONTENT, VALUES
from mechdsl.store.index import NAME
from mechdsl.store.locks import STORE, is_held, take_lock

if TYPE_CHECKING:
    from mechdsl.store.blobs import Blobs
    from mechdsl.store.index import Index

HOUR = 3_600.0
"""Seconds after which a file that was written aside belongs to nobody."""
MONTH = 30 * 86_400.0
"""Seconds after which an unfinished run isn't resumed any more."""


@dataclass(frozen=True)
class Swept:
    """What was removed from a store."""

    runs: int
    blocks: int
    """Values of so many passes."""
    files: int
    """Files that went from the disk."""
    bytes: int
    """What these files held."""
    left: int
    """Bytes of what is still there, without the index."""


@dataclass(frozen=True)
class _Unit:
    """What goes as a whole: a finished run's content, or one block of values."""

    used: float
    number: int
    run: bool
    blobs: tuple[tuple[str, int], ...]
    """Names and sizes."""


def sweep(
    index: Index,
    blobs: Blobs,
    limit: int | None,
    spared: int | None,
    locks: Path,
) -> Swept:
    """Remove what nothing refers to; then oldest-used values and runs, until at most `limit` bytes
    are left. Raises OSError, StoreProblem.

    locks: the folder of the runs' locks. spared: the number of a run that stays, with all that it
    wrote, as those do that go on.
    """
    now = time.time()
    with index.writing() as write:
        query = "SELECT number, id, used, seal IS NOT NULL FROM runs"
        runs = index.ask((int, str, float, int), query)
        held = {row[0] for row in runs if row[0] == spared or is_held(locks / row[1])}
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
    return Swept(len(gone), len(dropped), files, freed, left)


def _remove_locks(locks: Path, ids: set[str]) -> None:
    """Remove those of runs that aren't there any more."""
    for path in locks.iterdir():
        if path.name not in ids | {STORE}:
            lock = take_lock(path)
            if lock is not None:
                lock.free(remove=True)


def _units(index: Index, held: set[int], now: float) -> list[_Unit]:
    """What may go, oldest-used first. Times in the future are those of a clock that was wrong."""
    units = [
        _Unit(min(used, now), seq, False, ((hash.hex() + VALUES, size),))
        for seq, hash, size, run, used in index.ask(
            (int, bytes, int, int, float), "SELECT seq, hash, size, run, used FROM blocks"
        )
        if run not in held
    ]
    contents: dict[int, list[tuple[str, int]]] = {}
    for run, hash, size in index.ask((int, bytes, int), "SELECT run, hash, size FROM contents"):
        contents.setdefault(run, []).append((hash.hex() + CONTENT, size))
    finished = "SELECT number, used FROM runs WHERE seal IS NOT NULL"
    for run, used in index.ask((int, float), finished):
        if run not in held:
            units.append(_Unit(min(used, now), run, True, tuple(contents.get(run, ()))))
    return sorted(units, key=lambda unit: (unit.used, unit.run, unit.number))


def _named(index: Index) -> Counter[tuple[str, int]]:
    """How often each blob is named by the index."""
    named = Counter((hash.hex() + VALUES, size) for hash, size in _rows(index, "blocks"))
    named.update((hash.hex() + CONTENT, size) for hash, size in _rows(index, "contents"))
    return named


def _rows(index: Index, table: str) -> Iterable[tuple[bytes, int]]:
    return (
        (hash, size) for hash, size in index.ask((bytes, int), f"SELECT hash, size FROM {table}")
    )


def _evicted(index: Index, units: list[_Unit], limit: int) -> list[_Unit]:
    """The first of these, as many as it takes."""
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
    """Remove files that the index doesn't name; their number, their bytes and the bytes left.

    Nobody writes meanwhile: what is placed is named before this looks, or placed after it.
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
            found = entry.stat(follow_symlinks=False)
            if found.st_mtime < oldest and _removed(Path(entry.path)):
                files, freed = files + 1, freed + found.st_size
        write.execute("UPDATE kept SET bytes = ?", (left,))
    return files, freed, left


def remove_old_indexes(folder: Path) -> tuple[int, int]:
    """Remove damaged indexes that were moved aside a month ago; their number and bytes."""
    files = freed = 0
    for path in folder.glob(f"{NAME}.broken-*"):
        size = path.stat().st_size
        if path.stat().st_mtime < time.time() - MONTH and _removed(path):
            files, freed = files + 1, freed + size
    return files, freed


def _removed(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
