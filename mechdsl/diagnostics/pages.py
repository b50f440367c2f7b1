"""The pages that `mechdsl explain` prints: one for each code, and that of the language."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.shipped import shipped_path
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean

LANGUAGE = "language"
"""The word for the page of the language."""


def _folder() -> Path:
    return shipped_path("error_pages", "docs/errors")


def codes() -> list[str]:
    """Every code that has a page."""
    return sorted(path.stem for path in _folder().glob("[EW]*.md"))


def page(code: str) -> str | None:
    """The page of a code, None where there is none."""
    path = _folder() / f"{code}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def names_page(text: str) -> bool:
    """Whether a text is `language`, or written like a code: `E0301`, `w0710`."""
    return text == LANGUAGE or (text[:1] in tuple("EWew") and text[1:].isdigit())


def page_of(name: str) -> tuple[str, list[Diagnostic]]:
    """The page of the language, or of a code, in capitals or not; E0208 where there is none."""
    if name == LANGUAGE:
        return shipped_path("language.md", "docs/language.md").read_text(encoding="utf-8"), []
    code = name.upper()
    text = page(code)
    if text is not None:
        return text, []
    hint = did_you_mean(code, codes(), "codes look like E0305")
    return "", [BadCommandLine(reason=f"there is no code `{code}`", hint=hint)]
