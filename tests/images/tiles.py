"""Reference for tiled images; uses nothing of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from . import support
from .support import FRONT, GRID, PATCH, SIDE

EDGES: Mapping[tuple[int, int], tuple[int, ...]] = {
    (23, 2): (0, 11, 23),
    (16, 2): (0, 8, 16),
    (30, 2): (0, 15, 30),
    (19, 3): (0, 6, 12, 19),
    (16, 3): (0, 5, 10, 16),
    (41, 3): (0, 13, 27, 41),
}
"""(pixels of a side, number of tiles) → edges of the tiles, computed manually."""
NAMES = tuple(f"row {row} col {col}" for row in (1, 2) for col in (1, 2, 3))
BOXES = ((2, 3, 9, 20), (6, 1, 9, 7), (10, 4, 33, 10))
"""(left, top, right, bottom) of each file; each box intersects several tiles, but not all."""
Box = tuple[int, int, int, int]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Tile:
    """One row: a tile of a file, or all of it (`whole`)."""

    number: int
    """Number of the file."""
    name: str

    @property
    def box(self) -> Box:
        """Position of the tile in pixels of the file."""
        height, width = support.image(self.number).shape[:2]
        if self.name == "whole":
            return 0, 0, width, height
        row, col = divmod(NAMES.index(self.name), 3)
        down, across = EDGES[height, 2], EDGES[width, 3]
        return across[col], down[row], across[col + 1], down[row + 1]

    def of(self, image: Pixels) -> Image.Image:
        """Cut the tile out of an image of the file's size."""
        return Image.fromarray(image).crop(self.box)

    def pixels(self, name: str, image: Pixels | None = None) -> Tensor:
        """Model input [1, 3, side, side] from the library's processor."""
        given = self.of(support.image(self.number) if image is None else image)
        return support.processor(name)(given, return_tensors="pt")["pixel_values"].double()

    def inside(self, name: str) -> NDArray[np.bool_]:
        """[side, side]: pixels of the prepared image at least half of which is in the box."""
        left, top, right, bottom = self.box
        within = BOXES[self.number]
        sides = resized(name, bottom - top, right - left)
        down = _shares(bottom - top, sides[0], within[1] - top, within[3] - top)
        across = _shares(right - left, sides[1], within[0] - left, within[2] - left)
        return np.outer(down, across) >= 0.5

    def region(self, name: str) -> tuple[int, ...]:
        """Tokens with a pixel in the box."""
        inside = self.inside(name)
        return tuple(
            FRONT[name] + row * GRID + col
            for row in range(GRID)
            for col in range(GRID)
            if inside[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH].any()
        )


def resized(name: str, height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image after resizing and before cropping."""
    size = support.PROCESSORS[name][1]["size"]
    if "height" in size:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def _shares(pixels: int, to: int, start: int, end: int) -> NDArray[np.float64]:
    """[side]: share of each pixel of a resized and cropped side that is between `start` and `end`;
    enlarged images repeat pixels."""
    edges = np.arange(to + 1) * pixels / to
    if to >= pixels:
        middle = np.floor((edges[:-1] + edges[1:]) / 2)
        share = ((middle >= start) & (middle < end)).astype(float)
    else:
        share = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0, None)
        share /= np.diff(edges)
    first = (to - SIDE) // 2
    return share[first : first + SIDE]


def write(folder: Path) -> None:
    """Write the files with boxes and masks, and each tile that intersects its box as a separate
    file with the clipped box."""
    support.write_images(folder)
    lines = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines()
    records = [
        {**json.loads(line), "box": list(box)} for line, box in zip(lines, BOXES, strict=True)
    ]
    cut: list[dict[str, object]] = []
    for number, record in enumerate(records):
        image, (left, top, right, bottom) = support.image(number), BOXES[number]
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[top:bottom, left:right] = 255
        Image.fromarray(mask).save(folder / f"mask{number}.png")
        record["mask"] = f"mask{number}.png"
        for tile in (Tile(number, each) for each in NAMES):
            path, own = f"{number} {tile.name}.png", clipped(BOXES[number], tile.box)
            tile.of(image).save(folder / path)
            if own is not None:
                named = {"scene": str(number), "at": tile.name}
                cut.append({**record, **named, "file": path, "box": own})
    for file, rows in (("data.jsonl", records), ("cut.jsonl", cut)):
        text = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / file).write_text(text, encoding="utf-8")


def clipped(box: Box, within: Box) -> list[int] | None:
    """Intersection of two boxes, relative to the corner of the second."""
    left, top = max(box[0], within[0]), max(box[1], within[1])
    right, bottom = min(box[2], within[2]), min(box[3], within[3])
    if right <= left or bottom <= top:
        return None
    return [left - within[0], top - within[1], right - within[0], bottom - within[1]]


@cache
def unpatched(name: str, tile: Tile) -> support.Seen:
    """Run a tile through the bare model."""
    return support.forward(name, tile.pixels(name))


def rows(values: Mapping[str, Sequence[object]]) -> Iterator[Tile]:
    """Tile of each row of a result, from its row values."""
    for image, name in zip(values["image"], values["tile"], strict=True):
        yield Tile(int(str(image).removesuffix(".png")), str(name))
