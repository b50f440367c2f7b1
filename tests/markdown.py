"""Programs in Markdown beside what is said about them: `tests/messages` and `docs/errors`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r"^(?:#{1,6} +(?P<heading>[^\n]+)|```(?P<info>\w[^\n]*)\n(?P<content>.*?)^```$)", re.M | re.S
)


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the words behind it, and where it stands."""

    language: str
    words: tuple[str, ...]
    content: str
    heading: str
    """The nearest heading above, or nothing."""
    label: str
    """The last line of prose before it, such as `Fails:`; or nothing."""
    start: int
    """Where the content starts in the text."""

    @property
    def file(self) -> str | None:
        """The file that this is, where a name with a suffix stands behind the language."""
        return next((word for word in self.words if re.search(r"\w\.\w+$", word)), None)

    def replaced(self, text: str, content: str) -> str:
        """The text that this block was read from, with another content."""
        return text[: self.start] + content + text[self.start + len(self.content) :]


def fences(text: str) -> list[Fence]:
    """All fenced blocks of a text that have a language, in order."""
    found: list[Fence] = []
    heading = ""
    behind = 0
    for block in _BLOCK.finditer(text):
        if block["heading"] is not None:
            heading = block["heading"].strip()
        else:
            language, *words = block["info"].split()
            prose = text[behind : block.start()].strip().rpartition("\n")[2]
            found.append(
                Fence(
                    language, tuple(words), block["content"], heading, prose, block.start("content")
                )
            )
        behind = block.end()
    return found
