"""Measure accuracy on held-out images: `python -m zoo.counting_vlm.evaluate`.

In held-out images, all shapes are in cells where training has no such shape. An answer is right if
greedy generation gives all its words and ends there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import LlavaForConditionalGeneration

from zoo import MODELS, language, vlm
from zoo.commands import Tally, evaluate_command
from zoo.counting_vlm.data import QUESTIONS, absent, one_question, without_colours
from zoo.counting_vlm.tune import TUNED
from zoo.vlm import Example

SEED = 20271  # not the training seed
TRAINED, CUES, NO_CUES = "at, cells of training", "row of, cues", "row of, no cues"
OTHER_IMAGE = "at, image of another row"
FOG = "is there, fog"
ABSENT = {
    "absent companion": (False, True),
    "absent other shape": (False, False),
    "absent companion, fog": (True, True),
    "absent other shape, fog": (True, False),
}
"""Questions with the answer `no`: whether in fog, and whether for a companion."""


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return the accuracy of each question, on `n` images each; then that of the tuned model, whose
    right answers have no colours."""
    model, tokenizer = language.load(LlavaForConditionalGeneration, folder)
    found = {name: vlm.tally(model, tokenizer, rows) for name, rows in _rows(n, seed).items()}
    tuned, _ = language.load(LlavaForConditionalGeneration, folder / TUNED)
    for kind in QUESTIONS:
        rows = list(without_colours(one_question(kind, seed, n, held_out=True)))
        found[f"{TUNED}: {kind}"] = vlm.tally(tuned, tokenizer, rows)
    return found


def _rows(n: int, seed: int) -> dict[str, list[Example]]:
    rows = {kind: one_question(kind, seed, n, held_out=True) for kind in QUESTIONS}
    rows[CUES] = one_question("row of", seed, n, held_out=True, cues=True)
    rows[NO_CUES] = one_question("row of", seed, n, held_out=True, cues=False)
    rows[TRAINED] = one_question("at", seed, n, held_out=False)
    images = [each.images for each in rows["at"]]
    rows[OTHER_IMAGE] = [
        replace(each, images=other)
        for each, other in zip(rows["at"], [*images[1:], *images[:1]], strict=True)
    ]
    rows[FOG] = one_question("is there", seed, n, held_out=True, fog=True)
    for name, (fog, companion) in ABSENT.items():
        rows[name] = absent(seed, n, fog=fog, companion=companion)
    return rows


def main() -> None:
    """Run the command line."""
    evaluate_command(
        __doc__, evaluate, folder=MODELS / "counting-vlm", seed=SEED, counted="images of each row"
    )


if __name__ == "__main__":
    main()
