"""Every complete program of README and the pages of docs is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.rendering import render_full

from ..markdown import fences

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_MODEL = {"checkpoints.mech"}
"""Programs on models that the reader trains."""


def programs(page: Path) -> list[tuple[str, str]]:
    blocks = [each for each in fences(page.read_text("utf-8")) if each.language == "mech"]
    return [
        (each.file or each.heading, each.content) for each in blocks if "mech 1\n" in each.content
    ]


def test_pages_have_complete_programs() -> None:
    assert sum(len(programs(page)) for page in PAGES) > 70


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_complete_programs_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    for block in fences(page.read_text(encoding="utf-8")):
        if block.file is not None:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.content, encoding="utf-8")
    for name, text in programs(page):
        source = Source(text, tmp_path / "file.mech")
        found = check_source(source, CheckSettings(python="look")).diagnostics
        errors = [each for each in found if each.severity == "error"]
        if name in WITHOUT_MODEL:
            assert errors[0].code == "E0401"
            continue
        assert not errors, f"{name}: {render_full(errors, color=False, width=100)}"
