"""Diagnostics as terminal text, JSON, SARIF and Python exceptions or warnings."""

from __future__ import annotations

import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO
from urllib.parse import quote

from mechdsl.base import limits
from mechdsl.base.text import Source, Span, dump_json, escape_hidden
from mechdsl.diagnostics.core import Diagnostic

TAB_WIDTH = 4
"""Columns per tab."""

MIN_TEXT_WIDTH = 40

_BOX = {"corner": "┌─", "bar": "│", "cut": "…"}

_ASCII = {"corner": "-->", "bar": "|", "cut": "..."}

_COLOURS = {"error": "1;31", "warning": "1;33", "title": "1", "frame": "34", "help": "36"}


def sort_diagnostics(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Sort by file and position; diagnostics without a position come first."""

    def key(diagnostic: Diagnostic) -> tuple[str, int, int, str]:
        span = diagnostic.span
        if span is None:
            return "", -1, -1, diagnostic.code
        return span.source.name, span.start, span.end, diagnostic.code

    return sorted(diagnostics, key=key)


def render_summary(diagnostics: Iterable[Diagnostic]) -> str:
    """Format `2 errors, 1 warning`; empty without diagnostics."""
    severities = [d.severity for d in diagnostics]
    counts = [(severities.count("error"), "error"), (severities.count("warning"), "warning")]
    return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)


def _is_warning(diagnostic: Diagnostic) -> bool:
    return diagnostic.severity == "warning"


def needs_ascii(stream: TextIO) -> bool:
    """Whether the stream can't encode the frame characters."""
    try:
        "".join(_BOX.values()).encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


# --- for people -------------------------------------------------------------------------------


def render_full(
    diagnostics: Iterable[Diagnostic],
    *,
    color: bool = False,
    width: int = 100,
    ascii: bool = False,
) -> str:
    """Format diagnostics (`limits.DIAGNOSTICS` at most) with their source lines, and their number.

    Args:
        width: Columns of the terminal; longer lines of a file are cut around the position.
        ascii: Use no frame characters, and escape other non-ASCII characters (see `needs_ascii`).
    """
    ordered = sort_diagnostics(diagnostics)
    if not ordered:
        return ""
    painter = _Painter(color, max(width, MIN_TEXT_WIDTH), _ASCII if ascii else _BOX)
    last = render_summary(ordered)
    if len(ordered) > limits.DIAGNOSTICS:
        last += f"; showing the first {limits.DIAGNOSTICS:,}, errors first"
        ordered = sort_diagnostics(sorted(ordered, key=_is_warning)[: limits.DIAGNOSTICS])
    text = "\n\n".join([*(painter.one(d) for d in ordered), last]) + "\n"
    return text.encode("ascii", "backslashreplace").decode("ascii") if ascii else text


@dataclass(frozen=True)
class _Painter:
    color: bool
    width: int
    signs: dict[str, str]

    def paint(self, kind: str, text: str) -> str:
        return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if self.color and text else text

    def one(self, diagnostic: Diagnostic) -> str:
        severity = diagnostic.severity
        head = self.paint(severity, f"{severity}[{diagnostic.code}]")
        lines = [head + self.paint("title", f": {_clean(diagnostic.message)}")]
        gutter = 0
        if diagnostic.span is not None:
            last = diagnostic.span.source.line_column(diagnostic.span.end)[0]
            gutter = len(str(last))
            lines += self._place(diagnostic, diagnostic.span, gutter)
        elif diagnostic.label_text:  # on a separate line, as there is no source line
            cause = _clean(diagnostic.label_text)
            lines.append(" " + self.paint("frame", "= cause:") + f" {cause}")
        if diagnostic.help_text:
            helps = _clean(diagnostic.help_text, keep="\n").split("\n")
            lead = " " * (gutter + 1)
            lines.append(lead + self.paint("help", "= help:") + f" {helps[0]}")
            lines += [f"{lead}        {more}" for more in helps[1:]]
        return "\n".join(lines)

    def _place(self, diagnostic: Diagnostic, span: Span, gutter: int) -> list[str]:
        source = span.source
        first, column = source.line_column(span.start)
        last, end_column = source.line_column(span.end)
        if last > first and end_column == 1:
            # A span that ends with a line break ends on the previous line.
            last -= 1
            end_column = len(source.line_text(last)) + 1
        corner, bar = self.signs["corner"], self.signs["bar"]
        where = f"{_clean(source.name)}:{first}:{column}"
        lines = [self.paint("frame", " " * gutter + corner) + f" {where}"]
        empty = self.paint("frame", " " * gutter + f" {bar}")
        numbers = [first] if first == last else [first, last]
        for number in numbers:
            if number != first and number > first + 1:
                lines.append(f"{empty} {self.signs['cut']}")
            text = source.line_text(number)
            start = column - 1 if number == first else len(text) - len(text.lstrip())
            end = end_column - 1 if number == last else len(text)
            shown, before, marks = self._window(text, start, max(start, end), gutter)
            label = f" {_clean(diagnostic.label_text)}" if number == last else ""
            carets = self.paint(diagnostic.severity, "^" * marks + label)
            numbered = self.paint("frame", f"{number:>{gutter}} {bar}")
            lines.append(f"{numbered} {shown}".rstrip())
            lines.append(f"{empty} {' ' * before}{carets}".rstrip())
        return lines

    def _window(self, text: str, start: int, end: int, gutter: int) -> tuple[str, int, int]:
        """Return the visible part of a line, the columns before the carets, and the carets'
        number."""
        room = self.width - gutter - 3
        start, end = min(start, len(text)), min(end, len(text))
        before, marked, after = _shown(text[:start]), _shown(text[start:end]), _shown(text[end:])
        if _columns(before + marked + after) <= room:
            return before + marked + after, _columns(before), max(1, _columns(marked))
        cut = self.signs["cut"]
        kept = _head(marked, room // 2, cut)
        left = _tail(before, max(room // 3, room - _columns(kept) - _columns(after) - 1), cut)
        right = _head(after, max(0, room - _columns(left) - _columns(kept)), cut)
        return left + kept + right, _columns(left), max(1, _columns(kept))


def _clean(text: str, keep: str = "") -> str:
    """Return the text on one line, without terminal control characters."""
    blanks = {ord(char): " " for char in "\n\t" if char not in keep}
    return escape_hidden(text.translate(blanks), keep)


def _shown(text: str) -> str:
    """Replace the tabs in a piece of a source line by blanks."""
    return escape_hidden(text.replace("\t", " " * TAB_WIDTH))


def _columns(text: str) -> int:
    """Return the number of terminal columns of a text."""
    return len(text) if text.isascii() else sum(map(_char_columns, text))


def _char_columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _head(text: str, room: int, cut: str) -> str:
    """Return the beginning of a text, with a mark if it is cut."""
    # Avoids measuring a line of two megabytes character by character.
    if len(text) <= 4 * room and _columns(text) <= room:
        return text
    kept, used = "", _columns(cut)
    for char in text[: room + 1]:
        used += _char_columns(char)
        if used > room:
            break
        kept += char
    return kept + cut if room >= len(cut) else ""


def _tail(text: str, room: int, cut: str) -> str:
    """Return the end of a text, with a mark if it is cut."""
    if len(text) <= 4 * room and _columns(text) <= room:
        return text
    kept, used = "", _columns(cut)
    for char in reversed(text[-room - 1 :]):
        used += _char_columns(char)
        if used > room:
            break
        kept = char + kept
    return cut + kept


# --- for tools --------------------------------------------------------------------------------


def diagnostic_facts(diagnostic: Diagnostic) -> dict[str, Any]:
    """Return the content of every machine-readable form; lines and columns are 1-based."""
    facts: dict[str, Any] = {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "label": diagnostic.label_text,
        "help": diagnostic.help_text,
        "file": None,
        "line": None,
        "column": None,
        "end_line": None,
        "end_column": None,
    }
    if diagnostic.span is not None:
        source = diagnostic.span.source
        facts["file"] = source.name
        facts["line"], facts["column"] = source.line_column(diagnostic.span.start)
        facts["end_line"], facts["end_column"] = source.line_column(diagnostic.span.end)
    return facts


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """Format a list of objects, in source order."""
    return dump_json([diagnostic_facts(d) for d in sort_diagnostics(diagnostics)], indent=2)


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Format workflow commands that annotate the lines of a pull request."""
    lines: list[str] = []
    for diagnostic in sort_diagnostics(diagnostics):
        known = diagnostic_facts(diagnostic)
        properties = {
            "file": known["file"],
            "line": known["line"],
            "col": known["column"],
            "endLine": known["end_line"],
            "endColumn": known["end_column"],
            "title": diagnostic.code,
        }
        if known["end_line"] != known["line"]:
            # Columns are only allowed for a single line.
            properties["col"] = properties["endColumn"] = None
        listed = ",".join(
            f"{key}={_github(str(value), ':,')}"
            for key, value in properties.items()
            if value is not None
        )
        texts = [diagnostic.message, diagnostic.label_text, diagnostic.help_text]
        message = _github("\n".join(filter(None, texts)))
        lines.append(f"::{diagnostic.severity} {listed}::{message}\n")
    return "".join(lines)


def _github(text: str, more: str = "") -> str:
    text = escape_hidden(text, keep="\r\n")
    for char in "%\r\n" + more:
        text = text.replace(char, f"%{ord(char):02X}")
    return text


def render_sarif(diagnostics: Iterable[Diagnostic]) -> str:
    """Format SARIF 2.1.0, for code scanning."""
    ordered = sort_diagnostics(diagnostics)
    classes = {d.code: type(d) for d in ordered}
    codes = sorted(classes)
    rules = [
        {"id": code, "shortDescription": {"text": _sarif_rule(classes[code])}} for code in codes
    ]
    driver = {"name": "mechdsl", "rules": rules}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_sarif(d, codes) for d in ordered],
    }
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    return dump_json(log, indent=2)


def _sarif_rule(kind: type[Diagnostic]) -> str:
    """Return the description of a code; a dataclass's default docstring is its signature."""
    written = (kind.__doc__ or "").split("\n")[0]
    return kind.title if not written or written.startswith(f"{kind.__name__}(") else written


def _sarif(diagnostic: Diagnostic, codes: Sequence[str]) -> dict[str, Any]:
    known = diagnostic_facts(diagnostic)
    text = "\n".join(filter(None, [known["message"], known["label"], known["help"]]))
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "ruleIndex": codes.index(diagnostic.code),
        "level": diagnostic.severity,
        "message": {"text": text},
    }
    if diagnostic.span is not None:
        result["locations"] = [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(diagnostic.span.source)},
                    "region": {
                        "startLine": known["line"],
                        "startColumn": known["column"],
                        "endLine": known["end_line"],
                        "endColumn": known["end_column"],
                    },
                }
            }
        ]
    return result


def _uri(source: Source) -> str:
    path = source.path
    if path is None:
        return source.origin
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())


DiagnosticFormat = Literal["full", "json", "github", "sarif"]

DIAGNOSTIC_FORMATS: dict[DiagnosticFormat, Callable[[Iterable[Diagnostic]], str]] = {
    "full": render_full,
    "json": render_json,
    "github": render_github,
    "sarif": render_sarif,
}


class Diagnostics(list[Diagnostic]):
    """A list of errors and warnings; `print` shows them as the command line does."""

    @property
    def errors(self) -> Diagnostics:
        """The errors, which keep a file from running."""
        return Diagnostics(problem for problem in self if problem.severity == "error")

    @property
    def warnings(self) -> Diagnostics:
        """The warnings, with which a file runs."""
        return Diagnostics(problem for problem in self if problem.severity == "warning")

    def render(self, format: DiagnosticFormat = "full") -> str:
        """Return the output of `mechdsl validate --format FORMAT`.

        Raises:
            ValueError: For another format.
        """
        if format not in DIAGNOSTIC_FORMATS:
            raise ValueError(
                f"there is no format `{format}`: formats are {', '.join(DIAGNOSTIC_FORMATS)}"
            )
        return DIAGNOSTIC_FORMATS[format](self)

    def __str__(self) -> str:
        return self.render() or "no errors, no warnings"

    def __repr__(self) -> str:
        return str(self).rstrip("\n")


class MechdslError(Exception):
    """A file, its data, its model or an argument is invalid.

    Its text is the output of the command line.
    """

    diagnostics: Diagnostics
    """The errors and warnings as objects."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(diagnostics)  # makes it picklable
        self.diagnostics = Diagnostics(diagnostics)

    def __str__(self) -> str:
        return "\n" + self.diagnostics.render()


class MechdslWarning(UserWarning):
    """A warning about a file that runs."""

    diagnostic: Diagnostic
    """The warning as an object."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic

    def __str__(self) -> str:
        return render_one_line(self.diagnostic)


def render_one_line(diagnostic: Diagnostic) -> str:
    """Format `W0730 at heads.mech:3:1: …; …; help: …`: code, position, message, cause and help."""
    span = diagnostic.span
    place = "" if span is None else f" at {span.source.name}:{span.line}:{span.column}"
    helped = f"help: {diagnostic.help_text}" if diagnostic.help_text else ""
    said = "; ".join(filter(None, (diagnostic.message, diagnostic.label_text, helped)))
    text = f"{diagnostic.code}{place}: {said}"
    return " ".join(text.split())


def warn_diagnostics(diagnostics: Iterable[Diagnostic]) -> None:
    """Show each diagnostic through `warnings`, with the location of the call to this package."""
    level = _frames_of_ours()
    for problem in sort_diagnostics(diagnostics):
        warnings.warn(MechdslWarning(problem), stacklevel=level)


def _frames_of_ours() -> int:
    """Return the stack level, as for `warnings.warn`, of the first frame outside this package."""
    # `skip_file_prefixes` does this from Python 3.12 on.
    package = __name__.partition(".")[0]
    level, frame = 0, sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level + 1
