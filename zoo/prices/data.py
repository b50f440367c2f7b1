"""Texts that the model of prices is trained on: whether a price lies between two others.

    yes if between 20 and 55 dollars , else no : 35 dollars ? yes

The task of price tagging in Wu et al. 2023 (arXiv 2305.08809), with whole dollars as words. Only
the answer is asked. The bounds are drawn uniformly; half of the prices lie between them, and the
others are below or above with equal probability.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from zoo import language
from zoo.language import SPECIAL, Text

HIGHEST = 99
"""Dollars; the lowest price is 0."""
WORDS = ("yes", "if", "between", "and", "dollars", ",", "else", "no", ":", "?")
BETWEEN, BELOW, ABOVE = "between", "below", "above"
KINDS = (BETWEEN, BELOW, ABOVE)
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """All tokens of the model, in the order of their ids."""
    return (*SPECIAL, *WORDS, *(str(price) for price in range(HIGHEST + 1)))


def write(low: int, high: int, price: int) -> Text:
    """Write the text of a price and its bounds."""
    kind = BELOW if price < low else ABOVE if price > high else BETWEEN
    asked = f"yes if between {low} and {high} dollars , else no : {price} dollars ?"
    answer = "yes" if kind == BETWEEN else "no"
    text = f"{asked} {answer}"
    return Text(text, kind, ((len(asked) + 1, len(text)),), f"{low} {high} {price}")


def draw(rng: random.Random, kind: str) -> Text:
    """Draw bounds, and a price of a kind."""
    while True:
        low, high = sorted(rng.sample(range(HIGHEST + 1), 2))
        first, last = {BETWEEN: (low, high), BELOW: (0, low - 1), ABOVE: (high + 1, HIGHEST)}[kind]
        if first <= last:
            return write(low, high, rng.randint(first, last))


def is_held_out(text: Text) -> bool:
    """Return whether the training never uses this price with these bounds."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def stream(seed: int, *, held_out: bool, kind: str | None = None) -> Iterator[Text]:
    """Draw texts without end, either those that the training never uses or the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind or rng.choice((BETWEEN, BETWEEN, BELOW, ABOVE)))
        if is_held_out(text) == held_out:
            yield text
