"""Runs in the store: their values during the run, their results at its end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mechdsl.store.files import CONTENT_SUFFIX, VALUES_SUFFIX, StoreProblem

if TYPE_CHECKING:
    from mechdsl.store.files import Blobs, FileLock, Index, StagedBlob


CELL_KEY_BYTES = 16
"""Length of a cell's key."""

CachedValues: TypeAlias = Mapping[bytes, tuple[NDArray[np.uint64], NDArray[np.float64]]]
"""Per cell with values: distinct row keys, and values [row, column]."""


MOST_COLUMNS = 3
"""Values of a row: those of a measure in two runs, or of an observation and its controls."""


@dataclass(frozen=True, eq=False)
class ValueBlock:
    """Values of some cells on some rows: the result of one pass."""

    cells: Sequence[bytes]
    """Distinct keys of 16 bytes."""
    starts: NDArray[np.int64]
    """[cell + 1] start of each cell's rows, then the end of the last cell's."""
    rows: NDArray[np.uint64]
    """[row] key of the row's content, unique within its cell."""
    values: NDArray[np.float64]
    """[row, column]; at most `MOST_COLUMNS` columns."""

    def problem(self) -> str | None:
        """Return the error in its shapes, or None."""
        if any(len(cell) != CELL_KEY_BYTES for cell in self.cells):
            return f"a cell's key has {CELL_KEY_BYTES} bytes"
        if len(set(self.cells)) != len(self.cells):
            return "a cell is there twice"
        if self.starts.shape != (len(self.cells) + 1,):
            return "each cell has a start, and the last one an end"
        if self.values.ndim != 2 or not 1 <= self.values.shape[1] <= MOST_COLUMNS:
            return f"values have 1 to {MOST_COLUMNS} columns"
        if self.rows.shape != (len(self.values),):
            return "each row has a key"
        ends = (int(self.starts[0]), int(self.starts[-1]))
        if ends != (0, len(self.rows)) or bool((np.diff(self.starts) < 0).any()):
            return "starts grow from 0 to the number of rows"
        return None


def pack_values(block: ValueBlock) -> bytes:
    """Serialise a block as a safetensors file. Raises ValueError if its shapes are wrong."""
    problem = block.problem()
    if problem:
        raise ValueError(f"not a block of values: {problem}")
    keys = np.frombuffer(b"".join(block.cells), np.uint8).reshape(-1, CELL_KEY_BYTES)
    return save(
        {
            "cells": keys,
            "starts": np.ascontiguousarray(block.starts, np.int64),
            "rows": np.ascontiguousarray(block.rows, np.uint64),
            "values": np.ascontiguousarray(block.values, np.float64),
        }
    )


def unpack_values(data: bytes) -> ValueBlock | None:
    """Parse the bytes that `pack_values` returned; None for other bytes."""
    try:
        values = load(data)
        keys = values["cells"].astype(np.uint8, casting="no", copy=False)
        block = ValueBlock(
            [key.tobytes() for key in keys],
            values["starts"].astype(np.int64, casting="no", copy=False),
            values["rows"].astype(np.uint64, casting="no", copy=False),
            values["values"].astype(np.float64, casting="no", copy=False),
        )
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return None if block.problem() else block


def merge_blocks(cells: Sequence[bytes], blocks: Iterable[ValueBlock]) -> CachedValues:
    """Combine the blocks' values of these cells, with rows in the order of their keys.

    If several blocks have a row, the first one counts. The first block also determines a cell's
    number of columns: values with another number are ignored.
    """
    numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
    columns = np.zeros(len(numbers), np.int64)
    parts = [part for block in blocks if (part := _part(block, numbers, columns)) is not None]
    if not parts:
        return {}
    of_cell = np.concatenate([part[0] for part in parts])
    rows = np.concatenate([part[1] for part in parts])
    most = max(part[2].shape[1] for part in parts)
    wide = [np.pad(part[2], ((0, 0), (0, most - part[2].shape[1]))) for part in parts]
    values = np.concatenate(wide)
    order = np.lexsort((rows, of_cell))  # stable: equal rows stay in the order of their blocks
    of_cell, rows = of_cell[order], rows[order]
    first = np.ones(len(rows), bool)
    first[1:] = (of_cell[1:] != of_cell[:-1]) | (rows[1:] != rows[:-1])
    of_cell, rows, values = of_cell[first], rows[first], values[order][first]
    ends = np.searchsorted(of_cell, np.arange(len(columns) + 1)).tolist()
    return {
        cell: (rows[begin:end], np.ascontiguousarray(values[begin:end, :width]))
        for cell, begin, end, width in zip(
            numbers, ends[:-1], ends[1:], columns.tolist(), strict=True
        )
        if begin < end
    }


def _part(
    block: ValueBlock, numbers: Mapping[bytes, int], columns: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.float64]] | None:
    """Select a block's values of some cells.

    columns: number of columns per cell, updated for cells without a number.

    Returns:
        Cell numbers, row keys and values; None if the block has none of the cells.
    """
    width = block.values.shape[1]
    of_block = np.array([numbers.get(cell, -1) for cell in block.cells], np.int64)
    filled = of_block[(of_block >= 0) & (np.diff(block.starts) > 0)]
    columns[filled[columns[filled] == 0]] = width
    wanted = np.zeros(len(of_block), bool)
    wanted[of_block >= 0] = columns[of_block[of_block >= 0]] == width
    of_row = np.repeat(np.where(wanted, of_block, -1), np.diff(block.starts))
    taken = of_row >= 0
    if not taken.any():
        return None
    return of_row[taken], block.rows[taken], block.values[taken]


DAY = 86_400.0
"""Seconds between updates of the time of last use."""

RunState = Literal["running", "unfinished", "finished"]


@dataclass(frozen=True)
class StoredRun:
    """A run in the index of a store."""

    id: str
    """Sortable by start time in UTC, and short to type: `20261121-154210-3fa2`."""
    key: str
    state: RunState
    """`running`: a process is executing it; `unfinished`: no process is, and it isn't finished."""
    began: float
    """Seconds since the epoch."""
    ended: float | None
    about: Mapping[str, Any]
    """Facts recorded at its start and at its end."""
    size: int
    """Bytes of its content."""


def seal(id: str, key: str, about: str, content: Iterable[tuple[str, bytes, int]]) -> bytes:
    """Return a hash of all facts about a finished run, which reveals changes of the index."""
    files = [[name, hash.hex(), size] for name, hash, size in sorted(content)]
    return hashlib.sha256(json.dumps([id, key, about, files]).encode()).digest()


def check_content_name(name: str) -> None:
    """Raise ValueError unless a folder can contain a file of a run's content with this name."""
    path = PurePosixPath(name)
    bad = not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    if bad or path.as_posix() != name or name == ".":
        raise ValueError(f"`{name}` can't be the name of a file in a run's folder")


def find_values(
    index: Index, blobs: Blobs, cells: Sequence[bytes], where: str, bound: int
) -> tuple[CachedValues, list[int], list[int]]:
    """Look up the values of cells in the blocks that an SQL condition selects.

    If several blocks have a row, fresh runs come first, the latest of them before others; among all
    other blocks, the first one written counts.

    Returns:
        The values; the incomplete blocks; the blocks whose time of last use needs an update.
    """
    rows = index.ask_of(
        cells,
        (int, bytes, float),
        "SELECT seq, hash, used FROM blocks "
        f"WHERE seq IN (SELECT cells.seq FROM asked JOIN cells USING (cell)) AND {where} "
        "ORDER BY fresh DESC, fresh * -run, seq",
        bound,
    )
    torn: list[int] = []

    def blocks() -> Iterator[ValueBlock]:
        for seq, hash, _ in rows:
            try:
                data = blobs.read(hash, VALUES_SUFFIX)
            except OSError:  # the blob may be intact: later, or for a user with other permissions
                continue
            block = None if data is None else unpack_values(data)
            if block is None:
                torn.append(seq)
            else:
                yield block

    values = merge_blocks(cells, blocks())
    now = time.time()
    return values, torn, [seq for seq, _, used in rows if abs(now - used) > DAY]


class OpenRun:
    """An active run, as a context manager: without `finish`, it can be resumed later.

    A run of a read-only store reads values and stores none; its `id` is empty.
    """

    def __init__(
        self,
        index: Index,
        blobs: Blobs,
        row: tuple[int, str, int, str | None],
        lock: FileLock | None,
        *,
        resumed: bool,
        fresh: bool,
        tidy: Callable[[], None],
    ) -> None:
        """row: number, id, baseline and sizes from the index. tidy: called by `finish`."""
        self._index = index
        self._blobs = blobs
        self._number, self.id, self._baseline, sizes = row
        self._lock = lock
        self.resumed = resumed
        self._fresh = fresh
        self._tidy = tidy
        self.is_valid: Callable[[], bool] = lambda: True
        """Whether values may still be stored."""
        self.sizes: Mapping[str, Any] | None = None if sizes is None else index.read_json(sizes)

    def __enter__(self) -> OpenRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the run; repeated calls have no effect."""
        if self._lock is not None:
            self._lock.free()
            self._lock = None

    @property
    def _keeps(self) -> bool:
        if not self.id:
            return False
        if self._lock is None:
            raise ValueError("this run was closed")
        return True

    def settle(self, sizes: Mapping[str, Any]) -> None:
        """Store the layout of passes for a resumed run; durable on return.

        sizes: JSON, replaces the previous layout. Raises OSError, StoreProblem.
        """
        text = json.dumps(dict(sizes))
        if self._keeps:
            with self._index.writing() as write:
                write.execute("UPDATE runs SET sizes = ? WHERE number = ?", (text, self._number))
        self.sizes = json.loads(text)

    def keep(self, block: ValueBlock) -> None:
        """Store the values of a pass; durable on return, all or nothing. Values of a run that is no
        longer valid are dropped.

        Existing values stay. Other runs read the first values written, or those of the latest fresh
        run; this run reads its own first.

        Raises:
            OSError: The disk is full or fails.
            StoreProblem: The index can't be written.
            ValueError: The shapes of the block are wrong.
        """
        if not self._keeps or not block.cells or not self.is_valid():
            return
        staged = self._blobs.stage(pack_values(block), VALUES_SUFFIX)
        try:
            with self._index.writing() as write:
                self._blobs.place([staged])
                seq = write.execute(
                    "INSERT INTO blocks(hash, size, run, fresh, used) VALUES (?, ?, ?, ?, ?)",
                    (staged.hash, staged.size, self._number, self._fresh, time.time()),
                ).lastrowid
                write.executemany(
                    "INSERT INTO cells VALUES (?, ?)", ((cell, seq) for cell in sorted(block.cells))
                )
                write.execute("UPDATE kept SET bytes = bytes + ?", (staged.size,))
        finally:
            self._blobs.drop([staged])

    def earlier(self, cells: Sequence[bytes]) -> CachedValues:
        """Return values that existed when the run first started. Raises OSError, StoreProblem."""
        return self._found(cells, "seq <= ?", self._baseline)

    def own(self, cells: Sequence[bytes]) -> CachedValues:
        """Return values that this run wrote, in any attempt. Raises OSError, StoreProblem."""
        return self._found(cells, "run = ?", self._number)

    def _found(self, cells: Sequence[bytes], where: str, bound: int) -> CachedValues:
        values, torn, used = find_values(self._index, self._blobs, cells, where, bound)
        if self.id and (torn or used):
            now = time.time()
            # The values are valid even if this update fails; a later lookup repeats it.
            with suppress(OSError, StoreProblem), self._index.writing() as write:
                write.executemany("DELETE FROM blocks WHERE seq = ?", [(seq,) for seq in torn])
                write.executemany(
                    "UPDATE blocks SET used = ? WHERE seq = ?", [(now, seq) for seq in used]
                )
        return values

    def finish(self, content: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        """Store the results of the run and close it; durable on return, all or nothing.

        content: files by name. about: JSON, added to the facts from its start. Raises OSError,
        StoreProblem, and ValueError for names that are invalid in a folder.
        """
        for name in content:
            check_content_name(name)
        if not self._keeps:
            return
        staged: list[StagedBlob] = []
        try:
            for data in content.values():
                staged.append(self._blobs.stage(data, CONTENT_SUFFIX))
            files = [(name, of.hash, of.size) for name, of in zip(content, staged, strict=True)]
            with self._index.writing() as write:
                self._blobs.place(staged)
                self._enter(write.execute, files, about)
                write.executemany(
                    "INSERT INTO contents(run, name, hash, size) VALUES (?, ?, ?, ?)",
                    ((self._number, *file) for file in files),
                )
        finally:
            self._blobs.drop(staged)
        with suppress(OSError, StoreProblem):  # the results are stored; the next run tidies again
            self._tidy()
        if self._lock is not None:
            self._lock.free(remove=True)
            self._lock = None

    def _enter(
        self,
        execute: Callable[..., Any],
        files: list[tuple[str, bytes, int]],
        about: Mapping[str, Any],
    ) -> None:
        """Record that the run is finished."""
        rows = execute("SELECT key, about FROM runs WHERE number = ?", (self._number,)).fetchall()
        if not rows:
            raise StoreProblem(f"run {self.id} was removed while it went on")
        key, before = rows[0]
        text = json.dumps({**self._index.read_json(before), **about})
        execute(
            "UPDATE runs SET ended = ?, used = ?, about = ?, seal = ? WHERE number = ?",
            (time.time(), time.time(), text, seal(self.id, key, text, files), self._number),
        )
        execute("UPDATE kept SET bytes = bytes + ?", (sum(size for _, _, size in files),))
