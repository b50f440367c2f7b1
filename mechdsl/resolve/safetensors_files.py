"""Headers and digests of safetensors files that a `.mech` file names."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from mechdsl.base.files import load_json
from mechdsl.base.records import Record, record

MAX_HEADER_BYTES = 10_000_000
"""Bytes of a header that is read; a larger one is none."""

_CHUNK = 1 << 24


class UnreadableFile(Exception):
    """Why a file can't be used, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@record
class SafetensorsFile(Record):
    """A file as it was when it was checked."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors of floating-point numbers."""


def inspect_safetensors(path: Path, written: str, most: int, alone: str) -> SafetensorsFile:
    """What is in a file of at most so many bytes; `alone`: the help for a larger one. Raises
    Unreadable."""
    try:
        if path.stat().st_size > most:
            raise UnreadableFile(f"`{written}` has more than {most:,} bytes", alone)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
        digest = compute_digest(path)
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise UnreadableFile(reason, "paths start from the folder of the file") from None
    found: dict[str, tuple[int, ...]] = {}
    try:
        for name, entry in load_json(header.decode("utf-8")).items():
            if name != "__metadata__" and entry["dtype"] in ("F16", "BF16", "F32", "F64"):
                found[name] = tuple(int(size) for size in entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"`{written}` is no safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise UnreadableFile(reason, hint) from None
    return SafetensorsFile(path, digest, found)


def compute_digest(path: Path) -> str:
    """SHA-256 of a file, which is never in memory as a whole. Raises OSError."""
    made = sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            made.update(part)
    return made.hexdigest()
