"""Images of coloured shapes on a texture, with a mask of where the shapes lie.

Only whole numbers are drawn and compared, so that a seed gives the same pixels on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Grid = NDArray[np.int64]
Rgb = tuple[int, int, int]

KINDS: Mapping[str, Callable[[Grid, Grid, int], Mask]] = {
    "circle": lambda x, y, side: x * x + y * y <= side * side,
    "square": lambda x, y, side: np.maximum(abs(x), abs(y)) <= side,
    "triangle": lambda x, y, side: 2 * abs(x) <= y + side,
    "cross": lambda x, y, side: 3 * np.minimum(abs(x), abs(y)) <= side,
    "diamond": lambda x, y, side: abs(x) + abs(y) <= side,
    "ring": lambda x, y, side: (
        (x * x + y * y <= side * side) & (4 * (x * x + y * y) >= side * side)
    ),
}
"""Which pixels of a square belong to the shape: x to the right and y down from its middle, in half
pixels, up to `side`."""

TEXTURES: Mapping[str, Callable[[Grid, Grid, int], Mask]] = {
    "plain": lambda x, y, width: np.zeros(x.shape, np.bool_),
    "stripes": lambda x, y, width: y // width % 2 == 1,
    "bars": lambda x, y, width: x // width % 2 == 1,
    "checks": lambda x, y, width: (x // width + y // width) % 2 == 1,
    "dots": lambda x, y, width: (x % (2 * width) < width) & (y % (2 * width) < width),
}
"""Which pixels have the second of a texture's two colours; its elements are `width` pixels wide."""

COLOURS: Mapping[str, Rgb] = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (225, 205, 45),
    "purple": (150, 50, 190),
    "cyan": (40, 200, 210),
}

SMALLEST = 3
"""Pixels of a shape's side, at least: in fewer the kinds look alike."""
COLOUR_SPREAD, TINT, NOISE = 24, 18, 14


@dataclass(frozen=True)
class Drawn:
    """An image with what is in it."""

    pixels: Pixels
    """[height, width, 3]"""
    mask: Mask
    """[height, width], true where the shapes lie."""
    kind: str
    colours: tuple[str, ...]
    """Of each shape, from left to right within each row."""
    texture: str


def draw(
    kind: str, n: int, size: int, random: Generator, *, colour: str = "", texture: str = ""
) -> Drawn:
    """`n` shapes of a kind at random places in a square image of `size` pixels, of random colours
    and sizes, on a random texture in muted colours, and noise over all. Shapes don't touch.

    colour, texture: those instead of random ones. Raises ValueError where a name is unknown or the
    shapes would be smaller than `SMALLEST`.
    """
    for what, name, names in (
        ("kind", kind, KINDS),
        ("colour", colour or "red", COLOURS),
        ("texture", texture or "plain", TEXTURES),
    ):
        if name not in names:
            raise ValueError(f"unknown {what} {name!r}; there are {', '.join(names)}")
    pattern = texture or _one_of(TEXTURES, random)
    pixels, mask = _background(pattern, size, random), np.zeros((size, size), np.bool_)
    colours: list[str] = []
    for top, left, cell in _cells(n, size, random):
        side = int(random.integers(max(SMALLEST, cell * 3 // 8), cell * 5 // 8 + 1))
        top += int(random.integers(cell - side))
        left += int(random.integers(cell - side))
        name = colour or _one_of(COLOURS, random)
        shape = _shape(kind, side)
        spread = random.integers(-COLOUR_SPREAD, COLOUR_SPREAD + 1, 3)
        pixels[top : top + side, left : left + side][shape] = np.array(COLOURS[name]) + spread
        mask[top : top + side, left : left + side] = shape
        colours.append(name)
    pixels += random.integers(-NOISE, NOISE + 1, pixels.shape)
    return Drawn(pixels.clip(0, 255).astype(np.uint8), mask, kind, tuple(colours), pattern)


def _one_of(names: Mapping[str, object], random: Generator) -> str:
    return list(names)[int(random.integers(len(names)))]


def _cells(n: int, size: int, random: Generator) -> list[tuple[int, int, int]]:
    """Squares of a grid, one for each shape: top, left and side."""
    across = max(1, math.isqrt(max(n, 1) - 1) + 1)
    cell = size // across
    if n < 0 or cell * 5 // 8 < SMALLEST:
        raise ValueError(f"{n} shapes don't fit into an image of {size} × {size} pixels")
    chosen = sorted(random.permutation(across * across)[:n].tolist())
    return [(each // across * cell, each % across * cell, cell) for each in chosen]


def _shape(kind: str, side: int) -> Mask:
    """Which pixels of its square belong to a shape, [side, side]."""
    y, x = np.indices((side, side)) * 2 + 1 - side
    return KINDS[kind](x, y, side)


def _background(texture: str, size: int, random: Generator) -> Grid:
    """A texture of two greyish colours, moved by a random amount, [size, size, 3]."""
    width = int(random.integers(2, 5))
    y, x = np.indices((size, size)) + random.integers(0, 2 * width, (2, 1, 1))
    grey, apart = int(random.integers(60, 160)), int(random.integers(45, 75))
    tints = random.integers(-TINT, TINT + 1, (2, 3))
    second = TEXTURES[texture](x, y, width)
    return np.where(second[..., None], grey + apart + tints[1], grey + tints[0])
