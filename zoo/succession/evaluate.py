"""Measure accuracy on held-out numerals and on newly sampled texts:
`python -m zoo.succession.evaluate`.

The successors of some numerals were held out of training. All other rows ask for pairs of item and
question that training had, among newly sampled filler words.
"""

from __future__ import annotations

import random
from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.language import Text
from zoo.succession.data import NEXT, QUESTIONS, SEQUENCES, draw, questions

SEED = 20270  # not the training seed
HELD_OUT = f"{NEXT}, held-out numerals"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return the accuracy of `next` by sequence, and of each other question, on `n` texts each.

    An answer of two words is right if both words are.
    """
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    tallies: dict[str, Tally] = {}
    for name, texts in _texts(n, seed).items():
        tallies[name] = Tally()
        for _, wanted, found in language.best_words(model, tokenizer, texts):
            tallies[name].add(wanted == found)
    return tallies


def _texts(n: int, seed: int) -> dict[str, list[Text]]:
    rng = random.Random(seed)
    rows = {HELD_OUT: questions(NEXT, True)}
    for name in SEQUENCES:
        asked = questions(NEXT, False)
        rows[f"{NEXT}, {name}"] = tuple(each for each in asked if each.sequence == name)
    rows |= {kind: questions(kind, False) for kind in QUESTIONS if kind != NEXT}
    return {
        name: [draw(rng, rng.choice(choices)) for _ in range(n)] for name, choices in rows.items()
    }


def main() -> None:
    """Run the command line."""
    evaluate_command(
        __doc__,
        evaluate,
        folder=MODELS / "succession",
        seed=SEED,
        counted="texts of each row",
    )


if __name__ == "__main__":
    main()
