"""Frozen dataclasses that cost nothing until they are used.

A hundred kinds of nodes and more of diagnostics are defined at every start of the command, few of
them are met in one file, and the standard decorator compiles six functions for each. These compile
one, when the first object of the kind is made; equality, hash and representation are written once
here, and that nothing is assigned to is the type checker's to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from threading import Lock
from typing import Any, Self, TypeVar, dataclass_transform

T = TypeVar("T", bound="type[Record]")

_FIELDS = "__dataclass_fields__"
_FINISHING = Lock()


class _Unfinished:
    """Stands where a kind keeps its fields, until they are asked for."""

    def __init__(self, *, kw_only: bool) -> None:
        self.kw_only = kw_only

    def __get__(self, instance: Any, kind: type[Record]) -> Any:
        _finish(kind)
        return getattr(kind, _FIELDS)


@cache
def _finish(kind: type[Record]) -> None:
    """Make dataclasses of a kind and of those it inherits from."""
    with _FINISHING:
        for each in reversed(kind.__mro__):
            waiting = vars(each).get(_FIELDS)
            if isinstance(waiting, _Unfinished):
                dataclass(eq=False, repr=False, kw_only=waiting.kw_only)(each)


class Record:
    """Equal to another of its class whose compared fields are equal."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        _finish(cls)
        return object.__new__(cls)

    def _key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _compared(type(self)))

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Record)
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _shown(type(self)))
        return f"{type(self).__name__}({shown})"


@cache
def _compared(kind: type[Record]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.compare)  # type: ignore[arg-type]


@cache
def _shown(kind: type[Record]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.repr)  # type: ignore[arg-type]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(kind: T) -> T:
    """`@dataclass` for a subclass of Record; frozen, as far as the type checker is concerned."""
    setattr(kind, _FIELDS, _Unfinished(kw_only=False))
    return kind


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def keyword_record(kind: T) -> T:
    """The same with all fields given by name."""
    setattr(kind, _FIELDS, _Unfinished(kw_only=True))
    return kind
