"""docs/generation.md: its files run, and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

from ..markdown import fences
from .conftest import Command
from .test_guides import part_of, same

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def test_generation_page_files_print_the_shown_output(tmp_path: Path, command: Command) -> None:
    printed, shown = "", 0
    for fence in fences(PAGE.read_text(encoding="utf-8")):
        if fence.file is None:
            shown += 1
            expected = fence.content.strip()
            lines = part_of(printed, expected).splitlines()
            pairs = zip(expected.splitlines(), lines, strict=True)
            assert all(same(*pair) for pair in pairs), printed
            continue
        path = tmp_path / fence.file
        path.write_text(fence.content, encoding="utf-8")
        done = command("run", path)
        assert done.status == 0, done.err
        printed = re.sub(r" +$", "", done.out, flags=re.MULTILINE)
    assert shown == 5
