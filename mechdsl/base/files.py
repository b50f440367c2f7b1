"""Files and folders: atomic writes, caches, safetensors headers, and files of the package."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePath
from threading import get_ident
from typing import Any, Literal

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError

_KINDS = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}

RELATIVE_PATH_HINT = (
    "the path is relative to the folder of the `.mech` file; in a text passed to `mechdsl.run`, "
    "to the working directory"
)

_STREAMS = ("standard input", "standard output", "standard error")


@contextmanager
def replace_file(path: Path) -> Generator[Path]:
    """Yield a temporary file's path; the file replaces `path` unless an exception occurs.

    The target of a link is replaced, not the link. Special files such as `/dev/stdout` can't be
    replaced, so their own path is yielded.
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
    """Write a file that others may read at the same time. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as made:
        made.write_text(text, encoding="utf-8")


def special_file_kind(path: Path, *, stream: bool = False) -> str | None:
    """Return the kind of a special file, such as `a device`; None for files and folders.

    stream: also report a standard stream of this process.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # it doesn't exist, or no file can have this name
        return None
    for number, name in enumerate(_STREAMS if stream else ()):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(number)):
                return name
    return _KINDS.get(stat.S_IFMT(status.st_mode))


def write_obstacle(path: Path) -> str | None:
    """Return a foreseeable reason that a file can't be written; None without one.

    Missing folders aren't an obstacle, as they can be created.
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
    """Return `MECHDSL_CACHE`, else `mechdsl` in the user's cache; None if the variable is empty."""
    given = os.environ.get("MECHDSL_CACHE")
    if given is not None:
        return Path(given).expanduser() if given else None
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mechdsl"


def hub_cache_folder() -> Path:
    """Return the Hugging Face cache, from `HF_HUB_CACHE`, `HF_HOME` or the default."""
    if direct := os.environ.get("HF_HUB_CACHE"):
        return Path(direct).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "hub"


def find_snapshot(
    name: str, revision: str | None, *, of: Literal["models", "datasets"] = "models"
) -> Path | None:
    """Return the snapshot of `org/name` in the cache.

    `revision` is a branch, a tag or (the start of) a commit; None is `main`.

    Returns:
        The folder; None if there is no snapshot, or if several commits start with `revision`.
    """
    root = hub_cache_folder() / f"{of}--{name.replace('/', '--')}"
    if not os.path.isdir(root / "snapshots"):
        return None
    wanted = revision or "main"
    if PurePath(wanted).is_absolute() or ".." in PurePath(wanted).parts:
        return None  # a path that leaves the cache isn't a revision
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
    """Return a shipped file or folder: inside the package in a wheel, else in the checkout.

    in_wheel: relative to the package. in_checkout: relative to the folder with the package.
    """
    inside = PACKAGE_FOLDER / in_wheel
    return inside if inside.exists() else PACKAGE_FOLDER.parent / in_checkout


_CODE = (".py", ".lark")


@cache
def package_digest() -> str:
    """Return SHA-256 over all modules, the grammar and their tables; once per process."""
    digest = sha256()
    for root in (PACKAGE_FOLDER, shipped_path("grammar", "grammar")):
        for path in sorted(_code_files(root)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _code_files(folder: Path) -> Iterator[Path]:
    """Yield code files; zoo models aren't included because their weights identify them."""
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
    """Parse a JSON text.

    pairs: builds an object from its keys and values.

    Raises:
        ValueError: The JSON is invalid, contains a lone surrogate (`\\ud800`), or is nested deeper
            than `limits.DATA_DEPTH`, where Python's parser would fail.
    """
    opened = text.count("[") + text.count("{")
    if opened > limits.DATA_DEPTH and _depth(text) > limits.DATA_DEPTH:
        raise ValueError(
            f"lists and objects are nested more than {limits.DATA_DEPTH} deep",
        )
    value = json.loads(text, object_pairs_hook=pairs)
    if "\\u" in text:  # a lone surrogate raises UnicodeEncodeError, a ValueError
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _depth(text: str) -> int:
    """Return the deepest nesting, or the first depth beyond the limit."""
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


# --- safetensors files ----------------------------------------------------------------------------


MAX_HEADER_BYTES = 10_000_000
"""Maximum size of a header in bytes; a larger one is invalid."""

_CHUNK = 1 << 24


class UnreadableFile(HintedError):
    """Error for a file that can't be used, with a hint on what to do."""


class SafetensorsFile(Record):
    """Properties of a file when it was checked."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of its floating-point tensors."""
    dtypes: Mapping[str, str]
    """Their types: `F32`, `BF16`."""


def inspect_safetensors(path: Path, written: str, most: int, alone: str) -> SafetensorsFile:
    """Read the header and the digest of a file.

    Args:
        written: The path as the user wrote it.
        most: Maximum size of the file in bytes.
        alone: Hint for a larger file.

    Raises:
        UnreadableFile: If the file is missing, too large or invalid.
    """
    try:
        if path.stat().st_size > most:
            raise UnreadableFile(f"`{written}` has more than {most:,} bytes", alone)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
        digest = compute_digest(path)
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise UnreadableFile(reason, "paths are relative to the folder of the file") from None
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        for name, entry in load_json(header.decode("utf-8")).items():
            if name != "__metadata__" and entry["dtype"] in ("F16", "BF16", "F32", "F64"):
                shapes[name] = tuple(int(size) for size in entry["shape"])
                dtypes[name] = entry["dtype"]
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"`{written}` is not a safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise UnreadableFile(reason, hint) from None
    return SafetensorsFile(path, digest, shapes, dtypes)


def compute_digest(path: Path) -> str:
    """Compute the SHA-256 of a file in chunks. Raises OSError if the file can't be read."""
    made = sha256()
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            made.update(part)
    return made.hexdigest()
