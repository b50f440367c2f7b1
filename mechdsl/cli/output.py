"""What commands say: diagnostics, tables, and why they broke off."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechdsl.base.visible import encodable_json, visible
from mechdsl.cli.status import BROKE_OFF

if TYPE_CHECKING:
    from rich.console import Console

    from mechdsl.diagnostics.core import Diagnostic


def print_diagnostics(
    diagnostics: Sequence[Diagnostic], form: str = "full", *, out: bool = False
) -> None:
    """Diagnostics on standard error, or on standard output where they are what was asked for."""
    if form == "full" and not diagnostics:
        return
    from mechdsl.diagnostics import render

    stream = sys.stdout if out else sys.stderr
    if form == "full":
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        text = render.render_full(
            diagnostics, color=colour, width=width(), ascii=render.needs_ascii(stream)
        )
    else:
        text = {
            "json": render.render_json,
            "github": render.render_github,
            "sarif": render.render_sarif,
        }[form](diagnostics)
        if form in ("json", "sarif"):
            text = encodable_json(text, stream.encoding)
    stream.write(text if text.endswith("\n") or not text else text + "\n")


def say(text: str, *, out: bool = True) -> None:
    """One line on standard output, or on standard error."""
    print(visible(text), file=sys.stdout if out else sys.stderr)


def broke_off(what: str, error: Exception) -> int:
    """The last resort, so that no user meets a traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        from mechdsl.diagnostics.e02_names import cannot_write

        print_diagnostics([cannot_write(error)])
        return BROKE_OFF
    if os.environ.get("MECHDSL_DEBUG"):
        raise error
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):  # a full disk
        reason = (error.strerror or str(error)).lower()
    say(f"{what} broke off: {reason}", out=False)
    say("set MECHDSL_DEBUG=1 for the traceback", out=False)
    return BROKE_OFF


def width() -> int:
    """Columns of the reader's window."""
    import shutil

    return max(40, shutil.get_terminal_size((100, 24)).columns)


def make_console(*, stderr: bool = False) -> Console:
    """A rich console: colours only on terminals, and as wide as the reader's window."""
    from mechdsl.show.console import visible_console

    return visible_console(stderr=stderr, width=None if sys.stdout.isatty() else width())
