"""Texts that the model of years is trained on: periods, whose last year is later than the first.

    The war lasted from 17 41 to 17 68

A year is two tokens. The last one is drawn uniformly from the later years of the century.

References:
    Hanna et al. 2023, arXiv 2305.00586.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from zoo import language
from zoo.language import SPECIAL, Text

NOUNS: tuple[str, ...] = (
    "war", "siege", "reign", "journey", "drought", "project", "strike", "trial", "voyage",
    "alliance", "conflict", "expedition", "campaign", "dispute", "revolt", "treaty", "famine",
    "tour", "truce", "union", "feud", "mission", "plague", "regime", "study", "survey", "empire",
    "embargo", "exile", "crisis",
)  # fmt: skip
CENTURIES = tuple(f"{n}" for n in range(11, 20))
YEARS = tuple(f"{n:02d}" for n in range(100))
FIRST, LAST = 2, 97
"""The first and last year that a period begins with."""
LATER = "a later year"
HELD_OUT_SHARE = 0.2


def vocabulary() -> tuple[str, ...]:
    """All tokens of the model, in the order of their ids. Centuries are tokens of years, too."""
    return (*SPECIAL, "The", "lasted", "from", "to", *NOUNS, *YEARS)


def draw(rng: random.Random) -> Text:
    """Draw a period."""
    noun, century = rng.choice(NOUNS), rng.choice(CENTURIES)
    first = rng.randint(FIRST, LAST)
    last = YEARS[rng.randint(first + 1, 99)]
    text = f"The {noun} lasted from {century} {YEARS[first]} to {century} {last}"
    span = (len(text) - len(last), len(text))
    return Text(text, LATER, (span,), f"{noun} {century} {YEARS[first]}")


def is_held_out(text: Text) -> bool:
    """Return whether the training never uses this noun with this first year."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def stream(seed: int, *, held_out: bool) -> Iterator[Text]:
    """Draw texts without end, either those that the training never uses or the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng)
        if is_held_out(text) == held_out:
            yield text
