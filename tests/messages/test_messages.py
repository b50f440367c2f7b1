"""Messages of `mechdsl validate` about invalid programs, stored with the programs in Markdown.

Read them as a new user: does a message point to the error, name the problem, and propose a valid
fix?
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.diagnostics.rendering import render_full

from .cases import HERE, Case, all_cases

CASES = all_cases()
MOST = 2
"""Maximum number of diagnostics for one mistake."""
SLIPS = HERE / "slips" / "counting.md"
EXAMPLE = HERE / "slips" / "counting.mech"
"""`examples/counting.mech` as of the review of the misspellings, with fewer rows."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_messages_equal_the_stored_text(case: Case, tmp_path: Path, update: bool) -> None:
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


def test_case_ids_are_unique() -> None:
    assert [name for name, times in Counter(case.id for case in CASES).items() if times > 1] == []


def misspelt(line: str) -> str | None:
    """The line with two letters of one of its words swapped."""
    words = [word for word in line.replace("_", " ").split() if word.isalpha() and len(word) > 3]
    if not words or line.lstrip().startswith("#"):
        return None
    word = words[len(line) % len(words)]
    at = next(i for i in range(1, len(word) - 1) if word[i] != word[i + 1])
    return line.replace(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :], 1)


def test_misspelling_in_each_line_equals_the_stored_messages(update: bool) -> None:
    """Each misspelling is reported once, where it is or first matters, without further errors."""
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
