"""Images before rendering: files, generated shapes, baseline images, and their regions."""

from __future__ import annotations

import json
import re
from dataclasses import field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.base.records import Record
from mechdsl.images.baselines import IMAGE_BASELINES
from mechdsl.images.processing import PatchLayout, Processing, crop_corner

if TYPE_CHECKING:
    from PIL.Image import Image


HALF_COVERED = 128
"""Level of 255 from which a pixel of the prepared image counts as inside a region."""


class Region(Record):
    """A part of an image, in pixels of the image before preparation."""

    box: tuple[float, float, float, float] | None = None
    """(left, top, right, bottom), the ends exclusive."""
    mask: Path | None = None
    """A mask file of the image's size; everything that isn't black is inside."""
    digest: str = ""
    """SHA-256 of the mask file."""
    shapes: bool = False
    """The region of the generated shapes."""

    def told(self) -> list[object]:
        """Return all values that the region depends on."""
        return [self.box, self.digest, self.shapes]


def box_coverage(box: tuple[float, float, float, float], size: tuple[int, int]) -> Image:
    """Return [height, width] from 0 to 255: the share of each pixel inside a box.

    size: (height, width).
    """
    from PIL import Image, ImageDraw

    height, width = size
    times = 4  # subpixels per side, for boxes that don't end at a pixel's border
    left, top, right, bottom = (round(each * times) for each in box)
    drawn = Image.new("L", (width * times, height * times))
    if right > left and bottom > top:
        ImageDraw.Draw(drawn).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return drawn.reduce(times)


def pixel_box(region: Region, size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return a box in whole pixels, clipped to an image of size (height, width)."""
    assert region.box is not None
    left, top, right, bottom = (round(each) for each in region.box)
    left, right = (min(max(0, each), size[1]) for each in (left, right))
    top, bottom = (min(max(0, each), size[0]) for each in (top, bottom))
    return left, top, right, bottom


def prepared_coverage(cover: Image, how: Processing) -> Image:
    """Return [height, width] of the prepared image, 0 to 255: the share of each pixel in a region.

    cover: the coverage of the image before preparation, as `box_coverage` returns it.
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
    """Return the tokens of patches that contain a pixel of a region.

    cover: as in `prepared_coverage`.
    """
    height, width = layout.patch
    inside = prepared_coverage(cover, how).point(
        [float(level >= HALF_COVERED) for level in range(256)]
    )
    shares = inside.convert("F").reduce((width, height)).crop((0, 0, layout.cols, layout.rows))
    of_patches = memoryview(shares.tobytes()).cast("f")
    return tuple(t for t, share in zip(layout.grid, of_patches, strict=True) if share > 0)


_OPEN, _CLOSE = "\u27e6", "\u27e7"
"""Brackets around the marker of an image in a prompt."""

_NO_BRACKETS = {ord(_OPEN): "[", ord(_CLOSE): "]"}

MARKER = re.compile(
    rf"{_OPEN}(?:image|sound|video) [^{_OPEN}{_CLOSE}]* #[0-9a-f]+ "
    rf"(?P<width>\d+) x (?P<height>\d+)(?: x (?P<frames>\d+))?{_CLOSE}"
)
"""The marker of an image, a sound or a video, with its size: 0 x 0 if it takes the model's."""


_GROUPED = 0
"""In `Picture.extent`, in place of a number of frames, for one of several images of a prompt."""


def group_extent(extent: tuple[int, ...]) -> tuple[int, ...]:
    """Return the extent of an image that is grouped; that of a video as it is."""
    return extent if has_frames(extent) else (*extent[:2], _GROUPED)


def is_grouped(extent: tuple[int, ...]) -> bool:
    """Return whether an extent is that of a picture with `grouped`."""
    return extent[2:] == (_GROUPED,)


def has_frames(extent: tuple[int, ...]) -> bool:
    """Return whether an extent is that of a video."""
    return len(extent) == 3 and extent[2] != _GROUPED


def marker_extent(marker: re.Match[str]) -> tuple[int, ...]:
    """Return `Picture.extent` of the picture that a marker stands for."""
    height, width, frames = marker.group("height", "width", "frames")
    return (int(height), int(width)) if frames is None else (int(height), int(width), int(frames))


RENDERING_VERSION = 1
"""Version of the pixels of generated images: a new version changes all generated images."""

_DIGITS = 8

Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, the ends exclusive."""


class PictureChange(Record):
    """A corruption's change to an image: before preparation, except for patches."""

    how: Literal["blur", "mask", "noise", "silence", "swap"]
    amount: float = 0.0
    """The radius of a blur in pixels; the standard deviation of noise, of 255."""
    region: Region | None = None
    """None: the whole image."""
    seed: int = 0
    """The seed of noise."""
    other: Region | None = None
    """The region that is swapped with `region`."""
    patches: tuple[Box, ...] | None = None
    """For a change of patches, their boxes in the prepared image."""

    def told(self) -> list[object]:
        """Return all values that the change depends on."""
        region = None if self.region is None else self.region.told()
        other = [] if self.other is None else [self.other.told()]
        return [self.how, self.amount, region, self.seed, *other, *(self.patches or ())]


EMPTY_CELL = "-"


class GridLayout(Record):
    """The content of a grid of shapes."""

    rows: tuple[tuple[str, ...], ...]
    """The shape of each cell, such as `red circle`; an empty text where there is none. In
    `red circle 30%`, the colour replaces 30 % of the background."""
    marks: tuple[str, ...] | None = None
    """The mark before each row; empty for a column without marks, None for no such column."""
    cell: int = 8
    """Side of a cell in pixels."""
    noise: int | None = None
    """Largest change of a channel by noise, of 255; None for that of all generated images."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        columns = len(self.rows[0]) + (self.marks is not None)
        return len(self.rows) * self.cell, columns * self.cell

    def told(self) -> list[object]:
        """Return all values that the image depends on, besides random draws."""
        return [self.rows, self.marks, self.cell, self.noise]

    @property
    def text(self) -> str:
        """The shapes as a file writes them."""
        return " / ".join(", ".join(each or EMPTY_CELL for each in row) for row in self.rows)


class Picture(Record):
    """The description of an image that isn't rendered yet."""

    noun: ClassVar[str] = "image"
    """What it describes, in markers and messages."""

    how: str
    """`file`, `shapes`, `grid`, `mean`, `video` or a name in `IMAGE_BASELINES`."""
    path: Path | None = None
    """For a file, its path."""
    digest: str = ""
    """For a file, SHA-256 of its bytes. For a mean or a video, the digest of its images."""
    said: str = ""
    """For a file, the path as written. For a mean, the name of its block."""
    of: tuple[Picture, ...] = field(default=(), compare=False, repr=False)
    """For a mean, its images; for a video, its frames."""
    kind: str = ""
    """For shapes, their type."""
    count: int = 1
    """Number of shapes, of images in a mean, or of frames."""
    colour: str = ""
    texture: str = ""
    """For shapes and their background; empty if drawn at random."""
    grid: GridLayout | None = None
    """For a grid, its cells."""
    size: tuple[int, int] = (0, 0)
    """(height, width) of a generated image, or the size stored in the file."""
    fit: Processing | None = None
    """For a mean of images of several sizes, how each of them is resized and cropped first."""
    number: int | None = None
    """For a baseline image, its number in parentheses, if a file has one."""
    seed: int = 0
    """The seed of random draws, 0..2^64-1."""
    changes: tuple[PictureChange, ...] = ()
    """Changes before preparation apply to the uncut image."""
    tile: str = ""
    """For a tile, its name within the image."""
    cut: Box | None = None
    """For a tile, its box in the image; None for the whole image."""
    grouped: bool = False
    """Whether its prompt has other images, for which the model's processor prepares it in another
    way than alone."""

    def content(self) -> str:
        """Return a digest of everything that the pixels depend on."""
        told: list[object] = [self.how]
        match self.how:
            case "file" | "mean" | "video":
                told += [self.digest]
            case "shapes":
                told += [RENDERING_VERSION, self.kind, self.count, self.size, self.seed]
                told += [self.colour, self.texture]
            case "grid":
                assert self.grid is not None
                told += [RENDERING_VERSION, self.seed, *self.grid.told()]
            case name:
                entry = IMAGE_BASELINES[name]
                told += [RENDERING_VERSION] if entry.is_uniform else [RENDERING_VERSION, self.size]
                told += [] if entry.number is None else [self.baseline_number]
                told += [self.seed] if entry.is_random else []
        told += [change.told() for change in self.changes]
        told += [] if self.cut is None else [["cut", *self.cut]]
        return blake2b(json.dumps(told).encode(), digest_size=_DIGITS).hexdigest()

    @property
    def baseline_number(self) -> int:
        """For a baseline image, the number that its pixels depend on; 0 if it has none."""
        if self.number is not None:
            return self.number
        default = IMAGE_BASELINES[self.how].number
        return 0 if default is None else default.default

    @property
    def words(self) -> str:
        """A description of the image for users."""
        which = self.tile if self.cut is None else f"tile {self.tile}"
        return f"{self._made}, {which}" if which else self._made

    @property
    def _made(self) -> str:
        """A description of the image's source."""
        match self.how:
            case "file":
                return self.said
            case "video":
                return f"{self.count:,} frames from {self.of[0].words}"
            case "mean":
                return f"mean of {self.count:,} of {self.said}"
            case "shapes":
                return f"{self.count} {self.kind}, {self.size[1]} x {self.size[0]}"
            case "grid":
                assert self.grid is not None
                return f"grid {self.grid.text}, {self.size[1]} x {self.size[0]}"
            case name:
                return IMAGE_BASELINES[name].shown(self.baseline_number)

    @cached_property
    def text(self) -> str:
        """The text that represents the image in prompts; equal exactly for equal images."""
        changed = "".join(f", {change.how}" for change in self.changes)
        return f"{self.words}{changed} #{self.content()}"

    @cached_property
    def marker(self) -> str:
        """The text that stands for the image in a longer prompt; equal exactly for equal images."""
        said, (height, width, *frames) = self.text.translate(_NO_BRACKETS), self.extent
        size = " x ".join(map(str, (width, height, *frames)))
        return f"{_OPEN}{self.noun} {said} {size}{_CLOSE}"

    @property
    def extent(self) -> tuple[int, ...]:
        """(height, width), and the number of frames of a video or 0 if it is grouped: its tokens
        depend on them."""
        return group_extent(self.size) if self.grouped else self.size

    @property
    def uncut(self) -> Picture:
        """The image that it is a tile of."""
        return replace(self, tile="", cut=None)

    def sized(self, size: tuple[int, int]) -> Picture:
        """Return the image with this size, unless it has a size."""
        if self.size != (0, 0):
            return self
        return replace(self, size=size, of=tuple(each.sized(size) for each in self.of))


class Video(Picture):
    """Frames of one size that a model's video processor reads together; `size` is theirs."""

    noun: ClassVar[str] = "video"

    @property
    def extent(self) -> tuple[int, ...]:
        return *self.size, self.count


def video_picture(frames: tuple[Picture, ...]) -> Video:
    """Return the video of frames, of which those without a size take that of the others.

    Raises:
        ValueError: The frames have different sizes, which the message lists.
    """
    sizes = sorted({each.size for each in frames} - {(0, 0)})
    if len(sizes) > 1:
        raise ValueError(" and ".join(f"{width} x {height}" for height, width in sizes))
    size = sizes[0] if sizes else (0, 0)
    frames = tuple(each.sized(size) for each in frames)
    return Video("video", digest=_digest(frames), of=frames, count=len(frames), size=size)


def _digest(pictures: tuple[Picture, ...], fit: Processing | None = None) -> str:
    contents = [each.content() for each in pictures]
    told = json.dumps(contents + ([] if fit is None else [fit.resampled_words])).encode()
    return blake2b(told, digest_size=_DIGITS).hexdigest()


def mean_picture(
    pictures: tuple[Picture, ...],
    said: str,
    size: tuple[int, int] = (0, 0),
    fit: Processing | None = None,
) -> Picture:
    """Return the mean of images.

    Args:
        pictures: The images.
        said: A description of the images.
        size: Their (height, width), for a mean before preparation; else it is one after it.
        fit: How images of several sizes are resized and cropped to `size` first.
    """
    digest, count = _digest(pictures, fit), len(pictures)
    return Picture("mean", digest=digest, said=said, of=pictures, count=count, size=size, fit=fit)
