"""Frozen dataclasses that cost nothing until they are used.

A hundred kinds of nodes and more of diagnostics are defined at every start of the command, few of
them are met in one file, and the standard decorator compiles six functions for each. These compile
one, when the first object of the kind is made; equality, hash and representation are written once
here, and that nothing is assigned to is the type checker's to see.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from threading import Lock
from typing import Any, TypeVar, dataclass_transform

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
                dataclass(init=False, eq=False, repr=False, kw_only=waiting.kw_only)(each)
                if vars(each).get("__init__") is _finish_and_init:
                    # In one step: until then, other threads wait for the lock.
                    each.__init__ = _initializer(each)


def _initializer(kind: type[Record]) -> Any:
    """`__init__` as `dataclass` writes it, which replaces no function that a class has already."""
    every = [(each.name, Any, copy(each)) for each in fields(kind)]  # type: ignore[arg-type]
    own = {"__post_init__": None} if hasattr(kind, "__post_init__") else {}
    return make_dataclass(kind.__name__, every, namespace=own, eq=False, repr=False).__init__


def _finish_and_init(self: Record, *args: Any, **values: Any) -> None:
    """The initializer of a class until its first object is made."""
    _finish(type(self))
    type(self).__init__(self, *args, **values)


class Record:
    """Equal to another of its class whose compared fields are equal."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        _finish(type(self))  # an unpickled object may be the first of its class in this process
        self.__dict__.update(state)

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
    return _waiting(kind, kw_only=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def keyword_record(kind: T) -> T:
    """The same with all fields given by name."""
    return _waiting(kind, kw_only=True)


def _waiting(kind: T, *, kw_only: bool) -> T:
    setattr(kind, _FIELDS, _Unfinished(kw_only=kw_only))
    if "__init__" not in vars(kind):
        setattr(kind, "__init__", _finish_and_init)  # noqa: B010
    return kind
