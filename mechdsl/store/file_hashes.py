"""Hashes of large files, worked out once for as long as they stay as they are."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.store.problem import StoreProblem

if TYPE_CHECKING:
    from mechdsl.store.index import Index

RACY = 2.0
"""Seconds. A file that was written within them may be written again with the same times."""
UNSYNCED = 120.0
"""Seconds after which the system has written what was given to it."""
_TRIES = 3
_PART = 1 << 20


def hash_file(index: Index, path: Path, *, writable: bool) -> str:
    """SHA-256 in hex. Raises OSError, and StoreProblem where the file changes while it is read."""
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
            if now - found.st_mtime < UNSYNCED:
                with suppress(OSError):  # else a power cut may take back what was read
                    os.fsync(file.fileno())
            same = _mark(found) == _mark(os.fstat(file.fileno())) == _mark(os.stat(place))
        if same:
            break
    else:
        raise StoreProblem(f"`{path}` changes while it is read")
    if writable and max(found.st_mtime, found.st_ctime) < now - RACY:
        # The hash is as good when it can't be kept.
        with suppress(OSError, StoreProblem), index.writing() as write:
            write.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?)",
                (place, _mark(found), worked_out.hexdigest()),
            )
    return worked_out.hexdigest()


def _mark(found: os.stat_result) -> str:
    """What changes with a file. The last of its times can't be set back by hand."""
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}:{found.st_ctime_ns}"
