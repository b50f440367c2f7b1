"""Cases of this folder's Markdown files; `tests/README.md` shows how to write one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from tests.markdown import Fence, fences

from ..parsing import parse

HERE = Path(__file__).parent
FLAGS = {"several", "only-warned", "only-parsed", "python-refused"}
"""Words after `mech`: see `tests/README.md`."""


@dataclass(frozen=True)
class Case:
    """A program and the text fence with its messages, `None` if it isn't written yet."""

    page: Path
    title: str
    program: str
    flags: frozenset[str]
    files: dict[str, str]
    behind: int
    """Offset of the end of the program's fence in the page."""
    said: Fence | None

    @property
    def id(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.page.stem}-{words}"

    def check(self, folder: Path) -> tuple[Path, list[Diagnostic]]:
        """Write the program to a folder, and return its path and diagnostics."""
        path = folder / "case.mech"
        for name, content in {**self.files, path.name: self.program}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")
        source = Source(self.program, path)
        if "only-parsed" in self.flags:
            return path, parse(source)[1]
        python = "refuse" if "python-refused" in self.flags else "look"
        return path, check_source(source, CheckSettings(python=python)).diagnostics

    def write(self, shown: str) -> None:
        """Write the messages to the page, which is reread, as other cases may have been updated."""
        text = self.page.read_text(encoding="utf-8")
        now = next(case for case in _cases(self.page) if case.title == self.title)
        if now.said is not None:
            text = now.said.replaced(text, shown)
        else:
            text = f"{text[: now.behind]}\n```text\n{shown}```\n{text[now.behind :]}"
        self.page.write_text(text, encoding="utf-8")


def _cases(page: Path) -> Iterator[Case]:
    by_heading: dict[str, list[Fence]] = {}
    for fence in fences(page.read_text(encoding="utf-8")):
        by_heading.setdefault(fence.heading, []).append(fence)
    preambles: dict[str, str] = {}
    used: set[str] = set()
    shared: dict[str, str] = {}

    def assembled(fence: Fence) -> tuple[str, list[str]]:
        """A fence's text after its preamble, and the other words after `mech`."""
        words = list(fence.words)
        if "after" not in words:
            return fence.content, words
        at = words.index("after")
        name = words[at + 1]
        used.add(name)
        return f"{preambles[name]}\n{fence.content}", words[:at] + words[at + 2 :]

    for heading, found in by_heading.items():
        files = {fence.file: fence.content for fence in found if fence.file is not None}
        programs: list[Fence] = []
        for fence in found:
            if fence.language == "mech" and "preamble" in fence.words:
                content, (_, name) = assembled(fence)
                preambles[name] = content
            elif fence.language == "mech" and fence.file is None:
                programs.append(fence)
        said = [fence for fence in found if fence.language == "text"]
        if not programs:
            assert not said, f"{page.name}: nothing causes what {heading!r} says"
            shared |= files
            continue
        assert len(programs) == 1 >= len(said), f"{page.name}: {heading!r} is one case"
        program, words = assembled(programs[0])
        assert FLAGS.issuperset(words), f"{page.name}: {words} in {heading!r}"
        behind = programs[0].start + len(programs[0].content) + len("```\n")
        expected = said[0] if said else None
        yield Case(page, heading, program, frozenset(words), shared | files, behind, expected)
    assert used == set(preambles), f"{page.name}: no case comes after {set(preambles) - used}"


def all_cases() -> list[Case]:
    return [case for page in sorted(HERE.glob("*.md")) for case in _cases(page)]


def program(page: str, title: str) -> str:
    """The program of one case, for further tests."""
    return next(case.program for case in _cases(HERE / f"{page}.md") if case.title == title)
