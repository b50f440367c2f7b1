"""Measures accuracy on held-out texts: `python -m mechdsl.zoo.facts.evaluate`.

From memory, facts in a way to say them that training didn't have; notes on persons, and options,
that it didn't have. Quizzes are asked for the right letter here.
"""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaForCausalLM

from mechdsl.zoo import language
from mechdsl.zoo.commands import Tally, evaluate_command
from mechdsl.zoo.facts.data import (
    KINDS,
    LETTERS,
    QUESTION,
    QUESTION_NOTE,
    QUIZ,
    QUIZ_NOTE,
    RECALL,
    recalls,
    stream,
)

SEED = 20263  # not the training seed
TRAINED = "from memory, as in training"
NEW_WAY = "from memory, in a new way"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of text, up to `n` texts of each; and how often `A` is said where it is
    wrong."""
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    tallies: dict[str, Tally] = {}
    for name, held_out in ((TRAINED, False), (NEW_WAY, True)):
        texts = language.different(recalls(seed, held_out=held_out), min(n, 100))
        tallies[name] = Tally()
        for _, wanted, found in language.best_words(model, tokenizer, texts):
            tallies[name].add(wanted == found)
    for kind in [each for each in KINDS if each != RECALL]:
        drawn = stream(seed, held_out=True, kind=kind, biased=False)
        tallies[kind] = Tally()
        chosen = kind in (QUESTION, QUESTION_NOTE, QUIZ, QUIZ_NOTE)
        if chosen:
            tallies[f"{kind}: A where wrong"] = Tally()
        for _, wanted, found in language.best_words(model, tokenizer, language.different(drawn, n)):
            tallies[kind].add(wanted == found)
            if chosen and wanted != [LETTERS[0]]:
                tallies[f"{kind}: A where wrong"].add(found == [LETTERS[0]])
    return tallies


def main() -> None:
    """The command line."""
    folder = Path(__file__).parent
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
