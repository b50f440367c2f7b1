"""The pages of error codes: in a wheel they lie in the package, in a checkout in `docs/errors`."""

from __future__ import annotations

from pathlib import Path

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
