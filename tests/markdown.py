"""Programs in Markdown with their messages: `tests/messages` and `docs/errors`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r"^(?:#{1,6} +(?P<heading>[^\n]+)|```(?P<info>\w[^\n]*)\n(?P<content>.*?)^```$)", re.M | re.S
)


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, the following words, and its position."""

    language: str
    words: tuple[str, ...]
    content: str
    heading: str
    """The nearest heading above, or nothing."""
    label: str
    """The last line of prose before it, such as `Fails:`; or nothing."""
    start: int
    """Offset of the content in the text."""

    @property
    def file(self) -> str | None:
        """The file name, if a name with a suffix follows the language."""
        return next((word for word in self.words if re.search(r"\w\.\w+$", word)), None)

    def replaced(self, text: str, content: str) -> str:
        """The text of this block's page with new content of the block."""
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
