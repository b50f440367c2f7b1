"""The package's own code, by its content: another version of it may give another number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

from mechdsl.base.shipped import PACKAGE, shipped_path

_CODE = (".py", ".lark")


@cache
def own_code() -> str:
    """SHA-256 over all modules, the grammar and the tables that they read; once in a process."""
    digest = sha256()
    for root in (PACKAGE, shipped_path("grammar", "grammar")):
        for path in sorted(_files(root)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Those of the zoo are models, and told by their weights."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _files(path)
            elif path.suffix in _CODE or (path.suffix == ".json" and path.parent.name == "models"):
                yield path
