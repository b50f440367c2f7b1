"""Output of commands: streams, exit statuses, diagnostics, and the handling of Ctrl-C."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import TYPE_CHECKING, cast

from mechdsl.base.text import escape_hidden, escape_unencodable

if TYPE_CHECKING:
    from rich.console import Console

    from mechdsl.diagnostics.core import Diagnostic


SUCCESS = 0

EXPECTATION_FAILED = 1
"""Exit status if an expectation doesn't hold."""

INVALID_INPUT = 2
"""Exit status if an input is invalid and nothing could be computed."""

INCOMPLETE = 3
"""Exit status if a part failed: a measure couldn't be computed, the run was interrupted, a report
wasn't written, or standard output is unavailable. Everything else is printed."""

SIGNAL_OFFSET = 128
"""Added to the number of the signal that ended the run: 130 for Ctrl-C, 143 for SIGTERM."""

COMPLETION_VARIABLE = "_MECHDSL_COMPLETE"
"""Environment variable with which a shell requests completions of a line."""


def print_diagnostics(
    diagnostics: Sequence[Diagnostic], form: str = "full", *, out: bool = False
) -> None:
    """Print diagnostics on standard error, or on standard output if they were requested."""
    if form == "full" and not diagnostics:
        return
    from mechdsl.diagnostics import rendering as render

    stream = sys.stdout if out else sys.stderr
    if form == "full":
        colour = stream.isatty() and "NO_COLOR" not in os.environ
        text = render.render_full(
            diagnostics, color=colour, width=window_width(), ascii=render.needs_ascii(stream)
        )
    else:
        text = {
            "json": render.render_json,
            "github": render.render_github,
            "sarif": render.render_sarif,
        }[form](diagnostics)
        if form in ("json", "sarif"):
            text = escape_unencodable(text, stream.encoding)
    stream.write(text if text.endswith("\n") or not text else text + "\n")


def print_line(text: str, *, out: bool = True) -> None:
    """Print one line on standard output, or on standard error."""
    print(escape_hidden(text), file=sys.stdout if out else sys.stderr)


def report_failure(what: str, error: Exception) -> int:
    """Report an internal error, so that no user sees a traceback; return the exit status.

    Codes: E0208 for a missing library of the extra `run`.
    """
    if isinstance(error, OSError) and error.filename is not None:
        from mechdsl.diagnostics.command_line import write_error

        print_diagnostics([write_error(error)])
        return INCOMPLETE
    if isinstance(error, ModuleNotFoundError):
        from mechdsl.base.installation import install_command, missing_requirements
        from mechdsl.diagnostics.command_line import BadCommandLine

        library = (error.name or "").partition(".")[0]
        if library in missing_requirements():
            reason = f"{what} needs `{library}`, which isn't installed"
            hint = f"install what runs need: `{install_command()}`"
            print_diagnostics([BadCommandLine(reason=reason, hint=hint)])
            return INVALID_INPUT
    if os.environ.get("MECHDSL_DEBUG"):
        raise error
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):  # for instance, a full disk
        reason = (error.strerror or str(error)).lower()
    print_line(f"{what} failed: {reason}", out=False)
    print_line("set MECHDSL_DEBUG=1 to see the traceback", out=False)
    return INCOMPLETE


def window_width() -> int:
    """Return the number of columns of the user's window."""
    import shutil

    return max(40, shutil.get_terminal_size((100, 24)).columns)


def make_console(*, stderr: bool = False) -> Console:
    """Return a rich console with colours only on terminals, and the width of the user's window."""
    from mechdsl.show.console import visible_console

    return visible_console(stderr=stderr, width=None if sys.stdout.isatty() else window_width())


REPLACEMENT_HANDLER = "mechdsl.replaced"
"""Name of the codecs error handler for characters that an encoding lacks."""

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
"""Replacements of our signs, mostly of equal width, so that columns remain aligned."""


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Replace our signs by others, and letters by `\\xe9`, as an error handler of codecs."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    texts = [_SIGNS.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in lost]
    return "".join(texts), error.end


class OutputLost(Exception):
    """Standard output is closed or full."""


class StandardOutput(io.TextIOWrapper):
    """Standard output whose failures are distinguished from those of written files.

    Raises OutputLost from every method if standard output doesn't accept everything.
    """

    def __init__(
        self,
        stream: io.RawIOBase | io.BufferedWriter,
        *,
        encoding: str,
        line_buffering: bool = False,
    ) -> None:
        """Wrap a stream as opened by Python, without a buffer if Python runs unbuffered."""
        # An unbuffered file may write less than it is given, and only reports that as its result.
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


class StandardError(io.TextIOWrapper):
    """Standard error that is discarded from its first failure on, such as that of a full disk:
    messages that nobody can read change no exit status."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # pending output goes there too


def _reason(error: OSError) -> str:
    """Return why output was lost; empty for a pipe whose reader closed it."""
    if isinstance(error, BrokenPipeError):
        return ""
    return f"can't be written to: {(error.strerror or str(error)).lower()}"


def prepare_streams() -> None:
    """Replace characters that can't be encoded, so that no run fails at its end because of one.

    Raises:
        OutputLost: If standard output is closed from the start.
    """
    codecs.register_error(REPLACEMENT_HANDLER, _replaced)
    if sys.stderr is None:  # closed: `print` would use standard output instead
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise OutputLost("is closed")
    plain = sys.__stdout__
    if plain is not None and sys.stdout is plain:  # unless something captures it
        line_buffering, encoding = plain.line_buffering, plain.encoding
        stream = cast(io.RawIOBase | io.BufferedWriter, plain.detach())
        sys.stdout = sys.__stdout__ = StandardOutput(
            stream, encoding=encoding, line_buffering=line_buffering
        )
    plain = sys.__stderr__
    if plain is not None and sys.stderr is plain:
        sys.stderr = sys.__stderr__ = StandardError(
            cast(io.BufferedWriter, plain.detach()), encoding=plain.encoding, line_buffering=True
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=REPLACEMENT_HANDLER)


def finish_output() -> None:
    """Flush standard output, and check that everything was written. Raises OutputLost."""
    if isinstance(sys.stdout, StandardOutput):
        sys.stdout.finish()
    else:
        sys.stdout.flush()


def print_json(text: str) -> None:
    """Print a JSON document on standard output."""
    sys.stdout.write(escape_unencodable(text, sys.stdout.encoding) + "\n")


def print_csv(text: str) -> None:
    """Print a CSV on standard output, with a warning about cells that are formulas (W0745)."""
    from mechdsl.show.output import csv_warnings

    sys.stdout.write(text)
    print_diagnostics(csv_warnings(text, "standard output"))


def report_lost_output(error: OutputLost) -> int:
    """Report why output was lost, unless a reader closed its pipe; return the exit status."""
    if str(error):
        with suppress(OSError):
            print(f"standard output {error}", file=sys.stderr)
    if sys.stdout is not None:  # pending output would be retried at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return INCOMPLETE


_WORDS = {
    getattr(signal, name): word
    for name, word in (("SIGTERM", "terminated"), ("SIGHUP", "the terminal was closed"))
    if hasattr(signal, name)
}

RESUME_NOTE = "finished results are stored; run the same command to resume"


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a run like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def raise_on_signals() -> Generator[None]:
    """Raise `Terminated` on these signals; one that is ignored (`nohup`) stays ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {each: signal.getsignal(each) for each in _WORDS}
    ours = [each for each, handler in before.items() if handler is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each])


@contextmanager
def silence() -> Generator[None]:
    """Print nothing, and leave signals to the first of several processes, which prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def report_interruption(error: KeyboardInterrupt, kept: str = "") -> int:
    """Report that the command was ended, and what is saved; return the exit status."""
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    word = _WORDS.get(signal.Signals(number), "interrupted")
    print(f"{word}{kept}", file=sys.stderr)
    return SIGNAL_OFFSET + number
