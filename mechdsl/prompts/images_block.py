"""What is asked of a block whose rows are images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mechdsl.base.names import name_list
from mechdsl.base.registry import nearest
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.diagnostics.e05_data import UnknownValue
from mechdsl.images import files
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE, MASK, averaged_block
from mechdsl.syntax import ast
from mechdsl.vocab.corruptions import (
    ActivationChange,
    ImageChange,
    SwapChange,
    ValueChange,
    kind_of,
    of_patches,
)

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
    """E0203 and E0207 for what images, or texts, can't be changed by."""
    found: list[Diagnostic | None] = []
    for corruption in prompts.corruptions:
        for place, change in enumerate(corruption.changes):
            if prompts.kind == "prompts":
                found.append(_not_of_texts(change))
            else:
                before = corruption.changes[:place]
                found.append(_not_of_images(change, prompts) or _too_late(change, before, prompts))
    return [each for each in found if each is not None]


def _not_of_texts(change: ast.CorruptLine) -> Diagnostic | None:
    kind = kind_of(change)
    if not isinstance(kind, ImageChange):
        return None
    hint, reason = "change a value that stands in the template", "is of images, and these are texts"
    return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)


def _not_of_images(change: ast.CorruptLine, prompts: spec.Prompts) -> Diagnostic | None:
    kind, averaged = kind_of(change), averaged_block(prompts.image)
    swaps = swaps_regions(change, prompts)
    if not isinstance(kind, ImageChange) and not swaps:
        if isinstance(kind, ActivationChange):
            return None
        if isinstance(kind, ValueChange) and not kind.templates(change):
            return None
        return _of_other_things(change)
    if averaged is not None:
        reason = "is of single images, and these are a mean"
        hint = f"change the images of `{averaged.name}`"
        return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    assert isinstance(change, ast.Change)
    names = [region.name for region in prompts.regions]
    names = names if swaps else [IMAGE, *names]
    parts = [part for part in change.values if isinstance(part, ast.Name) and part.id not in names]
    for part in parts:
        hint = did_you_mean(part.id, names, f"there is {name_list(names)}")
        return UnknownWord(span=part.span, kind="region", word=part.id, hint=hint)
    return None


def _of_other_things(change: ast.CorruptLine) -> Diagnostic:
    """E0207 for texts in images."""
    name = kind_of(change).name
    hint = "change a value that the `image` line names, or the image: `mask image`, `blur image …`"
    if isinstance(change, ast.Change) and change.tokens is not None:
        hint = f"write `mask {change.tokens.span.written}` for gray"
    reason = "writes a text, and these are images"
    return BadArgument(span=change.span, name=name, reason=reason, hint=hint)


def _too_late(
    change: ast.CorruptLine, before: Sequence[ast.CorruptLine], prompts: spec.Prompts
) -> Diagnostic | None:
    """E0207 for a change of pixels behind one of patches, which is made last."""
    if not of_pixels(change, prompts) or not of_patches(before):
        return None
    reason = "stands behind a change of patches, which is made when all pixels are changed"
    hint = "write it in front of that"
    return BadArgument(span=change.span, name=kind_of(change).name, reason=reason, hint=hint)


def swaps_regions(change: ast.CorruptLine, prompts: spec.Prompts) -> bool:
    """Whether regions change places, and no values."""
    if not isinstance(change, ast.Change) or not isinstance(kind_of(change), SwapChange):
        return False
    names = {region.name for region in prompts.regions}
    return any(isinstance(each, ast.Name) and each.id in names for each in change.values)


def of_pixels(change: ast.CorruptLine, prompts: spec.Prompts) -> bool:
    """Whether it changes an image before that is made ready."""
    if isinstance(change, ast.Change) and isinstance(kind_of(change), ImageChange):
        return change.tokens is None
    return swaps_regions(change, prompts)


def meant_otherwise(problem: UnknownValue, prompts: spec.Prompts) -> UnknownValue:
    """With a better help where a text lacks its quotes, or shapes have a mask."""
    image, at, name = prompts.image, problem.span, problem.name
    if image is None or at is None or problem.hint.startswith("did you mean"):
        return problem
    shapes = isinstance(image, ast.Call) and image.name == "shapes"
    if any(region.span == at for region in prompts.regions):
        meant = f"did you mean `{MASK}`, where the shapes lie?"
        return replace(problem, hint=meant) if shapes and nearest(name, [MASK]) else problem
    if shapes and image.span.start <= at.start and at.end <= image.span.end:
        return replace(problem, hint=f'{problem.hint}; a text stands in quotes: `"{name}"`')
    return problem
