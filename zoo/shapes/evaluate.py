"""Measures accuracy on held-out images: `python -m zoo.shapes.evaluate`.

Held out are scenes (kind, colour and texture together), a fifth of all. Patches are put in grey at
random, or by the mask: all that the shape doesn't touch, or all that it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import default_rng
from torch import Tensor
from transformers import ViTForImageClassification

from mechdsl.images.pixels import Mask, Pixels, ShapesDrawing
from zoo import MODELS, pictures
from zoo.commands import Tally, evaluate_command
from zoo.pictures import GREY, PATCH, SIZE
from zoo.shapes.data import CLASSES

SEED = 20268
HELD_OUT, TRAINED = "scenes kept from training", "scenes of training"
HALF, MOST = "half of the patches in grey", "7 of 8 patches in grey"
SHAPE, REST = "grey but where the shape is", "grey where the shape is"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy on `n` images of each kind of row."""
    model = pictures.load(ViTForImageClassification, folder)
    drawn = pictures.images(seed, n, held_out=True)
    random = default_rng(seed)
    rows: dict[str, tuple[Sequence[ShapesDrawing], Sequence[Pixels]]] = {
        HELD_OUT: (drawn, [each.pixels for each in drawn]),
        HALF: (drawn, [pictures.in_grey(each.pixels, 0.5, random) for each in drawn]),
        MOST: (drawn, [pictures.in_grey(each.pixels, 0.875, random) for each in drawn]),
        SHAPE: (drawn, [_grey_where(each.pixels, ~_touched(each.mask)) for each in drawn]),
        REST: (drawn, [_grey_where(each.pixels, _touched(each.mask)) for each in drawn]),
    }
    others = pictures.images(seed, n, held_out=False)
    rows[TRAINED] = (others, [each.pixels for each in others])
    return {name: _right(model, *each) for name, each in rows.items()}


def grey_image(folder: Path) -> dict[str, float]:
    """The probability of each kind where all is grey."""
    model = pictures.load(ViTForImageClassification, folder)
    [found] = probabilities(model, [np.full((SIZE, SIZE, 3), GREY, np.uint8)])
    return dict(zip(CLASSES, found.tolist(), strict=True))


def probabilities(model: Any, pixels: Sequence[Pixels]) -> Tensor:
    """Of each image and kind, [image, kind]."""
    with torch.no_grad():
        parts = [
            model(pixel_values=pictures.as_input(pixels[i : i + 64])).logits.softmax(-1)
            for i in range(0, len(pixels), 64)
        ]
    return torch.cat(parts)


def _right(model: Any, drawn: Sequence[ShapesDrawing], pixels: Sequence[Pixels]) -> Tally:
    best = probabilities(model, pixels).argmax(-1).tolist()
    right = [CLASSES[k] == each.kind for k, each in zip(best, drawn, strict=True)]
    return Tally(sum(right), len(right))


def _touched(mask: Mask) -> Mask:
    """All pixels of the patches that the shape has a part in."""
    across = SIZE // PATCH
    patches = (pictures.pixels_of_patches(mask) > 0).reshape(across, across)
    return patches.repeat(PATCH, 0).repeat(PATCH, 1)


def _grey_where(pixels: Pixels, where: Mask) -> Pixels:
    return np.where(where[..., None], np.uint8(GREY), pixels)


def _said(folder: Path) -> str:
    found = (f"{name} {share:.3f}" for name, share in grey_image(folder).items())
    return f"a grey image: {', '.join(found)}"


def main() -> None:
    """The command line."""
    folder = MODELS / "shapes"
    evaluate_command(
        __doc__, evaluate, folder=folder, seed=SEED, counted="images of each kind", below=_said
    )


if __name__ == "__main__":
    main()
