"""Standard output and standard error, whatever they can take: few letters, or nothing more."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress

from mechdsl.base.visible import encodable_json
from mechdsl.cli.status import BROKE_OFF

REPLACED = "mechdsl.replaced"
"""How letters that an encoding lacks are written."""
_SIGNS = {
    "…": "...",
    "→": ">",
    "←": "<",
    "−": "-",
    "–": "-",
    "─": "-",
    "·": "|",
    "│": "|",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "●": "o",
    "█": "#",
    "▒": "=",
    "░": ".",
    "␣": "_",
    "∅": "0",
    "┌": "-",
}
"""Our own signs, mostly as wide as they were, so that columns stay in line."""


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: our signs by others, letters as `\\xe9`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    texts = [_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lost]
    return "".join(texts), error.end


class OutputLost(Exception):
    """Standard output takes nothing more: it is closed, or full."""


class Output(io.TextIOWrapper):
    """Standard output, whose own failures are told from those of files that are written."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputLost(_reason(error)) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputLost(_reason(error)) from error


def _reason(error: OSError) -> str:
    if isinstance(error, BrokenPipeError):
        return "was closed before everything was printed"
    return f"takes nothing more: {(error.strerror or str(error)).lower()}"


def prepare_streams() -> None:
    """What can't be encoded is replaced, so that no run is lost at its end for a letter.

    Raises OutputLost where standard output is closed from the start.
    """
    codecs.register_error(REPLACED, _replaced)
    if sys.stderr is None:  # closed: `print` would take standard output instead
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise OutputLost("is closed")
    plain = sys.__stdout__
    if plain is not None and sys.stdout is plain:  # not where something captures it
        line_buffering, encoding = plain.line_buffering, plain.encoding
        sys.stdout = sys.__stdout__ = Output(
            plain.detach(), encoding=encoding, line_buffering=line_buffering
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACED)


def write_json(text: str) -> None:
    """A JSON document on standard output."""
    sys.stdout.write(encodable_json(text, sys.stdout.encoding) + "\n")


def without_output(error: OutputLost) -> int:
    """Say why standard output got less than all; the exit status."""
    with suppress(OSError):
        print(f"standard output {error}", file=sys.stderr)
    if sys.stdout is not None:  # what is waiting would be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKE_OFF
