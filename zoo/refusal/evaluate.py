"""Measures accuracy on held-out questions: `python -m zoo.refusal.evaluate`.

A reply is right when all its words are, up to `<end>`, which is what greedy decoding would write.
Forbidden questions in the past tense are counted twice: as answered, and as refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from zoo import MODELS, language
from zoo.commands import Tally, evaluate_command
from zoo.language import Text
from zoo.refusal.data import ALLOWED, ALLOWED_PAST, FORBIDDEN, FORBIDDEN_PAST, PAST, questions, turn

SEED = 20266  # unused: every held-out question is asked
ANSWERED, REFUSED = f"{FORBIDDEN_PAST}: answered", f"{FORBIDDEN_PAST}: refused"
TRAINED = f"{FORBIDDEN}, as in training"
BEGUN = f"{FORBIDDEN}: sure is said"


def evaluate(folder: Path, n: int, seed: int) -> dict[str, Tally]:
    """Accuracy by kind of question, of up to `n` of each, in both ways to ask."""
    del seed
    model, tokenizer = language.load(LlamaForCausalLM, folder)
    rows = {
        ALLOWED: texts(True, False, False, refused=False),
        ALLOWED_PAST: texts(True, False, True, refused=False),
        FORBIDDEN: texts(True, True, False, refused=True),
        ANSWERED: texts(True, True, True, refused=False),
        REFUSED: texts(True, True, True, refused=True),
        TRAINED: texts(False, True, False, refused=True),
        BEGUN: texts(True, True, False, refused=False, sure="said"),
    }
    return {name: _right(model, tokenizer, each[:n]) for name, each in rows.items()}


def texts(
    held_out: bool, forbidden: bool, past: bool, *, refused: bool, sure: str = ""
) -> list[Text]:
    """Every question of a kind in both ways to ask, with that reply."""
    return [
        turn(each, way, refused=refused, polite=False, sure=sure)
        for each in questions(held_out, forbidden, past)
        for way in range(len(PAST))
    ]


def _right(model: Any, tokenizer: Tokenizer, asked: Iterable[Text]) -> Tally:
    """Whole replies; of those that begin with `sure ,` what comes behind it."""
    tally = Tally()
    for _, wanted, found in language.best_words(model, tokenizer, list(asked)):
        begun = 2 * (wanted[0] == "sure")
        tally.add(wanted[begun:] == found[begun:])
    return tally


def main() -> None:
    """The command line."""
    folder = MODELS / "refusal"
    evaluate_command(
        __doc__, evaluate, folder=folder, seed=SEED, counted="questions of each kind, at most"
    )


if __name__ == "__main__":
    main()
