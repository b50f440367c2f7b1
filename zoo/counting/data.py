"""Texts the counting model is trained and tested on: lists in parts, then questions.

Pure Python and seeded. A text looks like one of these (answers are what is learned):

    Part 1: apple plum fig Part 2: kiwi pear Count 2: 2 Count 1: 3 Total: 5
    Part 1: apple, plum, fig | Part 2: kiwi, pear. Count 1: 3
    Part 1: apple 1 plum fig 3 Part 2: kiwi pear 2 Total: 5

A text also says what its questions may not attend to while training (`CountingExample.hidden`).
Left to itself the model may keep a part's count anywhere between the part and the question (it took
the colon of the next part's header when tried). Hiding the headers leaves the list; where bars
separate the parts, hiding the lists as well leaves the bar and the full stop.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["running", "count", "total", "direct"]
Hide = Literal["nothing", "headers", "lists"]  # "lists" hides the headers as well
Span = tuple[int, int]  # from one character of the text up to another

MAX_ITEMS = 9
MAX_NUMBER = 30  # totals reach 27; a few more numerals, so that "one too many" is a word as well

ITEMS: tuple[str, ...] = (
    "apple", "pear", "plum", "fig", "kiwi", "thing", "peach", "lemon", "lime", "mango",
    "grape", "melon", "cherry", "banana", "orange", "berry", "date", "olive", "nut", "bean",
    "cat", "dog", "bird", "fish", "cup", "book", "key", "ball",
)  # fmt: skip
SPECIAL: tuple[str, ...] = ("<s>", "<pad>", "<unk>")
FRAME: tuple[str, ...] = ("Part", "Count", "Total", ":", ",", ".", "|")

HELD_OUT_SHARE = 0.1
HIDDEN_SHARE = 0.75


def vocabulary() -> tuple[str, ...]:
    """Every token of the model, in the order of their ids."""
    return (*SPECIAL, *FRAME, *(str(n) for n in range(MAX_NUMBER + 1)), *ITEMS)


@dataclass(frozen=True)
class Target:
    """A numeral of the text that the model should predict; a span in characters."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True)
class ListForm:
    """How a text is punctuated: between items, after a part that others follow, at the end."""

    item_sep: str
    bar: str
    end: str


PLAIN = ListForm(" ", "", "")
BARRED = ListForm(", ", " |", ".")
# The two forms that the example experiments contrast get most of the weight; the others are
# there so that no single mark is needed.
FORMS: tuple[tuple[ListForm, float], ...] = (
    (PLAIN, 0.45),
    (BARRED, 0.25),
    (ListForm(" ", "", "."), 0.06),
    (ListForm(", ", "", ""), 0.06),
    (ListForm(", ", "", "."), 0.06),
    (ListForm(" ", " |", ""), 0.06),
    (ListForm(", ", " |", ""), 0.06),
)


@dataclass(frozen=True)
class CountingExample:
    """One text, without `<s>`, with the numerals to predict in the order of the text."""

    text: str
    targets: tuple[Target, ...]
    parts: tuple[tuple[str, ...], ...]
    form: ListForm
    questions: int  # the character where the questions begin
    hidden: tuple[Span, ...] = ()  # what they may not attend to while training

    @property
    def held_out(self) -> bool:
        """Whether this list of lists is kept from training, however it is written."""
        return is_held_out(self.parts)


def is_held_out(parts: tuple[tuple[str, ...], ...]) -> bool:
    """A fixed share of all contents, by hash, so that punctuation cannot leak a list."""
    key = " | ".join(" ".join(part) for part in parts)
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


class _ExampleWriter:
    """Appends pieces of text and remembers where the numerals to predict are."""

    def __init__(self) -> None:
        self.text = ""
        self.targets: list[Target] = []

    def add(self, piece: str) -> None:
        self.text += piece

    def number(self, value: int, kind: Kind) -> None:
        self.text += " "
        start = len(self.text)
        self.text += str(value)
        self.targets.append(Target(start, len(self.text), kind))


def _draw_parts(rng: random.Random) -> tuple[tuple[str, ...], ...]:
    parts = rng.choices((1, 2, 3), weights=(0.3, 0.45, 0.25))[0]
    # Lists of one word, of few words and of many: the number of words must not tell the count.
    kinds = rng.choice((1, 2, 3, 5, len(ITEMS)))
    words = rng.sample(ITEMS, kinds)
    return tuple(
        tuple(rng.choice(words) for _ in range(rng.randint(1, MAX_ITEMS))) for _ in range(parts)
    )


def write(
    parts: tuple[tuple[str, ...], ...],
    form: ListForm,
    asked: tuple[int, ...],
    *,
    total: bool,
    numbered: random.Random | None = None,
    hide: Hide = "nothing",
) -> CountingExample:
    """The text for these parts: `asked` are the parts (from 0) whose counts are asked, in order.

    `numbered` gives half of the items their running number, drawn from that generator.
    """
    out = _ExampleWriter()
    headers: list[Span] = []
    lists: list[Span] = []
    for p, part in enumerate(parts):
        begin = len(out.text)
        out.add(f"{' ' if p else ''}Part {p + 1}: ")
        headers.append((begin, len(out.text)))
        for i, item in enumerate(part):
            out.add(f"{form.item_sep if i else ''}{item}")
            if numbered is not None and numbered.random() < 0.5:
                out.number(i + 1, "running")
        lists.append((headers[-1][1], len(out.text)))
        out.add(form.end if p == len(parts) - 1 else form.bar)
    questions = len(out.text)
    for p in asked:
        out.add(f" Count {p + 1}:")
        out.number(len(parts[p]), "count")
    if total:
        out.add(" Total:")
        out.number(sum(map(len, parts)), "total" if asked else "direct")
    hidden = {"nothing": (), "headers": tuple(headers), "lists": (*headers, *lists)}[hide]
    return CountingExample(out.text, tuple(out.targets), parts, form, questions, hidden)


def draw(rng: random.Random, *, numbered_share: float = 0.6) -> CountingExample:
    """One text of the training distribution."""
    parts = _draw_parts(rng)
    form = rng.choices([f for f, _ in FORMS], weights=[w for _, w in FORMS])[0]
    order = list(range(len(parts)))
    rng.shuffle(order)
    fate = rng.random()
    if fate < 0.06:  # the total at once, without the steps
        asked, total = (), True
    elif fate < 0.3:  # some of the counts
        asked, total = tuple(order[: rng.randint(1, len(parts))]), False
    else:
        asked, total = tuple(order), rng.random() < 0.8
    numbered = rng if rng.random() < numbered_share else None
    hide: Hide = "nothing"
    if rng.random() < HIDDEN_SHARE:
        hide = "lists" if form == BARRED else "headers"
    return write(parts, form, asked, total=total, numbered=numbered, hide=hide)


def stream(seed: int, *, held_out: bool, numbered_share: float = 0.6) -> Iterator[CountingExample]:
    """Endless texts, either only those kept from training or only the others."""
    rng = random.Random(seed)
    while True:
        example = draw(rng, numbered_share=numbered_share)
        if example.held_out == held_out:
            yield example
