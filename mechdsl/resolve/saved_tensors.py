"""Safetensors files that a `.mech` file names: what is in them, by their header."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from mechdsl.base.json_text import load_json
from mechdsl.base.record import Record, record

HEADER = 10_000_000
"""Bytes of a header that is read; a larger one is none."""
_CHUNK = 1 << 24


class Unreadable(Exception):
    """Why a file can't be used, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@record
class SavedTensors(Record):
    """A file as it was when it was checked."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors of floating-point numbers."""


def saved_tensors(path: Path, written: str, most: int, alone: str) -> SavedTensors:
    """What is in a file of at most so many bytes; `alone`: the help for a larger one. Raises
    Unreadable."""
    try:
        if path.stat().st_size > most:
            raise Unreadable(f"`{written}` has more than {most:,} bytes", alone)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, HEADER))
        digest = digest_of(path)
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise Unreadable(reason, "paths start from the folder of the file") from None
    found: dict[str, tuple[int, ...]] = {}
    try:
        for name, entry in load_json(header.decode("utf-8")).items():
            if name != "__metadata__" and entry["dtype"] in ("F16", "BF16", "F32", "F64"):
                found[name] = tuple(int(size) for size in entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"`{written}` is no safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise Unreadable(reason, hint) from None
    return SavedTensors(path, digest, found)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, which is never in memory as a whole. Raises OSError."""
    made = sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            made.update(part)
    return made.hexdigest()
