"""Trains the vision-language model of grids: `python -m zoo.counting_vlm.train`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from zoo import MODELS, vlm
from zoo.commands import train_command
from zoo.counting_vlm.data import ROWS, examples, vocabulary

SEED = 0
STEPS = 14000
BATCH = 16  # images
SCAFFOLD = 0.35  # of the steps, with the losses about patches
LEARNING_RATE = 2e-3


def model_config() -> LlavaConfig:
    """The shape: 2 layers for images, 4 for texts, 25 patches of 8 × 8 pixels."""
    return vlm.llava_config(
        vocabulary(), side=ROWS * vlm.CELL, width=96, layers=4, vision_layers=2, positions=128
    )


def save_rest(folder: Path) -> None:
    """Write the tokenizer and the image processor."""
    vlm.save_rest(folder, model_config(), vocabulary())


def train(seed: int, steps: int) -> LlavaForConditionalGeneration:
    """Train a model on `steps` batches."""
    about_patches = int(SCAFFOLD * steps)
    return vlm.train(
        model_config(),
        vocabulary(),
        examples(seed, steps * BATCH),
        seed=seed,
        steps=steps,
        batch=BATCH,
        rate=LEARNING_RATE,
        aligned_steps=about_patches,
        told_steps=about_patches,
        told_layer=0,
    )


def main() -> None:
    """Run the command line."""
    train_command(
        __doc__,
        train,
        save_rest,
        folder=MODELS / "counting-vlm",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
