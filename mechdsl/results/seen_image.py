"""An image as a model sees it, kept with results that are drawn on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.record import Record, record

SHOWN = 3
"""Prompts that an overlay shows where `top n` doesn't say how many."""


@record
class SeenImage(Record):
    """An image as the model sees it, and how its tokens divide it."""

    title: str
    pixels: NDArray[np.uint8]
    """[height, width, 3], resized and cropped, not normalised."""
    front: int
    """Tokens before those of the patches."""
    rows: int
    cols: int
