"""Files that are whole or not there, and places that can't be written to."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident

_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
_STREAMS = ("standard input", "standard output", "standard error")


@contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """A new file beside `path`, which takes its place when the block ends without an exception.

    A link stays one: what it leads to is replaced. What is no plain file is given as it is, as
    nothing can take the place of `/dev/stdout`.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()
    made = target.with_name(f".mechdsl-{os.getpid()}-{get_ident()}{target.suffix}")
    try:
        yield made
        if target.exists():
            made.chmod(stat.S_IMODE(target.stat().st_mode))
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file that others may read at the same time; OSError where that can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as made:
        made.write_text(text, encoding="utf-8")


def special_file(path: Path, *, stream: bool = False) -> str | None:
    """`a device`, where a path leads to something that is neither a file nor a folder.

    stream: also where it is what this process reads or prints to.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):  # it isn't there, or no file can have this name
        return None
    for number, name in enumerate(_STREAMS if stream else ()):
        with suppress(OSError):
            if os.path.samestat(found, os.fstat(number)):
                return name
    return _KINDS.get(stat.S_IFMT(found.st_mode))


def unwritable(path: Path) -> str | None:
    """Why a file can't be written, as far as that shows before it is; None where nothing does.

    Folders that are missing can be made.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except ValueError:
        return "no file can have this name"
    if path.is_dir():
        return "it is a folder"
    if path.exists() and not os.access(path, os.W_OK):
        return "it may not be written to"
    folder = path.resolve().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        return f"`{folder.name}` is not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder `{folder}` may not be written to"
    return None
