"""Parts of an image: boxes, masks, shapes; and which tokens of a model they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mechdsl.base.record import Record, record
from mechdsl.images.patches import PatchLayout
from mechdsl.images.processing import Processing, crop_corner

if TYPE_CHECKING:
    from PIL.Image import Image

HALF = 128
"""Of 255: a pixel of the prepared image is in a region from so much of it."""


@record
class Region(Record):
    """A part of an image, in its own pixels: before it is made ready."""

    box: tuple[float, float, float, float] | None = None
    """(left, top, right, bottom), the ends exclusive."""
    mask: Path | None = None
    """A file of the image's size: what isn't black in it."""
    digest: str = ""
    """Of that file, SHA-256."""
    shapes: bool = False
    """The shapes that are drawn."""

    def told(self) -> list[object]:
        """All that it hangs on."""
        return [self.box, self.digest, self.shapes]


def of_box(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image:
    """[height, width] of 0 to 255, how much of each pixel lies in a box; size: (height, width)."""
    from PIL import Image, ImageDraw

    height, width = size
    times = 4  # parts of a pixel, for boxes that don't end with one
    left, top, right, bottom = (round(each * times) for each in box)
    drawn = Image.new("L", (width * times, height * times))
    if right > left and bottom > top:
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return drawn.reduce(times)


def whole_box(region: Region, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A box in whole pixels of an image of a size, (height, width), as far as it lies in it."""
    assert region.box is not None
    left, top, right, bottom = (round(each) for each in region.box)
    left, right = (min(max(0, each), size[1]) for each in (left, right))
    top, bottom = (min(max(0, each), size[0]) for each in (top, bottom))
    return left, top, right, bottom


def prepared_cover(cover: Image, how: Processing) -> Image:
    """[height, width] of the prepared image, 0 to 255, how much of each pixel lies in a region.

    cover: the same of the image itself, as `of_box` has it.
    """
    from PIL import Image

    height, width = how.resized(cover.height, cover.width)
    if (height, width) != (cover.height, cover.width):
        cover = cover.resize((width, height), resample=Image.Resampling.BOX)
    if how.crop is not None:
        top, left = crop_corner((height, width), how.crop)
        cover = cover.crop((left, top, left + how.crop[1], top + how.crop[0]))
    return cover


def tokens_in(cover: Image, how: Processing, layout: PatchLayout) -> tuple[int, ...]:
    """The tokens of patches that have a pixel of the prepared image in a region.

    cover: as `prepared_cover` takes it.
    """
    height, width = layout.patch
    inside = prepared_cover(cover, how).point([float(level >= HALF) for level in range(256)])
    shares = inside.convert("F").reduce((width, height)).crop((0, 0, layout.cols, layout.rows))
    of_patches = memoryview(shares.tobytes()).cast("f")
    return tuple(t for t, share in zip(layout.grid, of_patches, strict=True) if share > 0)
