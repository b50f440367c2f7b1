"""Images the classifier is trained and tested on: one coloured shape on a texture, 32 × 32 pixels.

Seeded, by `mechdsl/images/pixels.py`. Half of the images of training have patches in grey, a random
share from none to all, and keep their kind: where nothing of the shape is left, no kind is more
likely than another, so that a grey image says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from mechdsl.images.pixels import SHAPES, Pixels
from zoo import pictures

CLASSES: tuple[str, ...] = tuple(SHAPES)
GREY_SHARE = 0.5
"""Of the images, those with patches in grey."""


@dataclass(frozen=True)
class Example:
    """An image of training, its class, and which shape its patches are part of."""

    pixels: Pixels
    label: int
    patches: NDArray[np.int64]
    """[patch], see `pictures.kinds_of_patches`."""


def examples(seed: int, whole_until: int = 0) -> Iterator[Example]:
    """Endless images of training; the first `whole_until` without grey."""
    random = default_rng(seed)
    for number, drawn in enumerate(pictures.stream(random, held_out=False)):
        pixels = drawn.pixels
        if number >= whole_until and random.random() < GREY_SHARE:
            pixels = pictures.in_grey(pixels, random.random(), random)
        yield Example(pixels, CLASSES.index(drawn.kind), pictures.kinds_of_patches(drawn))
