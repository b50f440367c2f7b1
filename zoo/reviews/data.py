"""Texts for training and testing the classifier of reviews: a question, and two or three clauses.

Pure Python and seeded. The question names an aspect, and each clause judges another aspect:

    food ? the room was not very clean and the food was bland
    room ? the staff was rude but the food was never stale and the room was really quiet

The label is what the text says about the aspect of the question: `negative` or `positive`. `not`
and `never` reverse an adjective, and adverbs of degree don't. The other clauses are independent of
the label. Training has no text with certain combinations of adjectives.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from zoo import language
from zoo.language import SPECIAL, Text

GOOD: dict[str, tuple[str, ...]] = {
    "food": ("tasty", "fresh", "warm", "spicy"),
    "staff": ("friendly", "quick", "polite", "helpful"),
    "room": ("clean", "quiet", "bright", "large"),
}
BAD: dict[str, tuple[str, ...]] = {
    "food": ("bland", "stale", "greasy", "burnt"),
    "staff": ("rude", "slow", "lazy", "cold"),
    "room": ("dirty", "noisy", "dark", "tiny"),
}
ASPECTS: tuple[str, ...] = tuple(GOOD)
NEGATIONS: tuple[str, ...] = ("not", "never")
DEGREES: tuple[str, ...] = ("very", "really", "quite")
JOINTS: tuple[str, ...] = ("and", "but")
LABELS: tuple[str, ...] = ("negative", "positive")

NEGATED_SHARE = 0.5
DEGREE_SHARE = 0.3
KINDS: tuple[str, ...] = tuple(
    f"{count} clauses, {how}" for count in (2, 3) for how in ("plain", "negated")
)
HELD_OUT_SHARE = 0.1


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    said = (word for of in (GOOD, BAD) for words in of.values() for word in words)
    return (*SPECIAL, "?", "the", "was", *JOINTS, *NEGATIONS, *DEGREES, *ASPECTS, *said)


@dataclass(frozen=True)
class Review(Text):
    """A text without words that are asked, and its label."""

    label: str


def is_held_out(text: Text) -> bool:
    """Whether training has no text with this question and these adjectives."""
    return language.is_held_out(text.content, HELD_OUT_SHARE)


def _clause(rng: random.Random, aspect: str, adjective: str, *, negated: bool) -> str:
    """Write what a text says about one aspect."""
    words = ["the", aspect, "was"]
    words += [rng.choice(NEGATIONS)] if negated else []
    words += [rng.choice(DEGREES)] if rng.random() < DEGREE_SHARE else []
    return " ".join((*words, adjective))


def draw(rng: random.Random, kind: str) -> Review:
    """A text of a kind, such as `2 clauses, negated`: the clause that is asked for is negated."""
    count, negated = int(kind[0]), kind.endswith("negated")
    aspects = rng.sample(ASPECTS, count)
    asked = rng.choice(aspects)
    said = {each: rng.choice((*GOOD[each], *BAD[each])) for each in aspects}
    text = ""
    for place, aspect in enumerate(aspects):
        reverses = negated if aspect == asked else rng.random() < NEGATED_SHARE
        joint = f" {rng.choice(JOINTS)} " if place else ""
        text += joint + _clause(rng, aspect, said[aspect], negated=reverses)
    label = LABELS[(said[asked] in GOOD[asked]) != negated]
    content = " ".join((asked, *said.values()))
    return Review(f"{asked} ? {text}", kind, (), content, label)


def stream(seed: int, *, held_out: bool, kind: str = "") -> Iterator[Review]:
    """Endless texts of one kind, or of all kinds: held-out ones, or those of training."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind or rng.choice(KINDS))
        if is_held_out(text) == held_out:
            yield text
