"""Forms of statements: the words and fields of each, from which it is built and printed.

A form has the shape of the statement's rule in the grammar:

    patch {site} at {at:positions} [onto {onto:positions}] [with {source:ref}]

Words stand for themselves, words in single quotes are one token. `{onto:positions}` is the field
`onto` of the kind `positions`; the kind of `{site}` is `site`. `mechdsl.syntax.tree_builder` reads
each kind, and `mechdsl.syntax.printer` prints it. `[…]` may be left out, `[frozen=with …]` sets the
field `frozen` to True, and `(… | …)` and `[… | …]` have alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

from mechdsl.base.records import Record

NodeT = TypeVar("NodeT", bound=type[Any])


class FormField(Record):
    """A field of a statement."""

    name: str
    kind: str


class FormGroup(Record):
    """Alternatives, of which a statement has one."""

    alternatives: tuple[tuple[FormPart, ...], ...]
    optional: bool
    flag: str = ""
    """Field that is True if the statement has the group."""


FormPart: TypeAlias = str | FormField | FormGroup


class Form(Record):
    """The form of one class of statements."""

    node: type[Any]
    rules: tuple[str, ...]
    """Rules of the grammar that have this form."""
    text: str

    @cached_property
    def parts(self) -> tuple[FormPart, ...]:
        """The parts, in order."""
        alternatives, rest = _parse(_MARKS.findall(self.text))
        assert len(alternatives) == 1
        assert not rest, rest
        return alternatives[0]

    @property
    def body(self) -> str:
        """The field with the lines in braces, which is the last one; empty without braces."""
        last = self.parts[-1]
        return last.name if isinstance(last, FormField) and last.kind == "block" else ""


FORMS: dict[type[Any], Form] = {}
"""Forms by class of the syntax tree."""


def statement(form: str, *rules: str) -> Callable[[NodeT], NodeT]:
    """Give a class of the syntax tree its form.

    Args:
        rules: Rules of the grammar that have the form.
    """

    def register(node: NodeT) -> NodeT:
        FORMS[node] = Form(node, rules, form)
        return node

    return register


_MARKS = re.compile(r"\{[\w:]+\}|\w+=(?=[\w'])|'[^']+'|[\[\]()|]|[^\s\[\]()|{}]+")


def _parse(marks: Sequence[str]) -> tuple[list[tuple[FormPart, ...]], Sequence[str]]:
    """Return the alternatives up to a closing bracket, and the marks from there on."""
    forms: list[tuple[FormPart, ...]] = []
    parts: list[FormPart] = []
    while marks and marks[0] not in "])":
        mark, *marks = marks
        if mark == "|":
            forms.append(tuple(parts))
            parts = []
        elif mark in "[(":
            flag = marks[0].removesuffix("=") if marks[0][-1] == "=" and len(marks[0]) > 1 else ""
            alternatives, rest = _parse(marks[bool(flag) :])
            parts.append(FormGroup(tuple(alternatives), mark == "[", flag))
            marks = rest[1:]
        elif mark[0] == "{":
            name, _, kind = mark[1:-1].partition(":")
            parts.append(FormField(name, kind or name))
        else:
            parts.append(mark.strip("'"))
    return [*forms, tuple(parts)], marks


def iter_parts(parts: Sequence[FormPart]) -> Iterator[str | FormField]:
    """Iterate over the words and fields, with those of all groups."""
    for part in parts:
        if isinstance(part, FormGroup):
            for each in part.alternatives:
                yield from iter_parts(each)
        else:
            yield part


def chosen_parts(group: FormGroup, node: Any) -> tuple[FormPart, ...]:
    """Return the alternative of a group that a statement has; empty if it has none."""
    if group.flag:
        return group.alternatives[0] if getattr(node, group.flag) else ()
    for each in group.alternatives:
        required = [part for part in each if isinstance(part, FormField)]
        fields = required or [part for part in iter_parts(each) if isinstance(part, FormField)]
        if fields and _is_given(getattr(node, fields[0].name)):
            return each
    return ()


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", ())
