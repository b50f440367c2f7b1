"""The pages of error codes: in a wheel they lie in the package, in a checkout in `docs/errors`."""

from __future__ import annotations

from pathlib import Path

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean

_HERE = Path(__file__).parents[1]


def _folder() -> Path:
    shipped = _HERE / "error_pages"
    return shipped if shipped.is_dir() else _HERE.parent / "docs" / "errors"


def codes() -> list[str]:
    """Every code that has a page."""
    return sorted(path.stem for path in _folder().glob("[EW]*.md"))


def page(code: str) -> str | None:
    """The page of a code, None where there is none."""
    path = _folder() / f"{code}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def is_code(text: str) -> bool:
    """Whether a text is written like a code: `E0301`, `w0710`."""
    return text[:1] in tuple("EWew") and text[1:].isdigit()


def page_of(code: str) -> tuple[str, list[Diagnostic]]:
    """The page of a code, in capitals or not; E0208 where there is none."""
    code = code.upper()
    text = page(code)
    if text is not None:
        return text, []
    hint = did_you_mean(code, codes(), "codes look like E0305")
    return "", [BadCommandLine(reason=f"there is no code `{code}`", hint=hint)]
