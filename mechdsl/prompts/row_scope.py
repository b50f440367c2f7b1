"""What expressions are evaluated in: the names of one row, and its seeded draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.prompts.values import Record, Rich, Value
from mechdsl.syntax import ast


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
class Key:
    """Which draw this is: the value it is for, then the call within it, then the item.

    A corruption's own draws have its name in front, so that what it writes out is drawn anew and
    everything else keeps its draws.
    """

    path: str
    calls: int = 0

    def call(self) -> Key:
        """The key of the next call in the expression."""
        self.calls += 1
        return Key(f"{self.path}.{self.calls}")

    def item(self, index: int) -> Key:
        return Key(f"{self.path}[{index}]")


class Scope(Protocol):
    """Names with values, and draws. Where there is nothing to give, methods raise `Refusal`."""

    def value(self, name: str, span: Span) -> Value: ...

    def known(self, name: str) -> bool:
        """Whether `value` finds something."""
        ...

    def attribute(self, name: str, attribute: str, span: Span) -> Value: ...

    def text(self, node: ast.String, key: Key) -> Rich:
        """A text with its placeholders filled in."""
        ...

    def placeholders(self, node: ast.String) -> Sequence[ast.Expr]:
        """What stands in the braces of a text."""
        ...

    def domain(self, node: ast.Expr) -> Sequence[Value]:
        """The values that an expression (most often a name) ranges over."""
        ...

    def records(self, name: str, *, drawn: bool) -> Sequence[Record] | None:
        """The records of a block of prompts, by its name: in the order of the file, or, where some
        are drawn, in one that hangs on their content."""
        ...

    def python(self, node: ast.Call) -> Value:
        """What a function of a Python file gives for the row."""
        ...

    def is_own(self, record: Record, fields: Sequence[str]) -> bool:
        """Whether the row has the same values in these fields."""
        ...

    def tokens(self, node: ast.Expr, value: Value) -> int:
        """How many tokens an expression has in the prompt, if it is a span of it, or behind it."""
        ...

    def changed_item(self, name: str, value: Value, key: Key) -> Value:
        """A drawn item, as the corruption leaves it."""
        ...

    def draw(self, key: Key, index: int, below: int) -> int:
        """A seeded number in 0..below-1."""
        ...

    def kept(self, key: Key) -> list[Value]:
        """In a corrupted row, what the clean row drew there; else nothing."""
        ...

    def keep(self, key: Key, value: Value) -> None:
        """Remember what was drawn."""
        ...

    def order(self, key: Key, size: int) -> Sequence[int]:
        """A seeded permutation of 0..size-1."""
        ...

    def elsewhere(self, name: str, span: Span) -> Value:
        """The value of a column or domain in the row that a seeded permutation of all of them
        puts here."""
        ...

    def with_values(self, values: Mapping[str, Value]) -> Scope:
        """The same row with some more names."""
        ...
