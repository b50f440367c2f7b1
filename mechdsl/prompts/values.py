"""Values of a row, and the text that they become in a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

if TYPE_CHECKING:
    from mechdsl.syntax import ast

SEPARATOR = "sep"
"""Name of the spans between the items of a list."""


class SpanAt(NamedTuple):
    """One occurrence of a named span in a prompt: characters `start` to `end` (exclusive).

    A tuple, because a hundred rows of lists make tens of thousands of them.
    """

    name: str
    start: int
    end: int
    within: tuple[str, ...] = ()
    """Names of the spans around it, outermost first (`("part1",)` for an item of `part1`)."""


shared_span = lru_cache(maxsize=2**16)(SpanAt)
"""`SpanAt`, one object for equal ones: the lists of all rows have the same few."""


@dataclass(frozen=True, slots=True)
class Rich:
    """A text with the named spans in it."""

    text: str
    spans: tuple[SpanAt, ...] = ()


@lru_cache(maxsize=256)
def bare(text: str) -> Rich:
    """A text without spans; rows are made of a few of these."""
    return Rich(text)


_NOTHING_DRAWN: Mapping[str, Value] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a list."""

    value: Value
    rich: Rich
    drawn: Mapping[str, Value] = field(default_factory=lambda: _NOTHING_DRAWN)
    """What stands in the placeholders of its text."""


shared_item = lru_cache(maxsize=2**12)(Item)
"""`Item` of a text, one object for equal ones: the lists of all rows draw from the same few."""


@dataclass(frozen=True, slots=True)
class Items:
    """What `list(…)` gives: its items are spans called `name`, if that isn't empty."""

    name: str
    items: tuple[Item, ...]
    sep: str
    last: str
    text: ast.String | None = None
    """What each item is written as, of a list of texts."""


@dataclass(frozen=True)
class TokenId:
    """What `token_id(column)` gives."""

    id: int


Record: TypeAlias = Mapping[str, "Value"]
Value: TypeAlias = "int | float | bool | str | Rich | Items | TokenId | list[Value] | Record | None"
"""Lists and mappings come from data files."""


def number_text(value: int | float) -> str:
    """`3` for 3 and 3.0, `0.5` for 0.5."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    return repr(value)


def render(value: Value) -> Rich | None:
    """The text of a value; None where it has none (no value, a raw list or record)."""
    match value:
        case Rich():
            return value
        case str():
            return bare(value)
        case bool():
            return Rich("true" if value else "false")
        case int() | float():
            return Rich(number_text(value))
        case Items():
            return _join(value)
        case _:
            return None


def _join(items: Items) -> Rich:
    parts: list[tuple[str, Rich]] = []
    for i, item in enumerate(items.items):
        if i:
            final = i == len(items.items) - 1
            parts.append((SEPARATOR, bare(items.last if final else items.sep)))
        parts.append((items.name, item.rich))
    return concatenate(parts)


def concatenate(parts: Iterable[tuple[str, Rich]]) -> Rich:
    """Texts behind one another; each is a span of its name (none where the name is empty)."""
    text = ""
    spans: list[SpanAt] = []
    for name, rich in parts:
        at = len(text)
        text += rich.text
        if name:
            spans.append(shared_span(name, at, len(text)))
        if rich.spans:
            around = (name,) if name else ()
            spans += [
                shared_span(n, at + a, at + b, around + within) for n, a, b, within in rich.spans
            ]
    return Rich(text, tuple(spans))


_PLAIN = (str, int, float, NoneType)


def is_whole(number: int | float) -> bool:
    """Whether it is a whole number, however large; infinity and NaN are none."""
    return isinstance(number, int) or number.is_integer()


def plain(value: Value) -> object:
    """The value without spans, as tables and comparisons want it."""
    if isinstance(value, _PLAIN):
        return value  # as most are; whether it is a mapping is a slow question
    match value:
        case Rich(text=text):
            return text
        case Items(items=items):
            return [plain(item.value) for item in items]
        case TokenId(id=number):
            return number
        case list():
            return [plain(v) for v in value]
        case Mapping():
            return {k: plain(v) for k, v in value.items()}
        case _:
            return value


def frozen(value: object) -> object:
    """A plain value as something that can be compared and put in a set."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return tuple(frozen(v) for v in cast("list[object]", value))
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return tuple((k, frozen(v)) for k, v in pairs)
    return value
