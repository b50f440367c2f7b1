"""docs/generation.md: its file runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

from ..markdown import fences
from .conftest import Command

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def test_the_page(tmp_path: Path, command: Command) -> None:
    program, *shown = fences(PAGE.read_text(encoding="utf-8"))
    assert program.file is not None
    path = tmp_path / program.file
    path.write_text(program.content, encoding="utf-8")
    done = command("run", path)
    assert done.status == 0, done.err
    printed = re.sub(r" +$", "", done.out, flags=re.MULTILINE)
    assert len(shown) == 3
    for fence in shown:
        assert fence.content.strip() in printed
