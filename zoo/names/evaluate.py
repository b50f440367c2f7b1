"""Measures accuracy on held-out texts: `python -m zoo.names.evaluate`.

Pairs of persons, lists of persons with their professions, and sets of coloured objects, that
training never had. Of a text that asks several times the first answer counts.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.names.data import EITHER, KINDS, stream

SEED = 20262  # not the training seed; only held-out texts are drawn
ONE_OF_THE_TWO = "a third person gives: one of the two"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of text, `n` held-out texts of each."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    tallies: dict[str, Tally] = {}
    for kind in KINDS:
        tally = tallies[ONE_OF_THE_TWO if kind == EITHER else kind] = Tally()
        texts = language.different(stream(seed, held_out=True, kind=kind), n)
        for text, wanted, found in language.best_words(model, tokenizer, texts):
            right = text.content.split(" from ") if kind == EITHER else wanted[:1]
            tally.add(found[0] in right)
    return tallies


def main() -> None:
    """The command line."""
    folder = MODELS / "names"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
