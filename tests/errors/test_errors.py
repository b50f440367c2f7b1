"""Wrong programs, and what is said about each: one `.err` beside each `.mech`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechdsl.base.source import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.render import render_full
from mechdsl.validate.file import check_source

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("*.mech"))
EXAMPLE = HERE / "counting.txt"
"""`examples/counting.mech` as it was when the misspellings below were read."""


def check(text: str, path: Path | None = None) -> list[Diagnostic]:
    return check_source(Source(text, path)).diagnostics


def compare(shown: str, golden: Path, update: bool) -> None:
    if update:
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_error(path: Path, update: bool) -> None:
    found = check(path.read_text(encoding="utf-8"), path)
    code = path.stem.partition("_")[0]
    if code != "many":
        assert {d.code for d in found} == {code}
    assert all(d.span is not None and d.span.text for d in found)
    shown = render_full(found).replace(str(HERE), "$HERE")
    compare(shown, path.with_suffix(".err"), update)


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
    lines = EXAMPLE.read_text(encoding="utf-8").split("\n")
    assert not check("\n".join(lines))
    shown: list[str] = []
    for number, line in enumerate(lines):
        wrong = misspelt(line)
        if wrong is None:
            continue
        found = check("\n".join([*lines[:number], wrong, *lines[number + 1 :]]))
        assert len(found) <= 4, wrong
        said = render_full(found).replace("<text>", "$FILE") or "nothing\n"
        shown.append(f"### {number + 1}: {wrong.strip()}\n\n{said}")
    assert len(shown) > 30
    compare("\n".join(shown), HERE / "slips.err", update)
