"""The base class of all diagnostics, and helpers for their hints."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import field, fields
from typing import Any, ClassVar, Literal, TypeAlias, dataclass_transform

from mechdsl.base.records import Record, closest_name
from mechdsl.base.text import Span

Severity = Literal["error", "warning"]

UnknownFact: TypeAlias = Literal["shape", "tokens", "rows", "count", "columns"]
"""Facts that may be unknown and replaced by placeholders: sizes and sites of a model, tokens of
texts, rows of prompts, their number, and column names of a data file."""

UNKNOWN_FACTS: tuple[UnknownFact, ...] = ("shape", "tokens", "rows", "count", "columns")

_COUNTED = re.compile(
    r"(?<!of )\{(\w+)[^}]*\} "
    r"(?:cell|draw|head|item|layer|measure|model|position|prompt|row|token)s\b"
)
"""A number of things in a message, except in expressions such as `1 of 1 rows`."""

CODES: dict[str, type[Diagnostic]] = {}
"""Every code of the language, filled as the classes are defined."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Diagnostic(Record, kw_only=True):
    """An error or a warning. Each code has a subclass, whose fields are the facts of the message.

    `title`, `label` and `help` are format strings over the fields. `span` is None if the error
    isn't at a position in a file (such as an unknown option of the command line).
    """

    code: ClassVar[str] = ""
    """Code of the error or warning, such as `E0301`. `mechdsl.explain` returns its page."""
    title: ClassVar[str] = ""
    """Format string of `message`."""
    label: ClassVar[str] = ""
    """Format string of `label_text`."""
    help: ClassVar[str] = ""
    """Format string of `help_text`."""
    depends_on: ClassVar[frozenset[UnknownFact]] = frozenset()
    """Facts that must be known for this to be certain; with placeholders it isn't reported."""

    span: Span | None = None
    """Position in a file: `span.source.name`, `span.line`, `span.column`, `span.text`; None if the
    problem isn't in a file."""
    by_text: bool = False
    """Whether this instance depends only on the text, regardless of `depends_on`."""
    rewrite: str = ""
    """The text that replaces the marked text, if the fix is known."""
    rewrite_help: str = ""
    """Format string of `help_text` in place of `help`, if the fix is a rewrite."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__(kw_only=True)
        if cls.code in CODES:
            raise ValueError(f"code {cls.code} is used twice")
        if cls.code:
            CODES[cls.code] = cls

    @property
    def severity(self) -> Severity:
        """Severity: an error keeps a file from running, a warning doesn't."""
        return "warning" if self.code.startswith("W") else "error"

    def _facts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def _said(self, wording: str) -> str:
        """Format a text with the facts and the correct plurals: `1 row`, `2 rows`."""
        facts = self._facts()

        def counted(match: re.Match[str]) -> str:
            return match[0][:-1] if facts[match[1]] == 1 else match[0]

        return _COUNTED.sub(counted, wording).format(**facts)

    @property
    def message(self) -> str:
        """The formatted title."""
        return self._said(self.title)

    @property
    def label_text(self) -> str:
        """The formatted text next to the carets."""
        return self._said(self.label)

    @property
    def help_text(self) -> str:
        """The formatted fix."""
        if self.rewrite_help:
            return self.rewrite_help.replace("{rewrite}", self.rewrite)
        return self._said(self.help)


class HintedDiagnostic(Diagnostic):
    """A diagnostic whose fix depends on the case."""

    help = "{hint}"

    hint: str
    """The fix."""


class ReasonedDiagnostic(HintedDiagnostic):
    """A diagnostic whose cause and fix depend on the case."""

    label = "{reason}"

    reason: str
    """The cause."""


class ModelDiagnostic(Diagnostic):
    """A diagnostic about a model."""

    model: str
    """Name of the model in the file."""


class BlockDiagnostic(Diagnostic):
    """A diagnostic about a block of prompts or images."""

    prompts: str
    """Name of the block."""
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""


class RowsDiagnostic(Diagnostic):
    """A diagnostic about some of the rows of a block."""

    rows: int
    """Number of affected rows."""
    total: int
    """Number of all rows."""


class MissingRowsDiagnostic(Diagnostic):
    """A diagnostic about rows of a run in which something is missing."""

    label = "as in {example}"

    run: str
    lacking: int
    """Number of affected rows."""
    total: int
    """Number of all rows."""
    example: str
    """Text of an affected row."""


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether any diagnostic is an error, so that nothing may run."""
    return any(d.severity == "error" for d in diagnostics)


def filter_certain(
    problems: Iterable[Diagnostic], unknown: Collection[UnknownFact]
) -> list[Diagnostic]:
    """Return the diagnostics that are certain regardless of the unknown facts."""
    return [
        problem for problem in problems if problem.by_text or problem.depends_on.isdisjoint(unknown)
    ]


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str, *, written: Callable[[str], str] = str
) -> str:
    """Return a help line: the most similar known word, or else a general fix.

    Args:
        otherwise: The general fix.
        written: Formats the known word.
    """
    near = closest_name(word, known)
    return f"did you mean `{written(near)}`?" if near else otherwise
