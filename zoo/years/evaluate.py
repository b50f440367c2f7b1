"""Measures accuracy on held-out texts: `python -m zoo.years.evaluate`."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.years.data import LATER, YEARS, stream

SEED = 20266  # not the training seed; only held-out texts are drawn


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Return how often the most likely token is a later year, on `n` held-out texts."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    tally = Tally()
    texts = language.different(stream(seed, held_out=True), n)
    for text, _, (found,) in language.best_words(model, tokenizer, texts):
        tally.add(found in YEARS and int(found) > int(text.content.split()[-1]))
    return {LATER: tally}


def main() -> None:
    """The command line."""
    folder = MODELS / "years"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts")


if __name__ == "__main__":
    main()
