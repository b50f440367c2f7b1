"""What every diagnostic has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, ClassVar, Literal

from mechdsl.base.record import Record, keyword_record
from mechdsl.base.source import Span

Severity = Literal["error", "warning"]

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

    span: Span | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.code in CODES:
            raise ValueError(f"code {cls.code} is used twice")
        CODES[cls.code] = cls

    @property
    def severity(self) -> Severity:
        """An error keeps a file from running, a warning doesn't."""
        return "warning" if self.code.startswith("W") else "error"

    def _facts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def message(self) -> str:
        """The headline with the facts put in."""
        return self.title.format(**self._facts())

    @property
    def label_text(self) -> str:
        """What stands beside the carets."""
        return self.label.format(**self._facts())

    @property
    def help_text(self) -> str:
        """What to write instead."""
        return self.help.format(**self._facts())


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether any of them is an error, so that nothing may run."""
    return any(d.severity == "error" for d in diagnostics)
