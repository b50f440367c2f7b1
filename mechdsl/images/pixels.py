"""From what an image is made of to its pixels, and to what a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mechdsl.base.arrays import Bools
from mechdsl.images import files
from mechdsl.images.patches import PatchLayout
from mechdsl.images.picture import GRAY, Picture, PictureChange
from mechdsl.images.processing import Processing, crop_corner
from mechdsl.images.regions import HALF, Region, of_box, prepared_cover, whole_box
from mechdsl.images.shapes import Drawn, draw

Pixels = NDArray[np.uint8]
"""[height, width, 3] in RGB."""
Floats = NDArray[np.float32]
KEPT = 128
"""Prepared images that are kept, as the runs of a file read them again and again."""


def pixels(picture: Picture) -> Pixels:
    """The image, with what corruptions do to it before it is made ready. Raises files.NotRead."""
    if picture.cut is None:
        return _uncut(picture)
    left, top, right, bottom = picture.cut
    return _of_tiles(picture.uncut)[top:bottom, left:right]


@lru_cache(maxsize=2)
def _of_tiles(picture: Picture) -> Pixels:
    """The image of several rows, which follow one another, in two runs."""
    return _uncut(picture)


def _uncut(picture: Picture) -> Pixels:
    found = _made(picture)
    for change in picture.changes:
        if change.patches is None:
            found = _changed(found, picture, change)
    return found


def _changed(image: Pixels, picture: Picture, change: PictureChange) -> Pixels:
    if change.how == "swap":
        return _swapped(image, change)
    own, other = Image.fromarray(image), Image.fromarray(_altered(image, change))
    if change.region is not None:
        other = Image.composite(other, own, cover(change.region, picture, image.shape[:2]))
    return np.asarray(other)


def _altered(image: Pixels, change: PictureChange) -> Pixels:
    """All of an image, blurred, gray or with noise."""
    if change.how == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(change.amount)))
    if change.how == "mask":
        return np.full_like(image, GRAY)
    random = np.random.Generator(np.random.Philox(change.seed))
    noisy = image + change.amount * random.standard_normal(image.shape)
    return noisy.round().clip(0, 255).astype(np.uint8)


def _swapped(image: Pixels, change: PictureChange) -> Pixels:
    """Two boxes change places, each resized to the other's size."""
    assert change.region is not None
    assert change.other is not None
    boxes = [whole_box(region, image.shape[:2]) for region in (change.region, change.other)]
    parts = [Image.fromarray(image).crop(box) for box in boxes]
    found = image.copy()
    for (left, top, right, bottom), part in zip(boxes, reversed(parts), strict=True):
        size = (right - left, bottom - top)
        own = part if part.size == size else part.resize(size, Image.Resampling.BILINEAR)
        found[top:bottom, left:right] = np.asarray(own)
    return found


def cover_of(region: Region, picture: Picture) -> Image.Image:
    """[height, width] of 0 to 255, how much of each pixel of a picture, or of the tile of one, lies
    in a region. Raises files.NotRead."""
    found = cover(region, picture, picture.size)
    return found if picture.cut is None else found.crop(picture.cut)


def cover(region: Region, picture: Picture, size: tuple[int, ...]) -> Image.Image:
    """The same of a picture before it is cut. size: (height, width)."""
    height, width = size
    if region.shapes:
        return Image.fromarray(_drawn(picture).mask.astype(np.uint8) * 255)
    if region.mask is not None:
        mask = files.read(region.mask, region.digest).convert("L")
        return mask.point(lambda value: 255 if value else 0)
    assert region.box is not None
    return of_box(region.box, (height, width))


def mask_of(
    regions: Sequence[Region], picture: Picture, how: Processing, layout: PatchLayout
) -> Bools:
    """[height, width] which pixels of the prepared image lie in one of some regions, as far as the
    patches reach. Raises files.NotRead."""
    height, width = layout.rows * layout.patch[0], layout.cols * layout.patch[1]
    found = np.zeros((height, width), dtype=np.bool_)
    for region in regions:
        own = np.asarray(prepared_cover(cover_of(region, picture), how))
        found |= own[:height, :width] >= HALF
    return found


def _made(picture: Picture) -> Pixels:
    match picture.how:
        case "file":
            assert picture.path is not None
            return np.asarray(files.read(picture.path, picture.digest))
        case "gray":
            height, width = picture.size
            return np.full((max(1, height), max(1, width), 3), picture.level, np.uint8)
        case "noise":
            random = np.random.Generator(np.random.Philox(picture.seed))
            return random.integers(0, 256, (*picture.size, 3), dtype=np.uint8)
        case "shapes":
            return _drawn(picture).pixels
        case "mean":
            raise AssertionError  # it has no pixels before it is made ready


def _drawn(picture: Picture) -> Drawn:
    random = np.random.Generator(np.random.Philox(picture.seed))
    how = {"colour": picture.colour, "texture": picture.texture}
    return draw(picture.kind, picture.count, picture.size[0], random, **how)


@lru_cache(maxsize=KEPT)
def prepared(picture: Picture, processing: Processing) -> Floats:
    """[3, height, width] that a model is given. Raises files.NotRead."""
    found = made_ready(picture, processing)
    found.setflags(write=False)
    return found


def made_ready(picture: Picture, processing: Processing) -> Floats:
    """[3, height, width] that a processor makes of it. Raises files.NotRead."""
    if picture.how != "mean":
        later = [change for change in picture.changes if change.patches is not None]
        return prepare(pixels(picture), processing, later)
    total: NDArray[np.float64] | float = 0.0
    for each in picture.of:  # one after another: there may be thousands
        total = total + made_ready(each, processing).astype(np.float64)
    return (np.asarray(total) / len(picture.of)).astype(np.float32)


def prepare(image: Pixels, how: Processing, later: Sequence[PictureChange] = ()) -> Floats:
    """[3, height, width]: as transformers' processor does it, `Processing` says what.

    later: changes of patches, made where it has the model's size and isn't normalised yet.
    """
    height, width = how.resized(*image.shape[:2])
    found: NDArray[np.uint8] | Floats
    if how.floats:
        found = _resized_floats(_scaled(image, how.rescale), height, width, how.resample)
        found = _on_patches(_cropped(found, how.crop), later, how.rescale or 1.0)
    else:
        found = image
        if how.resize is not None:
            found = np.asarray(
                Image.fromarray(image).resize((width, height), resample=how.resample)
            )
        found = _scaled(_on_patches(_cropped(found, how.crop), later, 1.0), how.rescale)
    if how.mean is not None:
        assert how.std is not None
        found = (found - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(found.astype(np.float32, copy=False), -1, 0))


def _on_patches(
    image: NDArray[np.uint8] | Floats, changes: Sequence[PictureChange], one: float
) -> NDArray[np.uint8] | Floats:
    """one: what 1 of 255 is in the image."""
    for change in changes:
        levels = np.divide(image, one).round().clip(0, 255).astype(np.uint8)
        altered, image = _altered(levels, change), image.copy()
        for left, top, right, bottom in change.patches or ():
            own = altered[top:bottom, left:right]
            image[top:bottom, left:right] = own if one == 1 else own * one
    return image


def _scaled(image: NDArray[np.uint8] | Floats, by: float | None) -> Floats:
    if by is None:
        return image.astype(np.float32)
    return (image.astype(np.float64) * by).astype(np.float32)


def _resized_floats(image: Floats, height: int, width: int, resample: int) -> Floats:
    """Each channel by itself: Pillow has no images of three floats."""
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
    image: NDArray[np.uint8] | Floats, size: tuple[int, int] | None
) -> NDArray[np.uint8] | Floats:
    """The middle; an image that is smaller stands on black."""
    if size is None:
        return image
    height, width = image.shape[:2]
    top, left = crop_corner((height, width), size)
    if top < 0 or left < 0 or top + size[0] > height or left + size[1] > width:
        shape = (max(size[0], height), max(size[1], width), 3)
        whole = cast("Pixels | Floats", np.zeros(shape, image.dtype))
        down, right = ceil((whole.shape[0] - height) / 2), ceil((whole.shape[1] - width) / 2)
        whole[down : down + height, right : right + width] = image
        image, top, left = whole, top + down, left + right
    return image[max(0, top) : top + size[0], max(0, left) : left + size[1]]
