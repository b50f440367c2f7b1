"""Images before rendering: files, generated shapes, baseline images, and their regions.

A baseline image is one class. A module outside the package adds one under
`mechdsl.program.images.image_baseline`, when it is imported before a file is checked.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import field, replace
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.base import limits
from mechdsl.base.files import RELATIVE_PATH_HINT
from mechdsl.base.records import Record, Registry, attribute_problem
from mechdsl.base.text import HintedError
from mechdsl.images.processing import PatchLayout, Processing, crop_corner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

GRAY_LEVEL = 128
"""Level of gray, of 255."""


class BaselineNumber(Record):
    """The number in parentheses, as in `gray(100)`."""

    noun: str
    """With its article, for messages: `a level`."""
    low: int
    high: int
    default: int
    """Value if a file has no parentheses."""
    example: int


class ImageBaseline:
    """An image without content, in the size that the model reads."""

    name: ClassVar[str]
    documentation: ClassVar[str]
    """Description for the language reference."""
    number: ClassVar[BaselineNumber | None] = None
    """The number that a file can give; None if it takes none."""
    is_uniform: ClassVar[bool] = False
    """Whether all pixels are equal, so that the size doesn't matter."""
    is_random: ClassVar[bool] = False
    """Whether `pixels` depends on the seed, which differs from row to row."""

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        """Return the image in RGB, shape [height, width, 3].

        Args:
            size: Height and width in pixels.
            number: The number in parentheses, or its default; 0 if the class takes none.
            seed: Seed of random draws, 0..2^64-1.
        """
        raise NotImplementedError

    def shown(self, number: int) -> str:
        """Return the image as a file writes it, with its number unless that is the default."""
        usual = self.number is None or number == self.number.default
        return self.name if usual else f"{self.name} {number}"


IMAGE_BASELINES: Registry[ImageBaseline] = Registry("baseline image")


def baseline_problem(name: str, entry: type[ImageBaseline]) -> str | None:
    """Return the reason that a class can't be registered."""
    wrong = attribute_problem(entry, texts=("documentation",))
    if wrong is not None:
        return wrong
    if not isinstance(entry.number, BaselineNumber | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        return "`number` must be None or a `BaselineNumber`"
    if entry.pixels is ImageBaseline.pixels:
        return "it has no `pixels(self, size, number, seed)`"
    return None


@IMAGE_BASELINES.class_decorator("gray", baseline_problem)
class Gray(ImageBaseline):
    documentation = "All pixels 128 of 255; `gray(100)` is darker."
    number = BaselineNumber("a level", 0, 255, default=GRAY_LEVEL, example=100)
    is_uniform = True

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        import numpy as np  # not at the top: `validate` only reads the registry

        return np.full((*size, 3), number, np.uint8)


@IMAGE_BASELINES.class_decorator("noise", baseline_problem)
class Noise(ImageBaseline):
    documentation = "Uniform noise, drawn for every channel of every pixel."
    is_random = True

    def pixels(self, size: tuple[int, int], number: int, seed: int) -> NDArray[np.uint8]:
        import numpy as np  # not at the top: `validate` only reads the registry

        random = np.random.Generator(np.random.Philox(seed))
        return random.integers(0, 256, (*size, 3), dtype=np.uint8)


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
        return replace(self, size=size, of=tuple(picture.sized(size) for picture in self.of))


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
    sizes = sorted({frame.size for frame in frames} - {(0, 0)})
    if len(sizes) > 1:
        raise ValueError(" and ".join(f"{width} x {height}" for height, width in sizes))
    size = sizes[0] if sizes else (0, 0)
    frames = tuple(frame.sized(size) for frame in frames)
    return Video("video", digest=_digest(frames), of=frames, count=len(frames), size=size)


def _digest(pictures: tuple[Picture, ...], fit: Processing | None = None) -> str:
    contents = [picture.content() for picture in pictures]
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


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Pillow's modes with values up to 255: others would lose precision."""

_SMALLER = "save it smaller: models read a few hundred pixels a side"


class MediaError(HintedError):
    """An image or sound file that can't be used; `reason` and `hint` are for the user."""


def inspect_image(path: Path) -> tuple[str, tuple[int, int]]:
    """Return (SHA-256 of the bytes, (height, width)) of an image, after decoding all its pixels.

    Raises MediaError.
    """
    content = _read(path)
    image = decode_image(content)
    return sha256(content).hexdigest(), (image.height, image.width)


def read_image(path: Path, digest: str) -> Image:
    """Read an image in RGB. Raises MediaError, also if the file's digest has changed."""
    content = _read(path)
    if sha256(content).hexdigest() != digest:
        raise MediaError("it has changed since it was checked", "run it again when it is written")
    return decode_image(content)


def _read(path: Path) -> bytes:
    return read_content(path, limits.IMAGE_FILE, _SMALLER)


def read_content(path: Path, most: int, advice: str) -> bytes:
    """Read a file of at most this number of bytes. Raises MediaError.

    advice: what to do with a larger file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        reason = "there is no such file"
        if not isinstance(error, FileNotFoundError):
            reason = str(error.strerror or error).lower()
        raise MediaError(reason, RELATIVE_PATH_HINT) from None
    if len(content) > most:
        raise MediaError(f"it has more than {most:,} bytes", advice)
    return content


def decode_image(content: bytes) -> Image:
    """Decode an image: upright, in RGB, transparent parts on white. Raises MediaError.

    The size is read from the header before any pixel.
    """
    from PIL import Image, ImageOps

    known = ", ".join(IMAGE_FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images, which are rejected below
        try:
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            pixels = image.width * image.height
            if pixels > limits.IMAGE_PIXELS:
                reason = f"it has {pixels:,} pixels, more than {limits.IMAGE_PIXELS:,}"
                raise MediaError(reason, _SMALLER)
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise MediaError("it moves: it has several frames", "save one of them")
            if image.mode not in IMAGE_MODES:
                reason = f"its numbers are of the kind `{image.mode}`"
                raise MediaError(reason, "save it with 8 bits for each colour")
            image.load()
            return flatten_on_white(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            reason = f"it has more than {limits.IMAGE_PIXELS:,} pixels"
            raise MediaError(reason, _SMALLER) from None
        except Image.UnidentifiedImageError:
            raise MediaError(f"it isn't an image of the kinds {known}", "save it as one") from None
        except (OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
            raise MediaError(f"it is damaged ({_line(error)})", "save it again") from None


def flatten_on_white(image: Image) -> Image:
    """Convert to RGB as transformers' `convert_to_rgb` does."""
    from PIL import Image as Images

    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Images.new("RGBA", image.size, (255, 255, 255, 255))
    return Images.alpha_composite(ground, image).convert("RGB")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
