"""Standard output and standard error, whatever they can take: few letters, or nothing more."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import cast

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
    """Standard output, whose own failures are distinguished from those of files that are written.

    Raises OutputLost from every method where standard output takes less than all.
    """

    def __init__(
        self,
        stream: io.RawIOBase | io.BufferedWriter,
        *,
        encoding: str,
        line_buffering: bool = False,
    ) -> None:
        """stream: as Python opened it, without a buffer where Python runs unbuffered."""
        # A file without a buffer may write less than it is given, and only its result tells.
        self._unbuffered = isinstance(stream, io.RawIOBase)
        if isinstance(stream, io.RawIOBase):
            stream = io.BufferedWriter(stream)
        super().__init__(stream, encoding=encoding, line_buffering=line_buffering)

    def write(self, text: str, /) -> int:
        try:
            count = super().write(text)
        except OSError as error:
            raise OutputLost(_reason(error)) from error
        if self._unbuffered:
            self.flush()
        return count

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputLost(_reason(error)) from error

    def finish(self) -> None:
        """Flush, and check that closing the file loses nothing: network and quota file systems may
        reject data only then. The file stays open."""
        self.flush()
        try:
            os.close(os.dup(self.fileno()))
        except OSError as error:
            raise OutputLost(_reason(error)) from error


def _reason(error: OSError) -> str:
    """Why less than all was taken; nothing of a pipe whose reader has all it wants."""
    if isinstance(error, BrokenPipeError):
        return ""
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
        stream = cast(io.RawIOBase | io.BufferedWriter, plain.detach())
        sys.stdout = sys.__stdout__ = Output(
            stream, encoding=encoding, line_buffering=line_buffering
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACED)


def finish_output() -> None:
    """Flush standard output, and check that all of it was taken. Raises OutputLost."""
    if isinstance(sys.stdout, Output):
        sys.stdout.finish()
    else:
        sys.stdout.flush()


def write_json(text: str) -> None:
    """A JSON document on standard output."""
    sys.stdout.write(encodable_json(text, sys.stdout.encoding) + "\n")


def without_output(error: OutputLost) -> int:
    """Report why standard output got less than all, unless a reader closed its pipe; the exit
    status."""
    if str(error):
        with suppress(OSError):
            print(f"standard output {error}", file=sys.stderr)
    if sys.stdout is not None:  # what is waiting would be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKE_OFF
