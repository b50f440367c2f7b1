"""E0208 and the pages of `mechdsl explain`: command-line errors, documentation by code."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.files import shipped_path
from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic, did_you_mean


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
        hint="name a file in a folder that exists and may be written to",
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


def is_page_name(text: str) -> bool:
    """Whether a text is `language`, or has the form of a code: `E0301`, `w0710`."""
    return text == LANGUAGE_PAGE or (text[:1] in tuple("EWew") and text[1:].isdigit())


def find_page(name: str) -> tuple[str, list[Diagnostic]]:
    """Find the page of the language, or of a code in any case; E0208 if there is none."""
    if name == LANGUAGE_PAGE:
        return shipped_path("language.md", "docs/language.md").read_text(encoding="utf-8"), []
    code = name.upper()
    text = read_page(code)
    if text is not None:
        return text, []
    hint = did_you_mean(code, page_codes(), "codes look like E0305")
    return "", [BadCommandLine(reason=f"there is no code `{code}`", hint=hint)]
