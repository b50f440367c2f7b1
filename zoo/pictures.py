"""What the zoo's models of images share: what they see, how it is given to them, how they start."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from torch import Tensor, nn

from mechdsl.images.pixels import (
    SHAPE_COLOURS,
    SHAPES,
    TEXTURES,
    Mask,
    Pixels,
    ShapesDrawing,
    draw_shapes,
)
from zoo.language import is_held_out

SIZE, PATCH = 32, 4  # pixels
GREY = 128
HELD_OUT_SHARE = 0.2
FASTEST, AMPLITUDE = 1.5, 0.7
"""Of the waves that positions begin with: radians a patch, height."""
PART = 4
"""Pixels of a patch, of 16, that make it part of the shape."""
SCAFFOLD_STEPS = 1500
Scene = tuple[str, str, str]
"""Kind, colour, texture."""


@cache
def scenes(held_out: bool) -> tuple[Scene, ...]:
    """What images show: either those that are kept from training or the others."""
    every = itertools.product(SHAPES, SHAPE_COLOURS, TEXTURES)
    return tuple(each for each in every if is_held_out(" ".join(each), HELD_OUT_SHARE) == held_out)


def stream(random: Generator, *, held_out: bool) -> Iterator[ShapesDrawing]:
    """Endless images of one shape each, of the scenes kept from training, or of the others."""
    known = scenes(held_out)
    while True:
        yield of_scene(known[int(random.integers(len(known)))], random)


def of_scene(scene: Scene, random: Generator) -> ShapesDrawing:
    """One image that shows it."""
    kind, colour, texture = scene
    return draw_shapes(kind, 1, SIZE, random, colour=colour, texture=texture)


def scene_of(drawn: ShapesDrawing) -> Scene:
    """What an image of one shape shows."""
    return drawn.kind, drawn.colours[0], drawn.texture


def images(seed: int, n: int, *, held_out: bool) -> list[ShapesDrawing]:
    """The first `n` images of a seed."""
    return list(itertools.islice(stream(default_rng(seed), held_out=held_out), n))


def in_grey(pixels: Pixels, share: float, random: Generator) -> Pixels:
    """The image with that share of its patches in grey, [height, width, 3]."""
    across = SIZE // PATCH
    gone = random.permutation(across * across).reshape(across, across) < share * across * across
    return np.where(gone.repeat(PATCH, 0).repeat(PATCH, 1)[..., None], np.uint8(GREY), pixels)


def pixels_of_patches(mask: Mask) -> NDArray[np.int64]:
    """How many pixels of each patch are in the mask, [patch], row by row."""
    across = SIZE // PATCH
    return mask.reshape(across, PATCH, across, PATCH).sum((1, 3)).ravel()


def kinds_of_patches(drawn: ShapesDrawing) -> NDArray[np.int64]:
    """The number of its kind where a patch is part of the shape, else the number of kinds,
    [patch]."""
    part = pixels_of_patches(drawn.mask) >= PART
    return np.where(part, list(SHAPES).index(drawn.kind), len(SHAPES))


def as_input(pixels: Sequence[Pixels]) -> Tensor:
    """What the models are given, [image, channel, height, width] from -1 to 1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def save_processor(folder: Path, kind: str, *, crops: bool = False, side: int = SIZE) -> None:
    """Writes `preprocessor_config.json` that says the same as `as_input`. kind: the class of
    transformers that reads it; crops: it would crop by itself; side: of images, in pixels."""
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        **({"do_center_crop": False} if crops else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def begin_with_places(positions: Tensor, across: int = SIZE // PATCH) -> None:
    """Gives new positions, [..., 1 + patches, width], sines and cosines of row and column; the
    class token in front gets none. across: patches of a row."""
    width = positions.shape[-1]
    rates = FASTEST / 8.0 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(across)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], -1)  # [place, width / 2]
    rows = waves[:, None].expand(across, across, -1)
    columns = waves[None].expand(across, across, -1)
    positions.zero_()
    positions[..., 1:, :] = AMPLITUDE * torch.cat([rows, columns], -1).flatten(0, 1)


@torch.no_grad()
def begin_alike(model: nn.Module) -> None:
    """Gives new keys the weights of the queries, so that patches attend to those that are like
    them, and so to near ones (Trockman and Kolter 2023, mimetic initialization)."""
    attention = [module for module in model.modules() if hasattr(module, "q_proj")]
    if not attention:
        raise ValueError("this version of transformers has other names for queries and keys")
    for module in attention:
        query, key = module.get_submodule("q_proj"), module.get_submodule("k_proj")
        key.load_state_dict(query.state_dict())


class Scaffold(nn.Module):
    """Asks patches which kind of shape they are part of, in the first steps of a training and ever
    less: so a model learns in a thousand steps to see shapes. It isn't kept."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.named = nn.Linear(width, len(SHAPES) + 1)

    def forward(self, hidden: Tensor, patches: Sequence[NDArray[np.int64]], step: int) -> Tensor:
        """What is added to the loss. hidden: [image, 1 + patch, width]; patches: of each image,
        see `kinds_of_patches`."""
        known = torch.from_numpy(np.stack(patches)).flatten()
        lost = nn.functional.cross_entropy(self.named(hidden[:, 1:]).flatten(0, 1), known)
        return max(0.0, 1 - step / SCAFFOLD_STEPS) * lost


def load(model_class: Any, folder: Path) -> Any:
    """A model of the zoo, computed in 32 bits whatever it is stored in."""
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()
