"""Files that commands are given: found, read and checked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from mechdsl.base.source import Source
    from mechdsl.validate.check_file import Checked, Settings

T = TypeVar("T")
STDIN = Path("-")
"""Where a file is named, what comes in on standard input."""
_FILES_EACH = 4
"""Files that a process is started for, at least."""


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


def each_file(
    work: Callable[[Path, Settings], T], files: Sequence[Path], settings: Settings
) -> Iterator[T]:
    """What a function gives for each file, in order; many files are divided among processes, one
    for each core that there is."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = min(cores, len(files) // _FILES_EACH)
    # Torch's threads don't survive a fork, and only one process can read standard input.
    if processes < 2 or STDIN in files or "torch" in sys.modules:
        return map(work, files, repeat(settings))
    return _divided(work, files, settings, processes)


def _divided(
    work: Callable[[Path, Settings], T], files: Sequence[Path], settings: Settings, processes: int
) -> Iterator[T]:
    """As `each_file`. No process waits for this one, so that all end if it is killed."""
    from multiprocessing import get_context

    import_module("mechdsl.validate.check_file")  # once, and not in each process
    # There is a process for each core already. Unset, it warns of a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("fork")
    with ExitStack() as stack:
        found: list[Connection] = []
        for first in range(processes):
            reader, writer = context.Pipe(duplex=False)
            part = partial(_work_through, writer, work, files[first::processes], settings)
            process = context.Process(target=part, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            writer.close()
            found.append(reader)
        for number, file in enumerate(files):
            try:
                one = found[number % processes].recv()
            except EOFError as error:
                raise RuntimeError(f"the process that checked {file} ended") from error
            if isinstance(one, Exception):
                raise one
            yield one


def _work_through(
    writer: Connection, work: Callable[[Path, Settings], T], files: Sequence[Path], how: Settings
) -> None:
    """Send what comes of each file, or what it raised."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process that started this one handles
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(BrokenPipeError):
        for file in files:
            try:
                found = work(file, how)
            except Exception as error:
                writer.send(error)
                return
            writer.send(found)
