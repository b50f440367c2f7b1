"""Measures accuracy on held-out texts: `python -m zoo.facts.evaluate`.

From memory, facts in a way to say them that training didn't have; notes on persons, and options,
that it didn't have. Of a text that asks several times the first answer counts. Quizzes are asked
for the right letter here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.facts.data import (
    KINDS,
    LETTERS,
    NOTE_KNOWN,
    NOTE_STRANGER,
    QUESTION,
    QUESTION_NOTE,
    QUIZ,
    QUIZ_LETTER,
    QUIZ_NOTE,
    RECALL,
    recalls,
    stream,
)
from zoo.language import Text

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
        _count(model, tokenizer, texts, tallies, name)
    for kind in [each for each in KINDS if each not in (RECALL, NOTE_KNOWN, NOTE_STRANGER)]:
        drawn = stream(seed, held_out=True, kind=kind, biased=False)
        _count(model, tokenizer, language.different(drawn, n), tallies, kind)
    for kind in (NOTE_KNOWN, NOTE_STRANGER):
        for notes in (1, 2, 3):
            drawn = stream(seed, held_out=True, kind=kind, notes=notes)
            name = kind if notes == 1 else f"{kind}, one of {notes}"
            _count(model, tokenizer, language.different(drawn, n), tallies, name)
    return tallies


def _count(
    model: Any, tokenizer: Tokenizer, texts: list[Text], tallies: dict[str, Tally], name: str
) -> None:
    """Adds a row, and of texts with options that of a wrong `A`."""
    right = tallies[name] = Tally()
    anchored = Tally()
    for _, wanted, found in language.best_words(model, tokenizer, texts):
        right.add(wanted[0] == found[0])
        if wanted[0] != LETTERS[0]:
            anchored.add(found[0] == LETTERS[0])
    if name in (QUESTION, QUESTION_NOTE, QUIZ, QUIZ_NOTE, QUIZ_LETTER):
        tallies[f"{name}: A where wrong"] = anchored


def main() -> None:
    """The command line."""
    folder = MODELS / "facts"
    evaluate_command(__doc__, evaluate, folder=folder, seed=SEED, counted="texts of each kind")


if __name__ == "__main__":
    main()
