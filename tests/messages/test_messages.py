"""What `mechdsl validate` says about wrong programs, each beside its program in a Markdown file.

To be read as somebody new to the language would: does it point at the place, does it say what is
wrong, can what it proposes be typed?
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mechdsl.base.source import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full

from .cases import HERE, Case, all_cases

CASES = all_cases()
MOST = 2
"""Diagnostics about one mistake."""
SLIPS = HERE / "slips" / "counting.md"
EXAMPLE = HERE / "slips" / "counting.mech"
"""`examples/counting.mech` as it was when the misspellings were read, on fewer rows."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_is_said(case: Case, tmp_path: Path, update: bool) -> None:
    path, found = case.check(tmp_path)
    assert found
    assert has_errors(found) == ("only-warned" not in case.flags)
    assert all(each.span is not None for each in found)
    if "several" not in case.flags:
        assert len(found) <= MOST
        for each in found:
            assert render_full([each]).count("= help: ") == 1, "nothing says what to write"
    shown = render_full(found, width=100)
    shown = shown.replace(str(path), "$FILE").replace(str(tmp_path), "$FOLDER")
    if update:
        case.write(shown)
    else:
        assert case.said is not None, "pytest tests/messages --update-goldens"
        assert shown == case.said.content


def test_titles_are_told_apart() -> None:
    assert [name for name, times in Counter(case.id for case in CASES).items() if times > 1] == []


def misspelt(line: str) -> str | None:
    """The line with two letters of one of its words the wrong way round."""
    words = [word for word in line.replace("_", " ").split() if word.isalpha() and len(word) > 3]
    if not words or line.lstrip().startswith("#"):
        return None
    word = words[len(line) % len(words)]
    at = next(i for i in range(1, len(word) - 1) if word[i] != word[i + 1])
    return line.replace(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :], 1)


def test_a_slip_in_each_line(update: bool) -> None:
    """Each is said once, at the slip or where it first matters; nothing follows from it."""
    text = EXAMPLE.read_text(encoding="utf-8")
    lines = text.split("\n")
    assert not check_source(Source(text)).diagnostics
    shown = [f"# `{EXAMPLE.name}`, with a slip in one line after another\n"]
    for number, line in enumerate(lines):
        wrong = misspelt(line)
        if wrong is None:
            continue
        slipped = "\n".join([*lines[:number], wrong, *lines[number + 1 :]])
        found = check_source(Source(slipped)).diagnostics
        assert len(found) <= 4, wrong
        said = render_full(found).replace("<text>", "$FILE") or "nothing\n"
        shown.append(f"## Line {number + 1}: `{wrong.strip()}`\n\n```text\n{said}```\n")
    assert len(shown) > 30
    if update:
        SLIPS.write_text("\n".join(shown), encoding="utf-8")
    assert "\n".join(shown) == SLIPS.read_text(encoding="utf-8")
