"""Files with terminal escapes: every command shows their text and doesn't execute it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mechdsl.base.text import hidden_characters

from .conftest import HEADS, Command

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202egnp\u202c\u200b[b]:cat:</text><script>"
TEXT = (
    HEADS.replace("Part 1:", f"Part 1: {HOSTILE}")
    .replace("at last-item token", f'at "{HOSTILE}" tokens')
    .replace("as recovery", "as delta")
)
"""The text is in prompts and in a position, hence in tables, labels and graph nodes."""


def harmless(text: str) -> None:
    found = hidden_characters().search(text.replace("\n", ""))
    assert found is None, repr(found)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a file with a hostile name in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("\x1b]0;owned\x07\u202e[b].mech")
    path.write_text(TEXT + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "line",
    [
        "explain",
        "plan",
        "graph --format dot",
        "graph --format mermaid",
        "graph --format text",
        "graph --format svg",
        "run",
        "run --format json",
        "fmt --check",
    ],
)
def test_commands_escape_hostile_text(line: str, file: Path, command: Command) -> None:
    name, *options = line.split()
    done = command(name, file, *options)
    assert done.status == (2 if name == "fmt" else 0)
    harmless(done.out + done.err)
    said = done.out + done.err
    assert "\\x1b]0;owned" in said or "\\u001b]0;owned" in said
    if "svg" in options:
        root = ElementTree.fromstring(done.out)
        assert not [each for each in root.iter() if each.tag.endswith("script")]
    if "json" in options:
        json.loads(done.out)


@pytest.mark.parametrize("form", ["full", "json", "github", "sarif"])
def test_diagnostics_escape_quoted_hostile_text(form: str, file: Path, command: Command) -> None:
    wrong = TEXT.replace("report table", f'report tabel to "{HOSTILE}"')
    file.write_text(wrong, encoding="utf-8")
    done = command("validate", file, "--format", form)
    assert done.status == 2
    harmless(done.out + done.err)
    if form in ("json", "sarif"):
        json.loads(done.out)
    if form == "full":
        lines = done.err.splitlines()
        (number,) = [n for n, line in enumerate(lines) if "│   report tabel" in line]
        quoted, carets = lines[number], lines[number + 1]
        assert quoted[carets.index("^") :].startswith("report tabel")
        assert len(carets.strip("│^ ").split()[0]) > 0


def test_explain_does_not_interpret_rich_markup(file: Path, command: Command) -> None:
    """`[b]` and `:cat:` are no markup of the terminal library."""
    out = command("explain", file).out
    assert "[b]:cat:" in out
