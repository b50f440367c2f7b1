"""What is asked of a block whose rows are images."""

from __future__ import annotations

from pathlib import Path

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.images import files
from mechdsl.program import spec
from mechdsl.vocab.corruptions import ValueChange, kind_of

Seen = tuple[str, tuple[int, int]]
"""(SHA-256, (height, width))"""


class ImageFiles:
    """Images in files that a block names, each looked at once."""

    def __init__(self) -> None:
        self._seen: dict[Path, Seen] = {}

    def look(self, path: Path) -> Seen:
        """Raises `files.NotRead`."""
        if path not in self._seen:
            self._seen[path] = files.look(path)
        return self._seen[path]


def not_of_images(prompts: spec.Prompts) -> list[Diagnostic]:
    """E0108 for what images can't be changed by."""
    if prompts.kind == "prompts":
        return []
    return [
        NotSupported(span=change.span, what=f"`{kind_of(change).name}` in a block of images")
        for corruption in prompts.corruptions
        for change in corruption.changes
        if not isinstance(kind_of(change), ValueChange) or kind_of(change).templates(change)
    ]
