"""Content hashes of Python code outside this package: files, modules and callables.

Imports are found by reading the source: `import x`, `from x import y`, `import_module("x")`. A
module in a user's folder is hashed with its whole text, an installed module by the versions of the
packages installed alongside it. Python's standard library is excluded.

A stored result is reused if the hash of a callable is unchanged, so the hash covers everything that
the function reads: bytecode, default values, closures, globals, and the attributes of the user's
modules and classes, with their values in memory. A callable that reads anything else isn't hashed,
and its results are never stored.
"""

from __future__ import annotations

import ast
import dis
import os
import re
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, lru_cache, partial
from hashlib import sha256
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from re import Pattern
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, cast

from mechdsl.base.records import Record

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
    imported_codes: dict[str, str] = {}
    left = [name for content in contents for name in _imports(content)]
    done: set[str] = set()
    while left:
        name = left.pop()
        if name in done:
            continue
        done.add(name)
        for key, digest, content in _of_module(name):
            imported_codes[key] = digest
            left += _imports(content)
    return imported_codes


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
    read = [_read(*package_file) for package_file in _package_files(root, Path(file))]
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
            for package_file in _package_files(root, Path(spec.origin)):
                _read(*package_file)


def _package_files(root: str, path: Path) -> list[tuple[str, Path]]:
    """Name and path of the modules of a package, whose own file is `path`."""
    if path.stem != "__init__":
        return [(root, path)]
    files = _python_files(path.parent, root)
    return [(_module_name(root, path.parent, file), file) for file in files]


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
                yield from (name.name.partition(".")[0] for name in names)
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
    python_files: list[Path] = []
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".so", ".pyd"):
            python_files.append(path)
        if len(python_files) > MAX_PACKAGE_FILES:
            raise CodeHashError(f"the package `{name}` has more than {MAX_PACKAGE_FILES} files")
    return sorted(python_files)


def _installed(path: Path) -> Path | None:
    """Return the folder of installed packages that contains a path."""
    for folder in path.parents:
        if folder.name in _INSTALLED or path.relative_to(folder).parts[0] in _recorded(folder):
            return folder
    return None


@cache
def _recorded(folder: Path) -> frozenset[str]:
    """Return what packages installed into a folder, as by `pip install --target`: names in it."""
    names: set[str] = set()
    for record in folder.glob("*.dist-info/RECORD"):
        with suppress(OSError, UnicodeError):
            lines = record.read_text("utf-8").splitlines()
            names |= {re.split("[/,]", line, maxsplit=1)[0] for line in lines}
    return frozenset(names)


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


MAX_ARRAY_BYTES = 16 * 2**20
"""Maximum total size of the arrays and tensors that a callable reads. They are hashed after every
call."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SCALARS = (bool, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)

_DYNAMIC_BUILTINS = _words(
    "__import__ breakpoint compile eval exec globals hash id input locals open vars"
)
"""Builtins that read names, files or addresses that aren't visible in the bytecode."""

_CHANGING_MODULES = _words(
    """_io _random asyncio builtins ctypes datetime gc glob http importlib inspect io linecache mmap
    multiprocessing os pathlib pickle posix posixpath random requests secrets shelve shutil signal
    socket sqlite3 subprocess sys tempfile threading time urllib uuid weakref"""
)
"""Modules that read files, the network, the clock, the process or random numbers."""

_CHANGING_FUNCTIONS = _words(
    """bernoulli bernoulli_ default_rng dropout from_file from_pretrained fromfile genfromtxt load
    load_dataset load_file loadtxt manual_seed memmap multinomial normal normal_ rand rand_like
    randint randint_like randn randn_like random random_ randperm read_bytes read_csv read_excel
    read_json read_parquet read_table read_text safe_open seed uniform_ urlopen"""
)
"""Functions and methods of packages that read files or draw random numbers."""

_IGNORED_ATTRIBUTES = _words(
    """__abstractmethods__ __annotate_func__ __annotations__ __annotations_cache__
    __dataclass_fields__ __dataclass_params__ __dict__ __doc__ __firstlineno__ __match_args__
    __module__ __orig_bases__ __parameters__ __qualname__ __slotnames__ __static_attributes__
    __weakref__"""
)
"""Attributes of a class that the interpreter sets, and that its methods don't read."""

_NATIVE_METHODS = (
    WrapperDescriptorType,
    MethodDescriptorType,
    GetSetDescriptorType,
    MemberDescriptorType,
)


def hash_callable(function: Callable[..., Any]) -> tuple[str, bytes]:
    """Hash a callable: its bytecode, and the values of everything that it reads.

    Args:
        function: A function, a lambda, or a `functools.partial` of one.

    Returns:
        SHA-256, and the `import` lines of the modules that it uses, for `hash_imported_code`.

    Raises:
        CodeHashError: If it reads anything whose code or value can't be hashed.
    """
    try:
        reader, parts = _read_callable(function, frozenset())
        before: set[str] = set()
        while before != reader.looked_up:  # code that is read later may look up further names
            before = reader.looked_up
            reader, parts = _read_callable(function, frozenset(before))
    except CodeHashError:
        raise
    except RecursionError:
        raise CodeHashError("what it reads is nested too deeply") from None
    except Exception as error:  # from the user's objects
        raise CodeHashError(f"what it reads can't be hashed: {type(error).__name__}") from None
    imports = "".join(f"import {name}\n" for name in sorted(reader.modules))
    text = f"{sys.version_info[:3]}\n{parts!r}\n{imports}"
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), imports.encode()


def _read_callable(function: object, looked_up: frozenset[str]) -> tuple[_Reader, object]:
    reader = _Reader(looked_up)
    return reader, reader.read_callable(function)


class _CodeNames(Record):
    """Names in bytecode, including nested functions."""

    read: frozenset[str]
    """Globals and builtins."""
    attributes: frozenset[str]
    texts: frozenset[str]
    """Texts that may be names of attributes, as for `getattr`."""
    imported: frozenset[str]
    """Modules that the code imports itself; relative ones begin with a dot."""
    assigned: frozenset[str]
    """Globals that it assigns or deletes."""
    stored_cells: frozenset[str]
    """Variables of enclosing functions that it assigns."""


class _Reader:
    def __init__(self, looked_up: frozenset[str]) -> None:
        """Read the attributes `looked_up` of every module."""
        self.modules: set[str] = set()
        self.looked_up = set(looked_up)
        """Names of attributes in all code that was read."""
        self._numbers: dict[int, int] = {}
        self._held: list[object] = []
        """Objects in `_numbers`, so that no id is reused."""
        self._open: set[int] = set()
        """Containers that are being read."""
        self._array_bytes = 0

    def read_callable(self, function: object) -> object:
        if isinstance(function, FunctionType | BuiltinFunctionType | type(partial(int))):
            return self._value("it", function)
        if isinstance(function, MethodType):
            owner = type(function.__self__).__name__
            raise CodeHashError(f"it is a method of a `{owner}`, whose state can't be hashed")
        raise CodeHashError(f"a `{type(function).__name__}` isn't a plain function")

    def _first_seen(self, value: object) -> int | None:
        """Return the number of an object that was read before; None for a new one."""
        known = self._numbers.get(id(value))
        if known is None:
            self._numbers[id(value)] = len(self._numbers)
            self._held.append(value)
        return known

    # --- functions ---

    def _function(self, name: str, function: FunctionType) -> object:
        home = str(function.__globals__.get("__name__", ""))  # `functools.wraps` doesn't change it
        if _is_library(home) and _look_up(home, function.__qualname__) is function:
            return self._library(name, home, function.__qualname__)
        known = self._first_seen(function)
        if known is not None:
            return ("function", known)
        code = function.__code__
        names = _code_names(code)
        self.looked_up |= names.attributes | names.texts | (names.read & {"getattr"})
        if not _is_library(home):
            self._refuse_hidden_inputs(function, names)
            self._add_source(home)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        read = sorted(each for each in names.read if each in function.__globals__)
        return (
            code_digest(code),
            self._value("a default value", function.__defaults__),
            self._value("a default value", function.__kwdefaults__),
            self._value("an attribute", vars(function)),
            [(each, self._value(each, _content(each, cell))) for each, cell in cells],
            [(each, self._value(each, function.__globals__[each])) for each in read],
            [(each, self._imported(each, function)) for each in sorted(names.imported)],
        )

    def _refuse_hidden_inputs(self, function: FunctionType, names: _CodeNames) -> None:
        """Raise CodeHashError for inputs that the names in the bytecode don't show."""
        hidden = sorted((names.read & _DYNAMIC_BUILTINS) - function.__globals__.keys())
        hidden += sorted(names.attributes & _CHANGING_FUNCTIONS)
        if hidden:
            raise CodeHashError(f"it calls `{hidden[0]}`, whose result can't be hashed")
        outer = names.stored_cells & frozenset(function.__code__.co_freevars)
        assigned = sorted(names.assigned | outer)
        if assigned:
            raise CodeHashError(f"it assigns `{assigned[0]}`, which its next call may read")

    def _imported(self, name: str, function: FunctionType) -> object:
        """Describe a module that code imports itself."""
        absolute = name
        if name.startswith("."):
            package = str(function.__globals__.get("__package__") or "")
            level = len(name) - len(name.lstrip("."))
            parts = package.split(".")
            kept = parts[: len(parts) - level + 1]
            absolute = ".".join([*kept, name.lstrip(".")]).strip(".")
        module = sys.modules.get(absolute)
        if module is None:
            if _is_library(absolute):
                return self._library(name, absolute, "")
            raise CodeHashError(f"it imports `{name}`, which wasn't imported before")
        root = sys.modules.get(absolute.partition(".")[0], module)
        return [self._module(name, each) for each in dict.fromkeys((root, module))]

    # --- modules and classes ---

    def _module(self, name: str, module: ModuleType) -> object:
        home = module.__name__
        if home == "__main__":
            raise CodeHashError("it reads the module `__main__`, which can't be hashed")
        library = _is_library(home)
        described = self._library(name, home, "") if library else f"module {home}"
        if library and _root(home) == _PACKAGE:
            return described
        if not library:
            self._add_source(home)
            self._refuse_computed_names(home)
        if id(module) in self._open:
            return described
        self._open.add(id(module))
        held = vars(module)
        values: list[tuple[str, object]] = []
        for each in sorted(self.looked_up & held.keys()):
            value = held[each]
            if not library or _is_patched(value) or type(value) in (bool, int, float, complex):
                values.append((each, self._value(f"{name}.{each}", value)))
        self._open.discard(id(module))
        return (described, values)

    def _refuse_computed_names(self, home: str) -> None:
        """Raise CodeHashError for code that may read any attribute of a user's module."""
        computed = sorted(self.looked_up & {"getattr", "__dict__", "attrgetter"})
        if computed:
            raise CodeHashError(f"it reads the module `{home}` and uses `{computed[0]}`")

    def _class(self, name: str, kind: type) -> object:
        home = kind.__module__
        if _is_library(home) and _look_up(home, kind.__qualname__) is kind:
            return self._library(name, home, kind.__qualname__)
        known = self._first_seen(kind)
        if known is not None:
            return ("class", known)
        if type(kind) is not type:
            meta = type(kind).__name__
            raise CodeHashError(f"`{name}` is a class of type `{meta}`, which can't be hashed")
        self._add_source(home)
        names = sorted(vars(kind).keys() - _IGNORED_ATTRIBUTES)
        return (
            kind.__qualname__,
            [self._class(name, base) for base in kind.__bases__],
            [(each, self._value(f"{name}.{each}", vars(kind)[each])) for each in names],
        )

    def _library(self, name: str, home: str, inside: str) -> object:
        """Describe a part of an installed package, which its version identifies."""
        root, last = _root(home), inside.rpartition(".")[2]
        if root in _CHANGING_MODULES and not (root == "builtins" and inside):
            raise CodeHashError(f"it reads `{name}` of `{root}`, whose results can't be hashed")
        if last in _CHANGING_FUNCTIONS or (root == "builtins" and last in _DYNAMIC_BUILTINS):
            raise CodeHashError(f"it calls `{last}`, whose result can't be hashed")
        if root not in ("builtins", _PACKAGE):
            self.modules.add(home)
        return ("library", home, inside)

    def _add_source(self, home: str) -> None:
        """Add the files of a user's module to the code that must be unchanged."""
        module = sys.modules.get(home)
        if home != "__main__" and getattr(module, "__spec__", None) is not None:
            self.modules.add(home)

    # --- values ---

    def _value(self, name: str, value: object) -> object:
        match value:
            case ModuleType():
                return self._module(name, value)
            case FunctionType():
                return self._function(name, value)
            case type():
                return self._class(name, value)
            case BuiltinFunctionType():
                return self._builtin(name, value)
            case MethodType():
                return self._method(name, value)
            case staticmethod() | classmethod():
                wrapped = cast("Any", value)
                return (type(value).__name__, self._value(name, wrapped.__func__))
            case property():
                inner = (value.fget, value.fset, value.fdel)
                return ("property", [self._value(name, each) for each in inner])
            case _ if isinstance(value, _NATIVE_METHODS):
                return self._native_method(name, cast("Any", value))
            case _:
                return self._data(name, value)

    def _builtin(self, name: str, value: Any) -> object:
        owner = value.__self__
        home = value.__module__
        if isinstance(owner, ModuleType):
            home = owner.__name__
        elif isinstance(owner, type):
            home = owner.__module__
        if (owner is None or isinstance(owner, ModuleType | type)) and home and _is_library(home):
            return self._library(name, home, value.__qualname__)
        raise CodeHashError(f"`{name}` is a `{type(value).__name__}`, which can't be hashed")

    def _native_method(self, name: str, value: Any) -> object:
        home = value.__objclass__.__module__
        if _is_library(home):
            return self._library(name, home, value.__qualname__)
        return ("slot", value.__name__)  # its class is read as a whole

    def _method(self, name: str, value: MethodType) -> object:
        owner: object = value.__self__
        if isinstance(owner, type) or _is_grad_mode(owner):
            return ("method", self._value(name, owner), self._value(name, value.__func__))
        kind = type(owner).__name__
        raise CodeHashError(f"`{name}` is a method of a `{kind}`, whose state can't be hashed")

    def _data(self, name: str, value: object) -> object:
        kind = type(value)
        if kind is int:
            return hex(cast("int", value))
        if kind in _SCALARS:
            return repr(value)
        if kind is partial:
            call = cast("partial[Any]", value)
            inner: tuple[object, ...] = (call.func, call.args, call.keywords, vars(call))
            return ("partial", [self._value(name, each) for each in inner])
        if kind is Pattern:
            pattern = cast("Pattern[Any]", value)
            return ("pattern", repr(pattern.pattern), pattern.flags)
        if kind in (tuple, list, dict, set, frozenset):
            return self._container(name, value)
        described = self._array(name, value)
        if described is not None:
            return described
        if _is_grad_mode(value):
            return self._library(name, kind.__module__, kind.__qualname__)
        if (kind.__module__, kind.__name__) in _DESCRIBED_BY_TEXT:
            return (kind.__name__, repr(value))
        if (kind.__module__, kind.__name__) == ("numpy", "ufunc"):
            word = cast("Any", value).__name__
            if _look_up("numpy", word) is value:
                return self._library(name, "numpy", word)
        raise CodeHashError(f"`{name}` is a `{kind.__name__}`, which can't be hashed")

    def _container(self, name: str, value: Any) -> object:
        if id(value) in self._open:
            raise CodeHashError(f"`{name}` contains itself")
        self._open.add(id(value))
        kind = type(value).__name__
        if isinstance(value, dict):
            pairs = cast("dict[object, object]", value).items()
            values = [(self._value(name, k), self._value(name, v)) for k, v in pairs]
        else:
            values = [self._value(name, each) for each in cast("Iterable[object]", value)]
            if isinstance(value, set | frozenset):
                values = sorted(values, key=repr)
        self._open.discard(id(value))
        return (kind, values)

    def _array(self, name: str, value: Any) -> object:
        """Describe a numpy array or number, or a tensor; None for anything else."""
        kind = type(value)
        where = (kind.__module__, kind.__name__)
        if where == ("numpy", "ndarray"):
            held = value
            said: tuple[object, ...] = ("array", str(value.dtype), value.shape)
        elif kind.__module__ == "numpy" and hasattr(value, "tobytes") and value.shape == ():
            held = value  # a number
            said = ("number", str(value.dtype), ())
        elif where in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            plain = str(value.layout) == "torch.strided" and value.device.type != "meta"
            if not plain or vars(value) or value.is_quantized:
                raise CodeHashError(f"`{name}` is a tensor that can't be hashed")
            said = (kind.__name__, str(value.dtype), tuple(value.shape), value.device.type)
            said = (*said, value.requires_grad)
            self._count_bytes(name, value.numel() * value.element_size())
            held = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
            held = held.view(sys.modules["torch"].uint8).numpy()
            return (*said, sha256(held.tobytes()).hexdigest())
        else:
            return None
        if held.dtype.hasobject:
            raise CodeHashError(f"`{name}` is an array of objects, which can't be hashed")
        self._count_bytes(name, held.nbytes)
        return (*said, sha256(held.tobytes()).hexdigest())

    def _count_bytes(self, name: str, size: int) -> None:
        self._array_bytes += size
        if self._array_bytes > MAX_ARRAY_BYTES:
            limit = MAX_ARRAY_BYTES // 2**20
            raise CodeHashError(f"with `{name}` it reads more than {limit} MiB of arrays")


_DESCRIBED_BY_TEXT = frozenset({("torch", "dtype"), ("torch", "device"), ("torch", "Size")})

_GRAD_MODES = frozenset({"no_grad", "enable_grad", "inference_mode"})


def _is_grad_mode(value: object) -> bool:
    """Whether a value is an instance of `torch.no_grad` or the like, as decorators hold."""
    kind = type(value)
    return kind.__module__ == "torch.autograd.grad_mode" and kind.__name__ in _GRAD_MODES


def _root(module: str) -> str:
    return module.partition(".")[0]


def _is_library(module: str) -> bool:
    """Whether a module belongs to Python, an installed package or mechdsl."""
    root = _root(module)
    if root in ("", "__main__"):
        return False
    return root in sys.stdlib_module_names or root == _PACKAGE or is_installed(root)


def _is_patched(value: object) -> bool:
    """Whether a value in an installed package is a function of the user."""
    if not isinstance(value, FunctionType):
        return False
    return not _is_library(str(value.__globals__.get("__name__", "")))


def _look_up(home: str, path: str) -> object:
    """Return the object at a path of an imported module; None if there is none."""
    module: object = sys.modules.get(home)
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _content(name: str, cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        raise CodeHashError(f"`{name}` has no value yet") from None


# --- bytecode -------------------------------------------------------------------------------------

_ATTRIBUTE_OPERATIONS = _words(
    "LOAD_ATTR LOAD_METHOD STORE_ATTR DELETE_ATTR LOAD_SUPER_ATTR IMPORT_FROM"
)


@lru_cache(maxsize=4096)
def _code_names(code: CodeType) -> _CodeNames:
    attributes: set[str] = set()
    others: set[str] = set()
    imported: set[str] = set()
    assigned: set[str] = set()
    stored: set[str] = set()
    level = 0
    previous: list[Any] = [None, None]
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in _ATTRIBUTE_OPERATIONS:
            attributes.add(name)
        elif instruction.opname == "IMPORT_NAME":
            level = previous[0] if isinstance(previous[0], int) else 0
            imported.add("." * level + name)
        elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            assigned.add(name)
        elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
            stored.add(name)
        elif isinstance(name, str) and name in code.co_names:
            others.add(name)
        previous = [previous[1], name]
    texts = {constant for constant in _constants(code.co_consts) if constant.isidentifier()}
    inner = [
        _code_names(code_type) for code_type in code.co_consts if isinstance(code_type, CodeType)
    ]
    # A name that no known operation uses may be a global.
    read = others | (set(code.co_names) - attributes - {each.lstrip(".") for each in imported})
    return _CodeNames(
        frozenset(read).union(*(code_names.read for code_names in inner)),
        frozenset(attributes).union(*(code_names.attributes for code_names in inner)),
        frozenset(texts).union(*(code_names.texts for code_names in inner)),
        frozenset(imported).union(*(code_names.imported for code_names in inner)),
        frozenset(assigned).union(*(code_names.assigned for code_names in inner)),
        frozenset(stored).union(*(code_names.stored_cells for code_names in inner)),
    )


def _constants(constants: Iterable[object]) -> set[str]:
    """Return the texts among constants, including those in tuples."""
    names: set[str] = set()
    for constant in constants:
        if isinstance(constant, str):
            names.add(constant)
        elif isinstance(constant, tuple | frozenset):
            names |= _constants(cast("Iterable[object]", constant))
    return names
