"""Texts the worked-answers model is trained and tested on: lists in parts, then a question.

Pure Python and seeded. The last word of the question tells how to answer: in steps, at once, or to
the nearest five.

    Part 1: apple plum fig | Part 2: kiwi pear. Steps: Count 1: 3 Count 2: 2 Total: 5 <end>
    Part 1: apple plum fig | Part 2: kiwi pear. Answer: 5 <end>
    Part 1: apple plum fig | Part 2: kiwi pear. About: 5 <end>
    Steps: Count 1: 3 Count 2: 2 Total: 5 <end>

The last is an exercise in adding up, without lists; its counts are given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from zoo import language
from zoo.counting import data as counting
from zoo.counting.data import FRAME, ITEMS, MAX_ITEMS
from zoo.language import Span, Text

END = "<end>"
SPECIAL: tuple[str, ...] = (*language.SPECIAL, END)
STEPS, ANSWER, ABOUT, SUM = "Steps", "Answer", "About", "sum"
KINDS: dict[str, float] = {STEPS: 0.4, ANSWER: 0.25, ABOUT: 0.15, SUM: 0.2}
"""Forms of texts, and how often each is drawn."""
MAX_PARTS = 5
MAX_NUMBER = 50  # totals reach 45

Parts = tuple[tuple[str, ...], ...]


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    numbers = (str(n) for n in range(MAX_NUMBER + 1))
    return (*SPECIAL, *FRAME, STEPS, ANSWER, ABOUT, *numbers, *ITEMS)


def draw_parts(rng: random.Random) -> Parts:
    """One to five lists of one to nine items, of few words or of many."""
    words = rng.sample(ITEMS, rng.choice((1, 2, 3, 5, len(ITEMS))))
    return tuple(
        tuple(rng.choice(words) for _ in range(rng.randint(1, MAX_ITEMS)))
        for _ in range(rng.randint(1, MAX_PARTS))
    )


def question(parts: Parts) -> str:
    """The lists."""
    return " | ".join(f"Part {n}: {' '.join(part)}" for n, part in enumerate(parts, 1)) + "."


def about(number: int) -> int:
    """The nearest multiple of five; no number lies between two."""
    return 5 * ((number + 2) // 5)


def reply(counts: list[int], kind: str) -> str:
    """What is written behind the colon of the question."""
    total = sum(counts)
    if kind in (ANSWER, ABOUT):
        return f"{total if kind == ANSWER else about(total)} {END}"
    steps = " ".join(f"Count {n}: {count}" for n, count in enumerate(counts, 1))
    return f"{steps} Total: {total} {END}"


def write(parts: Parts, kind: str) -> Text:
    """The text of these parts. Every word of the reply is asked, of a sum those behind `Total:`."""
    counts = [len(part) for part in parts]
    text = f"{'' if kind == SUM else f'{question(parts)} '}{STEPS if kind == SUM else kind}:"
    answers, spans = reply(counts, kind).split(" "), list[Span]()
    for number, word in enumerate(answers):
        start = len(text) + 1
        text += f" {word}"
        if kind != SUM or number >= len(answers) - 2:
            spans.append((start, start + len(word.rstrip(":"))))
    return Text(text, kind, tuple(spans), " | ".join(map(" ".join, parts)))


def draw(rng: random.Random, kind: str | None = None) -> Text:
    """One text, of any kind or of this one."""
    return write(draw_parts(rng), kind or rng.choices([*KINDS], [*KINDS.values()])[0])


def is_held_out(text: Text) -> bool:
    """Whether these lists are kept from training, however they are asked."""
    return language.is_held_out(text.content, counting.HELD_OUT_SHARE)


def stream(seed: int, *, held_out: bool, kind: str | None = None) -> Iterator[Text]:
    """Endless texts, either only those kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        text = draw(rng, kind)
        if is_held_out(text) == held_out:
            yield text
