"""Values of a row, their text, and the scope in which expressions are evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

from mechdsl.base.hashing import stable_hash
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.syntax import ast

SEPARATOR = "sep"
"""Name of the spans between the items of a list."""


class TextSpan(NamedTuple):
    """One occurrence of a named span in a prompt: characters `start` to `end` (exclusive).

    A tuple, because a hundred rows of lists make tens of thousands of them.
    """

    name: str
    start: int
    end: int
    within: tuple[str, ...] = ()
    """Names of the spans around it, outermost first (`("part1",)` for an item of `part1`)."""


cached_span = lru_cache(maxsize=2**16)(TextSpan)
"""`SpanAt`, one object for equal ones: the lists of all rows have the same few."""


@dataclass(frozen=True, slots=True)
class RichText:
    """A text with the named spans in it."""

    text: str
    spans: tuple[TextSpan, ...] = ()


@lru_cache(maxsize=256)
def unmarked_text(text: str) -> RichText:
    """A text without spans; rows are made of a few of these."""
    return RichText(text)


_NOTHING_DRAWN: Mapping[str, RowValue] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ListItem:
    """One entry of a list."""

    value: RowValue
    rich: RichText
    drawn: Mapping[str, RowValue] = field(default_factory=lambda: _NOTHING_DRAWN)
    """What stands in the placeholders of its text."""


cached_item = lru_cache(maxsize=2**12)(ListItem)
"""`Item` of a text, one object for equal ones: the lists of all rows draw from the same few."""


@dataclass(frozen=True, slots=True)
class ItemList:
    """What `list(…)` gives: its items are spans called `name`, if that isn't empty."""

    name: str
    items: tuple[ListItem, ...]
    sep: str
    last: str
    text: ast.String | None = None
    """What each item is written as, of a list of texts."""


@dataclass(frozen=True)
class TokenId:
    """What `token_id(column)` gives."""

    id: int


DataRecord: TypeAlias = Mapping[str, "RowValue"]

RowValue: TypeAlias = (
    "int | float | bool | str | RichText | ItemList | TokenId | list[RowValue] | DataRecord | None"
)
"""Lists and mappings come from data files."""


def format_number(value: int | float) -> str:
    """`3` for 3 and 3.0, `0.5` for 0.5."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    return repr(value)


def render_value(value: RowValue) -> RichText | None:
    """The text of a value; None where it has none (no value, a raw list or record)."""
    match value:
        case RichText():
            return value
        case str():
            return unmarked_text(value)
        case bool():
            return RichText("true" if value else "false")
        case int() | float():
            return RichText(format_number(value))
        case ItemList():
            return _join(value)
        case _:
            return None


def _join(items: ItemList) -> RichText:
    parts: list[tuple[str, RichText]] = []
    for i, item in enumerate(items.items):
        if i:
            final = i == len(items.items) - 1
            parts.append((SEPARATOR, unmarked_text(items.last if final else items.sep)))
        parts.append((items.name, item.rich))
    return concatenate(parts)


def concatenate(parts: Iterable[tuple[str, RichText]]) -> RichText:
    """Texts behind one another; each is a span of its name (none where the name is empty)."""
    text = ""
    spans: list[TextSpan] = []
    for name, rich in parts:
        at = len(text)
        text += rich.text
        if name:
            spans.append(cached_span(name, at, len(text)))
        if rich.spans:
            around = (name,) if name else ()
            spans += [
                cached_span(n, at + a, at + b, around + within) for n, a, b, within in rich.spans
            ]
    return RichText(text, tuple(spans))


_PLAIN = (str, int, float, NoneType)


def is_whole_number(number: int | float) -> bool:
    """Whether it is a whole number, however large; infinity and NaN are none."""
    return isinstance(number, int) or number.is_integer()


def to_plain(value: RowValue) -> object:
    """The value without spans, as tables and comparisons want it."""
    if isinstance(value, _PLAIN):
        return value  # as most are; whether it is a mapping is a slow question
    match value:
        case RichText(text=text):
            return text
        case ItemList(items=items):
            return [to_plain(item.value) for item in items]
        case TokenId(id=number):
            return number
        case list():
            return [to_plain(v) for v in value]
        case Mapping():
            return {k: to_plain(v) for k, v in value.items()}
        case _:
            return value


def to_hashable(value: object) -> object:
    """A plain value as something that can be compared and put in a set."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return tuple(to_hashable(v) for v in cast("list[object]", value))
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return tuple((k, to_hashable(v)) for k, v in pairs)
    return value


class Refusal(Exception):
    """A row can't be built. Raised while it is evaluated, caught where rows are collected, and
    turned into its diagnostic there, with the row's description as the fact `rows`."""

    def __init__(self, kind: type[Diagnostic], span: Span, **facts: Any) -> None:
        super().__init__(kind.code)
        self.kind = kind
        self.span = span
        self.facts = facts

    @staticmethod
    def of(problem: Diagnostic) -> Refusal:
        """One that says what a diagnostic with a place says."""
        assert problem.span is not None
        facts = {f.name: getattr(problem, f.name) for f in fields(problem) if f.name != "span"}
        return Refusal(type(problem), problem.span, **facts)

    def diagnostic(self, row: str) -> Diagnostic:
        facts = dict(self.facts)
        if "rows" in {f.name for f in fields(self.kind)}:
            facts.setdefault("rows", row)
        return self.kind(span=self.span, **facts)


@dataclass
class DrawKey:
    """Which draw this is: the value it is for, then the call within it, then the item.

    A corruption's own draws have its name in front, so that what it writes out is drawn anew and
    everything else keeps its draws.
    """

    path: str
    calls: int = 0

    def call(self) -> DrawKey:
        """The key of the next call in the expression."""
        self.calls += 1
        return DrawKey(f"{self.path}.{self.calls}")

    def item(self, index: int) -> DrawKey:
        return DrawKey(f"{self.path}[{index}]")


class Scope(Protocol):
    """Names with values, and draws. Where there is nothing to give, methods raise `Refusal`."""

    def value(self, name: str, span: Span) -> RowValue: ...

    def known(self, name: str) -> bool:
        """Whether `value` finds something."""
        ...

    def attribute(self, name: str, attribute: str, span: Span) -> RowValue: ...

    def text(self, node: ast.String, key: DrawKey) -> RichText:
        """A text with its placeholders filled in."""
        ...

    def placeholders(self, node: ast.String) -> Sequence[ast.Expr]:
        """What stands in the braces of a text."""
        ...

    def domain(self, node: ast.Expr) -> Sequence[RowValue]:
        """The values that an expression (most often a name) ranges over."""
        ...

    def records(self, name: str, *, drawn: bool) -> Sequence[DataRecord] | None:
        """The records of a block of prompts, by its name: in the order of the file, or, where some
        are drawn, in one that hangs on their content."""
        ...

    def python(self, node: ast.Call) -> RowValue:
        """What a function of a Python file gives for the row."""
        ...

    def is_own(self, record: DataRecord, fields: Sequence[str]) -> bool:
        """Whether the row has the same values in these fields."""
        ...

    def tokens(self, node: ast.Expr, value: RowValue) -> int:
        """How many tokens an expression has in the prompt, if it is a span of it, or behind it."""
        ...

    def changed_item(self, name: str, value: RowValue, key: DrawKey) -> RowValue:
        """A drawn item, as the corruption leaves it."""
        ...

    def draw(self, key: DrawKey, index: int, below: int) -> int:
        """A seeded number in 0..below-1."""
        ...

    def kept(self, key: DrawKey) -> list[RowValue]:
        """In a corrupted row, what the clean row drew there; else nothing."""
        ...

    def keep(self, key: DrawKey, value: RowValue) -> None:
        """Remember what was drawn."""
        ...

    def order(self, key: DrawKey, size: int) -> Sequence[int]:
        """A seeded permutation of 0..size-1."""
        ...

    def elsewhere(self, name: str, span: Span) -> RowValue:
        """The value of a column or domain in the row that a seeded permutation of all of them
        puts here."""
        ...

    def with_values(self, values: Mapping[str, RowValue]) -> Scope:
        """The same row with some more names."""
        ...


KEY_BITS = 63
"""Of a key, so that it fits into a column of integers."""


def content_key(values: Mapping[str, object], texts: Iterable[object] = ()) -> int:
    """A number in 0..2^63-1, equal for equal values and texts, whatever order the names are in.

    values: plain, by name.
    """
    return stable_hash(_canonical_json(dict(values)), *map(_canonical_json, texts)) >> (
        128 - KEY_BITS
    )


def _canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
