"""Render pictures to pixels, and prepare them for a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mechdsl.base.arrays import Bools
from mechdsl.base.records import closest_name
from mechdsl.base.text import count_noun
from mechdsl.images.picture import (
    GRAY_LEVEL,
    HALF_COVERED,
    IMAGE_BASELINES,
    GridLayout,
    MediaError,
    Picture,
    PictureChange,
    Region,
    box_coverage,
    pixel_box,
    prepared_coverage,
    read_image,
)
from mechdsl.images.processing import PatchLayout, Processing, crop_corner

Pixels = NDArray[np.uint8]
"""[height, width, 3] in RGB."""

Mask = NDArray[np.bool_]

Grid = NDArray[np.int64]

Rgb = tuple[int, int, int]

SHAPES: Mapping[str, Callable[[Grid, Grid, int], Mask]] = {
    "circle": lambda x, y, side: x * x + y * y <= side * side,
    "square": lambda x, y, side: np.maximum(abs(x), abs(y)) <= side,
    "triangle": lambda x, y, side: 2 * abs(x) <= y + side,
    "cross": lambda x, y, side: 3 * np.minimum(abs(x), abs(y)) <= side,
    "diamond": lambda x, y, side: abs(x) + abs(y) <= side,
    "ring": lambda x, y, side: (
        (x * x + y * y <= side * side) & (4 * (x * x + y * y) >= side * side)
    ),
}
"""Membership of a square's pixels in a shape: x to the right and y down from the square's centre,
in half pixels, up to `side`."""

TEXTURES: Mapping[str, Callable[[Grid, Grid, int], Mask]] = {
    "plain": lambda x, y, width: np.zeros(x.shape, np.bool_),
    "stripes": lambda x, y, width: y // width % 2 == 1,
    "bars": lambda x, y, width: x // width % 2 == 1,
    "checks": lambda x, y, width: (x // width + y // width) % 2 == 1,
    "dots": lambda x, y, width: (x % (2 * width) < width) & (y % (2 * width) < width),
}
"""Pixels with the second of a texture's two colours; its elements are `width` pixels wide."""

SHAPE_COLOURS: Mapping[str, Rgb] = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (225, 205, 45),
    "purple": (150, 50, 190),
    "cyan": (40, 200, 210),
}

MARKS: Mapping[str, tuple[str, ...]] = {
    "@": (".###.", "#...#", "#.###", "#.#.#", ".####"),
    "#": (".#.#.", "#####", ".#.#.", "#####", ".#.#."),
    "$": ("..#..", ".####", "..#..", "####.", "..#.."),
    "&": (".##..", "#..#.", ".##.#", "#..#.", ".##.#"),
    "%": ("##..#", "##.#.", "..#..", ".#.##", "#..##"),
    "*": ("#.#.#", ".###.", "#####", ".###.", "#.#.#"),
}
"""Marks of the rows of a grid, five pixels wide and high."""

MARK_SIDE = 5
MARK_LEVEL, LINE_LEVEL = 250, 20
"""Levels of the pixels of marks and of lines between rows, of 255."""

MIN_SHAPE_SIDE = 3
"""Minimum side of a shape in pixels: smaller shapes look alike."""

COLOUR_SPREAD, TINT, TEXTURE_NOISE = 24, 18, 14


@dataclass(frozen=True)
class ShapesDrawing:
    """A generated image and the properties of its shapes."""

    pixels: Pixels
    """[height, width, 3]"""
    mask: Mask
    """[height, width], True inside the shapes."""
    kind: str
    colours: tuple[str, ...]
    """The colour of each shape, from left to right within each row."""
    texture: str


def draw_shapes(
    kind: str, n: int, size: int, random: Generator, *, colour: str = "", texture: str = ""
) -> ShapesDrawing:
    """Draw `n` shapes of a kind in a square image of `size` pixels.

    Positions, colours and sizes are random, as is the texture in muted colours; noise covers the
    image. Shapes don't touch. `colour` and `texture` replace random ones.

    Raises:
        ValueError: A name is unknown, or shapes would be smaller than `MIN_SHAPE_SIDE`.
    """
    for what, name, names in (
        ("kind", kind, SHAPES),
        ("colour", colour or "red", SHAPE_COLOURS),
        ("texture", texture or "plain", TEXTURES),
    ):
        if name not in names:
            raise ValueError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    pattern = texture or _one_of(TEXTURES, random)
    pixels, mask = _background(pattern, size, random), np.zeros((size, size), np.bool_)
    colours: list[str] = []
    for top, left, cell in _cells(n, size, random):
        side = int(random.integers(max(MIN_SHAPE_SIDE, cell * 3 // 8), cell * 5 // 8 + 1))
        top += int(random.integers(cell - side))
        left += int(random.integers(cell - side))
        name = colour or _one_of(SHAPE_COLOURS, random)
        shape = _shape(kind, side)
        spread = random.integers(-COLOUR_SPREAD, COLOUR_SPREAD + 1, 3)
        pixels[top : top + side, left : left + side][shape] = np.array(SHAPE_COLOURS[name]) + spread
        mask[top : top + side, left : left + side] = shape
        colours.append(name)
    pixels += random.integers(-TEXTURE_NOISE, TEXTURE_NOISE + 1, pixels.shape)
    return ShapesDrawing(pixels.clip(0, 255).astype(np.uint8), mask, kind, tuple(colours), pattern)


@dataclass(frozen=True)
class GridDrawing:
    """A generated grid of shapes."""

    pixels: Pixels
    """[height, width, 3]"""
    mask: Mask
    """[height, width], True inside the shapes."""


def draw_grid(layout: GridLayout, random: Generator) -> GridDrawing:
    """Draw shapes in the cells of a grid, on a plain background.

    Sizes, positions within the cells, the level of the background and noise are random. They don't
    depend on the shapes, so that another shape in one cell leaves all other pixels equal. Lines
    separate rows with marks.

    Args:
        layout: The content of the grid.
        random: Source of random draws.

    Raises:
        ValueError: The layout can't be drawn (`grid_problem`).
    """
    problem = grid_problem(layout)
    if problem:
        raise ValueError(problem)
    cell, noise = layout.cell, TEXTURE_NOISE if layout.noise is None else layout.noise
    (height, width), offset = layout.size, 0 if layout.marks is None else layout.cell
    pixels = _background("plain", max(height, width), random)[:height, :width]
    mask = np.zeros((height, width), np.bool_)
    drawn = random.random((len(layout.rows), len(layout.rows[0]), 6))  # also for empty cells
    for row, things in enumerate(layout.rows):
        for column, thing in enumerate(things):
            if thing:
                top, left = row * cell, column * cell + offset
                area = (slice(top, top + cell), slice(left, left + cell))
                mask[area] = _draw_in_cell(pixels[area], thing, drawn[row, column])
    for row, mark in enumerate(layout.marks or ()):
        glyph = np.array([[each == "#" for each in line] for line in MARKS[mark]])
        top, left = row * cell + (cell - MARK_SIDE) // 2, (cell - MARK_SIDE) // 2
        pixels[top : top + MARK_SIDE, left : left + MARK_SIDE][glyph] = MARK_LEVEL
        pixels[(row + 1) * cell - 1] = LINE_LEVEL
    pixels += random.integers(-noise, noise + 1, pixels.shape)
    return GridDrawing(pixels.clip(0, 255).astype(np.uint8), mask)


def grid_problem(layout: GridLayout) -> str:
    """Return the reason that a grid can't be drawn; empty if it can."""
    if len({len(row) for row in layout.rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in layout.rows)
        return f"its rows have different numbers of cells: {lengths}"
    for thing in dict.fromkeys(thing for row in layout.rows for thing in row if thing):
        if _parse_cell(thing) is None:
            return (
                f"{thing!r} isn't a colour ({', '.join(SHAPE_COLOURS)}) and a shape "
                f"({', '.join(SHAPES)}), with a contrast up to `100%` or none"
            )
    unknown = [mark for mark in layout.marks or () if mark not in MARKS]
    if unknown:
        return f"unknown mark {unknown[0]!r}; there are {' '.join(MARKS)}"
    if layout.marks and len(layout.marks) != len(layout.rows):
        rows, marks = count_noun(len(layout.rows), "row"), count_noun(len(layout.marks), "mark")
        return f"it has {rows} and {marks}"
    return ""


def suggest_cell(layout: GridLayout) -> str:
    """Return the first cell that can't be drawn in the spelling that is probably meant; empty if
    all cells can, or if no spelling is close."""
    for thing in dict.fromkeys(thing for row in layout.rows for thing in row if thing):
        if _parse_cell(thing) is None:
            words = thing.split()
            near = [
                closest_name(word, known) or word
                for word, known in zip(words, (SHAPE_COLOURS, SHAPES), strict=False)
            ]
            meant = " ".join([*near, *words[2:]])
            return meant if _parse_cell(meant) is not None else ""
    return ""


def _parse_cell(thing: str) -> tuple[str, str, float] | None:
    """Return colour, kind and contrast (0 to 1) of a cell's shape; None if it isn't one."""
    written = re.fullmatch(r"(\w+) (\w+)(?: (\d{1,3})%)?", thing)
    if written is None:
        return None
    colour, kind, percent = written[1], written[2], int(written[3] or 100)
    if colour not in SHAPE_COLOURS or kind not in SHAPES or percent > 100:
        return None
    return colour, kind, percent / 100


def _draw_in_cell(area: Grid, thing: str, drawn: NDArray[np.float64]) -> Mask:
    """Draw one shape into a cell, [cell, cell, 3], and return its mask, [cell, cell].

    drawn: six uniform numbers below 1.
    """
    parsed = _parse_cell(thing)
    assert parsed is not None
    colour, kind, contrast = parsed
    cell, least = len(area), len(area) * 5 // 8
    side = least + int(drawn[0] * (cell - least))
    top, left = (int(each * (cell - side)) for each in drawn[1:3])
    spread = (drawn[3:] * 2 - 1) * COLOUR_SPREAD
    mask = np.zeros((cell, cell), np.bool_)
    mask[top : top + side, left : left + side] = _shape(kind, side)
    values = (np.array(SHAPE_COLOURS[colour]) + spread) * contrast + area[mask] * (1 - contrast)
    area[mask] = values.round().astype(np.int64)
    return mask


def _one_of(names: Mapping[str, object], random: Generator) -> str:
    return list(names)[int(random.integers(len(names)))]


def _cells(n: int, size: int, random: Generator) -> list[tuple[int, int, int]]:
    """Return the grid square of each shape: top, left and side."""
    across = max(1, math.isqrt(max(n, 1) - 1) + 1)
    cell = size // across
    if n < 0 or cell * 5 // 8 < MIN_SHAPE_SIDE:
        raise ValueError(f"{n} shapes don't fit into an image of {size} × {size} pixels")
    chosen = sorted(random.permutation(across * across)[:n].tolist())
    return [(each // across * cell, each % across * cell, cell) for each in chosen]


def _shape(kind: str, side: int) -> Mask:
    """Return the mask of a shape within its square, [side, side]."""
    y, x = np.indices((side, side)) * 2 + 1 - side
    return SHAPES[kind](x, y, side)


def _background(texture: str, size: int, random: Generator) -> Grid:
    """Return a texture of two greyish colours at a random offset, [size, size, 3]."""
    width = int(random.integers(2, 5))
    y, x = np.indices((size, size)) + random.integers(0, 2 * width, (2, 1, 1))
    grey, apart = int(random.integers(60, 160)), int(random.integers(45, 75))
    tints = random.integers(-TINT, TINT + 1, (2, 3))
    second = TEXTURES[texture](x, y, width)
    return np.where(second[..., None], grey + apart + tints[1], grey + tints[0])


FloatPixels = NDArray[np.float32]

CACHED_MASKS = 1024
"""Number of masks of generated shapes in the cache."""

CACHED_IMAGES = 128
"""Number of prepared images in the cache: the runs of a file read them repeatedly."""


def render_pixels(picture: Picture) -> Pixels:
    """Render an image with the corruptions' changes before preparation. Raises MediaError."""
    if picture.cut is None:
        return _uncut(picture)
    left, top, right, bottom = picture.cut
    return _of_tiles(picture.uncut)[top:bottom, left:right]


@lru_cache(maxsize=2)
def _of_tiles(picture: Picture) -> Pixels:
    """Render the image of consecutive tile rows; cached for two runs."""
    return _uncut(picture)


def _uncut(picture: Picture) -> Pixels:
    pixels = _rendered(picture)
    for change in picture.changes:
        if change.patches is None:
            pixels = _changed(pixels, picture, change)
    return pixels


def _changed(image: Pixels, picture: Picture, change: PictureChange) -> Pixels:
    if change.how == "swap":
        return _swapped(image, change)
    own, other = Image.fromarray(image), Image.fromarray(_altered(image, change))
    if change.region is not None:
        other = Image.composite(other, own, uncut_coverage(change.region, picture, image.shape[:2]))
    return np.asarray(other)


def _altered(image: Pixels, change: PictureChange) -> Pixels:
    """Return a whole image blurred, gray or with noise."""
    if change.how == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(change.amount)))
    if change.how == "mask":
        return np.full_like(image, GRAY_LEVEL)
    random = np.random.Generator(np.random.Philox(change.seed))
    noisy = image + change.amount * random.standard_normal(image.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def _swapped(image: Pixels, change: PictureChange) -> Pixels:
    """Swap two boxes, each resized to the other's size."""
    assert change.region is not None
    assert change.other is not None
    boxes = [pixel_box(region, image.shape[:2]) for region in (change.region, change.other)]
    parts = [Image.fromarray(image).crop(box) for box in boxes]
    pixels = image.copy()
    for (left, top, right, bottom), part in zip(boxes, reversed(parts), strict=True):
        size = (right - left, bottom - top)
        own = part if part.size == size else part.resize(size, Image.Resampling.BILINEAR)
        pixels[top:bottom, left:right] = np.asarray(own)
    return pixels


def region_coverage(region: Region, picture: Picture) -> Image.Image:
    """Return [height, width] from 0 to 255: the share of each pixel of a picture in a region.

    If the picture is a tile, the result covers the tile. Raises `MediaError`.
    """
    image = uncut_coverage(region, picture, picture.size)
    return image if picture.cut is None else image.crop(picture.cut)


def uncut_coverage(region: Region, picture: Picture, size: tuple[int, ...]) -> Image.Image:
    """Return the coverage of a picture before it is cut. size: (height, width)."""
    height, width = size
    if region.shapes:
        return _drawn_coverage(replace(picture, changes=(), tile="", cut=None, grouped=False))
    if region.mask is not None:
        mask = read_image(region.mask, region.digest).convert("L")
        return mask.point(lambda value: 255 if value else 0)
    assert region.box is not None
    return box_coverage(region.box, (height, width))


@lru_cache(maxsize=CACHED_MASKS)
def _drawn_coverage(picture: Picture) -> Image.Image:
    """Return the coverage of the shapes of a picture; cached, because several tables of a file
    have the same pictures."""
    return Image.fromarray(_drawing(picture).mask.astype(np.uint8) * 255)


def region_mask(
    regions: Sequence[Region], picture: Picture, how: Processing, layout: PatchLayout
) -> Bools:
    """Return [height, width]: whether each pixel of the prepared image is in any of the regions.

    The mask covers the area of the patches. Raises `MediaError`.
    """
    height, width = layout.rows * layout.patch[0], layout.cols * layout.patch[1]
    mask = np.zeros((height, width), dtype=np.bool_)
    for region in regions:
        own = np.asarray(prepared_coverage(region_coverage(region, picture), how))
        mask |= own[:height, :width] >= HALF_COVERED
    return mask


def _rendered(picture: Picture) -> Pixels:
    match picture.how:
        case "file":
            assert picture.path is not None
            return np.asarray(read_image(picture.path, picture.digest))
        case "shapes" | "grid":
            return _drawing(picture).pixels
        case "mean":  # an image in a prompt; that of rows is the mean after preparation
            total: NDArray[np.float64] | float = 0.0
            for each in picture.of:  # one at a time to limit memory: there may be thousands
                pixels = render_pixels(each)
                pixels = pixels if picture.fit is None else fit_pixels(pixels, picture.fit)
                total = total + pixels.astype(np.float64)
            return (np.asarray(total) / len(picture.of)).round().astype(np.uint8)
        case name:
            return _baseline(name, picture)


def _baseline(name: str, picture: Picture) -> Pixels:
    """Render a baseline image. Raises MediaError if its class fails."""
    height, width = (max(1, side) for side in picture.size)
    hint = f"correct the class of `{name}`"
    try:
        entry = IMAGE_BASELINES[name]
        baseline = np.asarray(entry.pixels((height, width), picture.baseline_number, picture.seed))
    except Exception as error:
        reason = f"`pixels` of `{name}` failed: {type(error).__name__}: {error}"
        raise MediaError(reason, hint) from error
    if baseline.shape != (height, width, 3) or baseline.dtype != np.uint8:
        returned = f"{baseline.dtype} {list(baseline.shape)}"
        reason = f"`pixels` of `{name}` returned {returned} instead of uint8 {[height, width, 3]}"
        raise MediaError(reason, hint)
    return baseline


def _drawing(picture: Picture) -> ShapesDrawing | GridDrawing:
    random = np.random.Generator(np.random.Philox(picture.seed))
    if picture.grid is not None:
        return draw_grid(picture.grid, random)
    how = {"colour": picture.colour, "texture": picture.texture}
    return draw_shapes(picture.kind, picture.count, picture.size[0], random, **how)


@lru_cache(maxsize=CACHED_IMAGES)
def model_input(picture: Picture, processing: Processing) -> FloatPixels:
    """Return the model's input, [3, height, width]. Raises `MediaError`."""
    pixels = process_picture(picture, processing)
    pixels.setflags(write=False)
    return pixels


def process_picture(picture: Picture, processing: Processing) -> FloatPixels:
    """Return the prepared image, [3, height, width]. Raises `MediaError`."""
    if picture.how != "mean":
        later = [change for change in picture.changes if change.patches is not None]
        return process_pixels(render_pixels(picture), processing, later)
    total: NDArray[np.float64] | float = 0.0
    for each in picture.of:  # one at a time to limit memory: there may be thousands
        total = total + process_picture(each, processing).astype(np.float64)
    return (np.asarray(total) / len(picture.of)).astype(np.float32)


def process_pixels(
    image: Pixels, how: Processing, later: Sequence[PictureChange] = ()
) -> FloatPixels:
    """Prepare an image as transformers' processor does, [3, height, width].

    later: changes of patches, applied at the model's size before normalisation.
    """
    pixels: NDArray[np.uint8] | FloatPixels
    if how.floats:
        height, width = how.resized(*image.shape[:2])
        pixels = _resized_floats(_scaled(image, how.rescale), height, width, how.resample)
        pixels = _on_patches(_cropped(pixels, how.crop), later, how.rescale or 1.0)
    else:
        pixels = _scaled(_on_patches(fit_pixels(image, how), later, 1.0), how.rescale)
    if how.mean is not None:
        assert how.std is not None
        pixels = (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32, copy=False), -1, 0))


def fit_pixels(image: Pixels, how: Processing) -> Pixels:
    """Resize and crop an image, in whole levels of 255."""
    height, width = how.resized(*image.shape[:2])
    if how.resize is not None:
        image = np.asarray(Image.fromarray(image).resize((width, height), resample=how.resample))
    return cast("Pixels", _cropped(image, how.crop))


def _on_patches(
    image: NDArray[np.uint8] | FloatPixels, changes: Sequence[PictureChange], one: float
) -> NDArray[np.uint8] | FloatPixels:
    """Apply changes of patches. one: the value in the image that equals 1 of 255."""
    for change in changes:
        levels = np.divide(image, one).round().clip(0, 255).astype(np.uint8)
        altered, image = _altered(levels, change), image.copy()
        for left, top, right, bottom in change.patches or ():
            numbers = altered[top:bottom, left:right]
            image[top:bottom, left:right] = numbers if one == 1 else numbers * one
    return image


def _scaled(image: NDArray[np.uint8] | FloatPixels, by: float | None) -> FloatPixels:
    if by is None:
        return image.astype(np.float32)
    return (image.astype(np.float64) * by).astype(np.float32)


def _resized_floats(image: FloatPixels, height: int, width: int, resample: int) -> FloatPixels:
    """Resize each channel separately: Pillow has no images of three floats."""
    if image.shape[:2] == (height, width):
        return image
    parts = [
        Image.fromarray(np.ascontiguousarray(image[..., channel])).resize(
            (width, height), resample=resample
        )
        for channel in range(image.shape[-1])
    ]
    return np.stack([np.asarray(part, dtype=np.float32) for part in parts], axis=-1)


def _cropped(
    image: NDArray[np.uint8] | FloatPixels, size: tuple[int, int] | None
) -> NDArray[np.uint8] | FloatPixels:
    """Crop the centre; a smaller image is padded with black."""
    if size is None:
        return image
    height, width = image.shape[:2]
    top, left = crop_corner((height, width), size)
    if top < 0 or left < 0 or top + size[0] > height or left + size[1] > width:
        shape = (max(size[0], height), max(size[1], width), 3)
        whole = cast("Pixels | FloatPixels", np.zeros(shape, image.dtype))
        down, right = ceil((whole.shape[0] - height) / 2), ceil((whole.shape[1] - width) / 2)
        whole[down : down + height, right : right + width] = image
        image, top, left = whole, top + down, left + right
    return image[max(0, top) : top + size[0], max(0, left) : left + size[1]]
