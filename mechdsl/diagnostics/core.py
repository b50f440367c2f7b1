"""The base class of all diagnostics, and helpers for their hints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from typing import Any, ClassVar, Literal, TypeAlias

from mechdsl.base.records import Record, closest_name, keyword_record
from mechdsl.base.source import Span

Severity = Literal["error", "warning"]

UnknownFact: TypeAlias = Literal["shape", "tokens", "rows", "count", "columns"]
"""What isn't known where something stands in for it: the sizes and sites of a model, the tokens of
texts, the rows of prompts, how many there are of them, the names that a data file gives them."""

UNKNOWN_FACTS: tuple[UnknownFact, ...] = ("shape", "tokens", "rows", "count", "columns")

_COUNTED = re.compile(
    r"(?<!of )\{(\w+)[^}]*\} "
    r"(?:cell|draw|head|item|layer|measure|model|position|prompt|row|token)s\b"
)
"""A number of things in a wording, but for those of which some are meant: `1 of 1 rows`."""

CODES: dict[str, type[Diagnostic]] = {}
"""Every code of the language, filled as the classes are defined."""


@keyword_record
class Diagnostic(Record):
    """A subclass fixes `code` and the wording; its fields are the facts.

    `title`, `label` and `help` are format strings over the fields. `span` is None where no place
    in a file is at fault (an unknown option of the command line).
    """

    code: ClassVar[str] = ""
    title: ClassVar[str] = ""
    label: ClassVar[str] = ""
    help: ClassVar[str] = ""
    hangs_on: ClassVar[frozenset[UnknownFact]] = frozenset()
    """What has to be known for this to be true: it isn't said where that only stands in."""

    span: Span | None = None
    by_text: bool = False
    """The text alone decides it, whatever `hangs_on` says of others of its kind."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.code in CODES:
            raise ValueError(f"code {cls.code} is used twice")
        if cls.code:
            CODES[cls.code] = cls

    @property
    def severity(self) -> Severity:
        """An error keeps a file from running, a warning doesn't."""
        return "warning" if self.code.startswith("W") else "error"

    def _facts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _said(self, wording: str) -> str:
        """The wording with the facts put in: `1 row`, `2 rows`."""
        facts = self._facts()

        def counted(found: re.Match[str]) -> str:
            return found[0][:-1] if facts[found[1]] == 1 else found[0]

        return _COUNTED.sub(counted, wording).format(**facts)

    @property
    def message(self) -> str:
        """The headline with the facts put in."""
        return self._said(self.title)

    @property
    def label_text(self) -> str:
        """What stands beside the carets."""
        return self._said(self.label)

    @property
    def help_text(self) -> str:
        """What to write instead."""
        return self._said(self.help)


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether any of them is an error, so that nothing may run."""
    return any(d.severity == "error" for d in diagnostics)


def filter_certain(
    found: Iterable[Diagnostic], unknown: Collection[UnknownFact]
) -> list[Diagnostic]:
    """Those that are true whatever stands in for what is unknown."""
    return [each for each in found if each.by_text or each.hangs_on.isdisjoint(unknown)]


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str, *, written: Callable[[str], str] = str
) -> str:
    """A help line: the known word that is near where there is one, else what to do.

    written: how the known word is written there.
    """
    near = closest_name(word, known)
    return f"did you mean `{written(near)}`?" if near else otherwise
