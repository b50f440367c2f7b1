"""Files of the store: durable writes, content-addressed blobs, large tensor files and locks.

The system releases a lock whenever its process ends, for any reason.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
        for each in staged:
            path = self.path(each.hash, each.suffix)
            self._make_durable(path.parent)
            each.at.replace(path)
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
        for each in staged:
            with suppress(OSError):
                each.at.unlink()

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
