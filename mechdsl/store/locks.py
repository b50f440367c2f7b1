"""Locks on files, which the system releases when a process ends, however it ends."""

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
"""The lock that all share who use a store; others are named as their runs."""

_TRIES = 5

_PAUSE = 0.01
"""Seconds. Who only looks whether a run goes on holds its lock for a moment."""


class FileLock:
    """A lock that this process holds, for itself or shared with others."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle

    def free(self, *, remove: bool = False) -> None:
        """Let go of it; remove: the file goes as well. A second time does nothing."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if remove and os.name != "nt":  # before it is freed, so that nobody locks what goes
            self.path.unlink(missing_ok=True)
        os.close(handle)
        if remove and os.name == "nt":
            self.path.unlink(missing_ok=True)


def take_lock(path: Path, *, shared: bool = False) -> FileLock | None:
    """The lock of a file, which is made where it is missing; None where somebody else has it.

    shared: beside others who share it. Raises OSError where the file can't be made or locked.
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
    """Whether somebody holds a lock, as far as that can be seen."""
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
    """Whether the file still has its name: another may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":

    def _lock(handle: int, shared: bool) -> bool:
        if shared:  # an open file can't be moved there, which is all that sharing is for
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
