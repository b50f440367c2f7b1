"""Texts for training and testing the succession model: an item of a sequence, and a question.

Pure Python and seeded. Filler words surround the item. The last word before the answer is the
question, so that attention must find the item:

    lamp march stone river next april
    cloud 27 next 28
    box ring october number 10
    27 stone digits two seven

The other questions give the model reasons to represent values: `previous` and `again` are within
the sequence, `number` asks for the numeral of the same value, and `digits` for the names of the
two digits of a numeral. Training doesn't ask for the successors of a share of the numerals.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from zoo import language
from zoo.language import SPECIAL, Span, Text

NUMERALS: tuple[str, ...] = tuple(str(n) for n in range(100))
WORDS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
ORDINALS: tuple[str, ...] = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth",
)  # fmt: skip
MONTHS: tuple[str, ...] = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
)  # fmt: skip
DAYS: tuple[str, ...] = (
    "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday",
)  # fmt: skip
LETTERS: tuple[str, ...] = tuple("abcdefghijklmnopqrstuvwxyz")
FILLERS: tuple[str, ...] = (
    "lamp", "stone", "river", "cloud", "box", "ring", "bread", "chair", "forest", "glass",
    "hammer", "island", "jacket", "kettle", "ladder", "mirror", "needle", "orange", "piano",
    "rocket",
)  # fmt: skip


@dataclass(frozen=True)
class Sequence:
    """Items in order, the value of the first one, and whether the first follows the last."""

    items: tuple[str, ...]
    first: int
    cyclic: bool


SEQUENCES: dict[str, Sequence] = {
    "numerals": Sequence(NUMERALS, 0, False),
    "words": Sequence(WORDS, 0, False),
    "ordinals": Sequence(ORDINALS, 1, False),
    "months": Sequence(MONTHS, 1, True),
    "days": Sequence(DAYS, 1, True),
    "letters": Sequence(LETTERS, 1, False),
}

NEXT, PREVIOUS, AGAIN, NUMBER, DIGITS = "next", "previous", "again", "number", "digits"
QUESTIONS: tuple[str, ...] = (NEXT, PREVIOUS, AGAIN, NUMBER, DIGITS)
WEIGHTS = (0.35, 0.1, 0.1, 0.2, 0.25)
"""How often each question is drawn."""
MOST_FILLERS = 3
"""Before the item, and between it and the question."""
HELD_OUT_SHARE = 0.12


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    items = (item for each in SEQUENCES.values() for item in each.items)
    return (*SPECIAL, *QUESTIONS, *items, *FILLERS)


@dataclass(frozen=True)
class Question:
    """A question about an item of a sequence."""

    kind: str
    sequence: str
    item: str

    def answer(self) -> tuple[str, ...]:
        """The words of the answer; none if the item has no answer to this question."""
        of = SEQUENCES[self.sequence]
        at = of.items.index(self.item)
        value = of.first + at
        if self.kind == AGAIN:
            return (self.item,)
        if self.kind == NUMBER:
            return () if self.sequence == "numerals" else (str(value),)
        if self.kind == DIGITS:
            if self.sequence != "numerals":
                return ()
            return WORDS[value // 10], WORDS[value % 10]
        to = at + (1 if self.kind == NEXT else -1)
        if of.cyclic:
            to %= len(of.items)
        return (of.items[to],) if 0 <= to < len(of.items) else ()

    @property
    def content(self) -> str:
        return f"{self.item} {self.kind}"


def _kept(content: str) -> bool:
    """Whether training has no such text: the successors of a share of the numerals."""
    item, kind = content.split(" ")
    return kind == NEXT and item in NUMERALS and language.is_held_out(content, HELD_OUT_SHARE)


def is_held_out(text: Text) -> bool:
    """Whether training has no text with this item and question."""
    return _kept(text.content)


@cache
def questions(kind: str, held_out: bool) -> tuple[Question, ...]:
    """Every question of a kind that has an answer, either those held out or the others."""
    every = (Question(kind, name, item) for name, of in SEQUENCES.items() for item in of.items)
    return tuple(each for each in every if each.answer() and _kept(each.content) == held_out)


def write(question: Question, before: tuple[str, ...], after: tuple[str, ...]) -> Text:
    """A question, with filler words before the item and after it, and its answer."""
    text = " ".join((*before, question.item, *after, question.kind))
    spans = list[Span]()
    for word in question.answer():
        spans.append((len(text) + 1, len(text) + 1 + len(word)))
        text += f" {word}"
    kind = f"{question.kind}, {question.sequence}"
    return Text(text, kind, tuple(spans), question.content)


def _fillers(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choices(FILLERS, k=rng.randint(0, MOST_FILLERS)))


def draw(rng: random.Random, question: Question) -> Text:
    """The question among random filler words."""
    return write(question, _fillers(rng), _fillers(rng))


def stream(seed: int, *, held_out: bool) -> Iterator[Text]:
    """Endless texts: those with held-out numerals, or those of training."""
    rng = random.Random(seed)
    while True:
        kind = NEXT if held_out else rng.choices(QUESTIONS, WEIGHTS)[0]
        yield draw(rng, rng.choice(questions(kind, held_out)))
