"""The folder for what is kept between runs, and files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from threading import get_ident


def cache_folder() -> Path | None:
    """`MECHDSL_CACHE`, else `mechdsl` in the user's cache; None where that is set and empty."""
    given = os.environ.get("MECHDSL_CACHE")
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mechdsl"


def write_whole(path: Path, text: str) -> None:
    """Write a file that others may read at the same time; OSError where that can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.{os.getpid()}.{get_ident()}")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
