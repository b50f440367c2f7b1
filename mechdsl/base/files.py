"""Files and folders: atomic writes, caches, safetensors headers, and files of the package."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path, PurePath
from threading import get_ident
from typing import Any, Literal, cast

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


def load_json(
    text: str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    strict: bool = False,
) -> Any:
    """Parse a JSON text.

    pairs: builds an object from its keys and values. strict: reject NaN, infinity and numbers with
    more than 300 digits, which are no JSON or no float.

    Raises:
        ValueError: The JSON is invalid, contains a lone surrogate (`\\ud800`), or is nested deeper
            than `limits.DATA_DEPTH`, where Python's parser would fail.
    """
    opened = text.count("[") + text.count("{")
    if opened > limits.DATA_DEPTH and _depth(text) > limits.DATA_DEPTH:
        raise ValueError(
            f"lists and objects are nested more than {limits.DATA_DEPTH} deep",
        )
    parsers = (_parse_float, _parse_integer, _reject_constant) if strict else (None, None, None)
    as_float, as_integer, constant = parsers
    value = json.loads(
        text,
        object_pairs_hook=pairs,
        parse_float=as_float,
        parse_int=as_integer,
        parse_constant=constant,
    )
    if "\\u" in text:  # a lone surrogate raises UnicodeEncodeError, a ValueError
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_constant(text)


def _parse_integer(text: str) -> int:
    return int(text) if len(text) <= limits.DIGITS else _reject_constant(text)


def _reject_constant(text: str) -> Any:
    raise ValueError(f"`{text[:20]}` isn't a finite number of at most {limits.DIGITS} digits")


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

_CACHED_DIGEST_BYTES = 1 << 26
"""Size of a file from which its digest is cached on the disk."""


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
    """Read the header and the digest of a file, whose length must be that of its tensors.

    Args:
        written: The path as the user wrote it.
        most: Maximum size of the file in bytes.
        alone: Hint for a larger file.

    Raises:
        UnreadableFile: If the file is missing, too large, truncated or invalid.
    """
    from safetensors import SafetensorError, safe_open

    size = header = 0
    try:
        size = path.stat().st_size
        if size > most:
            raise UnreadableFile(f"`{written}` has more than {most:,} bytes", alone)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise SafetensorError(f"its header has more than {MAX_HEADER_BYTES:,} bytes")
        with cast("Any", safe_open)(path, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            dtypes = {name: str(each.get_dtype()) for name, each in slices.items()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        digest = _cached_digest(path, size)
    except OSError as error:
        reason = f"`{written}` can't be read: {error.strerror or error}"
        raise UnreadableFile(reason, "paths are relative to the folder of the file") from None
    except SafetensorError as error:
        if "IncompleteBuffer" in str(error) or 8 <= size < header + 8 <= MAX_HEADER_BYTES:
            reason = f"`{written}` is damaged: its {size:,} bytes aren't those of its tensors"
            raise UnreadableFile(reason, "copy the file again") from None
        reason = f"`{written}` is not a safetensors file"
        hint = 'write it with `safetensors.torch.save_file({"d": vector}, path)`'
        raise UnreadableFile(reason, hint) from None
    kinds = ("F16", "BF16", "F32", "F64")
    dtypes = {name: dtype for name, dtype in sorted(dtypes.items()) if dtype in kinds}
    return SafetensorsFile(path, digest, {name: shapes[name] for name in dtypes}, dtypes)


def _cached_digest(path: Path, size: int) -> str:
    """Return the SHA-256 of a file; that of a large one is cached until the file changes."""
    folder = cache_folder()
    if size < _CACHED_DIGEST_BYTES or folder is None:
        return compute_digest(path)
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < 2_000_000_000:
        return compute_digest(path)  # a later change could have the same time
    state = (path.resolve(), size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    kept = folder / "digests" / sha256(repr(state).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        text = kept.read_text("utf-8")
        if re.fullmatch("[0-9a-f]{64}", text):
            return text
    digest = compute_digest(path)
    with suppress(OSError):
        write_atomically(kept, digest)
    return digest


def compute_digest(path: Path) -> str:
    """Compute the SHA-256 of a file in chunks. Raises OSError if the file can't be read."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


# --- files next to a `.mech` file -----------------------------------------------------------------


def load_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object whose keys are unique and whose numbers are finite, at most 300 digits
    long.

    Raises:
        ValueError: The content is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            name = next(name for name, times in Counter(k for k, _ in pairs).items() if times > 1)
            raise ValueError(f"`{name[:80]}` is there twice")
        return record

    document = load_json(content.decode("utf-8-sig"), unique, strict=True)
    if not isinstance(document, dict):
        raise ValueError("it isn't a JSON object")
    return cast("dict[str, Any]", document)


# --- sealed files and folders ---------------------------------------------------------------------


def dump_sealed(state: Mapping[str, Any]) -> str:
    """Return a JSON object with a digest of its entries."""
    text = json.dumps(state)
    return json.dumps({**state, "sha256": sha256(text.encode()).hexdigest()})


def load_sealed(text: str) -> dict[str, Any]:
    """Return the entries of a text of `dump_sealed`. Raises ValueError, KeyError or TypeError for
    any other text."""
    state = json.loads(text)
    digest = state.pop("sha256")
    if sha256(json.dumps(state).encode()).hexdigest() != digest:
        raise ValueError("the file is damaged")
    return state


SEAL_FILE = "SHA256SUMS"
"""Digests of all other files of a folder, one a line, as `sha256sum` writes and checks them."""


def seal_folder(folder: Path) -> None:
    """Write the digests of all files of a folder. Raises OSError."""
    (folder / SEAL_FILE).write_text(_list_digests(folder), "utf-8")


def is_intact(folder: Path) -> bool:
    """Whether a folder has exactly the files that it was sealed with. Raises OSError."""
    return (folder / SEAL_FILE).read_bytes() == _list_digests(folder).encode()


def _list_digests(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    names.pop(SEAL_FILE, None)
    return "".join(f"{compute_digest(path)}  {name}\n" for name, path in names.items())
