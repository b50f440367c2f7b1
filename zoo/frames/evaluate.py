"""Measure accuracy on held-out clips: `python -m zoo.frames.evaluate`.

Held-out clips have two shapes that training doesn't have together. An answer is right if greedy
generation gives all its words and ends there. In the last rows, images are replaced: a single frame
is independent of the motion, and frames in reverse order show the opposite one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import LlavaForConditionalGeneration

from zoo import MODELS, language, vlm
from zoo.commands import Tally, evaluate_command
from zoo.frames.data import FRAMES, OPPOSITE, WAY, WHERE, one_question
from zoo.pictures import GREY
from zoo.vlm import Example

SEED = 20272  # not the training seed
ALONE = f"{WAY}, one shape"
TRAINED, REVERSED = f"{WAY}, pairs of training", f"{WAY}, reversed: opposite"
ONE_FRAME = tuple(f"{WAY}, only frame {frame + 1}" for frame in range(FRAMES))
TWO_FRAMES = f"{WAY}, only frames 1 and 2"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return the accuracy of each question, on `n` examples each."""
    model, tokenizer = language.load(LlavaForConditionalGeneration, folder)
    ways = one_question(WAY, seed, n, held_out=True)
    rows = {
        WAY: ways,
        WHERE: one_question(WHERE, seed, n, held_out=True),
        TRAINED: one_question(WAY, seed, n, held_out=False, count=2),
        ALONE: one_question(WAY, seed, n, held_out=False, count=1),
        REVERSED: [reverse(each) for each in ways],
        TWO_FRAMES: [keep_frames(each, (0, 1)) for each in ways],
    }
    for frame, name in enumerate(ONE_FRAME):
        rows[name] = [keep_frames(each, (frame,)) for each in ways]
    return {name: vlm.tally(model, tokenizer, each) for name, each in rows.items()}


def reverse(example: Example) -> Example:
    """Return the example with its images in reverse order, and the opposite motion as answer."""
    [turn] = example.turns
    return replace(
        example,
        images=example.images[::-1],
        turns=(replace(turn, answer=OPPOSITE[turn.answer]),),
    )


def keep_frames(example: Example, kept: Sequence[int]) -> Example:
    """Return the example with gray images instead of all others."""
    gray = np.full_like(example.images[0], GREY)
    images = tuple(each if k in kept else gray for k, each in enumerate(example.images))
    return replace(example, images=images)


def main() -> None:
    """Run the command line."""
    evaluate_command(
        __doc__, evaluate, folder=MODELS / "frames", seed=SEED, counted="examples of each row"
    )


if __name__ == "__main__":
    main()
