"""Properties that are computed on first access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

ValueT = TypeVar("ValueT")


class lazy_property(Generic[ValueT]):
    """A `functools.cached_property` without a lock, which Python 3.11 takes on every computation.

    Two threads may compute the value at the same time, so the computation must be deterministic.
    """

    def __init__(self, compute: Callable[[Any], ValueT]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy_property[ValueT]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> ValueT: ...
    def __get__(self, instance: object, owner: type) -> lazy_property[ValueT] | ValueT:
        if instance is None:
            return self
        # The value in the instance's dictionary hides this descriptor.
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
