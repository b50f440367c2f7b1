"""Images before rendering: files, generated shapes, baseline images, and their regions."""

from __future__ import annotations

import json
from dataclasses import field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mechdsl.base.records import Record, record
from mechdsl.images.processing import PatchLayout, Processing, crop_corner

if TYPE_CHECKING:
    from PIL.Image import Image


HALF_COVERED = 128
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


def box_coverage(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image:
    """[height, width] of 0 to 255, how much of each pixel lies in a box; size: (height, width)."""
    from PIL import Image, ImageDraw

    height, width = size
    times = 4  # parts of a pixel, for boxes that don't end with one
    left, top, right, bottom = (round(each * times) for each in box)
    drawn = Image.new("L", (width * times, height * times))
    if right > left and bottom > top:
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return drawn.reduce(times)


def pixel_box(region: Region, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A box in whole pixels of an image of a size, (height, width), as far as it lies in it."""
    assert region.box is not None
    left, top, right, bottom = (round(each) for each in region.box)
    left, right = (min(max(0, each), size[1]) for each in (left, right))
    top, bottom = (min(max(0, each), size[0]) for each in (top, bottom))
    return left, top, right, bottom


def prepared_coverage(cover: Image, how: Processing) -> Image:
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


def covered_tokens(cover: Image, how: Processing, layout: PatchLayout) -> tuple[int, ...]:
    """The tokens of patches that have a pixel of the prepared image in a region.

    cover: as `prepared_cover` takes it.
    """
    height, width = layout.patch
    inside = prepared_coverage(cover, how).point(
        [float(level >= HALF_COVERED) for level in range(256)]
    )
    shares = inside.convert("F").reduce((width, height)).crop((0, 0, layout.cols, layout.rows))
    of_patches = memoryview(shares.tobytes()).cast("f")
    return tuple(t for t, share in zip(layout.grid, of_patches, strict=True) if share > 0)


PictureKind = Literal["file", "shapes", "gray", "noise", "mean"]

GRAY_LEVEL = 128
"""How bright gray is, of 255."""

RENDERING_VERSION = 1
"""Of the pixels that generated images have: another one makes other images of all of them."""

_DIGITS = 8

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the ends exclusive."""


@record
class PictureChange(Record):
    """What a corruption does to an image: before it is made ready, but for patches."""

    how: Literal["blur", "mask", "noise", "swap"]
    amount: float = 0.0
    """Of a blur its radius in pixels, of noise its standard deviation, of 255."""
    region: Region | None = None
    """None: the whole image."""
    seed: int = 0
    """What is drawn hangs on."""
    other: Region | None = None
    """What the region changes places with."""
    patches: tuple[Box, ...] | None = None
    """Of patches: where they lie in the image that is made ready."""

    def told(self) -> list[object]:
        """All that it hangs on."""
        region = None if self.region is None else self.region.told()
        other = [] if self.other is None else [self.other.told()]
        return [self.how, self.amount, region, self.seed, *other, *(self.patches or ())]


@record
class Picture(Record):
    """An image that isn't made yet."""

    how: PictureKind
    path: Path | None = None
    """Of a file."""
    digest: str = ""
    """Of a file: SHA-256 of its bytes. Of a mean: of all that it is taken of."""
    said: str = ""
    """Of a file: the path as it is written. Of a mean: the block that it is of."""
    of: tuple[Picture, ...] = field(default=(), compare=False, repr=False)
    """Of a mean: its images."""
    kind: str = ""
    """Of shapes: what they are."""
    count: int = 1
    """Of shapes, and of images that a mean is of: how many."""
    colour: str = ""
    texture: str = ""
    """Of shapes and what they stand on: empty where they are drawn."""
    size: tuple[int, int] = (0, 0)
    """(height, width) of generated ones; of a file what it says itself."""
    level: int = GRAY_LEVEL
    """Of gray: how bright, of 255."""
    seed: int = 0
    """What is drawn hangs on, 0..2^64-1."""
    changes: tuple[PictureChange, ...] = ()
    """Those before it is made ready are of the uncut image."""
    tile: str = ""
    """Of several rows that one image is cut into: which this is."""
    cut: Box | None = None
    """Where that lies in the image; None of all of it."""

    def content(self) -> str:
        """A digest of all that its pixels hang on."""
        told: list[object] = [self.how]
        match self.how:
            case "file" | "mean":
                told += [self.digest]
            case "gray":
                told += [RENDERING_VERSION, self.level]
            case "noise":
                told += [RENDERING_VERSION, self.size, self.seed]
            case "shapes":
                told += [RENDERING_VERSION, self.kind, self.count, self.size, self.seed]
                told += [self.colour, self.texture]
        told += [change.told() for change in self.changes]
        told += [] if self.cut is None else [["cut", *self.cut]]
        return blake2b(json.dumps(told).encode(), digest_size=_DIGITS).hexdigest()

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        which = self.tile if self.cut is None else f"tile {self.tile}"
        return f"{self._made}, {which}" if which else self._made

    @property
    def _made(self) -> str:
        """What it is made of."""
        match self.how:
            case "file":
                return self.said
            case "gray":
                return "gray" if self.level == GRAY_LEVEL else f"gray {self.level}"
            case "noise":
                return "noise"
            case "mean":
                return f"mean of {self.count:,} of {self.said}"
            case "shapes":
                return f"{self.count} {self.kind}, {self.size[1]} x {self.size[0]}"

    @cached_property
    def text(self) -> str:
        """What stands for it where a prompt has its text: two of them are equal where the images
        are."""
        changed = "".join(f", {change.how}" for change in self.changes)
        return f"{self.words}{changed} #{self.content()}"

    @property
    def uncut(self) -> Picture:
        """The image that it is a tile of."""
        return replace(self, tile="", cut=None)

    def sized(self, size: tuple[int, int]) -> Picture:
        """The same of this size, where it has none of its own."""
        if self.size != (0, 0):
            return self
        return replace(self, size=size, of=tuple(each.sized(size) for each in self.of))


def mean_picture(pictures: tuple[Picture, ...], said: str) -> Picture:
    """The mean of images, as a model is given them. said: what they are."""
    told = json.dumps([each.content() for each in pictures]).encode()
    digest = blake2b(told, digest_size=_DIGITS).hexdigest()
    return Picture("mean", digest=digest, said=said, of=pictures, count=len(pictures))
