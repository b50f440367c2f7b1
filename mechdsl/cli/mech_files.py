"""Files that commands are given: found, read and checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine

if TYPE_CHECKING:
    from mechdsl.base.source import Source
    from mechdsl.validate.check_file import Checked, Settings

STDIN = Path("-")
"""Where a file is named, what comes in on standard input."""


def mech_files(paths: tuple[Path, ...]) -> tuple[list[Path], list[Diagnostic]]:
    """Files as given; folders are walked, in order of their names. Codes: E0208."""
    found: list[Path] = []
    problems: list[Diagnostic] = []
    if paths.count(STDIN) > 1:
        problems.append(
            BadCommandLine(
                reason="`-` is given twice, and standard input can be read only once",
                hint="give it once; what was piped in is one file",
            )
        )
    for path in paths:
        if path == STDIN:
            found.append(path)
        elif os.path.isdir(path):  # which, unlike `Path.is_dir`, takes any name
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


def read_file(path: Path) -> tuple[Source | None, list[Diagnostic]]:
    """The text of a file, or of standard input; None where it can't be read.

    Codes: E0208 for standard input; those of `read_source`.
    """
    from mechdsl.syntax.parse import piped_source, read_source

    if path != STDIN:
        return read_source(path)
    try:
        if sys.stdin is None:
            raise OSError(None, "it is closed")
        return piped_source(sys.stdin.buffer.read())
    except OSError as error:
        reason = f"cannot read standard input: {(error.strerror or str(error)).lower()}"
        hint = "pipe a file in, as in `cat FILE | mechdsl validate -`, or name it"
        return None, [BadCommandLine(reason=reason, hint=hint)]


def checked_file(file: Path, settings: Settings) -> tuple[Checked | None, list[Diagnostic]]:
    """One file checked; None where it can't be read."""
    from mechdsl.validate.check_file import check_source

    source, problems = read_file(file)
    if source is None:
        return None, problems
    checked = check_source(source, settings)
    return checked, checked.diagnostics
