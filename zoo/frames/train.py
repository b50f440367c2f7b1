"""Trains the vision-language model of motion: `python -m zoo.frames.train`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from zoo import MODELS, vlm
from zoo.commands import train_command
from zoo.frames.data import ACROSS, examples, vocabulary

SEED = 0
STEPS = 3600
BATCH = 64  # examples of four images
LEARNING_RATE = 1e-3
ALIGNED_STEPS = 1000
TOLD_STEPS = 1800  # with a loss that names the motion at each patch of a shape


def model_config() -> LlavaConfig:
    """The shape: a layer for images, 3 for texts, 9 patches of 8 × 8 pixels in each frame."""
    return vlm.llava_config(
        vocabulary(), side=ACROSS * vlm.CELL, width=64, layers=3, vision_layers=1, positions=64
    )


def save_rest(folder: Path) -> None:
    """Write the tokenizer and the image processor."""
    vlm.save_rest(folder, model_config(), vocabulary())


def train(seed: int, steps: int) -> LlavaForConditionalGeneration:
    """Train a model on `steps` batches."""
    return vlm.train(
        model_config(),
        vocabulary(),
        examples(seed),
        seed=seed,
        steps=steps,
        batch=BATCH,
        rate=LEARNING_RATE,
        aligned_steps=ALIGNED_STEPS,
        told_steps=TOLD_STEPS,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def main() -> None:
    """Run the command line."""
    train_command(
        __doc__,
        train,
        save_rest,
        folder=MODELS / "frames",
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
