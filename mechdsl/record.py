"""Frozen dataclasses that cost little to define.

A hundred kinds of nodes and as many diagnostics are defined at every start of the command, and the
standard decorator compiles six functions for each. These compile one; equality, hash and
representation are written once here, and that nothing is assigned to is the type checker's to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T", bound="type[Record]")


class Record:
    """Equal to another of its class whose compared fields are equal."""

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
    return dataclass(eq=False, repr=False)(kind)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def keyword_record(kind: T) -> T:
    """The same with all fields given by name."""
    return dataclass(eq=False, repr=False, kw_only=True)(kind)
