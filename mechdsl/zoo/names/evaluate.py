"""Measures accuracy on held-out texts: `python -m mechdsl.zoo.names.evaluate`.

Pairs of persons, and sets of coloured objects, that training never had.
"""

from __future__ import annotations

from pathlib import Path

from transformers import GPT2LMHeadModel

from mechdsl.zoo import language
from mechdsl.zoo.commands import Tally, evaluate_command
from mechdsl.zoo.names.data import COLOUR, COLOURS, EITHER, IOI_FIRST, IOI_SECOND, stream

SEED = 20262  # not the training seed; only held-out texts are drawn
A_COLOUR = "coloured objects: one of the text"
ONE_OF_THE_TWO = "a third person gives: one of the two"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of text, `n` held-out texts of each."""
    model, tokenizer = language.load(GPT2LMHeadModel, folder)
    tallies = {name: Tally() for name in (IOI_FIRST, IOI_SECOND, ONE_OF_THE_TWO, COLOUR, A_COLOUR)}
    for kind in (IOI_FIRST, IOI_SECOND, EITHER, COLOUR):
        texts = language.different(stream(seed, held_out=True, kind=kind), n)
        for text, (wanted,), (found,) in language.best_words(model, tokenizer, texts):
            if kind == EITHER:
                tallies[ONE_OF_THE_TWO].add(found in text.content.split(" from "))
                continue
            tallies[kind].add(found == wanted)
            if kind == COLOUR:
                tallies[A_COLOUR].add(found in COLOURS and f" {found} " in text.text)
    return tallies


def main() -> None:
    """The command line."""
    folder = Path(__file__).parent
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
