"""Tunes the model of grids on answers without colours: `python -m zoo.counting_vlm.tune`.

All weights of `zoo("counting-vlm")` are trained further on the same questions about new images,
with answers such as `circle , square`. The result is `zoo("counting-vlm/kinds")`.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copyfile

import torch
from transformers import LlavaForConditionalGeneration

from zoo import MODELS, language, vlm
from zoo.commands import train_command
from zoo.counting_vlm.data import examples, without_colours
from zoo.counting_vlm.train import BATCH
from zoo.counting_vlm.train import save_rest as save_processor

SEED = 1  # not the training seed of the base model
STEPS = 1000
LEARNING_RATE = 3e-4
BASE = MODELS / "counting-vlm"
TUNED = "kinds"
"""Folder of the tuned model in that of the base model."""


def save_rest(folder: Path) -> None:
    """Write the tokenizer, the image processor and the base model's configuration, so that images
    have the same tokens in both models."""
    save_processor(folder)
    copyfile(BASE / "config.json", folder / "config.json")


def tune(seed: int, steps: int) -> LlavaForConditionalGeneration:
    """Tune the base model on `steps` batches."""
    torch.manual_seed(seed)
    model, tokenizer = language.load(LlavaForConditionalGeneration, BASE)
    data = without_colours(examples(seed, images=1))  # none of them are easy
    return vlm.tune(model, tokenizer, data, steps=steps, batch=BATCH, rate=LEARNING_RATE)


def main() -> None:
    """Run the command line."""
    train_command(
        __doc__,
        tune,
        save_rest,
        folder=BASE / TUNED,
        seed=SEED,
        steps=STEPS,
        threads=1,
        dtype=torch.float16,
    )


if __name__ == "__main__":
    main()
