"""Files that commands are given: found, read and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine

if TYPE_CHECKING:
    from mechdsl.validate.check_file import Checked, Settings


def mech_files(paths: tuple[Path, ...]) -> tuple[list[Path], list[Diagnostic]]:
    """Files as given; folders are walked, in order of their names."""
    found: list[Path] = []
    problems: list[Diagnostic] = []
    for path in paths:
        if os.path.isdir(path):  # which, unlike `Path.is_dir`, takes any name
            inside = sorted(path.rglob("*.mech"))
            if not inside:
                problems.append(
                    BadCommandLine(
                        reason=f"there is no `.mech` file in `{path}`",
                        hint="name a file, or a folder that has some",
                    )
                )
            found.extend(inside)
        else:
            found.append(path)
    return list(dict.fromkeys(found)), problems


def checked_file(file: Path, settings: Settings) -> tuple[Checked | None, list[Diagnostic]]:
    """One file checked; None where it can't be read."""
    from mechdsl.syntax.parse import read_source
    from mechdsl.validate.check_file import check_source

    source, problems = read_source(file)
    if source is None:
        return None, problems
    checked = check_source(source, settings)
    return checked, checked.diagnostics
