"""Safetensors files that are larger than memory, written slice by slice.

The format (github.com/huggingface/safetensors, "Format"): eight bytes with the length of a header,
little endian; the header in JSON, which names each tensor with its type, shape and place; then the
tensors' bytes. The library writes tensors that are whole; here their rows come one batch after the
other. The library reads what comes out.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mechdsl.store.disk import sync, sync_folder

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""Bytes of one number, by the format's word for its type."""
_ALIGNED = 8


@dataclass(frozen=True)
class TensorPlace:
    """A tensor of a file."""

    kind: str
    """Of `SIZES`."""
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of one row."""
        size = SIZES[self.kind]
        for length in self.shape[1:]:
            size *= length
        return size

    @property
    def size(self) -> int:
        return self.shape[0] * self.row


class TensorFile:
    """A file whose tensors are all known in size, and written from row to row."""

    def __init__(
        self, handle: int, tensors: Mapping[str, TensorPlace], metadata: Mapping[str, str]
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
        """Write some rows of a tensor, from `row` on."""
        tensor = self._tensors[name]
        begin = row * tensor.row
        if begin + len(data) > tensor.size or len(data) % tensor.row:
            raise ValueError(f"these are no rows of `{name}`")
        _write(self._handle, data, self._data + self._begins[name] + begin)


def _room(handle: int, size: int) -> None:
    """Take the room on the disk now, where the system can; OSError where there isn't enough."""
    if hasattr(os, "posix_fallocate"):
        with _where_unsupported():
            os.posix_fallocate(handle, 0, size)
            return
    os.ftruncate(handle, size)


@contextmanager
def _where_unsupported() -> Generator[None]:
    """File systems that can't take room in advance."""
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
def beside(path: Path) -> Generator[Path]:
    """A path beside another, whose file takes its place at the end; after an error, or where the
    process is interrupted, there is none."""
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
def tensor_file(
    path: Path, tensors: Mapping[str, TensorPlace], metadata: Mapping[str, str]
) -> Generator[TensorFile]:
    """A new safetensors file; OSError where there is no room for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    try:
        yield TensorFile(handle, tensors, metadata)
        sync(handle)
    finally:
        os.close(handle)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A new text file, durable when this returns."""
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{line}\n")
        file.flush()
        sync(file.fileno())
