"""Where a file's store lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

FOLDER = ".mechdsl"
"""Beside the `.mech` file."""
VARIABLE = "MECHDSL_STORE"
OFF = "none"
"""What the variable says where there is to be none."""

Named = Path | None | Literal[False]
"""A folder that is named; None: wherever stores are; False: nowhere."""


def store_folder(file: Path | None, named: Named = None, *, untrusted: bool = False) -> Path | None:
    """The folder of the store, which need not be there; None: without one.

    file: the `.mech` file, None for text that came from none. named: what `--store` or `store=`
    says, which goes before the variable `MECHDSL_STORE`, and that before the file's own folder.
    untrusted: the folder of the file isn't asked. Whoever made the file may have put a store beside
    it, and in that any number.
    """
    if named is False:
        return None
    if named is not None:
        return named
    said = os.environ.get(VARIABLE, "").strip()
    if said:
        return None if said == OFF else Path(said).expanduser()
    return None if file is None or untrusted else file.parent / FOLDER
