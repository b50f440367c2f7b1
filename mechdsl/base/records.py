"""Frozen records and registries of named entries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from operator import attrgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, dataclass_transform

ClassT = TypeVar("ClassT")

_FIELDS = "__dataclass_fields__"

_FINISHING = Lock()


class _Unfinished:
    """Placeholder for the fields of a class until they are first accessed."""

    def __init__(self, *, kw_only: bool) -> None:
        self.kw_only = kw_only

    def __get__(self, instance: Any, kind: type[Record]) -> Any:
        _finish(kind)
        return getattr(kind, _FIELDS)


@cache
def _finish(kind: type[Record]) -> None:
    """Turn a class and its bases into dataclasses."""
    with _FINISHING:
        for each in reversed(kind.__mro__):
            waiting = vars(each).get(_FIELDS)
            if isinstance(waiting, _Unfinished):
                dataclass(init=False, eq=False, repr=False, kw_only=waiting.kw_only)(each)
                if vars(each).get("__init__") is _finish_and_init:
                    # The last step: until then, other threads wait for the lock.
                    each.__init__ = _initializer(each)


def _initializer(kind: type[Record]) -> Any:
    """Return an `__init__` like the one of `dataclass`, in a third of the time."""
    positional: list[str] = []
    named: list[str] = []
    body: list[str] = []
    scope: dict[str, Any] = {"_no_value": MISSING}
    for each in fields(cast("Any", kind)):
        name, value, default = each.name, each.name, ""
        if each.default_factory is not MISSING:
            scope[f"_make_{name}"] = each.default_factory
            default, made = "=_no_value", f"_make_{name}()"
            value = f"{made} if {name} is _no_value else {name}" if each.init else made
        elif each.default is not MISSING:
            scope[f"_default_{name}"] = each.default
            default = f"=_default_{name}"
        if each.init:
            (named if each.kw_only else positional).append(name + default)
        if each.init or each.default_factory is not MISSING:
            body.append(f" self.{name} = {value}")
    body += [" self.__post_init__()"] if hasattr(kind, "__post_init__") else []
    arguments = ", ".join(["self", *positional, *["*"][: len(named)], *named])
    exec("\n".join([f"def __init__({arguments}):", *(body or [" pass"])]), scope)
    scope["__init__"].__qualname__ = f"{kind.__qualname__}.__init__"
    return scope["__init__"]


def _finish_and_init(self: Record, *args: Any, **values: Any) -> None:
    """Complete the class at the creation of its first object, and call the new initializer."""
    _finish(type(self))
    type(self).__init__(self, *args, **values)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """A record, equal to records of the same class with equal compared fields.

    Each subclass becomes a dataclass on first use; frozen for the type checker only. The fields of
    `class Word(Record, kw_only=True)` are keyword-only.
    """

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__()
        setattr(cls, _FIELDS, _Unfinished(kw_only=kw_only))
        if "__init__" not in vars(cls):
            setattr(cls, "__init__", _finish_and_init)  # noqa: B010

    def __setstate__(self, state: dict[str, Any]) -> None:
        _finish(type(self))  # an unpickled object may be the first of its class in this process
        self.__dict__.update(state)

    def _key(self) -> tuple[Any, ...]:
        return _compared(type(self))(self)

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
def _compared(kind: type[Record]) -> Callable[[Record], tuple[Any, ...]]:
    """Return a function that reads the compared fields of a record."""
    names = [f.name for f in fields(kind) if f.compare]  # type: ignore[arg-type]
    if len(names) > 1:
        return attrgetter(*names)  # of one name, it wouldn't return a tuple
    return lambda record: tuple(getattr(record, name) for name in names)


@cache
def _shown(kind: type[Record]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind) if f.repr)  # type: ignore[arg-type]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def compact_record(kind: type[ClassT]) -> type[ClassT]:
    """Apply `@dataclass` with slots, for classes with many objects; frozen for the type checker
    only, because a check at run time triples the time that an object takes to create."""
    return dataclass(slots=True, unsafe_hash=True)(kind)


if TYPE_CHECKING:
    unlocked_property = cached_property
else:

    class unlocked_property(cached_property):
        """`cached_property` without a lock, which takes longer than a row's simplest values."""

        def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self.attrname] = self.func(instance)
            return value


EntryT = TypeVar("EntryT")


def closest_name(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a misspelt one most likely means.

    A third of its letters may differ. For a word of two letters, exactly one known word has to be
    close and to have the same letters, or all its letters and more, or fewer.
    """
    closest_names = close_names(word, known)
    if len(word) > 2:
        return next(iter(closest_names), None)
    letters = set(word.lower())
    kept = {
        each
        for each in closest_names
        if letters <= set(each.lower()) or set(each.lower()) < letters
    }
    return kept.pop() if len(kept) == 1 else None


def close_names(word: str, known: Iterable[str]) -> list[str]:
    """Return all known words that a misspelt one may mean, closest first.

    Nearly every word of two letters is close to another one, so matches for those need
    confirmation.
    """
    most = max(1, (len(word) + 1) // 3)
    alike = (each for each in known if abs(len(each) - len(word)) <= most)
    ranked = sorted((edit_distance(word.lower(), each.lower()), each) for each in alike)
    return [each for apart, each in ranked if apart <= most]


def edit_distance(a: str, b: str) -> int:
    """Count the letters to insert, delete, replace or swap with a neighbour between two words.

    source: Damerau 1964, doi.org/10.1145/363958.363994, without changes inside a swapped pair
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


_PACKAGE = __name__.partition(".")[0]


def _external_caller() -> str | None:
    """Return the module that registers an entry, the first caller outside the package; None if a
    module of the package registers it."""
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] != _PACKAGE:
            return name
        if frame.f_code.co_name == "<module>":
            return None
        frame = frame.f_back
    return None


def attribute_problem(
    entry: object, *, texts: Sequence[str] = (), counts: Sequence[str] = ()
) -> str | None:
    """Return the reason that a class can't be registered, by the types of its attributes.

    Args:
        entry: The class.
        texts: Attributes that must be texts.
        counts: Attributes that must be whole numbers of at least 1.
    """
    for name in texts:
        if not isinstance(getattr(entry, name, None), str):
            return f"`{name}` must be a text"
    for name in counts:
        value = getattr(entry, name, None)
        if type(value) is not int or value < 1:
            return f"`{name}` must be a whole number of at least 1, not {value!r}"
    return None


class Registry(Generic[EntryT]):
    """Named entries of one kind (sites, metrics, …) in the order of registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.external_modules: set[str] = set()
        """Names of modules outside this package that have registered an entry."""
        self._entries: dict[str, EntryT] = {}
        REGISTRIES.append(self)

    def add(self, name: str, entry: EntryT) -> EntryT:
        """Register an entry. A duplicate name is a programming error, so it raises ValueError."""
        if name in self._entries:
            raise ValueError(f"{self.kind} `{name}` is registered twice")
        self._entries[name] = entry
        module = _external_caller()
        if module is not None:
            self.external_modules.add(module)
        return entry

    def class_decorator(
        self, name: str, find_problem: Callable[[str, type[ClassT]], str | None]
    ) -> Callable[[type[ClassT]], type[ClassT]]:
        """Return a decorator that sets a class's `name` and registers an instance of it.

        The decorator raises TypeError with the text of `find_problem` for a class that can't be
        used, and ValueError for a duplicate name.
        """

        def register(entry: type[ClassT]) -> type[ClassT]:
            problem = find_problem(name, entry)
            if problem is not None:
                raise TypeError(f"{self.kind} `{name}`: {problem}")
            self.add(name, cast("EntryT", entry()))
            entry.name = name  # pyright: ignore[reportAttributeAccessIssue]
            return entry

        return register

    def get(self, name: str) -> EntryT | None:
        return self._entries.get(name)

    def __getitem__(self, name: str) -> EntryT:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterable[tuple[str, EntryT]]:
        return self._entries.items()


REGISTRIES: list[Registry[Any]] = []
"""All registries of this process."""


def external_modules() -> set[str]:
    """Return the names of modules outside this package that have registered an entry."""
    return {module for registry in REGISTRIES for module in registry.external_modules}
