"""Content hashes of Python code outside this package: files, and the modules that they import.

Imports are found by reading the source: `import x`, `from x import y`, `import_module("x")`. A
module in a user's folder is hashed with its whole text, an installed module by the versions of the
packages installed alongside it. Python's standard library is excluded.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache
from hashlib import sha256
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from types import CodeType
from typing import cast

MAX_PACKAGE_FILES = 2000
"""Maximum number of files in a package; a larger folder may be, for instance, a home folder."""

_PACKAGE = __name__.partition(".")[0]

_INSTALLED = ("site-packages", "dist-packages")


class CodeHashError(Exception):
    """Can't determine which code would run; the text gives the reason in lower case."""


def hash_imported_code(contents: Iterable[bytes]) -> dict[str, str]:
    """Hash everything that these texts import.

    Returns:
        Module, or folder of installed packages → SHA-256.

    Raises:
        CodeHashError: If a module was imported earlier in this process and has changed since.
    """
    found: dict[str, str] = {}
    left = [name for content in contents for name in _imports(content)]
    done: set[str] = set()
    while left:
        name = left.pop()
        if name in done:
            continue
        done.add(name)
        for key, digest, content in _of_module(name):
            found[key] = digest
            left += _imports(content)
    return found


def hash_module_code(name: str) -> dict[str, str]:
    """Hash an imported module and everything that it imports, as `hash_imported_code` does.

    Raises:
        CodeHashError: If the module's source is unavailable.
    """
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if not file or not os.path.isfile(file):
        raise CodeHashError(f"the source of `{name}` can't be read")
    path = Path(file)
    content = _package_content(path)
    digest = sha256(content).hexdigest()
    if name != f"mechdsl_python_{digest[:16]}":  # such a module is run from the hashed bytes
        _unchanged(name, path, digest)
    return {name: digest, **hash_imported_code([content])}


def hash_package_code(name: str) -> dict[str, str]:
    """Hash all files of the package of an imported module, and what they import.

    Unlike `hash_imported_code`, this hashes the files of an installed package too.
    Raises CodeHashError if a source can't be read.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        root = ".".join(parts[:end])
        file = getattr(sys.modules.get(root), "__file__", None)
        if file:  # a namespace package has none
            break
    else:
        raise CodeHashError(f"the source of `{name}` can't be read")
    read = [_read(*each) for each in _package_files(root, Path(file))]
    digests = {module: digest for module, digest, _ in read}
    return digests | hash_imported_code([content for _, _, content in read])


def note_package_code(name: str) -> None:
    """Record the files of a package before it is imported, so that `hash_package_code` can tell
    that they have not changed since."""
    root = name.partition(".")[0]
    if root in sys.modules:
        return
    with suppress(ImportError, ValueError, CodeHashError):
        spec = find_spec(root)
        if spec is not None and spec.origin is not None and os.path.isfile(spec.origin):
            for each in _package_files(root, Path(spec.origin)):
                _read(*each)


def _package_files(root: str, path: Path) -> list[tuple[str, Path]]:
    """Name and path of the modules of a package, whose own file is `path`."""
    if path.stem != "__init__":
        return [(root, path)]
    files = _python_files(path.parent, root)
    return [(_module_name(root, path.parent, each), each) for each in files]


def _module_name(package: str, folder: Path, path: Path) -> str:
    inside = path.relative_to(folder).with_suffix("").parts
    parts = inside[:-1] if inside[-1] == "__init__" else inside
    return ".".join((package, *parts))


_IMPORTS: dict[bytes, tuple[str, ...]] = {}
"""SHA-256 of a source → the packages that it imports. One run hashes the same files repeatedly."""


def _imports(content: bytes) -> tuple[str, ...]:
    """Return the top-level package of each import, once each."""
    digest = sha256(content).digest()
    if digest not in _IMPORTS:
        _IMPORTS[digest] = tuple(dict.fromkeys(_parsed_imports(content)))
    return _IMPORTS[digest]


def _parsed_imports(content: bytes) -> Iterator[str]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # an unparsable file can't be imported either
    calls = b"import_module" in content or b"__import__" in content
    for node in ast.walk(tree) if calls else _statements(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name.partition(".")[0] for each in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Attribute(attr=called) | ast.Name(id=called),
                args=[ast.Constant(value=str(module)), *_],
            ) if called in ("import_module", "__import__"):
                yield module.partition(".")[0]
            case _:
                pass


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module in the order of `ast.walk`, which visits expressions too."""
    left = deque([tree])
    while left:
        node = left.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            left.extend(getattr(node, name, ()))


def _of_module(name: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, digest, text) of a module's files; for an installed module, of its versions."""
    if name == _PACKAGE or name in sys.builtin_module_names:
        return
    try:
        spec = find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin in ("built-in", "frozen"):
        return
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    files = [] if spec.origin is None else [Path(spec.origin)]
    for path in (*files, *folders):
        root = _installed(path)
        if root is not None:
            yield f"beside {root.name}", _versions(root), b""
            return
        if path.resolve().is_relative_to(_standard()):
            return
    if not folders:
        for path in files:
            yield _read(name, path)
    for folder in folders:
        for path in _python_files(folder, name):
            yield _read(_module_name(name, folder, path), path)


def _read(module: str, path: Path) -> tuple[str, str, bytes]:
    content = _package_content(path)
    digest = sha256(content).hexdigest()
    _unchanged(module, path, digest)
    return module, digest, content if path.suffix == ".py" else b""


def _package_content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise CodeHashError(f"`{path.name}`, which is imported, can't be read: {said}") from None


def _python_files(folder: Path, name: str) -> list[Path]:
    found: list[Path] = []
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".so", ".pyd"):
            found.append(path)
        if len(found) > MAX_PACKAGE_FILES:
            raise CodeHashError(f"the package `{name}` has more than {MAX_PACKAGE_FILES} files")
    return sorted(found)


def _installed(path: Path) -> Path | None:
    """Return the folder of installed packages that contains a path."""
    for folder in path.parents:
        if folder.name in _INSTALLED or path.relative_to(folder).parts[0] in _recorded(folder):
            return folder
    return None


@cache
def _recorded(folder: Path) -> frozenset[str]:
    """Return what packages installed into a folder, as by `pip install --target`: names in it."""
    found: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with suppress(OSError, UnicodeError):
            lines = record.read_text("utf-8").splitlines()
            found |= {re.split("[/,]", line, maxsplit=1)[0] for line in lines}
    return frozenset(found)


@cache
def is_installed(package: str) -> bool:
    """Whether an imported package is an installed one."""
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is not None and _installed(Path(file)) is not None


def _versions(root: Path) -> str:
    """List names and versions of the packages installed in a folder."""
    names = sorted(each for each in os.listdir(root) if each.endswith((".dist-info", ".egg-info")))
    return sha256("\n".join(names).encode()).hexdigest()


@cache
def _standard() -> Path:
    return Path(sysconfig.get_path("stdlib")).resolve()


# --- earlier imports ------------------------------------------------------------------------------

_IMPORTED: dict[tuple[str, Path], str] = {}
"""Digest of a module's file before its import, or when it was last known to be unchanged."""


def _unchanged(module: str, path: Path, digest: str) -> None:
    """Raise CodeHashError if the module in memory may differ from its file."""
    key = (module, path.resolve())
    if module not in sys.modules:
        _IMPORTED[key] = digest
        return
    known = _IMPORTED.get(key)
    if known is None and _compiled_from(path):
        known = _IMPORTED[key] = digest
    if known != digest:
        raise CodeHashError(f"`{path.name}` may have changed since this process imported it")


def _compiled_from(path: Path) -> bool:
    """Whether the file is older than this process, or matches Python's compiled cache."""
    try:
        now = path.stat()
        if now.st_mtime < _process_start():
            return True
        head = Path(cache_from_source(str(path))).read_bytes()[:16]
    except (OSError, NotImplementedError):
        return False
    stamps = [int.from_bytes(head[n : n + 4], "little") for n in (4, 8, 12)]
    return stamps == [0, int(now.st_mtime) & 0xFFFFFFFF, now.st_size & 0xFFFFFFFF]


@cache
def _process_start() -> float:
    """Return the start time in seconds since the epoch; 0 if unknown."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - age
    return 0.0


@lru_cache(maxsize=8192)
def code_digest(code: CodeType) -> str:
    """Return the SHA-256 of code's behavior, independent of its location."""
    parts = (
        *(code.co_code, code.co_exceptiontable, code.co_flags, code.co_names, code.co_varnames),
        *(code.co_freevars, code.co_cellvars, code.co_argcount, code.co_kwonlyargcount),
        *(code.co_posonlyargcount, _describe_constant(code.co_consts)),
    )
    return sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _describe_constant(value: object) -> str:
    """Describe a constant of code, equally in every process."""
    match value:
        case CodeType():
            return code_digest(value)
        case tuple():
            return f"({', '.join(map(_describe_constant, cast('tuple[object, ...]', value)))})"
        case frozenset():
            parts = sorted(map(_describe_constant, cast("frozenset[object]", value)))
            return f"{{{', '.join(parts)}}}"
        case _:
            return f"{type(value).__name__} {value!r}"
