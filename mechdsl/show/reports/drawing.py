"""Pictures drawn by vl-convert in a child process.

Its JavaScript engine aborts the process where an allocation fails. It reserves tens of gigabytes of
address space, which limits on clusters (`ulimit -v`) don't allow. In a child process, that costs
one picture.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from tempfile import TemporaryFile
from threading import Timer
from typing import IO, Any

from mechdsl.base.text import HintedError
from mechdsl.show.reports import drawing_worker

DRAWING_SECONDS = 300.0
"""Time limit of one call; the longest chart of the tests takes a few seconds."""

NUMBERS_HINT = 'the numbers need no drawing: `report csv to "cells.csv"`'


class DrawingError(HintedError):
    """A picture that couldn't be drawn."""


class DrawingProcess:
    """A child process that draws; it starts with the first call, and again after a failure."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._messages: IO[bytes] | None = None
        self._is_late = False

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        """Call a function of vl-convert.

        Raises:
            DrawingError: If the function fails, takes longer than `DRAWING_SECONDS`, or ends the
                process.
        """
        try:
            process = self._process or self._start()
        except OSError as error:
            reason = f"no process for drawing can be started: {error.strerror or error}"
            raise DrawingError(reason, NUMBERS_HINT) from error
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(DRAWING_SECONDS, self._end_late)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump((function, arguments, options), process.stdin)
            process.stdin.flush()
            succeeded, value = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise self._failure() from error
        except BaseException:
            self.close()  # its answer would be taken for that of the next call
            raise
        finally:
            timer.cancel()
        if self._is_late:  # the answer came just before the process was ended
            self.close()
        if not succeeded:
            raise DrawingError(" ".join(value.split()), NUMBERS_HINT)
        return value

    def _start(self) -> subprocess.Popen[bytes]:
        # `-P`: a file of the working directory mustn't replace a module.
        command = [sys.executable, "-P", drawing_worker.__file__]
        paths = os.pathsep.join(filter(None, sys.path))
        self._is_late = False
        self._messages = TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env={**os.environ, "PYTHONPATH": paths},
        )
        return self._process

    def _end_late(self) -> None:
        self._is_late = True
        if self._process is not None:
            self._process.kill()

    def _failure(self) -> DrawingError:
        """Describe why the process ended, and clean up."""
        assert self._process is not None
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:  # it closed its output, but still runs
            status = None
        assert self._messages is not None
        self._messages.seek(0)
        lines = self._messages.read(100_000).decode(errors="replace").splitlines()
        self.close()
        if self._is_late:
            return DrawingError(f"drawing took longer than {DRAWING_SECONDS:g} s", NUMBERS_HINT)
        reason = f"the process that draws pictures ended with {_status_text(status)}"
        limit = _address_limit()
        if limit is None:
            fatal = [line.strip("# ") for line in lines if "atal" in line or "Error" in line]
            return DrawingError(": ".join([reason, *fatal[-1:]]), NUMBERS_HINT)
        hint = "unset it (`ulimit -v unlimited`): the drawing library reserves about 40 GB"
        return DrawingError(
            f"{reason}: its address space is limited to {limit / 1e9:.3g} GB (`ulimit -v`)",
            f"{hint}; {NUMBERS_HINT}",
        )

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, self._messages):
            if stream is not None:
                with suppress(OSError):  # an unsent call
                    stream.close()


def _status_text(status: int | None) -> str:
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"


def _address_limit() -> int | None:
    """Return the limit of the address space in bytes; None without one."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


_SHARED: ContextVar[DrawingProcess | None] = ContextVar("_SHARED", default=None)


@contextmanager
def drawing_process() -> Generator[DrawingProcess]:
    """Yield the process that draws, which all pictures of the outermost block share."""
    shared = _SHARED.get()
    if shared is not None:
        yield shared
        return
    shared = DrawingProcess()
    token = _SHARED.set(shared)
    try:
        yield shared
    finally:
        _SHARED.reset(token)
        shared.close()


def call_drawing(function: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of vl-convert in the child process; see `DrawingProcess.call`."""
    with drawing_process() as process:
        return process.call(function, *arguments, **options)
