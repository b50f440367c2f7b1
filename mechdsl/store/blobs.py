"""Files named by the hash of their bytes: a torn or changed one shows when it is read."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mechdsl.store.disk import make_folder, sync_folder, write_synced

VALUES = ".safetensors"
CONTENT = ".data"


@dataclass(frozen=True)
class Staged:
    """Bytes that are durable under a name of their own, and not yet under their hash."""

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
        """Where files are written before they get their names."""
        self._durable: set[Path] = set()
        """Folders whose own names this process has synced: whoever made them may not have."""

    def stage(self, data: bytes, suffix: str) -> Staged:
        """Write bytes aside. Raises OSError."""
        make_folder(self.aside)
        at = self.aside / f"{os.getpid()}-{secrets.token_hex(8)}"
        write_synced(at, data)
        return Staged(hashlib.sha256(data).digest(), len(data), at, suffix)

    def place(self, staged: list[Staged]) -> None:
        """Give them their names, durably. Raises OSError.

        One that is there already is replaced: it may be torn.
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

    def drop(self, staged: list[Staged]) -> None:
        """Remove those that didn't get their names."""
        for each in staged:
            with suppress(OSError):
                each.at.unlink()

    def path(self, hash: bytes, suffix: str) -> Path:
        name = hash.hex()
        return self.folder / name[:2] / (name + suffix)

    def read(self, hash: bytes, suffix: str) -> bytes | None:
        """The bytes; None where they aren't there or aren't those of the hash. Raises OSError."""
        try:
            data = self.path(hash, suffix).read_bytes()
        except FileNotFoundError:
            return None
        return data if hashlib.sha256(data).digest() == hash else None

    def files(self) -> Iterator[os.DirEntry[str]]:
        """All that lies in the folders of blobs."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as folders:
            for folder in folders:
                if folder.is_dir(follow_symlinks=False):
                    with os.scandir(folder) as files:
                        yield from files

    def leftovers(self) -> Iterator[os.DirEntry[str]]:
        """Files that were written aside: by somebody who is at it, or by one who was ended."""
        with suppress(FileNotFoundError), os.scandir(self.aside) as files:
            yield from files
