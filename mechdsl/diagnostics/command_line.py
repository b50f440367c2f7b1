"""E0208 and the pages of `mechdsl explain`: command-line errors, documentation by code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from mechdsl.base.files import shipped_path
from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.other_tools import translate_word


@keyword_record
class BadCommandLine(Diagnostic):
    """A mistake on the command line."""

    code = "E0208"
    title = "{reason}"
    help = "{hint}"
    reason: str
    hint: str


@keyword_record
class PluginNotLoaded(Diagnostic):
    """A plugin that is not installed, or can't be imported."""

    code = "E0211"
    title = "plugin `{plugin}` {reason}"
    help = "{hint}"
    plugin: str
    reason: str
    hint: str


def write_error(error: OSError) -> BadCommandLine:
    """Return E0208 for a file that can't be written."""
    said = (error.strerror or str(error)).lower()
    return BadCommandLine(
        reason=f"cannot write `{error.filename}`: {said}",
        hint="choose a path in an existing, writable folder",
    )


LANGUAGE_PAGE = "language"
"""Name of the page of the language."""


def _pages_folder() -> Path:
    return shipped_path("error_pages", "docs/errors")


def page_codes() -> list[str]:
    """Return every code that has a page."""
    return sorted(path.stem for path in _pages_folder().glob("[EW]*.md"))


def read_page(code: str) -> str | None:
    """Read the page of a code; None if there is none."""
    path = _pages_folder() / f"{code}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


_CODE = re.compile(r"[EWew][0-9]+")

_WORD = re.compile(r"[A-Za-z_]\w*")

_LANGUAGE_ROW = re.compile(r"\| (?P<example>`.*?`) \| (?P<meaning>.*?) \|")


def is_page_name(text: str) -> bool:
    """Whether a text is `language`, a word, or has the form of a code: `E0301`, `w0710`.

    A file or folder of that name takes precedence over a word.
    """
    if text == LANGUAGE_PAGE or _CODE.fullmatch(text):
        return True
    return _WORD.fullmatch(text) is not None and not Path(text).exists()


@cache
def _language_page() -> str:
    return shipped_path("language.md", "docs/language.md").read_text(encoding="utf-8")


def language_words() -> list[str]:
    """Return every word in the examples of the language page, without the texts in quotes."""
    words: set[str] = set()
    for _, example, _ in _language_rows():
        words.update(_WORD.findall(re.sub(r'"[^"]*"', "", example)))
    return sorted(word for word in words if len(word) > 1 or word.islower())


def _language_rows() -> list[tuple[str, str, str]]:
    """Return section, example and meaning of each row of the language page's tables."""
    rows: list[tuple[str, str, str]] = []
    section = ""
    for line in _language_page().splitlines():
        if line.startswith("## "):
            section = line[3:]
        row = _LANGUAGE_ROW.match(line)
        if row is not None:
            rows.append((section, row["example"].replace("\\|", "|"), row["meaning"]))
    return rows


def _word_page(word: str) -> str:
    """Return the rows of the language page whose example contains a word.

    Rows whose example begins with the word replace the others, if there are any.
    """
    whole = re.compile(rf"\b{re.escape(word)}\b")
    rows = [row for row in _language_rows() if whole.search(re.sub(r'"[^"]*"', "", row[1]))]
    rows = [row for row in rows if whole.match(row[1].lstrip("`"))] or rows
    lines: list[str] = []
    for n, (section, example, meaning) in enumerate(rows):
        if n == 0 or section != rows[n - 1][0]:
            lines += [f"# `{word}`: {section}", ""]
        lines += [example, f"    {meaning}", ""]
    return "\n".join(lines)


def _find_word(word: str) -> tuple[str, list[Diagnostic]]:
    text = _word_page(word)
    if text:
        return text, []
    site = translate_word(word)
    general = "`mechdsl explain language` lists every construct; a file ends in `.mech`"
    hint = f"write `{site}`" if site else did_you_mean(word, language_words(), general)
    return "", [
        BadCommandLine(reason=(f"`{word}` is not a keyword, an error code or a file"), hint=hint)
    ]


def find_page(name: str) -> tuple[str, list[Diagnostic]]:
    """Find the page of the language, of a code in any case, or of a word; E0208 if there is
    none."""
    if name == LANGUAGE_PAGE:
        return _language_page(), []
    if not _CODE.fullmatch(name):
        return _find_word(name)
    code = name.upper()
    text = read_page(code)
    if text is not None:
        return text, []
    hint = did_you_mean(code, page_codes(), "codes look like E0305")
    return "", [BadCommandLine(reason=f"there is no code `{code}`", hint=hint)]
