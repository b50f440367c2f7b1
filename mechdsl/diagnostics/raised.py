"""Diagnostics as Python meets them: a list, an exception, a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.render import (
    in_order,
    render_full,
    render_github,
    render_json,
    render_sarif,
)

Format = Literal["full", "json", "github", "sarif"]
FORMATS: dict[Format, Callable[[Iterable[Diagnostic]], str]] = {
    "full": render_full,
    "json": render_json,
    "github": render_github,
    "sarif": render_sarif,
}


class Diagnostics(list[Diagnostic]):
    """Errors and warnings, a list. `print` shows them as the command line does."""

    @property
    def errors(self) -> Diagnostics:
        """Those because of which nothing runs."""
        return Diagnostics(each for each in self if each.severity == "error")

    @property
    def warnings(self) -> Diagnostics:
        """Those with which a file runs."""
        return Diagnostics(each for each in self if each.severity == "warning")

    def render(self, format: Format = "full") -> str:
        """As text: what `mechdsl validate --format FORMAT` prints.

        Raises ValueError for another format.
        """
        if format not in FORMATS:
            raise ValueError(f"there is no format `{format}`: formats are {', '.join(FORMATS)}")
        return FORMATS[format](self)

    def __str__(self) -> str:
        return self.render() or "no errors, no warnings"

    def __repr__(self) -> str:
        return str(self).rstrip("\n")


class MechdslError(Exception):
    """A file, its data, its model or an argument is wrong.

    As text it is what the command line prints; `diagnostics` are the same as objects.
    """

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(diagnostics)  # by which it can be sent from process to process
        self.diagnostics = Diagnostics(diagnostics)

    def __str__(self) -> str:
        return "\n" + self.diagnostics.render()


class MechdslWarning(UserWarning):
    """A warning about a file that runs. `diagnostic` is the same as an object."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic

    def __str__(self) -> str:
        return one_line(self.diagnostic)


def one_line(diagnostic: Diagnostic) -> str:
    """`W0730 at heads.mech:3:1: …; …; help: …`: code, place, message, cause and help."""
    span = diagnostic.span
    place = "" if span is None else f" at {span.source.name}:{span.line}:{span.column}"
    helped = f"help: {diagnostic.help_text}" if diagnostic.help_text else ""
    said = "; ".join(filter(None, (diagnostic.message, diagnostic.label_text, helped)))
    text = f"{diagnostic.code}{place}: {said}"
    return " ".join(text.split())


def warn(diagnostics: Iterable[Diagnostic]) -> None:
    """Show each through `warnings`, as coming from the line that called this package."""
    level = _frames_of_ours()
    for each in in_order(diagnostics):
        warnings.warn(MechdslWarning(each), stacklevel=level)


def _frames_of_ours() -> int:
    """How many frames up, seen from `warn`, the first one is that isn't of this package."""
    # `skip_file_prefixes` does this from Python 3.12 on.
    package = __name__.partition(".")[0]
    level, frame = 0, sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level + 1
