"""Files and folders: atomic writes, caches, and files shipped with the package."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePath
from threading import get_ident
from typing import Any, Literal

from mechdsl.base import limits

_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}

_STREAMS = ("standard input", "standard output", "standard error")


@contextmanager
def replace_file(path: Path) -> Generator[Path]:
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


def write_atomically(path: Path, text: str) -> None:
    """Write a file that others may read at the same time; OSError where that can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as made:
        made.write_text(text, encoding="utf-8")


def special_file_kind(path: Path, *, stream: bool = False) -> str | None:
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


def write_obstacle(path: Path) -> str | None:
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


def cache_folder() -> Path | None:
    """`MECHDSL_CACHE`, else `mechdsl` in the user's cache; None where that is set and empty."""
    given = os.environ.get("MECHDSL_CACHE")
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mechdsl"


def hub_cache_folder() -> Path:
    """The Hugging Face cache, as `HF_HUB_CACHE`, `HF_HOME` or the default say."""
    if direct := os.environ.get("HF_HUB_CACHE"):
        return Path(direct).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "hub"


def find_snapshot(
    name: str, revision: str | None, *, of: Literal["models", "datasets"] = "models"
) -> Path | None:
    """The snapshot of `org/name` in the cache.

    `revision` is a branch, a tag or (the start of) a commit; None is `main`. None where there is
    no snapshot, or where several commits start with `revision`.
    """
    root = hub_cache_folder() / f"{of}--{name.replace('/', '--')}"
    if not os.path.isdir(root / "snapshots"):
        return None
    wanted = revision or "main"
    if PurePath(wanted).is_absolute() or ".." in PurePath(wanted).parts:
        return None  # a path out of the cache is no revision
    reference = root / "refs" / wanted
    if os.path.isfile(reference):
        wanted = reference.read_text(encoding="utf-8", errors="replace").strip()
    exact = root / "snapshots" / wanted
    if os.path.isdir(exact):
        return exact
    starting = [p for p in (root / "snapshots").iterdir() if p.name.startswith(wanted)]
    return starting[0] if len(starting) == 1 else None


PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def shipped_path(in_wheel: str, in_checkout: str) -> Path:
    """A file or folder: inside the package where a wheel put it, else in the checkout around it.

    in_wheel: from the package; in_checkout: from the folder that holds the package.
    """
    inside = PACKAGE_FOLDER / in_wheel
    return inside if inside.exists() else PACKAGE_FOLDER.parent / in_checkout


_CODE = (".py", ".lark")


@cache
def package_digest() -> str:
    """SHA-256 over all modules, the grammar and the tables that they read; once in a process."""
    digest = sha256()
    for root in (PACKAGE_FOLDER, shipped_path("grammar", "grammar")):
        for path in sorted(_code_files(root)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _code_files(folder: Path) -> Iterator[Path]:
    """Those of the zoo are models, and told by their weights."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _code_files(path)
            elif path.suffix in _CODE or (path.suffix == ".json" and path.parent.name == "models"):
                yield path


_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def load_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds. Raises ValueError, also for lists and objects that are nested
    deeper than `limits.DATA_DEPTH`, where Python's reader would break off, and for halves of
    characters (`\\ud800`). pairs: what makes an object of its keys and values."""
    opened = text.count("[") + text.count("{")
    if opened > limits.DATA_DEPTH and _depth(text) > limits.DATA_DEPTH:
        raise ValueError(
            f"lists and objects are nested more than {limits.DATA_DEPTH} deep",
        )
    found = json.loads(text, object_pairs_hook=pairs)
    if "\\u" in text:  # half a character, which no text can hold: UnicodeEncodeError
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _depth(text: str) -> int:
    """The deepest nesting, or the first beyond the limit."""
    depth = deepest = 0
    for mark in _MARKS.finditer(text):
        if mark[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limits.DATA_DEPTH:
                break
        elif mark[0] in "]}":
            depth -= 1
    return deepest
