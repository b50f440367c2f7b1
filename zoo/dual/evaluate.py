"""Measures matching of held-out images and captions: `python -m zoo.dual.evaluate`.

Held out are scenes (kind, colour and texture together), a fifth of all: neither images nor captions
of them were trained on. A choice is right when the true one has the highest score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.random import default_rng
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPModel

from mechdsl.images.pixels import SHAPE_COLOURS, SHAPES, TEXTURES, ShapesDrawing
from zoo import MODELS, pictures
from zoo.commands import Tally, evaluate_command
from zoo.dual.data import caption
from zoo.dual.train import encode
from zoo.pictures import Scene, scene_of, scenes

SEED = 20269
KIND, COLOUR, TEXTURE = "kind, of 6", "colour, of 6", "texture, of 5"
CAPTION, TRAINED = "caption, of all 180", "caption, scenes of training"
IMAGE = "image, of one of each scene"

CHOICES: dict[str, Callable[[Scene], list[Scene]]] = {
    KIND: lambda true: [(kind, "", "") for kind in SHAPES],
    COLOUR: lambda true: [(true[0], colour, "") for colour in SHAPE_COLOURS],
    TEXTURE: lambda true: [(true[0], "", texture) for texture in TEXTURES],
    CAPTION: lambda true: [*scenes(False), *scenes(True)],
}
"""What captions may say of an image, one of which is true."""


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """What is chosen for each of `n` images, and for the captions of `n` images, of which each
    group has all held-out scenes once."""
    model = pictures.load(CLIPModel, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept = pictures.images(seed, n, held_out=True)
    known = pictures.images(seed, n, held_out=False)
    tallies = {name: captions_chosen(model, tokenizer, kept, name) for name in CHOICES}
    tallies[TRAINED] = captions_chosen(model, tokenizer, known, CAPTION)
    tallies[IMAGE] = images_chosen(model, tokenizer, n, seed)
    return tallies


def captions_chosen(
    model: Any, tokenizer: Tokenizer, drawn: Sequence[ShapesDrawing], name: str
) -> Tally:
    """For each image, whether the true caption is the best of the row's choices."""
    tally = Tally()
    every = {caption(*each) for true in scenes(False) for each in CHOICES[name](true)}
    columns = {text: number for number, text in enumerate(sorted(every))}
    found = scores(model, tokenizer, drawn, list(columns))
    for each, row in zip(drawn, found.tolist(), strict=True):
        texts = [caption(*said) for said in CHOICES[name](scene_of(each))]
        tally.add(max(texts, key=lambda text: row[columns[text]]) == _said(scene_of(each), name))
    return tally


def _said(true: Scene, name: str) -> str:
    kind, colour, texture = true
    return caption(
        kind,
        colour if name in (COLOUR, CAPTION) else "",
        texture if name in (TEXTURE, CAPTION) else "",
    )


def images_chosen(model: Any, tokenizer: Tokenizer, n: int, seed: int) -> Tally:
    """For each held-out caption, whether its image is the best among one of each held-out scene."""
    tally, random = Tally(), default_rng(seed)
    texts = [caption(*each) for each in scenes(True)]
    while tally.n + len(texts) <= n:
        drawn = [pictures.of_scene(each, random) for each in scenes(True)]
        best = scores(model, tokenizer, drawn, texts).argmax(0)
        for number, chosen in enumerate(best.tolist()):
            tally.add(chosen == number)
    return tally


def scores(
    model: Any, tokenizer: Tokenizer, drawn: Sequence[ShapesDrawing], texts: Sequence[str]
) -> Tensor:
    """How well each caption fits each image, [image, caption]."""
    given = encode(tokenizer, texts, model.config.text_config.pad_token_id)
    parts: list[Tensor] = []
    with torch.no_grad():
        for i in range(0, len(drawn), 64):
            pixels = pictures.as_input([each.pixels for each in drawn[i : i + 64]])
            parts.append(model(pixel_values=pixels, **given).logits_per_image)
    return torch.cat(parts)


def main() -> None:
    """The command line."""
    folder = MODELS / "dual"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="images")


if __name__ == "__main__":
    main()
