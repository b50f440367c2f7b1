"""Trains the classifier of shapes: `python -m zoo.shapes.train`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from zoo import MODELS, language, pictures
from zoo.commands import train_command
from zoo.shapes.data import CLASSES, examples

SEED = 0
STEPS = 3600
WHOLE_STEPS = 1200  # without grey patches
BATCH = 32  # images
LEARNING_RATE = 1.5e-3
SCAFFOLD_LAYER = 4


def model_config() -> ViTConfig:
    """The shape: 6 layers, 4 heads, width 96, 64 patches of 4 × 4 pixels, no dropout."""
    return ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        image_size=pictures.SIZE,
        patch_size=pictures.PATCH,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
        architectures=["ViTForImageClassification"],
    )


def save_processor(folder: Path) -> None:
    pictures.save_processor(folder, "ViTImageProcessor")


def train(seed: int, steps: int) -> ViTForImageClassification:
    """A model after `steps` batches."""
    torch.manual_seed(seed)
    model: Any = ViTForImageClassification(model_config())
    pictures.begin_with_places(model.vit.embeddings.position_embeddings)
    pictures.begin_alike(model)
    scaffold = pictures.Scaffold(model.config.hidden_size)
    data = examples(seed, WHOLE_STEPS * BATCH)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        batch = list(itertools.islice(data, BATCH))
        labels = torch.tensor([each.label for each in batch])
        pixels = pictures.as_input([each.pixels for each in batch])
        found = model(pixel_values=pixels, output_hidden_states=True)
        right = (found.logits.argmax(-1) == labels).float().mean()
        whole = nn.functional.cross_entropy(found.logits, labels)
        hidden = found.hidden_states[SCAFFOLD_LAYER]
        return whole + scaffold(hidden, [each.patches for each in batch], step), right

    trained = [*model.parameters(), *scaffold.parameters()]
    language.optimise(trained, loss, steps=steps, rate=LEARNING_RATE)
    return model


def main() -> None:
    """The command line."""
    train_command(
        __doc__,
        train,
        save_processor,
        folder=MODELS / "shapes",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
