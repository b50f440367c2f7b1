"""What is asked of a block whose rows are images."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.names import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.images import files
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE, MASK, averaged_block
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
    of_texts = prompts.kind == "prompts"
    problem = _not_of_texts if of_texts else _not_of_images
    found = (problem(change, prompts) for c in prompts.corruptions for change in c.changes)
    return [each for each in found if each is not None]


def _not_of_texts(change: ast.CorruptLine, prompts: spec.Prompts) -> Diagnostic | None:
    kind = kind_of(change)
    if not isinstance(kind, ImageChange):
        return None
    hint, reason = "change a value that stands in the template", "is of images, and these are texts"
    return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)


def _not_of_images(change: ast.CorruptLine, prompts: spec.Prompts) -> Diagnostic | None:
    kind, averaged = kind_of(change), averaged_block(prompts.image)
    if not isinstance(kind, ImageChange):
        if isinstance(kind, ValueChange) and not kind.templates(change):
            return None
        return NotSupported(span=change.span, what=f"`{kind.name}` in a block of images")
    assert isinstance(change, ast.Change)
    if averaged is not None:
        reason = "is of single images, and these are a mean"
        hint = f"change the images of `{averaged.name}`"
        return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    names = [IMAGE, *(region.name for region in prompts.regions)]
    part = kind.part(change)
    if part.id in names:
        return None
    hint = did_you_mean(part.id, names, f"there is {name_list(names)}")
    return UnknownWord(span=part.span, kind="region", word=part.id, hint=hint)
