"""File locks, which the system releases whenever a process ends, for any reason."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

STORE_LOCK = "store"
"""The lock that all users of a store share; other locks have the names of their runs."""

_TRIES = 5

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
    for attempt in range(_TRIES):
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
