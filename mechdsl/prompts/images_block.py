"""What is asked of a block whose rows are images."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.names import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.images import files
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE, MASK
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import ImageChange, ValueChange, kind_of

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


def is_drawn_mask(block: spec.Prompts, region: spec.RegionDef) -> bool:
    """Whether a region is that of shapes which are drawn."""
    image = block.image
    return region.column == MASK and isinstance(image, ast.Call) and image.name == "shapes"


def not_of_images(prompts: spec.Prompts) -> list[Diagnostic]:
    """E0108, E0203 and E0207 for what images, or texts, can't be changed by."""
    found: list[Diagnostic] = []
    for change in (each for c in prompts.corruptions for each in c.changes):
        kind = kind_of(change)
        if prompts.kind == "prompts":
            if isinstance(kind, ImageChange):
                hint = "change a value that stands in the template"
                reason = "is of images, and these are texts"
                bad = BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
                found.append(bad)
        elif isinstance(kind, ImageChange):
            assert isinstance(change, ast.Change)
            names = [IMAGE, *(region.name for region in prompts.regions)]
            part = kind.part(change)
            if part.id not in names:
                hint = did_you_mean(part.id, names, f"there is {name_list(names)}")
                word = part.id
                found.append(UnknownWord(span=part.span, kind="region", word=word, hint=hint))
        elif not isinstance(kind, ValueChange) or kind.templates(change):
            what = f"`{kind.name}` in a block of images"
            found.append(NotSupported(span=change.span, what=what))
    return found
