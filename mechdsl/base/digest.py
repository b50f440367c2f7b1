"""Digests of plain values: equal for equal ones, on every machine and in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from hashlib import blake2b
from typing import Any, cast

BYTES = 16
"""Of a digest."""


def digest(*parts: object) -> bytes:
    """16 bytes. Parts are numbers, texts, bytes, arrays, records, functions, classes, sequences,
    sets and mappings of these; TypeError for anything else, so that nothing is left out unseen.

    A record counts with its class and the fields that take part in its comparison.
    """
    made = blake2b(digest_size=BYTES)
    _feed(made, parts)
    return made.digest()


def number_of(*parts: object) -> int:
    """A digest as a number in 0..2^64-1."""
    return int.from_bytes(digest(*parts)[:8], "little")


def _feed(made: Any, value: object) -> None:
    """Every value is written with its kind and its length, so that no two run into each other."""
    match value:
        case None | bool() | int() | float():
            _write(made, "v", f"{type(value).__name__} {value!r}".encode())
        case str():
            _write(made, "s", value.encode("utf-8", "surrogatepass"))
        case bytes():
            _write(made, "b", value)
        case Mapping():
            pairs = cast("Mapping[object, object]", value)
            each = sorted(digest(key) + digest(own) for key, own in pairs.items())
            _write(made, "m", b"".join(each))
        case Set():
            _write(made, "e", b"".join(sorted(map(digest, cast("Iterable[object]", value)))))
        case list() | tuple():
            items = cast("tuple[object, ...]", value)
            _write(made, "l", str(len(items)).encode())
            for item in items:
                _feed(made, item)
        case _:
            _feed_object(made, value)


def _feed_object(made: Any, value: object) -> None:
    import numpy as np  # here, as few files need it to be checked

    if isinstance(value, np.ndarray):
        array = cast("np.ndarray[Any, Any]", value)
        if array.dtype == object:
            raise TypeError("an array of objects has no digest")
        _write(made, "a", f"{array.dtype.str} {array.shape}".encode())
        _write(made, "d", np.ascontiguousarray(array).tobytes())
    elif isinstance(value, np.generic):
        _feed(made, cast(object, value.item()))
    elif is_dataclass(value) and not isinstance(value, type):
        _write(made, "r", _name(type(value)).encode())
        _feed(made, [(f.name, getattr(value, f.name)) for f in fields(value) if f.compare])
    else:
        _write(made, "f", _name(value).encode())


def _name(value: object) -> str:
    """Of a class or function; TypeError for what has no name of its own."""
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise TypeError(f"a {type(value).__name__} has no digest")
    return f"{getattr(value, '__module__', '')}.{name}"


def _write(made: Any, kind: str, content: bytes) -> None:
    made.update(f"{kind}{len(content)}:".encode())
    made.update(content)
