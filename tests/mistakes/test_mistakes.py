"""Likely mistakes of somebody new to the language: what `mechdsl validate` says about each.

One `.txt` beside each `.mech`, to be read as that person would: does it point at the place, does
it say what is wrong, can what it proposes be typed?
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.render import render_full
from mechdsl.validate.file import Settings, check_source

HERE = Path(__file__).parent
MISTAKES = sorted(HERE.glob("*.mech"))
ONLY_WARNED = {"sources_same_as_base", "top_same_rows", "with_base"}
"""What may be meant."""
MOST = 2
"""Diagnostics about one mistake."""


def validate(path: Path) -> list[Diagnostic]:
    source = Source(path.read_text(encoding="utf-8"), Path(path.name))
    return check_source(Source(source.text, path), Settings(python="look")).diagnostics


@pytest.mark.parametrize("path", MISTAKES, ids=lambda path: path.stem)
def test_what_is_said(path: Path, update: bool) -> None:
    found = validate(path)
    errors = [each for each in found if each.severity == "error"]
    assert (not errors) == (path.stem in ONLY_WARNED)
    assert 1 <= len(found) <= MOST
    for each in found:
        assert each.span is not None
        assert render_full([each]).count("= help: ") == 1, "nothing says what to write"
    shown = render_full(found, width=100).replace(str(path), "$FILE")
    golden = path.with_suffix(".txt")
    if update:
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")


def test_every_text_belongs_to_a_mistake() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {path.stem for path in MISTAKES}
