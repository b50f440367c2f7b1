"""Headers and digests of safetensors files that a `.mech` file names."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from mechdsl.base.files import load_json
from mechdsl.base.records import Record, record

MAX_HEADER_BYTES = 10_000_000
"""Maximum size of a header in bytes; a larger one is invalid."""

_CHUNK = 1 << 24


class UnreadableFile(Exception):
    """Error for a file that can't be used, with a hint on what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@record
class SafetensorsFile(Record):
    """Properties of a file when it was checked."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of its floating-point tensors."""
    dtypes: Mapping[str, str]
    """Their types: `F32`, `BF16`."""


def inspect_safetensors(path: Path, written: str, most: int, alone: str) -> SafetensorsFile:
    """Read the header and the digest of a file.

    Args:
        written: The path as the user wrote it.
        most: Maximum size of the file in bytes.
        alone: Hint for a larger file.

    Raises:
        UnreadableFile: If the file is missing, too large or invalid.
    """
    try:
        if path.stat().st_size > most:
            raise UnreadableFile(f"`{written}` has more than {most:,} bytes", alone)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
        digest = compute_digest(path)
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise UnreadableFile(reason, "paths are relative to the folder of the file") from None
    found: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        for name, entry in load_json(header.decode("utf-8")).items():
            if name != "__metadata__" and entry["dtype"] in ("F16", "BF16", "F32", "F64"):
                found[name] = tuple(int(size) for size in entry["shape"])
                dtypes[name] = entry["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"`{written}` is not a safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise UnreadableFile(reason, hint) from None
    return SafetensorsFile(path, digest, found, dtypes)


def compute_digest(path: Path) -> str:
    """Compute the SHA-256 of a file in chunks. Raises OSError if the file can't be read."""
    made = sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            made.update(part)
    return made.hexdigest()
