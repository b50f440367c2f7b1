"""The folder for what is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`MECHDSL_CACHE`, else `mechdsl` in the user's cache; None where that is set and empty."""
    given = os.environ.get("MECHDSL_CACHE")
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mechdsl"
