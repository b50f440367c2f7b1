"""Values of a row, their text, and the scope in which expressions are evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

from mechdsl.base.hashing import stable_hash
from mechdsl.base.records import compact_record
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.syntax import ast

SEPARATOR = "sep"
"""Name of the spans between the items of a list."""


class TextSpan(NamedTuple):
    """One occurrence of a named span in a prompt: characters `start` to `end` (exclusive).

    A tuple, because a hundred rows of lists have tens of thousands of spans.
    """

    name: str
    start: int
    end: int
    within: tuple[str, ...] = ()
    """Names of the enclosing spans, outermost first (`("part1",)` for an item of `part1`)."""


cached_span = lru_cache(maxsize=2**16)(TextSpan)
"""`TextSpan`, with equal spans as one object: the lists of all rows share a few spans."""


@compact_record
class RichText:
    """A text with its named spans."""

    text: str
    spans: tuple[TextSpan, ...] = ()


@lru_cache(maxsize=256)
def unmarked_text(text: str) -> RichText:
    """Return a text without spans; cached, because rows consist of a few such texts."""
    return RichText(text)


_NOTHING_DRAWN: Mapping[str, RowValue] = MappingProxyType({})


@compact_record
class ListItem:
    """One entry of a list."""

    value: RowValue
    rich: RichText
    drawn: Mapping[str, RowValue] = field(default_factory=lambda: _NOTHING_DRAWN)
    """The values of the placeholders in its text."""


cached_item = lru_cache(maxsize=2**12)(ListItem)
"""`ListItem` of a text, with equal items as one object: the lists of all rows share a few."""


@compact_record
class ItemList:
    """The value of `list(…)`: its items are spans called `name`, unless that is empty."""

    name: str
    items: tuple[ListItem, ...]
    sep: str
    last: str
    text: ast.String | None = None
    """For a list of texts, the text of each item."""


@dataclass(frozen=True)
class TokenId:
    """The value of `token_id(column)`."""

    id: int


DataRecord: TypeAlias = Mapping[str, "RowValue"]

RowValue: TypeAlias = (
    "int | float | bool | str | RichText | ItemList | TokenId | list[RowValue] | DataRecord | None"
)
"""Lists and mappings come from data files."""


def format_number(value: int | float) -> str:
    """Format a number: `3` for 3 and 3.0, `0.5` for 0.5."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        return str(int(value))
    return repr(value)


def render_value(value: RowValue) -> RichText | None:
    """Return the text of a value; None if it has none (no value, a raw list or record)."""
    if isinstance(value, str):  # the most common
        return unmarked_text(value)
    match value:
        case RichText():
            return value
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


def concatenate(parts: Iterable[str | tuple[str, RichText]]) -> RichText:
    """Concatenate texts; each with a name that isn't empty is a span of it."""
    text = ""
    spans: list[TextSpan] = []
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        name, rich = part
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


def to_plain(value: RowValue) -> object:
    """Return the value without spans, for tables and comparisons."""
    if isinstance(value, _PLAIN):
        return value  # the common case, and the test for a mapping is slow
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
    """Convert a plain value to a hashable one for comparisons and sets."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return tuple(to_hashable(v) for v in cast("list[object]", value))
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, object]", value).items()
        return tuple((k, to_hashable(v)) for k, v in pairs)
    return value


class Refusal(Exception):
    """The reason that a row can't be built.

    Raised during evaluation, caught where rows are collected and converted there to its diagnostic,
    with the row's description as the fact `rows`.
    """

    def __init__(self, kind: type[Diagnostic], span: Span, **facts: Any) -> None:
        super().__init__(kind.code)
        self.kind = kind
        self.span = span
        self.facts = facts

    @staticmethod
    def of(problem: Diagnostic) -> Refusal:
        """Return a refusal with the facts of a diagnostic that has a span."""
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
    """The identity of a draw: the value it is for, then the call within it, then the item.

    The draws of a corruption have its name as prefix, so that its assignments are drawn
    independently and all other values keep their draws.
    """

    path: str
    calls: int = 0

    def call(self) -> DrawKey:
        """Return the key of the next call in the expression."""
        self.calls += 1
        return DrawKey(f"{self.path}.{self.calls}")

    def item(self, index: int) -> DrawKey:
        return DrawKey(f"{self.path}[{index}]")


class Scope(Protocol):
    """Names with values, and draws. Methods raise `Refusal` if they have no result."""

    def value(self, name: str, span: Span) -> RowValue: ...

    def known(self, name: str) -> bool:
        """Return whether `value` has a result for a name."""
        ...

    def attribute(self, name: str, attribute: str, span: Span) -> RowValue: ...

    def text(self, node: ast.String, key: DrawKey) -> RichText:
        """Fill in the placeholders of a text."""
        ...

    def placeholders(self, node: ast.String) -> Sequence[ast.Expr]:
        """Return the expressions in the braces of a text."""
        ...

    def domain(self, node: ast.Expr) -> Sequence[RowValue]:
        """Return the values that an expression (most often a name) ranges over."""
        ...

    def records(self, name: str, *, drawn: bool) -> Sequence[DataRecord] | None:
        """Return the records of a block of prompts by name.

        They are in file order or, for draws, in an order that depends on their content.
        """
        ...

    def python(self, node: ast.Call) -> RowValue:
        """Return the value of a Python file's function for the row."""
        ...

    def is_own(self, record: DataRecord, fields: Sequence[str]) -> bool:
        """Return whether the row has the record's values in these fields."""
        ...

    def tokens(self, node: ast.Expr, value: RowValue) -> int:
        """Count an expression's tokens: in the prompt if it is a span there, else after it."""
        ...

    def changed_item(self, name: str, value: RowValue, key: DrawKey) -> RowValue:
        """Return a drawn item after the corruption's change to it."""
        ...

    def draw(self, key: DrawKey, index: int, below: int) -> int:
        """Return a seeded number in 0..below-1."""
        ...

    def kept(self, key: DrawKey) -> list[RowValue]:
        """Return the clean row's draw in a corrupted row; else nothing."""
        ...

    def keep(self, key: DrawKey, value: RowValue) -> None:
        """Store a draw."""
        ...

    def order(self, key: DrawKey, size: int) -> Sequence[int]:
        """Return a seeded permutation of 0..size-1."""
        ...

    def elsewhere(self, name: str, span: Span) -> RowValue:
        """Return the value of a column or domain in the row that a seeded permutation of all rows
        maps to this one."""
        ...

    def with_values(self, values: Mapping[str, RowValue]) -> Scope:
        """Return the same row with additional names."""
        ...


KEY_BITS = 63
"""Bits of a key, so that it fits into a column of integers."""


def content_key(values: Mapping[str, object], texts: Iterable[object] = ()) -> int:
    """Return a number in 0..2^63-1, equal for equal values and texts in any order of names.

    values: plain values by name.
    """
    return stable_hash(_canonical_json(dict(values)), *map(_canonical_json, texts)) >> (
        128 - KEY_BITS
    )


_canonical_json = json.JSONEncoder(sort_keys=True, default=repr, check_circular=False).encode
