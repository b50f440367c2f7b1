"""Hashes of the code of Python callables, such as functions of a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, cast

from mechdsl.program.code_hashes import CodeHashError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def hash_callable(function: Callable[..., Any]) -> tuple[str, bytes]:
    """Hash the code of a function: bytecode, default values, and the globals that it reads.

    Returns:
        SHA-256, and the `import` lines of the modules that the function uses, for
        `hash_imported_code`.

    Raises:
        CodeHashError: If the function depends on an object whose code or value can't be hashed.
    """
    reader = _Reader()
    parts = reader.read_callable(function)
    imports = "".join(f"import {name}\n" for name in sorted(reader.modules))
    return sha256(f"{parts!r}\n{imports}".encode("utf-8", "surrogatepass")).hexdigest(), (
        imports.encode()
    )


class _Reader:
    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._numbers: dict[int, int] = {}

    def read_callable(self, function: object) -> object:
        if not isinstance(function, FunctionType):
            raise CodeHashError(f"a `{type(function).__name__}` isn't a plain function")
        if id(function) in self._numbers:  # recursion
            return ("function", self._numbers[id(function)])
        self._numbers[id(function)] = len(self._numbers)
        cells = function.__closure__ or ()
        closed = list(zip(function.__code__.co_freevars, cells, strict=True))
        used = sorted({name for name in _names(function.__code__) if name in function.__globals__})
        return (
            _describe_code(function.__code__),
            self._value("its default values", function.__defaults__),
            self._value("its default values", function.__kwdefaults__),
            [(name, self._value(name, _content(name, cell))) for name, cell in closed],
            [(name, self._value(name, function.__globals__[name])) for name in used],
        )

    def _value(self, name: str, value: object) -> object:
        if type(value) in _PLAIN:
            return repr(value)
        if type(value) in (tuple, list):
            items = cast("list[object]", value)
            return (type(value).__name__, [self._value(name, each) for each in items])
        if type(value) is dict:
            pairs = cast("dict[object, object]", value).items()
            return ("dict", [(self._value(name, k), self._value(name, v)) for k, v in pairs])
        if isinstance(value, ModuleType):
            return self._module(value.__name__)
        module = getattr(value, "__module__", None)
        if isinstance(value, type | FunctionType | BuiltinFunctionType) and module:
            if module == "__main__" and isinstance(value, FunctionType):
                return self.read_callable(value)
            if module != "__main__" and "<locals>" not in value.__qualname__:
                return (self._module(module), value.__qualname__)
            if isinstance(value, FunctionType):
                return self.read_callable(value)
        raise CodeHashError(f"`{name}` is a `{type(value).__name__}`, which can't be hashed")

    def _module(self, name: str) -> str:
        if name == "__main__":
            raise CodeHashError("the code of `__main__` can't be hashed")
        self.modules.add(name)
        return f"module {name}"


def _content(name: str, cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        raise CodeHashError(f"`{name}` has no value yet") from None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _describe_code(code: CodeType) -> object:
    return (
        code.co_code,
        code.co_exceptiontable,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars),
        [_describe_constant(each) for each in code.co_consts],
    )


def _describe_constant(constant: object) -> object:
    if isinstance(constant, CodeType):
        return _describe_code(constant)
    if isinstance(constant, frozenset):
        return sorted(map(repr, cast("frozenset[object]", constant)))
    return repr(constant)
